//! The vhost-user-gpu socket (QEMU `docs/interop/vhost-user-gpu.rst`), both directions.
//!
//! Every message is a header of three native-endian words (request, flags, size) and a payload.
//! Requests flow from the back end to the front end, answers carry [`FLAG_REPLY`]; the messages of
//! [`crate::frames`] also flow the other way. Descriptors travel beside the first byte of a
//! message; [`FromFrontEnd::wants_fd`] and [`FromBackEnd::wants_fd`] tell with which.

use alloc::vec::Vec;

use bitflags::bitflags;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{
    frames::{self, Frame, Release, ShmScanout, Want},
    guest_frames::{self, GuestFrame, GuestMemory},
    host_memory::{self, Map, Unmap},
    rect::Rect,
    virtio::{CURSOR_BYTES, RespDisplayInfo, RespEdid},
};

/// [`Header::flags`]: this is an answer.
pub const FLAG_REPLY: u32 = 1 << 2;

/// Longest UPDATE that is accepted: 4096 × 4096 pixels at once.
pub const MAX_UPDATE: usize = 20 + 4096 * 4096 * 4;

bitflags! {
    /// Protocol features of this socket (not those of vhost-user).
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct ProtocolFeatures: u64 {
        /// The front end answers GET_EDID.
        const EDID = 1 << 0;
        /// The front end understands DMABUF_SCANOUT2.
        const DMABUF2 = 1 << 1;
        /// The back end tells that the device was reset, see [`guest_frames::id::DEVICE_RESET`]. Not
        /// part of the standard.
        const DEVICE_RESET = 1 << 59;
        /// Frames that stay in guest memory, see [`crate::guest_frames`]. Not part of the standard.
        const GUEST_FRAMES = 1 << 60;
        /// Memory of the host in the guest's shared memory region, see [`crate::host_memory`]. Not
        /// part of the standard.
        const HOST_MEMORY = 1 << 61;
        /// Frames in shared memory, see [`crate::frames`]. Not part of the standard.
        const SHM_FRAMES = 1 << 62;
    }
}

/// Request numbers of the standard.
#[allow(missing_docs)] // the standard's names
pub mod id {
    pub const GET_PROTOCOL_FEATURES: u32 = 1;
    pub const SET_PROTOCOL_FEATURES: u32 = 2;
    pub const GET_DISPLAY_INFO: u32 = 3;
    pub const CURSOR_POS: u32 = 4;
    pub const CURSOR_POS_HIDE: u32 = 5;
    pub const CURSOR_UPDATE: u32 = 6;
    pub const SCANOUT: u32 = 7;
    pub const UPDATE: u32 = 8;
    pub const DMABUF_SCANOUT: u32 = 9;
    pub const DMABUF_UPDATE: u32 = 10;
    pub const GET_EDID: u32 = 11;
    pub const DMABUF_SCANOUT2: u32 = 12;
}

/// Start of every message.
#[repr(C)]
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
pub struct Header {
    /// Request number, also in its answer.
    pub request: u32,
    /// [`FLAG_REPLY`] or 0.
    pub flags: u32,
    /// Bytes of payload.
    pub size: u32,
}

/// Bytes of a [`Header`].
pub const HEADER_SIZE: usize = size_of::<Header>();

/// The peer broke the protocol; the connection is of no use any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// A message that does not exist in this direction.
    #[error("message {request:#x} with flags {flags:#x} is not known in this direction")]
    Unknown {
        /// Its number.
        request: u32,
        /// Its flags.
        flags: u32,
    },
    /// A payload longer than that message may have.
    #[error("message {request:#x} announces {size} bytes, at most {limit} are allowed")]
    TooLong {
        /// Its number.
        request: u32,
        /// Announced length.
        size: u32,
        /// Allowed length.
        limit: usize,
    },
    /// A payload of the wrong length or with contradictory contents.
    #[error("message {request:#x} has a malformed payload")]
    Payload {
        /// Its number.
        request: u32,
    },
}

