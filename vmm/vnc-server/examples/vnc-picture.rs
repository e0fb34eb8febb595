//! Shows a test picture to VNC viewers and prints what they do.
//!
//! ```text
//! vnc-picture [--listen ADDRESS:PORT] [--password-file FILE] [--size WxH] [--moving]
//! ```
//!
//! Standard input takes commands, one a line: `size WxH`, `off`, `tick` (draws the next picture).

use std::{
    env, fs,
    io::{self, BufRead},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use vnc_server::{
    Button, Config, Cursor, Events, Frame, FrameGone, Rect, Scancode, Screen, VncServer,
};

struct Picture {
    width: u32,
    height: u32,
    tick: u32,
}

impl Picture {
    /// A photograph in the left half, lines as of text in the right one, and a box that wanders.
    fn pixel(&self, x: u32, y: u32) -> [u8; 4] {
        let side = x.wrapping_sub(self.tick * 8 % self.width) < 48 && y < 48;
        if side {
            return [0, (self.tick * 40) as u8, 255, 0];
        }
        if x < self.width / 2 {
            let noise = (x.wrapping_mul(2_654_435_761) ^ y.wrapping_mul(40_503)) >> 28;
            return [(x + noise) as u8, (y + noise) as u8, ((x + y) / 2) as u8, 0];
        }
        match (y % 16 < 10, (x * 7 + y / 16 * 13) % 11 < 4) {
            (true, true) => [32, 32, 32, 0],
            _ => [250, 250, 245, 0],
        }
    }
}

impl Frame for Picture {
    fn width(&self) -> u32 {
        self.width
    }

    fn height(&self) -> u32 {
        self.height
    }

    fn copy_rect(&self, rect: Rect, out: &mut [u8], stride: usize) -> Result<(), FrameGone> {
        for (row, y) in out.chunks_mut(stride).zip(rect.y..rect.y + rect.height) {
            let (pixels, _) = row.as_chunks_mut::<4>();
            for (pixel, x) in pixels.iter_mut().zip(rect.x..rect.x + rect.width) {
                *pixel = self.pixel(x, y);
            }
        }
        Ok(())
    }
}

#[derive(Debug)]
struct Printer(Mutex<Option<Screen>>);

impl Events for Printer {
    fn key(&self, key: Scancode, down: bool) {
        println!("key {}{:02x} {down}", if key.extended { "e0" } else { "" }, key.code);
    }

    fn pointer(&self, (x, y): (u32, u32), (width, height): (u32, u32)) {
        println!("pointer {x} {y} of {width}x{height}");
    }

    fn button(&self, button: Button, down: bool) {
        println!("button {button:?} {down}");
    }

    fn wheel(&self, steps: i32) {
        println!("wheel {steps}");
    }

    fn resize(&self, width: u32, height: u32) -> bool {
        println!("resize {width}x{height}");
        if let Ok(screen) = self.0.lock()
            && let Some(screen) = &*screen
        {
            show(screen, (width, height), 0);
        }
        true
    }

    fn copied(&self, text: &str) {
        println!("copied {text:?}");
    }

    fn watched(&self, any: bool) {
        println!("watched {any}");
    }
}

fn show(screen: &Screen, (width, height): (u32, u32), tick: u32) {
    let damage = [Rect::new(0, 0, width, height)];
    screen.present(Arc::new(Picture { width, height, tick }), &damage);
}

/// An arrow with a red left and a half transparent green right edge.
fn cursor() -> Cursor {
    let pixels = (0..16 * 24_u32).flat_map(|i| match (i % 16, i / 16) {
        (0, _) => [0, 0, 255, 255],
        (x, y) if x == y.min(15) => [0, 128, 0, 128],
        (x, y) if x < y => [255, 255, 255, 255],
        _ => [0; 4],
    });
    Cursor { width: 16, height: 24, hot: (0, 0), pixels: pixels.collect() }
}

fn size(text: &str) -> Option<(u32, u32)> {
    let (width, height) = text.split_once('x')?;
    Some((width.parse().ok()?, height.parse().ok()?))
}

fn main() -> io::Result<()> {
    tracing_subscriber::fmt().with_writer(io::stderr).with_ansi(false).init();
    let mut listen = "127.0.0.1:5901".to_owned();
    let (mut password, mut wanted, mut moving) = (None, (800, 600), false);
    let mut arguments = env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or(io::ErrorKind::InvalidInput);
        match argument.as_str() {
            "--listen" => listen = value()?,
            "--password-file" => password = Some(fs::read(value()?)?.trim_ascii().to_vec()),
            "--size" => wanted = size(&value()?).ok_or(io::ErrorKind::InvalidInput)?,
            "--moving" => moving = true,
            _ => return Err(io::Error::other(format!("{argument}: unknown"))),
        }
    }
    let config = Config { name: "test picture".to_owned(), password };
    let address = listen.parse().map_err(io::Error::other)?;
    let events = Arc::new(Printer(Mutex::new(None)));
    let server = VncServer::start(vnc_server::listen(address)?, config, events.clone())?;
    let screen = server.screen();
    if let Ok(mut target) = events.0.lock() {
        *target = Some(screen.clone());
    }
    show(&screen, wanted, 0);
    screen.set_cursor(Some(cursor()));
    println!("listening {}", server.local_addr()?);
    if moving {
        let screen = screen.clone();
        thread::spawn(move || {
            for tick in 1.. {
                show(&screen, wanted, tick);
                thread::sleep(Duration::from_millis(16));
            }
        });
    }
    let mut tick = 0;
    for line in io::stdin().lock().lines() {
        let line = line?;
        if line == "off" {
            screen.set_size(None);
            continue;
        }
        match line.split_once(' ') {
            Some(("size", text)) => {
                wanted = size(text).unwrap_or(wanted);
                show(&screen, wanted, tick);
            }
            Some(("copy", text)) => server.set_clipboard(text),
            Some(_) => {}
            None => {
                tick += 1;
                show(&screen, wanted, tick);
            }
        }
    }
    Ok(())
}
