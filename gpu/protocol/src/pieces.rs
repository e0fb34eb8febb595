//! The guest memory behind a resource (VIRTIO 1.3 §5.7.6.8, `virtio_gpu_mem_entry`).

use alloc::vec::Vec;

use crate::virtio::BackingEntry;

/// Pieces of guest memory in order, to be read as if they were one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pieces {
    entries: Vec<BackingEntry>,
    /// Offset just behind each entry.
    ends: Vec<u64>,
}

impl Pieces {
    /// What one entry costs a process.
    pub const ENTRY_BYTES: u64 = (size_of::<BackingEntry>() + size_of::<u64>()) as u64;

    /// These pieces. Nothing is known of where they lie.
    pub fn new(entries: Vec<BackingEntry>) -> Self {
        let mut end = 0_u64;
        let behind = |entry: &BackingEntry| {
            // Messages and commands have far too few pieces of 4 GiB each for more than 64 bits.
            end = end.saturating_add(u64::from(entry.length));
            end
        };
        let ends = entries.iter().map(behind).collect();
        Self { entries, ends }
    }

    /// The pieces.
    pub fn entries(&self) -> &[BackingEntry] {
        &self.entries
    }

    /// Bytes in all pieces together.
    pub fn len(&self) -> u64 {
        self.ends.last().copied().unwrap_or(0)
    }

    /// Whether there is no byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Calls `each` with address and length of what makes up `length` bytes at `offset`; `None` if
    /// they are not all there, or as soon as `each` returns that.
    pub fn for_each(
        &self,
        mut offset: u64,
        mut length: usize,
        mut each: impl FnMut(u64, usize) -> Option<()>,
    ) -> Option<()> {
        let mut index = self.ends.partition_point(|end| *end <= offset);
        while length > 0 {
            let (entry, end) = (self.entries.get(index)?, self.ends.get(index)?);
            let left = end - offset;
            let count = length.min(usize::try_from(left).unwrap_or(usize::MAX));
            each(entry.address.checked_add(u64::from(entry.length) - left)?, count)?;
            length -= count;
            offset += count as u64;
            index += 1;
        }
        Some(())
    }

    /// Fills `target` from `offset` on; `read` copies from an address, and says whether it could.
    pub fn read(
        &self,
        offset: u64,
        mut target: &mut [u8],
        mut read: impl FnMut(u64, &mut [u8]) -> Option<()>,
    ) -> Option<()> {
        self.for_each(offset, target.len(), |address, count| {
            read(address, target.split_off_mut(..count)?)
        })
    }
}

#[cfg(test)]
mod tests {
    use alloc::{vec, vec::Vec};

    use super::*;

    #[test]
    fn scattered_pieces_are_one() {
        let piece = |address, length| BackingEntry { address, length };
        let pieces = Pieces::new(vec![piece(100, 10), piece(7, 0), piece(5, 3), piece(200, 7)]);
        assert_eq!(pieces.len(), 20);
        let all: Vec<u64> = (100..110).chain(5..8).chain(200..207).collect();
        for start in 0..20 {
            for end in start..=20 {
                let mut seen = Vec::new();
                let whole = pieces.for_each(start as u64, end - start, |address, count| {
                    seen.extend(address..address + count as u64);
                    Some(())
                });
                assert_eq!((whole, &seen[..]), (Some(()), &all[start..end]));
            }
        }
        let whole =
            |pieces: &Pieces, offset, length| pieces.for_each(offset, length, |_, _| Some(()));
        assert_eq!(whole(&pieces, 19, 2), None);
        assert_eq!(whole(&pieces, u64::MAX, 1), None);
        assert_eq!(whole(&Pieces::new(vec![piece(u64::MAX, 9)]), 1, 1), None);
        assert_eq!(pieces.for_each(0, 20, |address, _| (address > 5).then_some(())), None);
    }
}
