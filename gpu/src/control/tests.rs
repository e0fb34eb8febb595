//! What a hostile guest tries.

use gpu_protocol::virtio::{BackingEntry, FLAG_FENCE, MAX_BACKING_ENTRIES, decode};
use vm_memory::{Bytes, GuestAddress};
use zerocopy::FromBytes;

use super::*;
use crate::renderer::Soft2d;

const MEMORY: u64 = 1 << 20;

struct Rig {
    control: Control,
    memory: GuestMemory,
}

impl Rig {
    fn new(limits: Limits) -> Self {
        let control = Control::new(Box::new(Soft2d::new()), limits, Link::new().unwrap());
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0x1000), MEMORY as usize)]).unwrap();
        Self { control, memory }
    }

    fn run(&mut self, command: Command<'_>) -> u32 {
        let hdr = CtrlHdr::default();
        match self.control.execute(&self.memory, &hdr, Ok(command)) {
            Outcome::Answer(bytes) => CtrlHdr::read_from_bytes(&bytes).unwrap().kind.get(),
            Outcome::Ask(question) => panic!("asks {question:?}"),
        }
    }

    fn create(&mut self, resource: u32, width: u32, height: u32) -> u32 {
        self.run(Command::ResourceCreate2d { resource, format: 1, width, height })
    }

    fn attach(&mut self, resource: u32, pieces: &[(u64, u32)]) -> u32 {
        let entries = pieces
            .iter()
            .map(|(address, length)| BackingEntry { address: *address, length: *length })
            .collect();
        self.run(Command::AttachBacking { resource, entries })
    }
}

/// The leaks: a second ATTACH_BACKING lost the first list, UNREF lost list and image.
#[test]
fn cve_2021_3544_nothing_is_leaked() {
    let mut rig = Rig::new(Limits::default());
    assert_eq!(rig.create(1, 64, 64), kind::OK_NODATA);
    assert_eq!(rig.attach(1, &[(0x1000, 4096); 100]), kind::OK_NODATA);
    let bytes = rig.control.bytes();
    assert_eq!(rig.attach(1, &[(0x1000, 4096); 100]), kind::ERR_UNSPEC);
    assert_eq!(rig.create(1, 64, 64), kind::ERR_INVALID_RESOURCE_ID);
    assert_eq!(rig.control.bytes(), bytes);
    // Detaching and attaching again is fine; a refused list leaves nothing behind.
    assert_eq!(rig.run(Command::DetachBacking { resource: 1 }), kind::OK_NODATA);
    assert_eq!(rig.run(Command::DetachBacking { resource: 1 }), kind::ERR_UNSPEC);
    assert_eq!(rig.attach(1, &[(0x1000, 4096), (0, 1)]), kind::ERR_INVALID_PARAMETER);
    assert_eq!(rig.control.bytes(), 64 * 64 * 4);
    assert_eq!(rig.attach(1, &[(0x1000, 4096); 100]), kind::OK_NODATA);
    assert_eq!(rig.run(Command::ResourceUnref { resource: 1 }), kind::OK_NODATA);
    assert_eq!(rig.run(Command::ResourceUnref { resource: 1 }), kind::ERR_INVALID_RESOURCE_ID);
    assert_eq!(rig.control.bytes(), 0);
    for _ in 0..1000 {
        assert_eq!(rig.create(7, 640, 480), kind::OK_NODATA);
        assert_eq!(rig.attach(7, &[(0x1000, 4096)]), kind::OK_NODATA);
        rig.control.reset();
    }
    assert_eq!(rig.control.bytes(), 0);
}

/// The information leak: an answer with uninitialised memory in it.
#[test]
fn cve_2021_3545_answers_contain_nothing_but_answers() {
    let mut rig = Rig::new(Limits::default());
    for index in [0, 1, u32::MAX] {
        let hdr = CtrlHdr::new(kind::GET_CAPSET_INFO);
        let outcome = rig.control.execute(&rig.memory, &hdr, Ok(Command::GetCapsetInfo { index }));
        let Outcome::Answer(bytes) = outcome else { panic!("no answer") };
        let expected = CtrlHdr::new(kind::ERR_INVALID_PARAMETER);
        assert_eq!(bytes, expected.as_bytes(), "the header alone, with zeros for padding");
    }
    let edid = rig.control.answer_to(&CtrlHdr::default(), Question::EdidFromInfo(0));
    let edid = RespEdid::read_from_bytes(&edid).unwrap();
    assert!(edid.edid[edid.bytes().len()..].iter().all(|byte| *byte == 0));
}

/// The write out of bounds: a capability set that does not exist has size 0.
#[test]
fn cve_2021_3546_capability_sets_that_do_not_exist_are_refused() {
    let mut rig = Rig::new(Limits::default());
    let mut bytes = CtrlHdr::new(kind::GET_CAPSET).as_bytes().to_vec();
    bytes.extend_from_slice(&[0xff; 8]);
    let (hdr, command) = decode(&bytes);
    let outcome = rig.control.execute(&rig.memory, &hdr, command);
    let Outcome::Answer(answer) = outcome else { panic!("no answer") };
    assert_eq!(answer, CtrlHdr::new(kind::ERR_INVALID_PARAMETER).as_bytes());
}

