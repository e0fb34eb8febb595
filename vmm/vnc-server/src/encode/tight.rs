//! Tight (rfbproto, "Tight Encoding"): one colour, few colours, JPEG, or pixels through zlib.

use jpeg_encoder::{ColorType, SamplingFactor};

use super::{Picture, Stream, palette::Palette, zrle::pack};
use crate::{geometry::Rect, proto::pixel::PixelFormat};

/// Widest rectangle that a client must accept, in pixels.
pub(crate) const MAX_WIDTH: u32 = 2048;

const FILL: u8 = 0x80;
const JPEG: u8 = 0x90;
/// A filter follows; the number of the stream goes into the bits below.
const FILTERED: u8 = 0x40;
const PALETTE_FILTER: u8 = 1;

/// Less than this is not compressed.
const MIN_COMPRESSED: usize = 12;

/// Photographs are bigger than this; anything smaller is not worth its JPEG header.
const MIN_JPEG_PIXELS: u32 = 1024;

/// JPEG qualities of the ten levels a client may name.
const QUALITIES: [u8; 10] = [15, 29, 41, 42, 62, 77, 79, 86, 92, 100];

/// The streams: plain pixels, two colours, palettes.
#[derive(Debug, Default)]
pub(super) struct Streams([Stream; 3]);

impl Streams {
    /// Appends a rectangle of at most [`MAX_WIDTH`]; returns whether it was lossy.
    pub(super) fn push(
        &mut self,
        picture: Picture<'_>,
        rect: Rect,
        format: &PixelFormat,
        quality: Option<u8>,
        scratch: &mut Vec<u8>,
        out: &mut Vec<u8>,
    ) -> bool {
        scratch.clear();
        let Some(palette) = Palette::of(picture.iter(rect), 256) else {
            let photo = format.is_full_colour() && rect.width * rect.height >= MIN_JPEG_PIXELS;
            if let Some(level) = quality.filter(|_| photo)
                && jpeg(picture, rect, level, scratch)
            {
                out.push(JPEG);
                compact_length(scratch.len(), out);
                out.extend_from_slice(scratch);
                return true;
            }
            scratch.clear();
            picture.iter(rect).for_each(|pixel| format.push_tight(pixel, scratch));
            out.push(0);
            self.compress(0, scratch, out);
            return false;
        };
        let colours = palette.colours();
        if let [colour] = colours {
            out.push(FILL);
            format.push_tight(*colour, out);
            return false;
        }
        let stream = if colours.len() == 2 { 1 } else { 2 };
        out.extend([FILTERED | (stream << 4), PALETTE_FILTER, (colours.len() - 1) as u8]);
        colours.iter().for_each(|colour| format.push_tight(*colour, out));
        for row in picture.rows(rect) {
            let numbers = row.iter().map(|pixel| palette.index(*pixel));
            pack(numbers, if colours.len() == 2 { 1 } else { 8 }, scratch);
        }
        self.compress(usize::from(stream), scratch, out);
        false
    }

    fn compress(&mut self, stream: usize, bytes: &[u8], out: &mut Vec<u8>) {
        if bytes.len() < MIN_COMPRESSED {
            out.extend_from_slice(bytes);
            return;
        }
        let mut compressed = Vec::with_capacity(bytes.len() / 2);
        if let Some(stream) = self.0.get_mut(stream) {
            stream.push(bytes, &mut compressed);
        }
        compact_length(compressed.len(), out);
        out.extend(compressed);
    }
}

fn jpeg(picture: Picture<'_>, rect: Rect, level: u8, out: &mut Vec<u8>) -> bool {
    let quality = QUALITIES[usize::from(level).min(QUALITIES.len() - 1)];
    let mut pixels = Vec::with_capacity((rect.width * rect.height * 4) as usize);
    picture.rows(rect).for_each(|row| pixels.extend_from_slice(row.as_flattened()));
    let mut encoder = jpeg_encoder::Encoder::new(&mut *out, quality);
    encoder.set_sampling_factor(if level < 8 {
        SamplingFactor::F_2_2
    } else {
        SamplingFactor::F_1_1
    });
    let (width, height) = (rect.width as u16, rect.height as u16);
    encoder.encode(&pixels, width, height, ColorType::Bgra).is_ok()
}

/// Seven bits a byte, lowest first, up to 22 bits.
fn compact_length(length: usize, out: &mut Vec<u8>) {
    let (low, middle, high) = (length & 0x7f, (length >> 7) & 0x7f, (length >> 14) & 0xff);
    if length < 1 << 7 {
        out.push(low as u8);
    } else if length < 1 << 14 {
        out.extend([low as u8 | 0x80, middle as u8]);
    } else {
        out.extend([low as u8 | 0x80, middle as u8 | 0x80, high as u8]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encode(pixels: &[[u8; 4]], width: u32, quality: Option<u8>) -> (Vec<u8>, bool) {
        let picture = Picture { pixels: pixels.as_flattened(), width };
        let rect = Rect::new(0, 0, width, pixels.len() as u32 / width);
        let mut out = Vec::new();
        let format = PixelFormat::BGRX;
        let lossy =
            Streams::default().push(picture, rect, &format, quality, &mut vec![1], &mut out);
        (out, lossy)
    }

    #[test]
    fn lengths() {
        let length = |length| {
            let mut out = Vec::new();
            compact_length(length, &mut out);
            out
        };
        assert_eq!(length(0x7f), [0x7f]);
        assert_eq!(length(0x80), [0x80, 1]);
        assert_eq!(length(10000), [0x90, 0x4e]);
        assert_eq!(length((1 << 22) - 1), [0xff, 0xff, 0xff]);
    }

    #[test]
    fn the_cheapest_kind() {
        assert_eq!(encode(&[[1, 2, 3, 0]; 64], 8, Some(9)).0, [FILL, 3, 2, 1]);
        let (a, b) = ([1, 2, 3, 0], [4, 5, 6, 0]);
        let (two, lossy) = encode(&[a, b, a, b], 2, Some(9));
        assert_eq!(two, [0x50, 1, 1, 3, 2, 1, 6, 5, 4, 0b0100_0000, 0b0100_0000]);
        assert!(!lossy);
        let photo: Vec<[u8; 4]> =
            (0..4096_u32).map(|i| [i as u8, (i >> 4) as u8, (i >> 8) as u8 * 3, 0]).collect();
        let (bytes, lossy) = encode(&photo, 64, Some(5));
        assert_eq!((bytes[0], lossy), (JPEG, true));
        let (bytes, lossy) = encode(&photo, 64, None);
        assert_eq!((bytes[0], lossy), (0, false));
    }
}
