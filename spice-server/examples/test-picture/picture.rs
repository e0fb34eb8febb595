//! The test picture: what is in it, and a thread that moves it.
#![allow(unreachable_pub, dead_code, reason = "shared by the example and the tests")]

use std::{
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, Sender},
    },
    time::{Duration, Instant},
};

use spice_server::{
    Button, CursorImage, DisplayEvents, DisplayHandle, Frame, InputSink, KeyEvent, MemoryFrame,
    MonitorConfig, PointerPosition, Rect,
};

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
            _ => return Err(format!("no mode {text}: moving, noise, texture, key or static")),
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

/// Paints frames and presents them.
pub struct Picture {
    display: DisplayHandle,
    mode: Mode,
    size: (u32, u32),
    background: Vec<u8>,
    /// Frames; those nobody else holds are free.
    pool: Vec<Arc<MemoryFrame>>,
    square: Rect,
    step: u32,
    pressed: bool,
}

impl Picture {
    pub fn new(display: DisplayHandle, mode: Mode, size: (u32, u32)) -> Self {
        let mut picture = Self {
            display,
            mode,
            size,
            background: background(size.0, size.1),
            pool: Vec::new(),
            square: Rect::default(),
            step: 0,
            pressed: false,
        };
        picture.resize(size);
        picture
    }

    pub fn resize(&mut self, size: (u32, u32)) {
        self.size = size;
        self.background = background(size.0, size.1);
        self.pool.clear();
        self.square = Rect::default();
        self.show(&[Rect::new(0, 0, size.0, size.1)]);
    }

    /// A free frame with the background in it.
    fn frame(&mut self) -> Arc<MemoryFrame> {
        if let Some(index) = self.pool.iter_mut().position(|f| Arc::get_mut(f).is_some()) {
            let mut frame = self.pool.swap_remove(index);
            if let Some(frame) = Arc::get_mut(&mut frame) {
                frame.pixels_mut().copy_from_slice(&self.background);
            }
            return frame;
        }
        let frame = MemoryFrame::new(self.size.0, self.size.1, self.background.clone());
        Arc::new(frame.expect("the background has this size"))
    }

    fn show(&mut self, damage: &[Rect]) {
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
                let mut state = u64::from(self.step).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
                for pixels in frame.pixels_mut().chunks_exact_mut(8) {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    pixels.copy_from_slice(&state.to_le_bytes());
                }
            }
            Mode::Texture => {
                let (width, step) = (self.size.0 as usize, self.step);
                for (y, row) in (0u32..).zip(frame.pixels_mut().chunks_exact_mut(width * 4)) {
                    for (x, pixel) in (0u32..).zip(row.chunks_exact_mut(4)) {
                        let value = (x + step) ^ y;
                        pixel.copy_from_slice(&(value & 0x00ff_f8f8).to_le_bytes());
                    }
                }
            }
        }
        self.display.present(shared.clone(), damage);
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
