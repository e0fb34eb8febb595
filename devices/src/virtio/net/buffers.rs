//! The driver's receive buffers, taken off the queue before there is a packet for them, so that it can
//! be read to where it belongs.

use std::collections::VecDeque;

use vm_memory::Permissions;

use super::{HEADER, MAX_FRAME, NUM_BUFFERS, backend::Packet, sys::Pieces};
use crate::virtio::ring::Ring;

/// Room for any packet.
const LARGEST: usize = HEADER + MAX_FRAME;
/// A driver with many small buffers shall not make each call long.
const MANY_PIECES: usize = 128;

/// A chain of the driver's.
struct Buffer {
    head: u16,
    length: usize,
    pieces: usize,
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
#[derive(Default)]
pub(super) struct Buffers {
    /// VIRTIO_NET_F_MRG_RXBUF: a packet may take several buffers.
    mergeable: bool,
    taken: VecDeque<Buffer>,
    pieces: Pieces,
}

impl Buffers {
    pub(super) fn new(mergeable: bool) -> Self {
        Self { mergeable, ..Self::default() }
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
            // With all of the queue in hand there is nothing to wait for.
            if self.is_complete() || self.taken.len() >= usize::from(ring.size()) {
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

    fn take_one(&mut self, ring: &mut Ring) -> bool {
        if self.is_complete() {
            return false;
        }
        let Some(chain) = ring.pop() else { return false };
        if self.taken.is_empty() {
            self.pieces.clear(&ring.memory());
        }
        let before = (self.pieces.len(), self.pieces.count());
        let head = chain.head_index();
        for part in chain.writable() {
            let length = part.len() as usize;
            if length > 0 && !self.pieces.push(part.addr(), length, Permissions::Write) {
                ring.fail("a receive buffer is not in guest memory, or in too many pieces");
                return false;
            }
        }
        let length = self.pieces.len() - before.0;
        if length < HEADER {
            ring.fail("a receive buffer is too small for the packet header");
            return false;
        }
        self.taken.push_back(Buffer { head, length, pieces: self.pieces.count() - before.1 });
        true
    }

    /// Gives the buffers with the first `length` bytes back, at least one.
    fn give_back(&mut self, ring: &mut Ring, length: usize) {
        let (mut room, mut pieces, mut count) = (0, 0, 0);
        for buffer in &self.taken {
            count += 1;
            room += buffer.length;
            pieces += buffer.pieces;
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
        self.pieces.drop_front(pieces);
    }
}
