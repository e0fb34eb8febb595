//! What one viewer shows, and what it should show: the picture in tiles of 64 by 64 pixels.
//!
//! `shown` holds the pixels the client was sent, so damage that changed nothing costs nothing and a
//! move is proved pixel by pixel before it is sent. `fresh` holds the newest pixels of the tiles that
//! still have to be sent; it is released while the picture rests. What was sent with a lossy coding
//! is remembered by tile until it has been sent exactly.

use std::time::{Duration, Instant};

use super::{
    Frame, Rect,
    damage::CELL,
    handle::to_xrgb8888,
    motion::{self, Move},
};

/// Bytes of a pixel.
const PIXEL: usize = 4;
/// Most tiles in one run: 1024 by 64 pixels, 256 KiB.
const MAX_RUN: u32 = 16;
/// Widest strip that is looked for in several rows of tiles.
const MAX_STRIP: u8 = 24;
/// Pixels of a run that may be sent in vain to save a message.
const JOIN_WASTE: u32 = 2048;
/// Changed pixels worth looking for a move.
const MOVE_WORTH: u64 = 6000;
/// Most pictures that are not searched after searches in vain.
const MAX_PATIENCE: u32 = 16;

/// A part of a tile in pixels from its corner; empty when `x1` is 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Span {
    x0: u8,
    y0: u8,
    x1: u8,
    y1: u8,
}

impl Span {
    fn is_empty(self) -> bool {
        self.x1 == 0
    }

    fn area(self) -> u32 {
        u32::from(self.x1 - self.x0) * u32::from(self.y1 - self.y0)
    }

    fn union(self, other: Self) -> Self {
        if self.is_empty() {
            return other;
        }
        if other.is_empty() {
            return self;
        }
        Self {
            x0: self.x0.min(other.x0),
            y0: self.y0.min(other.y0),
            x1: self.x1.max(other.x1),
            y1: self.y1.max(other.y1),
        }
    }
}

/// One tile.
#[derive(Debug, Clone, Copy, Default)]
struct Tile {
    /// What the client has not been sent; `fresh` is valid in the whole tile if there is any.
    todo: Span,
    /// `shown` is what the client shows, or the original of a lossy version of it; not kept up where
    /// the whole tile is under a stream.
    known: bool,
    /// When it was last sent with a lossy coding, if it has not been sent exactly since.
    lossy: Option<Instant>,
    /// The part under a video stream; `fresh` is valid in the whole tile if there is any.
    veil: Span,
}

impl Tile {
    /// Whether something has to be sent that no stream will show.
    fn drawable(self) -> bool {
        !self.todo.is_empty() && self.todo.union(self.veil) != self.veil
    }

    fn held(self) -> bool {
        !self.veil.is_empty()
    }

    /// Whether all of it is under a stream: nothing else draws there.
    fn is_covered(self, rect: Rect) -> bool {
        self.veil == whole(rect)
    }
}

/// One viewer's picture.
#[derive(Debug)]
pub(crate) struct Tiles {
    width: u32,
    height: u32,
    columns: u32,
    tiles: Vec<Tile>,
    shown: Vec<u8>,
    fresh: Vec<u8>,
    scratch: Vec<u8>,
    /// Tiles with something to draw.
    todo: usize,
    /// Tiles with lossy pixels.
    lossy: usize,
    /// Tiles that have never been sent.
    unknown: usize,
    /// Where the next search begins, so that a slow viewer gets all parts of a busy picture.
    next: usize,
    /// Pictures that are not searched for moves, and how many that were after the last failure.
    patience: u32,
    next_patience: u32,
    /// The last vector of a move.
    last_move: Option<(i32, i32)>,
}

impl Tiles {
    /// A picture of which nothing is known and nothing has to be sent yet.
    pub(crate) fn new((width, height): (u32, u32)) -> Self {
        let columns = width.div_ceil(CELL);
        let count = columns as usize * height.div_ceil(CELL) as usize;
        Self {
            width,
            height,
            columns,
            tiles: vec![Tile::default(); count],
            shown: vec![0; width as usize * height as usize * PIXEL],
            fresh: Vec::new(),
            scratch: Vec::new(),
            todo: 0,
            lossy: 0,
            unknown: count,
            next: 0,
            patience: 0,
            next_patience: 1,
            last_move: None,
        }
    }

