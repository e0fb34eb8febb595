//! Pictures that a back end which is not ours has in a dmabuf: a real one where the kernel makes them
//! (`/dev/udmabuf`), and memory that is sealed like one.

use std::{
    fs::File,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{fs::FileExt, net::UnixStream},
    },
    sync::Arc,
};

use gpu_protocol::{
    host_memory::{Map, Unmap},
    socket::{DmabufScanout, FromBackEnd, FromFrontEnd, ProtocolFeatures},
};
use rustix::fs::{MemfdFlags, SealFlags};

use super::{super::sys, pair::Pair, *};
use crate::virtio::shared_memory::SharedMemory;

const WIDTH: u32 = 48;
const HEIGHT: u32 = 20;
/// Longer than a row.
const STRIDE: u32 = 256;
const SIZE: u64 = 8192;

impl Pair {
    fn for_dmabufs(region: Option<Arc<SharedMemory>>) -> Self {
        Self::new(ProtocolFeatures::EDID | ProtocolFeatures::DMABUF2, region)
    }

    fn update(&mut self, rect: Rect) {
        self.tell(FromBackEnd::DmabufUpdate { scanout: 0, rect }, None);
        // Whatever becomes of it: the guest's queue waits for that.
        assert_eq!(self.hear(), FromFrontEnd::DmabufUpdated);
    }
}

fn sealed(size: u64) -> File {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(rustix::fs::memfd_create("picture", flags).unwrap());
    rustix::fs::ftruncate(&file, size).unwrap();
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
    file
}

fn colour(x: u32, y: u32, round: u8) -> [u8; 3] {
    [x as u8 * 3, y as u8 * 5 + round, x as u8 ^ y as u8]
}

/// Fills the buffer; `place` says where a pixel's blue, green and red are.
fn draw(file: &File, place: [usize; 3], round: u8) {
    for y in 0..HEIGHT {
        for x in 0..WIDTH {
            let mut pixel = [0x55; 4];
            for (at, value) in place.into_iter().zip(colour(x, y, round)) {
                pixel[at] = value;
            }
            file.write_all_at(&pixel, u64::from(y * STRIDE + x * 4)).unwrap();
        }
    }
}

/// Whether the picture is what is in `part` of the buffer.
fn shows(picture: &[u8], part: Rect, upside_down: bool, round: u8) -> bool {
    let pixels = picture.chunks_exact(4).enumerate();
    let mut same = pixels.map(|(number, pixel)| {
        let (x, y) = (number as u32 % part.width + part.x, number as u32 / part.width + part.y);
        let y = if upside_down { HEIGHT - 1 - y } else { y };
        pixel[..3] == colour(x, y, round)
    });
    picture.len() == (part.width * part.height * 4) as usize && same.all(|same| same)
}

fn geometry(rect: Rect, fourcc: &[u8; 4], flags: u32) -> DmabufScanout {
    DmabufScanout {
        scanout: 0,
        rect,
        fd_width: WIDTH,
        fd_height: HEIGHT,
        fd_stride: STRIDE,
        fd_flags: flags,
        fd_drm_fourcc: u32::from_le_bytes(*fourcc),
    }
}

#[test]
fn linear_dmabufs_are_shown() {
    let memory = sealed(SIZE);
    let real = sys::udmabuf(memory.as_fd(), SIZE);
    if real.is_none() {
        println!("SKIPPED the real dmabuf: no /dev/udmabuf here");
    }
    let whole = Rect::of_size(WIDTH, HEIGHT);
    let part = Rect::new(5, 3, 20, 12);
    for fd in [Some(OwnedFd::from(memory.try_clone().unwrap())), real].into_iter().flatten() {
        for (fourcc, place) in
            [(b"XR24", [0, 1, 2]), (b"AR24", [0, 1, 2]), (b"XB24", [2, 1, 0]), (b"AB24", [2, 1, 0])]
        {
            for (flags, modifier, rect) in
                [(0, None, whole), (1, Some(0), whole), (0, Some(0), part), (1, None, part)]
            {
                let mut pair = Pair::for_dmabufs(None);
                draw(&memory, place, 1);
                let scanout = geometry(rect, fourcc, flags);
                let message = FromBackEnd::DmabufScanout { scanout, modifier };
                pair.tell(message, Some(fd.try_clone().unwrap()));
                let is_shown = |pair: &Pair, round| {
                    let seen = pair.sink.seen.lock().unwrap();
                    shows(&seen.picture, rect, flags == 1, round)
                };
                pair.update(rect);
                assert!(is_shown(&pair, 1), "{fourcc:?} {flags} {rect:?}");
                draw(&memory, place, 2);
                pair.update(Rect { width: rect.width / 2, ..rect });
                pair.update(rect);
                assert!(is_shown(&pair, 2));
                // Nobody looks: nothing is read. Who looks then sees all of it.
                pair.display.want_frames(0, 0, false);
                draw(&memory, place, 3);
                pair.update(rect);
                assert!(is_shown(&pair, 2));
                pair.display.want_frames(0, 10, false);
                pair.tell(FromBackEnd::CursorHide(Default::default()), None);
                assert!(is_shown(&pair, 3));
            }
        }
    }
}

