//! Commands and answers in the control and cursor queues (VIRTIO 1.3 §5.7.6, and
//! `include/uapi/linux/virtio_gpu.h` for numbers).
//!
//! All integers are little-endian. A command is decoded from a private copy of the guest's bytes,
//! so what was checked cannot change afterwards.

mod command;
mod wire;

use bitflags::bitflags;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned, little_endian::U32};

pub use self::{command::*, wire::*};

/// `VIRTIO_GPU_MAX_SCANOUTS`: what the answer to GET_DISPLAY_INFO has room for.
pub const MAX_SCANOUTS: usize = 16;

/// Width and height of cursor images in pixels.
pub const CURSOR_SIZE: u32 = 64;

/// Bytes in a cursor image.
pub const CURSOR_BYTES: usize = (CURSOR_SIZE * CURSOR_SIZE * 4) as usize;

/// Most (address, length) entries accepted in one ATTACH_BACKING: a 4K frame in 4 KiB pages needs
/// 8100.
pub const MAX_BACKING_ENTRIES: u32 = 16_384;

/// Most bytes of 3D commands in one SUBMIT_3D. Mesa's drivers send 256 KiB at most.
pub const MAX_SUBMIT: usize = 1 << 20;

/// Longest command: SUBMIT_3D with all it may carry.
pub const MAX_COMMAND: usize = size_of::<Submit3d>() + MAX_SUBMIT;

const _: () = assert!(
    MAX_COMMAND >= size_of::<CreateBlob>() + MAX_BACKING_ENTRIES as usize * size_of::<MemEntry>()
);

/// Bytes in a capability set at most; those of virglrenderer 1.3 have less than 2 KiB.
pub const MAX_CAPSET: usize = 16 << 10;

/// Capability sets, by their ids (§5.7.6.8).
pub mod capset {
    /// virgl, the first version.
    pub const VIRGL: u32 = 1;
    /// virgl with its later additions.
    pub const VIRGL2: u32 = 2;
    /// Vulkan.
    pub const VENUS: u32 = 4;
}

/// `blob_mem` of RESOURCE_CREATE_BLOB.
pub mod blob_mem {
    /// The guest's memory.
    pub const GUEST: u32 = 1;
    /// Memory of the host, made by a 3D context.
    pub const HOST3D: u32 = 2;
    /// Memory of the host with a shadow in the guest's.
    pub const HOST3D_GUEST: u32 = 3;
}

/// `blob_flags` of RESOURCE_CREATE_BLOB.
pub mod blob_flag {
    /// It will be mapped.
    pub const MAPPABLE: u32 = 1 << 0;
    /// It will be used by several contexts.
    pub const SHAREABLE: u32 = 1 << 1;
    /// It will be used by several devices.
    pub const CROSS_DEVICE: u32 = 1 << 2;
}

/// `map_info` of the answer to RESOURCE_MAP_BLOB: its lowest bits.
pub mod map_info {
    /// The bits.
    pub const CACHE_MASK: u32 = 0xf;
}

/// Id of the shared memory region in which memory of the host is visible (§5.7.6.9).
pub const SHM_HOST_VISIBLE: u8 = 1;

/// `flags` of RESOURCE_CREATE_3D: row 0 is at the top.
pub const RESOURCE_Y_0_TOP: u32 = 1 << 0;

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
