//! The link stage, before a connection is a channel (spice-protocol `SpiceLinkHeader`,
//! `SpiceLinkMess`, `SpiceLinkReply`): hello, public key, ticket, result.

use super::{
    channel::{
        COMMON_CAP_AUTH_SELECTION, COMMON_CAP_AUTH_SPICE, COMMON_CAP_MINI_HEADER, Caps,
        ChannelType, cap_word,
    },
    framing::HeaderKind,
    wire::{Put, Reader},
};

const MAGIC: [u8; 4] = *b"REDQ";
const VERSION_MAJOR: u32 = 2;
const VERSION_MINOR: u32 = 2;
const HEADER_SIZE: usize = 16;
const MESSAGE_SIZE: usize = 18;
const MAX_MESSAGE: usize = 4096;
const MAX_CAP_WORDS: u32 = 256;
const AUTH_MECHANISM_SPICE: u32 = 1;

/// Size of an encrypted ticket: one RSA-1024 block.
pub(crate) const TICKET_SIZE: usize = 128;
/// Size of the public key in the link reply: a DER SubjectPublicKeyInfo of RSA-1024.
pub(crate) const PUBLIC_KEY_SIZE: usize = 162;

/// Result codes (`SpiceLinkErr`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum LinkCode {
    Ok = 0,
    Error = 1,
    BadMagic = 2,
    InvalidData = 3,
    VersionMismatch = 4,
    /// This channel needs TLS.
    NeedSecured = 5,
    PermissionDenied = 7,
    BadConnectionId = 8,
    ChannelNotAvailable = 9,
}

/// What a client wants to open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LinkRequest {
    /// 0 for the main channel of a new session, else the session to join.
    pub(crate) connection_id: u32,
    /// Channel type as sent; it may be one this server does not have.
    pub(crate) channel_type: u8,
    pub(crate) channel_id: u8,
    pub(crate) common_caps: Caps,
    pub(crate) channel_caps: Caps,
}

impl LinkRequest {
    /// Whether the client draws images that are other surfaces, as far as can be guessed; no capability tells:
    /// ryll 0.3 sends all that there are about surfaces, and draws nothing for one. spice-gtk does draw
    /// them; it is told by taking tickets without saying so (`AUTH_SPICE`).
    pub(crate) fn copies_surfaces(&self) -> bool {
        !self.common_caps.has(COMMON_CAP_AUTH_SPICE)
    }

    pub(crate) fn header_kind(&self) -> HeaderKind {
        if self.common_caps.has(COMMON_CAP_MINI_HEADER) {
            HeaderKind::Mini
        } else {
            HeaderKind::Data
        }
    }

    pub(crate) fn known_type(&self) -> Option<ChannelType> {
        ChannelType::from_wire(self.channel_type)
    }
}

/// What happened on a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum LinkEvent {
    /// The client said what it wants: answer with [`ServerLink::accept`] or
    /// [`ServerLink::reject`].
    Request(LinkRequest),
    /// The client sent its ticket: answer with [`ServerLink::finish`].
    Ticket(Box<[u8; TICKET_SIZE]>),
    /// The bytes are wrong: answer with [`ServerLink::fail`] and close.
    Failure(LinkCode),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Hello,
    AwaitDecision,
    Mechanism,
    Ticket,
    AwaitResult,
    Done,
}

/// The server's side of one link.
#[derive(Debug)]
pub(crate) struct ServerLink {
    stage: Stage,
    buffer: Vec<u8>,
    selection: bool,
}

impl ServerLink {
    pub(crate) fn new() -> Self {
        Self { stage: Stage::Hello, buffer: Vec::new(), selection: false }
    }

    /// Whether nothing was received yet.
    pub(crate) fn is_fresh(&self) -> bool {
        self.stage == Stage::Hello && self.buffer.is_empty()
    }

