//! Formats of samples (VIRTIO 1.3 §5.14.6.6.1): what the guest may choose, and how it becomes the
//! 16-bit stereo that sinks and sources know.

use std::time::Duration;

use super::Frame;

/// Stereo, or mono.
pub(super) const MAX_CHANNELS: u8 = 2;

/// A sample in guest memory, little-endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Unsigned 8 bits.
    U8 = 4,
    /// Signed 16 bits.
    S16 = 5,
    /// Signed 32 bits.
    S32 = 17,
    /// IEEE 754 single precision, -1 to 1.
    Float = 19,
}

const FORMATS: [Format; 4] = [Format::U8, Format::S16, Format::S32, Format::Float];

/// Rates by their numbers on the wire, 1 to 7.
const RATES: [u32; 7] = [8_000, 11_025, 16_000, 22_050, 32_000, 44_100, 48_000];

/// Bits of the formats there are.
pub(super) fn formats() -> u64 {
    FORMATS.iter().fold(0, |bits, format| bits | 1 << *format as u32)
}

/// Bits of the rates there are.
pub(super) fn rates() -> u64 {
    0xfe
}

/// Frames per second by its number on the wire.
pub(super) fn rate(number: u8) -> Option<u32> {
    RATES.get(usize::from(number).checked_sub(1)?).copied()
}

impl Format {
    pub(super) fn from_wire(number: u8) -> Option<Self> {
        FORMATS.into_iter().find(|format| *format as u8 == number)
    }

    /// Bytes of a sample.
    fn bytes(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::S16 => 2,
            Self::S32 | Self::Float => 4,
        }
    }

    fn read(self, bytes: &[u8]) -> i16 {
        match (self, bytes) {
            (Self::U8, [a, ..]) => (i16::from(*a) - 128) << 8,
            (Self::S16, [a, b, ..]) => i16::from_le_bytes([*a, *b]),
            (Self::S32, [_, _, a, b, ..]) => i16::from_le_bytes([*a, *b]),
            (Self::Float, [a, b, c, d, ..]) => {
                // `as` saturates, and makes 0 of what is no number.
                (f32::from_le_bytes([*a, *b, *c, *d]) * 32_767.0).round() as i16
            }
            _ => 0,
        }
    }

    fn write(self, sample: i16, out: &mut Vec<u8>) {
        match self {
            Self::U8 => out.push(((i32::from(sample) + 0x8000) >> 8) as u8),
            Self::S16 => out.extend(sample.to_le_bytes()),
            Self::S32 => out.extend((i32::from(sample) << 16).to_le_bytes()),
            Self::Float => out.extend((f32::from(sample) / 32_768.0).to_le_bytes()),
        }
    }
}

/// What the driver chose for a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Params {
    /// A sample.
    pub format: Format,
    /// Frames per second.
    pub rate: u32,
    /// 1 or 2.
    pub channels: u8,
}

impl Params {
    /// Bytes of a frame.
    pub fn frame_bytes(&self) -> usize {
        self.format.bytes() * usize::from(self.channels)
    }

    /// Bytes of whole frames that last so long.
    pub(super) fn bytes_in(&self, time: Duration) -> u32 {
        let frames = time.as_millis() * u128::from(self.rate) / 1000;
        u32::try_from(frames * self.frame_bytes() as u128).unwrap_or(u32::MAX)
    }

    /// Appends the frames in `bytes`; what is left of a frame at the end is dropped.
    pub fn decode(&self, bytes: &[u8], frames: &mut Vec<Frame>) {
        let size = self.format.bytes();
        frames.extend(bytes.chunks_exact(self.frame_bytes()).map(|frame| {
            let left = self.format.read(frame);
            let right = frame.get(size..).filter(|rest| !rest.is_empty());
            [left, right.map_or(left, |right| self.format.read(right))]
        }));
    }

    /// Appends the bytes of `frames`; mono is the mean of both channels.
    pub fn encode(&self, frames: &[Frame], bytes: &mut Vec<u8>) {
        for [left, right] in frames {
            if self.channels == 1 {
                let mean = (i32::from(*left) + i32::from(*right)) / 2;
                self.format.write(mean as i16, bytes);
            } else {
                self.format.write(*left, bytes);
                self.format.write(*right, bytes);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_formats_keep_what_they_can() {
        let frames = [[0, 0], [256, -256], [12_345, -12_345], [i16::MAX, i16::MIN]];
        for format in FORMATS {
            for channels in [1, 2] {
                let params = Params { format, rate: 48_000, channels };
                let mut bytes = Vec::new();
                params.encode(&frames, &mut bytes);
                assert_eq!(bytes.len(), frames.len() * params.frame_bytes());
                let mut back = Vec::new();
                params.decode(&bytes, &mut back);
                for (was, is) in frames.iter().zip(&back) {
                    let mean = (i32::from(was[0]) + i32::from(was[1])) / 2;
                    let wanted = if channels == 1 { [mean; 2] } else { was.map(i32::from) };
                    let most = if format == Format::U8 { 255 } else { 1 };
                    for (wanted, is) in wanted.into_iter().zip(is) {
                        assert!(
                            (wanted - i32::from(*is)).abs() <= most,
                            "{params:?}: {was:?} {is:?}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn floats_out_of_range_are_cut_off() {
        let params = Params { format: Format::Float, rate: 8000, channels: 1 };
        let bytes: Vec<u8> = [2.0f32, -9.0, f32::NAN, f32::INFINITY]
            .into_iter()
            .flat_map(f32::to_le_bytes)
            .collect();
        let mut frames = Vec::new();
        params.decode(&bytes, &mut frames);
        assert_eq!(frames, [[i16::MAX; 2], [i16::MIN; 2], [0; 2], [i16::MAX; 2]]);
    }

    #[test]
    fn numbers_on_the_wire() {
        assert_eq!(formats(), 0xa_0030);
        assert_eq!((rate(0), rate(1), rate(7), rate(8)), (None, Some(8000), Some(48_000), None));
        assert_eq!(rates().count_ones() as usize, RATES.len());
    }
}
