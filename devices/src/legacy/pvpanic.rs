//! The pvpanic port (QEMU `docs/specs/pvpanic.rst`; ACPI id `QEMU0001`): reading tells which events
//! are supported, writing reports one.

use super::{SystemEvent, SystemEventSink};
use crate::bus::BusDevice;

/// The port, the same as QEMU's.
pub const PORT: u64 = 0x505;
/// Bit 0: the guest panicked.
const PANICKED: u8 = 1 << 0;
/// Bit 1: the guest panicked and runs a crash kernel.
const CRASH_LOADED: u8 = 1 << 1;

/// The pvpanic device.
pub struct PvPanic {
    events: SystemEventSink,
}

impl std::fmt::Debug for PvPanic {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PvPanic").finish_non_exhaustive()
    }
}

impl PvPanic {
    /// A device that reports to `events`.
    pub fn new(events: SystemEventSink) -> Self {
        Self { events }
    }
}

impl BusDevice for PvPanic {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(first) = data.first_mut() {
            *first = PANICKED | CRASH_LOADED;
        }
    }

    fn write(&self, _: u64, data: &[u8]) {
        let value = data.first().copied().unwrap_or(0);
        if value & PANICKED != 0 {
            (self.events)(SystemEvent::Panicked);
        } else if value & CRASH_LOADED != 0 {
            (self.events)(SystemEvent::CrashLoaded);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[test]
    fn reports_each_event_once() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = seen.clone();
        let device = PvPanic::new(Arc::new(move |event| log.lock().unwrap().push(event)));
        let mut byte = [0];
        device.read(0, &mut byte);
        assert_eq!(byte, [3]);
        device.write(0, &[0]);
        device.write(0, &[PANICKED]);
        device.write(0, &[CRASH_LOADED]);
        assert_eq!(*seen.lock().unwrap(), [SystemEvent::Panicked, SystemEvent::CrashLoaded]);
    }
}
