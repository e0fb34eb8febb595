//! Starts servers with a test picture and real clients against them.
#![allow(dead_code, unreachable_pub, reason = "every test file uses a part of it")]

use std::{
    io::{BufRead, BufReader, Write},
    net::SocketAddr,
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use spice_server::{
    AgentPort, DisplayHandle, Frame, MemoryFrame, Rect, ServerBuilder, SpiceServer,
};

pub mod certificates;
#[path = "../../examples/test-picture/picture.rs"]
pub mod picture;
pub mod xvfb;

use picture::{Event, Reporter};

/// How long anything may take before a test gives up: only what hangs takes so long, on however slow a
/// machine.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// A server with everything it reports.
pub struct Setup {
    pub server: SpiceServer,
    pub events: Receiver<Event>,
    pub display: DisplayHandle,
}

pub fn setup(configure: impl FnOnce(ServerBuilder) -> ServerBuilder) -> Setup {
    let (sender, events) = channel();
    let reporter = Arc::new(Reporter(sender));
    let builder = SpiceServer::builder()
        .name("test picture")
        .listen(([127, 0, 0, 1], 0).into())
        .input(reporter.clone())
        .display_events(reporter);
    let server = configure(builder).start().expect("server");
    let display = server.display(0).expect("display 0");
    Setup { server, events, display }
}

impl Setup {
    pub fn address(&self) -> SocketAddr {
        self.server.local_addr().expect("listening")
    }

    /// Presents the still background.
    pub fn show_background(&self, size: (u32, u32)) -> Vec<u8> {
        let pixels = picture::background(size.0, size.1);
        self.show(size, pixels.clone());
        pixels
    }

    pub fn show(&self, size: (u32, u32), pixels: Vec<u8>) {
        let frame = MemoryFrame::new(size.0, size.1, pixels).expect("size fits");
        self.display.present(Arc::new(frame), &[Rect::new(0, 0, size.0, size.1)]);
    }

    /// The next event for which `pick` returns something.
    pub fn event<T>(&self, what: &str, mut pick: impl FnMut(Event) -> Option<T>) -> T {
        let end = Instant::now() + PATIENCE;
        loop {
            match self.events.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(event) => {
                    if let Some(found) = pick(event) {
                        return found;
                    }
                }
                Err(error) => panic!("no {what}: {error}"),
            }
        }
    }
}

/// Waits until something is true.
pub fn eventually(what: &str, mut is_true: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !is_true() {
        assert!(Instant::now() < end, "never: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Whether a program is there; says that the test is skipped if not.
pub fn have(program: &str) -> bool {
    let found = std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).exists()));
    if !found {
        eprintln!("SKIPPED: {program} is not installed");
    }
    found
}

/// A password as a ticket for this public key (DER).
pub fn seal(key: &[u8], password: &str) -> Vec<u8> {
    use rsa::{Oaep, RsaPublicKey, pkcs8::DecodePublicKey, rand_core::OsRng};
    let key = RsaPublicKey::from_public_key_der(key).expect("a key");
    let text = [password.as_bytes(), b"\0"].concat();
    key.encrypt(&mut OsRng, Oaep::new::<sha1::Sha1>(), &text).expect("fits")
}

const PYTHON: &str = "/usr/bin/python3";

/// Whether the spice-gtk client can run; says that the test is skipped if not.
pub fn have_client() -> bool {
    const PROBE: &str = "import gi; gi.require_version('SpiceClientGLib', '2.0')";
    let found = Command::new(PYTHON)
        .args(["-c", PROBE])
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if !found {
        eprintln!("SKIPPED: python3-gi or gir1.2-spiceclientglib-2.0 is not installed");
    }
    found
}

/// `tests/browser.py`: a headless Chromium, remotely controlled.
pub struct Browser(Client);

impl Browser {
    pub fn open(url: &str) -> Self {
        Self(Client::run("browser.py", &[url]))
    }

    pub fn tell(&mut self, command: &str) {
        self.0.tell(command);
    }

    pub fn named(&self, name: &str) -> Value {
        self.0.named(name)
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // At the end of its commands it ends the browser and removes what that has written.
        self.0.stdin = None;
        let _ = self.0.child.wait();
    }
}