    /// Whether anything has to be sent.
    pub(crate) fn has_todo(&self) -> bool {
        self.todo > 0
    }

    /// The client shows black everywhere.
    pub(crate) fn blackened(&mut self) {
        self.shown.fill(0);
        self.tiles.fill(Tile { known: true, ..Tile::default() });
        (self.todo, self.lossy, self.unknown) = (0, 0, 0);
    }

    /// Whether every tile has been sent once.
    pub(crate) fn is_known(&self) -> bool {
        self.unknown == 0
    }

    /// Gives memory back that is needed only while something changes.
    pub(crate) fn rest(&mut self) {
        self.scratch = Vec::new();
        if self.todo == 0 && !self.tiles.iter().any(|tile| tile.held()) {
            self.fresh = Vec::new();
        }
    }

    /// Bytes held.
    pub(crate) fn memory(&self) -> usize {
        self.shown.capacity() + self.fresh.capacity() + self.scratch.capacity()
    }

    /// Compares the tiles that `rects` touch with what the client shows.
    /// Returns the numbers of those that differ and have changed.
    pub(crate) fn take_in(&mut self, frame: &dyn Frame, rects: &[Rect]) -> Vec<usize> {
        let mut dirty = Vec::new();
        if self.fresh.is_empty() {
            // Zeroed pages cost nothing until they are written.
            self.fresh = vec![0; self.shown.len()];
        }
        for rect in rects {
            let rect = rect.clipped(self.width, self.height);
            if rect.is_empty() {
                continue;
            }
            let (left, right) = (rect.x / CELL, rect.right().div_ceil(CELL));
            for row in rect.y / CELL..rect.bottom().div_ceil(CELL) {
                let mut column = left;
                while column < right {
                    let count = (right - column).min(MAX_RUN);
                    self.take_run(frame, column, row, count, &mut dirty);
                    column += count;
                }
            }
        }
        dirty
    }

    fn take_run(
        &mut self,
        frame: &dyn Frame,
        column: u32,
        row: u32,
        count: u32,
        dirty: &mut Vec<usize>,
    ) {
        let run = Rect::new(column * CELL, row * CELL, count * CELL, CELL)
            .clipped(self.width, self.height);
        let stride = run.width as usize * PIXEL;
        let mut pixels = std::mem::take(&mut self.scratch);
        pixels.resize(stride * run.height as usize, 0);
        if frame.copy_rect(run, &mut pixels, stride).is_err() {
            self.scratch = pixels;
            return;
        }
        to_xrgb8888(frame.format(), &mut pixels);
        for column in column..column + count {
            let tile = self.tile_rect(column, row);
            let index = (row * self.columns + column) as usize;
            let left = (tile.x - run.x) as usize * PIXEL;
            let source = pixels.get(left..).unwrap_or_default();
            let Some(state) = self.tiles.get(index).copied() else { continue };
            if !state.todo.is_empty() || state.held() {
                // What waits to be sent is no news.
                let from = self.offset(tile.x, tile.y);
                let fresh = self.fresh.get(from..).unwrap_or_default();
                if same(source, stride, fresh, self.stride(), tile) {
                    continue;
                }
            }
            let span = if state.is_covered(tile) {
                whole(tile)
            } else if state.known {
                difference(source, stride, self.shown_at(tile), self.stride(), tile)
            } else {
                whole(tile)
            };
            if !span.is_empty() || state.held() {
                let (to, to_stride) = (self.offset(tile.x, tile.y), self.stride());
                copy(source, stride, self.fresh.get_mut(to..).unwrap_or_default(), to_stride, tile);
            }
            if !span.is_empty() {
                dirty.push(index);
            }
            self.set_todo(index, span);
        }
        self.scratch = pixels;
    }

