//! From the program to the client's loudspeaker: spice-gtk plays with GStreamer to PulseAudio, whose sound card
//! is an empty one, and what that would make audible is recorded.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

#[path = "support/ear.rs"]
mod ear;
mod support;
#[path = "support/tone.rs"]
mod tone;

use std::{
    io::Read,
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use ear::Ear;
use spice_server::{PlaybackHandle, ask_for_short_turns};
use support::{eventually, have, have_client, setup};
use tone::{RATE, clean, tone};

const TICK: Duration = Duration::from_millis(10);
/// Frames of a tick.
const FRAMES: usize = RATE / 100;
/// Milliseconds between two clicks, far more than one takes.
const CLICKS: usize = 500;

/// A PulseAudio of its own, with a sound card that makes no sound, and what it does not make.
struct SoundCard {
    folder: tempfile::TempDir,
    server: Child,
    recorder: Child,
    heard: Arc<Mutex<Heard>>,
}

/// Left samples, and when the first of them was heard.
#[derive(Default)]
struct Heard {
    samples: Vec<f64>,
    began: Option<Instant>,
}

impl Heard {
    /// The card has begun to play these frames. Nobody hears of it too early, but perhaps too late.
    fn push(&mut self, bytes: &[u8], now: Instant) {
        let before = Duration::from_secs_f64(self.samples.len() as f64 / RATE as f64);
        let began = now.checked_sub(before).unwrap();
        self.began = Some(self.began.map_or(began, |known| known.min(began)));
        let frames = bytes.chunks_exact(4);
        self.samples.extend(frames.map(|f| f64::from(i16::from_le_bytes([f[0], f[1]]))));
    }

    /// When clicks were heard.
    fn clicks(&self) -> Vec<Instant> {
        let mut quiet_since = 0;
        let loud = self.samples.iter().enumerate().filter(|(_, sample)| sample.abs() > 12_000.0);
        let onsets = loud.filter_map(|(at, _)| {
            let before = at - std::mem::replace(&mut quiet_since, at);
            (before > RATE / 10).then(|| Duration::from_secs_f64(at as f64 / RATE as f64))
        });
        onsets.map(|at| self.began.unwrap() + at).collect()
    }
}

impl SoundCard {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let server = command("pulseaudio", folder.path())
            .args(["-n", "--daemonize=no", "--exit-idle-time=-1", "--use-pid-file=no"])
            .args(["-L", "module-null-sink sink_name=card rate=48000"])
            .args(["-L", &format!("module-native-protocol-unix socket={}", socket(folder.path()))])
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        eventually("a sound card", || {
            let listed = command("pactl", folder.path()).args(["list", "short", "sinks"]).output();
            String::from_utf8_lossy(&listed.unwrap().stdout).contains("card")
        });
        let mut recorder = command("parec", folder.path())
            .args(["--device=card.monitor", "--raw", "--latency-msec=5", "--rate=48000"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let heard = Arc::new(Mutex::new(Heard::default()));
        let (mut out, kept) = (recorder.stdout.take().unwrap(), heard.clone());
        thread::spawn(move || {
            let mut buffer = [0; 1 << 16];
            while let Ok(count @ 1..) = out.read(&mut buffer) {
                kept.lock().unwrap().push(&buffer[..count], Instant::now());
            }
        });
        eventually("silence", || !heard.lock().unwrap().samples.is_empty());
        Self { folder, server, recorder, heard }
    }

    /// A client that plays to it.
    fn client(&self, address: std::net::SocketAddr, opus: bool) -> Ear {
        let server = format!("unix:{}", socket(self.folder.path()));
        let ear = Ear::with_environment(
            address,
            opus,
            1.0,
            &[("PULSE_SERVER", &server), ("SPEAKER", "")],
        );
        ear.wait_open(&["PlaybackChannel"]);
        ear
    }

    /// What PulseAudio says of the stream that plays.
    fn stream(&self) -> String {
        let listed = command("pactl", self.folder.path()).args(["list", "sink-inputs"]).output();
        let listed = String::from_utf8_lossy(&listed.unwrap().stdout).into_owned();
        let lines = listed.lines().map(str::trim).filter(|line| line.contains("Latency:"));
        lines.collect::<Vec<_>>().join(", ")
    }
}

impl Drop for SoundCard {
    fn drop(&mut self) {
        for child in [&mut self.recorder, &mut self.server] {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn socket(folder: &Path) -> String {
    folder.join("socket").display().to_string()
}

/// A program of PulseAudio that knows nothing but this folder.
fn command(program: &str, folder: &Path) -> Command {
    let mut command = Command::new(program);
    for variable in ["HOME", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "PULSE_RUNTIME_PATH"] {
        command.env(variable, folder);
    }
    command.env("PULSE_SERVER", format!("unix:{}", socket(folder)));
    command
}

fn have_all() -> bool {
    have_client() && ["pulseaudio", "parec", "pactl"].iter().all(|program| have(program))
}

/// Plays so many frames, 10 ms at a time as time goes by; when each of these began.
fn play(handle: &PlaybackHandle, frames: &[[i16; 2]]) -> Vec<Instant> {
    let _ = ask_for_short_turns();
    let begin = Instant::now();
    let ticks = frames.chunks(FRAMES).enumerate();
    ticks
        .map(|(tick, frames)| {
            thread::sleep((begin + TICK * tick as u32).saturating_duration_since(Instant::now()));
            let now = Instant::now();
            handle.play(frames);
            now
        })
        .collect()
}

/// On a machine with something else to do sound is not what it should be, hence not much is asked of it.
#[test]
#[ignore = "needs the packages pulseaudio and pulseaudio-utils, which other clients would start, too"]
fn a_sine_stays_a_sine_in_the_loudspeaker() {
    assert!(have_all());
    let card = SoundCard::new();
    for opus in [true, false] {
        let longest = (0..5).map(|_| hear_a_sine(&card, opus, 2)).find(|longest| *longest > 0.5);
        assert!(longest.is_some(), "Opus {opus}: no tone in five times");
    }
}

/// The longest time of a tone without a crackle, in seconds.
fn hear_a_sine(card: &SoundCard, opus: bool, seconds: usize) -> f64 {
    let setup = setup(|builder| builder.sound(true));
    let handle = setup.server.playback().unwrap();
    let _client = card.client(setup.address(), opus);
    handle.start(RATE as u32);
    let before = card.heard.lock().unwrap().samples.len();
    // Silence first, so that the client has little in store.
    let silence = vec![[0; 2]; RATE * 2];
    play(&handle, &[silence, tone(0, RATE * seconds)].concat());
    handle.stop();
    let heard = card.heard.lock().unwrap().samples[before..].to_vec();
    let longest = clean(&heard, 10_000.0, 0.02);
    println!("Opus {opus}: {longest:.2} s without a crackle");
    longest
}

#[test]
#[ignore = "a bench: needs a machine with nothing else to do"]
fn the_way_to_the_loudspeaker() {
    assert!(have_all());
    let card = SoundCard::new();
    for opus in [true, false] {
        println!("of 10 s: {:.2} s", hear_a_sine(&card, opus, 10));
        let setup = setup(|builder| builder.sound(true));
        let handle = setup.server.playback().unwrap();
        let client = card.client(setup.address(), opus);
        handle.start(RATE as u32);
        *card.heard.lock().unwrap() = Heard::default();
        let mut frames = vec![[0; 2]; RATE * 12];
        let clicks: Vec<usize> = (1..20).map(|click| click * CLICKS / 10).collect();
        for tick in &clicks {
            for (i, frame) in frames[tick * FRAMES..][..FRAMES / 2].iter_mut().enumerate() {
                *frame = [if i / 24 % 2 == 0 { 25_000 } else { -25_000 }; 2];
            }
        }
        let played = play(&handle, &frames);
        println!("Opus {opus}: {}", card.stream());
        handle.stop();
        let heard = card.heard.lock().unwrap().clicks();
        let arrived: Vec<Instant> =
            clicks.iter().map(|_| clock_of(&client.event("loud"))).collect();
        let since = |times: &[Instant]| {
            // A click that was lost is not the next one, late.
            let mut late: Vec<f64> = clicks
                .iter()
                .filter_map(|tick| {
                    let said = played[*tick];
                    let at = times.iter().find(|at| **at > said)?;
                    Some(at.duration_since(said).as_secs_f64() * 1e3)
                })
                .filter(|late| *late < CLICKS as f64)
                .collect();
            assert!(!late.is_empty(), "no click");
            late.sort_by(f64::total_cmp);
            format!("p50 {:.1} ms, worst {:.1} ms", late[late.len() / 2], late[late.len() - 1])
        };
        println!(
            "Opus {opus}: to the client {}, to the loudspeaker {}",
            since(&arrived),
            since(&heard)
        );
    }
}

/// What the client's clock showed, as this process's: both are the system's.
fn clock_of(event: &serde_json::Value) -> Instant {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let now = now.tv_sec as f64 + now.tv_nsec as f64 / 1e9;
    let ago = now - event["at"].as_f64().unwrap();
    Instant::now().checked_sub(Duration::from_secs_f64(ago)).unwrap()
}
