//! Power control of a hardware-reduced ACPI machine (ACPI 6.5, §4.8.3.7 sleep registers, §4.8.3.6
//! reset register, §5.6.9 generic event device).
//!
//! | port | access | meaning |
//! |---|---|---|
//! | base + 0 | write | sleep control: bit 5 SLP_EN, bits 4:2 SLP_TYP |
//! | base + 1 | read | sleep status: bit 7 WAK_STS, always clear |
//! | base + 2 | write | reset register: writing [`RESET_VALUE`] resets |
//! | base + 3 | read | pending events of the generic event device; reading clears them |

use std::{
    io,
    sync::atomic::{AtomicU8, Ordering},
};

use vmm_sys_util::eventfd::EventFd;

use super::{SystemEvent, SystemEventSink};
use crate::bus::BusDevice;

/// First port.
pub const PORT: u64 = 0x600;
/// Number of ports.
pub const PORTS: u64 = 4;
/// Offset of the sleep control register.
pub const SLEEP_CONTROL: u64 = 0;
/// Offset of the sleep status register.
pub const SLEEP_STATUS: u64 = 1;
/// Offset of the reset register.
pub const RESET: u64 = 2;
/// Offset of the event register.
pub const EVENTS: u64 = 3;
/// What the guest writes to the reset register.
pub const RESET_VALUE: u8 = 1;
/// SLP_TYP of state S5, as `\_S5` says.
pub const S5_SLEEP_TYPE: u8 = 5;
/// Event bit: the power button was pressed.
pub const EVENT_POWER_BUTTON: u8 = 1 << 0;

const SLEEP_ENABLE: u8 = 1 << 5;

/// The power registers.
pub struct Power {
    events: SystemEventSink,
    pending: AtomicU8,
    interrupt: EventFd,
}

impl std::fmt::Debug for Power {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Power").field("pending", &self.pending).finish_non_exhaustive()
    }
}

impl Power {
    /// Registers that report to `events` and raise `interrupt`, the edge triggered line of the
    /// generic event device.
    pub fn new(events: SystemEventSink, interrupt: EventFd) -> Self {
        Self { events, pending: AtomicU8::new(0), interrupt }
    }

    /// Presses the power button. The guest's operating system decides what to do about it, and
    /// ignores it before its ACPI driver is up.
    pub fn press_power_button(&self) -> io::Result<()> {
        self.pending.fetch_or(EVENT_POWER_BUTTON, Ordering::SeqCst);
        self.interrupt.write(1)
    }
}

impl BusDevice for Power {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (EVENTS, Some(first)) = (offset, data.first_mut()) {
            *first = self.pending.swap(0, Ordering::SeqCst);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some(&value) = data.first() else { return };
        match offset {
            SLEEP_CONTROL if value & SLEEP_ENABLE != 0 => {
                let sleep_type = (value >> 2) & 7;
                if sleep_type == S5_SLEEP_TYPE {
                    (self.events)(SystemEvent::PowerOff);
                } else {
                    tracing::warn!(sleep_type, "the guest asked for an unknown sleep state");
                }
            }
            RESET if value == RESET_VALUE => {
                (self.events)(SystemEvent::Reset("the ACPI reset register"));
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[test]
    fn sleep_reset_and_button() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = seen.clone();
        let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let power = Power::new(
            Arc::new(move |event| log.lock().unwrap().push(event)),
            line.try_clone().unwrap(),
        );
        power.write(SLEEP_CONTROL, &[S5_SLEEP_TYPE << 2]);
        power.write(RESET, &[0]);
        assert!(seen.lock().unwrap().is_empty(), "SLP_EN and the reset value are required");
        power.write(SLEEP_CONTROL, &[(S5_SLEEP_TYPE << 2) | SLEEP_ENABLE]);
        power.write(RESET, &[RESET_VALUE]);
        assert!(matches!(seen.lock().unwrap()[..], [SystemEvent::PowerOff, SystemEvent::Reset(_)]));
        power.press_power_button().unwrap();
        assert_eq!(line.read().unwrap(), 1);
        let mut byte = [0];
        power.read(EVENTS, &mut byte);
        assert_eq!(byte, [EVENT_POWER_BUTTON]);
        power.read(EVENTS, &mut byte);
        assert_eq!(byte, [0], "reading clears");
    }
}
