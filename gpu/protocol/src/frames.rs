//! This project's extension of the vhost-user-gpu socket: frames in shared memory
//! (`docs/gpu-protocol.md`).
//!
//! The front end makes the memory, so its size is trusted on that side, and cuts it into slots of
//! one frame each. The back end draws into a free slot and names it in a [`Frame`]; the slot
//! belongs to the front end until its [`Release`]. Nothing of this has an answer, so neither side
//! ever waits.

use alloc::vec::Vec;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{
    format::{BYTES_PER_PIXEL, FOURCC_XRGB8888},
    rect::Rect,
    socket::ProtocolError,
};

/// Message ids, far away from those of the standard.
pub mod id {
    /// Back end → front end: [`super::Frame`].
    pub const FRAME: u32 = 0x4452_0001;
    /// Front end → back end: [`super::ShmScanout`], with one descriptor unless `slots` is 0.
    pub const SHM_SCANOUT: u32 = 0x4452_0101;
    /// Front end → back end: [`super::Release`].
    pub const RELEASE: u32 = 0x4452_0102;
    /// Front end → back end: [`super::Want`].
    pub const WANT: u32 = 0x4452_0103;
}

/// Most slots of one scanout.
pub const MAX_SLOTS: u32 = 8;

/// Most rectangles in one [`Frame`].
pub const MAX_RECTS: usize = 64;

/// Largest width and height of a scanout, as in `virtio_gpu` drivers and EDID practice.
pub const MAX_SIZE: u32 = 16_384;

/// Rows of a slot start at multiples of this many bytes.
pub const STRIDE_ALIGN: u32 = 64;

/// Slots start at multiples of this many bytes.
pub const SLOT_ALIGN: u64 = 4096;

/// The memory for the frames of one scanout. A newer one replaces it; one with `slots` 0 and no
/// descriptor takes it away.
#[repr(C)]
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
pub struct ShmScanout {
    /// Which scanout.
    pub scanout: u32,
    /// Repeated in every [`Frame`] and [`Release`] that is about this memory.
    pub generation: u32,
    /// Width of a frame in pixels.
    pub width: u32,
    /// Height of a frame in pixels.
    pub height: u32,
    /// Bytes from one row to the next.
    pub stride: u32,
    /// [`FOURCC_XRGB8888`].
    pub fourcc: u32,
    /// Number of slots, up to [`MAX_SLOTS`].
    pub slots: u32,
    /// Zero.
    pub reserved: u32,
    /// Bytes from one slot to the next; slot `n` starts at `n * slot_size`.
    pub slot_size: u64,
}

impl ShmScanout {
    /// The layout for frames of the given size, or `None` for a size that has none.
    pub fn layout(
        scanout: u32,
        generation: u32,
        width: u32,
        height: u32,
        slots: u32,
    ) -> Option<Self> {
        let sizes = 1..=MAX_SIZE;
        if !sizes.contains(&width) || !sizes.contains(&height) || !(1..=MAX_SLOTS).contains(&slots)
        {
            return None;
        }
        let stride = (width * BYTES_PER_PIXEL).next_multiple_of(STRIDE_ALIGN);
        let slot_size = (u64::from(stride) * u64::from(height)).next_multiple_of(SLOT_ALIGN);
        Some(Self {
            scanout,
            generation,
            width,
            height,
            stride,
            fourcc: FOURCC_XRGB8888,
            slots,
            reserved: 0,
            slot_size,
        })
    }

    /// Bytes of the whole memory, or `None` if the description contradicts itself.
    pub fn checked_size(&self) -> Option<u64> {
        let row = u64::from(self.width) * u64::from(BYTES_PER_PIXEL);
        let consistent = (1..=MAX_SIZE).contains(&self.width)
            && (1..=MAX_SIZE).contains(&self.height)
            && (1..=MAX_SLOTS).contains(&self.slots)
            && self.fourcc == FOURCC_XRGB8888
            && u64::from(self.stride) >= row
            && self.stride.is_multiple_of(BYTES_PER_PIXEL)
            && self.slot_size >= u64::from(self.stride) * u64::from(self.height)
            && self.slot_size.is_multiple_of(u64::from(BYTES_PER_PIXEL));
        if !consistent {
            return None;
        }
        self.slot_size.checked_mul(u64::from(self.slots))
    }
}

/// The start of a FRAME; `rect_count` times [`Rect`] follow.
#[repr(C)]
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
pub struct FrameHeader {
    /// Which scanout.
    pub scanout: u32,
    /// That of the [`ShmScanout`] in whose memory the frame is.
    pub generation: u32,
    /// The slot with the complete frame.
    pub slot: u32,
    /// How many rectangles follow.
    pub rect_count: u32,
    /// Counts the frames of this scanout.
    pub sequence: u64,
}

