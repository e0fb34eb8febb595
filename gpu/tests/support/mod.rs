//! A front end with a guest's queues made by hand, for tests and the vtest bridge.

#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "each test uses a part of it"
)]

pub mod screen;
pub mod three_d;

use std::{
    fs::File,
    io::{IoSlice, Read, Write},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{Ordering, fence},
};

use gpu_protocol::{
    Rect,
    socket::{Decoder, FLAG_REPLY, FromBackEnd, FromFrontEnd, Header},
    virtio::{
        AttachBacking, CtrlHdr, MemEntry, ResourceCreate2d, ResourceFlush, SetScanout,
        TransferToHost2d, kind,
    },
};
use host::socket_io;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use vhost::{
    VhostBackend, VhostUserMemoryRegionInfo, VringConfigData,
    vhost_user::{
        Frontend, VhostUserFrontend,
        message::{VhostUserConfigFlags, VhostUserProtocolFeatures},
    },
};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
};
use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::EventFd,
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Where guest memory starts.
pub const GUEST_BASE: u64 = 0x8000_0000;
const GUEST_SIZE: usize = 512 << 20;
/// Free for the guest's data, up to the end of memory.
pub const DATA: u64 = GUEST_BASE + (64 << 20);
/// The end of guest memory.
pub const DATA_END: u64 = GUEST_BASE + GUEST_SIZE as u64;
/// Where [`FrontEnd::screen`] has its pixels.
pub const PIXELS: u64 = DATA;

const EVENT_IDX: u64 = 1 << 29;
const QUEUE_SIZE: u16 = 64;
/// Where the two sides say when they want to be notified: behind the rings.
const AVAIL_EVENT: u64 = 0x5004 + QUEUE_SIZE as u64 * 8;
const USED_EVENT: u64 = 0x4004 + QUEUE_SIZE as u64 * 2;
/// Commands on their way at most: each takes two descriptors.
const SLOTS: u16 = QUEUE_SIZE / 2;
const QUEUE_STRIDE: u64 = 1 << 20;
/// Command and answer of a slot.
const SLOT: u64 = 0x2000;
const SMALL: usize = 0x1000;
/// Commands that do not fit there.
const LARGE: u64 = GUEST_BASE + (2 << 20);
const LARGE_SLOT: u64 = 0x11_0000;

/// A queue.
pub struct Queue {
    base: u64,
    /// Index of the next entry in the available ring.
    pub next: u16,
    seen: u16,
    busy: [bool; SLOTS as usize],
    /// Which command a slot holds or held.
    serials: [u64; SLOTS as usize],
    last: u16,
    kick: EventFd,
    /// The device's interrupt.
    pub call: EventFd,
    /// The interrupt, or the end of the process.
    wake: Epoll,
}

/// Of [`Queue::wake`]: the device hung up.
const DEATH: u64 = 1;

/// `drago-gpu` and what it is connected to.
pub struct FrontEnd {
    pub child: Child,
    pub vhost: Frontend,
    /// The socket of `vhost`, which keeps it to itself.
    direct: UnixStream,
    pub gpu: UnixStream,
    pub memory: GuestMemoryMmap,
    pub queues: [Queue; 2],
    pub features: u64,
    pub capsets: u32,
    /// Notifications are suppressed as Linux does; set before [`FrontEnd::start`].
    pub event_idx: bool,
    /// Commands that were answered with an error.
    pub refused: u64,
}

/// A command on its way.
#[derive(Debug, Clone, Copy)]
pub struct Ticket {
    slot: u16,
    serial: u64,
}

/// Starts a program of ours; with `DRAGO_TEST_ROOT`, on the libraries of the system unpacked there.
pub fn command(program: &Path) -> Command {
    let Some(root) = std::env::var_os("DRAGO_TEST_ROOT").map(PathBuf::from) else {
        return Command::new(program);
    };
    let libraries = root.join("usr/lib/x86_64-linux-gnu");
    let mut command = Command::new(libraries.join("ld-linux-x86-64.so.2"));
    command
        .arg(program)
        .env("LD_LIBRARY_PATH", &libraries)
        .env("__EGL_VENDOR_LIBRARY_DIRS", root.join("usr/share/glvnd/egl_vendor.d"))
        .env("LIBGL_DRIVERS_PATH", libraries.join("dri"))
        .env("GBM_BACKENDS_PATH", libraries.join("gbm"))
        .env("VK_DRIVER_FILES", root.join("usr/share/vulkan/icd.d/lvp_icd.json"));
    command
}

