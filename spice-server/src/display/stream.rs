//! One region video stream: its quality, its clock, and when it ends.
//!
//! Every frame carries the time at which the client shows it, and a client drops frames that come
//! later. The time is what the line is believed to need plus a margin, which grows when the client
//! reports late frames and shrinks again when it reports none: as little delay as the line allows.

use std::time::{Duration, Instant};

use super::Rect;
use crate::{VideoCodec, proto::display::StreamReport, video::VideoEncoder};

/// A film that stands still for so long is over.
const STILL: Duration = Duration::from_millis(400);
/// Bounds of the margin in milliseconds.
const MARGIN: (f64, f64) = (8.0, 120.0);
/// Bounds of the JPEG quality.
const QUALITY: (u8, u8) = (20, 85);
/// Smallest side of a stream whose frames may be halved.
const MIN_HALVED: u32 = 256;
/// Share of the line a stream may fill.
const SHARE: f64 = 0.85;
/// Bits per second for every pixel of a 1920 by 1080 video; smaller ones have more detail per pixel.
const PIXEL_RATE: f64 = 3.4;
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
    /// Frames are sent in half their size.
    half: bool,
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
            quality: 70,
            margin: 15.0,
            half: false,
        }
    }

    /// Something under the stream changed.
    pub(crate) fn changed(&mut self, now: Instant) {
        self.dirty = true;
        self.last_change = now;
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
        let pixels = f64::from(self.rect.width) * f64::from(self.rect.height);
        let enough = pixels * PIXEL_RATE * (1920.0 * 1080.0 / pixels.max(1.0)).powf(0.25);
        let room = line.map_or(f64::INFINITY, |line| line * 8.0 * SHARE);
        enough.min(room).max(MIN_RATE)
    }

    /// Size of the frames sent.
    pub(crate) fn frame_size(&self) -> (u32, u32) {
        let Rect { width, height, .. } = self.rect;
        if self.half { (width / 2, height / 2) } else { (width, height) }
    }

    /// A frame of so many bytes was encoded; the line carries `line` bytes per frame, if known.
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
        let large = self.rect.width.min(self.rect.height) >= MIN_HALVED;
        if quality < QUALITY.0 && !self.half && can_scale && large {
            (self.half, self.quality) = (true, 60);
        } else if quality > QUALITY.1 && self.half && ratio < 0.5 {
            (self.half, self.quality) = (false, 40);
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
        if report.drops > 0 || report.last_delay < 0 {
            let late = f64::from(report.last_delay.min(0)).abs();
            self.margin = (self.margin + 8.0 + late).min(MARGIN.1);
        } else {
            // What was too early by so much may be later by a quarter of it.
            let spare = (f64::from(report.last_delay) - MARGIN.0).max(0.0);
            self.margin = (self.margin - spare / 4.0).max(MARGIN.0);
        }
        true
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
        self.frames += count;
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
    }
}
