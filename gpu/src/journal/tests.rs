use std::os::fd::OwnedFd;

use gpu_protocol::{
    Rect,
    virtio::{
        AttachBacking, CtrlHdr, CursorPos, MemEntry, ResourceCommand, ResourceCreate2d, SetScanout,
        UpdateCursor, kind,
    },
};
use zerocopy::IntoBytes;

use super::*;

const QUEUE: u16 = 16;

fn create(id: u32) -> Vec<u8> {
    ResourceCreate2d {
        hdr: CtrlHdr::new(kind::RESOURCE_CREATE_2D),
        resource_id: id.into(),
        format: 2.into(),
        width: 10.into(),
        height: 10.into(),
    }
    .as_bytes()
    .to_vec()
}

fn attach(id: u32, entries: u32) -> Vec<u8> {
    let hdr = CtrlHdr::new(kind::RESOURCE_ATTACH_BACKING);
    let mut bytes =
        AttachBacking { hdr, resource_id: id.into(), entries: entries.into() }.as_bytes().to_vec();
    for n in 0..entries {
        let address = u64::from(n) << 12;
        let entry = MemEntry { address: address.into(), length: 4096.into(), padding: 0.into() };
        bytes.extend_from_slice(entry.as_bytes());
    }
    bytes
}

fn about(kind: u32, id: u32) -> Vec<u8> {
    ResourceCommand { hdr: CtrlHdr::new(kind), resource_id: id.into(), padding: 0.into() }
        .as_bytes()
        .to_vec()
}

fn show(scanout: u32, id: u32, size: u32) -> Vec<u8> {
    SetScanout {
        hdr: CtrlHdr::new(kind::SET_SCANOUT),
        rect: Rect::of_size(size, size).into(),
        scanout_id: scanout.into(),
        resource_id: id.into(),
    }
    .as_bytes()
    .to_vec()
}

fn cursor(kind: u32, id: u32, x: u32, y: u32) -> Vec<u8> {
    UpdateCursor {
        hdr: CtrlHdr::new(kind),
        pos: CursorPos { scanout_id: 1.into(), x: x.into(), y: y.into(), padding: 0.into() },
        resource_id: id.into(),
        hot_x: 3.into(),
        hot_y: 4.into(),
        padding: 0.into(),
    }
    .as_bytes()
    .to_vec()
}

fn successor(journal: &Journal, fd: &OwnedFd) -> Journal {
    Journal::inherit(fd.try_clone().unwrap(), journal.size(), QUEUE).unwrap()
}

#[test]
fn commands_come_back_in_the_order_of_execution() {
    let (journal, fd) = Journal::create(QUEUE).unwrap();
    journal.record(&create(5));
    journal.record(&attach(5, 3));
    journal.record(&show(0, 5, 10));
    // Ids may come in any order.
    journal.record(&create(2));
    journal.record(&cursor(kind::UPDATE_CURSOR, 2, 10, 20));
    journal.record(&cursor(kind::MOVE_CURSOR, 2, 77, 88));
    // Not ours: a resource that only a 3D renderer knows.
    journal.record(&attach(9, 1));
    journal.record(&show(1, 9, 10));
    let expected = vec![
        create(2),
        create(5),
        attach(5, 3),
        show(0, 5, 10),
        cursor(kind::UPDATE_CURSOR, 2, 77, 88),
    ];
    assert_eq!(journal.inheritance(), Vec::<Vec<u8>>::new(), "it inherited nothing");
    let second = successor(&journal, &fd);
    assert_eq!(second.inheritance(), expected);
    assert_eq!(second.inheritance(), Vec::<Vec<u8>>::new(), "once");
    // It goes on writing where the first one stopped.
    second.record(&show(0, 0, 0));
    second.record(&about(kind::RESOURCE_DETACH_BACKING, 5));
    second.record(&show(1, 2, 4));
    let third = successor(&second, &fd);
    let expected =
        vec![create(2), create(5), show(1, 2, 4), cursor(kind::UPDATE_CURSOR, 2, 77, 88)];
    assert_eq!(third.inheritance(), expected);
    third.record(&about(kind::RESOURCE_UNREF, 2));
    third.record(&cursor(kind::UPDATE_CURSOR, 0, 0, 0));
    assert_eq!(successor(&third, &fd).inheritance(), [create(5)]);
    third.clear();
    assert!(successor(&third, &fd).inheritance().is_empty());
}

