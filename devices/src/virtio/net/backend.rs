//! Where packets go to and come from.

use std::{
    io::{self, ErrorKind, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, RawFd},
        unix::net::UnixStream,
    },
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{
    HEADER, MIN_FRAME,
    stream::{FrameDecoder, LENGTH},
    tap::Tap,
};
use crate::virtio::{VirtioInterrupt, pieces::Pieces};

/// A received packet, virtio header included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Packet {
    pub(super) length: usize,
    /// So many bytes are in the driver's buffers; the others are in the buffer for spills.
    pub(super) placed: usize,
}

/// What became of an attempt to receive.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Received {
    Packet(Packet),
    /// Nothing there at the moment.
    Empty,
    /// The peer is gone.
    Closed,
}

/// What became of an attempt to send.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Sent {
    /// The packet is on its way, or lost as packets may be.
    Done,
    /// No room: try again when the descriptor is writable.
    Full,
}

/// A tap interface or a stream socket.
#[derive(Debug)]
pub(super) enum Backend {
    /// A tap interface.
    Tap(Tap),
    /// The socket of a process that comes and goes.
    Stream(Stream),
}

impl Backend {
    /// The descriptor to watch, if there is one at the moment.
    pub(super) fn fd(&self) -> Option<RawFd> {
        match self {
            Self::Tap(tap) => tap.is_there().then(|| tap.as_raw_fd()),
            Self::Stream(stream) => stream.socket.as_ref().map(AsRawFd::as_raw_fd),
        }
    }

    /// Lets go of a peer that is gone.
    pub(super) fn close(&mut self) {
        match self {
            Self::Tap(tap) => tap.set_gone(),
            Self::Stream(stream) => stream.socket = None,
        }
    }

    /// Receives a packet, with a virtio header in front: into `pieces`, or what does not fit there into
    /// `spill`, which has room for the largest packet.
    pub(super) fn receive(&mut self, pieces: &mut Pieces, spill: &mut [u8]) -> Received {
        match self {
            Self::Tap(tap) => match tap.receive(pieces, spill) {
                Ok(packet) if packet.length >= HEADER + MIN_FRAME => Received::Packet(packet),
                // EIO while the interface is down; the descriptor stays usable.
                Ok(_) | Err(_) => Received::Empty,
            },
            Self::Stream(stream) => stream.receive(pieces, spill),
        }
    }

    /// Whether packets are here that the descriptor does not tell of any more.
    pub(super) fn has_received(&self) -> bool {
        match self {
            Self::Tap(_) => false,
            Self::Stream(stream) => stream.socket.is_some() && stream.decoder.has_frame(),
        }
    }

    /// Sends what was kept back; `true` if something is left still.
    pub(super) fn has_unsent(&mut self) -> bool {
        match self {
            Self::Tap(_) => false,
            Self::Stream(stream) => !stream.flush(),
        }
    }

    /// Sends a packet that has a virtio header. It may be kept back until
    /// [`has_unsent`](Self::has_unsent).
    pub(super) fn transmit(&mut self, packet: &mut Pieces) -> Sent {
        match self {
            Self::Tap(tap) => sent(tap.transmit(packet)),
            Self::Stream(stream) => stream.transmit(packet),
        }
    }
}

/// What the interface made of a packet.
fn sent(result: io::Result<()>) -> Sent {
    match result {
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
            Sent::Full
        }
        // The interface is down, or the header makes no sense: a lost packet.
        Ok(()) | Err(_) => Sent::Done,
    }
}

/// A connection to a process that understands framed packets.
#[derive(Debug)]
pub(super) struct Stream {
    link: Arc<Link>,
    socket: Option<UnixStream>,
    decoder: FrameDecoder,
    /// Frames to be sent together, or the rest of what was sent in part.
    unsent: Vec<u8>,
}

/// Frames up to this length are collected: copying one costs less than a call and waking the peer for it.
const COLLECTED: usize = 8 << 10;
/// What is sent in one call then.
const COLLECTION: usize = 64 << 10;

impl Stream {
    pub(super) fn new(link: Arc<Link>) -> Self {
        Self { link, socket: None, decoder: FrameDecoder::new(), unsent: Vec::new() }
    }

    /// Switches to the newest connection; returns whether there was one.
    pub(super) fn reconnect(&mut self) -> bool {
        let Some(socket) = self.link.take() else { return false };
        self.socket = Some(socket);
        self.decoder = FrameDecoder::new();
        self.unsent.clear();
        // Whoever noticed the end of the one before may have pulled the cable since it was handed over.
        self.link.set_up(true);
        true
    }

