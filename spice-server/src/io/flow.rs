//! How much may be on its way to a client, and how fast its line is.
//!
//! A `PING` follows the pictures; the client answers it when it has drawn them. From the answers
//! come the shortest round trip and the rate at which pictures are delivered, and from these how much
//! may be under way: enough to keep the line busy, and no more than [`QUEUE`] of waiting beyond. That
//! bounds the age of what is shown, wherever on the line the queue would be.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// Waiting that is allowed on top of the round trip.
const QUEUE: f64 = 0.03;
/// Bytes after which a ping is due in the midst of a picture.
const PING_EVERY: u64 = 64 * 1024;
/// Bytes that may always be under way.
const MIN_WINDOW: f64 = 32.0 * 1024.0;
/// Bytes that may be under way before anything is known.
const FIRST_WINDOW: f64 = 128.0 * 1024.0;
/// How much more than the line has delivered is sent until it delivers no more.
const GROWTH: f64 = 2.5;
/// Rounds without growth that mean that the line is full.
const FULL_ROUNDS: u32 = 3;
/// Most unanswered pings.
const MAX_PINGS: usize = 4096;
/// Below this many bytes per second (50 Mbit/s) lossy pictures are worth their artefacts.
const SLOW: f64 = 6_250_000.0;
/// How long an observation of the line's rate counts.
const REMEMBER: Duration = Duration::from_secs(3);
/// After this long without a shorter round trip it is measured again on an empty line: lines change,
/// and a queue of our own making must not count as length.
const MEASURE_AGAIN: Duration = Duration::from_secs(10);
/// After this long without an exact picture a line is tried anew.
const RETRY: Duration = Duration::from_secs(6);
/// How long before the line is free a film's next frame may follow.
const AHEAD: Duration = Duration::from_millis(8);
/// Seconds of waiting on the line that mean something.
const WAITED: f64 = 0.01;
/// Seconds that everything waits on the line, and bytes, after which it is full, though more might be
/// under way.
const STANDING: (f64, u64) = (0.3, 64 * 1024);
/// What counts as waiting there: so many seconds, or this share of the round trip if that is more.
const STANDS: (f64, f64) = (0.03, 0.25);

/// A client that has not answered its first ping after this long will answer none.
pub(crate) const MUTE: Duration = Duration::from_secs(3);

#[derive(Debug, Clone, Copy)]
struct Ping {
    id: u32,
    /// Bytes sent before it.
    bytes: u64,
    /// Bytes known to be delivered when it was sent, and when the last of them were.
    delivered: u64,
    since: Instant,
    sent: Instant,
    /// There was more to send than could be while it was under way.
    busy: bool,
    /// Nothing else was under way when it was sent.
    alone: bool,
    /// What went with it was coded exactly. A client may take a lossy picture slowly because
    /// decoding it is work, and concluding from that would never end.
    exact: bool,
}

/// Estimates of one connection.
#[derive(Debug)]
pub(crate) struct Flow {
    pings: VecDeque<Ping>,
    next_id: u32,
    /// Bytes handed to the connection.
    queued: u64,
    pinged: u64,
    delivered: u64,
    delivered_at: Instant,
    answered: bool,
    round_trip: Option<f64>,
    measured_at: Instant,
    /// Nothing is sent until everything is delivered, to measure the round trip anew.
    draining: bool,
    /// A ping goes alone over the empty line; its trip is the new round trip, longer or not.
    measuring: bool,
    /// Rates seen lately while there was more to send, in bytes per second.
    rates: VecDeque<(Instant, f64)>,
    /// Kept from before, when none were seen lately.
    rate: Option<f64>,
    /// The rate of exact pictures alone.
    exact_rate: Option<(Instant, f64)>,
    lossy: bool,
    /// The line's rate is still being found out.
    growing: bool,
    /// Since when everything has waited on the line, and what had been delivered then.
    standing: Option<(Instant, u64)>,
    /// When the line will have taken everything, if its rate is right.
    busy_until: Instant,
    /// The first ping of the round after this one, the rate before it, and rounds without growth.
    round: (u32, f64, u32),
}

