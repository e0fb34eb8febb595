//! A PCI bus: configuration space access (PCI Local Bus 3.0 §3.2.2.3 and §6, PCI Express 4.0
//! §7.2.2), and the windows of the address space that its base address registers may use.
//!
//! | module | what it holds |
//! |---|---|
//! | [`config`] | one function's 256 bytes: header, capabilities, write masks |
//! | [`msix`] | the MSI-X capability, table and pending bits |
//! | [`window`] | placing base address registers, since there is no firmware to do it |
//!
//! There is a single bus with 32 slots of one function each. Slot 0 is the host bridge.

pub mod config;
pub mod msix;
pub mod window;

use std::{
    fmt, io,
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicU8, AtomicU32, Ordering},
    },
};

pub use self::window::PciWindows;
use self::{
    config::{ConfigSpace, Ids},
    window::Windows,
};
use crate::{
    GuestMemory,
    bus::{Bus, BusDevice},
    legacy::{SystemEvent, SystemEventSink},
    services::VmServices,
    vfio::{
        Physical,
        function::{FunctionError, VfioPci},
    },
    virtio::{device::VirtioDevice, pci::VirtioPci},
};

const SLOTS: usize = 32;

/// Where a function sits on the bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PciAddress {
    /// Bus number; this machine has bus 0 only.
    pub bus: u8,
    /// Slot, 0 to 31.
    pub device: u8,
    /// Function, 0 to 7.
    pub function: u8,
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}:{:02x}.{}", self.bus, self.device, self.function)
    }
}

/// Why a device could not be put on the bus.
#[derive(Debug, thiserror::Error)]
pub enum PciError {
    /// All slots are taken.
    #[error("the PCI bus is full: it has room for {} devices", SLOTS - 1)]
    NoFreeSlot,
    /// No window has room for the device's registers.
    #[error("no PCI memory window has room for {size:#x} bytes of device registers")]
    NoAddressSpace {
        /// Size of the base address register in bytes.
        size: u64,
    },
    /// The device has more queues than the transport has registers for.
    #[error("{device} has {queues} queues, the PCI transport can carry {limit}")]
    TooManyQueues {
        /// The device's name.
        device: String,
        /// Queues of the device.
        queues: usize,
        /// Queues the transport supports.
        limit: usize,
    },
    /// An interrupt vector or eventfd could not be had.
    #[error("{what} could not be allocated for {device}")]
    Host {
        /// The device's name.
        device: String,
        /// What was asked for.
        what: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

/// One function on the bus, as the root sees it. Methods are called from vCPU threads.
pub trait PciFunction: Send + Sync {
    /// Reads 1 to 8 bytes of configuration space.
    fn config_read(&self, offset: u16, data: &mut [u8]);

    /// Writes 1 to 8 bytes of configuration space.
    fn config_write(&self, offset: u16, data: &[u8]);

    /// Maps registers whose place was taken by another function when the guest asked for it.
    /// Called after any function changed its mappings.
    fn retry_mapping(&self) {}

    /// The machine is about to end.
    fn shutdown(&self) {}
}

/// The root of the PCI hierarchy.
pub struct PciRoot {
    slots: Arc<Slots>,
    mmio_bus: Arc<Bus>,
    windows: PciWindows,
    free: Mutex<Windows>,
}

impl fmt::Debug for PciRoot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PciRoot")
            .field("windows", &self.windows)
            .field("functions", &self.slots.functions().len())
            .finish_non_exhaustive()
    }
}

impl PciRoot {
    /// A bus with nothing but the host bridge, whose functions answer on `mmio_bus` inside
    /// `windows`.
    pub fn new(windows: PciWindows, mmio_bus: Arc<Bus>) -> Self {
        let slots = Arc::new(Slots::default());
        slots.set(0, Arc::new(HostBridge::new()));
        let free = Mutex::new(Windows::new(&windows));
        Self { slots, mmio_bus, windows, free }
    }

