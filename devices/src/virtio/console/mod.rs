//! The console device (VIRTIO 1.3 §5.3) with named ports.
//!
//! ```text
//!   PortHandle / PortListener          shared            worker thread          guest
//!   (SPICE agent, socket, file) ◀──▶ port::Port ◀──────▶ ConsoleWorker ◀─rings─▶ hvc0, vport0p1…
//! ```
//!
//! | module | what it holds |
//! |---|---|
//! | [`config`] | the `--console` option |
//! | [`port`] | what the rest of the VMM sees of a port |
//! | `protocol` | messages of the control queues |
//! | `worker` | the rings: control protocol, data both ways, back-pressure |
//! | `socket` | a port served on a Unix socket |
//! | `device` | configuration space and life cycle |
//!
//! Port 0 is the console (`hvc0` in the guest), ports 1 and up have names under
//! `/dev/virtio-ports` in a Linux guest. A port appears in the guest when somebody attaches to it,
//! so an agent port without a SPICE server does not start a useless agent.

pub mod config;
mod device;
pub mod port;
mod protocol;
mod socket;
#[cfg(test)]
mod tests;
mod worker;

pub use config::ConsoleConfig;
pub use port::{ConsoleHandle, PortHandle, PortListener};

use crate::virtio::registry::{Count, DeviceModule, Machines, Preset};

/// Name of port 0.
pub const CONSOLE_PORT: &str = "hvc0";
/// Name of the SPICE agent's port.
pub const VDAGENT_PORT: &str = "com.redhat.spice.0";
/// Name of the QEMU guest agent's port.
pub const GUEST_AGENT_PORT: &str = "org.qemu.guest_agent.0";

/// The console in the registry.
pub static MODULE: DeviceModule = DeviceModule {
    option: "console",
    value_name: "[hvc0=off|on|FILE|socket=PATH][,size=COLSxROWS][,vdagent=on|off][,qga=PATH][,port=NAME[:socket=PATH]…]",
    help: "virtio console and named ports: hvc0, SPICE agent, guest agent, any others",
    count: Count::One,
    presets: &[Preset { value: "vdagent=on", on: Machines::Viewed }],
    can_be_off: false,
    served_elsewhere: false,
    parse: ConsoleConfig::parse,
    sample: ConsoleConfig::sample,
};
