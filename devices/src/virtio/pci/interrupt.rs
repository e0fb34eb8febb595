//! Raising interrupts (VIRTIO 1.3 §4.1.5.3 and §4.1.5.4) from any thread, without locks: the
//! transport may hold its own while it waits for that very thread.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU64, Ordering},
    },
};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::{services::MsiVector, virtio::device::VirtioInterrupt};

/// `VIRTIO_MSI_NO_VECTOR`: this event raises no interrupt.
pub const NO_VECTOR: u16 = 0xffff;

const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// The interrupt state of one function.
pub struct Interrupts {
    vectors: Vec<Arc<dyn MsiVector>>,
    msix_enabled: AtomicBool,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
    isr: AtomicU8,
    needs_reset: AtomicBool,
    /// Counts resets, so that a handle from before the last one is without effect.
    epoch: AtomicU64,
}

impl Interrupts {
    pub(super) fn new(vectors: Vec<Arc<dyn MsiVector>>, queues: usize) -> Self {
        Self {
            vectors,
            msix_enabled: AtomicBool::new(false),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            isr: AtomicU8::new(0),
            needs_reset: AtomicBool::new(false),
            epoch: AtomicU64::new(0),
        }
    }

    pub(super) fn handle(self: &Arc<Self>) -> Arc<dyn VirtioInterrupt> {
        Arc::new(Handle { shared: self.clone(), epoch: self.epoch.load(Ordering::Acquire) })
    }

    pub(super) fn set_msix_enabled(&self, enabled: bool) {
        self.msix_enabled.store(enabled, Ordering::Release);
    }

    pub(super) fn config_vector(&self) -> u16 {
        self.config_vector.load(Ordering::Acquire)
    }

    /// §4.1.5.1.2: a vector that does not exist reads back as "no vector".
    pub(super) fn set_config_vector(&self, vector: u16) {
        self.config_vector.store(self.existing(vector), Ordering::Release);
    }

    pub(super) fn queue_vector(&self, queue: usize) -> u16 {
        self.queue_vectors.get(queue).map_or(NO_VECTOR, |vector| vector.load(Ordering::Acquire))
    }

    pub(super) fn set_queue_vector(&self, queue: usize, vector: u16) {
        if let Some(entry) = self.queue_vectors.get(queue) {
            entry.store(self.existing(vector), Ordering::Release);
        }
    }

    fn existing(&self, vector: u16) -> u16 {
        if usize::from(vector) < self.vectors.len() { vector } else { NO_VECTOR }
    }

    pub(super) fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::AcqRel)
    }

    pub(super) fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    pub(super) fn set_needs_reset(&self) {
        self.needs_reset.store(true, Ordering::Release);
        self.raise(self.config_vector(), ISR_CONFIG);
    }

    /// Back to the state after power on, except for what belongs to PCI (MSI-X).
    pub(super) fn reset(&self) {
        self.epoch.fetch_add(1, Ordering::AcqRel);
        self.needs_reset.store(false, Ordering::Release);
        self.isr.store(0, Ordering::Release);
        self.config_vector.store(NO_VECTOR, Ordering::Release);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::Release);
        }
    }

    fn raise(&self, vector: u16, isr: u8) {
        if self.msix_enabled.load(Ordering::Acquire) {
            if let Some(vector) = self.vectors.get(usize::from(vector))
                && let Err(error) = vector.eventfd().write(1)
                && error.kind() != io::ErrorKind::WouldBlock
            {
                tracing::error!(%error, "an interrupt could not be raised");
            }
        } else {
            // There is no interrupt line; a driver without MSI-X polls this register.
            self.isr.fetch_or(isr, Ordering::AcqRel);
        }
    }
}

/// What a device holds from activation to reset.
struct Handle {
    shared: Arc<Interrupts>,
    epoch: u64,
}

impl Handle {
    fn current(&self) -> Option<&Interrupts> {
        (self.shared.epoch.load(Ordering::Acquire) == self.epoch).then_some(&self.shared)
    }
}

impl VirtioInterrupt for Handle {
    fn signal_used(&self, queue: u16) {
        if let Some(shared) = self.current() {
            shared.raise(shared.queue_vector(queue.into()), ISR_QUEUE);
        }
    }

    fn signal_config_change(&self) {
        if let Some(shared) = self.current() {
            shared.raise(shared.config_vector(), ISR_CONFIG);
        }
    }

    fn set_needs_reset(&self) {
        if let Some(shared) = self.current() {
            shared.set_needs_reset();
        }
    }

    fn queue_eventfd(&self, queue: u16) -> io::Result<EventFd> {
        let vector = self.current().map_or(NO_VECTOR, |shared| shared.queue_vector(queue.into()));
        match self.shared.vectors.get(usize::from(vector)) {
            Some(vector) => vector.eventfd().try_clone(),
            // The driver polls this queue: the back end may signal, nobody listens.
            None => EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC),
        }
    }
}
