//! Films as streams: when they begin and end, and their frames.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::{Encoder, Line, touch};
use crate::{
    VideoCodec,
    display::{
        Rect,
        stats::{Codec, count},
        stream::{REPORT_WINDOW, Stream},
        tiles::bounds,
    },
    proto::{
        display::{
            PreferredCodecs, StreamReport, put_stream_create, put_stream_data, put_stream_destroy,
            put_stream_report_wanted,
        },
        image::put_jpeg,
    },
    video::{Picture, Video, VideoError},
};

/// Most streams at a time.
const MAX_STREAMS: usize = 4;
/// Numbers of streams; clients have tables of 50 and more.
const STREAM_IDS: u32 = 32;
/// How often it is looked for films.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Age at which a stream may become a part of a larger one, and the part of that it is at most.
const GROW_AFTER: Duration = Duration::from_millis(500);
const GROWTH: (u64, u64) = (4, 5);
/// Share of the line that exact pictures of a film may take before it becomes a stream.
const FILM_SHARE: f64 = 0.5;
/// Bytes per second of exact pictures of a film that a network may be asked to carry.
const FILM_RATE: f64 = 12_500_000.0;
/// Bytes per second above which a connection from this machine is what it looks like, and no tunnel.
const LOCAL_RATE: f64 = 50_000_000.0;

impl Encoder {
    /// Films may be sent with these encoders; the client shows `known`.
    pub(crate) fn set_video(&mut self, video: Arc<Video>, known: impl Fn(VideoCodec) -> bool) {
        let codecs = video.codecs().iter().copied();
        self.video_codecs =
            codecs.filter(|codec| self.abilities.streams && known(*codec)).collect();
        self.video = video;
    }

    /// The client prefers codecs in this order; those it did not name come last.
    pub(crate) fn prefer_codecs(&mut self, wanted: PreferredCodecs) {
        self.video_codecs.sort_by_key(|codec| wanted.place(*codec).unwrap_or(usize::MAX));
    }

    /// The client reports on a stream.
    pub(crate) fn report(&mut self, report: StreamReport, now: Instant) {
        let known = |stream: &&mut Stream| {
            stream.id == report.stream && (stream.unique == report.unique || report.frames == 0)
        };
        let Some(stream) = self.streams.iter_mut().find(known) else { return };
        let codec = stream.codec;
        if stream.report(report) {
            count(&self.stats.late, report.drops.into());
        } else {
            tracing::info!(%codec, "the client cannot show such streams");
            self.give_up(codec, now);
        }
    }

    /// A codec does not work: no more of it.
    fn give_up(&mut self, codec: VideoCodec, now: Instant) {
        self.video_codecs.retain(|other| *other != codec);
        self.end_streams(|stream| stream.codec == codec, now);
    }

    /// Turns films into streams, when exact pictures of them are more than the line should carry.
    pub(super) fn look_for_films(&mut self, line: &Line, now: Instant) {
        if self.video_codecs.is_empty()
            || self.staging.is_some()
            || self.streams.len() >= MAX_STREAMS
            || self.look_at.is_some_and(|at| now < at)
        {
            return;
        }
        self.look_at = Some(now + LOOK_EVERY);
        let share = line.rate.map_or(f64::INFINITY, |rate| rate * FILM_SHARE);
        // Without a network, exact pixels are less work for both sides than coding them.
        let limit = match line.rate {
            Some(rate) if self.abilities.local && rate > LOCAL_RATE => return,
            _ if self.abilities.local => share,
            _ => share.min(FILM_RATE),
        };
        for film in self.heat.films(now) {
            let rect = film.rect;
            let exact = f64::from(rect.width)
                * f64::from(rect.height)
                * 3.0
                * film.rate.max(self.source.rate());
            if exact < limit || self.streams.len() >= MAX_STREAMS {
                continue;
            }
            if !self.make_room(rect, now) {
                continue;
            }
            self.begin_stream(rect, now);
        }
    }

    /// Ends the streams that were found to be parts of a larger film; `false` if a film is where
    /// streams are already.
    fn make_room(&mut self, film: Rect, now: Instant) -> bool {
        let area = |rect: Rect| u64::from(rect.width) * u64::from(rect.height);
        let (mut covered, mut keep) = (0, false);
        for stream in self.streams.iter().filter(|stream| touch(stream.rect, film)) {
            // Their size was made even.
            let all = bounds(stream.rect, film);
            let inside = all.width <= film.width + 1 && all.height <= film.height + 1;
            keep |= !inside || now.saturating_duration_since(stream.begun) < GROW_AFTER;
            covered += area(stream.rect);
        }
        if keep || covered * GROWTH.1 > area(film) * GROWTH.0 {
            return false;
        }
        self.end_streams(|stream| touch(stream.rect, film), now);
        true
    }

