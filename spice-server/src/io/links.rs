//! Connections that have not authenticated yet.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use crate::proto::{
    link::{LinkRequest, ServerLink},
    ticket::TicketKey,
};

/// A connection's link stage.
pub(crate) struct PendingLink {
    pub(crate) link: ServerLink,
    /// What the client wants, once it has said so.
    pub(crate) request: Option<LinkRequest>,
    /// The key its ticket is encrypted with.
    pub(crate) key: Option<Arc<TicketKey>>,
    /// The client came before the first key was ready.
    pub(crate) waits_for_key: bool,
    /// When a wrong ticket will be answered.
    pub(crate) answer_failure_at: Option<Instant>,
    deadline: Instant,
}

impl PendingLink {
    pub(crate) fn new(deadline: Instant) -> Self {
        Self {
            link: ServerLink::new(),
            request: None,
            key: None,
            waits_for_key: false,
            answer_failure_at: None,
            deadline,
        }
    }

    /// When it is dropped.
    pub(crate) fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Whether nothing was received yet.
    pub(crate) fn is_fresh(&self) -> bool {
        self.link.is_fresh()
    }

    /// When something is due.
    pub(crate) fn next_timer(&self) -> Instant {
        self.answer_failure_at.map_or(self.deadline, |at| at.min(self.deadline))
    }
}

/// How long wrong passwords are answered late: longer the more of them come, for everybody, but
/// never so long that the connection times out. Right passwords are not delayed.
#[derive(Debug, Default)]
pub(crate) struct FailureDelay {
    failures: u32,
}

impl FailureDelay {
    /// A wrong password: how long to wait before saying so.
    pub(crate) fn failure(&mut self) -> Duration {
        self.failures = (self.failures + 1).min(4);
        Duration::from_millis(250 << self.failures)
    }

    /// A right password.
    pub(crate) fn success(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_grow_to_a_limit() {
        let mut delay = FailureDelay::default();
        let first = delay.failure();
        assert!(delay.failure() > first);
        for _ in 0..100 {
            assert!(delay.failure() <= Duration::from_secs(5));
        }
        delay.success();
        assert_eq!(delay.failure(), first);
    }
}