impl Drop for FrontEnd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl FrontEnd {
    /// A 2D device; `extra_features` are acknowledged although nobody offers them.
    pub fn new(extra_features: u64) -> Self {
        // Examples have no such variable, and do not call this.
        let Some(program) = option_env!("CARGO_BIN_EXE_drago-gpu") else { panic!("no test") };
        Self::spawn(Path::new(program), &["--renderer", "2d"], extra_features)
    }

    /// Starts the program.
    pub fn spawn(program: &Path, arguments: &[&str], extra_features: u64) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let verbose = std::env::var_os("DRAGO_LOG").is_some();
        let child = command(program)
            .args(["--fd", "0"])
            .args(arguments)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stderr(if verbose { Stdio::inherit() } else { Stdio::null() })
            .spawn()
            .unwrap();
        let direct = ours.try_clone().unwrap();
        let mut vhost = Frontend::from_stream(ours, 2);
        // The order in which QEMU says it.
        let features = vhost.get_features().unwrap();
        let protocol = vhost.get_protocol_features().unwrap();
        let wanted = VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::MQ;
        assert!(protocol.contains(wanted));
        vhost.set_protocol_features(wanted).unwrap();
        assert_eq!(vhost.get_queue_num().unwrap(), 2);
        vhost.set_owner().unwrap();
        let (gpu, other) = UnixStream::pair().unwrap();
        send_gpu_socket(&direct, &other);
        let empty = [0; 16];
        let (_, config) = vhost.get_config(0, 16, VhostUserConfigFlags::empty(), &empty).unwrap();
        let capsets = u32::from_le_bytes(config[12..16].try_into().unwrap());

        let file =
            File::from(rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.set_len(GUEST_SIZE as u64 + 8192).unwrap();
        let memory = GuestMemoryMmap::from_ranges_with_files([(
            GuestAddress(GUEST_BASE),
            GUEST_SIZE,
            Some(FileOffset::new(file, 8192)),
        )])
        .unwrap();
        let fd = || EventFd::new(0).unwrap();
        let queues = [0, 1].map(|index| Queue {
            base: GUEST_BASE + index * QUEUE_STRIDE,
            next: 0,
            seen: 0,
            busy: [false; SLOTS as usize],
            serials: [0; SLOTS as usize],
            last: 0,
            kick: fd(),
            call: fd(),
            wake: Epoll::new().unwrap(),
        });
        for queue in &queues {
            let add = |fd: i32, events, data| {
                let event = EpollEvent::new(events, data);
                queue.wake.ctl(ControlOperation::Add, fd, event).unwrap();
            };
            add(queue.call.as_raw_fd(), EventSet::IN, 0);
            add(direct.as_raw_fd(), EventSet::HANG_UP, DEATH);
        }
        let mut front = Self {
            child,
            vhost,
            direct,
            gpu,
            memory,
            queues,
            features,
            capsets,
            event_idx: false,
            refused: 0,
        };
        front.start(features | extra_features);
        front
    }

    /// Another GPU socket, in place of the one before.
    pub fn reconnect_gpu(&mut self) {
        let (gpu, other) = UnixStream::pair().unwrap();
        send_gpu_socket(&self.direct, &other);
        self.gpu = gpu;
    }

    /// Takes the queues back.
    pub fn vhost_stop(&mut self) {
        for queue in 0..2 {
            self.vhost.set_vring_enable(queue, false).unwrap();
            self.vhost.get_vring_base(queue).unwrap();
        }
    }

