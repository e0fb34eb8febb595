//! What the rest of the VMM sees of a port: bytes both ways, and who has it open.

use std::{
    collections::VecDeque,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use vmm_sys_util::eventfd::EventFd;

use super::protocol::ConsoleSize;

/// Bytes that wait for the guest at most, per port.
pub const TO_GUEST_LIMIT: usize = 64 << 10;

/// The host's end of a port. Called from the console's worker thread (`opened(false)` at a reset
/// also from a vCPU thread), one call at a time; implementations must not block and may use the
/// [`PortHandle`].
pub trait PortListener: Send + Sync {
    /// The guest wrote `bytes`. Returns how many of them were taken; if fewer than all, the guest
    /// is held back until [`PortHandle::resume`], and the rest comes again then.
    fn data(&self, bytes: &[u8]) -> usize;

    /// The guest's end was opened or closed; closed also by a reset of the device.
    fn opened(&self, open: bool) {
        let _ = open;
    }

    /// After [`PortHandle::write`] took less than it was given: there is room again.
    fn writable(&self) {}
}

/// The shared state of one port.
pub(super) struct Port {
    pub(super) id: u32,
    pub(super) name: String,
    wake: Arc<EventFd>,
    state: Mutex<State>,
    /// Bytes from the guest that nobody wanted.
    discarded: AtomicU64,
}

#[derive(Default)]
struct State {
    to_guest: VecDeque<u8>,
    /// The last write was cut short.
    refused: bool,
    listener: Option<Arc<dyn PortListener>>,
    /// The listener has not been told yet that the guest's end is open.
    announce: bool,
    /// The guest gets to know of the port.
    attached: bool,
    host_open: bool,
    /// The host's end was closed since the worker looked last.
    host_closed: bool,
    guest_open: bool,
    resume: bool,
}

/// What the worker has to do about a port's host end.
#[derive(Debug, Clone, Copy)]
pub(super) struct HostEnd {
    pub(super) attached: bool,
    pub(super) open: bool,
    /// It was closed at least once since the worker looked last.
    pub(super) was_closed: bool,
    pub(super) resume: bool,
}

impl Port {
    pub(super) fn new(id: u32, name: String, wake: Arc<EventFd>) -> Arc<Self> {
        let state = Mutex::default();
        Arc::new(Self { id, name, wake, state, discarded: AtomicU64::new(0) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        if let Err(error) = self.wake.write(1) {
            tracing::error!(port = self.name, %error, "the console's worker cannot be woken");
        }
    }

    /// Takes over what the host did to its end.
    pub(super) fn take_host_end(&self) -> HostEnd {
        let mut state = self.state();
        let was_closed = std::mem::take(&mut state.host_closed);
        let resume = std::mem::take(&mut state.resume);
        HostEnd { attached: state.attached, open: state.host_open, was_closed, resume }
    }

    /// Tells a listener that came later than the guest.
    pub(super) fn announce(&self) {
        let mut state = self.state();
        if std::mem::take(&mut state.announce) && state.guest_open {
            let listener = state.listener.clone();
            drop(state);
            if let Some(listener) = listener {
                listener.opened(true);
            }
        }
    }

    /// The guest opened or closed its end.
    pub(super) fn set_guest_open(&self, open: bool) {
        let mut state = self.state();
        if state.guest_open == open {
            return;
        }
        state.guest_open = open;
        state.to_guest.clear();
        state.resume = false;
        state.announce = false;
        let writable = open && std::mem::take(&mut state.refused);
        let listener = state.listener.clone();
        drop(state);
        if let Some(listener) = listener {
            listener.opened(open);
            if writable {
                listener.writable();
            }
        }
    }

    /// Hands guest data to the listener; returns how much was taken or discarded.
    pub(super) fn deliver(&self, bytes: &[u8]) -> usize {
        let state = self.state();
        let listener = state.listener.clone().filter(|_| state.host_open);
        drop(state);
        match listener {
            Some(listener) => listener.data(bytes).min(bytes.len()),
            None => {
                self.discard(bytes.len());
                bytes.len()
            }
        }
    }

    /// Counts bytes that are thrown away, and says so once.
    pub(super) fn discard(&self, count: usize) {
        if self.discarded.fetch_add(count as u64, Ordering::Relaxed) == 0 && count > 0 {
            tracing::debug!(port = self.name, "guest data is discarded: nobody listens");
        }
    }

    /// Whether bytes wait for the guest.
    pub(super) fn has_output(&self) -> bool {
        !self.state().to_guest.is_empty()
    }

    /// Moves waiting bytes to the guest with `copy`, which returns how many it took.
    pub(super) fn take_output(&self, copy: impl FnOnce(&[u8]) -> usize) -> usize {
        let mut state = self.state();
        let taken = copy(state.to_guest.make_contiguous());
        let taken = taken.min(state.to_guest.len());
        state.to_guest.drain(..taken);
        taken
    }

    /// Tells the listener about room for output, where it waits for that.
    pub(super) fn announce_room(&self) {
        let mut state = self.state();
        if state.refused && state.guest_open && state.to_guest.len() <= TO_GUEST_LIMIT / 2 {
            state.refused = false;
            let listener = state.listener.clone();
            drop(state);
            if let Some(listener) = listener {
                listener.writable();
            }
        }
    }
}

/// A port of the console. Clones are the same port.
#[derive(Clone)]
pub struct PortHandle(pub(super) Arc<Port>);

impl fmt::Debug for PortHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PortHandle")
            .field("id", &self.0.id)
            .field("name", &self.0.name)
            .finish_non_exhaustive()
    }
}

impl PortHandle {
    /// The port's name, `hvc0` for port 0.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Connects the host's end: from now on the guest knows the port, sees its other end open,
    /// and what it writes goes to `listener`, which is told if the guest has it open already.
    pub fn set_listener(&self, listener: Arc<dyn PortListener>) {
        self.connect(listener, true);
    }

    /// As [`set_listener`](Self::set_listener), with the host's end closed until
    /// [`set_host_open`](Self::set_host_open).
    pub fn set_listener_closed(&self, listener: Arc<dyn PortListener>) {
        self.connect(listener, false);
    }

    fn connect(&self, listener: Arc<dyn PortListener>, open: bool) {
        let mut state = self.0.state();
        state.listener = Some(listener);
        state.announce = true;
        state.attached = true;
        state.host_closed |= state.host_open && !open;
        state.host_open = open;
        drop(state);
        self.0.wake();
    }

    /// Disconnects the listener and closes the host's end. The guest keeps the port.
    pub fn clear_listener(&self) {
        let mut state = self.0.state();
        state.listener = None;
        state.host_closed |= state.host_open;
        state.host_open = false;
        state.resume = true;
        drop(state);
        self.0.wake();
    }

    /// Opens or closes the host's end as the guest sees it. While it is closed, Linux lets the
    /// guest's readers see an end of file and its writers wait.
    pub fn set_host_open(&self, open: bool) {
        let mut state = self.0.state();
        if state.host_open == open {
            return;
        }
        state.host_closed |= !open;
        state.host_open = open;
        // Whatever was held back now finds either a listener or no host.
        state.resume = true;
        drop(state);
        self.0.wake();
    }

    /// Whether the guest has its end open.
    pub fn guest_open(&self) -> bool {
        self.0.state().guest_open
    }

    /// Sends bytes to the guest. Returns how many were accepted: none while the guest has its end
    /// closed, and at most [`TO_GUEST_LIMIT`] wait. After fewer than all,
    /// [`PortListener::writable`] tells when to try again.
    pub fn write(&self, bytes: &[u8]) -> usize {
        let mut state = self.0.state();
        let room = if state.guest_open { TO_GUEST_LIMIT - state.to_guest.len() } else { 0 };
        let taken = bytes.len().min(room);
        state.refused |= taken < bytes.len();
        state.to_guest.extend(&bytes[..taken]);
        drop(state);
        if taken > 0 {
            self.0.wake();
        }
        taken
    }

    /// After [`PortListener::data`] took less than it was given: deliver again.
    pub fn resume(&self) {
        self.0.state().resume = true;
        self.0.wake();
    }
}

/// The console at run time.
#[derive(Clone)]
pub struct ConsoleHandle {
    pub(super) ports: Arc<[Arc<Port>]>,
    pub(super) size: Arc<Mutex<Option<ConsoleSize>>>,
}

impl fmt::Debug for ConsoleHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.ports.iter().map(|port| &port.name)).finish()
    }
}

impl ConsoleHandle {
    /// The port called `name` ([`super::CONSOLE_PORT`], [`super::VDAGENT_PORT`], …).
    pub fn port(&self, name: &str) -> Option<PortHandle> {
        self.ports.iter().find(|port| port.name == name).cloned().map(PortHandle)
    }

    /// Tells the guest the size of the terminal behind `hvc0`. Only effective for a console that
    /// was given a `size=`. (Linux up to at least 6.12 takes rows for columns here.)
    pub fn set_size(&self, columns: u16, rows: u16) {
        *self.size.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(ConsoleSize { columns, rows });
        if let Some(port) = self.ports.first() {
            port.wake();
        }
    }
}
