//! The test picture: what is in it, and a thread that moves it.
#![allow(unreachable_pub, dead_code, reason = "shared by the example and the tests")]

#[path = "content.rs"]
pub mod content;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, RecvTimeoutError, Sender},
    },
    time::{Duration, Instant},
};

use spice_server::{
    Button, CursorImage, DisplayEvents, DisplayHandle, Frame, InputSink, KeyEvent, MemoryFrame,
    MonitorConfig, PointerPosition, Rect,
};

use content::{Canvas, LETTER, Random};

/// What the picture does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// A square moves over a still background.
    Moving,
    /// Every pixel changes at random: nothing compresses.
    Noise,
    /// Every pixel changes: a texture that compresses like a busy desktop.
    Texture,
    /// A square changes colour when a key goes down.
    Key,
    /// Nothing moves.
    Static,
    /// A window with text is dragged over a desktop.
    Window,
    /// A page of text scrolls.
    Scroll,
    /// Letters appear on a page of text, ten times a second.
    Typing,
    /// Something like a film: parts move in different directions.
    Film,
    /// A photograph pans.
    Pan,
}

impl Mode {
    /// Whether its frames carry the time at which they were painted (see [`Canvas::stamp`]).
    pub fn is_stamped(self) -> bool {
        use Mode::{Film, Noise, Pan, Scroll, Typing, Window};
        matches!(self, Film | Noise | Pan | Scroll | Typing | Window)
    }
}

impl std::str::FromStr for Mode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(match text {
            "moving" => Self::Moving,
            "noise" => Self::Noise,
            "texture" => Self::Texture,
            "key" => Self::Key,
            "static" => Self::Static,
            "window" => Self::Window,
            "scroll" => Self::Scroll,
            "typing" => Self::Typing,
            "film" => Self::Film,
            "pan" => Self::Pan,
            _ => return Err(format!("no mode {text}")),
        })
    }
}

/// What happens to the picture from outside.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Event {
    Key(KeyEvent),
    Absolute(PointerPosition),
    Relative(i32, i32),
    Button(Button, bool),
    Wheel(i32),
    Viewers(bool),
    Resize(u32, MonitorConfig),
}

/// Hands everything the server reports to a channel.
pub struct Reporter(pub Sender<Event>);

impl Reporter {
    fn report(&self, event: Event) {
        let _ = self.0.send(event);
    }
}

impl InputSink for Reporter {
    fn key(&self, event: KeyEvent) {
        self.report(Event::Key(event));
    }
    fn pointer_absolute(&self, position: PointerPosition) {
        self.report(Event::Absolute(position));
    }
    fn pointer_relative(&self, dx: i32, dy: i32) {
        self.report(Event::Relative(dx, dy));
    }
    fn button(&self, button: Button, down: bool) {
        self.report(Event::Button(button, down));
    }
    fn wheel(&self, steps: i32) {
        self.report(Event::Wheel(steps));
    }
}

impl DisplayEvents for Reporter {
    fn viewers_changed(&self, any: bool) {
        self.report(Event::Viewers(any));
    }
    fn resize_requested(&self, display: u32, monitor: MonitorConfig) {
        self.report(Event::Resize(display, monitor));
    }
}

/// Side of the square that moves or answers keys.
pub const SQUARE: u32 = 64;

/// The still background: colour ramps, hard edges and one-pixel patterns, so that a wrong stride, a
/// swapped colour or a lossy codec shows in every tile.
pub fn background(width: u32, height: u32) -> Vec<u8> {
    let mut pixels = Vec::with_capacity(width as usize * height as usize * 4);
    for y in 0..height {
        for x in 0..width {
            let pixel = match (x / 128 + y / 128) % 4 {
                0 => [(x * 2) as u8, (y * 2) as u8, ((x + y) / 8) as u8],
                1 => [255 * ((x ^ y) & 1) as u8; 3],
                2 => [40, 90 + (y / 128 % 8) as u8 * 16, 160],
                _ => [(x / 16 % 2) as u8 * 200, 220, (y / 16 % 2) as u8 * 250],
            };
            pixels.extend_from_slice(&[pixel[0], pixel[1], pixel[2], 0]);
        }
    }
    pixels
}

