//! Record channel messages (spice.proto, `RecordChannel`).

use super::{
    DecodeError,
    channel::{BASE_LIMIT, BaseMessage, decode_base},
    framing::Framer,
    sound::{self, Mode, Volume},
    wire::Reader,
};

/// Both sides: volume and mute.
pub(crate) const CAP_VOLUME: u32 = 1;
/// Both sides: Opus.
pub(crate) const CAP_OPUS: u32 = 2;

/// Largest `DATA`: raw samples of 0.34 s. spice-gtk sends what its sound system had at once.
const MAX_DATA: u32 = 64 << 10;

/// What a client says on its record channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ClientMessage<'a> {
    Base(BaseMessage),
    /// Samples, coded as the last `MODE` said.
    Data(&'a [u8]),
    Mode(Mode),
    /// Recording begins at this time of the client's clock.
    StartMark,
}

/// Largest body of a client message.
pub(crate) fn limit(kind: u16) -> u32 {
    if kind == 101 { MAX_DATA } else { BASE_LIMIT }
}

pub(crate) fn decode(kind: u16, body: &[u8]) -> Result<ClientMessage<'_>, DecodeError> {
    if let Some(base) = decode_base(kind, body)? {
        return Ok(ClientMessage::Base(base));
    }
    let mut reader = Reader::new(body);
    // Every one begins with a time, which is the client's own.
    reader.u32()?;
    Ok(match kind {
        101 => ClientMessage::Data(body.get(4..).unwrap_or_default()),
        102 => ClientMessage::Mode(Mode::decode(&mut reader)?),
        103 => ClientMessage::StartMark,
        _ => return Err(DecodeError::UnexpectedType(kind)),
    })
}

pub(crate) fn put_start(framer: &mut Framer, out: &mut Vec<u8>) {
    framer.message(out, 101, sound::put_format);
}

pub(crate) fn put_stop(framer: &mut Framer, out: &mut Vec<u8>) {
    framer.message(out, 102, |_| {});
}

pub(crate) fn put_volume(framer: &mut Framer, out: &mut Vec<u8>, volume: Volume) {
    sound::put_volume(framer, out, 103, volume);
}

pub(crate) fn put_mute(framer: &mut Framer, out: &mut Vec<u8>, mute: bool) {
    sound::put_mute(framer, out, 104, mute);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::framing::HeaderKind;

    #[test]
    fn client_messages() {
        assert_eq!(decode(101, b"timeab"), Ok(ClientMessage::Data(b"ab")));
        assert_eq!(decode(101, b"tim"), Err(DecodeError::Truncated));
        assert_eq!(decode(102, &[0, 0, 0, 0, 3, 0]), Ok(ClientMessage::Mode(Mode::Opus)));
        let celt = decode(102, &[0, 0, 0, 0, 2, 0]);
        assert_eq!(celt, Err(DecodeError::Value("audio mode")));
        assert_eq!(decode(103, &[0; 4]), Ok(ClientMessage::StartMark));
        assert_eq!(decode(104, &[0; 4]), Err(DecodeError::UnexpectedType(104)));
    }

    #[test]
    fn layouts() {
        let mut out = Vec::new();
        put_start(&mut Framer::new(HeaderKind::Mini), &mut out);
        assert_eq!(out, [101, 0, 10, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0x80, 0xbb, 0, 0]);
    }
}
