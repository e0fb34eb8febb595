//! From frames to messages for one viewer: what changed, and the cheapest way to say it.
//!
//! Knows no sockets: whoever owns it asks for a [`step`](Encoder::step) whenever the connection can
//! take more, and every step encodes one part from the newest pixels. [`streams`] has the films.

mod cut;
mod streams;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    Frame, Rect,
    cache::ImageCache,
    heat::HeatMap,
    stats::{Codec, Counters, count, set},
    stream::{SourceRate, Stream},
    tiles::{REFINE_AFTER, Tiles, bounds},
};
use crate::{
    VideoChange, VideoCodec,
    proto::{
        display::{
            Surface, put_copy, put_copy_bits, put_fill, put_forget_images, put_mark,
            put_monitors_config, put_surface_create, put_surface_destroy,
        },
        framing::Framer,
        image::{Coding, Keep, put_image, put_kept_image, put_surface_image},
    },
    video::Video,
};

/// Quality of lossy parts, 1 to 100, and of those that change all the time.
const JPEG_QUALITY: u8 = 80;
const WARM_QUALITY: u8 = 50;
/// Smallest part, in bytes of pixels, that may be lossy.
const MIN_LOSSY: usize = 1024 * 4;
/// Seconds the line may be busy with exact pixels before lossy ones are considered.
const LOSSY_AFTER: f64 = 0.05;
/// Bytes per second of a slow line whose rate is not known yet.
const SLOW_RATE: f64 = 1_250_000.0;
/// Smallest image, in encoded bytes, that clients are asked to keep.
const MIN_KEPT: usize = 600;

/// What the client can do.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Abilities {
    /// It knows LZ4: no browser.
    pub(crate) modern: bool,
    /// It copies from a second surface.
    pub(crate) surfaces: bool,
    /// It tells which codecs it shows.
    pub(crate) streams: bool,
    pub(crate) reports: bool,
    /// It scales stream frames.
    pub(crate) sized: bool,
    /// It runs on this machine: bytes cost next to nothing.
    pub(crate) local: bool,
}

/// What is known about the connection.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Line {
    /// Lossy pictures are worth their artefacts.
    pub(crate) slow: bool,
    /// Bytes per second, if known.
    pub(crate) rate: Option<f64>,
    /// Seconds until it has taken what was sent, if its rate is right.
    pub(crate) waiting: f64,
    /// The multimedia clock, in milliseconds.
    pub(crate) clock: u32,
}

/// One viewer's encoder.
pub(crate) struct Encoder {
    framer: Framer,
    /// Encoded messages.
    pub(crate) out: Vec<u8>,
    /// Some of them hold lossy pictures.
    pub(crate) lossy: bool,
    /// They are to be sent before anything else is encoded.
    pub(crate) urgent: bool,
    abilities: Abilities,
    /// LZ4 is allowed.
    lz4: bool,
    /// Size of the client's surface.
    shown: Option<(u32, u32)>,
    /// Size of the surface that collects a new picture, while there is one.
    staging: Option<(u32, u32)>,
    /// The client waits for `MARK` to show its surface.
    mark_due: bool,
    tiles: Tiles,
    heat: HeatMap,
    cache: ImageCache,
    /// How films can be encoded, and the codecs the client shows, the best one first.
    video: Arc<Video>,
    video_codecs: Vec<VideoCodec>,
    streams: Vec<Stream>,
    resting: Option<streams::Resting>,
    /// The codec films were sent with last, and what the program has not been told about that.
    noted_codec: Option<VideoCodec>,
    news: Option<(Option<VideoCodec>, VideoChange)>,
    next_stream: u32,
    look_at: Option<Instant>,
    source: SourceRate,
    pixels: Vec<u8>,
    /// What a run is cut into.
    parts: Vec<Rect>,
    stats: Arc<Counters>,
    /// What encoding a frame of a film counts for, in place of the time that it takes.
    pub(crate) frame_cost: Option<Duration>,
}

impl Encoder {
    pub(crate) fn new(framer: Framer, abilities: Abilities, stats: Arc<Counters>) -> Self {
        Self {
            framer,
            out: Vec::new(),
            lossy: false,
            urgent: false,
            abilities,
            lz4: abilities.modern,
            shown: None,
            staging: None,
            mark_due: false,
            tiles: Tiles::new((0, 0)),
            heat: HeatMap::new((0, 0)),
            cache: ImageCache::new(),
            video: Arc::default(),
            video_codecs: if abilities.streams { vec![VideoCodec::Mjpeg] } else { Vec::new() },
            streams: Vec::new(),
            resting: None,
            noted_codec: None,
            news: None,
            next_stream: 0,
            look_at: None,
            source: SourceRate::new(),
            pixels: Vec::new(),
            parts: Vec::new(),
            stats,
            frame_cost: None,
        }
    }

