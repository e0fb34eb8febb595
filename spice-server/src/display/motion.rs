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
const PLACES: usize = 4096;
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
/// Width and height in pixels of the units in which rectangles are searched.
const UNIT: (usize, usize) = (16, 4);
/// In areas of more pixels only the middle is searched for places.
const LARGE: u64 = 512 * 1024;
/// Share of an area, in eighths, that a vector must explain to be taken without looking for others.
const GOOD: u64 = 2;
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
/// rows of `stride` bytes. Each move is exact as long as none has been done before it; a move may
/// overwrite what a later one reads. `last` is tried first, and becomes the best vector.
pub(crate) fn find(
    old: &[u8],
    new: &[u8],
    stride: usize,
    area: Rect,
    last: &mut Option<(i32, i32)>,
) -> Vec<Move> {
    let mut moves = Vec::new();
    if (area.width as usize) < WINDOW * 2 || area.height < 8 {
        return moves;
    }
    if let Some(vector) = *last {
        let gain = rectangles(old, new, stride, area, vector, &mut moves);
        if gain * 8 >= u64::from(area.width) * u64::from(area.height) * GOOD {
            return moves;
        }
        moves.clear();
    }
    let mut best = (0, None);
    for vector in vectors(old, new, stride, area) {
        let gain = rectangles(old, new, stride, area, vector, &mut moves);
        if gain > best.0 {
            best = (gain, Some(vector));
        }
    }
    *last = best.1;
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
    let (width, height) = (area.width, area.height);
    let area = if u64::from(width) * u64::from(height) > LARGE {
        Rect::new(area.x + width / 4, area.y, width / 2, height)
    } else {
        area
    };
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

/// Adds the largest rectangles that moved by a vector, and returns how many changed pixels they save.
fn rectangles(
    old: &[u8],
    new: &[u8],
    stride: usize,
    area: Rect,
    (dx, dy): (i32, i32),
    moves: &mut Vec<Move>,
) -> u64 {
    // What stays inside of the area in both pictures.
    let left = area.x + dx.max(0) as u32;
    let right = (i64::from(area.right()) + i64::from(dx.min(0))).max(0) as u32;
    let top = area.y + dy.max(0) as u32;
    let bottom = (i64::from(area.bottom()) + i64::from(dy.min(0))).max(0) as u32;
    if right <= left || bottom <= top {
        return 0;
    }
    let columns = (right - left) as usize / UNIT.0;
    let rows = (bottom - top) as usize / UNIT.1;
    let new_at = |x: u32, y: u32| y as usize * stride + x as usize * PIXEL;
    let old_at = |x: u32, y: u32| {
        new_at((i64::from(x) - i64::from(dx)) as u32, (i64::from(y) - i64::from(dy)) as u32)
    };
    const BYTES: usize = UNIT.0 * PIXEL;
    let line = |pixels: &[u8], at: usize| -> Option<[u8; BYTES]> {
        pixels.get(at..).and_then(|rest| rest.first_chunk()).copied()
    };
    let place =
        |column: usize, row: usize| (left + (column * UNIT.0) as u32, top + (row * UNIT.1) as u32);
    let mut grid = vec![false; columns * rows];
    for (row, cells) in grid.chunks_mut(columns.max(1)).enumerate() {
        for (column, moved) in cells.iter_mut().enumerate() {
            let (x, y) = place(column, row);
            *moved =
                (y..y + UNIT.1 as u32).all(|y| line(new, new_at(x, y)) == line(old, old_at(x, y)));
        }
    }
    let mut saved = 0;
    // Cells of rectangles found before.
    let mut used = vec![false; grid.len()];
    for _ in 0..MAX_RECTS {
        let Some((x0, y0, x1, y1)) = largest(&grid, columns) else { break };
        if (x1 - x0) * (y1 - y0) * UNIT.0 * UNIT.1 < MIN_GAIN {
            break;
        }
        let mut gain = 0;
        for row in y0..y1 {
            for column in x0..x1 {
                let (x, y) = place(column, row);
                let changed = |y: &u32| line(new, new_at(x, *y)) != line(old, new_at(x, *y));
                gain += (y..y + UNIT.1 as u32).filter(changed).count() * UNIT.0;
                let at = row * columns + column;
                if let (Some(moved), Some(used)) = (grid.get_mut(at), used.get_mut(at)) {
                    (*moved, *used) = (false, true);
                }
            }
        }
        if gain < MIN_GAIN {
            continue;
        }
        saved += gain as u64;
        let (mut x, mut y) = place(x0, y0);
        let (mut end, mut under) = place(x1, y1);
        // To the exact row and column.
        let row_moved = |y: u32, x: u32, end: u32| {
            let bytes = (end - x) as usize * PIXEL;
            let (new_at, old_at) = (new_at(x, y), old_at(x, y));
            new.get(new_at..new_at + bytes) == old.get(old_at..old_at + bytes)
        };
        // Not over what another rectangle has.
        let free = |mut rows: std::ops::Range<usize>, columns_there: std::ops::Range<usize>| {
            rows.all(|row| {
                let cells = row * columns + columns_there.start..row * columns + columns_there.end;
                used.get(cells).is_none_or(|cells| !cells.contains(&true))
            })
        };
        let (above, below) = (y0.checked_sub(1), y1);
        let above_free = above.is_none_or(|row| free(row..y0, x0..x1));
        let below_free = below >= rows || free(below..below + 1, x0..x1);
        while above_free && y > top && row_moved(y - 1, x, end) {
            y -= 1;
        }
        while below_free && under < bottom && row_moved(under, x, end) {
            under += 1;
        }
        let before_free = x0.checked_sub(1).is_none_or(|column| free(y0..y1, column..x0));
        let behind_free = x1 >= columns || free(y0..y1, x1..x1 + 1);
        let column_moved = |x: u32| (y..under).all(|y| row_moved(y, x, x + 1));
        while before_free && x > left && column_moved(x - 1) {
            x -= 1;
        }
        while behind_free && end < right && column_moved(end) {
            end += 1;
        }
        moves.push(Move {
            to: Rect::new(x, y, end - x, under - y),
            from: ((i64::from(x) - i64::from(dx)) as u32, (i64::from(y) - i64::from(dy)) as u32),
        });
    }
    saved
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
