//! The I/O thread: accepts connections, runs links, and serves all channels but display.

mod handshake;
mod http;

use std::{
    collections::HashMap,
    io,
    net::IpAddr,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, atomic::Ordering},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use rustix::event::{Timespec, epoll};

use super::{
    channels::{Channel, Context, SOFT_LIMIT},
    guard::{self, Guard, source},
    keys::{KeyEvent, KeyService},
    links::{FailureDelay, PendingLink},
    listen::Listener,
    shared::{Command, Session, Shared, Traffic, lock},
    stream::{Peer, READ, Stream},
    sys::ask_for_short_turns,
    viewer::{ViewerHandle, is_hangup},
};
use crate::{
    MouseMode, Refusal, ServerEvent,
    display::stats::count,
    proto::{channel::ChannelType, link::LinkCode},
};

/// Most connections that have not authenticated; one more pushes one out, of the address that has
/// most of them.
const MAX_PENDING: usize = 96;
/// How long a client may take to authenticate.
const LINK_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a connection may take to accept its last bytes.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// Most unsent bytes of a connection; a client that lets more pile up is cut off.
const MAX_UNSENT: usize = 512 * 1024;
/// How long no connections are accepted after the system refused one.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// Most bytes taken from a connection that has not authenticated; a TLS handshake, a request for a
/// page and a link have less than half of that.
const MAX_STRANGER: u64 = 64 * 1024;
/// How often one connection is read before it is others' turn.
const READS: usize = 8;

const TOKEN_WAKE: u64 = 0;
const TOKEN_LISTENERS: u64 = 1;
const TOKEN_CONNECTIONS: u64 = 1 << 16;

/// A connection the reactor serves.
struct Connection {
    stream: Stream,
    peer: Peer,
    /// It came to a port for TLS only.
    tls_only: bool,
    out: Vec<u8>,
    sent: usize,
    /// Whether epoll reports room in the socket.
    wants_room: bool,
    /// The client has said all it will say, and is to be sent what is left.
    ended: bool,
    stage: Stage,
}

enum Stage {
    Link(Box<PendingLink>),
    Channel(Arc<Session>, Arc<Traffic>, Box<Channel>),
    /// A browser that has begun to ask.
    Http {
        head: Vec<u8>,
        until: Instant,
    },
    /// Only unsent bytes are left to go, and then the rest of a page.
    Closing {
        until: Instant,
        page: Option<Page>,
    },
}

/// What is left of a file of the page for browsers.
struct Page {
    content: Arc<[u8]>,
    sent: usize,
}

impl Connection {
    /// Tells epoll what is awaited now.
    fn watch(&self, epoll: &OwnedFd, token: u64) {
        let mut flags = epoll::EventFlags::empty();
        flags.set(epoll::EventFlags::IN, !self.ended);
        flags.set(epoll::EventFlags::OUT, self.wants_room);
        let data = epoll::EventData::new_u64(token);
        if let Err(error) = epoll::modify(epoll, &self.stream, data, flags) {
            tracing::warn!(%error, "cannot watch a connection");
        }
    }

    /// Takes the next part of a page, once everything before it is gone; whether there was one.
    fn next_part(&mut self) -> bool {
        let Stage::Closing { page: Some(page), .. } = &mut self.stage else { return false };
        let rest = page.content.get(page.sent..).unwrap_or_default();
        let part = rest.get(..READ).unwrap_or(rest);
        self.out.clear();
        self.out.extend_from_slice(part);
        self.sent = 0;
        page.sent += part.len();
        !part.is_empty()
    }
}

struct SessionEntry {
    session: Arc<Session>,
    main: u64,
    viewers: HashMap<u8, ViewerHandle>,
}

/// The I/O thread's state.
pub(crate) struct Reactor {
    shared: Arc<Shared>,
    epoll: OwnedFd,
    listeners: Vec<Listener>,
    connections: HashMap<u64, Connection>,
    sessions: Vec<SessionEntry>,
    viewer_threads: Vec<JoinHandle<()>>,
    /// Connections whose layers may hold more than was read.
    read_again: Vec<u64>,
    /// When accepting, which the system refused, is tried again.
    accept_again: Option<Instant>,
    next_token: u64,
    keys: KeyService,
    failures: FailureDelay,
    guard: Guard,
}