/// Position of a cursor's hot spot.
#[repr(C)]
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
pub struct CursorPos {
    /// Which scanout.
    pub scanout: u32,
    /// Pixels from the left.
    pub x: u32,
    /// Pixels from the top.
    pub y: u32,
}

#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
struct CursorUpdateHeader {
    pos: CursorPos,
    hot_x: u32,
    hot_y: u32,
}

#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
struct UpdateHeader {
    scanout: u32,
    rect: Rect,
}

#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable)]
struct ScanoutPayload {
    scanout: u32,
    width: u32,
    height: u32,
}

/// Payload of DMABUF_SCANOUT.
#[repr(C)]
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
pub struct DmabufScanout {
    /// Which scanout.
    pub scanout: u32,
    /// Shown part of the buffer; a width of 0 switches the scanout off.
    pub rect: Rect,
    /// Width of the buffer.
    pub fd_width: u32,
    /// Height of the buffer.
    pub fd_height: u32,
    /// Bytes from row to row.
    pub fd_stride: u32,
    /// Bit 0: the first row is the bottom one.
    pub fd_flags: u32,
    /// Pixel format, a DRM fourcc.
    pub fd_drm_fourcc: u32,
}

/// A message from the back end to the front end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FromBackEnd<'a> {
    /// Asks for the front end's [`ProtocolFeatures`].
    GetProtocolFeatures,
    /// Tells which of them are used.
    SetProtocolFeatures(u64),
    /// Asks for sizes of the monitors.
    GetDisplayInfo,
    /// Asks for a monitor's EDID.
    GetEdid {
        /// Which scanout.
        scanout: u32,
    },
    /// Shows the cursor here.
    CursorPos(CursorPos),
    /// Hides the cursor.
    CursorHide(CursorPos),
    /// A new cursor image.
    CursorUpdate {
        /// Where.
        pos: CursorPos,
        /// Hot spot inside the image.
        hot_x: u32,
        /// Hot spot inside the image.
        hot_y: u32,
        /// 64 × 64 pixels ARGB8888: [`CURSOR_BYTES`] bytes.
        image: &'a [u8],
    },
    /// Size of the picture; 0 × 0: off.
    Scanout {
        /// Which scanout.
        scanout: u32,
        /// Pixels.
        width: u32,
        /// Pixels.
        height: u32,
    },
    /// New pixels of the picture.
    Update {
        /// Which scanout.
        scanout: u32,
        /// Where.
        rect: Rect,
        /// XRGB8888, rows without gaps.
        pixels: &'a [u8],
    },
    /// The picture is in a dmabuf.
    DmabufScanout {
        /// Geometry.
        scanout: DmabufScanout,
        /// Layout modifier, with [`ProtocolFeatures::DMABUF2`].
        modifier: Option<u64>,
    },
    /// A dmabuf's contents changed; has an answer.
    DmabufUpdate {
        /// Which scanout.
        scanout: u32,
        /// Where.
        rect: Rect,
    },
    /// A frame is in shared memory.
    Frame(Frame),
    /// Memory for the guest's shared memory region; has an answer.
    Map(Map),
    /// The end of it.
    Unmap(Unmap),
    /// Where a resource's memory is.
    GuestMemory(GuestMemory),
    /// It is not to be read any more; has an answer.
    ForgetMemory {
        /// Whose memory.
        resource: u32,
    },
    /// A frame is in such memory.
    GuestFrame(GuestFrame),
    /// What was said of such memory until now is about a driver that is gone.
    DeviceReset,
}

/// A message from the front end to the back end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FromFrontEnd {
    /// Answer to GET_PROTOCOL_FEATURES.
    ProtocolFeatures(u64),
    /// Answer to GET_DISPLAY_INFO.
    DisplayInfo(alloc::boxed::Box<RespDisplayInfo>),
    /// Answer to GET_EDID.
    Edid(alloc::boxed::Box<RespEdid>),
    /// Answer to DMABUF_UPDATE.
    DmabufUpdated,
    /// Answer to MAP: 0, or an error number of Linux.
    Mapped(u32),
    /// Answer to FORGET_MEMORY.
    MemoryForgotten,
    /// Memory for frames.
    ShmScanout(ShmScanout),
    /// A slot is free again.
    Release(Release),
    /// Whether frames are needed.
    Want(Want),
}

