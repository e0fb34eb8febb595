//! The rings of the console: control protocol, data both ways, back-pressure.

use std::{
    collections::VecDeque,
    io::{Read, Write},
    sync::{Arc, Mutex, PoisonError},
};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::eventfd::EventFd;

use super::{
    port::Port,
    protocol::{self, ConsoleSize, HEADER_SIZE, Message},
};
use crate::virtio::ring::Ring;

/// Index of the queue with control messages for the driver.
pub(super) const CONTROL_RX: u16 = 2;
/// Index of the queue with control messages from the driver.
pub(super) const CONTROL_TX: u16 = 3;

/// The most that one write by the guest may hold; Linux sends up to 32 KiB.
const MAX_CHAIN: usize = 1 << 20;
/// Guest data is handed on in pieces of this size.
const PIECE: usize = 16 << 10;
/// Event data of the wake-up; queues use their index.
const WAKE: u32 = u32::MAX;

/// Queue index of what the device sends to the driver's end of `port`.
pub(super) fn receive_queue(port: usize) -> u16 {
    if port == 0 { 0 } else { 2 * port as u16 + 2 }
}

/// A port while the device is active.
struct ActivePort {
    port: Arc<Port>,
    /// To the guest.
    receive: Option<Ring>,
    /// From the guest.
    transmit: Option<Ring>,
    /// How much of the transmit queue's next chain the listener took already.
    offset: usize,
    /// The listener wants no more for now.
    blocked: bool,
    /// PORT_ADD was sent.
    added: bool,
    /// The driver answered with PORT_READY.
    ready: bool,
    /// What the driver believes of the host's end.
    host_open: bool,
}

/// The subscriber of the worker thread.
pub(super) struct ConsoleWorker {
    ports: Vec<ActivePort>,
    control_receive: Option<Ring>,
    control_transmit: Option<Ring>,
    multiport: bool,
    device_ready: bool,
    /// The driver's messages were left alone because too many answers wait.
    held_back: bool,
    /// Messages that wait for a buffer of the driver.
    messages: VecDeque<Vec<u8>>,
    size: Arc<Mutex<Option<ConsoleSize>>>,
    sent_size: Option<ConsoleSize>,
    wake: Arc<EventFd>,
    piece: Box<[u8]>,
}

impl ConsoleWorker {
    /// `rings` by queue index. Without `multiport` there is port 0 only, and it is always open.
    pub(super) fn new(
        ports: &[Arc<Port>],
        mut rings: Vec<Option<Ring>>,
        multiport: bool,
        size: Arc<Mutex<Option<ConsoleSize>>>,
        wake: Arc<EventFd>,
    ) -> Self {
        let mut take = |index: u16| rings.get_mut(usize::from(index)).and_then(Option::take);
        let used = if multiport { ports.len() } else { 1 };
        let ports = ports[..used]
            .iter()
            .enumerate()
            .map(|(number, port)| ActivePort {
                port: port.clone(),
                receive: take(receive_queue(number)),
                transmit: take(receive_queue(number) + 1),
                offset: 0,
                blocked: false,
                added: false,
                ready: false,
                host_open: false,
            })
            .collect();
        let (control_receive, control_transmit) =
            if multiport { (take(CONTROL_RX), take(CONTROL_TX)) } else { (None, None) };
        Self {
            ports,
            control_receive,
            control_transmit,
            multiport,
            device_ready: false,
            held_back: false,
            messages: VecDeque::new(),
            size,
            sent_size: None,
            wake,
            piece: vec![0; PIECE].into(),
        }
    }

    fn rings(&self) -> impl Iterator<Item = &Ring> {
        let ports = self.ports.iter().flat_map(|port| [&port.receive, &port.transmit]);
        ports.chain([&self.control_receive, &self.control_transmit]).flatten()
    }

    /// Takes over what handles did, and moves whatever can move.
    fn service_all(&mut self) {
        self.control();
        for number in 0..self.ports.len() {
            self.follow_host(number);
            self.ports[number].port.announce();
            self.transmit(number, false);
            self.ports[number].receive();
        }
        self.send_size();
        self.flush_messages();
    }

