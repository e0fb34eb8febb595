//! What devices may ask of KVM: message signalled interrupts as irqfds, queue notifications as
//! ioeventfds.

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use devices::{
    services::{MsiMessage, MsiVector, VmServices},
    vfio::DeviceMemory,
    virtio::shared_memory::SharedMemory,
};
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::layout::IO_APIC_PINS;

/// KVM's default for the size of the routing table is 4096 entries; ours stays well below.
const MAX_VECTORS: u32 = 2048;
const PIC_PINS: u32 = 8;

fn io_error(errno: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(errno.errno())
}

/// Interrupt routes by GSI; the pins of PIC and I/O APIC are implied.
#[derive(Default)]
struct Routes {
    messages: BTreeMap<u32, MsiMessage>,
    allocated: u32,
}

impl Routes {
    fn table(&self) -> Vec<kvm_irq_routing_entry> {
        let pin = |gsi, irqchip, pin| {
            let mut entry =
                kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
            entry.u.irqchip.irqchip = irqchip;
            entry.u.irqchip.pin = pin;
            entry
        };
        let pics = (0..2 * PIC_PINS).map(|gsi| {
            let chip = if gsi < PIC_PINS { KVM_IRQCHIP_PIC_MASTER } else { KVM_IRQCHIP_PIC_SLAVE };
            pin(gsi, chip, gsi % PIC_PINS)
        });
        // The classic wiring: the timer (IRQ 0) arrives at pin 2.
        let io_apic = (0..IO_APIC_PINS)
            .map(|gsi| pin(gsi, KVM_IRQCHIP_IOAPIC, if gsi == 0 { 2 } else { gsi }));
        let messages = self.messages.iter().map(|(&gsi, message)| {
            let mut entry =
                kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
            entry.u.msi.address_lo = message.address as u32;
            entry.u.msi.address_hi = (message.address >> 32) as u32;
            entry.u.msi.data = message.data;
            entry
        });
        pics.chain(io_apic).chain(messages).collect()
    }
}

struct Shared {
    vm: Arc<VmFd>,
    routes: Mutex<Routes>,
    /// Windows by their slots; they stay as long as the guest may see them.
    windows: Mutex<Vec<Window>>,
}

struct Window {
    memory: Content,
    placed: bool,
}

/// What is behind a window; it stays where it is in this process as long as this lives.
#[derive(Clone)]
pub(crate) enum Content {
    /// What a device of ours shows.
    Shared(Arc<SharedMemory>),
    /// Registers of a device of the host.
    Device(Arc<DeviceMemory>),
}

impl Content {
    /// Bytes.
    pub(crate) fn size(&self) -> u64 {
        match self {
            Self::Shared(memory) => memory.size(),
            Self::Device(memory) => memory.size(),
        }
    }

    /// Where it is in this process.
    pub(crate) fn host_address(&self) -> u64 {
        match self {
            Self::Shared(memory) => memory.host_address(),
            Self::Device(memory) => memory.host_address(),
        }
    }
}

impl Window {
    /// Moves the window with `set`, which makes its slot or, without an address, deletes it.
    ///
    /// A slot that could not be deleted counts as placed: its memory must stay.
    fn place(
        &mut self,
        address: Option<u64>,
        set: impl Fn(&Content, Option<u64>) -> io::Result<()>,
    ) -> io::Result<()> {
        if self.placed {
            set(&self.memory, None)?;
            self.placed = false;
        }
        if address.is_some() {
            set(&self.memory, address)?;
            self.placed = true;
        }
        Ok(())
    }
}

/// The memory slots behind those of RAM.
const FIRST_WINDOW: u32 = 32;

impl Shared {
    fn routes(&self) -> MutexGuard<'_, Routes> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn commit(&self, routes: &Routes) -> io::Result<()> {
        let table = KvmIrqRouting::from_entries(&routes.table())
            .map_err(|error| io::Error::other(format!("{error:?}")))?;
        self.vm.set_gsi_routing(&table).map_err(io_error)
    }

    fn place(&self, memory: Content, address: Option<u64>) -> io::Result<()> {
        let mut windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        // No two pieces of memory are in one place.
        let is_known = |window: &Window| window.memory.host_address() == memory.host_address();
        let index = windows.iter().position(is_known).unwrap_or_else(|| {
            windows.push(Window { memory, placed: false });
            windows.len() - 1
        });
        let Some(window) = windows.get_mut(index) else { return Ok(()) };
        let slot = FIRST_WINDOW + index as u32;
        window.place(address, |memory, address| {
            crate::sys::set_window(&self.vm, slot, memory, address)
        })
    }
}

/// [`VmServices`] of one machine.
#[derive(Clone)]
pub struct KvmServices {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for KvmServices {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KvmServices").finish_non_exhaustive()
    }
}

impl KvmServices {
    /// Services of `vm`, whose interrupt controllers exist already.
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self {
            shared: Arc::new(Shared { vm, routes: Mutex::default(), windows: Mutex::default() }),
        }
    }

    /// An eventfd that pulses the I/O APIC pin `gsi`.
    pub fn line(&self, gsi: u32) -> io::Result<EventFd> {
        let line = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        self.shared.vm.register_irqfd(&line, gsi).map_err(io_error)?;
        Ok(line)
    }
}