/// What a script says, an event in JSON on each line; anything else is left out.
pub fn events(stdout: ChildStdout) -> Receiver<Value> {
    let (sender, events) = channel();
    thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            let Ok(value) = serde_json::from_str(&line) else { continue };
            if sender.send(value).is_err() {
                break;
            }
        }
    });
    events
}

/// `tests/client.py`: spice-gtk, remotely controlled.
pub struct Client {
    child: Child,
    stdin: Option<ChildStdin>,
    events: Receiver<Value>,
}

impl Client {
    pub fn connect(address: SocketAddr) -> Self {
        Self::connect_with(address, None)
    }

    pub fn connect_with(address: SocketAddr, password: Option<&str>) -> Self {
        let port = address.port().to_string();
        Self::start(&address.ip().to_string(), &port, password.as_slice())
    }

    /// `more`: a password, properties of SpiceSession as `key=value`.
    pub fn start(host: &str, port: &str, more: &[&str]) -> Self {
        Self::run("client.py", &[&[host, port], more].concat())
    }

    /// With variables in its environment.
    pub fn with_environment(address: SocketAddr, variables: &[(&str, &str)]) -> Self {
        let (host, port) = (address.ip().to_string(), address.port().to_string());
        Self::run_with("client.py", &[&host, &port], variables)
    }

    fn run(script: &str, arguments: &[&str]) -> Self {
        Self::run_with(script, arguments, &[])
    }

    fn run_with(script: &str, arguments: &[&str], variables: &[(&str, &str)]) -> Self {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(script);
        let mut command = Command::new(PYTHON);
        command.arg(script).args(arguments).envs(variables.iter().copied());
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("python starts");
        let events = events(child.stdout.take().expect("piped"));
        let stdin = child.stdin.take();
        Self { child, stdin, events }
    }

    /// Connects and waits until everything is open and the picture is shown.
    pub fn connect_ready(setup: &Setup) -> Self {
        let client = Self::connect(setup.address());
        client.wait_ready();
        client
    }

    pub fn wait_ready(&self) {
        let mut missing =
            vec!["MainChannel", "DisplayChannel", "InputsChannel", "CursorChannel", "mark"];
        self.event("all channels", |event| {
            let name = match event["ev"].as_str() {
                Some("channel") if event["event"] == "opened" => event["channel"].as_str(),
                Some("mark") => Some("mark"),
                _ => None,
            };
            missing.retain(|wanted| Some(*wanted) != name);
            missing.is_empty().then_some(())
        });
    }

    pub fn tell(&mut self, command: &str) {
        let stdin = self.stdin.as_mut().expect("not closed");
        writeln!(stdin, "{command}").expect("the client takes commands");
    }

