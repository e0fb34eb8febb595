//! Lets Mesa's `virpipe` driver draw through our device, without a virtual machine: speaks the vtest
//! protocol (virglrenderer's `vtest_protocol.h`, version 2) on one side and is a guest's driver with
//! queues and memory on the other.
//!
//! ```text
//!  LIBGL_ALWAYS_SOFTWARE=1 GALLIUM_DRIVER=virpipe glmark2-es2 ──/tmp/.virgl_test── bridge ──queues── drago-gpu
//! ```
//!
//! Usage: `vtest-bridge [SOCKET [--screen WIDTHxHEIGHT@FPS] [DRAGO-GPU ARGUMENTS…]]`. With a screen, the
//! last picture of that size that a client made is on it and flushed after every command, and a viewer
//! takes up to so many frames a second of it (0: nobody looks).
//!
//! When a client has gone, the bridge says what the device did, as JSON. Each client gets a device of its own, as it gets a
//! process of its own from `virgl_test_server`: Mesa's clients open more than one connection.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test program")]

#[path = "../tests/support/mod.rs"]
mod support;

use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use gpu_protocol::{
    Rect,
    format::PixelFormat,
    frames::{Frame, Release, ShmScanout, WANT_FULL, Want},
    socket::{Decoder, FromBackEnd, FromFrontEnd, ProtocolFeatures, Side},
    virtio::{
        Create3d, CtrlHdr, GetCapset, GetCapsetInfo, ResourceFlush, RespCapsetInfo, Transfer3d,
        kind,
    },
};
use host::socket_io;
use rustix::fs::{MemfdFlags, SealFlags};
use support::{
    DATA, DATA_END, FrontEnd, Ticket,
    three_d::{fenced, transfer_command},
};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, MmapRegion, VolatileMemory, VolatileSlice,
};
use zerocopy::IntoBytes;

const DEFAULT_SOCKET: &str = "/tmp/.virgl_test";
const CONTEXT: u32 = 1;

/// `capability_bits` in `virgl_caps_v2`.
const CAPABILITY_BITS: std::ops::Range<usize> = 392..396;
/// `VIRGL_CAP_ARB_BUFFER_STORAGE`, in the highest byte of them.
const BUFFER_STORAGE: u8 = 1 << 7;

/// Commands of the protocol.
mod vcmd {
    pub(super) const GET_CAPS: u32 = 1;
    pub(super) const RESOURCE_CREATE: u32 = 2;
    pub(super) const RESOURCE_UNREF: u32 = 3;
    pub(super) const TRANSFER_GET: u32 = 4;
    pub(super) const TRANSFER_PUT: u32 = 5;
    pub(super) const SUBMIT_CMD: u32 = 6;
    pub(super) const RESOURCE_BUSY_WAIT: u32 = 7;
    pub(super) const CREATE_RENDERER: u32 = 8;
    pub(super) const GET_CAPS2: u32 = 9;
    pub(super) const PING_PROTOCOL_VERSION: u32 = 10;
    pub(super) const PROTOCOL_VERSION: u32 = 11;
    pub(super) const RESOURCE_CREATE2: u32 = 12;
    pub(super) const TRANSFER_GET2: u32 = 13;
    pub(super) const TRANSFER_PUT2: u32 = 14;
}

/// Guest memory for backing.
struct Heap {
    /// Start and length of what is free.
    free: BTreeMap<u64, u64>,
    /// Free as soon as the command is done.
    leaving: Vec<(Ticket, u64, u64)>,
}

impl Heap {
    fn new() -> Self {
        Self { free: BTreeMap::from([(DATA, DATA_END - DATA)]), leaving: Vec::new() }
    }

