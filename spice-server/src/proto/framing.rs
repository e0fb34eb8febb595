//! Message headers: the mini header (`{type u16, size u32}`) and the old data header
//! (`{serial u64, type u16, size u32, sub_list u32}`), chosen by the link capabilities.

use super::{DecodeError, wire::Put};

const MINI_HEADER: usize = 6;
const DATA_HEADER: usize = 18;

/// Which header the messages of a connection have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HeaderKind {
    Mini,
    Data,
}

/// Writes messages.
#[derive(Debug)]
pub(crate) struct Framer {
    kind: HeaderKind,
    serial: u64,
}

impl Framer {
    pub(crate) fn new(kind: HeaderKind) -> Self {
        Self { kind, serial: 0 }
    }

    /// Appends one message of this type whose body `body` appends.
    pub(crate) fn message(
        &mut self,
        out: &mut Vec<u8>,
        message_type: u16,
        body: impl FnOnce(&mut Vec<u8>),
    ) {
        self.serial += 1;
        let header_at = out.len();
        match self.kind {
            HeaderKind::Mini => {
                out.put_u16(message_type);
                out.put_u32(0);
            }
            HeaderKind::Data => {
                out.put_u64(self.serial);
                out.put_u16(message_type);
                out.put_u32(0);
                out.put_u32(0);
            }
        }
        let (size_at, body_at) = match self.kind {
            HeaderKind::Mini => (header_at + 2, header_at + MINI_HEADER),
            HeaderKind::Data => (header_at + 10, header_at + DATA_HEADER),
        };
        body(out);
        let size = u32::try_from(out.len() - body_at).unwrap_or(u32::MAX);
        super::wire::patch_u32(out, size_at, size);
    }
}

/// Cuts received bytes into messages. Holds at most one message and what one `receive` added.
#[derive(Debug)]
pub(crate) struct Deframer {
    kind: HeaderKind,
    buffer: Vec<u8>,
    start: usize,
}

impl Deframer {
    pub(crate) fn new(kind: HeaderKind) -> Self {
        Self { kind, buffer: Vec::new(), start: 0 }
    }

    /// Adds received bytes. Take all messages out before adding more.
    pub(crate) fn receive(&mut self, bytes: &[u8]) {
        if self.start > 0 {
            self.buffer.drain(..self.start);
            self.start = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next complete message: type and body. `limit` tells the largest body of a type; a
    /// larger one is an error as soon as its header is there.
    pub(crate) fn next_message(
        &mut self,
        limit: impl Fn(u16) -> u32,
    ) -> Result<Option<(u16, &[u8])>, DecodeError> {
        let pending = self.buffer.get(self.start..).unwrap_or_default();
        let (header, kind, size) = match self.kind {
            HeaderKind::Mini => match pending {
                [k0, k1, s0, s1, s2, s3, ..] => (
                    MINI_HEADER,
                    u16::from_le_bytes([*k0, *k1]),
                    u32::from_le_bytes([*s0, *s1, *s2, *s3]),
                ),
                _ => return Ok(None),
            },
            HeaderKind::Data => match pending {
                [_, _, _, _, _, _, _, _, k0, k1, s0, s1, s2, s3, _, _, _, _, ..] => (
                    DATA_HEADER,
                    u16::from_le_bytes([*k0, *k1]),
                    u32::from_le_bytes([*s0, *s1, *s2, *s3]),
                ),
                _ => return Ok(None),
            },
        };
        let limit = limit(kind);
        if size > limit {
            return Err(DecodeError::Oversize { kind, size, limit });
        }
        let end = header + size as usize;
        if pending.len() < end {
            return Ok(None);
        }
        let body = self.start + header..self.start + end;
        self.start = body.end;
        Ok(self.buffer.get(body).map(|body| (kind, body)))
    }
}

/// Finds where messages end in bytes that are being sent.
#[derive(Debug)]
pub(crate) struct MessageEnds {
    kind: HeaderKind,
    /// Bytes until the end of the message that has begun.
    left: usize,
}

impl MessageEnds {
    /// `before`: bytes that come before the first message.
    pub(crate) fn new(kind: HeaderKind, before: usize) -> Self {
        Self { kind, left: before }
    }

    /// How many of the next bytes, which begin where the last call's answer ended, belong to one
    /// message. 0 if they end within a message's header.
    pub(crate) fn next(&mut self, bytes: &[u8]) -> usize {
        if self.left == 0 {
            let (size_at, header) = match self.kind {
                HeaderKind::Mini => (2, MINI_HEADER),
                HeaderKind::Data => (10, DATA_HEADER),
            };
            let size = bytes.get(size_at..).and_then(|bytes| bytes.first_chunk());
            let Some(size) = size.filter(|_| bytes.len() >= header) else { return 0 };
            self.left = header + u32::from_le_bytes(*size) as usize;
        }
        let count = self.left.min(bytes.len());
        self.left -= count;
        count
    }
}

#[cfg(test)]
mod tests {
    use super::{Deframer, Framer, HeaderKind, MessageEnds};
    use crate::proto::DecodeError;

    #[test]
    fn messages_survive_any_cut() {
        for kind in [HeaderKind::Mini, HeaderKind::Data] {
            let mut wire = Vec::new();
            let mut framer = Framer::new(kind);
            framer.message(&mut wire, 7, |out| out.extend_from_slice(b"hello"));
            framer.message(&mut wire, 300, |_| {});
            for cut in 0..=wire.len() {
                let mut deframer = Deframer::new(kind);
                let mut got = Vec::new();
                for part in [&wire[..cut], &wire[cut..]] {
                    deframer.receive(part);
                    while let Some((kind, body)) = deframer.next_message(|_| 5).unwrap() {
                        got.push((kind, body.to_vec()));
                    }
                }
                assert_eq!(got, [(7, b"hello".to_vec()), (300, vec![])]);
            }
        }
    }

    #[test]
    fn oversize_is_refused_from_the_header_alone() {
        let mut deframer = Deframer::new(HeaderKind::Mini);
        deframer.receive(&[1, 0, 0xff, 0xff, 0xff, 0xff]);
        assert_eq!(
            deframer.next_message(|_| 100),
            Err(DecodeError::Oversize { kind: 1, size: u32::MAX, limit: 100 })
        );
    }

    #[test]
    fn ends_of_sent_messages() {
        for kind in [HeaderKind::Mini, HeaderKind::Data] {
            let mut out = b"link".to_vec();
            let mut framer = Framer::new(kind);
            let mut ends = vec![4];
            for size in [0, 5, 70_000] {
                framer.message(&mut out, 1, |out| out.resize(out.len() + size, 7));
                ends.push(out.len());
            }
            for part in [100, 70_100] {
                let mut cut = MessageEnds::new(kind, 4);
                let (mut at, mut seen) = (0, Vec::new());
                while at < out.len() {
                    at += cut.next(&out[at..out.len().min(at + part)]);
                    if cut.left == 0 {
                        seen.push(at);
                    }
                }
                assert_eq!(seen, ends);
            }
            assert_eq!(MessageEnds::new(kind, 0).next(&out[4..8]), 0, "half a header");
        }
    }
}
