//! What the commands of the control queue mean: the books about resources, backing and scanouts,
//! and every check of what a guest asks for (VIRTIO 1.3 §5.7.6).

use std::{collections::HashMap, os::fd::OwnedFd, sync::Arc, time::Instant};

use gpu_protocol::{
    Rect,
    edid::{self, Monitor},
    format::PixelFormat,
    frames::{MAX_SIZE, Release, ShmScanout, Want},
    socket::{FromBackEnd, ProtocolFeatures},
    virtio::{
        BackingEntry, CURSOR_BYTES, CURSOR_SIZE, Command, CtrlHdr, MAX_SCANOUTS, Refusal,
        RespDisplayInfo, RespEdid, kind,
    },
};
use vm_memory::VolatileSlice;
use zerocopy::IntoBytes;

use crate::{
    GuestMemory,
    backing::Backing,
    link::{CursorImage, Link},
    renderer::{Layout, Renderer},
    scanout::{Scanout, Source, Transport},
};

/// Limits on what one guest may occupy in this process.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of resources and their books together.
    pub bytes: u64,
    /// Number of resources.
    pub resources: usize,
}

impl Default for Limits {
    /// 512 MiB: 15 frames of 4K.
    fn default() -> Self {
        Self { bytes: 512 << 20, resources: 16_384 }
    }
}

#[derive(Debug)]
struct Resource {
    layout: Layout,
    backing: Option<Backing>,
}

/// A question to the front end on which the queue waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Question {
    /// GET_DISPLAY_INFO.
    DisplayInfo,
    /// GET_EDID that the front end answers.
    Edid(u32),
    /// GET_EDID that is answered here, from the display info the front end gives.
    EdidFromInfo(u32),
}

/// What became of a command.
#[derive(Debug)]
pub enum Outcome {
    /// Answer with these bytes.
    Answer(Vec<u8>),
    /// The front end has to be asked; [`Control::answer_to`] makes the answer of its reply.
    Ask(Question),
}

/// The state behind the control queue.
pub struct Control {
    renderer: Box<dyn Renderer>,
    limits: Limits,
    bytes: u64,
    resources: HashMap<u32, Resource>,
    scanouts: [Scanout; MAX_SCANOUTS],
    link: Arc<Link>,
    /// Of the GPU socket; `None` until negotiated.
    features: Option<ProtocolFeatures>,
    display: RespDisplayInfo,
    edids: HashMap<u32, Box<RespEdid>>,
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control")
            .field("resources", &self.resources.len())
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}

fn header_only(hdr: &CtrlHdr, kind: u32) -> Outcome {
    Outcome::Answer(hdr.answer(kind).as_bytes().to_vec())
}

impl Control {
    /// No resources, nothing shown.
    pub fn new(renderer: Box<dyn Renderer>, limits: Limits, link: Arc<Link>) -> Self {
        Self {
            renderer,
            limits,
            bytes: 0,
            resources: HashMap::new(),
            scanouts: Default::default(),
            link,
            features: None,
            display: default_display(),
            edids: HashMap::new(),
        }
    }

    /// The renderer, for its features.
    pub fn renderer(&self) -> &dyn Renderer {
        &*self.renderer
    }

    /// Bytes that count against [`Limits::bytes`].
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Drops everything the guest made, as a device reset does.
    pub fn reset(&mut self) {
        for scanout in &mut self.scanouts {
            scanout.set_source(None);
        }
        for (id, _) in self.resources.drain() {
            self.renderer.destroy(id);
        }
        self.bytes = 0;
        self.link.reset_cursors();
        self.pump();
    }

