//! A client's connection in any layers, as far as a channel's first message, and what comes after it from
//! one who means no good.

use std::{
    io::{self, Read, Write},
    net::{IpAddr, SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use rsa::{Oaep, RsaPublicKey, pkcs8::DecodePublicKey, rand_core::OsRng};
use rustls::{ClientConnection, StreamOwned};
use tungstenite::{
    Message,
    protocol::{Role, WebSocket},
};

use super::tls::{self, EmptyRecords};

/// Anything bytes go through.
pub trait Line: Read + Write + Send {}
impl<T: Read + Write + Send> Line for T {}

/// What is between SPICE and the socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layers {
    pub tls: bool,
    pub web: bool,
}

impl Layers {
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "plain" => Self { tls: false, web: false },
            "web" => Self { tls: false, web: true },
            "tls" => Self { tls: true, web: false },
            "tls+web" => Self { tls: true, web: true },
            _ => return None,
        })
    }
}

type Tls = StreamOwned<ClientConnection, TcpStream>;

enum Connection {
    Plain(TcpStream),
    Tls(Box<Tls>),
    Web(Box<WebSocket<Box<dyn Line>>>),
}

pub struct Peer {
    connection: Connection,
    received: Vec<u8>,
}

impl Peer {
    /// Connects, from an address of its own if it is to have one.
    pub fn connect(to: SocketAddr, from: Option<IpAddr>, layers: Layers) -> io::Result<Self> {
        use rustix::net::{AddressFamily, SocketType, bind, connect, socket};
        let socket = socket(AddressFamily::INET, SocketType::STREAM, None)?;
        if let Some(from) = from {
            bind(&socket, &SocketAddr::new(from, 0))?;
        }
        connect(&socket, &to)?;
        let socket = TcpStream::from(socket);
        socket.set_read_timeout(Some(Duration::from_secs(30)))?;
        socket.set_write_timeout(Some(Duration::from_secs(30)))?;
        let connection = match layers {
            Layers { tls: false, web: false } => Connection::Plain(socket),
            Layers { tls: true, web: false } => Connection::Tls(Box::new(tls::connect(socket)?)),
            Layers { tls: false, web: true } => web_socket(Box::new(socket), to)?,
            Layers { tls: true, web: true } => web_socket(Box::new(tls::connect(socket)?), to)?,
        };
        Ok(Self { connection, received: Vec::new() })
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        match &mut self.connection {
            Connection::Plain(line) => line.write_all(bytes),
            Connection::Tls(line) => line.write_all(bytes),
            Connection::Web(line) => {
                line.send(Message::Binary(bytes.to_vec().into())).map_err(io::Error::other)
            }
        }
    }

    fn take(&mut self, count: usize) -> io::Result<Vec<u8>> {
        while self.received.len() < count {
            let mut buffer = [0; 4096];
            let more = match &mut self.connection {
                Connection::Plain(line) => line.read(&mut buffer)?,
                Connection::Tls(line) => line.read(&mut buffer)?,
                Connection::Web(line) => {
                    let message = line.read().map_err(io::Error::other)?;
                    self.received.extend_from_slice(&message.into_data());
                    continue;
                }
            };
            if more == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.received.extend_from_slice(&buffer[..more]);
        }
        Ok(self.received.drain(..count).collect())
    }

    /// The link of a channel up to its key.
    pub fn begin_link(&mut self, session: u32, kind: u8) -> io::Result<Vec<u8>> {
        // One word of capabilities for all channels: selection of the mechanism, ticket, mini header.
        self.begin_link_with(session, (kind, 0), &[0xb], &[])
    }

