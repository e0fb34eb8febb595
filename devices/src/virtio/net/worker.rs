//! The receive and the transmit queue of the card.

use std::{
    os::fd::{AsRawFd, RawFd},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vm_memory::Permissions;

use super::{
    HEADER, MAX_FRAME, MIN_FRAME,
    backend::{Backend, Link, Packet, Received, Sent},
    buffers::{Buffers, Placed},
    control::Switch,
};
use crate::virtio::{
    pieces::{ONE_CALL, Pieces},
    ring::{Chain, Ring},
};

// Event data.
const RECEIVE: u32 = 0;
const TRANSMIT: u32 = 1;
const BACKEND: u32 = 2;
const LINK: u32 = 3;
const SWITCH: u32 = 4;

/// Packets per turn, so that neither direction starves the other.
const BURST: usize = 64;
/// Times that others go first in a turn: each may cost a time slice, in which nothing is received either.
const MOST_YIELDS: usize = 4;
/// Bytes after which the driver hears of packets within a turn.
const NEWS: usize = 64 << 10;

/// Packets that were lost.
#[derive(Debug, Default)]
pub(super) struct Counters {
    /// Larger than the driver's buffers.
    pub(super) receive_dropped: AtomicU64,
    /// Shorter than an Ethernet header.
    pub(super) transmit_dropped: AtomicU64,
}

/// What receiving waits for, other than packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Waiting {
    Nothing,
    /// The other queues had to have their turn; there is more than the backend's descriptor tells of.
    Turn,
    /// The driver has no buffers; packets stay where they are.
    Buffers,
    /// A packet has come that needs more buffers than there are.
    Placing(Packet),
}

/// The subscriber of the worker thread.
pub(super) struct NetWorker {
    backend: Backend,
    receive: Option<Ring>,
    transmit: Option<Ring>,
    /// For packets to come.
    buffers: Buffers,
    link: Arc<Link>,
    /// Whether the driver uses this pair of queues.
    switch: Option<Arc<Switch>>,
    counters: Arc<Counters>,
    waiting: Waiting,
    /// What the driver's buffers had no room for.
    spill: Box<[u8]>,
    /// The packet that is being sent.
    outgoing: Pieces,
    /// The transmit queue waits for the backend.
    blocked: bool,
    /// What is registered for the backend.
    watched: Option<(RawFd, EventSet)>,
}

impl NetWorker {
    pub(super) fn new(
        backend: Backend,
        receive: Option<Ring>,
        transmit: Option<Ring>,
        mergeable: bool,
        link: Arc<Link>,
        switch: Option<Arc<Switch>>,
        counters: Arc<Counters>,
    ) -> Self {
        Self {
            backend,
            receive,
            transmit,
            buffers: Buffers::new(mergeable),
            link,
            switch,
            counters,
            waiting: Waiting::Nothing,
            spill: vec![0; HEADER + MAX_FRAME].into(),
            outgoing: Pieces::new(ONE_CALL),
            blocked: false,
            watched: None,
        }
    }

    /// The backend, for the next activation.
    pub(super) fn into_backend(self) -> Backend {
        self.backend
    }

    /// Moves packets from the backend to the driver. Returns `false` if the peer is gone.
    fn receive(&mut self) -> bool {
        let Some(ring) = &mut self.receive else { return true };
        let (mut open, mut news) = (true, 0);
        for _ in 0..BURST {
            let packet = match self.waiting {
                Waiting::Placing(packet) => packet,
                Waiting::Nothing | Waiting::Turn | Waiting::Buffers => {
                    if !self.buffers.prepare(ring) {
                        self.waiting = Waiting::Buffers;
                        break;
                    }
                    self.waiting = Waiting::Nothing;
                    match self.backend.receive(self.buffers.pieces(), &mut self.spill) {
                        Received::Packet(packet) => packet,
                        Received::Empty => break,
                        Received::Closed => {
                            open = false;
                            break;
                        }
                    }
                }
            };
            self.waiting = Waiting::Nothing;
            match self.buffers.place(ring, packet, &self.spill) {
                Placed::Done => {}
                Placed::TooLarge => {
                    count(&self.counters.receive_dropped, "larger than the guest's buffers");
                }
                Placed::NoBuffers => {
                    self.waiting = Waiting::Placing(packet);
                    break;
                }
            }
            tell(ring, &mut news, packet.length);
        }
        ring.notify_driver();
        self.see_to_the_rest();
        open
    }

    /// Comes back for packets that have left the backend's descriptor already.
    fn see_to_the_rest(&mut self) {
        if let (Waiting::Nothing, Some(ring)) = (self.waiting, &self.receive)
            && self.backend.has_received()
        {
            self.waiting = Waiting::Turn;
            ring.come_back();
        }
    }

    /// Whether there is room for packets, as far as is known.
    fn can_receive(&self) -> bool {
        matches!(self.waiting, Waiting::Nothing | Waiting::Turn)
    }

    /// Moves packets from the driver to the backend.
    fn transmit(&mut self) {
        let Some(ring) = &mut self.transmit else { return };
        self.blocked = false;
        let mut news = 0;
        let (mut moved, mut yields) = (false, 0);
        ring.disable_kicks();
        'turn: {
            for _ in 0..BURST {
                let Some(chain) = ring.pop() else {
                    if std::mem::take(&mut moved) && yields < MOST_YIELDS {
                        yields += 1;
                        // Whoever wants this processor goes first, a driver that is about to send more or a
                        // passt among them: what comes meanwhile costs the guest no kick.
                        ring.notify_driver();
                        thread::yield_now();
                        continue;
                    }
                    if ring.enable_kicks() {
                        continue;
                    }
                    break 'turn;
                };
                let Some(length) = gather(ring, &chain, &mut self.outgoing) else { break 'turn };
                if length < HEADER + MIN_FRAME {
                    count(&self.counters.transmit_dropped, "shorter than an Ethernet header");
                } else if self.backend.transmit(&mut self.outgoing) == Sent::Full {
                    ring.put_back();
                    self.blocked = true;
                    break 'turn;
                }
                ring.push_used(chain.head_index(), 0);
                tell(ring, &mut news, length);
                moved = true;
            }
            ring.come_back();
        }
        ring.notify_driver();
    }

