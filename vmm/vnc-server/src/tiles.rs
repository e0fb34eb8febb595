//! The grid in which damage is counted: bounded, however much a guest draws.

use crate::geometry::Rect;

/// Side of a tile in pixels.
pub(crate) const TILE: u32 = 64;

/// A mark per tile of a picture.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tiles {
    width: u32,
    height: u32,
    marks: Vec<bool>,
}

impl Tiles {
    /// No marks.
    pub(crate) fn new(width: u32, height: u32) -> Self {
        let count = width.div_ceil(TILE) * height.div_ceil(TILE);
        Self { width, height, marks: vec![false; count as usize] }
    }

    fn columns(&self) -> usize {
        self.width.div_ceil(TILE) as usize
    }

    pub(crate) fn is_empty(&self) -> bool {
        !self.marks.contains(&true)
    }

    pub(crate) fn clear(&mut self) {
        self.marks.fill(false);
    }

    /// Marks all tiles that the rectangle touches.
    pub(crate) fn mark(&mut self, rect: Rect) {
        let rect = rect.clipped(self.width, self.height);
        if rect.is_empty() {
            return;
        }
        let columns = self.columns();
        let from = (rect.x / TILE) as usize;
        let to = (rect.x + rect.width).div_ceil(TILE) as usize;
        for row in rect.y / TILE..(rect.y + rect.height).div_ceil(TILE) {
            let start = row as usize * columns;
            if let Some(marks) = self.marks.get_mut(start + from..start + to) {
                marks.fill(true);
            }
        }
    }

    /// Adds the marks of another grid of the same size.
    pub(crate) fn add(&mut self, other: &Self) {
        self.marks.iter_mut().zip(&other.marks).for_each(|(mark, other)| *mark |= other);
    }

    /// Number of tiles, marked or not.
    pub(crate) fn count(&self) -> usize {
        self.marks.len()
    }

    /// Numbers of the marked tiles.
    pub(crate) fn numbers(&self) -> impl Iterator<Item = usize> + '_ {
        self.marks.iter().enumerate().filter(|(_, mark)| **mark).map(|(number, _)| number)
    }

    /// Keeps the marks of tiles for whose numbers `keep` says so.
    pub(crate) fn retain(&mut self, keep: impl Fn(usize) -> bool) {
        self.marks.iter_mut().enumerate().for_each(|(number, mark)| *mark &= keep(number));
    }

    /// Takes away the marks that another grid of the same size has.
    pub(crate) fn remove(&mut self, other: &Self) {
        self.marks.iter_mut().zip(&other.marks).for_each(|(mark, other)| *mark &= !other);
    }

    /// The marked tiles, cut at the picture's edges.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Rect> + '_ {
        self.numbers().map(|number| self.tile(number))
    }

    fn tile(&self, index: usize) -> Rect {
        let (x, y) = (index % self.columns(), index / self.columns());
        Rect::new(x as u32 * TILE, y as u32 * TILE, TILE, TILE).clipped(self.width, self.height)
    }

    /// Marked tiles that lie side by side, as rectangles at most `max_width` wide.
    pub(crate) fn runs(&self, max_width: u32) -> Vec<Rect> {
        let mut runs: Vec<Rect> = Vec::new();
        for tile in self.iter() {
            match runs.last_mut() {
                Some(run)
                    if run.y == tile.y
                        && run.x + run.width == tile.x
                        && run.width + tile.width <= max_width =>
                {
                    run.width += tile.width;
                }
                _ => runs.push(tile),
            }
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_and_runs() {
        let mut tiles = Tiles::new(200, 100);
        assert!(tiles.is_empty());
        tiles.mark(Rect::new(63, 0, 2, 1));
        tiles.mark(Rect::new(199, 99, 50, 50));
        tiles.mark(Rect::new(500, 0, 9, 9));
        tiles.mark(Rect::new(0, 0, 0, 9));
        assert_eq!(tiles.runs(2048), [Rect::new(0, 0, 128, 64), Rect::new(192, 64, 8, 36)]);
        assert_eq!(tiles.runs(64).len(), 3);
        let mut more = Tiles::new(200, 100);
        more.mark(Rect::new(128, 0, 1, 1));
        tiles.add(&more);
        assert_eq!(tiles.runs(2048)[0], Rect::new(0, 0, 192, 64));
        tiles.remove(&more);
        assert_eq!(tiles.numbers().collect::<Vec<_>>(), [0, 1, 7]);
        tiles.retain(|number| number > 0);
        assert_eq!(tiles.runs(2048)[0], Rect::new(64, 0, 64, 64));
        assert_eq!(tiles.count(), 8);
        tiles.clear();
        assert!(tiles.is_empty());
    }
}
