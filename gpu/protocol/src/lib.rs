//! Wire formats around virtio-gpu, as bytes ↔ typed messages (no sockets, no memory, no threads).
//!
//! | module | what it holds | source |
//! |---|---|---|
//! | [`socket`] | the vhost-user-gpu socket between front end and back end | QEMU `docs/interop/vhost-user-gpu.rst` |
//! | [`frames`] | this project's extension of it: frames in shared memory | `docs/gpu-protocol.md` |
//! | [`guest_frames`] | and of frames in guest memory | `docs/gpu-protocol.md` |
//! | [`host_memory`] | and of memory of the host in the guest | `docs/gpu-protocol.md` |
//! | [`inflight`] | which commands a back end has not answered yet | QEMU `docs/interop/vhost-user.rst` |
//! | [`chain`] | descriptor chains by their head | VIRTIO 1.3 §2.7.5 |
//! | [`virtio`] | the commands a guest puts into the control and cursor queues | VIRTIO 1.3 §5.7 |
//! | [`format`] | pixel formats and their conversion to XRGB8888 | VIRTIO 1.3 §5.7.6.8 |
//! | [`pieces`] | guest memory behind a resource | VIRTIO 1.3 §5.7.6.8 |
//! | [`edid`] | an EDID for a monitor of any size | VESA E-EDID 1.4, DisplayID 1.3 |
//! | [`rect`] | rectangles and damage regions | |
#![cfg_attr(not(test), no_std)]

extern crate alloc;

pub mod chain;
pub mod edid;
pub mod format;
pub mod frames;
pub mod guest_frames;
pub mod host_memory;
pub mod inflight;
pub mod pieces;
pub mod rect;
pub mod socket;
pub mod virtio;

pub use rect::{Damage, Rect};
