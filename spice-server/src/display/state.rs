//! A display as the program and its viewers share it.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::{CursorImage, Frame, FrameSource, Rect, SurfaceInfo, damage::Damage};
use crate::io::wake::Wake;

/// Size of the black picture a viewer gets before the program has shown anything.
const FIRST_SIZE: (u32, u32) = (1024, 768);
/// Largest side of a picture.
const MAX_SIDE: u32 = 16384;

/// One display.
pub(crate) struct DisplayShared {
    state: Mutex<DisplayState>,
}

#[derive(Default)]
struct DisplayState {
    surface: Option<(u32, u32)>,
    frame: Option<Arc<dyn Frame>>,
    source: Option<Arc<dyn FrameSource>>,
    viewers: Vec<Viewer>,
    next_viewer: u64,
    cursor: CursorState,
}

struct Viewer {
    id: u64,
    damage: Damage,
    /// The picture went away and the viewer has not been told.
    blank: bool,
    /// Frames presented since the viewer was given one.
    frames: u64,
    wake: Arc<Wake>,
}

/// The pointer of a display.
#[derive(Clone, Default)]
pub(crate) struct CursorState {
    /// The picture and the number that names its content.
    pub(crate) image: Option<(u64, Arc<CursorImage>)>,
    pub(crate) visible: bool,
    pub(crate) position: (u32, u32),
}

/// What a viewer should do next.
pub(crate) enum Work {
    /// Replace the surface by one of this size and paint it black.
    Surface((u32, u32)),
    /// Begin a picture of this size; drawing follows.
    FrameSurface((u32, u32)),
    /// Paint everything black.
    Blank,
    /// These parts of this frame may have changed, which is so many frames newer than the one
    /// given out before.
    Draw(Arc<dyn Frame>, Vec<Rect>, u64),
    /// Nothing.
    Done,
}

/// Whether a viewer has something to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum HasWork {
    No,
    Yes,
    /// It has nothing to show but black, though a picture of known size should come soon.
    OnlyBlack,
}

impl DisplayShared {
    pub(crate) fn new() -> Self {
        Self { state: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, DisplayState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn set_surface(&self, surface: Option<SurfaceInfo>) {
        let mut state = self.lock();
        let size = surface.map(|s| (s.width.clamp(1, MAX_SIDE), s.height.clamp(1, MAX_SIDE)));
        let old = if size.is_some() && size == state.surface { None } else { state.frame.take() };
        state.surface = size;
        if size.is_none() {
            for viewer in &mut state.viewers {
                viewer.blank = true;
                viewer.wake.wake();
            }
        }
        drop(state);
        // A frame's drop is the program's code: not under our lock.
        drop(old);
    }

    /// Lets go of the newest frame; the picture's size stays.
    pub(crate) fn release_frame(&self) {
        let old = self.lock().frame.take();
        drop(old);
    }

    pub(crate) fn present(&self, frame: Arc<dyn Frame>, damage: &[Rect], skipped: u64) {
        let size = (frame.width(), frame.height());
        if size.0 == 0 || size.1 == 0 || size.0 > MAX_SIDE || size.1 > MAX_SIDE {
            tracing::warn!(width = size.0, height = size.1, "frame of an impossible size ignored");
            return;
        }
        let mut state = self.lock();
        let same = state.frame.as_ref().is_some_and(|f| (f.width(), f.height()) == size);
        let old = state.frame.replace(frame);
        state.surface = Some(size);
        for viewer in &mut state.viewers {
            viewer.blank = false;
            viewer.frames = viewer.frames.saturating_add(1).saturating_add(skipped);
            if same {
                damage.iter().for_each(|rect| viewer.damage.add(*rect));
            } else {
                viewer.damage = Damage::new(size.0, size.1);
                viewer.damage.add_all();
            }
            if !viewer.damage.is_empty() {
                viewer.wake.wake();
            }
        }
        drop(state);
        drop(old);
    }

    pub(crate) fn set_source(&self, source: Arc<dyn FrameSource>) {
        self.lock().source = Some(source);
    }

    /// A viewer could show a frame that is newer than the newest one there is.
    pub(crate) fn want_next(&self) {
        // Not under our lock: it is the program's code.
        let source = self.lock().source.clone();
        if let Some(source) = source {
            source.want_next();
        }
    }

    /// The newest frame.
    pub(crate) fn frame(&self) -> Option<Arc<dyn Frame>> {
        self.lock().frame.clone()
    }

    /// The size of the picture viewers point at.
    pub(crate) fn size(&self) -> (u32, u32) {
        self.lock().surface.unwrap_or(FIRST_SIZE)
    }

    /// Adds a viewer that has not been sent anything.
    pub(crate) fn add_viewer(&self, wake: Arc<Wake>) -> u64 {
        let mut state = self.lock();
        let (width, height) = state.surface.unwrap_or(FIRST_SIZE);
        let mut damage = Damage::new(width, height);
        damage.add_all();
        state.next_viewer += 1;
        let id = state.next_viewer;
        state.viewers.push(Viewer { id, damage, blank: false, frames: 0, wake });
        id
    }

    pub(crate) fn remove_viewer(&self, id: u64) {
        self.lock().viewers.retain(|viewer| viewer.id != id);
    }

    /// Whether there is anything to do for this viewer.
    pub(crate) fn has_work(&self, id: u64, shown: Option<(u32, u32)>) -> HasWork {
        let state = self.lock();
        let Some(viewer) = state.viewers.iter().find(|viewer| viewer.id == id) else {
            return HasWork::No;
        };
        let work = match (&state.frame, shown) {
            (Some(frame), Some(size)) => {
                !viewer.damage.is_empty() || size != (frame.width(), frame.height())
            }
            (Some(_), None) => true,
            (None, Some(_)) => viewer.blank,
            (None, None) if state.surface.is_some() => return HasWork::OnlyBlack,
            (None, None) => true,
        };
        if work { HasWork::Yes } else { HasWork::No }
    }

    /// What a viewer whose surface has the size `shown` should do next.
    pub(crate) fn next_work(&self, id: u64, shown: Option<(u32, u32)>) -> Work {
        let mut state = self.lock();
        let state = &mut *state;
        let Some(viewer) = state.viewers.iter_mut().find(|viewer| viewer.id == id) else {
            return Work::Done;
        };
        let Some(frame) = &state.frame else {
            if shown.is_none() {
                viewer.blank = false;
                return Work::Surface(state.surface.unwrap_or(FIRST_SIZE));
            }
            if std::mem::take(&mut viewer.blank) {
                return Work::Blank;
            }
            return Work::Done;
        };
        let size = (frame.width(), frame.height());
        if shown != Some(size) {
            return Work::FrameSurface(size);
        }
        let rects = viewer.damage.take_all();
        if rects.is_empty() {
            return Work::Done;
        }
        Work::Draw(frame.clone(), rects, std::mem::take(&mut viewer.frames))
    }

    pub(crate) fn set_cursor(&self, image: CursorImage) {
        let mut hasher = DefaultHasher::new();
        (image.width, image.height, image.hot_x, image.hot_y).hash(&mut hasher);
        image.argb.hash(&mut hasher);
        let id = hasher.finish();
        let mut state = self.lock();
        state.cursor.image = Some((id, Arc::new(image)));
        state.cursor.visible = true;
    }

    pub(crate) fn move_cursor(&self, position: (u32, u32)) {
        self.lock().cursor.position = position;
    }

    pub(crate) fn hide_cursor(&self) {
        self.lock().cursor.visible = false;
    }

    pub(crate) fn cursor(&self) -> CursorState {
        self.lock().cursor.clone()
    }
}
