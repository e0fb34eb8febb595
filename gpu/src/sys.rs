//! The few things here that the safe crates cannot do.
#![allow(unsafe_code)] // taking over a descriptor that another process left open for us; fork; close_range; dup2

use std::{
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
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

/// Leaves a program that is executed from now on nothing but the standard streams: what is open now is
/// closed then.
pub fn close_on_exec() -> io::Result<()> {
    let first = libc::STDERR_FILENO + 1;
    // SAFETY: numbers only; no descriptor is closed or changes its owner, a flag of each is set.
    let result = unsafe {
        libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC)
    };
    if result == 0 {
        return Ok(());
    }
    // Linux before 5.11.
    for entry in std::fs::read_dir("/proc/self/fd")? {
        let number = entry?.file_name().to_str().and_then(|name| name.parse::<RawFd>().ok());
        let Some(fd) = number.filter(|fd| *fd >= first) else { continue };
        // SAFETY: as above.
        if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } == -1 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// For a copy of this process made by [`fork`] that never returns to whom it was copied from: closes what
/// it inherited, but for `kept`, standard output and standard errors. Standard input reads nothing.
pub fn close_all_but(kept: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let nothing = std::fs::File::open("/dev/null")?;
    let kept = kept.map(|fd| fd.as_raw_fd());
    if kept.is_some_and(|fd| fd <= libc::STDERR_FILENO) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: whoever owns standard input is in frames of the stack that are not returned to.
    if unsafe { libc::dup2(nothing.as_raw_fd(), libc::STDIN_FILENO) } == -1 {
        return Err(io::Error::last_os_error());
    }
    drop(nothing);
    let numbers = std::fs::read_dir("/proc/self/fd")?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<RawFd>().ok())
        .filter(|fd| *fd > libc::STDERR_FILENO && Some(*fd) != kept)
        .collect::<Vec<_>>();
    for fd in numbers {
        // SAFETY: the same; the folder's own descriptor is closed already, which does no harm.
        unsafe { libc::close(fd) };
    }
    Ok(())
}

/// Where [`fork`] returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fork {
    /// In the process that there was.
    Parent,
    /// In the new one.
    Child,
}

/// Makes a copy of this process. To be called while there is one thread: the copy may then do
/// everything that this one may.
pub fn fork() -> io::Result<Fork> {
    // Names of the threads are those of this process; more than one would leave locks behind.
    let threads = std::fs::read_dir("/proc/self/task")?.count();
    if threads != 1 {
        return Err(io::Error::other(format!("{threads} threads cannot be copied")));
    }
    // SAFETY: there is no other thread (checked just above) whose locks or half-made state the copy
    // could have.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Fork::Child),
        _ => Ok(Fork::Parent),
    }
}