    /// The same of one channel of several, by a client that says it can do this and that.
    pub fn begin_link_with(
        &mut self,
        session: u32,
        channel: (u8, u8),
        common: &[u32],
        more: &[u32],
    ) -> io::Result<Vec<u8>> {
        let mut common = common.to_vec();
        if common.is_empty() {
            common.push(0);
        }
        // This client always selects the ticket.
        common[0] |= 3;
        let mut hello = b"REDQ".to_vec();
        let size = 18 + 4 * (common.len() + more.len()) as u32;
        for word in [2, 2, size, session] {
            hello.extend_from_slice(&word.to_le_bytes());
        }
        hello.extend_from_slice(&[channel.0, channel.1]);
        let words = [common.len() as u32, more.len() as u32, 18];
        for word in words.iter().chain(&common).chain(more) {
            hello.extend_from_slice(&word.to_le_bytes());
        }
        self.send(&hello)?;
        let reply = self.take(16 + 178 + 8)?;
        match word(&reply[16..]) {
            0 => Ok(reply[20..182].to_vec()),
            code => Err(io::Error::other(format!("link refused: {code}"))),
        }
    }

    /// The session's number, out of a main channel's first message with a mini header or a full one.
    pub fn session(&mut self, mini: bool) -> io::Result<u32> {
        self.take(if mini { 6 } else { 18 })?;
        Ok(word(&self.take(32)?))
    }

    /// The socket of a client without layers.
    pub fn into_socket(self) -> io::Result<TcpStream> {
        match self.connection {
            Connection::Plain(socket) => Ok(socket),
            _ => Err(io::Error::other("there are layers")),
        }
    }

    /// Sends the ticket.
    pub fn send_ticket(&mut self, key: &[u8], password: &str) -> io::Result<()> {
        let key = RsaPublicKey::from_public_key_der(key).map_err(io::Error::other)?;
        let text = [password.as_bytes(), b"\0"].concat();
        let ticket =
            key.encrypt(&mut OsRng, Oaep::new::<sha1::Sha1>(), &text).map_err(io::Error::other)?;
        self.send(&[&1u32.to_le_bytes()[..], &ticket].concat())
    }

    /// The answer to a ticket: 0 if it was right.
    pub fn result(&mut self) -> io::Result<u32> {
        Ok(word(&self.take(4)?))
    }

    /// A whole link.
    pub fn link(&mut self, session: u32, kind: u8, password: &str) -> io::Result<()> {
        let key = self.begin_link(session, kind)?;
        self.send_ticket(&key, password)?;
        match self.result()? {
            0 => Ok(()),
            code => Err(io::Error::other(format!("ticket refused: {code}"))),
        }
    }

    /// The next message of the channel: type and body.
    pub fn message(&mut self) -> io::Result<(u16, Vec<u8>)> {
        let header = self.take(6)?;
        let body = self.take(word(&header[2..]) as usize)?;
        Ok((u16::from_le_bytes([header[0], header[1]]), body))
    }

    /// Sends frames or records with nothing in them, as fast as they are taken, for so long. An error if
    /// it is cut off.
    pub fn send_nothing(self, time: Duration) -> io::Result<()> {
        /// A binary message that never ends: its beginning, then continuations (RFC 6455, 5.4).
        const BEGIN: &[u8] = &[0x02, 0x80, 0, 0, 0, 0];
        const CONTINUE: &[u8] = &[0x00, 0x80, 0, 0, 0, 0];
        let end = Instant::now() + time;
        match self.connection {
            Connection::Plain(mut line) => {
                // There is no nothing without layers: it says little, and wrong.
                while Instant::now() < end {
                    line.write_all(b"R")?;
                }
            }
            Connection::Tls(line) => {
                let mut records = EmptyRecords::after(*line)?;
                while Instant::now() < end {
                    records.send()?;
                }
            }
            Connection::Web(mut socket) => {
                let line = socket.get_mut();
                line.write_all(BEGIN)?;
                let many = CONTINUE.repeat(2730);
                while Instant::now() < end {
                    line.write_all(&many)?;
                }
            }
        }
        Ok(())
    }
}

fn word(bytes: &[u8]) -> u32 {
    u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

fn web_socket(mut line: Box<dyn Line>, to: SocketAddr) -> io::Result<Connection> {
    let request = format!(
        "GET / HTTP/1.1\r\nHost: {to}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
         Sec-WebSocket-Protocol: binary\r\n\r\n"
    );
    line.write_all(request.as_bytes())?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        line.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    if !head.starts_with(b"HTTP/1.1 101") {
        return Err(io::Error::other("no WebSocket"));
    }
    Ok(Connection::Web(Box::new(WebSocket::from_raw_socket(line, Role::Client, None))))
}
