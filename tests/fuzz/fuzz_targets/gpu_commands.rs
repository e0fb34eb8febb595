//! `drago-gpu`'s books and renderer: a guest's commands in any order, mixed with whatever the front
//! end sends, up to frames drawn into shared memory.

#![no_main]

use std::{
    io::Read,
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::{Arc, OnceLock},
};

use drago_fuzz::{Input, MemoryFile};
use drago_gpu::{
    GuestMemory,
    control::{Control, Limits, Outcome},
    link::{Link, Listener},
    renderer::Soft2d,
};
use gpu_protocol::{
    frames::{Release, ShmScanout, Want},
    socket::FromFrontEnd,
    virtio::{CtrlHdr, RespDisplayInfo, decode},
};
use libfuzzer_sys::fuzz_target;
use vm_memory::GuestAddress;
use zerocopy::IntoBytes;

/// Largest frame memory that is really made; larger layouts come with a file that is too short.
const MOST_MEMORY: u64 = 4 << 20;
const LIMITS: Limits = Limits { bytes: 4 << 20, resources: 8, contexts: 4 };
const KINDS: [u32; 26] = [
    0x100, 0x101, 0x102, 0x103, 0x104, 0x105, 0x106, 0x107, 0x108, 0x109, 0x10a, 0x10b, 0x10c, 0x10d,
    0x200, 0x201, 0x202, 0x203, 0x204, 0x205, 0x206, 0x207, 0x208, 0x209, 0x300, 0x301,
];

/// Nobody listens: messages of the front end are made here.
struct Quiet;

impl Listener for Quiet {
    fn message(&self, _: FromFrontEnd, _: Option<OwnedFd>) {}
    fn room(&self) {}
    fn closed(&self, _: u64) {}
}

struct Fixture {
    link: Arc<Link>,
    peer: UnixStream,
    memory: GuestMemory,
    _listener: Arc<dyn Listener>,
}

impl Fixture {
    /// One for all inputs: it holds a thread.
    fn get() -> &'static Self {
        static FIXTURE: OnceLock<Fixture> = OnceLock::new();
        FIXTURE.get_or_init(|| {
            let link = Link::new().unwrap();
            let (socket, peer) = UnixStream::pair().unwrap();
            peer.set_nonblocking(true).unwrap();
            let listener: Arc<dyn Listener> = Arc::new(Quiet);
            link.connect(socket, Arc::downgrade(&listener)).unwrap();
            let memory = GuestMemory::from_ranges(&[(GuestAddress(0x1000), 1 << 20)]).unwrap();
            Self { link, peer, memory, _listener: listener }
        })
    }

    /// Reads what was sent, so that there is room for more.
    fn drain(&self) {
        let mut buffer = [0; 64 << 10];
        while matches!((&self.peer).read(&mut buffer), Ok(1..)) {}
    }
}

fn execute(control: &mut Control, memory: &GuestMemory, bytes: &[u8]) {
    let (hdr, command) = decode(bytes);
    let answer = match control.execute(memory, &hdr, command) {
        Outcome::Answer(answer) => answer,
        Outcome::Ask(question) => control.answer_to(&hdr, question),
    };
    assert!(answer.len() >= size_of::<CtrlHdr>(), "an answer has a header");
    assert!(control.bytes() <= LIMITS.bytes, "{} bytes", control.bytes());
}

fn set_slots(control: &mut Control, input: &mut Input<'_>) {
    let (scanout, generation) = (u32::from(input.u8() % 17), u32::from(input.u8() % 4));
    let (width, height) = (input.number(), input.number());
    let slots = u32::from(input.u8() % 9);
    let mut layout = ShmScanout::layout(scanout, generation, width, height, slots)
        .unwrap_or(ShmScanout { scanout, generation, width, height, ..ShmScanout::default() });
    match input.u8() {
        0 => layout.stride = input.number(),
        1 => layout.slot_size = input.u64(),
        2 => layout.slots = input.number(),
        3 => layout.fourcc = input.u32(),
        _ => {}
    }
    let size = layout.checked_size().unwrap_or(0).min(MOST_MEMORY);
    let mut memory = MemoryFile::new().unwrap();
    memory.fill(&[], size).unwrap();
    if input.u8() & 7 != 0 {
        rustix::fs::fcntl_add_seals(&memory.file, rustix::fs::SealFlags::SHRINK).unwrap();
    }
    control.set_slots(layout, Some(memory.file.into()));
}

