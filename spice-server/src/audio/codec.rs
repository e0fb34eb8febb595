//! Opus at 48 kHz in stereo (RFC 6716), in packets of 10 ms from us.

use opus_pure::{Application, OpusDecoder, OpusEncoder};

use super::resample::Frame;
use crate::proto::sound::{CHANNELS, PACKET_FRAMES, RATE};

/// Transparent for nearly everything in stereo, and a twelfth of the raw samples.
const BITRATE: i32 = 128_000;
/// Beyond this the encoder costs more and gains next to nothing at this rate.
const COMPLEXITY: i32 = 5;
/// The longest a packet can be by its format (120 ms).
const MAX_PACKET_FRAMES: usize = 5760;

/// Packs frames.
pub(crate) struct Encoder {
    inner: OpusEncoder,
    samples: Vec<i16>,
}

impl Encoder {
    /// `None` if the library refuses, which it does not.
    pub(crate) fn new() -> Option<Self> {
        // The coding for music alone, which is 4 ms faster than those that can switch to speech's.
        let mut inner =
            OpusEncoder::new(RATE as i32, CHANNELS as usize, Application::RestrictedLowDelay)
                .inspect_err(|error| tracing::error!(?error, "there is no Opus encoder"))
                .ok()?;
        inner.bitrate_bps = BITRATE;
        inner.complexity = COMPLEXITY;
        Some(Self { inner, samples: Vec::new() })
    }

    /// One packet of [`PACKET_FRAMES`] frames.
    pub(crate) fn encode(&mut self, frames: &[Frame]) -> Option<Vec<u8>> {
        self.samples.clear();
        self.samples.extend(frames.iter().flatten());
        let mut packet = vec![0; 1500];
        match self.inner.encode_s16(&self.samples, PACKET_FRAMES, &mut packet) {
            Ok(length) => {
                packet.truncate(length);
                Some(packet)
            }
            Err(error) => {
                tracing::debug!(?error, "Opus cannot code a packet");
                None
            }
        }
    }
}

/// Unpacks packets of a client.
pub(crate) struct Decoder {
    inner: OpusDecoder,
    samples: Vec<i16>,
}

impl Decoder {
    /// `None` if the library refuses, which it does not.
    pub(crate) fn new() -> Option<Self> {
        let inner = OpusDecoder::new(RATE as i32, CHANNELS as usize)
            .inspect_err(|error| tracing::error!(?error, "there is no Opus decoder"))
            .ok()?;
        Some(Self { inner, samples: vec![0; MAX_PACKET_FRAMES * CHANNELS as usize] })
    }

    /// The frames of a packet; `None` if it is not one.
    pub(crate) fn decode(
        &mut self,
        packet: &[u8],
    ) -> Option<impl ExactSizeIterator<Item = Frame> + '_> {
        let count = self.inner.decode_s16(packet, MAX_PACKET_FRAMES, &mut self.samples).ok()?;
        let (frames, _) = self.samples.as_chunks::<2>();
        Some(frames.iter().copied().take(count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_keep_what_is_in_them() {
        let mut encoder = Encoder::new().unwrap();
        let mut decoder = Decoder::new().unwrap();
        let frames: Vec<Frame> = (0..48_000)
            .map(|i| {
                let angle = f64::from(i) * 440.0 / 48_000.0 * std::f64::consts::TAU;
                [(12_000.0 * angle.sin()) as i16, (-9_000.0 * angle.sin()) as i16]
            })
            .collect();
        let mut bytes = 0;
        let mut out = Vec::new();
        for packet in frames.chunks_exact(PACKET_FRAMES) {
            let packet = encoder.encode(packet).unwrap();
            bytes += packet.len();
            out.extend(decoder.decode(&packet).unwrap());
        }
        assert_eq!(out.len(), frames.len());
        assert!((14_000..18_000).contains(&bytes), "{bytes} bytes per second");
        // 2.5 ms late, and otherwise the same.
        let (mut signal, mut noise) = (0.0, 0.0);
        for (was, is) in frames.iter().zip(&out[120..]).skip(4800) {
            let differs = f64::from(was[0]) - f64::from(is[0]);
            signal += f64::from(was[0]).powi(2);
            noise += differs * differs;
        }
        assert!(signal / noise > 1e3, "{} dB", 10.0 * (signal / noise).log10());
    }

    #[test]
    fn rubbish_is_refused() {
        let mut decoder = Decoder::new().unwrap();
        assert!(decoder.decode(&[0xff; 3]).is_none());
        assert!(decoder.decode(&[3, 0]).is_none());
    }
}
