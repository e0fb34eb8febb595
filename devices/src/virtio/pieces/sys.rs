#![allow(unsafe_code, reason = "vectored I/O on guest memory needs raw pointers, see Pieces")]
//! The list of pieces, and system calls on it.

use std::{
    fs::File,
    io,
    ops::Range,
    os::fd::{AsRawFd, BorrowedFd},
    sync::Arc,
};

use vm_memory::{Bytes, GuestAddress, GuestMemory as _, Permissions};

use crate::GuestMemory;

/// Pieces that the kernel takes in one call (`UIO_MAXIOV`).
const CALL_LIMIT: usize = 1024;
/// Pieces of a packet, which one call has to move together with a piece of this process.
pub(crate) const ONE_CALL: usize = CALL_LIMIT - 1;

/// Pieces of guest memory, in the order of the bytes of a request, of a packet or of several; consumed
/// from the front.
pub(crate) struct Pieces {
    /// Keeps the mapping alive that `list` points into.
    memory: Option<Arc<GuestMemory>>,
    list: Vec<libc::iovec>,
    /// Where each of them is for the guest.
    addresses: Vec<GuestAddress>,
    length: usize,
    limit: usize,
    /// What one call is given, between calls empty.
    call: Vec<libc::iovec>,
}

// SAFETY: the pointers lead into guest memory, which any thread may access and which `memory` keeps
// mapped; only the kernel accesses it through them, so no Rust reference to it ever exists.
unsafe impl Send for Pieces {}

impl Pieces {
    /// An empty list that never gets longer than `limit` pieces.
    pub(crate) fn new(limit: usize) -> Self {
        let (list, addresses, call) = Default::default();
        Self { memory: None, list, addresses, length: 0, limit, call }
    }

    /// Empties the list for other bytes, keeping its allocations.
    pub(crate) fn clear(&mut self, memory: &Arc<GuestMemory>) {
        self.list.clear();
        self.addresses.clear();
        self.length = 0;
        if self.memory.as_ref().is_none_or(|old| !Arc::ptr_eq(old, memory)) {
            self.memory = Some(memory.clone());
        }
    }

