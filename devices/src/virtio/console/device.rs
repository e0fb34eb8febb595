//! Configuration space and life cycle of the console.

use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::{
    port::Port,
    protocol::ConsoleSize,
    socket::SocketServer,
    worker::{CONTROL_RX, ConsoleWorker},
};
use crate::virtio::{
    ActivateError, Activation, DeviceType, RING_FEATURES, VirtioDevice, ring::Ring, worker::Worker,
};

/// VIRTIO_CONSOLE_F_SIZE: configuration space has the size of the console.
pub(super) const F_SIZE: u64 = 1 << 0;
/// VIRTIO_CONSOLE_F_MULTIPORT: there are ports and control queues.
pub(super) const F_MULTIPORT: u64 = 1 << 1;
/// VIRTIO_CONSOLE_F_EMERG_WRITE: a byte can be written without any queue.
pub(super) const F_EMERG_WRITE: u64 = 1 << 2;

const DATA_QUEUE: u16 = 64;
const CONTROL_QUEUE: u16 = 32;
/// Offset of `emerg_wr` in configuration space.
const EMERG_WRITE_OFFSET: u64 = 8;

/// The device.
pub(super) struct Console {
    ports: Arc<[Arc<Port>]>,
    queue_sizes: Vec<u16>,
    wake: Arc<EventFd>,
    size: Arc<Mutex<Option<ConsoleSize>>>,
    offer_size: bool,
    worker: Option<Worker<ConsoleWorker>>,
    /// Ports that are served on sockets; they live as long as the device.
    _sockets: Vec<SocketServer>,
}

impl Console {
    pub(super) fn new(
        ports: Arc<[Arc<Port>]>,
        wake: Arc<EventFd>,
        size: Arc<Mutex<Option<ConsoleSize>>>,
        sockets: Vec<SocketServer>,
    ) -> Self {
        let mut queue_sizes = vec![DATA_QUEUE; 2 * ports.len() + 2];
        let control = usize::from(CONTROL_RX);
        queue_sizes[control..control + 2].fill(CONTROL_QUEUE);
        let offer_size = size.lock().unwrap_or_else(PoisonError::into_inner).is_some();
        Self { ports, queue_sizes, wake, size, offer_size, worker: None, _sockets: sockets }
    }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> DeviceType {
        DeviceType::CONSOLE
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        let size = if self.offer_size { F_SIZE } else { 0 };
        RING_FEATURES | F_MULTIPORT | F_EMERG_WRITE | size
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let size = *self.size.lock().unwrap_or_else(PoisonError::into_inner);
        let mut space = [0; 12];
        if let Some(size) = size.filter(|_| self.offer_size) {
            space[..4].copy_from_slice(&size.encode());
        }
        space[4..8].copy_from_slice(&(self.ports.len() as u32).to_le_bytes());
        let rest = usize::try_from(offset).ok().and_then(|offset| space.get(offset..));
        for (to, from) in data.iter_mut().zip(rest.unwrap_or_default()) {
            *to = *from;
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (EMERG_WRITE_OFFSET, [byte, ..], Some(console)) = (offset, data, self.ports.first())
        {
            console.deliver(&[*byte]);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, features, queues, interrupt } = activation;
        let memory = Arc::new(memory);
        let mut rings: Vec<Option<Ring>> = Vec::new();
        rings.resize_with(self.queue_sizes.len(), || None);
        for active in queues {
            let index = usize::from(active.index);
            if let Some(slot) = rings.get_mut(index) {
                *slot = Some(Ring::new("console", active, &memory, &interrupt));
            }
        }
        let multiport = features & F_MULTIPORT != 0;
        let (size, wake) = (self.size.clone(), self.wake.clone());
        let worker = ConsoleWorker::new(&self.ports, rings, multiport, size, wake);
        let worker = Worker::spawn("vio-console", worker)
            .map_err(|error| ActivateError::Host("the console's worker thread", error))?;
        self.worker = Some(worker);
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(worker) = self.worker.take() {
            worker.stop();
        }
        for port in self.ports.iter() {
            port.set_guest_open(false);
        }
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.reset();
    }
}
