//! The whole way from commands in virtqueues to pictures in a sink, through real back end
//! processes: `drago-gpu` with and without shared frames, and QEMU's own `vhost-user-gpu`.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Condvar, Mutex, OnceLock},
    time::{Duration, Instant},
};

use gpu_protocol::{
    format::PixelFormat,
    virtio::{
        AttachBacking, ContextCreate, CtrlHdr, CursorPos, Features, GetEdid, MemEntry,
        ResourceCommand, ResourceCreate2d, ResourceFlush, RespDisplayInfo, RespEdid, SetScanout,
        Submit3d, TransferToHost2d, UpdateCursor, kind,
    },
};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{config, device::VirtioGpu, *};
use crate::{
    GuestMemory,
    spec::Spec,
    virtio::{
        device::VirtioDevice,
        testing::{Driver, MEMORY_SIZE, Part},
    },
};

const PATIENCE: Duration = Duration::from_secs(20);
/// Guest physical address of the second region, where the pixels of the tests are.
const HIGH: u64 = 5 << 30;
const HIGH_SIZE: usize = 64 << 20;
const QEMU: &str = "/usr/lib/qemu/vhost-user-gpu";

/// Guest memory whose regions lie neither at their guest addresses nor at the start of the file.
fn memory() -> GuestMemory {
    const LOW_AT: u64 = 0x30_0000;
    const HIGH_AT: u64 = 0x10_0000 + LOW_AT + MEMORY_SIZE as u64;
    let fd = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = std::fs::File::from(fd);
    file.set_len(HIGH_AT + HIGH_SIZE as u64).unwrap();
    let again = file.try_clone().unwrap();
    GuestMemoryMmap::from_ranges_with_files([
        (GuestAddress(0), MEMORY_SIZE, Some(FileOffset::new(file, LOW_AT))),
        (GuestAddress(HIGH), HIGH_SIZE, Some(FileOffset::new(again, HIGH_AT))),
    ])
    .unwrap()
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct CursorSeen {
    hot: (u32, u32),
    pixels: Vec<u8>,
}

#[derive(Default)]
struct Seen {
    size: Option<(u32, u32)>,
    /// Put together from nothing but the damaged parts of frames.
    picture: Vec<u8>,
    frames: u64,
    sequences: Vec<u64>,
    damage: Vec<Vec<Rect>>,
    keep: bool,
    kept: Vec<Frame>,
    cursor: Option<CursorSeen>,
    cursor_pos: (u32, u32),
    scanouts: u32,
    /// How often the sink heard of a death, and of a successor.
    deaths: u32,
    successors: u32,
}

#[derive(Default)]
struct Sink {
    seen: Mutex<Seen>,
    changed: Condvar,
}

impl Sink {
    fn change(&self, f: impl FnOnce(&mut Seen)) {
        f(&mut self.seen.lock().unwrap());
        self.changed.notify_all();
    }

    fn wait<T>(&self, what: &str, mut f: impl FnMut(&mut Seen) -> Option<T>) -> T {
        let until = Instant::now() + PATIENCE;
        let mut seen = self.seen.lock().unwrap();
        loop {
            if let Some(value) = f(&mut seen) {
                return value;
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let Seen { size, frames, damage, .. } = &*seen;
                panic!("never happened: {what} ({size:?}, {frames} frames, {damage:?})");
            }
            seen = self.changed.wait_timeout(seen, left).unwrap().0;
        }
    }
}

impl DisplaySink for Sink {
    fn scanout(&self, id: u32, size: Option<(u32, u32)>) {
        assert_eq!(id, 0);
        self.change(|seen| {
            seen.size = size;
            seen.scanouts += 1;
            let (width, height) = size.unwrap_or_default();
            seen.picture = vec![0xee; width as usize * height as usize * 4];
        });
    }

    fn frame(&self, id: u32, frame: Frame, damage: &[Rect]) {
        assert_eq!(id, 0);
        self.change(|seen| {
            let (width, height) = seen.size.expect("a frame without a scanout");
            assert_eq!((frame.width(), frame.height()), (width, height));
            assert!(!damage.is_empty());
            let stride = width as usize * 4;
            for rect in damage {
                let at = rect.y as usize * stride + rect.x as usize * 4;
                frame.copy_rect(*rect, &mut seen.picture[at..], stride).unwrap();
            }
            seen.frames += 1;
            seen.sequences.push(frame.sequence());
            seen.damage.push(damage.to_vec());
            if seen.keep {
                seen.kept.push(frame);
            }
        });
    }

    fn cursor_define(&self, _: u32, image: &CursorImage<'_>) {
        let hot = (image.hot_x, image.hot_y);
        let pixels = image.pixels.to_vec();
        self.change(|seen| seen.cursor = Some(CursorSeen { hot, pixels }));
    }

    fn cursor_move(&self, _: u32, x: u32, y: u32) {
        self.change(|seen| seen.cursor_pos = (x, y));
    }

    fn cursor_hide(&self, _: u32) {
        self.change(|seen| seen.cursor = None);
    }

    fn back_end(&self, alive: bool) {
        self.change(|seen| *if alive { &mut seen.successors } else { &mut seen.deaths } += 1);
    }
}

/// Builds `drago-gpu` once, where the device looks for it.
fn drago_gpu() {
    static BUILT: OnceLock<()> = OnceLock::new();
    BUILT.get_or_init(|| {
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(["build", "--quiet", "-p", "drago-gpu", "--bin", "drago-gpu"]);
        if !cfg!(debug_assertions) {
            cargo.arg("--release");
        }
        assert!(cargo.status().unwrap().success(), "drago-gpu could not be built");
    });
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum BackEnd {
    /// drago-gpu, frames in shared memory.
    Shared,
    /// drago-gpu, pixels through the socket.
    Plain,
    /// QEMU's.
    Qemu,
    /// rust-vmm's, which draws nothing in its mode `null`.
    Null,
}

const ALL: [BackEnd; 3] = [BackEnd::Shared, BackEnd::Plain, BackEnd::Qemu];

/// A process of the test's own, ended with it.
struct Peer(Child);

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Installed, or made by `cargo xtask`.
fn vhost_device_gpu() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let tools = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tools/bin");
    let mut programs = std::env::split_paths(&path).chain([tools]);
    programs.find_map(|dir| Some(dir.join("vhost-device-gpu")).filter(|program| program.is_file()))
}

/// A driver, a device, a back end and a viewer.
struct Rig {
    driver: Driver,
    device: VirtioGpu,
    handle: GpuHandle,
    sink: Arc<Sink>,
    _peer: Option<Peer>,
    _directory: tempfile::TempDir,
}

fn build(config: &GpuConfig) -> (VirtioGpu, GpuHandle) {
    super::device::build(config).unwrap_or_else(|error| panic!("{error}: {error:?}"))
}

impl Rig {
    /// `None` (and a word about it) if that back end is not installed.
    fn new(back_end: BackEnd) -> Option<Self> {
        Self::with(back_end, GpuConfig::default())
    }

    fn with(back_end: BackEnd, mut config: GpuConfig) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let mut peer = None;
        match back_end {
            BackEnd::Shared => drago_gpu(),
            BackEnd::Plain => {
                drago_gpu();
                config.shared_frames = false;
            }
            BackEnd::Qemu => {
                let path = directory.path().join("qemu");
                let child = Command::new(QEMU)
                    .arg("-s")
                    .arg(&path)
                    .stdin(Stdio::null())
                    .stderr(Stdio::null())
                    .spawn();
                let Ok(child) = child else {
                    println!("SKIPPED: {QEMU} is not installed (package qemu-system-gui)");
                    return None;
                };
                peer = Some(Peer(child));
                wait_for_socket(&path);
                config.socket = Some(path);
            }
            BackEnd::Null => {
                let Some(program) = vhost_device_gpu() else {
                    println!(
                        "SKIPPED: no vhost-device-gpu (cargo xtask test --suite slow makes it)"
                    );
                    return None;
                };
                let path = directory.path().join("null");
                let child = Command::new(program)
                    .args(["--gpu-mode", "null", "--socket-path"])
                    .arg(&path)
                    .stdin(Stdio::null())
                    .stderr(Stdio::null())
                    .spawn()
                    .unwrap();
                peer = Some(Peer(child));
                wait_for_socket(&path);
                config.socket = Some(path);
            }
        }
        let (mut device, handle) = build(&config);
        let sink = Arc::new(Sink::default());
        handle.set_sink(sink.clone());
        handle.want_frames(0, 1000);
        let features = device.features();
        let driver = Driver::start_with(&mut device, features, memory());
        Some(Self { driver, device, handle, sink, _peer: peer, _directory: directory })
    }

    fn command_raw(&mut self, command: &[u8], room: usize) -> Vec<u8> {
        self.driver.queues[0].send(&[Part::Out(command), Part::In(room as u32)]);
        self.driver.queues[0].wait_used().1
    }

    fn command(&mut self, command: &(impl IntoBytes + Immutable)) -> u32 {
        let answer = self.command_raw(command.as_bytes(), size_of::<CtrlHdr>());
        CtrlHdr::read_from_bytes(&answer).unwrap().kind.get()
    }

    fn ok(&mut self, command: &(impl IntoBytes + Immutable)) {
        assert_eq!(self.command(command), kind::OK_NODATA);
    }

    fn ok_raw(&mut self, command: &[u8]) {
        let answer = self.command_raw(command, size_of::<CtrlHdr>());
        assert_eq!(CtrlHdr::read_from_bytes(&answer).unwrap().kind.get(), kind::OK_NODATA);
    }

    fn create(&mut self, resource: &Resource) {
        self.ok_raw(&resource.create());
        self.ok_raw(&resource.attach());
    }

    /// The guest draws, into its own memory.
    fn draw(&self, resource: &Resource, rect: Rect, pixel: impl Fn(u32, u32) -> [u8; 4]) {
        let mut bytes = resource.read(&self.driver.memory);
        for y in rect.y..rect.y + rect.height {
            for x in rect.x..rect.x + rect.width {
                let at = (y * resource.width + x) as usize * 4;
                bytes[at..at + 4].copy_from_slice(&pixel(x, y));
            }
        }
        resource.write(&self.driver.memory, &bytes);
    }

    fn transfer(&mut self, resource: &Resource, rect: Rect) {
        self.ok_raw(&resource.transfer(rect));
    }

    fn flush(&mut self, resource: &Resource, rect: Rect) {
        self.ok_raw(&resource.flush(rect));
    }

    fn show(&mut self, resource: u32, rect: Rect) {
        self.ok(&show(resource, rect));
    }

    fn unref(&mut self, resource: u32) {
        self.ok_raw(&Resource::new(resource, 1, 1).unref());
    }

    /// Draws, uploads and flushes.
    fn paint(&mut self, resource: &Resource, rect: Rect, pixel: impl Fn(u32, u32) -> [u8; 4]) {
        self.draw(resource, rect, pixel);
        self.transfer(resource, rect);
        self.flush(resource, rect);
    }

    /// Waits until the viewer sees exactly what the guest has in `part` of the resource.
    fn expect_picture(&self, resource: &Resource, part: Rect, what: &str) {
        let bytes = resource.read(&self.driver.memory);
        let mut expected = Vec::new();
        for y in part.y..part.y + part.height {
            let at = (y * resource.width + part.x) as usize * 4;
            expected.extend_from_slice(&bytes[at..at + part.width as usize * 4]);
        }
        resource.format.to_bgrx(&mut expected);
        // The fourth byte means nothing.
        let same = |seen: &[u8]| {
            let mut pixels = seen.chunks_exact(4).zip(expected.chunks_exact(4));
            seen.len() == expected.len() && pixels.all(|(a, b)| a[..3] == b[..3])
        };
        self.sink.wait(what, |seen| {
            let size = seen.size == Some((part.width, part.height));
            (size && same(&seen.picture)).then_some(())
        });
    }

    fn cursor(&mut self, kind: u32, x: u32, y: u32, resource: u32, hot: (u32, u32)) -> u32 {
        let command = cursor(kind, x, y, resource, hot);
        let room = size_of::<CtrlHdr>() as u32;
        self.driver.queues[1].send(&[Part::Out(command.as_bytes()), Part::In(room)]);
        let (_, answer) = self.driver.queues[1].wait_used();
        // QEMU's back end gives cursor commands back without an answer, as drivers expect none.
        CtrlHdr::read_from_bytes(&answer).map_or(kind::OK_NODATA, |hdr| hdr.kind.get())
    }

    fn display_info(&mut self) -> RespDisplayInfo {
        let command = CtrlHdr::new(kind::GET_DISPLAY_INFO);
        let answer = self.command_raw(command.as_bytes(), size_of::<RespDisplayInfo>());
        RespDisplayInfo::read_from_bytes(&answer).unwrap()
    }

    fn edid(&mut self) -> Vec<u8> {
        let command =
            GetEdid { hdr: CtrlHdr::new(kind::GET_EDID), scanout: 0.into(), padding: 0.into() };
        let answer = self.command_raw(command.as_bytes(), size_of::<RespEdid>());
        let answer = RespEdid::read_from_bytes(&answer).unwrap();
        assert_eq!(answer.hdr.kind.get(), kind::OK_EDID);
        answer.bytes().to_vec()
    }

    fn config(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.device.read_config(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }
}

/// Waits until somebody listens at `path`: that the file is there is not enough.
fn wait_for_socket(path: &Path) {
    const LISTENING: &str = "00010000";
    let name = path.to_str().unwrap();
    let until = Instant::now() + PATIENCE;
    loop {
        let sockets = std::fs::read_to_string("/proc/net/unix").unwrap();
        let mut lines = sockets.lines();
        if lines.any(|line| line.ends_with(name) && line.contains(LISTENING)) {
            return;
        }
        assert!(Instant::now() < until, "no back end listens at {name}");
        std::thread::yield_now();
    }
}

fn show(resource: u32, rect: Rect) -> SetScanout {
    SetScanout {
        hdr: CtrlHdr::new(kind::SET_SCANOUT),
        rect: rect.into(),
        scanout_id: 0.into(),
        resource_id: resource.into(),
    }
}

fn cursor(kind: u32, x: u32, y: u32, resource: u32, hot: (u32, u32)) -> UpdateCursor {
    UpdateCursor {
        hdr: CtrlHdr::new(kind),
        pos: CursorPos { scanout_id: 0.into(), x: x.into(), y: y.into(), padding: 0.into() },
        resource_id: resource.into(),
        hot_x: hot.0.into(),
        hot_y: hot.1.into(),
        padding: 0.into(),
    }
}

/// A resource of the guest and where its pixels are.
#[derive(Debug, Clone, Copy)]
struct Resource {
    id: u32,
    format: PixelFormat,
    width: u32,
    height: u32,
    at: u64,
}

impl Resource {
    fn new(id: u32, width: u32, height: u32) -> Self {
        Self { id, format: PixelFormat::B8G8R8X8, width, height, at: u64::from(id) * (8 << 20) }
    }

    fn create(&self) -> Vec<u8> {
        let command = ResourceCreate2d {
            hdr: CtrlHdr::new(kind::RESOURCE_CREATE_2D),
            resource_id: self.id.into(),
            format: (self.format as u32).into(),
            width: self.width.into(),
            height: self.height.into(),
        };
        command.as_bytes().to_vec()
    }

    /// Pages in reverse order, the last one odd.
    fn attach(&self) -> Vec<u8> {
        let command = AttachBacking {
            hdr: CtrlHdr::new(kind::RESOURCE_ATTACH_BACKING),
            resource_id: self.id.into(),
            entries: (self.pages().len() as u32).into(),
        };
        let mut command = command.as_bytes().to_vec();
        for (address, length) in self.pages() {
            let entry =
                MemEntry { address: address.into(), length: length.into(), padding: 0.into() };
            command.extend_from_slice(entry.as_bytes());
        }
        command
    }

    fn transfer(&self, rect: Rect) -> Vec<u8> {
        let command = TransferToHost2d {
            hdr: CtrlHdr::new(kind::TRANSFER_TO_HOST_2D),
            rect: rect.into(),
            offset: (u64::from(rect.y * self.width + rect.x) * 4).into(),
            resource_id: self.id.into(),
            padding: 0.into(),
        };
        command.as_bytes().to_vec()
    }

    fn flush(&self, rect: Rect) -> Vec<u8> {
        let command = ResourceFlush {
            hdr: CtrlHdr::new(kind::RESOURCE_FLUSH),
            rect: rect.into(),
            resource_id: self.id.into(),
            padding: 0.into(),
        };
        command.as_bytes().to_vec()
    }

    fn unref(&self) -> Vec<u8> {
        let hdr = CtrlHdr::new(kind::RESOURCE_UNREF);
        let command = ResourceCommand { hdr, resource_id: self.id.into(), padding: 0.into() };
        command.as_bytes().to_vec()
    }

    fn whole(&self) -> Rect {
        Rect::of_size(self.width, self.height)
    }

    fn bytes(&self) -> u64 {
        u64::from(self.width) * u64::from(self.height) * 4
    }

    /// Pieces of guest memory: pages, the first of them last in memory.
    fn pages(&self) -> Vec<(u64, u32)> {
        let count = self.bytes().div_ceil(4096);
        (0..count)
            .map(|page| {
                let length = (self.bytes() - page * 4096).min(4096) as u32;
                (HIGH + self.at + (count - 1 - page) * 4096, length)
            })
            .collect()
    }

    fn read(&self, memory: &GuestMemory) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (address, length) in self.pages() {
            let mut page = vec![0; length as usize];
            memory.read_slice(&mut page, GuestAddress(address)).unwrap();
            bytes.extend(page);
        }
        bytes
    }

    fn write(&self, memory: &GuestMemory, mut bytes: &[u8]) {
        for (address, length) in self.pages() {
            let (now, later) = bytes.split_at(length as usize);
            memory.write_slice(now, GuestAddress(address)).unwrap();
            bytes = later;
        }
    }
}

