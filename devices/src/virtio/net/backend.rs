//! Where packets go to and come from.

use std::{
    io::{self, ErrorKind, Read, Write},
    os::{
        fd::{AsRawFd, RawFd},
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
    sys::Pieces,
    tap::Tap,
};
use crate::virtio::VirtioInterrupt;

/// What became of an attempt to receive.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Received {
    /// A packet of this length, virtio header included.
    Packet(usize),
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

    /// Receives a packet, with a virtio header in front.
    pub(super) fn receive(&mut self, packet: &mut [u8]) -> Received {
        match self {
            Self::Tap(tap) => match tap.receive(packet) {
                Ok(length) if length >= HEADER + MIN_FRAME => Received::Packet(length),
                // EIO while the interface is down; the descriptor stays usable.
                Ok(_) | Err(_) => Received::Empty,
            },
            Self::Stream(stream) => stream.receive(packet),
        }
    }

    /// Sends what is left of the last packet; `true` if something is left still.
    pub(super) fn has_unsent(&mut self) -> bool {
        match self {
            Self::Tap(_) => false,
            Self::Stream(stream) => !stream.flush(),
        }
    }

    /// Whether [`transmit_pieces`](Self::transmit_pieces) is possible.
    pub(super) fn takes_pieces(&self) -> bool {
        matches!(self, Self::Tap(tap) if tap.takes_pieces())
    }

    /// Sends a packet that has a virtio header, without a copy of it.
    pub(super) fn transmit_pieces(&mut self, pieces: &Pieces) -> Sent {
        match self {
            Self::Tap(tap) => sent(tap.transmit_pieces(pieces)),
            Self::Stream(_) => Sent::Done,
        }
    }

    /// Sends a packet that has a virtio header.
    pub(super) fn transmit(&mut self, packet: &[u8]) -> Sent {
        match self {
            Self::Tap(tap) => sent(tap.transmit(packet)),
            Self::Stream(stream) => stream.transmit(packet),
        }
    }
}

/// What the interface made of a packet.
fn sent(result: io::Result<()>) -> Sent {
    match result {
        Err(error) if error.kind() == ErrorKind::WouldBlock => Sent::Full,
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
    /// The rest of a frame that was sent in part.
    unsent: Vec<u8>,
}

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
        true
    }

    fn receive(&mut self, packet: &mut [u8]) -> Received {
        let Some(socket) = &mut self.socket else { return Received::Empty };
        loop {
            match self.decoder.next_frame() {
                Ok(Some(frame)) if frame.len() < MIN_FRAME => continue,
                Ok(Some(frame)) => {
                    let length = HEADER + frame.len();
                    packet[..HEADER].fill(0);
                    packet[HEADER..length].copy_from_slice(frame);
                    return Received::Packet(length);
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

    fn transmit(&mut self, packet: &[u8]) -> Sent {
        // Without a peer the cable is unplugged; a new one may not have been noticed yet.
        if self.socket.is_none() {
            self.reconnect();
        }
        let Some(socket) = &mut self.socket else { return Sent::Done };
        if !flush(socket, &mut self.unsent) {
            return Sent::Full;
        }
        let frame = packet.get(HEADER..).unwrap_or_default();
        self.unsent.reserve(LENGTH + frame.len());
        self.unsent.extend_from_slice(&(frame.len() as u32).to_be_bytes());
        self.unsent.extend_from_slice(frame);
        flush(socket, &mut self.unsent);
        Sent::Done
    }

    /// Sends what is left of the last frame; `false` if that is not possible yet.
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