    pub(crate) fn framer(&mut self) -> (&mut Framer, &mut Vec<u8>) {
        (&mut self.framer, &mut self.out)
    }

    // ---- what the client says ----

    /// The client's image cache holds so many pixels.
    pub(crate) fn set_cache(&mut self, pixels: u64) {
        self.cache.set_limit(pixels);
    }

    /// The client wants LZ4 (`true`), none (`false`), or leaves it to the server.
    pub(crate) fn prefer_lz4(&mut self, lz4: Option<bool>) {
        self.lz4 = lz4.unwrap_or(self.abilities.modern);
    }

    // ---- surfaces ----

    /// Size of the picture that is drawn.
    pub(crate) fn size(&self) -> Option<(u32, u32)> {
        self.staging.or(self.shown)
    }

    fn target(&self) -> Surface {
        if self.staging.is_some() { Surface::Staging } else { Surface::Primary }
    }

    /// Shows a black surface of this size.
    pub(crate) fn show_black(&mut self, size: (u32, u32), now: Instant) {
        self.show_surface(size, now);
        self.blacken(now);
        put_mark(&mut self.framer, &mut self.out);
    }

    /// Paints everything black.
    pub(crate) fn blacken(&mut self, now: Instant) {
        let Some(size) = self.size() else { return };
        self.end_streams(|_| true, now);
        self.restart(size);
        self.tiles.blackened();
        let (surface, rect) = (self.target(), Rect::new(0, 0, size.0, size.1));
        put_fill(&mut self.framer, &mut self.out, surface, rect, 0);
    }

    /// Begins a picture of this size. Its parts meet on a surface the client does not show, if it
    /// knows such, and appear together: no half-painted first frame, no flicker when the size
    /// changes.
    pub(crate) fn begin_picture(&mut self, size: (u32, u32), now: Instant) {
        if self.abilities.surfaces {
            self.drop_staging();
            let (framer, out) = (&mut self.framer, &mut self.out);
            put_surface_create(framer, out, Surface::Staging, size);
            self.end_streams(|_| true, now);
            self.staging = Some(size);
        } else {
            self.show_surface(size, now);
            self.mark_due = true;
        }
        self.restart(size);
    }

    fn restart(&mut self, size: (u32, u32)) {
        self.tiles = Tiles::new(size);
        self.heat = HeatMap::new(self.tiles.grid());
    }

    fn show_surface(&mut self, size: (u32, u32), now: Instant) {
        self.end_streams(|_| true, now);
        if self.shown.is_some() {
            put_surface_destroy(&mut self.framer, &mut self.out, Surface::Primary);
        }
        put_surface_create(&mut self.framer, &mut self.out, Surface::Primary, size);
        put_monitors_config(&mut self.framer, &mut self.out, size);
        self.shown = Some(size);
    }

    fn drop_staging(&mut self) {
        if self.staging.take().is_some() {
            put_surface_destroy(&mut self.framer, &mut self.out, Surface::Staging);
        }
    }

    /// Everything there was to draw has been drawn: a collected picture appears.
    fn finish(&mut self, now: Instant) {
        if let Some(size) = self.staging {
            if self.shown != Some(size) {
                self.show_surface(size, now);
            }
            let rect = Rect::new(0, 0, size.0, size.1);
            put_copy(&mut self.framer, &mut self.out, Surface::Primary, rect, |out| {
                put_surface_image(out, size, Surface::Staging);
            });
            self.drop_staging();
            self.mark_due = true;
        }
        if std::mem::take(&mut self.mark_due) {
            put_mark(&mut self.framer, &mut self.out);
        }
    }

    // ---- pictures ----

    /// Looks at parts of the newest frame, which may have changed; it is so many frames newer than the
    /// one before.
    pub(crate) fn take_in(
        &mut self,
        frame: &dyn Frame,
        rects: &[Rect],
        frames: u64,
        line: &Line,
        now: Instant,
    ) {
        let dirty = self.tiles.take_in(frame, rects);
        self.source.frames(frames, now);
        self.heat.look(frames, now);
        count(&self.stats.frames, 1);
        if dirty.is_empty() {
            count(&self.stats.unchanged, 1);
        }
        // Before anything else is sent: a move reads what the client shows now.
        let mut moved: Option<Rect> = None;
        if !dirty.is_empty() && self.staging.is_none() {
            for step in self.tiles.find_moves(now) {
                let from = Rect::new(step.from.0, step.from.1, step.to.width, step.to.height);
                let all = bounds(from, step.to);
                moved = Some(moved.map_or(all, |before| bounds(before, all)));
                let (start, before) = (Instant::now(), self.out.len());
                let (framer, out) = (&mut self.framer, &mut self.out);
                put_copy_bits(framer, out, Surface::Primary, step.to, step.from);
                self.stats.encoded(Codec::Move, self.out.len() - before, start);
            }
        }
        for index in dirty {
            let part = self.tiles.todo_of(index);
            if part.is_empty() {
                continue;
            }
            // What comes in at the edge of something that moves is no film, and neither is a picture
            // that is not there yet.
            let revealed = moved.is_some_and(|moved| touch(moved, part));
            if !revealed && self.staging.is_none() {
                self.heat.changed(index, part, now);
            }
            let touched = |stream: &&mut Stream| touch(stream.rect, part);
            self.streams.iter_mut().filter(touched).for_each(|stream| stream.changed(now));
        }
        self.look_for_films(line, now);
        count(&self.stats.compare_nanoseconds, now.elapsed().as_nanos() as u64);
        set(&self.stats.memory, (self.tiles.memory() + self.pixels.capacity()) as u64);
    }

