//! How fast a client's connection takes data, from the times it was full.

use std::time::{Duration, Instant};

/// Below this many bytes per second (100 Mbit/s) lossy pictures are worth their artefacts.
const SLOW: f64 = 12_500_000.0;
/// Shortest time of being full that tells anything.
const MEASURABLE: Duration = Duration::from_millis(4);
/// After this long without having been full a connection counts as fast again.
const FORGET: Duration = Duration::from_secs(10);

/// Estimates a connection's rate.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    /// When the socket became full, and the bytes it has taken since.
    full: Option<(Instant, u64)>,
    /// Mean bytes per second of recent episodes, and the end of the last.
    rate: Option<(f64, Instant)>,
}

impl Pace {
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
        let Some((since, taken)) = self.full.take() else { return };
        let time = now.saturating_duration_since(since);
        if time < MEASURABLE {
            return;
        }
        let rate = taken as f64 / time.as_secs_f64();
        let mean = self.rate.map_or(rate, |(old, _)| 0.5 * old + 0.5 * rate);
        self.rate = Some((mean, now));
    }

    /// Whether pixels should be saved at the cost of exactness.
    pub(crate) fn is_slow(&self, now: Instant) -> bool {
        self.rate
            .is_some_and(|(rate, at)| rate < SLOW && now.saturating_duration_since(at) < FORGET)
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
        pace.took(1_000_000);
        pace.drained(at(1000));
        assert!(pace.is_slow(at(1001)));
        assert!(!pace.is_slow(at(20_000)));
        for i in 0..10 {
            pace.full(at(2000 + i * 20));
            pace.took(2_000_000);
            pace.drained(at(2010 + i * 20));
        }
        assert!(!pace.is_slow(at(2300)));
        pace.full(at(3000));
        pace.drained(at(3001));
        assert!(!pace.is_slow(at(3001)));
    }
}
