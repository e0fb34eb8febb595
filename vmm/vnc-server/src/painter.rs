//! Makes updates: compares the frame with what the client has, and encodes what differs.

use std::time::{Duration, Instant};

use crate::{
    encode::{Encoder, MAX_WIDTH, Picture},
    geometry::Rect,
    proto::{encoding, pixel::PixelFormat, update::Update},
    screen::{Cursor, Frame, Screen},
    tiles::{TILE, Tiles},
    viewer::{Viewer, Work},
};

/// After so long without a change, what was sent as JPEG is sent again as it is.
const REST: Duration = Duration::from_millis(300);

/// What one client sees, and how to change it.
pub(crate) struct Painter {
    size: (u32, u32),
    /// The client's picture, but for losses: B, G, R, X.
    shadow: Vec<u8>,
    /// Tiles that were sent with losses, and when each tile was sent.
    lossy: Tiles,
    sent: Vec<Instant>,
    encoder: Encoder,
    tile: Vec<u8>,
}

/// The client cannot follow.
#[derive(Debug, thiserror::Error)]
#[error("the screen is {0}x{1} now, and the client cannot change its size")]
pub(crate) struct CannotResize(u32, u32);

impl Painter {
    /// For a client that was told this size.
    pub(crate) fn new(size: (u32, u32)) -> Self {
        Self {
            size,
            shadow: vec![0; (size.0 * size.1 * 4) as usize],
            lossy: Tiles::new(size.0, size.1),
            sent: vec![Instant::now(); Tiles::new(size.0, size.1).count()],
            encoder: Encoder::default(),
            tile: vec![0; (TILE * TILE * 4) as usize],
        }
    }

    /// When something that was sent with losses has come to rest.
    pub(crate) fn rest(&self) -> Option<Instant> {
        self.lossy.numbers().filter_map(|number| self.sent.get(number)).min().map(|at| *at + REST)
    }

    /// Takes the tiles that have come to rest.
    fn take_rested(&mut self, now: Instant) -> Tiles {
        let mut rested = self.lossy.clone();
        rested.retain(|number| self.sent.get(number).is_some_and(|at| *at + REST <= now));
        self.lossy.remove(&rested);
        rested
    }

    /// Appends an update to `out`, which stays empty if there is nothing to say.
    pub(crate) fn paint(
        &mut self,
        work: &Work,
        viewer: &Viewer,
        screen: &Screen,
        out: &mut Vec<u8>,
    ) -> Result<(), CannotResize> {
        let mut update = Update::new(out);
        let abilities = &work.abilities;
        let (width, height) = work.size;
        let wire_size = (width as u16, height as u16);
        if self.size != work.size {
            if abilities.extended_size {
                update.extended_size(wire_size, 0, 0);
            } else if abilities.size {
                update.rectangle((0, 0), wire_size, encoding::DESKTOP_SIZE);
            } else {
                return Err(CannotResize(width, height));
            }
            let encoder = std::mem::take(&mut self.encoder);
            *self = Self { encoder, ..Self::new(work.size) };
        } else if work.announce_size {
            update.extended_size(wire_size, 0, 0);
        }
        if let Some(status) = work.resize_status.filter(|_| abilities.extended_size) {
            // Reason 1: this client's own request.
            update.extended_size(wire_size, 1, status);
        }
        if work.announce_keys {
            update.rectangle((0, 0), (0, 0), encoding::EXTENDED_KEY);
        }
        if work.cursor
            && let Some(cursor) = screen.cursor()
        {
            if abilities.alpha_cursor {
                push_alpha_cursor(&mut update, &cursor);
            } else if abilities.cursor {
                push_cursor(&mut update, &cursor, &work.format);
            }
        }
        if work.blank {
            self.shadow.fill(0);
            let mut all = Tiles::new(width, height);
            all.mark(Rect::new(0, 0, width, height));
            self.encode(&mut update, &all, work, true);
        } else if !work.damage.is_empty() || !work.forced.is_empty() {
            match screen.frame().filter(|frame| (frame.width(), frame.height()) == work.size) {
                Some(frame) => {
                    let changed = self.compare(&*frame, work);
                    // Somebody may be waiting for its memory.
                    drop(frame);
                    self.encode(&mut update, &changed, work, false);
                }
                None => viewer.put_off(work),
            }
        }
        let rested = self.take_rested(Instant::now());
        if !rested.is_empty() {
            self.encode(&mut update, &rested, work, true);
        }
        let nothing = update.count() == 0;
        drop(update);
        if nothing {
            out.clear();
        }
        Ok(())
    }