#[test]
fn memory_and_numbers_are_limited() {
    let mut rig = Rig::new(Limits { bytes: 1 << 20, resources: 3, ..Limits::default() });
    assert_eq!(rig.create(1, 1024, 257), kind::ERR_OUT_OF_MEMORY);
    assert_eq!(rig.create(1, 1024, 255), kind::OK_NODATA);
    assert_eq!(rig.create(2, 1, 1), kind::OK_NODATA);
    assert_eq!(rig.create(3, 1, 1), kind::OK_NODATA);
    assert_eq!(rig.create(4, 1, 1), kind::ERR_OUT_OF_MEMORY);
    // Lists of backing count as well.
    let list = vec![(0x1000, 0); MAX_BACKING_ENTRIES as usize];
    assert_eq!(rig.attach(2, &list), kind::ERR_OUT_OF_MEMORY);
    assert_eq!(rig.attach(2, &list[..32]), kind::OK_NODATA);
    assert_eq!(rig.run(Command::ResourceUnref { resource: 1 }), kind::OK_NODATA);
    assert_eq!(rig.attach(3, &list), kind::OK_NODATA);
    for (width, height) in [(0, 1), (1, 0), (16385, 1), (u32::MAX, u32::MAX)] {
        assert_eq!(rig.create(9, width, height), kind::ERR_INVALID_PARAMETER);
    }
    assert_eq!(rig.create(0, 1, 1), kind::ERR_INVALID_RESOURCE_ID);
    let odd = Command::ResourceCreate2d { resource: 9, format: 99, width: 1, height: 1 };
    assert_eq!(rig.run(odd), kind::ERR_INVALID_PARAMETER);
}

#[test]
fn rectangles_and_offsets_out_of_bounds_are_refused() {
    let mut rig = Rig::new(Limits::default());
    rig.create(1, 100, 50);
    let whole = Rect::of_size(100, 50);
    let transfer = |rect, offset| Command::TransferToHost2d { resource: 1, rect, offset };
    assert_eq!(rig.run(transfer(whole, 0)), kind::ERR_UNSPEC, "nothing is attached");
    assert_eq!(rig.attach(1, &[(0x1000, 20_000)]), kind::OK_NODATA);
    assert_eq!(rig.run(transfer(whole, 0)), kind::OK_NODATA);
    assert_eq!(rig.run(transfer(whole, 1)), kind::ERR_INVALID_PARAMETER);
    assert_eq!(rig.run(transfer(Rect::new(99, 49, 1, 1), 19_996)), kind::OK_NODATA);
    for (rect, offset) in [
        (Rect::of_size(101, 1), 0),
        (Rect::new(1, 0, 100, 1), 0),
        (Rect::new(u32::MAX, 0, 2, 1), 0),
        (Rect::new(0, u32::MAX, 1, 2), 0),
        (Rect::new(0, 0, u32::MAX, u32::MAX), 0),
        (Rect::new(0, 0, 1, 1), u64::MAX),
        (Rect::new(0, 0, 10, 10), u64::MAX - 100),
    ] {
        assert_eq!(rig.run(transfer(rect, offset)), kind::ERR_INVALID_PARAMETER, "{rect:?}");
        if !rect.fits(100, 50) {
            let flush = Command::ResourceFlush { resource: 1, rect };
            assert_eq!(rig.run(flush), kind::ERR_INVALID_PARAMETER);
            let show = Command::SetScanout { scanout: 0, resource: 1, rect };
            assert_eq!(rig.run(show), kind::ERR_INVALID_PARAMETER);
        }
    }
    let show = |scanout, resource, rect| Command::SetScanout { scanout, resource, rect };
    assert_eq!(rig.run(show(16, 1, whole)), kind::ERR_INVALID_SCANOUT_ID);
    assert_eq!(rig.run(show(u32::MAX, 0, whole)), kind::ERR_INVALID_SCANOUT_ID);
    assert_eq!(rig.run(show(0, 2, whole)), kind::ERR_INVALID_RESOURCE_ID);
    assert_eq!(rig.run(show(0, 1, Rect::default())), kind::ERR_INVALID_PARAMETER);
    assert_eq!(rig.run(show(0, 1, whole)), kind::OK_NODATA);
    // What is shown may vanish.
    assert_eq!(rig.run(Command::ResourceUnref { resource: 1 }), kind::OK_NODATA);
    assert_eq!(rig.control.scanouts[0].source(), None);
}

