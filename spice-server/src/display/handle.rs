//! The program's end of a display.

use std::sync::Arc;

use super::{CursorImage, Frame, Rect, Snapshot, SurfaceInfo};

/// One display of the server; cheap to clone.
#[derive(Clone)]
pub struct DisplayHandle {
    pub(crate) shared: Arc<DisplayShared>,
}

pub(crate) struct DisplayShared;

impl DisplayHandle {
    /// Tells the size of the frames to come, or that there is no picture (`None`: viewers see
    /// black). Viewers keep the old picture until the first frame of the new size.
    pub fn set_surface(&self, surface: Option<SurfaceInfo>) {
        let _ = (&self.shared, surface);
    }

    /// Shows `frame`. `damage` is what changed since the frame presented before; a viewer that has
    /// not been sent that one gets the union. Never blocks: viewers encode on their own threads,
    /// always from the newest frame. A frame whose size differs from the surface sets the surface.
    pub fn present(&self, frame: Arc<dyn Frame>, damage: &[Rect]) {
        let _ = (frame, damage);
    }

    /// Sets the pointer's picture. Invalid images are ignored with a log line.
    pub fn set_cursor(&self, image: CursorImage) {
        let _ = image;
    }

    /// Moves the pointer (its hot spot). Viewers follow only in server mouse mode; in client mode
    /// they draw it where their own pointer is.
    pub fn move_cursor(&self, x: u32, y: u32) {
        let _ = (x, y);
    }

    /// Hides the pointer until the next [`set_cursor`](Self::set_cursor).
    pub fn hide_cursor(&self) {}

    /// A copy of the newest frame, without the pointer; `None` while there is no picture.
    pub fn snapshot(&self) -> Option<Snapshot> {
        None
    }
}
