//! The agent's messages between guest and clients, without I/O.
//!
//! The first client owns the guest's agent. All others, and the owner while the guest has no agent,
//! get the server's own agent, which answers capabilities and `MONITORS_CONFIG`, so that resizing
//! works from the firmware on. Changing from one to the other is shown to the client as an agent
//! that goes and one that comes, because then it says everything anew that the other must hear.
//!
//! Memory is bounded by tokens: a client has ten chunks, and gets one back when the guest has taken
//! it; the guest is not read while the client has [`MAX_OUTBOX`] bytes to take.

use std::collections::VecDeque;

use super::policy::{AgentPolicy, Sender, Verdict};
use crate::{
    MonitorConfig,
    proto::{
        DecodeError,
        agent::{
            ANNOUNCE_CAPABILITIES, CAP_CLIPBOARD_SELECTION, CAP_FILE_XFER_DETAILED_ERRORS,
            ChunkCutter, Cutter, Header, MAX_CHUNK, MONITORS_CONFIG, PORT_CLIENT, PORT_SERVER,
            Piece, add_server_capabilities, capabilities, change_capabilities, client_disconnected,
            decode_monitors, file_refused, put_chunks, server_capabilities, success_reply,
            wants_capabilities,
        },
    },
};

/// Chunks a client may have on the way to the agent.
pub(crate) const CLIENT_TOKENS: u32 = 10;
/// Chunks a client may send beyond that before it is cut off.
const TOKEN_SLACK: u32 = 10;
/// Bytes waiting for a client above which the guest's are refused.
const MAX_OUTBOX: usize = 64 * 1024;
/// Answers of the server's own agent a client may leave unread.
const MAX_REPLIES: usize = 32;
/// Largest message that is looked into instead of passed on.
const MAX_INSPECTED: u32 = 4096;

/// What a client's main channel should say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ToClient {
    /// A chunk of at most 2048 bytes.
    Data(Vec<u8>),
    /// The client may send this many more chunks.
    Tokens(u32),
    Disconnected,
    Connected {
        tokens: u32,
    },
}

/// Bytes for the guest's port.
#[derive(Debug)]
pub(crate) struct ToGuest {
    pub(crate) bytes: Vec<u8>,
    pub(crate) written: usize,
    /// The client that gets a token back when they are written.
    client: Option<(u32, u32)>,
    /// Which opening of the port they are for.
    opening: u64,
}

/// What becomes of the current message of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Action {
    #[default]
    Discard,
    Forward,
    Inspect(Header),
    /// Clipboard content to be replaced by none; so many bytes in front name the selection.
    Empty(Header, usize),
    /// The beginning of a file that may not be sent.
    Refuse,
}

impl Action {
    /// Keeps what this action needs of a message's body.
    fn keep(self, kept: &mut Vec<u8>, bytes: &[u8]) {
        let room = match self {
            Self::Discard | Self::Forward => 0,
            Self::Inspect(_) => bytes.len(),
            Self::Empty(_, selection) => selection.saturating_sub(kept.len()),
            Self::Refuse => 4_usize.saturating_sub(kept.len()),
        };
        kept.extend_from_slice(bytes.get(..room).unwrap_or(bytes));
    }
}

/// Puts an empty clipboard in place of one whose header this was.
fn put_empty_clipboard(out: &mut Vec<u8>, header: Header, selection: &[u8]) {
    const NONE: [u8; 4] = [0; 4];
    Header { size: (selection.len() + NONE.len()) as u32, ..header }.put(out);
    out.extend_from_slice(selection);
    out.extend_from_slice(&NONE);
}

#[derive(Debug)]
struct Client {
    session: u32,
    /// It has sent AGENT_START for the agent it has now.
    started: bool,
    /// Counts the agents it has had.
    epoch: u32,
    /// Chunks it has on the way.
    in_use: u32,
    /// Chunks it can be told that it has back.
    returned: u32,
    /// Chunks it takes from us.
    tokens: u32,
    outbox: VecDeque<ToClient>,
    outbox_bytes: usize,
    cutter: Cutter,
    action: Action,
    inspected: Vec<u8>,
    /// What it has told the agent it can do.
    capabilities: u32,
}

impl Client {
    fn push_data(&mut self, data: &[u8]) {
        for chunk in data.chunks(MAX_CHUNK) {
            self.outbox_bytes += chunk.len();
            self.outbox.push_back(ToClient::Data(chunk.to_vec()));
        }
    }

