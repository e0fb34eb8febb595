//! Giving guest pages back to the host.

use std::{os::fd::AsFd, sync::Arc};

use rustix::fs::{FallocateFlags, fallocate, fstatfs};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use super::PAGE;
use crate::GuestMemory;

/// `f_type` of a hugetlbfs file (`linux/magic.h`).
const HUGETLBFS_MAGIC: i64 = 0x958458f6;

/// Punches holes into the files behind guest memory.
#[derive(Debug)]
pub struct PageDiscarder {
    memory: Arc<GuestMemory>,
    /// The host's page size, which is larger than the guest's on hugetlbfs.
    granule: u64,
    failed: bool,
}

impl PageDiscarder {
    /// For `memory`, whose regions that lie in files can give pages back. The others keep theirs.
    pub fn new(memory: Arc<GuestMemory>) -> Self {
        let file = memory.iter().find_map(|region| region.file_offset());
        let granule = file.map_or(PAGE, |file| match fstatfs(file.file().as_fd()) {
            Ok(info) if info.f_type == HUGETLBFS_MAGIC => (info.f_bsize as u64).max(PAGE),
            _ => PAGE,
        });
        Self { memory, granule, failed: false }
    }

    /// Discards what lies in guest memory of `start..start + length` (guest physical, bytes).
    /// Whole host pages only. Returns the bytes discarded.
    pub fn discard(&mut self, start: u64, length: u64) -> u64 {
        let end = start.saturating_add(length);
        let mut discarded = 0;
        for region in self.memory.iter() {
            let first = region.start_addr().raw_value();
            let (from, to) = (start.max(first), end.min(first + region.len()));
            let Some(file) = region.file_offset().filter(|_| from < to) else { continue };
            // Regions begin at multiples of the host's page size.
            let from = MemoryRegionAddress(from - first).0.next_multiple_of(self.granule);
            let to = (to - first) / self.granule * self.granule;
            if from >= to {
                continue;
            }
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            match fallocate(file.file(), flags, file.start() + from, to - from) {
                Ok(()) => discarded += to - from,
                Err(error) => {
                    if !std::mem::replace(&mut self.failed, true) {
                        tracing::warn!(%error, "guest pages cannot be given back to the host");
                    }
                }
            }
        }
        discarded
    }

    /// Discards pages by number, adjacent ones at once. Sorts them.
    pub fn discard_pages(&mut self, pages: &mut [u32]) -> u64 {
        pages.sort_unstable();
        let runs = pages.chunk_by(|a, b| b - a <= 1);
        let mut discarded = 0;
        for run in runs {
            if let [first, .., last] | [first @ last] = run {
                let (first, last) = (u64::from(*first), u64::from(*last));
                discarded += self.discard(first * PAGE, (last - first + 1) * PAGE);
            }
        }
        discarded
    }
}
