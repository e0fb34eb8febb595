//! A machine without a hypervisor: guest memory, PCI bus and interrupts as plain eventfds, and the
//! guest's side of virtio-pci to drive any device with.

#![allow(dead_code, unreachable_pub, reason = "each test uses its own part of the harness")]

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    os::fd::AsRawFd,
    sync::{Arc, Mutex, atomic::Ordering},
};

use devices::{
    GuestMemory,
    bus::{Bus, BusDevice},
    pci::{PciRoot, PciWindows},
    services::{MsiMessage, MsiVector, VmServices},
    virtio::{VirtioDevice, shared_memory::SharedMemory},
};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::{EFD_NONBLOCK, EventFd},
};

/// Guest memory below the hole.
pub const LOW_MEMORY: u64 = 32 << 20;
/// Where guest memory goes on.
pub const HIGH_START: u64 = 4 << 30;
/// Guest memory above the hole.
pub const HIGH_MEMORY: u64 = 2 << 20;
/// Where the guest's rings lie, one queue per stride.
const RINGS: u64 = 1 << 20;
const RING_STRIDE: u64 = 64 << 10;
/// Where test buffers lie, behind the rings of up to 128 queues.
pub const BUFFERS: u64 = 16 << 20;
/// A passing test never waits this long.
pub const PATIENCE_MS: i32 = 20_000;

pub const ACKNOWLEDGE: u8 = 1;
pub const DRIVER: u8 = 2;
pub const DRIVER_OK: u8 = 4;
pub const FEATURES_OK: u8 = 8;
pub const NEEDS_RESET: u8 = 0x40;
pub const VERSION_1: u64 = 1 << 32;
pub const INDIRECT_DESC: u64 = 1 << 28;
pub const EVENT_IDX: u64 = 1 << 29;

pub const DESC_NEXT: u16 = 1;
pub const DESC_WRITE: u16 = 2;
pub const DESC_INDIRECT: u16 = 4;

/// Registers of the common configuration structure (VIRTIO 1.3 §4.1.4.3).
pub mod reg {
    pub const DEVICE_FEATURE_SELECT: u64 = 0x00;
    pub const DEVICE_FEATURE: u64 = 0x04;
    pub const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub const DRIVER_FEATURE: u64 = 0x0c;
    pub const CONFIG_VECTOR: u64 = 0x10;
    pub const NUM_QUEUES: u64 = 0x12;
    pub const STATUS: u64 = 0x14;
    pub const GENERATION: u64 = 0x15;
    pub const QUEUE_SELECT: u64 = 0x16;
    pub const QUEUE_SIZE: u64 = 0x18;
    pub const QUEUE_VECTOR: u64 = 0x1a;
    pub const QUEUE_ENABLE: u64 = 0x1c;
    pub const QUEUE_NOTIFY_OFF: u64 = 0x1e;
    pub const QUEUE_DESC: u64 = 0x20;
    pub const QUEUE_DRIVER: u64 = 0x28;
    pub const QUEUE_DEVICE: u64 = 0x30;
}

/// An interrupt vector that only remembers.
pub struct FakeVector {
    pub fd: EventFd,
    pub route: Mutex<Option<MsiMessage>>,
}

impl MsiVector for FakeVector {
    fn eventfd(&self) -> &EventFd {
        &self.fd
    }

    fn set_route(&self, message: Option<MsiMessage>) -> io::Result<()> {
        *self.route.lock().unwrap() = message;
        Ok(())
    }
}

/// The VMM's services over plain eventfds.
#[derive(Default)]
pub struct FakeServices {
    pub vectors: Mutex<Vec<Arc<FakeVector>>>,
    pub ioevents: Mutex<BTreeMap<u64, EventFd>>,
    /// Where the window for memory of the host is.
    pub window: Mutex<Option<u64>>,
}

impl VmServices for FakeServices {
    fn allocate_msi(&self) -> io::Result<Arc<dyn MsiVector>> {
        let fd = EventFd::new(EFD_NONBLOCK)?;
        let vector = Arc::new(FakeVector { fd, route: Mutex::new(None) });
        self.vectors.lock().unwrap().push(vector.clone());
        Ok(vector)
    }

