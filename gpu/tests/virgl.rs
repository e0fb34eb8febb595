//! The real virglrenderer behind our device, drawing in software: pictures are exact to the pixel,
//! fences are answered, and a hostile guest hurts itself only.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

mod support;

use std::{net::Shutdown, path::Path};

use gpu_protocol::{
    Rect,
    frames::{WANT_FULL, Want},
    socket::{Decoder, FromBackEnd, FromFrontEnd, ProtocolFeatures, Side},
    virtio::{
        Create3d, CreateBlob, CtrlHdr, CursorPos, GetCapset, GetCapsetInfo, MemEntry,
        RESOURCE_Y_0_TOP, ResourceCommand, ResourceCreate2d, RespCapsetInfo, RespResourceUuid,
        SetScanoutBlob, Transfer3d, UpdateCursor, blob_mem, kind,
    },
};
use support::{
    DATA, FrontEnd,
    screen::{Screen, whole},
    three_d::{clear, command, copy, fenced, prologue, target, textured, triangles, write_buffer},
};
use vhost::{VhostBackend, vhost_user::VhostUserFrontend};
use vm_memory::{Bytes, GuestAddress};
use zerocopy::IntoBytes;

const BGRA: u32 = 1;
const BGRX: u32 = 2;
const RGBA: u32 = 67;
const RGBX: u32 = 134;

const VIRGL: u32 = 1;
const VIRGL2: u32 = 2;

fn device() -> FrontEnd {
    let program = Path::new(env!("CARGO_BIN_EXE_drago-gpu"));
    FrontEnd::spawn(program, &["--renderer", "virgl"], 0)
}

/// What the tests ran on, for who reads their output.
#[test]
fn the_libraries_are_those_that_were_asked_for() {
    let program = Path::new(env!("CARGO_BIN_EXE_drago-gpu"));
    let out = support::command(program).args(["--probe", "--renderer", "virgl"]).output().unwrap();
    let said = String::from_utf8_lossy(&out.stdout);
    println!("{said}");
    assert!(said.contains("virgl on"), "{said}{}", String::from_utf8_lossy(&out.stderr));
    if let Ok(expected) = std::env::var("DRAGO_TEST_DRIVER") {
        assert!(said.contains(&expected), "{said:?} is not {expected}");
    }
}

/// A picture in which no pixel equals another one near it, B, G, R, 0.
fn pattern(size: (u32, u32)) -> Vec<u8> {
    let pixel = |x: u32, y: u32| [(x * 3) as u8, (y * 5) as u8, (x ^ y) as u8, 0];
    (0..size.1).flat_map(|y| (0..size.0).flat_map(move |x| pixel(x, y))).collect()
}

/// As it must be in memory for a resource of this format.
fn in_format(picture: &[u8], format: u32) -> Vec<u8> {
    let swap = matches!(format, RGBA | RGBX);
    let order = |p: &[u8]| if swap { [p[2], p[1], p[0], 0xff] } else { [p[0], p[1], p[2], 0xff] };
    picture.chunks(4).flat_map(order).collect()
}

fn all_of(size: (u32, u32)) -> Transfer3d {
    Transfer3d { width: size.0, height: size.1, depth: 1, ..Transfer3d::default() }
}

impl FrontEnd {
    /// A 3D picture with these contents, and a context that may use it.
    fn picture(&mut self, id: u32, format: u32, size: (u32, u32), flags: u32, pixels: &[u8]) {
        self.create_texture(id, format, size, flags);
        let address = DATA + u64::from(id) * (1 << 20);
        let bytes = in_format(pixels, format);
        self.memory.write_slice(&bytes, GuestAddress(address)).unwrap();
        self.attach(id, address, bytes.len() as u32);
        let answer = self.transfer(kind::TRANSFER_TO_HOST_3D, 0, id, &all_of(size));
        assert_eq!(answer, kind::OK_NODATA);
    }
}

#[test]
fn a_clear_is_exact_in_every_format() {
    let mut front = device();
    let mut screen = Screen::new(&mut front, 1000);
    assert_eq!(front.create_context(1, VIRGL2), kind::OK_NODATA);
    assert_eq!(front.draw(1, &prologue()), kind::OK_NODATA);
    let size = (333, 77);
    for (id, format) in [(1, BGRA), (2, BGRX), (3, RGBA), (4, RGBX)] {
        front.create_texture(id, format, size, RESOURCE_Y_0_TOP);
        front.use_in(1, id);
        let colour = [51.0 / 255.0, 102.0 / 255.0, id as f32 / 255.0, 1.0];
        let words = [target(id, id, format), clear(colour)].concat();
        assert_eq!(front.draw(1, &words), kind::OK_NODATA);
        front.show(0, id, whole(size));
        front.flush(id, whole(size));
        let (_, pixels) = screen.frame(&mut front, 0);
        assert_eq!(pixels.len(), 333 * 77 * 4);
        assert!(pixels.chunks(4).all(|p| p == [id as u8, 102, 51, 0]), "format {format}");
    }
}

