//! Building, starting and asking a server.

use std::{
    io,
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::Ordering,
        mpsc::{self, Receiver, RecvTimeoutError},
    },
    thread::{self, JoinHandle},
    time::{Duration, SystemTime},
};

use crate::{
    AgentPolicy, AgentPort, Capture, DisplayEvents, DisplayHandle, DisplayStats, Error, EventSink,
    InputSink, Leds, MouseMode, Peer, PlaybackHandle, RecordHandle, Refusal, Secret,
    SecureChannels, ServerEvent, TlsConfig, VideoCodecs, WebPage,
    agent::hub::AgentHub,
    audio::Sound,
    display::state::DisplayShared,
    io::{
        keys::KeyService,
        listen::Listener,
        password::Password,
        reactor::Reactor,
        shared::{Command, Config, Session, Shared, lock},
        wake::Wake,
    },
    video::Video,
};

/// Most displays of a server.
const MAX_DISPLAYS: u32 = 16;
/// How long the server's threads may take to end.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// What happens when a second client comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ClientPolicy {
    /// The new client takes over, the old one is told and disconnected.
    #[default]
    Exclusive,
    /// The new client is refused while another one is connected.
    Refuse,
    /// Several clients see and drive the displays together. The guest agent talks to the one that
    /// has been connected longest.
    Shared,
    /// Several clients see the displays, and the one that has been connected longest drives them;
    /// when it goes, the next one does.
    ViewOnly,
}

/// Until when a password is good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Expiry {
    /// For ever.
    #[default]
    Never,
    /// It is good no more.
    Now,
    /// Up to this moment, by the clock on the wall.
    At(SystemTime),
}

impl Expiry {
    pub(crate) fn is_over(self, now: SystemTime) -> bool {
        match self {
            Self::Never => false,
            Self::Now => true,
            Self::At(end) => now >= end,
        }
    }
}

/// Where to listen.
enum Address {
    Tcp { address: SocketAddr, tls_only: bool },
    Unix { path: PathBuf, mode: u32 },
}

/// Settings of a server to be started.
#[must_use = "a builder does nothing until start() is called"]
pub struct ServerBuilder {
    name: Option<String>,
    uuid: Option<[u8; 16]>,
    addresses: Vec<Address>,
    /// What [`bind`](ServerBuilder::bind) has made of addresses.
    listeners: Vec<Listener>,
    tls: Option<TlsConfig>,
    secure: SecureChannels,
    web: Option<WebPage>,
    origins: Vec<String>,
    password: Option<Secret>,
    password_required: bool,
    policy: ClientPolicy,
    displays: u32,
    input: Option<Arc<dyn InputSink>>,
    agent: Option<Arc<dyn AgentPort>>,
    agent_policy: AgentPolicy,
    events: Option<Arc<dyn DisplayEvents>>,
    observer: Option<Arc<dyn EventSink>>,
    max_size: (u32, u32),
    sound: bool,
    capture: Option<Capture>,
    video: VideoCodecs,
    keep_slow_codecs: bool,
}

impl Default for ServerBuilder {
    fn default() -> Self {
        Self {
            name: None,
            uuid: None,
            addresses: Vec::new(),
            listeners: Vec::new(),
            tls: None,
            secure: SecureChannels::NONE,
            web: None,
            origins: Vec::new(),
            password: None,
            password_required: false,
            policy: ClientPolicy::default(),
            displays: 1,
            input: None,
            agent: None,
            agent_policy: AgentPolicy::default(),
            events: None,
            observer: None,
            max_size: (8192, 8192),
            sound: false,
            capture: None,
            video: VideoCodecs::default(),
            keep_slow_codecs: false,
        }
    }
}

impl ServerBuilder {
    /// The name clients show, for example in their window title.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// The machine's UUID, shown by some clients.
    pub fn uuid(mut self, uuid: [u8; 16]) -> Self {
        self.uuid = Some(uuid);
        self
    }

    /// Listens on this address too; port 0 lets the system choose. An address the machine does not
    /// have yet (an interface that comes up later) is fine.
    pub fn listen(mut self, address: SocketAddr) -> Self {
        self.addresses.push(Address::Tcp { address, tls_only: false });
        self
    }

    /// Listens on this address too, for clients with TLS only.
    pub fn listen_tls(mut self, address: SocketAddr) -> Self {
        self.addresses.push(Address::Tcp { address, tls_only: true });
        self
    }

    /// Listens on a Unix socket too, whose file gets the permissions `mode` (who may write to it may
    /// connect). A stale socket is replaced; the file is removed at the end.
    pub fn listen_unix(mut self, path: impl Into<PathBuf>, mode: u32) -> Self {
        self.addresses.push(Address::Unix { path: path.into(), mode });
        self
    }

