//! The playback and record channels of one client.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use super::channels::Context;
use crate::{
    audio::{
        PlaybackHandle, Sound,
        codec::Decoder,
        playback::{PACKET_TIME, Playback, State},
        record::Record,
    },
    proto::{
        DecodeError,
        channel::{BaseMessage, put_ping},
        framing::Framer,
        link::LinkRequest,
        playback, record,
        sound::{Mode, RATE, Volume},
    },
};

/// Sound that a client may be given ahead of the time at which it can be heard. Only a server or line
/// that stalled and catches up gets there; what is beyond it would stay in the client's queue for
/// good.
const MOST_AHEAD: Duration = Duration::from_millis(60);
/// Sound of a stream after which a client's sink surely plays. GStreamer's begin only when their own buffer of
/// 200 ms is full, and then stay as late as that made them.
const SETTLED: Duration = Duration::from_millis(500);
/// Silence that is left out then, so that this becomes the store that the client was asked to have; of one that
/// cannot be asked nothing is known, and nothing is left out.
const LEFT_OUT: Duration = Duration::from_millis(110);
/// Answers may differ by this much for that: whoever's line is uneven needs the store.
const UNEVEN: Duration = Duration::from_millis(15);
/// Answers that make an unevenness known; an old one counts a third after as many.
const ANSWERS: u32 = 16;
/// Recorded sound that is taken in a second, and most at once, in frames: a client's clock may be fast and
/// a line may stall, but nobody records three seconds in two.
const RECORD_RATE: f64 = RATE as f64 * 1.5;
const RECORD_BURST: f64 = RATE as f64;
/// What a message counts for at least: the shortest packet of Opus (2.5 ms).
const RECORD_LEAST: usize = RATE as usize / 400;
/// Time between two measurements of the line.
const PING_INTERVAL: Duration = Duration::from_millis(50);
/// An answer that is later than the fastest one by this much means that the line is not keeping up.
const MOST_WAITING: Duration = Duration::from_millis(60);

pub(super) struct PlaybackChannel {
    shared: Arc<Playback>,
    mode: Mode,
    takes_volume: bool,
    takes_latency: bool,
    /// The stream the client was told of.
    stream: Option<u64>,
    /// Number of the packet it gets next.
    next: u64,
    /// When it will have played everything it was given.
    plays_until: Option<Instant>,
    shortening: Shortening,
    volume: Option<Volume>,
    mute: Option<bool>,
    line: Line,
}

impl PlaybackChannel {
    pub(super) fn new(request: &LinkRequest, sound: &Sound) -> Self {
        let has = |cap| request.channel_caps.has(cap);
        let mode = if has(playback::CAP_OPUS) { Mode::Opus } else { Mode::Raw };
        let shared = sound.playback.clone();
        shared.join(mode == Mode::Opus);
        // A client that comes in the middle begins with what comes next.
        let next = shared.state().next;
        Self {
            shared,
            mode,
            takes_volume: has(playback::CAP_VOLUME),
            takes_latency: has(playback::CAP_LATENCY),
            stream: None,
            next,
            plays_until: None,
            shortening: Shortening::default(),
            volume: None,
            mute: None,
            line: Line::default(),
        }
    }

    pub(super) fn message(&mut self, message: BaseMessage) {
        if let BaseMessage::Pong(id) = message
            && let Some(round_trip) = self.line.answered(id, Instant::now())
        {
            self.shared.set_line(round_trip);
        }
    }

    pub(super) fn closed(&self) {
        self.shared.leave(self.mode == Mode::Opus);
    }