    fn reply(&mut self, data: &[u8]) {
        if self.outbox.len() < MAX_REPLIES {
            self.push_data(data);
        }
    }

    /// Gives it another agent.
    fn switch_agent(&mut self) {
        self.outbox.clear();
        self.outbox_bytes = 0;
        self.outbox.push_back(ToClient::Disconnected);
        self.outbox.push_back(ToClient::Connected { tokens: CLIENT_TOKENS });
        self.started = false;
        self.epoch += 1;
        self.in_use = 0;
        self.returned = 0;
        self.cutter = Cutter::default();
        self.action = Action::Discard;
    }
}

/// The bridge between all clients and the guest.
#[derive(Debug, Default)]
pub(crate) struct Bridge {
    policy: AgentPolicy,
    /// Longest connected first: the owner of the guest's agent.
    clients: Vec<Client>,
    guest_open: bool,
    opening: u64,
    chunks: ChunkCutter,
    cutter: Cutter,
    action: Action,
    inspected: Vec<u8>,
    /// What the guest's agent has told it can do.
    guest_capabilities: u32,
    to_guest: VecDeque<ToGuest>,
    /// Guest data was refused.
    refused: bool,
}

impl Bridge {
    pub(crate) fn new(policy: AgentPolicy) -> Self {
        Self { policy, ..Self::default() }
    }

    /// Bytes in front of clipboard messages that name a selection.
    fn selection(guest: u32, client: u32) -> usize {
        if guest & client & CAP_CLIPBOARD_SELECTION != 0 { 4 } else { 0 }
    }

    fn client(&mut self, session: u32) -> Option<(usize, &mut Client)> {
        self.clients.iter_mut().enumerate().find(|(_, client)| client.session == session)
    }

    pub(crate) fn guest_is_open(&self) -> bool {
        self.guest_open
    }

    /// A client came. Returns the chunks it may send.
    pub(crate) fn attach(&mut self, session: u32) -> u32 {
        self.clients.push(Client {
            session,
            started: false,
            epoch: 0,
            in_use: 0,
            returned: 0,
            tokens: 0,
            outbox: VecDeque::new(),
            outbox_bytes: 0,
            cutter: Cutter::default(),
            action: Action::Discard,
            inspected: Vec::new(),
            capabilities: 0,
        });
        CLIENT_TOKENS
    }

    /// A client went.
    pub(crate) fn detach(&mut self, session: u32) {
        let Some((index, _)) = self.client(session) else { return };
        let client = self.clients.remove(index);
        if index != 0 || !self.guest_open {
            return;
        }
        // Chunks the guest has not seen anything of are void; one it has begun must be completed.
        self.to_guest.retain(|item| item.written > 0);
        if client.started {
            let mut bytes = Vec::new();
            put_chunks(&mut bytes, PORT_SERVER, &client_disconnected());
            self.queue_for_guest(bytes, None);
        }
        // The rest of a message for the old client is none for the next.
        self.action = Action::Discard;
        if let Some(next) = self.clients.first_mut() {
            next.switch_agent();
        }
    }

    fn queue_for_guest(&mut self, bytes: Vec<u8>, client: Option<(u32, u32)>) {
        let opening = self.opening;
        self.to_guest.push_back(ToGuest { bytes, written: 0, client, opening });
    }

    /// The client is ready for its agent, and takes this many chunks.
    pub(crate) fn start(&mut self, session: u32, tokens: u32) {
        if let Some((_, client)) = self.client(session) {
            client.started = true;
            client.tokens = tokens;
            client.cutter = Cutter::default();
            client.action = Action::Discard;
        }
    }

    /// The client takes this many more chunks.
    pub(crate) fn client_tokens(&mut self, session: u32, tokens: u32) {
        if let Some((_, client)) = self.client(session) {
            client.tokens = client.tokens.saturating_add(tokens);
        }
    }

