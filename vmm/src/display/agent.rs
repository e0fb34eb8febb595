//! The guest agent's port: bytes between the virtio console and the SPICE server.

use std::sync::Arc;

use devices::virtio::console::{PortHandle, PortListener};
use spice_server::{AgentHandle, AgentPort};

/// The SPICE server's way to the guest.
pub(super) struct Port(pub(super) PortHandle);

impl AgentPort for Port {
    fn to_guest(&self, bytes: &[u8]) -> usize {
        self.0.write(bytes)
    }

    fn guest_data_wanted(&self) {
        self.0.resume();
    }
}

/// The guest's way to the SPICE server.
struct Listener(AgentHandle);

impl PortListener for Listener {
    fn data(&self, bytes: &[u8]) -> usize {
        self.0.guest_data(bytes)
    }

    fn opened(&self, open: bool) {
        self.0.guest_opened(open);
    }

    fn writable(&self) {
        self.0.writable();
    }
}

/// Opens the host's end of `port` for the server behind `agent`.
pub(super) fn connect(port: &PortHandle, agent: AgentHandle) {
    port.set_listener(Arc::new(Listener(agent)));
}