    fn register_ioevent(&self, address: u64, fd: &EventFd) -> io::Result<()> {
        let previous = self.ioevents.lock().unwrap().insert(address, fd.try_clone()?);
        assert!(previous.is_none(), "two ioeventfds at {address:#x}");
        Ok(())
    }

    fn unregister_ioevent(&self, address: u64, _: &EventFd) -> io::Result<()> {
        let previous = self.ioevents.lock().unwrap().remove(&address);
        assert!(previous.is_some(), "no ioeventfd at {address:#x}");
        Ok(())
    }

    fn place_shared_memory(&self, _: &Arc<SharedMemory>, address: Option<u64>) -> io::Result<()> {
        *self.window.lock().unwrap() = address;
        Ok(())
    }
}

/// Waits until `fd` is readable, `false` after `milliseconds`.
pub fn readable(fd: &impl AsRawFd, milliseconds: i32) -> bool {
    let epoll = Epoll::new().unwrap();
    epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), EpollEvent::new(EventSet::IN, 0)).unwrap();
    epoll.wait(milliseconds, &mut [EpollEvent::default()]).unwrap() > 0
}

/// Guest memory in one memfd with a hole, as the VMM makes it.
fn guest_memory() -> GuestMemory {
    let file = rustix::fs::memfd_create("conformance", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = File::from(file);
    file.set_len(LOW_MEMORY + HIGH_MEMORY).unwrap();
    let high = FileOffset::new(file.try_clone().unwrap(), LOW_MEMORY);
    GuestMemoryMmap::from_ranges_with_files([
        (GuestAddress(0), LOW_MEMORY as usize, Some(FileOffset::new(file, 0))),
        (GuestAddress(HIGH_START), HIGH_MEMORY as usize, Some(high)),
    ])
    .unwrap()
}

/// The machine.
pub struct Machine {
    pub bus: Arc<Bus>,
    pub root: PciRoot,
    pub windows: PciWindows,
    pub ecam: Arc<dyn BusDevice>,
    pub services: Arc<FakeServices>,
    pub memory: GuestMemory,
}

impl Machine {
    pub fn new() -> Self {
        let bus = Arc::new(Bus::new());
        let windows =
            PciWindows { mmio32: 0xc000_0000..0xc100_0000, mmio64: 0x10_0000_0000..0x10_1000_0000 };
        let root = PciRoot::new(windows.clone(), bus.clone());
        let ecam = root.ecam();
        let services = Arc::new(FakeServices::default());
        Self { bus, root, windows, ecam, services, memory: guest_memory() }
    }

    /// Adds a device and looks at it the way a driver does.
    pub fn add(&self, device: Box<dyn VirtioDevice>) -> Guest<'_> {
        let first_vector = self.services.vectors.lock().unwrap().len();
        let services = self.services.clone();
        let address = self.root.add_virtio(device, services, self.memory.clone()).unwrap();
        Guest::probe(self, address.device, first_vector)
    }

    /// A guest's memory mapped read of up to 8 bytes.
    pub fn read(&self, address: u64, size: usize) -> u64 {
        let mut bytes = [0; 8];
        self.bus.read(address, &mut bytes[..size]);
        u64::from_le_bytes(bytes)
    }

    /// A guest's memory mapped write, which an ioeventfd may catch.
    pub fn write(&self, address: u64, value: u64, size: usize) {
        // As in the kernel, the lookup is over before a device sees the access.
        if let Some(fd) = self.services.ioevents.lock().unwrap().get(&address) {
            return fd.write(1).unwrap();
        }
        self.bus.write(address, &value.to_le_bytes()[..size]);
    }

    /// A write that reaches the registers even where an ioeventfd would catch it.
    pub fn bus_write(&self, address: u64, value: u64, size: usize) {
        self.bus.write(address, &value.to_le_bytes()[..size]);
    }
}

/// One capability of a function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capability {
    pub id: u8,
    pub kind: u8,
    pub offset: u16,
    pub bar: u8,
    pub start: u32,
    pub length: u32,
}