/// Every pixel of every generation differs from its neighbours.
fn noise(seed: u32) -> impl Fn(u32, u32) -> [u8; 4] {
    move |x, y| {
        let n = (x.wrapping_mul(2_654_435_761) ^ y.wrapping_mul(40_503) ^ seed.wrapping_mul(97))
            .wrapping_mul(2_246_822_519);
        n.to_le_bytes()
    }
}

#[test]
fn the_first_picture_appears_bit_exact() {
    for back_end in ALL {
        println!("{back_end:?}");
        let Some(mut rig) = Rig::new(back_end) else { continue };
        let screen = Resource::new(1, 1280, 800);
        rig.create(&screen);
        rig.draw(&screen, screen.whole(), noise(1));
        rig.show(1, screen.whole());
        rig.transfer(&screen, screen.whole());
        rig.flush(&screen, screen.whole());
        rig.expect_picture(&screen, screen.whole(), "the first picture");
    }
}

#[test]
fn partial_damage_odd_sizes_and_formats() {
    for back_end in ALL {
        for format in PixelFormat::ALL {
            println!("{back_end:?} {format:?}");
            // QEMU's back end sends the pixels of other formats as they are, and those of a part
            // from the wrong place.
            if back_end == BackEnd::Qemu && format != PixelFormat::B8G8R8X8 {
                continue;
            }
            let Some(mut rig) = Rig::new(back_end) else { continue };
            let screen = Resource { format, ..Resource::new(1, 641, 479) };
            rig.create(&screen);
            let part = match back_end {
                BackEnd::Qemu | BackEnd::Null => screen.whole(),
                BackEnd::Shared | BackEnd::Plain => Rect::new(3, 5, 631, 471),
            };
            rig.show(1, part);
            rig.paint(&screen, screen.whole(), noise(1));
            rig.expect_picture(&screen, part, "the whole picture");
            let rects = [
                Rect::new(0, 0, 1, 1),
                Rect::new(2, 4, 2, 2),
                Rect::new(633, 475, 8, 4),
                Rect::new(100, 0, 7, 479),
                Rect::new(0, 77, 641, 3),
                Rect::new(5, 5, 300, 200),
            ];
            for (seed, rect) in rects.into_iter().enumerate() {
                rig.paint(&screen, rect, noise(seed as u32 + 2));
                rig.expect_picture(&screen, part, "the damaged part");
            }
            // Many flushes at once: whatever is merged on the way, the end is the same.
            for seed in 0..60 {
                let rect = Rect::new(seed * 9, seed * 7, 40, 30);
                rig.paint(&screen, rect, noise(seed + 100));
            }
            rig.expect_picture(&screen, part, "many small changes");
        }
    }
}

