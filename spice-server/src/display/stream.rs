//! One region video stream: its quality, its clock, and when it ends.
//!
//! Every frame carries the time at which the client shows it, and a client drops frames that come
//! later. The time is what the line is believed to need plus a margin, which grows when the client
//! reports late frames and shrinks again when it reports none: as little delay as the line allows.
//!
//! A client needs some time until it shows a codec for which it builds a decoder. Meanwhile an MJPEG
//! stream of the same part, the [`opener`](Stream::opener), shows the film.

use std::time::{Duration, Instant};

use super::Rect;
use crate::{
    VideoCodec,
    proto::display::StreamReport,
    video::{self, VideoEncoder},
};

/// A film that stands still for so long is over.
const STILL: Duration = Duration::from_millis(400);
/// Bounds of the margin in milliseconds, and by how much it grows beyond a share of what the last frame
/// was late. spice-gtk drops MJPEG frames that come late, and shows those of other codecs.
const MARGIN: (f64, f64) = (8.0, 120.0);
const GROWTH: (f64, f64) = (8.0, 1.0);
const SMALL_MARGIN: (f64, f64) = (3.0, 120.0);
const SMALL_GROWTH: (f64, f64) = (2.0, 0.5);
/// Bounds of the JPEG quality.
const QUALITY: (u8, u8) = (20, 85);
/// JPEG quality of a film that begins, and of one whose frames have become half as large.
const FIRST_QUALITY: u8 = 70;
const HALVED_QUALITY: u8 = 60;
/// A frame that is so many times too large is encoded again.
const MUCH_TOO_LARGE: f64 = 1.8;
/// How much less a frame of half the width and height takes.
const HALVING: f64 = 3.5;
/// How long after its first frame has arrived a client may take to show it. spice-gtk builds a
/// pipeline of GStreamer: 90 to 300 ms.
const OPENING: Duration = Duration::from_millis(500);
/// Frames in a row that are larger than the line, in spite of the worst quality, before they become
/// half as large; and with a quality far better than needed, before they become whole again.
const OVERRUNS: u32 = 6;
const LUXURIES: u32 = 90;
/// Quantizer (0 to 63) below which a halved film could be a whole one.
const LUXURY: u32 = 12;
/// Part of what it may take with which a halved film could be a whole one.
const UNUSED: f64 = 0.5;
/// How many times its size a frame of a rate-controlled codec may have before it is an overrun.
const OVERRUN: f64 = 1.4;
/// Smallest side of a stream whose frames may be halved.
const MIN_HALVED: u32 = 256;
/// Share of the line a stream may fill.
const SHARE: f64 = 0.85;
/// Bits per second that a video has, however thin the line is.
const MIN_RATE: f64 = 100_000.0;
/// Frames and milliseconds between two reports.
pub(crate) const REPORT_WINDOW: (u32, u32) = (10, 1000);

/// A stream.
pub(crate) struct Stream {
    pub(crate) id: u32,
    /// The number reports come under.
    pub(crate) unique: u32,
    pub(crate) rect: Rect,
    pub(crate) codec: VideoCodec,
    /// Unless it is MJPEG.
    pub(crate) encoder: Option<Box<dyn VideoEncoder>>,
    pub(crate) begun: Instant,
    /// There is something newer than the last frame.
    pub(crate) dirty: bool,
    last_change: Instant,
    last_time: u32,
    quality: u8,
    margin: f64,
    /// Frames are sent in half their width and height.
    half: bool,
    /// They stay so: the host is too slow for whole ones.
    stays_half: bool,
    /// Frames in a row that were too large, and those that were better than needed.
    overruns: u32,
    luxuries: u32,
    /// What encoding costs.
    pub(crate) effort: Effort,
    /// Shows the film until the client can have shown this stream.
    pub(crate) opener: Option<Box<Stream>>,
    /// It is the opener's turn.
    openers_turn: bool,
    opened_at: Option<Instant>,
}

