//! Requests (VIRTIO 1.3 §5.2.6): from a descriptor chain to an operation on the image.

use std::{io, sync::Arc};

use vm_memory::{Bytes, GuestAddress, Permissions};

use super::image::{Direction, Image, Progress, SECTOR};
use crate::{
    GuestMemory,
    virtio::{
        pieces::{Pieces, PushError},
        ring::Chain,
    },
};

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

/// Status byte: done.
pub(super) const S_OK: u8 = 0;
/// Status byte: failed.
pub(super) const S_IOERR: u8 = 1;
/// Status byte: not a request this device knows.
pub(super) const S_UNSUPP: u8 = 2;

/// Length of the answer to GET_ID.
pub(super) const ID_LENGTH: usize = 20;
const HEADER_LENGTH: usize = 16;
/// `struct virtio_blk_discard_write_zeroes`.
const SEGMENT_LENGTH: usize = 16;
/// Segments of one discard or write-zeroes request.
pub(super) const MAX_SEGMENTS: usize = 32;
/// Sectors of one such segment: just below 2 GiB, so that no single one takes for ever.
pub(super) const MAX_SEGMENT_SECTORS: u32 = 0x3f_ffff;
const UNMAP: u32 = 1;
/// Pieces of one request; a driver that keeps to SEG_MAX stays far below.
const PIECE_LIMIT: usize = 4096;

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operation {
    Transfer(Direction),
    Flush,
    GetId,
    Discard,
    WriteZeroes,
    /// Nothing: the answer is known already.
    Answer(u8),
}

/// The chain cannot be answered, so the queue is broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(super) struct Malformed(&'static str);

/// A request on its way; reused for others, so that serving one allocates nothing.
pub(super) struct Request {
    operation: Operation,
    /// Where the operation is on the disk, in bytes.
    offset: u64,
    /// Apart, because requests are handed from thread to thread.
    buffers: Box<Pieces>,
    /// Bytes of data it is about.
    pub(super) size: usize,
    status: GuestAddress,
    /// Head of its descriptor chain.
    pub(super) head: u16,
    /// Bytes of the chain that are the device's to write.
    pub(super) written: u32,
    /// The answer, once there is one.
    result: u8,
    /// The driver expects writes to be stable when they are done.
    stable: bool,
}

impl Request {
    pub(super) fn new() -> Self {
        Self {
            operation: Operation::Answer(S_IOERR),
            offset: 0,
            buffers: Box::new(Pieces::new(PIECE_LIMIT)),
            size: 0,
            status: GuestAddress(0),
            head: 0,
            written: 0,
            result: S_IOERR,
            stable: false,
        }
    }

    /// Becomes the request in `chain`. `stable`: the write cache is off.
    pub(super) fn parse(
        &mut self,
        chain: Chain,
        memory: &Arc<GuestMemory>,
        image: &Image,
        stable: bool,
    ) -> Result<(), Malformed> {
        self.head = chain.head_index();
        self.written = 0;
        self.result = S_IOERR;
        self.stable = stable;
        self.operation = Operation::Answer(S_IOERR);
        self.buffers.clear(memory);

        let mut header = [0; HEADER_LENGTH];
        let mut have = 0;
        // The writable part seen last: its final byte is the status.
        let mut last: Option<(GuestAddress, usize)> = None;
        let mut more = true;
        for descriptor in chain {
            more = descriptor.has_next();
            let (mut address, mut length) = (descriptor.addr(), descriptor.len() as usize);
            if length == 0 {
                continue;
            }
            if descriptor.is_write_only() {
                if let Some((address, length)) = last.replace((address, length)) {
                    self.room(address, length)?;
                }
                self.written = self.written.saturating_add(length as u32);
                continue;
            }
            if last.is_some() {
                return Err(Malformed("data for the device follows room for its answer"));
            }
            if have < HEADER_LENGTH {
                let count = length.min(HEADER_LENGTH - have);
                memory
                    .read_slice(&mut header[have..have + count], address)
                    .map_err(|_| Malformed("the request header is not in guest memory"))?;
                have += count;
                if have == HEADER_LENGTH {
                    self.begin(&header, image);
                }
                length -= count;
                // The range was read from, so its end is an address.
                address = GuestAddress(address.0.wrapping_add(count as u64));
            }
            self.data(address, length)?;
        }
        if more {
            return Err(Malformed("the descriptor chain has no end"));
        }
        let Some((address, length)) = last else {
            return Err(Malformed("the request has no room for its status"));
        };
        self.room(address, length - 1)?;
        self.status = address
            .0
            .checked_add(length as u64 - 1)
            .map(GuestAddress)
            .ok_or(Malformed("the status byte is not in guest memory"))?;
        self.size = self.buffers.len();
        self.check(image);
        Ok(())
    }

    fn begin(&mut self, header: &[u8; HEADER_LENGTH], image: &Image) {
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = *header;
        let sector = u64::from_le_bytes(sector);
        self.operation = match u32::from_le_bytes([t0, t1, t2, t3]) {
            T_IN => Operation::Transfer(Direction::Read),
            T_OUT => Operation::Transfer(Direction::Write { stable: self.stable }),
            T_FLUSH => Operation::Flush,
            T_GET_ID => Operation::GetId,
            T_DISCARD if image.can_discard() => Operation::Discard,
            T_WRITE_ZEROES if !image.read_only() => Operation::WriteZeroes,
            T_DISCARD | T_WRITE_ZEROES if image.read_only() => Operation::Answer(S_IOERR),
            _ => Operation::Answer(S_UNSUPP),
        };
        match sector.checked_mul(SECTOR) {
            Some(offset) => self.offset = offset,
            None if matches!(self.operation, Operation::Transfer(_)) => {
                self.operation = Operation::Answer(S_IOERR);
            }
            None => self.offset = 0,
        }
    }

