//! A stream: its states (VIRTIO 1.3 §5.14.6.6.1), its buffers and its clock. Knows no guest memory.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use super::{
    pcm::Params,
    protocol::{BAD_MSG, Command, Direction, IO_ERR},
};
use crate::virtio::ring::Chain;

/// How much is read or written at a time.
const SLICE: Duration = Duration::from_millis(10);
/// The shortest time between two looks at a stream, whatever its buffers are.
const MIN_PAUSE: Duration = Duration::from_millis(1);
/// Who was late by more than this does not catch up.
const LOST: Duration = Duration::from_secs(1);

/// Where a stream is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing is known.
    Initial,
    /// Parameters are set, also after a release.
    Set,
    Prepared,
    Running,
    Stopped,
}

/// What the sink or source has to hear after a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Effect {
    Nothing,
    /// With so many frames per second.
    Start(u32),
    Stop,
    /// All buffers go back.
    Release,
}

/// A buffer of the driver.
pub(super) struct Buffer {
    pub(super) chain: Chain,
    /// Bytes of samples in it, a whole number of frames.
    pub(super) bytes: usize,
    /// Number of the stream's frame after its last one.
    end: u64,
}

/// A buffer that was not taken, and its status.
pub(super) struct Refused(pub(super) Chain, pub(super) u32);

/// Frames that are due, as a part of a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Slice {
    /// Which of the waiting buffers.
    pub(super) buffer: usize,
    /// Where in its samples, in bytes.
    pub(super) offset: usize,
    pub(super) frames: usize,
}

#[derive(Debug, Clone, Copy)]
enum Clock {
    /// Stands at this frame.
    Stopped(u64),
    /// Was at this frame then.
    Running(u64, Instant),
}

/// A stream.
pub(super) struct Stream {
    pub(super) direction: Direction,
    state: State,
    params: Option<Params>,
    buffers: VecDeque<Buffer>,
    clock: Clock,
    /// Frames taken from the buffers, or put into them.
    moved: u64,
    /// Frames of all buffers so far.
    queued: u64,
}

impl Stream {
    pub(super) fn new(direction: Direction) -> Self {
        Self {
            direction,
            state: State::Initial,
            params: None,
            buffers: VecDeque::new(),
            clock: Clock::Stopped(0),
            moved: 0,
            queued: 0,
        }
    }

    /// Carries a command out, or says why not.
    pub(super) fn command(&mut self, command: Command, now: Instant) -> Result<Effect, u32> {
        use State::{Initial, Prepared, Running, Set, Stopped};
        match (command, self.state) {
            // Buffers that came after PREPARE have the old format.
            (Command::SetParams(_), Prepared) if !self.buffers.is_empty() => Err(BAD_MSG),
            (Command::SetParams(params), Initial | Set | Prepared) => {
                self.params = Some(params);
                self.state = Set;
                Ok(Effect::Nothing)
            }
            (Command::Prepare, Set | Prepared) => {
                self.state = Prepared;
                Ok(Effect::Nothing)
            }
            (Command::Start, Prepared | Stopped) => {
                self.state = Running;
                self.resume(now);
                Ok(Effect::Start(self.params.map_or(0, |params| params.rate)))
            }
            (Command::Stop, Running) => {
                self.state = Stopped;
                self.clock = Clock::Stopped(self.position(now).min(self.queued));
                Ok(Effect::Stop)
            }
            (Command::Release, Prepared | Stopped) => {
                self.state = Set;
                Ok(Effect::Release)
            }
            _ => Err(BAD_MSG),
        }
    }

    /// Number of waiting buffers.
    pub(super) fn waiting(&self) -> usize {
        self.buffers.len()
    }

    pub(super) fn buffer(&self, index: usize) -> Option<&Buffer> {
        self.buffers.get(index)
    }

    /// The parameters of what [`due`](Self::due) gives.
    pub(super) fn params(&self) -> Option<Params> {
        self.params
    }

    /// Takes a buffer of so many bytes, or gives it back and says why.
    pub(super) fn push(&mut self, chain: Chain, bytes: usize, now: Instant) -> Result<(), Refused> {
        let welcome = matches!(self.state, State::Prepared | State::Running | State::Stopped);
        let Some(params) = self.params.filter(|_| welcome) else {
            return Err(Refused(chain, IO_ERR));
        };
        let frames = bytes / params.frame_bytes();
        if frames == 0 {
            return Err(Refused(chain, BAD_MSG));
        }
        self.queued += frames as u64;
        self.buffers.push_back(Buffer {
            chain,
            bytes: frames * params.frame_bytes(),
            end: self.queued,
        });
        if self.state == State::Running {
            self.resume(now);
        }
        Ok(())
    }