    /// Looks for parts of what has to be sent that the client shows at another place. Every move
    /// found is as good as done: it must be sent before anything else.
    pub(crate) fn find_moves(&mut self, now: Instant) -> Vec<Move> {
        let Some(area) = self.todo_area() else { return Vec::new() };
        if self.patience > 0 {
            self.patience -= 1;
            return Vec::new();
        }
        for index in self.indices(area) {
            if self.tiles.get(index).is_none_or(|tile| !tile.known || tile.held()) {
                return Vec::new();
            }
        }
        // Outside of what has to be sent, the newest pixels are those the client shows.
        for index in self.indices(area) {
            if self.tiles.get(index).is_some_and(|tile| tile.todo.is_empty()) {
                self.freshen(index);
            }
        }
        let stride = self.stride();
        let found = motion::find(&self.shown, &self.fresh, stride, area, &mut self.last_move);
        let found = in_order(found);
        let mut done = Vec::new();
        for step in found {
            // The first is right as it was found; it may have overwritten what others need.
            if done.is_empty() || self.proved(step) {
                debug_assert!(self.proved(step));
                self.apply(step, now);
                done.push(step);
            }
        }
        if done.is_empty() {
            self.patience = self.next_patience;
            self.next_patience = (self.next_patience * 2).min(MAX_PATIENCE);
        } else {
            self.next_patience = 1;
        }
        done
    }

    /// The area in which enough has to be sent to look for a move.
    fn todo_area(&self) -> Option<Rect> {
        let mut pixels = 0u64;
        let (mut x0, mut y0, mut x1, mut y1) = (u32::MAX, u32::MAX, 0, 0);
        for index in 0..self.tiles.len() {
            let tile = self.tiles.get(index)?;
            if !tile.drawable() {
                continue;
            }
            let span = tile.todo;
            pixels += u64::from(span.area());
            let rect = at(self.rect_of(index), span);
            (x0, y0) = (x0.min(rect.x), y0.min(rect.y));
            (x1, y1) = (x1.max(rect.right()), y1.max(rect.bottom()));
        }
        (pixels >= MOVE_WORTH).then(|| Rect::new(x0, y0, x1 - x0, y1 - y0))
    }

    /// Whether a move leaves exactly the newest pixels behind.
    fn proved(&self, step: Move) -> bool {
        let bytes = step.to.width as usize * PIXEL;
        (0..step.to.height).all(|y| {
            let new = self.offset(step.to.x, step.to.y + y);
            let old = self.offset(step.from.0, step.from.1 + y);
            let (new, old) = (self.fresh.get(new..new + bytes), self.shown.get(old..old + bytes));
            new.is_some() && new == old
        })
    }

    /// Does a move in `shown`.
    fn apply(&mut self, step: Move, now: Instant) {
        let from = Rect::new(step.from.0, step.from.1, step.to.width, step.to.height);
        let lossy = self.is_lossy(from);
        // The newest pixels are the same, and reading them avoids the overlap.
        let (start, stride) = (self.offset(step.to.x, step.to.y), self.stride());
        copy(
            self.fresh.get(start..).unwrap_or_default(),
            stride,
            self.shown.get_mut(start..).unwrap_or_default(),
            stride,
            step.to,
        );
        for index in self.indices(step.to) {
            let rect = self.rect_of(index);
            let span = if bounds(step.to, rect) == step.to {
                Span::default()
            } else {
                let fresh = self.fresh.get(self.offset(rect.x, rect.y)..).unwrap_or_default();
                difference(fresh, stride, self.shown_at(rect), stride, rect)
            };
            self.set_todo(index, span);
            if lossy {
                self.set_lossy(index, Some(now));
            }
        }
    }

    fn is_lossy(&self, rect: Rect) -> bool {
        self.lossy > 0
            && self
                .indices(rect)
                .any(|index| self.tiles.get(index).is_some_and(|t| t.lossy.is_some()))
    }

