//! Connections on their way to become channels: link, ticket, result.

use std::{
    collections::HashMap,
    io,
    sync::Arc,
    time::{Instant, SystemTime},
};

use rustix::event::epoll;

use super::{Reactor, SessionEntry, Stage};
use crate::{
    ClientPolicy, Refusal, ServerEvent,
    io::{
        channels::{Channel, Context},
        guard::source,
        password::Ticket,
        shared::{Session, lock},
        viewer::NewViewer,
    },
    proto::{
        channel::{ChannelType, cap_word},
        display, inputs,
        link::{LinkCode, LinkEvent, LinkRequest},
        main, playback, record,
        ticket::TicketKey,
    },
};

/// Most clients at a time under [`ClientPolicy::Shared`] and [`ClientPolicy::ViewOnly`].
const MAX_SESSIONS: usize = 16;

impl Reactor {
    pub(super) fn run_link(&mut self, token: u64) {
        loop {
            let Some(connection) = self.connections.get_mut(&token) else { return };
            let Stage::Link(pending) = &mut connection.stage else { return };
            match pending.link.poll() {
                None => break,
                Some(LinkEvent::Request(request)) => self.link_request(token, request),
                Some(LinkEvent::Ticket(ticket)) => {
                    let key = pending.key.take();
                    let request = pending.request.clone();
                    // Locked out, perhaps, since the link began.
                    if request.is_some_and(|request| self.locked_out(token, &request).is_some()) {
                        return self.refuse_guess(token);
                    }
                    let wanted = self.wanted_ticket(token);
                    match (wanted, key) {
                        (Ticket::None, _) => return self.link_done(token),
                        (Ticket::Password(secret), Some(key)) => {
                            self.keys.verify(token, key, ticket, secret);
                        }
                        (Ticket::Impossible, _) | (_, None) => self.ticket_verified(token, false),
                    }
                }
                Some(LinkEvent::Failure(code)) => {
                    tracing::debug!(peer = %connection.peer, ?code, "not a SPICE client");
                    pending.link.fail(code, &mut connection.out);
                    return self.close_after_flush(token);
                }
            }
        }
        self.flush(token);
    }

    /// The ticket a connection has to show: the one of the session it joins, else the one of the
    /// moment.
    fn wanted_ticket(&self, token: u64) -> Ticket {
        let joined = || {
            let Stage::Link(pending) = &self.connections.get(&token)?.stage else { return None };
            let session = pending.request.as_ref()?.connection_id;
            let known = |entry: &&SessionEntry| entry.session.id == session;
            Some(self.sessions.iter().find(known)?.session.ticket.clone())
        };
        joined().unwrap_or_else(|| lock(&self.shared.password).ticket(SystemTime::now()))
    }

    pub(super) fn link_request(&mut self, token: u64, request: LinkRequest) {
        let refusal = self
            .in_the_clear(token, &request)
            .or_else(|| self.locked_out(token, &request))
            .or_else(|| self.refusal(&request));
        let Some(connection) = self.connections.get_mut(&token) else { return };
        let Stage::Link(pending) = &mut connection.stage else { return };
        if let Some(code) = refusal {
            let peer = connection.peer;
            if self.guard.may_log() {
                tracing::info!(%peer, ?code, "link refused");
            }
            let reason = match code {
                LinkCode::NeedSecured => Some(Refusal::NotSecure),
                LinkCode::PermissionDenied => Some(Refusal::LockedOut),
                LinkCode::Error => Some(Refusal::Occupied),
                _ => None,
            };
            if let Some(reason) = reason {
                self.shared.emit(ServerEvent::Refused { peer, reason });
            }
            pending.link.reject(code, &mut connection.out);
            return self.close_after_flush(token);
        }
        pending.request = Some(request);
        match self.keys.key_for_link() {
            Some(key) => self.offer_key(token, key),
            None => pending.waits_for_key = true,
        }
    }