    /// Puts a virtio device into the next free slot.
    ///
    /// Its registers get an address at once, as firmware would do, but it does not answer there
    /// until the guest sets "memory space enable", so that no mapping is made twice.
    pub fn add_virtio(
        &self,
        device: Box<dyn VirtioDevice>,
        services: Arc<dyn VmServices>,
        memory: GuestMemory,
    ) -> Result<PciAddress, PciError> {
        let slot = self.slots.first_free().ok_or(PciError::NoFreeSlot)?;
        let allocate = |size| {
            let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
            free.allocate(size).ok_or(PciError::NoAddressSpace { size })
        };
        let bar = allocate(VirtioPci::BAR_SIZE)?;
        let shared_memory = match device.shared_memory() {
            Some((_, window)) => Some(allocate(window.size())?),
            None => None,
        };
        let place = BarPlace {
            address: bar,
            shared_memory,
            windows: self.windows.clone(),
            mmio_bus: self.mmio_bus.clone(),
        };
        let function = VirtioPci::new(device, services, memory, place)?;
        let address = PciAddress { bus: 0, device: slot as u8, function: 0 };
        tracing::debug!(%address, device = %function.device_type(), bar = format_args!("{bar:#x}"), "PCI function added");
        self.slots.set(slot, function);
        Ok(address)
    }

    /// Puts a device of the host into the next free slot.
    pub fn add_passthrough(
        &self,
        device: Arc<dyn Physical>,
        services: Arc<dyn VmServices>,
    ) -> Result<PciAddress, FunctionError> {
        let slot = self.slots.first_free().ok_or(PciError::NoFreeSlot)?;
        let allocate = |size: u64, low| {
            let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
            // Whole pages, so that they can be mapped.
            let place = size.max(0x1000);
            let found = if low { free.allocate_low(place) } else { free.allocate(place) };
            found.ok_or(PciError::NoAddressSpace { size })
        };
        let windows = self.windows.clone();
        let function = VfioPci::new(device, services, windows, &self.mmio_bus, allocate)?;
        self.slots.set(slot, function);
        Ok(PciAddress { bus: 0, device: slot as u8, function: 0 })
    }

    /// The memory mapped configuration space (ECAM) of bus 0: 1 MiB.
    pub fn ecam(&self) -> Arc<dyn BusDevice> {
        Arc::new(Ecam { slots: self.slots.clone() })
    }

    /// The configuration ports: 8 bytes at port `0xcf8`. Only double words reach the address
    /// register; a byte at `0xcf9` is the reset control register of Intel's chipsets, and `events`
    /// hears of resets.
    pub fn config_ports(&self, events: SystemEventSink) -> Arc<dyn BusDevice> {
        Arc::new(ConfigPorts {
            slots: self.slots.clone(),
            address: AtomicU32::new(0),
            reset: AtomicU8::new(0),
            events,
        })
    }

    /// Lets every device flush what the guest believes to be stable.
    pub fn shutdown(&self) {
        for function in self.slots.functions() {
            function.shutdown();
        }
    }
}

/// Where a function's base address register starts out and may go.
#[derive(Debug)]
pub struct BarPlace {
    /// The address before the guest chooses another.
    pub address: u64,
    /// The same of its shared memory region, if it has one.
    pub shared_memory: Option<u64>,
    /// Where both may be moved to.
    pub windows: PciWindows,
    /// The address space it appears in.
    pub mmio_bus: Arc<Bus>,
}

#[derive(Default)]
struct Slots {
    functions: RwLock<[Option<Arc<dyn PciFunction>>; SLOTS]>,
}

impl Slots {
    fn set(&self, slot: usize, function: Arc<dyn PciFunction>) {
        let mut functions = self.functions.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = functions.get_mut(slot) {
            *entry = Some(function);
        }
    }

    fn get(&self, slot: usize) -> Option<Arc<dyn PciFunction>> {
        let functions = self.functions.read().unwrap_or_else(PoisonError::into_inner);
        functions.get(slot).cloned().flatten()
    }

    fn first_free(&self) -> Option<usize> {
        let functions = self.functions.read().unwrap_or_else(PoisonError::into_inner);
        functions.iter().position(Option::is_none)
    }

    fn functions(&self) -> Vec<Arc<dyn PciFunction>> {
        let functions = self.functions.read().unwrap_or_else(PoisonError::into_inner);
        functions.iter().flatten().cloned().collect()
    }

    /// Finds the function a configuration access is for; `devfn` is slot and function number.
    fn find(&self, bus: u64, devfn: u64) -> Option<Arc<dyn PciFunction>> {
        if bus != 0 || devfn & 7 != 0 {
            return None;
        }
        self.get((devfn >> 3) as usize)
    }

