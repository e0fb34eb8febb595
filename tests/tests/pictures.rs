//! Golden pictures all the way: virgl's commands in a virtqueue → virtio-gpu → `drago-gpu` →
//! virglrenderer on llvmpipe → the SPICE server → a real SPICE client, exact to the pixel; and one picture
//! after the other to a VNC client. No virtual machine: the queue is made by hand.

#![allow(
    dead_code,
    missing_docs,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test, and what it borrows from others"
)]

#[path = "../../devices/src/virtio/testing.rs"]
mod testing;

mod device {
    pub(crate) use devices::virtio::device::*;
}

#[path = "../../gpu/tests/support/three_d.rs"]
mod three_d;

use std::{
    fs::File,
    io::{Read, Write},
    net::TcpStream,
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use devices::{
    GuestMemory,
    spec::Spec,
    virtio::{device::VirtioDevice, gpu},
};
use drago_tests::{client::SpiceClient, paths, picture::Picture};
use drago_vmm::display::{self, DisplayControl, Doors, Handles, Identity, SpiceConfig, VncConfig};
use gpu_protocol::{
    Rect,
    virtio::{
        AttachBacking, CtrlHdr, CursorPos, MemEntry, RESOURCE_Y_0_TOP, ResourceFlush, SetScanout,
        Transfer3d, UpdateCursor, kind,
    },
};
use serde_json::json;
use testing::{Driver, MEMORY_SIZE, Part};
use three_d::{clear, copy, prologue, target, textured, triangles, write_buffer};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use zerocopy::{FromBytes, IntoBytes};

const PATIENCE: Duration = Duration::from_secs(60);
const BGRA: u32 = 1;
const BGRX: u32 = 2;
const RGBX: u32 = 134;
const VIRGL2: u32 = 2;
/// Guest memory for pictures.
const DATA: u64 = 1 << 32;
const DATA_SIZE: usize = 16 << 20;
const SIZE: (u32, u32) = (200, 120);
const WHOLE: Rect = Rect { x: 0, y: 0, width: SIZE.0, height: SIZE.1 };

/// A driver of the device; what [`three_d`] needs of it.
pub struct FrontEnd {
    driver: Driver,
    answers: Vec<Vec<u8>>,
}

impl FrontEnd {
    fn submit_parts(&mut self, queue: usize, parts: &[&[u8]]) -> u16 {
        let room = size_of::<CtrlHdr>() as u32;
        let command = parts.concat();
        let queue = &mut self.driver.queues[queue];
        queue.send(&[Part::Out(&command), Part::In(room)]);
        self.answers.push(queue.wait_used().1);
        (self.answers.len() - 1) as u16
    }

    fn wait_for<T: FromBytes>(&mut self, _queue: usize, slot: u16) -> T {
        T::read_from_bytes(&self.answers[usize::from(slot)]).unwrap()
    }

    fn run(&mut self, parts: &[&[u8]]) -> u32 {
        let slot = self.submit_parts(0, parts);
        self.wait_for::<CtrlHdr>(0, slot).kind.get()
    }

    fn ok(&mut self, parts: &[&[u8]]) {
        assert_eq!(self.run(parts), kind::OK_NODATA);
    }

    fn show(&mut self, resource: u32) {
        let hdr = CtrlHdr::new(kind::SET_SCANOUT);
        let show = SetScanout {
            hdr,
            rect: WHOLE.into(),
            scanout_id: 0.into(),
            resource_id: resource.into(),
        };
        self.ok(&[show.as_bytes()]);
    }

    fn flush(&mut self, resource: u32, rect: Rect) {
        let hdr = CtrlHdr::new(kind::RESOURCE_FLUSH);
        let (rect, resource_id) = (rect.into(), resource.into());
        let flush = ResourceFlush { hdr, rect, resource_id, padding: 0.into() };
        self.ok(&[flush.as_bytes()]);
    }

    /// Puts pixels (B, G, R, anything) into a resource.
    fn upload(&mut self, resource: u32, format: u32, size: (u32, u32), pixels: &[u8]) {
        let order = |p: &[u8]| match format {
            RGBX => [p[2], p[1], p[0], 0xff],
            _ => [p[0], p[1], p[2], 0xff],
        };
        let bytes: Vec<u8> = pixels.chunks(4).flat_map(order).collect();
        let address = DATA + u64::from(resource) * (1 << 20);
        self.driver.memory.write_slice(&bytes, GuestAddress(address)).unwrap();
        let attach = AttachBacking {
            hdr: CtrlHdr::new(kind::RESOURCE_ATTACH_BACKING),
            resource_id: resource.into(),
            entries: 1.into(),
        };
        let length = (bytes.len() as u32).into();
        let entry = MemEntry { address: address.into(), length, padding: 0.into() };
        self.ok(&[attach.as_bytes(), entry.as_bytes()]);
        let (width, height) = size;
        let all = Transfer3d { width, height, depth: 1, ..Transfer3d::default() };
        assert_eq!(self.transfer(kind::TRANSFER_TO_HOST_3D, 0, resource, &all), kind::OK_NODATA);
    }
}

/// Two regions, the second where it is in machines with much memory.
fn memory() -> GuestMemory {
    let name = std::env::temp_dir();
    let file: File = tempfile::tempfile_in(name).unwrap();
    file.set_len((MEMORY_SIZE + DATA_SIZE) as u64).unwrap();
    let again = FileOffset::new(file.try_clone().unwrap(), MEMORY_SIZE as u64);
    GuestMemoryMmap::from_ranges_with_files([
        (GuestAddress(0), MEMORY_SIZE, Some(FileOffset::new(file, 0))),
        (GuestAddress(DATA), DATA_SIZE, Some(again)),
    ])
    .unwrap()
}

/// Pixels of which none equals another one near it: B, G, R.
fn pattern(x: u32, y: u32) -> [u8; 3] {
    [(x * 3) as u8, (y * 5) as u8, (x ^ y) as u8]
}

fn picture(size: (u32, u32)) -> Vec<u8> {
    let pixel = |x, y| {
        let [b, g, r] = pattern(x, y);
        [b, g, r, 0]
    };
    (0..size.1).flat_map(|y| (0..size.0).flat_map(move |x| pixel(x, y))).collect()
}

/// Builds `drago-gpu` where the device looks for it, if the test was not started by `cargo xtask`.
fn build_drago_gpu() {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["build", "--quiet", "-p", "drago-gpu", "--bin", "drago-gpu"]);
    if !cfg!(debug_assertions) {
        cargo.arg("--release");
    }
    assert!(cargo.status().unwrap().success(), "drago-gpu could not be built");
}