    /// Hands memory and queues over.
    pub fn start(&mut self, features: u64) {
        // Without EVENT_IDX every answer interrupts.
        let suppress = if self.event_idx { 0 } else { EVENT_IDX };
        self.vhost.set_features(features & !suppress).unwrap();
        let region = self.memory.iter().next().unwrap();
        assert!(region.start_addr().0 != 0);
        let info = VhostUserMemoryRegionInfo::from_guest_region(region).unwrap();
        self.vhost.set_mem_table(&[info]).unwrap();
        for (index, queue) in self.queues.iter_mut().enumerate() {
            queue.next = 0;
            queue.seen = 0;
            queue.busy.fill(false);
            self.memory.write_slice(&[0; 0x1_0000], GuestAddress(queue.base)).unwrap();
            let host = |offset| {
                self.memory.get_host_address(GuestAddress(queue.base + offset)).unwrap() as u64
            };
            let config = VringConfigData {
                queue_max_size: QUEUE_SIZE,
                queue_size: QUEUE_SIZE,
                flags: 0,
                desc_table_addr: host(0),
                avail_ring_addr: host(0x4000),
                used_ring_addr: host(0x5000),
                log_addr: None,
            };
            self.vhost.set_vring_num(index, QUEUE_SIZE).unwrap();
            self.vhost.set_vring_base(index, 0).unwrap();
            self.vhost.set_vring_addr(index, &config).unwrap();
            self.vhost.set_vring_call(index, &queue.call).unwrap();
            self.vhost.set_vring_kick(index, &queue.kick).unwrap();
            self.vhost.set_vring_enable(index, true).unwrap();
        }
        // A question, so that all of this has been done.
        self.vhost.get_features().unwrap();
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
    }

    /// Makes a command available; returns the slot its answer will be in. Waits while all slots are
    /// busy.
    pub fn submit(&mut self, queue: usize, command: &[u8]) -> u16 {
        self.submit_parts(queue, &[command])
    }