/// What a stream has to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turn {
    /// A frame of its opener.
    Opener,
    /// An encoder.
    Encoder,
    /// A frame of its own.
    Frame,
}

impl Stream {
    /// An MJPEG stream.
    pub(crate) fn new(id: u32, unique: u32, rect: Rect, now: Instant) -> Self {
        Self {
            id,
            unique,
            rect,
            codec: VideoCodec::Mjpeg,
            encoder: None,
            begun: now,
            dirty: true,
            last_change: now,
            last_time: 0,
            quality: FIRST_QUALITY,
            margin: 15.0,
            half: false,
            stays_half: false,
            overruns: 0,
            luxuries: 0,
            effort: Effort::default(),
            opener: None,
            openers_turn: true,
            opened_at: None,
        }
    }

    /// An MJPEG stream that shows a film until another can. Small frames, so that it is no burden.
    pub(crate) fn new_opener(
        id: u32,
        unique: u32,
        rect: Rect,
        can_scale: bool,
        now: Instant,
    ) -> Self {
        let mut stream = Self::new(id, unique, rect, now);
        stream.halve(can_scale);
        stream
    }

    /// A frame was encoded and is with the client in `transfer` seconds: the first one tells when the
    /// opener is not needed any more.
    pub(crate) fn arrives(&mut self, transfer: f64, now: Instant) {
        let arrives = now + Duration::from_secs_f64(transfer.clamp(0.0, 10.0));
        self.opened_at.get_or_insert(arrives + OPENING);
    }

    /// The opener, once it is not needed any more.
    pub(crate) fn take_opener(&mut self, now: Instant) -> Option<Box<Stream>> {
        self.opened_at.filter(|at| *at <= now).and_then(|_| self.opener.take())
    }

    /// How many share the line.
    pub(crate) fn count(&self) -> usize {
        1 + usize::from(self.opener.is_some())
    }

    /// Whether frames of half the width and height are an option.
    fn may_halve(&self, can_scale: bool) -> bool {
        !self.half && can_scale && self.rect.width.min(self.rect.height) >= MIN_HALVED
    }

    /// Sends smaller frames from now on, if that is an option.
    fn halve(&mut self, can_scale: bool) -> bool {
        let may = self.may_halve(can_scale);
        if may {
            (self.half, self.quality) = (true, HALVED_QUALITY);
            (self.overruns, self.luxuries) = (0, 0);
        }
        may
    }

    /// The host is too slow for this stream: smaller frames from now on, or `false`.
    pub(crate) fn relieve(&mut self, can_scale: bool) -> bool {
        self.effort = Effort::default();
        self.stays_half = true;
        self.halve(can_scale)
    }

    /// Something under the stream changed.
    pub(crate) fn changed(&mut self, now: Instant) {
        self.dirty = true;
        self.last_change = now;
        if let Some(opener) = &mut self.opener {
            opener.dirty = true;
        }
    }

    /// Whether there is something newer than the last frame, its opener's included.
    pub(crate) fn is_dirty(&self) -> bool {
        self.dirty || self.opener.as_ref().is_some_and(|opener| opener.dirty)
    }

    /// What comes next. An opener's frames are shown first, and making an encoder or a first frame
    /// takes long: each of them is a turn of its own.
    pub(crate) fn next_turn(&mut self) -> Turn {
        let opener = self.opener.as_ref().is_some_and(|opener| opener.dirty);
        if opener && (self.openers_turn || !self.dirty) {
            self.openers_turn = false;
            return Turn::Opener;
        }
        self.openers_turn = true;
        match self.codec.is_predictive() && self.encoder.is_none() {
            true => Turn::Encoder,
            false => Turn::Frame,
        }
    }

    /// When the stream ends if nothing changes.
    pub(crate) fn ends_at(&self) -> Instant {
        self.last_change + STILL
    }

    pub(crate) fn quality(&self) -> u8 {
        self.quality
    }

