//! Sockets and threads: one that accepts, two per client.

use std::{
    collections::HashSet,
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with, sockopt};

use crate::{
    gate::{Gate, Stranger},
    keysym::Scancode,
    painter::Painter,
    proto::{
        ProtocolError,
        auth::CHALLENGE,
        clipboard::{Clipboard, MAX_TEXT},
        handshake::{GREETING, Handshake, Step},
        message::{self, ClientMessage},
        update,
    },
    screen::Screen,
    viewer::{Turn, Viewer},
};

/// Clients at a time.
const MAX_VIEWERS: usize = 16;

/// The client's first words must come within this.
const FIRST_WORDS: Duration = Duration::from_secs(5);

/// All of the handshake must be done within this; a person may be typing the password.
const HANDSHAKE: Duration = Duration::from_secs(60);

/// A client that takes nothing for so long is gone.
const STALLED: Duration = Duration::from_secs(30);

/// Silence after which the system asks whether a client is still there.
const IDLE: Duration = Duration::from_secs(60);

/// Connections that wait to be accepted.
const BACKLOG: i32 = 64;

/// Between a wrong password and its answer.
const PAUSE: Duration = Duration::from_secs(1);

/// The size told to clients while there is no picture.
const NO_PICTURE: (u32, u32) = (640, 480);

/// Sides that a client may ask for.
const SIDES: std::ops::RangeInclusive<u32> = 64..=8192;

/// A button of the mouse.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Button {
    /// Left.
    Left,
    /// Middle.
    Middle,
    /// Right.
    Right,
}

/// Hears what viewers do. Called on the server's threads; must not block.
pub trait Events: Send + Sync {
    /// A key was pressed or released. Keys that a viewer holds are released when it goes.
    fn key(&self, key: Scancode, down: bool);
    /// The pointer is at this pixel of a screen of this size.
    fn pointer(&self, position: (u32, u32), screen: (u32, u32));
    /// A button was pressed or released.
    fn button(&self, button: Button, down: bool);
    /// The wheel was turned, away from the user if positive.
    fn wheel(&self, steps: i32);
    /// A viewer's window has this size; whether the screen may follow.
    fn resize(&self, width: u32, height: u32) -> bool;
    /// A viewer has copied this text.
    fn copied(&self, text: &str);
    /// The first viewer came, or the last one went: frames are of use only while there are any.
    fn watched(&self, any: bool);
}

/// How to serve.
#[derive(Clone, Default)]
pub struct Config {
    /// Title of viewers' windows.
    pub name: String,
    /// The password's first 8 bytes count. `None` lets everybody in.
    pub password: Option<Vec<u8>>,
}

impl std::fmt::Debug for Config {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let password = self.password.as_ref().map(|_| "secret");
        f.debug_struct("Config").field("name", &self.name).field("password", &password).finish()
    }
}

struct Shared {
    config: Config,
    screen: Screen,
    events: Arc<dyn Events>,
    gate: Gate,
    viewers: Mutex<Vec<Connected>>,
    /// Held while the program is told whether anybody watches, so that it hears the last word last.
    watched: Mutex<bool>,
    /// What the guest has copied last.
    clipboard: Mutex<Option<Arc<str>>>,
    next_id: AtomicU64,
    closing: AtomicBool,
}

struct Connected {
    id: u64,
    peer: SocketAddr,
    socket: TcpStream,
    viewer: Weak<Viewer>,
}

/// The running server; ends when dropped.
pub struct VncServer {
    shared: Arc<Shared>,
    listener: TcpListener,
    thread: Option<thread::JoinHandle<()>>,
}

impl std::fmt::Debug for VncServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VncServer").field("config", &self.shared.config).finish_non_exhaustive()
    }
}