/// A picture that is shown by the rules, as a place to go astray from.
fn show(control: &mut Control, memory: &GuestMemory, input: &mut Input<'_>) {
    let (width, height) = (u32::from(input.u8() % 80) + 1, u32::from(input.u8() % 80) + 1);
    control.negotiate(u64::MAX);
    let mut run = |kind: u32, words: &[u32]| {
        let mut command = CtrlHdr::new(kind).as_bytes().to_vec();
        words.iter().for_each(|word| command.extend_from_slice(&word.to_le_bytes()));
        execute(control, memory, &command);
    };
    run(0x101, &[1, 1, width, height]);
    run(0x106, &[1, 1, 0x1000, 0, 80 * 80 * 4, 0]);
    run(0x105, &[0, 0, width, height, 0, 0, 1, 0]);
    run(0x103, &[0, 0, width, height, 0, 1]);
    let layout = ShmScanout::layout(0, 1, width, height, 3).unwrap();
    let mut slots = MemoryFile::new().unwrap();
    slots.fill(&[], layout.checked_size().unwrap()).unwrap();
    rustix::fs::fcntl_add_seals(&slots.file, rustix::fs::SealFlags::SHRINK).unwrap();
    control.set_slots(layout, Some(slots.file.into()));
    control.want(&Want { scanout: 0, max_fps: 1_000_000, flags: 1, reserved: 0 });
    control.pump();
}

fuzz_target!(|bytes: &[u8]| {
    let fixture = Fixture::get();
    let memory = &fixture.memory;
    let mut input = Input::new(bytes);
    let mut control = Control::new(Box::new(Soft2d::new()), LIMITS, fixture.link.clone());
    control.connected();
    while !input.is_empty() {
        match input.u8() % 16 {
            // A command of words that are mostly small, so that ids and sizes meet.
            0..8 => {
                let kind = KINDS[usize::from(input.u8()) % KINDS.len()];
                let mut command = CtrlHdr::new(kind).as_bytes().to_vec();
                for _ in 0..input.u8() % 16 {
                    command.extend_from_slice(&input.number().to_le_bytes());
                }
                execute(&mut control, memory, &command);
            }
            8 => {
                let length = usize::from(input.u8());
                execute(&mut control, memory, input.take(length));
            }
            9 => control.negotiate(input.u64()),
            10 => control.negotiate(u64::MAX),
            11 => set_slots(&mut control, &mut input),
            12 => control.release(&Release {
                scanout: input.u8().into(),
                generation: (input.u8() % 4).into(),
                slot: input.u8().into(),
                reserved: 0,
            }),
            13 => control.want(&Want {
                scanout: input.u8().into(),
                max_fps: input.number(),
                flags: input.u8().into(),
                reserved: 0,
            }),
            14 => {
                let mut info = RespDisplayInfo::default();
                for word in info.as_mut_bytes().chunks_exact_mut(4).take(40) {
                    word.copy_from_slice(&input.number().to_le_bytes());
                }
                let hdr = input.u8();
                if hdr & 1 == 0 {
                    info.hdr = CtrlHdr::new(gpu_protocol::virtio::kind::OK_DISPLAY_INFO);
                }
                control.set_display(&info);
            }
            _ => match input.u8() % 5 {
                4 => show(&mut control, memory, &mut input),
                0 => drop(control.cursor_image(input.number())),
                1 => control.reset(),
                2 => control.connected(),
                _ => fixture.drain(),
            },
        }
        assert!(control.bytes() <= LIMITS.bytes);
    }
    control.reset();
    assert_eq!(control.bytes(), 0, "a reset gives everything back");
    fixture.drain();
});
