//! What VIRTIO 1.3 and PCI ask of every device, run over the whole registry. A new device passes
//! this without any change here.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

mod harness;

use std::{
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use devices::virtio::{
    VirtioDevice,
    registry::{DeviceModule, MODULES},
};
use harness::{
    ACKNOWLEDGE, BUFFERS, DESC_INDIRECT, DESC_NEXT, DESC_WRITE, DRIVER, DRIVER_OK, EVENT_IDX,
    FEATURES_OK, Guest, GuestQueue, HIGH_START, INDIRECT_DESC, LOW_MEMORY, Machine, NEEDS_RESET,
    PATIENCE_MS, VERSION_1, readable, reg,
};
use vm_memory::{Bytes, GuestAddress};

fn sample(module: &DeviceModule) -> Box<dyn VirtioDevice> {
    (module.sample)().unwrap_or_else(|error| panic!("--{}: {error}", module.option)).device
}

/// Runs `check` for every registered device, each in a machine of its own. A check that does not
/// come back is reported with the device's name instead of hanging the suite.
fn for_every_device(check: fn(&Machine, Guest<'_>)) {
    for_every_module(move |_, machine, guest| check(machine, guest));
}

/// The same for a check that wants to know what the registry says of the device.
fn for_every_module(check: impl Fn(&DeviceModule, &Machine, Guest<'_>) + Copy + Send + 'static) {
    for module in MODULES {
        let option = module.option;
        println!("device: {option}");
        let (done, finished) = mpsc::channel();
        let worker = thread::spawn(move || {
            let machine = Machine::new();
            let guest = machine.add(sample(module));
            check(module, &machine, guest);
            let _ = done.send(());
        });
        match finished.recv_timeout(Duration::from_secs(600)) {
            Err(mpsc::RecvTimeoutError::Timeout) => panic!("--{option}: the device hangs"),
            _ => {
                if let Err(panic) = worker.join() {
                    println!("failed: --{option}");
                    std::panic::resume_unwind(panic);
                }
            }
        }
    }
}

#[test]
fn the_function_describes_itself() {
    for_every_device(|machine, guest| {
        assert_eq!(guest.config(0x00, 2), 0x1af4);
        let id = guest.config(0x02, 2);
        assert!((0x1041..0x1080).contains(&id), "device id {id:#x}");
        assert!(guest.config(0x08, 1) >= 1, "modern devices have a revision");
        assert_ne!(guest.config(0x09, 3), 0, "class");
        assert_eq!(guest.config(0x0e, 1), 0, "header type");
        assert!(guest.config(0x2e, 2) >= 0x40, "subsystem id");
        assert_eq!(guest.config(0x3d, 1), 0, "no interrupt pin");
        assert_ne!(guest.config(0x06, 2) & 0x10, 0, "capability list");
        assert_eq!(guest.config(0x04, 2), 0, "decoding is off until the guest wants it");
        let mut data = [0xff; 4];
        assert!(!machine.bus.read(guest.bar, &mut data), "not mapped yet");

        // Sizing, as every operating system does it.
        guest.set_config(0x10, 0xffff_ffff, 4);
        guest.set_config(0x14, 0xffff_ffff, 4);
        let size = !(guest.config(0x10, 8) & !0xf) + 1;
        assert_eq!(guest.config(0x10, 4) & 0xf, 4, "64-bit, not prefetchable");
        guest.set_config(0x10, guest.bar & 0xffff_ffff, 4);
        guest.set_config(0x14, guest.bar >> 32, 4);
        assert!(size.is_power_of_two() && guest.bar % size == 0);
        assert!(machine.windows.contains(guest.bar, size));
        for bar in [0x18, 0x1c, 0x20, 0x24, 0x30] {
            guest.set_config(bar, 0xffff_ffff, 4);
            assert_eq!(guest.config(bar, 4), 0, "nothing at {bar:#x}");
        }

        guest.set_decoding(true);
        for (kind, minimum, alignment) in [(1, 0x38, 4), (2, 2, 2), (3, 1, 1), (4, 4, 4)] {
            let capability = guest.capability(kind);
            assert_eq!(capability.bar, 0);
            assert!(capability.length >= minimum && capability.start % alignment == 0);
            assert!(u64::from(capability.start) + u64::from(capability.length) <= size);
        }
        guest.capability(5);
        assert!(guest.config(guest.capability(2).offset + 16, 4).is_power_of_two());

        let queues = guest.queue_count();
        assert!(queues > 0);
        let msix = guest.msix();
        assert_eq!(guest.config(msix.offset + 2, 2), u64::from(queues), "a vector per event");
        for queue in 0..queues {
            guest.select(queue);
            let max = guest.common(reg::QUEUE_SIZE, 2);
            assert!(max.is_power_of_two() && max <= 32768, "queue {queue} of {max}");
            assert_eq!(guest.common(reg::QUEUE_ENABLE, 2), 0);
        }
        guest.select(queues);
        assert_eq!(guest.common(reg::QUEUE_SIZE, 2), 0, "there is no such queue");
    });
}

#[test]
fn initialisation_works_and_repeats() {
    for_every_device(|_, guest| {
        for _ in 0..3 {
            let queues = guest.start();
            assert_eq!(queues.len(), usize::from(guest.queue_count()));
            guest.reset();
            guest.reset();
            for queue in 0..guest.queue_count() {
                guest.select(queue);
                assert_eq!(guest.common(reg::QUEUE_ENABLE, 2), 0, "queue {queue}");
                assert_eq!(guest.common(reg::QUEUE_VECTOR, 2), 0xffff);
                assert_eq!(guest.common(reg::QUEUE_DESC, 8), 0);
            }
            assert_eq!(guest.common(reg::CONFIG_VECTOR, 2), 0xffff);
        }
        // With the least a driver must accept: no EVENT_IDX, no indirect descriptors.
        guest.start_with(VERSION_1);
        guest.reset();
    });
}

#[test]
fn reset_works_at_every_stage() {
    for_every_device(|_, guest| {
        guest.set_decoding(true);
        let stages = [
            &[ACKNOWLEDGE][..],
            &[ACKNOWLEDGE, ACKNOWLEDGE | DRIVER],
            &[ACKNOWLEDGE, ACKNOWLEDGE | DRIVER, 0x80 | ACKNOWLEDGE | DRIVER],
        ];
        for stage in stages {
            for status in stage {
                guest.set_status(*status);
                assert_eq!(guest.status(), *status);
            }
            guest.reset();
            guest.reset();
        }
        guest.start();
        guest.machine.root.shutdown();
        guest.reset();
        guest.machine.root.shutdown();
        guest.start();
    });
}

#[test]
fn features_that_are_not_offered_are_refused() {
    for_every_device(|_, guest| {
        guest.set_decoding(true);
        let offered = guest.offered();
        assert_ne!(offered & VERSION_1, 0);
        assert!(!guest.negotiate(0), "VERSION_1 must be accepted");
        assert!(!guest.negotiate(offered & !VERSION_1));
        for bit in (0..64).filter(|bit| offered >> bit & 1 == 0) {
            assert!(!guest.negotiate(offered | 1 << bit), "bit {bit}");
            assert_eq!(guest.status(), ACKNOWLEDGE | DRIVER);
            // A driver that goes on regardless gets nowhere.
            guest.set_status(ACKNOWLEDGE | DRIVER | DRIVER_OK);
            assert_eq!(guest.status(), ACKNOWLEDGE | DRIVER);
        }
        for bit in (0..64).filter(|bit| offered >> bit & 1 == 1) {
            assert!(guest.negotiate(VERSION_1 | 1 << bit), "bit {bit} alone");
        }
        guest.set_common(reg::DRIVER_FEATURE, 0, 4);
        guest.set_common(reg::DRIVER_FEATURE_SELECT, 1, 4);
        assert_eq!(guest.common(reg::DRIVER_FEATURE, 4) & 1, 1, "fixed after FEATURES_OK");
        guest.set_common(reg::DEVICE_FEATURE_SELECT, 2, 4);
        assert_eq!(guest.common(reg::DEVICE_FEATURE, 4), 0, "nothing beyond bit 63");
    });
}

#[test]
fn every_register_can_be_read_at_every_offset_and_size() {
    for_every_device(|machine, guest| {
        guest.start();
        for size in [1, 2, 4, 8] {
            for offset in 0..4096 {
                guest.config(offset, size);
            }
            for offset in 0..0x8000 - size as u64 + 1 {
                machine.read(guest.bar + offset, size);
            }
        }
        // Wide reads are the same bytes as narrow ones.
        for offset in 0..1024 {
            let mut bytes = [0; 8];
            for (index, byte) in bytes.iter_mut().enumerate() {
                *byte = guest.device_config(offset + index as u64, 1) as u8;
            }
            assert_eq!(guest.device_config(offset, 8), u64::from_le_bytes(bytes), "at {offset}");
        }
        assert_eq!(guest.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        let generation = guest.common(reg::GENERATION, 1);
        assert_eq!(guest.common(reg::GENERATION, 1), generation, "nothing changed in between");
    });
}

#[test]
fn device_configuration_can_be_written_at_every_offset_and_size() {
    for_every_device(|machine, guest| {
        guest.start();
        let base = guest.bar + u64::from(guest.capability(4).start);
        for value in [0, 1, 0x55aa_55aa_55aa_55aa, u64::MAX] {
            for size in [1, 2, 4, 8] {
                for offset in 0..512 {
                    machine.write(base + offset, value, size);
                    machine.read(base + offset, size);
                }
            }
        }
        guest.reset();
        guest.start();
    });
}

#[test]
fn registers_are_reachable_through_configuration_space() {
    for_every_device(|_, guest| {
        guest.set_decoding(false);
        let window = guest.capability(5).offset;
        let access = |offset: u64, size: u64| {
            guest.set_config(window + 4, 0, 1);
            guest.set_config(window + 8, u64::from(guest.capability(1).start) + offset, 4);
            guest.set_config(window + 12, size, 4);
        };
        access(reg::STATUS, 1);
        guest.set_config(window + 16, ACKNOWLEDGE.into(), 1);
        assert_eq!(guest.config(window + 16, 1), u64::from(ACKNOWLEDGE));
        access(reg::NUM_QUEUES, 2);
        let queues = guest.config(window + 16, 4) & 0xffff;
        // Lengths and offsets that are not allowed do nothing.
        for (offset, size) in [(reg::STATUS, 3), (reg::STATUS, 2), (0xffff_fffc, 4), (0x8000, 1)] {
            access(offset, size);
            guest.set_config(window + 16, u64::MAX, 4);
            guest.config(window + 16, 4);
        }
        guest.set_config(window + 4, 3, 1);
        guest.config(window + 16, 4);
        guest.set_decoding(true);
        assert_eq!(guest.status(), ACKNOWLEDGE);
        assert_eq!(u64::from(guest.queue_count()), queues);
    });
}

#[test]
fn the_order_of_initialisation_is_enforced() {
    for_every_device(|_, guest| {
        guest.set_decoding(true);
        guest.set_status(DRIVER);
        assert_eq!(guest.status(), 0, "DRIVER before ACKNOWLEDGE");
        guest.set_status(ACKNOWLEDGE | DRIVER | DRIVER_OK);
        assert_eq!(guest.status(), ACKNOWLEDGE | DRIVER, "DRIVER_OK before FEATURES_OK");
        guest.select(0);
        guest.set_common(reg::QUEUE_ENABLE, 1, 2);
        assert_eq!(guest.common(reg::QUEUE_ENABLE, 2), 0, "queue before FEATURES_OK");

        assert!(guest.negotiate(VERSION_1));
        let queue = guest.set_up_queue(0);
        guest.select(0);
        guest.set_common(reg::QUEUE_SIZE, 1, 2);
        guest.set_addresses(0, 0, 0);
        guest.set_common(reg::QUEUE_ENABLE, 0, 2);
        assert_eq!(guest.common(reg::QUEUE_ENABLE, 2), 1);
        assert_eq!(guest.common(reg::QUEUE_SIZE, 2), u64::from(queue.size));
        assert_eq!(guest.common(reg::QUEUE_DESC, 8), queue.desc);
        guest.set_common(reg::QUEUE_VECTOR, 0x7ff, 2);
        assert_eq!(guest.common(reg::QUEUE_VECTOR, 2), 0xffff, "no such vector");
        guest.select(guest.queue_count());
        guest.set_common(reg::QUEUE_ENABLE, 1, 2);
        guest.set_addresses(1, 2, 3);
        assert_eq!(guest.common(reg::QUEUE_ENABLE, 2), 0);
        guest.reset();
    });
}

#[test]
fn bad_queue_addresses_and_sizes_are_refused() {
    for_every_device(|_, guest| {
        guest.set_decoding(true);
        let good = (BUFFERS, BUFFERS + 0x1_0000, BUFFERS + 0x2_0000);
        let end = LOW_MEMORY;
        let bad_addresses = [
            (good.0 + 8, good.1, good.2),
            (good.0, good.1 + 1, good.2),
            (good.0, good.1, good.2 + 2),
            (end - 16, good.1, good.2),
            (good.0, end - 2, good.2),
            (good.0, good.1, end - 4),
            (end, good.1, good.2),
            (HIGH_START - 64, good.1, good.2),
            (u64::MAX - 15, good.1, good.2),
            (good.0, u64::MAX - 1, good.2),
            (good.0, good.1, u64::MAX - 3),
            (0, 0, 0),
        ];
        for queue in 0..guest.queue_count() {
            guest.reset();
            guest.select(queue);
            let max = guest.common(reg::QUEUE_SIZE, 2);
            let sizes = [0, 3, max + 1, max * 2, 0xffff];
            let cases = sizes
                .into_iter()
                .map(|size| (size, good))
                .chain(bad_addresses.map(|addresses| (max, addresses)));
            for (size, (desc, driver, device)) in cases {
                assert!(guest.negotiate(guest.offered()));
                guest.select(queue);
                guest.set_common(reg::QUEUE_SIZE, size & 0xffff, 2);
                guest.set_addresses(desc, driver, device);
                guest.set_common(reg::QUEUE_ENABLE, 1, 2);
                let what = format!("queue {queue}: {size} at {desc:#x} {driver:#x} {device:#x}");
                assert_eq!(guest.common(reg::QUEUE_ENABLE, 2), 0, "{what}");
                assert_ne!(guest.status() & NEEDS_RESET, 0, "{what}");
            }
        }
        guest.start();
    });
}

/// Lets the device look at what was offered: until it shows that it did, or for a moment where it
/// has no reason to (a queue of buffers for later). No verdict depends on the time.
fn let_it_look(guest: &Guest<'_>, queue: &GuestQueue<'_>, offered: u16) {
    let_it_look_for(Duration::from_millis(30), guest, queue, offered);
}

fn let_it_look_for(moment: Duration, guest: &Guest<'_>, queue: &GuestQueue<'_>, offered: u16) {
    let until = Instant::now() + moment;
    while Instant::now() < until {
        let looked = queue.used_index() == offered || queue.avail_event() == offered;
        if looked || guest.status() & NEEDS_RESET != 0 {
            return;
        }
        thread::yield_now();
    }
}

/// A chain that breaks a rule: fills in the descriptor table and returns the heads to offer.
type Trap = fn(&GuestQueue<'_>, indirect: u64) -> Vec<u16>;

const TRAPS: &[(&str, Trap)] = &[
    ("a descriptor that follows itself", |queue, _| {
        queue.descriptor(queue.desc, 0, (BUFFERS, 64, DESC_NEXT), 0);
        vec![0]
    }),
    ("a writable descriptor that follows itself", |queue, _| {
        queue.descriptor(queue.desc, 0, (BUFFERS, 64, DESC_NEXT | DESC_WRITE), 0);
        vec![0]
    }),
    ("two descriptors that follow each other", |queue, _| {
        queue.descriptor(queue.desc, 0, (BUFFERS, 64, DESC_NEXT), 1);
        queue.descriptor(queue.desc, 1, (BUFFERS, 64, DESC_NEXT | DESC_WRITE), 0);
        vec![0]
    }),
    ("a head that is out of range", |queue, _| vec![queue.size]),
    ("the largest head", |_, _| vec![0xffff]),
    ("a next descriptor that is out of range", |queue, _| {
        queue.descriptor(queue.desc, 0, (BUFFERS, 64, DESC_NEXT), queue.size);
        vec![0]
    }),
    ("the same head many times", |queue, _| {
        queue.chain(&[(BUFFERS, 64, 0), (BUFFERS + 64, 64, DESC_WRITE)]);
        vec![0; usize::from(queue.size)]
    }),
    ("an empty chain", |queue, _| {
        queue.chain(&[(BUFFERS, 0, 0), (BUFFERS, 0, DESC_WRITE)]);
        vec![0]
    }),
    ("a single empty descriptor", |queue, _| {
        queue.chain(&[(0, 0, 0)]);
        vec![0]
    }),
    ("nothing but room", |queue, _| {
        queue.chain(&[(BUFFERS, 4096, DESC_WRITE)]);
        vec![0]
    }),
    ("room before data", |queue, _| {
        queue.chain(&[(BUFFERS, 64, DESC_WRITE), (BUFFERS + 64, 64, 0)]);
        vec![0]
    }),
    ("one byte of data, one of room", |queue, _| {
        queue.chain(&[(BUFFERS, 1, 0), (BUFFERS + 64, 1, DESC_WRITE)]);
        vec![0]
    }),
    ("data in the hole", |queue, _| {
        queue.chain(&[(LOW_MEMORY, 64, 0), (BUFFERS, 64, DESC_WRITE)]);
        vec![0]
    }),
    ("room in the hole", |queue, _| {
        queue.chain(&[(BUFFERS, 64, 0), (LOW_MEMORY + 4096, 4096, DESC_WRITE)]);
        vec![0]
    }),
    ("data that ends in the hole", |queue, _| {
        queue.chain(&[(LOW_MEMORY - 8, 64, 0), (LOW_MEMORY - 8, 64, DESC_WRITE)]);
        vec![0]
    }),
    ("an address that wraps around", |queue, _| {
        queue.chain(&[(u64::MAX - 8, 64, 0), (u64::MAX - 8, 64, DESC_WRITE)]);
        vec![0]
    }),
    ("4 GiB of data", |queue, _| {
        queue.chain(&[(BUFFERS, u32::MAX, 0), (BUFFERS, 64, DESC_WRITE)]);
        vec![0]
    }),
    ("more than 4 GiB in all", |queue, _| {
        let part = (HIGH_START, 0x8000_0000, 0);
        queue.chain(&[(BUFFERS, 16, 0), part, part, part, (BUFFERS, 64, DESC_WRITE)]);
        vec![0]
    }),
    ("the longest chain there is", |queue, _| {
        let half = usize::from(queue.size / 2);
        let mut parts = vec![(BUFFERS, 8192, 0); half];
        parts.extend(vec![(BUFFERS + (1 << 20), 8192, DESC_WRITE); half]);
        queue.chain(&parts);
        vec![0]
    }),
    ("an indirect table of odd length", |queue, indirect| {
        queue.chain(&[(indirect, 17, DESC_INDIRECT)]);
        vec![0]
    }),
    ("an empty indirect table", |queue, indirect| {
        queue.chain(&[(indirect, 0, DESC_INDIRECT)]);
        vec![0]
    }),
    ("an indirect table in the hole", |queue, _| {
        queue.chain(&[(LOW_MEMORY, 64, DESC_INDIRECT)]);
        vec![0]
    }),
    ("an indirect table that is one of its own buffers", |queue, indirect| {
        queue.descriptor(indirect, 0, (indirect, 16, DESC_INDIRECT), 0);
        queue.chain(&[(indirect, 16, DESC_INDIRECT)]);
        vec![0]
    }),
    ("an indirect table that loops", |queue, indirect| {
        queue.descriptor(indirect, 0, (BUFFERS, 16, DESC_NEXT), 1);
        queue.descriptor(indirect, 1, (BUFFERS, 16, DESC_NEXT | DESC_WRITE), 0);
        queue.chain(&[(indirect, 32, DESC_INDIRECT)]);
        vec![0]
    }),
    ("an indirect table longer than any queue", |queue, indirect| {
        for slot in 0..32768 {
            queue.descriptor(indirect, slot, (BUFFERS, 512, DESC_NEXT), slot + 1);
        }
        queue.chain(&[(indirect, 32768 * 16, DESC_INDIRECT)]);
        vec![0]
    }),
    ("an indirect table of the largest length", |queue, indirect| {
        queue.chain(&[(indirect, 0xffff_fff0, DESC_INDIRECT)]);
        vec![0]
    }),
];

#[test]
fn chains_that_break_the_rules_harm_nobody() {
    for_every_device(|machine, guest| {
        const INDIRECT: u64 = BUFFERS + (4 << 20);
        const GUARD: u64 = BUFFERS + (12 << 20);
        guest.set_decoding(true);
        let offered = guest.offered();
        // What the device publishes with EVENT_IDX shows when it has looked.
        assert_ne!(offered & EVENT_IDX, 0, "this test needs EVENT_IDX");
        let features = [offered, offered & !INDIRECT_DESC]
            .into_iter()
            .take(if offered & INDIRECT_DESC != 0 { 2 } else { 1 });
        for features in features {
            for queue in 0..guest.queue_count() {
                for (name, trap) in TRAPS {
                    println!("queue {queue}: {name}");
                    let guard = vec![0xa5; 4096];
                    machine.memory.write_slice(&guard, GuestAddress(GUARD)).unwrap();
                    machine.memory.write_slice(&[0; 8192], GuestAddress(BUFFERS)).unwrap();
                    let mut queues = guest.start_with(features);
                    let queue = &mut queues[usize::from(queue)];
                    let heads = trap(queue, INDIRECT);
                    for head in &heads {
                        queue.offer(*head);
                    }
                    queue.kick();
                    let_it_look(&guest, queue, heads.len() as u16);
                    assert!(queue.used_index() <= heads.len() as u16, "{name}");
                    guest.reset();
                    let mut now = vec![0; 4096];
                    machine.memory.read_slice(&mut now, GuestAddress(GUARD)).unwrap();
                    assert_eq!(now, guard, "{name}");
                }
            }
        }
    });
}

#[test]
fn an_impossible_available_index_needs_a_reset() {
    for_every_module(|module, _, guest| {
        guest.set_decoding(true);
        let mut seen = false;
        let elsewhere = module.served_elsewhere;
        // Some queue must notice; which ones have no reason to look is the device's business. So each
        // gets a moment, and if that was too short on a busy machine each gets a longer one.
        for moment in (0..10).map(|n| Duration::from_millis(30 << n)) {
            for index in 0..guest.queue_count() {
                let mut queues = guest.start();
                let config_vector = guest.vector(0);
                let _ = config_vector.fd.read();
                let queue = &mut queues[usize::from(index)];
                queue.set_avail(queue.size + 1);
                queue.kick();
                let_it_look_for(moment, &guest, queue, u16::MAX);
                if guest.status() & NEEDS_RESET != 0 {
                    seen = true;
                    assert!(readable(&config_vector.fd, PATIENCE_MS), "the driver is told");
                }
                guest.reset();
            }
            if seen || elsewhere {
                break;
            }
        }
        assert!(seen || elsewhere, "no queue noticed");
        guest.start();
    });
}

/// Makes the device signal a configuration change: a queue that cannot be enabled does it.
fn provoke_config_change(guest: &Guest<'_>) {
    guest.select(0);
    guest.set_addresses(u64::MAX, u64::MAX, u64::MAX);
    guest.set_common(reg::QUEUE_ENABLE, 1, 2);
    assert_ne!(guest.status() & NEEDS_RESET, 0);
}

#[test]
fn interrupts_are_routed_masked_and_pending_as_programmed() {
    for_every_device(|machine, guest| {
        guest.set_decoding(true);
        let msix = guest.msix();
        let table = guest.bar + (guest.config(msix.offset + 4, 4) & !7);
        let pending = guest.bar + (guest.config(msix.offset + 8, 4) & !7);
        let vector = guest.vector(0);
        let routed = || *vector.route.lock().unwrap();

        // Without MSI-X the interrupt status register is all there is (§4.1.4.5).
        assert!(guest.negotiate(VERSION_1));
        let isr = guest.bar + u64::from(guest.capability(3).start);
        provoke_config_change(&guest);
        assert!(!readable(&vector.fd, 0));
        assert_eq!(machine.read(isr, 1), 2);
        assert_eq!(machine.read(isr, 1), 0, "reading clears it");

        // Unmasked: routed as programmed, and raised.
        assert!(guest.negotiate(VERSION_1));
        guest.set_up_vectors();
        let message = routed().expect("a route");
        assert_eq!((message.address, message.data), (0xfee0_0000, 0x30));
        provoke_config_change(&guest);
        assert!(readable(&vector.fd, 0));
        assert_eq!(machine.read(isr, 1), 0, "not with MSI-X");
        assert_eq!(machine.read(pending, 8) & 1, 0, "on its way, not pending");
        vector.fd.read().unwrap();

        // Masked in the table: pending until unmasked.
        assert!(guest.negotiate(VERSION_1));
        guest.set_up_vectors();
        machine.write(table + 12, 1, 4);
        assert_eq!(routed(), None);
        provoke_config_change(&guest);
        assert_eq!(machine.read(pending, 8) & 1, 1);
        machine.write(table + 12, 0, 4);
        assert_eq!(routed(), Some(message));
        assert_eq!(machine.read(pending, 8) & 1, 0);
        assert_eq!(vector.fd.read().unwrap(), 1, "the services deliver what waited");

        // Masked as a whole, then switched off.
        guest.set_config(msix.offset + 2, 0xc000, 2);
        assert_eq!(routed(), None);
        guest.set_config(msix.offset + 2, 0x8000, 2);
        assert_eq!(routed(), Some(message));
        guest.set_config(msix.offset + 2, 0, 2);
        assert_eq!(routed(), None);

        // No vector, no interrupt.
        assert!(guest.negotiate(VERSION_1));
        guest.set_up_vectors();
        guest.set_common(reg::CONFIG_VECTOR, 0xffff, 2);
        provoke_config_change(&guest);
        let raised = (0..=usize::from(guest.queue_count()))
            .any(|index| readable(&guest.vector(index).fd, 0));
        assert!(!raised);
    });
}

#[test]
fn registers_can_move_while_the_device_is_active() {
    for_every_device(|machine, mut guest| {
        guest.start();
        let places = [
            machine.windows.mmio32.end - 0x1_0000,
            machine.windows.mmio64.start + 0x10_0000,
            guest.bar,
        ];
        for place in places {
            let old = guest.bar;
            guest.move_bar(place);
            assert_eq!(guest.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
            let mut data = [0];
            assert!(!machine.bus.read(old, &mut data), "nothing is left at {old:#x}");
            let notify = guest.bar + u64::from(guest.capability(2).start);
            let ioevents: Vec<u64> =
                machine.services.ioevents.lock().unwrap().keys().copied().collect();
            let expected: Vec<u64> =
                (0..guest.queue_count()).map(|queue| notify + 4 * u64::from(queue)).collect();
            assert_eq!(ioevents, expected);
        }
        // Outside of the windows the registers vanish, and come back.
        let home = guest.bar;
        for nowhere in [0, 0x1000_0000, machine.windows.mmio32.end, u64::MAX << 15] {
            guest.move_bar(nowhere);
            let mut data = [0];
            assert!(!machine.bus.read(nowhere, &mut data));
            assert!(machine.services.ioevents.lock().unwrap().is_empty());
        }
        guest.move_bar(home);
        assert_eq!(guest.status(), ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        guest.reset();
        assert!(machine.services.ioevents.lock().unwrap().is_empty());
    });
}

#[test]
fn a_function_displaced_by_another_returns_when_it_can() {
    for_every_device(|machine, mut guest| {
        let mut other = machine.add(sample(MODULES[0]));
        guest.set_decoding(true);
        let (home, away) = (guest.bar, other.bar);
        guest.set_status(ACKNOWLEDGE);
        other.move_bar(home);
        assert_eq!(guest.status(), ACKNOWLEDGE, "whoever was there first answers");
        guest.move_bar(away);
        assert_eq!(guest.status(), ACKNOWLEDGE);
        assert_eq!(other.status(), 0, "the other one appears once there is room");
    });
}

#[test]
fn reset_while_busy_and_start_again() {
    for_every_device(|_, guest| {
        for round in 0..8 {
            let mut queues = guest.start();
            for queue in &mut queues {
                queue.chain(&[(BUFFERS, 512, 0), (BUFFERS + 4096, 512, DESC_WRITE)]);
                for _ in 0..=round {
                    queue.offer(0);
                }
                queue.kick();
            }
            guest.reset();
            let used: Vec<u16> = queues.iter().map(GuestQueue::used_index).collect();
            for queue in &queues {
                queue.kick();
            }
            let later: Vec<u16> = queues.iter().map(GuestQueue::used_index).collect();
            assert_eq!(used, later, "nothing moves after a reset");
        }
        guest.start();
    });
}

#[test]
fn arbitrary_register_writes_from_several_threads_are_survived() {
    for_every_device(|machine, guest| {
        guest.start();
        let home = guest.bar;
        thread::scope(|scope| {
            for thread in 0..3_u64 {
                let guest = &guest;
                scope.spawn(move || {
                    let mut random = 0x9e37_79b9_7f4a_7c15 ^ thread;
                    let mut next = move || {
                        random ^= random << 13;
                        random ^= random >> 7;
                        random ^= random << 17;
                        random
                    };
                    for _ in 0..3000 {
                        let (value, size) = (next(), 1 << (next() % 4));
                        let value = if next() % 2 == 0 { value & 0xff } else { value };
                        match next() % 8 {
                            0 => guest.set_config((next() % 256) as u16, value, size),
                            1 => drop(guest.config((next() % 256) as u16, size)),
                            2 => machine.bus_write(home + next() % 0x8000, value, size),
                            3 => drop(machine.read(home + next() % 0x8000, size)),
                            4 => machine.bus_write(home + 0x2000 + next() % 64, value, size),
                            _ => machine.bus_write(home + next() % 0x40, value, size),
                        }
                    }
                });
            }
        });
        let mut guest = guest;
        guest.move_bar(home);
        guest.reset();
        guest.start();
    });
}
