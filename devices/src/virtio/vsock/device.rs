//! Configuration space and life cycle.

use std::{io, sync::Arc};

use vhost::{VhostBackend, vhost_kern::vsock::Vsock as KernelVsock, vsock::VhostVsock};
use virtio_queue::QueueT;

use super::config::host;
use crate::{
    GuestMemory,
    virtio::{
        ActivateError, Activation, DeviceType, RING_FEATURES, VirtioDevice, VirtioInterrupt,
        device::ActiveQueue,
        registry::BuildError,
        vhost::{Addresses, Faults, LateMemory, Named, VhostError, set_memory, set_queue},
        worker::Worker,
    },
};

/// `VIRTIO_VSOCK_F_SEQPACKET`, §5.10.3.
const SEQPACKET: u64 = 1 << 1;

/// Receive, transmit, events. The kernel serves the first two; nothing ever happens on the third,
/// which is for machines that move to another host.
const QUEUE_SIZES: [u16; 3] = [256, 256, 8];
const SERVED: u16 = 2;

/// The device.
pub(super) struct Vsock {
    cid: u32,
    features: u64,
    kernel: Option<Kernel>,
    /// While the kernel serves the queues.
    running: Option<Worker<Faults>>,
}

struct Kernel {
    vhost: KernelVsock<LateMemory>,
    memory: LateMemory,
}

impl Vsock {
    /// Takes `cid` on this host.
    pub(super) fn open(cid: u32) -> Result<Self, BuildError> {
        let memory = LateMemory::new(GuestMemory::default());
        let failed = |what: &str, error: vhost::Error| {
            let source = match error {
                vhost::Error::VhostOpen(source) | vhost::Error::IoctlError(source) => source,
                other => io::Error::other(other.to_string()),
            };
            let hint = match source.kind() {
                io::ErrorKind::NotFound => " (is the module vhost_vsock loaded?)",
                io::ErrorKind::PermissionDenied => {
                    " (it belongs to the group kvm on most systems: is this user in it?)"
                }
                io::ErrorKind::AddrInUse => " (another machine has it)",
                _ => "",
            };
            host(format!("{what}{hint}"), source)
        };
        let vhost = KernelVsock::new(memory.clone())
            .map_err(|error| failed("/dev/vhost-vsock cannot be opened", error))?;
        vhost.set_owner().map_err(|error| failed("/dev/vhost-vsock cannot be used", error))?;
        let offered = vhost
            .get_features()
            .map_err(|error| failed("/dev/vhost-vsock has no features", error))?;
        vhost
            .set_guest_cid(cid.into())
            .map_err(|error| failed(&format!("cid={cid} cannot be taken"), error))?;
        let features = offered & (RING_FEATURES | SEQPACKET);
        Ok(Self { cid, features, kernel: Some(Kernel { vhost, memory }), running: None })
    }

    /// A device without sockets behind it.
    pub(super) fn unserved(cid: u32) -> Self {
        Self { cid, features: RING_FEATURES, kernel: None, running: None }
    }
}

impl Kernel {
    fn start(
        &self,
        features: u64,
        memory: &GuestMemory,
        queues: &[ActiveQueue],
        interrupt: &Arc<dyn VirtioInterrupt>,
    ) -> Result<Worker<Faults>, VhostError> {
        match self.memory.lock() {
            Ok(late) => late.replace(memory.clone()),
            Err(_) => return Err(VhostError::Memory),
        }
        // What the kernel does not know, such as bits of the transport, it refuses.
        let known = self.vhost.get_features().named("GET_FEATURES")?;
        self.vhost.set_features(features & known).named("SET_FEATURES")?;
        set_memory(&self.vhost, memory)?;
        let faults = Faults::new("vsock", interrupt).named("an eventfd")?;
        for active in queues.iter().filter(|active| active.index < SERVED) {
            let place = (usize::from(active.index), active.queue.next_avail());
            set_queue(&self.vhost, Addresses::Guest, memory, place, active, &**interrupt)?;
            faults.watch(&self.vhost, usize::from(active.index))?;
        }
        let faults = faults.start()?;
        self.vhost.start().named("VSOCK_SET_RUNNING")?;
        Ok(faults)
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> DeviceType {
        DeviceType::VSOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let space = u64::from(self.cid).to_le_bytes();
        let rest = usize::try_from(offset).ok().and_then(|offset| space.get(offset..));
        for (to, from) in data.iter_mut().zip(rest.unwrap_or_default()) {
            *to = *from;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, features, queues, interrupt } = activation;
        let Some(kernel) = &self.kernel else { return Ok(()) };
        // A driver that left one of the two alone has a device that does nothing.
        if queues.iter().filter(|active| active.index < SERVED).count() < usize::from(SERVED) {
            return Ok(());
        }
        let running = kernel
            .start(features, &memory, &queues, &interrupt)
            .map_err(|error| ActivateError::Backend(format!("vhost-vsock: {error}")))?;
        self.running = Some(running);
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(kernel) = &self.kernel
            && self.running.take().is_some()
            && let Err(error) = kernel.vhost.stop()
        {
            tracing::error!(%error, "the kernel does not let go of the sockets' queues");
        }
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        self.reset();
    }
}
