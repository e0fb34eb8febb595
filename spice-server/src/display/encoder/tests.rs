//! The encoder against a model of a client that does what the protocol says, and shows garbage
//! wherever a coding is lossy.

use std::{collections::HashMap, time::Duration};

use super::*;
use crate::{
    MemoryFrame, VideoCodecs,
    proto::{display::StreamReport, framing::HeaderKind},
};

mod films;

// `SpiceVideoCodecType`.
const MJPEG: u8 = 1;
const VP8: u8 = 2;
const H264: u8 = 3;

/// A client's surfaces, cache and streams.
#[derive(Default)]
struct Model {
    surfaces: HashMap<u32, (u32, u32, Vec<u8>)>,
    cache: HashMap<u64, Vec<u8>>,
    streams: HashMap<u32, Rect>,
    /// Numbers of the streams' codecs, and frames with each of them.
    codecs: HashMap<u32, u8>,
    frames: HashMap<u8, usize>,
    kinds: HashMap<u16, usize>,
    images: HashMap<u8, usize>,
    /// `profile_idc` of the H.264 streams.
    profiles: HashMap<u32, u8>,
    marked: bool,
    noise: u32,
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn rect_at(bytes: &[u8], at: usize) -> Rect {
    let [top, left, bottom, right] = [0, 4, 8, 12].map(|field| u32_at(bytes, at + field));
    Rect::new(left, top, right - left, bottom - top)
}

impl Model {
    fn receive(&mut self, mut wire: &[u8]) {
        while !wire.is_empty() {
            let kind = u16::from_le_bytes([wire[0], wire[1]]);
            let end = 6 + u32_at(wire, 2) as usize;
            self.message(kind, &wire[6..end]);
            wire = &wire[end..];
        }
    }

    fn message(&mut self, kind: u16, body: &[u8]) {
        *self.kinds.entry(kind).or_default() += 1;
        // Stream frames are shown at any time, even after what was sent later.
        let streams: Vec<Rect> = self.streams.values().copied().collect();
        match kind {
            102 => self.marked = true,
            104 => {
                let (to, from) = (rect_at(body, 4), (u32_at(body, 21), u32_at(body, 25)));
                let source = Rect::new(from.0, from.1, to.width, to.height);
                let pixels = self.read(u32_at(body, 0), source);
                self.write(u32_at(body, 0), to, &pixels);
            }
            105 => {
                for item in body[2..].chunks(9) {
                    let id = u64::from_le_bytes(item[1..9].try_into().unwrap());
                    assert!(self.cache.remove(&id).is_some(), "forgets what it has");
                }
            }
            122 => {
                assert_eq!(u32_at(body, 0), 0);
                let rect = rect_at(body, 34);
                assert_eq!((u32_at(body, 18), u32_at(body, 22)), (rect.width, rect.height));
                assert!(self.streams.insert(u32_at(body, 4), rect).is_none());
                self.codecs.insert(u32_at(body, 4), body[9]);
            }
            123 => {
                assert!(self.streams.contains_key(&u32_at(body, 0)));
                assert_eq!(u32_at(body, 8) as usize, body.len() - 12);
                let codec = self.codecs[&u32_at(body, 0)];
                match codec {
                    MJPEG => assert_eq!(body[12..14], [0xff, 0xd8]),
                    H264 if body[12..17] == [0, 0, 0, 1, 0x67] => {
                        self.profiles.insert(u32_at(body, 0), body[17]);
                    }
                    _ => {}
                }
                *self.frames.entry(codec).or_default() += 1;
            }
            316 => {
                assert_eq!(rect_at(body, 16), self.streams[&u32_at(body, 0)]);
                assert_eq!(body[36..38], [0xff, 0xd8]);
                *self.frames.entry(self.codecs[&u32_at(body, 0)]).or_default() += 1;
            }
            125 => assert!(self.streams.remove(&u32_at(body, 0)).is_some()),
            302 => {
                let rect = rect_at(body, 4);
                let colour = body[22..26].repeat((rect.width * rect.height) as usize);
                self.write(u32_at(body, 0), rect, &colour);
            }
            304 => {
                let rect = rect_at(body, 4);
                let pixels = self.image(&body[u32_at(body, 21) as usize..], rect);
                self.write(u32_at(body, 0), rect, &pixels);
            }
            314 => {
                let (width, height) = (u32_at(body, 4), u32_at(body, 8));
                let pixels = vec![0xee; (width * height * 4) as usize];
                assert!(self.surfaces.insert(u32_at(body, 0), (width, height, pixels)).is_none());
            }
            315 => {
                assert!(self.surfaces.remove(&u32_at(body, 0)).is_some());
                assert!(u32_at(body, 0) != 0 || self.streams.is_empty(), "streams end first");
            }
            317 | 319 => {}
            _ => panic!("message {kind}"),
        }
        for rect in streams {
            if self.streams.values().any(|running| *running == rect) {
                let garbage = self.garbage(rect);
                self.write(0, rect, &garbage);
            }
        }
    }

