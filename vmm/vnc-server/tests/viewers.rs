//! Real viewers look at the example server: gtk-vnc (which remote-viewer uses) and TigerVNC.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

use std::{
    fs::File,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::{
        Mutex, PoisonError,
        mpsc::{Receiver, channel},
    },
    time::{Duration, Instant},
};

#[path = "../../../spice-server/tests/support/xvfb.rs"]
#[allow(unreachable_pub, reason = "the file is a module of libraries, too")]
mod xvfb;
use xvfb::Xvfb;

/// Long enough for the slowest machine; nothing waits so long unless it fails.
const PATIENCE: Duration = Duration::from_secs(120);

/// A child process that does not outlive the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn lines(child: &mut Child) -> Receiver<String> {
    let (sender, receiver) = channel();
    if let Some(log) = child.stderr.take() {
        let sender = sender.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(log).lines().map_while(Result::ok) {
                // Only the last word counts: `… error=wrong password`.
                let text = line.rsplit('=').next().unwrap_or_default();
                let _ = sender.send(format!("log: {text}"));
            }
        });
    }
    let out = BufReader::new(child.stdout.take().unwrap());
    std::thread::spawn(move || {
        out.lines()
            .map_while(Result::ok)
            .take_while(|line| sender.send(line.clone()).is_ok())
            .count()
    });
    receiver
}

struct Server {
    _process: Running,
    input: ChildStdin,
    lines: Receiver<String>,
    port: u16,
}

impl Server {
    fn start(arguments: &[&str]) -> Self {
        let mut process = Command::new(example("vnc-picture"))
            .args(["--listen", "127.0.0.1:0"])
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let input = process.stdin.take().unwrap();
        let lines = lines(&mut process);
        let mut server = Self { _process: Running(process), input, lines, port: 0 };
        let line = server.wait_for("listening");
        server.port = line.rsplit(':').next().unwrap().parse().unwrap();
        server
    }

    /// The next line that starts like this.
    fn wait_for(&self, start: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        let mut seen = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) if line.starts_with(start) => return line,
                Ok(line) => seen.push(line),
                Err(error) => panic!("no {start:?} ({error}) in {seen:#?}"),
            }
        }
    }

    fn say(&mut self, line: &str) {
        writeln!(self.input, "{line}").unwrap();
    }
}

/// Cargo builds examples beside the folder of its tests.
fn example(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    test.parent().unwrap().parent().unwrap().join("examples").join(name)
}

/// Whether all programs are there; says so if not.
fn have(programs: &[&str]) -> bool {
    let missing = programs.iter().find(|program| {
        !std::env::split_paths(&std::env::var_os("PATH").unwrap())
            .any(|folder| folder.join(program).exists())
    });
    if let Some(program) = missing {
        println!("SKIPPED: {program} is not installed");
    }
    missing.is_none()
}

/// The example's picture, as its source says; no pointer in it.
fn pixel(width: u32, tick: u32, x: u32, y: u32) -> [u8; 3] {
    if x.wrapping_sub(tick * 8 % width) < 48 && y < 48 {
        return [255, (tick * 40) as u8, 0];
    }
    if x < width / 2 {
        let noise = (x.wrapping_mul(2_654_435_761) ^ y.wrapping_mul(40_503)) >> 28;
        return [((x + y) / 2) as u8, (y + noise) as u8, (x + noise) as u8];
    }
    match (y % 16 < 10, (x * 7 + y / 16 * 13) % 11 < 4) {
        (true, true) => [32, 32, 32],
        _ => [245, 250, 250],
    }
}

struct Image {
    width: u32,
    height: u32,
    channels: usize,
    pixels: Vec<u8>,
}

fn load(path: &Path) -> Option<Image> {
    let mut decoder = png::Decoder::new(BufReader::new(File::open(path).ok()?));
    decoder.set_transformations(png::Transformations::EXPAND | png::Transformations::STRIP_16);
    let mut reader = decoder.read_info().ok()?;
    let mut pixels = vec![0; reader.output_buffer_size()?];
    let info = reader.next_frame(&mut pixels).ok()?;
    let channels = info.color_type.samples();
    Some(Image { width: info.width, height: info.height, channels, pixels })
}

/// The worst difference from the picture in any channel, at the image's top left corner.
fn difference(image: &Image, (width, height): (u32, u32), tick: u32) -> u8 {
    if image.width < width || image.height < height || image.channels < 3 {
        return 255;
    }
    let mut worst = 0;
    for y in 0..height {
        for x in 0..width {
            let at = (y * image.width + x) as usize * image.channels;
            let wanted = pixel(width, tick, x, y);
            for (seen, wanted) in image.pixels[at..at + 3].iter().zip(wanted) {
                worst = worst.max(seen.abs_diff(wanted));
            }
        }
    }
    worst
}

