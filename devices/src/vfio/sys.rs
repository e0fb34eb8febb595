//! Mappings of a device's registers, and of the guest's memory for the device.
#![allow(unsafe_code, reason = "mappings; each block states why it is sound")]

use std::{
    ffi::c_void,
    io,
    os::fd::{AsRawFd, BorrowedFd},
    ptr::NonNull,
};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use vfio_ioctls::{VfioContainer, VfioDevice};

use crate::GuestMemory;

/// A part of a device's registers, mapped for the guest. Nothing in this process refers to what is in
/// it.
#[derive(Debug)]
pub struct DeviceMemory {
    start: NonNull<c_void>,
    size: usize,
}

// SAFETY: an address, behind which is memory for the guest only.
unsafe impl Send for DeviceMemory {}
// SAFETY: as above.
unsafe impl Sync for DeviceMemory {}

impl DeviceMemory {
    /// Maps `size` bytes of a descriptor from `offset` on; both are multiples of the page size.
    pub(super) fn new(fd: BorrowedFd<'_>, offset: u64, size: usize) -> io::Result<Self> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at a place of the kernel's choice.
        let start =
            unsafe { mmap(std::ptr::null_mut(), size, access, MapFlags::SHARED, fd, offset) }?;
        let start = NonNull::new(start).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self { start, size })
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.size as u64
    }

    /// Where it is in this process, for the guest's memory slot; the same as long as this lives.
    pub fn host_address(&self) -> u64 {
        self.start.as_ptr() as u64
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and nobody has it any more: memory slots keep it alive.
        let _ = unsafe { munmap(self.start.as_ptr(), self.size) };
    }
}

/// Lets the devices of a container reach the guest's memory, at the guest's addresses.
pub(super) fn map_guest_memory(
    container: &VfioContainer,
    memory: &GuestMemory,
) -> vfio_ioctls::Result<()> {
    // SAFETY: guest memory is accessed as volatile only, like by the guest itself. It stays mapped
    // while the container lives: `HostDevice` has a clone of `memory` beside the container.
    unsafe { container.vfio_map_guest_memory(memory) }
}

/// The descriptor of an open device.
pub(super) fn descriptor(device: &VfioDevice) -> BorrowedFd<'_> {
    // SAFETY: the device owns the descriptor and keeps it open as long as it is borrowed.
    unsafe { BorrowedFd::borrow_raw(device.as_raw_fd()) }
}
