//! The driver's receive buffers, taken off the queue before there is a packet for them, so that it can
//! be read to where it belongs.

use std::collections::VecDeque;

use vm_memory::Permissions;

use super::{HEADER, MAX_FRAME, NUM_BUFFERS, backend::Packet};
use crate::virtio::{
    pieces::{ONE_CALL, Pieces},
    ring::Ring,
};

/// Room for any packet.
const LARGEST: usize = HEADER + MAX_FRAME;
/// A driver with many small buffers shall not make each call long.
const MANY_PIECES: usize = 128;

/// A chain of the driver's.
struct Buffer {
    head: u16,
    length: usize,
}

/// What became of a received packet.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Placed {
    Done,
    /// It can never fit.
    TooLarge,
    /// The driver will notify when there are more.
    NoBuffers,
}

/// Buffers in the order in which the driver gave them.
pub(super) struct Buffers {
    /// VIRTIO_NET_F_MRG_RXBUF: a packet may take several buffers.
    mergeable: bool,
    taken: VecDeque<Buffer>,
    pieces: Pieces,
}

impl Buffers {
    pub(super) fn new(mergeable: bool) -> Self {
        Self { mergeable, taken: VecDeque::new(), pieces: Pieces::new(ONE_CALL) }
    }

    /// Where the next packet goes.
    pub(super) fn pieces(&mut self) -> &mut Pieces {
        &mut self.pieces
    }

    /// Takes as many buffers as the largest packet can use. `false` if there is not one; the driver will
    /// notify then.
    pub(super) fn prepare(&mut self, ring: &mut Ring) -> bool {
        loop {
            while self.pieces.len() < LARGEST && self.pieces.count() < MANY_PIECES {
                if !self.take_one(ring) {
                    break;
                }
            }
            if !self.taken.is_empty() {
                return true;
            }
            if !ring.enable_kicks() {
                return false;
            }
        }
    }

    /// Gives a packet to the driver, of which `spill` holds what is not placed yet.
    pub(super) fn place(&mut self, ring: &mut Ring, packet: Packet, spill: &[u8]) -> Placed {
        while self.pieces.len() < packet.length {
            if self.take_one(ring) {
                continue;
            }
            if self.is_complete() || !self.may_grow(ring) {
                self.give_back(ring, 0);
                return Placed::TooLarge;
            }
            if !ring.enable_kicks() {
                return Placed::NoBuffers;
            }
        }
        let rest = packet.length - packet.placed;
        self.pieces.store(packet.placed, spill.get(..rest).unwrap_or_default());
        self.give_back(ring, packet.length);
        Placed::Done
    }

    /// Whether one packet can use no more than what there is.
    fn is_complete(&self) -> bool {
        !self.mergeable && !self.taken.is_empty()
    }

    /// Whether the driver has room in the queue for another buffer of the sort that it has given so far:
    /// else there is nothing to wait for.
    fn may_grow(&self, ring: &Ring) -> bool {
        let (mut all, mut least) = (0, ring.size());
        for buffer in &self.taken {
            let entries = ring.entries(buffer.head);
            all += usize::from(entries);
            least = least.min(entries);
        }
        all + usize::from(least) <= usize::from(ring.size())
    }

    fn take_one(&mut self, ring: &mut Ring) -> bool {
        if self.is_complete() {
            return false;
        }
        let Some(chain) = ring.pop() else { return false };
        if self.taken.is_empty() {
            self.pieces.clear(&ring.memory());
        }
        let before = self.pieces.len();
        let head = chain.head_index();
        for part in chain.writable() {
            let length = part.len() as usize;
            if length > 0 && self.pieces.push(part.addr(), length, Permissions::Write).is_err() {
                ring.fail("a receive buffer is not in guest memory, or in too many pieces");
                return false;
            }
        }
        let length = self.pieces.len() - before;
        if length < HEADER {
            ring.fail("a receive buffer is too small for the packet header");
            return false;
        }
        self.taken.push_back(Buffer { head, length });
        true
    }

    /// Gives the buffers with the first `length` bytes back, at least one.
    fn give_back(&mut self, ring: &mut Ring, length: usize) {
        let (mut room, mut count) = (0, 0);
        for buffer in &self.taken {
            count += 1;
            room += buffer.length;
            if room >= length {
                break;
            }
        }
        if length > 0 {
            // One for each 12 bytes at least, of some 64 KiB.
            self.pieces.store(NUM_BUFFERS, &(count as u16).to_le_bytes());
        }
        let mut left = length;
        ring.push_used_together(self.taken.drain(..count).map(|buffer| {
            let written = left.min(buffer.length);
            left -= written;
            (buffer.head, written as u32)
        }));
        self.pieces.consume(room);
    }
}