fn fill(frame: &mut MemoryFrame, rect: Rect, colour: [u8; 3]) {
    let stride = frame.width() as usize * 4;
    let rows = frame.pixels_mut().chunks_exact_mut(stride);
    for row in rows.skip(rect.y as usize).take(rect.height as usize) {
        for pixel in row.chunks_exact_mut(4).skip(rect.x as usize).take(rect.width as usize) {
            pixel.copy_from_slice(&[colour[0], colour[1], colour[2], 0]);
        }
    }
}

/// A pointer with a half transparent rim, premultiplied.
pub fn cursor() -> CursorImage {
    let mut argb = Vec::new();
    for y in 0..24u32 {
        for x in 0..24u32 {
            argb.extend_from_slice(match x.abs_diff(12).pow(2) + y.abs_diff(12).pow(2) {
                0..=80 => &[0, 0, 255, 255],
                81..=120 => &[0, 0, 64, 128],
                _ => &[0; 4],
            });
        }
    }
    CursorImage { width: 24, height: 24, hot_x: 12, hot_y: 12, argb }
}

/// Milliseconds of the system's monotonic clock modulo 4096, above a sum of its digits that tells
/// half-painted stamps.
pub fn stamp_now() -> u16 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let time = (now.tv_sec * 1000 + now.tv_nsec / 1_000_000) as u16 & 0xfff;
    let sum = (time & 15) * 3 + (time >> 4 & 15) * 5 + (time >> 8) * 7 + 6;
    time << 4 | sum & 15
}

fn noise(pixels: &mut [u8], step: u32) {
    let mut state = u64::from(step).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for pixels in pixels.chunks_exact_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        pixels.copy_from_slice(&state.to_le_bytes());
    }
}

fn texture(pixels: &mut [u8], width: u32, step: u32) {
    for (y, row) in (0u32..).zip(pixels.chunks_exact_mut(width as usize * 4)) {
        for (x, pixel) in (0u32..).zip(row.chunks_exact_mut(4)) {
            let value = (x + step) ^ y;
            pixel.copy_from_slice(&(value & 0x00ff_f8f8).to_le_bytes());
        }
    }
}

/// What the modes that look like real work are made of.
pub struct Scene {
    mode: Mode,
    screen: Canvas,
    page: Canvas,
    other: Canvas,
    random: Random,
    caret: (u32, u32),
    window: (u32, u32),
}

/// The part of the screen that scrolls.
fn page_of((width, height): (u32, u32)) -> Rect {
    Rect::new(width / 10, height / 12, width * 8 / 10, height * 10 / 12)
}

impl Scene {
    pub fn new(mode: Mode, (width, height): (u32, u32)) -> Self {
        let mut screen = Canvas::new(width, height, 0x30_5070);
        let page_rect = page_of((width, height));
        let white = 0xff_ffff;
        let (mut page, mut other) = (Canvas::new(1, 1, white), Canvas::new(1, 1, white));
        match mode {
            Mode::Scroll => {
                page = Canvas::new(page_rect.width, page_rect.height * 3, white);
                page.text(1);
            }
            Mode::Typing => {
                page = Canvas::new(page_rect.width, page_rect.height, white);
                screen.copy(&page, (0, 0), (page_rect.x, page_rect.y), (page.width, page.height));
            }
            Mode::Window => {
                screen.photo(5);
                page = Canvas::new(width / 3, height / 3, white);
                page.text(2);
                other = screen.clone();
            }
            Mode::Film | Mode::Pan => {
                page = Canvas::new(width + 512, height + 512, 0);
                page.photo(3);
                if mode == Mode::Film {
                    other = Canvas::new(width + 512, height + 512, 0);
                    other.photo(4);
                }
            }
            _ => {}
        }
        let random = Random(7);
        Self { mode, screen, page, other, random, caret: (20, 4), window: (0, 0) }
    }

