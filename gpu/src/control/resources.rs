//! Resources that are pictures: made, backed, filled, shown.

use std::collections::HashMap;

use gpu_protocol::{
    Rect,
    format::{BlobLayout, PixelFormat},
    frames::MAX_SIZE,
    virtio::{BackingEntry, CURSOR_BYTES, CURSOR_SIZE, MAX_SCANOUTS, Refusal},
};
use vm_memory::VolatileSlice;

use super::{Control, blob};
use crate::{GuestMemory, backing::Backing, link::CursorImage, renderer::Layout, scanout::Source};

/// All resources by their ids.
pub(super) type Resources = HashMap<u32, Resource>;

/// What a resource is.
#[derive(Debug, Clone)]
pub(super) enum Kind {
    /// A picture made by RESOURCE_CREATE_2D.
    TwoD(Layout),
    /// Made by RESOURCE_CREATE_3D; with a layout if it is a picture that can be shown.
    ThreeD(Option<Layout>),
    /// Guest memory, mapped as it was when the blob was made.
    Blob { size: u64, memory: GuestMemory },
    /// Memory of the host, and where the guest sees it.
    Host { size: u64, mapped: Option<super::Mapping> },
}

/// A resource.
#[derive(Debug)]
pub(super) struct Resource {
    pub(super) kind: Kind,
    /// Bytes it counts for, its backing apart.
    pub(super) cost: u64,
    pub(super) backing: Option<Backing>,
}

impl Resource {
    /// Size and format, of what is a picture.
    pub(super) fn layout(&self) -> Option<Layout> {
        match self.kind {
            Kind::TwoD(layout) => Some(layout),
            Kind::ThreeD(layout) => layout,
            Kind::Blob { .. } | Kind::Host { .. } => None,
        }
    }
}

impl Control {
    /// Whether a resource may get this id now.
    pub(super) fn check_new(&self, id: u32) -> Result<(), Refusal> {
        if id == 0 || self.resources.contains_key(&id) {
            return Err(Refusal::InvalidResource);
        }
        if self.resources.len() >= self.limits.resources {
            return Err(Refusal::OutOfMemory);
        }
        Ok(())
    }

    pub(super) fn create_2d(
        &mut self,
        id: u32,
        format: u32,
        width: u32,
        height: u32,
    ) -> Result<(), Refusal> {
        self.check_new(id)?;
        let format = PixelFormat::from_wire(format).ok_or(Refusal::InvalidParameter)?;
        let sizes = 1..=MAX_SIZE;
        if !sizes.contains(&width) || !sizes.contains(&height) {
            return Err(Refusal::InvalidParameter);
        }
        let layout = Layout { format, width, height };
        let cost = layout.bytes();
        self.charge(cost)?;
        if let Err(refusal) = self.renderer.create_2d(id, layout) {
            self.bytes -= cost;
            return Err(refusal);
        }
        self.resources.insert(id, Resource { kind: Kind::TwoD(layout), cost, backing: None });
        Ok(())
    }

