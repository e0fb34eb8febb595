use std::{os::unix::fs::MetadataExt, sync::Arc, time::Duration};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::{
    BalloonHandle, PAGE,
    config::BalloonConfig,
    device::{Balloon, F_FREE_PAGE_HINT, F_REPORTING, F_STATS_VQ, roles},
    pages::PageDiscarder,
    worker::Role,
};
use crate::{
    GuestMemory,
    spec::Spec,
    virtio::{
        VirtioDevice,
        testing::{Driver, MEMORY_SIZE, Part, guest_memory},
    },
};

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATS: usize = 2;
const REPORTING: usize = 4;
/// Where nothing else is: the end of guest memory.
const FREE: u64 = MEMORY_SIZE as u64 - (4 << 20);

fn open(size_mib: u32) -> (Balloon, BalloonHandle) {
    BalloonConfig { size_mib, deflate_on_oom: false }.open().unwrap()
}

/// Bytes of the host that guest memory takes.
fn allocated(memory: &GuestMemory) -> u64 {
    let region = memory.iter().next().unwrap();
    region.file_offset().unwrap().file().metadata().unwrap().blocks() * 512
}

fn page_numbers(pages: &[u64]) -> Vec<u8> {
    pages.iter().flat_map(|page| ((page / PAGE) as u32).to_le_bytes()).collect()
}

fn fill(memory: &GuestMemory, address: u64, length: usize) {
    memory.write_slice(&vec![0xaa; length], GuestAddress(address)).unwrap();
}

fn byte(memory: &GuestMemory, address: u64) -> u8 {
    memory.read_obj(GuestAddress(address)).unwrap()
}

#[test]
fn inflated_pages_go_back_to_the_host() {
    let (mut device, handle) = open(1);
    let mut driver = Driver::start(&mut device);
    let memory = driver.memory.clone();
    fill(&memory, FREE, 1 << 20);
    // In the order in which Linux finds them, and some that are no memory.
    let mut pages: Vec<u64> = (0..100).rev().map(|n| FREE + n * PAGE).collect();
    pages.extend([0xffff_ffff * PAGE, MEMORY_SIZE as u64]);
    driver.queues[INFLATE].add(&[Part::Out(&page_numbers(&pages))]);
    let before = allocated(&memory);
    driver.queues[INFLATE].kick();
    driver.queues[INFLATE].wait_used();
    assert_eq!(before - allocated(&memory), 100 * PAGE);
    assert_eq!(handle.discarded_bytes(), 100 * PAGE);
    assert_eq!(byte(&memory, FREE + 99 * PAGE), 0);
    assert_eq!(byte(&memory, FREE + 100 * PAGE), 0xaa, "the next page is untouched");
    driver.queues[DEFLATE].send(&[Part::Out(&page_numbers(&pages[..10]))]);
    driver.queues[DEFLATE].wait_used();
    assert!(!driver.interrupt.needs_reset());
}

#[test]
fn the_size_is_negotiated_through_configuration_space() {
    let (mut device, handle) = open(64);
    let read = |device: &Balloon, offset| {
        let mut field = [0; 4];
        device.read_config(offset, &mut field);
        u32::from_le_bytes(field)
    };
    assert_eq!((read(&device, 0), read(&device, 4)), (64 * 256, 0));
    let driver = Driver::start(&mut device);
    handle.set_size_mib(128);
    driver.interrupt.wait_config_change();
    assert_eq!(read(&device, 0), 128 * 256);
    device.write_config(4, &(100u32 * 256).to_le_bytes());
    assert_eq!((handle.size_mib(), handle.actual_mib()), (128, 100));
    // Byte by byte works, and the target is the host's.
    for (index, value) in (128u32 * 256).to_le_bytes().into_iter().enumerate() {
        device.write_config(4 + index as u64, &[value]);
        device.write_config(index as u64, &[0xff]);
    }
    assert_eq!(handle.wait_settled(Duration::MAX), 128);
    assert_eq!(read(&device, 0), 128 * 256);
    device.write_config(u64::MAX, &[1; 8]);
    device.read_config(u64::MAX, &mut [0; 4]);
    device.reset();
    assert_eq!(handle.actual_mib(), 0);
    assert_eq!(handle.size_mib(), 128, "the wish outlives a reboot");
}

