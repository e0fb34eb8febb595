//! Finding what moved: scrolled pages, dragged windows, panned pictures, in any direction.
//!
//! Places are chosen by their content (a rolling hash over 32 pixels of a row), so the same content
//! yields the same places wherever it is. Equal places in the old and the new picture vote for a
//! vector. For the best vectors the largest rectangles are found whose pixels really moved so.
//! Everything found is exact; what is not found is merely sent as pixels.

use std::collections::HashMap;

use super::Rect;

const PIXEL: usize = 4;
/// Pixels a place's hash covers: what a 32-bit rolling hash remembers.
const WINDOW: usize = 32;
/// About how many places are wanted in an area full of edges.
const PLACES: usize = 16384;
/// Rows of the new picture that are searched: every so many.
const ROW_STEP: usize = 2;
/// Content that appears more often than this in the old picture tells nothing.
const MAX_REPEATS: usize = 4;
/// Votes a vector needs.
const MIN_VOTES: u32 = 6;
/// Vectors tried.
const MAX_VECTORS: usize = 2;
/// Rectangles tried for a vector.
const MAX_RECTS: usize = 4;
/// Width in pixels of the units in which rectangles are searched.
const UNIT: usize = 8;
/// Changed pixels a move must save.
const MIN_GAIN: usize = 2048;

/// A rectangle whose new content the client shows at another place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Move {
    /// Where it belongs.
    pub(crate) to: Rect,
    /// Where its top left corner is now.
    pub(crate) from: (u32, u32),
}

/// Moves inside `area` that turn a part of `old` into `new`, most useful first. Both pictures have
/// rows of `stride` bytes. A move may overwrite what a later one reads: check before use.
pub(crate) fn find(old: &[u8], new: &[u8], stride: usize, area: Rect) -> Vec<Move> {
    let mut moves = Vec::new();
    if (area.width as usize) < WINDOW * 2 || area.height < 8 {
        return moves;
    }
    for vector in vectors(old, new, stride, area) {
        rectangles(old, new, stride, area, vector, &mut moves);
    }
    moves.sort_by_key(|step| std::cmp::Reverse(step.to.width * step.to.height));
    moves
}

/// A place with telling content: its hash, column and row.
type Place = (u32, u32, u32);

fn places(pixels: &[u8], stride: usize, area: Rect, step: usize) -> Vec<Place> {
    // One place in 2^bits.
    let bits = (area.width as usize * area.height as usize / PLACES).max(1).ilog2().min(12);
    let mut found = Vec::new();
    for y in (area.y..area.bottom()).step_by(step) {
        let start = y as usize * stride + area.x as usize * PIXEL;
        let row = pixels.get(start..start + area.width as usize * PIXEL).unwrap_or_default();
        let (mut hash, mut previous) = (0u32, u32::MAX);
        for (x, pixel) in row.as_chunks::<PIXEL>().0.iter().enumerate() {
            let pixel = u32::from_le_bytes(*pixel);
            let mixed = pixel.wrapping_mul(0x9e37_79b1);
            hash = (hash << 1).wrapping_add(mixed ^ mixed >> 15);
            // Only at edges: inside of flat areas everything looks alike.
            let chosen = pixel != previous && hash.leading_zeros() >= bits;
            previous = pixel;
            if chosen && x >= WINDOW {
                found.push((hash, area.x + x as u32, y));
            }
        }
    }
    found
}

/// The vectors (from old to new) with the most votes.
fn vectors(old: &[u8], new: &[u8], stride: usize, area: Rect) -> Vec<(i32, i32)> {
    let mut known = places(old, stride, area, 1);
    known.sort_unstable();
    let mut votes: HashMap<(i32, i32), u32> = HashMap::new();
    for (hash, x, y) in places(new, stride, area, ROW_STEP) {
        let first = known.partition_point(|place| place.0 < hash);
        let same = known.get(first..).unwrap_or_default();
        let count = same.iter().take(MAX_REPEATS + 1).take_while(|place| place.0 == hash).count();
        if count > MAX_REPEATS {
            continue;
        }
        for (_, old_x, old_y) in same.iter().take(count) {
            let vector = (x as i32 - *old_x as i32, y as i32 - *old_y as i32);
            *votes.entry(vector).or_default() += 1;
        }
    }
    votes.remove(&(0, 0));
    let mut best: Vec<_> = votes.into_iter().filter(|(_, votes)| *votes >= MIN_VOTES).collect();
    best.sort_unstable_by_key(|(vector, votes)| (std::cmp::Reverse(*votes), *vector));
    let enough = best.first().map_or(0, |(_, votes)| votes / 8);
    best.into_iter()
        .filter(|(_, votes)| *votes >= enough)
        .take(MAX_VECTORS)
        .map(|(vector, _)| vector)
        .collect()
}

