//! What one viewer has not been sent yet, in bounded memory.
//!
//! The picture is divided into cells of 64 by 64 pixels, and every cell remembers the bounding
//! rectangle of its damage. That costs four bytes per cell however many rectangles come, keeps small
//! damage small, and yields runs of neighbouring cells as rectangles worth a message.

use super::Rect;

/// Side of a cell in pixels.
pub(crate) const CELL: u32 = 64;
/// Most cells in one run: 1024 by 64 pixels, 256 KiB.
const MAX_RUN_CELLS: u32 = 16;

/// Damaged part of one cell, in pixels from its corner; empty when `x1` is 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct CellDamage {
    x0: u8,
    y0: u8,
    x1: u8,
    y1: u8,
}

/// The damage of one picture for one viewer.
#[derive(Debug)]
pub(crate) struct Damage {
    width: u32,
    height: u32,
    columns: u32,
    cells: Vec<CellDamage>,
    dirty: usize,
}

impl Damage {
    /// No damage yet on a picture of this size.
    pub(crate) fn new(width: u32, height: u32) -> Self {
        let columns = width.div_ceil(CELL);
        let count = columns as usize * height.div_ceil(CELL) as usize;
        Self { width, height, columns, cells: vec![CellDamage::default(); count], dirty: 0 }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.dirty == 0
    }

    pub(crate) fn add_all(&mut self) {
        self.add(Rect::new(0, 0, self.width, self.height));
    }

    /// Adds a rectangle; what lies outside of the picture does not count.
    pub(crate) fn add(&mut self, rect: Rect) {
        let rect = rect.clipped(self.width, self.height);
        if rect.is_empty() {
            return;
        }
        for row in rect.y / CELL..=(rect.bottom() - 1) / CELL {
            let y0 = rect.y.saturating_sub(row * CELL) as u8;
            let y1 = (rect.bottom() - row * CELL).min(CELL) as u8;
            for column in rect.x / CELL..=(rect.right() - 1) / CELL {
                let x0 = rect.x.saturating_sub(column * CELL) as u8;
                let x1 = (rect.right() - column * CELL).min(CELL) as u8;
                let index = row as usize * self.columns as usize + column as usize;
                let Some(cell) = self.cells.get_mut(index) else { continue };
                if cell.x1 == 0 {
                    *cell = CellDamage { x0, y0, x1, y1 };
                    self.dirty += 1;
                } else {
                    cell.x0 = cell.x0.min(x0);
                    cell.y0 = cell.y0.min(y0);
                    cell.x1 = cell.x1.max(x1);
                    cell.y1 = cell.y1.max(y1);
                }
            }
        }
    }

    /// Takes all damage, as rectangles of at most 1024 by 64 pixels.
    pub(crate) fn take_all(&mut self) -> Vec<Rect> {
        let mut rects = Vec::new();
        let mut index = 0;
        while self.dirty > 0 && index < self.cells.len() {
            match self.take(index) {
                Some((rect, count)) => {
                    rects.push(rect);
                    index += count;
                }
                None => index += 1,
            }
        }
        rects
    }

    /// Takes the damage that begins in a cell, and tells how many cells it is in.
    fn take(&mut self, index: usize) -> Option<(Rect, usize)> {
        let first = self.cells.get(index).copied().filter(|cell| cell.x1 != 0)?;
        let column = index as u32 % self.columns;
        let row = index as u32 / self.columns;
        let limit = MAX_RUN_CELLS.min(self.columns - column);
        let mut last = first;
        let mut count = 1;
        while count < limit {
            let next = self.cells.get(index + count as usize).copied().unwrap_or_default();
            let joins = next.x1 != 0 && next.x0 == 0 && u32::from(last.x1) == CELL;
            if !joins || (next.y0, next.y1) != (first.y0, first.y1) {
                break;
            }
            last = next;
            count += 1;
        }
        for cell in self.cells.iter_mut().skip(index).take(count as usize) {
            *cell = CellDamage::default();
        }
        self.dirty -= count as usize;
        let x = column * CELL + u32::from(first.x0);
        let right = (column + count - 1) * CELL + u32::from(last.x1);
        let y = row * CELL + u32::from(first.y0);
        let rect = Rect::new(x, y, right - x, u32::from(first.y1 - first.y0));
        Some((rect, count as usize))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Marks the pixels of rectangles in a picture.
    fn paint(size: (u32, u32), rects: &[Rect]) -> Vec<bool> {
        let mut pixels = vec![false; (size.0 * size.1) as usize];
        for rect in rects {
            for y in rect.y..rect.bottom() {
                for x in rect.x..rect.right() {
                    pixels[(y * size.0 + x) as usize] = true;
                }
            }
        }
        pixels
    }

    #[test]
    fn everything_is_covered_once_and_stays_inside() {
        let size = (1030, 200);
        let mut damage = Damage::new(size.0, size.1);
        damage.add_all();
        let rects = damage.take_all();
        assert_eq!(paint(size, &rects), vec![true; (size.0 * size.1) as usize]);
        let area: u64 = rects.iter().map(|r| u64::from(r.width) * u64::from(r.height)).sum();
        assert_eq!(area, 1030 * 200);
        assert!(rects.iter().all(|r| r.width * r.height <= 65536));
        assert!(damage.is_empty());
    }

    #[test]
    fn small_damage_stays_small() {
        let mut damage = Damage::new(1920, 1080);
        damage.add(Rect::new(70, 70, 8, 16));
        assert_eq!(damage.take_all(), [Rect::new(70, 70, 8, 16)]);
        damage.add(Rect::new(100, 10, 200, 5));
        assert_eq!(damage.take_all(), [Rect::new(100, 10, 200, 5)]);
        assert_eq!(damage.take_all(), []);
        damage.add(Rect::new(u32::MAX, 0, u32::MAX, u32::MAX));
        damage.add(Rect::new(5, 5, 0, 9));
        assert!(damage.is_empty());
    }

    #[test]
    fn random_damage_is_covered() {
        let size = (300, 260);
        let mut state = 7u32;
        let mut random = |below: u32| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 16) % below
        };
        for _ in 0..200 {
            let mut damage = Damage::new(size.0, size.1);
            let rects: Vec<Rect> = (0..random(6))
                .map(|_| Rect::new(random(300), random(260), random(200), random(200)))
                .map(|r| r.clipped(size.0, size.1))
                .collect();
            for rect in &rects {
                damage.add(*rect);
            }
            let wanted = paint(size, &rects);
            let got = paint(size, &damage.take_all());
            assert!(wanted.iter().zip(&got).all(|(want, got)| !want || *got));
            assert!(damage.is_empty());
        }
    }
}