    fn queue_event(&mut self, index: u16) {
        match index {
            CONTROL_RX | CONTROL_TX if self.multiport => self.control(),
            _ => {
                let number = if index < 2 { 0 } else { usize::from(index - 2) / 2 };
                if index % 2 == 1 {
                    // What the guest wrote right after opening the port comes after the opening.
                    self.control();
                    self.transmit(number, false);
                } else if let Some(port) = self.ports.get_mut(number) {
                    port.receive();
                }
            }
        }
        self.flush_messages();
    }

    /// Tells the driver about ports that appeared and host ends that opened or closed.
    fn follow_host(&mut self, number: usize) {
        let Some(active) = self.ports.get_mut(number) else { return };
        let host = active.port.take_host_end();
        if host.resume {
            active.blocked = false;
        }
        if !self.multiport {
            return;
        }
        let id = active.port.id;
        if self.device_ready && host.attached && !active.added {
            active.added = true;
            self.messages.push_back(message(id, protocol::PORT_ADD, 1));
        }
        let Some(active) = self.ports.get_mut(number).filter(|active| active.ready) else { return };
        if active.host_open && (host.was_closed || !host.open) {
            active.host_open = false;
            self.messages.push_back(message(id, protocol::PORT_OPEN, 0));
        }
        if host.open && !active.host_open {
            active.host_open = true;
            self.messages.push_back(message(id, protocol::PORT_OPEN, 1));
        }
    }

    /// Moves control messages both ways.
    fn control(&mut self) {
        loop {
            self.handle_control();
            self.flush_messages();
            if !self.held_back || !self.messages.is_empty() {
                break;
            }
        }
    }

    /// Reads what the driver says. Stops while too many answers wait for buffers.
    fn handle_control(&mut self) {
        let limit = 4 * self.ports.len() + 16;
        let mut used = false;
        self.held_back = false;
        while let Some(ring) = &mut self.control_transmit {
            if self.messages.len() >= limit {
                self.held_back = true;
                break;
            }
            let Some(chain) = ring.pop() else {
                if ring.enable_kicks() {
                    continue;
                }
                break;
            };
            let memory = ring.memory();
            let Some(mut reader) = ring.reader(&chain, &memory) else { break };
            let mut header = [0; HEADER_SIZE];
            let complete = reader.read_exact(&mut header).is_ok();
            ring.push_used(chain.head_index(), 0);
            used = true;
            if complete {
                self.control_message(Message::decode(header));
            }
        }
        if let Some(ring) = self.control_transmit.as_mut().filter(|_| used) {
            ring.notify_driver();
        }
    }

    fn control_message(&mut self, message: Message) {
        let success = message.value == 1;
        if message.event == protocol::DEVICE_READY {
            if !success {
                tracing::warn!("the guest's driver could not set up the console");
            }
            self.device_ready = success;
            for number in 0..self.ports.len() {
                self.ports[number].added = false;
                self.follow_host(number);
            }
            return;
        }
        let number = message.port as usize;
        if number >= self.ports.len() {
            tracing::debug!(?message, "a control message for a port that does not exist");
            return;
        }
        match message.event {
            protocol::PORT_READY if success => self.port_ready(number),
            protocol::PORT_READY => {
                let port = &self.ports[number].port.name;
                tracing::warn!(port, "the guest's driver could not set up the port");
            }
            protocol::PORT_OPEN => {
                if !success {
                    // What was written before closing comes before the closing.
                    self.transmit(number, true);
                }
                self.ports[number].port.set_guest_open(success);
            }
            _ => tracing::debug!(?message, "an unknown control message"),
        }
    }

    fn port_ready(&mut self, number: usize) {
        let active = &mut self.ports[number];
        if !active.added {
            return;
        }
        let id = active.port.id;
        active.ready = true;
        active.host_open = false;
        if id == 0 {
            self.messages.push_back(message(id, protocol::CONSOLE_PORT, 1));
            self.sent_size = None;
        } else {
            let header = Message { port: id, event: protocol::PORT_NAME, value: 1 };
            self.messages.push_back(header.encode(active.port.name.as_bytes()));
        }
        self.follow_host(number);
        self.send_size();
    }

    fn send_size(&mut self) {
        let size = *self.size.lock().unwrap_or_else(PoisonError::into_inner);
        let ready = self.ports.first().is_some_and(|console| console.ready);
        if let Some(size) = size.filter(|_| ready && self.sent_size != size) {
            self.sent_size = Some(size);
            let header = Message { port: 0, event: protocol::RESIZE, value: 0 };
            self.messages.push_back(header.encode(&size.encode()));
        }
    }

