//! What the program plays: cut into packets, each coded once, kept for a moment for the clients.
//!
//! Clients take packets at their own pace from the newest few. One that stalls misses what is no
//! longer there, and costs the others nothing.

use std::{
    collections::VecDeque,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use super::{
    codec::Encoder,
    resample::{Frame, Resampler},
};
use crate::{
    io::{shared::lock, wake::Wake},
    proto::sound::{PACKET_FRAMES, RATE, Volume},
};

/// Time that a packet lasts.
pub(crate) const PACKET_TIME: Duration = Duration::from_millis(10);
/// Packets kept: what a client may be late before it misses something.
const KEPT: usize = 6;
/// A difference to the clock that is a pause, and not a thread that was late.
const PAUSE: Duration = Duration::from_millis(50);

/// Samples that nobody hears, where they end or begin: 72 dB below full.
const INAUDIBLE: u16 = 8;

/// 10 ms of sound.
#[derive(Debug, Clone)]
pub(crate) struct Packet {
    /// When its first frame was played.
    pub(crate) time: Instant,
    /// Little-endian samples.
    pub(crate) raw: Arc<[u8]>,
    /// While a client that understands it is there.
    pub(crate) opus: Option<Arc<[u8]>>,
    /// Nobody would miss it.
    pub(crate) is_silent: bool,
}

/// Sound on its way from the program to the clients.
pub(crate) struct Playback {
    io: Arc<Wake>,
    state: Mutex<State>,
    maker: Mutex<Maker>,
    /// Open playback channels, and those of them that take Opus.
    listeners: AtomicUsize,
    opus_listeners: AtomicUsize,
}

#[derive(Default)]
pub(crate) struct State {
    /// Number of the stream that plays; streams are counted from 1.
    pub(crate) playing: Option<u64>,
    streams: u64,
    pub(crate) volume: Option<Volume>,
    pub(crate) mute: Option<bool>,
    /// Number of the packet that comes next.
    pub(crate) next: u64,
    /// Of the stream that plays, or else of the last one.
    packets: VecDeque<Packet>,
    /// From the newest answers of the clients: how long a packet is on its way to the one that
    /// answered last.
    line: Option<Duration>,
}

impl State {
    /// Packet `number`, or the oldest one there is after it, with its own number.
    pub(crate) fn packet(&self, number: u64) -> Option<(u64, &Packet)> {
        let oldest = self.next - self.packets.len() as u64;
        let number = number.max(oldest);
        let packet = self.packets.get(usize::try_from(number - oldest).ok()?)?;
        Some((number, packet))
    }
}

/// The program's side.
#[derive(Default)]
struct Maker {
    /// Between the program's rate and [`RATE`], if they differ.
    resampler: Option<Resampler>,
    playing: bool,
    /// Frames that do not fill a packet yet.
    frames: Vec<Frame>,
    opus: Option<Encoder>,
    /// When the packet to come begins.
    time: Option<Instant>,
}

impl Playback {
    pub(crate) fn new(io: Arc<Wake>) -> Self {
        Self {
            io,
            state: Mutex::default(),
            maker: Mutex::default(),
            listeners: AtomicUsize::new(0),
            opus_listeners: AtomicUsize::new(0),
        }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// A client's channel began.
    pub(crate) fn join(&self, opus: bool) {
        self.listeners.fetch_add(1, Ordering::AcqRel);
        self.opus_listeners.fetch_add(opus.into(), Ordering::AcqRel);
    }

    /// A client's channel ended.
    pub(crate) fn leave(&self, opus: bool) {
        self.listeners.fetch_sub(1, Ordering::AcqRel);
        self.opus_listeners.fetch_sub(opus.into(), Ordering::AcqRel);
    }

    /// A client's answer took so long.
    pub(crate) fn set_line(&self, round_trip: Duration) {
        self.state().line = Some(round_trip / 2);
    }

    fn start(&self, rate: u32) {
        let mut maker = lock(&self.maker);
        *maker = Maker {
            resampler: (rate != RATE).then(|| Resampler::new(rate, RATE)),
            playing: true,
            ..Maker::default()
        };
        let mut state = self.state();
        state.streams += 1;
        state.playing = Some(state.streams);
        state.packets.clear();
        drop(state);
        self.io.wake();
    }

    fn stop(&self) {
        let mut maker = lock(&self.maker);
        if maker.playing {
            *maker = Maker::default();
            self.state().playing = None;
            self.io.wake();
        }
    }

    fn play(&self, frames: &[Frame], now: Instant) {
        let mut maker = lock(&self.maker);
        if !maker.playing {
            return;
        }
        if self.listeners.load(Ordering::Acquire) == 0 {
            maker.rest();
            return;
        }
        let opus = self.opus_listeners.load(Ordering::Acquire) > 0;
        let packets = maker.take(frames, opus, now);
        if packets.is_empty() {
            return;
        }
        let mut state = self.state();
        for packet in packets {
            if state.packets.len() >= KEPT {
                state.packets.pop_front();
            }
            state.packets.push_back(packet);
            state.next += 1;
        }
        drop(state);
        self.io.wake();
    }
}

impl Maker {
    /// Nobody listens.
    fn rest(&mut self) {
        self.frames.clear();
        self.opus = None;
        self.time = None;
        if let Some(resampler) = &mut self.resampler {
            resampler.clear();
        }
    }

    fn take(&mut self, frames: &[Frame], opus: bool, now: Instant) -> Vec<Packet> {
        match &mut self.resampler {
            None => self.frames.extend_from_slice(frames),
            Some(resampler) => {
                resampler.push(frames.iter().copied());
                let mut piece = [[0; 2]; PACKET_FRAMES];
                loop {
                    let count = resampler.pull(&mut piece);
                    self.frames.extend_from_slice(piece.get(..count).unwrap_or_default());
                    if count < piece.len() {
                        break;
                    }
                }
            }
        }
        if opus && self.opus.is_none() {
            self.opus = Encoder::new();
        } else if !opus {
            self.opus = None;
        }
        let mut packets = Vec::new();
        while let Some((frames, _)) = self.frames.split_at_checked(PACKET_FRAMES) {
            // The samples themselves are the clock, unless there was a pause.
            let began = now.checked_sub(PACKET_TIME).unwrap_or(now);
            let time = match self.time {
                Some(time) if began.saturating_duration_since(time) < PAUSE => time,
                Some(time) => began.max(time),
                None => began,
            };
            self.time = Some(time + PACKET_TIME);
            let raw: Vec<u8> =
                frames.iter().flatten().flat_map(|sample| sample.to_le_bytes()).collect();
            let opus = self.opus.as_mut().and_then(|encoder| encoder.encode(frames));
            let is_silent =
                frames.iter().flatten().all(|sample| sample.unsigned_abs() <= INAUDIBLE);
            packets.push(Packet { time, raw: raw.into(), opus: opus.map(Arc::from), is_silent });
            self.frames.drain(..PACKET_FRAMES);
        }
        packets
    }
}

/// Where the program plays to; cheap to clone, and all clones are the same sound.
///
/// Encoding (Opus, some 40 µs for 10 ms) is done on the calling thread, and only while somebody
/// listens.
#[derive(Clone)]
pub struct PlaybackHandle(pub(crate) Arc<Playback>);

impl fmt::Debug for PlaybackHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.0.state();
        f.debug_struct("PlaybackHandle")
            .field("playing", &state.playing.is_some())
            .field("listeners", &self.has_listeners())
            .finish()
    }
}