#[test]
fn resize_in_the_middle_of_a_frame() {
    for back_end in ALL {
        println!("{back_end:?}");
        let Some(mut rig) = Rig::new(back_end) else { continue };
        let sizes = [(800, 600), (1366, 768), (799, 601), (64, 48), (1280, 1024)];
        for (index, (width, height)) in sizes.into_iter().enumerate() {
            let screen = Resource::new(1 + (index as u32 % 2), width, height);
            rig.create(&screen);
            rig.show(screen.id, screen.whole());
            // The frames of this flush may still be under way when the next size comes.
            rig.paint(&screen, screen.whole(), noise(index as u32));
            if index % 2 == 0 {
                rig.expect_picture(&screen, screen.whole(), "a new size");
            }
            if index > 0 {
                rig.unref(2 - (index as u32 % 2));
            }
            rig.paint(&screen, screen.whole(), noise(index as u32 + 9));
            rig.expect_picture(&screen, screen.whole(), "a new size");
        }
        rig.show(0, Rect::default());
        rig.sink.wait("the scanout is off", |seen| seen.size.is_none().then_some(()));
    }
}

#[test]
fn page_flips_between_two_buffers() {
    for back_end in ALL {
        println!("{back_end:?}");
        let Some(mut rig) = Rig::new(back_end) else { continue };
        let buffers = [Resource::new(1, 320, 200), Resource::new(2, 320, 200)];
        buffers.iter().for_each(|buffer| rig.create(buffer));
        for flip in 0..20 {
            let buffer = &buffers[flip as usize % 2];
            rig.draw(buffer, buffer.whole(), noise(flip / 4));
            rig.transfer(buffer, buffer.whole());
            rig.show(buffer.id, buffer.whole());
            rig.flush(buffer, buffer.whole());
        }
        rig.expect_picture(&buffers[1], buffers[1].whole(), "the last buffer");
        let scanouts = rig.sink.seen.lock().unwrap().scanouts;
        assert!(scanouts <= 2, "a flip is no change of size: {scanouts}");
    }
}