/// A running device.
struct Rig {
    front: FrontEnd,
    display: Arc<dyn DisplayControl>,
    _device: Box<dyn VirtioDevice>,
}

impl Rig {
    fn start() -> Self {
        build_drago_gpu();
        let config = (gpu::MODULE.parse)(Spec::parse("gpu", "virgl").unwrap()).unwrap();
        let built = config.build().unwrap();
        let mut device = built.device;
        let handles = Handles { by_option: vec![("gpu", built.handle.unwrap())] };
        let spice = SpiceConfig::parse(Spec::parse("spice", "127.0.0.1:0").unwrap()).unwrap();
        let identity = Identity { name: "pictures".to_owned(), uuid: None };
        let vnc = VncConfig::parse(Spec::parse("vnc", "127.0.0.1:0").unwrap()).unwrap();
        let doors = Doors::open(Some(&spice), None, Some(&vnc)).unwrap();
        let display = display::start(doors, identity, &handles, &Arc::default()).unwrap().unwrap();
        let features = device.features();
        let driver = Driver::start_with(&mut *device, features, memory());
        let front = FrontEnd { driver, answers: Vec::new() };
        Self { front, display, _device: device }
    }
}

/// A SPICE client.
struct Spice(SpiceClient);

impl Spice {
    fn connect(rig: &Rig) -> Self {
        let address = rig.display.address().unwrap();
        let port = address.rsplit(':').next().unwrap().parse().unwrap();
        Self(SpiceClient::connect(port).unwrap())
    }

