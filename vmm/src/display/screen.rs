//! Frames and pointer images, from the GPU device to viewers and screenshots.

use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak},
    time::Duration,
};

use devices::virtio::gpu::{self, DisplayMode, DisplaySink, GpuHandle};
use spice_server::{
    CursorImage, DisplayHandle, Frame, FrameGone, MonitorConfig, PixelFormat, Rect, Severity,
    SpiceServer, SurfaceInfo,
};

use super::vnc;
use crate::control::ControlError;

/// Frames per second a viewer gets at most.
const MAX_FPS: u32 = 60;

/// Pictures that count at most as skipped between two frames: the GPU process says how many, and is not
/// trusted.
const MAX_SKIPPED: u64 = 1000;

/// How long a screenshot waits for the GPU process to deliver a picture.
const SCREENSHOT_PATIENCE: Duration = Duration::from_secs(10);

/// One scanout of the GPU.
pub(super) struct Screen {
    id: u32,
    gpu: GpuHandle,
    viewer: OnceLock<DisplayHandle>,
    vnc: OnceLock<vnc_server::Screen>,
    /// Held while demand changes and the GPU is told, so that the last change is told last. Never
    /// taken on the GPU's thread.
    demand: Mutex<()>,
    state: Mutex<State>,
    arrived: Condvar,
}

#[derive(Default)]
struct State {
    /// Size of the guest's picture; `None` while the guest shows nothing.
    size: Option<(u32, u32)>,
    /// Somebody is connected to the server of that kind.
    watched: [bool; 2],
    /// Screenshots that wait for a frame.
    screenshots: u32,
    /// The newest frame, as long as somebody wants frames: it occupies one of the GPU's slots.
    newest: Option<gpu::Frame>,
    /// Frames so far, and the number that the GPU gave to the last one.
    frames: u64,
    sequence: u64,
    /// Where in the pointer's image the pixel is that points.
    hot_spot: (u32, u32),
}

/// The servers through which a screen is watched.
#[derive(Debug, Clone, Copy)]
pub(super) enum Through {
    Spice,
    Vnc,
}

impl State {
    fn frames_wanted(&self) -> bool {
        self.watched.contains(&true) || self.screenshots > 0
    }
}

impl Screen {
    pub(super) fn new(id: u32, gpu: &GpuHandle) -> Arc<Self> {
        Arc::new(Self {
            id,
            gpu: gpu.clone(),
            viewer: OnceLock::new(),
            vnc: OnceLock::new(),
            demand: Mutex::default(),
            state: Mutex::default(),
            arrived: Condvar::new(),
        })
    }

    pub(super) fn id(&self) -> u32 {
        self.id
    }

    /// Size of the guest's picture; `None` while the guest shows nothing.
    pub(super) fn size(&self) -> Option<(u32, u32)> {
        self.state().size
    }

    /// Where frames go; set once, before the first one.
    pub(super) fn set_viewer(&self, viewer: Option<DisplayHandle>) {
        if let Some(viewer) = viewer {
            viewer.set_source(Arc::new(self.source()));
            // A second call would be a defect in `start`, and harmless.
            let _ = self.viewer.set(viewer);
        }
    }

    /// As [`set_viewer`](Self::set_viewer), for VNC.
    pub(super) fn set_vnc(&self, screen: vnc_server::Screen) {
        screen.set_source(Arc::new(self.source()));
        let _ = self.vnc.set(screen);
    }

