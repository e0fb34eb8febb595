//! The front end's half of vhost-user: hands over what driver and transport agreed on.

use std::{
    io::{self, IoSlice},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
};

use gpu_protocol::virtio::{Config, QUEUES};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use vhost::{
    VhostBackend, VhostUserMemoryRegionInfo, VringConfigData,
    vhost_user::{
        Frontend, VhostUserFrontend,
        message::{
            VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures,
            VhostUserVirtioFeatures,
        },
    },
};
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestMemoryBackend};
use zerocopy::{FromBytes, IntoBytes};

use crate::{
    GuestMemory,
    virtio::device::{ActiveQueue, VirtioInterrupt},
};

const GPU_SET_SOCKET: u32 = 33;
const VERSION: u32 = 1;

/// A request to the back end failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum VhostError {
    #[error("{what}: {source}")]
    Request { what: &'static str, source: vhost::Error },
    #[error("guest memory is not shared, or a ring lies outside it")]
    Memory,
    #[error("{what}: {source}")]
    Io { what: &'static str, source: io::Error },
    #[error("the back end does not speak vhost-user's protocol features")]
    TooOld,
}

trait Named<T> {
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

/// The connection to the back end.
pub(super) struct VhostUser {
    frontend: Frontend,
    features: u64,
    protocol: VhostUserProtocolFeatures,
    capsets: u32,
}

impl VhostUser {
    /// Negotiates on `socket` and passes `gpu` to the back end as its GPU socket.
    pub(super) fn connect(socket: UnixStream, gpu: &UnixStream) -> Result<Self, VhostError> {
        let direct = socket.try_clone().named("duplicating the socket")?;
        let mut frontend = Frontend::from_stream(socket, QUEUES as u64);
        let features = frontend.get_features().named("GET_FEATURES")?;
        if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            return Err(VhostError::TooOld);
        }
        let offered = frontend.get_protocol_features().named("GET_PROTOCOL_FEATURES")?;
        let protocol = offered
            & (VhostUserProtocolFeatures::CONFIG
                | VhostUserProtocolFeatures::REPLY_ACK
                | VhostUserProtocolFeatures::MQ
                | VhostUserProtocolFeatures::RESET_DEVICE);
        frontend.set_protocol_features(protocol).named("SET_PROTOCOL_FEATURES")?;
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        frontend.set_owner().named("SET_OWNER")?;
        send_gpu_socket(&direct, gpu.as_fd()).named("GPU_SET_SOCKET")?;
        let mut vhost = Self { frontend, features, protocol, capsets: 0 };
        vhost.capsets = vhost.read_capsets()?;
        Ok(vhost)
    }

    /// The back end's virtio features.
    pub(super) fn features(&self) -> u64 {
        self.features & !VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    /// Number of capability sets.
    pub(super) fn capsets(&self) -> u32 {
        self.capsets
    }

    fn read_capsets(&mut self) -> Result<u32, VhostError> {
        if !self.protocol.contains(VhostUserProtocolFeatures::CONFIG) {
            return Ok(0);
        }
        let empty = [0; size_of::<Config>()];
        let flags = VhostUserConfigFlags::WRITABLE;
        let (_, bytes) =
            self.frontend.get_config(0, empty.len() as u32, flags, &empty).named("GET_CONFIG")?;
        Ok(Config::read_from_bytes(&bytes).map_or(0, |config| config.num_capsets.get()))
    }

    /// Hands over features, memory and queues; the back end serves them from now on.
    pub(super) fn start(
        &mut self,
        features: u64,
        memory: &GuestMemory,
        queues: &[ActiveQueue],
        interrupt: &dyn VirtioInterrupt,
    ) -> Result<(), VhostError> {
        let features = (features & self.features)
            | (VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() & self.features);
        self.frontend.set_features(features).named("SET_FEATURES")?;
        let mut regions = Vec::new();
        for region in memory.iter() {
            let info = VhostUserMemoryRegionInfo::from_guest_region(region);
            regions.push(info.map_err(|_| VhostError::Memory)?);
        }
        self.frontend.set_mem_table(&regions).named("SET_MEM_TABLE")?;
        for active in queues {
            self.start_queue(memory, active, interrupt)?;
        }
        for active in queues {
            self.frontend
                .set_vring_enable(usize::from(active.index), true)
                .named("SET_VRING_ENABLE")?;
        }
        Ok(())
    }

    fn start_queue(
        &mut self,
        memory: &GuestMemory,
        active: &ActiveQueue,
        interrupt: &dyn VirtioInterrupt,
    ) -> Result<(), VhostError> {
        let (index, queue) = (usize::from(active.index), &active.queue);
        let host = |address: u64| {
            let pointer = memory.get_host_address(GuestAddress(address));
            pointer.map(|pointer| pointer as u64).map_err(|_| VhostError::Memory)
        };
        let config = VringConfigData {
            queue_max_size: queue.max_size(),
            queue_size: queue.size(),
            flags: 0,
            desc_table_addr: host(queue.desc_table())?,
            used_ring_addr: host(queue.used_ring())?,
            avail_ring_addr: host(queue.avail_ring())?,
            log_addr: None,
        };
        let call = interrupt.queue_eventfd(active.index).named("interrupt of a queue")?;
        self.frontend.set_vring_num(index, queue.size()).named("SET_VRING_NUM")?;
        self.frontend.set_vring_base(index, queue.next_avail()).named("SET_VRING_BASE")?;
        self.frontend.set_vring_addr(index, &config).named("SET_VRING_ADDR")?;
        self.frontend.set_vring_call(index, &call).named("SET_VRING_CALL")?;
        self.frontend.set_vring_kick(index, &active.kick).named("SET_VRING_KICK")
    }

    /// Takes the queues back. When this returns without error, the back end no longer touches
    /// guest memory.
    pub(super) fn stop(&mut self, queues: impl Iterator<Item = u16>) -> Result<(), VhostError> {
        for index in queues.map(usize::from) {
            self.frontend.set_vring_enable(index, false).named("SET_VRING_ENABLE")?;
            self.frontend.get_vring_base(index).named("GET_VRING_BASE")?;
        }
        if self.protocol.contains(VhostUserProtocolFeatures::RESET_DEVICE) {
            self.frontend.reset_device().named("RESET_DEVICE")?;
        }
        Ok(())
    }
}

/// Sends `VHOST_USER_GPU_SET_SOCKET`, which crate `vhost` 0.18 cannot send, between two of its
/// requests. It has no answer.
fn send_gpu_socket(vhost: &UnixStream, gpu: BorrowedFd<'_>) -> io::Result<()> {
    let header = [GPU_SET_SOCKET, VERSION, 0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [gpu];
    if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let bytes = header.as_bytes();
    let sent =
        rustix::net::sendmsg(vhost, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
    // Twelve bytes fit into any socket buffer that is empty, as this one is between two requests.
    if sent == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}
