//! Serves the queues of a GPU that has no back end: every command is refused, so that no thread of
//! the guest waits for ever.
//!
//! What the last back end left unanswered is in the tables that it kept for a successor. One without
//! such tables answered in the order of the queue; then it is what lies between the used and the
//! available index.

use std::{io, sync::Arc};

use event_manager::{EventOps, Events, MutEventSubscriber};
use gpu_protocol::{
    chain::{self, Buffer, Violation},
    virtio::{CtrlHdr, kind},
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use zerocopy::{FromBytes, IntoBytes};

use super::vhost_user::{Inflight, used_index};
use crate::{
    GuestMemory,
    virtio::{
        device::{ActiveQueue, VirtioInterrupt},
        ring::Ring,
        worker::Worker,
    },
};

/// Chains served before the worker looks whether it has to end.
const BURST: u32 = 256;

/// A queue, and where to find chains by their head.
struct Queued {
    ring: Ring,
    table: u64,
    size: u16,
    /// Taken by the back end that is gone.
    left: Vec<u16>,
}

pub(super) struct Refuser {
    queues: Vec<Queued>,
}

impl Refuser {
    /// Takes over `queues` where the back end left them.
    pub(super) fn start(
        queues: &[ActiveQueue],
        memory: &Arc<GuestMemory>,
        interrupt: &Arc<dyn VirtioInterrupt>,
        inflight: Option<&Inflight>,
    ) -> io::Result<Worker<Self>> {
        let mut queued = Vec::new();
        for active in queues {
            let index = active.index;
            let mut queue = Queue::try_from(active.queue.state()).map_err(io::Error::other)?;
            let (table, size) = (queue.desc_table(), queue.size());
            let used = used_index(memory, &queue).map_err(io::Error::other)?;
            let left = inflight.and_then(|tables| tables.chains(index, size, used));
            let left = left.unwrap_or_default();
            queue.set_next_avail(used.wrapping_add(left.len() as u16));
            queue.set_next_used(used);
            let active = ActiveQueue { index, queue, kick: active.kick.try_clone()? };
            let ring = Ring::new("virtio-gpu", active, memory, interrupt);
            queued.push(Queued { ring, table, size, left });
        }
        Worker::spawn("gpu-orphan", Self { queues: queued })
    }
}

impl Queued {
    fn serve(&mut self) {
        let memory = self.ring.memory();
        for head in std::mem::take(&mut self.left) {
            self.refuse(head, &memory);
        }
        self.ring.disable_kicks();
        for _ in 0..BURST {
            let Some(chain) = self.ring.pop() else { break };
            self.refuse(chain.head_index(), &memory);
        }
        self.ring.notify_driver();
        if self.ring.enable_kicks() {
            self.ring.come_back();
        }
    }

    fn refuse(&mut self, head: u16, memory: &GuestMemory) {
        let buffers = chain::walk(self.table, self.size, head, |at| {
            let mut descriptor = [0; 16];
            memory.read_slice(&mut descriptor, GuestAddress(at)).ok().map(|()| descriptor)
        });
        match buffers.and_then(|buffers| answer(&buffers, memory)) {
            Ok(written) => self.ring.push_used(head, written),
            Err(violation) => self.ring.fail(violation),
        }
    }
}

/// Writes the refusal as far as there is room for it; returns the number of bytes.
fn answer(buffers: &[Buffer], memory: &GuestMemory) -> Result<u32, Violation> {
    let mut command = Vec::new();
    for buffer in buffers.iter().filter(|buffer| !buffer.writable) {
        let old = command.len();
        let missing = size_of::<CtrlHdr>() - old;
        command.resize(old + missing.min(buffer.length as usize), 0);
        memory
            .read_slice(&mut command[old..], GuestAddress(buffer.address))
            .map_err(|_| Violation::Buffer)?;
    }
    // A command without a whole header gets an answer to none.
    let header = CtrlHdr::read_from_bytes(&command).unwrap_or_default();
    let answer = header.answer(kind::ERR_UNSPEC);
    let mut rest = answer.as_bytes();
    for buffer in buffers.iter().filter(|buffer| buffer.writable) {
        let (now, later) = rest.split_at(rest.len().min(buffer.length as usize));
        memory.write_slice(now, GuestAddress(buffer.address)).map_err(|_| Violation::Buffer)?;
        rest = later;
    }
    Ok((size_of::<CtrlHdr>() - rest.len()) as u32)
}

impl MutEventSubscriber for Refuser {
    fn process(&mut self, events: Events, _: &mut EventOps<'_>) {
        if let Some(queue) = self.queues.get_mut(events.data() as usize) {
            queue.ring.take_kick();
            queue.serve();
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        for (number, queue) in self.queues.iter_mut().enumerate() {
            queue.ring.register(ops, number as u32);
            queue.serve();
        }
    }
}