    /// Whether a link cannot be because it is not encrypted.
    fn in_the_clear(&self, token: u64, request: &LinkRequest) -> Option<LinkCode> {
        let connection = self.connections.get(&token)?;
        let secure = &self.shared.config.secure;
        let needed = connection.tls_only
            || request.known_type().is_some_and(|channel| secure.contains(channel));
        (needed && !connection.stream.is_secure()).then_some(LinkCode::NeedSecured)
    }

    /// Whether nobody from there may begin a session now. Clients that are in are not concerned.
    fn locked_out(&mut self, token: u64, request: &LinkRequest) -> Option<LinkCode> {
        let peer = self.connections.get(&token)?.peer;
        let joined = |entry: &SessionEntry| {
            let session = &entry.session;
            session.id == request.connection_id && source(&session.peer) == source(&peer)
        };
        if self.sessions.iter().any(joined) {
            return None;
        }
        self.guard.locked(&peer, Instant::now()).map(|_| LinkCode::PermissionDenied)
    }

    /// Why a link cannot be, if it cannot.
    fn refusal(&self, request: &LinkRequest) -> Option<LinkCode> {
        let Some(kind) = request.known_type() else { return Some(LinkCode::ChannelNotAvailable) };
        if kind == ChannelType::Main {
            return match request.connection_id {
                0 => self.session_refusal(),
                // A main channel of an existing session would be a migration's second half.
                _ => Some(LinkCode::BadConnectionId),
            };
        }
        let known = |entry: &&SessionEntry| entry.session.id == request.connection_id;
        let Some(entry) = self.sessions.iter().find(known) else {
            return Some(LinkCode::BadConnectionId);
        };
        let exists = match kind {
            ChannelType::Inputs => request.channel_id == 0,
            ChannelType::Playback | ChannelType::Record => {
                self.shared.config.sound.is_some() && request.channel_id == 0
            }
            _ => usize::from(request.channel_id) < self.shared.displays.len(),
        };
        let open = entry.session.has_open(kind, request.channel_id);
        (!exists || open).then_some(LinkCode::ChannelNotAvailable)
    }

    /// Why a new session cannot be, if it cannot.
    fn session_refusal(&self) -> Option<LinkCode> {
        let full = match self.shared.config.policy {
            ClientPolicy::Exclusive => false,
            ClientPolicy::Refuse => !self.sessions.is_empty(),
            ClientPolicy::Shared | ClientPolicy::ViewOnly => self.sessions.len() >= MAX_SESSIONS,
        };
        full.then_some(LinkCode::Error)
    }

    pub(super) fn offer_key(&mut self, token: u64, key: Arc<TicketKey>) {
        let Some(connection) = self.connections.get_mut(&token) else { return };
        let Stage::Link(pending) = &mut connection.stage else { return };
        let kind = pending.request.as_ref().and_then(LinkRequest::known_type);
        let caps = match kind {
            Some(ChannelType::Main) => {
                cap_word(&[main::CAP_NAME_AND_UUID, main::CAP_AGENT_CONNECTED_TOKENS])
            }
            Some(ChannelType::Display) => cap_word(&[
                display::CAP_MONITORS_CONFIG,
                display::CAP_STREAM_REPORT,
                display::CAP_PREF_COMPRESSION,
                display::CAP_PREF_VIDEO_CODEC,
            ]),
            Some(ChannelType::Inputs) => cap_word(&[inputs::CAP_KEY_SCANCODE]),
            Some(ChannelType::Playback) => cap_word(&[playback::CAP_VOLUME, playback::CAP_OPUS]),
            Some(ChannelType::Record) => cap_word(&[record::CAP_VOLUME, record::CAP_OPUS]),
            Some(ChannelType::Cursor) | None => 0,
        };
        pending.waits_for_key = false;
        pending.link.accept(key.public(), caps, &mut connection.out);
        pending.key = Some(key);
    }

