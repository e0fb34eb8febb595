#![allow(unsafe_code, reason = "tap interfaces are driven by ioctls that no safe crate wraps")]
//! System calls of tap interfaces, of inherited descriptors, and on packets in guest memory.

use std::{
    ffi::c_ulong,
    io,
    ops::Range,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    sync::Arc,
};

use vm_memory::{Bytes, GuestAddress, GuestMemory as _, Permissions};

use crate::GuestMemory;

/// What a tap descriptor is connected to.
#[derive(Debug, Clone)]
pub(super) struct TapInfo {
    /// Name of the interface.
    pub(super) name: String,
    /// `IFF_TAP`, `IFF_NO_PI`, `IFF_VNET_HDR`, …
    pub(super) flags: i32,
}

/// Pieces of guest memory, in the order of the bytes of one packet or of several.
#[derive(Default)]
pub(super) struct Pieces {
    /// Keeps the mapping alive that `list` points into.
    memory: Option<Arc<GuestMemory>>,
    list: Vec<libc::iovec>,
    /// Where each of them is for the guest.
    addresses: Vec<GuestAddress>,
    length: usize,
    /// What one call is given, between calls empty.
    call: Vec<libc::iovec>,
}

// SAFETY: the pointers lead into guest memory, which any thread may access and which `memory` keeps
// mapped; only the kernel accesses it, so no Rust reference to it ever exists.
unsafe impl Send for Pieces {}

impl Pieces {
    /// Pieces that the kernel takes in one call (`UIO_MAXIOV`), less one of this process.
    const LIMIT: usize = 1023;

    /// Empties the list for the next packet, keeping its allocation.
    pub(super) fn clear(&mut self, memory: &Arc<GuestMemory>) {
        self.list.clear();
        self.addresses.clear();
        self.length = 0;
        if self.memory.as_ref().is_none_or(|old| !Arc::ptr_eq(old, memory)) {
            self.memory = Some(memory.clone());
        }
    }

    /// Appends guest memory; `false` if it is not all there, or there are too many pieces.
    pub(super) fn push(
        &mut self,
        address: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> bool {
        let Some(memory) = &self.memory else { return false };
        let Ok(slices) = memory.get_slices(address, length, access) else { return false };
        let mut address = address;
        for slice in slices {
            let Ok(slice) = slice else { return false };
            if self.list.len() == Self::LIMIT {
                return false;
            }
            let iov_base = slice.ptr_guard_mut().as_ptr().cast();
            self.list.push(libc::iovec { iov_base, iov_len: slice.len() });
            self.addresses.push(address);
            address = GuestAddress(address.0.wrapping_add(slice.len() as u64));
        }
        self.length += length;
        true
    }

    /// Bytes of all pieces.
    pub(super) fn len(&self) -> usize {
        self.length
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.list.len()
    }

    /// Forgets the first `count` pieces.
    pub(super) fn drop_front(&mut self, count: usize) {
        let gone = self.list.drain(..count.min(self.addresses.len()));
        self.length -= gone.map(|piece| piece.iov_len).sum::<usize>();
        self.addresses.drain(..count.min(self.addresses.len()));
    }

    /// Writes `first`, then all pieces but their first `skip` bytes, in one call; the bytes that went.
    pub(super) fn write(
        &mut self,
        fd: BorrowedFd<'_>,
        first: &[u8],
        skip: usize,
    ) -> io::Result<usize> {
        self.call.clear();
        if !first.is_empty() {
            let iov_base = first.as_ptr().cast_mut().cast();
            self.call.push(libc::iovec { iov_base, iov_len: first.len() });
        }
        let mut skip = skip;
        for piece in &self.list {
            let gone = skip.min(piece.iov_len);
            skip -= gone;
            if gone < piece.iov_len {
                // In bounds: the piece is longer.
                let iov_base = piece.iov_base.wrapping_byte_add(gone);
                self.call.push(libc::iovec { iov_base, iov_len: piece.iov_len - gone });
            }
        }
        let count = self.call.len() as libc::c_int;
        // SAFETY: the elements describe `first` and guest memory of that length, which `memory` keeps
        // mapped; the kernel only reads it; the descriptor is open.
        let result = unsafe { libc::writev(fd.as_raw_fd(), self.call.as_ptr(), count) };
        usize::try_from(result).map_err(|_| io::Error::last_os_error())
    }

    /// Reads one packet into the first pieces, as many as have room for `expected` bytes, and what does
    /// not fit there into `rest`. Its length, and how much of it is in the pieces.
    pub(super) fn read(
        &mut self,
        fd: BorrowedFd<'_>,
        expected: usize,
        rest: &mut [u8],
    ) -> io::Result<(usize, usize)> {
        self.call.clear();
        let mut room = 0;
        for piece in &self.list {
            if room >= expected {
                break;
            }
            room += piece.iov_len;
            self.call.push(*piece);
        }
        let iov_base = rest.as_mut_ptr().cast();
        self.call.push(libc::iovec { iov_base, iov_len: rest.len() });
        let count = self.call.len() as libc::c_int;
        // SAFETY: the elements describe guest memory of that length, which `memory` keeps mapped and to
        // which no reference exists, and `rest`, which is borrowed for writing; the descriptor is open.
        let result = unsafe { libc::readv(fd.as_raw_fd(), self.call.as_ptr(), count) };
        let length = usize::try_from(result).map_err(|_| io::Error::last_os_error())?;
        Ok((length, length.min(room)))
    }

    /// Copies `bytes` to where byte `offset` is and on; what is behind the last piece is left out.
    pub(super) fn store(&self, offset: usize, bytes: &[u8]) {
        self.walk(offset, bytes.len(), |memory, address, range| {
            memory.write_slice(bytes.get(range).unwrap_or_default(), address).is_ok()
        });
    }

    /// Appends the bytes from `offset` on to `target`.
    pub(super) fn append_to(&self, target: &mut Vec<u8>, offset: usize) {
        let start = target.len();
        let wanted = self.length.saturating_sub(offset);
        target.resize(start + wanted, 0);
        self.walk(offset, wanted, |memory, address, range| {
            let range = start + range.start..start + range.end;
            memory.read_slice(target.get_mut(range).unwrap_or_default(), address).is_ok()
        });
    }

    /// Calls `each` for all guest memory of `length` bytes from `offset` on, with the range of these
    /// bytes.
    fn walk(
        &self,
        offset: usize,
        length: usize,
        mut each: impl FnMut(&GuestMemory, GuestAddress, Range<usize>) -> bool,
    ) {
        let Some(memory) = &self.memory else { return };
        let (mut skip, mut done) = (offset, 0);
        for (piece, address) in self.list.iter().zip(&self.addresses) {
            let gone = skip.min(piece.iov_len);
            skip -= gone;
            let here = (piece.iov_len - gone).min(length - done);
            let address = GuestAddress(address.0.wrapping_add(gone as u64));
            if here > 0 && !each(memory, address, done..done + here) {
                return;
            }
            done += here;
        }
    }
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
