#![allow(unsafe_code, reason = "rustix has no AF_VSOCK addresses")]
//! `AF_VSOCK` sockets, see vsock(7).

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

/// `VMADDR_CID_ANY`.
pub(super) const ANY_CID: u32 = u32::MAX;
/// `VMADDR_PORT_ANY`.
pub(super) const ANY_PORT: u32 = u32::MAX;

const LENGTH: libc::socklen_t = size_of::<libc::sockaddr_vm>() as libc::socklen_t;

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: plain old data for which all zeroes is a valid value.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A new stream socket.
pub(super) fn socket() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC;
    // SAFETY: a system call without pointers.
    let fd = check(unsafe { libc::socket(libc::AF_VSOCK, kind, 0) })?;
    // SAFETY: the kernel has just made this descriptor for us, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Gives a socket an address.
pub(super) fn bind(socket: &OwnedFd, cid: u32, port: u32) -> io::Result<()> {
    let address = address(cid, port);
    let pointer = std::ptr::from_ref(&address).cast();
    // SAFETY: the pointer is to an address of the length given, which outlives the call.
    check(unsafe { libc::bind(socket.as_raw_fd(), pointer, LENGTH) }).map(|_| ())
}

/// A socket's own context and port.
pub(super) fn local_address(socket: &OwnedFd) -> io::Result<(u32, u32)> {
    let mut address = address(0, 0);
    let mut length = LENGTH;
    let pointer = std::ptr::from_mut(&mut address).cast();
    // SAFETY: the kernel writes at most `length` bytes to the address, which outlives the call.
    check(unsafe { libc::getsockname(socket.as_raw_fd(), pointer, &raw mut length) })?;
    Ok((address.svm_cid, address.svm_port))
}

/// Waits for a connection; the other side's context and port.
pub(super) fn accept(socket: &OwnedFd) -> io::Result<(OwnedFd, (u32, u32))> {
    let mut address = address(0, 0);
    let mut length = LENGTH;
    let pointer = std::ptr::from_mut(&mut address).cast();
    let flags = libc::SOCK_CLOEXEC;
    // SAFETY: the kernel writes at most `length` bytes to the address, which outlives the call.
    let result = unsafe { libc::accept4(socket.as_raw_fd(), pointer, &raw mut length, flags) };
    // SAFETY: the kernel has just made this descriptor for us, so nobody else owns it.
    let connection = unsafe { OwnedFd::from_raw_fd(check(result)?) };
    Ok((connection, (address.svm_cid, address.svm_port)))
}