    /// Paints the next frame and returns what changed.
    pub fn next(&mut self, step: u32) -> Vec<Rect> {
        let size = (self.screen.width, self.screen.height);
        let page = page_of(size);
        let stamp = Rect::new(0, 0, 128, 8).clipped(size.0, size.1);
        let all = Rect::new(0, 0, size.0, size.1);
        // There and back again, up to 512.
        let swing = |speed: u32| {
            let at = step * speed % 1024;
            if at < 512 { at } else { 1023 - at }
        };
        let mut damage = match self.mode {
            Mode::Scroll => {
                let size = (page.width, page.height);
                self.screen.copy(&self.page, (0, step * 6), (page.x, page.y), size);
                vec![page]
            }
            Mode::Typing => {
                let (x, y) = (page.x + self.caret.0, page.y + self.caret.1);
                let letter = self.random.below(26);
                self.screen.letter(x, y, letter, 0x20_2020);
                self.caret.0 += LETTER.0 * if self.random.below(6) == 0 { 2 } else { 1 };
                if self.caret.0 + 40 > page.width {
                    self.caret = (20, (self.caret.1 + LETTER.1) % (page.height - LETTER.1));
                }
                vec![Rect::new(x, y, LETTER.0, LETTER.1)]
            }
            Mode::Window => {
                let window = (self.page.width, self.page.height);
                let old = self.window;
                self.screen.copy(&self.other, old, old, window);
                let room = (size.0 - window.0, size.1 - window.1);
                self.window = (swing(7) * room.0 / 512, swing(4) * room.1 / 512);
                self.screen.copy(&self.page, (0, 0), self.window, window);
                let rect = |at: (u32, u32)| Rect::new(at.0, at.1, window.0, window.1);
                vec![rect(old), rect(self.window)]
            }
            Mode::Film => {
                let (a, b) = ((swing(3), swing(2)), (511 - swing(5), swing(7)));
                self.screen.blend((&self.page, a.0, a.1), (&self.other, b.0, b.1));
                vec![all]
            }
            Mode::Pan => {
                self.screen.copy(&self.page, (swing(4), swing(1)), (0, 0), size);
                vec![all]
            }
            Mode::Noise => {
                noise(&mut self.screen.pixels, step);
                vec![all]
            }
            Mode::Texture => {
                texture(&mut self.screen.pixels, size.0, step);
                vec![all]
            }
            _ => vec![all],
        };
        if size.0 >= 128 && size.1 >= 8 {
            self.screen.stamp(stamp_now());
            damage.push(stamp);
        }
        damage
    }

    /// The pixels now.
    pub fn pixels(&self) -> &[u8] {
        &self.screen.pixels
    }
}

/// Paints frames and presents them.
pub struct Picture {
    display: DisplayHandle,
    scene: Scene,
    /// Damage is always everything, as programs report it that flip pages.
    pub whole: bool,
    mode: Mode,
    size: (u32, u32),
    background: Vec<u8>,
    /// Frames; those nobody else holds are free.
    pool: Vec<Arc<MemoryFrame>>,
    square: Rect,
    step: u32,
    pressed: bool,
    /// Frames shown so far.
    pub painted: Arc<AtomicU64>,
}

impl Picture {
    pub fn new(display: DisplayHandle, mode: Mode, size: (u32, u32)) -> Self {
        let mut picture = Self {
            display,
            mode,
            size,
            scene: Scene::new(mode, size),
            whole: false,
            background: background(size.0, size.1),
            pool: Vec::new(),
            square: Rect::default(),
            step: 0,
            pressed: false,
            painted: Arc::default(),
        };
        picture.resize(size);
        picture
    }

    pub fn resize(&mut self, size: (u32, u32)) {
        self.size = size;
        self.background = background(size.0, size.1);
        self.scene = Scene::new(self.mode, size);
        self.pool.clear();
        self.square = Rect::default();
        self.show(&[Rect::new(0, 0, size.0, size.1)]);
    }

    /// A free frame with the background in it.
    fn frame(&mut self) -> Arc<MemoryFrame> {
        if let Some(index) = self.pool.iter_mut().position(|f| Arc::get_mut(f).is_some()) {
            let mut frame = self.pool.swap_remove(index);
            if let Some(frame) = Arc::get_mut(&mut frame).filter(|_| !self.mode.is_stamped()) {
                frame.pixels_mut().copy_from_slice(&self.background);
            }
            return frame;
        }
        let frame = MemoryFrame::new(self.size.0, self.size.1, self.background.clone());
        Arc::new(frame.expect("the background has this size"))
    }