    /// The next run of what has to be sent.
    pub(crate) fn next_run(&mut self) -> Option<Rect> {
        if self.todo == 0 {
            return None;
        }
        let index = self.find_from_next(|tile| tile.drawable())?;
        let (column, row) = (index as u32 % self.columns, index as u32 / self.columns);
        let span = |column: u32| {
            let tile = self.tiles.get((row * self.columns + column) as usize);
            tile.filter(|tile| tile.drawable()).map_or(Span::default(), |tile| tile.todo)
        };
        let mut joined = at(self.tile_rect(column, row), span(column));
        let mut needed = span(column).area();
        let mut count = 1;
        while count < MAX_RUN && column + count < self.columns {
            let next = span(column + count);
            if next.is_empty() {
                break;
            }
            let wider = bounds(joined, at(self.tile_rect(column + count, row), next));
            needed += next.area();
            if wider.width * wider.height > needed + needed / 4 + JOIN_WASTE {
                break;
            }
            joined = wider;
            count += 1;
        }
        self.next = (index + count as usize) % self.tiles.len().max(1);
        if count == 1 {
            joined.height += self.strip_below(index, span(column), joined.bottom());
        }
        Some(joined)
    }

    /// Height of what continues a narrow strip in the tiles below it: what comes in at the side of a
    /// picture that pans would be many small messages otherwise.
    fn strip_below(&self, index: usize, strip: Span, bottom: u32) -> u32 {
        let (mut height, mut below) = (0, index);
        if strip.x1 - strip.x0 > MAX_STRIP {
            return 0;
        }
        for _ in 1..MAX_RUN {
            below += self.columns as usize;
            let Some(tile) = self.tiles.get(below).filter(|tile| tile.drawable()) else { break };
            let part = at(self.rect_of(below), tile.todo);
            let continues = (tile.todo.x0, tile.todo.x1) == (strip.x0, strip.x1);
            if !continues || part.y != bottom + height {
                break;
            }
            height += part.height;
        }
        height
    }

    /// The next run of tiles whose lossy version has been shown since before `before`.
    pub(crate) fn next_lossy(&mut self, before: Instant) -> Option<Rect> {
        if self.lossy == 0 {
            return None;
        }
        let due = |tile: &Tile| {
            tile.lossy.is_some_and(|at| at <= before) && tile.todo.is_empty() && !tile.held()
        };
        let index = self.find_from_next(due)?;
        let (column, row) = (index as u32 % self.columns, index as u32 / self.columns);
        let mut count = 1;
        while count < MAX_RUN / 4
            && column + count < self.columns
            && self.tiles.get(index + count as usize).is_some_and(due)
        {
            count += 1;
        }
        self.next = (index + count as usize) % self.tiles.len().max(1);
        let run = Rect::new(column * CELL, row * CELL, count * CELL, CELL);
        Some(run.clipped(self.width, self.height))
    }

    /// When the first lossy tile was sent, if there is one that is not under a stream.
    pub(crate) fn oldest_lossy(&self) -> Option<Instant> {
        if self.lossy == 0 {
            return None;
        }
        self.tiles.iter().filter(|tile| !tile.held()).filter_map(|tile| tile.lossy).min()
    }

    fn find_from_next(&self, wanted: impl Fn(&Tile) -> bool) -> Option<usize> {
        let (before, after) = self.tiles.split_at_checked(self.next)?;
        let found = after.iter().position(&wanted).map(|at| at + self.next);
        found.or_else(|| before.iter().position(&wanted))
    }

    /// Copies the newest pixels of a part inside tiles that `next_run` or `next_lossy` named.
    pub(crate) fn pixels(&self, rect: Rect, out: &mut Vec<u8>) {
        let bytes = rect.width as usize * PIXEL;
        out.clear();
        out.reserve(bytes * rect.height as usize);
        for y in rect.y..rect.bottom() {
            let mut x = rect.x;
            while x < rect.right() {
                let end = ((x / CELL + 1) * CELL).min(rect.right());
                let index = (y / CELL * self.columns + x / CELL) as usize;
                let tile = self.tiles.get(index).copied().unwrap_or_default();
                let is_shown = tile.todo.is_empty() && !tile.held();
                let newest = if is_shown { &self.shown } else { &self.fresh };
                let start = self.offset(x, y);
                let end_byte = start + (end - x) as usize * PIXEL;
                out.extend_from_slice(newest.get(start..end_byte).unwrap_or_default());
                x = end;
            }
        }
    }