    /// A ticket of somebody who is locked out: whether it is right is not said, and does not count.
    fn refuse_guess(&mut self, token: u64) {
        let Some(connection) = self.connections.get_mut(&token) else { return };
        let Stage::Link(pending) = &mut connection.stage else { return };
        let peer = connection.peer;
        pending.link.finish(LinkCode::PermissionDenied, &mut connection.out);
        if self.guard.may_log() {
            tracing::info!(%peer, "a ticket of a locked out address was not looked at");
        }
        self.shared.emit(ServerEvent::Refused { peer, reason: Refusal::LockedOut });
        self.close_after_flush(token);
    }

    pub(super) fn ticket_verified(&mut self, token: u64, ok: bool) {
        let now = Instant::now();
        let Some(connection) = self.connections.get_mut(&token) else { return };
        let Stage::Link(pending) = &mut connection.stage else { return };
        let peer = connection.peer;
        // Several tickets of one address may have been under way together.
        let request = pending.request.clone();
        if request.is_some_and(|request| self.locked_out(token, &request).is_some()) {
            return self.refuse_guess(token);
        }
        let Some(connection) = self.connections.get_mut(&token) else { return };
        let Stage::Link(pending) = &mut connection.stage else { return };
        if ok {
            self.failures.success();
            self.guard.success(&peer, now);
            return self.link_done(token);
        }
        pending.answer_failure_at = Some(now + self.failures.failure());
        let locked_out = self.guard.failure(&peer, now);
        match locked_out {
            _ if !self.guard.may_log() => {}
            None => tracing::warn!(%peer, "wrong SPICE password"),
            Some(pause) => {
                tracing::warn!(%peer, ?pause, "wrong SPICE passwords: the address is locked out");
            }
        }
        self.shared.emit(ServerEvent::WrongPassword { peer, locked_out });
    }

    /// The ticket is right: the connection becomes a channel, unless things changed meanwhile.
    fn link_done(&mut self, token: u64) {
        let Some(connection) = self.connections.get_mut(&token) else { return };
        let Stage::Link(pending) = &mut connection.stage else { return };
        let Some(request) = pending.request.take() else { return };
        if let Some(code) = self.refusal(&request) {
            let Some(connection) = self.connections.get_mut(&token) else { return };
            let Stage::Link(pending) = &mut connection.stage else { return };
            pending.link.finish(code, &mut connection.out);
            return self.close_after_flush(token);
        }
        match request.known_type() {
            Some(ChannelType::Main) => self.open_main(token, &request),
            Some(kind) => self.open_channel(token, &request, kind),
            None => self.drop_connection(token),
        }
    }

    fn open_main(&mut self, token: u64, request: &LinkRequest) {
        if self.shared.config.policy == ClientPolicy::Exclusive {
            let others: Vec<u32> = self.sessions.iter().map(|entry| entry.session.id).collect();
            for session in others {
                tracing::info!(session, "another client takes over");
                self.disconnect_session(session);
            }
        }
        let ticket = self.wanted_ticket(token);
        let Some(connection) = self.connections.get(&token) else { return };
        let mut id = 0;
        while id == 0 || self.sessions.iter().any(|entry| entry.session.id == id) {
            id = rand::random();
        }
        let session = Arc::new(Session::new(id, connection.peer, ticket));
        tracing::info!(peer = %session.peer, session = id, "client connected");
        let event = ServerEvent::ClientConnected {
            session: id,
            peer: session.peer,
            transport: connection.stream.describe(),
        };
        lock(&self.shared.sessions).push(session.clone());
        self.shared.emit(event);
        self.sessions.push(SessionEntry {
            session: session.clone(),
            main: token,
            viewers: HashMap::new(),
        });
        let clock = self.shared.clock.elapsed().as_millis() as u32;
        let channel = Channel::main(request, &self.shared, id, clock);
        self.become_channel(token, request, &session, channel);
    }

