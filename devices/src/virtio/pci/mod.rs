//! Virtio over PCI, the modern interface only (VIRTIO 1.3 §4.1).
//!
//! | module | what it holds |
//! |---|---|
//! | [`capability`] | where everything lies in the base address register, and the capabilities that say so |
//! | [`common`] | the common configuration structure: features, status, queue set-up |
//! | [`interrupt`] | raising interrupts from worker threads without any lock |
//!
//! Locks: `state` guards configuration space, device and set-up; `msix` guards the vector table.
//! Worker threads take neither, so a device may be waited for while `state` is held.

pub mod capability;
pub mod common;
pub mod interrupt;

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError, Weak,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::{
    capability::{BAR, Layout, PciCfgAccess, SHARED_MEMORY_BAR},
    common::{CommonConfig, Effect, QueueSetup},
    interrupt::Interrupts,
};
use super::device::{
    ActivateError, Activation, ActiveQueue, DeviceType, F_VERSION_1, VirtioDevice,
};
use super::shared_memory::SharedMemory;
use crate::{
    GuestMemory,
    bus::{Bus, BusDevice},
    pci::{
        BarPlace, PciError, PciFunction, PciWindows,
        config::{BarKind, COMMAND_MEMORY, ConfigSpace, Ids},
        msix::Msix,
    },
    services::VmServices,
};

/// PCI vendor of virtio devices (§4.1.2).
const VENDOR: u16 = 0x1af4;
/// Device id of a modern device is this plus its type (§4.1.2.1).
const DEVICE_BASE: u16 = 0x1040;
const F_EVENT_IDX: u64 = 1 << 29;

/// A virtio device as a PCI function.
pub struct VirtioPci {
    device_type: DeviceType,
    this: Weak<Self>,
    services: Arc<dyn VmServices>,
    memory: GuestMemory,
    windows: PciWindows,
    /// The address space holds this function while it is mapped, so this must not hold it back.
    mmio_bus: Weak<Bus>,
    interrupts: Arc<Interrupts>,
    msix: Mutex<Msix>,
    /// One notification per queue, for the life of the function.
    kicks: Vec<EventFd>,
    state: Mutex<State>,
    /// The guest moved the registers onto another device's; set and read under `state`, but read
    /// without it to skip the common case.
    displaced: AtomicBool,
    violations: AtomicU64,
}

/// Places of the shared memory that were refused and are logged.
const MAX_REFUSALS: u32 = 10;

struct State {
    config: ConfigSpace,
    /// Offset of the MSI-X capability.
    msix_capability: u16,
    /// Offset of the configuration access capability.
    pci_cfg: u16,
    mapped: Option<u64>,
    /// The shared memory region, and where the guest sees it.
    shared: Option<(Arc<SharedMemory>, Option<u64>)>,
    /// How often that was refused.
    shared_refusals: u32,
    /// Addresses whose writes signal a queue's eventfd without leaving the kernel.
    ioevents: Vec<(u64, usize)>,
    common: CommonConfig,
    active: bool,
    device: Box<dyn VirtioDevice>,
}

impl VirtioPci {
    /// Size of the base address register that holds all registers.
    pub const BAR_SIZE: u64 = Layout::SIZE;
    /// Queues the layout has room for, one vector being left for configuration changes.
    const QUEUE_LIMIT: usize = Layout::VECTORS - 1;

