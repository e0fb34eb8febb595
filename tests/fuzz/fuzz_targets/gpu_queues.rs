//! `drago-gpu`'s virtqueues: a guest writes what it likes into rings and memory and notifies, and now
//! and then another process takes over, with a journal that is not quite what the last one wrote.

#![no_main]

use drago_fuzz::Input;
use std::{fs::File, os::unix::fs::FileExt};

use drago_gpu::{
    GuestMemory,
    control::Limits,
    device::GpuDevice,
    relay::Direct,
    renderer::{Renderer, Soft2d},
};
use libfuzzer_sys::fuzz_target;
use vhost_user_backend::{VhostUserBackend, VringRwLock, VringT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryAtomic};
use vmm_sys_util::epoll::EventSet;

const MEMORY: u64 = 1 << 20;
const SIZE: u16 = 16;
/// Each queue has its tables in a stride of its own, then buffers follow.
const STRIDE: u64 = 0x1000;
const AVAIL: u64 = 0x400;
const USED: u64 = 0x800;
const BUFFERS: u64 = 2 * STRIDE;

fn address(input: &mut Input<'_>) -> u64 {
    match input.u8() % 8 {
        0 => input.u64(),
        1 => MEMORY - u64::from(input.u8()),
        2 => u64::from(input.u16()) % BUFFERS,
        _ => BUFFERS + u64::from(input.u8()) * 16,
    }
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap();
    let atomic = GuestMemoryAtomic::new(memory.clone());
    let flags = input.u8();
    let event_idx = flags & 1 != 0;
    let new_device = || {
        let limits = Limits { bytes: 2 << 20, resources: 8, contexts: 4 };
        let renderer = |_| Ok::<Box<dyn Renderer>, std::io::Error>(Box::new(Soft2d::new()));
        let device = GpuDevice::new(renderer, limits).unwrap();
        device.update_memory(atomic.clone()).unwrap();
        device.set_event_idx(event_idx);
        device
    };
    let mut device = new_device();
    let journal = (flags & 2 != 0).then(|| device.make_inflight(SIZE).unwrap());
    let journal = journal.map(|(length, fd)| (length, File::from(fd)));
    let rings: Vec<_> = (0..2_u64)
        .map(|index| {
            let ring = VringRwLock::new(atomic.clone(), 1024).unwrap();
            let base = index * STRIDE;
            ring.set_queue_size(SIZE);
            ring.set_queue_event_idx(event_idx);
            ring.set_queue_info(base, base + AVAIL, base + USED).unwrap();
            ring.set_queue_ready(true);
            ring.set_enabled(true);
            ring
        })
        .collect();
    let write = |at: u64, bytes: &[u8]| drop(memory.write_slice(bytes, GuestAddress(at)));
    while !input.is_empty() {
        let op = input.u8();
        let queue = u16::from(op >> 7);
        let base = u64::from(queue) * STRIDE;
        match op & 7 {
            0 | 1 => {
                // In the queue's own table, or in one for indirect descriptors.
                let table = if op & 8 == 0 { base } else { BUFFERS + 0x1000 };
                let slot = table + u64::from(input.u8() % 32) * 16;
                write(slot, &address(&mut input).to_le_bytes());
                write(slot + 8, &input.number().to_le_bytes());
                write(slot + 12, &u16::from(input.u8() & 7).to_le_bytes());
                write(slot + 14, &u16::from(input.u8() % 32).to_le_bytes());
            }
            2 | 3 => {
                // Words that are mostly small: commands and backing entries.
                let at = address(&mut input);
                for word in 0..u64::from(input.u8() % 24) {
                    let value = match word {
                        0 if op & 8 == 0 => 0x100 + u32::from(input.u8() & 15),
                        0 => 0x300 + u32::from(input.u8() & 1),
                        _ => input.number(),
                    };
                    write(at.wrapping_add(word * 4), &value.to_le_bytes());
                }
            }
            4 => {
                let at = address(&mut input);
                let length = input.u8().into();
                write(at, input.take(length));
            }
            5 => {
                let avail = base + AVAIL;
                let index: u16 = memory.read_obj(GuestAddress(avail + 2)).unwrap();
                let head = u16::from(input.u8() % 32);
                write(avail + 4 + 2 * u64::from(index % SIZE), &head.to_le_bytes());
                write(avail + 2, &index.wrapping_add(1).to_le_bytes());
            }
            6 => write(base + AVAIL + 2, &input.u16().to_le_bytes()),
            _ => {
                if op & 8 != 0 {
                    // After a violation nothing else brings a ring back.
                    device.stop_vring(queue.into()).unwrap();
                }
                device.handle_event(queue, EventSet::IN, &rings, queue.into()).unwrap();
                device.settle();
                match input.u8() {
                    0 => device.reset_device(),
                    1 => device.stop_vring(queue.into()).unwrap(),
                    2 => drop(device.get_config(input.number(), input.number())),
                    3 if journal.is_some() => {
                        let (length, file) = journal.as_ref().unwrap();
                        // In the tables, in the head of the log, or among its commands.
                        for _ in 0..input.u8() % 8 {
                            let at = u64::from(input.u8() % 3) * 4096 + u64::from(input.u16() % 1024);
                            file.write_all_at(&[input.u8()], at).unwrap();
                        }
                        drop(device);
                        device = new_device();
                        let fd = file.try_clone().unwrap().into();
                        let _ = device.take_inflight(fd, *length, SIZE);
                    }
                    _ => {}
                }
            }
        }
    }
    for queue in 0..2 {
        device.handle_event(queue, EventSet::IN, &rings, queue.into()).unwrap();
    }
    device.settle();
});