    /// Sends waiting messages as far as the driver has given buffers.
    fn flush_messages(&mut self) {
        let Some(ring) = &mut self.control_receive else {
            self.messages.clear();
            return;
        };
        let mut used = false;
        while let Some(message) = self.messages.front() {
            let Some(chain) = ring.pop() else {
                if ring.enable_kicks() {
                    continue;
                }
                break;
            };
            let memory = ring.memory();
            let Some(mut writer) = ring.writer(&chain, &memory) else { break };
            if writer.available_bytes() < message.len() {
                ring.fail("a control buffer is too small for a message");
                break;
            }
            // Cannot fail: there is room.
            let written = writer.write(message).unwrap_or_default();
            ring.push_used(chain.head_index(), written as u32);
            self.messages.pop_front();
            used = true;
        }
        if used {
            ring.notify_driver();
        }
    }

    /// Hands what the guest wrote to the listener. With `closing`, what it does not take is lost.
    fn transmit(&mut self, number: usize, closing: bool) {
        if let Some(active) = self.ports.get_mut(number) {
            active.transmit(&mut self.piece, closing);
        }
    }
}

impl ActivePort {
    fn transmit(&mut self, piece: &mut [u8], closing: bool) {
        let Some(ring) = &mut self.transmit else { return };
        if self.blocked && !closing {
            return;
        }
        self.blocked = false;
        let mut used = false;
        'chains: loop {
            ring.disable_kicks();
            while let Some(chain) = ring.pop() {
                let memory = ring.memory();
                let Some(mut reader) = ring.reader(&chain, &memory) else { break 'chains };
                let length = reader.available_bytes();
                if length > MAX_CHAIN {
                    ring.fail(format_args!("one write of {length} bytes"));
                    break 'chains;
                }
                // A driver that shortens a buffer it gave away only fools itself.
                let mut rest = match reader.split_at(self.offset.min(length)) {
                    Ok(rest) => rest,
                    Err(_) => break 'chains,
                };
                loop {
                    let count = rest.read(piece).unwrap_or_default();
                    if count == 0 {
                        break;
                    }
                    let taken = self.port.deliver(&piece[..count]);
                    self.offset += taken;
                    if taken == count {
                        continue;
                    }
                    if closing {
                        self.port.discard(length - self.offset);
                        break;
                    }
                    self.blocked = true;
                    ring.put_back();
                    break 'chains;
                }
                self.offset = 0;
                ring.push_used(chain.head_index(), 0);
                used = true;
            }
            if !ring.enable_kicks() {
                break;
            }
        }
        if used {
            ring.notify_driver();
        }
    }

    /// Moves bytes that wait for the guest into its buffers.
    fn receive(&mut self) {
        let Some(ring) = &mut self.receive else { return };
        let mut used = false;
        while self.port.has_output() {
            let Some(chain) = ring.pop() else {
                if ring.enable_kicks() {
                    continue;
                }
                break;
            };
            let memory = ring.memory();
            let Some(mut writer) = ring.writer(&chain, &memory) else { break };
            let written = self.port.take_output(|bytes| writer.write(bytes).unwrap_or_default());
            ring.push_used(chain.head_index(), written as u32);
            used = true;
        }
        if used {
            ring.notify_driver();
            self.port.announce_room();
        }
    }
}

fn message(port: u32, event: u16, value: u16) -> Vec<u8> {
    Message { port, event, value }.encode(&[])
}

impl MutEventSubscriber for ConsoleWorker {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        for ring in self.rings() {
            ring.register(ops, u32::from(ring.index()));
        }
        if let Err(error) = ops.add(Events::with_data(&*self.wake, WAKE, EventSet::IN)) {
            tracing::error!(%error, "the console cannot be woken");
        }
        if !self.multiport {
            self.ports.iter().for_each(|active| active.port.set_guest_open(true));
        }
        self.service_all();
    }

    fn process(&mut self, events: Events, _: &mut EventOps<'_>) {
        if events.data() == WAKE {
            let _ = self.wake.read();
            self.service_all();
            return;
        }
        let index = events.data() as u16;
        if let Some(ring) = self.rings().find(|ring| ring.index() == index) {
            ring.take_kick();
        }
        self.queue_event(index);
    }
}