#[test]
fn cursor_image_hot_spot_and_moves() {
    for back_end in ALL {
        println!("{back_end:?}");
        let Some(mut rig) = Rig::new(back_end) else { continue };
        let image = Resource { format: PixelFormat::B8G8R8A8, ..Resource::new(3, 64, 64) };
        rig.create(&image);
        // Upside down or mirrored would show.
        rig.draw(&image, image.whole(), |x, y| [x as u8, y as u8, (x * y) as u8, 255 - x as u8]);
        rig.transfer(&image, image.whole());
        let ok = rig.cursor(kind::UPDATE_CURSOR, 10, 20, 3, (5, 9));
        assert_eq!(ok, kind::OK_NODATA);
        let pixels = image.read(&rig.driver.memory);
        rig.sink.wait("the cursor's image", |seen| {
            (seen.cursor == Some(CursorSeen { hot: (5, 9), pixels: pixels.clone() })
                && seen.cursor_pos == (10, 20))
                .then_some(())
        });
        for step in 0..200 {
            rig.cursor(kind::MOVE_CURSOR, step * 3, step * 2, 3, (5, 9));
        }
        rig.sink.wait("the cursor's last place", |seen| {
            (seen.cursor_pos == (597, 398) && seen.cursor.is_some()).then_some(())
        });
        rig.cursor(kind::UPDATE_CURSOR, 0, 0, 0, (0, 0));
        // QEMU's back end sends an image without any opaque pixel instead.
        rig.sink.wait("no cursor", |seen| {
            let cursor = seen.cursor.as_ref();
            cursor.is_none_or(|cursor| cursor.pixels.iter().all(|b| *b == 0)).then_some(())
        });
    }
}