    pub(super) fn serve(&mut self, framer: &mut Framer, context: &mut Context<'_>) {
        let now = Instant::now();
        // Otherwise packets wait where they are, grow old and are forgotten.
        let room = context.out.is_empty() && !self.line.is_full(now);
        let shared = self.shared.clone();
        let state = shared.state();
        if self.takes_volume && state.volume != self.volume {
            self.volume = state.volume;
            state.volume.into_iter().for_each(|v| playback::put_volume(framer, context.out, v));
        }
        if self.takes_volume && state.mute != self.mute {
            self.mute = state.mute;
            state.mute.into_iter().for_each(|mute| playback::put_mute(framer, context.out, mute));
        }
        if self.stream.is_some() && state.playing != self.stream {
            // What is left of the old stream, unless there is a new one already.
            self.give_packets(&state, room, now, framer, context);
            playback::put_stop(framer, context.out);
            self.stream = None;
        }
        if self.stream.is_none() {
            // Not before the first packet, so that the client does not wait for it in vain.
            let first = state.packet(self.next);
            let (Some(stream), Some((_, packet))) = (state.playing, first) else { return };
            let time = context.time(packet.time);
            playback::put_mode(framer, context.out, time, self.mode);
            playback::put_start(framer, context.out, time);
            if self.takes_latency {
                let store = PlaybackHandle::STORE.as_millis() as u32;
                playback::put_latency(framer, context.out, store);
            }
            self.stream = Some(stream);
            self.plays_until = None;
            self.shortening = Shortening::default();
        }
        self.give_packets(&state, room, now, framer, context);
        if let Some(id) = self.line.ping(now) {
            put_ping(framer, context.out, id);
        }
    }

    fn give_packets(
        &mut self,
        state: &State,
        room: bool,
        now: Instant,
        framer: &mut Framer,
        context: &mut Context<'_>,
    ) {
        while room && let Some((number, packet)) = state.packet(self.next) {
            if number > self.next {
                self.shortening.ran_dry();
            }
            self.next = number + 1;
            let ahead = self.plays_until.map(|until| until.saturating_duration_since(now));
            if ahead.is_some_and(|ahead| ahead >= MOST_AHEAD) {
                continue;
            }
            let data = match (self.mode, &packet.opus) {
                (Mode::Opus, Some(data)) => data,
                // Coded before this client came.
                (Mode::Opus, None) => continue,
                (Mode::Raw, _) => &packet.raw,
            };
            let gap = self
                .plays_until
                .map_or(Duration::ZERO, |until| now.saturating_duration_since(until));
            if gap > self.shortening.least_store() {
                self.shortening.ran_dry();
            }
            let from = self.plays_until.map_or(now, |until| until.max(now));
            let may_go = packet.is_silent && self.takes_latency && self.line.is_even();
            if self.shortening.leaves_out(may_go) {
                self.plays_until = Some(from);
                continue;
            }
            self.plays_until = Some(from + PACKET_TIME);
            playback::put_data(framer, context.out, context.time(packet.time), data);
        }
    }
}

/// What a client has in store beyond what it was asked for becomes less where nobody hears it.
#[derive(Debug, Default)]
struct Shortening {
    given: Duration,
    left_out: Duration,
}

impl Shortening {
    /// The client's sink begins anew.
    fn ran_dry(&mut self) {
        *self = Self::default();
    }

    /// What the client has in store, if its sink began with as much as spice-gtk's.
    fn least_store(&self) -> Duration {
        PlaybackHandle::STORE + LEFT_OUT.saturating_sub(self.left_out)
    }

    /// Whether the next packet is not given, which may be done or not.
    fn leaves_out(&mut self, permitted: bool) -> bool {
        let leaves_out = permitted && self.given >= SETTLED && self.left_out < LEFT_OUT;
        let sum = if leaves_out { &mut self.left_out } else { &mut self.given };
        *sum = sum.saturating_add(PACKET_TIME);
        leaves_out
    }
}

/// Whether a client's line keeps up, by how long its answers take.
#[derive(Debug, Default)]
struct Line {
    /// What was asked and not answered.
    asked: VecDeque<(u32, Instant)>,
    last: u32,
    asked_at: Option<Instant>,
    /// The shortest round trip, which creeps up so that a line that changed is believed.
    fastest: Option<Duration>,
    /// By how much answers were later than the fastest one; an old one counts less and less.
    uneven: Duration,
    answers: u32,
}

impl Line {
    /// Whether answers are known to come at even times.
    fn is_even(&self) -> bool {
        self.answers >= ANSWERS && self.uneven <= UNEVEN
    }

    fn is_full(&self, now: Instant) -> bool {
        match (self.asked.front(), self.fastest) {
            (Some((_, at)), Some(fastest)) => {
                now.saturating_duration_since(*at) > fastest + MOST_WAITING
            }
            _ => false,
        }
    }

    /// The number of a question that is due.
    fn ping(&mut self, now: Instant) -> Option<u32> {
        let due = self.asked_at.is_none_or(|at| now >= at + PING_INTERVAL);
        // A client that does not answer at all is asked once.
        let silent = self.fastest.is_none() && !self.asked.is_empty();
        if !due || silent || self.asked.len() >= 64 {
            return None;
        }
        self.last = self.last.wrapping_add(1);
        self.asked_at = Some(now);
        self.asked.push_back((self.last, now));
        Some(self.last)
    }