/// Starts a message in `out`; [`finish`] sets the length.
fn start(out: &mut Vec<u8>, request: u32, flags: u32) -> usize {
    let at = out.len();
    out.extend_from_slice(Header { request, flags, size: 0 }.as_bytes());
    at
}

fn finish(out: &mut [u8], at: usize) {
    let size = (out.len() - at - HEADER_SIZE) as u32;
    // `size` is the last word of the header.
    out[at + 8..at + HEADER_SIZE].copy_from_slice(&size.to_ne_bytes());
}

fn exact<T: FromBytes>(request: u32, payload: &[u8]) -> Result<T, ProtocolError> {
    T::read_from_bytes(payload).map_err(|_| ProtocolError::Payload { request })
}

impl<'a> FromBackEnd<'a> {
    /// Appends the message to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::GetProtocolFeatures => put(out, id::GET_PROTOCOL_FEATURES, &[]),
            Self::SetProtocolFeatures(bits) => {
                put(out, id::SET_PROTOCOL_FEATURES, &[bits.as_bytes()]);
            }
            Self::GetDisplayInfo => put(out, id::GET_DISPLAY_INFO, &[]),
            Self::GetEdid { scanout } => put(out, id::GET_EDID, &[scanout.as_bytes()]),
            Self::CursorPos(pos) => put(out, id::CURSOR_POS, &[pos.as_bytes()]),
            Self::CursorHide(pos) => put(out, id::CURSOR_POS_HIDE, &[pos.as_bytes()]),
            Self::CursorUpdate { pos, hot_x, hot_y, image } => {
                let header = CursorUpdateHeader { pos: *pos, hot_x: *hot_x, hot_y: *hot_y };
                put(out, id::CURSOR_UPDATE, &[header.as_bytes(), image]);
            }
            Self::Scanout { scanout, width, height } => {
                let payload = ScanoutPayload { scanout: *scanout, width: *width, height: *height };
                put(out, id::SCANOUT, &[payload.as_bytes()]);
            }
            Self::Update { scanout, rect, pixels } => {
                let header = UpdateHeader { scanout: *scanout, rect: *rect };
                put(out, id::UPDATE, &[header.as_bytes(), pixels]);
            }
            Self::DmabufScanout { scanout, modifier: None } => {
                put(out, id::DMABUF_SCANOUT, &[scanout.as_bytes()]);
            }
            Self::DmabufScanout { scanout, modifier: Some(modifier) } => {
                put(out, id::DMABUF_SCANOUT2, &[scanout.as_bytes(), modifier.as_bytes()]);
            }
            Self::DmabufUpdate { scanout, rect } => {
                let header = UpdateHeader { scanout: *scanout, rect: *rect };
                put(out, id::DMABUF_UPDATE, &[header.as_bytes()]);
            }
            Self::Frame(frame) => {
                let at = start(out, frames::id::FRAME, 0);
                frame.encode_payload(out);
                finish(out, at);
            }
            Self::Map(map) => put(out, host_memory::id::MAP, &[map.as_bytes()]),
            Self::Unmap(unmap) => put(out, host_memory::id::UNMAP, &[unmap.as_bytes()]),
            Self::GuestMemory(memory) => {
                let at = start(out, guest_frames::id::GUEST_MEMORY, 0);
                memory.encode_payload(out);
                finish(out, at);
            }
            Self::ForgetMemory { resource } => {
                put(out, guest_frames::id::FORGET_MEMORY, &[resource.as_bytes()]);
            }
            Self::GuestFrame(frame) => {
                let at = start(out, guest_frames::id::GUEST_FRAME, 0);
                frame.encode_payload(out);
                finish(out, at);
            }
            Self::DeviceReset => put(out, guest_frames::id::DEVICE_RESET, &[]),
        }
    }

    /// Decodes one whole message.
    pub fn decode(message: &RawMessage<'a>) -> Result<Self, ProtocolError> {
        let request = message.header.request;
        let payload = message.payload;
        let wrong = ProtocolError::Payload { request };
        Ok(match request {
            id::GET_PROTOCOL_FEATURES => Self::GetProtocolFeatures,
            id::SET_PROTOCOL_FEATURES => Self::SetProtocolFeatures(exact(request, payload)?),
            id::GET_DISPLAY_INFO => Self::GetDisplayInfo,
            id::GET_EDID => Self::GetEdid { scanout: exact(request, payload)? },
            id::CURSOR_POS => Self::CursorPos(exact(request, payload)?),
            id::CURSOR_POS_HIDE => Self::CursorHide(exact(request, payload)?),
            id::CURSOR_UPDATE => {
                let (header, image) =
                    CursorUpdateHeader::read_from_prefix(payload).map_err(|_| wrong)?;
                if image.len() != CURSOR_BYTES {
                    return Err(wrong);
                }
                let CursorUpdateHeader { pos, hot_x, hot_y } = header;
                Self::CursorUpdate { pos, hot_x, hot_y, image }
            }
            id::SCANOUT => {
                let ScanoutPayload { scanout, width, height } = exact(request, payload)?;
                Self::Scanout { scanout, width, height }
            }
            id::UPDATE => {
                let (header, pixels) =
                    UpdateHeader::read_from_prefix(payload).map_err(|_| wrong)?;
                if header.rect.area().checked_mul(4) != Some(pixels.len() as u64) {
                    return Err(wrong);
                }
                Self::Update { scanout: header.scanout, rect: header.rect, pixels }
            }
            id::DMABUF_SCANOUT => {
                Self::DmabufScanout { scanout: exact(request, payload)?, modifier: None }
            }
            id::DMABUF_SCANOUT2 => {
                let (scanout, rest) =
                    DmabufScanout::read_from_prefix(payload).map_err(|_| wrong)?;
                Self::DmabufScanout { scanout, modifier: Some(exact(request, rest)?) }
            }
            id::DMABUF_UPDATE => {
                let UpdateHeader { scanout, rect } = exact(request, payload)?;
                Self::DmabufUpdate { scanout, rect }
            }
            frames::id::FRAME => Self::Frame(Frame::decode_payload(payload)?),
            host_memory::id::MAP => Self::Map(exact(request, payload)?),
            host_memory::id::UNMAP => Self::Unmap(exact(request, payload)?),
            guest_frames::id::GUEST_MEMORY => {
                Self::GuestMemory(GuestMemory::decode_payload(payload)?)
            }
            guest_frames::id::FORGET_MEMORY => {
                Self::ForgetMemory { resource: exact(request, payload)? }
            }
            guest_frames::id::GUEST_FRAME => Self::GuestFrame(GuestFrame::decode_payload(payload)?),
            guest_frames::id::DEVICE_RESET => Self::DeviceReset,
            _ => return Err(ProtocolError::Unknown { request, flags: message.header.flags }),
        })
    }

    /// Whether a descriptor belongs to this message.
    pub fn wants_fd(&self) -> bool {
        match self {
            Self::DmabufScanout { scanout, .. } => scanout.rect.width != 0,
            Self::Map(_) => true,
            _ => false,
        }
    }
}

