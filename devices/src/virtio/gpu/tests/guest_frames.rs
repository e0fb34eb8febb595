//! Pictures that stay where the guest has them.

use std::sync::Arc;

use gpu_protocol::{
    format::{BlobLayout, PixelFormat},
    guest_frames::{GuestFrame, GuestMemory as Memory, MAX_MEMORIES},
    pieces::Pieces,
    socket::{FromBackEnd, ProtocolFeatures},
    virtio::BackingEntry,
};
use vm_memory::{Bytes, GuestAddress};
use zerocopy::IntoBytes;

use super::{commands::*, pair::Pair, recovery::*, rig::*, *};
use crate::virtio::testing::{Driver, TestInterrupt};

impl Rig {
    fn create_blob(&mut self, screen: &Resource) {
        self.ok_raw(&screen.create_blob());
    }

    fn show_blob(&mut self, screen: &Resource, part: Rect) {
        self.ok_raw(screen.show_blob(part).as_bytes());
    }

    fn draw_and_flush(&mut self, screen: &Resource, rect: Rect, seed: u32) {
        self.draw(screen, rect, noise(seed));
        self.flush(screen, rect);
    }

    /// Keeps the frames that come from now on.
    fn keep(&self) {
        self.sink.seen.lock().unwrap().keep = true;
    }

    fn last_kept(&self) -> Frame {
        self.sink.wait("a frame", |seen| seen.kept.pop())
    }
}

/// The first pixel as it is now.
fn pixel(frame: &Frame) -> Result<[u8; 3], CopyError> {
    let mut bytes = [0; 4];
    frame.copy_rect(Rect::of_size(1, 1), &mut bytes, 4)?;
    Ok([bytes[0], bytes[1], bytes[2]])
}

#[test]
fn nothing_is_copied_but_by_who_looks() {
    for format in [PixelFormat::B8G8R8X8, PixelFormat::R8G8B8A8] {
        let mut rig = Rig::new(BackEnd::Shared).unwrap();
        let screen = Resource { format, ..Resource::new(1, 301, 200) };
        // Its edges are nowhere near those of the guest's pages.
        let part = Rect::new(7, 11, 289, 180);
        rig.create_blob(&screen);
        rig.show_blob(&screen, part);
        rig.keep();
        rig.draw_and_flush(&screen, screen.whole(), 1);
        rig.expect_picture(&screen, part, "a picture");
        // The first picture may come twice, and show what was drawn since.
        let told = (2..12).any(|seed| {
            rig.draw_and_flush(&screen, Rect::new(50, 60, 3, 5), seed);
            rig.expect_picture(&screen, part, "a change");
            let seen = rig.sink.seen.lock().unwrap();
            seen.damage.last().unwrap() == &[Rect::new(43, 49, 3, 5)]
        });
        assert!(told, "only what has changed is told");
        let frame = rig.last_kept();
        // What it drew and did not speak of: the frame is the guest's own memory.
        rig.draw(&screen, Rect::new(7, 11, 1, 1), |_, _| [1, 2, 3, 4]);
        let seen = if format.is_bgrx() { [1, 2, 3] } else { [3, 2, 1] };
        assert_eq!(pixel(&frame), Ok(seen));
    }
}

