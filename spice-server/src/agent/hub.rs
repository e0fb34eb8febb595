//! The bridge, shared by the I/O thread and the program's port.

use std::sync::{Arc, Mutex};

pub(crate) use super::bridge::ToClient;
use super::{AgentPolicy, AgentPort, bridge::Bridge};
use crate::{MonitorConfig, io::shared::lock, proto::DecodeError};

/// Connects the guest's agent with the clients. The port is never called with the lock held.
pub(crate) struct AgentHub {
    port: Option<Arc<dyn AgentPort>>,
    bridge: Mutex<Bridge>,
}

impl AgentHub {
    pub(crate) fn new(port: Option<Arc<dyn AgentPort>>, policy: AgentPolicy) -> Self {
        Self { port, bridge: Mutex::new(Bridge::new(policy)) }
    }

    pub(crate) fn is_open(&self) -> bool {
        lock(&self.bridge).guest_is_open()
    }

    pub(crate) fn attach(&self, session: u32) -> u32 {
        lock(&self.bridge).attach(session)
    }

    pub(crate) fn detach(&self, session: u32) {
        lock(&self.bridge).detach(session);
    }

    pub(crate) fn start(&self, session: u32, tokens: u32) {
        lock(&self.bridge).start(session, tokens);
    }

    pub(crate) fn client_tokens(&self, session: u32, tokens: u32) {
        lock(&self.bridge).client_tokens(session, tokens);
    }

    pub(crate) fn client_data(
        &self,
        session: u32,
        data: &[u8],
    ) -> Result<Option<Vec<Option<MonitorConfig>>>, DecodeError> {
        lock(&self.bridge).client_data(session, data)
    }

    pub(crate) fn next_for_client(&self, session: u32) -> Option<ToClient> {
        let mut bridge = lock(&self.bridge);
        match bridge.take_returned(session) {
            Some(tokens) => Some(ToClient::Tokens(tokens)),
            None => bridge.next_for_client(session),
        }
    }

    pub(crate) fn guest_data(&self, bytes: &[u8]) -> usize {
        lock(&self.bridge).guest_data(bytes)
    }

    pub(crate) fn guest_opened(&self, open: bool) {
        lock(&self.bridge).guest_opened(open);
    }

    /// Gives the guest what it takes; whether that was anything, and so clients may have tokens to
    /// get. Only the I/O thread calls this.
    pub(crate) fn pump(&self) -> bool {
        let mut any = false;
        let Some(port) = &self.port else { return any };
        loop {
            let Some(mut item) = lock(&self.bridge).next_for_guest() else { break };
            let rest = item.bytes.get(item.written..).unwrap_or_default();
            let taken = port.to_guest(rest).min(rest.len());
            item.written += taken;
            any |= taken > 0;
            if !lock(&self.bridge).wrote(item) {
                break;
            }
        }
        any
    }

    /// Asks the guest for what was refused, once the client has taken enough. Only the I/O thread
    /// calls this.
    pub(crate) fn resume_guest(&self) {
        let Some(port) = &self.port else { return };
        if lock(&self.bridge).take_wanted() {
            port.guest_data_wanted();
        }
    }
}
