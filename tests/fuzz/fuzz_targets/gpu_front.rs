//! A hostile back end: messages that can be decoded, in any order and with any descriptor, against the
//! VMM's own state of the monitors, while viewers come and go.

#![no_main]

use std::{
    fs::File,
    io::Read,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::{Arc, Mutex},
};

use devices::virtio::gpu::{CursorImage, DisplayMode, DisplaySink, Frame, Rect, fuzz::FrontEnd};
use drago_fuzz::Input;
use gpu_protocol::{
    format::{BlobLayout, PixelFormat},
    frames,
    guest_frames::{GuestFrame, GuestMemory},
    host_memory::{Map, Unmap},
    pieces::Pieces,
    socket::{CursorPos, Decoder, DmabufScanout, FromBackEnd, ProtocolFeatures, Side},
    virtio::BackingEntry,
};
use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, SealFlags};
use vm_memory::{GuestAddress, GuestMemoryMmap};

const SCANOUTS: u32 = 2;
const HOST_MEMORY: u64 = 1 << 20;
/// One input may do this much.
const MOST_OPERATIONS: usize = 256;
/// Frames that a viewer holds for longer than it should.
const MOST_HELD: usize = 8;
const CURSOR_BYTES: usize = 64 * 64 * 4;
static PIXELS: [u8; 64 * 64 * 4] = [0x5a; 64 * 64 * 4];

#[derive(Default)]
struct Seen {
    sizes: [Option<(u32, u32)>; SCANOUTS as usize],
    held: Vec<Frame>,
}

/// Believes what it is told, and says so where that does not fit together.
#[derive(Default)]
struct Viewer(Mutex<Seen>);

impl DisplaySink for Viewer {
    fn scanout(&self, id: u32, size: Option<(u32, u32)>) {
        assert_ne!(size.map(|(width, height)| u64::from(width) * u64::from(height)), Some(0));
        self.0.lock().unwrap().sizes[id as usize] = size;
    }

    fn frame(&self, id: u32, frame: Frame, damage: &[Rect]) {
        let mut seen = self.0.lock().unwrap();
        let (width, height) = (frame.width(), frame.height());
        assert_eq!(seen.sizes[id as usize], Some((width, height)), "a frame of another size");
        for rect in damage {
            assert!(!rect.is_empty() && rect.fits(width, height), "{rect:?} of {width}x{height}");
            // As much of it as keeps this quick.
            let part = Rect::new(rect.x, rect.y, rect.width.min(64), rect.height.min(8));
            let stride = part.width as usize * 4;
            let mut copy = vec![0; stride * part.height as usize];
            frame.copy_rect(part, &mut copy, stride).expect("damage can be read");
        }
        assert!(frame.copy_rect(Rect::new(width, 0, 1, 1), &mut [0; 4], 4).is_err());
        let corner = Rect::new(width - 1, height - 1, 1, 1);
        frame.copy_rect(corner, &mut [0; 4], 4).expect("so can the last pixel");
        if seen.held.len() < MOST_HELD {
            seen.held.push(frame);
        }
    }

    fn cursor_define(&self, id: u32, image: &CursorImage<'_>) {
        assert!(id < SCANOUTS && image.pixels.len() == CURSOR_BYTES);
    }

    fn cursor_move(&self, id: u32, _: u32, _: u32) {
        assert!(id < SCANOUTS);
    }

    fn cursor_hide(&self, id: u32) {
        assert!(id < SCANOUTS);
    }
}

fn id(input: &mut Input<'_>) -> u32 {
    match input.u8() {
        0xff => input.number(),
        byte => u32::from(byte) % SCANOUTS,
    }
}

fn rect(input: &mut Input<'_>) -> Rect {
    Rect::new(input.number(), input.number(), input.number(), input.number())
}

fn memory(length: u64, seals: SealFlags) -> Option<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = rustix::fs::memfd_create("back-end", flags).ok()?;
    rustix::fs::ftruncate(&fd, length).ok()?;
    rustix::fs::fcntl_add_seals(&fd, seals).ok()?;
    Some(fd)
}

/// A descriptor as a back end might send it; `kept`: files that it may cut off later.
fn descriptor(input: &mut Input<'_>, kept: &mut Vec<OwnedFd>) -> Option<OwnedFd> {
    let length = u64::from(input.u8()) << 12;
    let fd = match input.u8() % 8 {
        0 => return None,
        1 => rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).ok()?,
        2 => File::open("/dev/null").ok()?.into(),
        3 => File::open("/proc/self/exe").ok()?.into(),
        4 => UnixStream::pair().ok()?.0.into(),
        5 => memory(length, SealFlags::empty())?,
        6 => memory(length, SealFlags::SHRINK | SealFlags::WRITE)?,
        _ => memory(length, SealFlags::SHRINK)?,
    };
    if kept.len() < 16 {
        kept.extend(fd.try_clone().ok());
    }
    Some(fd)
}

