//! Threads for requests that have to wait for the disk. They start when they are first needed, so
//! a disk whose content is in the page cache costs none.

use std::{
    collections::VecDeque,
    io,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
};

use vmm_sys_util::eventfd::EventFd;

use super::{image::Image, request::Request};

/// Requests in progress at the same time; a flush must not keep reads waiting.
const MAX_THREADS: usize = 8;

#[derive(Default)]
struct Jobs {
    waiting: VecDeque<Request>,
    done: Vec<Request>,
    idle: usize,
    stop: bool,
}

struct Shared {
    image: Arc<Image>,
    jobs: Mutex<Jobs>,
    work: Condvar,
    /// Readable when requests are done.
    signal: EventFd,
}

impl Shared {
    fn jobs(&self) -> MutexGuard<'_, Jobs> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The threads of one active disk. Dropping it waits for requests in progress and forgets those
/// not begun.
pub(super) struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    /// A pool that writes to `signal` when requests are done.
    pub(super) fn new(image: Arc<Image>, signal: EventFd) -> Self {
        let shared = Shared { image, jobs: Mutex::default(), work: Condvar::new(), signal };
        Self { shared: Arc::new(shared), threads: Vec::new() }
    }

    /// Has a request executed. If there is no thread for it, it comes back.
    pub(super) fn submit(&mut self, request: Request) -> Result<(), Request> {
        let mut jobs = self.shared.jobs();
        let short = jobs.idle <= jobs.waiting.len() && self.threads.len() < MAX_THREADS;
        if short {
            drop(jobs);
            if let Err(error) = self.grow() {
                tracing::warn!(%error, "no further disk thread could be started");
                if self.threads.is_empty() {
                    return Err(request);
                }
            }
            jobs = self.shared.jobs();
        }
        jobs.waiting.push_back(request);
        drop(jobs);
        self.shared.work.notify_one();
        Ok(())
    }

    fn grow(&mut self) -> io::Result<()> {
        let shared = self.shared.clone();
        let thread =
            thread::Builder::new().name("blk-io".to_owned()).spawn(move || run(&shared))?;
        self.threads.push(thread);
        Ok(())
    }

    /// Appends the completed requests to `target`.
    pub(super) fn take_done(&self, target: &mut Vec<Request>) {
        let _ = self.shared.signal.read();
        target.append(&mut self.shared.jobs().done);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let mut jobs = self.shared.jobs();
        jobs.stop = true;
        jobs.waiting.clear();
        drop(jobs);
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a disk thread panicked");
            }
        }
    }
}

fn run(shared: &Shared) {
    let mut jobs = shared.jobs();
    loop {
        if jobs.stop {
            return;
        }
        let Some(mut request) = jobs.waiting.pop_front() else {
            jobs.idle += 1;
            jobs = shared.work.wait(jobs).unwrap_or_else(PoisonError::into_inner);
            jobs.idle -= 1;
            continue;
        };
        drop(jobs);
        request.execute(&shared.image);
        jobs = shared.jobs();
        let first = jobs.done.is_empty();
        jobs.done.push(request);
        if first {
            // Whoever takes the list takes all of it, so one signal is enough for many requests.
            let _ = shared.signal.write(1);
        }
    }
}