    fn write(&self, function: &dyn PciFunction, offset: u16, data: &[u8]) {
        function.config_write(offset, data);
        // Only the command register and the base address registers can move a mapping.
        if (0x04..0x28).contains(&offset) {
            for other in self.functions() {
                other.retry_mapping();
            }
        }
    }
}

struct Ecam {
    slots: Arc<Slots>,
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(function) = self.slots.find(offset >> 20, (offset >> 12) & 0xff) {
            function.config_read((offset & 0xfff) as u16, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(function) = self.slots.find(offset >> 20, (offset >> 12) & 0xff) {
            self.slots.write(function.as_ref(), (offset & 0xfff) as u16, data);
        }
    }

    fn describe(&self, offset: u64) -> String {
        let (slot, register) = (offset >> 15 & 31, offset & 0xfff);
        format!("PCI configuration of slot {slot}, offset {register:#x}")
    }
}

/// Offset of the reset control register `RST_CNT` (Intel ICH9 datasheet §13.7.5).
const RESET_CONTROL: u64 = 1;
/// Reset of the whole system, not only of the processor.
const SYS_RST: u8 = 1 << 1;
/// The change from 0 to 1 resets.
const RST_CPU: u8 = 1 << 2;
/// Power goes off for a moment.
const FULL_RST: u8 = 1 << 3;

struct ConfigPorts {
    slots: Arc<Slots>,
    address: AtomicU32,
    reset: AtomicU8,
    events: SystemEventSink,
}

impl ConfigPorts {
    /// The function and register selected by the address register for a data port access.
    fn target(&self, port: u64, length: usize) -> Option<(Arc<dyn PciFunction>, u16)> {
        let address = self.address.load(Ordering::Acquire);
        if address & (1 << 31) == 0 || port + length as u64 > 8 {
            return None;
        }
        let bus = u64::from(address >> 16 & 0xff);
        let function = self.slots.find(bus, u64::from(address >> 8 & 0xff))?;
        Some((function, (address & 0xfc) as u16 + (port & 3) as u16))
    }
}

impl BusDevice for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if offset >= 4 {
            if let Some((function, register)) = self.target(offset, data.len()) {
                function.config_read(register, data);
            }
        } else if offset == 0 && data.len() == 4 {
            data.copy_from_slice(&self.address.load(Ordering::Acquire).to_le_bytes());
        } else if let (RESET_CONTROL, [value]) = (offset, data) {
            *value = self.reset.load(Ordering::Acquire);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset >= 4 {
            if let Some((function, register)) = self.target(offset, data.len()) {
                self.slots.write(function.as_ref(), register, data);
            }
        } else if let (0, Ok(bytes)) = (offset, <[u8; 4]>::try_from(data)) {
            // Bits 1:0 and 30:24 are reserved and read as zero.
            self.address.store(u32::from_le_bytes(bytes) & 0x80ff_fffc, Ordering::Release);
        } else if let (RESET_CONTROL, [value]) = (offset, data) {
            let now = value & (SYS_RST | RST_CPU | FULL_RST);
            let before = self.reset.swap(now, Ordering::AcqRel);
            // Whether it is the processor only makes no difference here: the machine ends.
            if now & !before & RST_CPU != 0 {
                (self.events)(SystemEvent::Reset("port 0xcf9"));
            }
        }
    }
}

/// The function every PCI bus starts with. It has no registers of its own: the guest finds the
/// bus through ACPI, and the bridge only proves that configuration access works.
struct HostBridge {
    config: Mutex<ConfigSpace>,
}

impl HostBridge {
    fn new() -> Self {
        // QEMU's generic PCI Express host bridge, for which no guest has chipset quirks.
        let config = ConfigSpace::new(&Ids {
            vendor: 0x1b36,
            device: 0x0008,
            revision: 0,
            class: 0x06_00_00,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        });
        Self { config: Mutex::new(config) }
    }
}

impl PciFunction for HostBridge {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.config.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        self.config.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> PciRoot {
        let windows =
            PciWindows { mmio32: 0xc000_0000..0xd000_0000, mmio64: 1 << 40..(1 << 40) + (1 << 30) };
        PciRoot::new(windows, Arc::new(Bus::new()))
    }

    fn nobody() -> SystemEventSink {
        Arc::new(|_| {})
    }

    fn port_read(ports: &dyn BusDevice, register: u32, size: usize) -> Vec<u8> {
        ports.write(0, &(1 << 31 | register & !3).to_le_bytes());
        let mut data = vec![0xff; size];
        ports.read(u64::from(4 + (register & 3)), &mut data);
        data
    }

