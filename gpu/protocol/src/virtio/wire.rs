//! The structures of `include/uapi/linux/virtio_gpu.h`, little-endian.

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{U32, U64},
};

use super::{FLAG_FENCE, FLAG_INFO_RING_IDX, MAX_SCANOUTS};
use crate::rect::Rect;

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
        /// One of [`kind`](super::kind).
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
        /// [`kind::OK_DISPLAY_INFO`](super::kind::OK_DISPLAY_INFO).
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

    /// Answer to GET_CAPSET_INFO.
    pub struct RespCapsetInfo {
        /// [`kind::OK_CAPSET_INFO`](super::kind::OK_CAPSET_INFO).
        pub hdr: CtrlHdr,
        /// Id of the set, see [`capset`](super::capset).
        pub capset_id: U32,
        /// Newest version.
        pub max_version: U32,
        /// Bytes of that version.
        pub max_size: U32,
        /// Zero.
        pub padding: U32,
    }

    /// GET_CAPSET. The answer is a header and the set's bytes.
    pub struct GetCapset {
        /// Header.
        pub hdr: CtrlHdr,
        /// Id of the set.
        pub capset_id: U32,
        /// 0 to the newest.
        pub capset_version: U32,
    }

    /// Answer to RESOURCE_ASSIGN_UUID.
    pub struct RespResourceUuid {
        /// [`kind::OK_RESOURCE_UUID`](super::kind::OK_RESOURCE_UUID).
        pub hdr: CtrlHdr,
        /// The name other virtio devices may know the resource by.
        pub uuid: [u8; 16],
    }

    /// RESOURCE_CREATE_BLOB, followed by `entries` times [`MemEntry`].
    pub struct CreateBlob {
        /// Header; its context is used with memory of the host.
        pub hdr: CtrlHdr,
        /// Chosen by the guest, not 0.
        pub resource_id: U32,
        /// One of [`blob_mem`](super::blob_mem).
        pub blob_mem: U32,
        /// How it will be used.
        pub blob_flags: U32,
        /// How many [`MemEntry`] follow.
        pub entries: U32,
        /// Which object of the context, for memory of the host.
        pub blob_id: U64,
        /// Bytes.
        pub size: U64,
    }

    /// RESOURCE_MAP_BLOB.
    pub struct MapBlob {
        /// Header.
        pub hdr: CtrlHdr,
        /// Which blob.
        pub resource_id: U32,
        /// Not used.
        pub padding: U32,
        /// Where in the shared memory region.
        pub offset: U64,
    }

    /// Answer to RESOURCE_MAP_BLOB.
    pub struct RespMapInfo {
        /// Header.
        pub hdr: CtrlHdr,
        /// How the memory is cached: [`map_info`](super::map_info).
        pub map_info: U32,
        /// Not used.
        pub padding: U32,
    }

    /// SET_SCANOUT_BLOB.
    pub struct SetScanoutBlob {
        /// Header.
        pub hdr: CtrlHdr,
        /// Part of the picture to show.
        pub rect: WireRect,
        /// Which scanout.
        pub scanout_id: U32,
        /// 0 switches the scanout off.
        pub resource_id: U32,
        /// The picture's width in pixels.
        pub width: U32,
        /// The picture's height in pixels.
        pub height: U32,
        /// See [`crate::format::PixelFormat`].
        pub format: U32,
        /// Zero.
        pub padding: U32,
        /// Bytes from one row to the next, per plane.
        pub strides: [U32; 4],
        /// Where the first pixel is, per plane.
        pub offsets: [U32; 4],
    }

    /// CTX_CREATE; the id is in the header.
    pub struct ContextCreate {
        /// Header.
        pub hdr: CtrlHdr,
        /// Valid bytes in `debug_name`.
        pub name_length: U32,
        /// The lowest byte is the capability set the context speaks, or 0.
        pub context_init: U32,
        /// For logs.
        pub debug_name: [u8; 64],
    }

    /// RESOURCE_CREATE_3D: the parameters are Gallium's.
    pub struct ResourceCreate3d {
        /// Header.
        pub hdr: CtrlHdr,
        /// Chosen by the guest, not 0.
        pub resource_id: U32,
        /// Buffer, 1D, 2D, ... texture.
        pub target: U32,
        /// A format of virgl; [`crate::format::PixelFormat`] are some of them.
        pub format: U32,
        /// What it is used for, as bits.
        pub bind: U32,
        /// Pixels, or bytes of a buffer.
        pub width: U32,
        /// Pixels.
        pub height: U32,
        /// Pixels.
        pub depth: U32,
        /// Number of layers.
        pub array_size: U32,
        /// Number of smaller pictures.
        pub last_level: U32,
        /// Samples per pixel.
        pub nr_samples: U32,
        /// [`RESOURCE_Y_0_TOP`](super::RESOURCE_Y_0_TOP).
        pub flags: U32,
        /// Zero.
        pub padding: U32,
    }

    /// A part of a 3D resource on the wire.
    pub struct WireBox {
        /// Left.
        pub x: U32,
        /// Top.
        pub y: U32,
        /// Front, or first layer.
        pub z: U32,
        /// Width.
        pub width: U32,
        /// Height.
        pub height: U32,
        /// Depth, or number of layers.
        pub depth: U32,
    }

    /// TRANSFER_TO_HOST_3D, TRANSFER_FROM_HOST_3D.
    pub struct TransferHost3d {
        /// Header.
        pub hdr: CtrlHdr,
        /// Which part.
        pub part: WireBox,
        /// Where in the backing the first pixel is, in bytes.
        pub offset: U64,
        /// Which resource.
        pub resource_id: U32,
        /// Which of the smaller pictures.
        pub level: U32,
        /// Bytes from row to row in the backing; 0: without gaps.
        pub stride: U32,
        /// Bytes from layer to layer in the backing; 0: without gaps.
        pub layer_stride: U32,
    }

    /// SUBMIT_3D, followed by `size` bytes of commands in the format of the context.
    pub struct Submit3d {
        /// Header.
        pub hdr: CtrlHdr,
        /// Bytes that follow.
        pub size: U32,
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
        /// [`kind::OK_EDID`](super::kind::OK_EDID).
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