/// A message; `generations` of the scanouts' memory, as far as a back end can know them.
fn message<'a>(input: &mut Input<'_>, damage: &'a mut Vec<Rect>) -> FromBackEnd<'a> {
    let pos = |input: &mut Input<'_>| CursorPos {
        scanout: id(input),
        x: input.number(),
        y: input.number(),
    };
    match input.u8() % 32 {
        0 => FromBackEnd::GetProtocolFeatures,
        1 => FromBackEnd::SetProtocolFeatures(input.u64()),
        2 => FromBackEnd::SetProtocolFeatures(ProtocolFeatures::all().bits()),
        3 => FromBackEnd::SetProtocolFeatures(0),
        4 => FromBackEnd::GetDisplayInfo,
        5 => FromBackEnd::GetEdid { scanout: id(input) },
        6 => FromBackEnd::CursorPos(pos(input)),
        7 => FromBackEnd::CursorHide(pos(input)),
        8 => FromBackEnd::CursorUpdate {
            pos: pos(input),
            hot_x: input.number(),
            hot_y: input.number(),
            image: &PIXELS[..CURSOR_BYTES],
        },
        9..12 => FromBackEnd::Scanout {
            scanout: id(input),
            width: input.number(),
            height: input.number(),
        },
        12..15 => {
            let scanout = id(input);
            let mut rect = rect(input);
            (rect.width, rect.height) = (rect.width % 65, rect.height % 65);
            let pixels = &PIXELS[..rect.width as usize * rect.height as usize * 4];
            FromBackEnd::Update { scanout, rect, pixels }
        }
        15..17 => {
            let scanout = id(input);
            let rect = rect(input);
            let (fd_width, fd_height) = match input.u8() & 1 {
                0 => (rect.width.saturating_add(rect.x), rect.height.saturating_add(rect.y)),
                _ => (input.number(), input.number()),
            };
            let fd_stride = match input.u8() & 1 {
                0 => fd_width.saturating_mul(4),
                _ => input.number(),
            };
            let fd_drm_fourcc = match input.u8() {
                0xff => input.u32(),
                byte => u32::from_le_bytes(
                    [*b"XR24", *b"AR24", *b"XB24", *b"AB24"][usize::from(byte % 4)],
                ),
            };
            let fd_flags = input.u8().into();
            let modifier = match input.u8() % 4 {
                0 => None,
                1 => Some(input.u64()),
                _ => Some(0),
            };
            let scanout = DmabufScanout {
                scanout,
                rect,
                fd_width,
                fd_height,
                fd_stride,
                fd_flags,
                fd_drm_fourcc,
            };
            FromBackEnd::DmabufScanout { scanout, modifier }
        }
        17..19 => FromBackEnd::DmabufUpdate { scanout: id(input), rect: rect(input) },
        19..22 => {
            let (scanout, generation) = (id(input), input.number());
            let slot = u32::from(input.u8() % 4);
            let sequence = match input.u8() {
                0xff => input.u64(),
                0xfe => u64::MAX,
                byte => byte.into(),
            };
            damage.extend((0..=input.u8() % 4).map(|_| rect(input)));
            let damage = std::mem::take(damage);
            FromBackEnd::Frame(frames::Frame { scanout, generation, slot, sequence, damage })
        }
        22 => {
            let page = |input: &mut Input<'_>| match input.u8() {
                0xff => input.u64(),
                byte => u64::from(byte) << 12,
            };
            let (offset, length, file_offset) = (page(input), page(input), page(input));
            FromBackEnd::Map(Map { offset, length, file_offset, mapping: input.u8().into() })
        }
        23 => FromBackEnd::Unmap(Unmap {
            offset: u64::from(input.u8()) << 12,
            mapping: input.u8().into(),
        }),
        24..26 => {
            let resource = u32::from(input.u8() % 64);
            let piece = |input: &mut Input<'_>| {
                let address = match input.u8() {
                    0xff => input.u64(),
                    byte => u64::from(byte) << 9,
                };
                BackingEntry { address, length: input.number() }
            };
            let pieces = Pieces::new((0..input.u8() % 8).map(|_| piece(input)).collect());
            FromBackEnd::GuestMemory(GuestMemory { resource, pieces })
        }
        26 => match input.u8() % 65 {
            64 => FromBackEnd::DeviceReset,
            resource => FromBackEnd::ForgetMemory { resource: resource.into() },
        },
        _ => {
            let formats = PixelFormat::ALL;
            let format = formats[usize::from(input.u8()) % formats.len()];
            let layout = BlobLayout { format, stride: input.number(), offset: input.number() };
            damage.extend((0..=input.u8() % 4).map(|_| rect(input)));
            FromBackEnd::GuestFrame(GuestFrame {
                scanout: id(input),
                resource: u32::from(input.u8() % 64),
                part: rect(input),
                layout,
                sequence: input.u8().into(),
                damage: std::mem::take(damage),
            })
        }
    }
}

