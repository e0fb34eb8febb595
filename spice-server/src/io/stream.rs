//! A client's connection as one concept: a TCP or Unix socket, perhaps TLS over it, perhaps a
//! WebSocket over that.
//!
//! ```text
//! SPICE bytes ─▶ Stream ─▶ [WebSocket frames] ─▶ Transport ─▶ [TLS records] ─▶ Socket
//! ```
//!
//! Whether a client speaks TLS is told by the first byte it sends, so every port takes both.
//! What is written is encrypted or framed only when everything before it is with the kernel: a layer
//! holds one part of at most [`PART`] bytes, and what waits for the line waits unencrypted, where it
//! can still be replaced by something newer.
//!
//! Layers know bytes that are none of SPICE's: empty records, empty frames. One [`Stream::read`] takes
//! at most [`READ`] bytes from the socket for them, so that nobody keeps a thread with nothing.

use std::{
    fmt,
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    sync::Arc,
};

use rustix::net::{RecvFlags, recv};
use rustls::ServerConnection;
use tungstenite::{
    Bytes, Message,
    protocol::{Role, WebSocketConfig, WebSocketContext},
};

use crate::proto::framing::{HeaderKind, MessageEnds};

/// Most bytes that are encrypted or framed at once.
const PART: usize = 32 * 1024;
/// Most bytes taken from a socket at once.
pub(crate) const READ: usize = 16 * 1024;
/// Largest WebSocket message of a client; SPICE messages may be cut anywhere.
const MAX_MESSAGE: usize = 64 * 1024;
/// First byte of a TLS connection: a handshake record (RFC 8446, 5.1).
const TLS_HANDSHAKE: u8 = 0x16;

/// Who is at the other end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// Somebody on the network.
    Net(SocketAddr),
    /// A process of this machine, through a Unix socket.
    Unix {
        /// Its user.
        uid: u32,
        /// Its number; 0 if it is outside of this process's view.
        pid: i32,
    },
}

impl Peer {
    /// Whether it is a program of the same machine.
    pub fn is_local(&self) -> bool {
        match self {
            Self::Net(address) => address.ip().to_canonical().is_loopback(),
            Self::Unix { .. } => true,
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Net(address) => address.fmt(f),
            Self::Unix { uid, pid } => write!(f, "unix:uid={uid},pid={pid}"),
        }
    }
}

/// A connected socket that does not block.
#[derive(Debug)]
pub(crate) enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Read for Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(socket) => socket.read(buffer),
            Self::Unix(socket) => socket.read(buffer),
        }
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(socket) => socket.write(bytes),
            Self::Unix(socket) => socket.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(socket) => socket.as_fd(),
            Self::Unix(socket) => socket.as_fd(),
        }
    }
}

/// Whether a connection is encrypted.
enum Layer {
    /// Nothing has been received; `Some` if TLS is offered.
    Undecided(Option<Arc<rustls::ServerConfig>>),
    Plain,
    Tls(Box<ServerConnection>),
}

/// A socket, perhaps with TLS over it.
struct Transport {
    socket: Socket,
    layer: Layer,
    /// Bytes that may be taken from the socket before it is others' turn.
    budget: usize,
    /// Bytes taken from the socket so far.
    taken: u64,
}

impl Transport {
    /// Looks at the first byte, which stays in the socket; `false` if the client has left.
    fn decide(&mut self) -> io::Result<bool> {
        let Layer::Undecided(tls) = &self.layer else { return Ok(true) };
        let mut first = [0];
        let (count, _) = recv(&self.socket, &mut first, RecvFlags::PEEK)?;
        if count == 0 {
            return Ok(false);
        }
        self.layer = match tls {
            Some(config) if first == [TLS_HANDSHAKE] => {
                let connection = ServerConnection::new(config.clone()).map_err(io::Error::other)?;
                Layer::Tls(Box::new(connection))
            }
            _ => Layer::Plain,
        };
        Ok(true)
    }
}

/// A socket that is read within a budget.
struct Metered<'a> {
    socket: &'a mut Socket,
    budget: &'a mut usize,
    taken: &'a mut u64,
}

impl Read for Metered<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if *self.budget == 0 {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let most = buffer.len().min(*self.budget);
        let count = self.socket.read(buffer.get_mut(..most).unwrap_or_default())?;
        *self.budget -= count;
        *self.taken += count as u64;
        Ok(count)
    }
}