fn put(out: &mut Vec<u8>, request: u32, parts: &[&[u8]]) {
    put_flagged(out, request, 0, parts);
}

fn put_flagged(out: &mut Vec<u8>, request: u32, flags: u32, parts: &[&[u8]]) {
    let at = start(out, request, flags);
    for part in parts {
        out.extend_from_slice(part);
    }
    finish(out, at);
}

impl FromFrontEnd {
    /// Appends the message to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let reply = |out: &mut Vec<u8>, request, payload: &[u8]| {
            put_flagged(out, request, FLAG_REPLY, &[payload]);
        };
        match self {
            Self::ProtocolFeatures(bits) => reply(out, id::GET_PROTOCOL_FEATURES, bits.as_bytes()),
            Self::DisplayInfo(info) => reply(out, id::GET_DISPLAY_INFO, info.as_bytes()),
            Self::Edid(edid) => reply(out, id::GET_EDID, edid.as_bytes()),
            Self::DmabufUpdated => reply(out, id::DMABUF_UPDATE, &[]),
            Self::Mapped(status) => reply(out, host_memory::id::MAP, status.as_bytes()),
            Self::MemoryForgotten => reply(out, guest_frames::id::FORGET_MEMORY, &[]),
            Self::ShmScanout(scanout) => put(out, frames::id::SHM_SCANOUT, &[scanout.as_bytes()]),
            Self::Release(release) => put(out, frames::id::RELEASE, &[release.as_bytes()]),
            Self::Want(want) => put(out, frames::id::WANT, &[want.as_bytes()]),
        }
    }

    /// Decodes one whole message.
    pub fn decode(message: &RawMessage<'_>) -> Result<Self, ProtocolError> {
        let Header { request, flags, .. } = message.header;
        let payload = message.payload;
        Ok(match (request, flags & FLAG_REPLY != 0) {
            (id::GET_PROTOCOL_FEATURES, true) => Self::ProtocolFeatures(exact(request, payload)?),
            (id::GET_DISPLAY_INFO, true) => {
                Self::DisplayInfo(alloc::boxed::Box::new(exact(request, payload)?))
            }
            (id::GET_EDID, true) => Self::Edid(alloc::boxed::Box::new(exact(request, payload)?)),
            (id::DMABUF_UPDATE, true) => Self::DmabufUpdated,
            (host_memory::id::MAP, true) => Self::Mapped(exact(request, payload)?),
            (guest_frames::id::FORGET_MEMORY, true) => Self::MemoryForgotten,
            (frames::id::SHM_SCANOUT, false) => Self::ShmScanout(exact(request, payload)?),
            (frames::id::RELEASE, false) => Self::Release(exact(request, payload)?),
            (frames::id::WANT, false) => Self::Want(exact(request, payload)?),
            _ => return Err(ProtocolError::Unknown { request, flags }),
        })
    }

    /// Whether a descriptor belongs to this message.
    pub fn wants_fd(&self) -> bool {
        matches!(self, Self::ShmScanout(scanout) if scanout.slots != 0)
    }
}

