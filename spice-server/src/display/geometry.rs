//! Rectangles.

/// A rectangle of pixels; `x`,`y` is the top left corner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rect {
    /// Left edge.
    pub x: u32,
    /// Top edge.
    pub y: u32,
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
}

impl Rect {
    /// A rectangle from its corner and size.
    pub const fn new(x: u32, y: u32, width: u32, height: u32) -> Self {
        Self { x, y, width, height }
    }

    /// Whether it has no pixels.
    pub const fn is_empty(&self) -> bool {
        self.width == 0 || self.height == 0
    }

    /// First column to the right of it (saturating).
    pub const fn right(&self) -> u32 {
        self.x.saturating_add(self.width)
    }

    /// First row below it (saturating).
    pub const fn bottom(&self) -> u32 {
        self.y.saturating_add(self.height)
    }

    /// The part inside a picture of this size, possibly empty.
    pub fn clipped(&self, width: u32, height: u32) -> Self {
        let x = self.x.min(width);
        let y = self.y.min(height);
        let right = self.right().min(width);
        let bottom = self.bottom().min(height);
        Self { x, y, width: right.saturating_sub(x), height: bottom.saturating_sub(y) }
    }
}

#[cfg(test)]
mod tests {
    use super::Rect;

    #[test]
    fn clipping_never_leaves_the_picture() {
        assert_eq!(Rect::new(10, 10, 100, 5).clipped(50, 12), Rect::new(10, 10, 40, 2));
        assert!(Rect::new(60, 0, 10, 10).clipped(50, 50).is_empty());
        let all = Rect::new(3, 4, u32::MAX, u32::MAX).clipped(10, 10);
        assert_eq!(all, Rect::new(3, 4, 7, 6));
    }
}
