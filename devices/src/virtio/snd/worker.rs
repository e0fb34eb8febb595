//! The queues of the sound device (VIRTIO 1.3 §5.14.2).

use std::{
    io::{Read, Write},
    os::fd::OwnedFd,
    sync::Arc,
    time::{Duration, Instant},
};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use rustix::time::{Itimerspec, TimerfdTimerFlags, Timespec, timerfd_settime};

use super::{
    Frame,
    device::Link,
    protocol::{BAD_MSG, Command, Direction, MAX_REQUEST, OK, Request, request, status},
    stream::{Buffer, Effect, Refused, Slice, Stream},
};
use crate::{
    GuestMemory,
    virtio::ring::{Chain, Ring},
};

/// Queues by index; the event queue is never used.
const CONTROL: u16 = 0;
const TX: u16 = 2;
const RX: u16 = 3;
/// Event data of the timer, next to the indices of the queues.
const TIMER: u32 = u32::MAX;
/// Requests served before other events get their turn.
const BATCH: usize = 64;
/// Bytes of `virtio_snd_pcm_xfer` and `virtio_snd_pcm_status` (§5.14.6.8).
const XFER: usize = 4;
const STATUS: usize = 8;
/// Most buffers of a stream that wait: more than the queue has entries are none of an honest driver.
pub(super) const MAX_BUFFERS: usize = 256;

/// The subscriber of the worker thread.
pub(super) struct SoundWorker {
    rings: Vec<Ring>,
    streams: [Stream; 2],
    link: Arc<Link>,
    memory: Arc<GuestMemory>,
    timer: OwnedFd,
    /// Reused for every slice.
    frames: Vec<Frame>,
    bytes: Vec<u8>,
}

impl SoundWorker {
    pub(super) fn new(
        rings: Vec<Ring>,
        link: Arc<Link>,
        memory: Arc<GuestMemory>,
        timer: OwnedFd,
    ) -> Self {
        let streams = [Direction::Output, Direction::Input].map(Stream::new);
        Self { rings, streams, link, memory, timer, frames: Vec::new(), bytes: Vec::new() }
    }

    // ---- control ----

    fn serve_control(&mut self) {
        let memory = self.memory.clone();
        for _ in 0..BATCH {
            let Some(ring) = find(&mut self.rings, CONTROL) else { return };
            let Some(chain) = ring.pop() else { break };
            let Some(mut reader) = ring.reader(&chain, &memory) else { return };
            let mut bytes = [0; MAX_REQUEST];
            let length = reader.available_bytes().min(MAX_REQUEST);
            let bytes = bytes.get_mut(..length).unwrap_or_default();
            if reader.read_exact(bytes).is_err() {
                return ring.fail("a request cannot be read");
            }
            let answer = match request(bytes) {
                Request::Answer(answer) => answer,
                Request::Stream(direction, command) => {
                    if command == Command::Release {
                        // What the driver has made available by now is released as well.
                        self.serve_buffers(direction);
                    }
                    let stream = &mut self.streams[direction as usize];
                    let done = stream.command(command, Instant::now());
                    tracing::debug!(?direction, ?command, ?done, "sound");
                    match done {
                        Ok(effect) => {
                            self.carry_out(direction, effect);
                            status(OK)
                        }
                        Err(code) => status(code),
                    }
                }
            };
            let Some(ring) = find(&mut self.rings, CONTROL) else { return };
            let Some(mut writer) = ring.writer(&chain, &memory) else { return };
            // Where the whole answer has no room, the driver hears that at least.
            let fits = answer.len() <= writer.available_bytes();
            let answer = if fits { answer } else { status(BAD_MSG) };
            let written = writer.write_all(&answer).map_or(0, |()| answer.len() as u32);
            ring.push_used(chain.head_index(), written);
        }
        let Some(ring) = find(&mut self.rings, CONTROL) else { return };
        ring.notify_driver();
        if ring.enable_kicks() {
            ring.come_back();
        }
    }

