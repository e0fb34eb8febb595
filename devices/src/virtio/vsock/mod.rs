//! The socket device (VIRTIO 1.3 §5.10), served by the host's kernel (`/dev/vhost-vsock`), so that
//! guest and host reach each other by the host's own `AF_VSOCK`.
//!
//! | module | what it holds |
//! |---|---|
//! | [`config`] | the `--vsock` option |
//! | `device` | configuration space and life cycle |
//! | [`listener`] | a socket of the host's for one guest only |
//! | `sys` | `AF_VSOCK` addresses |

pub mod config;
mod device;
pub mod listener;
mod sys;
#[cfg(test)]
mod tests;

pub use config::VsockConfig;
pub use listener::Listener;

use crate::virtio::registry::{Count, DeviceModule};

/// The socket device in the registry.
pub static MODULE: DeviceModule = DeviceModule {
    option: "vsock",
    value_name: "cid=N[,notify=on]",
    help: "sockets between host and guest (AF_VSOCK); notify: systemd's readiness from the guest",
    count: Count::One,
    presets: &[],
    can_be_off: false,
    served_elsewhere: true,
    parse: VsockConfig::parse,
    sample: config::sample,
};

/// A socket device at run time.
#[derive(Debug)]
pub struct VsockHandle {
    /// The guest's context identifier.
    pub cid: u32,
    /// Where the guest is to report its state, with `notify=on`.
    pub notify: Option<Listener>,
}
