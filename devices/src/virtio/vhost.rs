//! What devices served by vhost have in common, in the kernel (`/dev/vhost-*`) or in another process
//! (vhost-user): handing over guest memory and queues.

use std::{io, sync::Arc};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestMemoryAtomic, GuestMemoryBackend};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{
    device::{ActiveQueue, VirtioInterrupt},
    worker::Worker,
};
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

    /// Whether the back end has hung up: it ended, or is somebody else's and about to end.
    pub(crate) fn is_end(&self) -> bool {
        use vhost::{Error::VhostUserProtocol, vhost_user::Error};
        let Self::Request { source: VhostUserProtocol(error), .. } = self else { return false };
        matches!(error, Error::SocketBroken(_) | Error::Disconnected | Error::PartialMessage)
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

/// Waits for the kernel to find a ring broken (`VHOST_SET_VRING_ERR`), and says so to the driver as a
/// worker of ours would.
pub(crate) struct Faults {
    device: &'static str,
    event: EventFd,
    interrupt: Arc<dyn VirtioInterrupt>,
}

impl Faults {
    /// For the rings of one device.
    pub(crate) fn new(
        device: &'static str,
        interrupt: &Arc<dyn VirtioInterrupt>,
    ) -> io::Result<Self> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Self { device, event, interrupt: interrupt.clone() })
    }

    /// Has the back end report queue `index`.
    pub(crate) fn watch(
        &self,
        back_end: &impl VhostBackend,
        index: usize,
    ) -> Result<(), VhostError> {
        back_end.set_vring_err(index, &self.event).named("SET_VRING_ERR")
    }

    /// Waits on a thread of its own until the worker is dropped.
    pub(crate) fn start(self) -> Result<Worker<Self>, VhostError> {
        Worker::spawn("vhost-err", self).named("a thread for broken rings")
    }
}

impl MutEventSubscriber for Faults {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = ops.add(Events::new(&self.event, EventSet::IN)) {
            tracing::error!(device = self.device, %error, "broken rings cannot be noticed");
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        tracing::warn!(
            device = self.device,
            "the driver violated a queue's rules, says the kernel; the device needs a reset"
        );
        self.interrupt.set_needs_reset();
        // Once is enough, however often it tries.
        let _ = ops.remove(events);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::TestInterrupt;

    #[test]
    fn a_broken_ring_is_reported_once_and_the_watch_ends_with_its_device() {
        let seen = Arc::new(TestInterrupt::new(1));
        let interrupt: Arc<dyn VirtioInterrupt> = seen.clone();
        let faults = Faults::new("test", &interrupt).unwrap();
        let kernel = faults.event.try_clone().unwrap();
        let worker = faults.start().unwrap();
        assert!(!seen.needs_reset());
        kernel.write(1).unwrap();
        seen.wait_config_change();
        assert!(seen.needs_reset());
        kernel.write(1).unwrap();
        drop(worker);
    }
}