    fn garbage(&mut self, rect: Rect) -> Vec<u8> {
        self.noise = self.noise.wrapping_mul(1_664_525).wrapping_add(12345);
        self.noise.to_le_bytes().repeat((rect.width * rect.height) as usize)
    }

    fn image(&mut self, image: &[u8], rect: Rect) -> Vec<u8> {
        let id = u64::from_le_bytes(image[..8].try_into().unwrap());
        assert_eq!((u32_at(image, 10), u32_at(image, 14)), (rect.width, rect.height));
        *self.images.entry(image[8]).or_default() += 1;
        let size = (rect.width * rect.height * 4) as usize;
        let pixels = match image[8] {
            0 => image[36..36 + size].to_vec(),
            103 => return self.cache[&id].clone(),
            104 => return self.read(u32_at(image, 18), rect),
            105 => return self.garbage(rect),
            109 => lz4_flex::block::decompress(&image[28..], size).unwrap(),
            kind => panic!("image {kind}"),
        };
        if image[9] & 1 == 1 {
            assert!(self.cache.insert(id, pixels.clone()).is_none(), "kept once");
        }
        pixels
    }

    fn read(&self, surface: u32, rect: Rect) -> Vec<u8> {
        let (width, height, pixels) = &self.surfaces[&surface];
        assert!(rect.right() <= *width && rect.bottom() <= *height);
        let row = |y: u32| {
            let start = ((y * width + rect.x) * 4) as usize;
            pixels[start..start + rect.width as usize * 4].iter().copied()
        };
        (rect.y..rect.bottom()).flat_map(row).collect()
    }

    fn write(&mut self, surface: u32, rect: Rect, bytes: &[u8]) {
        let (width, height, pixels) = self.surfaces.get_mut(&surface).unwrap();
        assert!(rect.right() <= *width && rect.bottom() <= *height);
        for (y, row) in (rect.y..rect.bottom()).zip(bytes.chunks(rect.width as usize * 4)) {
            let start = ((y * *width + rect.x) * 4) as usize;
            pixels[start..start + row.len()].copy_from_slice(row);
        }
    }
}

/// Those of spice-gtk.
const ABILITIES: Abilities = Abilities {
    modern: true,
    surfaces: true,
    streams: true,
    reports: true,
    sized: true,
    local: false,
};

/// A source of frames, an encoder, and the model that follows.
struct Bench {
    size: (u32, u32),
    pixels: Vec<u8>,
    encoder: Encoder,
    model: Model,
    stats: Arc<Counters>,
    line: Line,
    now: Instant,
    state: u32,
}

impl Bench {
    fn new(size: (u32, u32), seed: u32) -> Self {
        Self::with(ABILITIES, size, seed)
    }

    fn with(abilities: Abilities, size: (u32, u32), seed: u32) -> Self {
        let stats = Arc::<Counters>::default();
        let framer = Framer::new(HeaderKind::Mini);
        let mut bench = Self {
            size,
            pixels: vec![0; (size.0 * size.1 * 4) as usize],
            encoder: Encoder::new(framer, abilities, stats.clone()),
            model: Model::default(),
            stats,
            line: Line { slow: false, rate: None, waiting: 0.0, clock: 0 },
            now: Instant::now(),
            state: seed,
        };
        bench.encoder.set_cache(1 << 20);
        // The clock is the test's.
        bench.encoder.frame_cost = Some(Duration::ZERO);
        bench.encoder.begin_picture(size, bench.now);
        bench.show(&[Rect::new(0, 0, size.0, size.1)]);
        bench
    }

    fn random(&mut self, below: u32) -> u32 {
        self.state = self.state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (self.state >> 8) % below
    }

    fn rect(&mut self, most: u32) -> Rect {
        let (x, y) = (self.random(self.size.0), self.random(self.size.1));
        let (width, height) = (1 + self.random(most), 1 + self.random(most));
        Rect::new(x, y, width, height).clipped(self.size.0, self.size.1)
    }