    fn receive(&mut self, pieces: &mut Pieces, spill: &mut [u8]) -> Received {
        let Some(socket) = &mut self.socket else { return Received::Empty };
        loop {
            match self.decoder.next_frame() {
                Ok(Some(frame)) if frame.len() < MIN_FRAME => continue,
                Ok(Some(frame)) => {
                    let length = HEADER + frame.len();
                    if length <= pieces.len() {
                        pieces.store(0, &[0; HEADER]);
                        pieces.store(HEADER, frame);
                        return Received::Packet(Packet { length, placed: length });
                    }
                    spill[..HEADER].fill(0);
                    spill[HEADER..length].copy_from_slice(frame);
                    return Received::Packet(Packet { length, placed: 0 });
                }
                Ok(None) => {}
                Err(error) => {
                    tracing::warn!(%error, "user networking speaks another protocol");
                    return Received::Closed;
                }
            }
            match socket.read(self.decoder.space()) {
                Ok(0) => return Received::Closed,
                Ok(count) => self.decoder.filled(count),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Received::Empty,
                Err(_) => return Received::Closed,
            }
        }
    }

    fn transmit(&mut self, packet: &mut Pieces) -> Sent {
        // Without a peer the cable is unplugged; a new one may not have been noticed yet.
        if self.socket.is_none() {
            self.reconnect();
        }
        let Some(socket) = &mut self.socket else { return Sent::Done };
        let length = packet.len().saturating_sub(HEADER);
        let announced = (length as u32).to_be_bytes();
        let collect = length <= COLLECTED;
        if (!collect || self.unsent.len() >= COLLECTION) && !flush(socket, &mut self.unsent) {
            return Sent::Full;
        }
        if collect {
            self.unsent.extend_from_slice(&announced);
            packet.append_to(&mut self.unsent, HEADER);
            return Sent::Done;
        }
        match packet.send(socket.as_fd(), &announced, HEADER) {
            Ok(count) => {
                // The peer has the start of the frame: it must get the rest, whatever the driver does.
                self.unsent.extend_from_slice(announced.get(count..).unwrap_or_default());
                packet.append_to(&mut self.unsent, HEADER + count.saturating_sub(LENGTH));
                Sent::Done
            }
            Err(error) => sent(Err(error)),
        }
    }

    /// Sends what was kept back; `false` if that is not possible yet.
    fn flush(&mut self) -> bool {
        self.socket.as_mut().is_none_or(|socket| flush(socket, &mut self.unsent))
    }
}

fn flush(socket: &mut UnixStream, unsent: &mut Vec<u8>) -> bool {
    let mut done = 0;
    let complete = loop {
        if done == unsent.len() {
            break true;
        }
        match socket.write(&unsent[done..]) {
            Ok(count) => done += count,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => break false,
            // The receiving side notices that the peer is gone.
            Err(_) => {
                done = unsent.len();
            }
        }
    };
    unsent.drain(..done);
    complete
}

/// What the process behind a stream and the card share: the newest connection, and whether the
/// cable is plugged in.
pub(super) struct Link {
    connection: Mutex<Option<UnixStream>>,
    up: AtomicBool,
    /// Signalled with each new connection.
    pub(super) changed: EventFd,
    interrupt: Mutex<Option<Arc<dyn VirtioInterrupt>>>,
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link").field("up", &self.up).finish_non_exhaustive()
    }
}

impl Link {
    pub(super) fn new(up: bool) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            connection: Mutex::default(),
            up: AtomicBool::new(up),
            changed: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            interrupt: Mutex::default(),
        }))
    }

    /// Whether the cable is plugged in.
    pub(super) fn is_up(&self) -> bool {
        self.up.load(Ordering::Acquire)
    }

    /// Plugs the cable in or pulls it, and tells the driver.
    pub(super) fn set_up(&self, up: bool) {
        if self.up.swap(up, Ordering::AcqRel) == up {
            return;
        }
        let interrupt = self.interrupt.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(interrupt) = &*interrupt {
            interrupt.signal_config_change();
        }
    }

    /// Whom to tell about the cable.
    pub(super) fn set_interrupt(&self, interrupt: Option<Arc<dyn VirtioInterrupt>>) {
        *self.interrupt.lock().unwrap_or_else(PoisonError::into_inner) = interrupt;
    }

    /// Hands over a new connection.
    pub(super) fn connect(&self, socket: UnixStream) {
        *self.connection.lock().unwrap_or_else(PoisonError::into_inner) = Some(socket);
        self.set_up(true);
        if let Err(error) = self.changed.write(1) {
            tracing::error!(%error, "a network card cannot be told of its new connection");
        }
    }

    fn take(&self) -> Option<UnixStream> {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}
