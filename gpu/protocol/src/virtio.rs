//! Commands and answers in the control and cursor queues (VIRTIO 1.3 §5.7.6, and
//! `include/uapi/linux/virtio_gpu.h` for numbers).
//!
//! All integers are little-endian. A command is decoded from a private copy of the guest's bytes,
//! so what was checked cannot change afterwards.

use alloc::vec::Vec;

use bitflags::bitflags;
use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U32, U64},
};

use crate::rect::Rect;

/// `VIRTIO_GPU_MAX_SCANOUTS`: what the answer to GET_DISPLAY_INFO has room for.
pub const MAX_SCANOUTS: usize = 16;

/// Width and height of cursor images in pixels.
pub const CURSOR_SIZE: u32 = 64;

/// Bytes in a cursor image.
pub const CURSOR_BYTES: usize = (CURSOR_SIZE * CURSOR_SIZE * 4) as usize;

/// Most (address, length) entries accepted in one ATTACH_BACKING: a 4K frame in 4 KiB pages needs
/// 8100.
pub const MAX_BACKING_ENTRIES: u32 = 16_384;

/// Longest command: ATTACH_BACKING with all its entries.
pub const MAX_COMMAND: usize =
    size_of::<AttachBacking>() + MAX_BACKING_ENTRIES as usize * size_of::<MemEntry>();

/// Longest answer a 2D device gives.
pub const MAX_RESPONSE: usize = size_of::<RespEdid>();

/// Index of the control queue.
pub const CONTROL_QUEUE: u16 = 0;

/// Index of the cursor queue.
pub const CURSOR_QUEUE: u16 = 1;

/// Number of queues.
pub const QUEUES: usize = 2;

bitflags! {
    /// Device features (§5.7.3).
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Features: u64 {
        /// 3D commands in virgl's format.
        const VIRGL = 1 << 0;
        /// GET_EDID.
        const EDID = 1 << 1;
        /// RESOURCE_ASSIGN_UUID.
        const RESOURCE_UUID = 1 << 2;
        /// Blob resources.
        const RESOURCE_BLOB = 1 << 3;
        /// Several context types and per-context fences.
        const CONTEXT_INIT = 1 << 4;
    }
}

bitflags! {
    /// `events_read` and `events_clear` in the configuration space (§5.7.4).
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Events: u32 {
        /// The display configuration changed: ask GET_DISPLAY_INFO and GET_EDID again.
        const DISPLAY = 1 << 0;
    }
}

/// The configuration space (§5.7.4).
#[repr(C)]
#[derive(
    Debug, Clone, Copy, Default, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, PartialEq,
)]
pub struct Config {
    /// Pending [`Events`].
    pub events_read: U32,
    /// Writing a bit clears it in `events_read`.
    pub events_clear: U32,
    /// 1 to [`MAX_SCANOUTS`].
    pub num_scanouts: U32,
    /// Number of capability sets.
    pub num_capsets: U32,
}

/// What a command asks for, or how it was answered: the `type` of a [`CtrlHdr`].
pub mod kind {
    #![allow(missing_docs)] // the specification's names
    pub const GET_DISPLAY_INFO: u32 = 0x0100;
    pub const RESOURCE_CREATE_2D: u32 = 0x0101;
    pub const RESOURCE_UNREF: u32 = 0x0102;
    pub const SET_SCANOUT: u32 = 0x0103;
    pub const RESOURCE_FLUSH: u32 = 0x0104;
    pub const TRANSFER_TO_HOST_2D: u32 = 0x0105;
    pub const RESOURCE_ATTACH_BACKING: u32 = 0x0106;
    pub const RESOURCE_DETACH_BACKING: u32 = 0x0107;
    pub const GET_CAPSET_INFO: u32 = 0x0108;
    pub const GET_CAPSET: u32 = 0x0109;
    pub const GET_EDID: u32 = 0x010a;
    pub const RESOURCE_ASSIGN_UUID: u32 = 0x010b;
    pub const RESOURCE_CREATE_BLOB: u32 = 0x010c;
    pub const SET_SCANOUT_BLOB: u32 = 0x010d;

    pub const CTX_CREATE: u32 = 0x0200;
    pub const CTX_DESTROY: u32 = 0x0201;
    pub const CTX_ATTACH_RESOURCE: u32 = 0x0202;
    pub const CTX_DETACH_RESOURCE: u32 = 0x0203;
    pub const RESOURCE_CREATE_3D: u32 = 0x0204;
    pub const TRANSFER_TO_HOST_3D: u32 = 0x0205;
    pub const TRANSFER_FROM_HOST_3D: u32 = 0x0206;
    pub const SUBMIT_3D: u32 = 0x0207;
    pub const RESOURCE_MAP_BLOB: u32 = 0x0208;
    pub const RESOURCE_UNMAP_BLOB: u32 = 0x0209;

