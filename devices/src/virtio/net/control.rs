//! The control queue (VIRTIO 1.3 §5.1.6.5): how many of its pairs of queues the driver uses.

use std::{
    io::{Read, Write},
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::sys;
use crate::virtio::ring::Ring;

/// Chains served before the worker looks whether it has to end.
const BURST: u32 = 256;

/// `VIRTIO_NET_CTRL_MQ` and its command `VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET`.
const MQ: [u8; 2] = [4, 0];
const OK: u8 = 0;
const ERR: u8 = 1;

/// Pairs that may be switched at once, and how many more each second: in the host's kernel a switch
/// keeps everybody waiting who changes anything about the network. Drivers do it when they start, and
/// when processors come and go.
const SWITCHES: f64 = 256.0;
const SWITCHES_PER_SECOND: f64 = 16.0;

/// What a driver may still switch. It is the device's, so that a driver which resets it has no more.
#[derive(Debug)]
pub(super) struct Allowance {
    most: f64,
    left: f64,
    since: Instant,
    /// It was said that there was nothing left.
    complained: bool,
}

impl Allowance {
    /// For a card with so many pairs of queues.
    pub(super) fn new(pairs: usize, now: Instant) -> Self {
        // Enough for a few starts, each of which may switch every pair on and off.
        let most = SWITCHES.max(8.0 * pairs as f64);
        Self { most, left: most, since: now, complained: false }
    }

    /// Takes `count`, if there are that many.
    pub(super) fn take(&mut self, count: usize, now: Instant) -> bool {
        let earned = now.saturating_duration_since(self.since).as_secs_f64() * SWITCHES_PER_SECOND;
        self.left = (self.left + earned).min(self.most);
        self.since = now;
        let count = count as f64;
        if count > self.left {
            return false;
        }
        self.left -= count;
        true
    }

    /// Whether it is worth a line in the log that there was nothing left: the first time.
    pub(super) fn complains(&mut self) -> bool {
        !std::mem::replace(&mut self.complained, true)
    }
}

/// Whether a pair is in use: the interface only puts packets into queues that somebody empties.
#[derive(Debug)]
pub(super) struct Switch {
    on: AtomicBool,
    /// Signalled with each change, where a thread of ours serves the pair.
    pub(super) changed: EventFd,
    /// The descriptor that the pair's packets come from.
    tap: OwnedFd,
}

impl Switch {
    /// For a queue of an interface that is attached.
    pub(super) fn new(tap: OwnedFd) -> std::io::Result<Self> {
        let changed = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Self { on: AtomicBool::new(true), changed, tap })
    }

    /// Whether the pair is in use.
    pub(super) fn is_on(&self) -> bool {
        self.on.load(Ordering::Acquire)
    }

    fn set(&self, on: bool) -> std::io::Result<()> {
        if self.is_on() == on {
            return Ok(());
        }
        // The descriptor of a queue that is not in use reports an error, which must not be mistaken
        // for the end of the interface.
        if !on {
            self.on.store(false, Ordering::Release);
        }
        sys::attach_queue(&self.tap, on)?;
        self.on.store(on, Ordering::Release);
        self.changed.write(1)
    }
}

/// How many pairs change when the first `count` are used.
pub(super) fn changes(switches: &[Arc<Switch>], count: usize) -> usize {
    let changes = switches.iter().enumerate();
    changes.filter(|(index, switch)| switch.is_on() != (*index < count)).count()
}

/// Uses the first `count` pairs.
pub(super) fn use_pairs(switches: &[Arc<Switch>], count: usize) -> std::io::Result<()> {
    for (index, switch) in switches.iter().enumerate() {
        switch.set(index < count)?;
    }
    Ok(())
}

/// The subscriber of the worker thread.
pub(super) struct Control {
    ring: Ring,
    switches: Vec<Arc<Switch>>,
    allowance: Arc<Mutex<Allowance>>,
}

impl Control {
    pub(super) fn new(
        ring: Ring,
        switches: Vec<Arc<Switch>>,
        allowance: Arc<Mutex<Allowance>>,
    ) -> Self {
        Self { ring, switches, allowance }
    }

    fn serve(&mut self) {
        let memory = self.ring.memory();
        self.ring.disable_kicks();
        for _ in 0..BURST {
            let Some(chain) = self.ring.pop() else { break };
            let Some(mut reader) = self.ring.reader(&chain, &memory) else { return };
            let mut command = [0; 4];
            let whole = reader.read_exact(&mut command).is_ok();
            let answer = if whole { self.obey(command) } else { ERR };
            let Some(mut writer) = self.ring.writer(&chain, &memory) else { return };
            let written = writer.write(&[answer]).unwrap_or_default();
            self.ring.push_used(chain.head_index(), written as u32);
        }
        self.ring.notify_driver();
        if self.ring.enable_kicks() {
            self.ring.come_back();
        }
    }

    fn obey(&mut self, [class, command, low, high]: [u8; 4]) -> u8 {
        let pairs = usize::from(u16::from_le_bytes([low, high]));
        if [class, command] != MQ || !(1..=self.switches.len()).contains(&pairs) {
            return ERR;
        }
        {
            let mut allowance = self.allowance.lock().unwrap_or_else(PoisonError::into_inner);
            if !allowance.take(changes(&self.switches, pairs), Instant::now()) {
                if allowance.complains() {
                    tracing::warn!(
                        pairs,
                        "the driver switches its queues too often; it is refused"
                    );
                }
                return ERR;
            }
        }
        match use_pairs(&self.switches, pairs) {
            Ok(()) => OK,
            Err(error) => {
                tracing::warn!(%error, pairs, "the interface's queues cannot be switched");
                ERR
            }
        }
    }
}

impl MutEventSubscriber for Control {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        self.ring.register(ops, 0);
        self.serve();
    }

    fn process(&mut self, _: Events, _: &mut EventOps<'_>) {
        self.ring.take_kick();
        self.serve();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn switching_is_limited() {
        let begin = Instant::now();
        let mut allowance = Allowance::new(2, begin);
        assert!(allowance.take(255, begin));
        assert!(!allowance.take(2, begin));
        assert!(allowance.take(1, begin));
        assert!(!allowance.take(1, begin));
        assert!(allowance.take(0, begin));
        let later = begin + Duration::from_secs(1);
        assert!(allowance.take(16, later) && !allowance.take(1, later));
        let much_later = later + Duration::from_secs(3600);
        assert!(allowance.take(256, much_later) && !allowance.take(1, much_later));
    }
}
