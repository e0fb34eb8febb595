//! A shared memory region (VIRTIO 1.3 §2.10): a window of the guest's address space into which the
//! device maps memory of the host, and out of which it takes it again.
//!
//! The whole window is one piece of this process' address space and one memory slot of the guest, so
//! mapping costs no change of slots. Where nothing is mapped there is ordinary memory without
//! contents: a driver that reads or writes there gets neither a fault nor anything of the host's. (A
//! fault would end the machine, and programs of the guest still look where a back end that died had
//! mapped something.) What a guest writes there takes memory, like its RAM and up to the window's size,
//! until something is mapped there or everything is taken out.

mod sys;

use std::{
    collections::BTreeMap,
    io,
    os::fd::BorrowedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

const PAGE: u64 = 4096;

/// `HUGETLBFS_MAGIC` of `linux/magic.h`.
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

/// Mappings at once at most; the kernel's own limit for a process is 65,530.
const MAX_MAPPINGS: usize = 16_384;

/// Smallest and largest window: registers of more than this are hard to place.
pub const SIZES: std::ops::RangeInclusive<u64> = (1 << 20)..=(1 << 36);

/// Why something cannot be mapped.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// The place is not inside the window or not made of whole pages.
    #[error("{length:#x} bytes at {offset:#x} are not whole pages of the window")]
    Place {
        /// Offset in the window.
        offset: u64,
        /// Bytes.
        length: u64,
    },
    /// Something is there already.
    #[error("the window is in use at {0:#x}")]
    InUse(u64),
    /// Too many pieces.
    #[error("more than {MAX_MAPPINGS} pieces of memory are mapped already")]
    TooMany,
    /// The file ends before the piece does.
    #[error("the file has {size:#x} bytes, {end:#x} are to be mapped")]
    Short {
        /// Bytes of the file.
        size: u64,
        /// Where the piece ends.
        end: u64,
    },
    /// The file is of huge pages: more of the window would be replaced than was asked for.
    #[error("memory of huge pages (hugetlbfs) cannot be shown in the window")]
    HugePages,
    /// The system refused.
    #[error("the memory cannot be mapped")]
    System(#[source] io::Error),
}

/// The window. Lives as long as the guest may look into it.
#[derive(Debug)]
pub struct SharedMemory {
    area: sys::Area,
    mapped: Mutex<BTreeMap<u64, u64>>,
}

impl SharedMemory {
    /// An empty window; `size` is a power of two within [`SIZES`].
    pub fn new(size: u64) -> io::Result<Arc<Self>> {
        if !size.is_power_of_two() || !SIZES.contains(&size) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let area = sys::Area::new(size as usize)?;
        Ok(Arc::new(Self { area, mapped: Mutex::default() }))
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.area.size() as u64
    }

    /// Where it is in this process, for the guest's memory slot. Page-aligned; stays for ever.
    pub fn host_address(&self) -> u64 {
        self.area.address()
    }

    fn mapped(&self) -> MutexGuard<'_, BTreeMap<u64, u64>> {
        self.mapped.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check(&self, offset: u64, length: u64) -> Result<(), MapError> {
        let inside = offset.checked_add(length).is_some_and(|end| end <= self.size());
        let whole = offset.is_multiple_of(PAGE) && length.is_multiple_of(PAGE) && length > 0;
        if inside && whole { Ok(()) } else { Err(MapError::Place { offset, length }) }
    }

    /// Shows `length` bytes of a file, from `file_offset` on, at `offset` of the window.
    pub fn map(
        &self,
        offset: u64,
        length: u64,
        file: BorrowedFd<'_>,
        file_offset: u64,
    ) -> Result<(), MapError> {
        self.check(offset, length)?;
        let end = offset + length;
        let mut mapped = self.mapped();
        if let Some((at, _)) =
            mapped.range(..end).next_back().filter(|(at, len)| **at + **len > offset)
        {
            return Err(MapError::InUse(*at));
        }
        if mapped.len() >= MAX_MAPPINGS {
            return Err(MapError::TooMany);
        }
        let system = |error: rustix::io::Errno| MapError::System(error.into());
        // The kernel rounds such lengths up to the huge page. (Not by the block size of the file:
        // ordinary shared memory states that of a huge page, too, where the host merges pages.)
        let kind = rustix::fs::fstatfs(file).map_err(system)?.f_type;
        if kind as u64 == HUGETLBFS_MAGIC {
            return Err(MapError::HugePages);
        }
        // Behind the end of a file there is no memory: a guest that looked there would stop.
        let size = rustix::fs::seek(file, rustix::fs::SeekFrom::End(0)).map_err(system)?;
        let file_end = file_offset.checked_add(length).ok_or(MapError::Place { offset, length })?;
        if file_end > size {
            return Err(MapError::Short { size, end: file_end });
        }
        self.area
            .show(offset as usize, length as usize, file, file_offset)
            .map_err(MapError::System)?;
        mapped.insert(offset, length);
        Ok(())
    }

    /// Takes out what was mapped at `offset`; `false` if nothing was.
    pub fn unmap(&self, offset: u64) -> bool {
        let mut mapped = self.mapped();
        let Some(length) = mapped.remove(&offset) else { return false };
        self.clear(offset, length);
        true
    }

    /// What the guest sees there.
    #[cfg(test)]
    pub(crate) fn read(&self, offset: u64) -> u8 {
        self.area.read(offset as usize)
    }

    /// Takes out everything, what the guest wrote where nothing was mapped too.
    pub fn unmap_all(&self) {
        let mut mapped = self.mapped();
        for (offset, length) in std::mem::take(&mut *mapped) {
            self.clear(offset, length);
        }
        if let Err(error) = self.area.discard() {
            tracing::warn!(%error, "what the guest wrote to its shared memory takes memory");
        }
    }

    fn clear(&self, offset: u64, length: u64) {
        if let Err(error) = self.area.hide(offset as usize, length as usize) {
            tracing::error!(%error, "shared memory stays mapped");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        os::{fd::AsFd, unix::fs::FileExt},
    };

    use super::*;

    const SIZE: u64 = 1 << 20;

    fn file(length: u64, fill: u8) -> File {
        let fd = rustix::fs::memfd_create("window", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(fd);
        file.write_all_at(&vec![fill; length as usize], 0).unwrap();
        file
    }

    fn seen(window: &SharedMemory, offset: u64) -> u8 {
        window.read(offset)
    }

    #[test]
    fn files_appear_and_vanish() {
        let window = SharedMemory::new(SIZE).unwrap();
        let (one, two) = (file(0x3000, 1), file(0x1000, 2));
        assert_eq!(seen(&window, 0x5000), 0);
        window.map(0x4000, 0x2000, one.as_fd(), 0x1000).unwrap();
        window.map(0x6000, 0x1000, two.as_fd(), 0).unwrap();
        let around = [0x3fff, 0x4000, 0x5fff, 0x6000, 0x6fff, 0x7000];
        assert_eq!(around.map(|at| seen(&window, at)), [0, 1, 1, 2, 2, 0]);
        // Both ways.
        one.write_all_at(&[9], 0x1000).unwrap();
        assert_eq!(seen(&window, 0x4000), 9);
        window.area.write(0x6001, 7);
        let mut byte = [0];
        two.read_exact_at(&mut byte, 1).unwrap();
        assert_eq!(byte, [7]);
        assert!(window.unmap(0x4000));
        assert!(!window.unmap(0x4000), "once");
        assert!(!window.unmap(0x5000), "only as it was mapped");
        assert_eq!(around.map(|at| seen(&window, at)), [0, 0, 0, 2, 2, 0]);
        // What the guest writes where nothing is mapped stays out of the file, and is gone later.
        window.area.write(0x4000, 5);
        one.read_exact_at(&mut byte, 0x1000).unwrap();
        assert_eq!(byte, [9]);
        window.map(0x4000, 0x1000, two.as_fd(), 0).unwrap();
        window.area.write(0x9000, 8);
        window.unmap_all();
        assert_eq!(around.map(|at| seen(&window, at)), [0; 6]);
        // Nor does what was written beside it take memory any more.
        assert_eq!(seen(&window, 0x9000), 0);
    }

    #[test]
    fn impossible_places_are_refused() {
        let window = SharedMemory::new(SIZE).unwrap();
        let file = file(0x4000, 1);
        for (offset, length) in
            [(1, 0x1000), (0, 1), (0, 0), (SIZE, 0x1000), (SIZE - 0x1000, 0x2000), (!0xfff, 0x1000)]
        {
            let refused = window.map(offset, length, file.as_fd(), 0);
            assert!(matches!(refused, Err(MapError::Place { .. })), "{offset:#x}, {length:#x}");
        }
        for (offset, file_offset) in [(0, 0x1000), (0, !0xfff)] {
            window.map(offset, 0x4000, file.as_fd(), file_offset).unwrap_err();
        }
        window.map(0x8000, 0x2000, file.as_fd(), 0).unwrap();
        for offset in [0x7000, 0x8000, 0x9000] {
            let refused = window.map(offset, 0x2000, file.as_fd(), 0);
            assert!(matches!(refused, Err(MapError::InUse(0x8000))), "{offset:#x}");
        }
        window.map(0x6000, 0x2000, file.as_fd(), 0).unwrap();
        window.map(0xa000, 0x2000, file.as_fd(), 0).unwrap();
        for size in [0, 0x1000, 3 << 20, 1 << 40] {
            SharedMemory::new(size).unwrap_err();
        }
    }

    #[test]
    fn a_file_that_cannot_be_mapped_leaves_no_hole() {
        use rustix::fs::{MemfdFlags, SealFlags};

        let window = SharedMemory::new(SIZE).unwrap();
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let sealed = File::from(rustix::fs::memfd_create("sealed", flags).unwrap());
        sealed.write_all_at(&[1; 0x4000], 0).unwrap();
        // Its own `mmap` refuses to share it for writing.
        rustix::fs::fcntl_add_seals(&sealed, SealFlags::WRITE).unwrap();
        let pages = [0x8000, 0x9000, 0xa000, 0xb000];
        pages.iter().for_each(|page| window.area.write(*page as usize, 5));
        for _ in 0..2 {
            let refused = window.map(0x8000, 0x4000, sealed.as_fd(), 0);
            assert!(matches!(refused, Err(MapError::System(_))), "{refused:?}");
            assert_eq!(pages.map(|page| seen(&window, page)), [5; 4]);
            window.area.fill_again(0x8000, 0x4000).unwrap_err();
        }
        // The place is free.
        assert!(!window.unmap(0x8000));
        window.map(0x8000, 0x4000, file(0x4000, 2).as_fd(), 0).unwrap();
        assert_eq!(pages.map(|page| seen(&window, page)), [2; 4]);
    }

    #[test]
    fn holes_are_filled_and_nothing_else_is_replaced() {
        let window = SharedMemory::new(SIZE).unwrap();
        window.area.write(0x5000, 5);
        window.area.write(0x6000, 6);
        let full = window.area.fill_again(0x5000, 0x1000).unwrap_err();
        assert_eq!(full.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(seen(&window, 0x5000), 5);
        window.area.punch_and_fill(0x5000, 0x1000).unwrap();
        assert_eq!([0x5000, 0x6000].map(|page| seen(&window, page)), [0, 6]);
    }

    #[test]
    fn memory_of_huge_pages_is_refused() {
        use rustix::fs::MemfdFlags;

        let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB;
        let Ok(huge) = rustix::fs::memfd_create("huge", flags) else {
            eprintln!("SKIPPED: no hugetlbfs here");
            return;
        };
        rustix::fs::ftruncate(&huge, 2 << 20).unwrap();
        let window = SharedMemory::new(SIZE).unwrap();
        let refused = window.map(0, 0x1000, huge.as_fd(), 0);
        assert!(matches!(refused, Err(MapError::HugePages)), "{refused:?}");
        assert_eq!(seen(&window, 0), 0);
    }
}
