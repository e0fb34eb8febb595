//! Socket options, scheduling and the allocator, for which there is no safe wrapper yet.
#![allow(
    unsafe_code,
    reason = "setsockopt(TCP_NOTSENT_LOWAT), sched_setattr and mallopt have no safe wrappers in rustix"
)]

use std::{
    ffi::c_int,
    io,
    os::fd::{AsFd, AsRawFd},
};

/// Bounds the bytes the kernel takes beyond what it can send now (tcp(7) `TCP_NOTSENT_LOWAT`), so
/// that what is sent is fresh when the network has room.
pub(crate) fn set_tcp_notsent_lowat(socket: impl AsFd, bytes: c_int) -> io::Result<()> {
    let length = size_of::<c_int>() as libc::socklen_t;
    // SAFETY: the descriptor is open for the whole call, and the value is a live c_int of exactly
    // `length` bytes.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_NOTSENT_LOWAT,
            (&raw const bytes).cast(),
            length,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Has glibc's allocator give memory back when it is free. Otherwise what threads needed at their worst stays
/// with them, and with others after their end: some 10 MiB for the codecs of each viewer of a film. To be called
/// by a program once, before it starts threads; does nothing with another C library.
pub fn give_free_memory_back() {
    /// Free memory at the end of a heap, in bytes, that is kept; a fixed one keeps the size from which on memory
    /// is mapped for itself (128 KiB) fixed, too.
    #[cfg(target_env = "gnu")]
    const KEPT: libc::c_int = 1 << 20;
    // SAFETY: sets a number of the allocator's, under its lock.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT);
    }
}

/// Asks the scheduler for turns of 0.1 ms for the calling thread (sched_setattr(2), Linux 6.12): its
/// work is short, and gets to a busy processor sooner. For the thread that plays sound; the server's
/// own does so itself. Needs no privilege; older kernels do nothing.
///
/// # Errors
///
/// When the system refuses, and all stays as it is.
pub fn ask_for_short_turns() -> io::Result<()> {
    /// `struct sched_attr`, first version.
    #[repr(C)]
    #[derive(Default)]
    struct Attributes {
        size: u32,
        policy: u32,
        flags: u64,
        nice: i32,
        priority: u32,
        runtime: u64,
        deadline: u64,
        period: u64,
    }
    let mut attributes = Attributes::default();
    let size = size_of::<Attributes>() as u32;
    // SAFETY: the kernel writes at most `size` bytes, which is what there is; 0 is this thread.
    let got = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0) };
    if got < 0 {
        return Err(io::Error::last_os_error());
    }
    (attributes.size, attributes.runtime) = (size, 100_000);
    // SAFETY: the kernel reads `size` bytes of a structure that lives through the call.
    let set = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    if set < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