    /// Makes the function; it becomes visible when it is put on a bus.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        services: Arc<dyn VmServices>,
        memory: GuestMemory,
        place: BarPlace,
    ) -> Result<Arc<Self>, PciError> {
        let device_type = device.device_type();
        let sizes = device.queue_sizes().to_vec();
        if sizes.len() > Self::QUEUE_LIMIT {
            return Err(PciError::TooManyQueues {
                device: device_type.to_string(),
                queues: sizes.len(),
                limit: Self::QUEUE_LIMIT,
            });
        }
        let host =
            |what| move |source| PciError::Host { device: device_type.to_string(), what, source };
        let mut vectors = Vec::with_capacity(sizes.len() + 1);
        for _ in 0..=sizes.len() {
            vectors.push(services.allocate_msi().map_err(host("an interrupt vector"))?);
        }
        let mut kicks = Vec::with_capacity(sizes.len());
        for _ in &sizes {
            let kick = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
            kicks.push(kick.map_err(host("a queue's eventfd"))?);
        }
        let msix = Msix::new(vectors.iter().cloned());
        let mut config = ConfigSpace::new(&Ids {
            vendor: VENDOR,
            device: DEVICE_BASE + device_type.0,
            // §4.1.2.1: modern devices have a revision of 1 or higher.
            revision: 1,
            class: class_code(device_type),
            subsystem_vendor: VENDOR,
            subsystem: DEVICE_BASE + device_type.0,
        });
        config.set_bar64(BAR.into(), Layout::SIZE, place.address, BarKind::Registers);
        let (msix_capability, pci_cfg) = capability::add_all(&mut config, &msix);
        let shared = match (device.shared_memory(), place.shared_memory) {
            (Some((id, window)), Some(address)) => {
                let size = window.size();
                config.set_bar64(SHARED_MEMORY_BAR.into(), size, address, BarKind::Memory);
                capability::add_shared_memory(&mut config, id, size);
                Some((window, None))
            }
            _ => None,
        };
        let common = CommonConfig::new(device.features() | F_VERSION_1, &sizes);
        Ok(Arc::new_cyclic(|this| Self {
            device_type,
            this: this.clone(),
            services,
            memory,
            windows: place.windows,
            mmio_bus: Arc::downgrade(&place.mmio_bus),
            interrupts: Arc::new(Interrupts::new(vectors, sizes.len())),
            msix: Mutex::new(msix),
            kicks,
            state: Mutex::new(State {
                config,
                msix_capability,
                pci_cfg,
                mapped: None,
                shared,
                shared_refusals: 0,
                ioevents: Vec::new(),
                common,
                active: false,
                device,
            }),
            displaced: AtomicBool::new(false),
            violations: AtomicU64::new(0),
        }))
    }

    /// Which device this is.
    pub fn device_type(&self) -> DeviceType {
        self.device_type
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn msix(&self) -> MutexGuard<'_, Msix> {
        self.msix.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that the driver broke a rule. The log stays small however often it does.
    fn violation(&self, what: &str) {
        let count = self.violations.fetch_add(1, Ordering::Relaxed) + 1;
        if count <= 8 || count.is_power_of_two() {
            tracing::warn!(device = %self.device_type, count, "driver violation: {what}");
        }
    }

    fn read_registers(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match Layout::find(offset) {
            (Layout::COMMON, offset) => {
                let mut state = self.state();
                let State { common, device, .. } = &mut *state;
                common.read(offset, data, &self.interrupts, device.as_ref());
            }
            (Layout::ISR, 0) => {
                if let Some(first) = data.first_mut() {
                    *first = self.interrupts.take_isr();
                }
            }
            (Layout::DEVICE, offset) => self.state().device.read_config(offset, data),
            (Layout::MSIX_TABLE, offset) => self.msix().read_table(offset, data),
            (Layout::MSIX_PENDING, offset) => self.msix().read_pending(offset, data),
            _ => {}
        }
    }

    fn write_registers(&self, offset: u64, data: &[u8]) {
        match Layout::find(offset) {
            (Layout::COMMON, offset) => {
                let mut state = self.state();
                let effect = state.common.write(offset, data, &self.interrupts);
                self.apply(&mut state, effect);
            }
            (Layout::DEVICE, offset) => self.state().device.write_config(offset, data),
            (Layout::NOTIFY, offset) => {
                let index = offset / u64::from(Layout::NOTIFY_MULTIPLIER);
                let kick = usize::try_from(index).ok().and_then(|index| self.kicks.get(index));
                if let Some(kick) = kick {
                    // Fails only when 2^64 - 2 notifications wait already.
                    let _ = kick.write(1);
                }
            }
            (Layout::MSIX_TABLE, offset) => self.msix().write_table(offset, data),
            _ => {}
        }
    }

    fn apply(&self, state: &mut State, effect: Effect) {
        match effect {
            Effect::None => {}
            Effect::Violation(what) => self.violation(what),
            Effect::Enable(index) => {
                if let Err(reason) = state.common.try_enable(index, |setup| self.queue(setup)) {
                    self.violation(&format!("queue {index}: {reason}"));
                    self.interrupts.set_needs_reset();
                }
            }
            Effect::Reset => {
                state.device.reset();
                state.active = false;
                self.sync_ioevents(state);
                self.interrupts.reset();
                state.common.reset();
            }
            Effect::Activate => match self.activate(state) {
                Ok(()) => {
                    state.active = true;
                    self.sync_ioevents(state);
                }
                Err(error) => {
                    self.violation(&chain(&error));
                    self.interrupts.set_needs_reset();
                }
            },
        }
    }

    /// Builds the ring that a queue's registers describe, if it is one.
    fn queue(&self, setup: &QueueSetup) -> Result<Queue, &'static str> {
        let mut queue = Queue::new(setup.max_size).map_err(|_| "the device's size is invalid")?;
        queue
            .try_set_size(setup.size)
            .map_err(|_| "the size is not a power of two up to the maximum")?;
        queue
            .try_set_desc_table_address(vm_memory::GuestAddress(setup.descriptors))
            .map_err(|_| "the descriptor table is not aligned to 16 bytes")?;
        queue
            .try_set_avail_ring_address(vm_memory::GuestAddress(setup.driver))
            .map_err(|_| "the available ring is not aligned to 2 bytes")?;
        queue
            .try_set_used_ring_address(vm_memory::GuestAddress(setup.device))
            .map_err(|_| "the used ring is not aligned to 4 bytes")?;
        queue.set_ready(true);
        if setup.driver == 0 || !queue.is_valid(&self.memory) {
            return Err("a part of it lies outside of guest memory");
        }
        Ok(queue)
    }

    fn activate(&self, state: &mut State) -> Result<(), ActivateError> {
        let features = state.common.driver_features();
        let mut queues = Vec::new();
        for (index, setup) in state.common.enabled_queues() {
            let mut queue = self
                .queue(setup)
                .map_err(|reason| ActivateError::Driver(format!("queue {index}: {reason}")))?;
            queue.set_event_idx(features & F_EVENT_IDX != 0);
            let Some(kick) = self.kicks.get(index) else { continue };
            let kick = kick
                .try_clone()
                .map_err(|error| ActivateError::Host("a queue's notification", error))?;
            queues.push(ActiveQueue { index: index as u16, queue, kick });
        }
        let memory = self.memory.clone();
        let interrupt = self.interrupts.handle();
        state.device.activate(Activation { memory, features, queues, interrupt })
    }

    /// Lets the guest see the shared memory region where its base address register says.
    fn sync_shared_memory(&self, state: &mut State) {
        let address = state.config.bar64(SHARED_MEMORY_BAR.into());
        let decoding = state.config.command() & COMMAND_MEMORY != 0;
        let Some((window, placed)) = &mut state.shared else { return };
        let fits = decoding && self.windows.contains(address, window.size());
        let wanted = fits.then_some(address);
        if wanted == *placed {
            return;
        }
        match self.services.place_shared_memory(window, wanted) {
            Ok(()) => *placed = wanted,
            Err(error) => {
                *placed = None;
                // The guest can ask for that as often as it likes.
                if state.shared_refusals < MAX_REFUSALS {
                    state.shared_refusals += 1;
                    tracing::warn!(device = %self.device_type, %error, "the guest cannot see the shared memory");
                }
            }
        }
    }

    /// Makes the registers appear where the base address and command registers say.
    fn sync_mapping(&self, state: &mut State) {
        let address = state.config.bar64(BAR.into());
        let decoding = state.config.command() & COMMAND_MEMORY != 0;
        let wanted = (decoding && self.windows.contains(address, Layout::SIZE)).then_some(address);
        if wanted == state.mapped {
            self.displaced.store(false, Ordering::Relaxed);
            return;
        }
        let (Some(bus), Some(this)) = (self.mmio_bus.upgrade(), self.this.upgrade()) else {
            return;
        };
        if let Some(old) = state.mapped.take() {
            bus.remove(old);
        }
        if let Some(new) = wanted {
            match bus.insert(new, Layout::SIZE, Arc::new(Registers(this))) {
                Ok(()) => state.mapped = Some(new),
                Err(error) => tracing::debug!(device = %self.device_type, %error, "not mapped"),
            }
        }
        self.displaced.store(wanted != state.mapped, Ordering::Relaxed);
        self.sync_ioevents(state);
    }

    /// Lets the kernel signal the queues of an active device at their present addresses. Writes
    /// that it does not catch arrive in [`write_registers`](Self::write_registers).
    fn sync_ioevents(&self, state: &mut State) {
        let base = state.mapped.filter(|_| state.active);
        let wanted: Vec<(u64, usize)> = match base {
            Some(base) => state
                .common
                .enabled_queues()
                .map(|(index, _)| (base + Layout::notify_offset(index), index))
                .collect(),
            None => Vec::new(),
        };
        if wanted == state.ioevents {
            return;
        }
        for (address, index) in state.ioevents.drain(..) {
            let Some(kick) = self.kicks.get(index) else { continue };
            if let Err(error) = self.services.unregister_ioevent(address, kick) {
                tracing::warn!(device = %self.device_type, index, %error, "ioeventfd not removed");
            }
        }
        for (address, index) in wanted {
            let Some(kick) = self.kicks.get(index) else { continue };
            match self.services.register_ioevent(address, kick) {
                Ok(()) => state.ioevents.push((address, index)),
                Err(error) => {
                    tracing::warn!(device = %self.device_type, index, %error, "queue notifications take the slow path");
                }
            }
        }
    }

    /// Reads or writes registers through configuration space (§4.1.4.9).
    fn pci_cfg(&self, access: &PciCfgAccess, write: Option<[u8; 4]>) -> Option<[u8; 4]> {
        let length = access.valid_length()?;
        match write {
            Some(value) => {
                self.write_registers(access.offset.into(), &value[..length]);
                None
            }
            None => {
                let mut value = [0; 4];
                self.read_registers(access.offset.into(), &mut value[..length]);
                Some(value)
            }
        }
    }
}

