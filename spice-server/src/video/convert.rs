//! From the pixels of a screen to those of video: one luma sample per pixel, two chroma samples for
//! four.

use super::{Matrix, View, sys};

/// A picture of even size as video encoders take it: the planes Y, U and V one after the other,
/// without gaps.
#[derive(Debug, Clone, Default)]
pub(crate) struct I420 {
    width: u32,
    height: u32,
    bytes: Vec<u8>,
}

/// Fractional bits of the factors.
const BITS: u32 = 8;

/// The factors of blue, green and red for Y, U and V, video range (16 to 235 and 240).
#[derive(Debug, Clone, Copy)]
pub(super) struct Factors {
    y: [u32; 3],
    u: [i32; 3],
    v: [i32; 3],
}

/// ITU-R BT.601.
const BT601: Factors = Factors { y: [25, 129, 66], u: [112, -74, -38], v: [-18, -94, 112] };
/// ITU-R BT.709.
const BT709: Factors = Factors { y: [16, 157, 47], u: [112, -86, -26], v: [-10, -102, 112] };

impl I420 {
    pub(crate) fn size(&self) -> (u32, u32) {
        (self.width, self.height)
    }

    /// All planes.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The planes.
    pub(crate) fn planes(&self) -> (&[u8], &[u8], &[u8]) {
        let luma = self.width as usize * self.height as usize;
        let (y, chroma) = self.bytes.split_at(luma);
        let (u, v) = chroma.split_at(luma / 4);
        (y, u, v)
    }

    /// Takes over a picture; a last odd row and column are left out.
    pub(crate) fn convert(&mut self, view: View<'_>, matrix: Matrix) {
        let (columns, rows) = view.size;
        (self.width, self.height) = (columns & !1, rows & !1);
        let (stride, rows) = (self.width as usize, self.height as usize);
        self.bytes.resize(stride * rows * 3 / 2, 0);
        if self.bytes.is_empty() {
            return;
        }
        let factors = match matrix {
            Matrix::Bt601 => &BT601,
            Matrix::Bt709 => &BT709,
        };
        let convert = sys::two_rows();
        let (y, chroma) = self.bytes.split_at_mut(stride * rows);
        let (u, v) = chroma.split_at_mut(stride * rows / 4);
        let pairs = view.pairs_of_rows().zip(y.chunks_exact_mut(stride * 2));
        let chroma = u.chunks_exact_mut(stride / 2).zip(v.chunks_exact_mut(stride / 2));
        for ((pixels, y), (u, v)) in pairs.zip(chroma) {
            let y = y.split_at_mut(stride);
            convert(factors, TwoRows { pixels, y, u, v });
        }
    }
}

/// Two rows of pixels, and where their samples belong.
pub(super) struct TwoRows<'a> {
    pub(super) pixels: (&'a [u8], &'a [u8]),
    pub(super) y: (&'a mut [u8], &'a mut [u8]),
    pub(super) u: &'a mut [u8],
    pub(super) v: &'a mut [u8],
}

/// Converts two rows. Inlined where the compiler may use better instructions.
#[inline(always)]
pub(super) fn two_rows(factors: &Factors, rows: TwoRows<'_>) {
    let TwoRows { pixels: (top, bottom), y: (y0, y1), u, v } = rows;
    let luma = |pixel: &[u8; 4]| {
        let pixel = u32::from_le_bytes(*pixel);
        let [fb, fg, fr] = factors.y;
        let sum = (pixel & 255) * fb + (pixel >> 8 & 255) * fg + (pixel >> 16 & 255) * fr;
        ((sum + (16 << BITS) + (1 << (BITS - 1))) >> BITS) as u8
    };
    for (out, row) in [(y0, top), (y1, bottom)] {
        for (out, pixel) in out.iter_mut().zip(row.as_chunks::<4>().0) {
            *out = luma(pixel);
        }
    }
    let chroma = |[b, g, r]: [i32; 3], [fb, fg, fr]: [i32; 3]| {
        // Sums of four pixels.
        let sum = b * fb + g * fg + r * fr;
        ((sum + (128 << (BITS + 2)) + (1 << (BITS + 1))) >> (BITS + 2)) as u8
    };
    let (upper, lower) = (top.as_chunks::<8>().0, bottom.as_chunks::<8>().0);
    for (((u, v), a), b) in u.iter_mut().zip(v).zip(upper).zip(lower) {
        // Bytes 0 and 2 of a word, and byte 1, added as halves of words.
        let (a, b) = (u64::from_le_bytes(*a), u64::from_le_bytes(*b));
        let even = (a & 0x00ff_00ff_00ff_00ff) + (b & 0x00ff_00ff_00ff_00ff);
        let odd = (a >> 8 & 0x0000_00ff_0000_00ff) + (b >> 8 & 0x0000_00ff_0000_00ff);
        let even = (even as u32) + (even >> 32) as u32;
        let odd = (odd as u32) + (odd >> 32) as u32;
        let sums = [(even & 0xffff) as i32, odd as i32, (even >> 16) as i32];
        *u = chroma(sums, factors.u);
        *v = chroma(sums, factors.v);
    }
}
