//! How fast a client's connection takes data, from the times it was full.

use std::time::{Duration, Instant};

/// Below this many bytes per second (50 Mbit/s) lossy pictures are worth their artefacts.
const SLOW: f64 = 6_250_000.0;
/// Time of being full that must have been seen before anything is concluded.
const ENOUGH: Duration = Duration::from_millis(100);
/// Time of being full after which older observations count half.
const WINDOW: Duration = Duration::from_secs(1);
/// After this long without an observation a connection counts as fast again, and is tried anew.
const FORGET: Duration = Duration::from_secs(3);

/// Estimates a connection's rate.
///
/// Only exactly coded pictures tell: a client may take a lossy one slowly because decoding it is
/// work, and concluding from that would never end.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    /// When the socket became full, and the bytes it has taken since.
    full: Option<(Instant, u64)>,
    /// What was sent since the socket was empty contains lossy pictures.
    lossy: bool,
    bytes: f64,
    time: Duration,
    last: Option<Instant>,
}

impl Pace {
    /// A lossy picture is about to be sent.
    pub(crate) fn lossy(&mut self) {
        self.lossy = true;
    }

    /// The socket refused bytes.
    pub(crate) fn full(&mut self, now: Instant) {
        self.full.get_or_insert((now, 0));
    }

    /// The socket took bytes.
    pub(crate) fn took(&mut self, bytes: usize) {
        if let Some((_, taken)) = &mut self.full {
            *taken += bytes as u64;
        }
    }

    /// Everything there was to send is with the kernel.
    pub(crate) fn drained(&mut self, now: Instant) {
        let lossy = std::mem::take(&mut self.lossy);
        let Some((since, taken)) = self.full.take() else { return };
        if lossy {
            return;
        }
        if !self.remembers(now) {
            self.bytes = 0.0;
            self.time = Duration::ZERO;
        }
        self.bytes += taken as f64;
        self.time += now.saturating_duration_since(since);
        if self.time > WINDOW {
            self.bytes /= 2.0;
            self.time /= 2;
        }
        self.last = Some(now);
    }

    fn remembers(&self, now: Instant) -> bool {
        self.last.is_some_and(|last| now.saturating_duration_since(last) < FORGET)
    }

    /// Whether pixels should be saved at the cost of exactness.
    pub(crate) fn is_slow(&self, now: Instant) -> bool {
        self.remembers(now) && self.time >= ENOUGH && self.bytes < SLOW * self.time.as_secs_f64()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slow_is_what_was_full_for_long() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut pace = Pace::default();
        assert!(!pace.is_slow(start));
        pace.full(start);
        pace.took(1_000);
        pace.drained(at(50));
        assert!(!pace.is_slow(at(51)), "too short to tell");
        pace.full(at(60));
        pace.took(1_000_000);
        pace.drained(at(1000));
        assert!(pace.is_slow(at(1001)));
        assert!(!pace.is_slow(at(5_000)), "forgotten");
    }

    #[test]
    fn lossy_pictures_do_not_count() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut pace = Pace::default();
        pace.lossy();
        pace.full(start);
        pace.took(1);
        pace.drained(at(1000));
        assert!(!pace.is_slow(at(1001)));
        pace.full(at(1000));
        pace.took(1);
        pace.drained(at(2000));
        assert!(pace.is_slow(at(2001)));
        for i in 0..40 {
            pace.full(at(2000 + i * 100));
            pace.took(5_000_000);
            pace.drained(at(2100 + i * 100));
        }
        assert!(!pace.is_slow(at(6_100)), "fast now");
    }
}