/// Shaders, vertices, rasterisation: every pixel is on the right side of the edge.
/// What other programs do at the same time must not get in a program's way: a desktop goes on drawing
/// while programs start and end. (The library leaves a new context current and does not know it.)
#[test]
fn contexts_that_come_and_go_leave_the_others_alone() {
    let mut front = device();
    let mut screen = Screen::new(&mut front, 1000);
    assert_eq!(front.create_context(1, VIRGL2), kind::OK_NODATA);
    let size = (64, 32);
    for id in [1, 2] {
        front.create_texture(id, BGRX, size, RESOURCE_Y_0_TOP);
        front.use_in(1, id);
    }
    let words = [prologue(), target(1, 1, BGRX), target(2, 2, BGRX)].concat();
    assert_eq!(front.draw(1, &words), kind::OK_NODATA);
    front.show(0, 2, whole(size));
    for round in 0..20_u32 {
        let colour = [round as f32 / 255.0, 0.2, 0.4, 1.0];
        assert_eq!(front.draw(1, &clear(colour)), kind::OK_NODATA, "round {round}");
        let other = 2 + round % 3;
        match front.create_context(other, VIRGL2) {
            kind::OK_NODATA => {}
            _ => assert_eq!(front.destroy_context(other), kind::OK_NODATA),
        }
        let colour = [round as f32 / 255.0, 0.6, 0.8, 1.0];
        assert_eq!(front.draw(1, &clear(colour)), kind::OK_NODATA, "round {round}");
        front.flush(2, whole(size));
        let (_, pixels) = screen.frame(&mut front, 0);
        let wanted = [204, 153, round as u8, 0];
        assert!(pixels.chunks(4).all(|pixel| pixel == wanted), "round {round}: {:?}", &pixels[..4]);
    }
}

#[test]
fn a_triangle_is_exact() {
    let mut front = device();
    let mut screen = Screen::new(&mut front, 1000);
    let size = (64, 64);
    assert_eq!(front.create_context(1, VIRGL2), kind::OK_NODATA);
    assert_eq!(front.draw(1, &prologue()), kind::OK_NODATA);
    front.create_texture(1, BGRX, size, 0);
    front.create_vertices(2, 48);
    front.use_in(1, 1);
    front.use_in(1, 2);
    let vertices = [-1.0, -1.0, 0.0, 1.0, 1.51, -1.0, 0.0, 1.0, -1.0, 1.51, 0.0, 1.0_f32];
    let words = [
        target(1, 1, BGRX),
        clear([0.0, 0.0, 0.0, 1.0]),
        write_buffer(2, &vertices.map(f32::to_bits)),
        triangles(2, 3, size, [0.2, 0.4, 0.6, 1.0]),
    ];
    assert_eq!(front.draw(1, &words.concat()), kind::OK_NODATA);
    front.show(0, 1, whole(size));
    front.flush(1, whole(size));
    let (_, pixels) = screen.frame(&mut front, 0);
    for (index, pixel) in pixels.chunks(4).enumerate() {
        let (x, y) = (index as u32 % size.0, index as u32 / size.0);
        // The edge runs between the pixel centres on the diagonals 79 and 80.
        let expected = if x + y <= 79 { [153, 102, 51, 0] } else { [0; 4] };
        assert_eq!(pixel, expected, "{x},{y}");
    }
}

/// Sampling: every pixel is the texel it has to be, twice as big and repeated, in every format.
#[test]
fn a_texture_is_exact() {
    let texture = (32, 16);
    let size = (64, 64);
    let picture = pattern(texture);
    for format in [BGRA, BGRX, RGBA, RGBX] {
        let mut front = device();
        let mut screen = Screen::new(&mut front, 1000);
        assert_eq!(front.create_context(1, VIRGL2), kind::OK_NODATA);
        assert_eq!(front.draw(1, &prologue()), kind::OK_NODATA);
        front.create_texture(1, BGRX, size, 0);
        front.create_vertices(2, 6 * 32);
        front.picture(3, format, texture, 0, &picture);
        (1..=3).for_each(|id| front.use_in(1, id));
        // Where a corner is on screen and in the texture, which is repeated once downwards.
        let corner = |x: f32, y: f32| [x, y, 0.0, 1.0, (x + 1.0) / 2.0, y + 1.0, 0.0, 0.0];
        let corners =
            [(-1.0, -1.0), (1.0, -1.0), (-1.0, 1.0), (-1.0, 1.0), (1.0, -1.0), (1.0, 1.0)];
        let vertices: Vec<u32> =
            corners.iter().flat_map(|(x, y)| corner(*x, *y).map(f32::to_bits)).collect();
        let words = [
            target(1, 1, BGRX),
            clear([1.0; 4]),
            write_buffer(2, &vertices),
            textured(2, 6, size, 3, format),
        ];
        assert_eq!(front.draw(1, &words.concat()), kind::OK_NODATA);
        front.show(0, 1, whole(size));
        front.flush(1, whole(size));
        let (_, pixels) = screen.frame(&mut front, 0);
        for (index, pixel) in pixels.chunks(4).enumerate() {
            let (x, y) = (index as u32 % size.0, index as u32 / size.0);
            let texel = (y / 2 % texture.1 * texture.0 + x / 2) as usize * 4;
            assert_eq!(pixel, &picture[texel..texel + 4], "{x},{y} format {format}");
        }
    }
}

