//! The guest agent protocol (spice-protocol `vd_agent.h`): messages inside the main channel's agent
//! data, and the chunks that carry them on the guest's virtio port.

use super::{
    DecodeError,
    wire::{Put, Reader},
};
use crate::MonitorConfig;

const PROTOCOL: u32 = 1;
/// Size of a message header: protocol, type, opaque, size.
pub(crate) const HEADER_SIZE: usize = 20;
/// Size of a chunk header on the port: port number, size.
const CHUNK_HEADER_SIZE: usize = 8;
/// Largest chunk to a client or the guest (`VD_AGENT_MAX_DATA_SIZE`).
pub(crate) const MAX_CHUNK: usize = 2048;
/// Most monitors of a configuration; clients send 16.
const MAX_MONITORS: u32 = 64;

/// Port number of chunks between client and agent.
pub(crate) const PORT_CLIENT: u32 = 1;
/// Port number of chunks between server and agent.
pub(crate) const PORT_SERVER: u32 = 2;

/// Message types this server looks at.
pub(crate) const MONITORS_CONFIG: u32 = 2;
pub(crate) const REPLY: u32 = 3;
pub(crate) const CLIPBOARD: u32 = 4;
pub(crate) const ANNOUNCE_CAPABILITIES: u32 = 6;
pub(crate) const CLIPBOARD_GRAB: u32 = 7;
pub(crate) const CLIPBOARD_REQUEST: u32 = 8;
pub(crate) const CLIPBOARD_RELEASE: u32 = 9;
pub(crate) const FILE_XFER_START: u32 = 10;
pub(crate) const FILE_XFER_STATUS: u32 = 11;
pub(crate) const FILE_XFER_DATA: u32 = 12;
pub(crate) const CLIENT_DISCONNECTED: u32 = 13;

/// Capabilities of the server's own agent, and of any agent behind this server, because it answers
/// `MONITORS_CONFIG` itself: MONITORS_CONFIG, REPLY, SPARSE_MONITORS_CONFIG,
/// MONITORS_CONFIG_POSITION.
const SERVER_CAPS: u32 = 1 << 1 | 1 << 2 | 1 << 7 | 1 << 12;

/// The beginning of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) kind: u32,
    pub(crate) opaque: u64,
    pub(crate) size: u32,
}

impl Header {
    pub(crate) fn put(&self, out: &mut Vec<u8>) {
        out.put_u32(PROTOCOL);
        out.put_u32(self.kind);
        out.put_u64(self.opaque);
        out.put_u32(self.size);
    }
}

/// A piece of a message stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Piece<'a> {
    Begin(Header),
    Data(&'a [u8]),
    End,
}

/// Finds the messages in a stream cut anywhere. Holds no message, only a header's first bytes.
#[derive(Debug, Default)]
pub(crate) struct Cutter {
    header: Vec<u8>,
    /// Bytes left of the current message; `None` between messages.
    rest: Option<u32>,
}

impl Cutter {
    /// Takes the next piece from the front of `input`; `None` when more bytes are needed.
    pub(crate) fn next<'a>(
        &mut self,
        input: &mut &'a [u8],
    ) -> Result<Option<Piece<'a>>, DecodeError> {
        let Some(rest) = self.rest else {
            let (head, tail) = input.split_at(input.len().min(HEADER_SIZE - self.header.len()));
            self.header.extend_from_slice(head);
            *input = tail;
            if self.header.len() < HEADER_SIZE {
                return Ok(None);
            }
            let header = decode_header(&self.header)?;
            self.header.clear();
            self.rest = Some(header.size);
            return Ok(Some(Piece::Begin(header)));
        };
        if rest == 0 {
            self.rest = None;
            return Ok(Some(Piece::End));
        }
        if input.is_empty() {
            return Ok(None);
        }
        let (data, tail) = input.split_at(input.len().min(rest as usize));
        *input = tail;
        self.rest = Some(rest - data.len() as u32);
        Ok(Some(Piece::Data(data)))
    }
}

fn decode_header(bytes: &[u8]) -> Result<Header, DecodeError> {
    let mut reader = Reader::new(bytes);
    if reader.u32()? != PROTOCOL {
        return Err(DecodeError::Value("agent protocol"));
    }
    let kind = reader.u32()?;
    let opaque = reader.u64()?;
    Ok(Header { kind, opaque, size: reader.u32()? })
}

/// Finds the chunks on the guest's port. They are of any size: Linux' spice-vdagentd writes every message as one,
/// in spite of `VD_AGENT_MAX_DATA_SIZE`.
#[derive(Debug, Default)]
pub(crate) struct ChunkCutter {
    header: Vec<u8>,
    port: u32,
    rest: u32,
}