/// The guest's view of one function.
pub struct Guest<'m> {
    pub machine: &'m Machine,
    pub slot: u8,
    pub capabilities: Vec<Capability>,
    pub bar: u64,
    /// The machine's vectors that belong to this function start here.
    pub first_vector: usize,
}

impl<'m> Guest<'m> {
    fn probe(machine: &'m Machine, slot: u8, first_vector: usize) -> Self {
        let mut guest = Self { machine, slot, capabilities: Vec::new(), bar: 0, first_vector };
        let mut next = guest.config(0x34, 1) as u16;
        while next != 0 {
            assert!(next >= 0x40 && next.is_multiple_of(4), "capability at {next:#x}");
            assert!(guest.capabilities.len() < 32, "the capability list does not end");
            guest.capabilities.push(Capability {
                id: guest.config(next, 1) as u8,
                kind: guest.config(next + 3, 1) as u8,
                offset: next,
                bar: guest.config(next + 4, 1) as u8,
                start: guest.config(next + 8, 4) as u32,
                length: guest.config(next + 12, 4) as u32,
            });
            next = guest.config(next + 1, 1) as u16;
        }
        guest.bar = guest.config(0x10, 8) & !0xf;
        guest
    }

    pub fn config(&self, offset: u16, size: usize) -> u64 {
        let mut bytes = [0; 8];
        bytes[..size].fill(0xff);
        let address = u64::from(self.slot) << 15 | u64::from(offset);
        self.machine.ecam.read(address, &mut bytes[..size]);
        u64::from_le_bytes(bytes)
    }

    pub fn set_config(&self, offset: u16, value: u64, size: usize) {
        let address = u64::from(self.slot) << 15 | u64::from(offset);
        self.machine.ecam.write(address, &value.to_le_bytes()[..size]);
    }

    /// Memory decoding and bus mastering on or off.
    pub fn set_decoding(&self, on: bool) {
        self.set_config(4, if on { 6 } else { 0 }, 2);
    }

    /// Moves the base address register as Linux does, with decoding off meanwhile.
    pub fn move_bar(&mut self, address: u64) {
        self.set_decoding(false);
        self.set_config(0x10, address & 0xffff_ffff, 4);
        self.set_config(0x14, address >> 32, 4);
        self.set_decoding(true);
        self.bar = address;
    }

    /// The virtio capability of a kind.
    pub fn capability(&self, kind: u8) -> Capability {
        let mut found = self.capabilities.iter().filter(|cap| cap.id == 9 && cap.kind == kind);
        let capability = *found.next().unwrap_or_else(|| panic!("no capability of kind {kind}"));
        assert_eq!(found.next(), None, "capability {kind} twice");
        capability
    }

    pub fn common(&self, register: u64, size: usize) -> u64 {
        self.machine.read(self.bar + u64::from(self.capability(1).start) + register, size)
    }

    pub fn set_common(&self, register: u64, value: u64, size: usize) {
        let base = self.bar + u64::from(self.capability(1).start);
        self.machine.write(base + register, value, size);
    }

    pub fn device_config(&self, offset: u64, size: usize) -> u64 {
        self.machine.read(self.bar + u64::from(self.capability(4).start) + offset, size)
    }

    pub fn status(&self) -> u8 {
        self.common(reg::STATUS, 1) as u8
    }

    pub fn set_status(&self, status: u8) {
        self.set_common(reg::STATUS, status.into(), 1);
    }

    pub fn reset(&self) {
        self.set_status(0);
        assert_eq!(self.status(), 0, "the reset is complete when it returns");
    }

    pub fn offered(&self) -> u64 {
        self.set_common(reg::DEVICE_FEATURE_SELECT, 0, 4);
        let low = self.common(reg::DEVICE_FEATURE, 4);
        self.set_common(reg::DEVICE_FEATURE_SELECT, 1, 4);
        low | self.common(reg::DEVICE_FEATURE, 4) << 32
    }

