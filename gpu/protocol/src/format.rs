//! Pixel formats of 2D resources (VIRTIO 1.3 §5.7.6.8), all 32 bits per pixel.

use crate::rect::Rect;

/// `DRM_FORMAT_XRGB8888`: in memory B, G, R and one byte without meaning. Every frame that leaves
/// the back end has this format.
pub const FOURCC_XRGB8888: u32 = u32::from_le_bytes(*b"XR24");

/// `DRM_FORMAT_ARGB8888`: in memory B, G, R, A. Cursor images have this format, premultiplied.
pub const FOURCC_ARGB8888: u32 = u32::from_le_bytes(*b"AR24");

/// Bytes per pixel of every format here.
pub const BYTES_PER_PIXEL: u32 = 4;

/// A format of a 2D resource; the name gives the byte order in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
#[allow(missing_docs)] // the names say it all
pub enum PixelFormat {
    B8G8R8A8 = 1,
    B8G8R8X8 = 2,
    A8R8G8B8 = 3,
    X8R8G8B8 = 4,
    R8G8B8A8 = 67,
    X8B8G8R8 = 68,
    A8B8G8R8 = 121,
    R8G8B8X8 = 134,
}

impl PixelFormat {
    /// All formats of the specification.
    pub const ALL: [Self; 8] = [
        Self::B8G8R8A8,
        Self::B8G8R8X8,
        Self::A8R8G8B8,
        Self::X8R8G8B8,
        Self::R8G8B8A8,
        Self::X8B8G8R8,
        Self::A8B8G8R8,
        Self::R8G8B8X8,
    ];

    /// The format with the given number in a command.
    pub fn from_wire(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|format| *format as u32 == number)
    }

    /// Where the blue, green, red and alpha (or filler) bytes of a pixel are in memory.
    const fn positions(self) -> [usize; 4] {
        match self {
            Self::B8G8R8A8 | Self::B8G8R8X8 => [0, 1, 2, 3],
            Self::A8R8G8B8 | Self::X8R8G8B8 => [3, 2, 1, 0],
            Self::R8G8B8A8 | Self::R8G8B8X8 => [2, 1, 0, 3],
            Self::X8B8G8R8 | Self::A8B8G8R8 => [1, 2, 3, 0],
        }
    }

    /// Whether memory already holds B, G, R, A/X, so that pixels can be copied as they are.
    pub const fn is_bgrx(self) -> bool {
        matches!(self, Self::B8G8R8A8 | Self::B8G8R8X8)
    }

    /// Whether the fourth byte means opacity.
    pub const fn has_alpha(self) -> bool {
        matches!(self, Self::B8G8R8A8 | Self::A8R8G8B8 | Self::R8G8B8A8 | Self::A8B8G8R8)
    }

    /// Converts whole pixels in place to B, G, R, A/X. A trailing part of a pixel stays.
    pub fn to_bgrx(self, pixels: &mut [u8]) {
        if self.is_bgrx() {
            return;
        }
        let [b, g, r, a] = self.positions();
        for pixel in pixels.chunks_exact_mut(4) {
            let [p0, p1, p2, p3] = [pixel[b], pixel[g], pixel[r], pixel[a]];
            pixel.copy_from_slice(&[p0, p1, p2, p3]);
        }
    }
}

/// How a picture lies in a blob (SET_SCANOUT_BLOB, VIRTIO 1.3 §5.7.6.8).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlobLayout {
    /// Pixel format.
    pub format: PixelFormat,
    /// Bytes from one row to the next.
    pub stride: u32,
    /// Where the first pixel is.
    pub offset: u32,
}

impl BlobLayout {
    /// Bytes from the start of the blob to row `line` of a part of the picture.
    pub fn row(&self, part: Rect, line: u32) -> u64 {
        let line = u64::from(part.y) + u64::from(line);
        let in_row = u64::from(part.x) * u64::from(BYTES_PER_PIXEL);
        u64::from(self.offset) + line * u64::from(self.stride) + in_row
    }

    /// Bytes from the start of the blob to the end of the last pixel of a part.
    pub fn end_of(&self, part: Rect) -> u64 {
        let row = u64::from(part.width) * u64::from(BYTES_PER_PIXEL);
        self.row(part, part.height.saturating_sub(1)) + row
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_format_becomes_bgrx() {
        for format in PixelFormat::ALL {
            assert_eq!(PixelFormat::from_wire(format as u32), Some(format));
            // Spell out the pixel from the name of the format: B=1 G=2 R=3, A or X=4.
            let name = alloc::format!("{format:?}");
            let mut pixel: alloc::vec::Vec<u8> = name
                .chars()
                .filter_map(|c| match c {
                    'B' => Some(1),
                    'G' => Some(2),
                    'R' => Some(3),
                    'A' | 'X' => Some(4),
                    _ => None,
                })
                .collect();
            format.to_bgrx(&mut pixel);
            assert_eq!(pixel, [1, 2, 3, 4], "{name}");
            assert_eq!(format.has_alpha(), name.contains('A'), "{name}");
        }
        assert_eq!(PixelFormat::from_wire(5), None);
    }
}
