//! Ticket keys, made ahead, and the thread that opens tickets, so that neither delays a connection or
//! input.
//!
//! A key of 1024 bits takes tens of milliseconds to make. The first is made when the server starts;
//! where there is a password to protect, keys are replaced after a few links, and the successors wait
//! in a pool that a thread of low priority keeps filled.

use std::{
    collections::VecDeque,
    io,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
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
/// Keys that wait for their turn. A client opens up to seven links, so this is a storm of clients.
const SPARE_KEYS: usize = 3;
/// How nice the thread is that makes them (nice(2)).
const NICENESS: i32 = 10;

/// What the threads report.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum KeyEvent {
    /// There is one more key.
    Ready,
    /// The ticket of connection `token` carries the password, or not.
    Verified { token: u64, ok: bool },
}

struct Ticket {
    token: u64,
    key: Arc<TicketKey>,
    bytes: Box<[u8; TICKET_SIZE]>,
    wanted: Secret,
}

/// The reactor's end of the threads. Dropping it ends them.
pub(crate) struct KeyService {
    tickets: Option<Sender<Ticket>>,
    pool: Arc<Pool>,
    threads: Vec<JoinHandle<()>>,
    current: Option<Arc<TicketKey>>,
    /// Links served by the current key.
    used: u32,
}

#[derive(Default)]
struct Pool {
    state: Mutex<PoolState>,
    changed: Condvar,
}

#[derive(Default)]
struct PoolState {
    keys: VecDeque<Arc<TicketKey>>,
    stop: bool,
    /// There is a password to protect: keys are replaced after a few links.
    rotate: bool,
}

impl Pool {
    fn lock(&self) -> MutexGuard<'_, PoolState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> Option<Arc<TicketKey>> {
        let key = self.lock().keys.pop_front();
        self.changed.notify_all();
        key
    }

    /// Fills the pool, for ever; with one key until keys are to be replaced.
    fn fill(&self, report: &impl Fn(KeyEvent)) {
        let mut first = true;
        loop {
            {
                let mut state = self.lock();
                while !state.stop && (state.keys.len() >= SPARE_KEYS || !(first || state.rotate)) {
                    state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                if state.stop {
                    return;
                }
            }
            let Some(key) = TicketKey::generate() else {
                tracing::error!("no randomness for a ticket key: clients cannot connect");
                return;
            };
            self.lock().keys.push_back(Arc::new(key));
            report(KeyEvent::Ready);
            // Only the first is urgent.
            if std::mem::take(&mut first) {
                let thread = rustix::thread::gettid();
                if let Err(error) = rustix::process::setpriority_process(Some(thread), NICENESS) {
                    tracing::debug!(%error, "ticket keys are made at normal priority");
                }
            }
        }
    }
}

impl KeyService {
    /// Starts the threads; the first key is made at once. `report` is called from them.
    pub(crate) fn start(
        rotate: bool,
        report: impl Fn(KeyEvent) + Clone + Send + 'static,
    ) -> io::Result<Self> {
        let (tickets, inbox) = channel();
        let pool = Arc::<Pool>::default();
        pool.lock().rotate = rotate;
        let mut service = Self {
            tickets: Some(tickets),
            pool: pool.clone(),
            threads: Vec::new(),
            current: None,
            used: 0,
        };
        let for_keys = report.clone();
        let keys =
            thread::Builder::new().name("spice-keys".into()).spawn(move || pool.fill(&for_keys))?;
        service.threads.push(keys);
        let tickets = thread::Builder::new()
            .name("spice-tickets".into())
            .spawn(move || verify(&inbox, report))?;
        service.threads.push(tickets);
        Ok(service)
    }

    /// The key for one more link; `None` until the first one is ready. A key is used longer than it
    /// should be rather than not at all.
    pub(crate) fn key_for_link(&mut self) -> Option<Arc<TicketKey>> {
        let is_old = self.pool.lock().rotate && self.used >= LINKS_PER_KEY;
        if (self.current.is_none() || is_old)
            && let Some(next) = self.pool.take()
        {
            self.current = Some(next);
            self.used = 0;
        }
        self.used = self.used.saturating_add(1);
        self.current.clone()
    }

    /// Whether keys are to be replaced after a few links.
    pub(crate) fn rotate(&self, rotate: bool) {
        self.pool.lock().rotate = rotate;
        self.pool.changed.notify_all();
    }

    /// Asks whether a ticket carries the password `wanted`.
    pub(crate) fn verify(
        &self,
        token: u64,
        key: Arc<TicketKey>,
        ticket: Box<[u8; TICKET_SIZE]>,
        wanted: Secret,
    ) {
        if let Some(tickets) = &self.tickets {
            let _ = tickets.send(Ticket { token, key, bytes: ticket, wanted });
        }
    }
}

impl Drop for KeyService {
    fn drop(&mut self) {
        self.tickets = None;
        self.pool.lock().stop = true;
        self.pool.changed.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn verify(inbox: &Receiver<Ticket>, report: impl Fn(KeyEvent)) {
    while let Ok(Ticket { token, key, bytes, wanted }) = inbox.recv() {
        let ok = key.verify(&bytes, &wanted);
        report(KeyEvent::Verified { token, ok });
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, sync::mpsc};

    use super::*;

    #[test]
    fn keys_are_made_ahead_and_replaced_where_there_is_a_password() {
        let (tx, rx) = mpsc::channel();
        let mut keys = KeyService::start(true, move |event| tx.send(event).unwrap()).unwrap();
        let ready = |count: usize| {
            for _ in 0..count {
                assert_eq!(rx.recv().unwrap(), KeyEvent::Ready);
            }
        };
        ready(SPARE_KEYS);
        let mut seen = BTreeSet::new();
        // Three keys' worth of links in a row, and none has to wait or gets a worn key.
        for link in 0..LINKS_PER_KEY as usize * SPARE_KEYS {
            seen.insert(*keys.key_for_link().unwrap().public());
            assert_eq!(seen.len(), 1 + link / LINKS_PER_KEY as usize);
        }
        // The pool is filled again, and no further.
        ready(SPARE_KEYS);
        assert_eq!(keys.pool.lock().keys.len(), SPARE_KEYS);
        drop(keys);
        assert!(rx.recv().is_err(), "the threads are gone");
    }

    #[test]
    fn without_a_password_one_key_will_do() {
        let (tx, rx) = mpsc::channel();
        let mut keys = KeyService::start(false, move |event| tx.send(event).unwrap()).unwrap();
        assert_eq!(rx.recv().unwrap(), KeyEvent::Ready);
        let first = *keys.key_for_link().unwrap().public();
        for _ in 0..3 * LINKS_PER_KEY {
            assert_eq!(*keys.key_for_link().unwrap().public(), first);
        }
        // A password at run time changes that.
        keys.rotate(true);
        assert_eq!(rx.recv().unwrap(), KeyEvent::Ready);
        assert_ne!(*keys.key_for_link().unwrap().public(), first);
        drop(keys);
    }

    #[test]
    fn wrong_tickets_are_reported() {
        let (tx, rx) = mpsc::channel();
        let mut keys = KeyService::start(true, move |event| tx.send(event).unwrap()).unwrap();
        assert_eq!(rx.recv().unwrap(), KeyEvent::Ready);
        let key = keys.key_for_link().unwrap();
        keys.verify(5, key, Box::new([9; TICKET_SIZE]), Secret::new("pw").unwrap());
        let verdict = rx.iter().find(|event| *event != KeyEvent::Ready);
        assert_eq!(verdict, Some(KeyEvent::Verified { token: 5, ok: false }));
    }
}
