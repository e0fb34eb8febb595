//! Reading and writing files straight from and to guest memory.
#![allow(unsafe_code, reason = "vectored I/O on guest memory needs raw pointers, see GuestBuffers")]

use std::{fs::File, io, os::fd::AsRawFd, sync::Arc};

use vm_memory::{Bytes, GuestAddress, GuestMemory as _, Permissions};

use crate::GuestMemory;

/// Fail rather than wait for a disk.
pub(super) const NO_WAIT: libc::c_int = libc::RWF_NOWAIT;
/// Return when the data is stable.
pub(super) const STABLE: libc::c_int = libc::RWF_DSYNC;

/// Pieces that the kernel takes in one call (`UIO_MAXIOV`).
const CALL_LIMIT: usize = 1024;
/// Pieces of one request; a driver that keeps to SEG_MAX stays far below.
const PIECE_LIMIT: usize = 4096;

/// A request's data in guest memory: a list of pieces, consumed from the front.
#[derive(Default)]
pub(super) struct GuestBuffers {
    /// Keeps the mapping alive that `pieces` points into.
    memory: Option<Arc<GuestMemory>>,
    pieces: Vec<libc::iovec>,
    /// Where the pieces are for the guest, unaffected by what was consumed.
    ranges: Vec<(GuestAddress, usize)>,
    /// The first piece not consumed yet.
    next: usize,
    left: usize,
}

// SAFETY: the pointers lead into guest memory, which any thread may access and which `memory`
// keeps mapped; the kernel does the accesses, so no Rust reference to it ever exists.
unsafe impl Send for GuestBuffers {}

impl GuestBuffers {
    /// Empties the list for the next request, keeping its allocations.
    pub(super) fn clear(&mut self, memory: &Arc<GuestMemory>) {
        self.pieces.clear();
        self.ranges.clear();
        self.next = 0;
        self.left = 0;
        self.memory = Some(memory.clone());
    }

    /// Appends guest memory; an error if it is not all there or the list is too long.
    pub(super) fn push(&mut self, address: GuestAddress, length: usize) -> Result<(), PushError> {
        let memory = self.memory.as_ref().ok_or(PushError::OutsideMemory)?;
        let slices = memory
            .get_slices(address, length, Permissions::ReadWrite)
            .map_err(|_| PushError::OutsideMemory)?;
        for slice in slices {
            let slice = slice.map_err(|_| PushError::OutsideMemory)?;
            if self.pieces.len() == PIECE_LIMIT {
                return Err(PushError::TooMany);
            }
            let iov_base = slice.ptr_guard_mut().as_ptr().cast();
            self.pieces.push(libc::iovec { iov_base, iov_len: slice.len() });
        }
        self.ranges.push((address, length));
        self.left += length;
        Ok(())
    }

    /// Bytes not consumed yet.
    pub(super) fn len(&self) -> usize {
        self.left
    }

    /// Whether direct I/O may use what is left: pieces that begin at multiples of `memory` and are
    /// multiples of `length` long.
    pub(super) fn is_aligned(&self, memory: usize, length: usize) -> bool {
        self.pieces.iter().skip(self.next).all(|piece| {
            (piece.iov_base as usize).is_multiple_of(memory) && piece.iov_len.is_multiple_of(length)
        })
    }

    /// Reads from `file` at `offset` into what is left; the caller consumes.
    pub(super) fn read(
        &mut self,
        file: &File,
        offset: u64,
        flags: libc::c_int,
    ) -> io::Result<usize> {
        let (pieces, count) = self.call();
        let offset = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: the first `count` elements at `pieces` are initialised and describe mapped guest
        // memory of that length, see `push`; the descriptor is open.
        let done = unsafe { libc::preadv2(file.as_raw_fd(), pieces, count, offset, flags) };
        usize::try_from(done).map_err(|_| io::Error::last_os_error())
    }

    /// Writes what is left to `file` at `offset`; the caller consumes.
    pub(super) fn write(
        &mut self,
        file: &File,
        offset: u64,
        flags: libc::c_int,
    ) -> io::Result<usize> {
        let (pieces, count) = self.call();
        let offset = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: as in `read`; the kernel only reads the memory.
        let done = unsafe { libc::pwritev2(file.as_raw_fd(), pieces, count, offset, flags) };
        usize::try_from(done).map_err(|_| io::Error::last_os_error())
    }

    fn call(&self) -> (*const libc::iovec, libc::c_int) {
        let rest = self.pieces.get(self.next..).unwrap_or_default();
        (rest.as_ptr(), rest.len().min(CALL_LIMIT) as libc::c_int)
    }

    /// Drops `count` bytes from the front.
    pub(super) fn consume(&mut self, count: usize) {
        let mut count = count.min(self.left);
        self.left -= count;
        while let Some(piece) = self.pieces.get_mut(self.next) {
            if count < piece.iov_len {
                // In bounds: the piece is longer than `count`.
                piece.iov_base = piece.iov_base.wrapping_byte_add(count);
                piece.iov_len -= count;
                break;
            }
            count -= piece.iov_len;
            self.next += 1;
        }
    }

    /// Copies the start of the data out of guest memory, once, so that the guest cannot change it
    /// between check and use. Returns how many bytes there were.
    pub(super) fn copy_to(&self, target: &mut [u8]) -> usize {
        self.copy(target.len(), |memory, address, at, length| {
            memory.read_slice(target.get_mut(at..at + length).unwrap_or_default(), address).is_ok()
        })
    }

    /// Copies bytes to the start of the room in guest memory. Returns how many fitted.
    pub(super) fn copy_from(&self, source: &[u8]) -> usize {
        self.copy(source.len(), |memory, address, at, length| {
            memory.write_slice(source.get(at..at + length).unwrap_or_default(), address).is_ok()
        })
    }

    fn copy(
        &self,
        limit: usize,
        mut each: impl FnMut(&GuestMemory, GuestAddress, usize, usize) -> bool,
    ) -> usize {
        let Some(memory) = &self.memory else { return 0 };
        let mut at = 0;
        for (address, length) in &self.ranges {
            let length = (*length).min(limit - at);
            if length == 0 || !each(memory, *address, at, length) {
                break;
            }
            at += length;
        }
        at
    }

    /// Fills what is left with zeros and consumes it.
    pub(super) fn zero_rest(&mut self) -> io::Result<()> {
        const ZEROS: [u8; 512] = [0; 512];
        let mut skip: usize =
            self.ranges.iter().map(|(_, length)| length).sum::<usize>() - self.left;
        let Some(memory) = &self.memory else { return Ok(()) };
        for (address, length) in &self.ranges {
            let mut at = skip.min(*length);
            skip -= at;
            while at < *length {
                let count = (length - at).min(ZEROS.len());
                let address = GuestAddress(address.0 + at as u64);
                memory.write_slice(&ZEROS[..count], address).map_err(io::Error::other)?;
                at += count;
            }
        }
        self.consume(self.left);
        Ok(())
    }
}

/// Why guest memory could not be part of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PushError {
    /// The address is not memory.
    OutsideMemory,
    /// The chain has too many pieces.
    TooMany,
}
