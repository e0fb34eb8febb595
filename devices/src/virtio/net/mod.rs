//! The network card (VIRTIO 1.3 §5.1).
//!
//! | module | what it holds |
//! |---|---|
//! | [`config`] | the `--net` option |
//! | [`mac`] | hardware addresses and their stable defaults |
//! | [`hostfwd`] | port forwarding rules in QEMU's syntax |
//! | `backend` | where packets go: a tap interface or a stream socket |
//! | `buffers` | where received packets go: the driver's buffers |
//! | `kernel` | queues served by the kernel (vhost-net) |
//! | `control` | the control queue: how many queues the driver uses |
//! | `tap`, `sys` | tap interfaces, opened by name or inherited; packets in guest memory |
//! | [`stream`] | framing of packets on a stream socket |
//! | `passt` | user networking: a supervised `passt` process |
//! | `worker` | the receive and the transmit queue |
//! | `device` | configuration space and life cycle |

mod backend;
mod buffers;
pub mod config;
mod control;
mod device;
pub mod hostfwd;
mod kernel;
pub mod mac;
mod passt;
pub mod stream;
mod sys;
mod tap;
#[cfg(test)]
mod tests;
mod worker;

pub use config::NetConfig;

use crate::virtio::registry::{Count, DeviceModule};

/// Network cards in the registry.
pub static MODULE: DeviceModule = DeviceModule {
    option: "net",
    value_name: "user[,hostfwd=tcp:[ADDR]:PORT-:PORT…][,host-access=off][,passt=FILE]|tap=IFNAME[,queues=N][,vhost=on]|fd=N[:N…][,vhost=on][,mac=MAC][,mtu=N]",
    help: "virtio network card: user networking through passt, or a tap or macvtap interface",
    count: Count::Many,
    presets: &[],
    can_be_off: false,
    served_elsewhere: false,
    parse: NetConfig::parse,
    sample: config::sample,
};

/// The packet header of virtio-net (§5.1.6), between guest and device on every packet.
pub(crate) const HEADER: usize = 12;
/// Offset of `num_buffers` in the header.
pub(crate) const NUM_BUFFERS: usize = 10;
/// Largest Ethernet frame: 64 KiB of payload (a segmentation-offload packet or the largest MTU),
/// the Ethernet header and a VLAN tag.
pub(crate) const MAX_FRAME: usize = 65_535 + 14 + 4;
/// Smallest frame that has an Ethernet header.
pub(crate) const MIN_FRAME: usize = 14;