    /// Executes a command.
    pub fn execute(
        &mut self,
        memory: &GuestMemory,
        hdr: &CtrlHdr,
        command: Result<Command, Refusal>,
    ) -> Outcome {
        let done = match command {
            Ok(Command::GetDisplayInfo) => return Outcome::Ask(Question::DisplayInfo),
            Ok(Command::GetEdid { scanout }) if (scanout as usize) < MAX_SCANOUTS => {
                let has_edid =
                    self.features.is_some_and(|features| features.contains(ProtocolFeatures::EDID));
                return Outcome::Ask(match has_edid {
                    true => Question::Edid(scanout),
                    false => Question::EdidFromInfo(scanout),
                });
            }
            Ok(Command::GetEdid { .. }) => Err(Refusal::InvalidScanout),
            Ok(Command::ResourceCreate2d { resource, format, width, height }) => {
                self.create_2d(resource, format, width, height)
            }
            Ok(Command::ResourceUnref { resource }) => self.unref(resource),
            Ok(Command::SetScanout { scanout, resource, rect }) => {
                self.set_scanout(scanout, resource, rect)
            }
            Ok(Command::ResourceFlush { resource, rect }) => self.flush(resource, rect),
            Ok(Command::TransferToHost2d { resource, rect, offset }) => {
                self.transfer(resource, rect, offset, memory)
            }
            Ok(Command::AttachBacking { resource, entries }) => {
                self.attach(resource, entries, memory)
            }
            Ok(Command::DetachBacking { resource }) => self.detach(resource),
            // There are no capability sets, so no index is valid.
            Ok(Command::GetCapsetInfo { .. }) => Err(Refusal::InvalidParameter),
            // Cursor commands belong into the other queue.
            Ok(
                Command::UpdateCursor { .. } | Command::MoveCursor { .. } | Command::Other { .. },
            ) => Err(Refusal::Unspecified),
            Err(refusal) => Err(refusal),
        };
        match done {
            Ok(()) => header_only(hdr, kind::OK_NODATA),
            Err(refusal) => {
                tracing::debug!(kind = hdr.kind.get(), %refusal, "a command was refused");
                header_only(hdr, refusal as u32)
            }
        }
    }

    /// The answer to the guest, from what the front end last said.
    pub fn answer_to(&self, hdr: &CtrlHdr, question: Question) -> Vec<u8> {
        match question {
            Question::DisplayInfo => {
                let hdr = hdr.answer(kind::OK_DISPLAY_INFO);
                RespDisplayInfo { hdr, ..self.display }.as_bytes().to_vec()
            }
            Question::Edid(scanout) if self.edids.contains_key(&scanout) => {
                let edid = &self.edids[&scanout];
                let answer = RespEdid { hdr: hdr.answer(kind::OK_EDID), ..**edid };
                answer.as_bytes().to_vec()
            }
            Question::Edid(scanout) | Question::EdidFromInfo(scanout) => {
                let rect = self.display.scanouts.get(scanout as usize).map(|one| one.rect);
                let size = rect.filter(|rect| rect.width.get() > 0 && rect.height.get() > 0);
                let (width, height) =
                    size.map_or(DEFAULT_SIZE, |rect| (rect.width.get(), rect.height.get()));
                let edid = edid::generate(&Monitor::new(scanout, width, height));
                RespEdid::new(hdr.answer(kind::OK_EDID), &edid).as_bytes().to_vec()
            }
        }
    }

    /// Remembers what the front end said.
    pub fn set_display(&mut self, info: &RespDisplayInfo) {
        if info.hdr.kind.get() == kind::OK_DISPLAY_INFO {
            self.display = *info;
        }
    }

    /// Remembers what the front end said.
    pub fn set_edid(&mut self, scanout: u32, edid: Box<RespEdid>) {
        if edid.hdr.kind.get() == kind::OK_EDID {
            self.edids.insert(scanout, edid);
        } else {
            self.edids.remove(&scanout);
        }
    }

    /// The pixels of a cursor image.
    pub fn cursor_image(&mut self, resource: u32) -> Result<CursorImage, Refusal> {
        let layout = self.resources.get(&resource).ok_or(Refusal::InvalidResource)?.layout;
        if layout.width != CURSOR_SIZE || layout.height != CURSOR_SIZE {
            return Err(Refusal::InvalidParameter);
        }
        let mut image: CursorImage = Box::new([0; CURSOR_BYTES]);
        let whole = Rect::of_size(CURSOR_SIZE, CURSOR_SIZE);
        let target = VolatileSlice::from(&mut image[..]);
        self.renderer.read_pixels(resource, whole, &target, CURSOR_SIZE as usize * 4)?;
        if !layout.format.has_alpha() {
            image.chunks_exact_mut(4).for_each(|pixel| pixel[3] = 0xff);
        }
        Ok(image)
    }