    /// Shows the picture with this damage, and lets the encoder do so many steps.
    fn show(&mut self, damage: &[Rect]) {
        let frame = MemoryFrame::new(self.size.0, self.size.1, self.pixels.clone()).unwrap();
        self.encoder.take_in(&frame, damage, 1, &self.line, self.now);
        self.deliver();
    }

    fn steps(&mut self, most: u32) {
        for _ in 0..most {
            if !self.encoder.step(&self.line, |_| 0.0, self.now) {
                break;
            }
        }
        self.deliver();
    }

    fn deliver(&mut self) {
        self.model.receive(&self.encoder.out);
        self.encoder.out.clear();
    }

    fn pass(&mut self, milliseconds: u64) {
        self.now += Duration::from_millis(milliseconds);
        self.line.clock += milliseconds as u32;
    }

    /// Lets everything come to rest, and compares.
    fn settle(&mut self, what: &str) {
        for _ in 0..10_000 {
            self.steps(u32::MAX);
            let Some(at) = self.encoder.next_timer() else { break };
            self.now = self.now.max(at);
            self.encoder.timer(&self.line, self.now);
            self.deliver();
        }
        assert!(!self.encoder.has_work() && self.encoder.next_timer().is_none(), "{what}: rests");
        assert!(self.model.marked);
        assert_eq!(self.model.surfaces.len(), 1);
        let shown = &self.model.surfaces[&0];
        assert_eq!((shown.0, shown.1), self.size, "{what}");
        if let Some(at) = shown.2.chunks(4).zip(self.pixels.chunks(4)).position(|(a, b)| a != b) {
            let (x, y) = (at as u32 % self.size.0, at as u32 / self.size.0);
            panic!("{what}: wrong pixel at {x},{y}");
        }
    }

    fn paint(&mut self, rect: Rect, mut colour: impl FnMut(u32, u32) -> u32) {
        for y in rect.y..rect.bottom() {
            for x in rect.x..rect.right() {
                let at = ((y * self.size.0 + x) * 4) as usize;
                let pixel = (colour(x, y) & 0xff_ffff).to_le_bytes();
                self.pixels[at..at + 4].copy_from_slice(&pixel);
            }
        }
    }

    /// Something like text: strokes on white.
    fn text(&mut self, rect: Rect) {
        let seed = self.random(u32::MAX >> 8);
        self.paint(rect, |x, y| {
            let letter = (x / 7).wrapping_mul(31) ^ (y / 12).wrapping_mul(977) ^ seed;
            let bit = letter.wrapping_mul(0x9e37_79b1) >> ((x % 7 + y % 12 * 2) % 29) & 1;
            if bit == 1 && y % 12 < 9 { 0x20_2020 } else { 0xff_ffff }
        });
    }

    fn noise(&mut self, rect: Rect) {
        let mut state = self.random(u32::MAX >> 8) | 1;
        self.paint(rect, |_, _| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state
        });
    }

    /// Moves a part of the picture.
    fn shift(&mut self, from: Rect, to: (u32, u32)) {
        let old = self.pixels.clone();
        let width = self.size.0;
        let to = Rect::new(to.0, to.1, from.width, from.height).clipped(width, self.size.1);
        self.paint(to, |x, y| {
            let at = (((y - to.y + from.y) * width + x - to.x + from.x) * 4) as usize;
            u32_at(&old, at)
        });
    }

    fn sent(&self, codec: Codec) -> u64 {
        self.stats.stats(0).codecs[codec as usize].messages
    }

    fn bytes(&self) -> u64 {
        self.stats.stats(0).codecs.iter().map(|codec| codec.bytes).sum()
    }
}