    fn begin_stream(&mut self, rect: Rect, now: Instant) {
        let Some(codec) = self.video_codecs.first().copied() else { return };
        let rect = match codec {
            VideoCodec::Mjpeg => rect,
            // Its chroma has half the width and height.
            VideoCodec::Vp8 => even(rect, self.size().unwrap_or_default()),
        };
        let size = (rect.width, rect.height);
        // A number comes back late, because the client may still report on the stream that had it.
        let used = |id: &u32| self.streams.iter().any(|stream| stream.id == *id);
        let mut ids = (0..STREAM_IDS).map(|n| self.next_stream.wrapping_add(n) % STREAM_IDS);
        let Some(id) = ids.find(|id| !used(id)) else { return };
        if rect.is_empty() || !self.tiles.hold(rect, now) {
            return;
        }
        let encoder = match self.video.encoder(codec, size, self.source.rate()) {
            Ok(encoder) => encoder,
            Err(error) => {
                self.tiles.release(rect, now);
                return self.fail(codec, &error, now);
            }
        };
        self.next_stream = self.next_stream.wrapping_add(1);
        let unique = self.next_stream;
        let (framer, out) = (&mut self.framer, &mut self.out);
        put_stream_create(framer, out, id, codec, size, rect);
        if self.abilities.reports {
            put_stream_report_wanted(framer, out, id, unique, REPORT_WINDOW);
        }
        let mut stream = Stream::new(id, unique, rect, now);
        (stream.codec, stream.encoder) = (codec, encoder);
        self.streams.push(stream);
        count(&self.stats.streams, 1);
    }

    /// An encoder does not work.
    fn fail(&mut self, codec: VideoCodec, error: &VideoError, now: Instant) {
        tracing::warn!(%codec, %error, "cannot encode a video stream: this viewer gets no more of them");
        self.give_up(codec, now);
    }

    /// Encodes a stream's next frame.
    pub(super) fn send_frame(
        &mut self,
        at: usize,
        line: &Line,
        transfer: impl Fn(usize) -> f64,
        now: Instant,
    ) {
        let (fps, streams) = (self.source.rate(), self.streams.len());
        let Some(stream) = self.streams.get_mut(at) else { return };
        let (start, before) = (Instant::now(), self.out.len());
        let size = (stream.rect.width, stream.rect.height);
        // Of the line, for this stream.
        let share = line.rate.map(|rate| rate / streams as f64);
        self.tiles.pixels(stream.rect, &mut self.pixels);
        let mut sent_size = size;
        let mut data = Vec::new();
        let rate = stream.bit_rate(share);
        if let Some(encoder) = &mut stream.encoder {
            let picture = Picture {
                pixels: &self.pixels,
                size,
                clock: line.clock,
                duration: Duration::from_secs_f64(1.0 / fps),
                rate,
            };
            let codec = stream.codec;
            if let Err(error) = encoder.encode(picture, &mut data) {
                return self.fail(codec, &error, now);
            }
        } else {
            sent_size = stream.frame_size();
            if sent_size != size {
                halve(&mut self.pixels, size);
            }
            put_jpeg(&mut data, sent_size, &self.pixels, stream.quality());
        }
        let spent = start.elapsed();
        let clock = line.clock.wrapping_add(spent.as_millis() as u32);
        let time = stream.time(clock, transfer(data.len()));
        let sized = (sent_size != size).then_some((sent_size, stream.rect));
        put_stream_data(&mut self.framer, &mut self.out, stream.id, time, sized, |out| {
            out.extend_from_slice(&data);
        });
        stream.encoded(data.len(), share.map(|rate| rate / fps), self.abilities.sized);
        let (rect, codec) = (stream.rect, stream.codec);
        self.tiles.streamed(rect, now);
        self.lossy = true;
        self.stats.encoded(Codec::from(codec), self.out.len() - before, start);
    }

    /// Ends streams. Frames the client has not shown yet are dropped by it, so that what is drawn
    /// from now on stays.
    pub(super) fn end_streams(&mut self, which: impl Fn(&Stream) -> bool, now: Instant) {
        let mut at = 0;
        while let Some(stream) = self.streams.get(at) {
            if !which(stream) {
                at += 1;
                continue;
            }
            put_stream_destroy(&mut self.framer, &mut self.out, stream.id);
            let rect = stream.rect;
            self.streams.remove(at);
            self.tiles.release(rect, now);
        }
    }
}

/// A rectangle of even size around another one, or inside of it at the edges of an odd picture.
fn even(rect: Rect, (width, height): (u32, u32)) -> Rect {
    let grown = |at: u32, length: u32, limit: u32| match length % 2 {
        0 => (at, length),
        _ if at + length < limit => (at, length + 1),
        _ if at > 0 => (at - 1, length + 1),
        _ => (at, length - 1),
    };
    let (x, width) = grown(rect.x, rect.width, width);
    let (y, height) = grown(rect.y, rect.height, height);
    Rect::new(x, y, width, height)
}

/// Halves a picture in both directions, in place; odd ends are left out.
fn halve(pixels: &mut Vec<u8>, (width, height): (u32, u32)) {
    let stride = width as usize * 4;
    let (columns, rows) = (width as usize / 2, height as usize / 2);
    let mut half = Vec::with_capacity(columns * rows * 4);
    for pair in pixels.chunks_exact(stride * 2).take(rows) {
        let (top, bottom) = pair.split_at(stride);
        let (top, bottom) = (top.as_chunks::<8>().0, bottom.as_chunks::<8>().0);
        for (a, b) in top.iter().zip(bottom) {
            let sum = |at: usize| {
                let of =
                    |eight: &[u8; 8], at: usize| u16::from(eight.get(at).copied().unwrap_or(0));
                ((of(a, at) + of(a, at + 4) + of(b, at) + of(b, at + 4)) / 4) as u8
            };
            half.extend_from_slice(&[sum(0), sum(1), sum(2), 0]);
        }
    }
    *pixels = half;
}
