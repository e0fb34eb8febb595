#![allow(unsafe_code, reason = "tap interfaces are driven by ioctls that no safe crate wraps")]
//! System calls of tap interfaces and of inherited descriptors.

use std::{
    ffi::c_ulong,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

/// What a tap descriptor is connected to.
#[derive(Debug, Clone)]
pub(super) struct TapInfo {
    /// Name of the interface.
    pub(super) name: String,
    /// `IFF_TAP`, `IFF_NO_PI`, `IFF_VNET_HDR`, …
    pub(super) flags: i32,
}

fn request(name: &str, flags: i32) -> io::Result<libc::ifreq> {
    // SAFETY: `ifreq` is plain old data for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.is_empty() || name.len() >= request.ifr_name.len() || name.contains('\0') {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not an interface name"));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = flags as i16;
    Ok(request)
}

fn call<T>(fd: BorrowedFd<'_>, number: c_ulong, argument: &mut T) -> io::Result<()> {
    // SAFETY: each caller below passes the type that the request number is defined for, and the
    // reference keeps it valid for reading and writing during the call.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), number, std::ptr::from_mut(argument)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Connects a descriptor of `/dev/net/tun` to the tap interface `name`.
pub(super) fn attach(fd: BorrowedFd<'_>, name: &str, flags: i32) -> io::Result<()> {
    call(fd, libc::TUNSETIFF, &mut request(name, flags)?)
}

/// Asks a tap or macvtap descriptor for its interface.
pub(super) fn info(fd: BorrowedFd<'_>) -> io::Result<TapInfo> {
    let mut request = request("none", 0)?;
    call(fd, libc::TUNGETIFF, &mut request)?;
    let name = request.ifr_name.iter().take_while(|byte| **byte != 0);
    let name = name.map(|byte| char::from(byte.cast_unsigned())).collect();
    // SAFETY: TUNGETIFF has set the flags, and any bit pattern is a valid i16.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    Ok(TapInfo { name, flags: i32::from(flags.cast_unsigned()) })
}

/// The hardware address of a tap descriptor's interface.
pub(super) fn hardware_address(fd: BorrowedFd<'_>, name: &str) -> io::Result<[u8; 6]> {
    let mut request = request(name, 0)?;
    call(fd, libc::SIOCGIFHWADDR, &mut request)?;
    // SAFETY: SIOCGIFHWADDR has set the address, and any bit pattern is valid.
    let data = unsafe { request.ifr_ifru.ifru_hwaddr.sa_data };
    let mut address = [0; 6];
    for (to, from) in address.iter_mut().zip(data) {
        *to = from.cast_unsigned();
    }
    Ok(address)
}

/// Lets the interface use the queue behind a descriptor, or not.
pub(super) fn attach_queue(fd: &OwnedFd, on: bool) -> io::Result<()> {
    let flags = if on { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
    call(fd.as_fd(), libc::TUNSETQUEUE, &mut request("none", flags)?)
}

/// Sets the size of the virtio header in front of each packet.
pub(super) fn set_header_size(fd: BorrowedFd<'_>, size: i32) -> io::Result<()> {
    call(fd, libc::TUNSETVNETHDRSZ, &mut { size })
}

/// Chooses which offloads (`TUN_F_*`) the receiver of packets can cope with.
pub(super) fn set_offload(fd: BorrowedFd<'_>, flags: u32) -> io::Result<()> {
    // SAFETY: this request takes its argument by value and touches no memory of ours.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETOFFLOAD, c_ulong::from(flags)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A duplicate of a descriptor that this process inherited. The number itself stays open, as it
/// always was.
pub(super) fn duplicate_inherited(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: a plain system call on a number; a closed one yields EBADF.
    let copy = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) };
    if copy < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}