#[test]
fn whatever_is_drawn_ends_exactly() {
    for seed in 0..40 {
        let size = [(700, 500), (333, 201), (64, 64), (1, 1), (1030, 130)][seed as usize % 5];
        let mut bench = Bench::new(size, seed * 7919 + 1);
        for round in 0..60 {
            bench.line.slow = bench.random(3) == 0;
            bench.line.rate = (bench.random(2) == 0).then_some(1e6);
            let mut damage = Vec::new();
            for _ in 0..=bench.random(3) {
                let rect = bench.rect(400);
                match bench.random(6) {
                    0 => {
                        let colour = bench.random(1 << 24);
                        bench.paint(rect, |_, _| colour);
                    }
                    1 | 2 => bench.text(rect),
                    3 => bench.noise(rect),
                    _ => {
                        let to = bench.rect(400);
                        bench.shift(rect, (to.x, to.y));
                        damage.push(Rect::new(to.x, to.y, rect.width, rect.height));
                    }
                }
                damage.push(rect);
            }
            if bench.random(3) == 0 {
                damage = vec![Rect::new(0, 0, size.0, size.1)];
            }
            bench.show(&damage);
            let most = [0, 1, 3, u32::MAX][bench.random(4) as usize];
            bench.steps(most);
            let pause = [0, 16, 16, 33, 400][bench.random(5) as usize];
            bench.pass(pause);
            if bench.random(4) == 0 && bench.encoder.next_timer().is_some_and(|at| at <= bench.now)
            {
                bench.encoder.timer(&bench.line, bench.now);
                bench.deliver();
            }
            if bench.random(20) == 0 {
                bench.encoder.rest();
            }
            if bench.random(10) == 0 {
                bench.settle(&format!("seed {seed} round {round}"));
            }
        }
        bench.settle(&format!("seed {seed}"));
    }
}

#[test]
fn clients_that_copy_no_surfaces_are_sent_none() {
    const SURFACE: u8 = 104;
    for surfaces in [true, false] {
        let abilities = Abilities { surfaces, ..ABILITIES };
        let mut bench = Bench::with(abilities, (640, 480), 23);
        bench.text(Rect::new(0, 0, 640, 480));
        bench.show(&[Rect::new(0, 0, 640, 480)]);
        bench.steps(1);
        assert_eq!(bench.model.surfaces.contains_key(&0), !surfaces, "drawn in view");
        bench.settle("the picture");
        assert_eq!(bench.model.images.contains_key(&SURFACE), surfaces);
        assert!(bench.model.images.contains_key(&109), "LZ4 all the same");
    }
}

/// What TCP sends before the first acknowledgement (RFC 6928, in segments of Ethernet's size): a picture
/// that is longer takes one more round trip to come up.
const FIRST_FLIGHT: u64 = 10 * 1448;

#[test]
fn an_ordinary_picture_fits_into_the_first_flight() {
    let mut bench = Bench::new((1280, 720), 29);
    // A window with two lines on a page, a panel, a background.
    bench.paint(Rect::new(0, 0, 1280, 720), |_, _| 0x30_5070);
    bench.paint(Rect::new(0, 0, 1280, 28), |_, _| 0x20_2020);
    bench.paint(Rect::new(128, 60, 1024, 600), |_, _| 0xff_ffff);
    bench.text(Rect::new(150, 80, 300, 24));
    bench.show(&[Rect::new(0, 0, 1280, 720)]);
    bench.settle("the picture");
    assert!(bench.bytes() < FIRST_FLIGHT, "{} bytes", bench.bytes());
    assert!(bench.sent(Codec::Fill) > 5);
}

#[test]
fn unchanged_pictures_cost_nothing() {
    let mut bench = Bench::new((1920, 1080), 1);
    bench.text(Rect::new(0, 0, 1920, 1080));
    let all = [Rect::new(0, 0, 1920, 1080)];
    bench.show(&all);
    bench.settle("the picture");
    let before = bench.bytes();
    for _ in 0..5 {
        bench.pass(16);
        bench.show(&all);
        bench.steps(u32::MAX);
    }
    assert_eq!(bench.bytes(), before);
    bench.paint(Rect::new(500, 500, 2, 16), |_, _| 0);
    bench.show(&all);
    bench.steps(u32::MAX);
    assert!((1..200).contains(&(bench.bytes() - before)), "{} bytes", bench.bytes() - before);
    assert_eq!(bench.stats.stats(0).unchanged_frames, 5);
    bench.settle("the caret");
}

