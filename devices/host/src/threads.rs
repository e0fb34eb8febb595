//! Threads started by a neutral thread.
//!
//! A thread inherits the system call filter of the thread that starts it (seccomp(2)). A device
//! worker started by a vCPU thread, which is where the guest's driver activates a device, would have
//! the vCPU's narrow filter. With [`start_nursery`] all threads of [`spawn`] are children of a thread
//! which has nothing but the process' own filter.

use std::{
    io,
    sync::{
        OnceLock,
        mpsc::{Sender, channel},
    },
    thread::{self, JoinHandle},
};

type Job = Box<dyn FnOnce() + Send>;

static NURSERY: OnceLock<Sender<Job>> = OnceLock::new();

/// Starts the thread that starts threads. A second call does nothing.
///
/// # Errors
///
/// When the thread cannot be started.
pub fn start_nursery() -> io::Result<()> {
    if NURSERY.get().is_some() {
        return Ok(());
    }
    let (sender, jobs) = channel::<Job>();
    thread::Builder::new().name("nursery".into()).spawn(move || {
        for job in jobs {
            job();
        }
    })?;
    // If another thread was faster, ours ends because its sender is dropped here.
    let _ = NURSERY.set(sender);
    Ok(())
}

/// Starts a thread called `name` (at most 15 bytes are visible in `ps`).
///
/// # Errors
///
/// When the system has no room for another thread.
pub fn spawn<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let builder = thread::Builder::new().name(name.to_owned());
    let Some(nursery) = NURSERY.get() else { return builder.spawn(work) };
    let (reply, answer) = channel();
    let job = Box::new(move || {
        let _ = reply.send(builder.spawn(work));
    });
    let gone = || io::Error::other("the thread that starts threads has ended");
    nursery.send(job).map_err(|_| gone())?;
    answer.recv().map_err(|_| gone())?
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn work_is_done_by_a_thread_of_that_name() {
        let name = || thread::current().name().map(str::to_owned);
        assert_eq!(spawn("plain", name).unwrap().join().unwrap().unwrap(), "plain");
        start_nursery().unwrap();
        start_nursery().unwrap();
        assert_eq!(spawn("raised", name).unwrap().join().unwrap().unwrap(), "raised");
    }
}
