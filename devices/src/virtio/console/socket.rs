//! A port served on a Unix socket: one client at a time, the next one waits in the backlog.

use std::{
    io::{self, ErrorKind, Read, Write},
    os::unix::{
        fs::MetadataExt,
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::port::{PortHandle, PortListener};
use crate::virtio::worker::Worker;

/// Bytes read from the client at a time.
const PIECE: usize = 4096;

/// The guest's side of a socket port, called from the console's worker.
struct Outlet {
    client: Mutex<Option<Client>>,
    wake: EventFd,
}

struct Client {
    stream: UnixStream,
    /// The socket was full: guest data waits until it is writable.
    full: bool,
}

impl Outlet {
    fn client(&self) -> MutexGuard<'_, Option<Client>> {
        self.client.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        if let Err(error) = self.wake.write(1) {
            tracing::error!(%error, "a console socket's thread cannot be woken");
        }
    }
}

impl PortListener for Outlet {
    fn data(&self, bytes: &[u8]) -> usize {
        let mut guard = self.client();
        let Some(client) = guard.as_mut() else { return bytes.len() };
        let mut taken = 0;
        while taken < bytes.len() {
            match (&client.stream).write(&bytes[taken..]) {
                Ok(count) => taken += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    client.full = true;
                    drop(guard);
                    self.wake();
                    return taken;
                }
                // The thread notices the hang-up itself.
                Err(_) => return bytes.len(),
            }
        }
        taken
    }

    fn writable(&self) {
        self.wake();
    }
}

/// The thread's side: accepts clients and reads from them.
struct Server {
    port: PortHandle,
    listener: UnixListener,
    outlet: Arc<Outlet>,
    /// The current client, which is also in `outlet`.
    client: Option<UnixStream>,
    /// What the port did not take yet.
    held: Vec<u8>,
}

const LISTENER: u32 = 0;
const WAKE: u32 = 1;
const CLIENT: u32 = 2;

impl Server {
    fn accept(&mut self, ops: &mut EventOps<'_>) {
        if self.client.is_some() {
            return;
        }
        let stream = match self.listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return,
            Err(error) => {
                tracing::warn!(port = self.port.name(), %error, "a client cannot be accepted");
                return;
            }
        };
        let copy = match stream.set_nonblocking(true).and_then(|()| stream.try_clone()) {
            Ok(copy) => copy,
            Err(error) => {
                tracing::warn!(port = self.port.name(), %error, "a client cannot be served");
                return;
            }
        };
        let events = EventSet::IN | EventSet::READ_HANG_UP;
        if ops.add(Events::with_data(&stream, CLIENT, events)).is_err() {
            return;
        }
        // Further clients wait in the backlog, without waking this thread.
        let _ = ops.remove(Events::with_data(&self.listener, LISTENER, EventSet::IN));
        tracing::debug!(port = self.port.name(), "a client connected");
        *self.outlet.client() = Some(Client { stream: copy, full: false });
        self.client = Some(stream);
        self.port.set_host_open(true);
    }

    fn disconnect(&mut self, ops: &mut EventOps<'_>) {
        let Some(stream) = self.client.take() else { return };
        let _ = ops.remove(Events::with_data(&stream, CLIENT, EventSet::empty()));
        *self.outlet.client() = None;
        self.held.clear();
        self.port.set_host_open(false);
        tracing::debug!(port = self.port.name(), "the client disconnected");
        self.watch_listener(ops);
    }

    fn watch_listener(&self, ops: &mut EventOps<'_>) {
        if let Err(error) = ops.add(Events::with_data(&self.listener, LISTENER, EventSet::IN)) {
            tracing::error!(port = self.port.name(), %error, "the socket cannot be watched");
        }
    }

    /// Reads from the client until the port is full or there is nothing more.
    /// Returns whether the client is still there.
    fn read_client(&mut self) -> bool {
        let Some(client) = &mut self.client else { return true };
        let mut piece = [0; PIECE];
        loop {
            if !self.held.is_empty() {
                let taken = self.port.write(&self.held);
                self.held.drain(..taken);
                if !self.held.is_empty() {
                    return true;
                }
            }
            match client.read(&mut piece) {
                Ok(0) => return false,
                Ok(count) => self.held.extend_from_slice(&piece[..count]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return true,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
    }

    /// Watches the client for what would let something move.
    fn watch_client(&self, ops: &EventOps<'_>) {
        let Some(client) = &self.client else { return };
        let mut events = EventSet::empty();
        if self.held.is_empty() {
            events |= EventSet::IN | EventSet::READ_HANG_UP;
        }
        if self.outlet.client().as_ref().is_some_and(|client| client.full) {
            events |= EventSet::OUT;
        }
        if let Err(error) = ops.modify(Events::with_data(client, CLIENT, events)) {
            tracing::error!(port = self.port.name(), %error, "the client cannot be watched");
        }
    }
}

impl MutEventSubscriber for Server {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        self.watch_listener(ops);
        if let Err(error) = ops.add(Events::with_data(&self.outlet.wake, WAKE, EventSet::IN)) {
            tracing::error!(port = self.port.name(), %error, "the socket thread cannot be woken");
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let set = events.event_set();
        match events.data() {
            LISTENER => self.accept(ops),
            WAKE => {
                let _ = self.outlet.wake.read();
            }
            _ if set.intersects(EventSet::ERROR | EventSet::HANG_UP) && !self.held.is_empty() => {
                // What is held will not reach the guest before the client is gone anyway.
                return self.disconnect(ops);
            }
            _ => {
                if set.contains(EventSet::OUT) {
                    if let Some(client) = self.outlet.client().as_mut() {
                        client.full = false;
                    }
                    self.port.resume();
                }
            }
        }
        if self.read_client() {
            self.watch_client(ops);
        } else {
            self.disconnect(ops);
        }
    }
}

/// A listening socket that is connected to a port while it exists.
pub(super) struct SocketServer {
    worker: Option<Worker<Server>>,
    port: PortHandle,
    path: PathBuf,
    /// Device and inode of the socket file that is ours to remove.
    file: Option<(u64, u64)>,
}

impl SocketServer {
    /// Listens at `path` for the host's end of `port`. A socket that nobody serves any more is
    /// replaced.
    pub(super) fn start(port: PortHandle, path: &Path) -> io::Result<Self> {
        let listener = bind(path)?;
        listener.set_nonblocking(true)?;
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let outlet = Arc::new(Outlet { client: Mutex::default(), wake });
        let server = Server {
            port: port.clone(),
            listener,
            outlet: outlet.clone(),
            client: None,
            held: Vec::new(),
        };
        port.set_listener_closed(outlet);
        let worker = Worker::spawn("vio-con-socket", server)?;
        let file = std::fs::metadata(path).ok().map(|file| (file.dev(), file.ino()));
        Ok(Self { worker: Some(worker), port, path: path.to_owned(), file })
    }
}

impl Drop for SocketServer {
    fn drop(&mut self) {
        if let Some(worker) = self.worker.take() {
            worker.stop();
        }
        self.port.clear_listener();
        let now = std::fs::symlink_metadata(&self.path).ok().map(|file| (file.dev(), file.ino()));
        if now.is_some() && now == self.file {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Binds a socket, replacing one that was left behind by a process that is gone.
fn bind(path: &Path) -> io::Result<UnixListener> {
    let error = match UnixListener::bind(path) {
        Err(error) if error.kind() == ErrorKind::AddrInUse => error,
        other => return other,
    };
    match UnixStream::connect(path) {
        Err(refused) if refused.kind() == ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path)?;
            UnixListener::bind(path)
        }
        _ => Err(error),
    }
}
