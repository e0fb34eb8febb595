//! Blobs: resources that are a piece of guest memory. A picture in one is read from there when it is
//! wanted, without a copy of ours in between.

use gpu_protocol::{
    Rect,
    format::{BYTES_PER_PIXEL, PixelFormat},
    frames::MAX_SIZE,
    virtio::{BackingEntry, BlobPicture, Refusal, blob_mem},
};
use vm_memory::{Bytes, VolatileSlice};

use super::{
    Control,
    resources::{Kind, Resource},
};
use crate::{
    GuestMemory,
    backing::Backing,
    scanout::{BlobLayout, Source},
};

/// Bytes from the start of the blob to the end of the last pixel of `rect`.
fn end_of(layout: &BlobLayout, rect: Rect) -> u64 {
    let rows = rect.bottom().saturating_sub(1);
    u64::from(layout.offset)
        + rows * u64::from(layout.stride)
        + rect.right() * u64::from(BYTES_PER_PIXEL)
}

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
    if end_of(layout, part) > *size {
        return Err(Refusal::InvalidParameter);
    }
    let row = part.width as usize * BYTES_PER_PIXEL as usize;
    let first = u64::from(layout.offset) + u64::from(part.x) * u64::from(BYTES_PER_PIXEL);
    let mut converted = vec![0; if layout.format.is_bgrx() { 0 } else { row }];
    let out_of_bounds = |_| Refusal::InvalidParameter;
    for line in 0..part.height as usize {
        let offset = first + (u64::from(part.y) + line as u64) * u64::from(layout.stride);
        let target = target.subslice(line * stride, row).map_err(out_of_bounds)?;
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

impl Control {
    pub(super) fn create_blob(
        &mut self,
        id: u32,
        kind: u32,
        size: u64,
        entries: Vec<BackingEntry>,
        memory: &GuestMemory,
    ) -> Result<(), Refusal> {
        self.check_new(id)?;
        // Memory of the host would need a window to show it in.
        if kind != blob_mem::GUEST || size == 0 {
            return Err(Refusal::InvalidParameter);
        }
        let backing = Backing::new(entries, memory)?;
        if backing.len() < size {
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
            || end_of(&layout, Rect::of_size(width, height)) > size
            || rect.is_empty()
            || !rect.fits(width, height)
        {
            return Err(Refusal::InvalidParameter);
        }
        self.show(scanout, Some(Source { resource: id, rect, blob: Some(layout) }))
    }
}