    fn show(&mut self, damage: &[Rect]) {
        use Mode::{Film, Pan, Scroll, Typing, Window};
        let all = [Rect::new(0, 0, self.size.0, self.size.1)];
        let damage = if self.whole { &all } else { damage };
        let mut shared = self.frame();
        let frame = Arc::get_mut(&mut shared).expect("a free frame");
        match self.mode {
            Mode::Static => {}
            Mode::Moving => fill(frame, self.square, [40, 40, 250]),
            Mode::Key => {
                let colour = if self.pressed { [0, 255, 0] } else { [0, 0, 255] };
                fill(frame, self.square, colour);
            }
            Mode::Noise => {
                noise(frame.pixels_mut(), self.step);
                let mut stamp = Canvas::new(128, 8, 0);
                stamp.stamp(stamp_now());
                let stride = self.size.0 as usize * 4;
                let rows = frame.pixels_mut().chunks_exact_mut(stride).zip(0..8);
                for (row, y) in rows.filter(|_| stride >= 512) {
                    row[..512].copy_from_slice(stamp.row(y));
                }
            }
            Scroll | Typing | Window | Film | Pan => {
                frame.pixels_mut().copy_from_slice(self.scene.pixels());
            }
            Mode::Texture => {
                texture(frame.pixels_mut(), self.size.0, self.step);
            }
        }
        self.display.present(shared.clone(), damage);
        self.painted.fetch_add(1, Ordering::Relaxed);
        self.pool.push(shared);
    }

    /// Goes one step on, for the modes that move.
    pub fn tick(&mut self) {
        self.step = self.step.wrapping_add(1);
        match self.mode {
            Mode::Static | Mode::Key => {}
            Mode::Noise | Mode::Texture => {
                self.show(&[Rect::new(0, 0, self.size.0, self.size.1)]);
            }
            Mode::Scroll | Mode::Typing | Mode::Window | Mode::Film | Mode::Pan => {
                let damage = self.scene.next(self.step);
                self.show(&damage);
            }
            Mode::Moving => {
                let old = self.square;
                let x = self.step * 5 % self.size.0.saturating_sub(SQUARE).max(1);
                let y = self.step * 3 % self.size.1.saturating_sub(SQUARE).max(1);
                self.square = Rect::new(x, y, SQUARE, SQUARE).clipped(self.size.0, self.size.1);
                self.show(&[old, self.square]);
            }
        }
    }

    pub fn key(&mut self) {
        if self.mode == Mode::Key {
            self.pressed = !self.pressed;
            let (x, y) = (self.size.0 / 2, self.size.1 / 2);
            self.square = Rect::new(x, y, SQUARE, SQUARE).clipped(self.size.0, self.size.1);
            self.show(&[self.square]);
        }
    }

    /// Follows events until their sender is gone; `seen` is told every one.
    pub fn run(mut self, events: &Receiver<Event>, fps: u32, mut seen: impl FnMut(Event)) {
        self.display.set_cursor(cursor());
        let moves = !matches!(self.mode, Mode::Static | Mode::Key);
        let interval = Duration::from_secs(1) / fps.max(1);
        let mut viewers = false;
        let mut next = Instant::now();
        loop {
            let event = if moves && viewers {
                events.recv_timeout(next.saturating_duration_since(Instant::now()))
            } else {
                events.recv().map_err(|_| RecvTimeoutError::Disconnected)
            };
            match event {
                Ok(event) => {
                    seen(event);
                    match event {
                        Event::Viewers(any) => {
                            viewers = any;
                            next = Instant::now();
                        }
                        Event::Key(KeyEvent { down: true, .. }) => self.key(),
                        Event::Resize(_, monitor) => self.resize((monitor.width, monitor.height)),
                        _ => {}
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    self.tick();
                    next = (next + interval).max(Instant::now());
                }
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
    }
}
