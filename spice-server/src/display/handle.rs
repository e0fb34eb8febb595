//! The program's end of a display.

use std::sync::Arc;

use super::{
    CursorImage, Frame, FrameSource, PixelFormat, Rect, Snapshot, SurfaceInfo,
    cursor::MAX_CURSOR_SIDE, state::DisplayShared,
};
use crate::io::wake::Wake;

/// One display of the server; cheap to clone.
#[derive(Clone)]
pub struct DisplayHandle {
    pub(crate) shared: Arc<DisplayShared>,
    /// Wakes the I/O thread, which serves the cursor channels.
    pub(crate) io: Arc<Wake>,
}

impl DisplayHandle {
    /// Tells the size of the frames to come, or that there is no picture (`None`: viewers see
    /// black). Viewers keep the old picture until the first frame of the new size; the server lets
    /// go of the old frame at once. Sizes are clamped to 1..=16384.
    pub fn set_surface(&self, surface: Option<SurfaceInfo>) {
        self.shared.set_surface(surface);
    }

    /// Shows `frame`. `damage` is what changed since the frame presented before; a viewer that has
    /// not been sent that one gets the union. Never blocks: viewers encode on their own threads,
    /// always from the newest frame. A frame whose size differs from the surface sets the surface,
    /// and is sent whole.
    pub fn present(&self, frame: Arc<dyn Frame>, damage: &[Rect]) {
        self.shared.present(frame, damage, 0);
    }

    /// The same for a frame before which so many were not presented, because nobody
    /// [wanted](super::FrameSource) them: what is a film is told by how often it changes.
    pub fn present_after(&self, skipped: u64, frame: Arc<dyn Frame>, damage: &[Rect]) {
        self.shared.present(frame, damage, skipped);
    }

    /// Tells `source` whenever a viewer could show more than the newest frame, for programs that would
    /// make some in vain otherwise.
    pub fn set_source(&self, source: Arc<dyn FrameSource>) {
        self.shared.set_source(source);
    }

    /// Lets go of the newest frame without changing what viewers see: for programs that make frames
    /// only while there are viewers, once there are none. A viewer that comes later waits a moment
    /// for the next [`present`](Self::present) instead of seeing an old picture.
    pub fn release_frame(&self) {
        self.shared.release_frame();
    }

    /// Sets the pointer's picture and shows it. Invalid images are ignored with a log line.
    pub fn set_cursor(&self, image: CursorImage) {
        if !image.is_valid() {
            tracing::warn!(
                width = image.width,
                height = image.height,
                bytes = image.argb.len(),
                "pointer image ignored: sides must be 1 to {MAX_CURSOR_SIDE}, 4 bytes per pixel"
            );
            return;
        }
        self.shared.set_cursor(image);
        self.io.wake();
    }

    /// Moves the pointer (its hot spot). Viewers follow only in server mouse mode; in client mode
    /// they draw it where their own pointer is.
    pub fn move_cursor(&self, x: u32, y: u32) {
        self.shared.move_cursor((x, y));
        self.io.wake();
    }

    /// Hides the pointer until the next [`set_cursor`](Self::set_cursor).
    pub fn hide_cursor(&self) {
        self.shared.hide_cursor();
        self.io.wake();
    }

    /// A copy of the newest frame, without the pointer; `None` while there is no picture.
    pub fn snapshot(&self) -> Option<Snapshot> {
        let frame = self.shared.frame()?;
        let (width, height) = (frame.width(), frame.height());
        let stride = width as usize * 4;
        let mut pixels = vec![0; stride * height as usize];
        frame.copy_rect(Rect::new(0, 0, width, height), &mut pixels, stride).ok()?;
        to_xrgb8888(frame.format(), &mut pixels);
        Some(Snapshot { width, height, pixels })
    }
}