    pub const UPDATE_CURSOR: u32 = 0x0300;
    pub const MOVE_CURSOR: u32 = 0x0301;

    pub const OK_NODATA: u32 = 0x1100;
    pub const OK_DISPLAY_INFO: u32 = 0x1101;
    pub const OK_CAPSET_INFO: u32 = 0x1102;
    pub const OK_CAPSET: u32 = 0x1103;
    pub const OK_EDID: u32 = 0x1104;
    pub const OK_RESOURCE_UUID: u32 = 0x1105;
    pub const OK_MAP_INFO: u32 = 0x1106;

    pub const ERR_UNSPEC: u32 = 0x1200;
    pub const ERR_OUT_OF_MEMORY: u32 = 0x1201;
    pub const ERR_INVALID_SCANOUT_ID: u32 = 0x1202;
    pub const ERR_INVALID_RESOURCE_ID: u32 = 0x1203;
    pub const ERR_INVALID_CONTEXT_ID: u32 = 0x1204;
    pub const ERR_INVALID_PARAMETER: u32 = 0x1205;
}

/// Why the device refuses a command: the error answers of §5.7.6.8.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[repr(u32)]
pub enum Refusal {
    /// Unknown command, or one that the negotiated features do not allow.
    #[error("not supported")]
    Unspecified = kind::ERR_UNSPEC,
    /// A limit on memory was reached.
    #[error("out of memory")]
    OutOfMemory = kind::ERR_OUT_OF_MEMORY,
    /// No such scanout.
    #[error("invalid scanout id")]
    InvalidScanout = kind::ERR_INVALID_SCANOUT_ID,
    /// No such resource, or the id is taken.
    #[error("invalid resource id")]
    InvalidResource = kind::ERR_INVALID_RESOURCE_ID,
    /// No such 3D context.
    #[error("invalid context id")]
    InvalidContext = kind::ERR_INVALID_CONTEXT_ID,
    /// A rectangle, offset, format or length out of bounds.
    #[error("invalid parameter")]
    InvalidParameter = kind::ERR_INVALID_PARAMETER,
}

/// [`CtrlHdr::flags`]: answer only when the work is done, and repeat the fence id.
pub const FLAG_FENCE: u32 = 1 << 0;

/// [`CtrlHdr::flags`]: `ring_idx` is valid.
pub const FLAG_INFO_RING_IDX: u32 = 1 << 1;

