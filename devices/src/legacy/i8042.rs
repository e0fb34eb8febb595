//! The reset line of the i8042 keyboard controller (IBM PC AT Technical Reference, "keyboard
//! controller"): command `0xfe` pulses output bit 0, which is wired to the CPU's reset.
//!
//! There is no keyboard behind it. The status register reads 0: "input buffer empty", so that a
//! guest which waits before it sends the reset command (`reboot=k`) goes on at once.

use std::sync::atomic::{AtomicU8, Ordering};

use super::{SystemEvent, SystemEventSink};
use crate::bus::BusDevice;

/// First port of the controller (data register).
pub const PORT: u64 = 0x60;
/// The controller answers at `0x60` and `0x64`; each is registered on its own, see [`Register`].
pub const COMMAND_PORT: u64 = 0x64;

const COMMAND_READ_OUTPUT_PORT: u8 = 0xd0;
const COMMAND_SELF_TEST: u8 = 0xaa;
const COMMAND_PULSE_RESET: u8 = 0xfe;
/// Output buffer full: the data register holds an answer.
const STATUS_OUTPUT_FULL: u8 = 0x01;
/// The output port with the reset line high and A20 open.
const OUTPUT_PORT: u8 = 0x03;
const SELF_TEST_PASSED: u8 = 0x55;

/// Which of the two ports an instance answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Register {
    /// Port `0x60`.
    Data,
    /// Port `0x64`.
    Command,
}

/// State shared by the two ports.
pub struct Controller {
    events: SystemEventSink,
    /// Low byte of a pending answer; `answer_ready` in bit 0 of `status`.
    answer: AtomicU8,
    status: AtomicU8,
}

impl std::fmt::Debug for Controller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Controller").finish_non_exhaustive()
    }
}

impl Controller {
    /// A controller that reports reset pulses to `events`.
    pub fn new(events: SystemEventSink) -> Self {
        Self { events, answer: AtomicU8::new(0), status: AtomicU8::new(0) }
    }
}

/// One port of the controller.
#[derive(Debug)]
pub struct Port {
    controller: std::sync::Arc<Controller>,
    register: Register,
}

impl Port {
    /// The port `register` of `controller`.
    pub fn new(controller: std::sync::Arc<Controller>, register: Register) -> Self {
        Self { controller, register }
    }
}

impl BusDevice for Port {
    fn read(&self, _: u64, data: &mut [u8]) {
        let value = match self.register {
            Register::Data => {
                self.controller.status.store(0, Ordering::Relaxed);
                self.controller.answer.swap(0, Ordering::Relaxed)
            }
            Register::Command => self.controller.status.load(Ordering::Relaxed),
        };
        if let Some(first) = data.first_mut() {
            *first = value;
        }
    }

    fn write(&self, _: u64, data: &[u8]) {
        let (Register::Command, Some(&command)) = (self.register, data.first()) else { return };
        let answer = match command {
            COMMAND_PULSE_RESET => {
                (self.controller.events)(SystemEvent::Reset("the keyboard controller's pulse"));
                return;
            }
            COMMAND_READ_OUTPUT_PORT => OUTPUT_PORT,
            COMMAND_SELF_TEST => SELF_TEST_PASSED,
            _ => return,
        };
        self.controller.answer.store(answer, Ordering::Relaxed);
        self.controller.status.store(STATUS_OUTPUT_FULL, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[test]
    fn pulse_resets_and_status_never_blocks() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = seen.clone();
        let controller =
            Arc::new(Controller::new(Arc::new(move |event| log.lock().unwrap().push(event))));
        let command = Port::new(controller.clone(), Register::Command);
        let data = Port::new(controller, Register::Data);
        let mut byte = [0xff];
        command.read(0, &mut byte);
        assert_eq!(byte, [0], "kb_wait would spin otherwise");
        data.write(0, &[COMMAND_PULSE_RESET]);
        assert!(seen.lock().unwrap().is_empty(), "only the command port resets");
        command.write(0, &[COMMAND_SELF_TEST]);
        command.read(0, &mut byte);
        assert_eq!(byte, [STATUS_OUTPUT_FULL]);
        data.read(0, &mut byte);
        assert_eq!(byte, [SELF_TEST_PASSED]);
        command.write(0, &[COMMAND_PULSE_RESET]);
        assert!(matches!(seen.lock().unwrap()[..], [SystemEvent::Reset(_)]));
    }
}