    fn carry_out(&mut self, direction: Direction, effect: Effect) {
        match effect {
            Effect::Nothing => {}
            Effect::Start(rate) => self.link.start(direction, rate),
            Effect::Stop => self.link.stop(direction),
            Effect::Release => {
                let Some(ring) = find(&mut self.rings, queue(direction)) else { return };
                for (buffer, moved) in self.streams[direction as usize].take_all() {
                    let moved = if direction == Direction::Input { moved } else { 0 };
                    finish(ring, &self.memory, &buffer.chain, moved, OK, 0);
                }
                ring.notify_driver();
            }
        }
    }

    // ---- buffers ----

    /// Takes buffers of a stream.
    fn serve_buffers(&mut self, direction: Direction) {
        let memory = self.memory.clone();
        let Some(ring) = find(&mut self.rings, queue(direction)) else { return };
        let stream = &mut self.streams[direction as usize];
        let mut refused = false;
        for _ in 0..BATCH {
            let Some(chain) = ring.pop() else { break };
            if stream.waiting() >= MAX_BUFFERS {
                return ring.fail("there are more buffers than the queue has room for");
            }
            let Some(bytes) = room(ring, &memory, &chain, direction) else { return };
            let taken = match bytes {
                Ok(bytes) => stream.push(chain, bytes, Instant::now()),
                Err(code) => Err(Refused(chain, code)),
            };
            if let Err(Refused(chain, code)) = taken {
                finish(ring, &memory, &chain, 0, code, 0);
                refused = true;
            }
        }
        if refused {
            ring.notify_driver();
        }
        if ring.enable_kicks() {
            ring.come_back();
        }
    }

    /// Moves what is due by now, and gives back what a sound card would be done with.
    fn run(&mut self, direction: Direction) {
        let now = Instant::now();
        while let Some(slice) = self.streams[direction as usize].due(now) {
            if !self.carry(direction, slice) {
                return;
            }
            self.streams[direction as usize].moved(slice);
        }
        let stream = &mut self.streams[direction as usize];
        let Some(ring) = find(&mut self.rings, queue(direction)) else { return };
        let mut any = false;
        while let Some(Buffer { chain, bytes, .. }) = stream.finished(now) {
            let (written, latency) = match (direction, stream.params()) {
                (Direction::Output, Some(params)) => (0, params.bytes_in(self.link.latency())),
                _ => (bytes, 0),
            };
            finish(ring, &self.memory, &chain, written, OK, latency);
            any = true;
        }
        if any {
            ring.notify_driver();
        }
    }

    /// Carries samples from a buffer to the sink, or from the source into one. `false` after a
    /// violation.
    fn carry(&mut self, direction: Direction, slice: Slice) -> bool {
        let stream = &self.streams[direction as usize];
        let (Some(params), Some(buffer)) = (stream.params(), stream.buffer(slice.buffer)) else {
            return false;
        };
        let Some(ring) = find(&mut self.rings, queue(direction)) else { return false };
        self.frames.clear();
        self.bytes.clear();
        match direction {
            Direction::Output => {
                let Some(mut reader) = ring.reader(&buffer.chain, &self.memory) else {
                    return false;
                };
                self.bytes.resize(slice.frames * params.frame_bytes(), 0);
                let read = reader
                    .split_at(XFER + slice.offset)
                    .map_err(|_| ())
                    .and_then(|mut rest| rest.read_exact(&mut self.bytes).map_err(|_| ()));
                if read.is_err() {
                    ring.fail("a buffer cannot be read");
                    return false;
                }
                params.decode(&self.bytes, &mut self.frames);
                self.link.play(&self.frames);
            }
            Direction::Input => {
                self.frames.resize(slice.frames, [0, 0]);
                self.link.capture(&mut self.frames);
                params.encode(&self.frames, &mut self.bytes);
                let Some(mut writer) = ring.writer(&buffer.chain, &self.memory) else {
                    return false;
                };
                let written = writer
                    .split_at(slice.offset)
                    .map_err(|_| ())
                    .and_then(|mut rest| rest.write_all(&self.bytes).map_err(|_| ()));
                if written.is_err() {
                    ring.fail("a buffer cannot be written");
                    return false;
                }
            }
        }
        true
    }