/// The side whose incoming stream is decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Reads [`FromBackEnd`].
    FrontEnd,
    /// Reads [`FromFrontEnd`].
    BackEnd,
}

impl Side {
    fn limit(self, header: &Header) -> Result<usize, ProtocolError> {
        // A back end sends nothing but requests, and QEMU's leaves the flags of UPDATE
        // uninitialised, so they tell nothing there.
        let reply = self == Self::BackEnd && header.flags & FLAG_REPLY != 0;
        let unknown = ProtocolError::Unknown { request: header.request, flags: header.flags };
        let limit = match (self, header.request, reply) {
            (Self::FrontEnd, id::GET_PROTOCOL_FEATURES | id::GET_DISPLAY_INFO, false) => 0,
            (Self::FrontEnd, id::SET_PROTOCOL_FEATURES, false) => size_of::<u64>(),
            (Self::FrontEnd, id::GET_EDID, false) => size_of::<u32>(),
            (Self::FrontEnd, id::CURSOR_POS | id::CURSOR_POS_HIDE, false) => size_of::<CursorPos>(),
            (Self::FrontEnd, id::CURSOR_UPDATE, false) => {
                size_of::<CursorUpdateHeader>() + CURSOR_BYTES
            }
            (Self::FrontEnd, id::SCANOUT, false) => size_of::<ScanoutPayload>(),
            (Self::FrontEnd, id::UPDATE, false) => MAX_UPDATE,
            (Self::FrontEnd, id::DMABUF_SCANOUT, false) => size_of::<DmabufScanout>(),
            (Self::FrontEnd, id::DMABUF_SCANOUT2, false) => {
                size_of::<DmabufScanout>() + size_of::<u64>()
            }
            (Self::FrontEnd, id::DMABUF_UPDATE, false) => size_of::<UpdateHeader>(),
            (Self::FrontEnd, frames::id::FRAME, false) => {
                size_of::<frames::FrameHeader>() + frames::MAX_RECTS * size_of::<Rect>()
            }
            (Self::FrontEnd, host_memory::id::MAP, false) => size_of::<Map>(),
            (Self::FrontEnd, host_memory::id::UNMAP, false) => size_of::<Unmap>(),
            (Self::FrontEnd, guest_frames::id::GUEST_MEMORY, false) => GuestMemory::MAX_BYTES,
            (Self::FrontEnd, guest_frames::id::FORGET_MEMORY, false) => size_of::<u32>(),
            (Self::FrontEnd, guest_frames::id::GUEST_FRAME, false) => GuestFrame::MAX_BYTES,
            (Self::FrontEnd, guest_frames::id::DEVICE_RESET, false) => 0,
            (Self::BackEnd, host_memory::id::MAP, true) => size_of::<u32>(),
            (Self::BackEnd, guest_frames::id::FORGET_MEMORY, true) => 0,
            (Self::BackEnd, id::GET_PROTOCOL_FEATURES, true) => size_of::<u64>(),
            (Self::BackEnd, id::GET_DISPLAY_INFO, true) => size_of::<RespDisplayInfo>(),
            (Self::BackEnd, id::GET_EDID, true) => size_of::<RespEdid>(),
            (Self::BackEnd, id::DMABUF_UPDATE, true) => 0,
            (Self::BackEnd, frames::id::SHM_SCANOUT, false) => size_of::<ShmScanout>(),
            (Self::BackEnd, frames::id::RELEASE, false) => size_of::<Release>(),
            (Self::BackEnd, frames::id::WANT, false) => size_of::<Want>(),
            _ => return Err(unknown),
        };
        Ok(limit)
    }
}

