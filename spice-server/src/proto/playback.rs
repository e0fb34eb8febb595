//! Playback channel messages (spice.proto, `PlaybackChannel`).

use super::{
    DecodeError,
    channel::{BASE_LIMIT, BaseMessage, decode_base},
    framing::Framer,
    sound::{self, Mode, Volume},
    wire::Put,
};

/// Both sides: volume and mute.
pub(crate) const CAP_VOLUME: u32 = 1;
/// Client: [`put_latency`] is understood.
pub(crate) const CAP_LATENCY: u32 = 2;
/// Both sides: Opus.
pub(crate) const CAP_OPUS: u32 = 3;

/// Largest body of a client message: there are only those of every channel.
pub(crate) fn limit(_: u16) -> u32 {
    BASE_LIMIT
}

pub(crate) fn decode(kind: u16, body: &[u8]) -> Result<BaseMessage, DecodeError> {
    decode_base(kind, body)?.ok_or(DecodeError::UnexpectedType(kind))
}

/// `DATA`: one packet, to be heard when the multimedia clock says `time`.
pub(crate) fn put_data(framer: &mut Framer, out: &mut Vec<u8>, time: u32, data: &[u8]) {
    framer.message(out, 101, |out| {
        out.put_u32(time);
        out.extend_from_slice(data);
    });
}

/// `MODE`: how the packets from here on are coded. Clients make their decoder at `START`, so this
/// comes before it.
pub(crate) fn put_mode(framer: &mut Framer, out: &mut Vec<u8>, time: u32, mode: Mode) {
    framer.message(out, 102, |out| {
        out.put_u32(time);
        out.put_u16(mode as u16);
    });
}

pub(crate) fn put_start(framer: &mut Framer, out: &mut Vec<u8>, time: u32) {
    framer.message(out, 103, |out| {
        sound::put_format(out);
        out.put_u32(time);
    });
}

pub(crate) fn put_stop(framer: &mut Framer, out: &mut Vec<u8>) {
    framer.message(out, 104, |_| {});
}

pub(crate) fn put_volume(framer: &mut Framer, out: &mut Vec<u8>, volume: Volume) {
    sound::put_volume(framer, out, 105, volume);
}

pub(crate) fn put_mute(framer: &mut Framer, out: &mut Vec<u8>, mute: bool) {
    sound::put_mute(framer, out, 106, mute);
}

/// `LATENCY`: how much the client is to have in store before it plays, in milliseconds. spice-gtk
/// goes back to 200 at every `START`.
pub(crate) fn put_latency(framer: &mut Framer, out: &mut Vec<u8>, milliseconds: u32) {
    framer.message(out, 107, |out| out.put_u32(milliseconds));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::framing::HeaderKind;

    fn body(write: impl FnOnce(&mut Framer, &mut Vec<u8>)) -> (u16, Vec<u8>) {
        let mut out = Vec::new();
        write(&mut Framer::new(HeaderKind::Mini), &mut out);
        (u16::from_le_bytes([out[0], out[1]]), out[6..].to_vec())
    }

    #[test]
    fn layouts() {
        let start = [2, 0, 0, 0, 1, 0, 0x80, 0xbb, 0, 0, 7, 0, 0, 0];
        assert_eq!(body(|f, o| put_start(f, o, 7)), (103, start.to_vec()));
        assert_eq!(body(|f, o| put_mode(f, o, 7, Mode::Opus)), (102, vec![7, 0, 0, 0, 3, 0]));
        assert_eq!(body(|f, o| put_data(f, o, 9, b"ab")), (101, vec![9, 0, 0, 0, b'a', b'b']));
        let volume = body(|f, o| put_volume(f, o, Volume([0xffff, 1])));
        assert_eq!(volume, (105, vec![2, 0xff, 0xff, 1, 0]));
        assert_eq!(body(|f, o| put_mute(f, o, true)), (106, vec![1]));
        assert_eq!(body(|f, o| put_latency(f, o, 40)), (107, vec![40, 0, 0, 0]));
    }

    #[test]
    fn clients_say_nothing_of_their_own() {
        assert_eq!(decode(101, &[]), Err(DecodeError::UnexpectedType(101)));
        assert_eq!(decode(3, &[5, 0, 0, 0]), Ok(BaseMessage::Pong(5)));
    }
}