    fn allocate(&mut self, front: &mut FrontEnd, size: u64) -> u64 {
        let size = size.next_multiple_of(4096);
        loop {
            let (done, leaving) =
                self.leaving.drain(..).partition(|(ticket, ..)| front.is_over(0, *ticket));
            self.leaving = leaving;
            let done: Vec<(Ticket, u64, u64)> = done;
            done.into_iter().for_each(|(_, start, length)| self.release(start, length));
            let found = self.free.iter().find(|(_, length)| **length >= size);
            if let Some((start, length)) = found.map(|(start, length)| (*start, *length)) {
                self.free.remove(&start);
                if length > size {
                    self.free.insert(start + size, length - size);
                }
                return start;
            }
            let (ticket, ..) = *self.leaving.first().expect("guest memory is full");
            front.finish(0, ticket);
        }
    }

    fn release(&mut self, mut start: u64, mut length: u64) {
        length = length.next_multiple_of(4096);
        if let Some(next) = self.free.remove(&(start + length)) {
            length += next;
        }
        if let Some((before, size)) = self.free.range(..start).next_back().map(|(a, b)| (*a, *b))
            && before + size == start
        {
            start = before;
            length += size;
        }
        self.free.insert(start, length);
    }
}

/// virgl's commands that move memory of resources, inside what is submitted.
mod ccmd {
    pub(super) const TRANSFER3D: u32 = 43;
    pub(super) const COPY_TRANSFER3D: u32 = 45;
    pub(super) const FROM_HOST: u32 = 2;
}

/// A piece of a resource's memory that a submitted command reads or writes.
struct Moved {
    resource: u32,
    offset: u64,
    length: u64,
    from_host: bool,
}

/// Finds such pieces. The client writes to memory of its own where a guest would write to the
/// guest's.
fn moved(words: &[u32], is_buffer: impl Fn(u32) -> bool) -> Vec<Moved> {
    let mut found = Vec::new();
    let mut rest = words;
    while let Some((header, body)) = rest.split_first() {
        let length = (header >> 16) as usize;
        let Some((body, later)) = body.split_at_checked(length) else { break };
        rest = later;
        let (resource, offset, from_host) = match (header & 0xff, body) {
            (ccmd::TRANSFER3D, [resource, .., offset, direction]) if length == 13 => {
                (*resource, *offset, *direction == ccmd::FROM_HOST)
            }
            (ccmd::COPY_TRANSFER3D, [.., staging, offset, flags]) if length == 14 => {
                (*staging, *offset, flags & ccmd::FROM_HOST != 0)
            }
            _ => continue,
        };
        let [stride, layer] = [body[3], body[4]].map(u64::from);
        let [width, height, depth] = [body[8], body[9], body[10]].map(u64::from);
        let plain = height <= 1 && depth <= 1;
        let length = match (is_buffer(body[0]), plain || stride > 0) {
            (true, _) => width,
            // No pixel is longer than 16 bytes.
            (false, true) => {
                layer * depth.saturating_sub(1) + stride * height.saturating_sub(1) + width * 16
            }
            (false, false) => u64::MAX,
        };
        found.push(Moved { resource, offset: offset.into(), length, from_host });
    }
    found
}

struct Resource {
    buffer: bool,
    address: u64,
    size: u64,
    /// What the client sees; absent where it sends pixels through the socket.
    shared: Option<MmapRegion>,
    /// The last command that uses the backing.
    transfer: Option<Ticket>,
}

/// One client.
struct Session<'a> {
    socket: UnixStream,
    front: &'a mut FrontEnd,
    heap: Heap,
    resources: HashMap<u32, Resource>,
    context: bool,
    fence: u64,
    submitted: Option<Ticket>,
    commands: Vec<u32>,
    /// Size of what is on screen, and what is.
    screen: Option<(u32, u32)>,
    shown: Option<u32>,
}