#[test]
fn a_full_half_is_rewritten_into_the_other() {
    let (journal, fd) = Journal::create(QUEUE).unwrap();
    for id in 1..=4 {
        journal.record(&create(id));
        journal.record(&attach(id, 16_000));
    }
    // 8 MiB of flips and more.
    for n in 0..300_000_u32 {
        journal.record(&show(0, 1 + n % 4, 10));
    }
    let commands = successor(&journal, &fd).inheritance();
    assert_eq!(commands.len(), 9);
    assert_eq!(commands[8], show(0, 4, 10));
    assert_eq!(commands[7], attach(4, 16_000));
    // More than fits: what does not is left out, what does stays.
    for id in 10..60 {
        journal.record(&create(id));
        journal.record(&attach(id, 16_000));
    }
    let commands = successor(&journal, &fd).inheritance();
    assert_eq!(commands[53], create(59));
    assert!(commands.len() < 54 + 1 + 40, "{}", commands.len());
    assert_eq!(commands.last().unwrap(), &show(0, 4, 10));
}

#[test]
fn chains_without_an_answer_are_told_oldest_first() {
    let (journal, fd) = Journal::create(QUEUE).unwrap();
    assert!(journal.start(0, QUEUE, 100).is_empty());
    let answer = |journal: &Journal, head, used| {
        journal.answered(0, head, || Ok::<u16, ()>(used)).unwrap();
    };
    for head in [7, 3, 0, 9] {
        journal.taken(0, head, 0);
    }
    journal.taken(1, 2, 0);
    journal.taken(0, 500, 0);
    // Out of order, as fences are.
    answer(&journal, 0, 101);
    answer(&journal, 7, 102);
    let second = successor(&journal, &fd);
    let heads = |list: Vec<InFlight>| {
        list.into_iter().map(|one| (one.head, one.attempts)).collect::<Vec<_>>()
    };
    assert_eq!(heads(second.start(0, QUEUE, 102)), [(3, 0), (9, 0)]);
    second.taken(0, 3, 1);
    // It dies between the used ring and the table.
    let _ = second.answered(0, 9, || Err(()));
    let third = successor(&second, &fd);
    assert_eq!(heads(third.start(0, QUEUE, 103)), [(3, 1)]);
    third.taken(0, 1, 0);
    let fourth = successor(&third, &fd);
    assert_eq!(heads(fourth.start(0, QUEUE, 103)), [(3, 1), (1, 0)]);
    // The front end has answered everything and wiped the tables.
    rustix::fs::ftruncate(&fd, 0).unwrap_err();
    let zeros = vec![0; 2 * table_size(QUEUE)];
    rustix::io::pwrite(&fd, &zeros, 0).unwrap();
    let fifth = successor(&fourth, &fd);
    assert!(fifth.start(0, QUEUE, 0).is_empty());
    fifth.taken(0, 0, 0);
    assert_eq!(heads(successor(&fifth, &fd).start(0, QUEUE, 0)), [(0, 0)]);
}

#[test]
fn foreign_bytes_are_refused() {
    let (journal, fd) = Journal::create(QUEUE).unwrap();
    journal.record(&create(1));
    let clone = || fd.try_clone().unwrap();
    assert!(Journal::inherit(clone(), journal.size() - 1, QUEUE).is_err());
    assert!(Journal::inherit(clone(), journal.size(), QUEUE * 20).is_err());
    let unsealed = rustix::fs::memfd_create("unsealed", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&unsealed, journal.size()).unwrap();
    assert!(Journal::inherit(unsealed, journal.size(), QUEUE).is_err());
    let head = tables_size(QUEUE) as u64;
    let log = head + 4096;
    let wrong: [(u64, u64); 7] = [
        (head, 1),
        (head + 8, 2),
        (head + 16, u64::MAX),
        (head + 16, 50),
        (log, u64::MAX),
        (log + 8, u64::MAX),
        (log, 1 | 99 << 32),
    ];
    for (at, value) in wrong {
        let mut old = [0; 8];
        rustix::io::pread(&fd, &mut old, at).unwrap();
        rustix::io::pwrite(&fd, &value.to_ne_bytes(), at).unwrap();
        assert!(Journal::inherit(clone(), journal.size(), QUEUE).is_err(), "{at} {value}");
        rustix::io::pwrite(&fd, &old, at).unwrap();
    }
    assert_eq!(successor(&journal, &fd).inheritance(), [create(1)]);
}
