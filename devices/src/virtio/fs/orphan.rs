//! Answers for the guest while there is no virtiofsd, so that none of its programs waits for ever.

use std::{
    io::{self, Read, Write},
    num::Wrapping,
    sync::Arc,
};

use event_manager::{EventOps, Events, MutEventSubscriber};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use crate::{
    GuestMemory,
    virtio::{
        device::{ActiveQueue, VirtioInterrupt},
        ring::{Chain, Ring},
        worker::Worker,
    },
};

/// Chains served before the worker looks whether it has to end.
const BURST: u32 = 256;

/// Length of `struct fuse_in_header` (`linux/fuse.h`).
const IN_HEADER: usize = 40;
/// Where it has the number of the request, which the answer repeats.
const UNIQUE: std::ops::Range<usize> = 8..16;
/// Length of `struct fuse_out_header`: length, error, number.
const OUT_HEADER: usize = 16;
/// What programs in the guest get: "Transport endpoint is not connected".
const ERROR: i32 = -libc::ENOTCONN;

/// Serves the queues in place of virtiofsd.
pub(super) struct Orphan {
    rings: Vec<Ring>,
}

impl Orphan {
    /// Takes over `queues` where a virtiofsd that is gone left them. What it left unanswered is
    /// answered.
    pub(super) fn start(
        tag: &str,
        queues: &[ActiveQueue],
        memory: &Arc<GuestMemory>,
        interrupt: &Arc<dyn VirtioInterrupt>,
    ) -> io::Result<Worker<Self>> {
        let mut rings = Vec::new();
        for active in queues {
            let queue = take_back(tag, &active.queue, memory, interrupt, active.index)?;
            let kick = active.kick.try_clone()?;
            let active = ActiveQueue { index: active.index, queue, kick };
            rings.push(Ring::new("virtio-fs", active, memory, interrupt));
        }
        Worker::spawn("fs-orphan", Self { rings })
    }

    /// How far the available rings were served.
    pub(super) fn positions(&self) -> Vec<u16> {
        self.rings.iter().map(Ring::next_avail).collect()
    }
}

/// Answers what is in flight, and returns the queue at the first request that nobody has seen.
fn take_back(
    tag: &str,
    queue: &Queue,
    memory: &Arc<GuestMemory>,
    interrupt: &Arc<dyn VirtioInterrupt>,
    index: u16,
) -> io::Result<Queue> {
    let mut queue = Queue::try_from(queue.state()).map_err(io::Error::other)?;
    let rings = Rings::read(&queue, memory).map_err(io::Error::other)?;
    queue.set_next_used(rings.used_index);
    let in_flight = rings.in_flight_count();
    let mut chain = |position| {
        queue.set_next_avail(position);
        let chain = queue.iter(memory.clone()).ok().and_then(|mut chains| chains.next());
        chain.filter(|chain| waits(chain, memory))
    };
    let chains: Option<Vec<Chain>> =
        rings.in_flight().and_then(|positions| positions.into_iter().map(&mut chain).collect());
    match chains {
        Some(chains) => {
            for chain in chains {
                let written = refuse(&chain, memory);
                queue.add_used(&**memory, chain.head_index(), written).map_err(io::Error::other)?;
            }
            if in_flight > 0 {
                tracing::warn!(tag, in_flight, "requests to virtiofsd have failed");
                interrupt.signal_used(index);
            }
        }
        None => {
            tracing::error!(
                tag,
                in_flight,
                "which requests virtiofsd had not answered cannot be told; programs of the guest \
                 that wait for them hang until it is restarted"
            );
        }
    }
    queue.set_next_avail(rings.avail_index);
    Ok(queue)
}

/// Whether a chain looks like a request that was not answered yet.
fn waits(chain: &Chain, memory: &GuestMemory) -> bool {
    let mut header = [0; IN_HEADER];
    let Ok(mut reader) = chain.clone().reader(memory) else { return false };
    let length = reader.available_bytes();
    if reader.read_exact(&mut header).is_err() {
        return false;
    }
    let [a, b, c, d, ..] = header;
    let mut answer = [0; OUT_HEADER];
    let answered =
        chain.clone().writer(memory).is_ok_and(|writer| writer.available_bytes() >= OUT_HEADER)
            && read_writable(chain, memory, &mut answer)
            && answer[8..] == header[UNIQUE];
    u32::from_le_bytes([a, b, c, d]) as usize == length && !answered
}

/// Reads the first bytes of what the device may write to.
fn read_writable(chain: &Chain, memory: &GuestMemory, bytes: &mut [u8]) -> bool {
    let mut done = 0;
    for part in chain.clone().writable() {
        let rest = &mut bytes[done..];
        let length = rest.len().min(part.len() as usize);
        if memory.read_slice(&mut rest[..length], part.addr()).is_err() {
            return false;
        }
        done += length;
    }
    done == bytes.len()
}

/// Writes the answer to a request; returns its length.
fn refuse(chain: &Chain, memory: &GuestMemory) -> u32 {
    let mut header = [0; IN_HEADER];
    let Ok(mut reader) = chain.clone().reader(memory) else { return 0 };
    let Ok(mut writer) = chain.clone().writer(memory) else { return 0 };
    if reader.read_exact(&mut header).is_err() || writer.available_bytes() < OUT_HEADER {
        // Some requests, such as FORGET, have no answer.
        return 0;
    }
    let mut answer = [0; OUT_HEADER];
    answer[..4].copy_from_slice(&(OUT_HEADER as u32).to_le_bytes());
    answer[4..8].copy_from_slice(&ERROR.to_le_bytes());
    answer[8..].copy_from_slice(&header[UNIQUE]);
    if writer.write_all(&answer).is_ok() { OUT_HEADER as u32 } else { 0 }
}

