//! The queues of the balloon.

use std::{io::Read, sync::Arc};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use super::{
    device::{BalloonStats, Shared},
    pages::PageDiscarder,
};
use crate::{GuestMemory, virtio::ring::Ring};

/// Event data next to the indices of `rings`.
const REFRESH: u32 = u32::MAX;
/// Page numbers read at a time; Linux sends 256.
const BATCH: usize = 1024;
/// Statistics in one buffer at most; the specification has 16.
const MAX_STATS: usize = 64;
/// Bytes of a statistic: tag and value.
const STAT_SIZE: usize = 10;

/// What a queue is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// Pages that go into the balloon.
    Inflate,
    /// Pages that leave it.
    Deflate,
    /// Statistics.
    Stats,
    /// Free page hinting, which is never started.
    Hint,
    /// Free pages.
    Reporting,
}

/// The subscriber of the worker thread.
pub(super) struct BalloonWorker {
    shared: Arc<Shared>,
    rings: Vec<(Role, Ring)>,
    discarder: PageDiscarder,
    /// The buffer of the last statistics; the driver sends new ones when it gets it back.
    held_stats: Option<u16>,
}

impl BalloonWorker {
    pub(super) fn new(
        shared: Arc<Shared>,
        memory: Arc<GuestMemory>,
        rings: Vec<(Role, Ring)>,
    ) -> Self {
        Self { shared, rings, discarder: PageDiscarder::new(memory), held_stats: None }
    }

    fn serve(&mut self, number: usize) {
        let Some((role, ring)) = self.rings.get_mut(number) else { return };
        let memory = ring.memory();
        let mut used = false;
        loop {
            ring.disable_kicks();
            while let Some(chain) = ring.pop() {
                let head = chain.head_index();
                let discarded = match role {
                    Role::Inflate => {
                        let Some(reader) = ring.reader(&chain, &memory) else { break };
                        inflate(reader, &mut self.discarder)
                    }
                    // Pages come back as zeroes when they are touched.
                    Role::Deflate | Role::Hint => 0,
                    Role::Reporting if self.shared.is_poisoned() => 0,
                    Role::Reporting => chain
                        .filter(|part| part.is_write_only())
                        .map(|part| self.discarder.discard(part.addr().0, part.len().into()))
                        .sum(),
                    Role::Stats => {
                        let Some(reader) = ring.reader(&chain, &memory) else { break };
                        self.shared.set_stats(read_stats(reader));
                        if let Some(earlier) = self.held_stats.replace(head) {
                            ring.push_used(earlier, 0);
                            used = true;
                        }
                        continue;
                    }
                };
                if discarded > 0 {
                    self.shared.add_discarded(discarded);
                }
                ring.push_used(head, 0);
                used = true;
            }
            if !ring.enable_kicks() {
                break;
            }
        }
        if used {
            ring.notify_driver();
        }
    }

    fn refresh_stats(&mut self) {
        let stats = self.rings.iter_mut().find(|(role, _)| *role == Role::Stats);
        if let (Some((_, ring)), Some(head)) = (stats, self.held_stats.take()) {
            ring.push_used(head, 0);
            ring.notify_driver();
        }
    }
}

/// Discards the pages whose numbers `numbers` holds.
fn inflate(mut numbers: impl Read, discarder: &mut PageDiscarder) -> u64 {
    let mut discarded = 0;
    let mut bytes = [0; 4 * BATCH];
    let mut filled = 0;
    loop {
        let count = numbers.read(&mut bytes[filled..]).unwrap_or_default();
        filled += count;
        if count > 0 && filled < bytes.len() {
            continue;
        }
        let mut pages: Vec<u32> = bytes[..filled]
            .as_chunks::<4>()
            .0
            .iter()
            .map(|page| u32::from_le_bytes(*page))
            .collect();
        discarded += discarder.discard_pages(&mut pages);
        filled = 0;
        if count == 0 {
            return discarded;
        }
    }
}

fn read_stats(mut reader: impl Read) -> BalloonStats {
    let mut stats = BalloonStats::default();
    for _ in 0..MAX_STATS {
        let mut entry = [0; STAT_SIZE];
        if reader.read_exact(&mut entry).is_err() {
            break;
        }
        let [a, b, value @ ..] = entry;
        stats.set(u16::from_le_bytes([a, b]), u64::from_le_bytes(value));
    }
    stats
}

impl MutEventSubscriber for BalloonWorker {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        for (number, (_, ring)) in self.rings.iter().enumerate() {
            ring.register(ops, number as u32);
        }
        let refresh = Events::with_data(&self.shared.refresh, REFRESH, EventSet::IN);
        if let Err(error) = ops.add(refresh) {
            tracing::error!(%error, "the balloon cannot be woken");
        }
        for number in 0..self.rings.len() {
            self.serve(number);
        }
    }

    fn process(&mut self, events: Events, _: &mut EventOps<'_>) {
        if events.data() == REFRESH {
            let _ = self.shared.refresh.read();
            self.refresh_stats();
            return;
        }
        let number = events.data() as usize;
        if let Some((_, ring)) = self.rings.get(number) {
            ring.take_kick();
        }
        self.serve(number);
    }
}
