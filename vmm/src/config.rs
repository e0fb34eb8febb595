//! A machine's configuration: complete and checked against itself, nothing opened yet.

use std::path::PathBuf;

use devices::{vfio::HostAddress, virtio::registry::DeviceConfig};

use crate::{
    acpi,
    boot::BootConfig,
    credentials::CredentialConfig,
    display::{SpiceConfig, VncConfig, WebConfig},
    memory, seccomp,
    terminal::SerialConfig,
};

/// Everything that makes a machine.
#[derive(Debug)]
pub struct VmConfig {
    /// Shown by `ctl status` and in the log.
    pub name: String,
    /// Kernel, initrd, command line.
    pub boot: BootConfig,
    /// Number of processors.
    pub cpus: u32,
    /// RAM in MiB.
    pub memory_mib: u64,
    /// RAM in 2 MiB huge pages.
    pub huge_pages: bool,
    /// The serial port.
    pub serial: SerialConfig,
    /// Path of the control socket.
    pub control: Option<PathBuf>,
    /// SMBIOS system UUID.
    pub uuid: Option<[u8; 16]>,
    /// Credentials for the guest's systemd.
    pub credentials: Vec<CredentialConfig>,
    /// SPICE server.
    pub spice: Option<SpiceConfig>,
    /// The SPICE server's page for browsers.
    pub web: Option<WebConfig>,
    /// VNC server.
    pub vnc: Option<VncConfig>,
    /// Exit status after a guest panic; without it a panic is only logged.
    pub panic_exit_code: Option<u8>,
    /// Filters of system calls, here and in drago-gpu.
    pub sandbox: seccomp::Mode,
    /// Virtio devices in the order of their places on the PCI bus, with their option's name.
    pub devices: Vec<(&'static str, Box<dyn DeviceConfig>)>,
    /// Devices of the host, behind those on the bus.
    pub host_devices: Vec<HostAddress>,
}

/// Options that contradict the host or each other.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Zero or too many processors.
    #[error("--cpus {0}: expected 1 to {max}", max = acpi::MAX_CPUS)]
    Cpus(u32),
    /// A page without a server.
    #[error("--web: there is no SPICE server that could show the page; add --spice")]
    Web,
    /// More than the guest can do without.
    #[error("--balloon size={size}: of --memory {memory} MiB at most {most} can be taken", most = memory - memory::MINIMUM_MIB)]
    Balloon {
        /// MiB to be taken.
        size: u32,
        /// MiB of RAM.
        memory: u64,
    },
    /// A device of the host twice.
    #[error("--vfio {0} is given twice")]
    HostDevice(HostAddress),
    /// Memory that a device of the host may use at any time cannot be given back.
    #[error(
        "--balloon cannot be combined with --vfio: a device that is passed through may use any of \
         the guest's memory at any time, so none of it can be given back"
    )]
    BalloonAndHostDevice,
    /// A bad amount of RAM.
    #[error(transparent)]
    Memory(#[from] memory::Error),
}

impl VmConfig {
    /// Checks what can be checked without opening anything.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if !(1..=acpi::MAX_CPUS).contains(&self.cpus) {
            return Err(ConfigError::Cpus(self.cpus));
        }
        if self.web.is_some() && self.spice.is_none() {
            return Err(ConfigError::Web);
        }
        for (index, address) in self.host_devices.iter().enumerate() {
            if self.host_devices[..index].contains(address) {
                return Err(ConfigError::HostDevice(*address));
            }
        }
        let shrinks = self.devices.iter().any(|(_, device)| device.gives_memory_back());
        if shrinks && !self.host_devices.is_empty() {
            return Err(ConfigError::BalloonAndHostDevice);
        }
        memory::validate(self.memory_mib, self.huge_pages)?;
        Ok(())
    }
}
