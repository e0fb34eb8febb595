//! Blobs: resources that are a piece of memory.
//!
//! A picture in guest memory is read from there when it is wanted, without a copy of ours in between;
//! by the front end itself where it can ([`gpu_protocol::guest_frames`]).
//! Memory of the host, made by a 3D context, is shown to the guest in its shared memory region, which
//! the front end has ([`gpu_protocol::host_memory`]).

use std::collections::HashSet;

use gpu_protocol::{
    Rect,
    format::{BYTES_PER_PIXEL, BlobLayout, PixelFormat},
    frames::MAX_SIZE,
    guest_frames::{self, MAX_MEMORIES, MAX_PIECES},
    host_memory::{Map, Unmap},
    socket::{FromBackEnd, ProtocolFeatures},
    virtio::{
        BackingEntry, Blob, BlobPicture, CtrlHdr, Refusal, RespMapInfo, blob_flag, blob_mem, kind,
    },
};
use vm_memory::{Bytes, VolatileSlice};
use zerocopy::IntoBytes;

use super::{
    Control, Mapping,
    resources::{Kind, Resource, Resources},
};
use crate::{GuestMemory, backing::Backing, link::Link, scanout::Source};

const PAGE: u64 = 4096;

/// Writes `part` of the picture to `target` as B, G, R, A/X, rows `stride` bytes apart.
pub(super) fn read_pixels(
    resource: &Resource,
    layout: &BlobLayout,
    part: Rect,
    target: &VolatileSlice<'_>,
    stride: usize,
) -> Result<(), Refusal> {
    let (Kind::Blob { size, memory }, Some(backing)) = (&resource.kind, &resource.backing) else {
        return Err(Refusal::InvalidResource);
    };
    if part.is_empty() {
        return Ok(());
    }
    if layout.end_of(part) > *size {
        return Err(Refusal::InvalidParameter);
    }
    let row = part.width as usize * BYTES_PER_PIXEL as usize;
    let mut converted = vec![0; if layout.format.is_bgrx() { 0 } else { row }];
    let out_of_bounds = |_| Refusal::InvalidParameter;
    for line in 0..part.height {
        let offset = layout.row(part, line);
        let target = target.subslice(line as usize * stride, row).map_err(out_of_bounds)?;
        if layout.format.is_bgrx() {
            backing.copy_to(memory, offset, &target)?;
        } else {
            backing.read(memory, offset, &mut converted)?;
            layout.format.to_bgrx(&mut converted);
            target.write_slice(&converted, 0).map_err(|_| Refusal::InvalidParameter)?;
        }
    }
    Ok(())
}

/// The resources whose memory the front end knows, and may read until it has forgotten it.
#[derive(Debug, Default)]
pub(super) struct Shared(HashSet<u32>);

impl Shared {
    /// Whether the front end knows where the resource is; it is told if need be.
    pub(super) fn share(&mut self, id: u32, resources: &Resources, link: &Link) -> bool {
        if self.0.contains(&id) {
            return true;
        }
        let backing = resources.get(&id).and_then(|resource| resource.backing.as_ref());
        let Some(pieces) = backing.map(Backing::pieces) else { return false };
        if self.0.len() >= MAX_MEMORIES || pieces.entries().len() > MAX_PIECES {
            return false;
        }
        let memory = guest_frames::GuestMemory { resource: id, pieces: pieces.clone() };
        link.send(&FromBackEnd::GuestMemory(memory));
        self.0.insert(id)
    }

    /// The resource is gone; whether the front end has to forget it.
    pub(super) fn remove(&mut self, id: u32) -> bool {
        self.0.remove(&id)
    }

    /// The front end forgets all by itself.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}

impl Control {
    pub(super) fn create_blob(
        &mut self,
        id: u32,
        context: u32,
        blob: &Blob,
        entries: Vec<BackingEntry>,
        memory: &GuestMemory,
    ) -> Result<(), Refusal> {
        self.check_new(id)?;
        let size = blob.size;
        if blob.memory == blob_mem::HOST3D {
            return self.create_host_blob(id, context, blob, &entries);
        }
        if blob.memory != blob_mem::GUEST || size == 0 {
            return Err(Refusal::InvalidParameter);
        }
        let backing = Backing::new(entries, memory)?;
        if backing.pieces().len() < size {
            return Err(Refusal::InvalidParameter);
        }
        let cost = backing.cost();
        self.charge(cost)?;
        if let Err(refusal) = self.renderer.create_blob(id, size, &backing, memory) {
            self.bytes -= cost;
            return Err(refusal);
        }
        let kind = Kind::Blob { size, memory: memory.clone() };
        self.resources.insert(id, Resource { kind, cost: 0, backing: Some(backing) });
        Ok(())
    }

