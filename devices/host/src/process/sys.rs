#![allow(unsafe_code, reason = "fork, and work between fork and exec; each block states why")]
//! The system calls of starting processes.

use std::{
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd, RawFd},
        unix::process::CommandExt,
    },
    process::Command,
};

/// Lets `command`'s process have `fd` as number `number`.
pub(super) fn give<'a>(
    command: &'a mut Command,
    fd: &OwnedFd,
    number: RawFd,
) -> io::Result<&'a mut Command> {
    // Not the number itself, which would be closed on exec.
    let fd = rustix::io::fcntl_dupfd_cloexec(fd.as_fd(), number + 1)?;
    let place = move || {
        // SAFETY: a system call on two numbers. What may have been open under `number` in the new
        // process nobody there knows of.
        if unsafe { libc::dup2(fd.as_raw_fd(), number) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    };
    // SAFETY: the closure runs between fork and exec; it makes one system call, which is
    // async-signal-safe, and allocates nothing.
    Ok(unsafe { command.pre_exec(place) })
}

/// Which side of a fork this is.
pub(super) enum Fork {
    Parent(libc::pid_t),
    Child,
}

/// Forks a process that has one thread.
pub(super) fn fork() -> io::Result<Fork> {
    let threads = std::fs::read_dir("/proc/self/task").map_or(1, Iterator::count);
    if threads > 1 {
        return Err(io::Error::other("the launcher has to be forked before any thread starts"));
    }
    // SAFETY: there is no other thread (checked where /proc is there) that could hold a lock, so the
    // child may go on like any program.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Fork::Child),
        pid => Ok(Fork::Parent(pid)),
    }
}

/// Makes a bare process of the forked one: no signals, no descriptors but standard error and `keep`,
/// which becomes number 3.
pub(super) fn strip(keep: OwnedFd) -> io::Result<OwnedFd> {
    use std::os::fd::FromRawFd;
    let null = std::fs::File::options().read(true).write(true).open("/dev/null")?;
    for number in [0, 1] {
        // SAFETY: a system call on two numbers; nothing in this process uses the old ones.
        if unsafe { libc::dup2(null.as_raw_fd(), number) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    // SAFETY: as above.
    if unsafe { libc::dup3(keep.as_raw_fd(), 3, libc::O_CLOEXEC) } < 0 && keep.as_raw_fd() != 3 {
        return Err(io::Error::last_os_error());
    }
    // The numbers are not theirs any more.
    std::mem::forget((keep, null));
    // SAFETY: everything above 3 belongs to objects of the code before the fork, which does not run
    // in this process again. Without the call (before Linux 5.9) they only stay open.
    unsafe { libc::close_range(4, libc::c_uint::MAX, 0) };
    // SAFETY: a signal set is plain data; sigfillset initialises it.
    let mut all: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `all` is writable.
    unsafe { libc::sigfillset(&raw mut all) };
    // SAFETY: `all` is initialised. Started programs get an empty mask from the standard library.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, std::ptr::null_mut()) };
    // SAFETY: number 3 was made above and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(3) })
}

/// Ends the process without running anything that was meant for the other side of the fork.
pub(super) fn end() -> ! {
    // SAFETY: never returns, touches no memory.
    unsafe { libc::_exit(0) }
}