#[test]
fn scrolling_and_dragging_are_moves() {
    let size = (1024, 768);
    // Up, down, left, right, askew.
    for (dx, dy) in [(0, -17), (0, 40), (-8, 0), (33, 0), (5, -3)] {
        let mut bench = Bench::new(size, 3);
        bench.paint(Rect::new(0, 0, size.0, size.1), |x, y| x / 64 + y / 64 * 256);
        bench.text(Rect::new(100, 100, 700, 500));
        bench.show(&[Rect::new(0, 0, size.0, size.1)]);
        let before = bench.bytes();
        bench.settle("the page");
        let whole = bench.bytes() - before;
        let (mut x, mut y, mut moved) = (100i32, 100i32, 0);
        for _ in 0..5 {
            let from = Rect::new(x as u32, y as u32, 700, 500);
            (x, y) = (x + dx, y + dy);
            bench.shift(from, (x as u32, y as u32));
            let before = (bench.bytes(), bench.sent(Codec::Move));
            bench.show(&[Rect::new(0, 0, size.0, size.1)]);
            bench.steps(u32::MAX);
            moved += bench.sent(Codec::Move) - before.1;
            let bytes = bench.bytes() - before.0;
            assert!(bytes * 6 < whole, "{dx},{dy}: {bytes} of {whole} bytes");
            bench.pass(16);
        }
        assert!(moved >= 5, "{dx},{dy}: {moved} moves");
        bench.settle("the window");
    }
}

#[test]
fn pictures_that_never_rest_are_shown() {
    let mut bench = Bench::new((640, 480), 11);
    let all = Rect::new(0, 0, 640, 480);
    for _ in 0..40 {
        bench.noise(all);
        bench.show(&[all]);
        bench.steps(1);
    }
    assert!(bench.model.marked && bench.model.surfaces.contains_key(&0));
}

#[test]
fn what_waits_to_be_sent_is_no_film() {
    let mut bench = Bench::new((640, 480), 13);
    bench.settle("black");
    bench.line = Line { slow: false, rate: Some(1e6), ..bench.line };
    let all = Rect::new(0, 0, 640, 480);
    bench.noise(all);
    for _ in 0..40 {
        bench.show(&[all]);
        bench.steps(1);
        bench.pass(16);
    }
    assert_eq!(bench.stats.stats(0).streams, 0);
    bench.settle("the picture");
}

#[test]
fn what_comes_in_at_the_edge_of_a_pan_is_no_film() {
    let size = (640, 480);
    let mut bench = Bench::new(size, 17);
    let all = Rect::new(0, 0, size.0, size.1);
    bench.noise(all);
    bench.show(&[all]);
    bench.settle("the photograph");
    bench.line = Line { slow: true, rate: Some(1e6), ..bench.line };
    for _ in 0..40 {
        bench.shift(Rect::new(12, 0, size.0 - 12, size.1), (0, 0));
        bench.noise(Rect::new(size.0 - 12, 0, 12, size.1));
        bench.show(&[all]);
        bench.steps(u32::MAX);
        bench.pass(33);
    }
    assert_eq!(bench.stats.stats(0).streams, 0);
    assert!(bench.sent(Codec::Move) >= 40, "{}", bench.sent(Codec::Move));
    bench.settle("its end");
}

#[test]
fn a_pan_under_something_that_stays_is_two_moves() {
    let size = (1280, 720);
    let mut bench = Bench::new(size, 19);
    let all = Rect::new(0, 0, size.0, size.1);
    bench.noise(all);
    bench.show(&[all]);
    bench.settle("the photograph");
    for _ in 0..4 {
        bench.shift(Rect::new(4, 1, size.0 - 4, size.1 - 1), (0, 0));
        bench.noise(Rect::new(size.0 - 4, 0, 4, size.1));
        bench.noise(Rect::new(0, size.1 - 1, size.0, 1));
        // A clock in the corner.
        bench.noise(Rect::new(0, 0, 128, 8));
        let before = (bench.bytes(), bench.sent(Codec::Move));
        bench.show(&[all]);
        bench.steps(u32::MAX);
        assert!(bench.sent(Codec::Move) - before.1 >= 2);
        let bytes = bench.bytes() - before.0;
        assert!(bytes < 60_000, "{bytes} bytes");
        bench.pass(33);
    }
    bench.settle("its end");
}

#[test]
fn what_comes_back_is_in_the_cache() {
    let mut bench = Bench::new((640, 480), 5);
    let rect = Rect::new(128, 128, 256, 192);
    bench.text(rect);
    bench.show(&[rect]);
    bench.settle("one");
    let one = bench.pixels.clone();
    bench.text(rect);
    let two = bench.pixels.clone();
    bench.show(&[rect]);
    bench.settle("two");
    let mut last = 0;
    for round in 0..6 {
        bench.pixels = if round % 2 == 0 { one.clone() } else { two.clone() };
        bench.pass(1000);
        let before = bench.bytes();
        bench.show(&[rect]);
        bench.settle("back");
        last = bench.bytes() - before;
    }
    assert!(last < 1000, "{last} bytes");
    assert!(bench.sent(Codec::Cached) > 0);
}