    /// A part was sent with these pixels; `lossy` tells when, if not exactly.
    pub(crate) fn sent(&mut self, rect: Rect, pixels: &[u8], lossy: Option<Instant>) {
        let (start, stride) = (self.offset(rect.x, rect.y), self.stride());
        let shown = self.shown.get_mut(start..).unwrap_or_default();
        copy(pixels, rect.width as usize * PIXEL, shown, stride, rect);
        for index in self.indices(rect) {
            let tile = self.rect_of(index);
            let covered = bounds(rect, tile) == rect;
            let Some(state) = self.tiles.get(index).copied() else { continue };
            let todo = at(tile, state.todo);
            if covered || (!state.todo.is_empty() && bounds(rect, todo) == rect) {
                self.set_todo(index, Span::default());
            }
            if lossy.is_some() {
                self.set_lossy(index, lossy);
            } else if covered && !state.held() {
                self.set_lossy(index, None);
            }
            self.know(index);
        }
    }

    /// A stream takes over a part: its newest pixels stay at hand, and it is lossy from now on.
    /// Refused (`false`) where another stream is, and where nothing is known of a tile of which it takes
    /// only a part.
    pub(crate) fn hold(&mut self, rect: Rect, now: Instant) -> bool {
        let is_free = |index: usize| {
            let tile = self.rect_of(index);
            self.tiles.get(index).is_some_and(|state| {
                // All of a smaller stream's tile comes new, and nobody asks what was there before.
                let is_new = state.todo == whole(tile) && within(tile, rect) == whole(tile);
                !state.held() && (state.known || is_new)
            })
        };
        if !self.indices(rect).all(is_free) {
            return false;
        }
        if self.fresh.is_empty() {
            self.fresh = vec![0; self.shown.len()];
        }
        for index in self.indices(rect) {
            if self.tiles.get(index).is_some_and(|tile| tile.todo.is_empty()) {
                self.freshen(index);
            }
            let veil = within(self.rect_of(index), rect);
            self.change(index, |tile| tile.veil = veil);
            self.set_lossy(index, Some(now));
            self.know(index);
        }
        true
    }

    /// The newest pixels of a part that a stream has taken over, and the bytes from one row to the next.
    pub(crate) fn held_pixels(&self, rect: Rect) -> (&[u8], usize) {
        (self.fresh.get(self.offset(rect.x, rect.y)..).unwrap_or_default(), self.stride())
    }

    /// A stream showed the newest pixels of its part.
    pub(crate) fn streamed(&mut self, rect: Rect, now: Instant) {
        for index in self.indices(rect) {
            let tile = self.rect_of(index);
            let Some(state) = self.tiles.get(index).copied() else { continue };
            if !state.is_covered(tile) {
                self.show(at(tile, within(tile, rect)));
            }
            if !state.drawable() {
                self.set_todo(index, Span::default());
            }
            self.set_lossy(index, Some(now));
        }
    }

    /// A stream is over. What it showed last is lossy, what it did not show has to be drawn.
    pub(crate) fn release(&mut self, rect: Rect, now: Instant) {
        for index in self.indices(rect) {
            let tile = self.rect_of(index);
            let Some(state) = self.tiles.get(index).copied() else { continue };
            let is_shown = state.todo.is_empty();
            let span = match (state.is_covered(tile), is_shown) {
                (true, true) => {
                    self.show(tile);
                    Span::default()
                }
                // Nobody remembers what it showed last.
                (true, false) => {
                    self.forget(index);
                    whole(tile)
                }
                (false, _) => {
                    let fresh = self.fresh.get(self.offset(tile.x, tile.y)..).unwrap_or_default();
                    let stride = self.stride();
                    difference(fresh, stride, self.shown_at(tile), stride, tile)
                }
            };
            self.change(index, |tile| {
                tile.veil = Span::default();
                tile.todo = span;
            });
            self.set_lossy(index, Some(now));
        }
    }

