//! Who may try a password, and how often.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Wrong passwords after which an address has to wait.
const TRIES: u32 = 5;

/// How long it has to wait.
const LOCKED: Duration = Duration::from_secs(60);

/// Addresses remembered; a flood of them must not take memory.
const MAX_ADDRESSES: usize = 1024;

/// Connections that have not finished the handshake.
const MAX_STRANGERS: usize = 32;

#[derive(Debug, Default)]
struct State {
    failures: HashMap<IpAddr, (u32, Instant)>,
    strangers: usize,
}

/// Counts strangers and their failures.
#[derive(Debug, Default)]
pub(crate) struct Gate(Mutex<State>);

/// One stranger; dropped when the handshake is over.
#[derive(Debug)]
pub(crate) struct Stranger<'a>(&'a Gate);

impl Gate {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets a stranger in for the handshake, unless there are too many or its address is locked out.
    pub(crate) fn enter(&self, address: IpAddr, now: Instant) -> Option<Stranger<'_>> {
        let mut state = self.lock();
        let locked = state
            .failures
            .get(&address)
            .is_some_and(|(count, since)| *count >= TRIES && now < *since + LOCKED);
        if locked || state.strangers >= MAX_STRANGERS {
            return None;
        }
        state.strangers += 1;
        Some(Stranger(self))
    }

    /// Somebody at this address gave a wrong password.
    pub(crate) fn failed(&self, address: IpAddr, now: Instant) {
        let mut state = self.lock();
        state.failures.retain(|_, (_, since)| now < *since + LOCKED);
        if state.failures.len() < MAX_ADDRESSES {
            let (count, since) = state.failures.entry(address).or_insert((0, now));
            *count += 1;
            *since = now;
        }
    }

    /// Somebody at this address gave the right one.
    pub(crate) fn succeeded(&self, address: IpAddr) {
        self.lock().failures.remove(&address);
    }
}

impl Drop for Stranger<'_> {
    fn drop(&mut self) {
        self.0.lock().strangers -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn five_tries_a_minute() {
        let gate = Gate::default();
        let (bad, good): (IpAddr, IpAddr) = ([10, 0, 0, 1].into(), [10, 0, 0, 2].into());
        let start = Instant::now();
        for _ in 0..TRIES {
            assert!(gate.enter(bad, start).is_some());
            gate.failed(bad, start);
        }
        assert!(gate.enter(bad, start).is_none());
        assert!(gate.enter(good, start).is_some(), "others have nothing to do with it");
        assert!(gate.enter(bad, start + LOCKED).is_some());
        gate.succeeded(bad);
        assert!(gate.enter(bad, start).is_some());
    }

    #[test]
    fn strangers_are_few() {
        let gate = Gate::default();
        let now = Instant::now();
        let address = [10, 0, 0, 1].into();
        let inside: Vec<_> = (0..MAX_STRANGERS).map(|_| gate.enter(address, now)).collect();
        assert!(inside.iter().all(Option::is_some));
        assert!(gate.enter(address, now).is_none());
        drop(inside);
        assert!(gate.enter(address, now).is_some());
    }
}