    fn create_2d(&mut self, id: u32, format: u32, width: u32, height: u32) -> Result<(), Refusal> {
        if id == 0 || self.resources.contains_key(&id) {
            return Err(Refusal::InvalidResource);
        }
        let format = PixelFormat::from_wire(format).ok_or(Refusal::InvalidParameter)?;
        let sizes = 1..=MAX_SIZE;
        if !sizes.contains(&width) || !sizes.contains(&height) {
            return Err(Refusal::InvalidParameter);
        }
        let layout = Layout { format, width, height };
        if self.resources.len() >= self.limits.resources {
            return Err(Refusal::OutOfMemory);
        }
        self.charge(layout.bytes())?;
        if let Err(refusal) = self.renderer.create_2d(id, layout) {
            self.bytes -= layout.bytes();
            return Err(refusal);
        }
        self.resources.insert(id, Resource { layout, backing: None });
        Ok(())
    }

    fn unref(&mut self, id: u32) -> Result<(), Refusal> {
        let resource = self.resources.remove(&id).ok_or(Refusal::InvalidResource)?;
        self.bytes -= resource.layout.bytes();
        self.bytes -= resource.backing.map_or(0, |backing| backing.cost());
        for scanout in &mut self.scanouts {
            if scanout.source().is_some_and(|source| source.resource == id) {
                scanout.set_source(None);
            }
        }
        self.renderer.destroy(id);
        self.pump();
        Ok(())
    }

    fn attach(
        &mut self,
        id: u32,
        entries: Vec<BackingEntry>,
        memory: &GuestMemory,
    ) -> Result<(), Refusal> {
        let resource = self.resources.get(&id).ok_or(Refusal::InvalidResource)?;
        if resource.backing.is_some() {
            return Err(Refusal::Unspecified);
        }
        let backing = Backing::new(entries, memory)?;
        self.charge(backing.cost())?;
        if let Some(resource) = self.resources.get_mut(&id) {
            resource.backing = Some(backing);
        }
        Ok(())
    }

    fn detach(&mut self, id: u32) -> Result<(), Refusal> {
        let resource = self.resources.get_mut(&id).ok_or(Refusal::InvalidResource)?;
        let backing = resource.backing.take().ok_or(Refusal::Unspecified)?;
        self.bytes -= backing.cost();
        Ok(())
    }

    fn transfer(
        &mut self,
        id: u32,
        rect: Rect,
        offset: u64,
        memory: &GuestMemory,
    ) -> Result<(), Refusal> {
        let resource = self.resources.get(&id).ok_or(Refusal::InvalidResource)?;
        if !rect.fits(resource.layout.width, resource.layout.height) {
            return Err(Refusal::InvalidParameter);
        }
        let backing = resource.backing.as_ref().ok_or(Refusal::Unspecified)?;
        self.renderer.upload(id, rect, offset, backing, memory)
    }

    fn set_scanout(&mut self, id: u32, resource: u32, rect: Rect) -> Result<(), Refusal> {
        let scanout = self.scanouts.get_mut(id as usize).ok_or(Refusal::InvalidScanout)?;
        let source = if resource == 0 {
            None
        } else {
            let layout = self.resources.get(&resource).ok_or(Refusal::InvalidResource)?.layout;
            if rect.is_empty() || !rect.fits(layout.width, layout.height) {
                return Err(Refusal::InvalidParameter);
            }
            Some(Source { resource, rect })
        };
        if scanout.source() != source {
            scanout.set_source(source);
            self.pump();
        }
        Ok(())
    }

    fn flush(&mut self, id: u32, rect: Rect) -> Result<(), Refusal> {
        let layout = self.resources.get(&id).ok_or(Refusal::InvalidResource)?.layout;
        if !rect.fits(layout.width, layout.height) {
            return Err(Refusal::InvalidParameter);
        }
        for scanout in &mut self.scanouts {
            scanout.flush(id, rect);
        }
        self.pump();
        Ok(())
    }

    fn charge(&mut self, bytes: u64) -> Result<(), Refusal> {
        let total = self.bytes.checked_add(bytes).filter(|total| *total <= self.limits.bytes);
        self.bytes = total.ok_or(Refusal::OutOfMemory)?;
        Ok(())
    }
}