#[test]
fn two_flushes_while_no_slot_is_free() {
    let mut rig = Rig::new(BackEnd::Shared).unwrap();
    let screen = Resource::new(1, 200, 100);
    rig.create(&screen);
    // Questions after the wishes of the rig: when they are answered, so are the wishes, and no
    // complete frame that was asked for takes a slot later.
    rig.display_info();
    rig.display_info();
    rig.show(1, screen.whole());
    rig.sink.seen.lock().unwrap().keep = true;
    for seed in 0..3 {
        rig.paint(&screen, screen.whole(), noise(seed));
        rig.expect_picture(&screen, screen.whole(), "a frame per slot");
    }
    assert_eq!(rig.sink.seen.lock().unwrap().kept.len(), 3);
    let before = rig.sink.seen.lock().unwrap().picture.clone();
    // Answered at once although nobody gives a slot back.
    rig.paint(&screen, Rect::new(1, 1, 10, 10), noise(50));
    rig.paint(&screen, Rect::new(150, 50, 20, 20), noise(51));
    {
        let mut seen = rig.sink.seen.lock().unwrap();
        assert_eq!(seen.frames, 3);
        assert_eq!(seen.picture, before, "frames that are held do not change");
        let mut again = vec![0; before.len()];
        let last = seen.kept.pop().unwrap();
        last.copy_rect(Rect::of_size(200, 100), &mut again, 800).unwrap();
        assert_eq!(again, before);
        seen.kept.push(last);
    }
    let freed = rig.sink.seen.lock().unwrap().kept.remove(0);
    drop(freed);
    rig.expect_picture(&screen, screen.whole(), "the newest state in one frame");
    let seen = rig.sink.seen.lock().unwrap();
    assert_eq!(seen.frames, 4);
    assert_eq!(seen.damage[3], [Rect::new(1, 1, 10, 10), Rect::new(150, 50, 20, 20)]);
    assert_eq!(seen.sequences, [1, 2, 3, 4]);
}

#[test]
fn nobody_looking_costs_nothing_and_the_next_look_is_complete() {
    for back_end in ALL {
        println!("{back_end:?}");
        let Some(mut rig) = Rig::new(back_end) else { continue };
        let screen = Resource::new(1, 300, 200);
        rig.create(&screen);
        rig.show(1, screen.whole());
        rig.paint(&screen, screen.whole(), noise(1));
        rig.expect_picture(&screen, screen.whole(), "a picture");
        rig.handle.want_frames(0, 0);
        // A question after the wish: when it is answered, so is the wish (one socket, in order).
        rig.display_info();
        let frames = rig.sink.seen.lock().unwrap().frames;
        for seed in 0..5 {
            rig.paint(&screen, screen.whole(), noise(seed + 5));
        }
        rig.display_info();
        assert_eq!(rig.sink.seen.lock().unwrap().frames, frames);
        rig.handle.want_frames(0, 30);
        rig.expect_picture(&screen, screen.whole(), "the state of now");
        assert_eq!(rig.sink.seen.lock().unwrap().damage[frames as usize], [screen.whole()]);
        // Without any change of the guest's, a viewer that asks again gets a complete frame too.
        rig.handle.want_frames(0, 30);
        rig.sink.wait("a frame on request", |seen| {
            (seen.frames > frames + 1 && seen.damage.last() == Some(&vec![screen.whole()]))
                .then_some(())
        });
        // So does a viewer that is new.
        let second = Arc::new(Sink::default());
        rig.handle.set_sink(second.clone());
        rig.sink = second;
        rig.expect_picture(&screen, screen.whole(), "the state of now, for a new viewer");
    }
}

#[test]
fn a_new_monitor_reaches_the_driver() {
    for back_end in ALL {
        println!("{back_end:?}");
        let Some(mut rig) = Rig::new(back_end) else { continue };
        assert_eq!(rig.config(8), 1);
        let info = rig.display_info();
        assert_eq!(info.hdr.kind.get(), kind::OK_DISPLAY_INFO);
        assert_eq!(Rect::from(info.scanouts[0].rect), Rect::of_size(1280, 800));
        assert_eq!(info.scanouts[0].enabled.get(), 1);
        assert_eq!(info.scanouts[1].enabled.get(), 0);

        let mode = DisplayMode { width_mm: 300, height_mm: 200, ..DisplayMode::new(1000, 700) };
        assert!(rig.handle.set_display(0, Some(mode)));
        assert!(!rig.handle.set_display(0, Some(mode)), "nothing changed");
        assert!(!rig.handle.set_display(1, Some(mode)), "there is only one");
        assert!(!rig.handle.set_display(0, Some(DisplayMode::new(0, 5))));
        rig.driver.interrupt.wait_config_change();
        assert_eq!(rig.config(0), 1);
        let info = rig.display_info();
        assert_eq!(Rect::from(info.scanouts[0].rect), Rect::of_size(1000, 700));
        let has_edid = rig.device.features() & Features::EDID.bits() != 0;
        assert!(has_edid || back_end == BackEnd::Qemu);
        if has_edid {
            let edid = rig.edid();
            let width = u32::from(edid[56]) | u32::from(edid[58] >> 4) << 8;
            let height = u32::from(edid[59]) | u32::from(edid[61] >> 4) << 8;
            assert_eq!((width, height), (1000, 700));
            assert_eq!(edid[21..23], [30, 20]);
        }
        rig.device.write_config(4, &1_u32.to_le_bytes());
        assert_eq!(rig.config(0), 0);

        assert!(rig.handle.set_display(0, None));
        assert_eq!(rig.display_info().scanouts[0].enabled.get(), 0);
    }
}

