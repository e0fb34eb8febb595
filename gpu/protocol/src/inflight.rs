//! Which commands a back end has taken out of the queues and not answered yet: the tables of
//! vhost-user's `VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD` for split queues (QEMU
//! `docs/interop/vhost-user.rst`, "Inflight I/O tracking").
//!
//! The back end makes the buffer and writes it, the front end keeps it. When the back end has died,
//! the tables tell which chains still need an answer. Both readers treat them as foreign bytes.
//!
//! ```text
//!  queue 0: header (16 bytes) | entry per descriptor (16 bytes each) | up to a multiple of 64
//!  queue 1: …
//! ```

use alloc::vec::Vec;

/// Bytes before the entries of a queue: features u64, version u16, entries u16, the head that was
/// answered last u16, used index u16; all native-endian.
pub const HEADER: usize = 16;

/// Bytes per descriptor: in flight u8, attempts u8, 4 unused, next u16, counter u64. The standard
/// has five unused bytes after the first.
pub const ENTRY: usize = 16;

/// [`HEADER`]: version of the tables.
pub const VERSION: u16 = 1;

/// Offsets inside a queue's header.
#[allow(missing_docs)] // the standard's names
pub mod header {
    pub const VERSION: usize = 8;
    pub const DESC_NUM: usize = 10;
    pub const LAST_BATCH_HEAD: usize = 12;
    pub const USED_IDX: usize = 14;
}

/// Offsets inside an entry.
#[allow(missing_docs)] // the standard's names
pub mod entry {
    pub const INFLIGHT: usize = 0;
    pub const ATTEMPTS: usize = 1;
    pub const COUNTER: usize = 8;
}

/// Bytes of the table of a queue with `size` entries.
pub const fn table_size(size: u16) -> usize {
    (HEADER + ENTRY * size as usize).next_multiple_of(64)
}

/// Where the entry of a head is, from the start of its queue's table.
pub const fn entry_at(head: u16) -> usize {
    HEADER + ENTRY * head as usize
}

/// A chain without an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InFlight {
    /// Its first descriptor.
    pub head: u16,
    /// How often it was executed anew already.
    pub attempts: u8,
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

/// Reads a queue's table, oldest chain first. `used` is the used index in the ring. `None` if the
/// table is not one, or contradicts itself; then nothing is known.
pub fn parse(table: &[u8], size: u16, used: u16) -> Option<Vec<InFlight>> {
    if u16_at(table, header::VERSION)? != VERSION || u16_at(table, header::DESC_NUM)? < size {
        return None;
    }
    // An answer that is in the ring, but was not struck off here any more.
    let behind = u16_at(table, header::USED_IDX)? != used;
    let answered = u16_at(table, header::LAST_BATCH_HEAD).filter(|_| behind);
    let mut found = Vec::new();
    for head in 0..size {
        let at = entry_at(head);
        let bytes = table.get(at..at + ENTRY)?;
        if bytes[entry::INFLIGHT] != 1 || Some(head) == answered {
            continue;
        }
        let counter = u64::from_ne_bytes(bytes[entry::COUNTER..].try_into().ok()?);
        found.push((counter, InFlight { head, attempts: bytes[entry::ATTEMPTS] }));
    }
    found.sort_by_key(|(counter, _)| *counter);
    Some(found.into_iter().map(|(_, one)| one).collect())
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use super::*;

    fn table(size: u16, used: u16, last: u16) -> Vec<u8> {
        let mut bytes = vec![0; table_size(size)];
        bytes[header::VERSION..][..2].copy_from_slice(&VERSION.to_ne_bytes());
        bytes[header::DESC_NUM..][..2].copy_from_slice(&size.to_ne_bytes());
        bytes[header::LAST_BATCH_HEAD..][..2].copy_from_slice(&last.to_ne_bytes());
        bytes[header::USED_IDX..][..2].copy_from_slice(&used.to_ne_bytes());
        bytes
    }

    fn put(table: &mut [u8], head: u16, counter: u64) {
        let at = entry_at(head);
        table[at + entry::INFLIGHT] = 1;
        table[at + entry::COUNTER..][..8].copy_from_slice(&counter.to_ne_bytes());
    }

    #[test]
    fn oldest_first_and_without_the_one_that_was_answered() {
        let mut bytes = table(8, 5, 3);
        put(&mut bytes, 3, 1);
        put(&mut bytes, 1, 9);
        put(&mut bytes, 7, 4);
        let heads = |used| {
            let list = parse(&bytes, 8, used).unwrap();
            list.into_iter().map(|one| one.head).collect::<Vec<_>>()
        };
        assert_eq!(heads(5), [3, 7, 1]);
        assert_eq!(heads(6), [7, 1], "3 is in the used ring");
    }

    #[test]
    fn what_is_no_table_is_none() {
        assert_eq!(parse(&[], 8, 0), None);
        assert_eq!(parse(&[0; 400], 8, 0), None, "version 0");
        let bytes = table(8, 0, 0);
        assert_eq!(parse(&bytes, 16, 0), None, "too small for the queue");
        assert_eq!(parse(&bytes[..100], 8, 0), None);
        assert_eq!(parse(&bytes, 8, 0), Some(Vec::new()));
    }
}