    /// Bits per second for an encoder that can keep to them, of a line of which this stream has so
    /// many bytes per second, if that is known.
    pub(crate) fn bit_rate(&self, line: Option<f64>) -> f64 {
        let enough = video::full_rate((self.rect.width, self.rect.height));
        let room = line.map_or(f64::INFINITY, |line| line * 8.0 * SHARE);
        enough.min(room).max(MIN_RATE)
    }

    /// Size of the frames sent.
    pub(crate) fn frame_size(&self) -> (u32, u32) {
        let Rect { width, height, .. } = self.rect;
        if self.half { (width / 2, height / 2) } else { (width, height) }
    }

    /// An MJPEG frame of so many bytes is much larger than the line carries per frame: it has to be
    /// encoded again, with the quality and size that this sets.
    pub(crate) fn refit(&mut self, bytes: usize, line: Option<f64>, can_scale: bool) -> bool {
        let Some(wanted) = line.map(|line| (line * SHARE).max(1.0)) else { return false };
        let mut ratio = bytes as f64 / wanted;
        if ratio < MUCH_TOO_LARGE {
            return false;
        }
        let mut quality = smaller(self.quality, ratio);
        if quality < f64::from(QUALITY.0) && self.may_halve(can_scale) {
            ratio /= HALVING;
            quality = smaller(self.quality, ratio);
            self.halve(can_scale);
        } else if self.quality == QUALITY.0 {
            return false;
        }
        self.quality = quality.clamp(QUALITY.0.into(), HALVED_QUALITY.into()) as u8;
        true
    }

    /// An MJPEG frame of so many bytes was encoded; the line carries `line` bytes per frame, if known.
    /// Where quality alone does not help, and the client can scale, half the size does.
    pub(crate) fn encoded(&mut self, bytes: usize, line: Option<f64>, can_scale: bool) {
        self.dirty = false;
        let wanted = line.map_or(f64::INFINITY, |line| line * SHARE);
        let ratio = bytes as f64 / wanted;
        let quality = match ratio {
            2.0.. => self.quality.saturating_sub(15),
            1.3.. => self.quality.saturating_sub(6),
            1.05.. => self.quality.saturating_sub(2),
            0.85.. => self.quality,
            _ => self.quality + 1,
        };
        self.quality = quality.clamp(QUALITY.0, QUALITY.1);
        if quality < QUALITY.0 {
            self.halve(can_scale);
        } else if quality > QUALITY.1 && self.half && !self.stays_half && ratio < 0.5 {
            (self.half, self.quality) = (false, 40);
        }
    }

    /// A frame of so many bytes was encoded by an encoder that was told `told` bytes per frame, with
    /// this quantizer; the line carries `line` bytes per frame, if known. One that is too large for its
    /// worst quality gets smaller frames, until they have become far better than needed.
    pub(crate) fn coded(
        &mut self,
        bytes: usize,
        told: f64,
        quantizer: Option<u32>,
        line: Option<f64>,
        can_scale: bool,
    ) {
        self.dirty = false;
        let wanted = line.map_or(f64::INFINITY, |line| line * SHARE);
        self.overruns = if bytes as f64 > wanted * OVERRUN { self.overruns + 1 } else { 0 };
        // Who does not know its quantizer leaves bytes unused when it is at its best.
        let good = quantizer.map_or((bytes as f64) < told * UNUSED, |quantizer| quantizer < LUXURY);
        let luxury = self.half && good;
        self.luxuries = if luxury { self.luxuries + 1 } else { 0 };
        if self.overruns >= OVERRUNS {
            self.halve(can_scale);
            self.overruns = 0;
        } else if self.luxuries >= LUXURIES && !self.stays_half {
            (self.half, self.luxuries) = (false, 0);
        }
    }

    /// The time to show a frame at: `clock` milliseconds now, and the line needs `transfer` seconds
    /// until the frame is there. Never earlier than the frame before.
    pub(crate) fn time(&mut self, clock: u32, transfer: f64) -> u32 {
        let delay = (transfer * 1000.0 + self.margin).min(500.0) as u32;
        let time = clock.wrapping_add(delay);
        if self.last_time != 0 && (time.wrapping_sub(self.last_time) as i32) < 0 {
            return self.last_time;
        }
        self.last_time = time;
        time
    }

