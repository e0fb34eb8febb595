//! Where runs of tiles are cut, so that what is of one colour in them can be filled.
//!
//! LZ4 needs a byte for every 255, a fill is a message of some 60. Of a window with a page most is empty:
//! without this, its picture would be mostly lengths of runs.

use crate::display::{Rect, damage::CELL};

/// Pixels of one colour that are worth a message of their own, and one more for what is behind them: 256
/// bytes of LZ4.
const WORTH: u32 = 4 * CELL * CELL;

/// Makes `parts` those of a run of tiles beside one another that has these pixels, cut between tiles.
pub(super) fn cut(run: Rect, pixels: &[u8], parts: &mut Vec<Rect>) {
    parts.clear();
    // Narrow strips go on in the rows below.
    let is_row = run.y / CELL == (run.bottom().max(1) - 1) / CELL;
    if !is_row || run.width * run.height < WORTH {
        parts.push(run);
        return;
    }
    let mut may_grow = false;
    let mut x = run.x;
    while x < run.right() {
        // As many tiles as have the first one's colour.
        let colour = colour(run, x, pixels);
        let mut end = tile_end(run, x);
        while colour.is_some() && end < run.right() && self::colour(run, end, pixels) == colour {
            end = tile_end(run, end);
        }
        let fills = colour.is_some() && (end - x) * run.height >= WORTH;
        match parts.last_mut() {
            Some(last) if may_grow && !fills => last.width += end - x,
            _ => parts.push(Rect::new(x, run.y, end - x, run.height)),
        }
        may_grow = !fills;
        x = end;
    }
}

fn tile_end(run: Rect, x: u32) -> u32 {
    ((x / CELL + 1) * CELL).min(run.right())
}

/// The colour of all pixels of the tile that begins at `x`.
fn colour(run: Rect, x: u32, pixels: &[u8]) -> Option<[u8; 4]> {
    let (pixels, _) = pixels.as_chunks::<4>();
    let columns = (x - run.x) as usize..(tile_end(run, x) - run.x) as usize;
    let mut rows = pixels.chunks_exact(run.width as usize);
    let first = *pixels.get(columns.start)?;
    let is_it = |row: &[[u8; 4]]| {
        row.get(columns.clone()).is_some_and(|part| part.iter().all(|pixel| *pixel == first))
    };
    rows.all(is_it).then_some(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A row of tiles, a letter for the colour of each, `?` for a tile of several.
    fn cuts(tiles: &str, run: Rect) -> Vec<(u32, u32)> {
        let colours = tiles.as_bytes();
        let mut pixels = Vec::new();
        for y in run.y..run.bottom() {
            for x in run.x..run.right() {
                let colour = colours[(x / CELL) as usize];
                let mixed = colour == b'?' && (x + y) % 3 == 0;
                pixels.extend_from_slice(&[colour, 0, mixed.into(), 0]);
            }
        }
        let mut parts = vec![Rect::new(9, 9, 9, 9)];
        cut(run, &pixels, &mut parts);
        let mut x = run.x;
        for part in &parts {
            assert_eq!((part.x, part.y, part.height), (x, run.y, run.height), "{tiles}");
            x += part.width;
        }
        assert_eq!(x, run.right(), "{tiles}");
        parts.iter().map(|part| (part.x, part.width)).collect()
    }

    #[test]
    fn what_can_be_filled_is_cut_out() {
        let row = |tiles: &str| cuts(tiles, Rect::new(0, 128, tiles.len() as u32 * CELL, CELL));
        assert_eq!(row("aaaaaa"), [(0, 384)]);
        assert_eq!(row("??????"), [(0, 384)]);
        assert_eq!(row("aabbaa"), [(0, 384)], "too little of each");
        assert_eq!(row("aaaabbbb"), [(0, 256), (256, 256)]);
        assert_eq!(row("?aaaab?aa?cccc"), [(0, 64), (64, 256), (320, 320), (640, 256)]);
        // Not from a tile's beginning to its end, lower, and in two rows of tiles.
        assert_eq!(cuts("a?bbbbbb", Rect::new(10, 3, 480, 60)), [(10, 118), (128, 362)]);
        assert_eq!(cuts("?bbbbb", Rect::new(0, 64, 384, 30)), [(0, 384)]);
        assert_eq!(cuts("?bbbbbb", Rect::new(0, 40, 448, 64)), [(0, 448)]);
        let mut parts = Vec::new();
        cut(Rect::new(0, 0, 0, 0), &[], &mut parts);
        assert_eq!(parts.len(), 1);
    }
}
