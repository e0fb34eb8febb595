//! The guest memory behind a resource: a list of pieces, read as if it were one.

use gpu_protocol::virtio::{BackingEntry, Refusal};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileSlice};

use crate::GuestMemory;

/// Pieces of guest memory in order. Every piece was inside guest memory when it was attached; reads
/// check again, because the memory table may have been replaced.
#[derive(Debug)]
pub struct Backing {
    entries: Vec<BackingEntry>,
    /// Offset just behind each entry.
    ends: Vec<u64>,
}

impl Backing {
    /// What one entry costs this process, for the limit on memory.
    pub const ENTRY_BYTES: u64 = (size_of::<BackingEntry>() + size_of::<u64>()) as u64;

    /// Checks the pieces against guest memory.
    pub fn new(entries: Vec<BackingEntry>, memory: &GuestMemory) -> Result<Self, Refusal> {
        let mut ends = Vec::with_capacity(entries.len());
        let mut end = 0_u64;
        for entry in &entries {
            if !memory.check_range(GuestAddress(entry.address), entry.length as usize) {
                return Err(Refusal::InvalidParameter);
            }
            // At most 16384 pieces of 4 GiB each.
            end += u64::from(entry.length);
            ends.push(end);
        }
        Ok(Self { entries, ends })
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

    /// Bytes of this process that the list occupies.
    pub fn cost(&self) -> u64 {
        self.entries.len() as u64 * Self::ENTRY_BYTES
    }

    /// Fills `target` from `offset`; the guest may be writing at the same time.
    pub fn read(
        &self,
        memory: &GuestMemory,
        offset: u64,
        mut target: &mut [u8],
    ) -> Result<(), Refusal> {
        self.for_pieces(offset, target.len(), |address, count| {
            let (now, later) = std::mem::take(&mut target).split_at_mut(count);
            target = later;
            memory.read_slice(now, address).map_err(|_| Refusal::InvalidParameter)
        })
    }

    /// [`read`](Self::read) to memory that others may read at the same time.
    pub fn copy_to(
        &self,
        memory: &GuestMemory,
        offset: u64,
        target: &VolatileSlice<'_>,
    ) -> Result<(), Refusal> {
        let mut done = 0;
        self.for_pieces(offset, target.len(), |address, count| {
            for slice in memory.get_slices(address, count) {
                let slice = slice.map_err(|_| Refusal::InvalidParameter)?;
                let now = target.subslice(done, slice.len());
                slice.copy_to_volatile_slice(now.map_err(|_| Refusal::InvalidParameter)?);
                done += slice.len();
            }
            Ok(())
        })
    }

    /// Calls `each` with address and length of the pieces that make up `length` bytes at `offset`.
    fn for_pieces(
        &self,
        mut offset: u64,
        mut length: usize,
        mut each: impl FnMut(GuestAddress, usize) -> Result<(), Refusal>,
    ) -> Result<(), Refusal> {
        let mut index = self.ends.partition_point(|end| *end <= offset);
        while length > 0 {
            let (Some(entry), Some(end)) = (self.entries.get(index), self.ends.get(index)) else {
                return Err(Refusal::InvalidParameter);
            };
            let left = end - offset;
            let count = length.min(usize::try_from(left).unwrap_or(usize::MAX));
            let address = entry.address + (u64::from(entry.length) - left);
            each(GuestAddress(address), count)?;
            length -= count;
            offset += count as u64;
            index += 1;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scattered_pieces_read_as_one() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0x1000), 0x3000)]).unwrap();
        let bytes: Vec<u8> = (0..0x3000_u32).map(|i| (i % 251) as u8).collect();
        memory.write_slice(&bytes, GuestAddress(0x1000)).unwrap();
        let piece = |address, length| BackingEntry { address, length };
        let entries = vec![piece(0x2000, 10), piece(0x1000, 0), piece(0x1005, 3), piece(0x3000, 7)];
        let backing = Backing::new(entries, &memory).unwrap();
        assert_eq!(backing.len(), 20);
        let all = [&bytes[0x1000..0x100a], &bytes[5..8], &bytes[0x2000..0x2007]].concat();
        for start in 0..20 {
            for end in start..=20 {
                let mut seen = vec![0; end - start];
                backing.read(&memory, start as u64, &mut seen).unwrap();
                assert_eq!(seen, all[start..end]);
                seen.fill(0);
                let target = VolatileSlice::from(&mut seen[..]);
                backing.copy_to(&memory, start as u64, &target).unwrap();
                assert_eq!(seen, all[start..end]);
            }
        }
        assert_eq!(backing.read(&memory, 19, &mut [0; 2]), Err(Refusal::InvalidParameter));
        assert_eq!(backing.read(&memory, u64::MAX, &mut [0]), Err(Refusal::InvalidParameter));
        for bad in [piece(0x3fff, 2), piece(0, 1), piece(u64::MAX, 2)] {
            assert!(Backing::new(vec![bad], &memory).is_err());
        }
    }
}
