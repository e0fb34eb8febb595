//! The thread that makes ticket keys and opens tickets, so that neither delays input.

use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, Sender, channel},
    },
    thread::{self, JoinHandle},
};

use crate::{
    Secret,
    proto::{link::TICKET_SIZE, ticket::TicketKey},
};

/// Links one key may serve when there is a password to protect.
const LINKS_PER_KEY: u32 = 32;

/// What the thread reports.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum KeyEvent {
    /// There is a key now.
    Ready,
    /// The ticket of connection `token` carries the password, or not.
    Verified { token: u64, ok: bool },
}

enum Job {
    Generate,
    Verify { token: u64, key: Arc<TicketKey>, ticket: Box<[u8; TICKET_SIZE]> },
}

/// The reactor's end of the thread. Dropping it ends the thread.
pub(crate) struct KeyService {
    jobs: Option<Sender<Job>>,
    shared: Arc<KeyShared>,
    thread: Option<JoinHandle<()>>,
    rotate: bool,
    /// Links served by the current key.
    used: u32,
    generating: bool,
}

#[derive(Default)]
struct KeyShared {
    current: Mutex<Option<Arc<TicketKey>>>,
}

impl KeyService {
    /// Starts the thread and lets it make the first key. `report` is called from the thread.
    pub(crate) fn start(
        password: Option<Secret>,
        report: impl Fn(KeyEvent) + Send + 'static,
    ) -> io::Result<Self> {
        let (jobs, inbox) = channel();
        let shared = Arc::<KeyShared>::default();
        let rotate = password.is_some();
        let for_thread = shared.clone();
        let thread = thread::Builder::new()
            .name("spice-keys".into())
            .spawn(move || run(&inbox, &for_thread, password.as_ref(), report))?;
        let _ = jobs.send(Job::Generate);
        Ok(Self {
            jobs: Some(jobs),
            shared,
            thread: Some(thread),
            rotate,
            used: 0,
            generating: true,
        })
    }

    fn send(&self, job: Job) {
        if let Some(jobs) = &self.jobs {
            let _ = jobs.send(job);
        }
    }

    /// The key for one more link; `None` until the first one is ready.
    pub(crate) fn key_for_link(&mut self) -> Option<Arc<TicketKey>> {
        let key = self.shared.current.lock().unwrap_or_else(PoisonError::into_inner).clone()?;
        self.used += 1;
        if self.rotate && self.used >= LINKS_PER_KEY && !self.generating {
            self.generating = true;
            self.send(Job::Generate);
        }
        Some(key)
    }

    /// To be called on [`KeyEvent::Ready`].
    pub(crate) fn key_is_ready(&mut self) {
        self.used = 0;
        self.generating = false;
    }

    /// Asks whether a ticket carries the password.
    pub(crate) fn verify(&self, token: u64, key: Arc<TicketKey>, ticket: Box<[u8; TICKET_SIZE]>) {
        self.send(Job::Verify { token, key, ticket });
    }
}

impl Drop for KeyService {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn run(
    inbox: &Receiver<Job>,
    shared: &KeyShared,
    password: Option<&Secret>,
    report: impl Fn(KeyEvent),
) {
    while let Ok(job) = inbox.recv() {
        match job {
            Job::Generate => match TicketKey::generate() {
                Some(key) => {
                    *shared.current.lock().unwrap_or_else(PoisonError::into_inner) =
                        Some(Arc::new(key));
                    report(KeyEvent::Ready);
                }
                None => tracing::error!("no randomness for a ticket key: clients cannot connect"),
            },
            Job::Verify { token, key, ticket } => {
                let ok = password.is_none_or(|password| key.verify(&ticket, password));
                report(KeyEvent::Verified { token, ok });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn keys_rotate_only_with_a_password() {
        for (password, rotates) in [(None, false), (Some(Secret::new("x").unwrap()), true)] {
            let (tx, rx) = mpsc::channel();
            let mut keys =
                KeyService::start(password, move |event| tx.send(event).unwrap()).unwrap();
            assert_eq!(rx.recv().unwrap(), KeyEvent::Ready);
            keys.key_is_ready();
            let first = *keys.key_for_link().unwrap().public();
            for _ in 1..LINKS_PER_KEY {
                keys.key_for_link().unwrap();
            }
            assert_eq!(keys.generating, rotates);
            if rotates {
                assert_eq!(rx.recv().unwrap(), KeyEvent::Ready);
                assert_ne!(*keys.key_for_link().unwrap().public(), first);
            }
        }
    }

    #[test]
    fn wrong_tickets_are_reported() {
        let (tx, rx) = mpsc::channel();
        let mut keys =
            KeyService::start(Some(Secret::new("pw").unwrap()), move |e| tx.send(e).unwrap())
                .unwrap();
        assert_eq!(rx.recv().unwrap(), KeyEvent::Ready);
        let key = keys.key_for_link().unwrap();
        keys.verify(5, key, Box::new([9; TICKET_SIZE]));
        assert_eq!(rx.recv().unwrap(), KeyEvent::Verified { token: 5, ok: false });
    }
}
