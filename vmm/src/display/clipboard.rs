//! Clipboard text between VNC viewers and the guest's agent, for machines without SPICE, whose
//! viewers have the agent otherwise.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use devices::virtio::console::{PortHandle, PortListener};
use spice_server::{AgentText, Clipboard};
use vnc_server::VncServer;

/// The guest's agent.
pub(super) struct GuestClipboard {
    port: PortHandle,
    direction: Clipboard,
    text: Mutex<AgentText>,
    viewers: OnceLock<Weak<VncServer>>,
}

impl GuestClipboard {
    pub(super) fn new(port: PortHandle, direction: Clipboard) -> Arc<Self> {
        Arc::new(Self { port, direction, text: Mutex::default(), viewers: OnceLock::new() })
    }

    /// Opens the host's end of the port for these viewers.
    pub(super) fn connect(self: &Arc<Self>, viewers: &Arc<VncServer>) {
        if self.viewers.set(Arc::downgrade(viewers)).is_ok() {
            self.port.set_listener(self.clone());
        }
    }

    /// A viewer has copied this text.
    pub(super) fn copy(&self, text: &str) {
        if self.direction == Clipboard::ToClient {
            return;
        }
        let mut agent = self.text();
        agent.copy(text);
        self.send(agent);
    }

    fn text(&self) -> MutexGuard<'_, AgentText> {
        self.text.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the guest what it takes.
    fn send(&self, mut agent: MutexGuard<'_, AgentText>) {
        let count = self.port.write(agent.output());
        agent.written(count);
    }
}

impl PortListener for GuestClipboard {
    fn data(&self, bytes: &[u8]) -> usize {
        let mut agent = self.text();
        let texts = agent.guest_data(bytes);
        self.send(agent);
        if self.direction != Clipboard::ToGuest
            && let Some(text) = texts.last()
            && let Some(viewers) = self.viewers.get().and_then(Weak::upgrade)
        {
            viewers.set_clipboard(text);
        }
        bytes.len()
    }

    fn opened(&self, open: bool) {
        let mut agent = self.text();
        agent.guest_opened(open);
        self.send(agent);
    }

    fn writable(&self) {
        self.send(self.text());
    }
}