    /// Resets and accepts `features`; returns whether the device agreed.
    pub fn negotiate(&self, features: u64) -> bool {
        self.reset();
        self.set_status(ACKNOWLEDGE);
        self.set_status(ACKNOWLEDGE | DRIVER);
        for (select, half) in [(0, features & 0xffff_ffff), (1, features >> 32)] {
            self.set_common(reg::DRIVER_FEATURE_SELECT, select, 4);
            self.set_common(reg::DRIVER_FEATURE, half, 4);
        }
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
        self.status() & FEATURES_OK != 0
    }

    pub fn queue_count(&self) -> u16 {
        self.common(reg::NUM_QUEUES, 2) as u16
    }

    pub fn select(&self, queue: u16) {
        self.set_common(reg::QUEUE_SELECT, queue.into(), 2);
    }

    /// Writes the addresses of the selected queue, by halves as Linux does.
    pub fn set_addresses(&self, desc: u64, driver: u64, device: u64) {
        for (register, value) in
            [(reg::QUEUE_DESC, desc), (reg::QUEUE_DRIVER, driver), (reg::QUEUE_DEVICE, device)]
        {
            self.set_common(register, value & 0xffff_ffff, 4);
            self.set_common(register + 4, value >> 32, 4);
        }
    }

    /// Switches MSI-X on with every vector open, then gives each queue and the configuration a
    /// vector of its own.
    pub fn set_up_vectors(&self) {
        let msix = self.msix();
        let count = self.queue_count() + 1;
        let table = self.bar + u64::from(self.config(msix.offset + 4, 4) as u32 & !7);
        for vector in 0..u64::from(count) {
            self.machine.write(table + vector * 16, 0xfee0_0000, 4);
            self.machine.write(table + vector * 16 + 4, 0, 4);
            self.machine.write(table + vector * 16 + 8, 0x30 + vector, 4);
            self.machine.write(table + vector * 16 + 12, 0, 4);
        }
        self.set_config(msix.offset + 2, 0x8000, 2);
        self.set_common(reg::CONFIG_VECTOR, 0, 2);
        for queue in 0..self.queue_count() {
            self.select(queue);
            self.set_common(reg::QUEUE_VECTOR, u64::from(queue) + 1, 2);
            assert_eq!(self.common(reg::QUEUE_VECTOR, 2), u64::from(queue) + 1);
        }
    }

    pub fn msix(&self) -> Capability {
        *self.capabilities.iter().find(|cap| cap.id == 0x11).expect("an MSI-X capability")
    }

    /// Enables all queues at their usual places, emptied.
    pub fn set_up_queues(&self) -> Vec<GuestQueue<'m>> {
        (0..self.queue_count()).map(|index| self.set_up_queue(index)).collect()
    }

    pub fn set_up_queue(&self, index: u16) -> GuestQueue<'m> {
        self.select(index);
        let size = (self.common(reg::QUEUE_SIZE, 2) as u16).min(256);
        self.set_common(reg::QUEUE_SIZE, size.into(), 2);
        let queue = GuestQueue::new(self, index, size);
        self.set_addresses(queue.desc, queue.avail, queue.used);
        self.set_common(reg::QUEUE_ENABLE, 1, 2);
        assert_eq!(self.common(reg::QUEUE_ENABLE, 2), 1, "queue {index} is enabled");
        queue
    }

    /// A whole initialisation (§3.1.1) with everything the device offers.
    pub fn start(&self) -> Vec<GuestQueue<'m>> {
        self.set_decoding(true);
        self.start_with(self.offered())
    }

    pub fn start_with(&self, features: u64) -> Vec<GuestQueue<'m>> {
        self.set_decoding(true);
        assert!(self.negotiate(features), "features {features:#x}");
        self.set_up_vectors();
        let queues = self.set_up_queues();
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        assert_eq!(self.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        queues
    }

    /// The eventfd of the vector with this number in the function's table.
    pub fn vector(&self, index: usize) -> Arc<FakeVector> {
        self.machine.services.vectors.lock().unwrap()[self.first_vector + index].clone()
    }
}

/// The guest's half of one split virtqueue.
pub struct GuestQueue<'m> {
    machine: &'m Machine,
    pub index: u16,
    pub size: u16,
    pub desc: u64,
    pub avail: u64,
    pub used: u64,
    pub notify: u64,
    vector: Arc<FakeVector>,
    next_avail: u16,
    next_used: u16,
}

