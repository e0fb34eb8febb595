//! This project's extension of the vhost-user-gpu socket: frames that stay where the guest has them
//! (`docs/gpu-protocol.md`).
//!
//! A blob of guest memory that is shown need not be copied: the front end has the guest's memory, too.
//! The back end says once where the blob lies ([`GuestMemory`]) and then that a picture in it has
//! changed ([`GuestFrame`]). Before the guest may hear that the blob is gone, and uses its memory for
//! something else, the front end forgets it, and answers that it has.

use alloc::vec::Vec;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{
    format::{BlobLayout, PixelFormat},
    frames::{MAX_RECTS, decode_rects, encode_rects},
    pieces::Pieces,
    rect::Rect,
    socket::ProtocolError,
    virtio::BackingEntry,
};

/// Message ids.
pub mod id {
    /// Back end → front end: [`super::GuestMemory`].
    pub const GUEST_MEMORY: u32 = 0x4452_0004;
    /// Back end → front end: the resource whose memory is not to be read any more, a word. The answer
    /// has no payload, and comes when nobody reads it.
    pub const FORGET_MEMORY: u32 = 0x4452_0005;
    /// Back end → front end: [`super::GuestFrame`].
    pub const GUEST_FRAME: u32 = 0x4452_0006;
    /// Back end → front end: RESET_DEVICE was carried out, and what was said before is about a driver that
    /// is gone. Without payload or answer; only where
    /// [`ProtocolFeatures::DEVICE_RESET`](crate::socket::ProtocolFeatures::DEVICE_RESET) was agreed on.
    pub const DEVICE_RESET: u32 = 0x4452_0007;
}

/// Most pieces of a [`GuestMemory`].
pub const MAX_PIECES: usize = 16_384;

/// Most resources whose memory a front end keeps in mind.
pub const MAX_MEMORIES: usize = 32;

#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
struct MemoryHeader {
    resource: u32,
    count: u32,
}

#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
struct Piece {
    address: u64,
    length: u32,
    reserved: u32,
}

/// Where in guest memory a resource lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestMemory {
    /// The resource, by the guest's number.
    pub resource: u32,
    /// Its memory; at most [`MAX_PIECES`].
    pub pieces: Pieces,
}

impl GuestMemory {
    /// Longest payload.
    pub(crate) const MAX_BYTES: usize = size_of::<MemoryHeader>() + MAX_PIECES * size_of::<Piece>();

    pub(crate) fn encode_payload(&self, out: &mut Vec<u8>) {
        let entries = self.pieces.entries();
        let entries = entries.get(..MAX_PIECES).unwrap_or(entries);
        let header = MemoryHeader { resource: self.resource, count: entries.len() as u32 };
        out.extend_from_slice(header.as_bytes());
        for &BackingEntry { address, length } in entries {
            out.extend_from_slice(Piece { address, length, reserved: 0 }.as_bytes());
        }
    }

    pub(crate) fn decode_payload(bytes: &[u8]) -> Result<Self, ProtocolError> {
        let wrong = ProtocolError::Payload { request: id::GUEST_MEMORY };
        let (header, rest) = MemoryHeader::read_from_prefix(bytes).map_err(|_| wrong)?;
        let count = header.count as usize;
        if count > MAX_PIECES || rest.len() != count * size_of::<Piece>() {
            return Err(wrong);
        }
        let entries = rest
            .chunks_exact(size_of::<Piece>())
            .filter_map(|chunk| Piece::read_from_bytes(chunk).ok())
            .map(|Piece { address, length, .. }| BackingEntry { address, length })
            .collect();
        Ok(Self { resource: header.resource, pieces: Pieces::new(entries) })
    }
}

#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub(crate) struct FrameHeader {
    scanout: u32,
    resource: u32,
    part: Rect,
    format: u32,
    stride: u32,
    offset: u32,
    rect_count: u32,
    sequence: u64,
}

/// The picture of a scanout is in a resource whose memory the front end knows, and has changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestFrame {
    /// Which scanout.
    pub scanout: u32,
    /// Which resource.
    pub resource: u32,
    /// The part of what is in the resource that is shown; as large as the scanout.
    pub part: Rect,
    /// How it lies in the resource.
    pub layout: BlobLayout,
    /// Counts the frames of this scanout.
    pub sequence: u64,
    /// What changed since the previous frame that was sent, in the scanout; never empty.
    pub damage: Vec<Rect>,
}

impl GuestFrame {
    /// Longest payload.
    pub(crate) const MAX_BYTES: usize = size_of::<FrameHeader>() + MAX_RECTS * size_of::<Rect>();

    pub(crate) fn encode_payload(&self, out: &mut Vec<u8>) {
        let Self { scanout, resource, part, layout, sequence, damage } = self;
        let rects = damage.get(..MAX_RECTS).unwrap_or(damage);
        let header = FrameHeader {
            scanout: *scanout,
            resource: *resource,
            part: *part,
            format: layout.format as u32,
            stride: layout.stride,
            offset: layout.offset,
            rect_count: rects.len() as u32,
            sequence: *sequence,
        };
        out.extend_from_slice(header.as_bytes());
        encode_rects(rects, out);
    }

    pub(crate) fn decode_payload(bytes: &[u8]) -> Result<Self, ProtocolError> {
        let wrong = ProtocolError::Payload { request: id::GUEST_FRAME };
        let (header, rest) = FrameHeader::read_from_prefix(bytes).map_err(|_| wrong)?;
        let FrameHeader { scanout, resource, part, stride, offset, sequence, .. } = header;
        let format = PixelFormat::from_wire(header.format).ok_or(wrong)?;
        let damage = decode_rects(rest, header.rect_count).ok_or(wrong)?;
        let layout = BlobLayout { format, stride, offset };
        Ok(Self { scanout, resource, part, layout, sequence, damage })
    }
}
