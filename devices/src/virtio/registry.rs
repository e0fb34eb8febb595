//! The registry of virtio devices.
//!
//! Each device folder exports one [`DeviceModule`]; the command line, the machine builder and the
//! conformance test all walk [`MODULES`] and know no device by name; the VMM knows those that it talks
//! to at run time by the type of their handle.

use std::{any::Any, fmt, io};

use super::device::VirtioDevice;
use crate::spec::{Spec, SpecError};

/// Why a device could not be built from a valid configuration.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// A file, socket, device node or process of the host failed.
    #[error("--{option}: {what}")]
    Host {
        /// The flag, without dashes.
        option: &'static str,
        /// What was tried, naming the path or peer.
        what: String,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The host resource exists but cannot be used.
    #[error("--{option}: {reason}")]
    Unusable {
        /// The flag, without dashes.
        option: &'static str,
        /// Why, and what would help.
        reason: String,
    },
}

/// How often a device may be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Count {
    /// At most one.
    One,
    /// Any number, kept in command line order.
    Many,
}

/// Machines by what is connected with them; each kind includes those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Machines {
    /// Every machine.
    All,
    /// Those whose display is served to viewers.
    Viewed,
    /// Those whose viewers also hear and speak.
    Heard,
}

/// A device that is there without being asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Preset {
    /// The value that the option would have.
    pub value: &'static str,
    /// On which machines.
    pub on: Machines,
}

/// A device's configuration after parsing: complete, checked against itself, nothing opened yet.
pub trait DeviceConfig: fmt::Debug + Send {
    /// Opens host resources and makes the device.
    fn build(self: Box<Self>) -> Result<BuiltDevice, BuildError>;

    /// Sets the sandbox (`on`, `off`, `log`) of a program of ours that the device starts.
    fn set_sandbox(&mut self, _mode: &'static str) {}

    /// Whether the device connects with a socket again when the guest is running already, which
    /// the sandbox must leave possible.
    fn connects_later(&self) -> bool {
        false
    }

    /// Whether the device gives memory of the guest back to the host, which devices of the host that
    /// use it cannot bear.
    fn gives_memory_back(&self) -> bool {
        false
    }
}

/// A device and, where the VMM talks to it at run time, the handle to do so.
pub struct BuiltDevice {
    /// The device for the transport.
    pub device: Box<dyn VirtioDevice>,
    /// A device-specific handle (`InputHandle`, `GpuHandle`, `ConsoleHandle`…); the VMM downcasts.
    pub handle: Option<Box<dyn Any + Send>>,
}

impl fmt::Debug for BuiltDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BuiltDevice")
            .field("type", &self.device.device_type())
            .field("handle", &self.handle.is_some())
            .finish()
    }
}

/// One kind of device: what the command line, the builder and the conformance test need to know.
#[derive(Debug)]
pub struct DeviceModule {
    /// The flag, without dashes: `disk` for `--disk`.
    pub option: &'static str,
    /// The value's shape for `--help`, such as `path=FILE[,ro=on]`.
    pub value_name: &'static str,
    /// One line for `--help`.
    pub help: &'static str,
    /// How often it may be given.
    pub count: Count,
    /// What there is unless the option is given.
    pub presets: &'static [Preset],
    /// Whether the value `off` means that there is none.
    pub can_be_off: bool,
    /// Whether the queues are served by another process or by the kernel, which have their own ways
    /// to complain about a broken ring.
    pub served_elsewhere: bool,
    /// Parses and validates one value of the flag.
    pub parse: fn(Spec) -> Result<Box<dyn DeviceConfig>, SpecError>,
    /// A working instance for the conformance test, made without any option.
    pub sample: fn() -> Result<BuiltDevice, BuildError>,
}

/// Every device there is, in the order in which they take their places on the PCI bus.
#[rustfmt::skip]
pub static MODULES: &[&DeviceModule] = &[
    &super::blk::MODULE,
    &super::rng::MODULE,
    &super::console::MODULE,
    &super::input::MODULE,
    &super::net::MODULE,
    &super::balloon::MODULE,
    &super::vsock::MODULE,
    &super::fs::MODULE,
    &super::gpu::MODULE,
    &super::snd::MODULE,
];