#[test]
fn gtk_vnc_sees_every_pixel() {
    if !have(&["gvnccapture"]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("picture.png");
    // Sides that are no multiples of anything.
    let server = Server::start(&["--size", "799x603"]);
    let display = format!("127.0.0.1:{}", i32::from(server.port) - 5900);
    let done = Command::new("gvnccapture").arg(display).arg(&path).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let image = load(&path).unwrap();
    assert_eq!((image.width, image.height), (799, 603));
    assert_eq!(difference(&image, (799, 603), 0), 0);
    server.wait_for("watched true");
    server.wait_for("watched false");
}

/// TigerVNC in a window on a screen of its own.
struct Tiger {
    folder: tempfile::TempDir,
    _viewer: Running,
    screen: Xvfb,
}

impl Tiger {
    fn start(server: &Server, password: &str, arguments: &[&str]) -> Self {
        let screen = Xvfb::start(1280, 1024).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let log = std::fs::File::create(folder.path().join("log")).unwrap();
        let viewer = Command::new("vncviewer")
            .args(["-Shared=1", "-MenuKey=None", "-AutoSelect=0", "-FullColor=1"])
            .args([
                "-DotWhenNoCursor=0",
                "-ReconnectOnError=0",
                "-AlertOnFatalError=0",
                "-Log=*:stderr:30",
            ])
            .args(arguments)
            .arg(format!("127.0.0.1::{}", server.port))
            .env("DISPLAY", &screen.display)
            .env("HOME", folder.path())
            .env("VNC_PASSWORD", password)
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        Self { folder, _viewer: Running(viewer), screen }
    }

    fn run(&self, program: &str, arguments: &[&str]) -> Option<String> {
        let mut command = Command::new(program);
        let done = command.args(arguments).env("DISPLAY", &self.screen.display).output().ok()?;
        done.status.success().then(|| String::from_utf8_lossy(&done.stdout).trim().to_owned())
    }

    /// The window with the picture, once it is there.
    fn window(&self) -> Option<String> {
        let found = self.run("xdotool", &["search", "--onlyvisible", "--name", "test picture"])?;
        found.lines().last().map(str::to_owned)
    }

    fn screenshot(&self) -> Option<Image> {
        let path = self.folder.path().join("screen.png");
        self.run("import", &["-window", &self.window()?, path.to_str()?])?;
        load(&path)
    }

    /// Waits until the picture is seen within this difference.
    fn wait_for_picture(&self, size: (u32, u32), tick: u32, limit: u8) {
        let deadline = Instant::now() + PATIENCE;
        let mut worst = 255;
        while Instant::now() < deadline {
            if let Some(image) = self.screenshot() {
                worst = difference(&image, size, tick);
                if worst <= limit {
                    return;
                }
            }
        }
        let kept = std::env::temp_dir().join("vnc-picture-failed.png");
        let copied = std::fs::copy(self.folder.path().join("screen.png"), &kept);
        panic!(
            "the picture differs by {worst}, see {}: {copied:?}; window {:?}; vncviewer says: {}",
            kept.display(),
            self.window(),
            std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
        );
    }

    fn wait_for_black(&self) {
        let deadline = Instant::now() + PATIENCE;
        let black = |image: Image| {
            image
                .pixels
                .chunks(image.channels)
                .all(|pixel| pixel.iter().take(3).all(|channel| *channel == 0))
        };
        while !self.screenshot().is_some_and(black) {
            assert!(Instant::now() < deadline, "the screen is not black");
        }
    }

    fn xdotool(&self, arguments: &[&str]) {
        self.run("xdotool", arguments).unwrap();
    }
}

/// Tests with a screen of their own take turns: each has a picture to decode, and tools to start.
static TURN: Mutex<()> = Mutex::new(());

const TOOLS: &[&str] = &["Xvfb", "vncviewer", "import", "xdotool"];

#[test]
fn tigervnc_decodes_every_encoding() {
    if !have(TOOLS) {
        return;
    }
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let encodings: [(&str, &[&str]); 4] = [
        ("ZRLE", &["-NoJPEG=1"]),
        ("Tight", &["-NoJPEG=1"]),
        ("Raw", &["-NoJPEG=1"]),
        // Lossy at first, exact when it has come to rest.
        ("Tight", &["-NoJPEG=0", "-QualityLevel=4"]),
    ];
    for (encoding, more) in encodings {
        println!("{encoding} {more:?}");
        let mut server = Server::start(&["--size", "800x600"]);
        let preferred = format!("-PreferredEncoding={encoding}");
        let arguments: Vec<&str> = [&[preferred.as_str(), "-RemoteResize=0"], more].concat();
        let viewer = Tiger::start(&server, "", &arguments);
        viewer.wait_for_picture((800, 600), 0, 0);
        server.say("tick");
        viewer.wait_for_picture((800, 600), 1, 0);
        server.say("size 640x481");
        viewer.wait_for_picture((640, 481), 1, 0);
        server.say("off");
        viewer.wait_for_black();
        server.say("tick");
        viewer.wait_for_picture((640, 481), 2, 0);
    }
}

#[test]
fn tigervnc_types_points_and_resizes() {
    if !have(TOOLS) {
        return;
    }
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("password");
    std::fs::write(&file, "sesame\n").unwrap();
    let server = Server::start(&["--size", "800x600", "--password-file", file.to_str().unwrap()]);
    let viewer = Tiger::start(&server, "sesame", &["-RemoteResize=0"]);
    viewer.wait_for_picture((800, 600), 0, 0);
    let window = viewer.window().unwrap();
    // Without a window manager nobody else gives it the keyboard.
    viewer.xdotool(&["windowfocus", "--sync", &window]);
    viewer.xdotool(&["mousemove", "--window", &window, "321", "123"]);
    viewer.xdotool(&["click", "3"]);
    server.wait_for("pointer 321 123 of 800x600");
    server.wait_for("button Right true");
    server.wait_for("button Right false");
    viewer.xdotool(&["click", "4"]);
    server.wait_for("wheel 1");
    viewer.xdotool(&["click", "5"]);
    server.wait_for("wheel -1");
    viewer.xdotool(&["key", "a"]);
    server.wait_for("key 1e true");
    server.wait_for("key 1e false");
    viewer.xdotool(&["key", "Right"]);
    server.wait_for("key e04d true");
    // What is held when a viewer goes is let go.
    viewer.xdotool(&["keydown", "Control_L"]);
    server.wait_for("key 1d true");
    drop(viewer);
    server.wait_for("key 1d false");
    server.wait_for("watched false");

    let viewer = Tiger::start(&server, "sesame", &["-RemoteResize=1", "-DesktopSize=1024x700"]);
    server.wait_for("resize 1024x700");
    viewer.wait_for_picture((1024, 700), 0, 0);
    drop(viewer);
    server.wait_for("watched false");

    let _wrong = Tiger::start(&server, "guess", &[]);
    server.wait_for("log: wrong password");
    assert!(!server.lines.try_iter().any(|line| line.starts_with("watched")), "it got in");
}

#[test]
fn tigervnc_copies_and_pastes() {
    if !have(TOOLS) || !have(&["xclip"]) {
        return;
    }
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut server = Server::start(&["--size", "800x600"]);
    let viewer = Tiger::start(&server, "", &["-RemoteResize=0"]);
    viewer.wait_for_picture((800, 600), 0, 0);
    // It only looks after the clipboard while it has the keyboard.
    viewer.xdotool(&["windowfocus", "--sync", &viewer.window().unwrap()]);
    // UTF-8, by the extension.
    server.say("copy Grüße, 東京");
    let deadline = Instant::now() + PATIENCE;
    let target = ["-selection", "clipboard", "-out", "-target", "UTF8_STRING"];
    let paste = || viewer.run("xclip", &target);
    while paste().as_deref() != Some("Grüße, 東京") {
        assert!(Instant::now() < deadline, "the clipboard has {:?}", paste());
    }
    let mut copy = Command::new("xclip")
        .args(["-selection", "clipboard", "-in", "-quiet"])
        .env("DISPLAY", &viewer.screen.display)
        .stdin(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    copy.stdin.take().unwrap().write_all("zurück: 大阪".as_bytes()).unwrap();
    let _copy = Running(copy);
    assert_eq!(server.wait_for("copied"), "copied \"zurück: 大阪\"");
}

/// A connection of gtk-vnc without a window, which says what it hears. (Python cannot call what makes
/// it say something.)
const GTK_VNC: &str = r#"
import sys, gi
gi.require_version("GVnc", "1.0")
from gi.repository import GLib, GVnc
connection = GVnc.Connection()
def initialized(connection):
    print("ready", flush=True)
connection.connect("vnc-initialized", initialized)
connection.connect("vnc-auth-choose-type", lambda c, types: c.set_auth_type(1))
connection.connect("vnc-server-cut-text", lambda c, text: print("heard", text, flush=True))
connection.set_shared(True)
connection.open_host("127.0.0.1", sys.argv[1])
GLib.MainLoop().run()
"#;

#[test]
fn gtk_vnc_pastes() {
    let python = "/usr/bin/python3";
    let probe = ["-c", "import gi; gi.require_version('GVnc', '1.0')"];
    let found = Command::new(python).args(probe).stderr(Stdio::null()).status();
    if !found.is_ok_and(|status| status.success()) {
        println!("SKIPPED: gir1.2-gtk-vnc-2.0 is not installed");
        return;
    }
    let mut server = Server::start(&["--size", "320x200"]);
    let mut viewer = Command::new(python)
        .args(["-c", GTK_VNC, &server.port.to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = lines(&mut viewer);
    let _viewer = Running(viewer);
    let next = || lines.recv_timeout(PATIENCE).unwrap();
    assert_eq!(next(), "ready");
    server.wait_for("watched true");
    // The old way: Latin-1, of which Python's binding can only read ASCII.
    server.say("copy to Tokyo, 東京");
    assert_eq!(next(), "heard to Tokyo, ??");
}
