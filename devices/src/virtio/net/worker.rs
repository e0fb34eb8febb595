//! The receive and the transmit queue of the card.

use std::{
    io::{Read, Write},
    os::fd::{AsRawFd, RawFd},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use super::{
    HEADER, MAX_FRAME, MIN_FRAME, NUM_BUFFERS,
    backend::{Backend, Link, Received, Sent},
    control::Switch,
    sys::Pieces,
};
use crate::{
    GuestMemory,
    virtio::ring::{Chain, Ring},
};

// Event data.
const RECEIVE: u32 = 0;
const TRANSMIT: u32 = 1;
const BACKEND: u32 = 2;
const LINK: u32 = 3;
const SWITCH: u32 = 4;

/// Packets per turn, so that neither direction starves the other.
const BURST: usize = 64;

/// Packets that were lost.
#[derive(Debug, Default)]
pub(super) struct Counters {
    /// Larger than the driver's buffers.
    pub(super) receive_dropped: AtomicU64,
    /// Shorter than an Ethernet header.
    pub(super) transmit_dropped: AtomicU64,
}

/// The subscriber of the worker thread.
pub(super) struct NetWorker {
    backend: Backend,
    receive: Option<Ring>,
    transmit: Option<Ring>,
    /// VIRTIO_NET_F_MRG_RXBUF: a packet may take several buffers.
    mergeable: bool,
    link: Arc<Link>,
    /// Whether the driver uses this pair of queues.
    switch: Option<Arc<Switch>>,
    counters: Arc<Counters>,
    /// A received packet, and its length if it still waits for buffers.
    packet: Box<[u8]>,
    waiting: Option<usize>,
    outgoing: Box<[u8]>,
    /// A packet to be sent from where it is.
    pieces: Pieces,
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
            mergeable,
            link,
            switch,
            counters,
            packet: vec![0; HEADER + MAX_FRAME].into(),
            waiting: None,
            outgoing: vec![0; HEADER + MAX_FRAME].into(),
            pieces: Pieces::default(),
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
        let mut used = false;
        let mut open = true;
        for _ in 0..BURST {
            let length = match self.waiting {
                Some(length) => length,
                None => match self.backend.receive(&mut self.packet) {
                    Received::Packet(length) => length,
                    Received::Empty => break,
                    Received::Closed => {
                        open = false;
                        break;
                    }
                },
            };
            self.waiting = None;
            match place(ring, &mut self.packet[..length], self.mergeable) {
                Placed::Done => used = true,
                Placed::TooLarge => {
                    used = true;
                    count(&self.counters.receive_dropped, "larger than the guest's buffers");
                }
                Placed::NoBuffers => {
                    self.waiting = Some(length);
                    break;
                }
            }
        }
        if used {
            ring.notify_driver();
        }
        open
    }

    /// Moves packets from the driver to the backend.
    fn transmit(&mut self) {
        let Some(ring) = &mut self.transmit else { return };
        self.blocked = false;
        let mut used = false;
        loop {
            ring.disable_kicks();
            while let Some(chain) = ring.pop() {
                let memory = ring.memory();
                let sent = if self.backend.takes_pieces() {
                    let Some(length) = gather(ring, &chain, &memory, &mut self.pieces) else {
                        break;
                    };
                    (length >= HEADER + MIN_FRAME)
                        .then(|| self.backend.transmit_pieces(&self.pieces))
                } else {
                    let Some(mut reader) = ring.reader(&chain, &memory) else { break };
                    let length = reader.available_bytes();
                    if length > self.outgoing.len() {
                        ring.fail(format_args!("a packet of {length} bytes"));
                        break;
                    }
                    let packet = &mut self.outgoing[..length];
                    (length >= HEADER + MIN_FRAME && reader.read_exact(packet).is_ok())
                        .then(|| self.backend.transmit(packet))
                };
                if sent.is_none() {
                    count(&self.counters.transmit_dropped, "shorter than an Ethernet header");
                } else if sent == Some(Sent::Full) {
                    ring.put_back();
                    self.blocked = true;
                    break;
                }
                ring.push_used(chain.head_index(), 0);
                used = true;
            }
            if self.blocked || !ring.enable_kicks() {
                break;
            }
        }
        if used {
            ring.notify_driver();
        }
    }

    /// Watches the backend for what would let something move.
    fn watch(&mut self, ops: &mut EventOps<'_>) {
        let mut events = EventSet::empty();
        if self.waiting.is_none() && self.receive.is_some() {
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

/// Finds the pieces of a packet of the driver's; its length. `None` after a violation.
fn gather(
    ring: &mut Ring,
    chain: &Chain,
    memory: &Arc<GuestMemory>,
    pieces: &mut Pieces,
) -> Option<usize> {
    pieces.clear(memory);
    for part in chain.clone().readable() {
        let length = part.len() as usize;
        if pieces.len() + length > HEADER + MAX_FRAME {
            ring.fail(format_args!("a packet of {} bytes or more", pieces.len() + length));
            return None;
        }
        if length > 0 && !pieces.push(part.addr(), length) {
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

/// What became of a received packet.
enum Placed {
    Done,
    /// It does not fit, and took a buffer with it.
    TooLarge,
    /// The driver will notify when there are more.
    NoBuffers,
}

/// Copies a packet into the driver's buffers.
fn place(ring: &mut Ring, packet: &mut [u8], mergeable: bool) -> Placed {
    let memory = ring.memory();
    let mut buffers = Vec::new();
    let mut room = 0;
    while room < packet.len() {
        let Some(chain) = ring.pop() else {
            // Before any goes back: the notification is to come with one more than there are now.
            if ring.enable_kicks() {
                continue;
            }
            for _ in &buffers {
                ring.put_back();
            }
            return Placed::NoBuffers;
        };
        let Some(writer) = ring.writer(&chain, &memory) else { return Placed::NoBuffers };
        let available = writer.available_bytes();
        if available == 0 || (room == 0 && available < HEADER) {
            ring.fail("a receive buffer is too small for the packet header");
            return Placed::NoBuffers;
        }
        room += available;
        buffers.push((chain.head_index(), writer));
        if !mergeable {
            break;
        }
    }
    if room < packet.len() {
        for (head, _) in buffers {
            ring.push_used(head, 0);
        }
        return Placed::TooLarge;
    }
    // One buffer each for at least one byte, of at most 64 KiB: it fits, see VIRTIO 1.3 §5.1.6.4.
    packet[NUM_BUFFERS..HEADER].copy_from_slice(&(buffers.len() as u16).to_le_bytes());
    let mut rest = &*packet;
    for (head, mut writer) in buffers {
        let written = writer.write(rest).unwrap_or_default();
        rest = rest.get(written..).unwrap_or_default();
        ring.push_used(head, written as u32);
    }
    Placed::Done
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
        self.watch(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let mut open = true;
        match events.data() {
            RECEIVE => {
                if let Some(ring) = &self.receive {
                    ring.take_kick();
                }
                if self.waiting.is_some() {
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
                if broken && (self.waiting.is_some() || matches!(self.backend, Backend::Tap(_))) {
                    open = false;
                } else if self.waiting.is_none() {
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