    /// Appends guest memory. After an error the list is of no use until it is
    /// [cleared](Self::clear).
    pub(crate) fn push(
        &mut self,
        address: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<(), PushError> {
        let memory = self.memory.as_ref().ok_or(PushError::OutsideMemory)?;
        let slices =
            memory.get_slices(address, length, access).map_err(|_| PushError::OutsideMemory)?;
        let mut address = address;
        for slice in slices {
            let slice = slice.map_err(|_| PushError::OutsideMemory)?;
            if self.list.len() == self.limit {
                return Err(PushError::TooMany);
            }
            let iov_base = slice.ptr_guard_mut().as_ptr().cast();
            self.list.push(libc::iovec { iov_base, iov_len: slice.len() });
            self.addresses.push(address);
            address = GuestAddress(address.0.wrapping_add(slice.len() as u64));
        }
        self.length += length;
        Ok(())
    }

    /// Bytes of all pieces.
    pub(crate) fn len(&self) -> usize {
        self.length
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.list.len()
    }

    /// Whether direct I/O may use them: they begin at multiples of `memory` and are multiples of
    /// `length` long.
    pub(crate) fn is_aligned(&self, memory: usize, length: usize) -> bool {
        self.list.iter().all(|piece| {
            (piece.iov_base as usize).is_multiple_of(memory) && piece.iov_len.is_multiple_of(length)
        })
    }

    /// Forgets the first `count` bytes.
    pub(crate) fn consume(&mut self, count: usize) {
        let mut count = count.min(self.length);
        self.length -= count;
        let mut whole = 0;
        for piece in &self.list {
            if count < piece.iov_len {
                break;
            }
            count -= piece.iov_len;
            whole += 1;
        }
        self.list.drain(..whole);
        self.addresses.drain(..whole);
        if let (Some(piece), Some(address)) = (self.list.first_mut(), self.addresses.first_mut()) {
            // In bounds: the piece is longer than `count`.
            piece.iov_base = piece.iov_base.wrapping_byte_add(count);
            piece.iov_len -= count;
            *address = GuestAddress(address.0.wrapping_add(count as u64));
        }
    }

    /// Reads from `file` at `offset`, in one call; the bytes that came. The caller consumes.
    pub(crate) fn read_at(
        &self,
        file: &File,
        offset: u64,
        flags: libc::c_int,
    ) -> io::Result<usize> {
        let (pieces, count) = self.first_call();
        let offset = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: the first `count` elements at `pieces` are initialised and describe guest memory of
        // that length, which `memory` keeps mapped, see `push`; the descriptor is open.
        let done = unsafe { libc::preadv2(file.as_raw_fd(), pieces, count, offset, flags) };
        usize::try_from(done).map_err(|_| io::Error::last_os_error())
    }

    /// Writes to `file` at `offset`, in one call; the bytes that went. The caller consumes.
    pub(crate) fn write_at(
        &self,
        file: &File,
        offset: u64,
        flags: libc::c_int,
    ) -> io::Result<usize> {
        let (pieces, count) = self.first_call();
        let offset = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: as in `read_at`; the kernel only reads the memory.
        let done = unsafe { libc::pwritev2(file.as_raw_fd(), pieces, count, offset, flags) };
        usize::try_from(done).map_err(|_| io::Error::last_os_error())
    }

    fn first_call(&self) -> (*const libc::iovec, libc::c_int) {
        (self.list.as_ptr(), self.list.len().min(CALL_LIMIT) as libc::c_int)
    }

    /// Writes `first`, then all pieces but their first `skip` bytes, in one call; the bytes that went.
    /// For lists of up to [`ONE_CALL`] pieces.
    pub(crate) fn send(
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
    /// not fit there into `rest`. Its length, and how much of it is in the pieces. For lists of up to
    /// [`ONE_CALL`] pieces.
    pub(crate) fn receive(
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
    pub(crate) fn store(&self, offset: usize, bytes: &[u8]) {
        self.walk(offset, bytes.len(), |memory, address, range| {
            memory.write_slice(bytes.get(range).unwrap_or_default(), address).is_ok()
        });
    }

    /// Copies the first bytes out of guest memory, once, so that the guest cannot change them between
    /// check and use; how many there were.
    pub(crate) fn copy_to(&self, target: &mut [u8]) -> usize {
        self.walk(0, target.len(), |memory, address, range| {
            memory.read_slice(target.get_mut(range).unwrap_or_default(), address).is_ok()
        })
    }

    /// Appends the bytes from `offset` on to `target`.
    pub(crate) fn append_to(&self, target: &mut Vec<u8>, offset: usize) {
        let start = target.len();
        let wanted = self.length.saturating_sub(offset);
        target.resize(start + wanted, 0);
        self.walk(offset, wanted, |memory, address, range| {
            let range = start + range.start..start + range.end;
            memory.read_slice(target.get_mut(range).unwrap_or_default(), address).is_ok()
        });
    }

    /// Fills all of it with zeros and consumes it.
    pub(crate) fn zero_rest(&mut self) {
        const ZEROS: [u8; 512] = [0; 512];
        self.walk(0, self.length, |memory, address, range| {
            range.clone().step_by(ZEROS.len()).all(|at| {
                let count = (range.end - at).min(ZEROS.len());
                let address = GuestAddress(address.0 + (at - range.start) as u64);
                memory.write_slice(&ZEROS[..count], address).is_ok()
            })
        });
        self.consume(self.length);
    }

    /// Calls `each` for all guest memory of `length` bytes from `offset` on, with the range of these
    /// bytes; how many bytes there were.
    fn walk(
        &self,
        offset: usize,
        length: usize,
        mut each: impl FnMut(&GuestMemory, GuestAddress, Range<usize>) -> bool,
    ) -> usize {
        let Some(memory) = &self.memory else { return 0 };
        let (mut skip, mut done) = (offset, 0);
        for (piece, address) in self.list.iter().zip(&self.addresses) {
            let gone = skip.min(piece.iov_len);
            skip -= gone;
            let here = (piece.iov_len - gone).min(length - done);
            let address = GuestAddress(address.0.wrapping_add(gone as u64));
            if here > 0 && !each(memory, address, done..done + here) {
                break;
            }
            done += here;
        }
        done
    }
}

/// Why guest memory could not be appended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PushError {
    /// The address is not memory.
    OutsideMemory,
    /// There are too many pieces.
    TooMany,
}
