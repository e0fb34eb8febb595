//! A piece of the address space whose pages are replaced.
#![allow(unsafe_code, reason = "mappings at fixed places; each block states why it is sound")]

use std::{ffi::c_void, io, os::fd::BorrowedFd, ptr::NonNull};

use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

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

    /// Shows a piece of a file there.
    pub(super) fn show(
        &self,
        offset: usize,
        length: usize,
        file: BorrowedFd<'_>,
        file_offset: u64,
    ) -> io::Result<()> {
        let at = self.at(offset, length)?;
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        // SAFETY: replaces pages of this area only, to which nothing in this process refers.
        unsafe { mmap(at, length, READ_WRITE, flags, file, file_offset) }?;
        Ok(())
    }

    /// Shows nothing there any more.
    pub(super) fn hide(&self, offset: usize, length: usize) -> io::Result<()> {
        let at = self.at(offset, length)?;
        // SAFETY: as in `show`.
        unsafe { mmap_anonymous(at, length, READ_WRITE, EMPTY | MapFlags::FIXED) }?;
        Ok(())
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
