//! One virtqueue in service (VIRTIO 1.3 §2.7): what every device worker does with its rings,
//! so that the workers speak about buffers and not about notification suppression.

use std::{
    fmt::Display,
    num::Wrapping,
    sync::{
        Arc,
        atomic::{Ordering, fence},
    },
};

use event_manager::{EventOps, EventSet, Events};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT, Reader, Writer};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};
use vmm_sys_util::eventfd::EventFd;

use super::device::{ActiveQueue, VirtioInterrupt};
use crate::GuestMemory;

/// A chain of descriptors that the driver made available.
pub(crate) type Chain = DescriptorChain<Arc<GuestMemory>>;

/// `VIRTQ_AVAIL_F_NO_INTERRUPT` (§2.7.6).
const AVAIL_NO_INTERRUPT: u16 = 1;
/// `VIRTQ_DESC_F_NEXT` and `VIRTQ_DESC_F_INDIRECT` (§2.7.5).
const DESCRIPTOR_NEXT: u16 = 1;
const DESCRIPTOR_INDIRECT: u16 = 4;

/// A queue together with what serving it takes.
pub(crate) struct Ring {
    /// For log lines: which device this queue belongs to.
    device: &'static str,
    index: u16,
    queue: Queue,
    kick: EventFd,
    memory: Arc<GuestMemory>,
    interrupt: Arc<dyn VirtioInterrupt>,
    /// The used index at the last look at whether the driver wants an interrupt.
    notified: Wrapping<u16>,
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
        let notified = Wrapping(queue.next_used());
        Self { device, index, queue, kick, memory, interrupt, notified, kicks: true, failed: false }
    }

    /// The queue's index in its device.
    pub(crate) fn index(&self) -> u16 {
        self.index
    }

    /// Entries of the queue.
    pub(crate) fn size(&self) -> u16 {
        self.queue.size()
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

    /// How many entries of the queue the chain at `head` takes up: a table of its own takes one.
    pub(crate) fn entries(&self, head: u16) -> u16 {
        let (mut index, mut count) = (head, 0);
        while count < self.size() && index < self.size() {
            count += 1;
            let at = self.queue.desc_table() + 16 * u64::from(index);
            let word = |offset| self.memory.read_obj::<u16>(GuestAddress(at + offset));
            let (Ok(flags), Ok(next)) = (word(12), word(14)) else { break };
            if u16::from_le(flags) & (DESCRIPTOR_NEXT | DESCRIPTOR_INDIRECT) != DESCRIPTOR_NEXT {
                break;
            }
            index = u16::from_le(next);
        }
        count
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
        self.push_used_together([(head, written)]);
    }

    /// Gives several chains back at once: the driver sees all of them or none.
    pub(crate) fn push_used_together(&mut self, chains: impl IntoIterator<Item = (u16, u32)>) {
        if self.failed {
            return;
        }
        if let Err(error) = self.try_push_used(chains) {
            self.fail(error);
        }
    }

    /// §2.7.8: the elements first, then the index that makes them visible.
    fn try_push_used(
        &mut self,
        chains: impl IntoIterator<Item = (u16, u32)>,
    ) -> Result<(), GuestMemoryError> {
        let ring = self.queue.used_ring();
        let mut next = Wrapping(self.queue.next_used());
        for (head, written) in chains {
            let slot = ring + 4 + 8 * u64::from(next.0 % self.queue.size());
            let element = u64::from(head) | u64::from(written) << 32;
            self.memory.write_obj(element.to_le(), GuestAddress(slot))?;
            next += 1;
        }
        self.queue.set_next_used(next.0);
        self.memory.store(next.0.to_le(), GuestAddress(ring + 2), Ordering::Release)
    }

    /// Interrupts the driver about used buffers if it wants to know.
    pub(crate) fn notify_driver(&mut self) {
        if self.failed {
            return;
        }
        match self.needs_notification() {
            Ok(true) => self.interrupt.signal_used(self.index),
            Ok(false) => {}
            Err(error) => self.fail(error),
        }
    }

    /// §2.7.7: whether the driver wants to hear of what was used since the last call.
    fn needs_notification(&mut self) -> Result<bool, GuestMemoryError> {
        let new = Wrapping(self.queue.next_used());
        let old = std::mem::replace(&mut self.notified, new);
        if new == old {
            return Ok(false);
        }
        // The driver writes what it wants, then looks for used buffers; this side the other way around.
        fence(Ordering::SeqCst);
        let ring = self.queue.avail_ring();
        if self.queue.event_idx_enabled() {
            let event = ring + 4 + 2 * u64::from(self.queue.size());
            let event: u16 = self.memory.load(GuestAddress(event), Ordering::Relaxed)?;
            Ok(new - Wrapping(u16::from_le(event)) - Wrapping(1) < new - old)
        } else {
            let flags: u16 = self.memory.load(GuestAddress(ring), Ordering::Relaxed)?;
            Ok(u16::from_le(flags) & AVAIL_NO_INTERRUPT == 0)
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

#[cfg(test)]
mod model;

#[cfg(test)]
mod tests {
    use virtio_queue::QueueT;

    use super::*;
    use crate::virtio::testing::{TestInterrupt, guest_memory};

    const AVAIL: u64 = 0x2000;
    const USED: u64 = 0x3000;

    fn ring(event_idx: bool) -> (Ring, Arc<GuestMemory>, Arc<TestInterrupt>) {
        let memory = Arc::new(guest_memory());
        let mut queue = Queue::new(8).unwrap();
        queue.try_set_desc_table_address(GuestAddress(0x1000)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(AVAIL)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(USED)).unwrap();
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        let kick = EventFd::new(0).unwrap();
        let interrupt = Arc::new(TestInterrupt::new(1));
        let shared: Arc<dyn VirtioInterrupt> = interrupt.clone();
        let ring = Ring::new("test", ActiveQueue { index: 0, queue, kick }, &memory, &shared);
        (ring, memory, interrupt)
    }

    #[test]
    fn chains_used_together_become_visible_at_once() {
        let (mut ring, memory, _) = ring(true);
        let index = || memory.read_obj::<u16>(GuestAddress(USED + 2)).unwrap();
        for round in 0..3 {
            ring.push_used_together((0..6).map(|chain| {
                assert_eq!(index(), 6 * round, "before all of them are there");
                (chain, 100 + u32::from(chain))
            }));
            assert_eq!(index(), 6 * (round + 1));
            for chain in 0..6 {
                let slot = USED + 4 + 8 * ((6 * u64::from(round) + chain) % 8);
                let element: [u32; 2] =
                    [0, 4].map(|at| memory.read_obj(GuestAddress(slot + at)).unwrap());
                assert_eq!(element, [chain as u32, 100 + chain as u32]);
            }
        }
    }

    #[test]
    fn a_chain_takes_up_entries_of_the_queue() {
        let (ring, memory, _) = ring(true);
        let describe = |index: u64, flags: u16, next: u16| {
            memory.write_obj([flags, next], GuestAddress(0x1000 + 16 * index + 12)).unwrap();
        };
        describe(1, DESCRIPTOR_NEXT, 7);
        describe(7, DESCRIPTOR_NEXT, 3);
        describe(3, 0, 1);
        describe(4, DESCRIPTOR_INDIRECT, 1);
        assert_eq!([1, 7, 3, 4, 8].map(|head| ring.entries(head)), [3, 2, 1, 1, 0]);
        describe(3, DESCRIPTOR_NEXT, 1);
        assert_eq!(ring.entries(1), 8, "without end");
        describe(7, DESCRIPTOR_NEXT, 8);
        assert_eq!(ring.entries(1), 2, "out of range");
    }

    #[test]
    fn the_driver_is_interrupted_when_it_wants_to_be() {
        let (mut with_event, memory, interrupt) = ring(true);
        let event = |event: u16| {
            memory.write_obj(event, GuestAddress(AVAIL + 4 + 2 * 8)).unwrap();
        };
        let mut next = 0_u16;
        let mut push = |ring: &mut Ring, count: u16| {
            ring.push_used_together((0..count).map(|chain| (chain, 0)));
            ring.notify_driver();
            next = next.wrapping_add(count);
            next
        };
        event(0);
        push(&mut with_event, 1);
        assert_eq!(interrupt.take_used(0), 1);
        push(&mut with_event, 3);
        assert_eq!(interrupt.take_used(0), 0, "it has not asked again");
        with_event.notify_driver();
        event(5);
        push(&mut with_event, 1);
        assert_eq!(interrupt.take_used(0), 0, "one short of it");
        push(&mut with_event, 4);
        assert_eq!(interrupt.take_used(0), 1, "in the middle of some");
        event(8);
        with_event.notify_driver();
        assert_eq!(interrupt.take_used(0), 0, "nothing was used since");
        // Across the end of the 16 bits.
        while push(&mut with_event, 8) < u16::MAX - 8 {}
        event(u16::MAX);
        interrupt.take_used(0);
        push(&mut with_event, 8);
        assert_eq!(interrupt.take_used(0), 1);

        let (mut without, memory, interrupt) = ring(false);
        push(&mut without, 1);
        assert_eq!(interrupt.take_used(0), 1);
        memory.write_obj(AVAIL_NO_INTERRUPT, GuestAddress(AVAIL)).unwrap();
        push(&mut without, 1);
        assert_eq!(interrupt.take_used(0), 0, "it said that it does not want any");
    }
}
