//! Socket options no safe wrapper has yet.
#![allow(unsafe_code, reason = "setsockopt(TCP_NOTSENT_LOWAT) has no safe wrapper in rustix")]

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