impl<'m> GuestQueue<'m> {
    fn new(guest: &Guest<'m>, index: u16, size: u16) -> Self {
        let base = RINGS + RING_STRIDE * u64::from(index);
        assert!(base + RING_STRIDE <= BUFFERS, "too many queues for this test");
        let machine = guest.machine;
        machine.memory.write_slice(&[0; RING_STRIDE as usize], GuestAddress(base)).unwrap();
        let capability = guest.capability(2);
        let multiplier = guest.config(capability.offset + 16, 4);
        let notify = guest.bar
            + u64::from(capability.start)
            + guest.common(reg::QUEUE_NOTIFY_OFF, 2) * multiplier;
        Self {
            machine,
            index,
            size,
            desc: base,
            avail: base + 0x4000,
            used: base + 0x8000,
            notify,
            vector: guest.vector(usize::from(index) + 1),
            next_avail: 0,
            next_used: 0,
        }
    }

    pub fn put<T: vm_memory::ByteValued>(&self, value: T, address: u64) {
        self.machine.memory.write_obj(value, GuestAddress(address)).unwrap();
    }

    /// Writes a descriptor into the table at `table`.
    pub fn descriptor(&self, table: u64, slot: u16, part: (u64, u32, u16), next: u16) {
        let at = table + 16 * u64::from(slot);
        let (address, length, flags) = part;
        self.put(address, at);
        self.put(length, at + 8);
        self.put(flags, at + 12);
        self.put(next, at + 14);
    }

    /// Writes consecutive descriptors from 0 on as one chain.
    pub fn chain(&self, parts: &[(u64, u32, u16)]) {
        for (slot, part) in parts.iter().enumerate() {
            let slot = slot as u16;
            let more = if usize::from(slot) + 1 < parts.len() { DESC_NEXT } else { 0 };
            self.descriptor(self.desc, slot, (part.0, part.1, part.2 | more), slot + 1);
        }
    }

    /// Makes the chain with this head available, without a notification.
    pub fn offer(&mut self, head: u16) {
        self.put(head, self.avail + 4 + 2 * u64::from(self.next_avail % self.size));
        self.set_avail(self.next_avail.wrapping_add(1));
    }

    /// Sets the available index to anything.
    pub fn set_avail(&mut self, index: u16) {
        self.next_avail = index;
        let address = GuestAddress(self.avail + 2);
        self.machine.memory.store(index, address, Ordering::Release).unwrap();
    }

    pub fn kick(&self) {
        self.machine.write(self.notify, self.index.into(), 2);
    }

    pub fn used_index(&self) -> u16 {
        self.machine.memory.load(GuestAddress(self.used + 2), Ordering::Acquire).unwrap()
    }

    /// Where the device wants the next notification (EVENT_IDX).
    pub fn avail_event(&self) -> u16 {
        let at = self.used + 4 + 8 * u64::from(self.size);
        self.machine.memory.load(GuestAddress(at), Ordering::Acquire).unwrap()
    }

    /// Takes the next used element: head and written length.
    pub fn take_used(&mut self) -> Option<(u16, u32)> {
        if self.used_index() == self.next_used {
            return None;
        }
        let at = self.used + 4 + 8 * u64::from(self.next_used % self.size);
        let head: u32 = self.machine.memory.read_obj(GuestAddress(at)).unwrap();
        let length: u32 = self.machine.memory.read_obj(GuestAddress(at + 4)).unwrap();
        self.next_used = self.next_used.wrapping_add(1);
        let used_event = self.avail + 4 + 2 * u64::from(self.size);
        let memory = &self.machine.memory;
        memory.store(self.next_used, GuestAddress(used_event), Ordering::SeqCst).unwrap();
        Some((head as u16, length))
    }

    /// Waits for the next used element by its interrupt.
    pub fn wait_used(&mut self) -> (u16, u32) {
        loop {
            if let Some(used) = self.take_used() {
                return used;
            }
            assert!(readable(&self.vector.fd, PATIENCE_MS), "no interrupt from {}", self.index);
            let _ = self.vector.fd.read();
        }
    }
}
