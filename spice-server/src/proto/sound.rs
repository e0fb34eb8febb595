//! What the playback and record channels have in common (spice.proto, `PlaybackChannel`,
//! `RecordChannel`): coding of samples, volume, mute.

use super::{
    DecodeError,
    framing::Framer,
    wire::{Put, Reader},
};

/// Samples per second on the wire, whatever the program's rate is: the one rate that Opus and every
/// client's sound card have.
pub(crate) const RATE: u32 = 48_000;
/// Frames of a packet, 10 ms. spice-gtk decodes into a buffer of this size.
pub(crate) const PACKET_FRAMES: usize = 480;
/// Always stereo.
pub(crate) const CHANNELS: u32 = 2;
/// `SPICE_AUDIO_FMT_S16`.
const FORMAT_S16: u16 = 1;

/// How samples are coded (`SPICE_AUDIO_DATA_MODE_*`; CELT 0.5.1 is dead).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Raw = 1,
    Opus = 3,
}

impl Mode {
    pub(crate) fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        match reader.u16()? {
            1 => Ok(Self::Raw),
            3 => Ok(Self::Opus),
            _ => Err(DecodeError::Value("audio mode")),
        }
    }
}

/// Loudness of the channels: left, right; 65535 is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Volume(pub(crate) [u16; CHANNELS as usize]);

pub(super) fn put_format(out: &mut Vec<u8>) {
    out.put_u32(CHANNELS);
    out.put_u16(FORMAT_S16);
    out.put_u32(RATE);
}

pub(super) fn put_volume(framer: &mut Framer, out: &mut Vec<u8>, kind: u16, volume: Volume) {
    framer.message(out, kind, |out| {
        out.put_u8(volume.0.len() as u8);
        volume.0.into_iter().for_each(|channel| out.put_u16(channel));
    });
}

pub(super) fn put_mute(framer: &mut Framer, out: &mut Vec<u8>, kind: u16, mute: bool) {
    framer.message(out, kind, |out| out.put_u8(mute.into()));
}
