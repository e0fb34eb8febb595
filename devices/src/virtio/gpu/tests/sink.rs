//! A viewer: puts the picture together from what it is told has changed.

use std::{
    sync::{Condvar, Mutex},
    time::Instant,
};

use super::*;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct CursorSeen {
    pub(super) hot: (u32, u32),
    pub(super) pixels: Vec<u8>,
}

#[derive(Default)]
pub(super) struct Seen {
    pub(super) size: Option<(u32, u32)>,
    /// Put together from nothing but the damaged parts of frames.
    pub(super) picture: Vec<u8>,
    pub(super) frames: u64,
    pub(super) sequences: Vec<u64>,
    pub(super) damage: Vec<Vec<Rect>>,
    pub(super) keep: bool,
    pub(super) kept: Vec<Frame>,
    pub(super) cursor: Option<CursorSeen>,
    pub(super) cursor_pos: (u32, u32),
    pub(super) scanouts: u32,
    /// How often the sink heard of a death, and of a successor.
    pub(super) deaths: u32,
    pub(super) successors: u32,
}

#[derive(Default)]
pub(super) struct Sink {
    pub(super) seen: Mutex<Seen>,
    pub(super) changed: Condvar,
}

impl Sink {
    pub(super) fn change(&self, f: impl FnOnce(&mut Seen)) {
        f(&mut self.seen.lock().unwrap());
        self.changed.notify_all();
    }

    pub(super) fn wait<T>(&self, what: &str, mut f: impl FnMut(&mut Seen) -> Option<T>) -> T {
        let until = Instant::now() + PATIENCE;
        let mut seen = self.seen.lock().unwrap();
        loop {
            if let Some(value) = f(&mut seen) {
                return value;
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let Seen { size, frames, damage, .. } = &*seen;
                panic!("never happened: {what} ({size:?}, {frames} frames, {damage:?})");
            }
            seen = self.changed.wait_timeout(seen, left).unwrap().0;
        }
    }
}

impl DisplaySink for Sink {
    fn scanout(&self, id: u32, size: Option<(u32, u32)>) {
        assert_eq!(id, 0);
        self.change(|seen| {
            seen.size = size;
            seen.scanouts += 1;
            let (width, height) = size.unwrap_or_default();
            seen.picture = vec![0xee; width as usize * height as usize * 4];
        });
    }

    fn frame(&self, id: u32, frame: Frame, damage: &[Rect]) {
        assert_eq!(id, 0);
        self.change(|seen| {
            let (width, height) = seen.size.expect("a frame without a scanout");
            assert_eq!((frame.width(), frame.height()), (width, height));
            assert!(!damage.is_empty());
            let stride = width as usize * 4;
            for rect in damage {
                let at = rect.y as usize * stride + rect.x as usize * 4;
                match frame.copy_rect(*rect, &mut seen.picture[at..], stride) {
                    // Another one follows, all of it damaged.
                    Ok(()) | Err(CopyError::Gone) => {}
                    Err(error) => panic!("{error}: {rect:?}"),
                }
            }
            seen.frames += 1;
            seen.sequences.push(frame.sequence());
            seen.damage.push(damage.to_vec());
            if seen.keep {
                seen.kept.push(frame);
            }
        });
    }

    fn cursor_define(&self, _: u32, image: &CursorImage<'_>) {
        let hot = (image.hot_x, image.hot_y);
        let pixels = image.pixels.to_vec();
        self.change(|seen| seen.cursor = Some(CursorSeen { hot, pixels }));
    }

    fn cursor_move(&self, _: u32, x: u32, y: u32) {
        self.change(|seen| seen.cursor_pos = (x, y));
    }

    fn cursor_hide(&self, _: u32) {
        self.change(|seen| seen.cursor = None);
    }

    fn back_end(&self, alive: bool) {
        self.change(|seen| *if alive { &mut seen.successors } else { &mut seen.deaths } += 1);
    }
}
