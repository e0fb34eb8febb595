//! What devices served by vhost have in common, in the kernel (`/dev/vhost-*`) or in another process
//! (vhost-user): handing over guest memory and queues.

use std::io;

use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestMemoryAtomic, GuestMemoryBackend};

use super::device::{ActiveQueue, VirtioInterrupt};
use crate::GuestMemory;

/// Guest memory as a back end in the kernel holds it: none until the device is activated.
pub(crate) type LateMemory = GuestMemoryAtomic<GuestMemory>;

/// A request to the back end failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VhostError {
    /// It refused, or is gone.
    #[error("{what}: {source}")]
    Request { what: &'static str, source: vhost::Error },
    /// Guest memory is in no file, or a queue is not in guest memory.
    #[error("guest memory is not shared, or a ring lies outside it")]
    Memory,
    /// The system has no more of something.
    #[error("{what}: {source}")]
    Io { what: &'static str, source: io::Error },
    /// It cannot negotiate.
    #[error("the back end does not speak vhost-user's protocol features")]
    TooOld,
}

impl VhostError {
    /// Whether the back end is there and said no.
    pub(crate) fn is_refusal(&self) -> bool {
        use vhost::{Error::VhostUserProtocol, vhost_user::Error::BackendInternalError};
        matches!(self, Self::Request { source: VhostUserProtocol(BackendInternalError), .. })
    }
}

/// Says which request failed.
pub(crate) trait Named<T> {
    /// Names the request.
    fn named(self, what: &'static str) -> Result<T, VhostError>;
}

impl<T> Named<T> for Result<T, vhost::Error> {
    fn named(self, what: &'static str) -> Result<T, VhostError> {
        self.map_err(|source| VhostError::Request { what, source })
    }
}

impl<T> Named<T> for io::Result<T> {
    fn named(self, what: &'static str) -> Result<T, VhostError> {
        self.map_err(|source| VhostError::Io { what, source })
    }
}

/// How a back end wants to be told where a ring is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Addresses {
    /// As the guest sees it; crate `vhost` translates for back ends in the kernel.
    Guest,
    /// As this process sees it.
    Process,
}

/// Tells the back end which parts of this process are guest memory.
pub(crate) fn set_memory(
    back_end: &impl VhostBackend,
    memory: &GuestMemory,
) -> Result<(), VhostError> {
    let mut regions = Vec::new();
    for region in memory.iter() {
        let info = VhostUserMemoryRegionInfo::from_guest_region(region);
        regions.push(info.map_err(|_| VhostError::Memory)?);
    }
    back_end.set_mem_table(&regions).named("SET_MEM_TABLE").map(|_| ())
}

/// Hands over a queue as number `index` of the back end; it goes on with the available entry `base`.
pub(crate) fn set_queue(
    back_end: &impl VhostBackend,
    addresses: Addresses,
    memory: &GuestMemory,
    (index, base): (usize, u16),
    active: &ActiveQueue,
    interrupt: &dyn VirtioInterrupt,
) -> Result<(), VhostError> {
    let queue = &active.queue;
    let place = |address: u64| match addresses {
        Addresses::Guest => Ok(address),
        Addresses::Process => memory
            .get_host_address(GuestAddress(address))
            .map(|pointer| pointer as u64)
            .map_err(|_| VhostError::Memory),
    };
    let config = VringConfigData {
        queue_max_size: queue.max_size(),
        queue_size: queue.size(),
        flags: 0,
        desc_table_addr: place(queue.desc_table())?,
        used_ring_addr: place(queue.used_ring())?,
        avail_ring_addr: place(queue.avail_ring())?,
        log_addr: None,
    };
    let call = interrupt.queue_eventfd(active.index).named("interrupt of a queue")?;
    back_end.set_vring_num(index, queue.size()).named("SET_VRING_NUM")?;
    back_end.set_vring_base(index, base).named("SET_VRING_BASE")?;
    back_end.set_vring_addr(index, &config).named("SET_VRING_ADDR")?;
    back_end.set_vring_call(index, &call).named("SET_VRING_CALL")?;
    back_end.set_vring_kick(index, &active.kick).named("SET_VRING_KICK")
}
