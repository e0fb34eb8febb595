//! What all channels share: channel types, capabilities, base messages (1 to 7).

use super::{
    DecodeError,
    framing::Framer,
    wire::{Put, Reader},
};

/// Channel types this server offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub(crate) enum ChannelType {
    Main = 1,
    Display = 2,
    Inputs = 3,
    Cursor = 4,
    Playback = 5,
    Record = 6,
}

impl ChannelType {
    pub(crate) fn from_wire(value: u8) -> Option<Self> {
        Some(match value {
            1 => Self::Main,
            2 => Self::Display,
            3 => Self::Inputs,
            4 => Self::Cursor,
            5 => Self::Playback,
            6 => Self::Record,
            _ => return None,
        })
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Main => "main",
            Self::Display => "display",
            Self::Inputs => "inputs",
            Self::Cursor => "cursor",
            Self::Playback => "playback",
            Self::Record => "record",
        }
    }
}

/// A set of capability bits as sent in link messages.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Caps(pub(crate) Vec<u32>);

impl Caps {
    pub(crate) fn has(&self, bit: u32) -> bool {
        let word = self.0.get(bit as usize / 32).copied().unwrap_or(0);
        word >> (bit % 32) & 1 == 1
    }
}

/// The first capability word with these bits set.
pub(crate) const fn cap_word(bits: &[u32]) -> u32 {
    let mut word = 0;
    let mut i = 0;
    while i < bits.len() {
        word |= 1 << bits[i];
        i += 1;
    }
    word
}

/// Common capabilities (link message, `SPICE_COMMON_CAP_*`).
pub(crate) const COMMON_CAP_AUTH_SELECTION: u32 = 0;
pub(crate) const COMMON_CAP_AUTH_SPICE: u32 = 1;
pub(crate) const COMMON_CAP_MINI_HEADER: u32 = 3;

const SRV_PING: u16 = 4;
const SRV_DISCONNECTING: u16 = 6;
const SRV_NOTIFY: u16 = 7;

/// Messages every client channel may send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BaseMessage {
    /// Acknowledgements: this server opens no window, so they mean nothing.
    Ack,
    /// The answer to [`put_ping`] with this number.
    Pong(u32),
    Disconnecting,
}

/// Largest client message of a base type.
pub(crate) const BASE_LIMIT: u32 = 64;

/// Decodes a base message; `None` if the type is not one.
pub(crate) fn decode_base(kind: u16, body: &[u8]) -> Result<Option<BaseMessage>, DecodeError> {
    let mut reader = Reader::new(body);
    Ok(Some(match kind {
        1 => {
            reader.u32()?;
            BaseMessage::Ack
        }
        2 => BaseMessage::Ack,
        3 => BaseMessage::Pong(reader.u32()?),
        6 => BaseMessage::Disconnecting,
        4 | 5 => return Err(DecodeError::UnexpectedType(kind)),
        _ => return Ok(None),
    }))
}

/// `PING`: the client answers when it has done everything it was sent before.
pub(crate) fn put_ping(framer: &mut Framer, out: &mut Vec<u8>, id: u32) {
    framer.message(out, SRV_PING, |out| {
        out.put_u32(id);
        out.put_u64(0);
    });
}

/// `DISCONNECTING`: the server is about to close the connection.
pub(crate) fn put_disconnecting(framer: &mut Framer, out: &mut Vec<u8>) {
    framer.message(out, SRV_DISCONNECTING, |out| {
        out.put_u64(0);
        out.put_u32(0);
    });
}

/// `NOTIFY`: a text for the person at the client; `severity` is 0 for news, 1 for a warning, 2 for an
/// error.
pub(crate) fn put_notify(framer: &mut Framer, out: &mut Vec<u8>, severity: u32, text: &str) {
    const VISIBILITY_HIGH: u32 = 2;
    framer.message(out, SRV_NOTIFY, |out| {
        out.put_u64(0);
        out.put_u32(severity);
        out.put_u32(VISIBILITY_HIGH);
        out.put_u32(0);
        out.put_u32(text.len() as u32);
        out.extend_from_slice(text.as_bytes());
        out.put_u8(0);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capability_bits() {
        assert_eq!(cap_word(&[0, 1, 3]), 0xb);
        let caps = Caps(vec![1, 0x8000_0000]);
        assert!(caps.has(0) && caps.has(63) && !caps.has(1) && !caps.has(64));
    }

    #[test]
    fn base_messages() {
        assert_eq!(decode_base(1, &[0; 4]), Ok(Some(BaseMessage::Ack)));
        assert_eq!(decode_base(1, &[0; 3]), Err(DecodeError::Truncated));
        assert_eq!(decode_base(5, &[]), Err(DecodeError::UnexpectedType(5)));
        assert_eq!(decode_base(101, &[]), Ok(None));
    }
}
