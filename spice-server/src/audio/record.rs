//! What a client records: a store between its clock and the program's.
//!
//! The client's sound card decides how much comes, the program how much it takes, and no two clocks
//! agree. How much is in store tells who is faster, and the store is read by so much faster or slower
//! (at most half a percent, which nobody hears) that it stays the same.

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard},
};

use super::resample::{Frame, Resampler};
use crate::{
    io::{shared::lock, wake::Wake},
    proto::sound::{RATE, Volume},
};

/// Frames of so many milliseconds.
const fn ms(milliseconds: u32) -> usize {
    (RATE / 1000 * milliseconds) as usize
}

/// How much is in store at first; more after it ran dry, to a limit.
const STORE: (usize, usize) = (ms(30), ms(60));
const STORE_STEP: usize = ms(10);
/// Beyond the store: a client that stalled and catches up. What is older is dropped.
const MOST_BEYOND: usize = ms(60);
/// Reading this long without running dry, the store becomes smaller by a millisecond.
const CALM: usize = ms(10_000);
/// The largest change of speed.
const MAX_CORRECTION: f64 = 0.005;
/// A difference of the store is made good within this many seconds, were it to stay.
const CORRECTION_TIME: f64 = 4.0;
/// The store's level is a mean over about this many seconds.
const MEAN_TIME: f64 = 1.0;

/// Sound on its way from a client to the program.
pub(crate) struct Record {
    io: Arc<Wake>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// While the program records.
    store: Option<Store>,
    /// Sessions that could record, longest connected first.
    sessions: Vec<u32>,
    /// The one that does: the first of those that may.
    recorder: Option<u32>,
    volume: Option<Volume>,
    mute: Option<bool>,
}

struct Store {
    frames: Resampler,
    /// The program's rate.
    rate: u32,
    /// How much there is to be in store.
    target: usize,
    /// How much there was, on the mean.
    level: f64,
    /// Enough came to begin with.
    flows: bool,
    /// Frames read since it ran dry last.
    calm: usize,
}

impl Store {
    fn new(rate: u32) -> Self {
        Self {
            frames: Resampler::new(RATE, rate),
            rate,
            target: STORE.0,
            level: 0.0,
            flows: false,
            calm: 0,
        }
    }

    fn write(&mut self, frames: impl Iterator<Item = Frame>) {
        self.frames.push(frames);
        let beyond = self.frames.waiting().saturating_sub(self.target);
        if beyond > MOST_BEYOND {
            self.frames.skip(beyond);
            self.level = self.target as f64;
        }
    }

    fn read(&mut self, out: &mut [Frame]) {
        out.fill([0, 0]);
        let waiting = self.frames.waiting();
        if !self.flows {
            if waiting < self.target {
                return;
            }
            self.flows = true;
            self.level = waiting as f64;
        }
        let time = out.len() as f64 / f64::from(self.rate);
        self.level += (waiting as f64 - self.level) * (time / MEAN_TIME).min(1.0);
        let error = (self.level - self.target as f64) / f64::from(RATE);
        let correction = error / CORRECTION_TIME;
        self.frames.set_correction(correction.clamp(-MAX_CORRECTION, MAX_CORRECTION));
        let filled = self.frames.pull(out);
        if filled < out.len() {
            // It ran dry: silence, until there is some more in store than before.
            self.flows = false;
            self.target = (self.target + STORE_STEP).min(STORE.1);
            self.calm = 0;
            return;
        }
        self.calm += filled;
        if self.calm >= CALM {
            self.calm = 0;
            self.target = self.target.saturating_sub(ms(1)).max(STORE.0);
        }
    }
}

impl State {
    /// What another client said before is gone.
    fn set_recorder(&mut self, recorder: Option<u32>) {
        self.recorder = recorder;
        if let Some(store) = &mut self.store {
            *store = Store::new(store.rate);
        }
    }
}

impl Record {
    pub(crate) fn new(io: Arc<Wake>) -> Self {
        Self { io, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// A client's channel began.
    pub(crate) fn join(&self, session: u32) {
        self.state().sessions.push(session);
    }

    /// A client's channel ended; the next client takes over, and what the old one said is gone.
    pub(crate) fn leave(&self, session: u32) {
        let mut state = self.state();
        state.sessions.retain(|other| *other != session);
        if state.recorder == Some(session) {
            state.set_recorder(None);
        }
    }

    /// Whether this client is to record; `may` tells who is allowed to.
    pub(crate) fn is_wanted(&self, session: u32, may: impl Fn(u32) -> bool) -> bool {
        let mut state = self.state();
        let recorder = state.sessions.iter().copied().find(|session| may(*session));
        if recorder != state.recorder {
            state.set_recorder(recorder);
        }
        state.store.is_some() && recorder == Some(session)
    }

    /// How loud the client is to record.
    pub(crate) fn levels(&self) -> (Option<Volume>, Option<bool>) {
        let state = self.state();
        (state.volume, state.mute)
    }

    /// Frames from a client.
    pub(crate) fn write(&self, session: u32, frames: impl Iterator<Item = Frame>) {
        let mut state = self.state();
        if state.recorder == Some(session)
            && let Some(store) = &mut state.store
        {
            store.write(frames);
        }
    }
}

/// Where the program records from; cheap to clone, and all clones are the same sound.
#[derive(Clone)]
pub struct RecordHandle(pub(crate) Arc<Record>);

impl fmt::Debug for RecordHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RecordHandle")
            .field("recording", &self.0.state().store.is_some())
            .finish_non_exhaustive()
    }
}

