//! The few colours of a picture that is no photograph.

/// Slots of the hash table; a power of two, twice the colours or more.
const SLOTS: usize = 512;

/// Up to 256 colours in the order in which they were seen.
#[derive(Debug)]
pub(super) struct Palette {
    colours: Vec<[u8; 4]>,
    /// Index + 1 of the colour; 0 is free.
    slots: [u16; SLOTS],
}

/// Without the byte that says nothing.
fn key(pixel: [u8; 4]) -> u32 {
    u32::from_le_bytes(pixel) & 0x00ff_ffff
}

impl Palette {
    /// The colours of `pixels`, if they are `limit` (at most 256) or fewer.
    pub(super) fn of(pixels: impl Iterator<Item = [u8; 4]>, limit: usize) -> Option<Self> {
        let mut palette = Self { colours: Vec::new(), slots: [0; SLOTS] };
        let mut last = None;
        for pixel in pixels {
            if last == Some(pixel) {
                continue;
            }
            last = Some(pixel);
            let slot = palette.slot(pixel);
            if palette.slots[slot] == 0 {
                if palette.colours.len() == limit.min(256) {
                    return None;
                }
                palette.colours.push(pixel);
                palette.slots[slot] = palette.colours.len() as u16;
            }
        }
        Some(palette)
    }

    pub(super) fn colours(&self) -> &[[u8; 4]] {
        &self.colours
    }

    /// Number of a colour that is in the palette.
    pub(super) fn index(&self, pixel: [u8; 4]) -> u8 {
        self.slots[self.slot(pixel)].saturating_sub(1) as u8
    }

    /// Where a colour is, or where it would go. There are always free slots.
    fn slot(&self, pixel: [u8; 4]) -> usize {
        let key = key(pixel);
        let mut slot = (key.wrapping_mul(0x9e37_79b1) >> 23) as usize % SLOTS;
        loop {
            match self.slots[slot] {
                0 => return slot,
                taken
                    if self
                        .colours
                        .get(usize::from(taken) - 1)
                        .map(|c| crate::encode::palette::key(*c))
                        == Some(key) =>
                {
                    return slot;
                }
                _ => slot = (slot + 1) % SLOTS,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_in_order() {
        let pixels = [[1, 2, 3, 0], [1, 2, 3, 9], [4, 5, 6, 0], [1, 2, 3, 0]];
        let palette = Palette::of(pixels.into_iter(), 2).unwrap();
        assert_eq!(palette.colours(), [[1, 2, 3, 0], [4, 5, 6, 0]]);
        assert_eq!(pixels.map(|pixel| palette.index(pixel)), [0, 0, 1, 0]);
        assert!(Palette::of(pixels.into_iter(), 1).is_none());
    }

    #[test]
    fn all_256() {
        let colour = |i: u32| [(i * 7) as u8, (i >> 3) as u8, i as u8, 0];
        let palette = Palette::of((0..256).map(colour), 256).unwrap();
        assert!((0..256).all(|i| palette.index(colour(i)) == i as u8));
        assert!(Palette::of((0..257).map(colour), 256).is_none());
    }
}