    /// Pixels that have to be drawn.
    pub(crate) fn todo_pixels(&self) -> u64 {
        let drawable = self.tiles.iter().filter(|tile| tile.drawable());
        drawable.map(|tile| u64::from(tile.todo.area())).sum()
    }

    /// What has to be sent of a tile; empty if nothing.
    pub(crate) fn todo_of(&self, index: usize) -> Rect {
        self.tiles.get(index).map_or(Rect::default(), |tile| at(self.rect_of(index), tile.todo))
    }

    /// Columns and rows of tiles.
    pub(crate) fn grid(&self) -> (usize, usize) {
        (self.columns as usize, self.tiles.len() / self.columns.max(1) as usize)
    }

    // ---- small things ----

    /// Changes a tile and keeps the count of those that have something to draw.
    fn change(&mut self, index: usize, change: impl FnOnce(&mut Tile)) {
        let Some(tile) = self.tiles.get_mut(index) else { return };
        let before = tile.drawable();
        change(tile);
        match (before, tile.drawable()) {
            (false, true) => self.todo += 1,
            (true, false) => self.todo -= 1,
            _ => {}
        }
    }

    fn set_todo(&mut self, index: usize, span: Span) {
        self.change(index, |tile| tile.todo = span);
    }

    fn set_lossy(&mut self, index: usize, since: Option<Instant>) {
        let Some(tile) = self.tiles.get_mut(index) else { return };
        match (tile.lossy.is_some(), since.is_some()) {
            (false, true) => self.lossy += 1,
            (true, false) => self.lossy -= 1,
            _ => {}
        }
        tile.lossy = since;
    }

    /// What the client shows in a tile is known from now on, or does not matter.
    fn know(&mut self, index: usize) {
        if let Some(state) = self.tiles.get_mut(index).filter(|state| !state.known) {
            state.known = true;
            self.unknown -= 1;
        }
    }

    /// What the client shows in a tile is not known any more.
    fn forget(&mut self, index: usize) {
        if let Some(state) = self.tiles.get_mut(index).filter(|state| state.known) {
            state.known = false;
            self.unknown += 1;
        }
    }

    /// The client shows the newest pixels of a part.
    fn show(&mut self, rect: Rect) {
        let (start, stride) = (self.offset(rect.x, rect.y), self.stride());
        let fresh = self.fresh.get(start..).unwrap_or_default();
        copy(fresh, stride, self.shown.get_mut(start..).unwrap_or_default(), stride, rect);
    }

    /// Makes `fresh` what the client shows in a tile.
    fn freshen(&mut self, index: usize) {
        let (rect, stride) = (self.rect_of(index), self.stride());
        let start = self.offset(rect.x, rect.y);
        let from = self.shown.get(start..).unwrap_or_default();
        copy(from, stride, self.fresh.get_mut(start..).unwrap_or_default(), stride, rect);
    }

    fn stride(&self) -> usize {
        self.width as usize * PIXEL
    }

    fn offset(&self, x: u32, y: u32) -> usize {
        y as usize * self.stride() + x as usize * PIXEL
    }

    fn shown_at(&self, rect: Rect) -> &[u8] {
        self.shown.get(self.offset(rect.x, rect.y)..).unwrap_or_default()
    }

    fn tile_rect(&self, column: u32, row: u32) -> Rect {
        Rect::new(column * CELL, row * CELL, CELL, CELL).clipped(self.width, self.height)
    }

    fn rect_of(&self, index: usize) -> Rect {
        self.tile_rect(index as u32 % self.columns, index as u32 / self.columns)
    }

    /// Numbers of the tiles a rectangle inside the picture touches.
    pub(crate) fn indices(&self, rect: Rect) -> impl Iterator<Item = usize> + use<> {
        let rect = rect.clipped(self.width, self.height);
        let columns = self.columns;
        let (left, right) = (rect.x / CELL, rect.right().div_ceil(CELL));
        let rows = if rect.is_empty() { 0..0 } else { rect.y / CELL..rect.bottom().div_ceil(CELL) };
        rows.flat_map(move |row| (left..right).map(move |column| (row * columns + column) as usize))
    }
}