    /// Adds received bytes. The caller bounds how many it adds between two calls of
    /// [`poll`](Self::poll); a client that floods is cut off by [`overflowed`](Self::overflowed).
    pub(crate) fn receive(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// Whether the client sent more than any honest one does at this stage.
    pub(crate) fn overflowed(&self) -> bool {
        self.buffer.len() > HEADER_SIZE + MAX_MESSAGE + TICKET_SIZE + 16384
    }

    /// Bytes after the ticket: the beginning of the channel's messages.
    pub(crate) fn into_rest(self) -> Vec<u8> {
        self.buffer
    }

    /// What the bytes so far mean; `None` until more come.
    pub(crate) fn poll(&mut self) -> Option<LinkEvent> {
        match self.stage {
            Stage::Hello => self.poll_hello(),
            Stage::Mechanism => {
                let mechanism = u32::from_le_bytes(*self.buffer.first_chunk()?);
                self.buffer.drain(..4);
                if mechanism != AUTH_MECHANISM_SPICE {
                    self.stage = Stage::Done;
                    return Some(LinkEvent::Failure(LinkCode::InvalidData));
                }
                self.stage = Stage::Ticket;
                self.poll()
            }
            Stage::Ticket => {
                let ticket: [u8; TICKET_SIZE] = *self.buffer.first_chunk()?;
                self.buffer.drain(..TICKET_SIZE);
                self.stage = Stage::AwaitResult;
                Some(LinkEvent::Ticket(Box::new(ticket)))
            }
            Stage::AwaitDecision | Stage::AwaitResult | Stage::Done => None,
        }
    }

    fn poll_hello(&mut self) -> Option<LinkEvent> {
        let fail = |link: &mut Self, code| {
            link.stage = Stage::Done;
            Some(LinkEvent::Failure(code))
        };
        // A stranger (an HTTP client, say) is told at once, not after a timeout.
        let seen = self.buffer.len().min(4);
        if self.buffer[..seen] != MAGIC[..seen] {
            return fail(self, LinkCode::BadMagic);
        }
        let mut reader = Reader::new(self.buffer.get(4..HEADER_SIZE)?);
        let (Ok(major), Ok(_minor), Ok(size)) = (reader.u32(), reader.u32(), reader.u32()) else {
            return None;
        };
        if major != VERSION_MAJOR {
            return fail(self, LinkCode::VersionMismatch);
        }
        let size = size as usize;
        if !(MESSAGE_SIZE..=MAX_MESSAGE).contains(&size) {
            return fail(self, LinkCode::InvalidData);
        }
        let body = self.buffer.get(HEADER_SIZE..HEADER_SIZE + size)?;
        let Some(request) = decode_request(body) else {
            return fail(self, LinkCode::InvalidData);
        };
        self.buffer.drain(..HEADER_SIZE + size);
        self.selection = request.common_caps.has(COMMON_CAP_AUTH_SELECTION);
        self.stage = Stage::AwaitDecision;
        Some(LinkEvent::Request(request))
    }

    /// Answers a request with the key to encrypt the ticket with.
    pub(crate) fn accept(
        &mut self,
        key: &[u8; PUBLIC_KEY_SIZE],
        channel_caps: u32,
        out: &mut Vec<u8>,
    ) {
        self.stage = if self.selection { Stage::Mechanism } else { Stage::Ticket };
        put_reply(LinkCode::Ok, key, channel_caps, out);
    }

    /// Answers a request with an error; the connection ends.
    pub(crate) fn reject(&mut self, code: LinkCode, out: &mut Vec<u8>) {
        self.stage = Stage::Done;
        put_reply(code, &[0; PUBLIC_KEY_SIZE], 0, out);
    }

    /// Answers wrong bytes, in the form that fits the stage they came at.
    pub(crate) fn fail(&mut self, code: LinkCode, out: &mut Vec<u8>) {
        // Only the mechanism can be wrong after the reply has been sent; it asks for a bare code.
        if code == LinkCode::InvalidData && self.selection {
            out.put_u32(code as u32);
        } else {
            put_reply(code, &[0; PUBLIC_KEY_SIZE], 0, out);
        }
        self.stage = Stage::Done;
    }

    /// Answers the ticket. With [`LinkCode::Ok`] the connection is a channel now.
    pub(crate) fn finish(&mut self, code: LinkCode, out: &mut Vec<u8>) {
        self.stage = Stage::Done;
        out.put_u32(code as u32);
    }
}

fn decode_request(body: &[u8]) -> Option<LinkRequest> {
    let mut reader = Reader::new(body);
    let connection_id = reader.u32().ok()?;
    let channel_type = reader.u8().ok()?;
    let channel_id = reader.u8().ok()?;
    let common = reader.u32().ok()?;
    let channel = reader.u32().ok()?;
    let offset = reader.u32().ok()?;
    if common > MAX_CAP_WORDS || channel > MAX_CAP_WORDS {
        return None;
    }
    let mut words = Reader::new(body.get(offset as usize..)?);
    let mut take = |count: u32| (0..count).map(|_| words.u32().ok()).collect::<Option<Vec<_>>>();
    let common_caps = Caps(take(common)?);
    let channel_caps = Caps(take(channel)?);
    Some(LinkRequest { connection_id, channel_type, channel_id, common_caps, channel_caps })
}

fn put_reply(code: LinkCode, key: &[u8; PUBLIC_KEY_SIZE], channel_caps: u32, out: &mut Vec<u8>) {
    const CAPS_OFFSET: u32 = 178;
    out.extend_from_slice(&MAGIC);
    out.put_u32(VERSION_MAJOR);
    out.put_u32(VERSION_MINOR);
    out.put_u32(CAPS_OFFSET + 8);
    out.put_u32(code as u32);
    out.extend_from_slice(key);
    out.put_u32(1);
    out.put_u32(1);
    out.put_u32(CAPS_OFFSET);
    out.put_u32(cap_word(&[
        COMMON_CAP_AUTH_SELECTION,
        COMMON_CAP_AUTH_SPICE,
        COMMON_CAP_MINI_HEADER,
    ]));
    out.put_u32(channel_caps);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(connection_id: u32, kind: u8, common: &[u32], channel: &[u32]) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.put_u32(2);
        out.put_u32(2);
        out.put_u32(18 + 4 * (common.len() + channel.len()) as u32);
        out.put_u32(connection_id);
        out.put_u8(kind);
        out.put_u8(0);
        out.put_u32(common.len() as u32);
        out.put_u32(channel.len() as u32);
        out.put_u32(18);
        for word in common.iter().chain(channel) {
            out.put_u32(*word);
        }
        out
    }

