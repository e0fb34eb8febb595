//! Which tiles change at video rate, and the rectangles they form.

use std::time::{Duration, Instant};

use super::{Rect, tiles::bounds};

/// Longest pause between two changes of a film.
const PAUSE: Duration = Duration::from_millis(200);
/// The same when it is the line that keeps us from looking more often.
const LONG_PAUSE: Duration = Duration::from_millis(1500);
/// Changes that one counts for at most, when frames were skipped.
const MAX_WEIGHT: u16 = 3;
/// Changes in a row that make a tile part of a film.
const HOT: u16 = 8;
/// Tiles a film has at least.
const MIN_TILES: usize = 6;
/// Pixels of a change that may belong to a film.
const MIN_CHANGE: u32 = 24 * 24;

#[derive(Debug, Clone, Copy, Default)]
struct Heat {
    changes: u16,
    since: Option<Instant>,
    last: Option<Instant>,
    /// The pixels that changed, once a film is likely.
    extent: Option<Rect>,
    /// The last exact coding of it was large, as with photographs.
    photo: bool,
}

/// The heat of a picture's tiles.
#[derive(Debug)]
pub(crate) struct HeatMap {
    columns: usize,
    tiles: Vec<Heat>,
    hot: usize,
    /// When it was last looked, the pause that is allowed now, and what a change counts for.
    looked: Option<Instant>,
    pause: Duration,
    weight: u16,
}

/// A rectangle that changes at video rate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Film {
    pub(crate) rect: Rect,
    /// Changes per second.
    pub(crate) rate: f64,
}

impl HeatMap {
    /// Everything is cold in a grid of this many columns and rows.
    pub(crate) fn new((columns, rows): (usize, usize)) -> Self {
        let tiles = vec![Heat::default(); columns * rows];
        Self { columns, tiles, hot: 0, looked: None, pause: PAUSE, weight: 1 }
    }

    /// A frame is looked at that is so many newer than the one before: on a thin line most of a film's
    /// are never seen.
    pub(crate) fn look(&mut self, frames: u64, now: Instant) {
        let interval = self.looked.map(|at| now.saturating_duration_since(at));
        self.looked = Some(now);
        let frames = u32::try_from(frames).unwrap_or(u32::MAX).max(1);
        let is_fast = interval.is_some_and(|interval| interval / frames <= PAUSE);
        (self.pause, self.weight) = match interval {
            Some(interval) if is_fast && frames > 1 => (
                (interval * 2).clamp(PAUSE, LONG_PAUSE),
                u16::try_from(frames).unwrap_or(MAX_WEIGHT).min(MAX_WEIGHT),
            ),
            _ => (PAUSE, 1),
        };
    }

    /// A part of a tile changed, and not by a move.
    pub(crate) fn changed(&mut self, index: usize, part: Rect, now: Instant) {
        let (pause, weight) = (self.pause, self.weight);
        let Some(tile) = self.tiles.get_mut(index) else { return };
        let was_hot = tile.changes >= HOT;
        let continues = is_recent(tile, pause, now);
        if !continues {
            *tile = Heat { photo: tile.photo, ..Heat::default() };
        }
        if part.width * part.height >= MIN_CHANGE {
            tile.changes = tile.changes.saturating_add(weight);
        }
        tile.since.get_or_insert(now);
        tile.last = Some(now);
        // The first changes may have been another picture that made room for the film.
        if tile.changes > HOT / 2 {
            tile.extent = Some(tile.extent.map_or(part, |extent| bounds(extent, part)));
        }
        match (was_hot, tile.changes >= HOT) {
            (false, true) => self.hot += 1,
            (true, false) => self.hot = self.hot.saturating_sub(1),
            _ => {}
        }
    }

    /// How a tile's pixels were coded.
    pub(crate) fn coded(&mut self, index: usize, photo: bool) {
        if let Some(tile) = self.tiles.get_mut(index) {
            tile.photo = photo;
        }
    }

    /// Whether a tile changes often.
    pub(crate) fn is_warm(&self, index: usize, now: Instant) -> bool {
        self.tiles
            .get(index)
            .is_some_and(|tile| tile.changes >= 3 && is_recent(tile, self.pause, now))
    }