#[test]
fn free_pages_are_reported() {
    let (mut device, handle) = open(0);
    let mut driver = Driver::start(&mut device);
    let memory = driver.memory.clone();
    fill(&memory, FREE, 2 << 20);
    let before = allocated(&memory);
    let ranges = [(FREE, 1 << 20, true), (FREE + (3 << 20), 64 << 20, true)];
    driver.queues[REPORTING].add_raw(&ranges);
    driver.queues[REPORTING].kick();
    loop {
        // The chain's "room" is not written to, so read the ring only.
        if handle.discarded_bytes() >= 2 << 20 {
            break;
        }
        std::thread::yield_now();
    }
    assert_eq!(before - allocated(&memory), 1 << 20);
    assert_eq!(byte(&memory, FREE), 0);
    assert_eq!(byte(&memory, FREE + (1 << 20)), 0xaa);

    // A guest that relies on what is in free pages keeps them.
    device.write_config(12, &0xaau32.to_le_bytes());
    let discarded = handle.discarded_bytes();
    driver.queues[REPORTING].add_raw(&[(FREE + (1 << 20), 4096, true)]);
    driver.queues[REPORTING].kick();
    while driver.queues[REPORTING].wait_used().0 != 2 {}
    assert_eq!(handle.discarded_bytes(), discarded);
    assert_eq!(byte(&memory, FREE + (1 << 20)), 0xaa);
}

#[test]
fn statistics_are_fetched_on_request() {
    let (mut device, handle) = open(0);
    let mut driver = Driver::start(&mut device);
    let stat = |tag: u16, value: u64| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat();
    let first = [stat(4, 1000), stat(5, 2000), stat(99, 1)].concat();
    driver.queues[STATS].send(&[Part::Out(&first)]);
    while handle.stats().total != Some(2000) {
        std::thread::yield_now();
    }
    assert_eq!(handle.stats().free, Some(1000));
    assert!(driver.queues[STATS].try_used().is_none(), "kept until new ones are wanted");
    handle.request_stats();
    driver.queues[STATS].wait_used();
    driver.queues[STATS].send(&[Part::Out(&stat(4, 500))]);
    while handle.stats().free != Some(500) {
        std::thread::yield_now();
    }
}

#[test]
fn queues_are_found_by_both_ways_of_numbering() {
    let all = F_STATS_VQ | F_FREE_PAGE_HINT | F_REPORTING;
    let names = |features, enabled: &[u16]| {
        roles(features, enabled).into_iter().map(|(_, role)| role).collect::<Vec<_>>()
    };
    use Role::*;
    assert_eq!(names(all, &[0, 1, 2, 3, 4]), [Inflate, Deflate, Stats, Hint, Reporting]);
    assert_eq!(names(F_REPORTING, &[0, 1, 2]), [Inflate, Deflate, Reporting]);
    assert_eq!(names(F_REPORTING, &[0, 1, 4]), [Inflate, Deflate, Reporting]);
    assert_eq!(
        names(F_STATS_VQ | F_REPORTING, &[0, 1, 2, 4]),
        [Inflate, Deflate, Stats, Reporting]
    );
    assert_eq!(names(0, &[0, 1, 2, 3, 4]), [Inflate, Deflate]);
}

#[test]
fn partial_pages_are_kept() {
    let memory = Arc::new(guest_memory());
    fill(&memory, FREE, 4 * PAGE as usize);
    let mut discarder = PageDiscarder::new(memory.clone());
    assert_eq!(discarder.discard(FREE + 1, 2 * PAGE), PAGE);
    assert_eq!(byte(&memory, FREE + 1), 0xaa);
    assert_eq!(byte(&memory, FREE + PAGE), 0);
    assert_eq!(byte(&memory, FREE + 2 * PAGE), 0xaa);
    assert_eq!(discarder.discard(FREE + 1, 10), 0);
    assert_eq!(discarder.discard(u64::MAX - 10, u64::MAX), 0);
}

#[test]
fn options() {
    let parse = |text: &str| BalloonConfig::parse(Spec::parse("balloon", text).unwrap());
    let expected = BalloonConfig { size_mib: 512, deflate_on_oom: true };
    assert_eq!(format!("{:?}", parse("size=512,deflate-on-oom").unwrap()), format!("{expected:?}"));
    assert!(parse("").is_ok());
    for wrong in ["512", "size=x", "size=4294967295", "deflate-on-oom=maybe"] {
        assert!(parse(wrong).is_err(), "{wrong}");
    }
}
