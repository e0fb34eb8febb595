//! What the commands of the control queue mean: the books about resources, backing and scanouts,
//! and every check of what a guest asks for (VIRTIO 1.3 §5.7.6).

mod blob;
mod front;
mod resources;
#[cfg(test)]
mod tests;
mod three_d;

use std::{
    collections::{HashMap, HashSet},
    hash::{BuildHasher, RandomState},
    sync::Arc,
};

use gpu_protocol::{
    Rect,
    edid::{self, Monitor},
    socket::ProtocolFeatures,
    virtio::{
        Command, CtrlHdr, MAX_SCANOUTS, Refusal, RespCapsetInfo, RespDisplayInfo, RespEdid,
        RespResourceUuid, kind,
    },
};
use zerocopy::IntoBytes;

use self::{blob::Shared, resources::Resources};
use crate::{GuestMemory, link::Link, renderer::Renderer, scanout::Scanout};

/// Limits on what one guest may occupy in this process.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of resources and their books together.
    pub bytes: u64,
    /// Number of resources.
    pub resources: usize,
    /// Number of 3D contexts.
    pub contexts: usize,
}

impl Default for Limits {
    /// 512 MiB: 15 frames of 4K. A context costs Mesa's llvmpipe (25.0) about 32 MiB of the heap that
    /// the sandbox leaves for drivers, 4 GiB.
    fn default() -> Self {
        Self { bytes: 512 << 20, resources: 16_384, contexts: 64 }
    }
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
    /// RESOURCE_MAP_BLOB.
    Map(Mapping),
    /// RESOURCE_UNREF of what the front end may be reading.
    Forget(u32),
}

impl Question {
    /// Whether the guest can be answered without the front end. Not where it may still be reading what
    /// the guest is to have back: it may not have noticed the end of the connection yet.
    pub fn can_be_guessed(&self) -> bool {
        !matches!(self, Self::Forget(_))
    }
}

