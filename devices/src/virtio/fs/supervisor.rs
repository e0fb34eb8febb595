//! The thread that connects to virtiofsd, notices its end, and connects again.
//!
//! It alone talks to virtiofsd, so that a virtiofsd which does not answer keeps nobody else waiting
//! for longer than he wants.

use std::{
    io,
    net::Shutdown,
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd};

use super::{connection::Connection, orphan::Orphan, sys};
use crate::{
    GuestMemory,
    virtio::{
        ActivateError, Activation, ActiveQueue, VirtioInterrupt, registry::BuildError,
        worker::Worker,
    },
};

const OPTION: &str = "fs";
/// How long virtiofsd may take to start listening.
const START_LIMIT: Duration = Duration::from_secs(60);
/// Between attempts to connect. There is no event to wait for that would cover a socket which is not
/// there and one that nobody listens on.
const RETRY: Duration = Duration::from_millis(100);
/// Between reports that it is still waited for.
const REPORT: Duration = Duration::from_secs(10);
/// How long virtiofsd may take for a group of requests.
const PATIENCE: Duration = Duration::from_secs(10);

enum Order {
    Start(Box<Active>),
    Stop,
    End,
}

/// What the driver set up.
struct Active {
    features: u64,
    queues: Vec<ActiveQueue>,
    memory: Arc<GuestMemory>,
    interrupt: Arc<dyn VirtioInterrupt>,
}

/// The device's end.
pub(super) struct Supervisor {
    orders: mpsc::Sender<(Order, mpsc::SyncSender<()>)>,
    wake: OwnedFd,
    /// The present connection, to be cut when virtiofsd does not answer.
    socket: Arc<Mutex<Option<UnixStream>>>,
    features: u64,
    thread: Option<JoinHandle<()>>,
}

impl Supervisor {
    /// Waits for virtiofsd to listen at `path`, and connects.
    pub(super) fn start(tag: &str, path: &Path) -> Result<Self, BuildError> {
        let host = |what: String, source| BuildError::Host { option: OPTION, what, source };
        let stream = connect_patiently(path, START_LIMIT).map_err(|source| {
            host(format!("tag={tag}: virtiofsd does not listen at {}", path.display()), source)
        })?;
        let no_room = |source| host("no eventfd or thread can be made".to_owned(), source);
        let cut = stream.try_clone().map_err(no_room)?;
        let connection = within(PATIENCE, &cut, || Connection::negotiate(stream));
        let connection = connection.map_err(|error| BuildError::Unusable {
            option: OPTION,
            reason: format!("socket={}: no virtiofsd answers there: {error}", path.display()),
        })?;
        let features = connection.features();
        let wake = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)
            .map_err(|error| no_room(error.into()))?;
        let socket = Arc::new(Mutex::new(Some(cut)));
        let (orders, received) = mpsc::channel();
        let thread = Thread {
            tag: tag.to_owned(),
            path: path.to_owned(),
            orders: received,
            wake: wake.try_clone().map_err(no_room)?,
            socket: socket.clone(),
            features,
            connection: Some(connection),
            active: None,
            orphan: None,
            complained: false,
        };
        let thread = thread::Builder::new()
            .name(format!("fs-{tag}"))
            .spawn(move || thread.run())
            .map_err(no_room)?;
        Ok(Self { orders, wake, socket, features, thread: Some(thread) })
    }

    /// What the driver may be offered.
    pub(super) fn features(&self) -> u64 {
        self.features
    }

    /// Serves the queues, by virtiofsd or by refusing every request.
    pub(super) fn activate(&self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, features, queues, interrupt } = activation;
        let memory = Arc::new(memory);
        let active = Active { features, queues, memory, interrupt };
        if self.order(Order::Start(Box::new(active))) {
            Ok(())
        } else {
            Err(ActivateError::Backend("the thread that talks to virtiofsd hangs".to_owned()))
        }
    }

    /// Serves the queues no longer.
    pub(super) fn reset(&self) {
        self.order(Order::Stop);
    }

    fn order(&self, order: Order) -> bool {
        let (done, wait) = mpsc::sync_channel(1);
        if self.orders.send((order, done)).is_err()
            || rustix::io::write(&self.wake, &1u64.to_ne_bytes()).is_err()
        {
            return false;
        }
        match wait.recv_timeout(PATIENCE) {
            Err(mpsc::RecvTimeoutError::Timeout) => {}
            result => return result.is_ok(),
        }
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(socket) = &*socket {
            tracing::error!("virtiofsd does not answer; its connection is cut");
            let _ = socket.shutdown(Shutdown::Both);
        }
        drop(socket);
        wait.recv_timeout(PATIENCE).is_ok()
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        if self.order(Order::End)
            && let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that talks to virtiofsd panicked");
        }
    }
}

struct Thread {
    tag: String,
    path: PathBuf,
    orders: mpsc::Receiver<(Order, mpsc::SyncSender<()>)>,
    wake: OwnedFd,
    socket: Arc<Mutex<Option<UnixStream>>>,
    features: u64,
    connection: Option<Connection>,
    active: Option<Box<Active>>,
    orphan: Option<Worker<Orphan>>,
    /// It was said that virtiofsd cannot be used any more.
    complained: bool,
}