    fn create_host_blob(
        &mut self,
        id: u32,
        context: u32,
        blob: &Blob,
        entries: &[BackingEntry],
    ) -> Result<(), Refusal> {
        let flags = blob_flag::MAPPABLE | blob_flag::SHAREABLE | blob_flag::CROSS_DEVICE;
        if blob.size == 0
            || !blob.size.is_multiple_of(PAGE)
            || blob.flags & !flags != 0
            || !entries.is_empty()
        {
            return Err(Refusal::InvalidParameter);
        }
        if !self.contexts.contains(&context) {
            return Err(Refusal::InvalidContext);
        }
        self.charge(blob.size)?;
        if let Err(refusal) = self.renderer.create_host_blob(id, context, blob) {
            self.bytes -= blob.size;
            return Err(refusal);
        }
        let kind = Kind::Host { size: blob.size, mapped: None };
        self.resources.insert(id, Resource { kind, cost: blob.size, backing: None });
        Ok(())
    }

    /// Whether the guest may see this resource there.
    pub(super) fn check_map(&mut self, id: u32, offset: u64) -> Result<Mapping, Refusal> {
        let resource = self.resources.get(&id).ok_or(Refusal::InvalidResource)?;
        let Kind::Host { size, mapped } = resource.kind else {
            return Err(Refusal::InvalidResource);
        };
        if mapped.is_some() || !self.knows(ProtocolFeatures::HOST_MEMORY) {
            return Err(Refusal::Unspecified);
        }
        if !offset.is_multiple_of(PAGE) || offset.checked_add(size).is_none() {
            return Err(Refusal::InvalidParameter);
        }
        self.mappings += 1;
        Ok(Mapping { resource: id, offset, number: self.mappings })
    }

    /// Asks the front end to show the resource there; on success its answer is to come.
    pub fn send_map(&mut self, mapping: Mapping) -> Result<(), Refusal> {
        let Mapping { resource: id, offset, number } = mapping;
        let resource = self.resources.get(&id).ok_or(Refusal::InvalidResource)?;
        let Kind::Host { size, .. } = resource.kind else {
            return Err(Refusal::InvalidResource);
        };
        let (fd, map_info) = self.renderer.export_blob(id)?;
        self.map_info = map_info;
        let map = Map { offset, length: size, file_offset: 0, mapping: number };
        self.link.send_with(&FromBackEnd::Map(map), fd);
        Ok(())
    }

    /// The answer to the guest, after the front end's.
    pub fn mapped(&mut self, hdr: &CtrlHdr, mapping: Mapping, status: u32) -> Vec<u8> {
        let id = mapping.resource;
        if status != 0 {
            tracing::warn!(
                resource = id,
                error = %std::io::Error::from_raw_os_error(status as i32),
                "the guest cannot see a piece of the host's memory"
            );
            return hdr.answer(kind::ERR_UNSPEC).as_bytes().to_vec();
        }
        if let Some(Resource { kind: Kind::Host { mapped, .. }, .. }) = self.resources.get_mut(&id)
        {
            *mapped = Some(mapping);
        }
        let map_info = self.map_info.into();
        let answer =
            RespMapInfo { hdr: hdr.answer(kind::OK_MAP_INFO), map_info, padding: 0.into() };
        answer.as_bytes().to_vec()
    }

    /// Nobody waits any more for what is, or will be, shown there.
    pub fn take_out(&self, mapping: Mapping) {
        let Mapping { offset, number, .. } = mapping;
        self.link.send(&FromBackEnd::Unmap(Unmap { offset, mapping: number }));
    }

    pub(super) fn unmap(&mut self, id: u32) -> Result<(), Refusal> {
        let resource = self.resources.get_mut(&id).ok_or(Refusal::InvalidResource)?;
        let Kind::Host { mapped, .. } = &mut resource.kind else {
            return Err(Refusal::InvalidResource);
        };
        let mapping = mapped.take().ok_or(Refusal::Unspecified)?;
        self.take_out(mapping);
        Ok(())
    }

    /// A resource is about to go: the guest must not see its memory.
    pub(super) fn hide(&self, kind: &Kind) {
        if let Kind::Host { mapped: Some(mapping), .. } = *kind {
            self.take_out(mapping);
        }
    }

    pub(super) fn set_scanout_blob(
        &mut self,
        scanout: u32,
        id: u32,
        rect: Rect,
        picture: &BlobPicture,
    ) -> Result<(), Refusal> {
        if id == 0 {
            return self.show(scanout, None);
        }
        let resource = self.resources.get(&id).ok_or(Refusal::InvalidResource)?;
        let Kind::Blob { size, .. } = resource.kind else {
            return Err(Refusal::InvalidResource);
        };
        let format = PixelFormat::from_wire(picture.format).ok_or(Refusal::InvalidParameter)?;
        let sizes = 1..=MAX_SIZE;
        let BlobPicture { width, height, stride, offset, .. } = *picture;
        let layout = BlobLayout { format, stride, offset };
        if !sizes.contains(&width)
            || !sizes.contains(&height)
            || u64::from(stride) < u64::from(width) * u64::from(BYTES_PER_PIXEL)
            || layout.end_of(Rect::of_size(width, height)) > size
            || rect.is_empty()
            || !rect.fits(width, height)
        {
            return Err(Refusal::InvalidParameter);
        }
        self.show(scanout, Some(Source { resource: id, rect, blob: Some(layout) }))
    }
}
