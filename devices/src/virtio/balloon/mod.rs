//! The traditional memory balloon (VIRTIO 1.3 §5.5), with free page reporting.
//!
//! | module | what it holds |
//! |---|---|
//! | [`config`] | the `--balloon` option |
//! | `device` | configuration space, life cycle, [`BalloonHandle`] |
//! | [`pages`] | giving guest pages back to the host |
//! | `worker` | the queues |
//!
//! A page in the balloon, or one that the guest reports as free, costs the host nothing: it is
//! punched out of the memfd behind guest memory, and reads as zeroes when the guest uses it again.
//! With reporting the host's use follows the guest's without anybody setting a size.

pub mod config;
mod device;
pub mod pages;
#[cfg(test)]
mod tests;
mod worker;

pub use config::BalloonConfig;
pub use device::{BalloonHandle, BalloonStats};

use crate::virtio::registry::{Count, DeviceModule};

/// The balloon in the registry.
pub static MODULE: DeviceModule = DeviceModule {
    option: "balloon",
    value_name: "[size=MIB][,deflate-on-oom=on|off]",
    help: "memory balloon: takes MIB of guest memory at first; reports free pages to the host",
    count: Count::One,
    presets: &[],
    can_be_off: false,
    served_elsewhere: false,
    parse: BalloonConfig::parse,
    sample: BalloonConfig::sample,
};

/// The unit of this device, whatever the guest's page size (§5.5.6).
pub(crate) const PAGE: u64 = 4096;
/// Balloon pages per MiB.
pub(crate) const PAGES_PER_MIB: u32 = 256;
