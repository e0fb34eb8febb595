//! `drago-gpu` against a front end that behaves as badly, or as differently, as front ends can:
//! one that never answers, one that never reads, and one that knows nothing but the standard of
//! QEMU 7.2.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

use std::{
    fs::File,
    io::{IoSlice, Read, Write},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    process::{Child, Command, Stdio},
};

use gpu_protocol::{
    Rect,
    socket::{Decoder, FLAG_REPLY, FromBackEnd, FromFrontEnd, Header, Side, id},
    virtio::{
        AttachBacking, CtrlHdr, CursorPos, GetEdid, MemEntry, ResourceCreate2d, ResourceFlush,
        RespDisplayInfo, RespEdid, SetScanout, TransferToHost2d, UpdateCursor, kind,
    },
};
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
use vmm_sys_util::eventfd::EventFd;
use zerocopy::{FromBytes, Immutable, IntoBytes};

const GUEST_BASE: u64 = 0x8000_0000;
const GUEST_SIZE: usize = 16 << 20;
const QUEUE_SIZE: u16 = 64;
const PIXELS: u64 = GUEST_BASE + (1 << 20);
const PROTOCOL_FEATURES: u64 = 1 << 30;

struct Queue {
    base: u64,
    next: u16,
    kick: EventFd,
    call: EventFd,
}

struct FrontEnd {
    child: Child,
    vhost: Frontend,
    gpu: UnixStream,
    memory: GuestMemoryMmap,
    queues: [Queue; 2],
}

