//! This project's extension of the vhost-user-gpu socket: memory of the host in the guest's shared
//! memory region (`docs/gpu-protocol.md`).
//!
//! The front end has the region (VIRTIO 1.3 §5.7.6.9, `VIRTIO_GPU_SHM_ID_HOST_VISIBLE`), the back end
//! the memory. A [`Map`] carries the memory's descriptor and is answered; an [`Unmap`] is not: what
//! is asked for later happens later.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Message ids.
pub mod id {
    /// Back end → front end: [`super::Map`] with a descriptor. The answer is a word: 0, or an error
    /// number of Linux.
    pub const MAP: u32 = 0x4452_0002;
    /// Back end → front end: [`super::Unmap`].
    pub const UNMAP: u32 = 0x4452_0003;
}

/// Shows a piece of a file in the region.
#[repr(C)]
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
pub struct Map {
    /// Where in the region, in whole pages.
    pub offset: u64,
    /// Bytes, in whole pages.
    pub length: u64,
    /// Where in the file, in whole pages.
    pub file_offset: u64,
    /// What the back end calls this mapping; it uses each number once.
    pub mapping: u64,
}

/// Takes a mapping out of the region. Where another one is at its place by now, nothing happens.
#[repr(C)]
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
pub struct Unmap {
    /// Where in the region.
    pub offset: u64,
    /// Which mapping.
    pub mapping: u64,
}
