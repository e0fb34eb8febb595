//! Every registered device behind its PCI transport: a guest that initialises it properly and then
//! writes what it likes into rings, memory, registers and configuration space.
//!
//! Each input gets a machine of its own, so that what is found can be repeated. A panic in a
//! worker counts: libFuzzer's hook ends the process before the worker catches it.

#![no_main]

#[path = "../../../devices/tests/harness/mod.rs"]
mod harness;

use devices::virtio::registry::{DeviceModule, MODULES};
use drago_fuzz::Input;
use harness::{
    ACKNOWLEDGE, BUFFERS, DRIVER, DRIVER_OK, FEATURES_OK, Guest, GuestQueue, HIGH_MEMORY,
    HIGH_START, LOW_MEMORY, Machine, VERSION_1,
};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};

/// Served by another process; `gpu_queues` drives that one's half.
const NOT_HERE: &str = "gpu";
/// A table for indirect descriptors.
const INDIRECT: u64 = BUFFERS + (1 << 16);
/// One input may do this much.
const MOST_OPERATIONS: usize = 256;

fn module(index: u8) -> &'static DeviceModule {
    let here = || MODULES.iter().filter(|module| module.option != NOT_HERE);
    here().nth(usize::from(index) % here().count()).unwrap()
}

fn address(input: &mut Input<'_>, queue: &GuestQueue<'_>) -> u64 {
    match input.u8() % 10 {
        0 => input.u64(),
        1 => LOW_MEMORY.wrapping_sub(input.u16().into()),
        2 => LOW_MEMORY + u64::from(input.u16()),
        3 => HIGH_START.wrapping_sub(input.u8().into()),
        4 => HIGH_START + HIGH_MEMORY - u64::from(input.u16()),
        5 => queue.desc + u64::from(input.u16()),
        6 => INDIRECT + u64::from(input.u8()) * 16,
        _ => BUFFERS + u64::from(input.u8()) * 8,
    }
}

/// Initialisation (§3.1.1) with a part of the features. `None` if the device does not want them.
fn start<'m>(guest: &Guest<'m>, input: &mut Input<'_>) -> Option<Vec<GuestQueue<'m>>> {
    guest.set_decoding(true);
    let offered = guest.offered();
    let features = match input.u8() {
        0..0xc0 => offered,
        _ => (offered & input.u64()) | VERSION_1,
    };
    if !guest.negotiate(features) {
        return None;
    }
    guest.set_up_vectors();
    let queues = guest.set_up_queues();
    guest.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    Some(queues)
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let module = module(input.u8());
    let device = (module.sample)().unwrap_or_else(|error| panic!("{}: {error}", module.option));
    let machine = Machine::new();
    let mut guest = machine.add(device.device);
    let home = guest.bar;
    let Some(mut queues) = start(&guest, &mut input) else { return };
    let count = queues.len();
    for _ in 0..MOST_OPERATIONS {
        if input.is_empty() {
            break;
        }
        let op = input.u8();
        let queue = &mut queues[usize::from(op >> 4) % count];
        match op & 15 {
            0..5 => {
                let table = if op & 15 == 4 { INDIRECT } else { queue.desc };
                let slot = u16::from(input.u8() % 64);
                let part = (address(&mut input, queue), input.number(), (input.u8() & 7).into());
                queue.descriptor(table, slot, part, (input.u8() % 64).into());
            }
            5 | 6 => {
                // Words that are mostly small: the headers of requests.
                let at = address(&mut input, queue);
                for word in 0..u64::from(input.u8() % 8) {
                    let value = input.number().to_le_bytes();
                    let at = GuestAddress(at.wrapping_add(word * 4));
                    let _ = machine.memory.write_slice(&value, at);
                }
            }
            7 => {
                let at = GuestAddress(address(&mut input, queue));
                let length = input.u8().into();
                let _ = machine.memory.write_slice(input.take(length), at);
            }
            8..11 => {
                queue.offer((input.u8() % 64).into());
                queue.kick();
            }
            11 => {
                queue.set_avail(input.u16());
                queue.kick();
            }
            12 => queue.kick(),
            13 => {
                let register = home + u64::from(input.u16() % 0x8000);
                machine.bus_write(register, input.u64(), 1 << (input.u8() % 4));
            }
            14 => {
                let size = 1 << (input.u8() % 4);
                match input.u8() % 3 {
                    0 => guest.set_config((input.u16() % 256).into(), input.u64(), size),
                    1 => drop(guest.config((input.u16() % 256).into(), size)),
                    _ => drop(machine.read(home + u64::from(input.u16() % 0x8000), size)),
                }
            }
            _ => {
                guest.move_bar(home);
                match start(&guest, &mut input) {
                    Some(fresh) => queues = fresh,
                    None => return,
                }
            }
        }
    }
    // Whatever was done to it, a reset ends it, and the device can be used again. A notification
    // that is still waiting is served before the worker stops.
    guest.move_bar(home);
    guest.reset();
    guest.start();
    guest.reset();
});