/// The front end's side of the work.
impl Control {
    /// A GPU socket was connected: nothing is negotiated yet.
    pub fn connected(&mut self) {
        self.features = None;
        self.edids.clear();
        self.scanouts.iter_mut().for_each(Scanout::reconnect);
        self.link.send(&FromBackEnd::GetProtocolFeatures);
    }

    /// The front end offers these protocol features.
    pub fn negotiate(&mut self, offered: u64) {
        let known = ProtocolFeatures::EDID | ProtocolFeatures::SHM_FRAMES;
        let features = ProtocolFeatures::from_bits_truncate(offered) & known;
        tracing::info!(?features, "GPU socket negotiated");
        self.link.send(&FromBackEnd::SetProtocolFeatures(features.bits()));
        self.features = Some(features);
        self.pump();
    }

    /// Whether [`negotiate`](Self::negotiate) has happened.
    pub fn is_negotiated(&self) -> bool {
        self.features.is_some()
    }

    /// SHM_SCANOUT arrived.
    pub fn set_slots(&mut self, layout: ShmScanout, fd: Option<OwnedFd>) {
        if let Some(scanout) = self.scanouts.get_mut(layout.scanout as usize) {
            scanout.set_slots(layout, fd);
            self.pump();
        }
    }

    /// RELEASE arrived.
    pub fn release(&mut self, release: &Release) {
        if let Some(scanout) = self.scanouts.get_mut(release.scanout as usize) {
            scanout.release(release);
            self.pump();
        }
    }

    /// WANT arrived.
    pub fn want(&mut self, want: &Want) {
        if let Some(scanout) = self.scanouts.get_mut(want.scanout as usize) {
            scanout.want(want);
            self.pump();
        }
    }

    /// Sends pictures as far as possible.
    pub fn pump(&mut self) {
        let transport =
            self.features.map(|features| match features.contains(ProtocolFeatures::SHM_FRAMES) {
                true => Transport::Shm,
                false => Transport::Update,
            });
        for (id, scanout) in self.scanouts.iter_mut().enumerate() {
            scanout.pump(id as u32, transport, &mut *self.renderer, &self.link);
        }
    }

    /// When [`pump`](Self::pump) has to be called although nothing happens.
    pub fn deadline(&self) -> Option<Instant> {
        self.scanouts.iter().filter_map(Scanout::deadline).min()
    }
}

const DEFAULT_SIZE: (u32, u32) = (1280, 800);

/// What a guest is told when the front end does not say: one monitor.
fn default_display() -> RespDisplayInfo {
    let mut info = RespDisplayInfo::default();
    info.scanouts[0].rect = Rect::of_size(DEFAULT_SIZE.0, DEFAULT_SIZE.1).into();
    info.scanouts[0].enabled = 1.into();
    info
}

#[cfg(test)]
mod tests {
    use gpu_protocol::virtio::{FLAG_FENCE, MAX_BACKING_ENTRIES, decode};
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
            let memory =
                GuestMemory::from_ranges(&[(GuestAddress(0x1000), MEMORY as usize)]).unwrap();
            Self { control, memory }
        }

        fn run(&mut self, command: Command) -> u32 {
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
            let outcome =
                rig.control.execute(&rig.memory, &hdr, Ok(Command::GetCapsetInfo { index }));
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
        assert_eq!(answer, CtrlHdr::new(kind::ERR_UNSPEC).as_bytes());
    }

    #[test]
    fn memory_and_numbers_are_limited() {
        let mut rig = Rig::new(Limits { bytes: 1 << 20, resources: 3 });
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
        let limits = Limits { bytes: 4 << 20, resources: 64 };
        let mut rig = Rig::new(limits);
        rig.memory.write_slice(&[0x5a; 4096], GuestAddress(0x1000)).unwrap();
        let kinds = [0x100, 0x101, 0x102, 0x103, 0x104, 0x105, 0x106, 0x107, 0x10a, 0x200, 0x300];
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
                word.copy_from_slice(&(kinds[(next() % 11) as usize] as u32).to_le_bytes());
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
}