/// One message whose payload is not yet interpreted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RawMessage<'a> {
    /// Its header; the size has been checked against the limit of that message.
    pub header: Header,
    /// Its payload.
    pub payload: &'a [u8],
}

/// Cuts a byte stream into messages. Holds no more than what was pushed and not yet consumed; a
/// header that announces too much is refused before its payload arrives.
#[derive(Debug)]
pub struct Decoder {
    side: Side,
    buffer: Vec<u8>,
    consumed: usize,
}

impl Decoder {
    /// A decoder at the start of a stream.
    pub fn new(side: Side) -> Self {
        Self { side, buffer: Vec::new(), consumed: 0 }
    }

    /// Adds received bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.consumed > 0 {
            self.buffer.drain(..self.consumed);
            self.consumed = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole message, if there is one. After an error the stream cannot be read further.
    pub fn next_message(&mut self) -> Result<Option<RawMessage<'_>>, ProtocolError> {
        let rest = &self.buffer[self.consumed..];
        let Ok((header, rest)) = Header::read_from_prefix(rest) else { return Ok(None) };
        let limit = self.side.limit(&header)?;
        let size = header.size as usize;
        if size > limit {
            let Header { request, size, .. } = header;
            return Err(ProtocolError::TooLong { request, size, limit });
        }
        if rest.len() < size {
            return Ok(None);
        }
        let start = self.consumed + HEADER_SIZE;
        self.consumed = start + size;
        if self.consumed == self.buffer.len() && self.buffer.capacity() > 4 * 65536 {
            // A big UPDATE must not occupy its memory for ever.
            let payload_end = self.consumed;
            self.buffer.shrink_to(payload_end);
        }
        Ok(Some(RawMessage { header, payload: &self.buffer[start..start + size] }))
    }
}

#[cfg(test)]
mod tests {
    use alloc::{boxed::Box, vec};

    use super::*;
    use crate::{
        format::{BlobLayout, PixelFormat},
        pieces::Pieces,
        virtio::{BackingEntry, CtrlHdr, kind},
    };

