//! Films for a real SPICE client, encoded behind drago-vmm's own filter of system calls: libvpx and
//! OpenH264 are nobody's code here, and what they ask of the system would end the machine if it were
//! not allowed.
//!
//! The program that is filtered is this one, started once more, because the filter stays.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

use std::{
    env, fs,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use drago_vmm::seccomp;
use spice_server::{Codec, Error, MemoryFrame, Rect, SpiceServer, VideoCodec, VideoCodecs};

#[path = "../../spice-server/examples/test-picture/picture.rs"]
mod picture;

use picture::{Mode, Scene};

/// Set for the program that is filtered: the codec.
const FILTERED: &str = "DRAGO_TEST_FILTERED";
const SIZE: (u32, u32) = (640, 480);
/// Bytes per second, of which pictures would need more.
const LINE: usize = 1_500_000;
const PATIENCE: Duration = Duration::from_secs(120);

fn main() {
    if let Ok(codec) = env::var(FILTERED) {
        let known = VideoCodec::ALL.into_iter().find(|known| known.name() == codec);
        return serve(known.unwrap());
    }
    let probe = "import gi; gi.require_version('SpiceClientGLib', '2.0')";
    let have = |program: &str, arguments: &[&str]| {
        let mut command = Command::new(program);
        let status = command.args(arguments).stderr(Stdio::null()).status();
        status.is_ok_and(|status| status.success())
    };
    for (codec, decoder) in [(VideoCodec::Vp8, "vp8dec"), (VideoCodec::H264, "openh264dec")] {
        if have("/usr/bin/python3", &["-c", probe])
            && have("gst-inspect-1.0", &["--exists", decoder])
        {
            show(codec);
        } else {
            println!("SKIPPED sandboxed_film: spice-gtk or GStreamer's {decoder} is not installed");
        }
    }
}

/// A film with a codec, from the filtered program to a client.
fn show(codec: VideoCodec) {
    let mut server = Command::new(env::current_exe().unwrap())
        .env(FILTERED, codec.name())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(server.stdout.take().unwrap()).lines().map_while(Result::ok);
    let Some(port) = lines.next() else { panic!("it ended with {}", server.wait().unwrap()) };
    if port.starts_with("SKIPPED") {
        println!("{port}");
        return;
    }
    let line = slow_line(port.parse().unwrap());
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../spice-server/tests/client.py");
    let mut client = Command::new("/usr/bin/python3")
        .arg(script)
        .args(["127.0.0.1", &line.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let said = lines.next();
    let _ = client.kill();
    let _ = client.wait();
    drop(server.stdin.take());
    let status = server.wait().unwrap();
    assert_eq!(said.as_deref(), Some(codec.name()), "it ended with {status}");
    assert!(status.success(), "{status}");
    println!("sandboxed_film: {codec} ok");
}

/// The filtered program: says its port, then, when enough frames of the codec were sent, so.
fn serve(codec: VideoCodec) {
    seccomp::prepare(seccomp::Mode::On).unwrap();
    let builder = SpiceServer::builder().listen(([127, 0, 0, 1], 0).into()).keep_slow_codecs(true);
    let server = match builder.video_codecs(VideoCodecs::Prefer(codec)).start() {
        Ok(server) => server,
        Err(error @ Error::Video { .. }) => return println!("SKIPPED sandboxed_film: {error}"),
        Err(error) => panic!("{error}"),
    };
    let display = server.display(0).unwrap();
    let vcpu = seccomp::close(seccomp::Mode::On, seccomp::Extras::default());
    // In proc(5): 2 is a filter.
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    drop(vcpu);
    println!("{}", server.local_addr().unwrap().port());
    assert!(status.is_empty() || status.contains("Seccomp:\t2"), "no filter: {status}");

    let frames = |codec: Codec| -> u64 {
        let status = server.status();
        let displays = status.clients.iter().flat_map(|client| &client.displays);
        displays.flat_map(|d| &d.codecs).filter(|c| c.codec == codec).map(|c| c.messages).sum()
    };
    let counter = if codec == VideoCodec::H264 { Codec::H264 } else { Codec::Vp8 };
    let mut scene = Scene::new(Mode::Film, SIZE);
    let end = Instant::now() + PATIENCE;
    for step in 1.. {
        scene.next(step);
        let frame = MemoryFrame::new(SIZE.0, SIZE.1, scene.pixels().to_vec()).unwrap();
        display.present(Arc::new(frame), &[Rect::new(0, 0, SIZE.0, SIZE.1)]);
        if frames(counter) > 60 {
            println!("{codec}");
            break;
        }
        if Instant::now() > end {
            println!("only {} frames of MJPEG", frames(Codec::Stream));
            break;
        }
        thread::sleep(Duration::from_millis(33));
    }
    // The end of standard input is the end.
    let _ = std::io::stdin().read(&mut [0]);
    drop(server);
    seccomp::finish();
}

/// A port that leads to another one, through a line of [`LINE`].
fn slow_line(port: u16) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let here = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for client in listener.incoming() {
            let (mut client, mut server) =
                (client.unwrap(), TcpStream::connect(("127.0.0.1", port)).unwrap());
            let (mut to_server, mut from_client) =
                (server.try_clone().unwrap(), client.try_clone().unwrap());
            thread::spawn(move || std::io::copy(&mut from_client, &mut to_server));
            thread::spawn(move || {
                let mut buffer = [0; 15_000];
                while let Ok(count @ 1..) = server.read(&mut buffer) {
                    if client.write_all(&buffer[..count]).is_err() {
                        break;
                    }
                    thread::sleep(Duration::from_secs_f64(count as f64 / LINE as f64));
                }
            });
        }
    });
    here
}
