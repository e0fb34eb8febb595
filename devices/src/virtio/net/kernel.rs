//! A pair of queues served by the host's kernel (`/dev/vhost-net`): packets between guest and tap
//! interface without this process.

use std::{fs::File, io, sync::Arc};

use vhost::{VhostBackend, net::VhostNet, vhost_kern::net::Net as KernelNet};
use virtio_queue::QueueT;

use crate::{
    GuestMemory,
    virtio::{
        VirtioInterrupt,
        device::ActiveQueue,
        registry::BuildError,
        vhost::{Addresses, Faults, LateMemory, Named, VhostError, set_memory, set_queue},
    },
};

/// An open `/dev/vhost-net`.
pub(super) struct KernelPair {
    vhost: KernelNet<LateMemory>,
    memory: LateMemory,
    features: u64,
}

impl KernelPair {
    /// Opens the device.
    pub(super) fn open() -> Result<Self, BuildError> {
        let failed = |error: vhost::Error| {
            let source = match error {
                vhost::Error::VhostOpen(source) | vhost::Error::IoctlError(source) => source,
                other => io::Error::other(other.to_string()),
            };
            let hint = match source.kind() {
                io::ErrorKind::NotFound => " (is the module vhost_net loaded?)",
                io::ErrorKind::PermissionDenied => {
                    " (it belongs to the group kvm on most systems: is this user in it?)"
                }
                _ => "",
            };
            let what = format!("vhost=on: /dev/vhost-net cannot be used{hint}");
            BuildError::Host { option: "net", what, source }
        };
        let memory = LateMemory::new(GuestMemory::default());
        let vhost = KernelNet::new(memory.clone()).map_err(failed)?;
        vhost.set_owner().map_err(failed)?;
        let features = vhost.get_features().map_err(failed)?;
        Ok(Self { vhost, memory, features })
    }

    /// What the kernel can do with a queue.
    pub(super) fn features(&self) -> u64 {
        self.features
    }

    /// Connects receive and transmit queue with the interface.
    pub(super) fn start(
        &self,
        features: u64,
        memory: &GuestMemory,
        queues: [&ActiveQueue; 2],
        tap: &File,
        interrupt: &Arc<dyn VirtioInterrupt>,
        faults: &Faults,
    ) -> Result<(), VhostError> {
        match self.memory.lock() {
            Ok(late) => late.replace(memory.clone()),
            Err(_) => return Err(VhostError::Memory),
        }
        self.vhost.set_features(features & self.features).named("SET_FEATURES")?;
        set_memory(&self.vhost, memory)?;
        for (index, active) in queues.into_iter().enumerate() {
            let place = (index, active.queue.next_avail());
            set_queue(&self.vhost, Addresses::Guest, memory, place, active, &**interrupt)?;
            faults.watch(&self.vhost, index)?;
        }
        for index in 0..2 {
            self.vhost.set_backend(index, Some(tap)).named("NET_SET_BACKEND")?;
        }
        Ok(())
    }

    /// Disconnects them. Without error the kernel no longer touches guest memory.
    pub(super) fn stop(&self) -> Result<(), VhostError> {
        for index in 0..2 {
            self.vhost.set_backend(index, None).named("NET_SET_BACKEND")?;
        }
        Ok(())
    }
}