impl Drop for FrontEnd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl FrontEnd {
    fn new(extra_features: u64) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_drago-gpu"))
            .args(["--fd", "0"])
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stderr(Stdio::null())
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
        assert_eq!(config[12..16], [0; 4], "no capability sets");

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
            base: GUEST_BASE + index * 0x1_0000,
            next: 0,
            kick: fd(),
            call: fd(),
        });
        let mut front = Self { child, vhost, gpu, memory, queues };
        front.start(features | extra_features);
        front
    }

    fn start(&mut self, features: u64) {
        // Without EVENT_IDX, so that every answer interrupts.
        self.vhost.set_features(features & !(1 << 29)).unwrap();
        let region = self.memory.iter().next().unwrap();
        assert!(region.start_addr().0 != 0);
        let info = VhostUserMemoryRegionInfo::from_guest_region(region).unwrap();
        self.vhost.set_mem_table(&[info]).unwrap();
        for (index, queue) in self.queues.iter_mut().enumerate() {
            queue.next = 0;
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

    /// Makes a command available; descriptors, command and answer have places of their own.
    fn submit(&mut self, queue: usize, command: &[u8]) {
        let Queue { base, next, kick, .. } = &mut self.queues[queue];
        let slot = *next % (QUEUE_SIZE / 2);
        let (command_at, answer_at) = (*base + 0x6000 + u64::from(slot) * 256, *base + 0xa000);
        let put = |at: u64, bytes: &[u8]| self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
        put(command_at, command);
        let descriptor = |number: u16, at: u64, length: usize, flags: u16, next: u16| {
            let entry = *base + u64::from(number) * 16;
            put(entry, &at.to_le_bytes());
            put(entry + 8, &(length as u32).to_le_bytes());
            put(entry + 12, &flags.to_le_bytes());
            put(entry + 14, &next.to_le_bytes());
        };
        let head = slot * 2;
        descriptor(head, command_at, command.len(), 1, head + 1);
        descriptor(head + 1, answer_at, size_of::<RespEdid>(), 2, 0);
        put(*base + 0x4004 + u64::from(*next % QUEUE_SIZE) * 2, &head.to_le_bytes());
        *next = next.wrapping_add(1);
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        put(*base + 0x4002, &next.to_le_bytes());
        kick.write(1).unwrap();
    }

    fn used(&self, queue: usize) -> u16 {
        let at = GuestAddress(self.queues[queue].base + 0x5002);
        u16::from_le(self.memory.load(at, std::sync::atomic::Ordering::Acquire).unwrap())
    }

    /// Waits for the answer to the command submitted last.
    fn wait<T: FromBytes>(&self, queue: usize) -> T {
        while self.used(queue) != self.queues[queue].next {
            // The device interrupts after each answer.
            self.queues[queue].call.read().unwrap();
        }
        let mut bytes = vec![0; size_of::<T>()];
        let at = GuestAddress(self.queues[queue].base + 0xa000);
        self.memory.read_slice(&mut bytes, at).unwrap();
        T::read_from_bytes(&bytes).unwrap()
    }

    fn ok(&mut self, command: &(impl IntoBytes + Immutable)) {
        self.submit(0, command.as_bytes());
        assert_eq!(self.wait::<CtrlHdr>(0).kind.get(), kind::OK_NODATA);
    }

    /// A resource of this size on screen, backed by guest memory.
    fn screen(&mut self, width: u32, height: u32) {
        self.ok(&ResourceCreate2d {
            hdr: CtrlHdr::new(kind::RESOURCE_CREATE_2D),
            resource_id: 1.into(),
            format: 2.into(),
            width: width.into(),
            height: height.into(),
        });
        let attach = AttachBacking {
            hdr: CtrlHdr::new(kind::RESOURCE_ATTACH_BACKING),
            resource_id: 1.into(),
            entries: 1.into(),
        };
        let entry = MemEntry {
            address: PIXELS.into(),
            length: (width * height * 4).into(),
            padding: 0.into(),
        };
        self.submit(0, &[attach.as_bytes(), entry.as_bytes()].concat());
        assert_eq!(self.wait::<CtrlHdr>(0).kind.get(), kind::OK_NODATA);
        self.ok(&SetScanout {
            hdr: CtrlHdr::new(kind::SET_SCANOUT),
            rect: Rect::of_size(width, height).into(),
            scanout_id: 0.into(),
            resource_id: 1.into(),
        });
    }

    /// Fills the screen with one byte and flushes it.
    fn paint(&mut self, width: u32, height: u32, value: u8) {
        let bytes = vec![value; (width * height * 4) as usize];
        self.memory.write_slice(&bytes, GuestAddress(PIXELS)).unwrap();
        let rect = Rect::of_size(width, height).into();
        self.ok(&TransferToHost2d {
            hdr: CtrlHdr::new(kind::TRANSFER_TO_HOST_2D),
            rect,
            offset: 0.into(),
            resource_id: 1.into(),
            padding: 0.into(),
        });
        self.ok(&ResourceFlush {
            hdr: CtrlHdr::new(kind::RESOURCE_FLUSH),
            rect,
            resource_id: 1.into(),
            padding: 0.into(),
        });
    }

    fn send(&mut self, message: &FromFrontEnd) {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        self.gpu.write_all(&bytes).unwrap();
    }

    /// Reads GPU socket messages until `last` says so.
    fn receive_until(
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
}

fn send_gpu_socket(vhost: &UnixStream, gpu: &UnixStream) {
    let header = Header { request: 33, flags: 1, size: 0 };
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [gpu.as_fd()];
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    let iov = [IoSlice::new(header.as_bytes())];
    assert_eq!(rustix::net::sendmsg(vhost, &iov, &mut control, SendFlags::empty()).unwrap(), 12);
    assert!(gpu.as_raw_fd() >= 0);
}

/// QEMU's main thread answers questions and stops rings, one after the other: a back end that waits
/// for the answer while QEMU waits for the ring would hang both.
#[test]
fn a_ring_stops_although_a_question_is_open() {
    let mut front = FrontEnd::new(0);
    let mut decoder = Decoder::new(Side::FrontEnd);
    for round in 1..5_u16 {
        front.submit(0, CtrlHdr::new(kind::GET_DISPLAY_INFO).as_bytes());
        if round == 1 {
            // The question has left the back end, so the command is in its hands.
            let asked = |message: &FromBackEnd<'_>| *message == FromBackEnd::GetDisplayInfo;
            front.receive_until(&mut decoder, asked);
        } else {
            // It is still open and not asked again; what shows that the command was taken is that
            // the cursor queue, kicked later, has been served. Stopping must work either way.
            front.submit(1, &[0; 4]);
            while front.used(1) != front.queues[1].next {
                front.queues[1].call.read().unwrap();
            }
        }
        front.vhost.set_vring_enable(0, false).unwrap();
        let base = front.vhost.get_vring_base(0).unwrap();
        assert_eq!(u32::from(front.used(0)), base, "nothing taken is left unanswered");
        if round == 1 {
            let info: RespDisplayInfo = front.wait(0);
            assert_eq!(info.hdr.kind.get(), kind::OK_DISPLAY_INFO);
        }
        front.vhost.get_vring_base(1).unwrap();
        let features = front.vhost.get_features().unwrap();
        front.start(features);
    }
}

#[test]
fn a_front_end_that_does_not_read_stops_nobody() {
    const SIZE: (u32, u32) = (512, 512);
    let mut front = FrontEnd::new(0);
    let mut decoder = Decoder::new(Side::FrontEnd);
    // Just the standard: no features.
    front.receive_until(&mut decoder, |message| *message == FromBackEnd::GetProtocolFeatures);
    front.send(&FromFrontEnd::ProtocolFeatures(0));
    front.receive_until(&mut decoder, |message| *message == FromBackEnd::SetProtocolFeatures(0));
    front.screen(SIZE.0, SIZE.1);
    // 300 MiB of pixels and some cursor moves, of which nobody reads any.
    for value in 0..=255 {
        front.paint(SIZE.0, SIZE.1, value);
        let command = UpdateCursor {
            hdr: CtrlHdr::new(kind::MOVE_CURSOR),
            pos: CursorPos { x: u32::from(value).into(), ..CursorPos::default() },
            resource_id: 0.into(),
            hot_x: 0.into(),
            hot_y: 0.into(),
            padding: 0.into(),
        };
        front.submit(1, command.as_bytes());
        assert_eq!(front.wait::<CtrlHdr>(1).kind.get(), kind::OK_NODATA);
    }
    let status = std::fs::read_to_string(format!("/proc/{}/status", front.child.id())).unwrap();
    let rss = status.lines().find(|line| line.starts_with("RssAnon")).unwrap();
    let kib: u64 = rss.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!(kib < 32 << 10, "memory grew without bound: {rss}");
    // Now it reads: few messages, the end of them all is the last picture.
    let mut picture = vec![0_u8; (SIZE.0 * SIZE.1) as usize];
    let mut bytes = 0;
    front.receive_until(&mut decoder, |message| {
        if let FromBackEnd::Update { rect, pixels, .. } = message {
            bytes += pixels.len();
            assert!(pixels.len() <= 256 << 10);
            for (line, row) in pixels.chunks(rect.width as usize * 4).enumerate() {
                let at = (rect.y as usize + line) * SIZE.0 as usize + rect.x as usize;
                for (target, source) in picture[at..].iter_mut().zip(row.chunks(4)) {
                    *target = source[0];
                }
            }
        }
        picture.iter().all(|value| *value == 255)
    });
    assert!(bytes < 8 << 20, "old pictures were kept: {bytes} bytes");
}

/// QEMU 7.2 has no GET_EDID, and lets the driver acknowledge features of its transport that a back
/// end knows nothing of (RING_RESET is bit 40).
#[test]
fn qemu_7_2_gets_along() {
    let mut front = FrontEnd::new(1 << 40 | PROTOCOL_FEATURES);
    let mut decoder = Decoder::new(Side::FrontEnd);
    front.receive_until(&mut decoder, |message| *message == FromBackEnd::GetProtocolFeatures);
    front.send(&FromFrontEnd::ProtocolFeatures(0));
    let edid = GetEdid { hdr: CtrlHdr::new(kind::GET_EDID), scanout: 0.into(), padding: 0.into() };
    front.submit(0, edid.as_bytes());
    front.receive_until(&mut decoder, |message| *message == FromBackEnd::GetDisplayInfo);
    let mut info =
        RespDisplayInfo { hdr: CtrlHdr::new(kind::OK_DISPLAY_INFO), ..Default::default() };
    info.scanouts[0].rect = Rect::of_size(1111, 777).into();
    info.scanouts[0].enabled = 1.into();
    front.send(&FromFrontEnd::DisplayInfo(Box::new(info)));
    let answer: RespEdid = front.wait(0);
    assert_eq!(answer.hdr.kind.get(), kind::OK_EDID);
    let edid = answer.bytes();
    assert_eq!(u32::from(edid[56]) | u32::from(edid[58] >> 4) << 8, 1111);
    assert_eq!(u32::from(edid[59]) | u32::from(edid[61] >> 4) << 8, 777);
    assert_eq!(id::GET_EDID, 11);
}

#[test]
fn a_front_end_that_breaks_the_protocol_is_hung_up_on() {
    let mut front = FrontEnd::new(0);
    front.gpu.write_all(Header { request: 77, flags: 0, size: 9 }.as_bytes()).unwrap();
    let mut rest = Vec::new();
    front.gpu.read_to_end(&mut rest).unwrap();
    // The device goes on without it: the guest gets what was known before.
    front.submit(0, CtrlHdr::new(kind::GET_DISPLAY_INFO).as_bytes());
    let info: RespDisplayInfo = front.wait(0);
    assert_eq!(info.hdr.kind.get(), kind::OK_DISPLAY_INFO);
    front.screen(64, 64);
    front.paint(64, 64, 1);
}

#[test]
fn it_ends_with_its_front_end() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_drago-gpu"))
        .args(["--fd", "0"])
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    drop(ours);
    assert!(child.wait().unwrap().success());
}