    /// Takes over what differs, and what was asked for.
    fn compare(&mut self, frame: &dyn Frame, work: &Work) -> Tiles {
        let (width, height) = self.size;
        let mut changed = work.forced.clone();
        let mut looked_at = work.damage.clone();
        looked_at.add(&work.forced);
        let stride = width as usize * 4;
        for rect in looked_at.iter() {
            let row = rect.width as usize * 4;
            let tile = &mut self.tile[..row * rect.height as usize];
            if frame.copy_rect(rect, tile, row).is_err() {
                continue;
            }
            let start = rect.y as usize * stride + rect.x as usize * 4;
            let rows = tile.chunks_exact(row).zip(self.shadow[start..].chunks_mut(stride));
            let mut differs = false;
            for (new, old) in rows {
                let old = &mut old[..row];
                if new != old {
                    old.copy_from_slice(new);
                    differs = true;
                }
            }
            if differs {
                changed.mark(rect);
            }
        }
        debug_assert_eq!(self.shadow.len(), stride * height as usize);
        changed
    }

    fn encode(&mut self, update: &mut Update<'_>, tiles: &Tiles, work: &Work, lossless: bool) {
        let abilities = &work.abilities;
        let quality = abilities.quality.filter(|_| !lossless);
        let now = Instant::now();
        tiles.numbers().for_each(|number| {
            if let Some(sent) = self.sent.get_mut(number) {
                *sent = now;
            }
        });
        self.lossy.remove(tiles);
        for rect in tiles.runs(MAX_WIDTH) {
            let picture = Picture { pixels: &self.shadow, width: self.size.0 };
            let lossy =
                self.encoder.push(update, picture, rect, abilities.method, &work.format, quality);
            if lossy {
                self.lossy.mark(rect);
            }
        }
    }
}

fn position(cursor: &Cursor) -> ((u16, u16), (u16, u16)) {
    let (x, y) = cursor.hot;
    ((x as u16, y as u16), (cursor.width as u16, cursor.height as u16))
}

/// Cursor With Alpha: pixels red, green, blue, alpha, premultiplied, in an encoding of their own.
fn push_alpha_cursor(update: &mut Update<'_>, cursor: &Cursor) {
    let (hot, size) = position(cursor);
    let out = update.rectangle(hot, size, encoding::CURSOR_WITH_ALPHA);
    out.extend(encoding::RAW.to_be_bytes());
    let (pixels, _) = cursor.pixels.as_chunks::<4>();
    out.extend(pixels.iter().flat_map(|[blue, green, red, alpha]| [*red, *green, *blue, *alpha]));
}

/// Cursor: pixels in the client's format and a mask of those that count.
fn push_cursor(update: &mut Update<'_>, cursor: &Cursor, format: &PixelFormat) {
    let (hot, size) = position(cursor);
    let out = update.rectangle(hot, size, encoding::CURSOR);
    let (pixels, _) = cursor.pixels.as_chunks::<4>();
    pixels.iter().for_each(|pixel| format.push(*pixel, out));
    if cursor.width == 0 {
        return;
    }
    for row in pixels.chunks(cursor.width as usize) {
        for eight in row.chunks(8) {
            let bits = eight.iter().enumerate();
            out.push(
                bits.fold(0, |byte, (bit, pixel)| byte | (u8::from(pixel[3] >= 128) << (7 - bit))),
            );
        }
    }
}
