//! Configuration space, life cycle and handle of the sound device.

use std::{
    fmt, io,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use rustix::time::{TimerfdClockId, TimerfdFlags, timerfd_create};

use super::{
    AudioSink, AudioSource, Frame,
    protocol::{self, Direction},
    worker::{MAX_BUFFERS, SoundWorker},
};
use crate::virtio::{
    ActivateError, Activation, DeviceType, RING_FEATURES, VirtioDevice, ring::Ring, worker::Worker,
};

/// Control, events, buffers to play, buffers to record into. Linux has up to 16 of these.
const QUEUE_SIZES: [u16; 4] = [64, 64, MAX_BUFFERS as u16, MAX_BUFFERS as u16];

/// Who is at the other ends of the streams.
#[derive(Default)]
pub(super) struct Link(Mutex<Ends>);

#[derive(Default)]
struct Ends {
    sink: Option<Arc<dyn AudioSink>>,
    source: Option<Arc<dyn AudioSource>>,
    /// Frames per second of the streams that run, by their numbers.
    rates: [Option<u32>; 2],
}

impl Link {
    fn ends(&self) -> MutexGuard<'_, Ends> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn start(&self, direction: Direction, rate: u32) {
        let mut ends = self.ends();
        ends.rates[direction as usize] = Some(rate);
        match direction {
            Direction::Output => ends.sink.iter().for_each(|sink| sink.start(rate)),
            Direction::Input => ends.source.iter().for_each(|source| source.start(rate)),
        }
    }

    pub(super) fn stop(&self, direction: Direction) {
        let mut ends = self.ends();
        if ends.rates[direction as usize].take().is_none() {
            return;
        }
        match direction {
            Direction::Output => ends.sink.iter().for_each(|sink| sink.stop()),
            Direction::Input => ends.source.iter().for_each(|source| source.stop()),
        }
    }

    pub(super) fn play(&self, frames: &[Frame]) {
        self.ends().sink.iter().for_each(|sink| sink.play(frames));
    }

    /// `frames` are silent.
    pub(super) fn capture(&self, frames: &mut [Frame]) {
        self.ends().source.iter().for_each(|source| source.capture(frames));
    }

    pub(super) fn latency(&self) -> Duration {
        self.ends().sink.as_ref().map_or(Duration::ZERO, |sink| sink.latency())
    }
}

/// The sound device at run time. Clones are the same device.
#[derive(Clone)]
pub struct SoundHandle(Arc<Link>);

impl fmt::Debug for SoundHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ends = self.0.ends();
        f.debug_struct("SoundHandle")
            .field("playing", &ends.rates[0].is_some())
            .field("recording", &ends.rates[1].is_some())
            .finish()
    }
}

impl SoundHandle {
    /// Says who hears the guest and who speaks to it, in place of those before. Until then nobody
    /// hears it, and it hears silence.
    pub fn connect(&self, sink: Arc<dyn AudioSink>, source: Arc<dyn AudioSource>) {
        let mut ends = self.0.ends();
        if let Some(rate) = ends.rates[Direction::Output as usize] {
            sink.start(rate);
        }
        if let Some(rate) = ends.rates[Direction::Input as usize] {
            source.start(rate);
        }
        (ends.sink, ends.source) = (Some(sink), Some(source));
    }
}

/// The device.
pub(super) struct Sound {
    link: Arc<Link>,
    /// Made ahead: a vCPU's thread, which activates, may not.
    timer: OwnedFd,
    worker: Option<Worker<SoundWorker>>,
}

impl Sound {
    pub(super) fn new() -> io::Result<(Self, SoundHandle)> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        let link = Arc::<Link>::default();
        let handle = SoundHandle(link.clone());
        Ok((Self { link, timer, worker: None }, handle))
    }
}

impl VirtioDevice for Sound {
    fn device_type(&self) -> DeviceType {
        DeviceType::SOUND
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        RING_FEATURES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let skip = usize::try_from(offset).unwrap_or(usize::MAX);
        for (to, from) in data.iter_mut().zip(protocol::config().skip(skip)) {
            *to = from;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, queues, interrupt, .. } = activation;
        let memory = Arc::new(memory);
        let rings = queues
            .into_iter()
            .map(|active| Ring::new("virtio-snd", active, &memory, &interrupt))
            .collect();
        let timer = self
            .timer
            .try_clone()
            .map_err(|error| ActivateError::Host("the sound device's timer", error))?;
        let worker = SoundWorker::new(rings, self.link.clone(), memory, timer);
        let worker = Worker::spawn("vio-sound", worker)
            .map_err(|error| ActivateError::Host("the sound device's worker thread", error))?;
        self.worker = Some(worker);
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(worker) = self.worker.take() {
            worker.stop();
        }
        self.link.stop(Direction::Output);
        self.link.stop(Direction::Input);
    }
}

impl Drop for Sound {
    fn drop(&mut self) {
        self.reset();
    }
}
