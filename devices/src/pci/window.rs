//! The parts of the address space that belong to the PCI bus, and where in them registers go.

use std::ops::Range;

/// The address ranges routed to the PCI bus, as also told to the guest (`_CRS`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PciWindows {
    /// Below 4 GiB.
    pub mmio32: Range<u64>,
    /// Above the guest's memory; may be empty.
    pub mmio64: Range<u64>,
}

impl PciWindows {
    /// Whether `size` bytes at `address` lie in one of the windows.
    pub fn contains(&self, address: u64, size: u64) -> bool {
        let Some(end) = address.checked_add(size) else { return false };
        [&self.mmio32, &self.mmio64]
            .iter()
            .any(|window| address >= window.start && end <= window.end)
    }
}

/// The parts of the windows not given out yet.
#[derive(Debug)]
pub(super) struct Windows {
    low: Range<u64>,
    high: Range<u64>,
}

impl Windows {
    /// Registers up to this size go below 4 GiB, where 32-bit guests and small page tables reach
    /// them; larger ones would crowd the low window.
    const SMALL: u64 = 1 << 20;

    pub(super) fn new(windows: &PciWindows) -> Self {
        // Address 0 means "not assigned" to guests, so it is never given out.
        let usable = |range: &Range<u64>| range.start.max(0x1000)..range.end;
        Self { low: usable(&windows.mmio32), high: usable(&windows.mmio64) }
    }

    /// Takes `size` bytes, a power of two, aligned to their size.
    pub(super) fn allocate(&mut self, size: u64) -> Option<u64> {
        let (first, second) = if size <= Self::SMALL {
            (&mut self.low, &mut self.high)
        } else {
            (&mut self.high, &mut self.low)
        };
        take(first, size).or_else(|| take(second, size))
    }

    /// The same below 4 GiB.
    pub(super) fn allocate_low(&mut self, size: u64) -> Option<u64> {
        take(&mut self.low, size)
    }
}

fn take(range: &mut Range<u64>, size: u64) -> Option<u64> {
    let start = range.start.checked_next_multiple_of(size)?;
    let end = start.checked_add(size).filter(|end| *end <= range.end)?;
    range.start = end;
    Some(start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_registers_go_low_until_full_and_large_ones_high() {
        let windows = PciWindows { mmio32: 0x1_0800..0x2_0000, mmio64: 1 << 32..1 << 33 };
        let mut free = Windows::new(&windows);
        assert_eq!(free.allocate(0x8000), Some(0x1_8000));
        assert_eq!(free.allocate(0x8000), Some(1 << 32));
        assert_eq!(free.allocate(1 << 31), Some((1 << 32) + (1 << 31)));
        assert_eq!(free.allocate(1 << 31), None);
        assert!(windows.contains(0x1_8000, 0x8000));
        assert!(!windows.contains(0x1_8000, 0x8001));
        assert!(!windows.contains(u64::MAX, 2));
        assert!(!windows.contains(0, 16));
    }
}