/// The largest rectangles that moved by a vector.
fn rectangles(
    old: &[u8],
    new: &[u8],
    stride: usize,
    area: Rect,
    (dx, dy): (i32, i32),
    moves: &mut Vec<Move>,
) {
    // What stays inside of the area in both pictures.
    let left = area.x + dx.max(0) as u32;
    let right = (i64::from(area.right()) + i64::from(dx.min(0))).max(0) as u32;
    let top = area.y + dy.max(0) as u32;
    let bottom = (i64::from(area.bottom()) + i64::from(dy.min(0))).max(0) as u32;
    if right <= left || bottom <= top {
        return;
    }
    let columns = (right - left) as usize / UNIT;
    let rows = (bottom - top) as usize;
    let new_at = |x: u32, y: u32| y as usize * stride + x as usize * PIXEL;
    let old_at = |x: u32, y: u32| {
        new_at((i64::from(x) - i64::from(dx)) as u32, (i64::from(y) - i64::from(dy)) as u32)
    };
    let unit = |pixels: &[u8], at: usize| -> Option<[u8; UNIT * PIXEL]> {
        pixels.get(at..).and_then(|rest| rest.first_chunk()).copied()
    };
    let mut grid = vec![false; columns * rows];
    let place = |column: usize, row: usize| (left + (column * UNIT) as u32, top + row as u32);
    for (row, line) in grid.chunks_mut(columns.max(1)).enumerate() {
        for (column, moved) in line.iter_mut().enumerate() {
            let (x, y) = place(column, row);
            *moved = unit(new, new_at(x, y)) == unit(old, old_at(x, y));
        }
    }
    for _ in 0..MAX_RECTS {
        let Some((x0, y0, x1, y1)) = largest(&grid, columns) else { return };
        if (x1 - x0) * UNIT * (y1 - y0) < MIN_GAIN {
            return;
        }
        let mut gain = 0;
        for row in y0..y1 {
            for column in x0..x1 {
                let (x, y) = place(column, row);
                let at = new_at(x, y);
                gain += usize::from(unit(new, at) != unit(old, at)) * UNIT;
                if let Some(moved) = grid.get_mut(row * columns + column) {
                    *moved = false;
                }
            }
        }
        if gain < MIN_GAIN {
            continue;
        }
        let (mut x, y) = place(x0, y0);
        let mut end = x + ((x1 - x0) * UNIT) as u32;
        let height = (y1 - y0) as u32;
        // To the exact column.
        let column_moved = |x: u32| {
            (y..y + height).all(|y| {
                let (new_at, old_at) = (new_at(x, y), old_at(x, y));
                new.get(new_at..new_at + PIXEL) == old.get(old_at..old_at + PIXEL)
            })
        };
        while x > left && column_moved(x - 1) {
            x -= 1;
        }
        while end < right && column_moved(end) {
            end += 1;
        }
        moves.push(Move {
            to: Rect::new(x, y, end - x, height),
            from: ((i64::from(x) - i64::from(dx)) as u32, (i64::from(y) - i64::from(dy)) as u32),
        });
    }
}

/// The largest all-true rectangle of a grid, as `(x0, y0, x1, y1)`: for every row the heights of the
/// columns above it, and on these the largest rectangle under a histogram.
fn largest(grid: &[bool], columns: usize) -> Option<(usize, usize, usize, usize)> {
    if columns == 0 {
        return None;
    }
    let mut heights = vec![0usize; columns];
    let mut best = (0, (0, 0, 0, 0));
    // Columns of growing height: where each began, and its height.
    let mut open: Vec<(usize, usize)> = Vec::with_capacity(columns);
    for (row, line) in grid.chunks(columns).enumerate() {
        open.clear();
        for column in 0..=columns {
            let height = match (heights.get_mut(column), line.get(column)) {
                (Some(height), Some(true)) => {
                    *height += 1;
                    *height
                }
                (Some(height), _) => {
                    *height = 0;
                    0
                }
                _ => 0,
            };
            let mut start = column;
            while let Some((from, tall)) = open.pop_if(|(_, tall)| *tall > height) {
                start = from;
                let area = tall * (column - from);
                if area > best.0 {
                    best = (area, (from, row + 1 - tall, column, row + 1));
                }
            }
            if height > 0 && open.last().is_none_or(|(_, tall)| *tall < height) {
                open.push((start, height));
            }
        }
    }
    (best.0 > 0).then_some(best.1)
}