/// What the front end has sent goes by unread, or waits.
fn drain(peer: &mut UnixStream) {
    let mut buffer = [0; 4096];
    while peer.read(&mut buffer).is_ok_and(|count| count > 0) {}
}

fn connect(front: &mut FrontEnd) -> UnixStream {
    let (ours, mut peers) = UnixStream::pair().unwrap();
    peers.set_nonblocking(true).unwrap();
    front.connect(ours).unwrap();
    drain(&mut peers);
    peers
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let host_memory = if input.u8() & 1 == 0 { HOST_MEMORY } else { 0 };
    let mut front = FrontEnd::new(SCANOUTS, host_memory).unwrap();
    let ranges = [(GuestAddress(0), 0x8000), (GuestAddress(0x1_0000), 0x4000)];
    let guest: devices::GuestMemory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
    front.activate(guest.clone());
    let handle = front.handle();
    let viewer = Arc::new(Viewer::default());
    let mut peer = connect(&mut front);
    let mut kept = Vec::new();
    for _ in 0..MOST_OPERATIONS {
        if input.is_empty() {
            break;
        }
        match input.u8() {
            0..176 => {
                let mut damage = Vec::new();
                let message = message(&mut input, &mut damage);
                let fd = if message.wants_fd() { descriptor(&mut input, &mut kept) } else { None };
                let mut wire = Vec::new();
                message.encode(&mut wire);
                let mut decoder = Decoder::new(Side::FrontEnd);
                decoder.push(&wire);
                let Ok(Some(raw)) = decoder.next_message() else { continue };
                let Ok(message) = FromBackEnd::decode(&raw) else { continue };
                if front.listens() {
                    front.receive(message, fd);
                }
            }
            176..184 => handle.want_frames(id(&mut input), input.u8().into()),
            184..188 => handle.want_frames_one_by_one(id(&mut input), input.u8().into()),
            188..192 => handle.want_next_frame(id(&mut input)),
            192..200 => {
                handle.set_sink(viewer.clone());
                // It is told everything that there is at present.
                viewer.0.lock().unwrap().sizes = Default::default();
            }
            200..216 => {
                // Frames are given back without a lock, in any order.
                let mut seen = viewer.0.lock().unwrap();
                let held = std::mem::take(&mut seen.held);
                drop(seen);
                drop(held);
            }
            216..224 => {
                for fd in &kept {
                    let _ = rustix::fs::ftruncate(fd.as_fd(), 0);
                }
            }
            224..232 => drain(&mut peer),
            232..234 => front.reset(),
            234..236 => front.activate(guest.clone()),
            236..240 => {
                let mode = DisplayMode::new(input.number(), input.number());
                let plugged = input.u8() & 3 != 0;
                handle.set_display(id(&mut input), plugged.then_some(mode));
            }
            240..246 => {
                front.disconnect();
                assert!(!handle.is_alive());
            }
            246..252 => {
                front.disconnect();
                peer = connect(&mut front);
            }
            _ => front.flush(),
        }
        front.tell();
    }
    // A back end that reads is listened to again.
    for _ in 0..64 {
        drain(&mut peer);
        front.flush();
    }
    assert!(front.listens());
    // Nobody reads what the driver has taken back.
    front.reset();
    for frame in &viewer.0.lock().unwrap().held {
        let _ = frame.copy_rect(Rect::new(0, 0, 1, 1), &mut [0; 4], 4);
    }
    drop(guest);
    // Whatever happened: the next back end's picture is seen.
    front.disconnect();
    let _peer = connect(&mut front);
    handle.set_sink(viewer.clone());
    viewer.0.lock().unwrap().sizes = Default::default();
    handle.want_frames(0, 60);
    front.receive(FromBackEnd::SetProtocolFeatures(0), None);
    front.receive(FromBackEnd::Scanout { scanout: 0, width: 8, height: 8 }, None);
    let rect = Rect::new(0, 0, 8, 8);
    viewer.0.lock().unwrap().held.clear();
    front.receive(FromBackEnd::Update { scanout: 0, rect, pixels: &PIXELS[..256] }, None);
    let seen = viewer.0.lock().unwrap();
    assert_eq!(seen.sizes[0], Some((8, 8)));
    let mut pixel = [0; 4];
    seen.held.last().expect("a frame").copy_rect(Rect::new(7, 7, 1, 1), &mut pixel, 4).unwrap();
    assert_eq!(pixel, PIXELS[..4]);
});