    #[test]
    fn the_host_bridge_is_seen_both_ways() {
        let root = root();
        let mut data = [0xff; 4];
        root.ecam().read(0, &mut data);
        assert_eq!(data, [0x36, 0x1b, 0x08, 0x00]);
        let ports = root.config_ports(nobody());
        assert_eq!(port_read(ports.as_ref(), 0, 4), [0x36, 0x1b, 0x08, 0x00]);
        assert_eq!(port_read(ports.as_ref(), 0x0a, 2), [0x00, 0x06], "host bridge class");
        assert_eq!(port_read(ports.as_ref(), 0x0e, 1), [0x00], "header type, single function");
    }

    #[test]
    fn absent_functions_read_as_all_ones() {
        let root = root();
        let ecam = root.ecam();
        for address in [1 << 12, 1 << 15, 31 << 15, 1 << 20] {
            let mut data = [0xff; 4];
            ecam.write(address, &[0; 4]);
            ecam.read(address, &mut data);
            assert_eq!(data, [0xff; 4], "at {address:#x}");
        }
        let ports = root.config_ports(nobody());
        assert_eq!(port_read(ports.as_ref(), 1 << 16, 4), [0xff; 4], "bus 1");
        assert_eq!(port_read(ports.as_ref(), 3 << 11, 2), [0xff; 2], "slot 3");
    }

    /// What Linux does to find out whether configuration mechanism 1 works
    /// (`arch/x86/pci/direct.c`): a byte at 0xcfb must not disturb the address register.
    #[test]
    fn mechanism_1_probe_succeeds() {
        let ports = root().config_ports(nobody());
        ports.write(3, &[1]);
        ports.write(0, &0x8000_0000_u32.to_le_bytes());
        let mut data = [0xff; 4];
        ports.read(0, &mut data);
        assert_eq!(u32::from_le_bytes(data), 0x8000_0000);
        ports.write(1, &[6]);
        ports.read(0, &mut data);
        assert_eq!(u32::from_le_bytes(data), 0x8000_0000);
        ports.write(0, &0_u32.to_le_bytes());
        let mut data = [0xff; 4];
        ports.read(4, &mut data);
        assert_eq!(data, [0xff; 4], "configuration access is disabled");
    }

    /// Linux' `reboot=pci` (`native_machine_emergency_restart`): the kind of reset first, then the
    /// reset.
    #[test]
    fn reset_control_resets_when_its_bit_rises() {
        for kind in [0x02, 0x0a] {
            let resets = Arc::new(AtomicU32::new(0));
            let count = resets.clone();
            let ports = root().config_ports(Arc::new(move |event| {
                assert_eq!(event, SystemEvent::Reset("port 0xcf9"));
                count.fetch_add(1, Ordering::SeqCst);
            }));
            let mut value = [0xff];
            ports.read(RESET_CONTROL, &mut value);
            assert_eq!(value, [0]);
            ports.write(RESET_CONTROL, &[kind]);
            ports.read(RESET_CONTROL, &mut value);
            assert_eq!((value[0], resets.load(Ordering::SeqCst)), (kind, 0));
            ports.write(RESET_CONTROL, &[kind | RST_CPU]);
            assert_eq!(resets.load(Ordering::SeqCst), 1);
            ports.write(RESET_CONTROL, &[kind | RST_CPU]);
            assert_eq!(resets.load(Ordering::SeqCst), 1, "it was up already");
            // Wider accesses belong to configuration space.
            ports.write(0, &0x8000_0600_u32.to_le_bytes());
            ports.write(RESET_CONTROL, &[0, 6]);
            assert_eq!(resets.load(Ordering::SeqCst), 1);
        }
    }

    #[test]
    fn accesses_past_the_end_are_harmless() {
        let root = root();
        let ecam = root.ecam();
        let mut data = [0xff; 8];
        ecam.read(0xffc, &mut data);
        assert_eq!(data, [0; 8], "extended space is empty");
        ecam.read(0xfc, &mut data);
        ecam.write(0xffd, &[1; 8]);
        let ports = root.config_ports(nobody());
        ports.write(0, &0x8000_00fc_u32.to_le_bytes());
        let mut data = [0xff; 4];
        ports.read(7, &mut data);
        assert_eq!(data, [0xff; 4], "does not fit the data port");
    }
}
