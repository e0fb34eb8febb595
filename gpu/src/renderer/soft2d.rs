//! The renderer without 3D: pixels in this process's memory.

use std::collections::HashMap;

use gpu_protocol::{
    Rect,
    format::BYTES_PER_PIXEL,
    virtio::{Features, Refusal},
};
use vm_memory::VolatileSlice;

use super::{Layout, Renderer};
use crate::{GuestMemory, backing::Backing};

struct Surface {
    layout: Layout,
    pixels: Vec<u8>,
}

/// The renderer without 3D: pixels in this process's memory.
#[derive(Default)]
pub struct Soft2d {
    surfaces: HashMap<u32, Surface>,
    row: Vec<u8>,
}

impl Soft2d {
    /// No resources yet.
    pub fn new() -> Self {
        Self::default()
    }
}

impl std::fmt::Debug for Soft2d {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Soft2d").field("surfaces", &self.surfaces.len()).finish_non_exhaustive()
    }
}

impl Renderer for Soft2d {
    fn describe(&self) -> String {
        "2D, in software".to_owned()
    }

    fn features(&self) -> Features {
        // Guests that get no 3D put their pictures into blobs, which need no copy of ours.
        Features::RESOURCE_BLOB
    }

    fn create_2d(&mut self, id: u32, layout: Layout) -> Result<(), Refusal> {
        let bytes = usize::try_from(layout.bytes()).map_err(|_| Refusal::OutOfMemory)?;
        // Zeroed memory comes from the kernel page by page as it is used.
        let pixels = vec![0; bytes];
        self.surfaces.insert(id, Surface { layout, pixels });
        Ok(())
    }

    fn destroy(&mut self, id: u32) {
        self.surfaces.remove(&id);
    }

    fn upload(
        &mut self,
        id: u32,
        rect: Rect,
        offset: u64,
        backing: &Backing,
        memory: &GuestMemory,
    ) -> Result<(), Refusal> {
        let Surface { layout, pixels } =
            self.surfaces.get_mut(&id).ok_or(Refusal::InvalidResource)?;
        if rect.is_empty() {
            return Ok(());
        }
        let stride = layout.stride() as usize;
        let row = rect.width as usize * BYTES_PER_PIXEL as usize;
        let first = rect.y as usize * stride + rect.x as usize * BYTES_PER_PIXEL as usize;
        if row == stride {
            let target = pixels.get_mut(first..first + stride * rect.height as usize);
            return backing.read(memory, offset, target.ok_or(Refusal::InvalidParameter)?);
        }
        for line in 0..rect.height as usize {
            let start = first + line * stride;
            let target = pixels.get_mut(start..start + row).ok_or(Refusal::InvalidParameter)?;
            let offset = offset.checked_add((line * stride) as u64);
            backing.read(memory, offset.ok_or(Refusal::InvalidParameter)?, target)?;
        }
        Ok(())
    }

    fn read_pixels(
        &mut self,
        id: u32,
        rect: Rect,
        target: &VolatileSlice<'_>,
        stride: usize,
    ) -> Result<(), Refusal> {
        let Surface { layout, pixels } = self.surfaces.get(&id).ok_or(Refusal::InvalidResource)?;
        let source_stride = layout.stride() as usize;
        let row = rect.width as usize * BYTES_PER_PIXEL as usize;
        let first = rect.y as usize * source_stride + rect.x as usize * BYTES_PER_PIXEL as usize;
        for line in 0..rect.height as usize {
            let start = first + line * source_stride;
            let source = pixels.get(start..start + row).ok_or(Refusal::InvalidParameter)?;
            let target =
                target.subslice(line * stride, row).map_err(|_| Refusal::InvalidParameter)?;
            if layout.format.is_bgrx() {
                target.copy_from(source);
            } else {
                self.row.clear();
                self.row.extend_from_slice(source);
                layout.format.to_bgrx(&mut self.row);
                target.copy_from(&self.row);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use gpu_protocol::{format::PixelFormat, virtio::BackingEntry};
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    #[test]
    fn odd_rectangles_go_in_and_out_bit_exact() {
        let layout = Layout { format: PixelFormat::R8G8B8X8, width: 13, height: 7 };
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let picture: Vec<u8> = (0..layout.bytes()).map(|i| (i * 7) as u8).collect();
        memory.write_slice(&picture, GuestAddress(3)).unwrap();
        let entry = BackingEntry { address: 3, length: layout.bytes() as u32 };
        let backing = Backing::new(vec![entry], &memory).unwrap();
        let mut renderer = Soft2d::new();
        renderer.create_2d(1, layout).unwrap();
        let rect = Rect::new(2, 1, 9, 5);
        let offset = u64::from(rect.y) * layout.stride() + u64::from(rect.x) * 4;
        renderer.upload(1, rect, offset, &backing, &memory).unwrap();

        let mut seen = vec![0xee; 9 * 4 + 11 + 64 * 4];
        let stride = 64;
        let part = Rect::new(3, 2, 8, 4);
        renderer.read_pixels(1, part, &VolatileSlice::from(&mut seen[..]), stride).unwrap();
        for y in 0..4_usize {
            for x in 0..8_usize {
                let at = (y + 2) * 13 * 4 + (x + 3) * 4;
                let [r, g, b, a] = [0, 1, 2, 3].map(|i| picture[at + i]);
                assert_eq!(seen[y * stride + x * 4..][..4], [b, g, r, a]);
            }
            assert_eq!(seen[y * stride + 32], 0xee, "only the rectangle is written");
        }
        // What was never uploaded is black.
        let mut corner = [1; 4];
        let first = Rect::of_size(1, 1);
        renderer.read_pixels(1, first, &VolatileSlice::from(&mut corner[..]), 4).unwrap();
        assert_eq!(corner, [0; 4]);
    }
}
