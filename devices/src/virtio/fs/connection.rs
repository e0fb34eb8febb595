//! The vhost-user connection to virtiofsd.

use std::{
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    sync::Arc,
};

use vhost::{
    VhostBackend,
    vhost_user::{
        Frontend, VhostUserFrontend,
        message::{VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures},
    },
};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::device::QUEUES;
use crate::{
    GuestMemory,
    virtio::{
        ActiveQueue, RING_FEATURES, VirtioInterrupt,
        vhost::{Addresses, Named, VhostError, set_memory, set_queue},
    },
};

/// A virtiofsd that has introduced itself.
pub(super) struct Connection {
    frontend: Frontend,
    /// The same socket, to see its end.
    socket: UnixStream,
    features: u64,
}

impl Connection {
    /// Negotiates on `socket`.
    pub(super) fn negotiate(socket: UnixStream) -> Result<Self, VhostError> {
        let watched = socket.try_clone().named("duplicating the socket")?;
        let mut frontend = Frontend::from_stream(socket, QUEUES as u64);
        let features = frontend.get_features().named("GET_FEATURES")?;
        if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0 {
            let offered = frontend.get_protocol_features().named("GET_PROTOCOL_FEATURES")?;
            let wanted = VhostUserProtocolFeatures::REPLY_ACK | VhostUserProtocolFeatures::MQ;
            frontend.set_protocol_features(offered & wanted).named("SET_PROTOCOL_FEATURES")?;
            if offered.contains(VhostUserProtocolFeatures::REPLY_ACK) {
                frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
            }
        }
        frontend.set_owner().named("SET_OWNER")?;
        Ok(Self { frontend, socket: watched, features })
    }

    /// What the driver may be offered.
    pub(super) fn features(&self) -> u64 {
        self.features & RING_FEATURES
    }

    /// The socket.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Hands over the queues; virtiofsd goes on with the available entries `bases`. Returns what it
    /// writes to when it finds a ring broken.
    pub(super) fn start(
        &mut self,
        features: u64,
        memory: &GuestMemory,
        queues: &[ActiveQueue],
        bases: &[u16],
        interrupt: &Arc<dyn VirtioInterrupt>,
    ) -> Result<EventFd, VhostError> {
        let fault = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).named("an eventfd")?;
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let agreed = (features | protocol) & self.features;
        self.frontend.set_features(agreed).named("SET_FEATURES")?;
        set_memory(&self.frontend, memory)?;
        for (active, base) in queues.iter().zip(bases) {
            let place = (usize::from(active.index), *base);
            set_queue(&self.frontend, Addresses::Process, memory, place, active, &**interrupt)?;
            self.frontend.set_vring_err(place.0, &fault).named("SET_VRING_ERR")?;
        }
        if agreed & protocol != 0 {
            self.enable(queues, true)?;
        }
        // For what waits in the queues already.
        for active in queues {
            active.kick.write(1).named("waking virtiofsd")?;
        }
        Ok(fault)
    }

    /// Takes the queues back. Without error virtiofsd no longer touches guest memory.
    pub(super) fn stop(&mut self, queues: &[ActiveQueue]) -> Result<(), VhostError> {
        if self.features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0 {
            self.enable(queues, false)?;
        }
        for active in queues {
            let index = usize::from(active.index);
            self.frontend.get_vring_base(index).named("GET_VRING_BASE")?;
        }
        Ok(())
    }

    fn enable(&mut self, queues: &[ActiveQueue], on: bool) -> Result<(), VhostError> {
        for active in queues {
            let index = usize::from(active.index);
            self.frontend.set_vring_enable(index, on).named("SET_VRING_ENABLE")?;
        }
        Ok(())
    }
}