    fn source(&self) -> Source {
        Source { id: self.id, gpu: self.gpu.clone() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first viewer came or the last one went: without any the GPU need not copy pixels.
    pub(super) fn set_watched(&self, through: Through, watched: bool) {
        self.change_demand(|state| state.watched[through as usize] = watched);
    }

    /// Applies `change` and tells the GPU if frames are wanted now and were not before, or the
    /// other way round; returns whether it did.
    fn change_demand(&self, change: impl FnOnce(&mut State)) -> bool {
        let _order = self.demand.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = self.state();
        let before = state.frames_wanted();
        change(&mut state);
        let after = state.frames_wanted();
        // Dropped outside the lock: a frame tells the GPU that its slot is free.
        let stale = if after { None } else { state.newest.take() };
        drop(state);
        drop(stale);
        if before != after {
            if let Some(viewer) = self.viewer.get().filter(|_| !after) {
                // The next viewer must not see what was on the screen when the last one left.
                viewer.release_frame();
            }
            if let Some(vnc) = self.vnc.get().filter(|_| !after) {
                vnc.release_frame();
            }
            self.gpu.want_frames_one_by_one(self.id, if after { MAX_FPS } else { 0 });
        }
        before != after
    }

    /// Gives the guest another monitor; whether that is possible.
    pub(super) fn resize(&self, monitor: MonitorConfig) -> bool {
        let mode = DisplayMode {
            width: monitor.width,
            height: monitor.height,
            width_mm: monitor.width_mm.into(),
            height_mm: monitor.height_mm.into(),
        };
        let changed = self.gpu.set_display(self.id, Some(mode));
        if changed {
            tracing::debug!(display = self.id, mode.width, mode.height, "monitor changed");
        }
        changed
    }

    /// The picture as a PNG file.
    pub(super) fn screenshot(&self) -> Result<Vec<u8>, ControlError> {
        if self.state().size.is_none() {
            return Err(ControlError("the guest shows nothing on this display".to_owned()));
        }
        let seen = self.state().frames;
        if !self.change_demand(|state| state.screenshots += 1) {
            // The newest frame is as old as the viewers are slow.
            self.gpu.want_frames_one_by_one(self.id, MAX_FPS);
        }
        let frame = self.wait_for_frame(seen);
        self.change_demand(|state| state.screenshots -= 1);
        let frame = frame.ok_or_else(|| {
            ControlError("the GPU process delivered no picture; see the log".to_owned())
        })?;
        encode_png(&frame)
    }

    /// A frame that came after so many, or the last one if none comes.
    fn wait_for_frame(&self, seen: u64) -> Option<gpu::Frame> {
        let state = self.state();
        let waiting = |state: &mut State| state.frames == seen || state.newest.is_none();
        let waited = self.arrived.wait_timeout_while(state, SCREENSHOT_PATIENCE, waiting);
        waited.unwrap_or_else(PoisonError::into_inner).0.newest.clone()
    }

    fn scanout(&self, size: Option<(u32, u32)>) {
        let mut state = self.state();
        state.size = size;
        let stale = state.newest.take();
        drop(state);
        drop(stale);
        if let Some(viewer) = self.viewer.get() {
            viewer.set_surface(size.map(|(width, height)| SurfaceInfo { width, height }));
        }
        if let Some(vnc) = self.vnc.get() {
            vnc.set_size(size);
        }
    }

    fn frame(&self, frame: gpu::Frame, damage: &[gpu::Rect]) {
        let mut state = self.state();
        if !state.frames_wanted() {
            // Late: the last viewer has gone. The next one must not see it, and its slot is free.
            return;
        }
        let skipped = match state.newest {
            Some(_) => skipped(state.sequence, frame.sequence()),
            None => 0,
        };
        state.sequence = frame.sequence();
        state.frames = state.frames.wrapping_add(1);
        let stale = state.newest.replace(frame.clone());
        drop(state);
        drop(stale);
        self.arrived.notify_all();
        if let Some(vnc) = self.vnc.get() {
            vnc::present(vnc, frame.clone(), damage);
        }
        if let Some(viewer) = self.viewer.get() {
            let damage: Vec<Rect> =
                damage.iter().map(|r| Rect::new(r.x, r.y, r.width, r.height)).collect();
            viewer.present_after(skipped, Arc::new(Picture(frame)), &damage);
        }
    }
}

/// Pictures between two frames with these numbers.
fn skipped(last: u64, next: u64) -> u64 {
    next.saturating_sub(last).saturating_sub(1).min(MAX_SKIPPED)
}

/// Where servers ask for frames.
struct Source {
    id: u32,
    gpu: GpuHandle,
}

impl spice_server::FrameSource for Source {
    fn want_next(&self) {
        self.gpu.want_next_frame(self.id);
    }
}

impl vnc_server::FrameSource for Source {
    fn want_next(&self) {
        self.gpu.want_next_frame(self.id);
    }
}

/// Hands what the GPU shows to the screens.
pub(super) struct Sink {
    screens: Vec<Arc<Screen>>,
    /// Who tells viewers what happens to the GPU.
    server: Option<Weak<SpiceServer>>,
}

impl Sink {
    pub(super) fn new(screens: Vec<Arc<Screen>>, server: Option<&Arc<SpiceServer>>) -> Self {
        Self { screens, server: server.map(Arc::downgrade) }
    }

    fn screen(&self, id: u32) -> Option<&Screen> {
        self.screens.get(id as usize).map(Arc::as_ref)
    }

    fn viewer(&self, id: u32) -> Option<&DisplayHandle> {
        self.screen(id)?.viewer.get()
    }
}

impl DisplaySink for Sink {
    fn scanout(&self, id: u32, size: Option<(u32, u32)>) {
        if let Some(screen) = self.screen(id) {
            screen.scanout(size);
        }
    }

    fn frame(&self, id: u32, frame: gpu::Frame, damage: &[gpu::Rect]) {
        if let Some(screen) = self.screen(id) {
            screen.frame(frame, damage);
        }
    }

    fn cursor_define(&self, id: u32, image: &gpu::CursorImage<'_>) {
        let Some(screen) = self.screen(id) else { return };
        // The guest may say anything; viewers expect a pixel of the image.
        let hot_x = image.hot_x.min(image.width.saturating_sub(1));
        let hot_y = image.hot_y.min(image.height.saturating_sub(1));
        screen.state().hot_spot = (hot_x, hot_y);
        if let Some(vnc) = screen.vnc.get() {
            vnc.set_cursor(Some(vnc_server::Cursor {
                width: image.width,
                height: image.height,
                hot: (hot_x, hot_y),
                pixels: image.pixels.to_vec(),
            }));
        }
        if let Some(viewer) = screen.viewer.get() {
            viewer.set_cursor(CursorImage {
                width: image.width,
                height: image.height,
                hot_x,
                hot_y,
                argb: image.pixels.to_vec(),
            });
        }
    }

    fn cursor_move(&self, id: u32, x: u32, y: u32) {
        let Some(screen) = self.screen(id) else { return };
        let (hot_x, hot_y) = screen.state().hot_spot;
        if let Some(viewer) = screen.viewer.get() {
            // Linux moves the image's corner, SPICE the pixel that points. At the left and top
            // edges the corner is negative, which wraps.
            viewer.move_cursor(x.wrapping_add(hot_x), y.wrapping_add(hot_y));
        }
    }

    fn cursor_hide(&self, id: u32) {
        if let Some(viewer) = self.viewer(id) {
            viewer.hide_cursor();
        }
        if let Some(vnc) = self.screen(id).and_then(|screen| screen.vnc.get()) {
            vnc.set_cursor(None);
        }
    }

    fn back_end(&self, alive: bool) {
        let Some(server) = self.server.as_ref().and_then(Weak::upgrade) else { return };
        if alive {
            let text = "The GPU process runs again. Programs that draw in 3D have to be restarted.";
            server.notify(Severity::Info, text);
        } else {
            let text = "The GPU process of this machine ended. The picture stands still.";
            server.notify(Severity::Warning, text);
        }
    }
}

/// A frame of the GPU as the SPICE server wants it. Dropping the last copy frees the GPU's slot.
struct Picture(gpu::Frame);

impl Frame for Picture {
    fn width(&self) -> u32 {
        self.0.width()
    }

    fn height(&self) -> u32 {
        self.0.height()
    }

    fn format(&self) -> PixelFormat {
        PixelFormat::Xrgb8888
    }

    fn copy_rect(&self, rect: Rect, out: &mut [u8], out_stride: usize) -> Result<(), FrameGone> {
        let rect = gpu::Rect { x: rect.x, y: rect.y, width: rect.width, height: rect.height };
        self.0.copy_rect(rect, out, out_stride).map_err(|error| {
            if error == gpu::CopyError::OutOfFrame {
                tracing::error!(?rect, "the SPICE server asked for pixels that do not exist");
            }
            FrameGone
        })
    }
}

fn encode_png(frame: &gpu::Frame) -> Result<Vec<u8>, ControlError> {
    let failed = |error: &dyn std::fmt::Display| {
        ControlError(format!("the picture could not be encoded: {error}"))
    };
    let (width, height) = (frame.width(), frame.height());
    let stride = width as usize * 4;
    let mut pixels = vec![0; stride * height as usize];
    frame
        .copy_rect(gpu::Rect { x: 0, y: 0, width, height }, &mut pixels, stride)
        .map_err(|error| failed(&error))?;
    let rgb: Vec<u8> = pixels.chunks_exact(4).flat_map(|p| [p[2], p[1], p[0]]).collect();
    let mut file = Vec::new();
    let mut encoder = png::Encoder::new(&mut file, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.set_compression(png::Compression::Fast);
    let mut writer = encoder.write_header().map_err(|error| failed(&error))?;
    writer.write_image_data(&rgb).map_err(|error| failed(&error))?;
    writer.finish().map_err(|error| failed(&error))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::{io::Read, os::unix::net::UnixStream, thread};

    use gpu::fuzz::FrontEnd;
    use gpu_protocol::{
        frames::{Frame, WANT_FULL},
        socket::{Decoder, FromBackEnd, FromFrontEnd, ProtocolFeatures, Side},
    };

    use super::*;

    const SIZE: (u32, u32) = (64, 32);

    /// The GPU process, as far as a screen notices.
    struct Process {
        front: FrontEnd,
        socket: UnixStream,
        decoder: Decoder,
        /// How often a whole picture was asked for.
        asked: u32,
        generation: u32,
    }

    impl Process {
        fn new() -> Self {
            let mut front = FrontEnd::new(1, 0).unwrap();
            let (ours, socket) = UnixStream::pair().unwrap();
            front.connect(ours).unwrap();
            let features = ProtocolFeatures::SHM_FRAMES.bits();
            front.receive(FromBackEnd::SetProtocolFeatures(features), None);
            let decoder = Decoder::new(Side::BackEnd);
            Self { front, socket, decoder, asked: 0, generation: 0 }
        }

        /// Reads all there is, or more until a whole picture was asked for so often.
        fn read(&mut self, until: u32) {
            let mut bytes = [0; 4096];
            loop {
                self.socket.set_nonblocking(self.asked >= until).unwrap();
                let Ok(count) = self.socket.read(&mut bytes) else { return };
                self.decoder.push(&bytes[..count]);
                while let Some(raw) = self.decoder.next_message().unwrap() {
                    match FromFrontEnd::decode(&raw).unwrap() {
                        FromFrontEnd::Want(want) => {
                            self.asked += u32::from(want.flags & WANT_FULL != 0);
                        }
                        FromFrontEnd::ShmScanout(layout) => self.generation = layout.generation,
                        _ => {}
                    }
                }
            }
        }

        fn frame(&self, slot: u32, sequence: u64) {
            let damage = vec![gpu::Rect { x: 0, y: 0, width: SIZE.0, height: SIZE.1 }];
            let generation = self.generation;
            let frame = Frame { scanout: 0, generation, slot, sequence, damage };
            self.front.receive(FromBackEnd::Frame(frame), None);
        }
    }

    #[test]
    fn a_screenshot_asks_for_one_picture() {
        let mut process = Process::new();
        let gpu = process.front.handle();
        let screen = Screen::new(0, &gpu);
        gpu.set_sink(Arc::new(Sink::new(vec![screen.clone()], None)));
        let (width, height) = SIZE;
        process.front.receive(FromBackEnd::Scanout { scanout: 0, width, height }, None);
        let screenshot = |process: &mut Process, slot, sequence| {
            let asked = process.asked;
            let screen = screen.clone();
            let picture = thread::spawn(move || screen.screenshot().is_ok());
            process.read(asked + 1);
            process.frame(slot, sequence);
            assert!(picture.join().unwrap());
            process.read(0);
            process.asked - asked
        };
        assert_eq!(screenshot(&mut process, 0, 1), 1, "nobody watches");
        screen.set_watched(Through::Vnc, true);
        process.read(2);
        process.frame(0, 2);
        assert_eq!(screenshot(&mut process, 1, 3), 1, "somebody does");
    }

    #[test]
    fn what_the_gpu_process_says_it_skipped_is_limited() {
        assert_eq!(skipped(0, u64::MAX), MAX_SKIPPED);
        assert_eq!(skipped(5, 9), 3);
        assert_eq!(skipped(5, 6), 0);
        assert_eq!(skipped(9, 5), 0, "another process counts anew");
    }
}