    pub(super) fn unref(&mut self, id: u32) -> Result<(), Refusal> {
        let resource = self.resources.remove(&id).ok_or(Refusal::InvalidResource)?;
        self.hide(&resource.kind);
        self.bytes -= resource.cost;
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

    pub(super) fn attach(
        &mut self,
        id: u32,
        entries: Vec<BackingEntry>,
        memory: &GuestMemory,
    ) -> Result<(), Refusal> {
        let resource = self.resources.get(&id).ok_or(Refusal::InvalidResource)?;
        if resource.backing.is_some() || matches!(resource.kind, Kind::Host { .. }) {
            return Err(Refusal::Unspecified);
        }
        let backing = Backing::new(entries, memory)?;
        let cost = backing.cost();
        self.charge(cost)?;
        if let Err(refusal) = self.renderer.attach(id, &backing, memory) {
            self.bytes -= cost;
            return Err(refusal);
        }
        if let Some(resource) = self.resources.get_mut(&id) {
            resource.backing = Some(backing);
        }
        Ok(())
    }

    pub(super) fn detach(&mut self, id: u32) -> Result<(), Refusal> {
        let resource = self.resources.get_mut(&id).ok_or(Refusal::InvalidResource)?;
        if matches!(resource.kind, Kind::Blob { .. }) {
            // Without its memory nothing would be left of it.
            return Err(Refusal::Unspecified);
        }
        let backing = resource.backing.take().ok_or(Refusal::Unspecified)?;
        self.bytes -= backing.cost();
        self.renderer.detach(id);
        Ok(())
    }

    pub(super) fn transfer(
        &mut self,
        id: u32,
        rect: Rect,
        offset: u64,
        memory: &GuestMemory,
    ) -> Result<(), Refusal> {
        let resource = self.resources.get(&id).ok_or(Refusal::InvalidResource)?;
        let layout = match resource.kind {
            Kind::TwoD(layout) => layout,
            // It is where it belongs already.
            Kind::Blob { .. } => return Ok(()),
            Kind::ThreeD(_) | Kind::Host { .. } => return Err(Refusal::Unspecified),
        };
        if !rect.fits(layout.width, layout.height) {
            return Err(Refusal::InvalidParameter);
        }
        let backing = resource.backing.as_ref().ok_or(Refusal::Unspecified)?;
        self.renderer.upload(id, rect, offset, backing, memory)
    }

    pub(super) fn set_scanout(
        &mut self,
        scanout: u32,
        resource: u32,
        rect: Rect,
    ) -> Result<(), Refusal> {
        if resource == 0 {
            return self.show(scanout, None);
        }
        let found = self.resources.get(&resource).ok_or(Refusal::InvalidResource)?;
        let layout = found.layout().ok_or(Refusal::InvalidParameter)?;
        if rect.is_empty() || !rect.fits(layout.width, layout.height) {
            return Err(Refusal::InvalidParameter);
        }
        self.show(scanout, Some(Source { resource, rect, blob: None }))
    }

    /// Lets a scanout show this from now on.
    pub(super) fn show(&mut self, scanout: u32, source: Option<Source>) -> Result<(), Refusal> {
        if scanout as usize >= MAX_SCANOUTS {
            return Err(Refusal::InvalidScanout);
        }
        let scanout = &mut self.scanouts[scanout as usize];
        if scanout.source() != source {
            scanout.set_source(source);
            self.pump();
        }
        Ok(())
    }

    pub(super) fn flush(&mut self, id: u32, rect: Rect) -> Result<(), Refusal> {
        let resource = self.resources.get(&id).ok_or(Refusal::InvalidResource)?;
        // What a blob shows is known to its scanouts, which cut the rectangle.
        let fits = |layout: Layout| rect.fits(layout.width, layout.height);
        if !resource.layout().is_none_or(fits) {
            return Err(Refusal::InvalidParameter);
        }
        for scanout in &mut self.scanouts {
            scanout.flush(id, rect);
        }
        self.pump();
        Ok(())
    }

    /// The pixels of a cursor image.
    pub fn cursor_image(&mut self, id: u32) -> Result<CursorImage, Refusal> {
        let mut image: CursorImage = Box::new([0; CURSOR_BYTES]);
        let target = VolatileSlice::from(&mut image[..]);
        let whole = Rect::of_size(CURSOR_SIZE, CURSOR_SIZE);
        let stride = CURSOR_SIZE as usize * 4;
        let resource = self.resources.get(&id).ok_or(Refusal::InvalidResource)?;
        if matches!(resource.kind, Kind::Blob { .. }) {
            // Nothing says what is in it; cursors always have this format.
            let format = PixelFormat::B8G8R8A8;
            let layout = BlobLayout { format, stride: stride as u32, offset: 0 };
            blob::read_pixels(resource, &layout, whole, &target, stride)?;
            return Ok(image);
        }
        let layout = resource.layout().ok_or(Refusal::InvalidParameter)?;
        if layout.width != CURSOR_SIZE || layout.height != CURSOR_SIZE {
            return Err(Refusal::InvalidParameter);
        }
        self.renderer.read_pixels(id, whole, &target, stride)?;
        if !layout.format.has_alpha() {
            image.chunks_exact_mut(4).for_each(|pixel| pixel[3] = 0xff);
        }
        Ok(image)
    }

    pub(super) fn charge(&mut self, bytes: u64) -> Result<(), Refusal> {
        let total = self.bytes.checked_add(bytes).filter(|total| *total <= self.limits.bytes);
        self.bytes = total.ok_or(Refusal::OutOfMemory)?;
        Ok(())
    }
}
