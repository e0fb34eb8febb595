//! A device's shared memory region through the PCI transport, as Linux looks for it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

mod harness;

use std::sync::Arc;

use devices::virtio::{
    ActivateError, Activation, DeviceType, VirtioDevice, shared_memory::SharedMemory,
};

use harness::Machine;

const SIZE: u64 = 64 << 20;

struct Windowed(Arc<SharedMemory>);

impl VirtioDevice for Windowed {
    fn device_type(&self) -> DeviceType {
        DeviceType::GPU
    }

    fn queue_sizes(&self) -> &[u16] {
        &[16]
    }

    fn features(&self) -> u64 {
        0
    }

    fn shared_memory(&self) -> Option<(u8, Arc<SharedMemory>)> {
        Some((1, self.0.clone()))
    }

    fn read_config(&self, _: u64, _: &mut [u8]) {}

    fn activate(&mut self, _: Activation) -> Result<(), ActivateError> {
        Ok(())
    }

    fn reset(&mut self) {}
}

#[test]
fn a_driver_finds_the_region_and_moves_it() {
    let machine = Machine::new();
    let window = SharedMemory::new(SIZE).unwrap();
    let guest = machine.add(Box::new(Windowed(window)));
    let capability = guest.capability(8);
    assert_eq!(guest.config(capability.offset + 2, 1), 24, "length of virtio_pci_cap64");
    assert_eq!((capability.bar, guest.config(capability.offset + 5, 1)), (2, 1), "register, id");
    let high = |at| guest.config(capability.offset + at, 4) << 32;
    assert_eq!(u64::from(capability.start) | high(16), 0);
    assert_eq!(u64::from(capability.length) | high(20), SIZE);
    assert_eq!(guest.config(0x18, 4) & 0xf, 0b1100, "64 bits, prefetchable");
    let address = guest.config(0x18, 8) & !0xf;
    assert!(machine.windows.mmio64.contains(&address) && address.is_multiple_of(SIZE));
    let seen = || *machine.services.window.lock().unwrap();
    assert_eq!(seen(), None, "not before the function answers");
    guest.set_decoding(true);
    assert_eq!(seen(), Some(address));
    // Sizing, as Linux does it.
    guest.set_decoding(false);
    assert_eq!(seen(), None);
    guest.set_config(0x18, 0xffff_ffff, 4);
    guest.set_config(0x1c, 0xffff_ffff, 4);
    assert_eq!(!(guest.config(0x18, 8) & !0xf) + 1, SIZE);
    let elsewhere = address + SIZE;
    guest.set_config(0x18, elsewhere & 0xffff_ffff, 4);
    guest.set_config(0x1c, elsewhere >> 32, 4);
    assert_eq!(seen(), None);
    guest.set_decoding(true);
    assert_eq!(seen(), Some(elsewhere));
    // Over RAM it is not to be had.
    guest.set_config(0x1c, 0, 4);
    guest.set_config(0x18, 0, 4);
    assert_eq!(seen(), None);
    guest.set_config(0x1c, address >> 32, 4);
    guest.set_config(0x18, address & 0xffff_ffff, 4);
    assert_eq!(seen(), Some(address));
}

#[test]
fn devices_without_one_say_nothing_of_it() {
    let machine = Machine::new();
    let guest = machine.add(Box::new(Plain));
    assert!(guest.capabilities.iter().all(|capability| capability.kind != 8));
    assert_eq!(guest.config(0x18, 8), 0);
    guest.set_decoding(true);
    assert_eq!(*machine.services.window.lock().unwrap(), None);
}

struct Plain;

impl VirtioDevice for Plain {
    fn device_type(&self) -> DeviceType {
        DeviceType::RNG
    }

    fn queue_sizes(&self) -> &[u16] {
        &[16]
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, _: u64, _: &mut [u8]) {}

    fn activate(&mut self, _: Activation) -> Result<(), ActivateError> {
        Ok(())
    }

    fn reset(&mut self) {}
}