impl VncServer {
    /// Serves everybody who connects to `listener`.
    ///
    /// # Errors
    ///
    /// If no thread can be started or the socket cannot be used.
    pub fn start(
        listener: TcpListener,
        config: Config,
        events: Arc<dyn Events>,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            config,
            screen: Screen::default(),
            events,
            gate: Gate::default(),
            viewers: Mutex::default(),
            watched: Mutex::new(false),
            clipboard: Mutex::default(),
            next_id: AtomicU64::new(1),
            closing: AtomicBool::new(false),
        });
        let (socket, server) = (listener.try_clone()?, shared.clone());
        let thread = thread::Builder::new()
            .name("vnc-accept".to_owned())
            .spawn(move || accept(&socket, &server))?;
        Ok(Self { shared, listener, thread: Some(thread) })
    }

    /// Where frames go.
    pub fn screen(&self) -> Screen {
        self.shared.screen.clone()
    }

    /// The address that clients connect to.
    ///
    /// # Errors
    ///
    /// If the system cannot tell.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// The guest has copied this text: viewers can paste it. One that is too long is left out, with a
    /// log line. Never blocks.
    pub fn set_clipboard(&self, text: &str) {
        if text.len() > MAX_TEXT {
            tracing::info!(bytes = text.len(), "too much text for VNC viewers' clipboards");
            return;
        }
        let text: Arc<str> = text.into();
        *self.shared.clipboard() = Some(text.clone());
        for viewer in self.shared.viewers().iter().filter_map(|c| c.viewer.upgrade()) {
            viewer.clipboard_changed(text.clone());
        }
    }

    /// Addresses of the viewers.
    pub fn viewers(&self) -> Vec<SocketAddr> {
        self.shared.viewers().iter().map(|connected| connected.peer).collect()
    }
}

impl Drop for VncServer {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::SeqCst);
        // Wakes `accept`.
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
        self.shared.hang_up(|_| true);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Listens on an address, even one the machine does not have yet (`IP_FREEBIND`): that of a tunnel
/// comes up when it likes.
///
/// # Errors
///
/// If the address is in use or may not be used.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    if address.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
        sockopt::set_ipv6_freebind(&socket, true)?;
    } else {
        sockopt::set_ip_freebind(&socket, true)?;
    }
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