/// Upload, copy by the host's OpenGL, part of a resource on screen, damage smaller than that.
#[test]
fn transfers_copies_and_parts_keep_every_pixel_in_its_place() {
    let size = (67, 41);
    let picture = pattern(size);
    for (format, flags) in
        [(BGRA, 0), (BGRX, RESOURCE_Y_0_TOP), (RGBA, RESOURCE_Y_0_TOP), (RGBX, 0)]
    {
        let mut front = device();
        let mut screen = Screen::new(&mut front, 1000);
        assert_eq!(front.create_context(7, VIRGL), kind::OK_NODATA);
        assert_eq!(front.draw(7, &prologue()), kind::OK_NODATA);
        front.picture(1, format, size, flags, &picture);
        front.picture(2, format, size, flags, &vec![0x40; picture.len()]);
        front.use_in(7, 1);
        front.use_in(7, 2);
        let part = Rect::new(5, 3, 50, 30);
        front.show(0, 2, part);
        front.flush(2, whole(size));
        let (frame, pixels) = screen.frame(&mut front, 0);
        assert_eq!(frame.damage, [Rect::of_size(50, 30)]);
        assert!(pixels.chunks(4).all(|p| p == [0x40, 0x40, 0x40, 0]));
        // The host draws; only the changed part is flushed.
        let change = Rect::new(11, 9, 23, 17);
        // Copies count rows from where OpenGL does.
        let row = if flags == 0 { change.y } else { size.1 - change.y - change.height };
        let (at, extent) = ((change.x, row), (change.width, change.height));
        assert_eq!(front.draw(7, &copy(2, at, 1, at, extent)), kind::OK_NODATA);
        front.flush(2, change);
        let (frame, pixels) = screen.frame(&mut front, 0);
        assert_eq!(frame.damage, [Rect::new(6, 6, 23, 17)]);
        for y in 0..part.height {
            for x in 0..part.width {
                let (rx, ry) = (x + part.x, y + part.y);
                let changed = change.contains(&Rect::new(rx, ry, 1, 1));
                let source = ((ry * size.0 + rx) * 4) as usize;
                let expected =
                    if changed { &picture[source..source + 4] } else { &[0x40, 0x40, 0x40, 0] };
                let seen = ((y * part.width + x) * 4) as usize;
                assert_eq!(
                    pixels[seen..seen + 4],
                    *expected,
                    "{x},{y} format {format} flags {flags}"
                );
            }
        }
        // And back into the guest's memory.
        let address = DATA + (9 << 20);
        assert_eq!(front.about_resource(kind::RESOURCE_DETACH_BACKING, 0, 1), kind::OK_NODATA);
        front.attach(1, address, size.0 * size.1 * 4);
        let answer = front.transfer(kind::TRANSFER_FROM_HOST_3D, 7, 1, &all_of(size));
        assert_eq!(answer, kind::OK_NODATA);
        let mut back = vec![0; picture.len()];
        front.memory.read_slice(&mut back, GuestAddress(address)).unwrap();
        let expected = in_format(&picture, format);
        let same = back.chunks(4).zip(expected.chunks(4)).all(|(a, b)| a[..3] == b[..3]);
        assert!(same, "format {format}");
    }
}

#[test]
fn cursors_are_the_right_way_up_and_have_their_hotspot() {
    let size = (64, 64);
    for flags in [0, RESOURCE_Y_0_TOP] {
        let mut front = device();
        let mut screen = Screen::new(&mut front, 0);
        let picture = pattern(size);
        front.picture(5, BGRA, size, flags, &picture);
        let command = UpdateCursor {
            hdr: CtrlHdr::new(kind::UPDATE_CURSOR),
            pos: CursorPos { x: 100.into(), y: 200.into(), ..CursorPos::default() },
            resource_id: 5.into(),
            hot_x: 3.into(),
            hot_y: 61.into(),
            padding: 0.into(),
        };
        front.submit(1, command.as_bytes());
        assert_eq!(front.wait::<CtrlHdr>(1).kind.get(), kind::OK_NODATA);
        let cursor = screen.cursor(&mut front);
        assert_eq!((cursor.scanout, cursor.at, cursor.hot), (0, (100, 200), (3, 61)));
        assert_eq!(cursor.image, in_format(&picture, BGRA));
        // Not a cursor: wrong size, or not there.
        front.create_texture(6, BGRA, (65, 64), 0);
        for id in [6, 7] {
            let bad = UpdateCursor { resource_id: id.into(), ..command };
            front.submit(1, bad.as_bytes());
            assert!(front.wait::<CtrlHdr>(1).kind.get() >= kind::ERR_UNSPEC);
        }
    }
}