/// What the back end sends itself is not painted over by the dmabuf before it, not even at its size.
#[test]
fn a_picture_of_the_same_size_takes_over() {
    let memory = sealed(SIZE);
    let whole = Rect::of_size(WIDTH, HEIGHT);
    let mut pair = Pair::for_dmabufs(None);
    draw(&memory, [0, 1, 2], 1);
    let scanout = geometry(whole, b"XR24", 0);
    // The layout was not said.
    let message = FromBackEnd::DmabufScanout { scanout, modifier: Some(0x00ff_ffff_ffff_ffff) };
    pair.tell(message, Some(OwnedFd::from(memory.try_clone().unwrap())));
    pair.update(whole);
    let is_shown =
        |pair: &Pair, round| shows(&pair.sink.seen.lock().unwrap().picture, whole, false, round);
    assert!(is_shown(&pair, 1));
    pair.tell(FromBackEnd::Scanout { scanout: 0, width: WIDTH, height: HEIGHT }, None);
    draw(&memory, [0, 1, 2], 2);
    pair.update(whole);
    pair.display.want_frames(0, 0, false);
    pair.display.want_frames(0, 10, false);
    pair.tell(FromBackEnd::CursorHide(Default::default()), None);
    assert!(!is_shown(&pair, 2));
}

/// What cannot be shown is black, its updates are answered, and nothing else happens.
#[test]
fn other_dmabufs_are_not_touched() {
    let whole = Rect::of_size(WIDTH, HEIGHT);
    let good = geometry(whole, b"XR24", 0);
    let shrinking = {
        let fd = rustix::fs::memfd_create("picture", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, SIZE).unwrap();
        fd
    };
    let fine = || Some(OwnedFd::from(sealed(SIZE)));
    let cases = [
        (good, None, None),
        (good, None, Some(shrinking)),
        (good, None, Some(sealed(4096).into())),
        (good, Some(0x0100_0000_0000_0001), fine()),
        (geometry(whole, b"NV12", 0), None, fine()),
        (geometry(Rect::new(1, 0, WIDTH, HEIGHT), b"XR24", 0), None, fine()),
        (geometry(Rect::new(u32::MAX, 0, 2, 2), b"XR24", 0), None, fine()),
        (DmabufScanout { fd_stride: WIDTH * 4 - 1, ..good }, None, fine()),
        (DmabufScanout { fd_stride: u32::MAX, fd_height: u32::MAX, ..good }, None, fine()),
    ];
    for (number, (scanout, modifier, fd)) in cases.into_iter().enumerate() {
        let mut pair = Pair::for_dmabufs(None);
        pair.tell(FromBackEnd::DmabufScanout { scanout, modifier }, fd);
        pair.update(whole);
        let seen = pair.sink.seen.lock().unwrap();
        assert!(seen.size.is_some(), "case {number}");
        let black = |pixel: &[u8]| pixel[..3] == [0; 3] || pixel[..3] == [0xee; 3];
        assert!(seen.picture.chunks_exact(4).all(black), "case {number}");
    }
    // From one buffer to another kind of picture, and to none.
    let mut pair = Pair::for_dmabufs(None);
    pair.tell(FromBackEnd::DmabufScanout { scanout: good, modifier: None }, fine());
    pair.tell(FromBackEnd::Scanout { scanout: 0, width: 4, height: 4 }, None);
    pair.update(whole);
    let off = geometry(Rect::default(), b"XR24", 0);
    pair.tell(FromBackEnd::DmabufScanout { scanout: off, modifier: None }, None);
    assert_eq!(pair.sink.seen.lock().unwrap().size, None);
    pair.update(whole);
}

/// An order to take something out that comes late must not take out what is there by then.
#[test]
fn only_the_mapping_that_is_meant_is_taken_out() {
    let region = SharedMemory::new(1 << 20).unwrap();
    let mut pair = Pair::for_dmabufs(Some(region.clone()));
    let file = sealed(4096);
    file.write_all_at(&[7; 4096], 0).unwrap();
    let offset = 0x2000;
    let map = |mapping| FromBackEnd::Map(Map { offset, length: 4096, file_offset: 0, mapping });
    let unmap = |mapping| FromBackEnd::Unmap(Unmap { offset, mapping });
    let fd = || Some(OwnedFd::from(file.try_clone().unwrap()));
    pair.tell(map(1), fd());
    assert_eq!(pair.hear(), FromFrontEnd::Mapped(0));
    // The driver starts anew, and with it comes what was on its way.
    pair.display.reset();
    assert_eq!(region.read(offset), 0);
    pair.tell(map(2), fd());
    assert_eq!(pair.hear(), FromFrontEnd::Mapped(0));
    pair.tell(unmap(1), None);
    assert_eq!(region.read(offset), 7);
    pair.tell(unmap(2), None);
    assert_eq!(region.read(offset), 0);
    // A back end that dies leaves nothing, whatever was still to be read of it.
    let (_, generation) = pair.display.socket().unwrap();
    pair.tell(map(3), fd());
    let (ours, _theirs) = UnixStream::pair().unwrap();
    pair.display.connect(ours).unwrap();
    pair.tell(map(3), fd());
    pair.display.disconnect(generation);
    assert_eq!(region.read(offset), 0);
    pair.tell(map(1), fd());
    assert_eq!(region.read(offset), 7);
}
