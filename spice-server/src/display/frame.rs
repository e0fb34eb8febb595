//! Pictures as the program hands them over.

use super::Rect;

/// A complete picture of one display.
///
/// The server reads a frame from several threads, only the rectangles it is about to encode, and
/// each at most once per client. It drops the last reference when it has a newer frame and no
/// encoder is reading this one any more: dropping is how a slot of a frame pool becomes free. One
/// display keeps at most its newest frame plus one per display channel that is encoding.
pub trait Frame: Send + Sync {
    /// Width in pixels.
    fn width(&self) -> u32;

    /// Height in pixels.
    fn height(&self) -> u32;

    /// How its pixels are stored.
    fn format(&self) -> PixelFormat;

    /// Copies the pixels of `rect` row by row to `out`, rows `out_stride` bytes apart.
    ///
    /// `rect` lies inside the frame, `out_stride` is at least `4 * rect.width`, and `out` holds at
    /// least `(rect.height - 1) * out_stride + 4 * rect.width` bytes. The memory behind the frame
    /// may be written by somebody else meanwhile; any mixture of pixels is fine.
    ///
    /// # Errors
    /// If the memory behind the frame is somebody else's by now. Nothing of it is shown then, and what
    /// `out` holds means nothing; the program presents a newer frame, all of it damaged, or none.
    fn copy_rect(&self, rect: Rect, out: &mut [u8], out_stride: usize) -> Result<(), FrameGone>;
}

/// Who makes frames, if that costs something: no more of them than somebody looks at.
pub trait FrameSource: Send + Sync {
    /// A viewer has shown what it got, its connection has room, and it could show something newer. Called
    /// again and again, also when nothing has changed, from viewers' threads; must not wait.
    fn want_next(&self);
}

/// A [`Frame`] whose pixels cannot be had any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the frame's pixels are gone")]
pub struct FrameGone;

/// How a pixel's four bytes are ordered (DRM fourcc naming: a little-endian 32-bit word).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PixelFormat {
    /// Bytes blue, green, red, unused (`DRM_FORMAT_XRGB8888`).
    Xrgb8888,
    /// Bytes red, green, blue, unused (`DRM_FORMAT_XBGR8888`).
    Xbgr8888,
}

/// The size of a display's picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SurfaceInfo {
    /// Width in pixels, 1 to 16384.
    pub width: u32,
    /// Height in pixels, 1 to 16384.
    pub height: u32,
}

/// A frame in ordinary memory: for tests, examples and small programs.
#[derive(Debug, Clone)]
pub struct MemoryFrame {
    width: u32,
    height: u32,
    pixels: Vec<u8>,
}

impl MemoryFrame {
    /// A frame from `width * height` XRGB8888 pixels without padding; `None` if `pixels` has
    /// another length.
    pub fn new(width: u32, height: u32, pixels: Vec<u8>) -> Option<Self> {
        let bytes = usize::try_from(u64::from(width) * u64::from(height) * 4).ok()?;
        (pixels.len() == bytes).then_some(Self { width, height, pixels })
    }
}

impl MemoryFrame {
    /// Its pixels, row by row without padding.
    pub fn pixels(&self) -> &[u8] {
        &self.pixels
    }

    /// Its pixels, to be painted before the frame is presented.
    pub fn pixels_mut(&mut self) -> &mut [u8] {
        &mut self.pixels
    }
}

impl Frame for MemoryFrame {
    fn width(&self) -> u32 {
        self.width
    }

    fn height(&self) -> u32 {
        self.height
    }

    fn format(&self) -> PixelFormat {
        PixelFormat::Xrgb8888
    }

    fn copy_rect(&self, rect: Rect, out: &mut [u8], out_stride: usize) -> Result<(), FrameGone> {
        let stride = self.width as usize * 4;
        let row_bytes = rect.width as usize * 4;
        let start = rect.y as usize * stride + rect.x as usize * 4;
        let rows = self.pixels.get(start..).unwrap_or_default().chunks(stride);
        for (from, to) in rows.zip(out.chunks_mut(out_stride)).take(rect.height as usize) {
            let bytes = row_bytes.min(from.len()).min(to.len());
            to[..bytes].copy_from_slice(&from[..bytes]);
        }
        Ok(())
    }
}

/// A copy of a display's newest frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
    /// `width * height` XRGB8888 pixels without padding; the unused byte is 0.
    pub pixels: Vec<u8>,
}