/// What the two rings hold (VIRTIO 1.3 §2.7.6 and §2.7.8).
struct Rings {
    avail_index: u16,
    used_index: u16,
    /// The newest heads, the newest first, with their positions.
    avail: Vec<(u16, u16)>,
    /// The newest heads, the newest first.
    used: Vec<u32>,
}

impl Rings {
    fn read(queue: &Queue, memory: &GuestMemory) -> Result<Self, vm_memory::GuestMemoryError> {
        let size = queue.size();
        let (avail, used) = (queue.avail_ring(), queue.used_ring());
        let avail_index = u16::from_le(memory.read_obj(GuestAddress(avail + 2))?);
        let used_index = u16::from_le(memory.read_obj(GuestAddress(used + 2))?);
        let mut rings = Self { avail_index, used_index, avail: Vec::new(), used: Vec::new() };
        let mut fresh = true;
        for back in 1..=size {
            let position = (Wrapping(avail_index) - Wrapping(back)).0;
            let at = avail + 4 + 2 * u64::from(position % size);
            let head = u16::from_le(memory.read_obj(GuestAddress(at))?);
            rings.avail.push((position, head));
            let position = (Wrapping(used_index) - Wrapping(back)).0;
            let at = used + 4 + 8 * u64::from(position % size);
            let element: [u32; 2] = memory.read_obj(GuestAddress(at))?;
            rings.used.push(u32::from_le(element[0]));
            // Entries that were never written are zeroes, also the length, which an answer has.
            fresh &= position < used_index || element == [0, 0];
        }
        if fresh && avail_index <= size {
            rings.avail.truncate(avail_index.into());
        }
        Ok(rings)
    }

    /// Requests that were taken and not answered.
    fn in_flight_count(&self) -> u16 {
        self.avail_index.wrapping_sub(self.used_index)
    }

    /// The positions in the available ring of the requests in flight, if they can be told.
    ///
    /// Each head in the available ring has its counterpart in the used ring unless it is in flight.
    /// Both rings only hold the newest entries, so a request that was overtaken by more others than
    /// the ring is long cannot be seen; then mostly the counts contradict each other, and else one
    /// that was answered is found here, which its content tells.
    fn in_flight(&self) -> Option<Vec<u16>> {
        let count = usize::from(self.in_flight_count());
        let answered = self.avail.len().checked_sub(count)?;
        let mut unmatched: Vec<u32> = self.used.iter().take(answered).copied().collect();
        let mut positions = Vec::new();
        // From the oldest: an earlier request of the same head was answered, else it had not been
        // made again.
        for (position, head) in self.avail.iter().rev() {
            match unmatched.iter().rposition(|used| *used == u32::from(*head)) {
                Some(found) => {
                    unmatched.remove(found);
                }
                None => positions.push(*position),
            }
        }
        (positions.len() == count && unmatched.is_empty()).then_some(positions)
    }
}

fn serve(ring: &mut Ring) {
    let memory = ring.memory();
    ring.disable_kicks();
    for _ in 0..BURST {
        let Some(chain) = ring.pop() else { break };
        let written = refuse(&chain, &memory);
        ring.push_used(chain.head_index(), written);
    }
    ring.notify_driver();
    if ring.enable_kicks() {
        ring.come_back();
    }
}

impl MutEventSubscriber for Orphan {
    fn process(&mut self, events: Events, _: &mut EventOps<'_>) {
        if let Some(ring) = self.rings.get_mut(events.data() as usize) {
            ring.take_kick();
            serve(ring);
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        for (number, ring) in self.rings.iter_mut().enumerate() {
            ring.register(ops, number as u32);
            serve(ring);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rings(avail_index: u16, avail: &[u16], used_index: u16, used: &[u32]) -> Rings {
        let positions = (0..).map(|back| avail_index.wrapping_sub(back + 1));
        Rings {
            avail_index,
            used_index,
            avail: positions.zip(avail.iter().rev().copied()).collect(),
            used: used.iter().rev().copied().collect(),
        }
    }

    #[test]
    fn requests_in_flight_are_found() {
        // The same head again and again.
        assert_eq!(rings(5, &[3, 3, 3, 3], 4, &[3, 3, 3, 3]).in_flight(), Some(vec![4]));
        assert_eq!(rings(5, &[3, 3, 3, 3], 5, &[3, 3, 3, 3]).in_flight(), Some(vec![]));
        // Out of order: the second of three is missing.
        assert_eq!(rings(3, &[0, 2, 4], 2, &[0, 4]).in_flight(), Some(vec![1]));
        // Across the end of the index.
        assert_eq!(
            rings(1, &[7, 8, 9, 5], 0xffff, &[6, 1, 7, 8]).in_flight(),
            Some(vec![0xffff, 0])
        );
        // Nothing was answered yet.
        assert_eq!(rings(2, &[0, 1], 0, &[0, 0]).in_flight(), Some(vec![0, 1]));
    }

    #[test]
    fn what_cannot_be_told_is_not_guessed() {
        // The used ring knows of none of them.
        assert_eq!(rings(100, &[1, 2, 3, 4], 99, &[5, 6, 7, 8]).in_flight(), None);
        // More in flight than the ring holds.
        assert_eq!(rings(100, &[1, 2], 10, &[1, 2]).in_flight(), None);
    }
}
