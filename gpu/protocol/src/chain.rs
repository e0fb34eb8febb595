//! Descriptor chains by their head (VIRTIO 1.3 §2.7.5), for whoever has a head and no available
//! ring to find it in: a chain that a process left unanswered when it died.

use alloc::vec::Vec;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Bytes of a descriptor.
const SIZE: u64 = 16;

/// Most descriptors of an indirect table that are followed: 64 MiB in pages.
const MAX_INDIRECT: u32 = 16_384;

/// A part of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buffer {
    /// Guest physical address.
    pub address: u64,
    /// Bytes.
    pub length: u32,
    /// The device writes it; otherwise it reads it.
    pub writable: bool,
}

/// How a driver broke the rules for chains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// A head or `next` that is no descriptor of the table.
    #[error("descriptor {0} is outside its table")]
    Index(u16),
    /// More descriptors than there are entries: a loop (§2.7.5.1).
    #[error("a chain is longer than its table")]
    Endless,
    /// The table, or an indirect one, is not in guest memory.
    #[error("a descriptor table is not in guest memory")]
    Table,
    /// A buffer is not in guest memory.
    #[error("a buffer is not in guest memory")]
    Buffer,
    /// An indirect table with a length that is not a multiple of 16, empty, inside another one, or
    /// with a `next` (§2.7.5.3.1).
    #[error("an indirect descriptor table breaks the rules")]
    Indirect,
    /// Something for the device to read after something for it to write (§2.7.4.2).
    #[error("readable buffers follow writable ones")]
    Order,
    /// A head that the device has not given back yet.
    #[error("the chain at descriptor {0} is given to the device while it has it")]
    InUse(u16),
}

/// Follows the chain that begins at `head` of a table of `size` descriptors at `table`. `read`
/// fetches 16 bytes of guest memory, or says that there are none.
pub fn walk(
    table: u64,
    size: u16,
    head: u16,
    mut read: impl FnMut(u64) -> Option<[u8; 16]>,
) -> Result<Vec<Buffer>, Violation> {
    let mut buffers: Vec<Buffer> = Vec::new();
    let (mut table, mut entries) = (table, u32::from(size));
    let (mut index, mut indirect) = (head, false);
    loop {
        if u32::from(index) >= entries {
            return Err(Violation::Index(index));
        }
        let at = table.checked_add(u64::from(index) * SIZE).ok_or(Violation::Table)?;
        let bytes = read(at).ok_or(Violation::Table)?;
        let [a0, a1, a2, a3, a4, a5, a6, a7, l0, l1, l2, l3, f0, f1, n0, n1] = bytes;
        let address = u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]);
        let length = u32::from_le_bytes([l0, l1, l2, l3]);
        let (flags, next) = (u16::from_le_bytes([f0, f1]), u16::from_le_bytes([n0, n1]));
        if flags & INDIRECT != 0 {
            let whole = length != 0 && u64::from(length) % SIZE == 0;
            if indirect || flags & NEXT != 0 || !whole {
                return Err(Violation::Indirect);
            }
            (table, entries) = (address, length / SIZE as u32);
            (index, indirect) = (0, true);
            continue;
        }
        let writable = flags & WRITE != 0;
        if !writable && buffers.last().is_some_and(|last| last.writable) {
            return Err(Violation::Order);
        }
        // Linux makes indirect chains that are longer than the queue, which §2.7.5.3.1 forbids.
        let limit = if indirect { entries.min(MAX_INDIRECT) } else { u32::from(size) };
        if buffers.len() >= limit as usize {
            return Err(Violation::Endless);
        }
        buffers.push(Buffer { address, length, writable });
        if flags & NEXT == 0 {
            return Ok(buffers);
        }
        index = next;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptor(address: u64, length: u32, flags: u16, next: u16) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&length.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        bytes
    }

    fn walk_in(memory: &[[u8; 16]], head: u16) -> Result<Vec<Buffer>, Violation> {
        walk(0, 4, head, |at| memory.get(usize::try_from(at / 16).unwrap()).copied())
    }

    #[test]
    fn follows_links_and_indirect_tables() {
        let buffer = |address, length, writable| Buffer { address, length, writable };
        let memory = [
            descriptor(10, 1, 0, 9),
            descriptor(20, 2, NEXT, 3),
            descriptor(4 * 16, 32, INDIRECT, 0),
            descriptor(30, 3, WRITE, 0),
            descriptor(40, 4, NEXT, 1),
            descriptor(50, 5, WRITE, 0),
        ];
        assert_eq!(walk_in(&memory, 0).unwrap(), [buffer(10, 1, false)]);
        assert_eq!(walk_in(&memory, 1).unwrap(), [buffer(20, 2, false), buffer(30, 3, true)]);
        assert_eq!(walk_in(&memory, 2).unwrap(), [buffer(40, 4, false), buffer(50, 5, true)]);
    }

    #[test]
    fn refuses_what_drivers_must_not_do() {
        let memory = [
            descriptor(0, 1, NEXT, 0),
            descriptor(0, 1, NEXT, 4),
            descriptor(0x1000, 16, INDIRECT, 0),
            descriptor(0, 1, WRITE | NEXT, 0),
        ];
        assert_eq!(walk_in(&memory, 0), Err(Violation::Endless));
        assert_eq!(walk_in(&memory, 1), Err(Violation::Index(4)));
        assert_eq!(walk_in(&memory, 2), Err(Violation::Table));
        assert_eq!(walk_in(&memory, 3), Err(Violation::Order));
        assert_eq!(walk_in(&memory, 9), Err(Violation::Index(9)));
        for bad in [descriptor(0, 16, INDIRECT | NEXT, 0), descriptor(0, 17, INDIRECT, 0)] {
            assert_eq!(walk_in(&[bad], 0), Err(Violation::Indirect));
        }
        // An indirect table whose entry is indirect again.
        assert_eq!(walk_in(&[descriptor(0, 16, INDIRECT, 0)], 0), Err(Violation::Indirect));
    }
}
