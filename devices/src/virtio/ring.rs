//! One virtqueue in service (VIRTIO 1.3 §2.7): what every device worker does with its rings,
//! so that the workers speak about buffers and not about notification suppression.

use std::{fmt::Display, sync::Arc};

use event_manager::{EventOps, EventSet, Events};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT, Reader, Writer};
use vmm_sys_util::eventfd::EventFd;

use super::device::{ActiveQueue, VirtioInterrupt};
use crate::GuestMemory;

/// A chain of descriptors that the driver made available.
pub(crate) type Chain = DescriptorChain<Arc<GuestMemory>>;

/// A queue together with what serving it takes.
pub(crate) struct Ring {
    /// For log lines: which device this queue belongs to.
    device: &'static str,
    index: u16,
    queue: Queue,
    kick: EventFd,
    memory: Arc<GuestMemory>,
    interrupt: Arc<dyn VirtioInterrupt>,
    /// The driver is to notify.
    kicks: bool,
    failed: bool,
}

impl Ring {
    /// Takes `active` into service.
    pub(crate) fn new(
        device: &'static str,
        active: ActiveQueue,
        memory: &Arc<GuestMemory>,
        interrupt: &Arc<dyn VirtioInterrupt>,
    ) -> Self {
        let ActiveQueue { index, queue, kick } = active;
        let (memory, interrupt) = (memory.clone(), interrupt.clone());
        Self { device, index, queue, kick, memory, interrupt, kicks: true, failed: false }
    }

    /// The queue's index in its device.
    pub(crate) fn index(&self) -> u16 {
        self.index
    }

    /// Guest memory; a separate handle, so that readers and writers made from it do not borrow
    /// the ring.
    pub(crate) fn memory(&self) -> Arc<GuestMemory> {
        self.memory.clone()
    }

    /// Registers the driver's notifications, delivered with `data`.
    pub(crate) fn register(&self, ops: &mut EventOps<'_>, data: u32) {
        if let Err(error) = ops.add(Events::with_data(&self.kick, data, EventSet::IN)) {
            tracing::error!(device = self.device, %error, "a queue cannot be watched");
        }
    }

    /// Position in the available ring of the next chain.
    pub(crate) fn next_avail(&self) -> u16 {
        self.queue.next_avail()
    }

    /// Takes the driver's notification after its event arrived.
    pub(crate) fn take_kick(&self) {
        // The event says that it is readable, and nobody else reads it.
        let _ = self.kick.read();
    }

    /// Makes the notification arrive again: for a worker that leaves some of the queue for later,
    /// so that a driver which never pauses cannot keep it from being stopped.
    pub(crate) fn come_back(&self) {
        let _ = self.kick.write(1);
    }

    /// The next available chain. `None` if there is none, or after a violation. From then on the
    /// driver need not notify until [`enable_kicks`](Self::enable_kicks).
    pub(crate) fn pop(&mut self) -> Option<Chain> {
        if self.failed {
            return None;
        }
        let chain = match self.queue.iter(self.memory.clone()) {
            Ok(mut chains) => chains.next()?,
            Err(error) => {
                self.fail(error);
                return None;
            }
        };
        if chain.head_index() >= self.queue.size() {
            self.fail(format_args!("descriptor {} is out of range", chain.head_index()));
            return None;
        }
        self.disable_kicks();
        Some(chain)
    }

    /// Makes the chain that [`pop`](Self::pop) returned last available again. No notification comes
    /// for it: whoever waits for further buffers calls [`enable_kicks`](Self::enable_kicks) before.
    pub(crate) fn put_back(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// The device-readable bytes of a chain. A chain that leaves guest memory is a violation.
    pub(crate) fn reader<'m>(
        &mut self,
        chain: &Chain,
        memory: &'m GuestMemory,
    ) -> Option<Reader<'m>> {
        match chain.clone().reader(memory) {
            Ok(reader) => Some(reader),
            Err(error) => {
                self.fail(error);
                None
            }
        }
    }

    /// The device-writable bytes of a chain. A chain that leaves guest memory is a violation.
    pub(crate) fn writer<'m>(
        &mut self,
        chain: &Chain,
        memory: &'m GuestMemory,
    ) -> Option<Writer<'m>> {
        match chain.clone().writer(memory) {
            Ok(writer) => Some(writer),
            Err(error) => {
                self.fail(error);
                None
            }
        }
    }

    /// Gives a chain back to the driver; `written` bytes of it were filled.
    pub(crate) fn push_used(&mut self, head: u16, written: u32) {
        if self.failed {
            return;
        }
        if let Err(error) = self.queue.add_used(&*self.memory, head, written) {
            self.fail(error);
        }
    }

    /// Interrupts the driver about used buffers if it wants to know.
    pub(crate) fn notify_driver(&mut self) {
        if self.failed {
            return;
        }
        match self.queue.needs_notification(&*self.memory) {
            Ok(true) => self.interrupt.signal_used(self.index),
            Ok(false) => {}
            Err(error) => self.fail(error),
        }
    }

    /// Asks the driver for no notifications, as long as the worker looks at the queue anyway.
    pub(crate) fn disable_kicks(&mut self) {
        if self.failed || !std::mem::take(&mut self.kicks) {
            return;
        }
        if self.queue.disable_notification(&*self.memory).is_err() {
            self.fail("the used ring is not in guest memory");
        }
    }

    /// Asks the driver for a notification with its next buffer. `true` means that there is one
    /// already, and the caller must go on.
    pub(crate) fn enable_kicks(&mut self) -> bool {
        if self.failed {
            return false;
        }
        self.kicks = true;
        match self.queue.enable_notification(&*self.memory) {
            Ok(more) => more,
            Err(error) => {
                self.fail(error);
                false
            }
        }
    }

    /// The driver broke the rules: logs it once, asks for a reset, and serves the queue no more.
    pub(crate) fn fail(&mut self, reason: impl Display) {
        if !self.failed {
            self.failed = true;
            tracing::warn!(
                device = self.device,
                queue = self.index,
                %reason,
                "the driver violated the queue's rules; the device needs a reset"
            );
            self.interrupt.set_needs_reset();
        }
    }
}
