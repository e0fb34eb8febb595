//! The sound device over real guest memory.

use std::{
    sync::{
        Arc, Mutex,
        mpsc::{Receiver, Sender, channel},
    },
    time::{Duration, Instant},
};

use super::{AudioSink, AudioSource, Frame, SoundHandle, device::Sound};
use crate::virtio::{
    VirtioDevice,
    testing::{Driver, Part},
};

const OK: u32 = 0x8000;
const BAD_MSG: u32 = 0x8001;
const NOT_SUPP: u32 = 0x8002;
const IO_ERR: u32 = 0x8003;
const SET_PARAMS: u32 = 0x101;
const PREPARE: u32 = 0x102;
const RELEASE: u32 = 0x103;
const START: u32 = 0x104;
const STOP: u32 = 0x105;
const CONTROL: usize = 0;
const TX: usize = 2;
const RX: usize = 3;
const OUTPUT: u32 = 0;
const INPUT: u32 = 1;
/// 20 ms of S16 in stereo at 48 kHz.
const PERIOD: u32 = 3840;
const PERIOD_TIME: Duration = Duration::from_millis(20);

#[derive(Debug, PartialEq, Eq)]
enum Event {
    Started(u32),
    Played(Vec<Frame>),
    Stopped,
}

struct Sink(Mutex<Sender<Event>>);

impl Sink {
    fn say(&self, event: Event) {
        let _ = self.0.lock().unwrap().send(event);
    }
}

impl AudioSink for Sink {
    fn start(&self, rate: u32) {
        self.say(Event::Started(rate));
    }

    fn play(&self, frames: &[Frame]) {
        self.say(Event::Played(frames.to_vec()));
    }

    fn stop(&self) {
        self.say(Event::Stopped);
    }

    fn latency(&self) -> Duration {
        Duration::from_millis(50)
    }
}

/// Counts.
#[derive(Default)]
struct Source(Mutex<i16>);

impl AudioSource for Source {
    fn start(&self, rate: u32) {
        assert_eq!(rate, 48_000);
    }

    fn capture(&self, frames: &mut [Frame]) {
        let mut next = self.0.lock().unwrap();
        for frame in frames {
            *frame = [*next, -*next];
            *next += 1;
        }
    }

    fn stop(&self) {
        *self.0.lock().unwrap() = 0;
    }
}

struct Card {
    device: Sound,
    driver: Driver,
    events: Receiver<Event>,
}

fn card() -> Card {
    let (mut device, handle): (Sound, SoundHandle) = Sound::new().unwrap();
    let (sender, events) = channel();
    handle.connect(Arc::new(Sink(Mutex::new(sender))), Arc::<Source>::default());
    let driver = Driver::start(&mut device);
    Card { device, driver, events }
}

impl Card {
    fn request(&mut self, words: &[u32], tail: &[u8]) -> u32 {
        let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.extend(tail);
        let queue = &mut self.driver.queues[CONTROL];
        queue.send(&[Part::Out(&bytes), Part::In(4)]);
        let (_, answer) = queue.wait_used();
        u32::from_le_bytes(answer.try_into().unwrap())
    }

    /// S16 in stereo at 48 kHz.
    fn set_params(&mut self, stream: u32) -> u32 {
        self.request(&[SET_PARAMS, stream, PERIOD * 4, PERIOD, 0], &[2, 5, 7, 0])
    }

    fn prepare(&mut self, stream: u32) {
        assert_eq!(self.set_params(stream), OK);
        assert_eq!(self.request(&[PREPARE, stream], &[]), OK);
    }

    fn send_period(&mut self, samples: &[u8]) {
        self.driver.queues[TX].send(&[
            Part::Out(&OUTPUT.to_le_bytes()),
            Part::Out(samples),
            Part::In(8),
        ]);
    }

    fn offer_period(&mut self) {
        self.driver.queues[RX].send(&[
            Part::Out(&INPUT.to_le_bytes()),
            Part::In(PERIOD),
            Part::In(8),
        ]);
    }

    /// Status and latency of the next buffer that comes back.
    fn status(&mut self, queue: usize) -> (u32, u32) {
        let (_, bytes) = self.driver.queues[queue].wait_used();
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        (word(bytes.len() - 8), word(bytes.len() - 4))
    }

