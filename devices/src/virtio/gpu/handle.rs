//! What the VMM does with the GPU while the guest runs.

use std::sync::Arc;

use gpu_protocol::Rect;

use super::{display::Display, frame::Frame};

/// A monitor as the guest is to see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DisplayMode {
    /// Preferred width in pixels, 1 to 16384.
    pub width: u32,
    /// Preferred height in pixels, 1 to 16384.
    pub height: u32,
    /// Physical width in millimetres, from which guests derive a scale factor; 0: as at 96 dpi.
    pub width_mm: u32,
    /// Physical height in millimetres; 0: as at 96 dpi.
    pub height_mm: u32,
}

impl DisplayMode {
    /// A monitor of this many pixels at 96 dpi.
    pub const fn new(width: u32, height: u32) -> Self {
        Self { width, height, width_mm: 0, height_mm: 0 }
    }
}

/// A cursor image.
#[derive(Debug, Clone, Copy)]
pub struct CursorImage<'a> {
    /// Pixels; 64.
    pub width: u32,
    /// Pixels; 64.
    pub height: u32,
    /// Where in the image the pointed-at pixel is. As the guest says: may lie outside.
    pub hot_x: u32,
    /// Where in the image the pointed-at pixel is.
    pub hot_y: u32,
    /// ARGB8888 (in memory B, G, R, A), premultiplied by Linux guests; rows without gaps.
    pub pixels: &'a [u8],
}

/// Who looks at the guest's monitors. All methods are called from one thread, the one that serves
/// the GPU socket, so they should be quick; none is called while another is running.
pub trait DisplaySink: Send + Sync {
    /// The guest shows pictures of this size (in pixels) on a scanout, or nothing any more.
    fn scanout(&self, id: u32, size: Option<(u32, u32)>);

    /// A new frame. It is complete; `damage` tells what differs from the frame before it (the first
    /// frame of a size, and the first after [`GpuHandle::want_frames`], is all damage). Rectangles
    /// lie inside the frame and may overlap.
    fn frame(&self, id: u32, frame: Frame, damage: &[Rect]);

    /// The cursor looks like this now, and is to be seen.
    fn cursor_define(&self, id: u32, image: &CursorImage<'_>);

    /// The cursor's image (its top left corner, as Linux has it) is at this place.
    fn cursor_move(&self, id: u32, x: u32, y: u32);

    /// No cursor is to be seen.
    fn cursor_hide(&self, id: u32);

    /// The back end died (what is shown stays as it is), or another one has taken over.
    fn back_end(&self, alive: bool) {
        let _ = alive;
    }
}

/// The GPU at run time. Clones refer to the same device.
#[derive(Debug, Clone)]
pub struct GpuHandle {
    pub(super) display: Arc<Display>,
}

impl GpuHandle {
    /// Sends everything from now on to `sink`, beginning with what is shown at present.
    pub fn set_sink(&self, sink: Arc<dyn DisplaySink>) {
        self.display.set_sink(sink);
    }

    /// Number of monitors the guest can have.
    pub fn scanouts(&self) -> u32 {
        self.display.scanouts()
    }

    /// The monitor that is plugged into a scanout at present.
    pub fn display(&self, scanout: u32) -> Option<DisplayMode> {
        self.display.mode(scanout)
    }

    /// Plugs in another monitor, or none: changes display info and EDID and tells the driver.
    /// Returns whether anything changed; a scanout or size that is out of range changes nothing.
    pub fn set_display(&self, scanout: u32, mode: Option<DisplayMode>) -> bool {
        self.display.set_mode(scanout, mode)
    }

    /// Asks for up to `max_fps` frames per second of a scanout; 0: none, which costs nothing. Each
    /// call with another value than 0 is followed by one complete frame, even if nothing changes.
    pub fn want_frames(&self, scanout: u32, max_fps: u32) {
        self.display.want_frames(scanout, max_fps, false);
    }

    /// The same, but after the complete frame each next one has to be asked for with
    /// [`want_next_frame`](Self::want_next_frame), so that the GPU does not read back what nobody would
    /// look at. (A back end that is not ours may send more.)
    pub fn want_frames_one_by_one(&self, scanout: u32, max_fps: u32) {
        self.display.want_frames(scanout, max_fps, true);
    }

    /// Somebody has use for a frame that is newer than the last one. It comes when something has changed
    /// since then, which may be at once; that it was asked for before it came makes no difference.
    pub fn want_next_frame(&self, scanout: u32) {
        self.display.want_next_frame(scanout);
    }

    /// Whether there is a back end at present.
    pub fn is_alive(&self) -> bool {
        self.display.is_alive()
    }
}