    fn open_channel(&mut self, token: u64, request: &LinkRequest, kind: ChannelType) {
        let known = |entry: &&mut SessionEntry| entry.session.id == request.connection_id;
        let Some(entry) = self.sessions.iter_mut().find(known) else { return };
        let session = entry.session.clone();
        let channel = match kind {
            ChannelType::Inputs => Channel::inputs(request, &self.shared),
            ChannelType::Cursor => {
                let Some(display) = self.shared.displays.get(usize::from(request.channel_id))
                else {
                    return;
                };
                Channel::cursor(request, display.clone())
            }
            ChannelType::Playback | ChannelType::Record => {
                let Some(sound) = &self.shared.config.sound else { return };
                match kind {
                    ChannelType::Playback => Channel::playback(request, sound),
                    _ => Channel::record(request, sound, session.id),
                }
            }
            ChannelType::Display | ChannelType::Main => return self.open_display(token, request),
        };
        self.become_channel(token, request, &session, channel);
    }

    fn become_channel(
        &mut self,
        token: u64,
        request: &LinkRequest,
        session: &Arc<Session>,
        channel: Channel,
    ) {
        let Some(connection) = self.connections.get_mut(&token) else { return };
        let (kind, id) = channel.key();
        let tap = self.shared.config.capture.as_ref().map(|to| to.open(session.id, request));
        let traffic = session.open(kind, id, connection.stream.describe(), tap);
        let stage = Stage::Channel(session.clone(), traffic, Box::new(channel));
        let Stage::Link(mut pending) = std::mem::replace(&mut connection.stage, stage) else {
            return;
        };
        pending.link.finish(LinkCode::Ok, &mut connection.out);
        let unsent = connection.out.len() - connection.sent;
        connection.stream.begin_messages(request.header_kind(), unsent);
        let rest = pending.link.into_rest();
        let Stage::Channel(_, traffic, channel) = &mut connection.stage else { return };
        session.note_received(traffic, &rest);
        let mut context =
            Context { shared: &self.shared, session: session.id, out: &mut connection.out };
        channel.opened(&mut context);
        if let Err(error) = channel.receive(&rest, &mut context) {
            return self.hang_up(token, &io::Error::new(io::ErrorKind::InvalidData, error));
        }
        self.flush(token);
    }

    /// Hands a display connection to a thread of its own.
    fn open_display(&mut self, token: u64, request: &LinkRequest) {
        let Some(mut connection) = self.connections.remove(&token) else { return };
        let _ = epoll::delete(&self.epoll, &connection.stream);
        let known = |entry: &&mut SessionEntry| entry.session.id == request.connection_id;
        let Some(entry) = self.sessions.iter_mut().find(known) else { return };
        let Stage::Link(mut pending) = connection.stage else { return };
        let mut unsent = connection.out;
        unsent.drain(..connection.sent);
        pending.link.finish(LinkCode::Ok, &mut unsent);
        connection.stream.begin_messages(request.header_kind(), unsent.len());
        let capture = self.shared.config.capture.as_ref();
        let viewer = NewViewer {
            shared: self.shared.clone(),
            session: entry.session.clone(),
            display: request.channel_id,
            traffic: entry.session.open(
                ChannelType::Display,
                request.channel_id,
                connection.stream.describe(),
                capture.map(|to| to.open(entry.session.id, request)),
            ),
            stream: connection.stream,
            header: request.header_kind(),
            caps: request.channel_caps.clone(),
            copies_surfaces: request.copies_surfaces(),
            received: pending.link.into_rest(),
            unsent,
        };
        match viewer.spawn() {
            Ok((handle, thread)) => {
                self.viewer_threads.retain(|thread| !thread.is_finished());
                self.viewer_threads.push(thread);
                entry.viewers.insert(request.channel_id, handle);
            }
            Err(error) => {
                tracing::error!(%error, "cannot start a display channel's thread");
                entry.session.closed(ChannelType::Display, request.channel_id);
            }
        }
    }
}
