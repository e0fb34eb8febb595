//! H.264 by OpenH264, for one stream.

use super::{
    VideoError,
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
/// `PRO_MAIN`.
const MAIN: u8 = 77;

/// An encoder for pictures of an even size.
pub(super) fn encoder(
    library: &OpenH264,
    size: (u32, u32),
    fps: f64,
) -> Result<H264Encoder, VideoError> {
    let settings = H264Settings {
        size,
        rate: (FIRST_RATE, fps as f32),
        quantizers: QUANTIZERS,
        // Without it a film of 1920 by 1080 in 2 Mbit/s is 2 dB worse and takes 10 ms per frame, not 11.
        profile: MAIN,
        arithmetic: true,
        // The next one takes 15 ms, and gains nothing.
        complexity: 0,
        key_percent: KEY_PERCENT,
    };
    H264Encoder::new(library, settings)
}
