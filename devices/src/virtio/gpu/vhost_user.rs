//! The front end's half of vhost-user: hands over what driver and transport agreed on.

use std::{
    fs::File,
    io::{self, IoSlice},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::{fs::FileExt, net::UnixStream},
    },
};

use gpu_protocol::{
    inflight::{self, table_size},
    virtio::{Config, QUEUES},
};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use vhost::{
    VhostBackend,
    vhost_user::{
        Frontend, VhostUserFrontend,
        message::{
            VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight,
            VhostUserProtocolFeatures, VhostUserVirtioFeatures,
        },
    },
};
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};
use zerocopy::{FromBytes, IntoBytes};

use crate::{
    GuestMemory,
    virtio::{
        device::{ActiveQueue, VirtioInterrupt},
        vhost::{Addresses, Named, VhostError, set_memory, set_queue},
    },
};

const SET_VRING_ERR: u32 = 14;
const GPU_SET_SOCKET: u32 = 33;
const VERSION: u32 = 1;

/// What the back end keeps for its successor: the tables of commands in flight, and behind them what
/// only it understands.
pub(super) struct Inflight {
    info: VhostUserInflight,
    file: File,
}

impl Inflight {
    /// The chains of a queue that have no answer, oldest first; `None` if the back end left nonsense.
    /// Read as a file: a mapping of a file that shrinks would kill this process.
    pub(super) fn chains(&self, queue: u16, size: u16, used: u16) -> Option<Vec<u16>> {
        let length = table_size(self.info.queue_size);
        let mut table = vec![0; length];
        let at = self.info.mmap_offset.checked_add(u64::from(queue) * length as u64)?;
        self.file.read_exact_at(&mut table, at).ok()?;
        let found = inflight::parse(&table, size.min(self.info.queue_size), used)?;
        Some(found.into_iter().map(|one| one.head).collect())
    }

    /// Strikes all chains off: they have been answered.
    pub(super) fn wipe(&self) -> io::Result<()> {
        let zeros = vec![0; QUEUES * table_size(self.info.queue_size)];
        self.file.write_all_at(&zeros, self.info.mmap_offset)
    }
}

/// How to start the queues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Start {
    /// From their beginning.
    Fresh,
    /// Where the last back end stopped.
    Resumed,
}

/// The connection to the back end.
pub(super) struct VhostUser {
    frontend: Frontend,
    /// The same socket.
    direct: UnixStream,
    features: u64,
    protocol: VhostUserProtocolFeatures,
    capsets: u32,
}

impl VhostUser {
    /// Negotiates on `socket` and passes `gpu` to the back end as its GPU socket. `successors` tells
    /// whether another process can take over if it dies.
    pub(super) fn connect(
        socket: UnixStream,
        gpu: &UnixStream,
        successors: bool,
    ) -> Result<Self, VhostError> {
        let direct = socket.try_clone().named("duplicating the socket")?;
        let mut frontend = Frontend::from_stream(socket, QUEUES as u64);
        let features = frontend.get_features().named("GET_FEATURES")?;
        if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            return Err(VhostError::TooOld);
        }
        let offered = frontend.get_protocol_features().named("GET_PROTOCOL_FEATURES")?;
        let mut known = VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::RESET_DEVICE;
        known.set(VhostUserProtocolFeatures::INFLIGHT_SHMFD, successors);
        let protocol = offered & known;
        frontend.set_protocol_features(protocol).named("SET_PROTOCOL_FEATURES")?;
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        frontend.set_owner().named("SET_OWNER")?;
        send(&direct, GPU_SET_SOCKET, &[], gpu.as_fd()).named("GPU_SET_SOCKET")?;
        let mut vhost = Self { frontend, direct, features, protocol, capsets: 0 };
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