/// Sends what TLS has ready.
fn send_records(tls: &mut ServerConnection, socket: &mut Socket) -> io::Result<()> {
    while tls.wants_write() {
        if tls.write_tls(socket)? == 0 {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
    }
    Ok(())
}

/// A full socket is no error for somebody who has handed over all there was.
fn later(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
        result => result,
    }
}

impl Read for Transport {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if !self.decide()? {
            return Ok(0);
        }
        let mut socket =
            Metered { socket: &mut self.socket, budget: &mut self.budget, taken: &mut self.taken };
        let Layer::Tls(tls) = &mut self.layer else { return socket.read(buffer) };
        loop {
            match tls.reader().read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => return result,
            }
            if tls.read_tls(&mut socket)? == 0 {
                // An end without close_notify: SPICE messages have lengths, nothing can be cut
                // unnoticed.
                return Ok(0);
            }
            let processed = tls.process_new_packets();
            // Handshakes, and alerts that tell the client what is wrong.
            let sent = later(send_records(tls, socket.socket));
            processed.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            sent?;
        }
    }
}

impl Transport {
    /// Writes; no TLS record has parts of two messages. (spice-gtk waits for the socket after every
    /// message, even if it has decrypted the beginning of the next one.)
    fn write_messages(&mut self, bytes: &[u8], ends: &mut MessageEnds) -> io::Result<usize> {
        let Layer::Tls(tls) = &mut self.layer else { return self.socket.write(bytes) };
        send_records(tls, &mut self.socket)?;
        let mut rest = bytes.get(..PART).unwrap_or(bytes);
        let mut taken = 0;
        while !rest.is_empty() {
            let mut count = ends.next(rest);
            if count == 0 && taken == 0 {
                // Not a whole header: it cannot be.
                count = rest.len();
            }
            let Some((message, others)) = rest.split_at_checked(count).filter(|_| count > 0) else {
                break;
            };
            tls.writer().write_all(message)?;
            taken += count;
            rest = others;
        }
        later(send_records(tls, &mut self.socket))?;
        Ok(taken)
    }
}

impl Write for Transport {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Layer::Tls(tls) = &mut self.layer else { return self.socket.write(bytes) };
        send_records(tls, &mut self.socket)?;
        let count = tls.writer().write(bytes.get(..PART).unwrap_or(bytes))?;
        later(send_records(tls, &mut self.socket))?;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        match &mut self.layer {
            Layer::Tls(tls) => send_records(tls, &mut self.socket),
            Layer::Undecided(_) | Layer::Plain => Ok(()),
        }
    }
}

/// WebSocket frames (RFC 6455) over a transport.
struct Frames {
    context: WebSocketContext,
    /// What is left of the last message.
    rest: Bytes,
}

/// A client's connection. Nothing here blocks (`WouldBlock`).
pub(crate) struct Stream {
    transport: Transport,
    frames: Option<Box<Frames>>,
    /// Once SPICE messages are sent.
    ends: Option<MessageEnds>,
}

impl Stream {
    /// `tls`: what to offer to a client that begins with TLS.
    pub(crate) fn new(socket: Socket, tls: Option<Arc<rustls::ServerConfig>>) -> Self {
        Self {
            transport: Transport { socket, layer: Layer::Undecided(tls), budget: 0, taken: 0 },
            frames: None,
            ends: None,
        }
    }

    /// From now on a WebSocket: `answer` ends the handshake, `received` came after the client's
    /// part of it.
    pub(crate) fn upgrade(&mut self, answer: &[u8], received: Vec<u8>) -> io::Result<()> {
        // The first bytes on a connection: a socket without room for them is of no use.
        self.transport.write_all(answer)?;
        let config = Some(websocket_config());
        let context = WebSocketContext::from_partially_read(received, Role::Server, config);
        self.frames = Some(Box::new(Frames { context, rest: Bytes::new() }));
        Ok(())
    }

