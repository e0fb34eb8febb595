//! A device's worker thread: an [`event_manager`] loop that can be stopped and hands back the
//! state it was given, so that a device can be reset and activated again.

use std::{
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
};

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Either the device's subscriber or the stop signal; one event manager holds both.
enum Member<S> {
    Device(Box<S>),
    Stop { signal: EventFd, stopped: Arc<AtomicBool> },
}

impl<S: MutEventSubscriber> MutEventSubscriber for Member<S> {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        match self {
            Self::Device(subscriber) => subscriber.process(events, ops),
            Self::Stop { stopped, .. } => stopped.store(true, Ordering::Release),
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        match self {
            Self::Device(subscriber) => subscriber.init(ops),
            Self::Stop { signal, .. } => {
                if let Err(error) = ops.add(Events::new(signal, EventSet::IN)) {
                    tracing::error!(%error, "a worker's stop signal could not be registered");
                }
            }
        }
    }
}

/// A running worker thread around a subscriber `S`.
#[derive(Debug)]
pub struct Worker<S> {
    stop: EventFd,
    thread: Option<JoinHandle<Option<Box<S>>>>,
    name: String,
}

impl<S: MutEventSubscriber + Send + 'static> Worker<S> {
    /// Starts a thread called `name` (at most 15 bytes are visible in `ps`) which dispatches the
    /// events of `subscriber` until [`stop`](Self::stop).
    pub fn spawn(name: &str, subscriber: S) -> io::Result<Self> {
        let stop = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let signal = stop.try_clone()?;
        // Not as a child of this thread, which may be a vCPU's.
        let thread = host::threads::spawn(name, move || run(Box::new(subscriber), signal))?;
        Ok(Self { stop, thread: Some(thread), name: name.to_owned() })
    }

    /// Stops the thread and returns the subscriber. `None` if the worker had failed, in which case
    /// the failure has been logged.
    pub fn stop(mut self) -> Option<Box<S>> {
        self.join()
    }
}

impl<S> Worker<S> {
    fn join(&mut self) -> Option<Box<S>> {
        let thread = self.thread.take()?;
        if let Err(error) = self.stop.write(1) {
            tracing::error!(worker = self.name, %error, "the stop signal could not be sent");
        }
        thread.join().unwrap_or_else(|_| {
            tracing::error!(worker = self.name, "the worker thread panicked");
            None
        })
    }
}

impl<S> Drop for Worker<S> {
    fn drop(&mut self) {
        self.join();
    }
}

fn run<S: MutEventSubscriber>(subscriber: Box<S>, signal: EventFd) -> Option<Box<S>> {
    let mut manager = EventManager::<Member<S>>::new()
        .inspect_err(|error| tracing::error!(%error, "a worker has no event loop"))
        .ok()?;
    let stopped = Arc::new(AtomicBool::new(false));
    manager.add_subscriber(Member::Stop { signal, stopped: stopped.clone() });
    let id = manager.add_subscriber(Member::Device(subscriber));
    // A defect in a device must not take the virtual machine with it: the guest sees a device that
    // no longer answers, the log says why.
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        while !stopped.load(Ordering::Acquire) {
            match manager.run() {
                Ok(_) => {}
                Err(event_manager::Error::Epoll(errno)) if errno.errno() == libc::EINTR => {}
                Err(error) => {
                    tracing::error!(%error, "a worker's event loop failed");
                    break;
                }
            }
        }
    }));
    if outcome.is_err() {
        tracing::error!(thread = thread::current().name(), "a device worker panicked");
        return None;
    }
    match manager.remove_subscriber(id) {
        Ok(Member::Device(subscriber)) => Some(subscriber),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Counter {
        kick: EventFd,
        seen: Arc<std::sync::atomic::AtomicU64>,
    }

    impl MutEventSubscriber for Counter {
        fn process(&mut self, _: Events, _: &mut EventOps<'_>) {
            self.seen.fetch_add(self.kick.read().unwrap(), Ordering::SeqCst);
        }

        fn init(&mut self, ops: &mut EventOps<'_>) {
            ops.add(Events::new(&self.kick, EventSet::IN)).unwrap();
        }
    }

    #[test]
    fn events_arrive_and_the_state_comes_back() {
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        let seen = Arc::new(std::sync::atomic::AtomicU64::new(0));
        let counter = Counter { kick: kick.try_clone().unwrap(), seen: seen.clone() };
        let worker = Worker::spawn("test", counter).unwrap();
        kick.write(3).unwrap();
        while seen.load(Ordering::SeqCst) != 3 {
            thread::yield_now();
        }
        assert!(worker.stop().is_some());
    }
}