/// Looks at the screen, on a thread of its own: takes each frame out of its slot.
fn view(socket: &UnixStream, max_fps: u32, frames: &AtomicU64) {
    let mut decoder = Decoder::new(Side::FrontEnd);
    let mut bytes = vec![0; 64 * 1024];
    let mut memory: Option<(ShmScanout, MmapRegion)> = None;
    let mut seen = Vec::new();
    let send = |message: FromFrontEnd, fds: &[BorrowedFd<'_>]| {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        socket_io::send_all(socket, &bytes, fds)
    };
    while let Ok(count @ 1..) = { socket }.read(&mut bytes) {
        decoder.push(&bytes[..count]);
        while let Some(raw) = decoder.next_message().unwrap() {
            let _ = match FromBackEnd::decode(&raw).unwrap() {
                FromBackEnd::GetProtocolFeatures => {
                    let features = ProtocolFeatures::SHM_FRAMES | ProtocolFeatures::EDID;
                    send(FromFrontEnd::ProtocolFeatures(features.bits()), &[])
                }
                FromBackEnd::Scanout { scanout: 0, width: width @ 1.., height } => {
                    let layout = ShmScanout::layout(0, 1, width, height, 3).unwrap();
                    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
                    let file = File::from(rustix::fs::memfd_create("frames", flags).unwrap());
                    let length = layout.checked_size().unwrap();
                    file.set_len(length).unwrap();
                    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
                    let region = FileOffset::new(file.try_clone().unwrap(), 0);
                    let region = MmapRegion::from_file(region, length as usize).unwrap();
                    send(FromFrontEnd::ShmScanout(layout), &[file.as_fd()]).unwrap();
                    memory = Some((layout, region));
                    let want = Want { scanout: 0, max_fps, flags: WANT_FULL, reserved: 0 };
                    send(FromFrontEnd::Want(want), &[])
                }
                FromBackEnd::Frame(frame) => {
                    let Some((layout, region)) = &memory else { continue };
                    seen.resize(layout.slot_size as usize, 0);
                    let at = frame.slot as usize * layout.slot_size as usize;
                    region.as_volatile_slice().read_slice(&mut seen, at).unwrap();
                    frames.fetch_add(1, Ordering::Relaxed);
                    let Frame { scanout, generation, slot, .. } = frame;
                    send(
                        FromFrontEnd::Release(Release { scanout, generation, slot, reserved: 0 }),
                        &[],
                    )
                }
                _ => Ok(()),
            };
        }
    }
}

/// User and system time of a process so far, in seconds.
fn cpu_seconds(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    let ticks: f64 = fields.skip(11).take(2).filter_map(|field| field.parse::<f64>().ok()).sum();
    // USER_HZ, proc_pid_stat(5).
    ticks / 100.0
}

