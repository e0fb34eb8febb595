//! Sound to and from spice-gtk: a sine stays a sine.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

#[path = "support/ear.rs"]
mod ear;
mod support;
#[path = "support/tone.rs"]
mod tone;

use std::{
    f64::consts::TAU,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use ear::Ear;
use spice_server::{ClientPolicy, PlaybackHandle, ask_for_short_turns};
use support::{have_client, setup};
use tone::{RATE, TONE, clean, tone};

const TICK: Duration = Duration::from_millis(10);

/// Plays what `frames` makes, given the number of the next frame, for so long: as time goes by, and not
/// before `ears` have got what was played so far. So a busy machine makes it slow and not wrong.
fn play(
    handle: &PlaybackHandle,
    time: Duration,
    ears: &[&Ear],
    mut frames: impl FnMut(usize, usize) -> Vec<[i16; 2]>,
) {
    let before: Vec<usize> = ears.iter().map(|ear| ear.heard()).collect();
    let mut next = Instant::now();
    for tick in 0..(time.as_millis() / TICK.as_millis()) as usize {
        thread::sleep(next.saturating_duration_since(Instant::now()));
        handle.play(&frames(tick * RATE / 100, RATE / 100));
        // What was late is not made good by haste.
        next = if ears.is_empty() { next } else { next.max(Instant::now()) } + TICK;
        for (ear, before) in ears.iter().zip(&before) {
            let all = before + (tick + 1) * RATE / 100;
            support::eventually("the sound at the client", || ear.heard() >= all);
        }
    }
}

#[test]
fn a_cut_sine_is_noticed() {
    let whole: Vec<f64> = tone(0, RATE * 2).iter().map(|frame| frame[0].into()).collect();
    assert!(clean(&whole, 10_000.0, 0.02) > 1.9);
    let cut = |lost: usize| [&whole[..RATE], &whole[RATE + lost..]].concat();
    for lost in [1, 480, 960] {
        let clean = clean(&cut(lost), 10_000.0, 0.02);
        assert!(clean < 1.1, "{lost} samples were lost, but {clean} s are clean");
    }
    let silence = [&whole[..RATE], &[0.0; 100], &whole[RATE + 100..]].concat();
    assert!(clean(&silence, 10_000.0, 0.02) < 1.1);
}

/// One at a time, and again where the machine was busy with something else: sound is real time.
fn take(what: impl Fn() -> Result<(), String>) {
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut said = Vec::new();
    for _ in 0..5 {
        match what() {
            Ok(()) => return,
            Err(why) => said.push(why),
        }
    }
    panic!("five times: {said:?}");
}

/// What clients with raw samples and with Opus get, all processors being busy if `load`.
fn play_a_sine(load: bool) -> Result<(), String> {
    let stop = Arc::new(AtomicBool::new(false));
    let spinners = if load { thread::available_parallelism().unwrap().get() * 2 } else { 0 };
    for _ in 0..spinners {
        let stop = stop.clone();
        thread::spawn(move || while !stop.load(Ordering::Relaxed) {});
    }
    let setup = setup(|builder| builder.sound(true).client_policy(ClientPolicy::Shared));
    let handle = setup.server.playback().unwrap();
    let ears = [true, false].map(|opus| Ear::new(setup.address(), opus, 1.0));
    ears.iter().for_each(|ear| ear.wait_open(&["PlaybackChannel"]));
    handle.start(RATE as u32);
    let waited_for: Vec<&Ear> = if load { Vec::new() } else { ears.iter().collect() };
    if load {
        ask_for_short_turns().unwrap();
    }
    play(&handle, Duration::from_secs(3), &waited_for, tone);
    handle.stop();
    stop.store(true, Ordering::Relaxed);
    let mut result = Ok(());
    for (ear, what) in ears.into_iter().zip(["Opus", "raw"]) {
        let start = ear.event("start");
        assert_eq!((&start["format"], &start["channels"]), (&1.into(), &2.into()));
        assert_eq!(start["rate"], RATE);
        assert_eq!(ear.event("latency")["ms"], 40);
        ear.event("stop");
        let samples = ear.finish();
        let clean = clean(&samples, 10_000.0, 0.02);
        println!("{what}: {} samples, {clean:.2} s clean", samples.len());
        if samples.len() != RATE * 3 || clean < 2.9 {
            result = Err(format!("{what}: {} samples, {clean:.2} s clean", samples.len()));
        }
    }
    result
}

#[test]
fn a_played_sine_stays_a_sine() {
    if have_client() {
        play_a_sine(false).unwrap();
    }
}

#[test]
#[ignore = "keeps all processors busy"]
fn a_played_sine_stays_a_sine_under_load() {
    if have_client() {
        take(|| play_a_sine(true));
    }
}

#[test]
fn a_client_that_comes_later_hears_the_rest_at_any_rate() {
    if !have_client() {
        return;
    }
    let setup = setup(|builder| builder.sound(true));
    let handle = setup.server.playback().unwrap();
    handle.set_volume([0x8000, 0x4000]);
    handle.set_mute(true);
    handle.start(44_100);
    let sound = |tick: usize| -> Vec<[i16; 2]> {
        let angle = |i: usize| i as f64 * TONE * TAU / 44_100.0;
        let frames = tick * 441..(tick + 1) * 441;
        frames.map(|i| [(10_000.0 * angle(i).sin()) as i16, 0]).collect()
    };
    let mut ticks = 0;
    let mut tick = || {
        handle.play(&sound(ticks));
        ticks += 1;
        thread::sleep(TICK);
    };
    (0..10).for_each(|_| tick());
    let ear = Ear::new(setup.address(), true, 1.0);
    ear.wait_open(&["PlaybackChannel"]);
    support::eventually("sound", || {
        tick();
        ear.heard() > 0
    });
    assert_eq!(ear.event("volume")["channels"], 2);
    assert_eq!(ear.event("mute")["mute"], true);
    assert_eq!(ear.event("start")["rate"], RATE);
    // From here on one after the other; some is on its way through the filter and the coder.
    let began = ear.heard();
    for number in 0..200 {
        tick();
        support::eventually("its sound", || {
            ear.heard() + 2 * RATE / 100 >= began + number * RATE / 100
        });
    }
    let clean = clean(&ear.played()[began..], 10_000.0, 0.02);
    assert!(clean > 1.5, "{clean} s are clean");
}

#[test]
fn one_client_records_for_the_program() {
    if have_client() {
        // Nobody can wait for a microphone: on a busy machine it is a tone now and then.
        take(|| record_a_sine(true, 0.2));
        take(|| record_a_sine(false, 0.2));
    }
}

#[test]
#[ignore = "needs a machine with nothing else to do"]
fn a_recorded_sine_stays_a_sine() {
    if have_client() {
        take(|| record_a_sine(true, 2.5));
        take(|| record_a_sine(false, 2.5));
    }
}

fn record_a_sine(opus: bool, enough: f64) -> Result<(), String> {
    let setup = setup(|builder| builder.sound(true).client_policy(ClientPolicy::Shared));
    let handle = setup.server.record().unwrap();
    // Its clock is 0.1 % faster than ours.
    let ear = Ear::new(setup.address(), opus, 1.001);
    ear.wait_open(&["RecordChannel"]);
    let other = Ear::new(setup.address(), opus, 1.0);
    other.wait_open(&["RecordChannel"]);
    handle.start(RATE as u32);
    let start = ear.event("record-start");
    assert_eq!((&start["channels"], &start["rate"]), (&2.into(), &RATE.into()));
    let mut heard = Vec::new();
    let began = Instant::now();
    for tick in 0..400 {
        thread::sleep((began + TICK * tick).saturating_duration_since(Instant::now()));
        let mut frames = [[0; 2]; RATE / 100];
        handle.read(&mut frames);
        heard.extend(frames.map(|frame| f64::from(frame[0])));
    }
    handle.stop();
    ear.event("record-stop");
    // When the first client goes the other one records.
    handle.start(RATE as u32);
    drop(ear);
    other.event("record-start");
    // Half a percent of 431.7 Hz in 5 ms is 0.07.
    let clean = clean(&heard, 10_000.0, 0.08);
    println!("opus {opus}: {clean:.2} s clean");
    if clean > enough { Ok(()) } else { Err(format!("opus {opus}: {clean:.2} s clean")) }
}

#[test]
fn a_click_arrives_at_once() {
    if !have_client() {
        return;
    }
    let setup = setup(|builder| builder.sound(true));
    let handle = setup.server.playback().unwrap();
    for opus in [true, false] {
        let ear = Ear::new(setup.address(), opus, 1.0);
        ear.wait_open(&["PlaybackChannel"]);
        handle.start(RATE as u32);
        let mut said = Vec::new();
        play(&handle, Duration::from_secs(2), &[&ear], |from, count| {
            // Not silence, of which some is left out.
            let mut frames = vec![[20; 2]; count];
            if (from / count) % 20 == 10 {
                // The clock of Python's time.monotonic().
                let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
                said.push(now.tv_sec as f64 + now.tv_nsec as f64 / 1e9);
                // A burst of 5 ms at the end of the packet, which Opus cannot smooth away.
                for (i, frame) in frames[count / 2..].iter_mut().enumerate() {
                    *frame = [if i / 24 % 2 == 0 { 25_000 } else { -25_000 }; 2];
                }
            }
            frames
        });
        handle.stop();
        let mut late: Vec<f64> =
            said.iter().map(|said| ear.event("loud")["at"].as_f64().unwrap() - said).collect();
        late.sort_by(f64::total_cmp);
        println!(
            "opus {opus}: from play() to the client p50 {:.2} ms, worst {:.2} ms",
            late[late.len() / 2] * 1e3,
            late[late.len() - 1] * 1e3
        );
        assert!(late[0] > 0.0, "{late:?}");
    }
}

/// A client's sink begins late and stays so: silence is where it catches up.
#[test]
fn silence_is_left_out_and_nothing_else() {
    if have_client() {
        [true, false].into_iter().for_each(|opus| take(|| play_silence_and_a_tone(opus)));
    }
}

fn play_silence_and_a_tone(opus: bool) -> Result<(), String> {
    const LEFT_OUT: usize = RATE * 11 / 100;
    let setup = setup(|builder| builder.sound(true));
    let handle = setup.server.playback().unwrap();
    let ear = Ear::new(setup.address(), opus, 1.0);
    ear.wait_open(&["PlaybackChannel"]);
    handle.start(RATE as u32);
    let (mut silence, mut missing) = (0, 0);
    support::eventually("less silence", || {
        handle.play(&[[0; 2]; RATE / 100]);
        silence += RATE / 100;
        thread::sleep(TICK);
        // More often than what is only on its way.
        missing = if ear.heard() + LEFT_OUT <= silence { missing + 1 } else { 0 };
        missing > 20
    });
    play(&handle, Duration::from_secs(1), &[&ear], tone);
    handle.stop();
    ear.event("stop");
    let samples = ear.finish();
    let left_out = (silence + RATE).saturating_sub(samples.len());
    let clean = clean(&samples, 10_000.0, 0.02);
    println!("opus {opus}: of {silence} silent samples {left_out} are missing, {clean:.2} s clean");
    // Once more may be left out after the client ran dry, on a busy machine.
    if (LEFT_OUT..3 * LEFT_OUT).contains(&left_out) && clean > 0.9 {
        Ok(())
    } else {
        Err(format!("{left_out} samples are missing, {clean:.2} s clean"))
    }
}

/// A client that reads nothing costs the others nothing.
#[test]
fn a_client_that_stalls_is_left_behind() {
    if !have_client() {
        return;
    }
    let setup = setup(|builder| builder.sound(true).client_policy(ClientPolicy::Shared));
    let handle = setup.server.playback().unwrap();
    let ear = Ear::new(setup.address(), false, 1.0);
    let stalled = Ear::new(setup.address(), false, 1.0);
    for ear in [&ear, &stalled] {
        ear.wait_open(&["PlaybackChannel"]);
    }
    handle.start(RATE as u32);
    let pid = stalled.pid();
    play(&handle, Duration::from_millis(500), &[&ear, &stalled], tone);
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    play(&handle, Duration::from_secs(3), &[&ear], |from, count| tone(from + RATE / 2, count));
    rustix::process::kill_process(pid, rustix::process::Signal::CONT).unwrap();
    play(&handle, Duration::from_millis(500), &[&ear], |from, count| {
        tone(from + RATE * 7 / 2, count)
    });
    handle.stop();
    ear.event("stop");
    stalled.event("stop");
    let clean = clean(&ear.finish(), 10_000.0, 0.02);
    // What it missed it does not get afterwards, but for what was on the line.
    let heard = stalled.finish().len() as f64 / RATE as f64;
    println!("the one that stalled for 3 s heard {heard:.2} s, the other {clean:.2} s clean");
    assert!(heard < 2.5, "{heard} s");
    assert!(clean > 3.5, "{clean} s are clean");
}
