//! A SPICE server that shows a test picture and prints keys and pointer, without any machine behind
//! it: `cargo run -p spice-server --example test-picture -- --listen 127.0.0.1:5930`.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, reason = "example")]

mod picture;

use std::{
    path::PathBuf,
    process::ExitCode,
    sync::{Arc, atomic::Ordering, mpsc},
    time::{Duration, Instant},
};

use picture::{Event, Mode, Picture, Reporter, Scene};
use spice_server::{
    ClientPolicy, DisplayStats, Secret, SpiceServer, TlsConfig, VideoCodecs, WebPage,
};

const USAGE: &str = "\
test-picture [--listen ADDRESS:PORT] [--password-file FILE] [--mode MODE] [--size WxH]
             [--fps N] [--policy exclusive|refuse|shared|view-only] [--whole] [--quiet] [--stats]
             [--sound HZ] [--into FILE --offset BYTES] [--video-codec auto|mjpeg|vp8|h264|off]
             [--tls-cert-file FILE --tls-key-file FILE] [--web FOLDER]
  MODE: moving (default), noise, texture, key, static, window, scroll, typing, film, pan
  --whole: every frame says that everything changed
  --stats: prints every second how many frames there were, and what became of them
  --sound: plays a tone of so many hertz, and prints how loud the client's microphone is
  --into: no server; the frames are written into a file, for another server to show";

struct Options {
    listen: Vec<std::net::SocketAddr>,
    password: Option<PathBuf>,
    mode: Mode,
    size: (u32, u32),
    fps: u32,
    policy: ClientPolicy,
    certificate: Option<PathBuf>,
    key: Option<PathBuf>,
    web: Option<PathBuf>,
    video: VideoCodecs,
    quiet: bool,
    stats: bool,
    whole: bool,
    sound: Option<f64>,
    into: Option<PathBuf>,
    offset: u64,
}

fn options() -> Result<Options, String> {
    let mut options = Options {
        listen: Vec::new(),
        password: None,
        mode: Mode::Moving,
        size: (1024, 768),
        fps: 60,
        policy: ClientPolicy::Exclusive,
        certificate: None,
        key: None,
        web: None,
        video: VideoCodecs::Auto,
        quiet: false,
        stats: false,
        whole: false,
        sound: None,
        into: None,
        offset: 0,
    };
    let mut args = std::env::args().skip(1);
    while let Some(name) = args.next() {
        if name == "--quiet" {
            options.quiet = true;
            continue;
        }
        if name == "--stats" {
            options.stats = true;
            continue;
        }
        if name == "--whole" {
            options.whole = true;
            continue;
        }
        if name == "--help" {
            return Err(USAGE.into());
        }
        let value = args.next().ok_or_else(|| format!("{name} needs a value\n{USAGE}"))?;
        let wrong = |what: &dyn std::fmt::Display| format!("{name} {value}: {what}");
        match name.as_str() {
            "--listen" => options.listen.push(value.parse().map_err(|e| wrong(&e))?),
            "--password-file" => options.password = Some(value.clone().into()),
            "--sound" => options.sound = Some(value.parse().map_err(|e| wrong(&e))?),
            "--into" => options.into = Some(value.clone().into()),
            "--offset" => options.offset = value.parse().map_err(|e| wrong(&e))?,
            "--mode" => options.mode = value.parse().map_err(|e: String| wrong(&e))?,
            "--fps" => options.fps = value.parse().map_err(|e| wrong(&e))?,
            "--size" => {
                let (w, h) = value.split_once('x').ok_or_else(|| wrong(&"want WxH"))?;
                options.size =
                    (w.parse().map_err(|e| wrong(&e))?, h.parse().map_err(|e| wrong(&e))?);
            }
            "--tls-cert-file" => options.certificate = Some(value.into()),
            "--tls-key-file" => options.key = Some(value.into()),
            "--video-codec" => options.video = value.parse().map_err(|e| wrong(&e))?,
            "--web" => options.web = Some(value.into()),
            "--policy" => {
                options.policy = match value.as_str() {
                    "exclusive" => ClientPolicy::Exclusive,
                    "refuse" => ClientPolicy::Refuse,
                    "shared" => ClientPolicy::Shared,
                    "view-only" => ClientPolicy::ViewOnly,
                    _ => return Err(wrong(&"want exclusive, refuse, shared or view-only")),
                }
            }
            _ => return Err(format!("no option {name}\n{USAGE}")),
        }
    }
    if options.listen.is_empty() {
        options.listen.push(([127, 0, 0, 1], 5930).into());
    }
    Ok(options)
}

fn print_stats(stats: &DisplayStats) {
    let frames = stats.frames.max(1) as u32;
    print!(
        "frames {} skipped {} unchanged {} compare {:?}/frame rtt {:?} rate {} memory {}",
        stats.frames,
        stats.skipped_frames,
        stats.unchanged_frames,
        stats.compare_time / frames,
        stats.round_trip,
        stats.line_rate,
        stats.memory
    );
    for codec in stats.codecs.iter().filter(|codec| codec.messages > 0) {
        let (name, time) = (codec.codec.name(), codec.time / frames);
        print!("; {name} {} {} B {time:?}/frame", codec.messages, codec.bytes);
    }
    println!();
}