/// The console before a desktop starts: 2D resources of a guest that has 3D.
#[test]
fn two_d_works_beside_three_d() {
    let mut front = device();
    let mut screen = Screen::new(&mut front, 1000);
    let size = (101, 53);
    let picture = pattern(size);
    for (id, format) in [(1, BGRA), (2, BGRX), (3, RGBA), (4, RGBX)] {
        let bytes = in_format(&picture, format);
        front.memory.write_slice(&bytes, GuestAddress(DATA)).unwrap();
        front.create_2d(id, format, size, DATA);
        front.upload(id, whole(size), 0);
        front.show(0, id, whole(size));
        front.flush(id, whole(size));
        let (_, pixels) = screen.frame(&mut front, 0);
        assert!(pixels == picture, "format {format}");
        // A part from the middle of the backing.
        let part = Rect::new(10, 20, 30, 7);
        front.memory.write_slice(&vec![0x77; bytes.len()], GuestAddress(DATA)).unwrap();
        front.upload(id, part, u64::from((part.y * size.0 + part.x) * 4));
        front.flush(id, part);
        let (_, pixels) = screen.frame(&mut front, 0);
        for (index, pixel) in pixels.chunks(4).enumerate() {
            let (x, y) = (index as u32 % size.0, index as u32 / size.0);
            let expected = match part.contains(&Rect::new(x, y, 1, 1)) {
                true => &[0x77, 0x77, 0x77, 0],
                false => &picture[index * 4..index * 4 + 4],
            };
            assert_eq!(pixel, expected, "{x},{y} format {format}");
        }
    }
}

#[test]
fn a_new_size_in_the_middle_of_a_frame() {
    let mut front = device();
    let mut screen = Screen::new(&mut front, 1000);
    let sizes = [(100, 100), (200, 150), (31, 7)];
    for (id, size) in (1..).zip(sizes) {
        front.picture(id, BGRX, size, 0, &pattern(size));
    }
    // All of it before the front end reads anything.
    for (id, size) in (1..).zip(sizes) {
        front.show(0, id, whole(size));
        front.flush(id, whole(size));
    }
    loop {
        let (_, pixels) = screen.frame(&mut front, 0);
        if pixels == pattern(sizes[2]) {
            break;
        }
        assert!(sizes.iter().any(|size| pixels == pattern(*size)), "half of one, half of another");
    }
}

/// How often the threads of a process were given a processor so far.
fn turns(pid: u32) -> u64 {
    let mut turns = 0;
    for task in std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten() {
        let status = std::fs::read_to_string(task.path().join("status")).unwrap_or_default();
        let counts = status.lines().filter(|line| line.contains("ctxt_switches"));
        let numbers = counts.filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
        turns += numbers.sum::<u64>();
    }
    turns
}

/// A viewer looks, nothing changes: no thread of the process runs at all. With nobody looking, what
/// changes is not read back.
#[test]
fn a_static_picture_costs_nothing_and_nor_does_one_without_a_viewer() {
    let mut front = device();
    let mut screen = Screen::new(&mut front, 60);
    let size = (640, 480);
    assert_eq!(front.create_context(1, VIRGL2), kind::OK_NODATA);
    assert_eq!(front.draw(1, &prologue()), kind::OK_NODATA);
    front.create_texture(1, BGRX, size, 0);
    front.use_in(1, 1);
    assert_eq!(front.draw(1, &target(1, 1, BGRX)), kind::OK_NODATA);
    let paint = |front: &mut FrontEnd, value: f32| {
        let slot = front.submit_3d(fenced(kind::SUBMIT_3D, 1, 1, None), &clear([value; 4]));
        assert_eq!(front.wait_for::<CtrlHdr>(0, slot).kind.get(), kind::OK_NODATA);
        front.flush(1, whole(size));
    };
    front.show(0, 1, whole(size));
    for value in [0.2, 0.4, 0.6] {
        paint(&mut front, value);
        screen.frame(&mut front, 0);
    }
    // What is under way ends some time; then there is a second in which nobody runs.
    let pid = front.child.id();
    let is_quiet = |_| {
        let before = turns(pid);
        std::thread::sleep(std::time::Duration::from_secs(1));
        turns(pid) == before
    };
    assert!((0..10).any(is_quiet), "threads of drago-gpu go on running");

    let read_back = |screen: &Screen| screen.slots(0).chunks(4).filter(|p| p[0] != 0x99).count();
    screen.want(&mut front, 0, 0);
    screen.settle(&mut front);
    screen.fill(0, 0x99);
    for value in [0.1, 0.3, 0.5] {
        paint(&mut front, value);
    }
    assert_eq!(read_back(&screen), 0, "pixels that nobody wanted");
    screen.want(&mut front, 0, 60);
    screen.frame(&mut front, 0);
    assert_eq!(read_back(&screen), 640 * 480, "one picture, when somebody looks");
}