    /// The next event for which `pick` returns something.
    pub fn event<T>(&self, what: &str, mut pick: impl FnMut(&Value) -> Option<T>) -> T {
        let end = Instant::now() + PATIENCE;
        let mut seen = Vec::new();
        loop {
            match self.events.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(event) => {
                    assert_ne!(event["ev"], "error", "{event}");
                    if let Some(found) = pick(&event) {
                        return found;
                    }
                    seen.push(event);
                }
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    panic!("the client saw no {what}, but {seen:?}")
                }
            }
        }
    }

    /// The next event of this name.
    pub fn named(&self, name: &str) -> Value {
        self.event(name, |event| (event["ev"] == name).then(|| event.clone()))
    }

    /// SHA-1 of the pixels the client shows, unused bytes 0.
    pub fn pixels(&mut self) -> String {
        self.pixels_of(0)
    }

    /// The same of another display than the first.
    pub fn pixels_of(&mut self, display: u32) -> String {
        self.tell(&format!("pixels {display}"));
        self.named("pixels")["hash"].as_str().unwrap_or("none").to_owned()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// SHA-1 of pixels as [`Client::pixels`] says it.
pub fn hash(pixels: &[u8]) -> String {
    use sha1::{Digest, Sha1};
    let mut clean = pixels.to_vec();
    clean.iter_mut().skip(3).step_by(4).for_each(|unused| *unused = 0);
    Sha1::digest(&clean).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A guest that has an agent's port: keeps what it is sent, takes as much as it is told to.
#[derive(Default)]
pub struct GuestPort {
    pub received: std::sync::Mutex<Vec<u8>>,
}

impl AgentPort for GuestPort {
    fn to_guest(&self, bytes: &[u8]) -> usize {
        self.received.lock().expect("not poisoned").extend_from_slice(bytes);
        bytes.len()
    }
}

impl GuestPort {
    /// Messages received so far: type and body, without chunk headers.
    pub fn messages(&self) -> Vec<(u32, Vec<u8>)> {
        let wire = self.received.lock().expect("not poisoned").clone();
        let word = |bytes: &[u8], at: usize| {
            u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
        };
        let mut streams = [Vec::new(), Vec::new(), Vec::new()];
        let mut rest = &wire[..];
        while rest.len() >= 8 {
            let size = word(rest, 4) as usize;
            streams[word(rest, 0) as usize].extend_from_slice(&rest[8..8 + size]);
            rest = &rest[8 + size..];
        }
        let mut messages = Vec::new();
        for stream in streams {
            let mut rest = &stream[..];
            while rest.len() >= 20 {
                let end = 20 + word(rest, 16) as usize;
                let Some(body) = rest.get(20..end) else { break };
                messages.push((word(rest, 4), body.to_vec()));
                rest = &rest[end..];
            }
        }
        messages
    }
}

/// An agent message in one chunk, as the guest writes it to its port.
pub fn guest_message(kind: u32, body: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut put = |value: u32| out.extend_from_slice(&value.to_le_bytes());
    put(1);
    put(20 + body.len() as u32);
    put(1);
    put(kind);
    put(0);
    put(0);
    put(body.len() as u32);
    out.extend_from_slice(body);
    out
}

/// Sends everything a server reports nowhere.
pub fn silent() -> Sender<Event> {
    channel().0
}

/// A frame that counts how often it is dropped.
pub struct CountedFrame {
    pub inner: MemoryFrame,
    pub dropped: Arc<std::sync::atomic::AtomicUsize>,
}

impl Frame for CountedFrame {
    fn width(&self) -> u32 {
        self.inner.width()
    }
    fn height(&self) -> u32 {
        self.inner.height()
    }
    fn format(&self) -> spice_server::PixelFormat {
        self.inner.format()
    }
    fn copy_rect(
        &self,
        rect: Rect,
        out: &mut [u8],
        out_stride: usize,
    ) -> Result<(), spice_server::FrameGone> {
        self.inner.copy_rect(rect, out, out_stride)
    }
}

impl Drop for CountedFrame {
    fn drop(&mut self) {
        self.dropped.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
    }
}

/// A line to a server that carries so many bytes per second and no more, and tells whether a JPEG
/// came along.
pub struct SlowLine {
    pub address: SocketAddr,
    pub jpeg_seen: Arc<std::sync::atomic::AtomicBool>,
}

impl SlowLine {
    pub fn to(target: SocketAddr, bytes_per_second: u32) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("bound");
        let jpeg_seen = Arc::<std::sync::atomic::AtomicBool>::default();
        let seen = jpeg_seen.clone();
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let server = std::net::TcpStream::connect(target).expect("the server is there");
                let (mut from_client, mut to_server) =
                    (client.try_clone().expect("clone"), server.try_clone().expect("clone"));
                thread::spawn(move || std::io::copy(&mut from_client, &mut to_server));
                let seen = seen.clone();
                thread::spawn(move || carry_slowly(server, client, bytes_per_second, &seen));
            }
        });
        Self { address, jpeg_seen }
    }
}

fn carry_slowly(
    mut from: std::net::TcpStream,
    mut to: std::net::TcpStream,
    bytes_per_second: u32,
    jpeg_seen: &std::sync::atomic::AtomicBool,
) {
    use std::io::Read;
    let mut buffer = [0; 8192];
    let mut free_at = Instant::now();
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        let now = Instant::now();
        let busy = f64::from(count as u32) / f64::from(bytes_per_second);
        free_at = free_at.max(now) + Duration::from_secs_f64(busy);
        thread::sleep(free_at - now);
        if buffer[..count].windows(4).any(|four| four == b"JFIF") {
            jpeg_seen.store(true, std::sync::atomic::Ordering::SeqCst);
        }
        if to.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(std::net::Shutdown::Both);
    let _ = from.shutdown(std::net::Shutdown::Both);
}
