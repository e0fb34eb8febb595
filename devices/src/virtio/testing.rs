//! The driver's half of virtqueues over real guest memory, for the tests of the devices.

use std::{
    collections::HashMap,
    os::fd::AsRawFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering, fence},
    },
};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::{EFD_NONBLOCK, EventFd},
};

use super::device::{
    Activation, ActiveQueue, F_VERSION_1, RING_FEATURES, VirtioDevice, VirtioInterrupt,
};
use crate::GuestMemory;

/// Milliseconds after which a test has failed; never reached by one that passes.
const PATIENCE: i32 = 120_000;
/// Guest memory of a test.
pub(crate) const MEMORY_SIZE: usize = 32 << 20;
/// Where buffers begin; rings lie below.
const BUFFERS: u64 = 4 << 20;
const RING_STRIDE: u64 = 64 << 10;

/// Waits until `fd` is readable.
pub(crate) fn wait_readable(fd: &impl AsRawFd, what: &str) {
    let epoll = Epoll::new().unwrap();
    let fd = fd.as_raw_fd();
    epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, 0)).unwrap();
    let mut events = [EpollEvent::default()];
    assert!(epoll.wait(PATIENCE, &mut events).unwrap() > 0, "nothing happened: {what}");
}

/// Guest memory on a memfd, as the VMM makes it.
pub(crate) fn guest_memory() -> GuestMemory {
    let file = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = std::fs::File::from(file);
    file.set_len(MEMORY_SIZE as u64).unwrap();
    let offset = FileOffset::new(file, 0);
    GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), MEMORY_SIZE, Some(offset))]).unwrap()
}

/// Interrupts as eventfds.
pub(crate) struct TestInterrupt {
    queues: Vec<EventFd>,
    config: EventFd,
    broken: AtomicBool,
}

impl TestInterrupt {
    pub(crate) fn new(queues: usize) -> Self {
        let fd = || EventFd::new(EFD_NONBLOCK).unwrap();
        Self {
            queues: (0..queues).map(|_| fd()).collect(),
            config: fd(),
            broken: AtomicBool::new(false),
        }
    }

    /// Whether the device gave up.
    pub(crate) fn needs_reset(&self) -> bool {
        self.broken.load(Ordering::SeqCst)
    }

    /// How many interrupts of a queue there were since the last call.
    pub(crate) fn take_used(&self, queue: usize) -> u64 {
        self.queues[queue].read().unwrap_or_default()
    }

    /// Waits for a configuration change, or for the device to give up.
    pub(crate) fn wait_config_change(&self) {
        wait_readable(&self.config, "a configuration change");
        self.config.read().unwrap();
    }
}

impl VirtioInterrupt for TestInterrupt {
    fn signal_used(&self, queue: u16) {
        self.queues[usize::from(queue)].write(1).unwrap();
    }

    fn signal_config_change(&self) {
        self.config.write(1).unwrap();
    }

    fn set_needs_reset(&self) {
        self.broken.store(true, Ordering::SeqCst);
        self.config.write(1).unwrap();
    }

    fn queue_eventfd(&self, queue: u16) -> std::io::Result<EventFd> {
        self.queues[usize::from(queue)].try_clone()
    }
}

/// A part of a chain.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Part<'a> {
    /// Bytes for the device to read.
    Out(&'a [u8]),
    /// Room for the device to write to.
    In(u32),
}

/// One queue, seen by the driver.
pub(crate) struct DriverQueue {
    index: u16,
    size: u16,
    memory: GuestMemory,
    interrupt: Arc<TestInterrupt>,
    kick: EventFd,
    desc: u64,
    avail: u64,
    used: u64,
    event_idx: bool,
    next_avail: u16,
    /// `next_avail` at the last notification.
    kicked: u16,
    next_used: u16,
    next_desc: u16,
    next_buffer: u64,
    buffers: (u64, u64),
    /// Writable areas per chain in flight.
    pending: HashMap<u16, Vec<(u64, u32)>>,
}