/// Finds out when a peer vanished without a word.
fn keep_alive(socket: &TcpStream) -> io::Result<()> {
    sockopt::set_tcp_user_timeout(socket, STALLED.as_millis() as u32)?;
    sockopt::set_socket_keepalive(socket, true)?;
    sockopt::set_tcp_keepidle(socket, IDLE)?;
    sockopt::set_tcp_keepintvl(socket, STALLED / 3)?;
    Ok(())
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    loop {
        let (socket, peer) = match listener.accept() {
            _ if shared.closing.load(Ordering::SeqCst) => return,
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors, most likely: wait for some to come back.
                tracing::warn!(%error, "a VNC client could not be accepted");
                thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        let server = shared.clone();
        let spawned = thread::Builder::new().name("vnc-client".to_owned()).spawn(move || {
            match server.serve(socket, peer) {
                Ok(()) => tracing::info!(%peer, "VNC viewer left"),
                Err(error) => tracing::info!(%peer, %error, "VNC client disconnected"),
            }
        });
        if let Err(error) = spawned {
            tracing::warn!(%error, "no thread for a VNC client");
        }
    }
}

fn hostile(error: ProtocolError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

impl Shared {
    fn viewers(&self) -> MutexGuard<'_, Vec<Connected>> {
        self.viewers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn clipboard(&self) -> MutexGuard<'_, Option<Arc<str>>> {
        self.clipboard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the connections that `which` chooses.
    fn hang_up(&self, which: impl Fn(&Connected) -> bool) {
        for connected in self.viewers().iter().filter(|connected| which(connected)) {
            let _ = connected.socket.shutdown(Shutdown::Both);
            if let Some(viewer) = connected.viewer.upgrade() {
                viewer.close();
            }
        }
    }

    /// Tells the program whether anybody watches, if that changed.
    fn update_watched(&self) {
        let mut watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner);
        let any = !self.viewers().is_empty();
        if *watched != any {
            *watched = any;
            self.events.watched(any);
        }
    }

    fn serve(self: &Arc<Self>, mut socket: TcpStream, peer: SocketAddr) -> io::Result<()> {
        let Some(stranger) = self.gate.enter(peer.ip(), Instant::now()) else {
            return Err(io::Error::other("too many connections or wrong passwords"));
        };
        socket.set_nodelay(true)?;
        socket.set_write_timeout(Some(STALLED))?;
        keep_alive(&socket)?;
        let mut input = Vec::new();
        let exclusive = !self.handshake(&mut socket, &stranger, &mut input)?;
        drop(stranger);
        let size = self.screen.size().unwrap_or(NO_PICTURE);
        let name = &self.config.name;
        socket.write_all(&update::server_init(size.0 as u16, size.1 as u16, name))?;
        socket.set_read_timeout(None)?;

        let viewer = Arc::new(Viewer::new(size));
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        {
            let mut viewers = self.viewers();
            if viewers.len() >= MAX_VIEWERS || self.closing.load(Ordering::SeqCst) {
                return Err(io::Error::other("too many viewers"));
            }
            let (socket, viewer) = (socket.try_clone()?, Arc::downgrade(&viewer));
            viewers.push(Connected { id, peer, socket, viewer });
        }
        if exclusive {
            // RFC 6143 §7.3.1: the others have to go.
            self.hang_up(|connected| connected.id != id);
        }
        tracing::info!(%peer, "VNC viewer connected");
        self.update_watched();
        self.screen.add(&viewer);
        let result = self.converse(&mut socket, &viewer, size, input);
        viewer.close();
        let _ = socket.shutdown(Shutdown::Both);
        self.viewers().retain(|connected| connected.id != id);
        self.update_watched();
        result
    }

    /// Returns whether the client is content with others beside it.
    fn handshake(
        &self,
        socket: &mut TcpStream,
        stranger: &Stranger<'_>,
        input: &mut Vec<u8>,
    ) -> io::Result<bool> {
        let start = Instant::now();
        let mut deadline = start + FIRST_WORDS;
        let challenge: [u8; CHALLENGE] = rand::random();
        let mut handshake = Handshake::new(self.config.password.clone(), challenge);
        socket.write_all(GREETING)?;
        loop {
            match handshake.advance(input).map_err(hostile)? {
                Step::Send(bytes) => {
                    socket.write_all(&bytes)?;
                    deadline = start + HANDSHAKE;
                }
                Step::Done { shared } => {
                    stranger.succeeded();
                    return Ok(shared);
                }
                Step::Refuse(bytes) => {
                    stranger.failed(Instant::now());
                    // Slows down guessing; nobody else waits for this thread.
                    thread::sleep(PAUSE);
                    socket.write_all(&bytes)?;
                    return Err(io::Error::other("wrong password"));
                }
                Step::Read => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err(io::ErrorKind::TimedOut.into());
                    }
                    socket.set_read_timeout(Some(left))?;
                    receive(socket, input)?;
                }
            }
        }
    }

    /// The reader; the writer is a thread beside it.
    fn converse(
        self: &Arc<Self>,
        socket: &mut TcpStream,
        viewer: &Arc<Viewer>,
        size: (u32, u32),
        mut input: Vec<u8>,
    ) -> io::Result<()> {
        let (target, screen, to) = (socket.try_clone()?, self.screen.clone(), viewer.clone());
        let writer = thread::Builder::new()
            .name("vnc-writer".to_owned())
            .spawn(move || write_updates(target, &screen, &to, size))?;
        let mut hands = Hands { events: &*self.events, keys: HashSet::new(), buttons: 0 };
        let result = loop {
            match message::take(&mut input) {
                Ok(Some(message)) => self.obey(message, viewer, &mut hands),
                Ok(None) => match receive(socket, &mut input) {
                    Ok(()) => {}
                    Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => break Ok(()),
                    Err(error) => break Err(error),
                },
                Err(error) => break Err(hostile(error)),
            }
        };
        drop(hands);
        viewer.close();
        let _ = socket.shutdown(Shutdown::Both);
        match writer.join() {
            Ok(Err(error)) if result.is_ok() => Err(error),
            _ => result,
        }
    }

    fn obey(&self, message: ClientMessage, viewer: &Viewer, hands: &mut Hands<'_>) {
        match message {
            ClientMessage::SetPixelFormat(format) => viewer.set_format(format),
            ClientMessage::SetEncodings(encodings) => viewer.set_encodings(&encodings),
            ClientMessage::UpdateRequest { incremental, x, y, width, height } => {
                let [x, y, width, height] = [x, y, width, height].map(u32::from);
                let part = crate::Rect::new(x, y, width, height);
                viewer.request((!incremental).then_some(part));
            }
            ClientMessage::Key { down, keysym } => {
                if let Some(key) = Scancode::from_keysym(keysym) {
                    hands.key(key, down);
                }
            }
            ClientMessage::ExtendedKey { down, keysym, scancode } => {
                let key = Scancode::from_wire(scancode).or_else(|| Scancode::from_keysym(keysym));
                if let Some(key) = key {
                    hands.key(key, down);
                }
            }
            ClientMessage::Pointer { buttons, x, y } => {
                let screen = self.screen.size().unwrap_or(NO_PICTURE);
                let at = (u32::from(x).min(screen.0 - 1), u32::from(y).min(screen.1 - 1));
                hands.pointer(at, screen, buttons);
            }
            ClientMessage::SetDesktopSize { width, height } => {
                let (width, height) = (u32::from(width), u32::from(height));
                let possible = SIDES.contains(&width) && SIDES.contains(&height);
                // 0: it will be done; 1: prohibited; 3: invalid.
                viewer.resize_answered(match possible {
                    false => 3,
                    true if self.events.resize(width, height) => 0,
                    true => 1,
                });
            }
            ClientMessage::Clipboard(said) => match said {
                Clipboard::Text(text) => self.events.copied(&text),
                Clipboard::Notify(true) => viewer.request_clipboard(),
                Clipboard::Request => {
                    if let Some(text) = self.clipboard().clone() {
                        viewer.clipboard_asked(text);
                    }
                }
                Clipboard::Peek => {
                    if let Some(text) = self.clipboard().clone() {
                        viewer.clipboard_changed(text);
                    }
                }
                Clipboard::Notify(false) | Clipboard::Other => {}
            },
        }
    }
}