    /// Takes device-readable bytes.
    fn data(&mut self, address: GuestAddress, length: usize) -> Result<(), Malformed> {
        let wanted = matches!(
            self.operation,
            Operation::Transfer(Direction::Write { .. })
                | Operation::Discard
                | Operation::WriteZeroes
        );
        self.take(wanted, address, length, Permissions::Read)
    }

    /// Takes device-writable bytes.
    fn room(&mut self, address: GuestAddress, length: usize) -> Result<(), Malformed> {
        let wanted =
            matches!(self.operation, Operation::Transfer(Direction::Read) | Operation::GetId);
        self.take(wanted, address, length, Permissions::Write)
    }

    fn take(
        &mut self,
        wanted: bool,
        address: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<(), Malformed> {
        if !wanted || length == 0 {
            return Ok(());
        }
        match self.buffers.push(address, length, access) {
            Ok(()) => Ok(()),
            Err(PushError::OutsideMemory) => Err(Malformed("a buffer is not in guest memory")),
            Err(PushError::TooMany) => {
                self.operation = Operation::Answer(S_IOERR);
                Ok(())
            }
        }
    }

    /// Refuses what can be refused without touching the image.
    fn check(&mut self, image: &Image) {
        let count = self.buffers.len() as u64;
        let valid = match self.operation {
            Operation::Transfer(direction) => {
                count.is_multiple_of(SECTOR)
                    && image.contains(self.offset, count)
                    && (direction == Direction::Read || !image.read_only())
            }
            Operation::Discard | Operation::WriteZeroes => {
                let segment = SEGMENT_LENGTH as u64;
                count > 0 && count.is_multiple_of(segment) && count <= segment * MAX_SEGMENTS as u64
            }
            _ => true,
        };
        if !valid {
            self.operation = Operation::Answer(S_IOERR);
        }
    }

    /// Does what needs no waiting; whether the request is complete.
    pub(super) fn try_now(&mut self, image: &Image, id: &[u8; ID_LENGTH]) -> bool {
        match self.operation {
            Operation::Answer(status) => self.result = status,
            Operation::GetId => {
                self.buffers.store(0, id);
                self.result = S_OK;
            }
            Operation::Transfer(direction) => {
                match image.try_transfer(direction, &mut self.offset, &mut self.buffers) {
                    Ok(Progress::WouldWait) => return false,
                    Ok(Progress::Done) => self.result = S_OK,
                    Err(error) => self.fail(image, &error),
                }
            }
            _ => return false,
        }
        true
    }

    /// Does all of it.
    pub(super) fn execute(&mut self, image: &Image) {
        let outcome = match self.operation {
            Operation::Transfer(direction) => {
                image.transfer(direction, &mut self.offset, &mut self.buffers)
            }
            Operation::Flush => image.flush(),
            Operation::Discard | Operation::WriteZeroes => match self.segments(image) {
                Ok(done) => done,
                Err(status) => {
                    self.result = status;
                    return;
                }
            },
            Operation::GetId | Operation::Answer(_) => return,
        };
        match outcome {
            Ok(()) => self.result = S_OK,
            Err(error) => self.fail(image, &error),
        }
    }

    /// Discards or zeroes. All segments are checked before the first is touched (§5.2.6.2).
    fn segments(&self, image: &Image) -> Result<io::Result<()>, u8> {
        let discard = self.operation == Operation::Discard;
        let mut bytes = [0; SEGMENT_LENGTH * MAX_SEGMENTS];
        let have = self.buffers.copy_to(&mut bytes);
        let segments =
            bytes.get(..have).unwrap_or_default().chunks_exact(SEGMENT_LENGTH).map(|segment| {
                let word = |at: usize| {
                    let bytes = segment.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
                    u32::from_le_bytes(bytes.unwrap_or_default())
                };
                let sector = u64::from(word(0)) | u64::from(word(4)) << 32;
                (sector, word(8), word(12))
            });
        for (sector, count, flags) in segments.clone() {
            if flags & !UNMAP != 0 || (discard && flags != 0) {
                return Err(S_UNSUPP);
            }
            let offset = sector.checked_mul(SECTOR).ok_or(S_IOERR)?;
            if count > MAX_SEGMENT_SECTORS || !image.contains(offset, u64::from(count) * SECTOR) {
                return Err(S_IOERR);
            }
        }
        for (sector, count, flags) in segments {
            let (offset, count) = (sector * SECTOR, u64::from(count) * SECTOR);
            if count == 0 {
                continue;
            }
            let outcome = if discard {
                image.discard(offset, count)
            } else {
                image.write_zeroes(offset, count, flags & UNMAP != 0)
            };
            match outcome {
                Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                    return Err(S_UNSUPP);
                }
                Err(error) => return Ok(Err(error)),
                Ok(()) => {}
            }
        }
        Ok(if self.stable { image.flush() } else { Ok(()) })
    }

    fn fail(&mut self, image: &Image, error: &io::Error) {
        let what = match self.operation {
            Operation::Transfer(Direction::Read) => "a read",
            Operation::Transfer(Direction::Write { .. }) => "a write",
            Operation::Flush => "a flush",
            _ => "a discard or write of zeros",
        };
        image.report(what, error);
        self.result = S_IOERR;
    }

    /// Tells the driver the result; the chain can be given back afterwards.
    pub(super) fn finish(&self, memory: &GuestMemory) -> Result<(), Malformed> {
        memory
            .write_obj(self.result, self.status)
            .map_err(|_| Malformed("the status byte is not in guest memory"))
    }
}