impl PciFunction for VirtioPci {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        let access = {
            let state = self.state();
            state.config.read(offset, data);
            PciCfgAccess::find(&state.config, state.pci_cfg, offset, data.len())
        };
        // The registers may need the same locks again, so they are let go first.
        if let Some(access) = access
            && let Some(value) = self.pci_cfg(&access, None)
        {
            let mut state = self.state();
            let data_offset = PciCfgAccess::data_offset(state.pci_cfg);
            state.config.write(data_offset, &value);
            state.config.read(offset, data);
        }
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let access = {
            let mut state = self.state();
            state.config.write(offset, data);
            let touched = |register: u16, length: u16| {
                offset < register + length && register < offset.saturating_add(data.len() as u16)
            };
            if touched(0x04, 2) || touched(0x10, 24) {
                self.sync_mapping(&mut state);
                self.sync_shared_memory(&mut state);
            }
            if touched(state.msix_capability + 2, 2) {
                let mut control = [0; 2];
                state.config.read(state.msix_capability + 2, &mut control);
                let mut msix = self.msix();
                msix.set_control(u16::from_le_bytes(control));
                self.interrupts.set_msix_enabled(msix.enabled());
            }
            PciCfgAccess::find(&state.config, state.pci_cfg, offset, data.len())
        };
        if let Some(access) = access {
            self.pci_cfg(&access, Some(access.data));
        }
    }

    fn retry_mapping(&self) {
        if self.displaced.load(Ordering::Relaxed) {
            self.sync_mapping(&mut self.state());
        }
    }

    fn shutdown(&self) {
        self.state().device.shutdown();
    }
}