    /// Sets the timer to when there is something to do.
    fn arm(&mut self) {
        let now = Instant::now();
        let next = self.streams.iter_mut().filter_map(|stream| stream.next_time(now)).min();
        // Zero would switch the timer off.
        let pause = next.map_or(Duration::ZERO, |next| {
            next.saturating_duration_since(now).max(Duration::from_nanos(1))
        });
        let value =
            Timespec { tv_sec: pause.as_secs() as i64, tv_nsec: pause.subsec_nanos().into() };
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
        if let Err(error) = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once) {
            tracing::error!(%error, "the sound device's timer cannot be set");
        }
    }
}

/// Which queue a stream's buffers come on.
fn queue(direction: Direction) -> u16 {
    match direction {
        Direction::Output => TX,
        Direction::Input => RX,
    }
}

fn find(rings: &mut [Ring], index: u16) -> Option<&mut Ring> {
    rings.iter_mut().find(|ring| ring.index() == index)
}

/// The bytes for samples in a chain, or the status it gets. `None` after a violation.
fn room(
    ring: &mut Ring,
    memory: &GuestMemory,
    chain: &Chain,
    direction: Direction,
) -> Option<Result<usize, u32>> {
    let mut reader = ring.reader(chain, memory)?;
    let writable = ring.writer(chain, memory)?.available_bytes();
    let mut header = [0; XFER];
    if reader.read_exact(&mut header).is_err() || writable < STATUS {
        return Some(Err(BAD_MSG));
    }
    if super::protocol::direction(u32::from_le_bytes(header)) != Some(direction) {
        return Some(Err(BAD_MSG));
    }
    Some(Ok(match direction {
        Direction::Output => reader.available_bytes(),
        Direction::Input => writable - STATUS,
    }))
}

/// Gives a chain back with its status at its very end, after `written` bytes of samples.
fn finish(
    ring: &mut Ring,
    memory: &GuestMemory,
    chain: &Chain,
    written: usize,
    code: u32,
    latency: u32,
) {
    let Some(mut writer) = ring.writer(chain, memory) else { return };
    let length = match writer.available_bytes().checked_sub(STATUS) {
        Some(at) => {
            let mut status = [0; STATUS];
            status[..4].copy_from_slice(&code.to_le_bytes());
            status[4..].copy_from_slice(&latency.to_le_bytes());
            let put = writer
                .split_at(at)
                .map_err(|_| ())
                .and_then(|mut end| end.write_all(&status).map_err(|_| ()));
            if put.is_ok() { written + STATUS } else { 0 }
        }
        None => 0,
    };
    ring.push_used(chain.head_index(), length as u32);
}

impl MutEventSubscriber for SoundWorker {
    fn process(&mut self, events: Events, _: &mut EventOps<'_>) {
        if events.data() == TIMER {
            // The event says that it is readable, and nobody else reads it.
            let _ = rustix::io::read(&self.timer, &mut [0u8; 8]);
        } else if let Some(ring) = find(&mut self.rings, events.data() as u16) {
            ring.take_kick();
        }
        match events.data() as u16 {
            // What a buffer is for may be told by a request that came before it.
            TX | RX => {
                self.serve_control();
                self.serve_buffers(Direction::Output);
                self.serve_buffers(Direction::Input);
            }
            CONTROL => self.serve_control(),
            _ => {}
        }
        self.run(Direction::Output);
        self.run(Direction::Input);
        self.arm();
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        for ring in &self.rings {
            ring.register(ops, ring.index().into());
        }
        if let Err(error) = ops.add(Events::with_data(&self.timer, TIMER, EventSet::IN)) {
            tracing::error!(%error, "the sound device's timer cannot be watched");
        }
    }
}