#[test]
fn cursors_must_be_64_by_64() {
    let mut rig = Rig::new(Limits::default());
    rig.create(1, 64, 64);
    rig.create(2, 32, 64);
    assert!(rig.control.cursor_image(1).is_ok());
    assert_eq!(rig.control.cursor_image(2), Err(Refusal::InvalidParameter));
    assert_eq!(rig.control.cursor_image(3), Err(Refusal::InvalidResource));
    // Without an alpha channel the image is opaque.
    rig.run(Command::ResourceCreate2d { resource: 4, format: 2, width: 64, height: 64 });
    assert!(rig.control.cursor_image(4).unwrap().chunks(4).all(|p| p == [0, 0, 0, 0xff]));
}

#[test]
fn fences_are_repeated_in_every_kind_of_answer() {
    let mut rig = Rig::new(Limits::default());
    let mut hdr = CtrlHdr::new(kind::RESOURCE_UNREF);
    hdr.flags = FLAG_FENCE.into();
    hdr.fence_id = 0x1_0000_0001.into();
    let unref = Ok(Command::ResourceUnref { resource: 5 });
    let Outcome::Answer(bytes) = rig.control.execute(&rig.memory, &hdr, unref) else {
        panic!("no answer");
    };
    let answer = CtrlHdr::read_from_bytes(&bytes).unwrap();
    assert_eq!(answer.kind.get(), kind::ERR_INVALID_RESOURCE_ID);
    assert_eq!((answer.flags.get(), answer.fence_id.get()), (FLAG_FENCE, 0x1_0000_0001));
    let bytes = rig.control.answer_to(&hdr, Question::DisplayInfo);
    let answer = CtrlHdr::read_from_prefix(&bytes).unwrap().0;
    assert_eq!(answer.fence_id.get(), 0x1_0000_0001);
}

/// Commands made of noise: no panic, and never more memory than the limit.
#[test]
fn noise_harms_nobody() {
    let limits = Limits { bytes: 4 << 20, resources: 64, contexts: 4 };
    let mut rig = Rig::new(limits);
    rig.memory.write_slice(&[0x5a; 4096], GuestAddress(0x1000)).unwrap();
    let kinds = [
        0x100, 0x101, 0x102, 0x103, 0x104, 0x105, 0x106, 0x107, 0x10a, 0x10b, 0x10c, 0x10d, 0x200,
        0x202, 0x204, 0x205, 0x207, 0x300,
    ];
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for _ in 0..200_000 {
        let mut bytes = vec![0; (next() % 120) as usize];
        for word in bytes.chunks_mut(4) {
            // Mostly small numbers, so that ids and sizes meet.
            let value = match next() % 8 {
                0 => next() as u32,
                1 => 0x1000,
                _ => (next() % 70) as u32,
            };
            word.copy_from_slice(&value.to_le_bytes()[..word.len()]);
        }
        if let Some(word) = bytes.get_mut(..4) {
            word.copy_from_slice(
                &(kinds[(next() % kinds.len() as u64) as usize] as u32).to_le_bytes(),
            );
        }
        let (hdr, command) = decode(&bytes);
        match rig.control.execute(&rig.memory, &hdr, command) {
            Outcome::Answer(answer) => assert!(answer.len() >= size_of::<CtrlHdr>()),
            Outcome::Ask(question) => {
                rig.control.answer_to(&hdr, question);
            }
        }
        assert!(rig.control.bytes() <= limits.bytes);
    }
    rig.control.reset();
    assert_eq!(rig.control.bytes(), 0);
}

/// A front end that knows guest memory need not know DEVICE_RESET, and hangs up on what it does not know.
#[test]
fn a_reset_is_told_to_who_agreed_to_hear_of_it() {
    use std::{io::Read, os::unix::net::UnixStream};

    use gpu_protocol::socket::{Decoder, FromBackEnd, FromFrontEnd, ProtocolFeatures, Side};

    struct Quiet;

    impl crate::link::Listener for Quiet {
        fn message(&self, _: FromFrontEnd, _: Option<std::os::fd::OwnedFd>) {}
        fn room(&self) {}
        fn closed(&self, _: u64) {}
    }

    let guest_frames = ProtocolFeatures::SHM_FRAMES | ProtocolFeatures::GUEST_FRAMES;
    for (offered, told) in
        [(guest_frames, false), (guest_frames | ProtocolFeatures::DEVICE_RESET, true)]
    {
        let mut rig = Rig::new(Limits::default());
        let (socket, mut peer) = UnixStream::pair().unwrap();
        let listener: std::sync::Arc<dyn crate::link::Listener> = std::sync::Arc::new(Quiet);
        rig.control.link.connect(socket, std::sync::Arc::downgrade(&listener)).unwrap();
        rig.control.negotiate(offered.bits());
        rig.control.tell_reset();
        let mut bytes = [0; 4096];
        let count = peer.read(&mut bytes).unwrap();
        let mut decoder = Decoder::new(Side::FrontEnd);
        decoder.push(&bytes[..count]);
        let mut resets = 0;
        while let Some(raw) = decoder.next_message().unwrap() {
            resets += u32::from(FromBackEnd::decode(&raw).unwrap() == FromBackEnd::DeviceReset);
        }
        assert_eq!(resets, u32::from(told));
    }
}
