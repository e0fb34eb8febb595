//! Films as streams: when they begin and end, and their frames.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::{Encoder, Line, touch};
use crate::{
    VideoChange, VideoCodec,
    display::{
        Rect,
        stats::{Codec, Counters, count, set},
        stream::{REPORT_WINDOW, Stream, Turn},
        tiles::bounds,
    },
    proto::{
        display::{
            PreferredCodecs, StreamReport, put_stream_create, put_stream_data, put_stream_destroy,
            put_stream_report_wanted,
        },
        framing::Framer,
        image::put_jpeg,
    },
    video::{Picture, Video, VideoError, View},
};

/// Most streams at a time.
const MAX_STREAMS: usize = 4;
/// Numbers of streams; clients have tables of 50 and more.
const STREAM_IDS: u32 = 32;
/// How often it is looked for films.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// For how long codecs are not used that the host was too slow for: at first, and at most.
const FIRST_REST: Duration = Duration::from_secs(30);
const LONGEST_REST: Duration = Duration::from_secs(600);
/// How often an MJPEG frame is encoded at most.
const MAX_TRIES: u32 = 3;
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

    /// The codec for a film of this size that begins now.
    fn codec(&self, rect: Rect, now: Instant) -> Option<VideoCodec> {
        let rest = self.resting.is_some_and(|rest| now < rest.until);
        let fits = |codec: &VideoCodec| !(rest && codec.is_predictive()) && codec.takes(rect);
        self.video_codecs.iter().copied().find(fits)
    }

    /// The client reports on a stream.
    pub(crate) fn report(&mut self, report: StreamReport, now: Instant) {
        let known = |stream: &Stream| {
            stream.id == report.stream && (stream.unique == report.unique || report.frames == 0)
        };
        let mut streams = self.streams.iter_mut();
        let Some(codec) = streams.find_map(|stream| {
            if known(stream) {
                return Some((stream.codec, stream.report(report)));
            }
            let opener = stream.opener.as_deref_mut()?;
            known(opener).then(|| (opener.codec, opener.report(report)))
        }) else {
            return;
        };
        match codec {
            (_, true) => count(&self.stats.late, report.drops.into()),
            (codec, false) => {
                tracing::info!(%codec, "the client cannot show such streams");
                self.give_up(codec, VideoChange::NotShown, now);
            }
        }
    }

    /// A codec does not work: no more of it.
    fn give_up(&mut self, codec: VideoCodec, why: VideoChange, now: Instant) {
        self.video_codecs.retain(|other| *other != codec);
        if codec == VideoCodec::Mjpeg {
            self.close_openers(|_| true);
        }
        self.replace_streams(|other| other == codec, why, now);
    }

    /// The host is too slow for a codec, and so for those that are as much work: none of them for a
    /// while, which is longer each time.
    fn set_aside(&mut self, codec: VideoCodec, now: Instant) {
        let pause = match self.resting {
            Some(rest) => (rest.pause * 2).min(LONGEST_REST),
            None => FIRST_REST,
        };
        tracing::info!(%codec, ?pause, "the host is too slow for this video codec");
        self.resting = Some(Resting { pause, until: now + pause });
        self.replace_streams(VideoCodec::is_predictive, VideoChange::TooSlow, now);
    }

    /// Streams of some codecs go on with the next one, or end.
    fn replace_streams(
        &mut self,
        which: impl Fn(VideoCodec) -> bool,
        why: VideoChange,
        now: Instant,
    ) {
        while let Some(at) = self.streams.iter().position(|stream| which(stream.codec)) {
            let stream = self.streams.remove(at);
            let rect = stream.rect;
            self.close(stream);
            match self.open(rect, now) {
                Some(mut stream) => {
                    if why == VideoChange::TooSlow {
                        stream.relieve(self.abilities.sized);
                    }
                    self.streams.insert(at, stream);
                }
                None => self.tiles.release(rect, now),
            }
        }
        self.note_codec(why, now);
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
        let Some(codec) = self.codec(rect, now) else { return };
        let rect = match codec.is_predictive() {
            false => rect,
            // Their chroma has half the width and height.
            true => even(rect, self.size().unwrap_or_default()),
        };
        if rect.is_empty() || !self.tiles.hold(rect, now) {
            return;
        }
        match self.open(rect, now) {
            Some(stream) => self.streams.push(stream),
            None => self.tiles.release(rect, now),
        }
        self.note_codec(VideoChange::Chosen, now);
    }

    /// A stream of the best codec there is, which the client is told of.
    fn open(&mut self, rect: Rect, now: Instant) -> Option<Stream> {
        let codec = self.codec(rect, now)?;
        let (id, unique) = self.announce(codec, rect, &[])?;
        let mut stream = Stream::new(id, unique, rect, now);
        stream.codec = codec;
        // Of the decoders of clients only that of MJPEG is there at once.
        if codec.is_predictive() && self.video_codecs.contains(&VideoCodec::Mjpeg) {
            let opener = self.announce(VideoCodec::Mjpeg, rect, &[id]);
            stream.opener = opener.map(|(id, unique)| {
                Box::new(Stream::new_opener(id, unique, rect, self.abilities.sized, now))
            });
        }
        count(&self.stats.streams, 1);
        Some(stream)
    }

    /// Tells the client of a stream, and asks for reports; its numbers, none of `used`.
    fn announce(&mut self, codec: VideoCodec, rect: Rect, used: &[u32]) -> Option<(u32, u32)> {
        // A number comes back late, because the client may still report on the stream that had it.
        let taken = |id: &u32| {
            let opener = |stream: &Stream| stream.opener.as_ref().map(|opener| opener.id);
            let mut streams = self.streams.iter();
            used.contains(id) || streams.any(|one| one.id == *id || opener(one) == Some(*id))
        };
        let mut ids = (0..STREAM_IDS).map(|n| self.next_stream.wrapping_add(n) % STREAM_IDS);
        let id = ids.find(|id| !taken(id))?;
        self.next_stream = self.next_stream.wrapping_add(1);
        let unique = self.next_stream;
        let (framer, out) = (&mut self.framer, &mut self.out);
        put_stream_create(framer, out, id, codec, (rect.width, rect.height), rect);
        if self.abilities.reports {
            put_stream_report_wanted(framer, out, id, unique, REPORT_WINDOW);
        }
        Some((id, unique))
    }

    /// An encoder does not work: no more of it.
    fn fail(&mut self, codec: VideoCodec, error: &VideoError, now: Instant) {
        tracing::warn!(%codec, %error, "cannot encode a video stream: this viewer gets no more of them");
        self.give_up(codec, VideoChange::Failed, now);
    }

    /// Does what a stream has to do next: mostly, encodes a frame.
    pub(super) fn send_frame(
        &mut self,
        at: usize,
        line: &Line,
        transfer: impl Fn(usize) -> f64,
        now: Instant,
    ) {
        let fps = self.source.rate();
        let parts: usize = self.streams.iter().map(Stream::count).sum();
        let streams = self.streams.len();
        let can_scale = self.abilities.sized;
        let Some(stream) = self.streams.get_mut(at) else { return };
        let (rect, codec) = (stream.rect, stream.codec);
        let size = (rect.width, rect.height);
        let turn = stream.next_turn();
        if turn == Turn::Encoder {
            // Of the line, for this stream; openers are gone soon.
            let bits = stream.bit_rate(line.rate.map(|rate| rate / streams as f64));
            match self.video.encoder(codec, size, (bits, fps)) {
                Ok(encoder) => stream.encoder = encoder,
                Err(error) => self.fail(codec, &error, now),
            }
            return;
        }
        let (pixels, stride) = self.tiles.held_pixels(rect);
        let mut frame = FrameOf {
            whole: View { pixels, stride, size },
            halved: None,
            line,
            // Of the line, for this stream.
            share: line.rate.map(|rate| rate / parts as f64),
            fps,
            can_scale,
        };
        let mut wire = Wire { framer: &mut self.framer, out: &mut self.out, stats: &self.stats };
        let start = Instant::now();
        let sent = match (turn, stream.opener.as_deref_mut()) {
            (Turn::Opener, Some(opener)) => {
                // Before the other frame takes its time.
                self.urgent = true;
                frame.send(opener, &mut wire, &transfer)
            }
            _ => frame.send(stream, &mut wire, &transfer),
        };
        let bytes = match sent {
            Ok(bytes) => bytes,
            Err(error) => return self.fail(codec, &error, now),
        };
        if turn == Turn::Frame {
            stream.arrives(transfer(bytes), now);
        }
        // While there are two it costs more.
        let spent = self.frame_cost.unwrap_or_else(|| start.elapsed());
        let slow =
            turn == Turn::Frame && stream.opener.is_none() && stream.effort.spent(spent, fps, now);
        let hopeless = slow && !stream.relieve(can_scale) && stream.encoder.is_some();
        if let Some(opener) = stream.take_opener(now) {
            put_stream_destroy(&mut self.framer, &mut self.out, opener.id);
        }
        self.tiles.streamed(rect, now);
        self.lossy = true;
        if hopeless {
            self.set_aside(codec, now);
        }
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
            let stream = self.streams.remove(at);
            let rect = stream.rect;
            self.close(stream);
            self.tiles.release(rect, now);
        }
    }

    /// The client is told that a stream is over.
    fn close(&mut self, stream: Stream) {
        let ids = [Some(stream.id), stream.opener.map(|opener| opener.id)];
        for id in ids.into_iter().flatten() {
            put_stream_destroy(&mut self.framer, &mut self.out, id);
        }
    }

    fn close_openers(&mut self, which: impl Fn(&Stream) -> bool) {
        for stream in self.streams.iter_mut().filter(|stream| which(stream)) {
            if let Some(opener) = stream.opener.take() {
                put_stream_destroy(&mut self.framer, &mut self.out, opener.id);
            }
        }
    }

    /// Notes with which codec films are sent now, if that is another one than before.
    fn note_codec(&mut self, why: VideoChange, now: Instant) {
        let codec = self
            .streams
            .last()
            .map_or_else(|| self.codec(Rect::default(), now), |one| Some(one.codec));
        // Who never had one has lost none.
        if codec == self.noted_codec {
            return;
        }
        self.noted_codec = codec;
        if why != VideoChange::Chosen {
            count(&self.stats.fallbacks, 1);
        }
        set(&self.stats.video_codec, codec.map_or(0, |codec| codec as u64 + 1));
        self.news = Some((codec, why));
    }

    /// The codec films are sent with, `None` for pictures, if that has changed.
    pub(crate) fn take_news(&mut self) -> Option<(Option<VideoCodec>, VideoChange)> {
        self.news.take()
    }
}