impl PlaybackHandle {
    /// What the client is asked to have in store against the network's unevenness.
    pub(crate) const STORE: Duration = Duration::from_millis(40);

    /// Sound begins, with `rate` frames per second (at least 1).
    pub fn start(&self, rate: u32) {
        self.0.start(rate.max(1));
    }

    /// Plays stereo frames, left sample first. To be called as time goes by on the system's
    /// monotonic clock, best with 10 ms at a time: what comes faster than it can be heard is
    /// dropped. Frames that come without [`start`](Self::start) are dropped.
    pub fn play(&self, frames: &[[i16; 2]]) {
        self.0.play(frames, Instant::now());
    }

    /// Sound ends.
    pub fn stop(&self) {
        self.0.stop();
    }

    /// Tells the clients how loud to play, left and right; 65535 is full.
    pub fn set_volume(&self, volume: [u16; 2]) {
        self.0.state().volume = Some(Volume(volume));
        self.0.io.wake();
    }

    /// Tells the clients to be silent, or no longer.
    pub fn set_mute(&self, mute: bool) {
        self.0.state().mute = Some(mute);
        self.0.io.wake();
    }

    /// Whether a client would hear something.
    pub fn has_listeners(&self) -> bool {
        self.0.listeners.load(Ordering::Acquire) > 0
    }

    /// How long it takes, roughly, until what is played now is heard; zero if nobody listens.
    pub fn latency(&self) -> Duration {
        if !self.has_listeners() {
            return Duration::ZERO;
        }
        PACKET_TIME + self.0.state().line.unwrap_or_default() + Self::STORE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn playback() -> Playback {
        Playback::new(Arc::new(Wake::new().unwrap()))
    }

    #[test]
    fn the_newest_packets_are_kept_and_numbered() {
        let playback = playback();
        playback.join(true);
        playback.start(RATE);
        let now = Instant::now();
        for step in 0..20u32 {
            playback.play(&[[step as i16, 0]; PACKET_FRAMES], now + PACKET_TIME * step);
        }
        let state = playback.state();
        assert_eq!(state.next, 20);
        let (number, packet) = state.packet(3).unwrap();
        assert_eq!(number, 14, "older ones are gone");
        assert_eq!(packet.raw[..4], [14, 0, 0, 0]);
        assert!(packet.opus.is_some());
        assert_eq!(state.packet(19).unwrap().1.time - packet.time, PACKET_TIME * 5);
        assert!(state.packet(20).is_none());
    }

    #[test]
    fn nothing_is_made_for_nobody() {
        let playback = playback();
        playback.start(RATE);
        playback.play(&[[1, 1]; 4800], Instant::now());
        assert_eq!(playback.state().next, 0);
        playback.join(false);
        playback.play(&[[1, 1]; 4800], Instant::now());
        assert_eq!(playback.state().next, 10);
        assert!(playback.state().packet(9).unwrap().1.opus.is_none());
        playback.stop();
        playback.play(&[[1, 1]; 4800], Instant::now());
        assert_eq!(playback.state().next, 10);
        playback.leave(false);
    }

    #[test]
    fn times_follow_the_samples_and_jump_over_pauses() {
        let mut maker = Maker::default();
        let now = Instant::now();
        let mut times = Vec::new();
        let mut play = |ms: u64| {
            let packets =
                maker.take(&[[0; 2]; PACKET_FRAMES], false, now + Duration::from_millis(ms));
            times.extend(
                packets.into_iter().map(|packet| packet.time.duration_since(now).as_millis()),
            );
        };
        [20, 33, 35, 49, 500].into_iter().for_each(&mut play);
        assert_eq!(times, [10, 20, 30, 40, 490]);
    }

    #[test]
    fn other_rates_become_ours() {
        let playback = playback();
        playback.join(false);
        playback.start(44_100);
        for _ in 0..100 {
            playback.play(&[[100, 100]; 441], Instant::now());
        }
        assert_eq!(playback.state().next, 99, "all but what the filter holds");
    }
}
