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
use vmm_sys_util::eventfd::EventFd;

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
/// Longest time between attempts with a virtiofsd that listens but is of no use.
const LAST_RETRY: Duration = Duration::from_secs(10);
/// A connection that lasted for so long was a good one.
const GOOD_RUN: Duration = Duration::from_secs(5);
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
        Self::start_unless(tag, path, sys::told_to_end)
    }

    /// Like [`start`](Self::start), which goes on while `told_to_end` does not say otherwise.
    pub(super) fn start_unless(
        tag: &str,
        path: &Path,
        told_to_end: fn() -> bool,
    ) -> Result<Self, BuildError> {
        let host = |what: String, source| BuildError::Host { option: OPTION, what, source };
        let no_room = |source| host("no eventfd or thread can be made".to_owned(), source);
        let begin = Instant::now();
        let mut retry = Retry::new(begin);
        let mut reported = None;
        let (cut, connection) = loop {
            let limit = START_LIMIT.saturating_sub(begin.elapsed());
            let stream = connect_patiently(path, limit, told_to_end).map_err(|source| {
                host(format!("tag={tag}: virtiofsd does not listen at {}", path.display()), source)
            })?;
            retry.connected(Instant::now());
            let cut = stream.try_clone().map_err(no_room)?;
            let error = match within(PATIENCE, &cut, told_to_end, || Connection::negotiate(stream))
            {
                Ok(connection) => break (cut, connection),
                Err(error) => error,
            };
            // That of the machine's last run, which was about to end: the next one is on its way.
            let next = error.is_end() && begin.elapsed() < START_LIMIT;
            retry.ended(Instant::now());
            if next && is_due(&mut reported) {
                tracing::info!(tag, %error, "virtiofsd ended; waiting for the next one");
            }
            if !next || !pause(retry.left(Instant::now()), told_to_end) {
                let path = path.display();
                let reason = format!("socket={path}: no virtiofsd answers there: {error}");
                return Err(BuildError::Unusable { option: OPTION, reason });
            }
        };
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
            fault: None,
            orphan: None,
            complained: false,
            retry: Retry::new(Instant::now()),
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

    /// Has the queues served, by virtiofsd or by refusing every request. Nobody waits until they are: this
    /// is called on a vCPU thread, and a driver that notifies a queue sooner is heard later.
    pub(super) fn activate(&self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, features, queues, interrupt } = activation;
        let memory = Arc::new(memory);
        let active = Active { features, queues, memory, interrupt };
        match self.send(Order::Start(Box::new(active))) {
            Some(_) => Ok(()),
            None => {
                Err(ActivateError::Backend("the thread that talks to virtiofsd ended".to_owned()))
            }
        }
    }

    /// Serves the queues no longer.
    pub(super) fn reset(&self) {
        self.order(Order::Stop);
    }

    fn send(&self, order: Order) -> Option<mpsc::Receiver<()>> {
        let (done, wait) = mpsc::sync_channel(1);
        self.orders.send((order, done)).ok()?;
        rustix::io::write(&self.wake, &1u64.to_ne_bytes()).ok()?;
        Some(wait)
    }

    /// Sends an order and waits until it is carried out.
    fn order(&self, order: Order) -> bool {
        let Some(wait) = self.send(order) else { return false };
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
    /// virtiofsd writes to it when it finds a ring broken; none once that has been told.
    fault: Option<EventFd>,
    orphan: Option<Worker<Orphan>>,
    /// It was said that virtiofsd cannot be used any more.
    complained: bool,
    retry: Retry,
}

/// When to try the next connection.
#[derive(Debug)]
struct Retry {
    delay: Duration,
    at: Instant,
    /// When the present connection, or the last one, was made.
    connected: Instant,
}

impl Retry {
    fn new(now: Instant) -> Self {
        Self { delay: RETRY, at: now, connected: now }
    }

    /// Nobody listens: there is no harm in looking again soon.
    fn nobody(&mut self, now: Instant) {
        self.at = now + RETRY;
    }

    fn connected(&mut self, now: Instant) {
        self.connected = now;
    }

    /// A connection has ended, or was of no use.
    fn ended(&mut self, now: Instant) {
        if now.saturating_duration_since(self.connected) >= GOOD_RUN {
            self.delay = RETRY;
        }
        self.at = now + self.delay;
        self.delay = (2 * self.delay).min(LAST_RETRY);
    }