    /// Waits until the client shows exactly this: B, G, R of each pixel.
    fn expect(&mut self, what: &str, pixel: impl Fn(u32, u32) -> [u8; 3]) {
        let path = paths::cache("e2e/pictures").unwrap().join(format!("{what}.ppm"));
        let end = Instant::now() + PATIENCE;
        loop {
            let wrong = self.differs(&path, &pixel);
            if wrong.is_none() {
                return;
            }
            assert!(Instant::now() < end, "{what}: {wrong:?}, see {}", path.display());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// The first wrong pixel.
    fn differs(
        &mut self,
        path: &std::path::Path,
        pixel: impl Fn(u32, u32) -> [u8; 3],
    ) -> Option<String> {
        let size = self.0.screenshot(path).unwrap();
        if size != SIZE {
            return Some(format!("the size is {size:?}"));
        }
        let seen = Picture::open(path).unwrap();
        let mut all = (0..SIZE.1).flat_map(|y| (0..SIZE.0).map(move |x| (x, y)));
        all.find_map(|(x, y)| {
            let [b, g, r] = pixel(x, y);
            let have = seen.pixel(x, y);
            (have != [r, g, b]).then(|| format!("{x},{y} is {have:?}, not {:?}", [r, g, b]))
        })
    }
}

#[test]
fn golden_pictures_reach_a_spice_client_exactly() {
    let mut rig = Rig::start();
    let mut spice = Spice::connect(&rig);
    let front = &mut rig.front;
    assert_eq!(front.create_context(1, VIRGL2), kind::OK_NODATA);
    assert_eq!(front.draw(1, &prologue()), kind::OK_NODATA);
    // 1 and 2: screens. 3: vertices. 4 and 5: pictures. 2 and 4 are upside down in OpenGL's eyes.
    front.create_texture(1, BGRX, SIZE, 0);
    front.create_texture(2, BGRX, SIZE, RESOURCE_Y_0_TOP);
    front.create_vertices(3, 1024);
    front.create_texture(4, BGRX, SIZE, RESOURCE_Y_0_TOP);
    front.upload(4, BGRX, SIZE, &picture(SIZE));
    let small = (50, 30);
    front.create_texture(5, RGBX, small, 0);
    front.upload(5, RGBX, small, &picture(small));
    (1..=5).for_each(|id| front.use_in(1, id));

    // Clear.
    let colour = [51.0 / 255.0, 102.0 / 255.0, 153.0 / 255.0, 1.0];
    assert_eq!(front.draw(1, &[target(1, 1, BGRX), clear(colour)].concat()), kind::OK_NODATA);
    front.show(1);
    front.flush(1, WHOLE);
    spice.expect("clear", |_, _| [153, 102, 51]);

    // Triangle: the edge is the line from (140, 0) to (0, 140), just past the centres on it.
    let corner = |x: f32, y: f32| [x / 100.0 - 1.0, y / 60.0 - 1.0, 0.0, 1.0].map(f32::to_bits);
    let vertices = [corner(0.0, 0.0), corner(140.3, 0.0), corner(0.0, 140.3)].concat();
    let front = &mut rig.front;
    let words = [
        clear([0.0, 0.0, 0.0, 1.0]),
        write_buffer(3, &vertices),
        triangles(3, 3, SIZE, [0.2, 0.4, 0.6, 1.0]),
    ];
    assert_eq!(front.draw(1, &words.concat()), kind::OK_NODATA);
    front.flush(1, WHOLE);
    spice.expect("triangle", |x, y| if x + y <= 139 { [153, 102, 51] } else { [0; 3] });

    // Texture: 50 × 30 texels, each two pixels wide and high, repeated over the screen.
    let corner = |x: f32, y: f32| [x, y, 0.0, 1.0, x + 1.0, y + 1.0, 0.0, 0.0].map(f32::to_bits);
    let corners = [(-1.0, -1.0), (1.0, -1.0), (-1.0, 1.0), (-1.0, 1.0), (1.0, -1.0), (1.0, 1.0)];
    let vertices: Vec<u32> = corners.iter().flat_map(|(x, y)| corner(*x, *y)).collect();
    let front = &mut rig.front;
    let words =
        [clear([1.0; 4]), write_buffer(3, &vertices), textured(3, 6, SIZE, 5, RGBX)].concat();
    assert_eq!(front.draw(1, &words), kind::OK_NODATA);
    front.flush(1, WHOLE);
    spice.expect("texture", |x, y| pattern(x / 2 % small.0, y / 2 % small.1));

    // Copy, to the other screen, whose rows OpenGL counts from below; then a part to another place.
    let front = &mut rig.front;
    let all = copy(2, (0, 0), 4, (0, 0), SIZE);
    assert_eq!(front.draw(1, &all), kind::OK_NODATA);
    front.show(2);
    front.flush(2, WHOLE);
    spice.expect("copy", pattern);
    let front = &mut rig.front;
    let part = copy(2, (20, 10), 4, (0, 0), (64, 32));
    assert_eq!(front.draw(1, &part), kind::OK_NODATA);
    let at = Rect { x: 20, y: SIZE.1 - 10 - 32, width: 64, height: 32 };
    front.flush(2, at);
    spice.expect("part", |x, y| match at.contains(&Rect::new(x, y, 1, 1)) {
        true => pattern(x - 20, y + 10),
        false => pattern(x, y),
    });

    // Cursor.
    let front = &mut rig.front;
    front.create_texture(6, BGRA, (64, 64), RESOURCE_Y_0_TOP);
    front.upload(6, BGRA, (64, 64), &picture((64, 64)));
    let command = UpdateCursor {
        hdr: CtrlHdr::new(kind::UPDATE_CURSOR),
        pos: CursorPos { x: 100.into(), y: 50.into(), ..CursorPos::default() },
        resource_id: 6.into(),
        hot_x: 3.into(),
        hot_y: 61.into(),
        padding: 0.into(),
    };
    front.submit_parts(1, &[command.as_bytes()]);
    let pixel = |x, y| {
        let [b, g, r] = pattern(x, y);
        format!("{r:02x}{g:02x}{b:02x}ff")
    };
    let pixels: String = (0..64).flat_map(|y| (0..64).map(move |x| pixel(x, y))).collect();
    let expected = json!({ "width": 64, "height": 64, "hot": [3, 61], "rgba": pixels });
    spice
        .0
        .wait_state("the cursor", PATIENCE, |state| state["cursor"] == expected)
        .unwrap_or_else(|error| panic!("{error}"));
}

/// A number of two bytes, as VNC has them.
fn number(bytes: &[u8], at: usize) -> usize {
    usize::from(u16::from_be_bytes([bytes[at], bytes[at + 1]]))
}

/// A VNC client that knows raw pixels and new sizes.
struct Vnc {
    socket: TcpStream,
    size: (u32, u32),
    picture: Vec<u8>,
}

impl Vnc {
    fn connect(rig: &Rig) -> Self {
        let socket = TcpStream::connect(rig.display.vnc_address().unwrap()).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut client = Self { socket, size: (0, 0), picture: Vec::new() };
        assert_eq!(&client.take(12)[..4], b"RFB ");
        client.socket.write_all(b"RFB 003.008\n").unwrap();
        let kinds = usize::from(client.take(1)[0]);
        assert!(client.take(kinds).contains(&1), "a password is wanted");
        // No password; the answer is 0; others may stay.
        client.socket.write_all(&[1]).unwrap();
        assert_eq!(client.take(4), [0; 4]);
        client.socket.write_all(&[1]).unwrap();
        let head = client.take(24);
        client.resize(number(&head, 0), number(&head, 2));
        client.take(usize::from(head[23]));
        // Two encodings: raw, DesktopSize (-223).
        let encodings = [&[2, 0, 0, 2][..], &0_i32.to_be_bytes(), &(-223_i32).to_be_bytes()];
        client.socket.write_all(&encodings.concat()).unwrap();
        client
    }

    fn take(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.socket.read_exact(&mut bytes).unwrap();
        bytes
    }

    fn resize(&mut self, width: usize, height: usize) {
        self.size = (width as u32, height as u32);
        self.picture = vec![0x55; width * height * 4];
    }

    /// Asks for what has changed, and takes it in.
    fn update(&mut self) {
        let everything = [3, 1, 0, 0, 0, 0, 0x3f, 0xff, 0x3f, 0xff];
        self.socket.write_all(&everything).unwrap();
        let head = self.take(4);
        assert_eq!(head[0], 0, "no update");
        for _ in 0..number(&head, 2) {
            let rect = self.take(12);
            let [x, y, width, height] = [0, 2, 4, 6].map(|at| number(&rect, at));
            if rect[8..] == (-223_i32).to_be_bytes() {
                self.resize(width, height);
                continue;
            }
            let pixels = self.take(width * height * 4);
            let stride = self.size.0 as usize * 4;
            for (line, row) in pixels.chunks(width * 4).enumerate() {
                let at = (y + line) * stride + x * 4;
                self.picture[at..at + row.len()].copy_from_slice(row);
            }
        }
    }
}

/// The GPU reads back what a viewer asks for: VNC's viewers do, too.
#[test]
fn a_vnc_client_sees_one_picture_after_the_other() {
    let mut rig = Rig::start();
    let mut vnc = Vnc::connect(&rig);
    let front = &mut rig.front;
    assert_eq!(front.create_context(1, VIRGL2), kind::OK_NODATA);
    for id in 1..=5 {
        let shade = |x: u32, y: u32| [(x * id) as u8, (y * id) as u8, id as u8 * 50, 0];
        let pixels: Vec<u8> =
            (0..SIZE.1).flat_map(|y| (0..SIZE.0).flat_map(move |x| shade(x, y))).collect();
        front.create_texture(id, BGRX, SIZE, RESOURCE_Y_0_TOP);
        front.upload(id, BGRX, SIZE, &pixels);
        front.show(id);
        front.flush(id, WHOLE);
        let is_seen = |vnc: &Vnc| {
            let mut pairs = vnc.picture.chunks(4).zip(pixels.chunks(4));
            vnc.size == SIZE && pairs.all(|(seen, drawn)| seen[..3] == drawn[..3])
        };
        while !is_seen(&vnc) {
            vnc.update();
        }
    }
}
