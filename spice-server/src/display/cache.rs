//! Images the client is asked to keep, so that what comes back (a tab, a menu, a blinking cursor)
//! costs a few bytes. The server decides what is forgotten (`INVAL_LIST`).

use std::{
    collections::{BTreeMap, HashMap},
    hash::{BuildHasher, Hasher, RandomState},
};

/// Most pixels kept in a client: 32 MiB there, about a megabyte of numbers here at most.
const MAX_PIXELS: u64 = 8 << 20;
/// Most images.
const MAX_IMAGES: usize = 8192;

/// Which images a client has.
#[derive(Debug)]
pub(crate) struct ImageCache {
    /// Keys of SipHash, unknown to whoever paints the picture: nobody can make different images look
    /// alike.
    keys: RandomState,
    limit: u64,
    pixels: u64,
    /// Last use and size by identifier.
    images: HashMap<u64, (u64, u32)>,
    /// Identifier by last use.
    order: BTreeMap<u64, u64>,
    clock: u64,
}

impl ImageCache {
    /// A cache that holds nothing until the client says how much it may hold.
    pub(crate) fn new() -> Self {
        Self {
            keys: RandomState::new(),
            limit: 0,
            pixels: 0,
            images: HashMap::new(),
            order: BTreeMap::new(),
            clock: 0,
        }
    }

    /// The client can hold so many pixels. Half of them are used: others may share its cache.
    pub(crate) fn set_limit(&mut self, pixels: u64) {
        self.limit = (pixels / 2).min(MAX_PIXELS);
    }

    /// Whether images of this size may be kept.
    pub(crate) fn takes(&self, pixels: u32) -> bool {
        u64::from(pixels) * 16 <= self.limit
    }

    /// The identifier of an image.
    pub(crate) fn id(&self, (width, height): (u32, u32), pixels: &[u8]) -> u64 {
        let mut hasher = self.keys.build_hasher();
        hasher.write_u32(width);
        hasher.write_u32(height);
        hasher.write(pixels);
        hasher.finish().max(1)
    }

    /// Whether the client has this image; counts as a use.
    pub(crate) fn has(&mut self, id: u64) -> bool {
        let Some((used, _)) = self.images.get_mut(&id) else { return false };
        self.order.remove(used);
        self.clock += 1;
        *used = self.clock;
        self.order.insert(self.clock, id);
        true
    }

    /// The client will have this image. Appends those it must forget for it.
    pub(crate) fn insert(&mut self, id: u64, pixels: u32, forget: &mut Vec<u64>) {
        while self.pixels + u64::from(pixels) > self.limit || self.images.len() >= MAX_IMAGES {
            let Some((_, oldest)) = self.order.pop_first() else { break };
            if let Some((_, freed)) = self.images.remove(&oldest) {
                self.pixels -= u64::from(freed);
            }
            forget.push(oldest);
        }
        self.clock += 1;
        if self.images.insert(id, (self.clock, pixels)).is_none() {
            self.pixels += u64::from(pixels);
            self.order.insert(self.clock, id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_unused_is_forgotten() {
        let mut cache = ImageCache::new();
        let mut forget = Vec::new();
        assert!(!cache.takes(1));
        cache.set_limit(200);
        assert!(cache.takes(6) && !cache.takes(7));
        for id in 1..=10 {
            cache.insert(id, 10, &mut forget);
        }
        assert_eq!(forget, []);
        assert!(cache.has(1));
        cache.insert(11, 15, &mut forget);
        assert_eq!(forget, [2, 3]);
        assert!(cache.has(1) && !cache.has(2) && cache.has(11));
    }

    #[test]
    fn identifiers_tell_content_and_shape_apart() {
        let cache = ImageCache::new();
        let pixels: Vec<u8> = (0..96).collect();
        let id = cache.id((4, 6), &pixels);
        assert_eq!(id, cache.id((4, 6), &pixels));
        assert_ne!(id, cache.id((6, 4), &pixels));
        for at in 0..pixels.len() {
            let mut other = pixels.clone();
            other[at] ^= 1;
            assert_ne!(id, cache.id((4, 6), &other));
        }
    }
}
