//! Pixel formats (RFC 6143 §7.4) and the conversion from ours.

use super::{ProtocolError, Reader};

/// Bytes of PIXEL_FORMAT on the wire.
pub const WIRE_SIZE: usize = 16;

/// How a client wants its pixels. Only "true colour" is served: nobody has a palette any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PixelFormat {
    bits_per_pixel: u8,
    depth: u8,
    big_endian: bool,
    max: [u16; 3],
    shift: [u8; 3],
}

impl PixelFormat {
    /// Four bytes: blue, green, red, nothing. The order that pictures have here.
    pub const BGRX: Self =
        Self { bits_per_pixel: 32, depth: 24, big_endian: false, max: [255; 3], shift: [16, 8, 0] };

    /// As on the wire.
    pub fn to_wire(self) -> [u8; WIRE_SIZE] {
        let [red, green, blue] = self.max.map(u16::to_be_bytes);
        let [r, g, b] = self.shift;
        [
            self.bits_per_pixel,
            self.depth,
            self.big_endian.into(),
            1,
            red[0],
            red[1],
            green[0],
            green[1],
            blue[0],
            blue[1],
            r,
            g,
            b,
            0,
            0,
            0,
        ]
    }

    /// From the wire.
    ///
    /// # Errors
    ///
    /// If the format makes no sense or uses a colour map.
    pub fn from_wire(wire: &[u8; WIRE_SIZE]) -> Result<Self, ProtocolError> {
        let mut reader = Reader(wire);
        let bits_per_pixel = reader.u8();
        let depth = reader.u8();
        let big_endian = reader.u8() != 0;
        let true_colour = reader.u8() != 0;
        let max = [reader.u16(), reader.u16(), reader.u16()];
        let shift = [reader.u8(), reader.u8(), reader.u8()];
        let refuse = |why| Err(ProtocolError::PixelFormat(why));
        if !true_colour {
            return refuse("a colour map");
        }
        if !matches!(bits_per_pixel, 8 | 16 | 32) {
            return refuse("8, 16 or 32 bits per pixel are possible");
        }
        let fits = |(max, shift): (&u16, &u8)| {
            (1..=255).contains(max)
                && (max + 1).is_power_of_two()
                && u32::from(*shift) + max.count_ones() <= u32::from(bits_per_pixel)
        };
        if !max.iter().zip(&shift).all(fits) {
            return refuse("its colours do not fit into its pixels");
        }
        let [red, green, blue] = masks(max, shift);
        if red & green != 0 || green & blue != 0 || red & blue != 0 {
            return refuse("its colours overlap");
        }
        Ok(Self { bits_per_pixel, depth, big_endian, max, shift })
    }

    /// Bytes of a pixel.
    pub fn bytes(&self) -> usize {
        usize::from(self.bits_per_pixel / 8)
    }

    /// Whether three bytes say it all, and if so whether the unused fourth is the last one in memory
    /// (`Some(true)`) or the first (RFC 6143 §7.7.5, CPIXEL).
    fn compact(&self) -> Option<bool> {
        if self.bits_per_pixel != 32 || self.depth > 24 {
            return None;
        }
        let used = masks(self.max, self.shift).into_iter().fold(0, std::ops::BitOr::bitor);
        if used & 0xff00_0000 == 0 {
            Some(!self.big_endian)
        } else if used & 0x0000_00ff == 0 {
            Some(self.big_endian)
        } else {
            None
        }
    }

    /// Whether a pixel is three bytes red, green, blue in Tight rectangles (TPIXEL), and may be JPEG.
    pub fn is_full_colour(&self) -> bool {
        self.bits_per_pixel == 32 && self.depth == 24 && self.max == [255; 3]
    }

    fn value(&self, bgrx: [u8; 4]) -> u32 {
        let [blue, green, red, _] = bgrx;
        let mut value = 0;
        for ((channel, max), shift) in [red, green, blue].into_iter().zip(self.max).zip(self.shift)
        {
            // Maxima are 2ⁿ - 1: the n highest bits of the channel.
            value |= u32::from(channel >> (8 - max.count_ones())) << shift;
        }
        value
    }