/// Reorders pixels in place to XRGB8888, the order on the wire, and clears the unused byte.
pub(crate) fn to_xrgb8888(format: PixelFormat, pixels: &mut [u8]) {
    let (pixels, _) = pixels.as_chunks_mut::<4>();
    match format {
        PixelFormat::Xrgb8888 => pixels.iter_mut().for_each(|pixel| {
            *pixel = (u32::from_le_bytes(*pixel) & 0x00ff_ffff).to_le_bytes();
        }),
        PixelFormat::Xbgr8888 => pixels.iter_mut().for_each(|pixel| {
            *pixel = (u32::from_le_bytes(*pixel) << 8).swap_bytes().to_le_bytes();
        }),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::{
        FrameGone, MemoryFrame,
        display::state::{HasWork, Work},
    };

    fn handle() -> DisplayHandle {
        DisplayHandle { shared: Arc::new(DisplayShared::new()), io: Arc::new(Wake::new().unwrap()) }
    }

    struct Counted(Arc<AtomicUsize>, u32);

    impl Frame for Counted {
        fn width(&self) -> u32 {
            self.1
        }
        fn height(&self) -> u32 {
            64
        }
        fn format(&self) -> PixelFormat {
            PixelFormat::Xbgr8888
        }
        fn copy_rect(&self, rect: Rect, out: &mut [u8], stride: usize) -> Result<(), FrameGone> {
            for row in out.chunks_mut(stride).take(rect.height as usize) {
                for pixel in row[..rect.width as usize * 4].chunks_exact_mut(4) {
                    pixel.copy_from_slice(&[1, 2, 3, 4]);
                }
            }
            Ok(())
        }
    }

    impl Drop for Counted {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn only_the_newest_frame_is_kept() {
        let display = handle();
        let drops = Arc::new(AtomicUsize::new(0));
        for _ in 0..5 {
            display.present(Arc::new(Counted(drops.clone(), 64)), &[]);
        }
        assert_eq!(drops.load(Ordering::SeqCst), 4);
        let snapshot = display.snapshot().unwrap();
        assert_eq!(snapshot.pixels[..4], [3, 2, 1, 0]);
        display.set_surface(Some(SurfaceInfo { width: 64, height: 64 }));
        assert_eq!(drops.load(Ordering::SeqCst), 4);
        display.set_surface(Some(SurfaceInfo { width: 128, height: 64 }));
        assert_eq!(drops.load(Ordering::SeqCst), 5);
        assert!(display.snapshot().is_none());
    }

    #[test]
    fn a_viewer_sees_surface_then_damage_then_black() {
        let display = handle();
        let shared = &display.shared;
        let viewer = shared.add_viewer(Arc::new(Wake::new().unwrap()));
        assert_eq!(shared.has_work(viewer, None), HasWork::Yes);
        assert!(matches!(shared.next_work(viewer, None), Work::Surface((1024, 768))));
        assert_eq!(shared.has_work(viewer, Some((1024, 768))), HasWork::No);
        let frame = MemoryFrame::new(64, 64, vec![0; 64 * 64 * 4]).unwrap();
        display.present(Arc::new(frame.clone()), &[]);
        let shown = Some((64, 64));
        assert!(matches!(
            shared.next_work(viewer, Some((1024, 768))),
            Work::FrameSurface((64, 64))
        ));
        let Work::Draw(_, rects, frames) = shared.next_work(viewer, shown) else {
            panic!("no work")
        };
        assert_eq!((rects, frames), (vec![Rect::new(0, 0, 64, 64)], 1));
        assert!(matches!(shared.next_work(viewer, shown), Work::Done));
        display.present(Arc::new(frame.clone()), &[Rect::new(1, 2, 3, 4)]);
        display.present(Arc::new(frame.clone()), &[Rect::new(9, 2, 3, 4)]);
        let Work::Draw(_, rects, frames) = shared.next_work(viewer, shown) else {
            panic!("no work")
        };
        assert_eq!((rects, frames), (vec![Rect::new(1, 2, 11, 4)], 2));
        display.present_after(4, Arc::new(frame.clone()), &[Rect::new(1, 2, 3, 4)]);
        display.present(Arc::new(frame), &[Rect::new(1, 2, 3, 4)]);
        let Work::Draw(_, _, frames) = shared.next_work(viewer, shown) else { panic!("no work") };
        assert_eq!(frames, 6, "those that nobody wanted count");
        display.release_frame();
        assert_eq!(shared.has_work(viewer, shown), HasWork::No);
        assert_eq!(shared.has_work(viewer, None), HasWork::OnlyBlack);
        display.set_surface(None);
        assert!(matches!(shared.next_work(viewer, shown), Work::Blank));
        assert!(matches!(shared.next_work(viewer, shown), Work::Done));
    }

    #[test]
    fn invalid_cursors_are_ignored() {
        let display = handle();
        let image = CursorImage { width: 2, height: 2, hot_x: 0, hot_y: 0, argb: vec![0; 15] };
        display.set_cursor(image);
        assert!(display.shared.cursor().image.is_none());
    }
}