impl RecordHandle {
    /// The program records from now on, with `rate` frames per second (at least 1). The client that
    /// has been connected longest is asked to record.
    pub fn start(&self, rate: u32) {
        self.0.state().store = Some(Store::new(rate.max(1)));
        self.0.io.wake();
    }

    /// Fills `frames` (stereo, left sample first) with what was recorded, or with silence. To be
    /// called as time goes by, best for 10 ms at a time.
    pub fn read(&self, frames: &mut [[i16; 2]]) {
        match &mut self.0.state().store {
            Some(store) => store.read(frames),
            None => frames.fill([0, 0]),
        }
    }

    /// The program no longer records.
    pub fn stop(&self) {
        self.0.state().store = None;
        self.0.io.wake();
    }

    /// Tells the client how loud to record, left and right; 65535 is full.
    pub fn set_volume(&self, volume: [u16; 2]) {
        self.0.state().volume = Some(Volume(volume));
        self.0.io.wake();
    }

    /// Tells the client to record silence, or no longer.
    pub fn set_mute(&self, mute: bool) {
        self.0.state().mute = Some(mute);
        self.0.io.wake();
    }
}

#[cfg(test)]
mod tests {
    use std::f64::consts::TAU;

    use super::*;

    /// A client with a clock of its own says a sine of 500 Hz in packets of 20 ms that come unevenly;
    /// what the program reads in `seconds`.
    fn converse(speed: f64, rate: u32, seconds: u32) -> (Vec<Frame>, Store) {
        let mut store = Store::new(rate);
        let mut heard = Vec::new();
        let mut said = 0usize;
        let piece = (rate / 100) as usize;
        for step in 0..seconds * 100 {
            // Packets wait up to 15 ms somewhere.
            let jitter = f64::from(step.wrapping_mul(2_654_435_761) >> 16 & 0xff) / 255.0 * 0.015;
            let now = f64::from(step) * 0.01 - jitter;
            while (said + 960) as f64 <= now * 48_000.0 * speed {
                store.write((said..said + 960).map(|i| {
                    let angle = i as f64 * 500.0 * TAU / 48_000.0;
                    [(8000.0 * angle.sin()) as i16, 0]
                }));
                said += 960;
            }
            let mut out = vec![[0; 2]; piece];
            store.read(&mut out);
            heard.extend(out);
        }
        (heard, store)
    }

    /// Largest step of a sine's phase per frame that is not the sine's own, in degrees: 8000 sin
    /// moves by no more than its frequency, so a gap or a jump shows as a larger second difference.
    fn roughness(heard: &[Frame]) -> i32 {
        let values: Vec<i32> = heard.iter().map(|frame| frame[0].into()).collect();
        values.windows(3).map(|w| (w[0] - 2 * w[1] + w[2]).abs()).max().unwrap_or(0)
    }

    #[test]
    fn clocks_that_differ_neither_fill_nor_empty_the_store() {
        for speed in [0.999, 1.0, 1.001] {
            let (heard, store) = converse(speed, 48_000, 60);
            let steady = &heard[heard.len() / 2..];
            // 8000 (2 pi 500 / 48000)^2 is 34.
            assert!(roughness(steady) < 60, "{speed}: {}", roughness(steady));
            let loudest = steady.iter().map(|frame| frame[0]).max().unwrap();
            assert!(loudest > 7900);
            let level = store.frames.waiting();
            assert!(level < ms(80), "{speed}: {level} frames");
        }
    }

    #[test]
    fn the_programs_rate_may_be_another() {
        let (heard, _) = converse(1.0, 44_100, 20);
        assert!(roughness(&heard[heard.len() / 2..]) < 65);
    }

    #[test]
    fn what_is_too_old_is_dropped() {
        let mut store = Store::new(48_000);
        store.write(std::iter::repeat_n([1, 1], 480_000));
        assert_eq!(store.frames.waiting(), STORE.0);
    }

    #[test]
    fn the_first_client_records() {
        let record = RecordHandle(Arc::new(Record::new(Arc::new(Wake::new().unwrap()))));
        record.0.join(1);
        record.0.join(2);
        let is_wanted = |session| record.0.is_wanted(session, |_| true);
        assert!(!is_wanted(1), "nobody asked yet");
        record.start(48_000);
        assert!(is_wanted(1) && !is_wanted(2));
        record.0.write(2, std::iter::repeat_n([7, 7], 4800));
        let mut out = [[1; 2]; 480];
        record.read(&mut out);
        assert_eq!(out, [[0, 0]; 480], "only the first one is heard");
        record.0.write(1, std::iter::repeat_n([7, 7], 2400));
        record.read(&mut out);
        assert_eq!(out[479], [7, 7]);
        record.0.leave(1);
        assert!(!record.0.is_wanted(2, |_| false), "it may only watch");
        assert!(is_wanted(2));
        record.read(&mut out);
        assert_eq!(out, [[0, 0]; 480], "what the first one said is gone");
        record.stop();
        assert!(!is_wanted(2));
    }
}