    /// Offers TLS, on every address: a client's first byte tells whether it wants it.
    pub fn tls(mut self, tls: Option<TlsConfig>) -> Self {
        self.tls = tls;
        self
    }

    /// Channels that may not be in the clear; a client that tries is told to use TLS. None unless
    /// set.
    pub fn secure_channels(mut self, channels: SecureChannels) -> Self {
        self.secure = channels;
        self
    }

    /// Shows browsers this page, on every address. SPICE over WebSockets is spoken with or without it.
    pub fn web(mut self, page: Option<WebPage>) -> Self {
        self.web = page;
        self
    }

    /// Pages of this origin (`https://desk.example`) may connect, beside those of this server. Others
    /// may not: a page must not use what its reader can reach.
    pub fn web_origin(mut self, origin: impl Into<String>) -> Self {
        self.origins.push(origin.into());
        self
    }

    /// Clients must know this password. `None` lets everybody in, with one warning in the log.
    pub fn password(mut self, password: Option<Secret>) -> Self {
        self.password = password;
        self
    }

    /// Without a password nobody comes in, until [`SpiceServer::set_password`].
    pub fn password_required(mut self, required: bool) -> Self {
        self.password_required = required;
        self
    }

    /// What happens when a second client comes.
    pub fn client_policy(mut self, policy: ClientPolicy) -> Self {
        self.policy = policy;
        self
    }

    /// How many displays there are: 1 (the default) to 16.
    pub fn displays(mut self, count: u32) -> Self {
        self.displays = count;
        self
    }

    /// The largest size [`DisplayEvents::resize_requested`] may be asked for; 8192 by 8192 unless
    /// set.
    pub fn max_size(mut self, width: u32, height: u32) -> Self {
        self.max_size = (width, height);
        self
    }

    /// Whether clients are offered sound, both ways; not unless set. See
    /// [`SpiceServer::playback`] and [`SpiceServer::record`].
    pub fn sound(mut self, sound: bool) -> Self {
        self.sound = sound;
        self
    }

    /// Keeps what clients send.
    pub fn capture(mut self, capture: Option<Capture>) -> Self {
        self.capture = capture;
        self
    }

    /// Which codecs films may be sent with. Libraries are loaded by [`start`](Self::start).
    pub fn video_codecs(mut self, codecs: VideoCodecs) -> Self {
        self.video = codecs;
        self
    }

    /// Whether films keep their codec however long its frames take to encode; not unless set: a codec that
    /// takes most of the time between two frames is not used for a while. For tests, which a slow machine
    /// is to make slow and not different.
    pub fn keep_slow_codecs(mut self, keep: bool) -> Self {
        self.keep_slow_codecs = keep;
        self
    }

    /// Who hears keyboard and mouse.
    pub fn input(mut self, input: Arc<dyn InputSink>) -> Self {
        self.input = Some(input);
        self
    }

    /// What clients and the guest's agent may exchange.
    pub fn agent_policy(mut self, policy: AgentPolicy) -> Self {
        self.agent_policy = policy;
        self
    }

    /// The guest agent's port.
    pub fn agent(mut self, agent: Arc<dyn AgentPort>) -> Self {
        self.agent = Some(agent);
        self
    }

    /// Who hears what viewers want from the displays.
    pub fn display_events(mut self, events: Arc<dyn DisplayEvents>) -> Self {
        self.events = Some(events);
        self
    }

    /// Who hears who comes, goes and fails.
    pub fn observer(mut self, observer: Arc<dyn EventSink>) -> Self {
        self.observer = Some(observer);
        self
    }

    /// Listens now on all addresses given so far, so that [`start`](Self::start) cannot fail for one
    /// of them. Clients that come meanwhile wait.
    pub fn bind(mut self) -> Result<Self, Error> {
        for address in self.addresses.drain(..) {
            self.listeners.push(match address {
                Address::Tcp { address, tls_only } => Listener::tcp(address, tls_only)
                    .map_err(|source| Error::Listen { address, source })?,
                Address::Unix { path, mode } => Listener::unix(&path, mode)
                    .map_err(|source| Error::ListenUnix { path, source })?,
            });
        }
        Ok(self)
    }

    /// Listens and starts the server's threads.
    pub fn start(self) -> Result<SpiceServer, Error> {
        let mut this = self.bind()?;
        let listeners = std::mem::take(&mut this.listeners);
        if listeners.is_empty() {
            return Err(Error::NoAddress);
        }
        let addresses = listeners.iter().filter_map(|listener| listener.local_addr().transpose());
        let addresses: Vec<SocketAddr> = addresses
            .collect::<io::Result<_>>()
            .map_err(|source| Error::Start { what: "listening sockets", source })?;
        this.serve(listeners, addresses)
    }

