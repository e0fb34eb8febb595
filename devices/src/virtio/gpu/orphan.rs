//! Serves the queues of a GPU whose back end has died: every command is refused, so that no thread
//! of the guest waits for ever.
//!
//! The back end answered in the order of the queue, so what it left unanswered is what lies between
//! the used and the available index.

use std::{io, sync::Arc};

use event_manager::{EventOps, Events, MutEventSubscriber};
use gpu_protocol::virtio::{CtrlHdr, kind};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use zerocopy::{FromBytes, IntoBytes};

use crate::{
    GuestMemory,
    virtio::{
        device::{ActiveQueue, VirtioInterrupt},
        ring::Ring,
        worker::Worker,
    },
};

pub(super) struct Refuser {
    rings: Vec<Ring>,
}

impl Refuser {
    /// Takes over `queues` where the back end left them.
    pub(super) fn start(
        queues: &[ActiveQueue],
        memory: &Arc<GuestMemory>,
        interrupt: &Arc<dyn VirtioInterrupt>,
    ) -> io::Result<Worker<Self>> {
        let mut rings = Vec::new();
        for active in queues {
            let state = active.queue.state();
            let mut queue = Queue::try_from(state).map_err(io::Error::other)?;
            let used: u16 =
                memory.read_obj(GuestAddress(queue.used_ring() + 2)).map_err(io::Error::other)?;
            queue.set_next_avail(u16::from_le(used));
            queue.set_next_used(u16::from_le(used));
            let kick = active.kick.try_clone()?;
            let active = ActiveQueue { index: active.index, queue, kick };
            rings.push(Ring::new("virtio-gpu", active, memory, interrupt));
        }
        Worker::spawn("gpu-orphan", Self { rings })
    }
}

fn serve(ring: &mut Ring) {
    let memory = ring.memory();
    loop {
        ring.disable_kicks();
        while let Some(chain) = ring.pop() {
            let mut header = [0; size_of::<CtrlHdr>()];
            let head = chain.head_index();
            let Some(mut reader) = ring.reader(&chain, &memory) else { return };
            let whole = io::Read::read_exact(&mut reader, &mut header).is_ok();
            let header = CtrlHdr::read_from_bytes(&header).unwrap_or_default();
            let header = if whole { header } else { CtrlHdr::default() };
            let Some(mut writer) = ring.writer(&chain, &memory) else { return };
            let answer = header.answer(kind::ERR_UNSPEC);
            let room = writer.available_bytes().min(size_of::<CtrlHdr>());
            let written = match io::Write::write_all(&mut writer, &answer.as_bytes()[..room]) {
                Ok(()) => room as u32,
                Err(_) => 0,
            };
            ring.push_used(head, written);
        }
        ring.notify_driver();
        if !ring.enable_kicks() {
            return;
        }
    }
}

impl MutEventSubscriber for Refuser {
    fn process(&mut self, events: Events, _: &mut EventOps<'_>) {
        if let Some(ring) = self.rings.get_mut(events.data() as usize) {
            ring.take_kick();
            serve(ring);
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        for (number, ring) in self.rings.iter_mut().enumerate() {
            ring.register(ops, number as u32);
            serve(ring);
        }
    }
}
