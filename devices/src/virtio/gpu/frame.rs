//! A picture in memory that another process, or another thread, may be writing.

use std::{
    fmt,
    sync::{Arc, PoisonError, RwLock, Weak},
};

use gpu_protocol::{
    Rect,
    format::{BYTES_PER_PIXEL, FOURCC_XRGB8888},
    frames::{Release, ShmScanout},
};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

use super::display::Display;

/// A rectangle that is not inside its frame, or a buffer that is too small for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the rectangle does not lie inside the frame, or the buffer is too small for it")]
pub struct OutOfFrame;

/// The memory for the frames of one scanout, shared with the back end.
pub(super) struct SlotMemory {
    layout: ShmScanout,
    memory: MmapRegion,
}

impl SlotMemory {
    /// Maps `file`, which holds [`ShmScanout::checked_size`] bytes, for reading.
    pub(super) fn map(layout: ShmScanout, file: std::fs::File) -> std::io::Result<Self> {
        let size = layout.checked_size().and_then(|size| usize::try_from(size).ok());
        let size = size.ok_or(std::io::ErrorKind::InvalidInput)?;
        let (protection, flags) = (libc::PROT_READ, libc::MAP_SHARED | libc::MAP_NORESERVE);
        let memory = MmapRegion::build(Some(FileOffset::new(file, 0)), size, protection, flags)
            .map_err(std::io::Error::other)?;
        Ok(Self { layout, memory })
    }

    pub(super) fn layout(&self) -> &ShmScanout {
        &self.layout
    }
}

/// The picture of a scanout whose back end sends pixels through the socket.
#[derive(Default)]
pub(super) struct Shadow {
    pub(super) pixels: RwLock<Vec<u8>>,
}

enum Pixels {
    Slot { memory: Arc<SlotMemory>, slot: u32, owner: Weak<Display> },
    Shadow(Arc<Shadow>),
}

struct Inner {
    width: u32,
    height: u32,
    sequence: u64,
    pixels: Pixels,
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Pixels::Slot { memory, slot, owner } = &self.pixels
            && let Some(owner) = owner.upgrade()
        {
            let ShmScanout { scanout, generation, .. } = *memory.layout();
            owner.release(&Release { scanout, generation, slot: *slot, reserved: 0 });
        }
    }
}

/// A picture. Clones share it; when the last one is dropped, its memory goes back to the back end,
/// which has two more, so hold no more than one or two frames at a time.
#[derive(Clone)]
pub struct Frame(Arc<Inner>);

impl fmt::Debug for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Frame")
            .field("width", &self.0.width)
            .field("height", &self.0.height)
            .field("sequence", &self.0.sequence)
            .finish_non_exhaustive()
    }
}

impl Frame {
    pub(super) fn in_slot(
        memory: Arc<SlotMemory>,
        slot: u32,
        sequence: u64,
        owner: Weak<Display>,
    ) -> Self {
        let ShmScanout { width, height, .. } = *memory.layout();
        let pixels = Pixels::Slot { memory, slot, owner };
        Self(Arc::new(Inner { width, height, sequence, pixels }))
    }

    pub(super) fn over_shadow(
        shadow: Arc<Shadow>,
        (width, height): (u32, u32),
        sequence: u64,
    ) -> Self {
        Self(Arc::new(Inner { width, height, sequence, pixels: Pixels::Shadow(shadow) }))
    }

    /// Width in pixels.
    pub fn width(&self) -> u32 {
        self.0.width
    }

    /// Height in pixels.
    pub fn height(&self) -> u32 {
        self.0.height
    }

    /// Bytes from row to row in the frame's own memory (a copy may choose its own).
    pub fn stride(&self) -> u32 {
        match &self.0.pixels {
            Pixels::Slot { memory, .. } => memory.layout().stride,
            Pixels::Shadow(_) => self.0.width * BYTES_PER_PIXEL,
        }
    }

    /// Always `DRM_FORMAT_XRGB8888`: in memory B, G, R and a byte without meaning.
    pub fn fourcc(&self) -> u32 {
        FOURCC_XRGB8888
    }

    /// Counts the frames of a scanout.
    pub fn sequence(&self) -> u64 {
        self.0.sequence
    }

    /// Copies the pixels of `rect` to `target`, whose rows are `stride` bytes apart; bytes between
    /// the rows stay as they are. The pixels are read once, so what the other side writes meanwhile
    /// can tear the picture and nothing else.
    pub fn copy_rect(
        &self,
        rect: Rect,
        target: &mut [u8],
        stride: usize,
    ) -> Result<(), OutOfFrame> {
        if !rect.fits(self.0.width, self.0.height) {
            return Err(OutOfFrame);
        }
        let row = rect.width as usize * BYTES_PER_PIXEL as usize;
        let source_stride = self.stride() as usize;
        let first = rect.y as usize * source_stride + rect.x as usize * BYTES_PER_PIXEL as usize;
        if row == 0 {
            return Ok(());
        }
        let shadow = match &self.0.pixels {
            Pixels::Slot { .. } => None,
            Pixels::Shadow(shadow) => {
                Some(shadow.pixels.read().unwrap_or_else(PoisonError::into_inner))
            }
        };
        for line in 0..rect.height as usize {
            let from = first + line * source_stride;
            let to = line.checked_mul(stride).ok_or(OutOfFrame)?;
            let to_end = to.checked_add(row).ok_or(OutOfFrame)?;
            let target = target.get_mut(to..to_end).ok_or(OutOfFrame)?;
            match (&self.0.pixels, &shadow) {
                (Pixels::Slot { memory, slot, .. }, _) => {
                    let start = *slot as usize * memory.layout.slot_size as usize;
                    let source = memory.memory.get_slice(start + from, row);
                    source.map_err(|_| OutOfFrame)?.copy_to(target);
                }
                (Pixels::Shadow(_), Some(pixels)) => {
                    target.copy_from_slice(pixels.get(from..from + row).ok_or(OutOfFrame)?);
                }
                (Pixels::Shadow(_), None) => return Err(OutOfFrame),
            }
        }
        Ok(())
    }
}
