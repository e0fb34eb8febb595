//! The block device (VIRTIO 1.3 §5.2): configuration space, life cycle, and the worker that serves
//! the queue.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{
    image::{Image, SECTOR},
    pool::Pool,
    request::{ID_LENGTH, MAX_SEGMENT_SECTORS, MAX_SEGMENTS, Request},
};
use crate::{
    GuestMemory,
    virtio::{
        device::{ActivateError, Activation, DeviceType, RING_FEATURES, VirtioDevice},
        ring::Ring,
        worker::Worker,
    },
};

const QUEUE_SIZE: u16 = 256;
const QUEUE_SIZES: [u16; 1] = [QUEUE_SIZE];
/// Chains served before other events get their turn.
const BATCH: usize = 64;
/// The driver hears of requests together, unless they moved so many bytes: then it has work to do while the
/// next ones are served.
const NEWS: usize = 128 << 10;
/// Event data: the driver's notification.
const KICK: u32 = 0;
/// Event data: requests came back from the pool.
const DONE: u32 = 1;

/// `struct virtio_blk_config` (§5.2.4) up to the last field of our features.
const CONFIG_SIZE: usize = 60;
const WRITEBACK: usize = 32;

/// A disk.
pub(super) struct Disk {
    image: Arc<Image>,
    id: [u8; ID_LENGTH],
    /// The driver's choice with CONFIG_WCE; the write cache is on by default.
    writeback: Arc<AtomicBool>,
    worker: Option<Worker<DiskWorker>>,
}

impl Disk {
    /// A disk with a serial number, cut off at 20 bytes.
    pub(super) fn new(image: Image, serial: &str) -> Self {
        let mut id = [0; ID_LENGTH];
        for (byte, value) in id.iter_mut().zip(serial.bytes()) {
            *byte = value;
        }
        Self {
            image: Arc::new(image),
            id,
            writeback: Arc::new(AtomicBool::new(true)),
            worker: None,
        }
    }

    #[cfg(test)]
    pub(super) fn image(&self) -> Arc<Image> {
        self.image.clone()
    }

    fn config(&self) -> [u8; CONFIG_SIZE] {
        let image = &self.image;
        let block_size = image.block_size();
        let unit = image.allocation_size();
        let mut config = [0; CONFIG_SIZE];
        let mut put = |offset: usize, bytes: &[u8]| {
            config[offset..offset + bytes.len()].copy_from_slice(bytes);
        };
        put(0, &image.sectors().to_le_bytes());
        // A chain holds header, status and this many pieces.
        put(12, &u32::from(QUEUE_SIZE - 2).to_le_bytes());
        put(20, &block_size.to_le_bytes());
        // Topology: how many logical blocks make a unit that is written in one go.
        put(24, &[(unit / block_size).max(1).ilog2() as u8]);
        put(26, &u16::try_from(unit / block_size).unwrap_or(1).to_le_bytes());
        put(WRITEBACK, &[u8::from(self.writeback.load(Ordering::Relaxed))]);
        put(34, &1_u16.to_le_bytes());
        put(36, &MAX_SEGMENT_SECTORS.to_le_bytes());
        put(40, &(MAX_SEGMENTS as u32).to_le_bytes());
        put(44, &(unit / SECTOR as u32).to_le_bytes());
        put(48, &MAX_SEGMENT_SECTORS.to_le_bytes());
        put(52, &(MAX_SEGMENTS as u32).to_le_bytes());
        put(56, &[1]);
        config
    }
}

