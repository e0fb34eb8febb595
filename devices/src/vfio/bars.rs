//! The base address registers of a device (PCI Local Bus 3.0 §6.2.5), and which parts of them are
//! mapped into the guest.

use std::ops::Range;

use super::{Physical, Region};

const PAGE: u64 = 4096;
/// Offset of the first base address register.
pub(super) const FIRST: usize = 0x10;
/// How many there are.
pub(super) const COUNT: u8 = 6;
const IO_SPACE: u8 = 1;
const TYPE_64: u8 = 0b100;
const PREFETCHABLE: u8 = 0b1000;

/// One memory base address register, or two that make one of 64 bits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bar {
    /// The number of the (first) register, 0 to 5.
    pub index: u8,
    /// Bytes, a power of two, at least 16.
    pub size: u64,
    /// Two registers.
    pub wide: bool,
    /// Reading has no effects.
    pub prefetchable: bool,
    /// Parts that the kernel lets us map, whole pages.
    pub mappable: Vec<Range<u64>>,
}

impl Bar {
    /// The lowest four bits of the register.
    pub fn flags(&self) -> u8 {
        let kind = if self.wide { TYPE_64 } else { 0 };
        kind | if self.prefetchable { PREFETCHABLE } else { 0 }
    }

    /// What can be mapped, without the pages that `trapped` ranges touch.
    pub fn pieces(&self, trapped: &[Range<u64>]) -> Vec<Range<u64>> {
        let mut pieces = self.mappable.clone();
        for range in trapped {
            let hole = range.start / PAGE * PAGE..range.end.next_multiple_of(PAGE);
            pieces = pieces
                .into_iter()
                .flat_map(|piece| {
                    [piece.start..piece.end.min(hole.start), piece.start.max(hole.end)..piece.end]
                })
                .filter(|piece| piece.start < piece.end)
                .collect();
        }
        pieces
    }
}

/// The memory base address registers in a device's configuration header. Those of I/O ports are left
/// out.
pub fn find(header: &[u8], device: &dyn Physical) -> Vec<Bar> {
    let mut bars = Vec::new();
    let mut index = 0;
    while index < COUNT {
        let register = header.get(FIRST + 4 * usize::from(index)).copied().unwrap_or(IO_SPACE);
        let memory = register & IO_SPACE == 0;
        let wide = memory && register & 0b110 == TYPE_64;
        let region = device.region(index);
        if memory && region.size.is_power_of_two() && region.size >= 16 {
            bars.push(Bar {
                index,
                size: region.size,
                wide,
                prefetchable: register & PREFETCHABLE != 0,
                mappable: whole_pages(&region),
            });
        }
        index += if wide { 2 } else { 1 };
    }
    bars
}

fn whole_pages(region: &Region) -> Vec<Range<u64>> {
    let inside = |(start, length): &(u64, u64)| {
        let end = start.checked_add(*length)?.min(region.size) / PAGE * PAGE;
        let start = start.checked_next_multiple_of(PAGE)?;
        (start < end).then_some(start..end)
    };
    region.mappable.iter().filter_map(inside).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[allow(clippy::single_range_in_vec_init, reason = "it is a list of ranges")]
    fn pieces_leave_out_every_page_that_is_trapped() {
        let bar = Bar {
            index: 0,
            size: 0x1_0000,
            wide: true,
            prefetchable: false,
            mappable: vec![0..0x4000, 0x8000..0x1_0000],
        };
        assert_eq!(bar.flags(), 0b0100);
        assert_eq!(bar.pieces(&[]), bar.mappable);
        assert_eq!(
            bar.pieces(&[0x2010..0x2020, 0x9ff8..0xa001]),
            [0..0x2000, 0x3000..0x4000, 0x8000..0x9000, 0xb000..0x1_0000]
        );
        assert_eq!(bar.pieces(&[0..0x1_0000]), []);
        assert_eq!(bar.pieces(&[0x4000..0x8000]), bar.mappable);
        let odd = Region { size: 0x2800, mappable: vec![(0x10, 0x3000), (u64::MAX, 2)] };
        assert_eq!(whole_pages(&odd), [0x1000..0x2000]);
    }
}