impl ChunkCutter {
    /// Takes the next part of a chunk, at most [`MAX_CHUNK`] bytes, with its port, from the front of `input`.
    pub(crate) fn next<'a>(
        &mut self,
        input: &mut &'a [u8],
    ) -> Result<Option<(u32, &'a [u8])>, DecodeError> {
        while self.rest == 0 {
            let missing = CHUNK_HEADER_SIZE - self.header.len();
            let (head, tail) = input.split_at(input.len().min(missing));
            self.header.extend_from_slice(head);
            *input = tail;
            if self.header.len() < CHUNK_HEADER_SIZE {
                return Ok(None);
            }
            let mut reader = Reader::new(&self.header);
            self.port = reader.u32()?;
            self.rest = reader.u32()?;
            self.header.clear();
            if !matches!(self.port, PORT_CLIENT | PORT_SERVER) {
                return Err(DecodeError::Value("agent port"));
            }
        }
        if input.is_empty() {
            return Ok(None);
        }
        let (data, tail) = input.split_at(input.len().min(self.rest as usize).min(MAX_CHUNK));
        *input = tail;
        self.rest -= data.len() as u32;
        Ok(Some((self.port, data)))
    }
}

/// Appends `data` as chunks for a port.
pub(crate) fn put_chunks(out: &mut Vec<u8>, port: u32, data: &[u8]) {
    for chunk in data.chunks(MAX_CHUNK) {
        out.put_u32(port);
        out.put_u32(chunk.len() as u32);
        out.extend_from_slice(chunk);
    }
}

/// A whole message.
pub(crate) fn message(kind: u32, body: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER_SIZE + body.len());
    Header { kind, opaque: 0, size: body.len() as u32 }.put(&mut out);
    out.extend_from_slice(body);
    out
}

/// A whole `CLIENT_DISCONNECTED`.
pub(crate) fn client_disconnected() -> Vec<u8> {
    message(CLIENT_DISCONNECTED, &[])
}

/// A whole `REPLY` that says a message of type `to` was carried out.
pub(crate) fn success_reply(to: u32) -> Vec<u8> {
    const SUCCESS: u32 = 1;
    let mut body = Vec::new();
    body.put_u32(to);
    body.put_u32(SUCCESS);
    message(REPLY, &body)
}

/// A whole `ANNOUNCE_CAPABILITIES` of the server's own agent.
pub(crate) fn server_capabilities() -> Vec<u8> {
    let mut body = Vec::new();
    body.put_u32(0);
    body.put_u32(SERVER_CAPS);
    message(ANNOUNCE_CAPABILITIES, &body)
}

/// Whether the body of an `ANNOUNCE_CAPABILITIES` asks for one in return.
pub(crate) fn wants_capabilities(body: &[u8]) -> bool {
    Reader::new(body).u32().is_ok_and(|request| request != 0)
}

/// Adds what the server does itself to the body of a guest agent's `ANNOUNCE_CAPABILITIES`.
pub(crate) fn add_server_capabilities(body: &mut [u8]) {
    change_capabilities(body, 0, SERVER_CAPS);
}

/// Withdraws and adds capabilities in the body of an `ANNOUNCE_CAPABILITIES`.
pub(crate) fn change_capabilities(body: &mut [u8], withdraw: u32, add: u32) {
    if let Some(word) = body.get_mut(4..).and_then(|rest| rest.first_chunk_mut()) {
        *word = (u32::from_le_bytes(*word) & !withdraw | add).to_le_bytes();
    }
}

/// The first word of capabilities in the body of an `ANNOUNCE_CAPABILITIES`.
pub(crate) fn capabilities(body: &[u8]) -> u32 {
    body.get(4..).and_then(|rest| rest.first_chunk()).map_or(0, |word| u32::from_le_bytes(*word))
}

/// The capability to say that there is something to paste before it is asked for.
pub(crate) const CAP_CLIPBOARD_BY_DEMAND: u32 = 1 << 5;
/// The capability to name a selection (clipboard, primary) in clipboard messages: four bytes in front.
pub(crate) const CAP_CLIPBOARD_SELECTION: u32 = 1 << 6;
/// The capability to be told exactly why a file is not taken.
pub(crate) const CAP_FILE_XFER_DETAILED_ERRORS: u32 = 1 << 14;

/// A whole `FILE_XFER_STATUS` that refuses the transfer with this number.
pub(crate) fn file_refused(id: u32, detailed: bool) -> Vec<u8> {
    const CANCELLED: u32 = 1;
    const DISABLED: u32 = 7;
    let mut body = Vec::new();
    body.put_u32(id);
    body.put_u32(if detailed { DISABLED } else { CANCELLED });
    message(FILE_XFER_STATUS, &body)
}