    fn outgoing() -> Vec<FromBackEnd<'static>> {
        static IMAGE: [u8; CURSOR_BYTES] = [7; CURSOR_BYTES];
        let pos = CursorPos { scanout: 1, x: 2, y: 3 };
        let dmabuf = DmabufScanout { scanout: 1, fd_stride: 9, ..Default::default() };
        vec![
            FromBackEnd::GetProtocolFeatures,
            FromBackEnd::SetProtocolFeatures(ProtocolFeatures::all().bits()),
            FromBackEnd::GetDisplayInfo,
            FromBackEnd::GetEdid { scanout: 3 },
            FromBackEnd::CursorPos(pos),
            FromBackEnd::CursorHide(pos),
            FromBackEnd::CursorUpdate { pos, hot_x: 4, hot_y: 5, image: &IMAGE },
            FromBackEnd::Scanout { scanout: 0, width: 1, height: 2 },
            FromBackEnd::Update { scanout: 0, rect: Rect::new(1, 2, 2, 1), pixels: &IMAGE[..8] },
            FromBackEnd::DmabufScanout { scanout: dmabuf, modifier: None },
            FromBackEnd::DmabufScanout { scanout: dmabuf, modifier: Some(77) },
            FromBackEnd::DmabufUpdate { scanout: 0, rect: Rect::of_size(5, 5) },
            FromBackEnd::Map(Map {
                offset: 0x1000,
                length: 0x2000,
                file_offset: 0x3000,
                mapping: 4,
            }),
            FromBackEnd::Unmap(Unmap { offset: 0x1000, mapping: 4 }),
            FromBackEnd::GuestMemory(GuestMemory {
                resource: 7,
                pieces: Pieces::new(vec![
                    BackingEntry { address: 1 << 33, length: 4096 },
                    BackingEntry { address: 0x7000, length: 12 },
                ]),
            }),
            FromBackEnd::GuestFrame(GuestFrame {
                scanout: 2,
                resource: 7,
                part: Rect::new(3, 4, 30, 40),
                layout: BlobLayout { format: PixelFormat::R8G8B8A8, stride: 160, offset: 64 },
                sequence: 1 << 40,
                damage: vec![Rect::of_size(3, 3), Rect::new(4, 4, 1, 1)],
            }),
            FromBackEnd::ForgetMemory { resource: 7 },
            FromBackEnd::DeviceReset,
            FromBackEnd::Frame(Frame {
                scanout: 1,
                generation: 2,
                slot: 1,
                sequence: 99,
                damage: vec![Rect::of_size(3, 3), Rect::new(4, 4, 1, 1)],
            }),
        ]
    }

    fn incoming() -> Vec<FromFrontEnd> {
        let info =
            RespDisplayInfo { hdr: CtrlHdr::new(kind::OK_DISPLAY_INFO), ..Default::default() };
        vec![
            FromFrontEnd::ProtocolFeatures(5),
            FromFrontEnd::DisplayInfo(Box::new(info)),
            FromFrontEnd::Edid(Box::new(RespEdid::new(CtrlHdr::new(kind::OK_EDID), &[1, 2, 3]))),
            FromFrontEnd::DmabufUpdated,
            FromFrontEnd::ShmScanout(ShmScanout::layout(0, 1, 640, 480, 3).unwrap()),
            FromFrontEnd::Release(Release { scanout: 0, generation: 1, slot: 2, reserved: 0 }),
            FromFrontEnd::Mapped(22),
            FromFrontEnd::MemoryForgotten,
            FromFrontEnd::Want(Want { scanout: 0, max_fps: 60, flags: 1, reserved: 0 }),
        ]
    }

    #[test]
    fn every_message_survives_byte_by_byte_delivery() {
        let mut bytes = Vec::new();
        outgoing().iter().for_each(|message| message.encode(&mut bytes));
        let mut decoder = Decoder::new(Side::FrontEnd);
        let mut seen = 0;
        for byte in &bytes {
            decoder.push(&[*byte]);
            while let Some(raw) = decoder.next_message().unwrap() {
                assert_eq!(FromBackEnd::decode(&raw).unwrap(), outgoing()[seen]);
                seen += 1;
            }
        }
        assert_eq!(seen, outgoing().len());

        let mut bytes = Vec::new();
        incoming().iter().for_each(|message| message.encode(&mut bytes));
        let mut decoder = Decoder::new(Side::BackEnd);
        decoder.push(&bytes);
        for expected in incoming() {
            let raw = decoder.next_message().unwrap().unwrap();
            assert_eq!(FromFrontEnd::decode(&raw).unwrap(), expected);
        }
        assert_eq!(decoder.next_message(), Ok(None));
    }

    #[test]
    fn sizes_match_the_standard() {
        let size = |message: &FromBackEnd<'_>| {
            let mut bytes = Vec::new();
            message.encode(&mut bytes);
            bytes.len() - HEADER_SIZE
        };
        let sizes: Vec<usize> = outgoing().iter().map(size).collect();
        assert_eq!(sizes[..12], [0, 8, 0, 4, 12, 12, 16404, 12, 28, 40, 48, 20]);
    }

    #[test]
    fn a_header_is_judged_before_its_payload_arrives() {
        let mut decoder = Decoder::new(Side::FrontEnd);
        let header = Header { request: id::SCANOUT, flags: 0, size: u32::MAX };
        decoder.push(header.as_bytes());
        assert!(matches!(decoder.next_message(), Err(ProtocolError::TooLong { limit: 12, .. })));

        let mut decoder = Decoder::new(Side::FrontEnd);
        decoder.push(Header { request: 99, flags: 0, size: 0 }.as_bytes());
        assert!(matches!(decoder.next_message(), Err(ProtocolError::Unknown { .. })));

        // QEMU's back end does not set the flags.
        let mut decoder = Decoder::new(Side::FrontEnd);
        decoder
            .push(Header { request: id::GET_DISPLAY_INFO, flags: 0xffff_ffff, size: 0 }.as_bytes());
        assert!(decoder.next_message().unwrap().is_some());

        // A request is not an answer.
        let mut decoder = Decoder::new(Side::BackEnd);
        decoder.push(Header { request: id::GET_EDID, flags: 0, size: 0 }.as_bytes());
        assert!(matches!(decoder.next_message(), Err(ProtocolError::Unknown { .. })));
    }

    #[test]
    fn lying_payloads_are_refused() {
        let decode = |request: u32, payload: &[u8]| {
            let header = Header { request, flags: 0, size: payload.len() as u32 };
            FromBackEnd::decode(&RawMessage { header, payload }).map(|_| ())
        };
        let mut update = UpdateHeader { scanout: 0, rect: Rect::of_size(2, 2) }.as_bytes().to_vec();
        update.extend_from_slice(&[0; 12]);
        assert_eq!(decode(id::UPDATE, &update), Err(ProtocolError::Payload { request: 8 }));
        let update = UpdateHeader { scanout: 0, rect: Rect::of_size(u32::MAX, u32::MAX) };
        assert!(decode(id::UPDATE, update.as_bytes()).is_err());
        assert!(decode(id::CURSOR_UPDATE, &[0; 30]).is_err());
        let frame = frames::FrameHeader { rect_count: 60, ..Default::default() };
        assert!(decode(frames::id::FRAME, frame.as_bytes()).is_err());
        let frame = frames::FrameHeader { rect_count: u32::MAX, ..Default::default() };
        assert!(decode(frames::id::FRAME, frame.as_bytes()).is_err());
        for count in [1_u32, u32::MAX] {
            let memory = [7, count].map(u32::to_ne_bytes).concat();
            assert!(decode(guest_frames::id::GUEST_MEMORY, &memory).is_err(), "{count}");
        }
        // Neither an unknown format nor a frame without damage.
        for (format, rects) in [(5_u32, 1_usize), (1, 0)] {
            let words = [0, 7, 0, 0, 9, 9, format, 36, 0, rects as u32, 0, 0];
            let mut frame = words.map(u32::to_ne_bytes).concat();
            frame.resize(frame.len() + rects * size_of::<Rect>(), 1);
            assert!(decode(guest_frames::id::GUEST_FRAME, &frame).is_err(), "{format}");
        }
    }
}
