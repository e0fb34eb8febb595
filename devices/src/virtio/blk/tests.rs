//! Real data through real queues.

use std::{
    fs,
    io::Write as _,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use tempfile::{NamedTempFile, TempDir};

use super::*;
use crate::virtio::{
    device::{F_VERSION_1, RING_FEATURES, VirtioDevice},
    testing::{Driver, Part, guest_memory},
};

const MIB: usize = 1 << 20;
const OK: u8 = request::S_OK;
const IOERR: u8 = request::S_IOERR;
const UNSUPP: u8 = request::S_UNSUPP;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const F_RO: u64 = 1 << 5;
const F_FLUSH: u64 = 1 << 9;
const F_DISCARD: u64 = 1 << 13;

fn image(bytes: &[u8]) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn pattern(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}

fn try_build(text: &str) -> Result<Box<dyn VirtioDevice>, String> {
    let config = parse(Spec::parse("disk", text).unwrap()).map_err(|error| error.to_string())?;
    config.build().map(|built| built.device).map_err(|error| error.to_string())
}

fn build(path: &Path, options: &str) -> Box<dyn VirtioDevice> {
    try_build(&format!("path={}{options}", path.display())).unwrap()
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    bytes
}

/// One request and its answer: status and data.
fn ask(driver: &mut Driver, kind: u32, sector: u64, data: &[u8], room: u32) -> (u8, Vec<u8>) {
    let header = header(kind, sector);
    let mut parts = vec![Part::Out(&header)];
    if !data.is_empty() {
        parts.push(Part::Out(data));
    }
    if room > 0 {
        parts.push(Part::In(room));
    }
    parts.push(Part::In(1));
    driver.queues[0].send(&parts);
    let (_, mut bytes) = driver.queues[0].wait_used();
    assert_eq!(bytes.len(), room as usize + 1);
    (bytes.pop().unwrap(), bytes)
}

fn segment(sector: u64, count: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(count.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

fn config<const N: usize>(device: &dyn VirtioDevice, offset: u64) -> [u8; N] {
    let mut bytes = [0; N];
    device.read_config(offset, &mut bytes);
    bytes
}

#[test]
fn data_goes_to_the_file_and_comes_back() {
    let bytes = pattern(MIB, 1);
    let file = image(&bytes);
    let mut device = build(file.path(), "");
    assert_eq!(config(device.as_ref(), 0), (MIB as u64 / 512).to_le_bytes());
    let mut driver = Driver::start(device.as_mut());
    assert_eq!(ask(&mut driver, IN, 3, &[], 1024), (OK, bytes[3 * 512..5 * 512].to_vec()));
    let new = pattern(64 << 10, 2);
    assert_eq!(ask(&mut driver, OUT, 100, &new, 0), (OK, vec![]));
    assert_eq!(ask(&mut driver, IN, 100, &[], 64 << 10), (OK, new.clone()));
    assert_eq!(ask(&mut driver, FLUSH, 0, &[], 0), (OK, vec![]));
    let mut expected = bytes;
    expected[51_200..51_200 + new.len()].copy_from_slice(&new);
    assert_eq!(fs::read(file.path()).unwrap(), expected);
}

/// VERSION_1 lets the driver cut header, data and status wherever it likes (§2.7.4).
#[test]
fn any_layout_of_a_request_is_understood() {
    let bytes = pattern(MIB, 3);
    let file = image(&bytes);
    let mut device = build(file.path(), "");
    let mut driver = Driver::start(device.as_mut());
    let queue = &mut driver.queues[0];
    let head = header(IN, 7);
    queue.send(&[Part::Out(&head[..3]), Part::Out(&head[3..]), Part::In(1), Part::In(1024)]);
    let answer = queue.wait_used().1;
    assert_eq!(answer[..1024], bytes[7 * 512..9 * 512]);
    assert_eq!(answer[1024], OK);

    let data = pattern(1536, 4);
    let whole: Vec<u8> = header(OUT, 9).into_iter().chain(data.iter().copied()).collect();
    queue.send(&[Part::Out(&whole[..700]), Part::Out(&whole[700..]), Part::In(1)]);
    assert_eq!(queue.wait_used().1, [OK]);
    assert_eq!(fs::read(file.path()).unwrap()[9 * 512..12 * 512], data);
}

#[test]
fn a_request_without_end_header_or_status_breaks_the_queue() {
    let file = image(&[0; 4096]);
    let head = header(IN, 0);
    let cases: [&[Part<'_>]; 3] = [
        &[Part::Out(&head)],
        &[Part::In(512), Part::Out(&head), Part::In(1)],
        &[Part::Out(&head), Part::In(512), Part::Out(&head), Part::In(1)],
    ];
    let mut device = build(file.path(), "");
    for parts in cases {
        let mut driver = Driver::start(device.as_mut());
        driver.queues[0].send(parts);
        driver.interrupt.wait_config_change();
        assert!(driver.interrupt.needs_reset());
        device.reset();
    }
    let mut driver = Driver::start(device.as_mut());
    driver.queues[0].send(&[Part::Out(&head[..15]), Part::In(1)]);
    assert_eq!(driver.queues[0].wait_used().1, [IOERR], "a header that is too short");
}

#[test]
fn what_is_not_on_the_disk_or_not_known_is_refused() {
    let bytes = pattern(8 * 512, 5);
    let file = image(&bytes);
    let mut device = build(file.path(), "");
    let mut driver = Driver::start(device.as_mut());
    let sector = [1; 512];
    assert_eq!(ask(&mut driver, IN, 8, &[], 512).0, IOERR);
    assert_eq!(ask(&mut driver, IN, 7, &[], 1024).0, IOERR);
    assert_eq!(ask(&mut driver, IN, u64::MAX, &[], 512).0, IOERR);
    assert_eq!(ask(&mut driver, IN, u64::MAX / 512, &[], 512).0, IOERR);
    assert_eq!(ask(&mut driver, OUT, 8, &sector, 0).0, IOERR);
    assert_eq!(ask(&mut driver, OUT, 1 << 55, &sector, 0).0, IOERR);
    assert_eq!(ask(&mut driver, OUT, 0, &sector[..511], 0).0, IOERR);
    assert_eq!(ask(&mut driver, IN, 0, &[], 100).0, IOERR);
    for kind in [2, 3, 5, 7, 9, 10, 12, 14, 99, u32::MAX] {
        assert_eq!(ask(&mut driver, kind, 0, &sector, 512).0, UNSUPP, "type {kind}");
    }
    assert_eq!(ask(&mut driver, IN, 0, &[], 0).0, OK, "nothing to read is not wrong");
    assert_eq!(fs::read(file.path()).unwrap(), bytes, "the file did not change");
}

#[test]
fn a_read_only_disk_stays_as_it_is() {
    let bytes = pattern(8 * 512, 6);
    let file = image(&bytes);
    fs::set_permissions(file.path(), std::os::unix::fs::PermissionsExt::from_mode(0o444)).unwrap();
    let mut device = build(file.path(), ",ro=on");
    assert_eq!(device.features() & (F_RO | F_DISCARD), F_RO);
    let mut driver = Driver::start(device.as_mut());
    assert_eq!(ask(&mut driver, OUT, 0, &[1; 512], 0).0, IOERR);
    assert_eq!(ask(&mut driver, DISCARD, 0, &segment(0, 8, 0), 0).0, IOERR);
    assert_eq!(ask(&mut driver, WRITE_ZEROES, 0, &segment(0, 8, 0), 0).0, IOERR);
    assert_eq!(ask(&mut driver, FLUSH, 0, &[], 0).0, OK);
    assert_eq!(ask(&mut driver, IN, 0, &[], 4096), (OK, bytes.clone()));
    assert_eq!(fs::read(file.path()).unwrap(), bytes);
}

#[test]
fn the_serial_number_is_told() {
    let file = image(&[0; 512]);
    let id = |options: &str| {
        let mut device = build(file.path(), options);
        let mut driver = Driver::start(device.as_mut());
        let (status, id) = ask(&mut driver, GET_ID, 0, &[], 20);
        assert_eq!(status, OK);
        id
    };
    assert_eq!(id(",serial=ABC-123"), b"ABC-123\0\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(id(",serial=12345678901234567890,id=x"), b"12345678901234567890");
    assert_eq!(id(",id=root"), b"root\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(id(""), [0; 20]);
}

#[test]
fn discard_gives_storage_back() {
    let bytes = pattern(MIB, 7);
    let file = image(&bytes);
    file.as_file().sync_all().unwrap();
    let mut device = build(file.path(), "");
    if device.features() & F_DISCARD == 0 {
        eprintln!("SKIPPED: the file system of {:?} cannot punch holes", file.path());
        return;
    }
    let mut driver = Driver::start(device.as_mut());
    let before = fs::metadata(file.path()).unwrap().blocks();
    let mut segments = segment(0, 512, 0);
    segments.extend(segment(1024, 512, 0));
    assert_eq!(ask(&mut driver, DISCARD, 0, &segments, 0).0, OK);
    assert!(fs::metadata(file.path()).unwrap().blocks() < before);
    assert_eq!(ask(&mut driver, IN, 0, &[], 512), (OK, vec![0; 512]));
    assert_eq!(ask(&mut driver, IN, 512, &[], 512), (OK, bytes[512 * 512..513 * 512].to_vec()));
    assert_eq!(fs::metadata(file.path()).unwrap().len(), MIB as u64, "the size stays");

    let now = fs::read(file.path()).unwrap();
    let refused = [
        (segment(600, 8, 1), UNSUPP),
        (segment(600, 8, 2), UNSUPP),
        (segment(2048, 1, 0), IOERR),
        (segment(u64::MAX, 1, 0), IOERR),
        (segment(600, u32::MAX, 0), IOERR),
        (segment(600, 8, 0)[..15].to_vec(), IOERR),
        ([segment(600, 8, 0), segment(4096, 8, 0)].concat(), IOERR),
        (segment(600, 1, 0).repeat(33), IOERR),
    ];
    for (segments, status) in refused {
        assert_eq!(ask(&mut driver, DISCARD, 0, &segments, 0).0, status, "{segments:?}");
    }
    assert_eq!(ask(&mut driver, DISCARD, 0, &[], 0).0, IOERR);
    assert_eq!(fs::read(file.path()).unwrap(), now, "nothing was discarded by mistake");
}

#[test]
fn zeros_are_written_with_and_without_unmap() {
    let bytes = pattern(MIB, 8);
    let file = image(&bytes);
    let mut device = build(file.path(), "");
    let mut driver = Driver::start(device.as_mut());
    assert_eq!(ask(&mut driver, WRITE_ZEROES, 0, &segment(1, 3, 0), 0).0, OK);
    assert_eq!(ask(&mut driver, WRITE_ZEROES, 0, &segment(1000, 100, 1), 0).0, OK);
    assert_eq!(ask(&mut driver, WRITE_ZEROES, 0, &segment(10, 1, 4), 0).0, UNSUPP);
    assert_eq!(ask(&mut driver, WRITE_ZEROES, 0, &segment(10, 0, 0), 0).0, OK);
    let mut expected = bytes;
    expected[512..4 * 512].fill(0);
    expected[1000 * 512..1100 * 512].fill(0);
    assert_eq!(fs::read(file.path()).unwrap(), expected);
}

#[test]
fn the_write_cache_can_be_switched_off() {
    let file = image(&[0; 4096]);
    let mut device = build(file.path(), "");
    assert_eq!(config(device.as_ref(), 32), [1]);
    device.write_config(32, &[0]);
    device.write_config(0, &[0xff]);
    assert_eq!(config(device.as_ref(), 32), [0]);
    assert_eq!(config(device.as_ref(), 0), 8_u64.to_le_bytes(), "the rest is read-only");
    let mut driver = Driver::start(device.as_mut());
    assert_eq!(ask(&mut driver, OUT, 0, &[5; 512], 0).0, OK);
    assert_eq!(fs::read(file.path()).unwrap()[..512], [5; 512]);
    device.reset();
    assert_eq!(config(device.as_ref(), 32), [1], "on again after a reset");
    // Without the feature there is no cache to flush either.
    let mut driver = Driver::start_with(device.as_mut(), 0, guest_memory());
    assert_eq!(ask(&mut driver, OUT, 1, &[6; 512], 0).0, OK);
    assert_eq!(fs::read(file.path()).unwrap()[512..1024], [6; 512]);
    assert_eq!(F_VERSION_1 & device.features(), 0);
}

#[test]
fn a_partial_sector_at_the_end_is_padded_with_zeros() {
    let bytes = pattern(1000, 9);
    let file = image(&bytes);
    let mut device = build(file.path(), "");
    assert_eq!(config(device.as_ref(), 0), 2_u64.to_le_bytes());
    let mut driver = Driver::start(device.as_mut());
    let mut expected = bytes.clone();
    expected.resize(1024, 0);
    assert_eq!(ask(&mut driver, IN, 0, &[], 1024), (OK, expected.clone()));
    assert_eq!(ask(&mut driver, IN, 1, &[], 512), (OK, expected[512..].to_vec()));
    // A file that shrank behind our back is an error, not zeros.
    file.as_file().set_len(0).unwrap();
    assert_eq!(ask(&mut driver, IN, 0, &[], 512).0, IOERR);
}

/// Opens an image that was let go. A child that another test forks has copies of all our descriptors, and so the
/// lock, until it executes its program.
fn build_once_free(text: &str, in_use: &str) -> Box<dyn VirtioDevice> {
    let deadline = Instant::now() + Duration::from_secs(120);
    loop {
        match try_build(text) {
            Ok(device) => return device,
            Err(error) => assert_eq!(error, in_use),
        }
        assert!(Instant::now() < deadline, "{in_use}");
        std::thread::yield_now();
    }
}

#[test]
fn an_image_in_use_is_refused() {
    let file = image(&[0; 4096]);
    let text = format!("path={}", file.path().display());
    let in_use = format!(
        "--disk: '{}' is in use by another virtual machine or program; a disk can be shared only \
         if all of its users open it with ro=on",
        file.path().display()
    );
    let writer = try_build(&text).unwrap();
    assert_eq!(try_build(&text).err().unwrap(), in_use);
    assert_eq!(try_build(&format!("{text},ro=on")).err().unwrap(), in_use);
    drop(writer);
    let reader = build_once_free(&format!("{text},ro=on"), &in_use);
    let another = try_build(&format!("{text},ro=on")).unwrap();
    assert_eq!(try_build(&text).err().unwrap(), in_use);
    drop((reader, another));
    build_once_free(&text, &in_use);
}

#[test]
fn errors_say_what_to_do() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("disk.img");
    let error = |text: String| try_build(&text).err().unwrap();
    let shown = path.display();
    assert_eq!(error(format!("path={shown}")), format!("--disk: '{shown}' cannot be opened"));
    fs::write(&path, []).unwrap();
    assert_eq!(
        error(format!("path={shown}")),
        format!(
            "--disk: '{shown}' is empty; give it a size first, for instance with 'truncate -s 10G'"
        )
    );
    assert_eq!(
        error(format!("path={},ro=on", directory.path().display())),
        format!("--disk: '{}' is neither a file nor a block device", directory.path().display())
    );
    assert_eq!(error("ro=on".into()), "--disk: 'path=' is missing");
    assert_eq!(
        error("path=x,serial=123456789012345678901".into()),
        "--disk: serial=123456789012345678901: up to 20 printable ASCII characters are possible"
    );
    assert_eq!(error("a,path=b".into()), "--disk: 'a' is not understood; there is a path= already");
    assert!(error("path=x,cache=none".into()).starts_with("--disk: unknown key 'cache'"));
}

/// A directory on a file system with direct I/O, which a tmpfs may not have.
fn direct_image(bytes: &[u8]) -> Option<(TempDir, PathBuf)> {
    for place in [std::env::temp_dir(), PathBuf::from(env!("CARGO_MANIFEST_DIR"))] {
        let Ok(directory) = TempDir::new_in(place) else { continue };
        let path = directory.path().join("disk.img");
        fs::write(&path, bytes).unwrap();
        if try_build(&format!("path={},direct=on", path.display())).is_ok() {
            return Some((directory, path));
        }
    }
    eprintln!("SKIPPED: no file system here has direct I/O");
    None
}

#[test]
fn direct_access_copes_with_any_alignment() {
    let bytes = pattern(MIB + 512 * 3, 10);
    let Some((_directory, path)) = direct_image(&bytes) else { return };
    let mut device = build(&path, ",direct=on");
    let mut driver = Driver::start(device.as_mut());
    let queue = &mut driver.queues[0];
    let mut expected = bytes;
    // Buffer addresses and lengths off by anything, single sectors at odd places, the odd end.
    let base = 8 << 20;
    let head = base - 4096;
    let status =
        |queue: &mut crate::virtio::testing::DriverQueue, kind, sector, parts: &[(u64, u32)]| {
            queue.store(head, &header(kind, sector));
            let mut chain = vec![(head, 16, false)];
            chain.extend(parts.iter().map(|(address, length)| (*address, *length, kind == IN)));
            chain.push((head + 100, 1, true));
            queue.add_raw(&chain);
            queue.kick();
            let answer = queue.wait_used().1;
            (answer[answer.len() - 1], answer[..answer.len() - 1].to_vec())
        };
    let cases: [(u64, Vec<(u64, u32)>); 8] = [
        (0, vec![(base, 4096)]),
        (8, vec![(base, 65536)]),
        (1, vec![(base, 512)]),
        (3, vec![(base + 1, 1024)]),
        (16, vec![(base + 7, 4096)]),
        (24, vec![(base, 100), (base + 4096, 3996)]),
        (40, vec![(base, 4096), (base + 8192 + 512, 3584), (base + 20_000, 512)]),
        (2048, vec![(base + 512, 1536)]),
    ];
    for (round, (sector, parts)) in cases.iter().enumerate() {
        let length: usize = parts.iter().map(|(_, length)| *length as usize).sum();
        let at = *sector as usize * 512;
        let (code, data) = status(queue, IN, *sector, parts);
        assert_eq!(code, OK, "read {round}");
        assert_eq!(data, expected[at..at + length], "read {round}");
        let new = pattern(length, 100 + round as u64);
        let mut rest = &new[..];
        for (address, length) in parts {
            let (part, more) = rest.split_at(*length as usize);
            queue.store(*address, part);
            rest = more;
        }
        assert_eq!(status(queue, OUT, *sector, parts).0, OK, "write {round}");
        expected[at..at + length].copy_from_slice(&new);
        let (code, data) = status(queue, IN, *sector, parts);
        assert_eq!((code, data), (OK, new), "read back {round}");
    }
    assert_eq!(ask(&mut driver, FLUSH, 0, &[], 0).0, OK);
    assert_eq!(fs::read(&path).unwrap(), expected);
}

/// Hundreds of requests in flight, compared with a model; with the write cache off so that every
/// write goes through the pool, and once past the page cache.
#[test]
fn many_requests_at_once_keep_their_data_apart() {
    const SLOTS: usize = 64;
    const SLOT: usize = 8192;
    for options in ["", ",direct=on"] {
        let bytes = pattern(SLOTS * SLOT, 11);
        let Some((_directory, path)) = direct_image(&bytes) else { return };
        let mut device = build(&path, options);
        let mut expected = bytes;
        let features = RING_FEATURES | if options.is_empty() { 0 } else { F_FLUSH };
        for round in 0..20_u64 {
            let mut driver = Driver::start_with(device.as_mut(), features, guest_memory());
            let queue = &mut driver.queues[0];
            let mut reads = std::collections::HashMap::new();
            let mut total = 0;
            for slot in 0..SLOTS {
                let sector = (slot * SLOT / 512) as u64;
                let at = slot * SLOT..(slot + 1) * SLOT;
                if (slot as u64 + round).is_multiple_of(3) {
                    let data = pattern(SLOT, round * 1000 + slot as u64);
                    queue.add(&[Part::Out(&header(OUT, sector)), Part::Out(&data), Part::In(1)]);
                    expected[at].copy_from_slice(&data);
                } else {
                    let room = SLOT as u32;
                    let head =
                        queue.add(&[Part::Out(&header(IN, sector)), Part::In(room), Part::In(1)]);
                    reads.insert(head, at);
                }
                total += 1;
                if slot % 16 == 0 {
                    queue.add(&[Part::Out(&header(FLUSH, 0)), Part::In(1)]);
                    queue.kick();
                    total += 1;
                }
            }
            queue.kick();
            for _ in 0..total {
                let (head, answer) = queue.wait_used();
                assert_eq!(answer[answer.len() - 1], OK);
                if let Some(range) = reads.remove(&head) {
                    assert_eq!(answer[..SLOT], expected[range], "{options} round {round}");
                }
            }
            assert!(reads.is_empty());
            device.reset();
        }
        assert_eq!(fs::read(&path).unwrap(), expected);
    }
}

/// A driver that waits for all of a burst of large requests has nothing to do meanwhile.
#[test]
fn large_requests_are_reported_one_by_one() {
    const ROOM: u32 = 256 << 10;
    let file = image(&pattern(4 * MIB, 14));
    let mut device = build(file.path(), "");
    // Without EVENT_IDX, so that each report is an interrupt.
    let mut driver =
        Driver::start_with(device.as_mut(), RING_FEATURES & !(1 << 29), guest_memory());
    for index in 0..8 {
        let request = header(IN, index * (ROOM as u64 / 512));
        driver.queues[0].add(&[Part::Out(&request), Part::In(ROOM), Part::In(1)]);
    }
    driver.queues[0].kick();
    let mut interrupts = 0;
    for _ in 0..8 {
        while driver.queues[0].try_used().is_none() {
            std::thread::yield_now();
        }
        interrupts += driver.interrupt.take_used(0);
    }
    // That of the last one may come after it is seen.
    assert!(interrupts >= 7, "{interrupts}");
}

#[test]
fn a_reset_in_the_middle_leaves_nothing_behind() {
    let file = image(&pattern(MIB, 12));
    let mut device = build(file.path(), "");
    for _ in 0..50 {
        let mut driver = Driver::start_with(device.as_mut(), RING_FEATURES, guest_memory());
        let data = pattern(16 << 10, 13);
        for sector in 0..40 {
            let head = header(OUT, sector * 32);
            driver.queues[0].add(&[Part::Out(&head), Part::Out(&data), Part::In(1)]);
        }
        driver.queues[0].kick();
        device.reset();
        let mut taken = 0;
        while driver.queues[0].try_used().is_some() {
            taken += 1;
        }
        driver.queues[0].kick();
        assert!(taken <= 40);
        assert!(driver.queues[0].try_used().is_none(), "nothing happens after the reset");
    }
    device.shutdown();
    let mut driver = Driver::start(device.as_mut());
    assert_eq!(ask(&mut driver, IN, 0, &[], 512).0, OK);
    device.shutdown();
}

/// Poweroff, reboot and signals end in a shutdown of every device: what the guest wrote is stable then,
/// also if it never asked for that.
#[test]
fn a_shutdown_makes_stable_what_was_written() {
    let file = image(&pattern(MIB, 14));
    let opened = Image::open(file.path(), &ImageOptions::default()).unwrap();
    let mut disk = Disk::new(opened, "");
    let image = disk.image();
    let mut driver = Driver::start(&mut disk);
    assert_eq!(ask(&mut driver, OUT, 0, &pattern(4096, 15), 0).0, OK);
    assert_eq!(image.flushes(), 0, "the driver has a write cache");
    disk.shutdown();
    assert_eq!(image.flushes(), 1);
    drop((disk, image));

    let options = ImageOptions { read_only: true, ..ImageOptions::default() };
    let mut disk = Disk::new(Image::open(file.path(), &options).unwrap(), "");
    disk.shutdown();
    assert_eq!(disk.image().flushes(), 0, "there is nothing to flush");
}

#[test]
fn no_format_is_read_into_a_disk() {
    let mut content = pattern(MIB, 21);
    content[..4].copy_from_slice(b"QFI\xfb");
    let file = image(&content);
    assert_eq!(super::looks_like(file.path()), Some("qcow2"));
    let spec = Spec::parse("disk", &format!("path={}", file.path().display())).unwrap();
    let error = (MODULE.parse)(spec).unwrap().build().map(drop).unwrap_err().to_string();
    assert!(error.starts_with("--disk: path=") && error.contains("qcow2"), "{error}");
    let mut device = build(file.path(), ",format=raw");
    let mut driver = Driver::start(device.as_mut());
    let (status, data) = ask(&mut driver, IN, 0, &[], 512);
    assert_eq!((status, &data[..]), (OK, &content[..512]));
    assert_eq!(super::looks_like(image(&pattern(MIB, 22)).path()), None);
}

/// Reads are answered by the worker, flushes by the pool: each order of these and of the driver's looks has
/// to end with the driver awake. (`ring::model` has all orders, this has the code.)
#[test]
fn no_notification_is_lost_between_driver_and_disk() {
    let file = image(&[0; 4096]);
    for event_idx in [true, false] {
        let mut device = build(file.path(), "");
        let features = if event_idx { !0 } else { !(1 << 29) };
        let features = device.features() & features;
        let mut driver = Driver::start_with(device.as_mut(), features, guest_memory());
        let queue = &mut driver.queues[0];
        let random = pattern(20_000, 5);
        let (mut under_way, read, flush) = (0, header(IN, 0), header(FLUSH, 0));
        for chance in random {
            // One to four at a time; some of them when others are under way.
            for number in 0..=chance % 4 {
                match chance >> 4 {
                    0 => queue.add(&[Part::Out(&flush), Part::In(1)]),
                    _ => queue.add(&[Part::Out(&read), Part::In(512), Part::In(1)]),
                };
                under_way += 1;
                if chance & 8 != 0 || number == chance % 4 {
                    queue.kick();
                }
            }
            for _ in 0..u32::from(chance) * 4 {
                std::hint::spin_loop();
            }
            let left = if chance & 4 != 0 { 4 } else { 0 };
            while under_way > left {
                queue.wait_used();
                under_way -= 1;
            }
        }
    }
}