/// Where a tile's part is in the picture.
fn at(tile: Rect, span: Span) -> Rect {
    let (x, y) = (tile.x + u32::from(span.x0), tile.y + u32::from(span.y0));
    Rect::new(x, y, u32::from(span.x1 - span.x0), u32::from(span.y1 - span.y0))
}

fn whole(tile: Rect) -> Span {
    Span { x0: 0, y0: 0, x1: tile.width as u8, y1: tile.height as u8 }
}

/// The part of a tile inside of a rectangle that touches it.
fn within(tile: Rect, rect: Rect) -> Span {
    Span {
        x0: rect.x.saturating_sub(tile.x) as u8,
        y0: rect.y.saturating_sub(tile.y) as u8,
        x1: (rect.right().min(tile.right()) - tile.x) as u8,
        y1: (rect.bottom().min(tile.bottom()) - tile.y) as u8,
    }
}

/// Puts moves before the largest one that do not overwrite what it reads, because it may overwrite what
/// they read: the ticker above a picture that pans, say.
fn in_order(found: Vec<Move>) -> Vec<Move> {
    let Some(largest) = found.first().copied() else { return found };
    let source = Rect::new(largest.from.0, largest.from.1, largest.to.width, largest.to.height);
    let apart = |step: &Move| {
        let to = step.to;
        to.right() <= source.x
            || source.right() <= to.x
            || to.bottom() <= source.y
            || source.bottom() <= to.y
    };
    let (mut order, after): (Vec<_>, Vec<_>) = found.into_iter().skip(1).partition(apart);
    order.push(largest);
    order.extend(after);
    order
}

/// The smallest rectangle around two.
pub(crate) fn bounds(a: Rect, b: Rect) -> Rect {
    let (x, y) = (a.x.min(b.x), a.y.min(b.y));
    Rect::new(x, y, a.right().max(b.right()) - x, a.bottom().max(b.bottom()) - y)
}

/// Copies the rows of a rectangle.
fn copy(from: &[u8], from_stride: usize, to: &mut [u8], to_stride: usize, rect: Rect) {
    let bytes = rect.width as usize * PIXEL;
    let rows = from.chunks(from_stride).zip(to.chunks_mut(to_stride));
    for (from, to) in rows.take(rect.height as usize) {
        if let (Some(from), Some(to)) = (from.get(..bytes), to.get_mut(..bytes)) {
            to.copy_from_slice(from);
        }
    }
}

/// Whether two pictures are the same in a rectangle.
fn same(a: &[u8], a_stride: usize, b: &[u8], b_stride: usize, rect: Rect) -> bool {
    let bytes = rect.width as usize * PIXEL;
    let mut rows = a.chunks(a_stride).zip(b.chunks(b_stride)).take(rect.height as usize);
    rows.all(|(a, b)| a.get(..bytes) == b.get(..bytes))
}

/// The part of a tile in which two pictures differ.
fn difference(a: &[u8], a_stride: usize, b: &[u8], b_stride: usize, tile: Rect) -> Span {
    let bytes = tile.width as usize * PIXEL;
    let mut span = Span::default();
    let rows = a.chunks(a_stride).zip(b.chunks(b_stride)).take(tile.height as usize);
    for (y, (a, b)) in rows.enumerate() {
        let (a, b) = (a.get(..bytes).unwrap_or_default(), b.get(..bytes).unwrap_or_default());
        if a == b {
            continue;
        }
        let pairs = || a.chunks_exact(PIXEL).zip(b.chunks_exact(PIXEL));
        let first = pairs().position(|(a, b)| a != b).unwrap_or(0);
        let last = pairs().rposition(|(a, b)| a != b).unwrap_or(0);
        let row = Span { x0: first as u8, y0: y as u8, x1: last as u8 + 1, y1: y as u8 + 1 };
        span = span.union(row);
    }
    span
}

/// How long a lossy tile is shown before it is sent exactly.
pub(crate) const REFINE_AFTER: Duration = Duration::from_millis(300);