    /// Encodes one part, or a run of parts beside one another; `false` if there is nothing to draw.
    pub(crate) fn step(
        &mut self,
        line: &Line,
        transfer: impl Fn(usize) -> f64,
        now: Instant,
    ) -> bool {
        if let Some(at) = self.streams.iter().position(Stream::is_dirty) {
            self.send_frame(at, line, transfer, now);
            return true;
        }
        let Some(rect) = self.tiles.next_run() else {
            let before = self.out.len();
            self.finish(now);
            return self.out.len() != before;
        };
        self.draw_run(rect, line, now);
        // A picture that never rests is whole once every part has been drawn.
        if self.tiles.is_known() {
            self.finish(now);
        }
        true
    }

    /// Whether a video stream runs.
    pub(crate) fn is_streaming(&self) -> bool {
        !self.streams.is_empty()
    }

    /// Whether [`step`](Self::step) has something to do.
    pub(crate) fn has_work(&self) -> bool {
        self.tiles.has_todo()
            || self.staging.is_some()
            || self.mark_due
            || self.streams.iter().any(Stream::is_dirty)
    }

    /// When [`timer`](Self::timer) has something to do.
    pub(crate) fn next_timer(&self) -> Option<Instant> {
        let refine = self.tiles.oldest_lossy().map(|since| since + REFINE_AFTER);
        self.streams.iter().map(Stream::ends_at).chain(refine).min()
    }

    /// Ends films that stand still, and draws one part exactly that was lossy for long enough.
    pub(crate) fn timer(&mut self, line: &Line, now: Instant) {
        self.end_streams(|stream| stream.ends_at() <= now, now);
        let Some(before) = now.checked_sub(REFINE_AFTER) else { return };
        if let Some(rect) = self.tiles.next_lossy(before) {
            count(&self.stats.refined, 1);
            self.draw(rect, line, now, true);
        }
    }

    /// Gives memory back that is needed only while something changes.
    pub(crate) fn rest(&mut self) {
        self.tiles.rest();
        self.pixels = Vec::new();
        set(&self.stats.memory, self.tiles.memory() as u64);
    }

    /// Encodes a run of tiles, cut where that is worth it.
    fn draw_run(&mut self, run: Rect, line: &Line, now: Instant) {
        let mut start = Instant::now();
        let (mut pixels, mut parts) =
            (std::mem::take(&mut self.pixels), std::mem::take(&mut self.parts));
        self.tiles.pixels(run, &mut pixels);
        cut::cut(run, &pixels, &mut parts);
        for part in &parts {
            if parts.len() > 1 {
                self.tiles.pixels(*part, &mut pixels);
            }
            self.draw_pixels(*part, &pixels, line, (start, now), false);
            start = Instant::now();
        }
        (self.pixels, self.parts) = (pixels, parts);
    }

    /// Encodes a part; `exact` forbids lossy codings.
    fn draw(&mut self, rect: Rect, line: &Line, now: Instant, exact: bool) {
        let start = Instant::now();
        let mut pixels = std::mem::take(&mut self.pixels);
        self.tiles.pixels(rect, &mut pixels);
        self.draw_pixels(rect, &pixels, line, (start, now), exact);
        self.pixels = pixels;
    }