impl VmServices for KvmServices {
    fn allocate_msi(&self) -> io::Result<Arc<dyn MsiVector>> {
        let mut routes = self.shared.routes();
        if routes.allocated == MAX_VECTORS {
            return Err(io::Error::other(format!("all {MAX_VECTORS} interrupt vectors are taken")));
        }
        let gsi = IO_APIC_PINS + routes.allocated;
        routes.allocated += 1;
        Ok(Arc::new(Vector {
            shared: self.shared.clone(),
            gsi,
            eventfd: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            connected: Mutex::new(false),
        }))
    }

    fn register_ioevent(&self, address: u64, fd: &EventFd) -> io::Result<()> {
        // Without a data match and a length KVM need not decode the instruction.
        let address = IoEventAddress::Mmio(address);
        self.shared.vm.register_ioevent(fd, &address, NoDatamatch).map_err(io_error)
    }

    fn unregister_ioevent(&self, address: u64, fd: &EventFd) -> io::Result<()> {
        let address = IoEventAddress::Mmio(address);
        self.shared.vm.unregister_ioevent(fd, &address, NoDatamatch).map_err(io_error)
    }

    fn place_shared_memory(
        &self,
        memory: &Arc<SharedMemory>,
        address: Option<u64>,
    ) -> io::Result<()> {
        self.shared.place(Content::Shared(memory.clone()), address)
    }

    fn place_device_memory(
        &self,
        memory: &Arc<DeviceMemory>,
        address: Option<u64>,
    ) -> io::Result<()> {
        self.shared.place(Content::Device(memory.clone()), address)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let windows = self.windows.get_mut().unwrap_or_else(PoisonError::into_inner);
        for (slot, mut window) in (FIRST_WINDOW..).zip(windows.drain(..)) {
            let vm = &self.vm;
            if let Err(error) = window
                .place(None, |memory, address| crate::sys::set_window(vm, slot, memory, address))
            {
                tracing::error!(%error, "a window of the guest stays");
                // It must not see what comes to be there.
                std::mem::forget(window.memory);
            }
        }
    }
}

struct Vector {
    shared: Arc<Shared>,
    gsi: u32,
    eventfd: EventFd,
    /// Whether the irqfd is attached.
    connected: Mutex<bool>,
}

impl MsiVector for Vector {
    fn eventfd(&self) -> &EventFd {
        &self.eventfd
    }

    fn set_route(&self, message: Option<MsiMessage>) -> io::Result<()> {
        let mut connected = self.connected.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(message) = message else {
            // The route stays: changing the table is expensive, an unattached one does nothing.
            if *connected {
                self.shared.vm.unregister_irqfd(&self.eventfd, self.gsi).map_err(io_error)?;
                *connected = false;
            }
            return Ok(());
        };
        let mut routes = self.shared.routes();
        if routes.messages.get(&self.gsi) != Some(&message) {
            let before = routes.messages.insert(self.gsi, message);
            if let Err(error) = self.shared.commit(&routes) {
                // A message KVM refuses must not stay in the way of all later changes.
                match before {
                    Some(before) => routes.messages.insert(self.gsi, before),
                    None => routes.messages.remove(&self.gsi),
                };
                return Err(error);
            }
        }
        drop(routes);
        if !*connected {
            // Delivers at once what was signalled in the meantime.
            self.shared.vm.register_irqfd(&self.eventfd, self.gsi).map_err(io_error)?;
            *connected = true;
        }
        Ok(())
    }
}

impl Drop for Vector {
    fn drop(&mut self) {
        if let Err(error) = self.set_route(None) {
            tracing::debug!(%error, gsi = self.gsi, "an irqfd could not be detached");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_keeps_the_pins_of_the_interrupt_controllers() {
        let mut routes = Routes::default();
        routes.messages.insert(24, MsiMessage { address: 0xfee0_1000, data: 0x21 });
        let table = routes.table();
        assert_eq!(table.len(), 16 + 24 + 1);
        let message = table.last().unwrap();
        assert_eq!((message.gsi, message.type_), (24, KVM_IRQ_ROUTING_MSI));
    }

    #[test]
    fn a_window_whose_slot_stays_is_still_placed() {
        let memory = Content::Shared(SharedMemory::new(1 << 20).unwrap());
        let mut window = Window { memory, placed: false };
        let refuse = |_: &Content, _| Err(io::ErrorKind::OutOfMemory.into());
        window.place(None, refuse).unwrap();
        window.place(Some(0x1_0000_0000), refuse).unwrap_err();
        assert!(!window.placed);
        window.place(Some(0x1_0000_0000), |_, _| Ok(())).unwrap();
        assert!(window.placed);
        for address in [None, Some(0x2_0000_0000)] {
            window.place(address, refuse).unwrap_err();
            assert!(window.placed, "the slot is there: it is tried again at the end");
        }
        window
            .place(None, |_, address| {
                assert_eq!(address, None, "only deleted");
                Ok(())
            })
            .unwrap();
        assert!(!window.placed);
    }
}
