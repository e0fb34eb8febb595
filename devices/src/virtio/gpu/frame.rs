//! A picture in memory that another process, or another thread, may be writing.

use std::{
    fmt,
    sync::{Arc, PoisonError, RwLock, Weak},
};

use gpu_protocol::{
    Rect,
    format::{BYTES_PER_PIXEL, BlobLayout, FOURCC_XRGB8888},
    frames::{Release, ShmScanout},
    pieces::Pieces,
    virtio::BackingEntry,
};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, MmapRegion, VolatileMemory};

use super::display::Display;
use crate::GuestMemory;

/// Why pixels of a frame cannot be copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CopyError {
    /// A rectangle that is not inside its frame, or a buffer that is too small for it.
    #[error("the rectangle does not lie inside the frame, or the buffer is too small for it")]
    OutOfFrame,
    /// The guest uses the picture's memory for something else. What it shows now comes as another
    /// frame, all of it damaged, or the scanout is off.
    #[error("the guest has taken back the memory of this picture")]
    Gone,
}

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

/// Memory of the guest that holds a picture, until the guest takes it back.
pub(super) struct GuestPixels {
    pieces: Pieces,
    /// `None`: it is not to be read any more.
    memory: RwLock<Option<GuestMemory>>,
}

impl GuestPixels {
    /// `None` if not all pieces are in guest memory.
    pub(super) fn new(pieces: Pieces, memory: &GuestMemory) -> Option<Self> {
        let is_there = |entry: &BackingEntry| {
            memory.check_range(GuestAddress(entry.address), entry.length as usize)
        };
        let all = pieces.entries().iter().all(is_there);
        all.then(|| Self { pieces, memory: RwLock::new(Some(memory.clone())) })
    }

    /// Bytes.
    pub(super) fn len(&self) -> u64 {
        self.pieces.len()
    }

    /// When this returns nobody reads it, now or later.
    pub(super) fn forget(&self) {
        *self.memory.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn read(&self, memory: &GuestMemory, offset: u64, target: &mut [u8]) -> Option<()> {
        self.pieces.read(offset, target, |address, target| {
            memory.read_slice(target, GuestAddress(address)).ok()
        })
    }
}

enum Pixels {
    Guest { memory: Arc<GuestPixels>, layout: BlobLayout, part: Rect },
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
/// which has two more, so hold no more than one or two frames at a time. Of a picture that the guest has
/// in its own memory nothing goes back: what is read is what the guest has there at that time.
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

    /// `part` of what lies in `memory`; it ends inside.
    pub(super) fn in_guest(
        memory: Arc<GuestPixels>,
        layout: BlobLayout,
        part: Rect,
        sequence: u64,
    ) -> Self {
        let Rect { width, height, .. } = part;
        let pixels = Pixels::Guest { memory, layout, part };
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
            Pixels::Shadow(_) | Pixels::Guest { .. } => self.0.width * BYTES_PER_PIXEL,
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
    ///
    /// # Errors
    /// If the rectangle or the buffer does not fit, or the picture's memory is gone; the buffer may
    /// have been written to.
    pub fn copy_rect(&self, rect: Rect, target: &mut [u8], stride: usize) -> Result<(), CopyError> {
        if !rect.fits(self.0.width, self.0.height) {
            return Err(CopyError::OutOfFrame);
        }
        let row = rect.width as usize * BYTES_PER_PIXEL as usize;
        if row == 0 {
            return Ok(());
        }
        let source_stride = self.stride() as usize;
        let first = rect.y as usize * source_stride + rect.x as usize * BYTES_PER_PIXEL as usize;
        // From the start of the picture's memory.
        let from = |line: u32| first + line as usize * source_stride;
        let mut rows = (0..rect.height).map(|line| {
            let to = (line as usize).checked_mul(stride)?;
            Some((line, to..to.checked_add(row)?))
        });
        let mut copy = |each: &mut dyn FnMut(u32, &mut [u8]) -> Option<()>| {
            let done = rows.try_for_each(|row| {
                let (line, to) = row?;
                each(line, target.get_mut(to)?)
            });
            done.ok_or(CopyError::OutOfFrame)
        };
        match &self.0.pixels {
            Pixels::Slot { memory, slot, .. } => {
                let start = *slot as usize * memory.layout.slot_size as usize;
                copy(&mut |line, target| {
                    memory.memory.get_slice(start + from(line), row).ok()?.copy_to(target);
                    Some(())
                })
            }
            Pixels::Shadow(shadow) => {
                let pixels = shadow.pixels.read().unwrap_or_else(PoisonError::into_inner);
                copy(&mut |line, target| {
                    target.copy_from_slice(pixels.get(from(line)..from(line) + row)?);
                    Some(())
                })
            }
            Pixels::Guest { memory: pixels, layout, part } => {
                let rect = Rect { x: part.x + rect.x, y: part.y + rect.y, ..rect };
                let guard = pixels.memory.read().unwrap_or_else(PoisonError::into_inner);
                let memory = guard.as_ref().ok_or(CopyError::Gone)?;
                copy(&mut |line, target| {
                    pixels.read(memory, layout.row(rect, line), target)?;
                    layout.format.to_bgrx(target);
                    Some(())
                })
            }
        }
    }
}