    /// Takes all buffers back, each with how many bytes of it were moved; the stream begins anew.
    pub(super) fn take_all(&mut self) -> Vec<(Buffer, usize)> {
        let moved: Vec<usize> = self.buffers.iter().map(|buffer| self.progress(buffer)).collect();
        (self.moved, self.queued) = (0, 0);
        self.clock = Clock::Stopped(0);
        std::mem::take(&mut self.buffers).into_iter().zip(moved).collect()
    }

    /// How much of a buffer was moved, in bytes.
    fn progress(&self, buffer: &Buffer) -> usize {
        let frame = self.params.map_or(1, |params| params.frame_bytes());
        let left = usize::try_from(buffer.end.saturating_sub(self.moved)).unwrap_or(usize::MAX);
        buffer.bytes.saturating_sub(left.saturating_mul(frame))
    }

    /// Lets a clock go on that stands because there was nothing to do.
    fn resume(&mut self, now: Instant) {
        if let Clock::Stopped(frame) = self.clock
            && !self.buffers.is_empty()
        {
            self.clock = Clock::Running(frame, now);
        }
    }

    fn rate(&self) -> u64 {
        self.params.map_or(1, |params| params.rate.into())
    }

    fn frames(&self, time: Duration) -> u64 {
        (time.as_nanos() * u128::from(self.rate()) / 1_000_000_000) as u64
    }

    /// The frame that a sound card would be at.
    fn position(&self, now: Instant) -> u64 {
        match self.clock {
            Clock::Stopped(frame) => frame,
            Clock::Running(frame, then) => frame + self.frames(now.saturating_duration_since(then)),
        }
    }

    /// When the clock, which runs, gets to a frame.
    fn time_of(&self, frame: u64) -> Option<Instant> {
        let Clock::Running(begin, then) = self.clock else { return None };
        let nanos = u128::from(frame.saturating_sub(begin)) * 1_000_000_000;
        // Rounded up, so that the frame is due then.
        let nanos = nanos.div_ceil(u128::from(self.rate()));
        then.checked_add(Duration::from_nanos(u64::try_from(nanos).ok()?))
    }

    /// Frames of a slice.
    fn slice(&self) -> u64 {
        self.frames(SLICE).max(1)
    }

    /// What is played is read a slice ahead: it is on its way for longer than that.
    fn lead(&self) -> u64 {
        match self.direction {
            Direction::Output => self.slice(),
            Direction::Input => 0,
        }
    }

    /// The next frames to be moved by now.
    pub(super) fn due(&mut self, now: Instant) -> Option<Slice> {
        let position = self.position(now);
        if position > self.moved + self.frames(LOST) {
            self.clock = Clock::Running(self.moved, now);
            return None;
        }
        if matches!(self.clock, Clock::Stopped(_)) {
            return None;
        }
        let buffer = self.buffers.iter().position(|buffer| buffer.end > self.moved)?;
        let from = self.buffers.get(buffer)?;
        let target = position + self.lead();
        let slice = self.slice();
        // In whole slices, and to the end of a buffer.
        let until = if target >= from.end { from.end } else { target - target % slice };
        let until = until.min(self.moved + slice);
        let frames = until.checked_sub(self.moved).filter(|frames| *frames > 0)?;
        let offset = self.progress(from);
        Some(Slice { buffer, offset, frames: frames as usize })
    }

    /// A slice was moved.
    pub(super) fn moved(&mut self, slice: Slice) {
        self.moved += slice.frames as u64;
    }

    /// The next buffer that a sound card would be done with by now.
    pub(super) fn finished(&mut self, now: Instant) -> Option<Buffer> {
        let position = self.position(now).min(self.moved);
        self.buffers.pop_front_if(|buffer| buffer.end <= position)
    }

    /// To be called when nothing is due any more: when to look again. A stream that has no buffers
    /// stands still until there are some.
    pub(super) fn next_time(&mut self, now: Instant) -> Option<Instant> {
        if matches!(self.clock, Clock::Stopped(_)) {
            return None;
        }
        let Some(first) = self.buffers.front() else {
            self.clock = Clock::Stopped(self.queued);
            return None;
        };
        let mut next = first.end;
        if self.moved < self.queued {
            let slice = (self.moved / self.slice() + 1) * self.slice();
            next = next.min(slice.min(self.queued).saturating_sub(self.lead()));
        }
        Some(self.time_of(next)?.max(now + MIN_PAUSE))
    }
}