impl Flow {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            pings: VecDeque::new(),
            next_id: 1,
            queued: 0,
            pinged: 0,
            delivered: 0,
            delivered_at: now,
            answered: false,
            round_trip: None,
            measured_at: now,
            draining: false,
            measuring: true,
            rates: VecDeque::new(),
            rate: None,
            exact_rate: None,
            lossy: false,
            growing: true,
            standing: None,
            busy_until: now,
            round: (0, 0.0, 0),
        }
    }

    /// So many bytes were encoded; `lossy` if some of them are a lossy picture.
    pub(crate) fn queued(&mut self, bytes: usize, lossy: bool, now: Instant) {
        self.queued += bytes as u64;
        self.lossy |= lossy;
        if let Some(rate) = self.rate {
            let time = Duration::from_secs_f64((bytes as f64 / rate).min(10.0));
            self.busy_until = self.busy_until.max(now) + time;
        }
    }

    /// When a film's next frame may follow: when the line will have taken nearly all before it. Its
    /// answers would say so a round trip too late.
    pub(crate) fn next_frame_at(&self) -> Instant {
        self.busy_until.checked_sub(AHEAD).unwrap_or(self.busy_until)
    }

    /// The number of a ping to be sent now, if one is due: always at a picture's end.
    pub(crate) fn ping(&mut self, at_end: bool, now: Instant) -> Option<u32> {
        let waiting = self.queued - self.pinged;
        // One that measures the line's length goes ahead of pictures and meets an empty line.
        let alone = self.measuring && self.pings.is_empty();
        let due = alone || (waiting > 0 && (at_end || waiting >= PING_EVERY));
        if !due || self.pings.len() >= MAX_PINGS {
            return None;
        }
        let id = self.next_id;
        self.next_id = self.next_id.wrapping_add(1);
        self.pinged = self.queued;
        self.pings.push_back(Ping {
            id,
            bytes: self.queued,
            delivered: self.delivered,
            // After a pause the line was idle until now.
            since: if self.pings.is_empty() { now } else { self.delivered_at },
            sent: now,
            busy: false,
            alone: self.pings.is_empty(),
            exact: !std::mem::take(&mut self.lossy),
        });
        Some(id)
    }

    /// There is more to send than the line takes: what is under way now tells the line's rate.
    pub(crate) fn blocked(&mut self) {
        // Those in front are marked already.
        for ping in self.pings.iter_mut().rev() {
            if std::mem::replace(&mut ping.busy, true) {
                break;
            }
        }
    }

    /// The client answered a ping.
    pub(crate) fn pong(&mut self, id: u32, now: Instant) {
        let Some(position) = self.pings.iter().position(|ping| ping.id == id) else { return };
        let Some(ping) = self.pings.drain(..=position).next_back() else { return };
        self.answered = true;
        let trip = now.saturating_duration_since(ping.sent).as_secs_f64();
        // The first one may have waited for the client to begin.
        let measured = std::mem::take(&mut self.measuring) && self.round_trip.is_some();
        if measured || self.round_trip.is_none_or(|shortest| trip <= shortest) {
            self.round_trip = Some(trip.max(1e-5));
            self.measured_at = now;
        } else if now.saturating_duration_since(self.measured_at) > MEASURE_AGAIN {
            self.draining = true;
        }
        if self.draining && self.pings.is_empty() && self.queued == self.pinged {
            // The line is empty: the next trip tells its length.
            self.draining = false;
            self.measuring = true;
        }
        let bytes = (ping.bytes - ping.delivered) as f64;
        let time = now.saturating_duration_since(ping.since).as_secs_f64();
        self.delivered = ping.bytes;
        self.delivered_at = now;
        let standing = self.standing_rate(trip, now);
        let rate = if let Some(rate) = standing {
            self.growing = false;
            rate
        } else if ping.alone {
            // How much later the end of it came than a ping alone would have.
            let spread = trip - self.round_trip.unwrap_or(trip);
            if spread < WAITED {
                return;
            }
            bytes / spread
        } else if ping.busy {
            bytes / time.max(1e-5)
        } else {
            return;
        };
        while self
            .rates
            .front()
            .is_some_and(|(at, _)| now.saturating_duration_since(*at) > REMEMBER)
        {
            self.rates.pop_front();
        }
        // Only rates that may yet be the largest are kept.
        while self.rates.back().is_some_and(|(_, smaller)| *smaller <= rate) {
            self.rates.pop_back();
        }
        self.rates.push_back((now, rate));
        self.rate = self.rates.front().map(|(_, rate)| *rate);
        self.end_round(id);
        // Who had to wait for the line knows its rate; who was not let go by us does not.
        let waited = self.round_trip.is_some_and(|shortest| trip > shortest + WAITED);
        if ping.exact && (waited || self.exact_rate.is_some_and(|(_, old)| rate > old)) {
            let old =
                self.exact_rate.filter(|(at, _)| now.saturating_duration_since(*at) < REMEMBER);
            let best =
                old.map_or(rate, |(_, old)| if rate > old { rate } else { old * 0.9 + rate * 0.1 });
            self.exact_rate = Some((now, best));
        } else if !ping.exact
            && let Some((at, old)) = &mut self.exact_rate
            && rate > *old
        {
            (*at, *old) = (now, rate);
        }
    }

    /// The line's rate, if it is still being found out and a queue stands on it: who sends a little
    /// more than it carries, and less than might be under way, would keep that queue for ever.
    fn standing_rate(&mut self, trip: f64, now: Instant) -> Option<f64> {
        let shortest = self.round_trip.unwrap_or(trip);
        if !self.growing || trip <= shortest + STANDS.0.max(shortest * STANDS.1) {
            self.standing = None;
            return None;
        }
        let (since, before) = *self.standing.get_or_insert((now, self.delivered));
        let time = now.saturating_duration_since(since).as_secs_f64();
        let bytes = self.delivered - before;
        let is_long = time >= STANDING.0.max(shortest * 3.0) && bytes >= STANDING.1;
        is_long.then(|| bytes as f64 / time)
    }

    /// Looks once per round trip whether more sent was more delivered.
    fn end_round(&mut self, id: u32) {
        let (end, before, rounds) = self.round;
        if !self.growing || id < end {
            return;
        }
        let rate = self.rate.unwrap_or(0.0);
        let rounds = if rate > before * 1.25 { 0 } else { rounds + 1 };
        self.growing = rounds < FULL_ROUNDS;
        self.round = (self.next_id, rate.max(before), rounds);
    }

    /// Bytes under way.
    pub(crate) fn in_flight(&self) -> u64 {
        self.queued - self.delivered
    }

    /// Whether more may be sent. A client that does not answer pings at all is not limited.
    pub(crate) fn has_room(&self, now: Instant) -> bool {
        let mute = || {
            let first = self.pings.front();
            first.is_some_and(|ping| now.saturating_duration_since(ping.sent) >= MUTE)
        };
        if self.draining || (self.measuring && self.answered) {
            return false;
        }
        (self.in_flight() as f64) < self.window() || (!self.answered && mute())
    }

    fn window(&self) -> f64 {
        match (self.rate, self.round_trip) {
            (Some(rate), Some(trip)) if self.growing => {
                (rate * (trip * GROWTH + QUEUE)).max(FIRST_WINDOW)
            }
            (Some(rate), Some(trip)) => (rate * (trip * 1.25 + QUEUE)).max(MIN_WINDOW),
            _ => FIRST_WINDOW,
        }
    }

    /// Bytes per second the line carries, if that is known.
    pub(crate) fn rate(&self) -> Option<f64> {
        self.rate.filter(|_| !self.growing)
    }

    /// Shortest recent time from sending a picture to hearing that it was drawn, in seconds.
    pub(crate) fn round_trip(&self) -> Option<f64> {
        self.round_trip
    }

    /// Seconds until so many more bytes would be delivered, beyond the way itself.
    pub(crate) fn transfer(&self, bytes: usize, now: Instant) -> f64 {
        let before = self.busy_until.saturating_duration_since(now).as_secs_f64();
        self.rate.map_or(0.0, |rate| before + bytes as f64 / rate)
    }

    /// Whether pixels should be saved at the cost of exactness.
    pub(crate) fn is_slow(&self, now: Instant) -> bool {
        let recent = |at| now.saturating_duration_since(at) < RETRY;
        self.exact_rate.is_some_and(|(at, rate)| rate < SLOW && recent(at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A line of a rate and a round trip that is kept full for a while.
    fn fill(flow: &mut Flow, rate: f64, trip: f64, seconds: f64, lossy: bool) -> f64 {
        let start = Instant::now();
        let at = |seconds: f64| start + Duration::from_secs_f64(seconds);
        let (mut now, mut free, mut worst) = (0.0f64, 0.0f64, 0.0f64);
        let mut answers: VecDeque<(f64, u32)> = VecDeque::new();
        while now < seconds {
            while flow.has_room(at(now)) {
                flow.queued(16_384, lossy, at(now));
                free = free.max(now) + 16_384.0 / rate;
                if now > seconds / 2.0 {
                    worst = worst.max(free - now);
                }
                if let Some(id) = flow.ping(true, at(now)) {
                    answers.push_back((free + trip, id));
                }
                if answers.len() > 4000 {
                    break;
                }
            }
            flow.blocked();
            let Some((when, id)) = answers.pop_front() else { break };
            now = now.max(when);
            flow.pong(id, at(now));
        }
        worst
    }

    #[test]
    fn the_queue_stays_short_and_the_line_full() {
        for (rate, trip) in [(1.25e6, 0.0005), (1.25e6, 0.1), (12.5e6, 0.05), (125e6, 0.001)] {
            let mut flow = Flow::new(Instant::now());
            let wait = fill(&mut flow, rate, trip, 18.0, false);
            let measured = flow.rate().unwrap();
            assert!((0.8..1.3).contains(&(measured / rate)), "{rate} {trip}: {measured}");
            assert!(wait < 0.08 + trip * 1.3, "{rate} {trip}: waits {wait}");
            assert_eq!(flow.is_slow(flow.delivered_at), rate < SLOW, "{rate}");
        }
    }

    #[test]
    fn a_source_about_as_fast_as_the_line_makes_no_standing_queue() {
        // 30 pictures per second of these bytes on a line that takes 41,667 of them.
        for bytes in [38_000, 42_000, 43_000] {
            let (line, trip, start) = (1.25e6, 0.1, Instant::now());
            let mut flow = Flow::new(start);
            let (mut free, mut worst) = (0.0f64, 0.0f64);
            let mut answers: VecDeque<(f64, u32)> = VecDeque::new();
            for tick in 0..300_u32 {
                let now = f64::from(tick) / 30.0;
                let at = |seconds: f64| start + Duration::from_secs_f64(seconds);
                while let Some((when, id)) = answers.pop_front_if(|(when, _)| *when <= now) {
                    flow.pong(id, at(when));
                }
                // Something else now and then takes from the line.
                if tick % 50 == 10 {
                    free = free.max(now) + 0.05;
                }
                if !flow.has_room(at(now)) {
                    flow.blocked();
                    continue;
                }
                flow.queued(bytes, false, at(now));
                free = free.max(now) + bytes as f64 / line;
                answers.extend(flow.ping(true, at(now)).map(|id| (free + trip, id)));
                if tick > 200 {
                    worst = worst.max(free - now);
                }
            }
            assert!(worst < 0.15, "{bytes}: waits {worst}");
        }
    }

    #[test]
    fn lossy_pictures_make_no_line_slow() {
        let mut flow = Flow::new(Instant::now());
        fill(&mut flow, 1e6, 0.001, 2.0, true);
        assert!(!flow.is_slow(flow.delivered_at));
        assert!(flow.rate().is_some());
    }

    #[test]
    fn whoever_answers_nothing_is_not_limited() {
        let mut flow = Flow::new(Instant::now());
        let start = Instant::now();
        while flow.has_room(start) {
            flow.queued(100_000, false, start);
            flow.ping(true, start);
        }
        flow.pong(u32::MAX, start);
        assert!(!flow.has_room(start), "an answer to nothing counts for nothing");
        for _ in 0..10_000 {
            flow.queued(100_000, false, start);
            flow.ping(true, start);
        }
        assert!(flow.has_room(start + MUTE) && flow.pings.len() <= MAX_PINGS);
    }
}