    /// A chunk from a client. Returns the monitors it wants, if the chunk completed that message.
    pub(crate) fn client_data(
        &mut self,
        session: u32,
        mut data: &[u8],
    ) -> Result<Option<Vec<Option<MonitorConfig>>>, DecodeError> {
        let guest_open = self.guest_open;
        let policy = self.policy;
        let guest_capabilities = self.guest_capabilities;
        let Some((index, client)) = self.client(session) else { return Ok(None) };
        if !client.started {
            // On its way when the agent changed; its tokens are counted anew already.
            return Ok(None);
        }
        client.in_use += 1;
        if client.in_use > CLIENT_TOKENS + TOKEN_SLACK {
            return Err(DecodeError::Value("agent tokens"));
        }
        let forward = guest_open && index == 0;
        let mut out = Vec::new();
        let mut monitors = None;
        while let Some(piece) = client.cutter.next(&mut data)? {
            match piece {
                Piece::Begin(header) => {
                    client.inspected.clear();
                    let own = matches!(header.kind, MONITORS_CONFIG | ANNOUNCE_CAPABILITIES);
                    client.action = match policy.verdict(Sender::Client, &header) {
                        _ if own && header.size <= MAX_INSPECTED => Action::Inspect(header),
                        Verdict::Refuse => Action::Refuse,
                        _ if own || !forward => Action::Discard,
                        Verdict::Drop => Action::Discard,
                        Verdict::Empty => Action::Empty(
                            header,
                            Self::selection(guest_capabilities, client.capabilities),
                        ),
                        Verdict::Pass => {
                            header.put(&mut out);
                            Action::Forward
                        }
                    };
                }
                Piece::Data(bytes) => match client.action {
                    Action::Forward => out.extend_from_slice(bytes),
                    action => action.keep(&mut client.inspected, bytes),
                },
                Piece::End => {
                    let mut body = std::mem::take(&mut client.inspected);
                    match client.action {
                        Action::Discard | Action::Forward => {}
                        Action::Inspect(header) if header.kind == MONITORS_CONFIG => {
                            monitors = Some(decode_monitors(&body)?);
                            client.reply(&success_reply(MONITORS_CONFIG));
                        }
                        Action::Inspect(header) => {
                            client.capabilities = capabilities(&body);
                            if forward {
                                change_capabilities(&mut body, policy.capabilities().0, 0);
                                header.put(&mut out);
                                out.append(&mut body);
                            } else if wants_capabilities(&body) {
                                client.reply(&server_capabilities());
                            }
                        }
                        Action::Empty(header, _) => put_empty_clipboard(&mut out, header, &body),
                        Action::Refuse => {
                            if let Some(id) = body.first_chunk() {
                                let detailed =
                                    client.capabilities & CAP_FILE_XFER_DETAILED_ERRORS != 0;
                                client.reply(&file_refused(u32::from_le_bytes(*id), detailed));
                            }
                        }
                    }
                    client.action = Action::Discard;
                }
            }
        }
        if out.is_empty() {
            client.in_use -= 1;
            client.returned += 1;
        } else {
            let owner = (session, client.epoch);
            let mut bytes = Vec::new();
            put_chunks(&mut bytes, PORT_CLIENT, &out);
            self.queue_for_guest(bytes, Some(owner));
        }
        Ok(monitors)
    }

    /// What a client's main channel should say next.
    pub(crate) fn next_for_client(&mut self, session: u32) -> Option<ToClient> {
        let (_, client) = self.client(session)?;
        match client.outbox.front()? {
            ToClient::Data(data) => {
                if !client.started || client.tokens == 0 {
                    return None;
                }
                client.tokens -= 1;
                client.outbox_bytes -= data.len();
            }
            ToClient::Tokens(_) | ToClient::Disconnected | ToClient::Connected { .. } => {}
        }
        client.outbox.pop_front()
    }

    /// Tokens a client's main channel should give back now.
    pub(crate) fn take_returned(&mut self, session: u32) -> Option<u32> {
        let (_, client) = self.client(session)?;
        let returned = std::mem::take(&mut client.returned);
        (returned > 0).then_some(returned)
    }

    /// The guest opened or closed its port. Opening an open port is a new beginning.
    pub(crate) fn guest_opened(&mut self, open: bool) {
        if !open && !self.guest_open {
            return;
        }
        self.guest_open = open;
        self.opening += 1;
        self.chunks = ChunkCutter::default();
        self.cutter = Cutter::default();
        self.action = Action::Discard;
        self.to_guest.clear();
        if let Some(owner) = self.clients.first_mut() {
            owner.switch_agent();
        }
    }

