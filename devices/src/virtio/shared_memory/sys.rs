//! A piece of the address space whose pages are replaced.
#![allow(unsafe_code, reason = "mappings at fixed places; each block states why it is sound")]

use std::{ffi::c_void, io, os::fd::BorrowedFd, ptr::NonNull};

use rustix::mm::{
    Advice, MapFlags, MremapFlags, ProtFlags, madvise, mmap, mmap_anonymous, mremap_fixed, munmap,
};

/// The area. Nothing in this process refers to its contents.
#[derive(Debug)]
pub(super) struct Area {
    start: NonNull<c_void>,
    size: usize,
}

// SAFETY: an address; the kernel orders changes of mappings.
unsafe impl Send for Area {}
// SAFETY: as above.
unsafe impl Sync for Area {}

const READ_WRITE: ProtFlags = ProtFlags::READ.union(ProtFlags::WRITE);
/// Memory without contents: takes nothing until it is written to.
const EMPTY: MapFlags = MapFlags::PRIVATE.union(MapFlags::NORESERVE);

impl Area {
    pub(super) fn new(size: usize) -> io::Result<Self> {
        // SAFETY: a new mapping at a place of the kernel's choice.
        let start = unsafe { mmap_anonymous(std::ptr::null_mut(), size, READ_WRITE, EMPTY) }?;
        let start = NonNull::new(start).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self { start, size })
    }

    pub(super) fn size(&self) -> usize {
        self.size
    }

    pub(super) fn address(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    fn at(&self, offset: usize, length: usize) -> io::Result<*mut c_void> {
        let end = offset.checked_add(length).filter(|end| *end <= self.size);
        end.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.start.as_ptr().wrapping_byte_add(offset))
    }

    /// Shows a piece of a file there. After an error the guest sees none of it.
    pub(super) fn show(
        &self,
        offset: usize,
        length: usize,
        file: BorrowedFd<'_>,
        file_offset: u64,
    ) -> io::Result<()> {
        let at = self.at(offset, length)?;
        let anywhere = std::ptr::null_mut();
        // SAFETY: a new mapping at a place of the kernel's choice.
        let new =
            unsafe { mmap(anywhere, length, READ_WRITE, MapFlags::SHARED, file, file_offset) }?;
        self.replace(at, length, new)
    }

    /// Shows nothing there any more. After an error what was there may still be seen.
    pub(super) fn hide(&self, offset: usize, length: usize) -> io::Result<()> {
        let at = self.at(offset, length)?;
        // SAFETY: a new mapping at a place of the kernel's choice.
        let new = unsafe { mmap_anonymous(std::ptr::null_mut(), length, READ_WRITE, EMPTY) }?;
        self.replace(at, length, new)
    }

    /// Gives back the memory of the empty pages. Files that are shown keep what they have.
    pub(super) fn discard(&self) -> io::Result<()> {
        // SAFETY: pages of this area only, to which nothing in this process refers.
        unsafe { madvise(self.start.as_ptr(), self.size, Advice::LinuxDontNeed) }?;
        Ok(())
    }

    /// Moves the mapping `new` over the pages at `at`.
    ///
    /// `mmap(MAP_FIXED)` would not do: the kernel takes out what was there before it asks the file,
    /// and when the file refuses, a hole stays in the guest's memory slot. The next mapping of this
    /// process may come to lie in it, and the guest would read and write that. Moving a mapping
    /// that exists hardly ever fails. If it does, empty memory fills the place.
    fn replace(&self, at: *mut c_void, length: usize, new: *mut c_void) -> io::Result<()> {
        // SAFETY: `new` was made by the caller and nobody else knows it; at `at` are pages of this
        // area, to which nothing in this process refers.
        let moved = unsafe { mremap_fixed(new, length, length, MremapFlags::MAYMOVE, at) };
        let Err(error) = moved else { return Ok(()) };
        if let Err(error) = Self::fill(at, length) {
            // Either nothing happened or another thread's memory is there by now, seen by the
            // guest. Nobody can tell, and both are too rare to be worth the risk.
            tracing::error!(%error, "a hole in the guest's shared memory cannot be filled");
            std::process::abort();
        }
        // SAFETY: it was not moved, and nobody refers to it.
        let _ = unsafe { munmap(new, length) };
        Err(error.into())
    }

    /// Fills a hole of this area with empty memory; refuses to replace anything.
    fn fill(at: *mut c_void, length: usize) -> io::Result<()> {
        let flags = EMPTY | MapFlags::FIXED_NOREPLACE;
        // SAFETY: replaces nothing.
        let filled = unsafe { mmap_anonymous(at, length, READ_WRITE, flags) }?;
        if filled == at {
            return Ok(());
        }
        // Kernels before 4.17 do not know the flag and take the place for a wish.
        // SAFETY: made above.
        unsafe { munmap(filled, length) }?;
        Err(io::ErrorKind::AlreadyExists.into())
    }

    /// Leaves a hole and fills it again.
    #[cfg(test)]
    pub(super) fn punch_and_fill(&self, offset: usize, length: usize) -> io::Result<()> {
        let at = self.at(offset, length)?;
        // SAFETY: pages of this area only.
        unsafe { munmap(at, length) }?;
        Self::fill(at, length)
    }

    /// Tries to fill what is no hole.
    #[cfg(test)]
    pub(super) fn fill_again(&self, offset: usize, length: usize) -> io::Result<()> {
        Self::fill(self.at(offset, length)?, length)
    }

    #[cfg(test)]
    pub(super) fn read(&self, offset: usize) -> u8 {
        let at = self.at(offset, 1).unwrap().cast::<u8>();
        // SAFETY: inside the area, which is readable everywhere.
        unsafe { at.read_volatile() }
    }

    #[cfg(test)]
    pub(super) fn write(&self, offset: usize, value: u8) {
        let at = self.at(offset, 1).unwrap().cast::<u8>();
        // SAFETY: inside the area, which is writable everywhere.
        unsafe { at.write_volatile(value) }
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: this area only, and nobody has it any more: memory slots keep it alive.
        let _ = unsafe { munmap(self.start.as_ptr(), self.size) };
    }
}