    /// How long to wait still.
    fn left(&self, now: Instant) -> Duration {
        self.at.saturating_duration_since(now)
    }
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
            if self.connection.is_none() && self.retry.left(Instant::now()).is_zero() {
                self.reconnect();
            }
            let (ended, broken) = self.wait();
            if broken {
                self.broken_ring();
            }
            if ended {
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

    /// Waits for an order, for the end of the connection (first), for a broken ring (second), or for the
    /// next attempt to connect.
    fn wait(&self) -> (bool, bool) {
        let left = self.retry.left(Instant::now());
        let retry =
            Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
        let mut fds = vec![PollFd::new(&self.wake, PollFlags::IN)];
        fds.extend(self.connection.as_ref().map(|connection| {
            // What it says without being asked is read with its next answer.
            PollFd::from_borrowed_fd(connection.fd(), PollFlags::RDHUP)
        }));
        fds.extend(
            self.fault
                .as_ref()
                .map(|fault| PollFd::from_borrowed_fd(sys::borrow(fault), PollFlags::IN)),
        );
        let timeout = self.connection.is_none().then_some(&retry);
        // Interrupted is as good as woken.
        let _ = rustix::event::poll(&mut fds, timeout);
        let mut happened = fds.iter().skip(1).map(|fd| !fd.revents().is_empty());
        let ended = self.connection.is_some() && happened.next() == Some(true);
        let broken = self.fault.is_some() && happened.next() == Some(true);
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        (ended, broken)
    }

    fn broken_ring(&mut self) {
        // Once is enough, however often it says so.
        self.fault = None;
        tracing::warn!(
            tag = self.tag,
            "the driver violated a queue's rules, says virtiofsd; the device needs a reset"
        );
        if let Some(active) = &self.active {
            active.interrupt.set_needs_reset();
        }
    }

    fn disconnect(&mut self) {
        self.connection = None;
        self.fault = None;
        self.retry.ended(Instant::now());
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
                Ok(fault) => {
                    self.fault = Some(fault);
                    return;
                }
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
        self.fault = None;
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
        let connected = UnixStream::connect(&self.path)
            .and_then(|stream| stream.try_clone().map(|cut| (stream, cut)));
        let Ok((stream, cut)) = connected else {
            self.retry.nobody(Instant::now());
            return;
        };
        self.retry.connected(Instant::now());
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

/// Whether it is time for another report.
fn is_due(reported: &mut Option<Instant>) -> bool {
    let due = reported.is_none_or(|at| at.elapsed() >= REPORT);
    if due {
        *reported = Some(Instant::now());
    }
    due
}

/// Waits for `time`; `false` if there is no more point in it.
fn pause(time: Duration, told_to_end: fn() -> bool) -> bool {
    let end = Instant::now() + time;
    loop {
        if told_to_end() {
            return false;
        }
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return true;
        }
        thread::sleep(left.min(RETRY));
    }
}

/// Connects as soon as somebody listens at `path`.
pub(super) fn connect_patiently(
    path: &Path,
    limit: Duration,
    told_to_end: fn() -> bool,
) -> io::Result<UnixStream> {
    let started = Instant::now();
    let mut reported = None;
    loop {
        let error = match UnixStream::connect(path) {
            Ok(stream) => return Ok(stream),
            Err(error) => error,
        };
        use io::ErrorKind::{ConnectionRefused, NotFound};
        let waiting = matches!(error.kind(), NotFound | ConnectionRefused);
        if !waiting || started.elapsed() >= limit || told_to_end() {
            return Err(error);
        }
        if is_due(&mut reported) {
            tracing::info!(socket = %path.display(), %error, "waiting for virtiofsd");
        }
        thread::sleep(RETRY);
    }
}

/// Does `work`, which talks over `socket`; when that takes too long, or there is no more point in it, the
/// connection is cut.
fn within<T>(
    limit: Duration,
    socket: &UnixStream,
    told_to_end: fn() -> bool,
    work: impl FnOnce() -> T,
) -> T {
    let (done, wait) = mpsc::channel::<()>();
    thread::scope(|scope| {
        scope.spawn(move || {
            let end = Instant::now() + limit;
            while wait.recv_timeout(RETRY) == Err(mpsc::RecvTimeoutError::Timeout) {
                if Instant::now() >= end || told_to_end() {
                    let _ = socket.shutdown(Shutdown::Both);
                    return;
                }
            }
        });
        let result = work();
        drop(done);
        result
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_useless_virtiofsd_is_tried_ever_more_seldom() {
        let begin = Instant::now();
        let mut retry = Retry::new(begin);
        assert!(retry.left(begin).is_zero());
        let mut now = begin;
        let mut waits = Vec::new();
        for _ in 0..9 {
            retry.connected(now);
            retry.ended(now);
            waits.push(retry.left(now).as_millis());
            now += retry.left(now);
        }
        assert_eq!(waits, [100, 200, 400, 800, 1600, 3200, 6400, 10_000, 10_000]);
        // None at all is looked for as often as ever.
        retry.nobody(now);
        assert_eq!(retry.left(now), RETRY);
        // One that worked for a while is missed at once.
        retry.connected(now);
        retry.ended(now + GOOD_RUN);
        assert_eq!(retry.left(now + GOOD_RUN), RETRY);
    }
}
