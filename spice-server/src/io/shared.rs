//! What the server's threads and the program's handles share.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Instant,
};

use super::{
    keys::KeyEvent,
    password::{Password, Ticket},
    stream::Peer,
    wake::Wake,
};
use crate::{
    ChannelStatus, ClientPolicy, ClientStatus, DisplayEvents, EventSink, InputSink, Leds,
    MouseMode, Refusal, SecureChannels, ServerEvent, Severity, WebPage,
    agent::hub::AgentHub,
    audio::Sound,
    capture::{Capture, Tap},
    display::{
        state::DisplayShared,
        stats::{Counters, count},
    },
    proto::channel::ChannelType,
    video::Video,
};

/// Locks a mutex; a thread that panicked inside does not take the others with it.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Settings that do not change.
pub(crate) struct Config {
    pub(crate) name: Option<String>,
    pub(crate) uuid: Option<[u8; 16]>,
    pub(crate) policy: ClientPolicy,
    /// What browsers are shown.
    pub(crate) web: Option<WebPage>,
    /// Origins of pages elsewhere that may connect.
    pub(crate) origins: Vec<String>,
    /// What must not be opened in the clear.
    pub(crate) secure: SecureChannels,
    pub(crate) input: Option<Arc<dyn InputSink>>,
    pub(crate) events: Option<Arc<dyn DisplayEvents>>,
    pub(crate) observer: Option<Arc<dyn EventSink>>,
    pub(crate) sound: Option<Sound>,
    /// Where what clients send is kept.
    pub(crate) capture: Option<Arc<Capture>>,
    /// How films can be encoded.
    pub(crate) video: Arc<Video>,
    /// However long encoding takes, a film's codec stays.
    pub(crate) keep_slow_codecs: bool,
    /// Largest width and height a client may ask for.
    pub(crate) max_size: (u32, u32),
}

/// What other threads tell the reactor.
pub(crate) enum Command {
    Key(KeyEvent),
    PasswordChanged,
    /// All clients are to go.
    Disconnect,
    /// A display channel's thread is over.
    ViewerGone {
        session: u32,
        display: u8,
    },
}

pub(crate) struct Shared {
    pub(crate) config: Config,
    pub(crate) password: Mutex<Password>,
    /// Offered to clients that begin with TLS.
    pub(crate) tls: Mutex<Option<Arc<rustls::ServerConfig>>>,
    pub(crate) totals: Totals,
    pub(crate) displays: Vec<Arc<DisplayShared>>,
    pub(crate) agent: AgentHub,
    /// Wakes the reactor.
    pub(crate) io: Arc<Wake>,
    pub(crate) stop: AtomicBool,
    pub(crate) commands: Mutex<Vec<Command>>,
    /// The guest's lights, once it has said anything about them.
    pub(crate) leds: Mutex<Option<Leds>>,
    pub(crate) mouse_mode: Mutex<MouseMode>,
    pub(crate) notices: Mutex<Notices>,
    pub(crate) sessions: Mutex<Vec<Arc<Session>>>,
    pub(crate) pending_links: AtomicUsize,
    viewers: Mutex<usize>,
    /// When the multimedia clock was 0.
    pub(crate) clock: Instant,
}

/// The newest texts for the people at the clients.
#[derive(Default)]
pub(crate) struct Notices {
    /// Of the newest one; they are counted from 1.
    pub(crate) last: u64,
    recent: VecDeque<(Severity, String)>,
}

impl Notices {
    /// Kept for clients that are slow to take them.
    const MAX: usize = 8;

    pub(crate) fn add(&mut self, severity: Severity, text: &str) {
        self.last += 1;
        self.recent.push_back((severity, text.to_owned()));
        if self.recent.len() > Self::MAX {
            self.recent.pop_front();
        }
    }

    /// Those after number `seen`, as far as they are still there.
    pub(crate) fn after(&self, seen: u64) -> impl Iterator<Item = &(Severity, String)> {
        let new = usize::try_from(self.last.saturating_sub(seen)).unwrap_or(usize::MAX);
        self.recent.iter().skip(self.recent.len().saturating_sub(new))
    }
}

/// What happened at the door since the start.
#[derive(Default)]
pub(crate) struct Totals {
    pub(crate) connections: AtomicU64,
    pub(crate) wrong_passwords: AtomicU64,
    pub(crate) refused: [AtomicU64; Refusal::ALL.len()],
}

/// One authenticated client.
pub(crate) struct Session {
    pub(crate) id: u32,
    pub(crate) peer: Peer,
    /// What let it in, and its other channels.
    pub(crate) ticket: Ticket,
    since: Instant,
    channels: Mutex<Vec<Arc<Traffic>>>,
    sent: AtomicU64,
    received: AtomicU64,
    /// What its display channels count; of one that was opened again, what it counts now.
    displays: Mutex<Vec<(u8, Arc<Counters>)>>,
}

/// What goes through one of its channels.
pub(crate) struct Traffic {
    kind: ChannelType,
    id: u8,
    transport: String,
    sent: AtomicU64,
    received: AtomicU64,
    /// Bytes that wait for the socket.
    pub(crate) waiting: AtomicU64,
    /// Messages of the client that were too many and not looked at.
    pub(crate) dropped: AtomicU64,
    /// Where what the client sends is kept, if it is.
    tap: Option<Tap>,
}

