//! What one network address may ask for: connections per second, connections that have not
//! authenticated, wrong passwords. Unix sockets have permissions instead.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    time::{Duration, Instant},
};

use super::stream::Peer;

/// Connections an address may open at once, and how many more per second. A client with 16 displays
/// opens some 40.
const BURST: f64 = 128.0;
const PER_SECOND: f64 = 32.0;
/// Most connections of an address that have not authenticated; one more pushes its oldest out.
pub(crate) const MAX_PENDING: usize = 48;
/// Wrong passwords in a row that lock an address out.
const MAX_FAILURES: u32 = 10;
/// How long, at first. Every further wrong password doubles it.
const LOCK: Duration = Duration::from_secs(60);
const MAX_LOCK: Duration = Duration::from_secs(15 * 60);
/// An address nothing was heard of for this long is forgotten.
const FORGET: Duration = Duration::from_secs(60 * 60);
/// Most addresses that are remembered.
const MAX_SOURCES: usize = 4096;

#[derive(Debug)]
struct Record {
    /// Connections it may still open.
    tokens: f64,
    seen: Instant,
    failures: u32,
    locked_until: Option<Instant>,
}

/// Lines in the log about strangers, and in how long.
const MAX_LINES: u32 = 30;
const LINES_PERIOD: Duration = Duration::from_secs(60);

/// Remembers addresses. Bounded: the one that was silent longest is forgotten first.
#[derive(Debug, Default)]
pub(crate) struct Guard {
    sources: HashMap<IpAddr, Record>,
    /// Since when lines are counted, and how many there were.
    lines: Option<(Instant, u32)>,
}

/// The address a peer counts for: hosts have whole IPv6 networks to themselves.
pub(crate) fn source(peer: &Peer) -> Option<IpAddr> {
    let Peer::Net(address) = peer else { return None };
    Some(match address.ip().to_canonical() {
        IpAddr::V6(v6) => {
            let [a, b, c, d, ..] = v6.segments();
            IpAddr::V6(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0))
        }
        v4 => v4,
    })
}

impl Guard {
    fn record(&mut self, peer: &Peer, now: Instant) -> Option<&mut Record> {
        let source = source(peer)?;
        if self.sources.len() >= MAX_SOURCES && !self.sources.contains_key(&source) {
            let idle = |record: &Record| now.saturating_duration_since(record.seen);
            self.sources.retain(|_, record| idle(record) < FORGET);
            if self.sources.len() >= MAX_SOURCES {
                // Whoever is locked out stays so as long as there is anybody else to forget.
                let key = |record: &Record| (record.failures >= MAX_FAILURES, record.seen);
                let oldest =
                    self.sources.iter().min_by_key(|(_, record)| key(record)).map(|(ip, _)| *ip);
                if let Some(oldest) = oldest {
                    self.sources.remove(&oldest);
                }
            }
        }
        let new = Record { tokens: BURST, seen: now, failures: 0, locked_until: None };
        let record = self.sources.entry(source).or_insert(new);
        let silent = now.saturating_duration_since(record.seen);
        record.tokens = (record.tokens + silent.as_secs_f64() * PER_SECOND).min(BURST);
        if silent > FORGET {
            (record.failures, record.locked_until) = (0, None);
        }
        record.seen = now;
        Some(record)
    }

    /// Whether one more line about a stranger may go to the log, which must not be theirs to fill.
    pub(crate) fn may_log(&mut self) -> bool {
        self.may_log_at(Instant::now())
    }

    fn may_log_at(&mut self, now: Instant) -> bool {
        let over = |since| now.saturating_duration_since(since) >= LINES_PERIOD;
        if let Some((_, count)) = self.lines.take_if(|(since, _)| over(*since))
            && let Some(left_out @ 1..) = count.checked_sub(MAX_LINES)
        {
            tracing::info!("{left_out} more lines about refused SPICE connections were left out");
        }
        let (_, count) = self.lines.get_or_insert((now, 0));
        *count = count.saturating_add(1);
        *count <= MAX_LINES
    }

    /// Whether one more connection is welcome.
    pub(crate) fn connection(&mut self, peer: &Peer, now: Instant) -> bool {
        let Some(record) = self.record(peer, now) else { return true };
        let welcome = record.tokens >= 1.0;
        if welcome {
            record.tokens -= 1.0;
        }
        welcome
    }

    /// How much longer an address is locked out, if it is.
    pub(crate) fn locked(&mut self, peer: &Peer, now: Instant) -> Option<Duration> {
        let until = self.record(peer, now)?.locked_until?;
        until.checked_duration_since(now).filter(|left| !left.is_zero())
    }

