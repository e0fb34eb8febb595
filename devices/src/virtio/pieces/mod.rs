//! Scattered guest memory as one run of bytes (VIRTIO 1.3 §2.6.4: how a buffer is cut into descriptors
//! means nothing), which system calls read and write right where it is.

mod sys;

pub(crate) use sys::{ONE_CALL, Pieces, PushError};

#[cfg(test)]
mod tests {
    use std::{io::Read, os::fd::AsFd, sync::Arc};

    use vm_memory::{Bytes, GuestAddress, Permissions};

    use super::*;
    use crate::virtio::testing::{MEMORY_SIZE, guest_memory};

    /// Three pieces of 3, 5 and 8 bytes, in that order, at falling addresses.
    fn pieces() -> (Pieces, Arc<crate::GuestMemory>) {
        let memory = Arc::new(guest_memory());
        let mut pieces = Pieces::new(3);
        pieces.clear(&memory);
        for (address, length) in [(0x3000, 3), (0x2000, 5), (0x1000, 8)] {
            pieces.push(GuestAddress(address), length, Permissions::Write).unwrap();
        }
        (pieces, memory)
    }

    fn all(pieces: &Pieces) -> Vec<u8> {
        let mut bytes = Vec::new();
        pieces.append_to(&mut bytes, 0);
        bytes
    }

    #[test]
    fn bytes_follow_each_other_across_pieces() {
        let (mut pieces, memory) = pieces();
        let bytes: Vec<u8> = (1..=16).collect();
        pieces.store(0, &bytes);
        assert_eq!(memory.read_obj::<[u8; 5]>(GuestAddress(0x2000)).unwrap(), [4, 5, 6, 7, 8]);
        pieces.store(2, &[0xaa, 0xbb]);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x3002)).unwrap(), 0xaa);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x2000)).unwrap(), 0xbb);
        pieces.store(14, &[1; 100]);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x1008)).unwrap(), 0, "behind the last one");

        // From the front, in the middle of a piece as well as at its end.
        pieces.consume(1);
        assert_eq!((pieces.len(), pieces.count()), (15, 3));
        assert_eq!(all(&pieces)[..3], [2, 0xaa, 0xbb]);
        pieces.consume(2);
        assert_eq!((pieces.len(), pieces.count()), (13, 2));
        pieces.consume(6);
        assert_eq!((pieces.len(), pieces.count()), (7, 1));
        assert_eq!(all(&pieces)[..2], [10, 11]);
        let mut start = [0; 4];
        assert_eq!(pieces.copy_to(&mut start), 4);
        assert_eq!(start, [10, 11, 12, 13]);
        pieces.zero_rest();
        assert_eq!((pieces.len(), pieces.count()), (0, 0));
        assert_eq!(
            memory.read_obj::<[u8; 8]>(GuestAddress(0x1000)).unwrap(),
            [9, 0, 0, 0, 0, 0, 0, 0]
        );
        pieces.consume(1);
        assert_eq!(pieces.copy_to(&mut start), 0);
    }

    #[test]
    fn what_is_no_memory_or_too_much_is_refused() {
        let (mut pieces, memory) = pieces();
        let push = |pieces: &mut Pieces, at: u64, length| {
            pieces.push(GuestAddress(at), length, Permissions::Read)
        };
        assert_eq!(push(&mut pieces, 0, 1), Err(PushError::TooMany));
        pieces.clear(&memory);
        assert_eq!(push(&mut pieces, MEMORY_SIZE as u64 - 1, 2), Err(PushError::OutsideMemory));
        assert_eq!(push(&mut pieces, u64::MAX, 2), Err(PushError::OutsideMemory));
        assert_eq!(pieces.len(), 0);
    }

    #[test]
    fn calls_take_what_is_left() {
        let (mut pieces, memory) = pieces();
        let file = std::fs::File::from(
            rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap(),
        );
        pieces.store(0, &(1..=16).collect::<Vec<u8>>());
        pieces.consume(4);
        assert_eq!(pieces.write_at(&file, 100, 0).unwrap(), 12);
        memory.write_slice(&[0; 8], GuestAddress(0x1000)).unwrap();
        pieces.consume(4);
        assert_eq!(pieces.read_at(&file, 104, 0).unwrap(), 8);
        assert_eq!(all(&pieces), (9..=16).collect::<Vec<u8>>());
        assert!(!pieces.is_aligned(4096, 512) && pieces.is_aligned(4096, 8));

        let (mut pieces, _) = self::pieces();
        let (ours, mut peer) = std::os::unix::net::UnixStream::pair().unwrap();
        pieces.store(0, &(1..=16).collect::<Vec<u8>>());
        assert_eq!(pieces.send(ours.as_fd(), &[77], 4).unwrap(), 13);
        let mut sent = [0; 13];
        peer.read_exact(&mut sent).unwrap();
        assert_eq!((sent[0], &sent[1..3], sent[12]), (77, &[5, 6][..], 16));
        // What is expected decides how many pieces are offered, not what arrives.
        std::io::Write::write_all(&mut peer, &[9; 12]).unwrap();
        let mut rest = [0; 16];
        assert_eq!(pieces.receive(ours.as_fd(), 4, &mut rest).unwrap(), (12, 8));
        assert_eq!((all(&pieces)[7], all(&pieces)[8], rest[3], rest[4]), (9, 9, 9, 0));
    }
}