/// The guest may use the memory for what nobody is to see, as soon as it hears that it can.
#[test]
fn memory_that_the_guest_takes_back_is_not_read() {
    let mut rig = Rig::new(BackEnd::Shared).unwrap();
    let buffers = [1, 2].map(|id| Resource::new(id, 320, 200));
    buffers.iter().for_each(|buffer| rig.create_blob(buffer));
    rig.keep();
    let mut frames = Vec::new();
    for (round, flip) in (0..6).map(|round| (round, buffers[round % 2])) {
        rig.show_blob(&flip, flip.whole());
        rig.draw_and_flush(&flip, flip.whole(), round as u32);
        rig.expect_picture(&flip, flip.whole(), "a page flip");
        frames.push(rig.last_kept());
    }
    let (shown, old) = (frames.remove(5), frames.remove(4));
    assert!(pixel(&old).is_ok());
    rig.unref(buffers[0].id);
    assert_eq!(pixel(&old), Err(CopyError::Gone));
    assert!(pixel(&shown).is_ok());
    assert_eq!(rig.sink.seen.lock().unwrap().scanouts, 2, "switched on, and nothing else");
    // The same number again is another resource.
    rig.create_blob(&buffers[0]);
    rig.show_blob(&buffers[0], buffers[0].whole());
    rig.draw_and_flush(&buffers[0], buffers[0].whole(), 9);
    rig.expect_picture(&buffers[0], buffers[0].whole(), "another resource");
    assert_eq!(pixel(&old), Err(CopyError::Gone));
    rig.unref(buffers[0].id);
    rig.sink.wait("no picture", |seen| seen.size.is_none().then_some(()));
    // A reset does the same to all of them.
    assert!(pixel(&shown).is_ok());
    rig.device.reset();
    assert_eq!(pixel(&shown), Err(CopyError::Gone));
    let features = rig.device.features();
    rig.driver = Driver::start_with(&mut rig.device, features, memory());
    rig.create_blob(&buffers[1]);
    rig.show_blob(&buffers[1], buffers[1].whole());
    rig.draw_and_flush(&buffers[1], buffers[1].whole(), 10);
    rig.expect_picture(&buffers[1], buffers[1].whole(), "a picture of the next driver");
}

/// More than a front end keeps in mind go the other way.
#[test]
fn as_many_resources_as_the_guest_likes() {
    let mut rig = Rig::new(BackEnd::Shared).unwrap();
    rig.keep();
    let mut live = 0;
    for id in 1..=MAX_MEMORIES as u32 + 3 {
        let screen = Resource { at: u64::from(id) << 16, ..Resource::new(id, 100, 50) };
        rig.create_blob(&screen);
        rig.show_blob(&screen, screen.whole());
        rig.draw_and_flush(&screen, screen.whole(), id);
        rig.expect_picture(&screen, screen.whole(), "one of many");
        let frame = rig.last_kept();
        rig.draw(&screen, Rect::of_size(1, 1), |_, _| [9, 8, 7, 6]);
        live += usize::from(pixel(&frame) == Ok([9, 8, 7]));
        // Its slot, if it has one, is free again.
        drop(frame);
    }
    assert_eq!(live, MAX_MEMORIES);
}

#[test]
fn a_successor_knows_where_the_picture_is() {
    drago_gpu();
    let config = GpuConfig { restart: AT_ONCE, ..GpuConfig::default() };
    let mut rig = Rig::with(BackEnd::Shared, config).unwrap();
    let screen = Resource::new(1, 300, 200);
    rig.create_blob(&screen);
    rig.show_blob(&screen, screen.whole());
    rig.keep();
    rig.draw_and_flush(&screen, screen.whole(), 1);
    rig.expect_picture(&screen, screen.whole(), "a picture");
    let frame = rig.last_kept();
    kill(&rig);
    rig.sink.wait("a successor", |seen| (seen.successors == 1).then_some(()));
    assert_eq!(pixel(&frame), Err(CopyError::Gone), "what it showed is history");
    rig.new_viewer();
    rig.expect_picture(&screen, screen.whole(), "the picture of a guest that does nothing");
    rig.keep();
    rig.draw_and_flush(&screen, Rect::new(3, 4, 5, 6), 2);
    rig.expect_picture(&screen, screen.whole(), "a change");
    let frame = rig.last_kept();
    rig.draw(&screen, Rect::of_size(1, 1), |_, _| [9, 8, 7, 6]);
    assert_eq!(pixel(&frame), Ok([9, 8, 7]), "again without a copy");
}

/// Where there is no successor the guest hears that it has its memory back.
#[test]
fn the_last_picture_of_a_back_end_is_kept_without_the_guest() {
    let mut rig = Rig::on_a_socket(BackEnd::Shared);
    let screen = Resource::new(1, 320, 200);
    rig.create_blob(&screen);
    rig.show_blob(&screen, screen.whole());
    rig.draw_and_flush(&screen, screen.whole(), 1);
    rig.expect_picture(&screen, screen.whole(), "a picture");
    let picture = rig.sink.seen.lock().unwrap().picture.clone();
    rig.kill_peer();
    rig.sink.wait("its death", |seen| (seen.deaths == 1).then_some(()));
    rig.draw(&screen, screen.whole(), |_, _| [0x55; 4]);
    rig.new_viewer();
    rig.sink.wait("the last picture", |seen| (seen.picture == picture).then_some(()));
}

