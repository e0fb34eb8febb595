//! The sound device behind its PCI transport: requests that are nearly right in any order, with buffers
//! of any shape, while its clock runs.

#![no_main]

#[path = "../../../devices/tests/harness/mod.rs"]
mod harness;

use std::{thread, time::Duration};

use devices::virtio::registry::MODULES;
use drago_fuzz::Input;
use harness::{BUFFERS, DESC_NEXT, DESC_WRITE, Guest, GuestQueue, LOW_MEMORY, Machine};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};

const CODES: [u32; 10] = [0x101, 0x102, 0x103, 0x104, 0x105, 0x100, 0x200, 1, 2, 0x106];
const CONTROL: usize = 0;
/// One input may do this much.
const MOST_OPERATIONS: usize = 128;

/// Puts a chain of parts into the table from `slot` on.
fn send(queue: &mut GuestQueue<'_>, slot: u16, parts: &[(u64, u32, u16)]) {
    for (index, (address, length, flags)) in (0u16..).zip(parts) {
        let last = usize::from(index) + 1 == parts.len();
        let flags = flags | if last { 0 } else { DESC_NEXT };
        let (at, next) = ((slot + index) % 64, (slot + index + 1) % 64);
        queue.descriptor(queue.desc, at, (*address, *length, flags), next);
    }
    queue.offer(slot);
    queue.kick();
}

fn request(machine: &Machine, queue: &mut GuestQueue<'_>, input: &mut Input<'_>) {
    let at = BUFFERS + u64::from(input.u8()) * 64;
    let code = CODES[usize::from(input.u8()) % CODES.len()];
    let stream = u32::from(input.u8() % 3);
    let mut words = vec![code, stream];
    match (code, input.u8() & 7) {
        (0x101, 1..) => {
            // Parameters that are right, with what the input has in place of some of it.
            let format = [5, 4, 17, 19][usize::from(input.u8() % 4)];
            let (rate, channels) = (input.u8() % 9, input.u8() % 4);
            let period = (u32::from(input.u8()) + 1) * 8;
            words.extend([period * 4, period, u32::from(input.u8() == 1)]);
            words.push(u32::from_le_bytes([channels, format, rate, 0]));
        }
        (_, 0) => words.extend((0..input.u8() % 6).map(|_| input.number())),
        _ => words.extend([u32::from(input.u8() % 4), 32]),
    }
    let bytes: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
    let _ = machine.memory.write_slice(&bytes, GuestAddress(at));
    let answer = u32::from(input.u8());
    let slot = (input.u8() % 64).into();
    send(queue, slot, &[(at, bytes.len() as u32, 0), (at + 0x8000, answer, DESC_WRITE)]);
}

fn buffer(machine: &Machine, queue: &mut GuestQueue<'_>, input: &mut Input<'_>, record: bool) {
    let at = BUFFERS + (1 << 16) + u64::from(input.u8()) * 16;
    let stream = if input.u8() > 8 { u32::from(record) } else { input.number() };
    let _ = machine.memory.write_slice(&stream.to_le_bytes(), GuestAddress(at));
    let samples = match input.u8() % 16 {
        0 => (input.u64(), input.u32()),
        1 => (LOW_MEMORY - u64::from(input.u16()), input.number()),
        2 => (BUFFERS, 4 << 20),
        _ => (BUFFERS + (1 << 18), u32::from(input.u16())),
    };
    let way = if record { DESC_WRITE } else { 0 };
    let status = if input.u8() == 0 { u32::from(input.u8() % 12) } else { 8 };
    let slot = (input.u8() % 64).into();
    send(queue, slot, &[
        (at, 4, 0),
        (samples.0, samples.1, way),
        (at + 8, status, DESC_WRITE),
    ]);
}

fn begin<'m>(guest: &Guest<'m>) -> Vec<GuestQueue<'m>> {
    guest.start()
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let module = MODULES.iter().find(|module| module.option == "sound").unwrap();
    let device = (module.sample)().unwrap();
    let machine = Machine::new();
    let guest = machine.add(device.device);
    let mut queues = begin(&guest);
    for _ in 0..MOST_OPERATIONS {
        if input.is_empty() {
            break;
        }
        match input.u8() % 16 {
            0..6 => request(&machine, &mut queues[CONTROL], &mut input),
            6..10 => buffer(&machine, &mut queues[2], &mut input, false),
            10..14 => buffer(&machine, &mut queues[3], &mut input, true),
            14 => thread::sleep(Duration::from_micros(u64::from(input.u8()) * 16)),
            _ => {
                guest.reset();
                queues = begin(&guest);
            }
        }
    }
    guest.reset();
    begin(&guest);
    guest.reset();
});