#[test]
fn the_driver_can_come_and_go() {
    for back_end in [BackEnd::Shared, BackEnd::Plain] {
        println!("{back_end:?}");
        let mut rig = Rig::new(back_end).unwrap();
        for round in 0..8 {
            let screen = Resource::new(1, 320 + round * 16, 200);
            // The same ids again: nothing of the last driver is left.
            rig.create(&screen);
            rig.show(1, screen.whole());
            rig.paint(&screen, screen.whole(), noise(round));
            rig.expect_picture(&screen, screen.whole(), "a picture after a reset");
            rig.device.reset();
            rig.device.reset();
            rig.sink.wait("no picture after a reset", |seen| seen.size.is_none().then_some(()));
            let features = rig.device.features();
            rig.driver = Driver::start_with(&mut rig.device, features, memory());
        }
    }
}

#[test]
fn a_dead_back_end_leaves_the_picture_and_hangs_nobody() {
    for back_end in [BackEnd::Plain, BackEnd::Shared] {
        println!("{back_end:?}");
        // Started by the test, so that it can be killed by its number.
        drago_gpu();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("gpu");
        let exe = std::env::current_exe().unwrap();
        let program = exe.parent().unwrap().parent().unwrap().join("drago-gpu");
        let mut peer = Peer(Command::new(program).arg("--socket-path").arg(&path).spawn().unwrap());
        wait_for_socket(&path);
        let mut rig =
            Rig::with(back_end, GpuConfig { socket: Some(path), ..GpuConfig::default() }).unwrap();
        let screen = Resource::new(1, 320, 200);
        rig.create(&screen);
        rig.show(1, screen.whole());
        rig.paint(&screen, screen.whole(), noise(1));
        rig.expect_picture(&screen, screen.whole(), "a picture");
        peer.0.kill().unwrap();
        peer.0.wait().unwrap();
        // Whether it is in flight or comes later, every command is answered.
        for _ in 0..20 {
            let hdr = CtrlHdr::new(kind::GET_DISPLAY_INFO);
            let answer = rig.command_raw(hdr.as_bytes(), size_of::<RespDisplayInfo>());
            let hdr = CtrlHdr::read_from_prefix(&answer).unwrap().0;
            assert_eq!(hdr.kind.get(), kind::ERR_UNSPEC);
        }
        rig.cursor(kind::MOVE_CURSOR, 1, 1, 0, (0, 0));
        assert!(!rig.handle.is_alive());
        let second = Arc::new(Sink::default());
        rig.handle.set_sink(second.clone());
        rig.sink = second;
        rig.expect_picture(&screen, screen.whole(), "the last picture, for a new viewer");
        rig.device.reset();
        let activation = std::panic::AssertUnwindSafe(|| {
            let features = rig.device.features();
            Driver::start_with(&mut rig.device, features, memory());
        });
        assert!(std::panic::catch_unwind(activation).is_err(), "activation fails, nothing hangs");
    }
}

/// Restarts without a pause, however often.
const AT_ONCE: RestartPolicy = RestartPolicy {
    quick: usize::MAX,
    window: Duration::from_secs(60),
    pause: Duration::from_secs(1),
    longest_pause: Duration::from_secs(1),
};

fn kill(rig: &Rig) {
    let pid = rig.device.process_id().expect("a process of ours");
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

/// Sends commands without waiting for their answers.
struct Batch<'a> {
    rig: &'a mut Rig,
    sent: [usize; 2],
}

impl<'a> Batch<'a> {
    fn new(rig: &'a mut Rig) -> Self {
        Self { rig, sent: [0; 2] }
    }

    fn send(&mut self, queue: usize, command: &[u8]) {
        let room = size_of::<RespDisplayInfo>() as u32;
        self.rig.driver.queues[queue].send(&[Part::Out(command), Part::In(room)]);
        self.sent[queue] += 1;
    }

    /// Waits for all answers and returns their kinds.
    fn finish(self) -> Vec<u32> {
        let mut kinds = Vec::new();
        for (queue, sent) in self.sent.into_iter().enumerate() {
            for _ in 0..sent {
                let (_, answer) = self.rig.driver.queues[queue].wait_used();
                kinds.push(CtrlHdr::read_from_prefix(&answer).unwrap().0.kind.get());
            }
        }
        kinds
    }
}

