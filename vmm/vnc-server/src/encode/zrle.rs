//! ZRLE (RFC 6143 §7.7.6): tiles of 64×64 pixels, in one zlib stream. Runs are left to zlib.

use super::{Picture, palette::Palette};
use crate::{geometry::Rect, proto::pixel::PixelFormat};

const TILE: u32 = 64;

/// More colours than these are not packed.
const PACKED: usize = 16;

/// Appends the tiles of a rectangle, not yet compressed.
pub(super) fn tiles(picture: Picture<'_>, rect: Rect, format: &PixelFormat, out: &mut Vec<u8>) {
    for y in (rect.y..rect.y + rect.height).step_by(TILE as usize) {
        for x in (rect.x..rect.x + rect.width).step_by(TILE as usize) {
            let width = TILE.min(rect.x + rect.width - x);
            let height = TILE.min(rect.y + rect.height - y);
            tile(picture, Rect::new(x, y, width, height), format, out);
        }
    }
}

fn tile(picture: Picture<'_>, rect: Rect, format: &PixelFormat, out: &mut Vec<u8>) {
    let Some(palette) = Palette::of(picture.iter(rect), PACKED) else {
        out.push(0);
        picture.iter(rect).for_each(|pixel| format.push_compact(pixel, out));
        return;
    };
    let colours = palette.colours();
    out.push(colours.len() as u8);
    colours.iter().for_each(|colour| format.push_compact(*colour, out));
    let bits = match colours.len() {
        0 | 1 => return,
        2 => 1,
        3 | 4 => 2,
        _ => 4,
    };
    for row in picture.rows(rect) {
        pack(row.iter().map(|pixel| palette.index(*pixel)), bits, out);
    }
}

/// Appends numbers of `bits` bits, highest bits first; the last byte is filled up.
pub(super) fn pack(numbers: impl Iterator<Item = u8>, bits: u32, out: &mut Vec<u8>) {
    let (mut byte, mut used) = (0_u8, 0);
    for number in numbers {
        used += bits;
        byte |= number << (8 - used);
        if used == 8 {
            out.push(byte);
            (byte, used) = (0, 0);
        }
    }
    if used > 0 {
        out.push(byte);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encode(pixels: &[[u8; 4]], width: u32) -> Vec<u8> {
        let picture = Picture { pixels: pixels.as_flattened(), width };
        let rect = Rect::new(0, 0, width, pixels.len() as u32 / width);
        let mut out = Vec::new();
        tiles(picture, rect, &PixelFormat::BGRX, &mut out);
        out
    }

    #[test]
    fn solid_packed_and_plain() {
        assert_eq!(encode(&[[1, 2, 3, 0]; 64 * 3], 64), [1, 1, 2, 3]);
        let (a, b) = ([1, 1, 1, 0], [2, 2, 2, 0]);
        // Ten pixels a row: two bytes each.
        let mut pixels = vec![a; 20];
        pixels[9] = b;
        pixels[10] = b;
        assert_eq!(encode(&pixels, 10), [2, 1, 1, 1, 2, 2, 2, 0, 0b0100_0000, 0b1000_0000, 0]);
        let many: Vec<[u8; 4]> = (0..17).map(|i| [i, 0, 0, 0]).collect();
        let plain = encode(&many, 17);
        assert_eq!(plain.len(), 1 + 17 * 3);
        assert_eq!(plain[..7], [0, 0, 0, 0, 1, 0, 0]);
    }

    #[test]
    fn tiles_at_the_edges_are_smaller() {
        // 65×65: 64×64, 1×64, 64×1 and 1×1.
        assert_eq!(encode(&[[7, 8, 9, 0]; 65 * 65], 65), [1, 7, 8, 9].repeat(4));
    }
}