    /// The client reports; `false` if it cannot show the stream.
    pub(crate) fn report(&mut self, report: StreamReport) -> bool {
        if report.drops == u32::MAX {
            return false;
        }
        let (bounds, (step, share)) = match self.codec.is_predictive() {
            false => (MARGIN, GROWTH),
            true => (SMALL_MARGIN, SMALL_GROWTH),
        };
        if report.drops > 0 || report.last_delay < 0 {
            let late = f64::from(report.last_delay.min(0)).abs();
            self.margin = (self.margin + step + late * share).min(bounds.1);
        } else {
            // What was too early by so much may be later by a quarter of it.
            let spare = (f64::from(report.last_delay) - bounds.0).max(0.0);
            self.margin = (self.margin - spare / 4.0).max(bounds.0);
        }
        true
    }
}

/// The JPEG quality at which a frame takes `1/ratio` of what it takes with this one. Sizes go by the
/// 0.7th power of the quantizers, more or less.
fn smaller(quality: u8, ratio: f64) -> f64 {
    // How the quantizers are scaled, in percent.
    let quality = f64::from(quality.max(1));
    let scale = if quality < 50.0 { 5000.0 / quality } else { 200.0 - 2.0 * quality };
    let wanted = scale.max(1.0) * ratio.max(0.01).powf(1.0 / 0.7);
    if wanted > 100.0 { 5000.0 / wanted } else { (200.0 - wanted) / 2.0 }
}

/// Whether a host is fast enough to encode every frame of a stream.
#[derive(Debug, Default)]
pub(crate) struct Effort {
    /// Mean time per frame in seconds, of the last 16 or so.
    mean: f64,
    frames: u32,
    /// Since when it has been too much.
    over_since: Option<Instant>,
}

impl Effort {
    /// Share of the time between two frames that encoding may take, and less than which is enough
    /// to forget that it was more.
    const LIMITS: (f64, f64) = (0.8, 0.65);
    /// How long it may take more.
    const PATIENCE: Duration = Duration::from_secs(2);
    /// Frames that do not count: a stream's first one is the largest.
    const SETTLE: u32 = 10;

    /// Encoding a frame took so long, of which there are `fps` per second; `true` if that is too much
    /// for too long.
    pub(crate) fn spent(&mut self, time: Duration, fps: f64, now: Instant) -> bool {
        self.frames = self.frames.saturating_add(1);
        if self.frames <= Self::SETTLE {
            self.mean = time.as_secs_f64();
            return false;
        }
        self.mean += (time.as_secs_f64() - self.mean) / 16.0;
        let share = self.mean * fps;
        if share > Self::LIMITS.0 {
            let since = *self.over_since.get_or_insert(now);
            return now.saturating_duration_since(since) >= Self::PATIENCE;
        }
        if share < Self::LIMITS.1 {
            self.over_since = None;
        }
        false
    }
}

/// How many frames per second the program shows, those included that a viewer never looks at.
#[derive(Debug)]
pub(crate) struct SourceRate {
    since: Option<Instant>,
    frames: u64,
    rate: f64,
}

impl SourceRate {
    pub(crate) fn new() -> Self {
        Self { since: None, frames: 0, rate: 30.0 }
    }

    /// So many frames came since the last call.
    pub(crate) fn frames(&mut self, count: u64, now: Instant) {
        const WINDOW: Duration = Duration::from_millis(500);
        let Some(since) = self.since else {
            self.since = Some(now);
            return;
        };
        self.frames = self.frames.saturating_add(count);
        let time = now.saturating_duration_since(since);
        if time >= WINDOW {
            self.rate = self.frames as f64 / time.as_secs_f64();
            (self.since, self.frames) = (Some(now), 0);
        }
    }