    /// Reads what the client sent; 0 at its end. `Interrupted` if something other than that came, or so
    /// much that it is others' turn: there may be more.
    pub(crate) fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.transport.budget = READ;
        let Some(frames) = &mut self.frames else { return self.transport.read(buffer) };
        if frames.rest.is_empty() {
            match frames.context.read(&mut self.transport) {
                Ok(Message::Binary(bytes)) if bytes.is_empty() => {
                    return Err(io::ErrorKind::Interrupted.into());
                }
                Ok(Message::Binary(bytes)) => frames.rest = bytes,
                Ok(Message::Text(_)) => {
                    let text = "text on a SPICE WebSocket";
                    return Err(io::Error::new(io::ErrorKind::InvalidData, text));
                }
                Ok(_) => return Err(io::ErrorKind::Interrupted.into()),
                Err(error) => return meaning(error).map(|()| 0),
            }
        }
        let count = frames.rest.len().min(buffer.len());
        let taken = frames.rest.split_to(count);
        buffer.get_mut(..count).unwrap_or_default().copy_from_slice(&taken);
        Ok(count)
    }

    /// From now on SPICE messages are sent, after `before` bytes of the link.
    pub(crate) fn begin_messages(&mut self, kind: HeaderKind, before: usize) {
        self.ends = Some(MessageEnds::new(kind, before));
    }

    /// Takes some bytes for sending; what was taken before may not all be with the kernel yet.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.flush()?;
        let Some(frames) = &mut self.frames else {
            return match &mut self.ends {
                Some(ends) => self.transport.write_messages(bytes, ends),
                None => self.transport.write(bytes),
            };
        };
        let part = bytes.get(..PART).unwrap_or(bytes);
        let message = Message::Binary(Bytes::copy_from_slice(part));
        // A frame that finds no room is kept.
        later(frames.context.write(&mut self.transport, message).or_else(ended))?;
        later(self.flush())?;
        Ok(part.len())
    }

    /// Hands the kernel what was taken; `WouldBlock` if that is not possible now.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        match &mut self.frames {
            None => self.transport.flush(),
            Some(frames) => frames.context.flush(&mut self.transport).or_else(ended),
        }
    }

    /// Bytes taken from the socket so far, whatever they meant.
    pub(crate) fn bytes_taken(&self) -> u64 {
        self.transport.taken
    }

    pub(crate) fn is_websocket(&self) -> bool {
        self.frames.is_some()
    }

    /// Whether [`read`](Self::read) has to be called until it says `WouldBlock`: there may be
    /// something although the socket is empty.
    pub(crate) fn is_layered(&self) -> bool {
        self.frames.is_some() || matches!(self.transport.layer, Layer::Tls(_))
    }

    /// Whether nobody on the way can read along: TLS, or a Unix socket.
    pub(crate) fn is_secure(&self) -> bool {
        matches!(self.transport.layer, Layer::Tls(_))
            || matches!(self.transport.socket, Socket::Unix(_))
    }

    /// The layers, for people: `tcp`, `tcp+tls1.3+websocket`.
    pub(crate) fn describe(&self) -> String {
        let mut text = match self.transport.socket {
            Socket::Tcp(_) => "tcp".to_owned(),
            Socket::Unix(_) => "unix".to_owned(),
        };
        if let Layer::Tls(tls) = &self.transport.layer {
            text.push_str(match tls.protocol_version() {
                Some(rustls::ProtocolVersion::TLSv1_2) => "+tls1.2",
                Some(rustls::ProtocolVersion::TLSv1_3) => "+tls1.3",
                _ => "+tls",
            });
        }
        if self.frames.is_some() {
            text.push_str("+websocket");
        }
        text
    }

    /// Says that this is the end, as far as the socket has room for it.
    pub(crate) fn close(&mut self) {
        if let Some(frames) = &mut self.frames {
            let _ = frames.context.close(&mut self.transport, None);
        }
        if let Layer::Tls(tls) = &mut self.transport.layer {
            tls.send_close_notify();
        }
        let _ = self.flush();
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.transport.socket.as_fd()
    }
}

/// What an error of the WebSocket means for the bytes: their end (`Ok`), or an error.
fn meaning(error: tungstenite::Error) -> io::Result<()> {
    match error {
        tungstenite::Error::ConnectionClosed | tungstenite::Error::AlreadyClosed => Ok(()),
        tungstenite::Error::Io(error) => Err(error),
        error => Err(io::Error::new(io::ErrorKind::InvalidData, error)),
    }
}

/// The same while writing, where the end is one of the errors.
fn ended(error: tungstenite::Error) -> io::Result<()> {
    meaning(error).and_then(|()| Err(io::ErrorKind::BrokenPipe.into()))
}

fn websocket_config() -> WebSocketConfig {
    WebSocketConfig::default()
        .read_buffer_size(4096)
        .write_buffer_size(0)
        .max_write_buffer_size(2 * PART + 1024)
        .max_message_size(Some(MAX_MESSAGE))
        .max_frame_size(Some(MAX_MESSAGE))
}