    fn event(&self) -> Event {
        self.events.recv_timeout(Duration::from_secs(120)).unwrap()
    }

    /// What is played next, `count` frames.
    fn played(&self, count: usize) -> Vec<Frame> {
        let mut frames = Vec::new();
        while frames.len() < count {
            match self.event() {
                Event::Played(more) => {
                    assert!((1..=480).contains(&more.len()), "10 ms at most");
                    frames.extend(more);
                }
                other => panic!("{other:?}"),
            }
        }
        frames
    }
}

fn samples(first: i16) -> (Vec<u8>, Vec<Frame>) {
    let frames: Vec<Frame> = (first..first + (PERIOD / 4) as i16).map(|i| [i, -i]).collect();
    (frames.iter().flatten().flat_map(|sample| sample.to_le_bytes()).collect(), frames)
}

#[test]
fn what_is_played_arrives_whole_and_not_before_its_time() {
    let mut card = card();
    card.prepare(OUTPUT);
    let mut wanted = Vec::new();
    for period in 0..4 {
        let (bytes, frames) = samples(period * 960);
        card.send_period(&bytes);
        wanted.extend(frames);
    }
    let began = Instant::now();
    assert_eq!(card.request(&[START, OUTPUT], &[]), OK);
    assert_eq!(card.event(), Event::Started(48_000));
    for period in 1..=4 {
        // 50 ms in bytes.
        assert_eq!(card.status(TX), (OK, 9600));
        assert!(began.elapsed() >= PERIOD_TIME * period, "period {period} came too early");
    }
    assert_eq!(card.played(wanted.len()), wanted);
    // The clock stood still meanwhile, and goes on with the next buffer.
    std::thread::sleep(PERIOD_TIME);
    let again = Instant::now();
    let (bytes, frames) = samples(7);
    card.send_period(&bytes);
    assert_eq!(card.status(TX), (OK, 9600));
    assert!(again.elapsed() >= PERIOD_TIME);
    assert_eq!(card.played(960), frames);
    assert_eq!(card.request(&[STOP, OUTPUT], &[]), OK);
    assert_eq!(card.event(), Event::Stopped);
    assert_eq!(card.request(&[RELEASE, OUTPUT], &[]), OK);
}

#[test]
fn what_is_queued_may_still_change() {
    let mut card = card();
    card.prepare(OUTPUT);
    let memory = card.driver.memory.clone();
    let (at, room) = (30 << 20, vm_memory::GuestAddress(29 << 20));
    vm_memory::Bytes::write_obj(&memory, OUTPUT, room).unwrap();
    vm_memory::Bytes::write_slice(&memory, &[1; PERIOD as usize], vm_memory::GuestAddress(at))
        .unwrap();
    let queue = &mut card.driver.queues[TX];
    queue.add_raw(&[(29 << 20, 4, false), (at, PERIOD, false), (31 << 20, 8, true)]);
    queue.kick();
    // A rewind of the driver's: nobody has looked at the buffer before START.
    vm_memory::Bytes::write_slice(&memory, &[0; PERIOD as usize], vm_memory::GuestAddress(at))
        .unwrap();
    assert_eq!(card.request(&[START, OUTPUT], &[]), OK);
    assert_eq!(card.event(), Event::Started(48_000));
    assert_eq!(card.played(960), [[0, 0]; 960]);
}

#[test]
fn what_is_recorded_fills_buffers_in_time() {
    let mut card = card();
    card.prepare(INPUT);
    card.offer_period();
    card.offer_period();
    let began = Instant::now();
    assert_eq!(card.request(&[START, INPUT], &[]), OK);
    let mut next = 0;
    for period in 1..=2 {
        let (_, bytes) = card.driver.queues[RX].wait_used();
        assert!(began.elapsed() >= PERIOD_TIME * period);
        assert_eq!(bytes.len(), PERIOD as usize + 8);
        let (frames, end) = bytes.split_at(PERIOD as usize);
        assert_eq!(end[..4], OK.to_le_bytes());
        for frame in frames.chunks_exact(4) {
            let sample = |at| i16::from_le_bytes([frame[at], frame[at + 1]]);
            assert_eq!((sample(0), sample(2)), (next, -next));
            next += 1;
        }
    }
    assert_eq!(card.request(&[STOP, INPUT], &[]), OK);
    card.offer_period();
    assert_eq!(card.request(&[RELEASE, INPUT], &[]), OK);
    let (_, rest) = card.driver.queues[RX].wait_used();
    assert_eq!(rest.len(), 8, "a release gives all buffers back");
}