/// Decodes the body of `MONITORS_CONFIG`: one entry per display, `None` for a disabled one.
pub(crate) fn decode_monitors(body: &[u8]) -> Result<Vec<Option<MonitorConfig>>, DecodeError> {
    const FLAG_PHYSICAL_SIZE: u32 = 2;
    let mut reader = Reader::new(body);
    let count = reader.u32()?;
    let flags = reader.u32()?;
    if count > MAX_MONITORS {
        return Err(DecodeError::Value("number of monitors"));
    }
    let mut monitors = Vec::new();
    for _ in 0..count {
        let height = reader.u32()?;
        let width = reader.u32()?;
        let _depth = reader.u32()?;
        let x = reader.i32()?;
        let y = reader.i32()?;
        let monitor = MonitorConfig { width, height, x, y, width_mm: 0, height_mm: 0 };
        monitors.push((width > 0 && height > 0).then_some(monitor));
    }
    if flags & FLAG_PHYSICAL_SIZE != 0 {
        for monitor in &mut monitors {
            let height_mm = reader.u16()?;
            let width_mm = reader.u16()?;
            if let Some(monitor) = monitor {
                monitor.width_mm = width_mm;
                monitor.height_mm = height_mm;
            }
        }
    }
    Ok(monitors)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All messages of a stream fed in parts of this size.
    fn messages(stream: &[u8], part: usize) -> Vec<(u32, Vec<u8>)> {
        let mut cutter = Cutter::default();
        let mut found: Vec<(u32, Vec<u8>)> = Vec::new();
        let mut ended = 0;
        for mut input in stream.chunks(part) {
            while let Some(piece) = cutter.next(&mut input).unwrap() {
                match piece {
                    Piece::Begin(header) => found.push((header.kind, Vec::new())),
                    Piece::Data(data) => found.last_mut().unwrap().1.extend_from_slice(data),
                    Piece::End => ended += 1,
                }
            }
        }
        assert_eq!(ended, found.len());
        assert_eq!(cutter.rest, None);
        found
    }

    #[test]
    fn messages_are_found_however_they_are_cut() {
        let mut stream = client_disconnected();
        stream.extend(message(4, &[7; 5000]));
        stream.extend(success_reply(2));
        for part in [1, 3, 19, 20, 21, 2048, 9999] {
            let found = messages(&stream, part);
            assert_eq!(found.len(), 3);
            assert_eq!(found[0], (CLIENT_DISCONNECTED, vec![]));
            assert_eq!(found[1], (4, vec![7; 5000]));
            assert_eq!(found[2], (REPLY, vec![2, 0, 0, 0, 1, 0, 0, 0]));
        }
    }

    #[test]
    fn wrong_protocol_is_an_error() {
        let mut bytes = client_disconnected();
        bytes[0] = 2;
        let mut input = &bytes[..];
        assert!(Cutter::default().next(&mut input).is_err());
    }

    #[test]
    fn chunks_round_trip() {
        let mut wire = Vec::new();
        put_chunks(&mut wire, PORT_CLIENT, &[1; 5000]);
        put_chunks(&mut wire, PORT_SERVER, &[2; 3]);
        assert_eq!(wire.len(), 5003 + 4 * 8);
        for part in [1, 7, 4096] {
            let mut cutter = ChunkCutter::default();
            let mut ports = [0; 3];
            for mut input in wire.chunks(part) {
                while let Some((port, data)) = cutter.next(&mut input).unwrap() {
                    ports[port as usize] += data.len();
                }
            }
            assert_eq!(ports, [0, 5000, 3]);
        }
    }

    #[test]
    fn a_chunk_of_any_size_comes_in_parts() {
        let mut wire = Vec::new();
        wire.put_u32(PORT_CLIENT);
        wire.put_u32(70_000);
        wire.resize(8 + 70_000, 3);
        put_chunks(&mut wire, PORT_SERVER, &[4]);
        let (mut cutter, mut input) = (ChunkCutter::default(), &wire[..]);
        let mut sizes = [0; 3];
        while let Some((port, data)) = cutter.next(&mut input).unwrap() {
            assert!(data.len() <= MAX_CHUNK);
            sizes[port as usize] += data.len();
        }
        assert_eq!(sizes, [0, 70_000, 1]);
        assert!(cutter.next(&mut &[3, 0, 0, 0, 1, 0, 0, 0][..]).is_err(), "no such port");
    }

    #[test]
    fn monitors() {
        let mut body = Vec::new();
        for word in [2u32, 3, 768, 1030, 32, 0, 0, 0, 0, 0, 0, 0] {
            body.put_u32(word);
        }
        for mm in [200u16, 300, 0, 0] {
            body.put_u16(mm);
        }
        let wanted =
            MonitorConfig { width: 1030, height: 768, x: 0, y: 0, width_mm: 300, height_mm: 200 };
        assert_eq!(decode_monitors(&body), Ok(vec![Some(wanted), None]));
        for end in 0..body.len() {
            assert_eq!(decode_monitors(&body[..end]), Err(DecodeError::Truncated));
        }
        body[0..4].copy_from_slice(&65u32.to_le_bytes());
        assert_eq!(decode_monitors(&body), Err(DecodeError::Value("number of monitors")));
    }

    #[test]
    fn capabilities() {
        let own = server_capabilities();
        assert!(!wants_capabilities(&own[HEADER_SIZE..]));
        let mut body = vec![1, 0, 0, 0, 0b1000, 0, 0, 0];
        assert!(wants_capabilities(&body));
        add_server_capabilities(&mut body);
        assert_eq!(body[4..], (SERVER_CAPS | 8).to_le_bytes());
        add_server_capabilities(&mut [0; 6]);
    }
}
