//! The one thing here that the safe crates cannot do.
#![allow(unsafe_code)] // taking over a descriptor that another process left open for us

use std::{
    io,
    os::{
        fd::{FromRawFd, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
};

/// Takes over the connected Unix stream socket that the parent process passed as number `fd`.
/// Call once, before this process opens descriptors of its own.
pub fn inherited_socket(fd: RawFd) -> io::Result<UnixStream> {
    if std::fs::symlink_metadata(format!("/proc/self/fd/{fd}")).is_err() {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: the number comes from the command line and names an open descriptor (checked just
    // above) that nothing in this process owns yet, as the contract of this function says.
    let owned = unsafe { OwnedFd::from_raw_fd(fd) };
    let is_unix = rustix::net::sockopt::socket_domain(&owned)? == rustix::net::AddressFamily::UNIX;
    let is_stream = rustix::net::sockopt::socket_type(&owned)? == rustix::net::SocketType::STREAM;
    if !is_unix || !is_stream {
        return Err(io::Error::from_raw_os_error(libc::ENOTSOCK));
    }
    rustix::io::fcntl_setfd(&owned, rustix::io::FdFlags::CLOEXEC)?;
    Ok(UnixStream::from(owned))
}