/// What the back end has said of the last driver's memory may lie unread in the socket when the next
/// driver starts: nothing of it is read, and nothing of it takes a place.
#[test]
fn memory_of_a_driver_that_is_gone_is_not_read_for_the_next_one() {
    let features = ProtocolFeatures::SHM_FRAMES
        | ProtocolFeatures::GUEST_FRAMES
        | ProtocolFeatures::DEVICE_RESET;
    let mut pair = Pair::new(features, None);
    let guest = memory();
    let size = (8, 4);
    let layout = BlobLayout { format: PixelFormat::B8G8R8X8, stride: 32, offset: 0 };
    let whole = Rect::of_size(size.0, size.1);
    let told = |resource: u32| {
        let address = u64::from(resource) << 12;
        let pieces = Pieces::new(vec![BackingEntry { address, length: 4096 }]);
        FromBackEnd::GuestMemory(Memory { resource, pieces })
    };
    let frame = |resource| {
        let (part, damage) = (whole, vec![whole]);
        let frame = GuestFrame { scanout: 0, resource, part, layout, sequence: 1, damage };
        FromBackEnd::GuestFrame(frame)
    };
    let shows = |pair: &Pair, value| pair.sink.seen.lock().unwrap().picture == [value; 8 * 4 * 4];
    let resources = MAX_MEMORIES as u32;
    for resource in 1..=2 * resources {
        let at = GuestAddress(u64::from(resource) << 12);
        guest.write_slice(&[resource as u8; 4096], at).unwrap();
    }
    pair.display.set_driver(Arc::new(TestInterrupt::new(2)), guest.clone());
    let on = FromBackEnd::Scanout { scanout: 0, width: size.0, height: size.1 };
    pair.tell(on.clone(), None);
    pair.tell(told(1), None);
    pair.tell(frame(1), None);
    assert!(shows(&pair, 1));
    // The device is reset, and the next driver is there before the socket has been read.
    pair.display.expect_reset();
    pair.display.reset();
    pair.display.set_driver(Arc::new(TestInterrupt::new(2)), guest);
    for resource in 1..=resources {
        pair.tell(told(resource), None);
    }
    pair.tell(on.clone(), None);
    pair.tell(frame(2), None);
    assert!(!shows(&pair, 2), "what the last driver has shown");
    pair.tell(FromBackEnd::DeviceReset, None);
    // As many as ever for the next one.
    pair.tell(on, None);
    for resource in resources + 1..=2 * resources {
        pair.tell(told(resource), None);
        pair.tell(frame(resource), None);
        assert!(shows(&pair, resource as u8), "{resource}");
    }
}

/// A back end that knows guest memory need not know DEVICE_RESET: nobody waits for it then.
#[test]
fn a_back_end_that_tells_of_no_reset_is_listened_to_after_one() {
    let features = ProtocolFeatures::SHM_FRAMES | ProtocolFeatures::GUEST_FRAMES;
    let mut pair = Pair::new(features, None);
    let guest = memory();
    guest.write_slice(&[5; 4096], GuestAddress(4096)).unwrap();
    let whole = Rect::of_size(8, 4);
    let layout = BlobLayout { format: PixelFormat::B8G8R8X8, stride: 32, offset: 0 };
    for _ in 0..2 {
        pair.display.set_driver(Arc::new(TestInterrupt::new(2)), guest.clone());
        pair.tell(FromBackEnd::Scanout { scanout: 0, width: 8, height: 4 }, None);
        let pieces = Pieces::new(vec![BackingEntry { address: 4096, length: 4096 }]);
        pair.tell(FromBackEnd::GuestMemory(Memory { resource: 1, pieces }), None);
        let damage = vec![whole];
        let frame =
            GuestFrame { scanout: 0, resource: 1, part: whole, layout, sequence: 1, damage };
        pair.tell(FromBackEnd::GuestFrame(frame), None);
        let picture = std::mem::take(&mut pair.sink.seen.lock().unwrap().picture);
        assert_eq!(picture, [5; 8 * 4 * 4]);
        pair.display.expect_reset();
        pair.display.reset();
    }
}