    /// Watches the backend for what would let something move.
    fn watch(&mut self, ops: &mut EventOps<'_>) {
        let mut events = EventSet::empty();
        if self.waiting == Waiting::Nothing && self.receive.is_some() {
            events |= EventSet::IN;
        }
        if self.blocked || self.backend.has_unsent() {
            events |= EventSet::OUT;
        }
        let wanted = self.backend.fd().filter(|_| self.is_used()).map(|fd| (fd, events));
        if wanted == self.watched {
            return;
        }
        let event = |(fd, events)| Events::with_data_raw(fd, BACKEND, events);
        let result = match (self.watched, wanted) {
            (Some((old, _)), Some(new)) if old == new.0 => ops.modify(event(new)),
            (_, Some(new)) => ops.add(event(new)),
            (Some((old, events)), None) if self.backend.fd() == Some(old) => {
                ops.remove(Events::with_data_raw(old, BACKEND, events))
            }
            (_, None) => Ok(()),
        };
        match result {
            Ok(()) => self.watched = wanted,
            Err(error) => tracing::error!(%error, "the network cannot be watched"),
        }
    }

    fn is_used(&self) -> bool {
        self.switch.as_ref().is_none_or(|switch| switch.is_on())
    }

    fn unwatch(&mut self, ops: &mut EventOps<'_>) {
        if let Some((fd, events)) = self.watched.take() {
            // The descriptor is still open here, else epoll would have forgotten it by itself.
            let _ = ops.remove(Events::with_data_raw(fd, BACKEND, events));
        }
    }

    fn close(&mut self, ops: &mut EventOps<'_>) {
        self.unwatch(ops);
        self.backend.close();
        self.link.set_up(false);
        // What waited to be sent is lost, as on any unplugged cable.
        self.transmit();
    }

    fn follow_link(&mut self, ops: &mut EventOps<'_>) {
        let _ = self.link.changed.read();
        self.unwatch(ops);
        if let Backend::Stream(stream) = &mut self.backend {
            stream.reconnect();
        }
        self.transmit();
    }
}

/// Lets the driver know of large packets before the end of a turn: it is to work on them, or to make
/// further ones, meanwhile.
fn tell(ring: &mut Ring, news: &mut usize, length: usize) {
    *news += length;
    if *news >= NEWS {
        *news = 0;
        ring.notify_driver();
    }
}

/// Finds the pieces of a packet of the driver's; its length. `None` after a violation.
fn gather(ring: &mut Ring, chain: &Chain, pieces: &mut Pieces) -> Option<usize> {
    pieces.clear(&ring.memory());
    for part in chain.clone().readable() {
        let length = part.len() as usize;
        if pieces.len() + length > HEADER + MAX_FRAME {
            ring.fail(format_args!("a packet of {} bytes or more", pieces.len() + length));
            return None;
        }
        if length > 0 && pieces.push(part.addr(), length, Permissions::Read).is_err() {
            ring.fail("a packet is not in guest memory, or in too many pieces");
            return None;
        }
    }
    Some(pieces.len())
}

/// Counts a lost packet, and says so the first time.
fn count(counter: &AtomicU64, reason: &'static str) {
    if counter.fetch_add(1, Ordering::Relaxed) == 0 {
        tracing::warn!(reason, "the network card drops a packet");
    }
}

impl MutEventSubscriber for NetWorker {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        for (ring, data) in [(&self.receive, RECEIVE), (&self.transmit, TRANSMIT)] {
            if let Some(ring) = ring {
                ring.register(ops, data);
            }
        }
        if let Some(switch) = &self.switch
            && let Err(error) = ops.add(Events::with_data(&switch.changed, SWITCH, EventSet::IN))
        {
            tracing::error!(%error, "a pair of network queues cannot be switched");
        }
        if let Backend::Stream(stream) = &mut self.backend {
            let changed = self.link.changed.as_raw_fd();
            if let Err(error) = ops.add(Events::with_data_raw(changed, LINK, EventSet::IN)) {
                tracing::error!(%error, "user networking cannot be watched");
            }
            stream.reconnect();
        }
        self.transmit();
        self.see_to_the_rest();
        self.watch(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let mut open = true;
        match events.data() {
            RECEIVE => {
                if let Some(ring) = &self.receive {
                    ring.take_kick();
                }
                if self.waiting != Waiting::Nothing {
                    open = self.receive();
                }
            }
            TRANSMIT => {
                if let Some(ring) = &self.transmit {
                    ring.take_kick();
                }
                if !self.blocked {
                    self.transmit();
                }
            }
            LINK => self.follow_link(ops),
            SWITCH => {
                if let Some(switch) = &self.switch {
                    let _ = switch.changed.read();
                }
            }
            // Its queue of the interface was just switched off.
            _ if !self.is_used() => {}
            _ => {
                let set = events.event_set();
                if set.contains(EventSet::OUT) && !self.backend.has_unsent() {
                    self.transmit();
                }
                let broken = set.intersects(EventSet::HANG_UP | EventSet::ERROR);
                if broken && (!self.can_receive() || matches!(self.backend, Backend::Tap(_))) {
                    open = false;
                } else if self.can_receive() {
                    open = self.receive();
                }
            }
        }
        if !open {
            self.close(ops);
        }
        self.watch(ops);
    }
}