impl Session<'_> {
    fn words<const N: usize>(&mut self) -> io::Result<[u32; N]> {
        let mut words = [0; N];
        self.socket.read_exact(words.as_mut_bytes())?;
        Ok(words)
    }

    fn reply(&mut self, words: &[u32]) -> io::Result<()> {
        self.socket.write_all(words.as_bytes())
    }

    fn serve(&mut self) -> io::Result<()> {
        loop {
            let [length, number] = self.words()?;
            self.command(length, number)?;
        }
    }

    fn command(&mut self, length: u32, number: u32) -> io::Result<()> {
        match number {
            vcmd::CREATE_RENDERER => {
                let mut name = vec![0; length as usize];
                self.socket.read_exact(&mut name)
            }
            vcmd::PING_PROTOCOL_VERSION => self.reply(&[0, number]),
            vcmd::PROTOCOL_VERSION => {
                let [version] = self.words()?;
                self.reply(&[1, number, version.min(2)])
            }
            vcmd::GET_CAPS => self.caps(1, 1),
            vcmd::GET_CAPS2 => self.caps(2, 2),
            vcmd::RESOURCE_CREATE | vcmd::RESOURCE_CREATE2 => self.create(number),
            vcmd::RESOURCE_UNREF => self.unref(),
            vcmd::TRANSFER_GET | vcmd::TRANSFER_PUT => self.transfer_inline(number),
            vcmd::TRANSFER_GET2 | vcmd::TRANSFER_PUT2 => self.transfer_shared(number),
            vcmd::SUBMIT_CMD => self.submit(length),
            vcmd::RESOURCE_BUSY_WAIT => {
                let [_, flags] = self.words()?;
                let mut busy = false;
                if let Some(ticket) = self.submitted {
                    if flags & 1 != 0 {
                        self.front.finish(0, ticket);
                    }
                    busy = !self.front.is_over(0, ticket);
                }
                self.reply(&[1, number, busy.into()])
            }
            other => Err(io::Error::other(format!("vtest command {other} is not known"))),
        }
    }

    fn caps(&mut self, set: u32, answer: u32) -> io::Result<()> {
        let hdr = CtrlHdr::new(kind::GET_CAPSET_INFO);
        let info = GetCapsetInfo { hdr, index: (set - 1).into(), padding: 0.into() };
        self.front.submit(0, info.as_bytes());
        let info: RespCapsetInfo = self.front.wait(0);
        let get = GetCapset {
            hdr: CtrlHdr::new(kind::GET_CAPSET),
            capset_id: info.capset_id,
            capset_version: info.max_version,
        };
        let slot = self.front.submit(0, get.as_bytes());
        let length = info.max_size.get() as usize;
        let mut bytes = self.front.wait_for_bytes(0, slot, 24 + length);
        // Newer Mesa would want to share the host's memory, for which a guest's needs a window.
        if let Some(bits) = bytes.get_mut(24..).and_then(|set| set.get_mut(CAPABILITY_BITS)) {
            bits[3] &= !BUFFER_STORAGE;
        }
        self.reply(&[length as u32 + 1, answer])?;
        self.socket.write_all(&bytes[24..])
    }

    fn ensure_context(&mut self) {
        if !self.context {
            assert_eq!(self.front.create_context(CONTEXT, 2), kind::OK_NODATA);
            self.context = true;
        }
    }

    fn create(&mut self, number: u32) -> io::Result<()> {
        self.ensure_context();
        let [id, target, format, bind, width, height, depth, array_size, last_level, nr_samples] =
            self.words()?;
        let create = Create3d {
            target,
            format,
            bind,
            width,
            height,
            depth,
            array_size,
            last_level,
            nr_samples,
            flags: 0,
        };
        let answer = self.front.try_create_3d(id, &create);
        if answer != kind::OK_NODATA {
            return Err(io::Error::other(format!("{create:?} was answered with {answer:#x}")));
        }
        let mut resource =
            Resource { buffer: target == 0, address: 0, size: 0, shared: None, transfer: None };
        if number == vcmd::RESOURCE_CREATE2 {
            let [size] = self.words()?;
            resource.size = size.into();
            if size > 0 {
                let file = rustix::fs::memfd_create("vtest", MemfdFlags::CLOEXEC)?;
                let file = File::from(file);
                file.set_len(size.into())?;
                socket_io::send_all(&self.socket, &[0], &[file.as_fd()])?;
                let region = MmapRegion::from_file(FileOffset::new(file, 0), size as usize);
                resource.shared = Some(region.map_err(io::Error::other)?);
            }
        }
        self.front.use_in(CONTEXT, id);
        self.resources.insert(id, resource);
        let is_picture = PixelFormat::from_wire(format).is_some() && target == 2;
        if let Some(size) = self.screen.filter(|size| *size == (width, height) && is_picture) {
            self.front.show(0, id, Rect::of_size(size.0, size.1));
            self.shown = Some(id);
        }
        if self.resources[&id].size > 0 {
            self.back(id);
        }
        Ok(())
    }

    /// Gives a resource its backing.
    fn back(&mut self, id: u32) {
        let resource = self.resources.get_mut(&id).unwrap();
        resource.address = self.heap.allocate(self.front, resource.size);
        self.front.attach(id, resource.address, resource.size as u32);
    }

    fn unref(&mut self) -> io::Result<()> {
        let [id] = self.words()?;
        if let Some(resource) = self.resources.remove(&id) {
            self.forget(id, &resource);
        }
        Ok(())
    }

    fn forget(&mut self, id: u32, resource: &Resource) {
        if self.shown == Some(id) {
            self.shown = None;
        }
        let command = gpu_protocol::virtio::ResourceCommand {
            hdr: CtrlHdr::new(kind::RESOURCE_UNREF),
            resource_id: id.into(),
            padding: 0.into(),
        };
        self.front.submit(0, command.as_bytes());
        if resource.size > 0 {
            let ticket = self.front.ticket(0);
            self.heap.leaving.push((ticket, resource.address, resource.size));
        }
    }

    fn guest(&self, address: u64, length: u64) -> VolatileSlice<'_> {
        self.front.memory.get_slice(GuestAddress(address), length as usize).unwrap()
    }

    /// Version 2: the pixels are in memory that the client shares with us.
    fn transfer_shared(&mut self, number: u32) -> io::Result<()> {
        let [id, level, x, y, z, width, height, depth, size, offset] = self.words()?;
        let (size, offset) = (u64::from(size), u64::from(offset));
        let transfer =
            Transfer3d { x, y, z, width, height, depth, offset, level, stride: 0, layer_stride: 0 };
        let unknown = || io::Error::other("transfer of an unknown resource");
        let resource = self.resources.get(&id).ok_or_else(unknown)?;
        let size = size.min(resource.size.saturating_sub(offset));
        let address = resource.address + offset;
        if let Some(ticket) = resource.transfer {
            self.front.finish(0, ticket);
        }
        let resource = self.resources.get(&id).ok_or_else(unknown)?;
        let shared = resource.shared.as_ref().ok_or_else(unknown)?;
        let client = shared.get_slice(offset as usize, size as usize).map_err(io::Error::other)?;
        if number == vcmd::TRANSFER_PUT2 {
            client.copy_to_volatile_slice(self.guest(address, size));
            let hdr = CtrlHdr { ctx_id: CONTEXT.into(), ..CtrlHdr::new(kind::TRANSFER_TO_HOST_3D) };
            self.front.submit(0, transfer_command(hdr, id, &transfer).as_bytes());
            let ticket = self.front.ticket(0);
            self.resources.get_mut(&id).ok_or_else(unknown)?.transfer = Some(ticket);
        } else {
            self.front.transfer(kind::TRANSFER_FROM_HOST_3D, CONTEXT, id, &transfer);
            self.guest(address, size).copy_to_volatile_slice(client);
        }
        Ok(())
    }

    /// Version 0: the pixels come through the socket.
    fn transfer_inline(&mut self, number: u32) -> io::Result<()> {
        let [id, level, stride, layer_stride, x, y, z, width, height, depth, size] =
            self.words()?;
        let transfer =
            Transfer3d { x, y, z, width, height, depth, offset: 0, level, stride, layer_stride };
        let resource = self.resources.get_mut(&id).ok_or(io::ErrorKind::InvalidData)?;
        if resource.size < u64::from(size) {
            if resource.size > 0 {
                self.front.about_resource(kind::RESOURCE_DETACH_BACKING, 0, id);
                self.heap.release(resource.address, resource.size);
            }
            resource.size = size.into();
            self.back(id);
        }
        let address = GuestAddress(self.resources[&id].address);
        let mut pixels = vec![0; size as usize];
        if number == vcmd::TRANSFER_PUT {
            self.socket.read_exact(&mut pixels)?;
            self.socket
                .read_exact(&mut vec![0; size.next_multiple_of(4) as usize - pixels.len()])?;
            self.front.memory.write_slice(&pixels, address).map_err(io::Error::other)?;
            self.front.transfer(kind::TRANSFER_TO_HOST_3D, CONTEXT, id, &transfer);
            return Ok(());
        }
        self.front.transfer(kind::TRANSFER_FROM_HOST_3D, CONTEXT, id, &transfer);
        self.front.memory.read_slice(&mut pixels, address).map_err(io::Error::other)?;
        self.socket.write_all(&pixels)
    }

    fn submit(&mut self, length: u32) -> io::Result<()> {
        self.ensure_context();
        self.commands.resize(length as usize, 0);
        self.socket.read_exact(self.commands.as_mut_bytes())?;
        let is_buffer = |id: u32| self.resources.get(&id).is_some_and(|resource| resource.buffer);
        let moved = moved(&self.commands, is_buffer);
        for piece in &moved {
            self.copy(piece, false);
        }
        self.fence += 1;
        let hdr = fenced(kind::SUBMIT_3D, CONTEXT, self.fence, None);
        self.front.submit_3d(hdr, &self.commands);
        let ticket = self.front.ticket(0);
        self.submitted = Some(ticket);
        if moved.iter().any(|piece| piece.from_host) {
            self.front.finish(0, ticket);
            moved.iter().filter(|piece| piece.from_host).for_each(|piece| self.copy(piece, true));
        }
        if let (Some(id), Some(size)) = (self.shown, self.screen) {
            let flush = ResourceFlush {
                hdr: CtrlHdr::new(kind::RESOURCE_FLUSH),
                rect: Rect::of_size(size.0, size.1).into(),
                resource_id: id.into(),
                padding: 0.into(),
            };
            self.front.submit(0, flush.as_bytes());
        }
        Ok(())
    }

    /// Makes the client's memory and the guest's the same.
    fn copy(&self, piece: &Moved, to_client: bool) {
        let Some(resource) = self.resources.get(&piece.resource) else { return };
        let Some(shared) = &resource.shared else { return };
        let length = piece.length.min(resource.size.saturating_sub(piece.offset));
        let Ok(client) = shared.get_slice(piece.offset as usize, length as usize) else { return };
        let guest = self.guest(resource.address + piece.offset, length);
        match to_client {
            true => guest.copy_to_volatile_slice(client),
            false => client.copy_to_volatile_slice(guest),
        }
    }
}