    /// Appends a pixel.
    pub fn push(&self, bgrx: [u8; 4], out: &mut Vec<u8>) {
        if *self == Self::BGRX {
            out.extend(bgrx);
            return;
        }
        let value = self.value(bgrx);
        match (self.bits_per_pixel, self.big_endian) {
            (8, _) => out.push(value as u8),
            (16, false) => out.extend((value as u16).to_le_bytes()),
            (16, true) => out.extend((value as u16).to_be_bytes()),
            (_, false) => out.extend(value.to_le_bytes()),
            (_, true) => out.extend(value.to_be_bytes()),
        }
    }

    /// Appends a pixel as ZRLE wants it: without the byte that says nothing.
    pub fn push_compact(&self, bgrx: [u8; 4], out: &mut Vec<u8>) {
        let Some(last) = self.compact() else { return self.push(bgrx, out) };
        if *self == Self::BGRX {
            out.extend(&bgrx[..3]);
            return;
        }
        let value = self.value(bgrx);
        let bytes = if self.big_endian { value.to_be_bytes() } else { value.to_le_bytes() };
        out.extend(if last { &bytes[..3] } else { &bytes[1..] });
    }

    /// Appends a pixel as Tight wants it.
    pub fn push_tight(&self, bgrx: [u8; 4], out: &mut Vec<u8>) {
        if self.is_full_colour() {
            let [blue, green, red, _] = bgrx;
            out.extend([red, green, blue]);
        } else {
            self.push(bgrx, out);
        }
    }
}

/// The bits of red, green and blue.
fn masks(max: [u16; 3], shift: [u8; 3]) -> [u32; 3] {
    let [red, green, blue] = max.map(u32::from);
    let [r, g, b] = shift;
    [red << r, green << g, blue << b]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn format(bits: u8, depth: u8, big: bool, max: [u16; 3], shift: [u8; 3]) -> PixelFormat {
        let format = PixelFormat { bits_per_pixel: bits, depth, big_endian: big, max, shift };
        PixelFormat::from_wire(&format.to_wire()).unwrap()
    }

    const PIXEL: [u8; 4] = [0x11, 0x82, 0xff, 0x77];

    fn push(format: &PixelFormat) -> Vec<u8> {
        let mut out = Vec::new();
        format.push(PIXEL, &mut out);
        out
    }

    fn compact(format: &PixelFormat) -> Vec<u8> {
        let mut out = Vec::new();
        format.push_compact(PIXEL, &mut out);
        out
    }

    #[test]
    fn common_formats() {
        assert_eq!(push(&PixelFormat::BGRX), PIXEL);
        let rgb565 = format(16, 16, false, [31, 63, 31], [11, 5, 0]);
        assert_eq!(push(&rgb565), 0xfc02_u16.to_le_bytes());
        let rgb332 = format(8, 8, false, [7, 7, 3], [0, 3, 6]);
        assert_eq!(push(&rgb332), [0b0010_0111]);
        let big = format(32, 24, true, [255; 3], [16, 8, 0]);
        assert_eq!(push(&big), [0, 0xff, 0x82, 0x11]);
        assert_eq!(compact(&big), [0xff, 0x82, 0x11]);
        let high = format(32, 24, false, [255; 3], [24, 16, 8]);
        assert_eq!(push(&high), [0, 0x11, 0x82, 0xff]);
        assert_eq!(compact(&high), [0x11, 0x82, 0xff]);
        assert_eq!(compact(&PixelFormat::BGRX), [0x11, 0x82, 0xff]);
        assert_eq!(compact(&rgb565), push(&rgb565));
    }

    #[test]
    fn nonsense_is_refused() {
        let wire = PixelFormat::BGRX.to_wire();
        for (index, byte) in
            [(0, 24), (3, 0), (5, 254), (5, 0), (10, 25), (10, 255), (10, 0), (4, 255)]
        {
            let mut wire = wire;
            wire[index] = byte;
            PixelFormat::from_wire(&wire).unwrap_err();
        }
    }
}