/// The base address register on the memory bus.
struct Registers(Arc<VirtioPci>);

impl BusDevice for Registers {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.read_registers(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.0.write_registers(offset, data);
    }

    fn describe(&self, offset: u64) -> String {
        let (page, offset) = Layout::find(offset);
        let structure = match page {
            Layout::COMMON => "common configuration",
            Layout::ISR => "interrupt status",
            Layout::DEVICE => "device configuration",
            Layout::NOTIFY => "notifications",
            Layout::MSIX_TABLE => "MSI-X table",
            Layout::MSIX_PENDING => "MSI-X pending bits",
            _ => "nothing",
        };
        format!("{}: {structure}, offset {offset:#x}", self.0.device_type)
    }
}

/// PCI class, sub class and programming interface. Drivers bind by device id; these are for people
/// reading `lspci` and for desktops looking for a display.
fn class_code(device: DeviceType) -> u32 {
    match device {
        DeviceType::NET => 0x02_00_00,
        DeviceType::BLOCK | DeviceType::FS => 0x01_80_00,
        DeviceType::CONSOLE => 0x07_80_00,
        DeviceType::GPU => 0x03_80_00,
        DeviceType::INPUT => 0x09_80_00,
        DeviceType::VSOCK => 0x02_80_00,
        DeviceType::SOUND => 0x04_01_00,
        _ => 0x00_ff_00,
    }
}

/// An error with its causes on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
