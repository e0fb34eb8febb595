#![allow(unsafe_code, reason = "unshare and the environment; each block states why it is sound")]
//! The system calls of the sandbox without a safe wrapper.

use std::{io, path::Path};

use rustix::thread::UnshareFlags;

/// Enters new namespaces.
pub(super) fn unshare(flags: UnshareFlags) -> io::Result<()> {
    // SAFETY: unsafe because of CLONE_FILES, which would give this thread descriptors of its own;
    // callers pass flags of namespaces only.
    unsafe { rustix::thread::unshare_unsafe(flags) }.map_err(io::Error::from)
}

/// Tells Mesa where compiled shaders may be kept. To be called while there is one thread.
pub(super) fn tell_driver(shader_cache: Option<&Path>) {
    let (name, value) = match shader_cache {
        Some(folder) => ("MESA_SHADER_CACHE_DIR", folder.as_os_str()),
        None => ("MESA_SHADER_CACHE_DISABLE", "true".as_ref()),
    };
    // SAFETY: there is no other thread that could read the environment, as for the whole of
    // `Sandbox::enter`.
    unsafe { std::env::set_var(name, value) };
}

/// Forks a process that ends at once.
pub(super) fn fork() -> io::Result<()> {
    // SAFETY: the child does nothing but end.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        // SAFETY: ends the child without running anything of this process.
        0 => unsafe { libc::_exit(0) },
        _ => Ok(()),
    }
}

/// Maps a page that could be filled with code and run.
pub(super) fn make_code() -> io::Result<()> {
    let protection = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping at a place of the kernel's choice; it is never used.
    let page = unsafe { libc::mmap(std::ptr::null_mut(), 4096, protection, flags, -1, 0) };
    if page == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
}