/// A complete frame lies in a slot; the rectangles tell what differs from the frame before it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Frame {
    /// Which scanout.
    pub scanout: u32,
    /// That of the [`ShmScanout`] in whose memory the frame is.
    pub generation: u32,
    /// The slot with the complete frame.
    pub slot: u32,
    /// Counts the frames of this scanout.
    pub sequence: u64,
    /// What changed since the previous frame that was sent; never empty.
    pub damage: Vec<Rect>,
}

impl Frame {
    /// Appends the payload.
    pub(crate) fn encode_payload(&self, out: &mut Vec<u8>) {
        let rects = &self.damage[..self.damage.len().min(MAX_RECTS)];
        let header = FrameHeader {
            scanout: self.scanout,
            generation: self.generation,
            slot: self.slot,
            rect_count: rects.len() as u32,
            sequence: self.sequence,
        };
        out.extend_from_slice(header.as_bytes());
        encode_rects(rects, out);
    }

    /// Decodes a payload; rectangles are not yet compared with the size of the scanout.
    pub(crate) fn decode_payload(bytes: &[u8]) -> Result<Self, ProtocolError> {
        let wrong = ProtocolError::Payload { request: id::FRAME };
        let (header, rest) = FrameHeader::read_from_prefix(bytes).map_err(|_| wrong)?;
        let damage = decode_rects(rest, header.rect_count).ok_or(wrong)?;
        Ok(Self {
            scanout: header.scanout,
            generation: header.generation,
            slot: header.slot,
            sequence: header.sequence,
            damage,
        })
    }
}

/// Appends a frame's rectangles.
pub(crate) fn encode_rects(rects: &[Rect], out: &mut Vec<u8>) {
    out.extend_from_slice(rects.as_bytes());
}

/// A frame's rectangles: as many as its header says, and at least one.
pub(crate) fn decode_rects(bytes: &[u8], count: u32) -> Option<Vec<Rect>> {
    let count = count as usize;
    let fits = (1..=MAX_RECTS).contains(&count) && bytes.len() == count * size_of::<Rect>();
    let rects = bytes.chunks_exact(size_of::<Rect>());
    fits.then(|| rects.filter_map(|chunk| Rect::read_from_bytes(chunk).ok()).collect())
}

/// The front end no longer reads a slot.
#[repr(C)]
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
pub struct Release {
    /// Which scanout.
    pub scanout: u32,
    /// That of the frame.
    pub generation: u32,
    /// That of the frame.
    pub slot: u32,
    /// Zero.
    pub reserved: u32,
}

/// How many frames the front end has use for. Until the first one of these, none.
#[repr(C)]
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
pub struct Want {
    /// Which scanout.
    pub scanout: u32,
    /// Most frames per second; 0: none at all, nothing is copied.
    pub max_fps: u32,
    /// [`WANT_FULL`], [`WANT_ONE`].
    pub flags: u32,
    /// Zero.
    pub reserved: u32,
}

/// [`Want::flags`]: send a frame now, all of it damaged, even if nothing changed.
pub const WANT_FULL: u32 = 1;

/// [`Want::flags`]: one frame, the next time that something has changed, and then none before the next
/// [`Want`].
pub const WANT_ONE: u32 = 2;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_are_consistent_for_odd_sizes() {
        for (width, height) in [(1, 1), (1366, 768), (641, 479), (MAX_SIZE, MAX_SIZE)] {
            let layout = ShmScanout::layout(0, 1, width, height, 3).unwrap();
            assert_eq!(layout.stride % STRIDE_ALIGN, 0);
            assert_eq!(layout.checked_size(), Some(layout.slot_size * 3));
        }
        assert_eq!(ShmScanout::layout(0, 1, 0, 1, 3), None);
        assert_eq!(ShmScanout::layout(0, 1, MAX_SIZE + 1, 1, 3), None);
        assert_eq!(ShmScanout::layout(0, 1, 1, 1, 0), None);
    }

    #[test]
    fn contradictory_layouts_are_seen() {
        let good = ShmScanout::layout(0, 1, 640, 480, 3).unwrap();
        for bad in [
            ShmScanout { stride: 639 * 4, ..good },
            ShmScanout { stride: 640 * 4 + 1, ..good },
            ShmScanout { slot_size: 640 * 4 * 480 - 4, ..good },
            ShmScanout { slot_size: u64::MAX - 3, ..good },
            ShmScanout { slots: MAX_SLOTS + 1, ..good },
            ShmScanout { width: u32::MAX, ..good },
            ShmScanout { fourcc: 0, ..good },
        ] {
            assert_eq!(bad.checked_size(), None, "{bad:?}");
        }
    }
}