    fn serve(
        self,
        listeners: Vec<Listener>,
        addresses: Vec<SocketAddr>,
    ) -> Result<SpiceServer, Error> {
        if self.password.is_none() && !self.password_required {
            tracing::warn!(
                "no SPICE password: everybody who reaches {addresses:?} sees and drives the display"
            );
        }
        let start = |what| move |source| Error::Start { what, source };
        let io = Arc::new(Wake::new().map_err(start("wake-up event"))?);
        let count = self.displays.clamp(1, MAX_DISPLAYS);
        let displays: Vec<_> = (0..count).map(|_| Arc::new(DisplayShared::new())).collect();
        let config = Config {
            name: self.name,
            uuid: self.uuid,
            policy: self.policy,
            web: self.web,
            origins: self.origins,
            secure: self.secure,
            input: self.input,
            events: self.events,
            observer: self.observer,
            max_size: self.max_size,
            sound: self.sound.then(|| Sound::new(&io)),
            capture: self.capture.map(Arc::new),
            video: Arc::new(Video::load(self.video)?),
            keep_slow_codecs: self.keep_slow_codecs,
        };
        let password = Password::new(self.password, self.password_required);
        let rotate = password.is_required();
        let agent = AgentHub::new(self.agent, self.agent_policy);
        let shared = Arc::new(Shared::new(config, password, displays, agent, io.clone()));
        *lock(&shared.tls) = self.tls.map(|tls| tls.0);
        let for_keys = Arc::downgrade(&shared);
        let keys = KeyService::start(rotate, move |event| {
            if let Some(shared) = for_keys.upgrade() {
                shared.command(Command::Key(event));
            }
        })
        .map_err(start("key thread"))?;
        let reactor = Reactor::new(shared.clone(), listeners, keys).map_err(start("event loop"))?;
        let (ended, end) = mpsc::channel();
        let thread = thread::Builder::new()
            .name("spice-io".into())
            .spawn(move || {
                reactor.run();
                drop::<mpsc::Sender<()>>(ended);
            })
            .map_err(start("I/O thread"))?;
        Ok(SpiceServer { addresses, shared, thread: Mutex::new(Some((thread, end))) })
    }
}

/// A running server. Dropping it disconnects all clients and ends its threads, so it must not be
/// dropped from one of its own callbacks.
pub struct SpiceServer {
    addresses: Vec<SocketAddr>,
    shared: Arc<Shared>,
    /// The I/O thread, and what is disconnected at its end.
    thread: Mutex<Option<(JoinHandle<()>, Receiver<()>)>>,
}

impl SpiceServer {
    /// A builder with default settings.
    pub fn builder() -> ServerBuilder {
        ServerBuilder::default()
    }

    /// The first network address listened on, with the real port.
    pub fn local_addr(&self) -> Option<SocketAddr> {
        self.addresses.first().copied()
    }

