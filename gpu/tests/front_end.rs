//! `drago-gpu` against a front end that behaves as badly, or as differently, as front ends can:
//! one that never answers, one that never reads, and one that knows nothing but the standard of
//! QEMU 7.2.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

mod support;

use std::{
    io::{Read, Write},
    os::{fd::OwnedFd, unix::net::UnixStream},
    process::{Command, Stdio},
};

use gpu_protocol::{
    Rect,
    socket::{Decoder, FromBackEnd, FromFrontEnd, Header, Side, id},
    virtio::{CtrlHdr, CursorPos, GetEdid, RespDisplayInfo, RespEdid, UpdateCursor, kind},
};
use support::FrontEnd;
use vhost::{VhostBackend, vhost_user::VhostUserFrontend};
use zerocopy::IntoBytes;

const PROTOCOL_FEATURES: u64 = 1 << 30;

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
    front.send(&FromFrontEnd::ProtocolFeatures(0), &[]);
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
    front.send(&FromFrontEnd::ProtocolFeatures(0), &[]);
    let edid = GetEdid { hdr: CtrlHdr::new(kind::GET_EDID), scanout: 0.into(), padding: 0.into() };
    front.submit(0, edid.as_bytes());
    front.receive_until(&mut decoder, |message| *message == FromBackEnd::GetDisplayInfo);
    let mut info =
        RespDisplayInfo { hdr: CtrlHdr::new(kind::OK_DISPLAY_INFO), ..Default::default() };
    info.scanouts[0].rect = Rect::of_size(1111, 777).into();
    info.scanouts[0].enabled = 1.into();
    front.send(&FromFrontEnd::DisplayInfo(Box::new(info)), &[]);
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
        .args(["--fd", "0", "--renderer", "2d"])
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    drop(ours);
    assert!(child.wait().unwrap().success());
}
