//! The guest memory behind a resource.

use gpu_protocol::{
    pieces::Pieces,
    virtio::{BackingEntry, Refusal},
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileSlice};

use crate::GuestMemory;

/// Pieces that were all inside guest memory when they were attached; reads check again, because the
/// memory table may have been replaced.
#[derive(Debug)]
pub struct Backing(Pieces);

impl Backing {
    /// Checks the pieces against guest memory.
    pub fn new(entries: Vec<BackingEntry>, memory: &GuestMemory) -> Result<Self, Refusal> {
        let is_there = |entry: &BackingEntry| {
            memory.check_range(GuestAddress(entry.address), entry.length as usize)
        };
        if !entries.iter().all(is_there) {
            return Err(Refusal::InvalidParameter);
        }
        Ok(Self(Pieces::new(entries)))
    }

    /// The pieces.
    pub fn pieces(&self) -> &Pieces {
        &self.0
    }

    /// Bytes of this process that the list occupies.
    pub fn cost(&self) -> u64 {
        self.0.entries().len() as u64 * Pieces::ENTRY_BYTES
    }

    /// Fills `target` from `offset`; the guest may be writing at the same time.
    pub fn read(
        &self,
        memory: &GuestMemory,
        offset: u64,
        target: &mut [u8],
    ) -> Result<(), Refusal> {
        let read = self.0.read(offset, target, |address, target| {
            memory.read_slice(target, GuestAddress(address)).ok()
        });
        read.ok_or(Refusal::InvalidParameter)
    }

    /// [`read`](Self::read) to memory that others may read at the same time.
    pub fn copy_to(
        &self,
        memory: &GuestMemory,
        offset: u64,
        target: &VolatileSlice<'_>,
    ) -> Result<(), Refusal> {
        let mut done = 0;
        let copied = self.0.for_each(offset, target.len(), |address, count| {
            for slice in memory.get_slices(GuestAddress(address), count) {
                let slice = slice.ok()?;
                slice.copy_to_volatile_slice(target.subslice(done, slice.len()).ok()?);
                done += slice.len();
            }
            Some(())
        });
        copied.ok_or(Refusal::InvalidParameter)
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
        assert_eq!(backing.pieces().len(), 20);
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
