//! Port I/O and MMIO address spaces: which device answers at which address.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, PoisonError, RwLock},
};

/// A device that answers port or memory accesses. Called from vCPU threads, so implementations
/// synchronise themselves and are quick.
pub trait BusDevice: Send + Sync {
    /// Reads `data.len()` bytes (1, 2, 4 or 8) at `offset` from the start of the device's range.
    /// `data` arrives filled with `0xff`, the value of an address nobody answers.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Writes `data.len()` bytes (1, 2, 4 or 8) at `offset` from the start of the range.
    fn write(&self, offset: u64, data: &[u8]);

    /// What is at `offset`, for the log. Must not wait for anybody: it is asked when an access hangs.
    fn describe(&self, offset: u64) -> String {
        format!("a device, offset {offset:#x}")
    }
}

/// A range could not be added to a [`Bus`].
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the range {start:#x}+{length:#x} is empty, wraps around or overlaps another device")]
pub struct RangeError {
    /// First address of the refused range.
    pub start: u64,
    /// Length of the refused range in bytes.
    pub length: u64,
}

struct Entry {
    length: u64,
    device: Arc<dyn BusDevice>,
}

/// One address space.
#[derive(Default)]
pub struct Bus {
    ranges: RwLock<BTreeMap<u64, Entry>>,
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ranges = self.ranges.read().unwrap_or_else(PoisonError::into_inner);
        f.debug_map().entries(ranges.iter().map(|(start, entry)| (start, entry.length))).finish()
    }
}

impl Bus {
    /// An empty address space.
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets `device` answer for `start..start + length`.
    pub fn insert(
        &self,
        start: u64,
        length: u64,
        device: Arc<dyn BusDevice>,
    ) -> Result<(), RangeError> {
        let error = RangeError { start, length };
        let end = start.checked_add(length).filter(|_| length > 0).ok_or(error)?;
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        let clash = ranges
            .range(..end)
            .next_back()
            .is_some_and(|(first, entry)| first + entry.length > start);
        if clash {
            return Err(RangeError { start, length });
        }
        ranges.insert(start, Entry { length, device });
        Ok(())
    }

    /// Removes the range that starts at `start`; returns whether there was one.
    pub fn remove(&self, start: u64) -> bool {
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        ranges.remove(&start).is_some()
    }

    /// Reads from whichever device owns the whole access; otherwise `data` becomes all ones and
    /// the answer is `false`.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        data.fill(0xff);
        match self.find(address, data.len()) {
            Some((offset, device)) => {
                device.read(offset, data);
                true
            }
            None => false,
        }
    }

    /// Writes to whichever device owns the whole access; otherwise the answer is `false`.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        match self.find(address, data.len()) {
            Some((offset, device)) => {
                device.write(offset, data);
                true
            }
            None => false,
        }
    }

    /// Who answers at an address, for the log.
    pub fn describe(&self, address: u64) -> Option<String> {
        self.find(address, 1).map(|(offset, device)| device.describe(offset))
    }

    fn find(&self, address: u64, length: usize) -> Option<(u64, Arc<dyn BusDevice>)> {
        let ranges = self.ranges.read().unwrap_or_else(PoisonError::into_inner);
        let (start, entry) = ranges.range(..=address).next_back()?;
        let offset = address - start;
        let end = offset.checked_add(length as u64)?;
        (end <= entry.length).then(|| (offset, entry.device.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fixed(u8);

    impl BusDevice for Fixed {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(self.0 + offset as u8);
        }

        fn write(&self, _: u64, _: &[u8]) {}
    }

    #[test]
    fn routes_by_range_and_refuses_overlaps() {
        let bus = Bus::new();
        bus.insert(0x10, 8, Arc::new(Fixed(1))).unwrap();
        assert!(bus.insert(0x17, 1, Arc::new(Fixed(2))).is_err());
        assert!(bus.insert(0x8, 9, Arc::new(Fixed(2))).is_err());
        assert!(bus.insert(u64::MAX, 2, Arc::new(Fixed(2))).is_err());
        bus.insert(0x18, 8, Arc::new(Fixed(2))).unwrap();
        let mut byte = [0];
        assert!(bus.read(0x12, &mut byte));
        assert_eq!(byte, [3]);
        let mut wide = [0; 4];
        assert!(!bus.read(0x16, &mut wide), "an access may not straddle two devices");
        assert_eq!(wide, [0xff; 4]);
        assert!(bus.remove(0x10));
        assert!(!bus.write(0x10, &[0]));
    }
}