#[test]
fn a_hundred_kills_in_a_row() {
    drago_gpu();
    let config = GpuConfig { restart: AT_ONCE, ..GpuConfig::default() };
    let mut rig = Rig::with(BackEnd::Shared, config).unwrap();
    let buffers = [Resource::new(1, 640, 480), Resource::new(2, 640, 480)];
    let pointer = Resource { format: PixelFormat::B8G8R8A8, ..Resource::new(3, 64, 64) };
    buffers.iter().chain([&pointer]).for_each(|resource| rig.create(resource));
    rig.draw(&pointer, pointer.whole(), |x, y| [x as u8, y as u8, 7, 255]);
    rig.transfer(&pointer, pointer.whole());
    rig.cursor(kind::UPDATE_CURSOR, 1, 2, 3, (4, 5));
    rig.show(1, buffers[0].whole());
    rig.paint(&buffers[0], buffers[0].whole(), noise(0));
    rig.expect_picture(&buffers[0], buffers[0].whole(), "a picture");
    let scanouts = rig.sink.seen.lock().unwrap().scanouts;
    let mut pauses = Vec::new();
    for round in 0..100_u32 {
        let buffer = buffers[round as usize % 2];
        rig.draw(&buffer, buffer.whole(), noise(round));
        let mut batch = Batch::new(&mut rig);
        // What a frame with a page flip, a moving pointer and a short-lived resource looks like.
        let scratch = Resource::new(4, 64 + round, 10);
        for step in 0..4 {
            batch.send(0, &scratch.create());
            batch.send(0, &scratch.attach());
            batch.send(0, &buffer.transfer(buffer.whole()));
            batch.send(0, show(buffer.id, buffer.whole()).as_bytes());
            batch.send(0, &buffer.flush(buffer.whole()));
            batch.send(0, CtrlHdr::new(kind::GET_DISPLAY_INFO).as_bytes());
            batch.send(0, &scratch.unref());
            batch.send(1, cursor(kind::MOVE_CURSOR, round + step, step, 3, (4, 5)).as_bytes());
        }
        // Somewhere between "before the first of them" and "after the last".
        let until = Instant::now() + Duration::from_micros(u64::from(round * 7919 % 4000));
        while Instant::now() < until {
            std::hint::spin_loop();
        }
        kill(batch.rig);
        let killed = Instant::now();
        let kinds = batch.finish();
        let bad =
            kinds.iter().filter(|kind| ![kind::OK_NODATA, kind::OK_DISPLAY_INFO].contains(kind));
        assert_eq!(bad.count(), 0, "round {round}: {kinds:x?}");
        rig.sink.wait("a successor", |seen| (seen.successors == round + 1).then_some(()));
        rig.expect_picture(&buffer, buffer.whole(), "the picture after a kill");
        pauses.push(killed.elapsed());
        // The pointer moves on: the successor knows its image.
        rig.cursor(kind::MOVE_CURSOR, 500 + round, 6, 3, (4, 5));
        rig.sink.wait("the pointer", |seen| {
            (seen.cursor_pos == (500 + round, 6) && seen.cursor.is_some()).then_some(())
        });
    }
    pauses.sort();
    println!("from kill to picture: median {:?}, worst {:?}", pauses[50], pauses[99]);
    let seen = rig.sink.seen.lock().unwrap();
    assert_eq!((seen.deaths, seen.successors), (100, 100));
    assert_eq!(seen.scanouts, scanouts, "viewers see no change of the scanout");
    assert!(seen.sequences.is_sorted(), "frames are numbered on");
    drop(seen);
    assert!(!rig.driver.interrupt.needs_reset());
}

#[test]
fn what_is_not_drawn_again_comes_back_by_itself() {
    for back_end in [BackEnd::Shared, BackEnd::Plain] {
        println!("{back_end:?}");
        drago_gpu();
        let config = GpuConfig { restart: AT_ONCE, ..GpuConfig::default() };
        let mut rig = Rig::with(back_end, config).unwrap();
        let screen = Resource::new(1, 300, 200);
        rig.create(&screen);
        let part = Rect::new(10, 20, 200, 150);
        rig.show(1, part);
        rig.paint(&screen, screen.whole(), noise(1));
        rig.expect_picture(&screen, part, "a picture");
        // The guest draws and is about to say so when the process dies; then it sleeps.
        rig.draw(&screen, screen.whole(), noise(2));
        let frames = rig.sink.seen.lock().unwrap().frames;
        kill(&rig);
        rig.expect_picture(&screen, part, "the picture of a guest that does nothing");
        rig.sink.wait("a whole frame", |seen| (seen.frames > frames).then_some(()));
        rig.sink.wait("a successor", |seen| (seen.successors == 1).then_some(()));
        // A viewer that comes later sees it too.
        let second = Arc::new(Sink::default());
        rig.handle.set_sink(second.clone());
        rig.sink = second;
        rig.expect_picture(&screen, part, "the picture for a new viewer");
        rig.paint(&screen, Rect::new(30, 40, 5, 5), noise(3));
        rig.expect_picture(&screen, part, "a part of it");
        // A reset forgets it for all successors.
        rig.device.reset();
        let features = rig.device.features();
        rig.driver = Driver::start_with(&mut rig.device, features, memory());
        rig.sink.wait("no picture", |seen| seen.size.is_none().then_some(()));
        rig.create(&screen);
        kill(&rig);
        assert_eq!(rig.command_raw(&screen.create(), 24)[..4], 0x1203_u32.to_le_bytes());
        rig.sink.wait("another successor", |seen| (seen.successors == 1).then_some(()));
        assert_eq!(rig.sink.seen.lock().unwrap().size, None);
    }
}

#[test]
fn while_starts_are_rationed_commands_are_refused() {
    drago_gpu();
    let restart = RestartPolicy { quick: 0, ..AT_ONCE };
    let config = GpuConfig { restart, ..GpuConfig::default() };
    let mut rig = Rig::with(BackEnd::Shared, config).unwrap();
    let screen = Resource::new(1, 300, 200);
    rig.create(&screen);
    rig.show(1, screen.whole());
    rig.paint(&screen, screen.whole(), noise(1));
    rig.expect_picture(&screen, screen.whole(), "a picture");
    for round in 1..=2 {
        kill(&rig);
        rig.sink.wait("a death", |seen| (seen.deaths == round).then_some(()));
        // Answered long before there is a successor.
        let answer = rig.command_raw(&screen.flush(screen.whole()), 24);
        assert_eq!(answer[..4], kind::ERR_UNSPEC.to_le_bytes());
        assert_eq!(rig.sink.seen.lock().unwrap().successors, round - 1);
        assert!(!rig.handle.is_alive());
        rig.draw(&screen, screen.whole(), noise(round + 1));
        rig.expect_picture(&screen, screen.whole(), "the picture");
        rig.sink.wait("a successor", |seen| (seen.successors == round).then_some(()));
        rig.paint(&screen, Rect::new(1, 1, 9, 9), noise(round + 5));
        rig.expect_picture(&screen, screen.whole(), "a part");
    }
    // A driver that comes while there is none is served by the next one.
    kill(&rig);
    rig.sink.wait("a death", |seen| (seen.deaths == 3).then_some(()));
    rig.device.reset();
    let features = rig.device.features();
    rig.driver = Driver::start_with(&mut rig.device, features, memory());
    rig.create(&screen);
    rig.show(1, screen.whole());
    rig.paint(&screen, screen.whole(), noise(20));
    rig.expect_picture(&screen, screen.whole(), "the picture of a new driver");
}