impl VirtioDevice for Disk {
    fn device_type(&self) -> DeviceType {
        DeviceType::BLOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        let bit = |bit: u32| 1_u64 << bit;
        let mut features = RING_FEATURES
            | bit(VIRTIO_BLK_F_SEG_MAX)
            | bit(VIRTIO_BLK_F_BLK_SIZE)
            | bit(VIRTIO_BLK_F_TOPOLOGY)
            | bit(VIRTIO_BLK_F_FLUSH)
            | bit(VIRTIO_BLK_F_CONFIG_WCE);
        if self.image.read_only() {
            features |= bit(VIRTIO_BLK_F_RO);
        } else {
            features |= bit(VIRTIO_BLK_F_WRITE_ZEROES);
        }
        if self.image.can_discard() {
            features |= bit(VIRTIO_BLK_F_DISCARD);
        }
        features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (byte, value) in data.iter_mut().zip(self.config().iter().skip(start)) {
            *byte = *value;
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (Ok(WRITEBACK), [value]) = (usize::try_from(offset), data) {
            self.writeback.store(*value != 0, Ordering::Relaxed);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, features, queues, interrupt } = activation;
        let Some(queue) = queues.into_iter().next() else {
            return Err(ActivateError::Driver("the request queue is not set up".to_owned()));
        };
        let event = || {
            EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
                .map_err(|error| ActivateError::Host("completed requests", error))
        };
        let done = event()?;
        let signal =
            done.try_clone().map_err(|error| ActivateError::Host("completed requests", error))?;
        let memory = Arc::new(memory);
        let worker = DiskWorker {
            ring: Ring::new("virtio-blk", queue, &memory, &interrupt),
            memory,
            image: self.image.clone(),
            id: self.id,
            // Without FLUSH the driver has no way to ask for it (§5.2.5.2).
            can_flush: features & 1 << VIRTIO_BLK_F_FLUSH != 0,
            writeback: self.writeback.clone(),
            pool: Pool::new(self.image.clone(), signal),
            done,
            completed: Vec::new(),
            free: Vec::new(),
            in_flight: 0,
            news: 0,
        };
        let worker = Worker::spawn("blk", worker)
            .map_err(|error| ActivateError::Host("the worker thread", error))?;
        self.worker = Some(worker);
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(worker) = self.worker.take() {
            // Dropping what it hands back waits for the pool.
            drop(worker.stop());
        }
        self.writeback.store(true, Ordering::Relaxed);
    }

    fn shutdown(&mut self) {
        match self.image.flush() {
            Ok(()) => tracing::debug!(
                disk = self.image.name(),
                flushes = self.image.flushes(),
                "all that was written is stable"
            ),
            Err(error) => self.image.report("the final flush", &error),
        }
    }
}

/// Serves the queue: what the page cache can answer at once, the rest through the pool.
struct DiskWorker {
    ring: Ring,
    memory: Arc<GuestMemory>,
    image: Arc<Image>,
    id: [u8; ID_LENGTH],
    can_flush: bool,
    writeback: Arc<AtomicBool>,
    pool: Pool,
    done: EventFd,
    /// Scratch list for requests that came back.
    completed: Vec<Request>,
    /// Requests to be used again.
    free: Vec<Request>,
    in_flight: usize,
    /// Bytes of completed requests that the driver may not have heard of.
    news: usize,
}

impl DiskWorker {
    fn serve(&mut self) {
        self.ring.disable_kicks();
        for _ in 0..BATCH {
            // A driver may offer the same chain again and again; more than a queue full of
            // requests waits for others to complete.
            if self.in_flight >= usize::from(QUEUE_SIZE) {
                self.notify();
                return;
            }
            let Some(chain) = self.ring.pop() else { break };
            let mut request = self.free.pop().unwrap_or_else(Request::new);
            let stable = !(self.can_flush && self.writeback.load(Ordering::Relaxed));
            if let Err(error) = request.parse(chain, &self.memory, &self.image, stable) {
                self.ring.fail(error);
                return;
            }
            if request.try_now(&self.image, &self.id) {
                self.complete(request);
                continue;
            }
            match self.pool.submit(request) {
                Ok(()) => self.in_flight += 1,
                Err(mut request) => {
                    request.execute(&self.image);
                    self.complete(request);
                }
            }
        }
        self.notify();
        if self.ring.enable_kicks() {
            self.ring.come_back();
        }
    }

    fn notify(&mut self) {
        self.news = 0;
        self.ring.notify_driver();
    }

    fn complete(&mut self, request: Request) {
        match request.finish(&self.memory) {
            Ok(()) => self.ring.push_used(request.head, request.written),
            Err(error) => self.ring.fail(error),
        }
        self.news += request.size;
        if self.news >= NEWS {
            self.notify();
        }
        self.free.push(request);
    }

    fn take_done(&mut self) {
        let was_full = self.in_flight >= usize::from(QUEUE_SIZE);
        let mut completed = std::mem::take(&mut self.completed);
        self.pool.take_done(&mut completed);
        self.in_flight = self.in_flight.saturating_sub(completed.len());
        for request in completed.drain(..) {
            self.complete(request);
        }
        self.completed = completed;
        if was_full {
            self.serve();
        } else {
            self.notify();
        }
    }
}

impl MutEventSubscriber for DiskWorker {
    fn process(&mut self, events: Events, _: &mut EventOps<'_>) {
        if events.data() == DONE {
            self.take_done();
        } else {
            self.ring.take_kick();
            self.serve();
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        self.ring.register(ops, KICK);
        if let Err(error) = ops.add(Events::with_data(&self.done, DONE, EventSet::IN)) {
            tracing::error!(%error, "completed disk requests cannot be watched");
        }
    }
}