fn receive(socket: &mut TcpStream, input: &mut Vec<u8>) -> io::Result<()> {
    let mut buffer = [0; 4096];
    let count = socket.read(&mut buffer)?;
    if count == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    input.extend_from_slice(&buffer[..count]);
    Ok(())
}

/// Ends a connection however its writer ends; wakes the reader.
struct HangUp<'a>(&'a Viewer, TcpStream);

impl Drop for HangUp<'_> {
    fn drop(&mut self) {
        self.0.close();
        let _ = self.1.shutdown(Shutdown::Both);
    }
}

fn write_updates(
    socket: TcpStream,
    screen: &Screen,
    viewer: &Viewer,
    size: (u32, u32),
) -> io::Result<()> {
    let mut connection = HangUp(viewer, socket);
    let mut painter = Painter::new(size);
    let mut out = Vec::new();
    while let Some(turn) = viewer.wait(painter.rest(), || screen.want_next()) {
        let work = match turn {
            Turn::Say(messages) => {
                connection.1.write_all(&messages)?;
                continue;
            }
            Turn::Paint(work) => work,
        };
        out.clear();
        painter.paint(&work, viewer, screen, &mut out).map_err(io::Error::other)?;
        if out.is_empty() {
            viewer.still_requested();
        } else {
            connection.1.write_all(&out)?;
        }
    }
    Ok(())
}

/// What a viewer holds down; let go when it leaves.
struct Hands<'a> {
    events: &'a dyn Events,
    keys: HashSet<Scancode>,
    buttons: u8,
}

impl Hands<'_> {
    fn key(&mut self, key: Scancode, down: bool) {
        // Clients repeat held keys; the guest does that itself.
        let changed = if down { self.keys.insert(key) } else { self.keys.remove(&key) };
        if changed {
            self.events.key(key, down);
        }
    }

    fn pointer(&mut self, at: (u32, u32), screen: (u32, u32), buttons: u8) {
        self.events.pointer(at, screen);
        let changed = self.buttons ^ buttons;
        self.buttons = buttons;
        for (bit, button) in [Button::Left, Button::Middle, Button::Right].into_iter().enumerate() {
            if changed & (1 << bit) != 0 {
                self.events.button(button, buttons & (1 << bit) != 0);
            }
        }
        for (bit, steps) in [(3, 1), (4, -1)] {
            if changed & buttons & (1 << bit) != 0 {
                self.events.wheel(steps);
            }
        }
    }
}

impl Drop for Hands<'_> {
    fn drop(&mut self) {
        for key in self.keys.drain() {
            self.events.key(key, false);
        }
        for (bit, button) in [Button::Left, Button::Middle, Button::Right].into_iter().enumerate() {
            if self.buttons & (1 << bit) != 0 {
                self.events.button(button, false);
            }
        }
    }
}
