//! Shared folders (VIRTIO 1.3 §5.11), served by virtiofsd over vhost-user.
//!
//! | module | what it holds |
//! |---|---|
//! | [`config`] | the `--fs` option |
//! | `connection` | the vhost-user connection to virtiofsd |
//! | `device` | configuration space and life cycle |
//! | `orphan` | answers for the guest while there is no virtiofsd |
//! | `supervisor` | the thread that connects, notices an end, and connects again |
//! | `sys` | signals that wait, eventfds to wait for |
//!
//! virtiofsd may be restarted while the guest runs. What its guest knew of files went with it, and
//! numbers that stood for one file stand for another one in the next virtiofsd, so the old session
//! cannot be carried over: whatever the guest asked or asks for in it fails (`ENOTCONN`, then what the
//! new virtiofsd says to a guest that has not greeted it), no program waits for ever, and mounting
//! again works.

pub mod config;
mod connection;
mod device;
mod orphan;
mod supervisor;
mod sys;
#[cfg(test)]
mod tests;

pub use config::FsConfig;

use crate::virtio::registry::{Count, DeviceModule};

/// Shared folders in the registry.
pub static MODULE: DeviceModule = DeviceModule {
    option: "fs",
    value_name: "tag=TAG,socket=PATH",
    help: "shared folder: connects to virtiofsd, for which it waits up to a minute",
    count: Count::Many,
    presets: &[],
    can_be_off: false,
    served_elsewhere: true,
    parse: FsConfig::parse,
    sample: config::sample,
};
