//! Connects the guest's agent with the clients.

use std::sync::Arc;

use crate::{AgentPort, proto::DecodeError};

/// What the agent wants a client to hear.
pub(crate) enum ToClient {
    Data(Vec<u8>),
    Tokens(u32),
    Disconnected,
    Connected { tokens: u32 },
}

pub(crate) struct AgentHub {
    _port: Option<Arc<dyn AgentPort>>,
}

impl AgentHub {
    pub(crate) fn new(port: Option<Arc<dyn AgentPort>>) -> Self {
        Self { _port: port }
    }
    pub(crate) fn attach(&self, _session: u32) -> u32 {
        10
    }
    pub(crate) fn start(&self, _session: u32, _tokens: u32) {}
    pub(crate) fn client_data(&self, _session: u32, _data: &[u8]) -> Result<(), DecodeError> {
        Ok(())
    }
    pub(crate) fn client_tokens(&self, _session: u32, _tokens: u32) {}
    pub(crate) fn next_for_client(&self, _session: u32) -> Option<ToClient> {
        None
    }
    pub(crate) fn pump(&self) {}
    pub(crate) fn is_open(&self) -> bool {
        false
    }
    pub(crate) fn guest_data(&self, bytes: &[u8]) -> usize {
        bytes.len()
    }
    pub(crate) fn guest_opened(&self, _open: bool) {}
}