#[test]
fn scanouts_show_what_they_were_told() {
    let mut front = device();
    let mut screen = Screen::new(&mut front, 1000);
    for scanout in 0..4_u32 {
        let size = (40 + scanout, 30);
        front.picture(scanout + 1, BGRX, size, 0, &pattern(size));
        front.show(scanout, scanout + 1, whole(size));
        front.flush(scanout + 1, whole(size));
        let (frame, pixels) = screen.frame(&mut front, scanout);
        assert_eq!(frame.scanout, scanout);
        assert!(pixels == pattern(size), "scanout {scanout}");
    }
}

#[test]
fn fences_are_answered_and_keep_their_order() {
    let mut front = device();
    let size = (256, 256);
    assert_eq!(front.create_context(1, VIRGL2), kind::OK_NODATA);
    assert_eq!(front.draw(1, &prologue()), kind::OK_NODATA);
    front.create_texture(1, BGRX, size, 0);
    front.use_in(1, 1);
    assert_eq!(front.draw(1, &target(1, 1, BGRX)), kind::OK_NODATA);
    let work: Vec<u32> = (0..200).flat_map(|n| clear([n as f32 / 255.0; 4])).collect();
    // Numbers above 32 bits are the guest's to choose.
    let first = 0xffff_fff0_u64;
    let mut last = 0;
    for round in 0..100 {
        let slot = front.submit_3d(fenced(kind::SUBMIT_3D, 1, first + round, None), &work);
        // Behind it: a command without work on the same timeline, one without a fence, and one on
        // the context's own ring.
        let same = ResourceCommand {
            hdr: fenced(kind::CTX_ATTACH_RESOURCE, 1, first + round, None),
            resource_id: 1.into(),
            padding: 0.into(),
        };
        let same = front.submit(0, same.as_bytes());
        front.submit(0, CtrlHdr::new(kind::GET_CAPSET).as_bytes());
        assert!(front.wait::<CtrlHdr>(0).kind.get() >= kind::ERR_UNSPEC);
        let ring = front.submit_3d(fenced(kind::SUBMIT_3D, 1, round, Some(0)), &work);
        let answer: CtrlHdr = front.wait_for(0, same);
        assert!(front.is_done(0, slot), "a later fence of a timeline stands for the earlier ones");
        assert_eq!(answer.fence_id.get(), first + round);
        let answer: CtrlHdr = front.wait_for(0, slot);
        assert_eq!((answer.kind.get(), answer.fence_id.get()), (kind::OK_NODATA, first + round));
        let answer: CtrlHdr = front.wait_for(0, ring);
        assert_eq!((answer.fence_id.get(), answer.ring_idx), (round, 0));
        last = ring;
    }
    assert!(front.is_done(0, last));
    // A ring stops although fences are open, and nothing taken is left unanswered.
    for round in 0..5 {
        front.submit_3d(fenced(kind::SUBMIT_3D, 1, round, None), &work);
        front.submit_3d(fenced(kind::SUBMIT_3D, 1, round, Some(0)), &work);
        front.vhost.set_vring_enable(0, false).unwrap();
        let base = front.vhost.get_vring_base(0).unwrap();
        assert_eq!(u32::from(front.used(0)), base);
        front.vhost.get_vring_base(1).unwrap();
        let features = front.vhost.get_features().unwrap();
        // A driver that starts anew finds nothing of the old one.
        front.start(features);
        assert_eq!(front.create_context(1, VIRGL2), kind::OK_NODATA);
        assert_eq!(front.draw(1, &prologue()), kind::OK_NODATA);
        front.create_texture(1, BGRX, size, 0);
        front.use_in(1, 1);
        assert_eq!(front.draw(1, &target(1, 1, BGRX)), kind::OK_NODATA);
    }
}

