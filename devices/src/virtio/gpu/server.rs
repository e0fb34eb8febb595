//! The thread that serves the GPU socket, and the one of the next back end if that one dies.
//!
//! It has its own thread because the back end asks questions while the VMM waits for the back end:
//! whoever sets up rings and serves this socket at the same time waits for himself. It also is the
//! one that notices a back end which has died or does not answer any more.

use std::{
    collections::VecDeque,
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use gpu_protocol::socket::{Decoder, FromBackEnd, Side};
use host::socket_io;
use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec},
    net::RecvFlags,
};

use super::display::{self, Display};

/// How long the back end may take for one group of vhost-user requests.
const PATIENCE: Duration = Duration::from_secs(10);

/// The same for the first group: drivers of GPUs load slowly on a busy machine.
const START_PATIENCE: Duration = Duration::from_secs(60);

/// Watches over the vhost-user connection.
#[derive(Debug)]
pub(super) struct Watch {
    /// A duplicate of the vhost-user socket.
    vhost: Mutex<Option<(UnixStream, u64)>>,
    ring_error: OwnedFd,
    deadline: Mutex<Option<Instant>>,
    stop: AtomicBool,
}

impl Watch {
    pub(super) fn new() -> io::Result<Arc<Self>> {
        let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
        let ring_error = rustix::event::eventfd(0, flags)?;
        let (vhost, deadline, stop) = (Mutex::default(), Mutex::default(), AtomicBool::new(false));
        Ok(Arc::new(Self { vhost, ring_error, deadline, stop }))
    }

    /// Where the back end tells that the driver has broken the rules of a queue.
    pub(super) fn ring_error(&self) -> BorrowedFd<'_> {
        self.ring_error.as_fd()
    }

    /// Whether it has told so since the last call.
    pub(super) fn take_ring_error(&self) -> bool {
        rustix::io::read(&self.ring_error, &mut [0; 8]).is_ok()
    }

    /// Watches over the connection of this number from now on.
    pub(super) fn connected(&self, vhost: UnixStream, generation: u64) {
        *self.vhost.lock().unwrap_or_else(PoisonError::into_inner) = Some((vhost, generation));
    }

    /// Ends the vhost-user connection.
    pub(super) fn hang_up(&self) {
        self.hang_up_if(|_| true);
    }

    fn hang_up_if(&self, which: impl FnOnce(u64) -> bool) {
        if let Some((vhost, generation)) =
            &*self.vhost.lock().unwrap_or_else(PoisonError::into_inner)
            && which(*generation)
        {
            let _ = vhost.shutdown(std::net::Shutdown::Both);
        }
    }

    fn set(&self, deadline: Option<Instant>) {
        *self.deadline.lock().unwrap_or_else(PoisonError::into_inner) = deadline;
    }

    fn deadline(&self) -> Option<Instant> {
        *self.deadline.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the server's thread end, without a word about the back end's end.
    pub(super) fn stop(&self, display: &Display) {
        self.stop.store(true, Ordering::Release);
        display.wake();
    }

    /// Does `work`, which waits for the back end; if that takes too long, the connection is ended
    /// and the work fails.
    pub(super) fn guard<T>(&self, display: &Display, work: impl FnOnce() -> T) -> T {
        self.guard_for(PATIENCE, display, work)
    }

    /// The same for the first group of requests to a back end.
    pub(super) fn guard_start<T>(&self, display: &Display, work: impl FnOnce() -> T) -> T {
        self.guard_for(START_PATIENCE, display, work)
    }

    fn guard_for<T>(&self, patience: Duration, display: &Display, work: impl FnOnce() -> T) -> T {
        self.set(Some(Instant::now() + patience));
        display.wake();
        let result = work();
        self.set(None);
        result
    }
}