    /// `start` is when work on this part began.
    fn draw_pixels(
        &mut self,
        rect: Rect,
        pixels: &[u8],
        line: &Line,
        (start, now): (Instant, Instant),
        exact: bool,
    ) {
        let before = self.out.len();
        let (surface, size) = (self.target(), (rect.width, rect.height));
        let codec = if let Some(colour) = single_colour(pixels) {
            put_fill(&mut self.framer, &mut self.out, surface, rect, colour);
            Codec::Fill
        } else {
            let may_lose = !exact && pixels.len() >= MIN_LOSSY && line.slow && self.is_behind(line);
            let warm = self.tiles.indices(rect).any(|index| self.heat.is_warm(index, now));
            let keep = if !warm && !exact && self.cache.takes(rect.width * rect.height) {
                Keep::As(self.cache.id(size, pixels))
            } else {
                Keep::No
            };
            match keep {
                Keep::As(id) if self.cache.has(id) => {
                    put_copy(&mut self.framer, &mut self.out, surface, rect, |out| {
                        put_kept_image(out, size, id);
                    });
                    Codec::Cached
                }
                _ => {
                    let quality = if warm { WARM_QUALITY } else { JPEG_QUALITY };
                    self.put_pixels(rect, pixels, keep, may_lose.then_some(quality))
                }
            }
        };
        let lossy = (codec == Codec::Jpeg).then_some(now);
        self.lossy |= lossy.is_some();
        self.tiles.sent(rect, pixels, lossy);
        let photo = match codec {
            Codec::Raw | Codec::Jpeg => true,
            _ => (self.out.len() - before) * 10 > pixels.len() * 4,
        };
        for index in self.tiles.indices(rect) {
            self.heat.coded(index, photo);
        }
        self.stats.encoded(codec, self.out.len() - before, start);
    }

    /// Whether exact pixels of what has to be drawn would keep the line busy for long, after what it
    /// has not taken yet. Sending a little exactly is cheaper than sending it twice.
    fn is_behind(&self, line: &Line) -> bool {
        let bytes = self.tiles.todo_pixels() as f64 * 4.0;
        bytes / line.rate.unwrap_or(SLOW_RATE).max(1.0) + line.waiting > LOSSY_AFTER
    }

    /// `lossy`: it may be a JPEG of this quality.
    fn put_pixels(&mut self, rect: Rect, pixels: &[u8], keep: Keep, lossy: Option<u8>) -> Codec {
        let (surface, size) = (self.target(), (rect.width, rect.height));
        let wanted = if self.lz4 { Coding::Lz4 } else { Coding::Raw };
        let message_at = self.out.len();
        let mut coding = wanted;
        let mut encoded = 0;
        put_copy(&mut self.framer, &mut self.out, surface, rect, |out| {
            let start = out.len();
            coding = put_image(out, size, pixels, wanted, keep);
            // What LZ4 cannot shrink is a photograph or a film, where JPEG is at its best; text and
            // other flat pictures never come here.
            if let Some(quality) = lossy
                && out.len() - start > pixels.len() / 10 * 6
                && !is_flat(pixels)
            {
                out.truncate(start);
                coding = put_image(out, size, pixels, Coding::Jpeg(quality), Keep::No);
            }
            encoded = out.len() - start;
        });
        if let Keep::As(id) = keep
            && !matches!(coding, Coding::Jpeg(_))
        {
            self.keep(id, rect, pixels, message_at, encoded, coding);
        }
        match coding {
            Coding::Raw => Codec::Raw,
            Coding::Lz4 => Codec::Lz4,
            Coding::Jpeg(_) => Codec::Jpeg,
        }
    }

    /// Lets the client keep the image of the message that begins at `at`, if it is worth it; says
    /// what it must forget for that first.
    fn keep(
        &mut self,
        id: u64,
        rect: Rect,
        pixels: &[u8],
        at: usize,
        encoded: usize,
        coding: Coding,
    ) {
        let surface = self.target();
        let size = (rect.width, rect.height);
        let mut forget = Vec::new();
        let worth = encoded >= MIN_KEPT;
        if worth {
            self.cache.insert(id, rect.width * rect.height, &mut forget);
            if forget.is_empty() {
                return;
            }
        }
        self.out.truncate(at);
        if !forget.is_empty() {
            put_forget_images(&mut self.framer, &mut self.out, &forget);
        }
        let keep = if worth { Keep::As(id) } else { Keep::No };
        put_copy(&mut self.framer, &mut self.out, surface, rect, |out| {
            put_image(out, size, pixels, coding, keep);
        });
    }
}

fn touch(a: Rect, b: Rect) -> bool {
    a.x < b.right() && b.x < a.right() && a.y < b.bottom() && b.y < a.bottom()
}

/// The colour all pixels have.
fn single_colour(pixels: &[u8]) -> Option<u32> {
    let (pixels, _) = pixels.as_chunks::<4>();
    let first = pixels.first()?;
    pixels.iter().all(|pixel| pixel == first).then(|| u32::from_le_bytes(*first) & 0x00ff_ffff)
}

/// Whether many neighbouring pixels are equal, as in text and drawings.
fn is_flat(pixels: &[u8]) -> bool {
    let (mut equal, mut all) = (0usize, 0usize);
    for pair in pixels.chunks_exact(8) {
        equal += usize::from(pair.get(..3) == pair.get(4..7));
        all += 1;
    }
    equal * 4 > all
}

#[cfg(test)]
mod tests;
