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
