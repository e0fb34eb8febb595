//! Who may try a password, and how often.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// Wrong passwords after which an address has to wait.
const TRIES: u32 = 5;

/// How long it has to wait.
const LOCKED: Duration = Duration::from_secs(60);

/// Addresses remembered; a flood of them must not take memory.
const MAX_ADDRESSES: usize = 1024;

/// Connections that have not finished the handshake, of everybody and of one address: nobody can
/// keep all others out alone.
const MAX_STRANGERS: u32 = 64;
const MAX_STRANGERS_OF_ADDRESS: u32 = 8;

#[derive(Debug)]
struct Record {
    failures: u32,
    since: Instant,
    /// Connections in the handshake.
    inside: u32,
}

#[derive(Debug, Default)]
struct State {
    records: HashMap<IpAddr, Record>,
    strangers: u32,
}

/// Counts strangers and their failures.
#[derive(Debug, Default)]
pub(crate) struct Gate(Mutex<State>);

/// One stranger; dropped when the handshake is over.
#[derive(Debug)]
pub(crate) struct Stranger<'a> {
    gate: &'a Gate,
    key: IpAddr,
}

/// One customer has 2⁶⁴ addresses of IPv6: they count as one.
fn key(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let [a, b, c, d, ..] = address.segments();
            IpAddr::from([a, b, c, d, 0, 0, 0, 0])
        }
        v4 => v4,
    }
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets a stranger in for the handshake, unless there are too many or its address is locked out.
    pub(crate) fn enter(&self, address: IpAddr, now: Instant) -> Option<Stranger<'_>> {
        let key = key(address);
        let mut state = self.lock();
        if state.strangers >= MAX_STRANGERS {
            return None;
        }
        state.records.retain(|_, record| record.inside > 0 || now < record.since + LOCKED);
        if !state.records.contains_key(&key) && state.records.len() >= MAX_ADDRESSES {
            // The one that has been quiet for longest is forgotten, not the newcomer let through.
            let idle = state.records.iter().filter(|(_, record)| record.inside == 0);
            let oldest = idle.min_by_key(|(_, record)| record.since).map(|(key, _)| *key)?;
            state.records.remove(&oldest);
        }
        let record =
            state.records.entry(key).or_insert(Record { failures: 0, since: now, inside: 0 });
        if now >= record.since + LOCKED {
            record.failures = 0;
        }
        // Tries at the same time count as well.
        let tried = record.failures > 0 && record.failures + record.inside >= TRIES;
        if tried || record.inside >= MAX_STRANGERS_OF_ADDRESS {
            return None;
        }
        record.inside += 1;
        state.strangers += 1;
        Some(Stranger { gate: self, key })
    }
}

impl Stranger<'_> {
    /// It gave a wrong password.
    pub(crate) fn failed(&self, now: Instant) {
        if let Some(record) = self.gate.lock().records.get_mut(&self.key) {
            record.failures += 1;
            record.since = now;
        }
    }

    /// It gave the right one.
    pub(crate) fn succeeded(&self) {
        if let Some(record) = self.gate.lock().records.get_mut(&self.key) {
            record.failures = 0;
        }
    }
}

impl Drop for Stranger<'_> {
    fn drop(&mut self) {
        let mut state = self.gate.lock();
        state.strangers -= 1;
        if let Some(record) = state.records.get_mut(&self.key) {
            record.inside -= 1;
        }
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
            gate.enter(bad, start).unwrap().failed(start);
        }
        assert!(gate.enter(bad, start).is_none());
        assert!(gate.enter(good, start).is_some(), "others have nothing to do with it");
        let later = gate.enter(bad, start + LOCKED).unwrap();
        later.failed(start + LOCKED);
        later.succeeded();
        drop(later);
        assert!(gate.enter(bad, start + LOCKED).is_some());
    }

    #[test]
    fn tries_at_the_same_time_count() {
        let gate = Gate::default();
        let (now, address) = (Instant::now(), IpAddr::from([10, 0, 0, 1]));
        gate.enter(address, now).unwrap().failed(now);
        let inside: Vec<_> = (0..8).map_while(|_| gate.enter(address, now)).collect();
        assert_eq!(inside.len() as u32, TRIES - 1);
    }

    #[test]
    fn nobody_keeps_others_out() {
        let gate = Gate::default();
        let now = Instant::now();
        let prefix = |last: u16| IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, last]);
        let inside: Vec<_> = (0..100).map_while(|i| gate.enter(prefix(i), now)).collect();
        assert_eq!(inside.len() as u32, MAX_STRANGERS_OF_ADDRESS);
        assert!(gate.enter([10, 0, 0, 2].into(), now).is_some());
        drop(inside);
        assert!(gate.enter(prefix(9), now).is_some());
    }

    #[test]
    fn a_flood_of_addresses_is_forgotten() {
        let gate = Gate::default();
        let now = Instant::now();
        for i in 0..2000_u32 {
            let entered = gate.enter(IpAddr::from(i.to_be_bytes()), now);
            entered.unwrap().failed(now + Duration::from_millis(i.into()));
        }
        assert_eq!(gate.lock().records.len(), MAX_ADDRESSES);
        assert_eq!(gate.lock().strangers, 0);
    }
}
