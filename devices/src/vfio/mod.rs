//! Devices of the host handed to the guest (VFIO, Linux' `Documentation/driver-api/vfio.rst` and
//! `linux/vfio.h`).
//!
//! | module | what it holds |
//! |---|---|
//! | [`address`] | the `--vfio` option: which device |
//! | [`sysfs`] | what the host's kernel says about it, and what is in the way of handing it over |
//! | [`host`] | the open device: a [`Physical`] made of the kernel's descriptors |
//! | [`bars`] | its base address registers, and which parts of them the guest reaches without us |
//! | [`config_space`] | the configuration space that the guest sees, bytes in and bytes out |
//! | [`msi`] | message signalled interrupts (MSI); MSI-X is [`crate::pci::msix`] |
//! | [`function`] | all of that as a function of the guest's PCI bus |
//! | `sys` | mappings |
//!
//! What the guest gets is an endpoint of the root complex with the device's own identity, its memory
//! base address registers, MSI and MSI-X, and the capabilities of [`config_space`]. It does not get
//! I/O ports, an option ROM, INTx, extended configuration space, or a power state other than D0.
//!
//! The device reaches all of the guest's memory and, by its IOMMU, nothing else. So the kernel pins
//! that memory, which is counted against `RLIMIT_MEMLOCK`, and it cannot be given back to the host
//! while the guest runs. Without an IOMMU a device would write to the host's memory at the guest's
//! addresses: that is refused.

pub mod address;
pub mod bars;
pub mod config_space;
pub mod function;
pub mod host;
pub mod msi;
mod sys;
pub mod sysfs;
#[cfg(test)]
mod tests;

use std::{io, sync::Arc};

use vmm_sys_util::eventfd::EventFd;

pub use self::{
    address::HostAddress,
    host::{HostDevice, open},
    sys::DeviceMemory,
};

/// Why a device cannot be handed to the guest. The text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum VfioError {
    /// Something about the device or the host.
    #[error("--vfio {address}: {reason}")]
    Unusable {
        /// Which device.
        address: HostAddress,
        /// What is in the way, and how to get it out of it.
        reason: String,
    },
    /// A call failed.
    #[error("--vfio {address}: {what}")]
    Host {
        /// Which device.
        address: HostAddress,
        /// What was tried.
        what: String,
        /// The system's answer.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// The two kinds of interrupts the guest can get from a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InterruptKind {
    /// PCI Local Bus 3.0 §6.8.1.
    Msi,
    /// PCI Local Bus 3.0 §6.8.2.
    MsiX,
}

/// A base address register as the kernel hands it out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Region {
    /// Bytes; 0 if there is none.
    pub size: u64,
    /// Offset and length of the parts that can be mapped.
    pub mappable: Vec<(u64, u64)>,
}

/// A function of the host, as the guest's function needs it. Called from vCPU threads.
pub trait Physical: Send + Sync {
    /// What to call it in the log.
    fn name(&self) -> String;

    /// Reads configuration space. What cannot be read is left as it is.
    fn read_config(&self, offset: u16, data: &mut [u8]);

    /// Writes configuration space. The kernel keeps the bits that are the host's.
    fn write_config(&self, offset: u16, data: &[u8]);

    /// Base address register `bar`, 0 to 5.
    fn region(&self, bar: u8) -> Region;

    /// Reads registers. What cannot be read is left as it is.
    fn read_region(&self, bar: u8, offset: u64, data: &mut [u8]);

    /// Writes registers.
    fn write_region(&self, bar: u8, offset: u64, data: &[u8]);

    /// Maps a part of a base address register.
    fn map(&self, bar: u8, offset: u64, length: u64) -> io::Result<Arc<DeviceMemory>>;

    /// How many interrupts of a kind the device can raise.
    fn vectors(&self, kind: InterruptKind) -> u32;

    /// Has the device's interrupts signal these eventfds, in order; without any, switches them off.
    fn set_vectors(&self, kind: InterruptKind, eventfds: &[&EventFd]) -> io::Result<()>;

    /// Brings the device back to what it was after power-on, if it can be reset alone.
    fn reset(&self);
}
