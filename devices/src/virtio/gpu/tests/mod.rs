//! The whole way from commands in virtqueues to pictures in a sink, through real back end
//! processes: `drago-gpu` with and without shared frames, QEMU's own `vhost-user-gpu`, and rust-vmm's.
//!
//! | module | what |
//! |---|---|
//! | [`commands`] | what a driver writes into its queues, and its memory |
//! | [`sink`] | a viewer |
//! | [`pair`] | a display whose back end is the test |
//! | [`rig`] | driver, device, back end and viewer together |
//! | [`pictures`] | frames and cursors |
//! | [`monitors`] | what the driver is told about them; options |
//! | [`host_memory`] | what Vulkan shows the guest |
//! | [`guest_frames`] | pictures that stay in guest memory |
//! | [`dmabufs`] | pictures that other back ends have in dmabufs |
//! | [`recovery`] | back ends that die, drivers that come and go or break rules |
//! | [`peers`] | what only one foreign back end does |

mod commands;
mod dmabufs;
mod guest_frames;
mod host_memory;
mod monitors;
mod pair;
mod peers;
mod pictures;
mod recovery;
mod rig;
mod sink;

use std::time::Duration;

use super::*;
use crate::{GuestMemory, virtio::device::VirtioDevice};

const PATIENCE: Duration = Duration::from_secs(120);