/// Paints the frames of a mode into a file at their times, for ever.
fn write_frames(path: &std::path::Path, options: &Options) -> ExitCode {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::options().write(true).open(path).expect("file");
    let mut scene = Scene::new(options.mode, options.size);
    let stride = u64::from(options.size.0) * 4;
    println!("writing");
    let mut next = Instant::now();
    for step in 1.. {
        let damage = scene.next(step);
        for rect in damage {
            for y in rect.y..rect.bottom() {
                let at = u64::from(y) * stride + u64::from(rect.x) * 4;
                let bytes = &scene.pixels()[at as usize..][..rect.width as usize * 4];
                file.write_all_at(bytes, options.offset + at).expect("write");
            }
        }
        next = (next + Duration::from_secs(1) / options.fps.max(1)).max(Instant::now());
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    ExitCode::SUCCESS
}

/// Plays a tone and records, 10 ms at a time, for ever.
fn play(server: &SpiceServer, tone: f64) {
    const RATE: u32 = 48_000;
    const TICK: Duration = Duration::from_millis(10);
    let speaker = server.playback().expect("sound is on");
    let microphone = server.record().expect("sound is on");
    let _ = spice_server::ask_for_short_turns();
    speaker.start(RATE);
    microphone.start(RATE);
    let began = Instant::now();
    let mut loudest = 0;
    for tick in 0u32.. {
        std::thread::sleep((began + TICK * tick).saturating_duration_since(Instant::now()));
        let mut frames = [[0; 2]; RATE as usize / 100];
        microphone.read(&mut frames);
        loudest = frames.iter().map(|frame| frame[0].unsigned_abs()).fold(loudest, u16::max);
        for (i, frame) in frames.iter_mut().enumerate() {
            let time = (f64::from(tick) * 480.0 + i as f64) / f64::from(RATE);
            *frame = [(8000.0 * (time * tone * std::f64::consts::TAU).sin()) as i16; 2];
        }
        speaker.play(&frames);
        if tick % 100 == 99 && loudest > 0 {
            println!("the microphone: {} of 32767", std::mem::take(&mut loudest));
        }
    }
}

fn main() -> ExitCode {
    spice_server::give_free_memory_back();
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let options = match options() {
        Ok(options) => options,
        Err(text) => {
            eprintln!("{text}");
            return ExitCode::from(2);
        }
    };
    if let Some(path) = &options.into {
        return write_frames(path, &options);
    }
    let (events, inbox) = mpsc::channel();
    let reporter = Arc::new(Reporter(events));
    let mut builder = SpiceServer::builder()
        .video_codecs(options.video)
        .name("test picture")
        .client_policy(options.policy)
        .sound(options.sound.is_some())
        .input(reporter.clone())
        .display_events(reporter);
    for address in options.listen {
        builder = builder.listen(address);
    }
    if let Some(path) = options.password {
        match Secret::from_file(&path) {
            Ok(secret) => builder = builder.password(Some(secret)),
            Err(error) => {
                eprintln!("{error}");
                return ExitCode::FAILURE;
            }
        }
    }
    let tls = options.certificate.zip(options.key);
    let tls = tls.map(|(certificate, key)| TlsConfig::from_files(&certificate, &key));
    let web = options.web.map(|folder| WebPage::from_folder(&folder));
    match (tls.transpose(), web.transpose()) {
        (Ok(tls), Ok(web)) => builder = builder.tls(tls).web(web),
        (Err(error), _) | (_, Err(error)) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    }
    let server = match builder.start() {
        Ok(server) => server,
        Err(error) => {
            let cause = std::error::Error::source(&error).map(|e| format!(": {e}"));
            eprintln!("{error}{}", cause.unwrap_or_default());
            return ExitCode::FAILURE;
        }
    };
    for address in server.local_addrs() {
        println!("listening on {address}");
    }
    let server = Arc::new(server);
    let display = server.display(0).expect("one display");
    let mut picture = Picture::new(display, options.mode, options.size);
    picture.whole = options.whole;
    if options.stats {
        let (server, painted) = (server.clone(), picture.painted.clone());
        std::thread::spawn(move || {
            loop {
                std::thread::sleep(Duration::from_secs(1));
                println!("painted {}", painted.load(Ordering::Relaxed));
                for display in server.status().clients.iter().flat_map(|c| &c.displays) {
                    print_stats(display);
                }
            }
        });
    }
    if let Some(tone) = options.sound {
        let server = server.clone();
        std::thread::spawn(move || play(&server, tone));
    }
    picture.run(&inbox, options.fps, |event: Event| {
        if !options.quiet {
            println!("{event:?}");
        }
    });
    ExitCode::SUCCESS
}