    /// The films now running, largest first.
    pub(crate) fn films(&mut self, now: Instant) -> Vec<Film> {
        if self.hot < MIN_TILES {
            return Vec::new();
        }
        let pause = self.pause;
        let is_hot = |tile: &Heat| tile.changes >= HOT && tile.photo && is_recent(tile, pause, now);
        let mut left: Vec<bool> = self.tiles.iter().map(is_hot).collect();
        self.hot = left.iter().filter(|hot| **hot).count().max(self.count_hot());
        let mut films = Vec::new();
        for start in 0..left.len() {
            let mut stack = vec![start];
            let mut members = Vec::new();
            while let Some(index) = stack.pop() {
                let Some(hot) = left.get_mut(index) else { continue };
                if !std::mem::take(hot) {
                    continue;
                }
                members.push(index);
                let column = index % self.columns;
                if column > 0 {
                    stack.push(index - 1);
                }
                if column + 1 < self.columns {
                    stack.push(index + 1);
                }
                stack.push(index + self.columns);
                stack.extend(index.checked_sub(self.columns));
            }
            films.extend(self.film(&members, now));
        }
        films.sort_by_key(|film| std::cmp::Reverse(film.rect.width * film.rect.height));
        films
    }

    fn count_hot(&self) -> usize {
        self.tiles.iter().filter(|tile| tile.changes >= HOT).count()
    }

    fn film(&self, members: &[usize], now: Instant) -> Option<Film> {
        if members.len() < MIN_TILES {
            return None;
        }
        let tiles = || members.iter().filter_map(|index| self.tiles.get(*index));
        let rect = tiles().filter_map(|tile| tile.extent).reduce(bounds)?;
        let (mut x, mut y) = ((usize::MAX, 0), (usize::MAX, 0));
        for index in members {
            let (column, row) = (index % self.columns, index / self.columns);
            x = (x.0.min(column), x.1.max(column + 1));
            y = (y.0.min(row), y.1.max(row + 1));
        }
        // Ragged things are no film.
        if members.len() * 10 < (x.1 - x.0) * (y.1 - y.0) * 7 {
            return None;
        }
        let rate = tiles().filter_map(|tile| {
            let time = now.saturating_duration_since(tile.since?).as_secs_f64();
            Some(f64::from(tile.changes) / time.max(0.05))
        });
        Some(Film { rect, rate: rate.fold(0.0, f64::max) })
    }
}

fn is_recent(tile: &Heat, pause: Duration, now: Instant) -> bool {
    tile.last.is_some_and(|last| now.saturating_duration_since(last) <= pause)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(map: &mut HeatMap, indices: &[usize], frames: u64, start: Instant) -> Instant {
        let mut now = start;
        for frame in 0..frames {
            now = start + Duration::from_millis(frame * 33);
            for index in indices {
                let (x, y) = (*index as u32 % 10 * 64, *index as u32 / 10 * 64);
                map.changed(*index, Rect::new(x + 10, y, 54, 60), now);
                map.coded(*index, true);
            }
        }
        now
    }

    #[test]
    fn a_film_is_found_where_it_plays() {
        let mut map = HeatMap::new((10, 10));
        let indices: Vec<usize> =
            (2..5).flat_map(|row| (3..7).map(move |column| row * 10 + column)).collect();
        let now = run(&mut map, &indices, 30, Instant::now());
        let films = map.films(now);
        assert_eq!(films.len(), 1, "{films:?}");
        assert_eq!(films[0].rect, Rect::new(202, 128, 246, 188));
        assert!((25.0..40.0).contains(&films[0].rate), "{films:?}");
        assert_eq!(map.films(now + Duration::from_secs(1)), []);
    }

    #[test]
    fn a_film_of_which_a_thin_line_shows_little_is_one_none_the_less() {
        let start = Instant::now();
        let find = |milliseconds: u64, frames: u64| {
            let mut map = HeatMap::new((10, 10));
            (0..8).find(|look| {
                let now = start + Duration::from_millis(look * milliseconds);
                map.look(frames, now);
                for index in 0..20 {
                    map.changed(index, Rect::new(0, 0, 64, 64), now);
                    map.coded(index, true);
                }
                !map.films(now).is_empty()
            })
        };
        // Every frame; one in fifteen; slides, of which all are seen or some.
        assert_eq!(find(33, 1), Some(7));
        assert_eq!(find(500, 15), Some(3));
        assert_eq!(find(900, 1), None);
        assert_eq!(find(1000, 3), None);
    }

    #[test]
    fn few_changes_small_things_and_drawings_are_no_film() {
        let all: Vec<usize> = (0..100).collect();
        let start = Instant::now();
        let mut map = HeatMap::new((10, 10));
        let now = run(&mut map, &all, 5, start);
        assert_eq!(map.films(now), []);
        let mut map = HeatMap::new((10, 10));
        let now = run(&mut map, &[1, 2, 3], 50, start);
        assert_eq!(map.films(now), []);
        let mut map = HeatMap::new((10, 10));
        let now = run(&mut map, &all, 50, start);
        all.iter().for_each(|index| map.coded(*index, false));
        assert_eq!(map.films(now), []);
    }
}