#[test]
fn broken_chains_make_the_device_need_a_reset() {
    drago_gpu();
    let mut rig = Rig::new(BackEnd::Shared).unwrap();
    let outside = 1 << 40;
    for (queue, parts) in [
        (0, vec![(outside, 24, false), (0x10_0000, 24, true)]),
        (0, vec![(0x10_0000, 24, false), (outside, 24, true)]),
        (0, vec![(0x10_0000, 24, true), (0x10_0000, 24, false)]),
        (1, vec![(outside, 56, false)]),
    ] {
        assert!(!rig.driver.interrupt.needs_reset());
        rig.driver.queues[queue].add_raw(&parts);
        rig.driver.queues[queue].kick();
        rig.driver.interrupt.wait_config_change();
        assert!(rig.driver.interrupt.needs_reset());
        rig.device.reset();
        let features = rig.device.features();
        rig.driver = Driver::start_with(&mut rig.device, features, memory());
        let screen = Resource::new(1, 64, 64);
        rig.create(&screen);
        rig.show(1, screen.whole());
        rig.paint(&screen, screen.whole(), noise(1));
        rig.expect_picture(&screen, screen.whole(), "a picture after the reset");
    }
}

#[test]
fn contexts_die_and_pictures_do_not() {
    drago_gpu();
    let config = GpuConfig { renderer: Renderer::Virgl, restart: AT_ONCE, ..GpuConfig::default() };
    let built = super::device::build(&config);
    if let Err(error) = &built {
        println!("SKIPPED: no 3D here: {error}");
        return;
    }
    drop(built);
    let mut rig = Rig::with(BackEnd::Shared, config).unwrap();
    assert!(rig.config(12) > 0, "capability sets");
    let context = |kind, id: u32| CtrlHdr { ctx_id: id.into(), ..CtrlHdr::new(kind) };
    let create = |id| {
        let debug_name = [0; 64];
        let hdr = context(kind::CTX_CREATE, id);
        ContextCreate { hdr, name_length: 0.into(), context_init: 0.into(), debug_name }
    };
    // A command stream with nothing in it but VIRGL_CCMD_NOP.
    let submit = |id| {
        let hdr = CtrlHdr {
            flags: gpu_protocol::virtio::FLAG_FENCE.into(),
            fence_id: 77.into(),
            ..context(kind::SUBMIT_3D, id)
        };
        let command = Submit3d { hdr, size: 4.into(), padding: 0.into() };
        [command.as_bytes(), &[0; 4]].concat()
    };
    let screen = Resource::new(1, 300, 200);
    rig.create(&screen);
    rig.show(1, screen.whole());
    rig.paint(&screen, screen.whole(), noise(1));
    rig.expect_picture(&screen, screen.whole(), "a picture");
    rig.ok(&create(5));
    rig.ok_raw(&submit(5));
    let mut pauses = Vec::new();
    for round in 1..=5 {
        rig.draw(&screen, screen.whole(), noise(round + 1));
        let mut batch = Batch::new(&mut rig);
        for _ in 0..20 {
            batch.send(0, &submit(4 + round));
        }
        kill(batch.rig);
        let killed = Instant::now();
        for kind in batch.finish() {
            // Done, lost on the way, or sent to a context that is no more.
            let expected = [kind::OK_NODATA, kind::ERR_UNSPEC, kind::ERR_INVALID_CONTEXT_ID];
            assert!(expected.contains(&kind), "{kind:x}");
        }
        rig.expect_picture(&screen, screen.whole(), "the picture after a kill");
        pauses.push(killed.elapsed());
        let answer = rig.command_raw(&submit(4 + round), 24);
        assert_eq!(answer[..4], kind::ERR_INVALID_CONTEXT_ID.to_le_bytes());
        rig.ok(&create(5 + round));
        rig.ok_raw(&submit(5 + round));
    }
    println!("from kill to picture with virgl: {pauses:?}");
}

#[test]
fn options_are_understood_and_mistakes_named() {
    let parse = |text: &str| config::parse(Spec::parse("gpu", text).unwrap());
    let shown = |text: &str| format!("{:?}", parse(text).unwrap());
    assert!(shown("").contains("width: 1280, height: 800"));
    assert!(shown("2d,scanouts=2,size=1920x1080").contains("scanouts: 2"));
    assert!(shown("render-node=/dev/dri/renderD129").contains("renderer: Virgl"));
    assert!(shown("socket=/x").contains("/x"));
    for (text, message) in [
        ("3d", "--gpu: '3d' is not understood; expected auto, virgl or 2d"),
        ("scanouts=0", "--gpu: scanouts=0: expected 1 to 16"),
        ("size=1920", "--gpu: size=1920: expected WIDTHxHEIGHT, each 1 to 16384"),
        ("size=0x5", "--gpu: size=0x5: expected WIDTHxHEIGHT, each 1 to 16384"),
        ("sockt=x", "--gpu: unknown key 'sockt' (known: render-node, socket, scanouts, size)"),
    ] {
        assert_eq!(parse(text).unwrap_err().to_string(), message);
    }
}

/// A second implementation of QEMU's socket, in Rust: handshake, and answers to the commands with which
/// a driver starts. It has no monitors in this mode and asks us nothing.
#[test]
fn the_back_end_of_vhost_device_gets_along() {
    let Some(mut rig) = Rig::new(BackEnd::Null) else { return };
    let hdr = CtrlHdr::new(kind::GET_DISPLAY_INFO);
    let answer = rig.command_raw(hdr.as_bytes(), size_of::<RespDisplayInfo>());
    let (hdr, _) = CtrlHdr::read_from_prefix(&answer).unwrap();
    assert_eq!(hdr.kind.get(), kind::OK_NODATA, "no error, and no monitors");
    let screen = Resource::new(1, 64, 64);
    rig.create(&screen);
    rig.show(1, screen.whole());
    rig.paint(&screen, screen.whole(), |x, y| [x as u8, y as u8, 0, 0]);
    rig.unref(1);
    assert!(rig.handle.is_alive());
}