    #[test]
    fn whole_link_byte_by_byte() {
        // 0xd = selection, SASL, mini header: what spice-gtk sends, without the AUTH_SPICE bit.
        let mut wire = hello(7, 2, &[0xd], &[0x20]);
        wire.extend_from_slice(&1u32.to_le_bytes());
        wire.extend_from_slice(&[0x5a; TICKET_SIZE]);
        wire.extend_from_slice(b"rest");
        let mut link = ServerLink::new();
        let mut out = Vec::new();
        let mut events = Vec::new();
        for byte in wire {
            link.receive(&[byte]);
            while let Some(event) = link.poll() {
                if let LinkEvent::Request(request) = &event {
                    assert_eq!(request.connection_id, 7);
                    assert_eq!(request.known_type(), Some(ChannelType::Display));
                    assert!(request.channel_caps.has(5));
                    assert_eq!(request.header_kind(), HeaderKind::Mini);
                    assert!(request.copies_surfaces());
                    link.accept(&[3; PUBLIC_KEY_SIZE], 0x42, &mut out);
                    assert_eq!(out.len(), 16 + 178 + 8);
                }
                events.push(event);
            }
        }
        assert_eq!(events.len(), 2);
        assert_eq!(events[1], LinkEvent::Ticket(Box::new([0x5a; TICKET_SIZE])));
        link.finish(LinkCode::Ok, &mut out);
        assert_eq!(out.len(), 16 + 178 + 8 + 4);
        assert_eq!(link.into_rest(), b"rest");
    }

    fn first_event(bytes: &[u8]) -> Option<LinkEvent> {
        let mut link = ServerLink::new();
        link.receive(bytes);
        link.poll()
    }

    #[test]
    fn strangers_are_told_what_is_wrong() {
        let code = |bytes: &[u8]| match first_event(bytes) {
            Some(LinkEvent::Failure(code)) => Some(code),
            _ => None,
        };
        assert_eq!(code(b"GET"), Some(LinkCode::BadMagic));
        assert_eq!(code(b"RED"), None);
        let good = hello(0, 1, &[0xd], &[0xf]);
        let mut version = good.clone();
        version[4] = 9;
        assert_eq!(code(&version), Some(LinkCode::VersionMismatch));
        let mut size = good.clone();
        size[14] = 0xff;
        assert_eq!(code(&size), Some(LinkCode::InvalidData));
        let mut caps = good.clone();
        caps[16 + 6..16 + 10].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(code(&caps), Some(LinkCode::InvalidData));
        let mut offset = good.clone();
        offset[16 + 14..16 + 18].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(code(&offset), Some(LinkCode::InvalidData));
        for end in 0..good.len() {
            assert_eq!(first_event(&good[..end]), None, "truncated at {end}");
        }
        assert!(matches!(first_event(&good), Some(LinkEvent::Request(_))));
    }

    #[test]
    fn without_selection_the_ticket_follows_at_once_and_sasl_is_refused() {
        let mut link = ServerLink::new();
        link.receive(&hello(0, 1, &[0], &[]));
        assert!(matches!(link.poll(), Some(LinkEvent::Request(_))));
        link.accept(&[0; PUBLIC_KEY_SIZE], 0, &mut Vec::new());
        link.receive(&[1; TICKET_SIZE]);
        assert!(matches!(link.poll(), Some(LinkEvent::Ticket(_))));

        let mut link = ServerLink::new();
        link.receive(&hello(0, 1, &[0xd], &[]));
        link.poll();
        link.accept(&[0; PUBLIC_KEY_SIZE], 0, &mut Vec::new());
        link.receive(&2u32.to_le_bytes());
        assert_eq!(link.poll(), Some(LinkEvent::Failure(LinkCode::InvalidData)));
        let mut out = Vec::new();
        link.fail(LinkCode::InvalidData, &mut out);
        assert_eq!(out, 3u32.to_le_bytes());
    }
}