/// The running thread. Ends when dropped.
#[derive(Debug)]
pub(super) struct Server {
    display: Arc<Display>,
    watch: Arc<Watch>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Starts to serve the display's GPU socket, and those that come after it; `died` is called with
    /// the number of a connection that ended by itself.
    pub(super) fn spawn(
        display: Arc<Display>,
        watch: Arc<Watch>,
        died: impl Fn(u64) + Send + 'static,
    ) -> io::Result<Self> {
        let (display_, watch_) = (display.clone(), watch.clone());
        let thread = thread::Builder::new().name("gpu-socket".into()).spawn(move || {
            loop {
                // Without a back end new viewers still get the last picture.
                linger(&display_, &watch_);
                let Some((socket, generation)) = display_.socket() else { return };
                let result = serve(&display_, &socket, &watch_);
                display_.disconnect(generation);
                if watch_.stop.load(Ordering::Acquire) {
                    return;
                }
                match result {
                    Ok(()) => tracing::error!("the GPU's back end is gone; its last picture stays"),
                    Err(error) => {
                        tracing::error!(%error, "the GPU's back end is given up; its last picture stays");
                    }
                }
                // Nobody must wait for it any more.
                watch_.hang_up_if(|present| present == generation);
                let _ = socket.shutdown(std::net::Shutdown::Both);
                died(generation);
            }
        })?;
        Ok(Self { display, watch, thread: Some(thread) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.watch.stop(&self.display);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread of the GPU socket panicked");
        }
    }
}

fn tell_sink(display: &Display) {
    while let Some((sink, events)) = display.take_events() {
        display::deliver(&*sink, events);
    }
}

fn serve(display: &Arc<Display>, socket: &UnixStream, watch: &Watch) -> io::Result<()> {
    let mut decoder = Decoder::new(Side::FrontEnd);
    let mut fds = VecDeque::new();
    let mut buffer = vec![0; 256 * 1024];
    loop {
        tell_sink(display);
        if watch.stop.load(Ordering::Acquire) {
            return Ok(());
        }
        let events = wait(display, Some(socket), watch)?;
        if watch.deadline().is_some_and(|deadline| deadline <= Instant::now()) {
            return Err(io::Error::other("it did not answer in time"));
        }
        if events.contains(PollFlags::OUT) {
            display.flush();
        }
        if !events.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) {
            continue;
        }
        match socket_io::receive(socket, &mut buffer, &mut fds, RecvFlags::DONTWAIT) {
            Ok(0) => return Ok(()),
            Ok(count) => decoder.push(&buffer[..count]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
        while let Some(raw) = decoder.next_message().map_err(io::Error::other)? {
            let message = FromBackEnd::decode(&raw).map_err(io::Error::other)?;
            let fd = message.wants_fd().then(|| fds.pop_front()).flatten();
            display.handle(message, fd);
            // At once, so that no more than one message's worth of events ever waits.
            tell_sink(display);
        }
    }
}

/// While there is no back end: only the sink may want something.
fn linger(display: &Arc<Display>, watch: &Watch) {
    while !watch.stop.load(Ordering::Acquire) && display.socket().is_none() {
        tell_sink(display);
        if wait(display, None, watch).is_err() {
            return;
        }
    }
}

fn wait(display: &Display, socket: Option<&UnixStream>, watch: &Watch) -> io::Result<PollFlags> {
    let timeout = watch
        .deadline()
        .filter(|_| socket.is_some())
        .map(|deadline| deadline.saturating_duration_since(Instant::now()))
        .map(|left| Timespec {
            tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        });
    let wake = display.wake_fd();
    let ring_error = &watch.ring_error;
    let mut fds = vec![PollFd::new(wake, PollFlags::IN), PollFd::new(ring_error, PollFlags::IN)];
    if let Some(socket) = socket {
        let mut wanted = PollFlags::empty();
        wanted.set(PollFlags::IN, display.has_room());
        wanted.set(PollFlags::OUT, display.has_waiting());
        fds.push(PollFd::new(socket, wanted));
    }
    match rustix::event::poll(&mut fds, timeout.as_ref()) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    if fds[0].revents().contains(PollFlags::IN) {
        let _ = rustix::io::read(wake, &mut [0; 8]);
    }
    if fds[1].revents().contains(PollFlags::IN) && watch.take_ring_error() {
        display.ring_broken();
    }
    Ok(fds.get(2).map_or(PollFlags::empty(), PollFd::revents))
}