/// What clients get.
struct Options {
    program: PathBuf,
    arguments: Vec<String>,
    /// Width, height, frames a second.
    screen: Option<(u32, u32, u32)>,
}

fn main() {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    let socket = match arguments.is_empty() {
        true => DEFAULT_SOCKET.to_owned(),
        false => arguments.remove(0),
    };
    let mut screen = None;
    if arguments.first().is_some_and(|first| first == "--screen") {
        let numbers = arguments[1].split(['x', '@']).map(|number| number.parse().unwrap());
        let numbers: Vec<u32> = numbers.collect();
        screen = Some((numbers[0], numbers[1], numbers[2]));
        arguments.drain(..2);
    }
    if arguments.is_empty() {
        arguments = ["--renderer", "virgl"].map(str::to_owned).to_vec();
    }
    let own = std::env::current_exe().unwrap();
    let program = own.parent().and_then(Path::parent).unwrap().join("drago-gpu");
    let options = Arc::new(Options { program, arguments, screen });
    let _ = std::fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket).unwrap();
    eprintln!("listening at {socket}");
    loop {
        let (client, _) = listener.accept().unwrap();
        let options = options.clone();
        thread::spawn(move || serve(client, &options));
    }
}

fn serve(client: UnixStream, options: &Options) {
    let arguments: Vec<&str> = options.arguments.iter().map(String::as_str).collect();
    let mut front = FrontEnd::spawn(&options.program, &arguments, 0);
    // Anew, with notifications as sparse as Linux has them.
    front.vhost_stop();
    front.event_idx = true;
    front.start(front.features);
    let frames = Arc::new(AtomicU64::new(0));
    if let Some((_, _, max_fps)) = options.screen {
        let (socket, frames) = (front.gpu.try_clone().unwrap(), frames.clone());
        thread::spawn(move || view(&socket, max_fps, &frames));
    }
    let before = cpu_seconds(front.child.id());
    let mut session = Session {
        socket: client,
        front: &mut front,
        heap: Heap::new(),
        resources: HashMap::new(),
        context: false,
        fence: 0,
        submitted: None,
        commands: Vec::new(),
        screen: options.screen.map(|(width, height, _)| (width, height)),
        shown: None,
    };
    let error = session.serve().unwrap_err();
    if error.kind() != io::ErrorKind::UnexpectedEof {
        eprintln!("{error}");
    }
    for (id, resource) in std::mem::take(&mut session.resources) {
        session.forget(id, &resource);
    }
    if session.context {
        session.front.destroy_context(CONTEXT);
    }
    let cpu = cpu_seconds(front.child.id()) - before;
    let (refused, frames) = (front.refused, frames.load(Ordering::Relaxed));
    println!(r#"{{"refused": {refused}, "frames": {frames}, "cpu_seconds": {cpu}}}"#);
}
