//! Descriptor chains: commands out of a queue, answers back into it.

use gpu_protocol::virtio::MAX_COMMAND;
use vhost_user_backend::{VringRwLock, VringT};
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryLoadGuard};

use crate::GuestMemory;

pub(super) type Memory = GuestMemoryAtomic<GuestMemory>;
pub(super) type Ring = VringRwLock<Memory>;

/// A chain that was taken out of a queue and has no answer yet.
#[derive(Debug)]
pub(super) struct Request {
    head: u16,
    pub(super) command: Vec<u8>,
    answer: Vec<(GuestAddress, u32)>,
}

impl Request {
    fn read(chain: DescriptorChain<GuestMemoryLoadGuard<GuestMemory>>) -> Self {
        let head = chain.head_index();
        let mut request = Self { head, command: Vec::new(), answer: Vec::new() };
        let memory = chain.memory().clone();
        for descriptor in chain {
            if descriptor.is_write_only() {
                request.answer.push((descriptor.addr(), descriptor.len()));
                continue;
            }
            let old = request.command.len();
            let length = (descriptor.len() as usize).min(MAX_COMMAND - old);
            request.command.resize(old + length, 0);
            if memory.read_slice(&mut request.command[old..], descriptor.addr()).is_err() {
                // An address outside memory: what was read so far will not decode.
                request.command.truncate(old);
                break;
            }
        }
        request
    }

    /// A chain without buffers.
    #[cfg(test)]
    pub(super) fn empty() -> Self {
        Self { head: 0, command: Vec::new(), answer: Vec::new() }
    }

    /// Writes the answer as far as there is room for it; returns the number of bytes.
    fn write(&self, memory: &GuestMemory, mut bytes: &[u8]) -> u32 {
        let mut written = 0;
        for (address, length) in &self.answer {
            let count = bytes.len().min(*length as usize);
            let (now, later) = bytes.split_at(count);
            if memory.write_slice(now, *address).is_err() {
                break;
            }
            written += count as u32;
            bytes = later;
        }
        written
    }

    /// Answers: writes what there is room for, gives the chain back, tells the driver.
    pub(super) fn answer(&self, ring: &Ring, memory: &GuestMemory, bytes: &[u8]) {
        let written = self.write(memory, bytes);
        give_back(ring, self.head, written);
    }
}

/// Puts a chain into the used ring and tells the driver if it wants to know.
fn give_back(ring: &Ring, head: u16, written: u32) {
    if let Err(error) = ring.add_used(head, written) {
        tracing::error!(%error, "the used ring cannot be written");
        return;
    }
    // If the guest's wish cannot be read, an interrupt too many does no harm.
    if ring.needs_notification().unwrap_or(true)
        && let Err(error) = ring.signal_used_queue()
    {
        tracing::error!(%error, "the driver cannot be notified");
    }
}

/// What a look into the available ring gave.
pub(super) enum Next {
    Request(Request),
    Empty,
    /// The ring is stopped or broken: nothing more until the next notification.
    Stopped,
}

/// The next chain, while the ring runs.
pub(super) fn next_request(ring: &Ring, memory: &Memory) -> Next {
    let mut state = ring.get_mut();
    if !state.is_enabled() || !state.get_queue().ready() {
        return Next::Stopped;
    }
    let chain = match state.get_queue_mut().iter(memory.memory()) {
        Ok(mut chains) => chains.next(),
        Err(error) => {
            tracing::error!(%error, "the available ring cannot be read");
            return Next::Stopped;
        }
    };
    drop(state);
    chain.map_or(Next::Empty, |chain| Next::Request(Request::read(chain)))
}