    /// Frames per second, 5 to 60.
    pub(crate) fn rate(&self) -> f64 {
        self.rate.clamp(5.0, 60.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream() -> Stream {
        Stream::new(1, 7, Rect::new(0, 0, 640, 480), Instant::now())
    }

    fn report(drops: u32, last_delay: i32) -> StreamReport {
        StreamReport { stream: 1, unique: 7, frames: 10, drops, last_delay }
    }

    #[test]
    fn quality_follows_the_line() {
        let mut stream = stream();
        for _ in 0..50 {
            stream.encoded(100_000, Some(3.3e4), false);
        }
        assert_eq!(stream.quality(), QUALITY.0);
        for _ in 0..100 {
            stream.encoded(100_000, Some(3.3e6), false);
        }
        assert_eq!(stream.quality(), QUALITY.1);
        let before = stream.quality();
        stream.encoded(27_000, Some(3.3e4), false);
        assert_eq!(stream.quality(), before, "fits");
    }

    #[test]
    fn the_bit_rate_is_enough_and_fits_the_line() {
        let large = Stream::new(1, 7, Rect::new(0, 0, 1920, 1080), Instant::now());
        assert!((6.5e6..7.5e6).contains(&large.bit_rate(None)));
        assert!((4.0e6..4.5e6).contains(&large.bit_rate(Some(6.25e5))), "of 5 Mbit/s");
        assert!(stream().bit_rate(None) > large.bit_rate(None) / 6.0);
        assert_eq!(large.bit_rate(Some(0.0)), MIN_RATE);
    }

    #[test]
    fn thin_lines_get_smaller_frames() {
        let mut stream = stream();
        for _ in 0..10 {
            stream.encoded(100_000, Some(3.3e4), true);
        }
        assert_eq!(stream.frame_size(), (320, 240));
        for _ in 0..100 {
            stream.encoded(10_000, Some(3.3e4), true);
        }
        assert_eq!(stream.frame_size(), (640, 480));
    }

    #[test]
    fn a_frame_that_is_much_too_large_is_encoded_again() {
        let mut first = stream();
        assert!(!first.refit(1 << 20, None, true), "who knows");
        assert!(!first.refit(40_000, Some(3.3e4), true), "nearly fits");
        assert!(first.refit(60_000, Some(3.3e4), true));
        assert_eq!(first.frame_size(), (640, 480));
        assert!((20..50).contains(&first.quality()), "{}", first.quality());
        assert!(first.refit(300_000, Some(3.3e4), true));
        assert_eq!(first.frame_size(), (320, 240));
        for _ in 0..3 {
            first.refit(300_000, Some(3.3e4), true);
        }
        assert!(!first.refit(300_000, Some(3.3e4), true), "no better can be done");
        assert_eq!(first.quality(), QUALITY.0);
    }

    #[test]
    fn what_no_quality_makes_small_enough_is_halved_until_it_is_easy() {
        let mut film = stream();
        for _ in 0..20 {
            film.coded(27_000, 2.8e4, Some(60), Some(3.3e4), true);
        }
        assert_eq!(film.frame_size(), (640, 480), "fits");
        for _ in 0..OVERRUNS {
            film.coded(80_000, 2.8e4, Some(60), Some(3.3e4), true);
        }
        assert_eq!(film.frame_size(), (320, 240));
        for _ in 0..LUXURIES {
            film.coded(27_000, 2.8e4, Some(30), Some(3.3e4), true);
        }
        assert_eq!(film.frame_size(), (320, 240));
        for _ in 0..LUXURIES {
            film.coded(27_000, 2.8e4, Some(5), Some(3.3e4), true);
        }
        assert_eq!(film.frame_size(), (640, 480));
        assert!(film.relieve(true));
        for _ in 0..LUXURIES {
            film.coded(27_000, 2.8e4, Some(5), Some(3.3e4), true);
        }
        assert_eq!(film.frame_size(), (320, 240), "for good");
        assert!(!film.relieve(true), "nothing more can be done");
    }

    #[test]
    fn without_a_quantizer_unused_bytes_tell_that_it_is_easy() {
        let mut film = stream();
        for _ in 0..OVERRUNS {
            film.coded(80_000, 2.8e4, None, Some(3.3e4), true);
        }
        assert_eq!(film.frame_size(), (320, 240));
        for bytes in [27_000, 15_000] {
            for _ in 0..LUXURIES * 2 {
                film.coded(bytes, 2.8e4, None, Some(3.3e4), true);
            }
            assert_eq!(film.frame_size(), (320, 240), "{bytes} are needed");
        }
        for _ in 0..LUXURIES {
            film.coded(12_000, 2.8e4, None, Some(3.3e4), true);
        }
        assert_eq!(film.frame_size(), (640, 480));
    }

    #[test]
    fn a_host_is_too_slow_when_it_is_so_for_long() {
        let start = Instant::now();
        // Milliseconds per frame, of 33; frames until that is too much.
        let until = |times: &dyn Fn(u32) -> u64| {
            let mut effort = Effort::default();
            (0..1000).find(|frame| {
                let now = start + Duration::from_millis(33) * *frame;
                effort.spent(Duration::from_millis(times(*frame)), 30.0, now)
            })
        };
        assert_eq!(until(&|_| 20), None);
        assert_eq!(until(&|frame| if frame < 10 { 90 } else { 20 }), None, "its first ones");
        assert_eq!(until(&|frame| if frame % 100 < 30 { 60 } else { 10 }), None, "now and then");
        let found = until(&|_| 30).unwrap();
        assert!((65..80).contains(&found), "{found}");
    }

    #[test]
    fn the_opener_goes_when_the_client_can_have_shown_the_stream() {
        let start = Instant::now();
        let mut film = stream();
        film.opener = Some(Box::new(Stream::new_opener(2, 8, film.rect, true, start)));
        assert_eq!(film.count(), 2);
        assert!(film.take_opener(start + OPENING * 9).is_none(), "nothing was sent");
        film.arrives(0.2, start);
        film.arrives(0.3, start + OPENING);
        assert!(film.take_opener(start + OPENING).is_none());
        assert_eq!(film.take_opener(start + OPENING + Duration::from_millis(200)).unwrap().id, 2);
        assert_eq!(film.count(), 1);
    }

    #[test]
    fn a_stream_and_its_opener_take_turns() {
        let now = Instant::now();
        let mut film = stream();
        assert_eq!(film.next_turn(), Turn::Frame);
        film.opener = Some(Box::new(Stream::new_opener(2, 8, film.rect, true, now)));
        film.codec = VideoCodec::Vp8;
        // New frames come all the time.
        let turns: Vec<_> = (0..6).map(|_| film.next_turn()).collect();
        assert_eq!(turns, [Turn::Opener, Turn::Encoder].repeat(3));
        // The stream's own frame is sent, the opener's waits.
        film.dirty = false;
        assert!(film.is_dirty());
        assert_eq!([film.next_turn(), film.next_turn()], [Turn::Opener; 2]);
        film.changed(now);
        assert_eq!(film.next_turn(), Turn::Encoder);
    }

    #[test]
    fn times_never_go_back_and_follow_reports() {
        let mut stream = stream();
        assert_eq!(stream.time(1000, 0.1), 1115);
        assert_eq!(stream.time(1010, 0.0), 1115);
        assert!(stream.report(report(3, -5)));
        assert_eq!(stream.time(2000, 0.0), 2028);
        for _ in 0..100 {
            assert!(stream.report(report(0, 20)));
        }
        assert_eq!(stream.time(3000, 0.0), 3008);
        assert!(!stream.report(report(u32::MAX, 0)));
        // Of other codecs late frames are shown as well.
        stream.codec = VideoCodec::Vp8;
        for _ in 0..100 {
            assert!(stream.report(report(0, 20)));
        }
        assert_eq!(stream.time(4000, 0.0), 4003);
        assert!(stream.report(report(1, -4)));
        assert_eq!(stream.time(5000, 0.0), 5007);
    }
}
