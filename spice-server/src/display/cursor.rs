//! The pointer's picture.

/// A pointer image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CursorImage {
    /// Width in pixels, 1 to 256.
    pub width: u32,
    /// Height in pixels, 1 to 256.
    pub height: u32,
    /// The pixel that points, from the left edge.
    pub hot_x: u32,
    /// The pixel that points, from the top edge.
    pub hot_y: u32,
    /// `width * height` pixels of bytes blue, green, red, alpha (ARGB8888), colours
    /// **premultiplied** by alpha as DRM cursor planes and virtio-gpu use them. The server converts
    /// to what clients expect.
    pub argb: Vec<u8>,
}

/// Largest side of a pointer image.
pub(crate) const MAX_CURSOR_SIDE: u32 = 256;

impl CursorImage {
    /// Whether the sizes fit each other and the limits.
    pub fn is_valid(&self) -> bool {
        (1..=MAX_CURSOR_SIDE).contains(&self.width)
            && (1..=MAX_CURSOR_SIDE).contains(&self.height)
            && self.argb.len() == self.width as usize * self.height as usize * 4
    }
}