    /// A wrong password; how long the address is locked out now, if it is.
    pub(crate) fn failure(&mut self, peer: &Peer, now: Instant) -> Option<Duration> {
        let record = self.record(peer, now)?;
        record.failures = record.failures.saturating_add(1);
        let beyond = record.failures.checked_sub(MAX_FAILURES)?;
        let lock = LOCK.saturating_mul(1 << beyond.min(8)).min(MAX_LOCK);
        record.locked_until = Some(now + lock);
        Some(lock)
    }

    /// A right password.
    pub(crate) fn success(&mut self, peer: &Peer, now: Instant) {
        if let Some(record) = self.record(peer, now) {
            (record.failures, record.locked_until) = (0, None);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(text: &str) -> Peer {
        Peer::Net(text.parse().unwrap())
    }

    #[test]
    fn floods_are_thinned_out_and_others_do_not_notice() {
        let mut guard = Guard::default();
        let (start, flood, other) = (Instant::now(), peer("192.0.2.1:7"), peer("192.0.2.2:7"));
        let welcome = (0..1000).filter(|_| guard.connection(&flood, start)).count();
        assert_eq!(welcome, BURST as usize);
        assert!(guard.connection(&other, start));
        let later = start + Duration::from_secs(1);
        let welcome = (0..1000).filter(|_| guard.connection(&flood, later)).count();
        assert_eq!(welcome, PER_SECOND as usize);
        assert!(guard.connection(&flood, later + Duration::from_secs(10)));
    }

    #[test]
    fn wrong_passwords_lock_out_for_longer_and_longer() {
        let mut guard = Guard::default();
        let (mut now, guesser) = (Instant::now(), peer("[2001:db8:1:2::3]:7"));
        for _ in 1..MAX_FAILURES {
            assert_eq!(guard.failure(&guesser, now), None);
        }
        // The same network, another address in it.
        let neighbour = peer("[2001:db8:1:2:ffff::1]:9");
        assert_eq!(guard.failure(&neighbour, now), Some(LOCK));
        assert_eq!(guard.locked(&guesser, now), Some(LOCK));
        assert_eq!(guard.locked(&peer("[2001:db8:1:3::3]:7"), now), None);
        now += LOCK;
        assert_eq!(guard.locked(&guesser, now), None);
        assert_eq!(guard.failure(&guesser, now), Some(2 * LOCK));
        for _ in 0..100 {
            assert!(guard.failure(&guesser, now).unwrap() <= MAX_LOCK);
        }
        guard.success(&guesser, now);
        assert_eq!(guard.locked(&guesser, now), None);
        assert_eq!(guard.failure(&guesser, now), None);
        for _ in 0..MAX_FAILURES {
            guard.failure(&guesser, now);
        }
        now += FORGET + Duration::from_secs(1);
        assert_eq!(guard.failure(&guesser, now), None, "forgotten");
    }

    #[test]
    fn memory_is_bounded_and_those_locked_out_are_kept() {
        let mut guard = Guard::default();
        let (mut now, guesser) = (Instant::now(), peer("198.51.100.7:1"));
        while guard.failure(&guesser, now).is_none() {}
        for i in 0..3 * MAX_SOURCES as u32 {
            now += Duration::from_micros(1);
            let address = IpAddr::from((0x0a00_0000 + i).to_be_bytes());
            assert!(guard.connection(&Peer::Net((address, 1).into()), now));
            assert!(guard.sources.len() <= MAX_SOURCES);
        }
        assert!(guard.locked(&guesser, now).is_some());
        // An IPv4 client on an IPv6 socket is the same one.
        assert!(guard.locked(&peer("[::ffff:198.51.100.7]:2"), now).is_some());
    }

    #[test]
    fn unix_sockets_are_not_limited() {
        let mut guard = Guard::default();
        let (now, peer) = (Instant::now(), Peer::Unix { uid: 0, pid: 1 });
        for _ in 0..1000 {
            assert!(guard.connection(&peer, now) && guard.failure(&peer, now).is_none());
        }
        assert!(guard.sources.is_empty());
    }

    #[test]
    fn the_log_is_not_flooded() {
        let (mut guard, start) = (Guard::default(), Instant::now());
        let lines = (0..1000).filter(|_| guard.may_log_at(start)).count();
        assert_eq!(lines, MAX_LINES as usize);
        assert!(guard.may_log_at(start + LINES_PERIOD));
    }
}