#[test]
fn capability_sets_and_names() {
    let mut front = device();
    assert_eq!(front.features & 0b1_1111, 0b1_1111, "VIRGL, EDID, UUID, BLOB, CONTEXT_INIT");
    assert_eq!(front.capsets, 2);
    for (index, id) in [(0, VIRGL), (1, VIRGL2)] {
        let hdr = CtrlHdr::new(kind::GET_CAPSET_INFO);
        let command = GetCapsetInfo { hdr, index: index.into(), padding: 0.into() };
        front.submit(0, command.as_bytes());
        let info: RespCapsetInfo = front.wait(0);
        assert_eq!((info.hdr.kind.get(), info.capset_id.get()), (kind::OK_CAPSET_INFO, id));
        let get = |version: u32| GetCapset {
            hdr: CtrlHdr::new(kind::GET_CAPSET),
            capset_id: id.into(),
            capset_version: version.into(),
        };
        let slot = front.submit(0, get(info.max_version.get()).as_bytes());
        let length = 24 + info.max_size.get() as usize;
        let bytes = front.wait_for_bytes(0, slot, length);
        assert_eq!(bytes[..4], kind::OK_CAPSET.to_le_bytes());
        assert!(bytes[24..].iter().filter(|byte| **byte != 0).count() > 50);
        let newer = get(info.max_version.get() + 1);
        assert_eq!(front.run(&[newer.as_bytes()]), kind::ERR_INVALID_PARAMETER);
    }
    for id in [0, 3, 4, u32::MAX] {
        let hdr = CtrlHdr::new(kind::GET_CAPSET);
        let command = GetCapset { hdr, capset_id: id.into(), capset_version: 0.into() };
        assert_eq!(front.run(&[command.as_bytes()]), kind::ERR_INVALID_PARAMETER);
    }
    front.create_texture(1, BGRA, (4, 4), 0);
    front.create_texture(2, BGRA, (4, 4), 0);
    let mut uuid = |resource: u32| {
        let hdr = CtrlHdr::new(kind::RESOURCE_ASSIGN_UUID);
        let command = ResourceCommand { hdr, resource_id: resource.into(), padding: 0.into() };
        front.submit(0, command.as_bytes());
        let answer: RespResourceUuid = front.wait(0);
        (answer.hdr.kind.get() == kind::OK_RESOURCE_UUID).then_some(answer.uuid)
    };
    assert_eq!(uuid(1), uuid(1));
    assert_ne!(uuid(1), uuid(2));
    assert_eq!(uuid(3), None);
}

fn blob(id: u32, memory: u32, size: u64, pieces: &[(u64, u32)]) -> Vec<u8> {
    let command = CreateBlob {
        hdr: CtrlHdr::new(kind::RESOURCE_CREATE_BLOB),
        resource_id: id.into(),
        blob_mem: memory.into(),
        blob_flags: 1.into(),
        entries: (pieces.len() as u32).into(),
        blob_id: 0.into(),
        size: size.into(),
    };
    let mut bytes = command.as_bytes().to_vec();
    for (address, length) in pieces {
        let entry =
            MemEntry { address: (*address).into(), length: (*length).into(), padding: 0.into() };
        bytes.extend_from_slice(entry.as_bytes());
    }
    bytes
}

fn show_blob(id: u32, size: (u32, u32), format: u32, stride: u32, offset: u32) -> SetScanoutBlob {
    SetScanoutBlob {
        hdr: CtrlHdr::new(kind::SET_SCANOUT_BLOB),
        rect: whole(size).into(),
        scanout_id: 0.into(),
        resource_id: id.into(),
        width: size.0.into(),
        height: size.1.into(),
        format: format.into(),
        padding: 0.into(),
        strides: [stride.into(), 0.into(), 0.into(), 0.into()],
        offsets: [offset.into(), 0.into(), 0.into(), 0.into()],
    }
}

/// The guest may use the memory otherwise as soon as it hears that the resource is gone: not before the front
/// end has said that nobody reads it any more, nor where it cannot be asked.
#[test]
fn memory_is_given_back_when_the_front_end_has_forgotten_it() {
    let program = Path::new(env!("CARGO_BIN_EXE_drago-gpu"));
    let mut front = FrontEnd::spawn(program, &["--renderer", "2d"], 0);
    let size = (64, 32);
    let create = blob(1, blob_mem::GUEST, 64 * 32 * 4, &[(DATA, 4096), (DATA + 8192, 4096)]);
    let unref = ResourceCommand {
        hdr: CtrlHdr::new(kind::RESOURCE_UNREF),
        resource_id: 1.into(),
        padding: 0.into(),
    };
    // The front end is asked and answers; its connection ends.
    for asked in [true, false] {
        let mut decoder = Decoder::new(Side::FrontEnd);
        front.receive_until(&mut decoder, |m| *m == FromBackEnd::GetProtocolFeatures);
        let features = ProtocolFeatures::SHM_FRAMES | ProtocolFeatures::GUEST_FRAMES;
        front.send(&FromFrontEnd::ProtocolFeatures(features.bits()), &[]);
        let want = Want { scanout: 0, max_fps: 1000, flags: WANT_FULL, reserved: 0 };
        front.send(&FromFrontEnd::Want(want), &[]);
        assert_eq!(front.run(&[&create]), kind::OK_NODATA);
        front.ok(&show_blob(1, size, BGRX, 256, 0));
        front.flush(1, whole(size));
        front.receive_until(&mut decoder, |m| matches!(m, FromBackEnd::GuestMemory(_)));
        front.receive_until(&mut decoder, |m| matches!(m, FromBackEnd::GuestFrame(_)));
        if !asked {
            front.gpu.shutdown(Shutdown::Both).unwrap();
        }
        let slot = front.submit(0, unref.as_bytes());
        if asked {
            let forget = FromBackEnd::ForgetMemory { resource: 1 };
            front.receive_until(&mut decoder, |m| *m == forget);
            assert!(!front.is_done(0, slot), "the front end has not answered");
            front.send(&FromFrontEnd::MemoryForgotten, &[]);
        } else {
            // Others notice the end of the connection sooner or later than this.
            front.vhost.get_features().unwrap();
            assert!(!front.is_done(0, slot), "the front end may be reading still");
        }
        if !asked {
            front.reconnect_gpu();
        }
        let answer: CtrlHdr = front.wait_for(0, slot);
        assert_eq!(answer.kind.get(), kind::OK_NODATA);
        if asked {
            front.reconnect_gpu();
        }
    }
}