    /// The client answered: how long it took.
    fn answered(&mut self, id: u32, now: Instant) -> Option<Duration> {
        let index = self.asked.iter().position(|(asked, _)| *asked == id)?;
        let (_, at) = self.asked.drain(..=index).next_back()?;
        let took = now.saturating_duration_since(at);
        let fastest = self.fastest.unwrap_or(took);
        let late = took.saturating_sub(fastest);
        self.fastest = Some(took.min(fastest + late / 64));
        self.uneven = late.max(self.uneven - self.uneven / ANSWERS);
        self.answers = self.answers.saturating_add(1);
        Some(took)
    }
}

pub(super) struct RecordChannel {
    shared: Arc<Record>,
    session: u32,
    takes_volume: bool,
    /// The client was told to record.
    recording: bool,
    mode: Mode,
    /// Made when the client first says that it needs one.
    decoder: Option<Box<Decoder>>,
    allowance: Allowance,
    /// Messages that were too much.
    dropped: u64,
    volume: Option<Volume>,
    mute: Option<bool>,
}

/// How much sound a client may send now. Decoding it is work on a thread that others need as well.
#[derive(Debug)]
struct Allowance {
    /// Frames; below 0 after one message that was longer than what was left.
    left: f64,
    at: Instant,
}

impl Allowance {
    fn new(now: Instant) -> Self {
        Self { left: RECORD_BURST, at: now }
    }

    /// Whether another message may be looked at.
    fn is_open(&mut self, now: Instant) -> bool {
        let time = now.saturating_duration_since(self.at).as_secs_f64();
        self.left = (self.left + time * RECORD_RATE).min(RECORD_BURST);
        self.at = now;
        self.left > 0.0
    }

    fn charge(&mut self, frames: usize) {
        self.left -= frames.max(RECORD_LEAST) as f64;
    }
}

impl RecordChannel {
    pub(super) fn new(request: &LinkRequest, sound: &Sound, session: u32) -> Self {
        let shared = sound.record.clone();
        shared.join(session);
        Self {
            shared,
            session,
            takes_volume: request.channel_caps.has(record::CAP_VOLUME),
            recording: false,
            mode: Mode::Raw,
            decoder: None,
            allowance: Allowance::new(Instant::now()),
            dropped: 0,
            volume: None,
            mute: None,
        }
    }

    /// Messages since the last call that were not looked at because there were too many.
    pub(super) fn take_dropped(&mut self) -> u64 {
        std::mem::take(&mut self.dropped)
    }

    pub(super) fn message(
        &mut self,
        message: record::ClientMessage<'_>,
    ) -> Result<(), DecodeError> {
        match message {
            record::ClientMessage::Mode(mode) => {
                self.mode = mode;
                self.decoder = None;
            }
            // What was on its way when recording ended.
            record::ClientMessage::Data(_) if !self.recording => {}
            record::ClientMessage::Data(_) if !self.allowance.is_open(Instant::now()) => {
                self.dropped += 1;
            }
            record::ClientMessage::Data(data) => match self.mode {
                Mode::Raw => {
                    let (frames, _) = data.as_chunks::<4>();
                    self.allowance.charge(frames.len());
                    let frames = frames.iter().map(|[a, b, c, d]| {
                        [i16::from_le_bytes([*a, *b]), i16::from_le_bytes([*c, *d])]
                    });
                    self.shared.write(self.session, frames);
                }
                Mode::Opus => {
                    if self.decoder.is_none() {
                        self.decoder = Decoder::new().map(Box::new);
                    }
                    let Some(decoder) = &mut self.decoder else { return Ok(()) };
                    let frames = decoder.decode(data).ok_or(DecodeError::Value("Opus packet"))?;
                    self.allowance.charge(frames.len());
                    self.shared.write(self.session, frames);
                }
            },
            record::ClientMessage::StartMark | record::ClientMessage::Base(_) => {}
        }
        Ok(())
    }

