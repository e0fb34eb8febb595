//! What a viewer shows already, remembered by hash, so that damage which changed nothing costs
//! nothing: many programs flush their whole picture for every blinking cursor.

use crate::{Rect, display::damage::CELL};

/// Hashes of a picture's cells; 0 is an unknown one.
#[derive(Debug)]
pub(crate) struct Seen {
    width: u32,
    height: u32,
    columns: u32,
    cells: Vec<u64>,
    /// Unknown to whoever paints the picture, so that nobody can make different cells look alike.
    seed: u64,
}

impl Seen {
    /// Nothing is known about a picture of this size.
    pub(crate) fn new((width, height): (u32, u32)) -> Self {
        let columns = width.div_ceil(CELL);
        let count = columns as usize * height.div_ceil(CELL) as usize;
        Self { width, height, columns, cells: vec![0; count], seed: rand::random() }
    }

    /// The part of `rect` that differs from what was sent, from the first differing cell to the
    /// last; `None` if nothing does. `pixels` are the rectangle's, without padding, and count as
    /// sent exactly from now on.
    pub(crate) fn unseen(&mut self, rect: Rect, pixels: &[u8]) -> Option<Rect> {
        let ends = |end: u32, size: u32| end.is_multiple_of(CELL) || end == size;
        let whole_cells = rect.x.is_multiple_of(CELL)
            && rect.y.is_multiple_of(CELL)
            && ends(rect.right(), self.width)
            && ends(rect.bottom(), self.height)
            && rect.height <= CELL;
        if !whole_cells {
            self.forget(rect);
            return Some(rect);
        }
        let stride = rect.width as usize * 4;
        let (mut first, mut last) = (None, 0);
        for column in 0..rect.width.div_ceil(CELL) {
            let left = column as usize * CELL as usize * 4;
            let right = (left + CELL as usize * 4).min(stride);
            let mut hash = self.seed;
            for row in pixels.chunks_exact(stride) {
                hash = add(hash, row.get(left..right).unwrap_or_default());
            }
            let index = (rect.y / CELL * self.columns + rect.x / CELL + column) as usize;
            let Some(known) = self.cells.get_mut(index) else { return Some(rect) };
            if std::mem::replace(known, hash.max(1)) != hash.max(1) {
                first.get_or_insert(column);
                last = column;
            }
        }
        let x = first? * CELL;
        let right = ((last + 1) * CELL).min(rect.width);
        Some(Rect::new(rect.x + x, rect.y, right - x, rect.height))
    }

    /// What the viewer shows there is not known.
    pub(crate) fn forget(&mut self, rect: Rect) {
        let rect = rect.clipped(self.width, self.height);
        if rect.is_empty() {
            return;
        }
        for row in rect.y / CELL..=(rect.bottom() - 1) / CELL {
            for column in rect.x / CELL..=(rect.right() - 1) / CELL {
                if let Some(cell) = self.cells.get_mut((row * self.columns + column) as usize) {
                    *cell = 0;
                }
            }
        }
    }
}

/// Adds bytes to a hash: two independent multiply chains keep up with memory.
fn add(hash: u64, bytes: &[u8]) -> u64 {
    const K: u64 = 0x9e37_79b9_7f4a_7c15;
    let mix = |hash: u64, word: u64| (hash ^ word).wrapping_mul(K).rotate_left(29);
    let (mut a, mut b) = (hash, hash.rotate_left(32) ^ K);
    let mut pairs = bytes.chunks_exact(16);
    for pair in &mut pairs {
        let word = |at| {
            let bytes = pair.get(at..at + 8).and_then(|bytes| bytes.first_chunk());
            u64::from_le_bytes(*bytes.unwrap_or(&[0; 8]))
        };
        a = mix(a, word(0));
        b = mix(b, word(8));
    }
    for byte in pairs.remainder() {
        a = mix(a, u64::from(*byte));
    }
    mix(a, b)
}

/// Keeps the columns of `part` of the pixels of `whole`, in place.
pub(crate) fn keep_columns(pixels: &mut Vec<u8>, whole: Rect, part: Rect) {
    if whole.width == part.width {
        return;
    }
    let (old, new) = (whole.width as usize * 4, part.width as usize * 4);
    let left = (part.x - whole.x) as usize * 4;
    for row in 0..part.height as usize {
        let from = row * old + left;
        pixels.copy_within(from..from + new, row * new);
    }
    pixels.truncate(new * part.height as usize);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pixels of `rect`, numbered by their place in a picture, with one pixel changed.
    fn pixels(rect: Rect, changed: Option<(u32, u32)>) -> Vec<u8> {
        let mut out = Vec::new();
        for y in rect.y..rect.bottom() {
            for x in rect.x..rect.right() {
                let value = if changed == Some((x, y)) { u32::MAX } else { y * 1000 + x };
                out.extend_from_slice(&value.to_le_bytes());
            }
        }
        out
    }

    #[test]
    fn only_changed_cells_are_sent() {
        let mut seen = Seen::new((300, 100));
        let row = Rect::new(0, 0, 300, 64);
        assert_eq!(seen.unseen(row, &pixels(row, None)), Some(row));
        assert_eq!(seen.unseen(row, &pixels(row, None)), None);
        let changed = pixels(row, Some((130, 63)));
        assert_eq!(seen.unseen(row, &changed), Some(Rect::new(128, 0, 64, 64)));
        assert_eq!(seen.unseen(row, &changed), None);
        let end = pixels(row, Some((299, 0)));
        assert_eq!(seen.unseen(row, &end), Some(Rect::new(128, 0, 172, 64)));
        let last = Rect::new(256, 64, 44, 36);
        assert_eq!(seen.unseen(last, &pixels(last, None)), Some(last));
        assert_eq!(seen.unseen(last, &pixels(last, None)), None);
    }

    #[test]
    fn parts_of_cells_make_them_unknown() {
        let mut seen = Seen::new((128, 64));
        let all = Rect::new(0, 0, 128, 64);
        seen.unseen(all, &pixels(all, None));
        let part = Rect::new(70, 3, 4, 4);
        assert_eq!(seen.unseen(part, &pixels(part, None)), Some(part));
        assert_eq!(seen.unseen(all, &pixels(all, None)), Some(Rect::new(64, 0, 64, 64)));
        seen.forget(Rect::new(0, 0, 1, 1));
        assert_eq!(seen.unseen(all, &pixels(all, None)), Some(Rect::new(0, 0, 64, 64)));
    }

    #[test]
    fn columns_are_kept() {
        let whole = Rect::new(64, 0, 192, 3);
        for part in [whole, Rect::new(64, 0, 64, 3), Rect::new(128, 0, 64, 3)] {
            let mut bytes = pixels(whole, None);
            keep_columns(&mut bytes, whole, part);
            assert_eq!(bytes, pixels(part, None));
        }
    }
}