/// Both renderers: pictures are read from guest memory when they are wanted.
#[test]
fn blobs_are_shown_from_guest_memory() {
    for renderer in ["2d", "virgl"] {
        let program = Path::new(env!("CARGO_BIN_EXE_drago-gpu"));
        let mut front = FrontEnd::spawn(program, &["--renderer", renderer], 0);
        let mut screen = Screen::new(&mut front, 1000);
        let size = (57, 33);
        let (stride, offset) = (300, 36);
        for (id, format) in [(1, BGRX), (2, RGBA)] {
            let picture = pattern(size);
            let mut bytes = vec![0xee; (offset + stride * size.1) as usize];
            for (line, row) in in_format(&picture, format).chunks(size.0 as usize * 4).enumerate() {
                let at = (offset + stride * line as u32) as usize;
                bytes[at..at + row.len()].copy_from_slice(row);
            }
            // In two pieces that do not lie in order.
            let (first, second) = bytes.split_at(4096);
            front.memory.write_slice(second, GuestAddress(DATA)).unwrap();
            front.memory.write_slice(first, GuestAddress(DATA + 0x10000)).unwrap();
            let pieces = [(DATA + 0x10000, 4096), (DATA, second.len() as u32)];
            let create = blob(id, blob_mem::GUEST, bytes.len() as u64, &pieces);
            assert_eq!(front.run(&[&create]), kind::OK_NODATA);
            front.ok(&show_blob(id, size, format, stride, offset));
            front.flush(id, whole(size));
            let (_, pixels) = screen.frame(&mut front, 0);
            assert!(pixels == picture, "{renderer}, format {format}");
            // No transfer is needed for what changes.
            front.memory.write_slice(&[0x11; 4], GuestAddress(DATA + 0x10000 + 36)).unwrap();
            front.flush(id, Rect::of_size(1, 1));
            let (frame, pixels) = screen.frame(&mut front, 0);
            assert_eq!(frame.damage, [Rect::of_size(1, 1)]);
            assert_eq!(pixels[..8], [&[0x11, 0x11, 0x11, 0], &picture[4..8]].concat());
            // Contradictions.
            for bad in [
                show_blob(id, size, format, 57 * 4 - 4, offset),
                show_blob(id, size, format, stride, offset + 73),
                show_blob(id, (57, 34), format, stride, offset),
                show_blob(id, size, 5, stride, offset),
                show_blob(id, size, format, u32::MAX, offset),
                show_blob(id, (16385, 1), format, u32::MAX, 0),
                show_blob(id, (0, 0), format, stride, offset),
            ] {
                assert_eq!(front.run(&[bad.as_bytes()]), kind::ERR_INVALID_PARAMETER);
            }
            assert_eq!(
                front.about_resource(kind::RESOURCE_DETACH_BACKING, 0, id),
                kind::ERR_UNSPEC
            );
            assert_eq!(front.about_resource(kind::RESOURCE_UNREF, 0, id), kind::OK_NODATA);
        }
        // Longer than its memory, memory of the host, outside of memory.
        assert!(front.run(&[&blob(9, blob_mem::GUEST, 4097, &[(DATA, 4096)])]) >= kind::ERR_UNSPEC);
        assert!(front.run(&[&blob(9, blob_mem::GUEST, 0, &[])]) >= kind::ERR_UNSPEC);
        assert!(front.run(&[&blob(9, blob_mem::GUEST, 16, &[(0x10, 16)])]) >= kind::ERR_UNSPEC);
        assert!(front.run(&[&blob(9, blob_mem::HOST3D, 4096, &[])]) >= kind::ERR_UNSPEC);
        assert_eq!(front.run(&[&blob(9, blob_mem::GUEST, 4096, &[(DATA, 4096)])]), kind::OK_NODATA);
    }
}

