//! Building, starting and asking a server.

use std::{net::SocketAddr, sync::Arc};

use crate::{AgentPort, DisplayEvents, DisplayHandle, Error, InputSink, Leds, MouseMode, Secret};

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
}

/// Settings of a server to be started.
#[must_use = "a builder does nothing until start() is called"]
#[derive(Default)]
pub struct ServerBuilder {
    name: Option<String>,
    uuid: Option<[u8; 16]>,
    addresses: Vec<SocketAddr>,
    password: Option<Secret>,
    policy: ClientPolicy,
    displays: u32,
    input: Option<Arc<dyn InputSink>>,
    agent: Option<Arc<dyn AgentPort>>,
    events: Option<Arc<dyn DisplayEvents>>,
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
        self.addresses.push(address);
        self
    }

    /// Clients must know this password. `None` lets everybody in, with one warning in the log.
    pub fn password(mut self, password: Option<Secret>) -> Self {
        self.password = password;
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

    /// Who hears keyboard and mouse.
    pub fn input(mut self, input: Arc<dyn InputSink>) -> Self {
        self.input = Some(input);
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

    /// Listens and starts the server's threads.
    pub fn start(self) -> Result<SpiceServer, Error> {
        Err(Error::NoAddress)
    }
}

/// A running server. Dropping it disconnects all clients and ends its threads.
pub struct SpiceServer {
    addresses: Vec<SocketAddr>,
    displays: Vec<DisplayHandle>,
    agent: AgentHandle,
}

impl SpiceServer {
    /// A builder with default settings.
    pub fn builder() -> ServerBuilder {
        ServerBuilder::default()
    }

    /// The first address listened on, with the real port.
    pub fn local_addr(&self) -> Option<SocketAddr> {
        self.addresses.first().copied()
    }

    /// All addresses listened on, in the builder's order.
    pub fn local_addrs(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// The handle of display `id`, counted from 0.
    pub fn display(&self, id: u32) -> Option<DisplayHandle> {
        self.displays.get(id as usize).cloned()
    }

    /// The server's end of the guest agent's port.
    pub fn agent(&self) -> AgentHandle {
        self.agent.clone()
    }

    /// Shows the guest's keyboard lights to the clients.
    pub fn set_leds(&self, leds: Leds) {
        let _ = leds;
    }

    /// The mouse mode now in use.
    pub fn mouse_mode(&self) -> MouseMode {
        MouseMode::Client
    }

    /// Who is connected.
    pub fn status(&self) -> ServerStatus {
        ServerStatus::default()
    }
}

/// The server's end of the guest agent's port; cheap to clone.
#[derive(Clone)]
pub struct AgentHandle;

impl AgentHandle {
    /// Bytes from the guest. Returns how many were taken; after less than all, offer the rest when
    /// [`AgentPort::guest_data_wanted`] is called.
    pub fn guest_data(&self, bytes: &[u8]) -> usize {
        bytes.len()
    }

    /// The guest opened (`true`) or closed its end of the port.
    pub fn guest_opened(&self, open: bool) {
        let _ = open;
    }

    /// [`AgentPort::to_guest`] has room again after it had taken less than offered.
    pub fn writable(&self) {}
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
}

/// One client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientStatus {
    /// Number of the session, random.
    pub session: u32,
    /// Where it connected from.
    pub peer: SocketAddr,
    /// Its open channels, for example `main` or `display 0`.
    pub channels: Vec<String>,
    /// Bytes sent on all its channels.
    pub bytes_sent: u64,
    /// Bytes received on all its channels.
    pub bytes_received: u64,
}