impl DriverQueue {
    /// Makes a chain available without notifying the device; returns its head.
    pub(crate) fn add(&mut self, parts: &[Part<'_>]) -> u16 {
        let parts: Vec<_> = parts
            .iter()
            .map(|part| match part {
                Part::Out(bytes) => {
                    let address = self.take_buffer(bytes.len() as u64);
                    self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
                    (address, bytes.len() as u32, false)
                }
                Part::In(length) => (self.take_buffer(u64::from(*length)), *length, true),
            })
            .collect();
        self.add_raw(&parts)
    }

    /// Makes a chain of `(address, length, device writable)` available; returns its head.
    pub(crate) fn add_raw(&mut self, parts: &[(u64, u32, bool)]) -> u16 {
        let head = self.next_desc;
        for (position, (address, length, writable)) in parts.iter().enumerate() {
            let last = position + 1 == parts.len();
            let next = (self.next_desc + 1) % self.size;
            let flags = u16::from(!last) | (u16::from(*writable) << 1);
            let at = self.desc + 16 * u64::from(self.next_desc);
            self.store(at, &address.to_le_bytes());
            self.store(at + 8, &length.to_le_bytes());
            self.store(at + 12, &flags.to_le_bytes());
            self.store(at + 14, &next.to_le_bytes());
            self.next_desc = next;
        }
        let writable = parts.iter().filter(|part| part.2).map(|part| (part.0, part.1)).collect();
        self.pending.insert(head, writable);
        let slot = self.avail + 4 + 2 * u64::from(self.next_avail % self.size);
        self.store(slot, &head.to_le_bytes());
        self.next_avail = self.next_avail.wrapping_add(1);
        self.memory
            .store(self.next_avail.to_le(), GuestAddress(self.avail + 2), Ordering::Release)
            .unwrap();
        head
    }

    /// Notifies the device if it wants to know of what was added since the last call (§2.7.10).
    pub(crate) fn kick(&mut self) {
        fence(Ordering::SeqCst);
        let (old, new) = (self.kicked, self.next_avail);
        self.kicked = new;
        let wanted = if self.event_idx {
            let event = self.used + 4 + 8 * u64::from(self.size);
            let event: u16 = self.memory.read_obj(GuestAddress(event)).unwrap();
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            let flags: u16 = self.memory.read_obj(GuestAddress(self.used)).unwrap();
            flags & 1 == 0
        };
        if wanted {
            self.kick.write(1).unwrap();
        }
    }

    /// What another thread can make `head` available with, again and again, without looking at what
    /// becomes of it: as only a driver does that wants to keep the device busy.
    pub(crate) fn flood(&self, head: u16) -> impl FnMut() + Send + use<> {
        let (memory, kick) = (self.memory.clone(), self.kick.try_clone().unwrap());
        let (avail, used, size) = (self.avail, self.used, self.size);
        for slot in 0..u64::from(size) {
            memory.write_obj(head.to_le(), GuestAddress(avail + 4 + 2 * slot)).unwrap();
        }
        move || {
            // As far ahead of the device as may be.
            let done: u16 = memory.load(GuestAddress(used + 2), Ordering::Acquire).unwrap();
            let next = u16::from_le(done).wrapping_add(size);
            memory.store(next.to_le(), GuestAddress(avail + 2), Ordering::Release).unwrap();
            kick.write(1).unwrap();
        }
    }

    /// Makes a chain available and notifies the device.
    pub(crate) fn send(&mut self, parts: &[Part<'_>]) -> u16 {
        let head = self.add(parts);
        self.kick();
        head
    }

    /// Offers `count` buffers of `length` bytes for the device to fill.
    pub(crate) fn fill(&mut self, count: u16, length: u32) {
        for _ in 0..count {
            self.add(&[Part::In(length)]);
        }
        self.kick();
    }

    /// The next used chain if there is one: head, and what the device wrote.
    pub(crate) fn try_used(&mut self) -> Option<(u16, Vec<u8>)> {
        let index: u16 = self.memory.load(GuestAddress(self.used + 2), Ordering::Acquire).unwrap();
        if u16::from_le(index) == self.next_used {
            return None;
        }
        let element = self.used + 4 + 8 * u64::from(self.next_used % self.size);
        let head: u32 = self.memory.read_obj(GuestAddress(element)).unwrap();
        let length: u32 = self.memory.read_obj(GuestAddress(element + 4)).unwrap();
        self.next_used = self.next_used.wrapping_add(1);
        // Ask for an interrupt with the next one.
        let event = self.avail + 4 + 2 * u64::from(self.size);
        self.store(event, &self.next_used.to_le_bytes());
        // Whoever finds nothing at the next look sleeps: the wish has to be visible before it.
        fence(Ordering::SeqCst);
        let head = u16::try_from(head).unwrap();
        let mut bytes = Vec::new();
        let mut left = length as usize;
        for (address, room) in self.pending.remove(&head).expect("a chain in flight") {
            let take = left.min(room as usize);
            let mut part = vec![0; take];
            self.memory.read_slice(&mut part, GuestAddress(address)).unwrap();
            bytes.extend(part);
            left -= take;
        }
        assert_eq!(left, 0, "the device wrote more than the chain holds");
        Some((head, bytes))
    }

    /// Waits for the next used chain.
    pub(crate) fn wait_used(&mut self) -> (u16, Vec<u8>) {
        loop {
            if let Some(used) = self.try_used() {
                return used;
            }
            let fd = &self.interrupt.queues[usize::from(self.index)];
            wait_readable(fd, "no used buffer");
            let _ = fd.read();
        }
    }

    /// Like [`wait_used`](Self::wait_used), and makes an equal buffer available again.
    pub(crate) fn receive(&mut self, length: u32) -> Vec<u8> {
        let (_, bytes) = self.wait_used();
        self.send(&[Part::In(length)]);
        bytes
    }

    /// Writes to guest memory.
    pub(crate) fn store(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    fn take_buffer(&mut self, length: u64) -> u64 {
        let length = length.next_multiple_of(16);
        if self.next_buffer + length > self.buffers.1 {
            self.next_buffer = self.buffers.0;
        }
        let address = self.next_buffer;
        self.next_buffer += length;
        assert!(self.next_buffer <= self.buffers.1, "a test buffer is too large");
        address
    }
}

/// A driver that activated a device.
pub(crate) struct Driver {
    /// The queues by index.
    pub(crate) queues: Vec<DriverQueue>,
    /// What the device signalled.
    pub(crate) interrupt: Arc<TestInterrupt>,
    /// Guest memory.
    pub(crate) memory: GuestMemory,
}

impl Driver {
    /// Negotiates everything offered and activates all queues.
    pub(crate) fn start(device: &mut dyn VirtioDevice) -> Self {
        let features = device.features();
        Self::start_with(device, features, guest_memory())
    }

    /// Activates all queues with `features`.
    pub(crate) fn start_with(
        device: &mut dyn VirtioDevice,
        features: u64,
        memory: GuestMemory,
    ) -> Self {
        let count = device.queue_sizes().len();
        let all: Vec<u16> = (0..count as u16).collect();
        Self::start_queues(device, features, memory, &all)
    }

    /// Activates the queues listed in `enabled` with `features`.
    pub(crate) fn start_queues(
        device: &mut dyn VirtioDevice,
        features: u64,
        memory: GuestMemory,
        enabled: &[u16],
    ) -> Self {
        let features = features | F_VERSION_1;
        let event_idx = features & RING_FEATURES & (1 << 29) != 0;
        let sizes = device.queue_sizes().to_vec();
        let interrupt = Arc::new(TestInterrupt::new(sizes.len()));
        let share = (MEMORY_SIZE as u64 - BUFFERS) / sizes.len() as u64 / 4096 * 4096;
        let mut active = Vec::new();
        let mut queues = Vec::new();
        for (index, size) in sizes.iter().copied().enumerate() {
            let base = 0x1_0000 + RING_STRIDE * index as u64;
            let (desc, avail, used) = (base, base + 0x8000, base + 0xa000);
            assert!(size <= 1024 && base + RING_STRIDE <= BUFFERS);
            for at in (base..base + RING_STRIDE).step_by(8) {
                memory.write_obj(0u64, GuestAddress(at)).unwrap();
            }
            let mut queue = Queue::new(size).unwrap();
            queue.try_set_size(size).unwrap();
            queue.try_set_desc_table_address(GuestAddress(desc)).unwrap();
            queue.try_set_avail_ring_address(GuestAddress(avail)).unwrap();
            queue.try_set_used_ring_address(GuestAddress(used)).unwrap();
            queue.set_event_idx(event_idx);
            queue.set_ready(true);
            let kick = EventFd::new(EFD_NONBLOCK).unwrap();
            let start = BUFFERS + share * index as u64;
            queues.push(DriverQueue {
                index: index as u16,
                size,
                memory: memory.clone(),
                interrupt: interrupt.clone(),
                kick: kick.try_clone().unwrap(),
                desc,
                avail,
                used,
                event_idx,
                next_avail: 0,
                kicked: 0,
                next_used: 0,
                next_desc: 0,
                next_buffer: start,
                buffers: (start, start + share),
                pending: HashMap::new(),
            });
            if enabled.contains(&(index as u16)) {
                active.push(ActiveQueue { index: index as u16, queue, kick });
            }
        }
        device
            .activate(Activation {
                memory: memory.clone(),
                features,
                queues: active,
                interrupt: interrupt.clone(),
            })
            .unwrap();
        Self { queues, interrupt, memory }
    }
}
