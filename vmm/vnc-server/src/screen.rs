//! The program's end: frames and pointer images in.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::{geometry::Rect, viewer::Viewer};

/// Longest side of a picture in pixels.
pub const MAX_SIDE: u32 = 16384;

/// Longest side of a pointer's picture in pixels.
pub const MAX_CURSOR_SIDE: u32 = 256;

/// A finished picture, read on the server's threads and dropped when no longer needed.
pub trait Frame: Send + Sync {
    /// Pixels.
    fn width(&self) -> u32;
    /// Pixels.
    fn height(&self) -> u32;
    /// Copies a part, which lies inside, as B, G, R, X; rows of `out` are `stride` bytes apart.
    ///
    /// # Errors
    /// If the pixels cannot be had any more; the program shows a newer picture, all of it changed.
    fn copy_rect(&self, rect: Rect, out: &mut [u8], stride: usize) -> Result<(), FrameGone>;
}

/// Who makes frames, if that costs something: no more of them than somebody looks at.
pub trait FrameSource: Send + Sync {
    /// A viewer waits for a frame that is newer than the newest one. Called again and again, also when
    /// nothing has changed, from viewers' threads; must not wait.
    fn want_next(&self);
}

/// A [`Frame`] whose pixels cannot be had any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the frame's pixels are gone")]
pub struct FrameGone;

/// The pointer's picture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cursor {
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
    /// The pixel that points.
    pub hot: (u32, u32),
    /// B, G, R, A, premultiplied.
    pub pixels: Vec<u8>,
}

impl Cursor {
    /// Nothing.
    pub(crate) fn hidden() -> Self {
        Self { width: 0, height: 0, hot: (0, 0), pixels: Vec::new() }
    }

    fn is_valid(&self) -> bool {
        let sides = 1..=MAX_CURSOR_SIDE;
        sides.contains(&self.width)
            && sides.contains(&self.height)
            && self.hot.0 < self.width
            && self.hot.1 < self.height
            && self.pixels.len() == (self.width * self.height * 4) as usize
    }
}

#[derive(Default)]
struct State {
    size: Option<(u32, u32)>,
    frame: Option<Arc<dyn Frame>>,
    source: Option<Arc<dyn FrameSource>>,
    cursor: Option<Arc<Cursor>>,
    viewers: Vec<Weak<Viewer>>,
}

/// What viewers see; cheap to clone.
#[derive(Clone, Default)]
pub struct Screen(Arc<Mutex<State>>);

impl std::fmt::Debug for Screen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Screen").field("size", &self.size()).finish_non_exhaustive()
    }
}

impl Screen {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The size of the frames to come. The frame there is is let go; viewers keep what they show,
    /// but see black when there is no picture (`None`).
    pub fn set_size(&self, size: Option<(u32, u32)>) {
        let mut state = self.lock();
        state.size = size.map(|(w, h)| (w.clamp(1, MAX_SIDE), h.clamp(1, MAX_SIDE)));
        let stale = state.frame.take();
        if size.is_none() {
            let viewers = state.viewers.iter().filter_map(Weak::upgrade);
            viewers.for_each(|viewer| viewer.switched_off());
        }
        drop(state);
        drop(stale);
    }

    /// Shows a frame; `damage` is what changed since the one before. Never blocks.
    pub fn present(&self, frame: Arc<dyn Frame>, damage: &[Rect]) {
        let size = (frame.width(), frame.height());
        let sides = 1..=MAX_SIDE;
        if !sides.contains(&size.0) || !sides.contains(&size.1) {
            return;
        }
        let mut state = self.lock();
        state.size = Some(size);
        let stale = state.frame.replace(frame);
        state.viewers.retain(|viewer| match viewer.upgrade() {
            Some(viewer) => {
                viewer.damaged(size, damage);
                true
            }
            None => false,
        });
        drop(state);
        // Outside the lock: it may call the program.
        drop(stale);
    }

    /// Tells `source` whenever a viewer could show more than the newest frame.
    pub fn set_source(&self, source: Arc<dyn FrameSource>) {
        self.lock().source = Some(source);
    }

    /// A viewer has nothing left to show, and its client waits.
    pub(crate) fn want_next(&self) {
        // Not under our lock: it is the program's code.
        let source = self.lock().source.clone();
        if let Some(source) = source {
            source.want_next();
        }
    }

    /// Lets go of the frame without changing what viewers see.
    pub fn release_frame(&self) {
        let stale = self.lock().frame.take();
        drop(stale);
    }

    /// Sets the pointer's picture; `None` hides it. An invalid one is ignored with a log line.
    pub fn set_cursor(&self, cursor: Option<Cursor>) {
        let cursor = cursor.unwrap_or_else(Cursor::hidden);
        if cursor != Cursor::hidden() && !cursor.is_valid() {
            tracing::warn!(cursor.width, cursor.height, "pointer image ignored");
            return;
        }
        let mut state = self.lock();
        state.cursor = Some(Arc::new(cursor));
        state.viewers.iter().filter_map(Weak::upgrade).for_each(|viewer| viewer.cursor_changed());
    }

    pub(crate) fn size(&self) -> Option<(u32, u32)> {
        self.lock().size
    }

    pub(crate) fn frame(&self) -> Option<Arc<dyn Frame>> {
        self.lock().frame.clone()
    }

    pub(crate) fn cursor(&self) -> Option<Arc<Cursor>> {
        self.lock().cursor.clone()
    }

    /// Tells the viewer about everything from now on.
    pub(crate) fn add(&self, viewer: &Arc<Viewer>) {
        let mut state = self.lock();
        state.viewers.push(Arc::downgrade(viewer));
        if let Some(size) = state.size.filter(|_| state.frame.is_some()) {
            viewer.damaged(size, &[Rect::new(0, 0, size.0, size.1)]);
        }
        if state.cursor.is_some() {
            viewer.cursor_changed();
        }
    }
}