/// The host was too slow for codecs whose frames build on one another.
#[derive(Debug, Clone, Copy)]
pub(super) struct Resting {
    pause: Duration,
    until: Instant,
}

/// Where messages go.
struct Wire<'a> {
    framer: &'a mut Framer,
    out: &'a mut Vec<u8>,
    stats: &'a Counters,
}

/// A frame of a film, for one or two streams.
struct FrameOf<'a> {
    whole: View<'a>,
    /// The same, half as wide and high, once somebody wants it.
    halved: Option<Vec<u8>>,
    line: &'a Line,
    /// Bytes per second of the line, for each of its streams.
    share: Option<f64>,
    fps: f64,
    can_scale: bool,
}

impl FrameOf<'_> {
    /// Encodes it for a stream; the bytes it became.
    fn send(
        &mut self,
        stream: &mut Stream,
        wire: &mut Wire<'_>,
        transfer: &impl Fn(usize) -> f64,
    ) -> Result<usize, VideoError> {
        let (start, before) = (Instant::now(), wire.out.len());
        let whole = self.whole.size;
        let was_whole = stream.frame_size() == whole;
        let per_frame = self.share.map(|rate| rate / self.fps);
        let mut data = Vec::new();
        let mut tries = 0;
        let size = loop {
            let size = stream.frame_size();
            let view = match size == whole {
                true => self.whole,
                false => View::new(self.halved.get_or_insert_with(|| halve(self.whole)), size),
            };
            let rate = stream.bit_rate(self.share);
            let Some(encoder) = &mut stream.encoder else {
                put_jpeg(&mut data, size, &view.without_padding(), stream.quality());
                tries += 1;
                if tries < MAX_TRIES && stream.refit(data.len(), per_frame, self.can_scale) {
                    data.clear();
                    continue;
                }
                stream.encoded(data.len(), per_frame, self.can_scale);
                break size;
            };
            let (clock, duration) = (self.line.clock, Duration::from_secs_f64(1.0 / self.fps));
            encoder.encode(Picture { view, clock, duration, rate }, &mut data)?;
            let quantizer = encoder.quantizer();
            let told = rate / 8.0 / self.fps;
            stream.coded(data.len(), told, quantizer, per_frame, self.can_scale);
            // The decoder finds the size in the frame.
            break whole;
        };
        let clock = self.line.clock.wrapping_add(start.elapsed().as_millis() as u32);
        let time = stream.time(clock, transfer(data.len()));
        let sized = (size != whole).then_some((size, stream.rect));
        put_stream_data(wire.framer, wire.out, stream.id, time, sized, |out| {
            out.extend_from_slice(&data);
        });
        if was_whole && stream.frame_size() != whole {
            count(&wire.stats.halved, 1);
        }
        wire.stats.encoded(Codec::from(stream.codec), wire.out.len() - before, start);
        Ok(wire.out.len() - before)
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

/// A picture of half the width and height; odd ends are left out.
fn halve(view: View<'_>) -> Vec<u8> {
    let (columns, rows) = (view.size.0 as usize / 2, view.size.1 as usize / 2);
    let mut half = Vec::with_capacity(columns * rows * 4);
    for (top, bottom) in view.pairs_of_rows() {
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
    half
}