    /// Bytes from the guest. Returns how many were taken.
    pub(crate) fn guest_data(&mut self, bytes: &[u8]) -> usize {
        if !self.guest_open {
            return bytes.len();
        }
        let mut input = bytes;
        let mut out = Vec::new();
        let result = loop {
            let waiting = self.clients.first().map_or(0, |owner| owner.outbox_bytes);
            if waiting + out.len() >= MAX_OUTBOX && !input.is_empty() {
                self.refused = true;
                break Ok(());
            }
            match self.chunks.next(&mut input) {
                Ok(None) => break Ok(()),
                Ok(Some((PORT_CLIENT, data))) => {
                    if let Err(error) = self.guest_chunk(data, &mut out) {
                        break Err(error);
                    }
                }
                Ok(Some(_)) => {}
                Err(error) => break Err(error),
            }
        };
        if let Some(owner) = self.clients.first_mut() {
            owner.push_data(&out);
        }
        if let Err(error) = result {
            tracing::warn!(%error, "the guest agent talks nonsense; ignored until it reopens its port");
            self.guest_opened(false);
            return bytes.len();
        }
        bytes.len() - input.len()
    }

    fn guest_chunk(&mut self, mut data: &[u8], out: &mut Vec<u8>) -> Result<(), DecodeError> {
        let listening = self.clients.first().is_some_and(|owner| owner.started);
        let client_capabilities = self.clients.first().map_or(0, |owner| owner.capabilities);
        while let Some(piece) = self.cutter.next(&mut data)? {
            match piece {
                Piece::Begin(header) => {
                    self.inspected.clear();
                    let announce = header.kind == ANNOUNCE_CAPABILITIES;
                    self.action = match self.policy.verdict(Sender::Guest, &header) {
                        _ if announce && header.size <= MAX_INSPECTED => Action::Inspect(header),
                        _ if announce || !listening => Action::Discard,
                        Verdict::Drop | Verdict::Refuse => Action::Discard,
                        Verdict::Empty => Action::Empty(
                            header,
                            Self::selection(self.guest_capabilities, client_capabilities),
                        ),
                        Verdict::Pass => {
                            header.put(out);
                            Action::Forward
                        }
                    };
                }
                Piece::Data(bytes) => match self.action {
                    Action::Forward => out.extend_from_slice(bytes),
                    action => action.keep(&mut self.inspected, bytes),
                },
                Piece::End => {
                    match self.action {
                        Action::Inspect(header) => {
                            self.guest_capabilities = capabilities(&self.inspected);
                            if listening {
                                let (withdraw, add) = self.policy.capabilities();
                                change_capabilities(&mut self.inspected, withdraw, add);
                                add_server_capabilities(&mut self.inspected);
                                header.put(out);
                                out.append(&mut self.inspected);
                            }
                        }
                        Action::Empty(header, _) => {
                            put_empty_clipboard(out, header, &self.inspected);
                        }
                        Action::Discard | Action::Forward | Action::Refuse => {}
                    }
                    self.action = Action::Discard;
                }
            }
        }
        Ok(())
    }

    /// Takes the next bytes for the guest; give them back with [`wrote`](Self::wrote).
    pub(crate) fn next_for_guest(&mut self) -> Option<ToGuest> {
        self.to_guest.pop_front()
    }

    /// Some or all of the bytes are with the guest; `false` if it did not take all.
    pub(crate) fn wrote(&mut self, item: ToGuest) -> bool {
        if item.opening != self.opening {
            return true;
        }
        if item.written < item.bytes.len() {
            // Its client may have gone meanwhile; then only a begun chunk must be completed.
            let current = |(session, epoch)| {
                self.clients.iter().any(|c| (c.session, c.epoch) == (session, epoch))
            };
            if item.written > 0 || item.client.is_none_or(current) {
                self.to_guest.push_front(item);
            }
            return false;
        }
        if let Some((session, epoch)) = item.client
            && let Some((_, client)) = self.client(session)
            && client.epoch == epoch
        {
            client.in_use = client.in_use.saturating_sub(1);
            client.returned += 1;
        }
        true
    }

    /// Whether the guest should offer data again that was refused.
    pub(crate) fn take_wanted(&mut self) -> bool {
        let waiting = self.clients.first().map_or(0, |owner| owner.outbox_bytes);
        self.refused && waiting < MAX_OUTBOX / 2 && {
            self.refused = false;
            true
        }
    }
}

#[cfg(test)]
mod tests;