    /// Lets the back end make memory for its successor, before the queues start. `None` if it does
    /// not know how.
    pub(super) fn make_inflight(
        &mut self,
        queue_size: u16,
    ) -> Result<Option<Inflight>, VhostError> {
        if !self.protocol.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD) {
            return Ok(None);
        }
        let wanted = VhostUserInflight::new(0, 0, QUEUES as u16, queue_size);
        let (info, file) = self.frontend.get_inflight_fd(&wanted).named("GET_INFLIGHT_FD")?;
        if (info.num_queues, info.queue_size) != (QUEUES as u16, queue_size) {
            return Ok(None);
        }
        Ok(Some(Inflight { info, file }))
    }

    /// Gives the back end what its predecessor left.
    pub(super) fn give_inflight(&mut self, inflight: &Inflight) -> Result<(), VhostError> {
        let Inflight { info, file } = inflight;
        self.frontend.set_inflight_fd(info, file.as_raw_fd()).named("SET_INFLIGHT_FD")
    }

    /// Hands over features, memory and queues; the back end serves them from now on. It writes to
    /// `error` when the driver breaks the rules of a queue.
    pub(super) fn start(
        &mut self,
        features: u64,
        memory: &GuestMemory,
        queues: &[ActiveQueue],
        interrupt: &dyn VirtioInterrupt,
        error: BorrowedFd<'_>,
        how: Start,
    ) -> Result<(), VhostError> {
        let features = (features & self.features)
            | (VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() & self.features);
        self.frontend.set_features(features).named("SET_FEATURES")?;
        set_memory(&self.frontend, memory)?;
        for active in queues {
            let index = u64::from(active.index);
            send(&self.direct, SET_VRING_ERR, index.as_bytes(), error).named("SET_VRING_ERR")?;
            let base = match how {
                Start::Fresh => active.queue.next_avail(),
                Start::Resumed => used_index(memory, &active.queue)?,
            };
            let place = (usize::from(active.index), base);
            set_queue(&self.frontend, Addresses::Process, memory, place, active, interrupt)?;
        }
        for active in queues {
            self.frontend
                .set_vring_enable(usize::from(active.index), true)
                .named("SET_VRING_ENABLE")?;
        }
        Ok(())
    }

    /// Whether the back end knows RESET_DEVICE.
    pub(super) fn resets_devices(&self) -> bool {
        self.protocol.contains(VhostUserProtocolFeatures::RESET_DEVICE)
    }

    /// Takes the queues back. When this returns without error, the back end no longer touches
    /// guest memory.
    pub(super) fn stop(&mut self, queues: impl Iterator<Item = u16>) -> Result<(), VhostError> {
        for index in queues.map(usize::from) {
            self.frontend.set_vring_enable(index, false).named("SET_VRING_ENABLE")?;
            self.frontend.get_vring_base(index).named("GET_VRING_BASE")?;
        }
        if self.resets_devices() {
            self.frontend.reset_device().named("RESET_DEVICE")?;
        }
        Ok(())
    }
}

/// How many chains of a queue were given back, as its used ring says.
pub(super) fn used_index(
    memory: &GuestMemory,
    queue: &virtio_queue::Queue,
) -> Result<u16, VhostError> {
    let at = GuestAddress(queue.used_ring() + 2);
    let index: u16 = memory.read_obj(at).map_err(|_| VhostError::Memory)?;
    Ok(u16::from_le(index))
}

/// Sends a request with a descriptor and without an answer, between two of the library's: it cannot
/// send the first kind, and takes descriptors for the second in a type that cannot be waited for.
fn send(
    vhost: &UnixStream,
    request: u32,
    payload: &[u8],
    descriptor: BorrowedFd<'_>,
) -> io::Result<()> {
    let header = [request, VERSION, payload.len() as u32];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [descriptor];
    if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let bytes = [header.as_bytes(), payload].concat();
    let sent =
        rustix::net::sendmsg(vhost, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL)?;
    // So few bytes fit into any socket buffer that is empty, as this one is between two requests.
    if sent == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}
