//! Rectangles in pixels and small damage regions.

use alloc::vec::Vec;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// A rectangle in pixels, the origin at the top left.
#[repr(C)]
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, Hash, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
pub struct Rect {
    /// Left edge.
    pub x: u32,
    /// Top edge.
    pub y: u32,
    /// Width; 0 makes the rectangle empty.
    pub width: u32,
    /// Height; 0 makes the rectangle empty.
    pub height: u32,
}

impl Rect {
    /// A rectangle from its edges and size.
    pub const fn new(x: u32, y: u32, width: u32, height: u32) -> Self {
        Self { x, y, width, height }
    }

    /// The rectangle from the origin with the given size.
    pub const fn of_size(width: u32, height: u32) -> Self {
        Self::new(0, 0, width, height)
    }

    /// Whether it covers no pixel.
    pub const fn is_empty(&self) -> bool {
        self.width == 0 || self.height == 0
    }

    /// Number of pixels.
    pub const fn area(&self) -> u64 {
        self.width as u64 * self.height as u64
    }

    /// One past the right edge.
    pub const fn right(&self) -> u64 {
        self.x as u64 + self.width as u64
    }

    /// One past the bottom edge.
    pub const fn bottom(&self) -> u64 {
        self.y as u64 + self.height as u64
    }

    /// Whether every pixel of `self` lies in a surface of the given size. An empty rectangle must
    /// have its corner inside or on the edge.
    pub const fn fits(&self, width: u32, height: u32) -> bool {
        self.right() <= width as u64 && self.bottom() <= height as u64
    }

    /// Whether every pixel of `other` is in `self`.
    pub const fn contains(&self, other: &Self) -> bool {
        self.x <= other.x
            && self.y <= other.y
            && self.right() >= other.right()
            && self.bottom() >= other.bottom()
    }

    /// The common part; empty if there is none.
    pub fn intersection(&self, other: &Self) -> Self {
        let x = self.x.max(other.x);
        let y = self.y.max(other.y);
        let right = self.right().min(other.right());
        let bottom = self.bottom().min(other.bottom());
        // The differences fit: both operands lie between 0 and an edge of one rectangle.
        Self {
            x,
            y,
            width: right.saturating_sub(u64::from(x)) as u32,
            height: bottom.saturating_sub(u64::from(y)) as u32,
        }
    }

    /// The smallest rectangle around both. An empty rectangle adds nothing.
    pub fn union(&self, other: &Self) -> Self {
        if self.is_empty() {
            return *other;
        }
        if other.is_empty() {
            return *self;
        }
        let x = self.x.min(other.x);
        let y = self.y.min(other.y);
        let clamp = |edge: u64| u32::try_from(edge).unwrap_or(u32::MAX);
        Self {
            x,
            y,
            width: clamp(self.right().max(other.right()) - u64::from(x)),
            height: clamp(self.bottom().max(other.bottom()) - u64::from(y)),
        }
    }
}

/// The part of a picture that changed: at most [`Damage::MAX_RECTS`] rectangles, which may overlap.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Damage {
    rects: Vec<Rect>,
}

impl Damage {
    /// More rectangles than this are merged into their bounding box.
    pub const MAX_RECTS: usize = 16;

    /// Nothing.
    pub const fn new() -> Self {
        Self { rects: Vec::new() }
    }

    /// Exactly this rectangle.
    pub fn of(rect: Rect) -> Self {
        let mut damage = Self::new();
        damage.add(rect);
        damage
    }

    /// Whether nothing changed.
    pub fn is_empty(&self) -> bool {
        self.rects.is_empty()
    }

    /// The changed rectangles.
    pub fn rects(&self) -> &[Rect] {
        &self.rects
    }

    /// Number of pixels, those in overlaps counted more than once.
    pub fn area(&self) -> u64 {
        self.rects.iter().map(Rect::area).sum()
    }

    /// Adds a rectangle.
    pub fn add(&mut self, rect: Rect) {
        if rect.is_empty() || self.rects.iter().any(|old| old.contains(&rect)) {
            return;
        }
        self.rects.retain(|old| !rect.contains(old));
        self.rects.push(rect);
        if self.rects.len() > Self::MAX_RECTS {
            let all = self.rects.iter().fold(Rect::default(), |all, next| all.union(next));
            self.rects.clear();
            self.rects.push(all);
        }
    }

    /// Adds all of `other`.
    pub fn add_all(&mut self, other: &Self) {
        for rect in &other.rects {
            self.add(*rect);
        }
    }

    /// Drops what lies outside a surface of the given size.
    pub fn clip(&mut self, width: u32, height: u32) {
        let surface = Rect::of_size(width, height);
        for rect in &mut self.rects {
            *rect = rect.intersection(&surface);
        }
        self.rects.retain(|rect| !rect.is_empty());
    }

    /// Empties the region and returns what it held.
    pub fn take(&mut self) -> Self {
        core::mem::take(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edges_do_not_overflow() {
        let huge = Rect::new(u32::MAX, u32::MAX, u32::MAX, u32::MAX);
        assert!(!huge.fits(16384, 16384));
        assert!(huge.intersection(&Rect::of_size(100, 100)).is_empty());
        assert!(huge.union(&Rect::of_size(1, 1)).contains(&Rect::of_size(1, 1)));
        assert!(Rect::of_size(0, 0).fits(0, 0));
    }

    #[test]
    fn intersection_and_union() {
        let a = Rect::new(2, 3, 10, 10);
        let b = Rect::new(5, 1, 20, 6);
        assert_eq!(a.intersection(&b), Rect::new(5, 3, 7, 4));
        assert_eq!(a.union(&b), Rect::new(2, 1, 23, 12));
        assert!(a.intersection(&Rect::new(12, 3, 5, 5)).is_empty());
    }

    #[test]
    fn damage_stays_small_and_complete() {
        let mut damage = Damage::new();
        for i in 0..1000 {
            damage.add(Rect::new(i * 7 % 501, i * 13 % 401, 5, 5));
            assert!(damage.rects().len() <= Damage::MAX_RECTS);
        }
        for i in 0..1000 {
            let rect = Rect::new(i * 7 % 501, i * 13 % 401, 5, 5);
            assert!(damage.rects().iter().any(|r| r.contains(&rect)), "{rect:?}");
        }
        damage.clip(20, 10);
        assert!(damage.rects().iter().all(|r| r.fits(20, 10)));
        damage.add(Rect::of_size(30, 30));
        assert_eq!(damage.rects(), [Rect::of_size(30, 30)]);
    }
}