    /// A command in pieces that lie one behind the other.
    pub fn submit_parts(&mut self, queue: usize, parts: &[&[u8]]) -> u16 {
        let slot = loop {
            self.collect(queue);
            // As late as possible after its last use, so that answers can still be looked at.
            let Queue { busy, last, .. } = &self.queues[queue];
            let mut slots = (1..=SLOTS).map(|next| (last + next) % SLOTS);
            if let Some(slot) = slots.find(|slot| !busy[usize::from(*slot)]) {
                break slot;
            }
            self.sleep(queue);
        };
        let base = self.queues[queue].base;
        let length: usize = parts.iter().map(|part| part.len()).sum();
        let small_at = base + 0x1_0000 + u64::from(slot) * SLOT;
        let command_at = match length {
            0..=SMALL => small_at,
            _ => LARGE + u64::from(slot) * LARGE_SLOT,
        };
        let mut at = command_at;
        for part in parts {
            self.put(at, part);
            at += part.len() as u64;
        }
        let descriptor = |number: u16, at: u64, length: usize, flags: u16, next: u16| {
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&at.to_le_bytes());
            bytes[8..12].copy_from_slice(&(length as u32).to_le_bytes());
            bytes[12..14].copy_from_slice(&flags.to_le_bytes());
            bytes[14..].copy_from_slice(&next.to_le_bytes());
            self.put(base + u64::from(number) * 16, &bytes);
        };
        let head = slot * 2;
        descriptor(head, command_at, length, 1, head + 1);
        descriptor(head + 1, small_at + SMALL as u64, SMALL, 2, 0);
        let next = self.queues[queue].next;
        self.put(base + 0x4004 + u64::from(next % QUEUE_SIZE) * 2, &head.to_le_bytes());
        fence(Ordering::SeqCst);
        self.put(base + 0x4002, &next.wrapping_add(1).to_le_bytes());
        fence(Ordering::SeqCst);
        let event: u16 = self.memory.read_obj(GuestAddress(base + AVAIL_EVENT)).unwrap();
        let queue = &mut self.queues[queue];
        queue.next = next.wrapping_add(1);
        queue.busy[usize::from(slot)] = true;
        queue.serials[usize::from(slot)] += 1;
        queue.last = slot;
        if !self.event_idx || event == next {
            queue.kick.write(1).unwrap();
        }
        slot
    }

    /// What was submitted last.
    pub fn ticket(&self, queue: usize) -> Ticket {
        let slot = self.queues[queue].last;
        Ticket { slot, serial: self.queues[queue].serials[usize::from(slot)] }
    }

    /// Whether a command was answered.
    pub fn is_over(&mut self, queue: usize, ticket: Ticket) -> bool {
        self.collect(queue);
        let slot = usize::from(ticket.slot);
        self.queues[queue].serials[slot] != ticket.serial || !self.queues[queue].busy[slot]
    }

    /// Waits until a command is answered.
    pub fn finish(&mut self, queue: usize, ticket: Ticket) {
        while !self.is_over(queue, ticket) {
            self.sleep(queue);
        }
    }

    /// Waits for the next interrupt.
    fn sleep(&mut self, queue: usize) {
        let seen = self.queues[queue].seen;
        if self.event_idx {
            self.put(self.queues[queue].base + USED_EVENT, &seen.to_le_bytes());
            fence(Ordering::SeqCst);
            if self.used(queue) != seen {
                return;
            }
        }
        let mut events = [EpollEvent::default(); 2];
        let count = self.queues[queue].wake.wait(-1, &mut events).unwrap();
        if events[..count].iter().any(|event| event.data() == DEATH) {
            panic!("drago-gpu died: {:?}", self.child.wait());
        }
        self.queues[queue].call.read().unwrap();
    }

    /// How many answers there are.
    pub fn used(&self, queue: usize) -> u16 {
        let at = GuestAddress(self.queues[queue].base + 0x5002);
        u16::from_le(self.memory.load(at, Ordering::Acquire).unwrap())
    }

    /// Takes what is in the used ring.
    fn collect(&mut self, queue: usize) {
        let used = self.used(queue);
        let Queue { base, seen, busy, .. } = &mut self.queues[queue];
        while *seen != used {
            let at = *base + 0x5004 + u64::from(*seen % QUEUE_SIZE) * 8;
            let head: u32 = self.memory.read_obj(GuestAddress(at)).unwrap();
            let slot = head / 2;
            let answer = *base + 0x1_0000 + u64::from(slot) * SLOT + SMALL as u64;
            let answer: u32 = self.memory.read_obj(GuestAddress(answer)).unwrap();
            self.refused += u64::from(answer >= kind::ERR_UNSPEC);
            busy[slot as usize] = false;
            *seen = seen.wrapping_add(1);
        }
    }

    /// Whether the command in this slot was answered.
    pub fn is_done(&mut self, queue: usize, slot: u16) -> bool {
        self.collect(queue);
        !self.queues[queue].busy[usize::from(slot)]
    }

    /// Waits for the answer in a slot.
    pub fn wait_for<T: FromBytes>(&mut self, queue: usize, slot: u16) -> T {
        let bytes = self.wait_for_bytes(queue, slot, size_of::<T>());
        T::read_from_bytes(&bytes).unwrap()
    }

    /// Waits for the answer in a slot.
    pub fn wait_for_bytes(&mut self, queue: usize, slot: u16, length: usize) -> Vec<u8> {
        while !self.is_done(queue, slot) {
            self.sleep(queue);
        }
        let mut bytes = vec![0; length];
        let at = self.queues[queue].base + 0x1_0000 + u64::from(slot) * SLOT + SMALL as u64;
        self.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    /// Waits for the answer to the command submitted last.
    pub fn wait<T: FromBytes>(&mut self, queue: usize) -> T {
        self.wait_for(queue, self.queues[queue].last)
    }

    /// Submits a command and returns the kind of its answer.
    pub fn run(&mut self, parts: &[&[u8]]) -> u32 {
        let slot = self.submit_parts(0, parts);
        self.wait_for::<CtrlHdr>(0, slot).kind.get()
    }

    /// Submits a command that must succeed.
    pub fn ok(&mut self, command: &(impl IntoBytes + Immutable)) {
        assert_eq!(self.run(&[command.as_bytes()]), kind::OK_NODATA);
    }

    /// Backs a resource with one piece of guest memory.
    pub fn attach(&mut self, resource: u32, address: u64, length: u32) {
        let attach = AttachBacking {
            hdr: CtrlHdr::new(kind::RESOURCE_ATTACH_BACKING),
            resource_id: resource.into(),
            entries: 1.into(),
        };
        let entry = MemEntry { address: address.into(), length: length.into(), padding: 0.into() };
        assert_eq!(self.run(&[attach.as_bytes(), entry.as_bytes()]), kind::OK_NODATA);
    }

    /// A scanout shows this.
    pub fn show(&mut self, scanout: u32, resource: u32, rect: Rect) {
        self.ok(&SetScanout {
            hdr: CtrlHdr::new(kind::SET_SCANOUT),
            rect: rect.into(),
            scanout_id: scanout.into(),
            resource_id: resource.into(),
        });
    }

    /// A part of a resource changed.
    pub fn flush(&mut self, resource: u32, rect: Rect) {
        self.ok(&ResourceFlush {
            hdr: CtrlHdr::new(kind::RESOURCE_FLUSH),
            rect: rect.into(),
            resource_id: resource.into(),
            padding: 0.into(),
        });
    }

    /// A 2D resource backed by guest memory.
    pub fn create_2d(&mut self, resource: u32, format: u32, size: (u32, u32), address: u64) {
        self.ok(&ResourceCreate2d {
            hdr: CtrlHdr::new(kind::RESOURCE_CREATE_2D),
            resource_id: resource.into(),
            format: format.into(),
            width: size.0.into(),
            height: size.1.into(),
        });
        self.attach(resource, address, size.0 * size.1 * 4);
    }

    /// Copies a part of a 2D resource from its backing.
    pub fn upload(&mut self, resource: u32, rect: Rect, offset: u64) {
        self.ok(&TransferToHost2d {
            hdr: CtrlHdr::new(kind::TRANSFER_TO_HOST_2D),
            rect: rect.into(),
            offset: offset.into(),
            resource_id: resource.into(),
            padding: 0.into(),
        });
    }

    /// A resource of this size on screen, backed by guest memory.
    pub fn screen(&mut self, width: u32, height: u32) {
        self.create_2d(1, 2, (width, height), PIXELS);
        self.show(0, 1, Rect::of_size(width, height));
    }

    /// Fills the screen with one byte and flushes it.
    pub fn paint(&mut self, width: u32, height: u32, value: u8) {
        let bytes = vec![value; (width * height * 4) as usize];
        self.put(PIXELS, &bytes);
        let rect = Rect::of_size(width, height);
        self.upload(1, rect, 0);
        self.flush(1, rect);
    }

    /// Sends a message on the GPU socket.
    pub fn send(&mut self, message: &FromFrontEnd, fds: &[OwnedFd]) {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        socket_io::send_all(&self.gpu, &bytes, &fds).unwrap();
    }

    /// Reads GPU socket messages until `last` says so.
    pub fn receive_until(
        &mut self,
        decoder: &mut Decoder,
        mut last: impl FnMut(&FromBackEnd<'_>) -> bool,
    ) {
        let mut buffer = vec![0; 1 << 16];
        loop {
            while let Some(raw) = decoder.next_message().unwrap() {
                assert_eq!(raw.header.flags & FLAG_REPLY, 0);
                if last(&FromBackEnd::decode(&raw).unwrap()) {
                    return;
                }
            }
            let count = self.gpu.read(&mut buffer).unwrap();
            assert_ne!(count, 0, "the back end hung up");
            decoder.push(&buffer[..count]);
        }
    }

    /// Hangs up the GPU socket after this.
    pub fn write_gpu(&mut self, bytes: &[u8]) {
        self.gpu.write_all(bytes).unwrap();
    }
}

fn send_gpu_socket(vhost: &UnixStream, gpu: &UnixStream) {
    let header = Header { request: 33, flags: 1, size: 0 };
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [gpu.as_fd()];
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    let iov = [IoSlice::new(header.as_bytes())];
    assert_eq!(rustix::net::sendmsg(vhost, &iov, &mut control, SendFlags::empty()).unwrap(), 12);
}
