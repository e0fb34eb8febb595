#![allow(unsafe_code, reason = "an ioctl without a safe wrapper; it states why it is sound")]
//! dma-buf's ioctl.

use std::{io, os::fd::BorrowedFd};

use rustix::ioctl::{Setter, ioctl, opcode};

/// `DMA_BUF_IOCTL_SYNC` of `linux/dma-buf.h`.
const SYNC: u32 = opcode::write::<u64>(b'b', 0);
/// `DMA_BUF_SYNC_READ` and `DMA_BUF_SYNC_END`.
const READ: u64 = 1;
const END: u64 = 4;

/// A dmabuf over a sealed memfd, where this kernel makes some.
#[cfg(test)]
pub(super) fn udmabuf(memory: BorrowedFd<'_>, size: u64) -> Option<std::os::fd::OwnedFd> {
    use std::os::fd::{AsRawFd, FromRawFd};

    /// `struct udmabuf_create` of `linux/udmabuf.h`.
    #[repr(C)]
    struct Create {
        memory: u32,
        flags: u32,
        offset: u64,
        size: u64,
    }
    const CREATE: libc::c_ulong = 0x4018_7542;
    let device = std::fs::File::options().read(true).write(true).open("/dev/udmabuf").ok()?;
    let create = Create { memory: memory.as_raw_fd() as u32, flags: 1, offset: 0, size };
    // SAFETY: the request takes this structure and returns a new descriptor.
    let fd = unsafe { libc::ioctl(device.as_raw_fd(), CREATE, &raw const create) };
    assert!(fd >= 0, "{}", io::Error::last_os_error());
    // SAFETY: nobody else has it.
    Some(unsafe { std::os::fd::OwnedFd::from_raw_fd(fd) })
}

/// What the CPU reads from a dmabuf between the two calls is what devices wrote before.
pub(super) fn reads(dmabuf: BorrowedFd<'_>, begin: bool) -> io::Result<()> {
    let flags = if begin { READ } else { READ | END };
    // SAFETY: this request takes a number of 64 bits and writes nothing.
    let request = unsafe { Setter::<SYNC, u64>::new(flags) };
    // SAFETY: the request and its argument belong together; other kinds of files refuse it.
    unsafe { ioctl(dmabuf, request) }?;
    Ok(())
}