/// A resource's memory in the guest's shared memory region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapping {
    /// The resource.
    pub resource: u32,
    /// Where in the region.
    pub offset: u64,
    /// A number of its own.
    pub number: u64,
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
    resources: Resources,
    contexts: HashSet<u32>,
    /// Makes the names of resources.
    names: RandomState,
    scanouts: [Scanout; MAX_SCANOUTS],
    link: Arc<Link>,
    /// Of the GPU socket; `None` until negotiated.
    features: Option<ProtocolFeatures>,
    /// How the memory is cached that is being mapped.
    map_info: u32,
    /// Mappings so far.
    mappings: u64,
    shared: Shared,
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
            contexts: HashSet::new(),
            names: RandomState::new(),
            scanouts: Default::default(),
            link,
            features: None,
            map_info: 0,
            mappings: 0,
            shared: Shared::default(),
            display: default_display(),
            edids: HashMap::new(),
        }
    }

    /// The renderer, for its features.
    pub fn renderer(&self) -> &dyn Renderer {
        &*self.renderer
    }

    /// The renderer, for fences.
    pub fn renderer_mut(&mut self) -> &mut dyn Renderer {
        &mut *self.renderer
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
        for context in self.contexts.drain() {
            self.renderer.destroy_context(context);
        }
        for (id, resource) in std::mem::take(&mut self.resources) {
            self.hide(&resource.kind);
            self.renderer.destroy(id);
        }
        self.bytes = 0;
        // The front end has forgotten them before the guest can know that its device is reset.
        self.shared.clear();
        self.link.reset_cursors();
        self.pump();
    }

    /// Executes a command.
    pub fn execute(
        &mut self,
        memory: &GuestMemory,
        hdr: &CtrlHdr,
        command: Result<Command<'_>, Refusal>,
    ) -> Outcome {
        let done = match command {
            Ok(Command::GetDisplayInfo) => return Outcome::Ask(Question::DisplayInfo),
            Ok(Command::GetEdid { scanout }) if (scanout as usize) < MAX_SCANOUTS => {
                return Outcome::Ask(match self.knows(ProtocolFeatures::EDID) {
                    true => Question::Edid(scanout),
                    false => Question::EdidFromInfo(scanout),
                });
            }
            Ok(Command::GetEdid { .. }) => Err(Refusal::InvalidScanout),
            Ok(Command::ResourceCreate2d { resource, format, width, height }) => {
                self.create_2d(resource, format, width, height)
            }
            Ok(Command::ResourceUnref { resource }) => match self.unref(resource) {
                Ok(()) if self.shared.remove(resource) => {
                    return Outcome::Ask(Question::Forget(resource));
                }
                done => done,
            },
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
            Ok(Command::GetCapsetInfo { index }) => match self.capset_info(hdr, index) {
                Ok(answer) => return Outcome::Answer(answer.as_bytes().to_vec()),
                Err(refusal) => Err(refusal),
            },
            Ok(Command::GetCapset { set, version }) => match self.capset(hdr, set, version) {
                Ok(answer) => return Outcome::Answer(answer),
                Err(refusal) => Err(refusal),
            },
            Ok(Command::AssignUuid { resource }) => match self.uuid(hdr, resource) {
                Ok(answer) => return Outcome::Answer(answer.as_bytes().to_vec()),
                Err(refusal) => Err(refusal),
            },
            Ok(Command::CreateBlob { resource, blob, entries }) => {
                self.create_blob(resource, hdr.ctx_id.get(), &blob, entries, memory)
            }
            Ok(Command::MapBlob { resource, offset }) => match self.check_map(resource, offset) {
                Ok(mapping) => return Outcome::Ask(Question::Map(mapping)),
                Err(refusal) => Err(refusal),
            },
            Ok(Command::UnmapBlob { resource }) => self.unmap(resource),
            Ok(Command::SetScanoutBlob { scanout, resource, rect, picture }) => {
                self.set_scanout_blob(scanout, resource, rect, &picture)
            }
            Ok(Command::ResourceCreate3d { resource, create }) => self.create_3d(resource, &create),
            Ok(Command::ContextCreate { capset, name }) => {
                self.create_context(hdr.ctx_id.get(), capset, name)
            }
            Ok(Command::ContextDestroy) => self.destroy_context(hdr.ctx_id.get()),
            Ok(Command::ContextAttach { resource }) => {
                self.attach_to_context(hdr.ctx_id.get(), resource)
            }
            Ok(Command::ContextDetach { resource }) => {
                self.detach_from_context(hdr.ctx_id.get(), resource)
            }
            Ok(Command::TransferToHost3d { resource, transfer }) => {
                self.transfer_to_host(hdr.ctx_id.get(), resource, &transfer)
            }
            Ok(Command::TransferFromHost3d { resource, transfer }) => {
                self.transfer_from_host(hdr.ctx_id.get(), resource, &transfer)
            }
            Ok(Command::Submit3d { commands }) => self.submit(hdr.ctx_id.get(), commands),
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
            Question::Forget(_) => hdr.answer(kind::OK_NODATA).as_bytes().to_vec(),
            // Only the front end can do that.
            Question::Map(..) => hdr.answer(kind::ERR_UNSPEC).as_bytes().to_vec(),
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

    fn capset_info(&self, hdr: &CtrlHdr, index: u32) -> Result<RespCapsetInfo, Refusal> {
        let set = self.renderer.capsets().get(index as usize).ok_or(Refusal::InvalidParameter)?;
        Ok(RespCapsetInfo {
            hdr: hdr.answer(kind::OK_CAPSET_INFO),
            capset_id: set.id.into(),
            max_version: set.version.into(),
            max_size: set.size.into(),
            padding: 0.into(),
        })
    }

    fn capset(&mut self, hdr: &CtrlHdr, id: u32, version: u32) -> Result<Vec<u8>, Refusal> {
        let set = self.renderer.capsets().iter().copied().find(|set| set.id == id);
        let set = set.filter(|set| version <= set.version).ok_or(Refusal::InvalidParameter)?;
        let mut answer = hdr.answer(kind::OK_CAPSET).as_bytes().to_vec();
        let start = answer.len();
        answer.resize(start + set.size as usize, 0);
        self.renderer.fill_capset(id, version, &mut answer[start..]);
        Ok(answer)
    }

    /// A name that stays the same as long as this process lives.
    fn uuid(&self, hdr: &CtrlHdr, resource: u32) -> Result<RespResourceUuid, Refusal> {
        if !self.resources.contains_key(&resource) {
            return Err(Refusal::InvalidResource);
        }
        let half = |which: u8| self.names.hash_one((which, resource)).to_le_bytes();
        let mut uuid = [0; 16];
        uuid[..8].copy_from_slice(&half(0));
        uuid[8..].copy_from_slice(&half(1));
        // Version 4 (random), RFC 9562.
        uuid[6] = uuid[6] & 0x0f | 0x40;
        uuid[8] = uuid[8] & 0x3f | 0x80;
        Ok(RespResourceUuid { hdr: hdr.answer(kind::OK_RESOURCE_UUID), uuid })
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