/// Nonsense to the real library: answered, and the device goes on.
#[test]
fn a_hostile_guest_hurts_itself_only() {
    let mut front = device();
    let size = (64, 64);
    assert_eq!(front.create_context(1, VIRGL2), kind::OK_NODATA);
    assert_eq!(front.create_context(1, VIRGL2), kind::ERR_INVALID_CONTEXT_ID);
    assert_eq!(front.create_context(0, VIRGL2), kind::ERR_INVALID_CONTEXT_ID);
    assert_eq!(front.create_context(2, 4), kind::ERR_INVALID_PARAMETER, "no Venus here");
    assert_eq!(front.destroy_context(3), kind::ERR_INVALID_CONTEXT_ID);
    assert_eq!(front.draw(9, &prologue()), kind::ERR_INVALID_CONTEXT_ID);
    // Sizes.
    let flat = Create3d {
        target: 2,
        format: BGRA,
        bind: 2,
        width: 16,
        height: 16,
        depth: 1,
        array_size: 1,
        ..Create3d::default()
    };
    for bad in [
        Create3d { width: 0, ..flat },
        Create3d { height: 16385, ..flat },
        Create3d { depth: u32::MAX, target: 3, ..flat },
        Create3d { array_size: 100_000, target: 7, ..flat },
        Create3d { last_level: 15, ..flat },
        Create3d { nr_samples: 33, ..flat },
        Create3d { target: 9, ..flat },
        Create3d { target: 0, height: 2, ..flat },
        Create3d { format: 0xffff, ..flat },
        Create3d { width: 16384, height: 16384, depth: 2048, target: 3, ..flat },
    ] {
        assert!(front.try_create_3d(1, &bad) >= kind::ERR_UNSPEC, "{bad:?}");
    }
    front.picture(1, BGRA, size, 0, &pattern(size));
    front.use_in(1, 1);
    assert_eq!(
        front.about_resource(kind::CTX_ATTACH_RESOURCE, 1, 77),
        kind::ERR_INVALID_RESOURCE_ID
    );
    assert_eq!(
        front.about_resource(kind::CTX_ATTACH_RESOURCE, 77, 1),
        kind::ERR_INVALID_CONTEXT_ID
    );
    // Transfers out of bounds of the resource or of its backing.
    for bad in [
        Transfer3d { width: 65, height: 1, depth: 1, ..Transfer3d::default() },
        Transfer3d { x: u32::MAX, width: 2, height: 1, depth: 1, ..Transfer3d::default() },
        Transfer3d { width: 64, height: 64, depth: 2, ..Transfer3d::default() },
        Transfer3d { width: 64, height: 64, depth: 1, offset: 4, ..Transfer3d::default() },
        Transfer3d { width: 64, height: 64, depth: 1, offset: u64::MAX, ..Transfer3d::default() },
        Transfer3d { width: 64, height: 64, depth: 1, stride: 512, ..Transfer3d::default() },
        Transfer3d { width: 4, height: 4, depth: 1, level: 3, ..Transfer3d::default() },
        Transfer3d { width: 4, height: 4, depth: 1, level: u32::MAX, ..Transfer3d::default() },
    ] {
        for kind in [kind::TRANSFER_TO_HOST_3D, kind::TRANSFER_FROM_HOST_3D] {
            assert!(front.transfer(kind, 1, 1, &bad) >= kind::ERR_UNSPEC, "{bad:?}");
        }
    }
    // Commands that lie about their length, name what is not there, or mean nothing.
    for words in [
        vec![0xffff_0001],
        command(1, 8, &[1, 99, BGRA, 0, 0]),
        command(200, 0, &[1, 2, 3]),
        command(5, 0, &[u32::MAX, 0, 1]),
        command(17, 0, &[1, 0, u32::MAX, 0, 0, 1, 0, 0, 0, 0, 64, 64, 1]),
    ] {
        // Each in a context of its own: an error makes one useless.
        assert_eq!(front.create_context(20, VIRGL2), kind::OK_NODATA);
        front.use_in(20, 1);
        front.draw(20, &prologue());
        front.draw(20, &words);
        let slot = front.submit_3d(fenced(kind::SUBMIT_3D, 20, 5, None), &words);
        assert_eq!(front.wait_for::<CtrlHdr>(0, slot).fence_id.get(), 5);
        assert_eq!(front.destroy_context(20), kind::OK_NODATA);
    }
    // Contexts are counted.
    let made = (100..1000).take_while(|id| front.create_context(*id, VIRGL2) == kind::OK_NODATA);
    let made = made.count() as u32;
    assert!((32..=64).contains(&made), "{made}");
    (100..100 + made).for_each(|id| assert_eq!(front.destroy_context(id), kind::OK_NODATA));
    // Memory is counted, whatever it is called.
    let big = ResourceCreate2d {
        hdr: CtrlHdr::new(kind::RESOURCE_CREATE_2D),
        resource_id: 0.into(),
        format: BGRA.into(),
        width: 16384.into(),
        height: 16384.into(),
    };
    let mut answers = (50..60)
        .map(|id| front.run(&[ResourceCreate2d { resource_id: id.into(), ..big }.as_bytes()]));
    assert!(answers.any(|answer| answer == kind::ERR_OUT_OF_MEMORY));
    // After all this it still draws.
    let mut screen = Screen::new(&mut front, 1000);
    front.show(0, 1, whole(size));
    front.flush(1, whole(size));
    let (_, pixels) = screen.frame(&mut front, 0);
    assert!(pixels == pattern(size));
}