#[test]
fn a_release_gives_back_what_waits() {
    let mut card = card();
    card.prepare(OUTPUT);
    let (bytes, _) = samples(0);
    for _ in 0..3 {
        card.send_period(&bytes);
    }
    assert_eq!(card.request(&[RELEASE, OUTPUT], &[]), OK);
    for _ in 0..3 {
        assert!(card.driver.queues[TX].try_used().is_some(), "before the answer");
    }
    card.send_period(&bytes);
    assert_eq!(card.status(TX), (IO_ERR, 0), "not prepared");
    assert_eq!(card.request(&[PREPARE, OUTPUT], &[]), OK, "the parameters are still there");
}

#[test]
fn states_and_mistakes() {
    let mut card = card();
    let (bytes, _) = samples(0);
    card.send_period(&bytes);
    assert_eq!(card.status(TX), (IO_ERR, 0));
    for command in [PREPARE, START, STOP, RELEASE] {
        assert_eq!(card.request(&[command, OUTPUT], &[]), BAD_MSG, "{command:#x} in the beginning");
    }
    assert_eq!(card.request(&[SET_PARAMS, OUTPUT, 7680, 3840, 0], &[2, 6, 7, 0]), NOT_SUPP);
    card.prepare(OUTPUT);
    assert_eq!(card.request(&[STOP, OUTPUT], &[]), BAD_MSG);
    // The wrong stream, no stream, no samples, nowhere to say so.
    for (header, length) in [(&INPUT.to_le_bytes()[..], 100), (&[2, 0, 0, 0], 100), (&[0, 0], 0)] {
        let samples = vec![0; length];
        card.driver.queues[TX].send(&[Part::Out(header), Part::Out(&samples), Part::In(8)]);
        assert_eq!(card.status(TX), (BAD_MSG, 0));
    }
    card.driver.queues[TX].send(&[Part::Out(&[0; 4]), Part::In(8)]);
    assert_eq!(card.status(TX), (BAD_MSG, 0));
    card.driver.queues[TX].send(&[Part::Out(&[0; 100]), Part::In(7)]);
    assert_eq!(card.driver.queues[TX].wait_used().1, []);
    // An answer that has no room.
    let queue = &mut card.driver.queues[CONTROL];
    let info: Vec<u8> = [0x100u32, 0, 2, 32].into_iter().flat_map(u32::to_le_bytes).collect();
    queue.send(&[Part::Out(&info), Part::In(67)]);
    assert_eq!(queue.wait_used().1, BAD_MSG.to_le_bytes());
    queue.send(&[Part::Out(&info), Part::In(68)]);
    assert_eq!(queue.wait_used().1.len(), 68);
    assert!(!card.driver.interrupt.needs_reset());
    assert_eq!(card.request(&[START, OUTPUT], &[]), OK);
    assert_eq!(card.set_params(OUTPUT), BAD_MSG, "it runs");
}

#[test]
fn a_reset_ends_everything() {
    let mut card = card();
    card.prepare(OUTPUT);
    let (bytes, _) = samples(0);
    for _ in 0..50 {
        card.send_period(&bytes);
    }
    assert_eq!(card.request(&[START, OUTPUT], &[]), OK);
    assert_eq!(card.event(), Event::Started(48_000));
    card.device.reset();
    let last = card.events.try_iter().last();
    assert_eq!(last, Some(Event::Stopped));
    card.driver = Driver::start(&mut card.device);
    assert_eq!(card.request(&[PREPARE, OUTPUT], &[]), BAD_MSG, "nothing is left");
    card.prepare(OUTPUT);
}

#[test]
fn configuration_space() {
    let (device, _) = Sound::new().unwrap();
    let mut space = [0xff; 16];
    device.read_config(0, &mut space);
    assert_eq!(space, [0, 0, 0, 0, 2, 0, 0, 0, 2, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
    let mut word = [0; 4];
    device.read_config(4, &mut word);
    assert_eq!(word, [2, 0, 0, 0]);
}
