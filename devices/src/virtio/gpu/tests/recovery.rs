//! Back ends that die, drivers that come and go or break the rules.

use std::time::Instant;

use gpu_protocol::{
    format::PixelFormat,
    virtio::{ContextCreate, CtrlHdr, RespDisplayInfo, Submit3d, kind},
};
use zerocopy::{FromBytes, IntoBytes};

use super::{commands::*, rig::*, *};
use crate::virtio::testing::{Driver, Part};

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
        let mut rig = Rig::on_a_socket(back_end);
        let screen = Resource::new(1, 320, 200);
        rig.create(&screen);
        rig.show(1, screen.whole());
        rig.paint(&screen, screen.whole(), noise(1));
        rig.expect_picture(&screen, screen.whole(), "a picture");
        rig.kill_peer();
        // Whether it is in flight or comes later, every command is answered.
        for _ in 0..20 {
            let hdr = CtrlHdr::new(kind::GET_DISPLAY_INFO);
            let answer = rig.command_raw(hdr.as_bytes(), size_of::<RespDisplayInfo>());
            let hdr = CtrlHdr::read_from_prefix(&answer).unwrap().0;
            assert_eq!(hdr.kind.get(), kind::ERR_UNSPEC);
        }
        rig.cursor(kind::MOVE_CURSOR, 1, 1, 0, (0, 0));
        assert!(!rig.handle.is_alive());
        rig.new_viewer();
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
pub(super) const AT_ONCE: RestartPolicy = RestartPolicy {
    quick: usize::MAX,
    window: Duration::from_secs(60),
    pause: Duration::from_secs(1),
    longest_pause: Duration::from_secs(1),
};

pub(super) fn kill(rig: &Rig) {
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
        rig.new_viewer();
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
    // Longer than any test: it ends when the test says so.
    let pause = Duration::from_secs(3600);
    let restart = RestartPolicy { quick: 0, pause, longest_pause: pause, ..AT_ONCE };
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
        // Answered while there is no successor.
        let answer = rig.command_raw(&screen.flush(screen.whole()), 24);
        assert_eq!(answer[..4], kind::ERR_UNSPEC.to_le_bytes());
        assert_eq!(rig.sink.seen.lock().unwrap().successors, round - 1);
        assert!(!rig.handle.is_alive());
        rig.draw(&screen, screen.whole(), noise(round + 1));
        rig.device.end_pause();
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
    rig.device.end_pause();
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
    let built = super::super::device::build(&config);
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