impl Thread {
    fn run(mut self) {
        loop {
            while let Ok((order, done)) = self.orders.try_recv() {
                let end = matches!(order, Order::End);
                match order {
                    Order::Start(active) => {
                        self.active = Some(active);
                        self.serve();
                    }
                    Order::Stop | Order::End => self.stop(),
                }
                let _ = done.send(());
                if end {
                    return;
                }
            }
            if self.connection.is_none() {
                self.reconnect();
            }
            if self.wait() {
                tracing::error!(
                    tag = self.tag,
                    socket = %self.path.display(),
                    "virtiofsd is gone: the shared folder fails until it is back and the guest \
                     mounts it again"
                );
                self.disconnect();
                self.serve();
            }
        }
    }

    /// Waits for an order, for the end of the connection (`true`), or for the next attempt to
    /// connect.
    fn wait(&self) -> bool {
        let retry = Timespec { tv_sec: 0, tv_nsec: RETRY.subsec_nanos().into() };
        let mut fds = vec![PollFd::new(&self.wake, PollFlags::IN)];
        fds.extend(self.connection.as_ref().map(|connection| {
            // What it says without being asked is read with its next answer.
            PollFd::from_borrowed_fd(connection.fd(), PollFlags::RDHUP)
        }));
        let timeout = self.connection.is_none().then_some(&retry);
        // Interrupted is as good as woken.
        let _ = rustix::event::poll(&mut fds, timeout);
        let ended = fds.get(1).is_some_and(|fd| !fd.revents().is_empty());
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        ended
    }

    fn disconnect(&mut self) {
        self.connection = None;
        *self.socket.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Has the queues of an active device served, whoever can do it.
    fn serve(&mut self) {
        let Some(active) = &self.active else { return };
        if let Some(connection) = &mut self.connection {
            let bases: Vec<u16> = match self.orphan.take().and_then(Worker::stop) {
                Some(orphan) => orphan.positions(),
                None => active.queues.iter().map(|_| 0).collect(),
            };
            let Active { features, queues, memory, interrupt } = &**active;
            match connection.start(*features, memory, queues, &bases, interrupt) {
                Ok(()) => return,
                Err(error) => {
                    tracing::error!(tag = self.tag, %error, "virtiofsd does not take the queues");
                    self.disconnect();
                }
            }
        }
        let Some(active) = &self.active else { return };
        let Active { queues, memory, interrupt, .. } = &**active;
        match Orphan::start(&self.tag, queues, memory, interrupt) {
            Ok(orphan) => self.orphan = Some(orphan),
            Err(error) => {
                tracing::error!(tag = self.tag, %error, "the shared folder cannot be served");
                interrupt.set_needs_reset();
            }
        }
    }

    fn stop(&mut self) {
        let Some(active) = self.active.take() else { return };
        if let Some(orphan) = self.orphan.take() {
            orphan.stop();
        } else if let Some(connection) = &mut self.connection
            && let Err(error) = connection.stop(&active.queues)
        {
            // It may still write to guest memory; without its connection it ends.
            tracing::error!(tag = self.tag, %error, "virtiofsd does not let go of the queues");
            self.disconnect();
        }
    }

    /// One attempt.
    fn reconnect(&mut self) {
        let Ok(stream) = UnixStream::connect(&self.path) else { return };
        let Ok(cut) = stream.try_clone() else { return };
        *self.socket.lock().unwrap_or_else(PoisonError::into_inner) = Some(cut);
        match Connection::negotiate(stream) {
            Ok(connection) if connection.features() & self.features == self.features => {
                tracing::info!(tag = self.tag, "virtiofsd is back");
                self.connection = Some(connection);
                self.serve();
            }
            Ok(_) => {
                if !std::mem::replace(&mut self.complained, true) {
                    let tag = &self.tag;
                    tracing::error!(tag, "the new virtiofsd can do less than the first one");
                }
                self.disconnect();
            }
            Err(error) => {
                tracing::debug!(tag = self.tag, %error, "virtiofsd is not back yet");
                self.disconnect();
            }
        }
    }
}

/// Connects as soon as somebody listens at `path`.
pub(super) fn connect_patiently(path: &Path, limit: Duration) -> io::Result<UnixStream> {
    let started = Instant::now();
    let mut reported = None;
    loop {
        let error = match UnixStream::connect(path) {
            Ok(stream) => return Ok(stream),
            Err(error) => error,
        };
        use io::ErrorKind::{ConnectionRefused, NotFound};
        let waiting = matches!(error.kind(), NotFound | ConnectionRefused);
        if !waiting || started.elapsed() >= limit || sys::told_to_end() {
            return Err(error);
        }
        if reported.is_none_or(|at: Instant| at.elapsed() >= REPORT) {
            reported = Some(Instant::now());
            tracing::info!(socket = %path.display(), %error, "waiting for virtiofsd");
        }
        thread::sleep(RETRY);
    }
}

/// Does `work`, which talks over `socket`; when that takes too long the connection is cut.
fn within<T>(limit: Duration, socket: &UnixStream, work: impl FnOnce() -> T) -> T {
    let (done, wait) = mpsc::channel::<()>();
    thread::scope(|scope| {
        scope.spawn(move || {
            if wait.recv_timeout(limit) == Err(mpsc::RecvTimeoutError::Timeout) {
                let _ = socket.shutdown(Shutdown::Both);
            }
        });
        let result = work();
        drop(done);
        result
    })
}