impl Traffic {
    fn name(&self) -> String {
        match self.kind {
            ChannelType::Display | ChannelType::Cursor => {
                format!("{} {}", self.kind.name(), self.id)
            }
            kind => kind.name().to_owned(),
        }
    }
}

impl Session {
    pub(crate) fn new(id: u32, peer: Peer, ticket: Ticket) -> Self {
        Self {
            id,
            peer,
            ticket,
            since: Instant::now(),
            channels: Mutex::default(),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            displays: Mutex::default(),
        }
    }

    /// A channel begins; `transport` describes its connection.
    pub(crate) fn open(
        &self,
        kind: ChannelType,
        id: u8,
        transport: String,
        tap: Option<Tap>,
    ) -> Arc<Traffic> {
        let traffic = Arc::new(Traffic {
            kind,
            id,
            transport,
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            waiting: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            tap,
        });
        lock(&self.channels).push(traffic.clone());
        traffic
    }

    pub(crate) fn has_open(&self, kind: ChannelType, id: u8) -> bool {
        lock(&self.channels).iter().any(|open| (open.kind, open.id) == (kind, id))
    }

    /// A display channel counts here. A client may open and close them as often as it likes.
    pub(crate) fn count_display(&self, number: u8, counters: Arc<Counters>) {
        let mut displays = lock(&self.displays);
        displays.retain(|(other, _)| *other != number);
        displays.push((number, counters));
    }

    /// A channel ends.
    pub(crate) fn closed(&self, kind: ChannelType, id: u8) {
        lock(&self.channels).retain(|open| (open.kind, open.id) != (kind, id));
    }

    pub(crate) fn count_sent(&self, traffic: &Traffic, bytes: usize) {
        traffic.sent.fetch_add(bytes as u64, Ordering::Relaxed);
        self.sent.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Counts what a client sent, and keeps it where that is wanted.
    pub(crate) fn note_received(&self, traffic: &Traffic, bytes: &[u8]) {
        traffic.received.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        self.received.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        if let Some(tap) = &traffic.tap {
            tap.bytes(bytes);
        }
    }

    /// That it is gone.
    pub(crate) fn gone(&self) -> ServerEvent {
        ServerEvent::ClientDisconnected {
            session: self.id,
            peer: self.peer,
            after: self.since.elapsed(),
            bytes_sent: self.sent.load(Ordering::Relaxed),
            bytes_received: self.received.load(Ordering::Relaxed),
        }
    }

    pub(crate) fn status(&self, drives: bool) -> ClientStatus {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let channel = |traffic: &Arc<Traffic>| ChannelStatus {
            name: traffic.name(),
            transport: traffic.transport.clone(),
            bytes_sent: read(&traffic.sent),
            bytes_received: read(&traffic.received),
            bytes_waiting: read(&traffic.waiting),
            messages_dropped: read(&traffic.dropped),
        };
        ClientStatus {
            session: self.id,
            peer: self.peer,
            connected_for: self.since.elapsed(),
            drives,
            channels: lock(&self.channels).iter().map(channel).collect(),
            bytes_sent: read(&self.sent),
            bytes_received: read(&self.received),
            displays: lock(&self.displays).iter().map(|(id, c)| c.stats((*id).into())).collect(),
        }
    }
}

impl Shared {
    pub(crate) fn new(
        config: Config,
        password: Password,
        displays: Vec<Arc<DisplayShared>>,
        agent: AgentHub,
        io: Arc<Wake>,
    ) -> Self {
        Self {
            config,
            password: Mutex::new(password),
            tls: Mutex::default(),
            totals: Totals::default(),
            displays,
            agent,
            io,
            stop: AtomicBool::new(false),
            commands: Mutex::default(),
            leds: Mutex::default(),
            mouse_mode: Mutex::new(MouseMode::Client),
            notices: Mutex::default(),
            sessions: Mutex::default(),
            pending_links: AtomicUsize::new(0),
            viewers: Mutex::default(),
            clock: Instant::now(),
        }
    }

    /// Tells the program.
    pub(crate) fn emit(&self, event: ServerEvent) {
        match &event {
            ServerEvent::WrongPassword { .. } => count(&self.totals.wrong_passwords, 1),
            ServerEvent::Refused { reason, .. } => {
                if let Some(counter) = self.totals.refused.get(*reason as usize) {
                    count(counter, 1);
                }
            }
            _ => {}
        }
        if let Some(observer) = &self.config.observer {
            observer.event(event);
        }
    }

    /// Whether a client's keys, pointer and wishes count, or it only watches.
    pub(crate) fn drives(&self, session: u32) -> bool {
        self.config.policy != ClientPolicy::ViewOnly
            || lock(&self.sessions).first().is_some_and(|first| first.id == session)
    }

    /// Hands the reactor a command.
    pub(crate) fn command(&self, command: Command) {
        lock(&self.commands).push(command);
        self.io.wake();
    }

    /// A display channel began or ended. The lock orders the program's notifications.
    pub(crate) fn count_viewer(&self, joined: bool) {
        let mut viewers = lock(&self.viewers);
        let before = *viewers;
        *viewers = if joined { before + 1 } else { before.saturating_sub(1) };
        if let Some(events) = &self.config.events
            && (before == 0) != (*viewers == 0)
        {
            events.viewers_changed(*viewers > 0);
        }
    }
}