    /// All network addresses listened on, in the builder's order.
    pub fn local_addrs(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// The handle of display `id`, counted from 0.
    pub fn display(&self, id: u32) -> Option<DisplayHandle> {
        let shared = self.shared.displays.get(id as usize)?.clone();
        Some(DisplayHandle { shared, io: self.shared.io.clone() })
    }

    /// What all clients hear; `None` unless the server was built with
    /// [`sound`](ServerBuilder::sound).
    pub fn playback(&self) -> Option<PlaybackHandle> {
        Some(PlaybackHandle(self.shared.config.sound.as_ref()?.playback.clone()))
    }

    /// What a client records; `None` unless the server was built with
    /// [`sound`](ServerBuilder::sound).
    pub fn record(&self) -> Option<RecordHandle> {
        Some(RecordHandle(self.shared.config.sound.as_ref()?.record.clone()))
    }

    /// The server's end of the guest agent's port.
    pub fn agent(&self) -> AgentHandle {
        AgentHandle { shared: self.shared.clone() }
    }

    /// Shows the guest's keyboard lights to the clients.
    pub fn set_leds(&self, leds: Leds) {
        *lock(&self.shared.leds) = Some(leds);
        self.shared.io.wake();
    }

    /// Tells the people at the clients something. Clients decide how: spice-gtk's write it to their
    /// log.
    pub fn notify(&self, severity: Severity, text: &str) {
        lock(&self.shared.notices).add(severity, text);
        self.shared.io.wake();
    }

    /// The mouse mode now in use.
    pub fn mouse_mode(&self) -> MouseMode {
        *lock(&self.shared.mouse_mode)
    }

    /// From now on clients have to know this password. Those that are in stay in.
    pub fn set_password(&self, password: Secret, expires: Expiry) {
        lock(&self.shared.password).set(password, expires);
        self.shared.command(Command::PasswordChanged);
    }

    /// Until when the password is good. Without one, nobody else comes in once it is over.
    pub fn expire_password(&self, expires: Expiry) {
        lock(&self.shared.password).expire(expires);
    }

    /// Offers TLS with another certificate from now on. Connections that are there are not concerned.
    pub fn set_tls(&self, tls: &TlsConfig) {
        *lock(&self.shared.tls) = Some(tls.0.clone());
    }

    /// Disconnects all clients.
    pub fn disconnect(&self) {
        self.shared.command(Command::Disconnect);
    }

    /// Disconnects everybody and ends the server for good, as dropping it does. Must not be called from
    /// one of its own callbacks; one that does not return is left behind after a few seconds.
    pub fn stop(&self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.io.wake();
        let Some((thread, end)) = lock(&self.thread).take() else { return };
        if let Err(RecvTimeoutError::Timeout) = end.recv_timeout(STOP_TIMEOUT) {
            tracing::error!("the SPICE server's threads do not end; they are left behind");
            return;
        }
        let _ = thread.join();
    }

    /// Who is connected.
    pub fn status(&self) -> ServerStatus {
        let sessions = lock(&self.shared.sessions).clone();
        let totals = &self.shared.totals;
        let refused = totals.refused.iter().map(|counter| counter.load(Ordering::Relaxed));
        let status = |session: &Arc<Session>| session.status(self.shared.drives(session.id));
        ServerStatus {
            clients: sessions.iter().map(status).collect(),
            pending_connections: self.shared.pending_links.load(Ordering::Relaxed),
            agent_open: self.shared.agent.is_open(),
            connections: totals.connections.load(Ordering::Relaxed),
            wrong_passwords: totals.wrong_passwords.load(Ordering::Relaxed),
            refused: Refusal::ALL.into_iter().zip(refused).collect(),
        }
    }
}

/// How bad what [`SpiceServer::notify`] tells is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    /// News.
    Info = 0,
    /// Something is amiss.
    Warning = 1,
    /// Something failed.
    Error = 2,
}

impl Drop for SpiceServer {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The server's end of the guest agent's port; cheap to clone.
#[derive(Clone)]
pub struct AgentHandle {
    shared: Arc<Shared>,
}

impl AgentHandle {
    /// Bytes from the guest. Returns how many were taken; after less than all, offer the rest when
    /// [`AgentPort::guest_data_wanted`] is called.
    pub fn guest_data(&self, bytes: &[u8]) -> usize {
        let taken = self.shared.agent.guest_data(bytes);
        self.shared.io.wake();
        taken
    }

    /// The guest opened (`true`) or closed its end of the port.
    pub fn guest_opened(&self, open: bool) {
        if self.shared.agent.is_open() != open {
            self.shared.emit(ServerEvent::Agent { open });
        }
        self.shared.agent.guest_opened(open);
        self.shared.io.wake();
    }

    /// [`AgentPort::to_guest`] has room again after it had taken less than offered.
    pub fn writable(&self) {
        self.shared.io.wake();
    }
}

/// Who is connected.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ServerStatus {
    /// Authenticated clients, longest connected first.
    pub clients: Vec<ClientStatus>,
    /// Connections that have not authenticated yet.
    pub pending_connections: usize,
    /// Whether the guest's agent has its port open.
    pub agent_open: bool,
    /// Connections accepted since the start, those of strangers included.
    pub connections: u64,
    /// Wrong or expired passwords since the start.
    pub wrong_passwords: u64,
    /// Who did not get in since the start, by the reason.
    pub refused: Vec<(Refusal, u64)>,
}

/// One client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientStatus {
    /// Number of the session, random.
    pub session: u32,
    /// Where it connected from.
    pub peer: Peer,
    /// How long it has been connected.
    pub connected_for: Duration,
    /// Whether its keys, pointer and wishes count, or it only watches.
    pub drives: bool,
    /// Its open channels.
    pub channels: Vec<ChannelStatus>,
    /// Bytes sent on all its channels.
    pub bytes_sent: u64,
    /// Bytes received on all its channels.
    pub bytes_received: u64,
    /// What its display channels did.
    pub displays: Vec<DisplayStats>,
}

/// One channel of a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChannelStatus {
    /// For example `main` or `display 0`.
    pub name: String,
    /// The layers of its connection: `tcp` or `unix`, with `+tls1.3` and `+websocket` over it.
    pub transport: String,
    /// Bytes sent on it.
    pub bytes_sent: u64,
    /// Bytes received on it.
    pub bytes_received: u64,
    /// Bytes that wait for room in its socket.
    pub bytes_waiting: u64,
    /// Messages received that were not looked at because there were too many: sound that came faster
    /// than it can be recorded.
    pub messages_dropped: u64,
}
