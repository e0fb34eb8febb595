//! H.264 by OpenH264, for one stream.

use super::{
    VideoError, is_generous,
    sys::openh264::{H264Encoder, H264Settings, OpenH264},
};

/// Bounds of the quantizers. Better than the first nobody sees, worse than the second nobody wants
/// to see.
const QUANTIZERS: (u8, u8) = (18, 40);
/// Bits per second until the encoder is told.
const FIRST_RATE: u32 = 1_000_000;
/// A frame of a new size, in percent of the others.
const KEY_PERCENT: u32 = 300;
/// The largest picture: `MaxFS` of level 5.1 (ITU-T H.264, table A-1), in blocks of 16 by 16.
pub(super) const MAX_PIXELS: u64 = 36_864 * 256;
/// `PRO_BASELINE` and `PRO_MAIN`.
const BASELINE: u8 = 66;
const MAIN: u8 = 77;

/// An encoder for pictures of an even size, with about so many bits and frames per second.
pub(super) fn encoder(
    library: &OpenH264,
    size: (u32, u32),
    (bits, fps): (f64, f64),
) -> Result<H264Encoder, VideoError> {
    // Some decoders, OpenH264's among them, show frames of the Main profile one frame late. But where bits
    // are few its arithmetic coding is worth a third of them; where they are not, half a dB.
    let simple = is_generous(size, bits);
    let settings = H264Settings {
        size,
        rate: (FIRST_RATE, fps as f32),
        quantizers: QUANTIZERS,
        profile: if simple { BASELINE } else { MAIN },
        arithmetic: !simple,
        // The next one takes 15 ms, and gains nothing.
        complexity: 0,
        key_percent: KEY_PERCENT,
    };
    H264Encoder::new(library, settings)
}