    pub(super) fn serve(&mut self, framer: &mut Framer, context: &mut Context<'_>) {
        let (volume, mute) = self.shared.levels();
        if self.takes_volume && volume != self.volume {
            self.volume = volume;
            volume.into_iter().for_each(|v| record::put_volume(framer, context.out, v));
        }
        if self.takes_volume && mute != self.mute {
            self.mute = mute;
            mute.into_iter().for_each(|mute| record::put_mute(framer, context.out, mute));
        }
        let wanted = self.shared.is_wanted(self.session, |id| context.shared.drives(id));
        if wanted != self.recording {
            self.recording = wanted;
            if wanted {
                record::put_start(framer, context.out);
            } else {
                record::put_stop(framer, context.out);
            }
        }
    }

    pub(super) fn closed(&self) {
        self.shared.leave(self.session);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_sound_is_decoded_than_anybody_records() {
        let start = Instant::now();
        let mut allowance = Allowance::new(start);
        // Packets of `length` frames as fast as they come, for ten seconds.
        for length in [0, 120, 480, 5760] {
            let mut taken = 0;
            for tick in 0..10_000 {
                let now = start + Duration::from_millis(tick);
                for _ in 0..200 {
                    if allowance.is_open(now) {
                        allowance.charge(length);
                        taken += length.max(RECORD_LEAST);
                    }
                }
            }
            let most = RECORD_RATE * 10.0 + RECORD_BURST + 5760.0;
            assert!((taken as f64) < most, "{length}: {taken}");
            allowance = Allowance::new(start);
        }
        // A fast clock, and a line that stalls for half a second each time.
        for second in 0..10 {
            let now = start + Duration::from_secs(second);
            for packet in 0..101 {
                let late = if packet < 50 { 500 } else { packet * 10 };
                assert!(allowance.is_open(now + Duration::from_millis(late)));
                allowance.charge(480);
            }
        }
    }

    #[test]
    fn only_silence_is_left_out_and_only_once() {
        let mut shortening = Shortening::default();
        let mut left_out = |packets: u32, permitted| {
            (0..packets).filter(|_| shortening.leaves_out(permitted)).count()
        };
        assert_eq!(left_out(50, true), 0, "its sink has not begun");
        assert_eq!(left_out(1000, false), 0, "a tone");
        assert_eq!(left_out(5, true), 5);
        assert_eq!(left_out(7, false), 0);
        assert_eq!(left_out(1000, true), 6);
        assert_eq!(shortening.least_store(), PlaybackHandle::STORE);
        shortening.ran_dry();
        assert_eq!(shortening.least_store(), PlaybackHandle::STORE + LEFT_OUT);
        assert_eq!((0..100).filter(|_| shortening.leaves_out(true)).count(), 11);
    }

    #[test]
    fn an_uneven_line_is_known_and_forgotten() {
        let mut line = Line::default();
        let start = Instant::now();
        let mut answer = |number: u64, ms: u64| {
            let now = start + Duration::from_millis(number * 100);
            let id = line.ping(now).unwrap();
            line.answered(id, now + Duration::from_millis(ms));
            line.is_even()
        };
        let answers: Vec<bool> = (0..20).map(|number| answer(number, 10)).collect();
        assert_eq!(answers.iter().position(|even| *even), Some(15), "not before it is known");
        assert!(!answer(20, 45));
        let answers: Vec<bool> = (21..40).map(|number| answer(number, 10)).collect();
        assert!(!answers[5] && answers[18]);
    }

    #[test]
    fn a_line_that_falls_behind_is_noticed_and_a_slower_one_is_believed() {
        let mut line = Line::default();
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let first = line.ping(at(0)).unwrap();
        assert_eq!(line.ping(at(49)), None, "not answered yet");
        assert!(!line.is_full(at(1000)), "nothing is known of a client that never answers");
        assert_eq!(line.answered(first, at(5)), Some(Duration::from_millis(5)));
        let second = line.ping(at(60)).unwrap();
        assert!(!line.is_full(at(120)));
        assert!(line.is_full(at(126)));
        assert!(line.answered(second, at(200)).is_some());
        assert!(!line.is_full(at(200)));
        assert_eq!(line.answered(77, at(200)), None);
        // From here on the way takes 100 ms longer.
        let mut now = 1000;
        while line.fastest.unwrap() < Duration::from_millis(50) {
            let id = line.ping(at(now)).unwrap();
            line.answered(id, at(now + 105));
            now += 200;
            assert!(now < 30_000);
        }
    }
}
