//! Main channel messages (spice.proto, `MainChannel`).

use super::{
    DecodeError,
    channel::{BASE_LIMIT, BaseMessage, ChannelType, decode_base},
    framing::Framer,
    wire::{Put, Reader},
};
use crate::MouseMode;

/// Client capability: names and UUIDs are understood.
pub(crate) const CAP_NAME_AND_UUID: u32 = 1;
/// Both sides: the agent's connection is announced together with tokens.
pub(crate) const CAP_AGENT_CONNECTED_TOKENS: u32 = 2;

/// Largest agent chunk (`VD_AGENT_MAX_DATA_SIZE`).
pub(crate) const MAX_AGENT_DATA: u32 = 2048;

/// The mouse modes' bits.
impl MouseMode {
    pub(crate) fn bit(self) -> u16 {
        match self {
            Self::Server => 1,
            Self::Client => 2,
        }
    }
}

/// What a client says on its main channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ClientMessage<'a> {
    Base(BaseMessage),
    AttachChannels,
    MouseModeRequest(MouseMode),
    AgentStart {
        tokens: u32,
    },
    AgentData(&'a [u8]),
    AgentToken {
        tokens: u32,
    },
    /// Client information and quality hints, which change nothing here.
    Ignored,
}

/// Largest body of a client message.
pub(crate) fn limit(kind: u16) -> u32 {
    match kind {
        0..=100 => BASE_LIMIT,
        107 => MAX_AGENT_DATA,
        _ => 256,
    }
}

pub(crate) fn decode(kind: u16, body: &[u8]) -> Result<ClientMessage<'_>, DecodeError> {
    if let Some(base) = decode_base(kind, body)? {
        return Ok(ClientMessage::Base(base));
    }
    let mut reader = Reader::new(body);
    Ok(match kind {
        104 => ClientMessage::AttachChannels,
        105 => ClientMessage::MouseModeRequest(match reader.u16()? {
            1 => MouseMode::Server,
            2 => MouseMode::Client,
            _ => return Err(DecodeError::Value("mouse mode")),
        }),
        106 => ClientMessage::AgentStart { tokens: reader.u32()? },
        107 => ClientMessage::AgentData(body),
        108 => ClientMessage::AgentToken { tokens: reader.u32()? },
        101 | 112 => ClientMessage::Ignored,
        _ => return Err(DecodeError::UnexpectedType(kind)),
    })
}

/// `INIT`, the first message.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Init {
    pub(crate) session: u32,
    pub(crate) displays: u32,
    pub(crate) mouse_mode: MouseMode,
    /// Whether there is an agent, and how many chunks the client may send to it.
    pub(crate) agent_tokens: Option<u32>,
    /// Milliseconds of the server's multimedia clock.
    pub(crate) mm_time: u32,
}

/// Bits of all mouse modes.
const ALL_MOUSE_MODES: u16 = 3;

pub(crate) fn put_init(framer: &mut Framer, out: &mut Vec<u8>, init: &Init) {
    framer.message(out, 103, |out| {
        out.put_u32(init.session);
        out.put_u32(init.displays);
        out.put_u32(ALL_MOUSE_MODES.into());
        out.put_u32(init.mouse_mode.bit().into());
        out.put_u32(init.agent_tokens.is_some().into());
        out.put_u32(init.agent_tokens.unwrap_or(0));
        out.put_u32(init.mm_time);
        out.put_u32(0);
    });
}

pub(crate) fn put_channels_list(
    framer: &mut Framer,
    out: &mut Vec<u8>,
    channels: &[(ChannelType, u8)],
) {
    framer.message(out, 104, |out| {
        out.put_u32(channels.len() as u32);
        for (kind, id) in channels {
            out.put_u8(*kind as u8);
            out.put_u8(*id);
        }
    });
}

pub(crate) fn put_mouse_mode(framer: &mut Framer, out: &mut Vec<u8>, mode: MouseMode) {
    framer.message(out, 105, |out| {
        out.put_u16(ALL_MOUSE_MODES);
        out.put_u16(mode.bit());
    });
}

pub(crate) fn put_name(framer: &mut Framer, out: &mut Vec<u8>, name: &str) {
    framer.message(out, 113, |out| {
        out.put_u32(name.len() as u32 + 1);
        out.extend_from_slice(name.as_bytes());
        out.put_u8(0);
    });
}

pub(crate) fn put_uuid(framer: &mut Framer, out: &mut Vec<u8>, uuid: &[u8; 16]) {
    framer.message(out, 114, |out| out.extend_from_slice(uuid));
}

/// Announces an agent; `with_tokens` if the client has [`CAP_AGENT_CONNECTED_TOKENS`].
pub(crate) fn put_agent_connected(
    framer: &mut Framer,
    out: &mut Vec<u8>,
    tokens: u32,
    with_tokens: bool,
) {
    if with_tokens {
        framer.message(out, 115, |out| out.put_u32(tokens));
    } else {
        framer.message(out, 107, |_| {});
    }
}

pub(crate) fn put_agent_disconnected(framer: &mut Framer, out: &mut Vec<u8>) {
    framer.message(out, 108, |out| out.put_u32(0));
}

pub(crate) fn put_agent_data(framer: &mut Framer, out: &mut Vec<u8>, data: &[u8]) {
    framer.message(out, 109, |out| out.extend_from_slice(data));
}

pub(crate) fn put_agent_tokens(framer: &mut Framer, out: &mut Vec<u8>, tokens: u32) {
    framer.message(out, 110, |out| out.put_u32(tokens));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::framing::HeaderKind;

    #[test]
    fn client_messages() {
        assert_eq!(decode(104, &[]), Ok(ClientMessage::AttachChannels));
        assert_eq!(decode(105, &[2, 0]), Ok(ClientMessage::MouseModeRequest(MouseMode::Client)));
        assert_eq!(decode(105, &[3, 0]), Err(DecodeError::Value("mouse mode")));
        assert_eq!(decode(105, &[2]), Err(DecodeError::Truncated));
        assert_eq!(decode(106, &[0xff; 4]), Ok(ClientMessage::AgentStart { tokens: u32::MAX }));
        assert_eq!(decode(107, b"xyz"), Ok(ClientMessage::AgentData(b"xyz")));
        assert_eq!(decode(999, &[]), Err(DecodeError::UnexpectedType(999)));
    }

    #[test]
    fn init_layout() {
        let mut out = Vec::new();
        let init = Init {
            session: 0x1122_3344,
            displays: 1,
            mouse_mode: MouseMode::Client,
            agent_tokens: Some(10),
            mm_time: 5,
        };
        put_init(&mut Framer::new(HeaderKind::Mini), &mut out, &init);
        let words: Vec<u32> =
            out[6..].chunks(4).map(|w| u32::from_le_bytes(w.try_into().unwrap())).collect();
        assert_eq!(out[..6], [103, 0, 32, 0, 0, 0]);
        assert_eq!(words, [0x1122_3344, 1, 3, 2, 1, 10, 5, 0]);
    }

    #[test]
    fn name_is_terminated() {
        let mut out = Vec::new();
        put_name(&mut Framer::new(HeaderKind::Mini), &mut out, "vm");
        assert_eq!(out, [113, 0, 7, 0, 0, 0, 3, 0, 0, 0, b'v', b'm', 0]);
    }
}