impl Reactor {
    pub(crate) fn new(
        shared: Arc<Shared>,
        listeners: Vec<Listener>,
        keys: KeyService,
    ) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let watch = |fd: std::os::fd::BorrowedFd<'_>, token| {
            epoll::add(&epoll, fd, epoll::EventData::new_u64(token), epoll::EventFlags::IN)
        };
        watch(shared.io.as_fd(), TOKEN_WAKE)?;
        for (token, listener) in (TOKEN_LISTENERS..).zip(&listeners) {
            watch(listener.as_fd(), token)?;
        }
        Ok(Self {
            shared,
            epoll,
            listeners,
            connections: HashMap::new(),
            sessions: Vec::new(),
            viewer_threads: Vec::new(),
            read_again: Vec::new(),
            accept_again: None,
            next_token: TOKEN_CONNECTIONS,
            keys,
            failures: FailureDelay::default(),
            guard: Guard::default(),
        })
    }

    /// Serves until the server stops.
    pub(crate) fn run(mut self) {
        if self.shared.config.sound.is_some()
            && let Err(error) = ask_for_short_turns()
        {
            tracing::debug!(%error, "sound goes at the pace of everything else");
        }
        let mut events = [epoll::Event {
            flags: epoll::EventFlags::empty(),
            data: epoll::EventData::new_u64(0),
        }; 32];
        while !self.shared.stop.load(Ordering::Acquire) {
            let timeout = self.next_timer().map(|at| {
                let pause = at.saturating_duration_since(Instant::now());
                Timespec { tv_sec: pause.as_secs() as i64, tv_nsec: pause.subsec_nanos().into() }
            });
            let timeout =
                if self.read_again.is_empty() { timeout } else { Some(Timespec::default()) };
            let count = match epoll::wait(&self.epoll, &mut events, timeout.as_ref()) {
                Ok(count) => count,
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => {
                    tracing::error!(%error, "epoll failed, the SPICE server stops");
                    break;
                }
            };
            for event in events.iter().take(count) {
                match event.data.u64() {
                    TOKEN_WAKE => self.shared.io.clear(),
                    token if token < TOKEN_CONNECTIONS => self.accept(token),
                    token => self.connection_ready(token, event.flags),
                }
            }
            for token in std::mem::take(&mut self.read_again) {
                self.read(token);
            }
            self.run_commands();
            self.run_timers();
            self.serve_channels();
            self.update_status();
        }
        let sessions: Vec<u32> = self.sessions.iter().map(|entry| entry.session.id).collect();
        for session in sessions {
            self.disconnect_session(session);
        }
        for thread in self.viewer_threads {
            let _ = thread.join();
        }
    }

    // ---- connections ----

    fn accept(&mut self, token: u64) {
        let Some(listener) = self.listeners.get((token - TOKEN_LISTENERS) as usize) else { return };
        let tls_only = listener.tls_only;
        let (socket, peer) = match listener.accept() {
            Ok(accepted) => accepted,
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted
                ) =>
            {
                return;
            }
            Err(error) => {
                // Out of descriptors, most likely: epoll would report the listener for ever.
                tracing::warn!(%error, "cannot accept connections for a while");
                self.watch_listeners(false);
                self.accept_again = Some(Instant::now() + ACCEPT_PAUSE);
                return;
            }
        };
        count(&self.shared.totals.connections, 1);
        if !self.guard.connection(&peer, Instant::now()) {
            // Dropped without a word, which is the cheapest.
            tracing::debug!(%peer, "too many connections from there");
            let reason = Refusal::TooManyConnections;
            return self.shared.emit(ServerEvent::Refused { peer, reason });
        }
        self.make_room(&peer);
        let token = self.next_token;
        self.next_token += 1;
        let data = epoll::EventData::new_u64(token);
        if let Err(error) = epoll::add(&self.epoll, &socket, data, epoll::EventFlags::IN) {
            tracing::warn!(%peer, %error, "cannot set up a connection");
            return;
        }
        let link = PendingLink::new(Instant::now() + LINK_TIMEOUT);
        let connection = Connection {
            stream: Stream::new(socket, lock(&self.shared.tls).clone()),
            peer,
            tls_only,
            out: Vec::new(),
            sent: 0,
            wants_room: false,
            ended: false,
            stage: Stage::Link(Box::new(link)),
        };
        self.connections.insert(token, connection);
    }

    fn watch_listeners(&self, watch: bool) {
        let flags = if watch { epoll::EventFlags::IN } else { epoll::EventFlags::empty() };
        for (token, listener) in (TOKEN_LISTENERS..).zip(&self.listeners) {
            let data = epoll::EventData::new_u64(token);
            if let Err(error) = epoll::modify(&self.epoll, listener, data, flags) {
                tracing::error!(%error, "cannot watch a listening socket");
            }
        }
    }

    /// Pushes a connection out that has not authenticated, if there are too many: the oldest one of
    /// this peer's address, or of the address that has most of them.
    fn make_room(&mut self, peer: &Peer) {
        let mut pending: HashMap<Option<IpAddr>, (usize, u64)> = HashMap::new();
        for (token, connection) in &self.connections {
            if !matches!(connection.stage, Stage::Channel(..)) {
                let entry = pending.entry(source(&connection.peer)).or_insert((0, *token));
                *entry = (entry.0 + 1, entry.1.min(*token));
            }
        }
        let own = pending.get(&source(peer)).filter(|own| own.0 >= guard::MAX_PENDING);
        let all: usize = pending.values().map(|(count, _)| count).sum();
        let most = pending.values().max_by_key(|(count, _)| *count);
        let out = own.or(most.filter(|_| all >= MAX_PENDING)).map(|(_, oldest)| *oldest);
        if let Some(token) = out {
            tracing::debug!("too many pending connections, an old one is dropped");
            self.drop_connection(token);
        }
    }

    fn connection_ready(&mut self, token: u64, flags: epoll::EventFlags) {
        if flags.contains(epoll::EventFlags::OUT) {
            self.flush(token);
        }
        if flags.intersects(!epoll::EventFlags::OUT) {
            self.read(token);
        }
    }

    /// Reads what there is, or a fair share of it.
    fn read(&mut self, token: u64) {
        let mut buffer = [0; READ];
        for _ in 0..READS {
            let Some(connection) = self.connections.get_mut(&token) else { return };
            let result = connection.stream.read(&mut buffer);
            if !matches!(connection.stage, Stage::Channel(..))
                && connection.stream.bytes_taken() > MAX_STRANGER
            {
                let error = io::Error::other("too many bytes of a stranger");
                return self.hang_up(token, &error);
            }
            match result {
                Ok(0) if matches!(connection.stage, Stage::Closing { .. }) && !connection.ended => {
                    connection.ended = true;
                    connection.watch(&self.epoll, token);
                    return;
                }
                Ok(0) => return self.hang_up(token, &io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => self.received(token, buffer.get(..count).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // A layer may have something to answer.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return self.flush(token);
                }
                Err(error) => return self.hang_up(token, &error),
            }
            let layered = |connection: &Connection| connection.stream.is_layered();
            if !self.connections.get(&token).is_some_and(layered) {
                return;
            }
        }
        self.read_again.push(token);
    }

    fn received(&mut self, token: u64, bytes: &[u8]) {
        let Some(connection) = self.connections.get_mut(&token) else { return };
        match &mut connection.stage {
            Stage::Link(pending)
                if pending.is_fresh()
                    && bytes.first() == Some(&b'G')
                    && !connection.stream.is_websocket() =>
            {
                let until = pending.deadline();
                connection.stage = Stage::Http { head: bytes.to_vec(), until };
                self.run_http(token);
            }
            Stage::Http { head, .. } => {
                head.extend_from_slice(bytes);
                self.run_http(token);
            }
            Stage::Link(pending) => {
                pending.link.receive(bytes);
                if pending.link.overflowed() {
                    return self.drop_connection(token);
                }
                self.run_link(token);
            }
            Stage::Channel(session, traffic, channel) => {
                session.note_received(traffic, bytes);
                let mut context =
                    Context { shared: &self.shared, session: session.id, out: &mut connection.out };
                let result = channel.receive(bytes, &mut context);
                count(&traffic.dropped, channel.take_dropped());
                if let Err(error) = result {
                    let error = io::Error::new(io::ErrorKind::InvalidData, error);
                    return self.hang_up(token, &error);
                }
                self.flush(token);
            }
            Stage::Closing { .. } => {}
        }
    }

    /// Sends what the socket takes; asks epoll for more room if it is full.
    fn flush(&mut self, token: u64) {
        let Some(connection) = self.connections.get_mut(&token) else { return };
        let mut result = Ok(());
        loop {
            let Some(rest) = connection.out.get(connection.sent..).filter(|rest| !rest.is_empty())
            else {
                if connection.next_part() {
                    continue;
                }
                break;
            };
            match connection.stream.write(rest) {
                Ok(0) => {
                    result = Err(io::ErrorKind::BrokenPipe.into());
                    break;
                }
                Ok(count) => {
                    connection.sent += count;
                    if let Stage::Channel(session, traffic, _) = &connection.stage {
                        session.count_sent(traffic, count);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
        }
        let blocked = match result.and_then(|()| connection.stream.flush()) {
            Ok(()) => false,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => true,
            Err(error) => return self.hang_up(token, &error),
        };
        let unsent = connection.out.len() - connection.sent;
        if let Stage::Channel(_, traffic, _) = &connection.stage {
            traffic.waiting.store(unsent as u64, Ordering::Relaxed);
        }
        if unsent == 0 && !blocked {
            connection.out.clear();
            connection.sent = 0;
            if matches!(connection.stage, Stage::Closing { .. }) {
                return self.drop_connection(token);
            }
        } else if unsent > MAX_UNSENT {
            let error = io::Error::other("the client does not read what it is sent");
            return self.hang_up(token, &error);
        }
        let wants_room = unsent > 0 || blocked;
        if connection.wants_room != wants_room {
            connection.wants_room = wants_room;
            connection.watch(&self.epoll, token);
        }
    }

    /// Sends what is left and closes.
    fn close_after_flush(&mut self, token: u64) {
        if let Some(connection) = self.connections.get_mut(&token) {
            connection.stage = Stage::Closing { until: Instant::now() + CLOSE_TIMEOUT, page: None };
            self.flush(token);
        }
    }

    /// A connection failed or ended. A main channel takes its session along.
    fn hang_up(&mut self, token: u64, error: &io::Error) {
        let connection = self.connections.get(&token);
        match connection.map(|connection| (connection.peer, &connection.stage)) {
            Some((peer, Stage::Channel(session, _, channel))) => {
                let channel = channel.kind().name();
                if is_hangup(error) {
                    tracing::debug!(%peer, session = session.id, channel, "connection ended");
                } else {
                    tracing::warn!(%peer, session = session.id, channel, %error, "connection failed");
                }
            }
            // TLS that cannot be, most likely: the client does not trust the certificate.
            Some((peer, Stage::Link(_))) if !is_hangup(error) && self.guard.may_log() => {
                tracing::info!(%peer, %error, "a connection failed before it was a channel");
            }
            _ => {}
        }
        self.drop_connection(token);
    }

    fn drop_connection(&mut self, token: u64) {
        let Some(mut connection) = self.connections.remove(&token) else { return };
        let _ = epoll::delete(&self.epoll, &connection.stream);
        connection.stream.close();
        if let Stage::Channel(session, _, mut channel) = connection.stage {
            channel.closed(session.id, &self.shared);
            let (kind, id) = channel.key();
            session.closed(kind, id);
            if channel.kind() == ChannelType::Main {
                self.end_session(session.id);
            }
        }
    }

    // ---- sessions ----

    /// Tells a client that it is being disconnected and closes all its channels.
    fn disconnect_session(&mut self, id: u32) {
        let known = |entry: &&SessionEntry| entry.session.id == id;
        let Some(main) = self.sessions.iter().find(known).map(|entry| entry.main) else { return };
        if let Some(connection) = self.connections.get_mut(&main)
            && let Stage::Channel(_, _, channel) = &mut connection.stage
        {
            channel.say_goodbye(&mut connection.out);
        }
        self.flush(main);
        self.drop_connection(main);
    }

    /// The main channel is gone: so are the others.
    fn end_session(&mut self, id: u32) {
        let Some(index) = self.sessions.iter().position(|entry| entry.session.id == id) else {
            return;
        };
        let entry = self.sessions.remove(index);
        tracing::info!(peer = %entry.session.peer, session = id, "client disconnected");
        self.shared.emit(entry.session.gone());
        lock(&self.shared.sessions).retain(|session| session.id != id);
        entry.viewers.values().for_each(ViewerHandle::close);
        if self.sessions.is_empty() {
            *lock(&self.shared.mouse_mode) = MouseMode::Client;
        }
        let of_session = |connection: &Connection| matches!(&connection.stage, Stage::Channel(session, ..) if session.id == id);
        let tokens: Vec<u64> =
            self.connections.iter().filter(|(_, c)| of_session(c)).map(|(t, _)| *t).collect();
        for token in tokens {
            self.drop_connection(token);
        }
    }

    // ---- everything else ----

    fn run_commands(&mut self) {
        let commands = std::mem::take(&mut *lock(&self.shared.commands));
        for command in commands {
            match command {
                Command::PasswordChanged => {
                    let required = lock(&self.shared.password).is_required();
                    self.keys.rotate(required);
                }
                Command::Disconnect => {
                    let all: Vec<u32> = self.sessions.iter().map(|e| e.session.id).collect();
                    all.into_iter().for_each(|session| self.disconnect_session(session));
                }
                Command::Key(KeyEvent::Ready) => self.serve_key_waiters(),
                Command::Key(KeyEvent::Verified { token, ok }) => self.ticket_verified(token, ok),
                Command::ViewerGone { session, display } => {
                    self.viewer_threads.retain(|thread| !thread.is_finished());
                    let known = |entry: &&mut SessionEntry| entry.session.id == session;
                    if let Some(entry) = self.sessions.iter_mut().find(known) {
                        entry.viewers.remove(&display);
                        entry.session.closed(ChannelType::Display, display);
                    }
                }
            }
        }
    }

    fn serve_key_waiters(&mut self) {
        let waits = |c: &Connection| matches!(&c.stage, Stage::Link(link) if link.waits_for_key);
        let tokens: Vec<u64> =
            self.connections.iter().filter(|(_, c)| waits(c)).map(|(t, _)| *t).collect();
        for token in tokens {
            if let Some(key) = self.keys.key_for_link() {
                self.offer_key(token, key);
                self.run_link(token);
            }
        }
    }

    fn next_timer(&self) -> Option<Instant> {
        let connections = self.connections.values().filter_map(|c| match &c.stage {
            Stage::Link(link) => Some(link.next_timer()),
            Stage::Http { until, .. } | Stage::Closing { until, .. } => Some(*until),
            Stage::Channel(_, _, channel) => channel.next_timer(),
        });
        connections.chain(self.accept_again).min()
    }

    fn run_timers(&mut self) {
        let now = Instant::now();
        if self.accept_again.take_if(|at| *at <= now).is_some() {
            self.watch_listeners(true);
        }
        let mut refuse = Vec::new();
        let mut expired = Vec::new();
        for (token, connection) in &mut self.connections {
            match &mut connection.stage {
                Stage::Link(link) if link.answer_failure_at.is_some_and(|at| at <= now) => {
                    refuse.push(*token);
                }
                Stage::Link(link) if link.next_timer() <= now => expired.push(*token),
                Stage::Http { until, .. } | Stage::Closing { until, .. } if *until <= now => {
                    expired.push(*token);
                }
                Stage::Channel(session, _, channel) => {
                    if channel.next_timer().is_some_and(|at| at <= now) {
                        let mut context = Context {
                            shared: &self.shared,
                            session: session.id,
                            out: &mut connection.out,
                        };
                        channel.timer(now, &mut context);
                    }
                }
                Stage::Link(_) | Stage::Http { .. } | Stage::Closing { .. } => {}
            }
        }
        for token in refuse {
            if let Some(connection) = self.connections.get_mut(&token)
                && let Stage::Link(pending) = &mut connection.stage
            {
                pending.link.finish(LinkCode::PermissionDenied, &mut connection.out);
                self.close_after_flush(token);
            }
        }
        for token in expired {
            tracing::debug!("connection timed out before it authenticated");
            self.drop_connection(token);
        }
    }

    /// Lets every channel send what changed since it last did.
    fn serve_channels(&mut self) {
        // First, because every chunk that the guest takes is a token for the client.
        self.shared.agent.pump();
        let mut dirty = Vec::new();
        for (token, connection) in &mut self.connections {
            if let Stage::Channel(session, _, channel) = &mut connection.stage {
                let before = connection.out.len();
                let mut context =
                    Context { shared: &self.shared, session: session.id, out: &mut connection.out };
                channel.serve(&mut context);
                if connection.out.len() != before {
                    dirty.push((*token, connection.out.len() >= SOFT_LIMIT));
                }
            }
        }
        let mut again = false;
        for (token, held_back) in dirty {
            self.flush(token);
            // While the socket is full, it is epoll that comes back.
            let sent = |connection: &Connection| connection.out.is_empty();
            again |= held_back && self.connections.get(&token).is_some_and(sent);
        }
        self.shared.agent.resume_guest();
        // Who went just now may have left something for the guest to hear.
        again |= self.shared.agent.pump();
        if again {
            self.shared.io.wake();
        }
    }

    fn update_status(&self) {
        let pending =
            self.connections.values().filter(|c| !matches!(c.stage, Stage::Channel(..))).count();
        self.shared.pending_links.store(pending, Ordering::Relaxed);
    }
}