/// Frames of a client, in pieces, as a fuzzer makes them.
pub(crate) fn fuzz_frames<'a>(received: Vec<u8>, parts: &mut impl Iterator<Item = &'a [u8]>) {
    struct Pieces<'b>(&'b [u8]);
    impl Read for Pieces<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            match self.0.read(buffer)? {
                0 => Err(io::ErrorKind::WouldBlock.into()),
                count => Ok(count),
            }
        }
    }
    impl Write for Pieces<'_> {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let config = Some(websocket_config());
    let mut context = WebSocketContext::from_partially_read(received, Role::Server, config);
    let mut pieces = Pieces(&[]);
    loop {
        match context.read(&mut pieces) {
            Ok(message) => assert!(message.len() <= MAX_MESSAGE),
            Err(tungstenite::Error::Io(_)) => match parts.next() {
                Some(part) => pieces = Pieces(part),
                None => return,
            },
            Err(_) => return,
        }
    }
}

#[cfg(test)]
#[path = "../../examples/soak-peer/tls.rs"]
#[allow(missing_docs, unreachable_pub, reason = "a part of an example")]
mod client;

#[cfg(test)]
mod tests {
    use std::{path::Path, process::Command, sync::mpsc, thread};

    use super::*;

    fn pair() -> (Socket, UnixStream) {
        let (server, client) = UnixStream::pair().unwrap();
        server.set_nonblocking(true).unwrap();
        (Socket::Unix(server), client)
    }

    /// Reads as long as it only says that it was others' turn, and how often that was.
    fn turns(stream: &mut Stream) -> (usize, io::ErrorKind) {
        let mut turns = 0;
        loop {
            let before = stream.bytes_taken();
            let error = stream.read(&mut [0; 64]).expect_err("nothing to read");
            assert!(stream.bytes_taken() - before <= READ as u64);
            if error.kind() != io::ErrorKind::Interrupted {
                return (turns, error.kind());
            }
            turns += 1;
        }
    }

    #[test]
    fn empty_frames_are_read_in_turns() {
        let (socket, mut client) = pair();
        let mut stream = Stream::new(socket, None);
        stream.upgrade(b"answer", vec![0x02, 0x80, 0, 0, 0, 0]).unwrap();
        client.write_all(&[0x00, 0x80, 0, 0, 0, 0].repeat(10_000)).unwrap();
        assert_eq!(turns(&mut stream), (60_000 / READ, io::ErrorKind::WouldBlock));
        // Its end, with something in it.
        client.write_all(&[0x80, 0x81, 0, 0, 0, 0, b'x']).unwrap();
        assert_eq!(stream.read(&mut [0; 64]).unwrap(), 1);
    }

    #[test]
    fn empty_records_end_the_connection() {
        let folder = tempfile::tempdir().unwrap();
        let (key, certificate) = (folder.path().join("key"), folder.path().join("certificate"));
        let made = Command::new("openssl")
            .args(["req", "-x509", "-nodes", "-newkey", "ec", "-pkeyopt"])
            .args(["ec_paramgen_curve:prime256v1", "-subj", "/CN=localhost", "-keyout"])
            .args([&*key, Path::new("-out"), &*certificate])
            .output();
        if !made.is_ok_and(|made| made.status.success()) {
            eprintln!("SKIPPED: openssl is not installed");
            return;
        }
        let config = crate::TlsConfig::from_files(&certificate, &key).unwrap();
        let (socket, peer) = pair();
        let mut stream = Stream::new(socket, Some(config.0));
        let (done, finished) = mpsc::channel();
        let peer = thread::spawn(move || {
            let mut tls = client::connect(peer).unwrap();
            tls.write_all(b"x").unwrap();
            let mut records = client::EmptyRecords::after(tls).unwrap();
            let sent: usize = (0..3).map(|_| records.send().unwrap()).sum();
            done.send(sent).unwrap();
            records
        });
        // The handshake, up to what comes after it.
        let mut buffer = [0; 64];
        while !matches!(stream.read(&mut buffer), Ok(count) if count > 0) {
            rustix::event::poll(
                &mut [rustix::event::PollFd::new(&stream, rustix::event::PollFlags::IN)],
                None,
            )
            .unwrap();
        }
        let sent = finished.recv().unwrap();
        assert!(sent > 2 * READ);
        // The library bears 32 of them.
        assert_eq!(turns(&mut stream), (0, io::ErrorKind::InvalidData));
        drop(peer.join());
    }
}