macro_rules! wire {
    ($($(#[$meta:meta])* pub struct $name:ident {
        $($(#[$field_meta:meta])* pub $field:ident: $type:ty,)*
    })*) => {$(
        $(#[$meta])*
        #[repr(C)]
        #[derive(
            Debug, Clone, Copy, PartialEq, Eq,
            FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned,
        )]
        pub struct $name { $($(#[$field_meta])* pub $field: $type,)* }
    )*};
}

wire! {
    /// The start of every command and answer, `virtio_gpu_ctrl_hdr`.
    #[derive(Default)]
    pub struct CtrlHdr {
        /// One of [`kind`].
        pub kind: U32,
        /// [`FLAG_FENCE`], [`FLAG_INFO_RING_IDX`].
        pub flags: U32,
        /// Meaningful with [`FLAG_FENCE`].
        pub fence_id: U64,
        /// 3D context.
        pub ctx_id: U32,
        /// Meaningful with [`FLAG_INFO_RING_IDX`].
        pub ring_idx: u8,
        /// Zero.
        pub padding: [u8; 3],
    }

    /// A rectangle on the wire.
    #[derive(Default)]
    pub struct WireRect {
        /// Left edge.
        pub x: U32,
        /// Top edge.
        pub y: U32,
        /// Width.
        pub width: U32,
        /// Height.
        pub height: U32,
    }

    /// One scanout in [`RespDisplayInfo`].
    #[derive(Default)]
    pub struct DisplayOne {
        /// Position among the monitors, and preferred size.
        pub rect: WireRect,
        /// 1: a monitor is plugged in.
        pub enabled: U32,
        /// Zero.
        pub flags: U32,
    }

    /// Answer to GET_DISPLAY_INFO.
    #[derive(Default)]
    pub struct RespDisplayInfo {
        /// [`kind::OK_DISPLAY_INFO`].
        pub hdr: CtrlHdr,
        /// All possible scanouts.
        pub scanouts: [DisplayOne; MAX_SCANOUTS],
    }

    /// RESOURCE_CREATE_2D.
    pub struct ResourceCreate2d {
        /// Header.
        pub hdr: CtrlHdr,
        /// Chosen by the guest, not 0.
        pub resource_id: U32,
        /// See [`crate::format::PixelFormat`].
        pub format: U32,
        /// In pixels.
        pub width: U32,
        /// In pixels.
        pub height: U32,
    }

    /// RESOURCE_UNREF, RESOURCE_DETACH_BACKING.
    pub struct ResourceCommand {
        /// Header.
        pub hdr: CtrlHdr,
        /// Which.
        pub resource_id: U32,
        /// Zero.
        pub padding: U32,
    }

    /// SET_SCANOUT.
    pub struct SetScanout {
        /// Header.
        pub hdr: CtrlHdr,
        /// Part of the resource to show.
        pub rect: WireRect,
        /// Which scanout.
        pub scanout_id: U32,
        /// 0 switches the scanout off.
        pub resource_id: U32,
    }

    /// RESOURCE_FLUSH.
    pub struct ResourceFlush {
        /// Header.
        pub hdr: CtrlHdr,
        /// Changed part of the resource.
        pub rect: WireRect,
        /// Which.
        pub resource_id: U32,
        /// Zero.
        pub padding: U32,
    }

    /// TRANSFER_TO_HOST_2D.
    pub struct TransferToHost2d {
        /// Header.
        pub hdr: CtrlHdr,
        /// Destination in the resource.
        pub rect: WireRect,
        /// Where in the backing the first pixel of `rect` is, in bytes.
        pub offset: U64,
        /// Which.
        pub resource_id: U32,
        /// Zero.
        pub padding: U32,
    }

    /// RESOURCE_ATTACH_BACKING, followed by `entries` times [`MemEntry`].
    pub struct AttachBacking {
        /// Header.
        pub hdr: CtrlHdr,
        /// Which.
        pub resource_id: U32,
        /// How many [`MemEntry`] follow.
        pub entries: U32,
    }

    /// A piece of guest memory.
    pub struct MemEntry {
        /// Guest physical address.
        pub address: U64,
        /// Bytes.
        pub length: U32,
        /// Zero.
        pub padding: U32,
    }

    /// GET_CAPSET_INFO.
    pub struct GetCapsetInfo {
        /// Header.
        pub hdr: CtrlHdr,
        /// 0 to `num_capsets - 1`.
        pub index: U32,
        /// Zero.
        pub padding: U32,
    }

    /// GET_EDID.
    pub struct GetEdid {
        /// Header.
        pub hdr: CtrlHdr,
        /// Which scanout.
        pub scanout: U32,
        /// Zero.
        pub padding: U32,
    }

    /// Answer to GET_EDID.
    pub struct RespEdid {
        /// [`kind::OK_EDID`].
        pub hdr: CtrlHdr,
        /// Valid bytes in `edid`.
        pub size: U32,
        /// Zero.
        pub padding: U32,
        /// The EDID and its extensions.
        pub edid: [u8; 1024],
    }

    /// Position of a cursor.
    #[derive(Default)]
    pub struct CursorPos {
        /// Which scanout.
        pub scanout_id: U32,
        /// Position of the hot spot.
        pub x: U32,
        /// Position of the hot spot.
        pub y: U32,
        /// Zero.
        pub padding: U32,
    }

    /// UPDATE_CURSOR, MOVE_CURSOR.
    pub struct UpdateCursor {
        /// Header.
        pub hdr: CtrlHdr,
        /// Where.
        pub pos: CursorPos,
        /// The image; 0 hides the cursor. Not used by MOVE_CURSOR.
        pub resource_id: U32,
        /// Hot spot inside the image. Not used by MOVE_CURSOR.
        pub hot_x: U32,
        /// Hot spot inside the image. Not used by MOVE_CURSOR.
        pub hot_y: U32,
        /// Zero.
        pub padding: U32,
    }
}

impl From<WireRect> for Rect {
    fn from(r: WireRect) -> Self {
        Self::new(r.x.get(), r.y.get(), r.width.get(), r.height.get())
    }
}

impl From<Rect> for WireRect {
    fn from(r: Rect) -> Self {
        Self { x: r.x.into(), y: r.y.into(), width: r.width.into(), height: r.height.into() }
    }
}

impl CtrlHdr {
    /// A header without fence.
    pub fn new(kind: u32) -> Self {
        Self { kind: kind.into(), ..Self::default() }
    }

    /// The header of an answer of type `kind` to this command: a fence is repeated.
    pub fn answer(&self, kind: u32) -> Self {
        let flags = self.flags.get();
        if flags & FLAG_FENCE == 0 {
            return Self::new(kind);
        }
        let ring = flags & FLAG_INFO_RING_IDX;
        Self {
            kind: kind.into(),
            flags: (FLAG_FENCE | ring).into(),
            fence_id: self.fence_id,
            ctx_id: self.ctx_id,
            ring_idx: if ring == 0 { 0 } else { self.ring_idx },
            padding: [0; 3],
        }
    }
}

impl RespEdid {
    /// An answer with this EDID, cut at 1024 bytes.
    pub fn new(hdr: CtrlHdr, edid: &[u8]) -> Self {
        let mut answer = Self { hdr, size: 0.into(), padding: 0.into(), edid: [0; 1024] };
        let length = edid.len().min(answer.edid.len());
        answer.edid[..length].copy_from_slice(&edid[..length]);
        answer.size = (length as u32).into();
        answer
    }

    /// The valid bytes; a wrong size is cut.
    pub fn bytes(&self) -> &[u8] {
        let length = (self.size.get() as usize).min(self.edid.len());
        &self.edid[..length]
    }
}

/// A piece of guest memory behind a resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BackingEntry {
    /// Guest physical address.
    pub address: u64,
    /// Bytes.
    pub length: u32,
}

/// A decoded command of the control or cursor queue.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)] // the fields are those of the wire structures above
pub enum Command {
    GetDisplayInfo,
    GetEdid {
        scanout: u32,
    },
    ResourceCreate2d {
        resource: u32,
        format: u32,
        width: u32,
        height: u32,
    },
    ResourceUnref {
        resource: u32,
    },
    SetScanout {
        scanout: u32,
        resource: u32,
        rect: Rect,
    },
    ResourceFlush {
        resource: u32,
        rect: Rect,
    },
    TransferToHost2d {
        resource: u32,
        rect: Rect,
        offset: u64,
    },
    AttachBacking {
        resource: u32,
        entries: Vec<BackingEntry>,
    },
    DetachBacking {
        resource: u32,
    },
    GetCapsetInfo {
        index: u32,
    },
    UpdateCursor {
        scanout: u32,
        x: u32,
        y: u32,
        resource: u32,
        hot_x: u32,
        hot_y: u32,
    },
    MoveCursor {
        scanout: u32,
        x: u32,
        y: u32,
    },
    /// Known or not, no 2D device has it; `payload` is what followed the header.
    Other {
        kind: u32,
    },
}

fn fixed<T: FromBytes>(bytes: &[u8]) -> Result<T, Refusal> {
    T::read_from_prefix(bytes).map(|(value, _)| value).map_err(|_| Refusal::InvalidParameter)
}

/// Decodes a command; `bytes` is everything device-readable of its descriptor chain. The header is
/// returned for as long as there is one, so that an answer can be given to a bad command.
pub fn decode(bytes: &[u8]) -> (CtrlHdr, Result<Command, Refusal>) {
    let Ok((hdr, _)) = CtrlHdr::read_from_prefix(bytes) else {
        return (CtrlHdr::default(), Err(Refusal::InvalidParameter));
    };
    (hdr, decode_body(hdr.kind.get(), bytes))
}

fn decode_body(kind: u32, bytes: &[u8]) -> Result<Command, Refusal> {
    Ok(match kind {
        kind::GET_DISPLAY_INFO => Command::GetDisplayInfo,
        kind::GET_EDID => {
            let c: GetEdid = fixed(bytes)?;
            Command::GetEdid { scanout: c.scanout.get() }
        }
        kind::RESOURCE_CREATE_2D => {
            let c: ResourceCreate2d = fixed(bytes)?;
            Command::ResourceCreate2d {
                resource: c.resource_id.get(),
                format: c.format.get(),
                width: c.width.get(),
                height: c.height.get(),
            }
        }
        kind::RESOURCE_UNREF => {
            let c: ResourceCommand = fixed(bytes)?;
            Command::ResourceUnref { resource: c.resource_id.get() }
        }
        kind::SET_SCANOUT => {
            let c: SetScanout = fixed(bytes)?;
            Command::SetScanout {
                scanout: c.scanout_id.get(),
                resource: c.resource_id.get(),
                rect: c.rect.into(),
            }
        }
        kind::RESOURCE_FLUSH => {
            let c: ResourceFlush = fixed(bytes)?;
            Command::ResourceFlush { resource: c.resource_id.get(), rect: c.rect.into() }
        }
        kind::TRANSFER_TO_HOST_2D => {
            let c: TransferToHost2d = fixed(bytes)?;
            Command::TransferToHost2d {
                resource: c.resource_id.get(),
                rect: c.rect.into(),
                offset: c.offset.get(),
            }
        }
        kind::RESOURCE_ATTACH_BACKING => decode_backing(bytes)?,
        kind::RESOURCE_DETACH_BACKING => {
            let c: ResourceCommand = fixed(bytes)?;
            Command::DetachBacking { resource: c.resource_id.get() }
        }
        kind::GET_CAPSET_INFO => {
            let c: GetCapsetInfo = fixed(bytes)?;
            Command::GetCapsetInfo { index: c.index.get() }
        }
        kind::UPDATE_CURSOR => {
            let c: UpdateCursor = fixed(bytes)?;
            Command::UpdateCursor {
                scanout: c.pos.scanout_id.get(),
                x: c.pos.x.get(),
                y: c.pos.y.get(),
                resource: c.resource_id.get(),
                hot_x: c.hot_x.get(),
                hot_y: c.hot_y.get(),
            }
        }
        kind::MOVE_CURSOR => {
            let c: UpdateCursor = fixed(bytes)?;
            Command::MoveCursor {
                scanout: c.pos.scanout_id.get(),
                x: c.pos.x.get(),
                y: c.pos.y.get(),
            }
        }
        kind => Command::Other { kind },
    })
}

fn decode_backing(bytes: &[u8]) -> Result<Command, Refusal> {
    let (c, rest) =
        AttachBacking::read_from_prefix(bytes).map_err(|_| Refusal::InvalidParameter)?;
    let count = c.entries.get();
    if count > MAX_BACKING_ENTRIES {
        return Err(Refusal::InvalidParameter);
    }
    let (wire, _) = <[MemEntry]>::ref_from_prefix_with_elems(rest, count as usize)
        .map_err(|_| Refusal::InvalidParameter)?;
    let entries = wire
        .iter()
        .map(|entry| BackingEntry { address: entry.address.get(), length: entry.length.get() })
        .collect();
    Ok(Command::AttachBacking { resource: c.resource_id.get(), entries })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_of_the_kernel_header() {
        assert_eq!(size_of::<CtrlHdr>(), 24);
        assert_eq!(size_of::<RespDisplayInfo>(), 408);
        assert_eq!(size_of::<RespEdid>(), 1056);
        assert_eq!(size_of::<ResourceCreate2d>(), 40);
        assert_eq!(size_of::<SetScanout>(), 48);
        assert_eq!(size_of::<TransferToHost2d>(), 56);
        assert_eq!(size_of::<AttachBacking>(), 32);
        assert_eq!(size_of::<MemEntry>(), 16);
        assert_eq!(size_of::<UpdateCursor>(), 56);
        assert_eq!(size_of::<Config>(), 16);
    }

    #[test]
    fn truncated_commands_are_refused_with_their_header() {
        let mut hdr = CtrlHdr::new(kind::SET_SCANOUT);
        hdr.flags = FLAG_FENCE.into();
        hdr.fence_id = 7.into();
        let (seen, command) = decode(hdr.as_bytes());
        assert_eq!(seen, hdr);
        assert_eq!(command, Err(Refusal::InvalidParameter));
        let answer = seen.answer(kind::ERR_INVALID_PARAMETER);
        assert_eq!((answer.fence_id.get(), answer.flags.get()), (7, FLAG_FENCE));
        assert_eq!(decode(&hdr.as_bytes()[..23]).1, Err(Refusal::InvalidParameter));
        assert_eq!(decode(&[]).1, Err(Refusal::InvalidParameter));
    }

    #[test]
    fn backing_lists_are_bounded_by_what_is_there() {
        let attach = |entries: u32, present: usize| {
            let c = AttachBacking {
                hdr: CtrlHdr::new(kind::RESOURCE_ATTACH_BACKING),
                resource_id: 1.into(),
                entries: entries.into(),
            };
            let mut bytes = c.as_bytes().to_vec();
            for i in 0..present {
                let entry = MemEntry {
                    address: (i as u64 * 4096).into(),
                    length: 4096.into(),
                    padding: 0.into(),
                };
                bytes.extend_from_slice(entry.as_bytes());
            }
            decode(&bytes).1
        };
        assert!(
            matches!(attach(3, 3), Ok(Command::AttachBacking { entries, .. }) if entries.len() == 3)
        );
        assert_eq!(attach(3, 2), Err(Refusal::InvalidParameter));
        assert_eq!(attach(u32::MAX, 3), Err(Refusal::InvalidParameter));
        assert_eq!(attach(MAX_BACKING_ENTRIES + 1, 0), Err(Refusal::InvalidParameter));
    }
}
