//! Port `0x61`, system control port B of the PC AT: bit 0 gates timer 2, bit 5 is its output.
//!
//! Registered only when KVM's PIT (which brings its own) is absent. Guests that calibrate their
//! clock against timer 2 poll bit 5 until it rises, so it reads as set.

use std::sync::atomic::{AtomicU8, Ordering};

use crate::bus::BusDevice;

/// The port.
pub const PORT: u64 = 0x61;

const WRITABLE: u8 = 0x0f;
const TIMER2_OUTPUT: u8 = 1 << 5;

/// The control port.
#[derive(Debug, Default)]
pub struct Port61 {
    bits: AtomicU8,
}

impl BusDevice for Port61 {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(first) = data.first_mut() {
            *first = self.bits.load(Ordering::Relaxed) | TIMER2_OUTPUT;
        }
    }

    fn write(&self, _: u64, data: &[u8]) {
        if let Some(&value) = data.first() {
            self.bits.store(value & WRITABLE, Ordering::Relaxed);
        }
    }
}
