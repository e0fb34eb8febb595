//! Input devices (VIRTIO 1.3 §5.8): keyboard, absolute pointer, relative mouse.
//!
//! | module | what it holds |
//! |---|---|
//! | [`codes`] | event types and codes of Linux' evdev, which virtio-input speaks |
//! | [`scancode`] | AT scancodes to key codes |
//! | [`config`] | the `--input` option, and what each kind tells the guest about itself |
//! | [`queue`] | the bounded queue of events that wait for the guest |
//! | `device` | configuration space, worker, [`InputHandle`] |

pub mod codes;
pub mod config;
mod device;
pub mod queue;
pub mod scancode;
#[cfg(test)]
mod tests;

pub use config::InputKind;
pub use device::{InputHandle, Leds};

use crate::virtio::registry::{Count, DeviceModule, Machines, Preset};

/// One event (§5.8.6): a key, a movement along an axis, a light.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct InputEvent {
    /// Event type, one of `codes::EV_*`.
    pub kind: u16,
    /// What moved or was pressed; meaning depends on the type.
    pub code: u16,
    /// 1 pressed, 0 released; a distance; a position.
    pub value: i32,
}

impl InputEvent {
    /// Bytes of an event in a buffer.
    pub const SIZE: usize = 8;
    /// Ends a group of events that belong together.
    pub const SYN: Self = Self { kind: codes::EV_SYN, code: 0, value: 0 };

    /// A key or button (`codes::KEY_*`, `codes::BTN_*`) that goes down or up.
    pub fn key(code: u16, pressed: bool) -> Self {
        Self { kind: codes::EV_KEY, code, value: i32::from(pressed) }
    }

    /// A relative movement along `codes::REL_*`.
    pub fn relative(code: u16, distance: i32) -> Self {
        Self { kind: codes::EV_REL, code, value: distance }
    }

    /// A position along `codes::ABS_*`, from 0 to [`config::TABLET_MAX`].
    pub fn absolute(code: u16, position: i32) -> Self {
        Self { kind: codes::EV_ABS, code, value: position }
    }

    /// The event in the byte order of the wire.
    pub fn encode(self) -> [u8; Self::SIZE] {
        let ([a, b], [c, d]) = (self.kind.to_le_bytes(), self.code.to_le_bytes());
        let [e, f, g, h] = self.value.to_le_bytes();
        [a, b, c, d, e, f, g, h]
    }

    /// An event from the wire.
    pub fn decode([a, b, c, d, e, f, g, h]: [u8; Self::SIZE]) -> Self {
        Self {
            kind: u16::from_le_bytes([a, b]),
            code: u16::from_le_bytes([c, d]),
            value: i32::from_le_bytes([e, f, g, h]),
        }
    }
}

/// Input devices in the registry.
pub static MODULE: DeviceModule = DeviceModule {
    option: "input",
    value_name: "keyboard|tablet|mouse[,serial=TEXT]",
    help: "virtio input device: keyboard, absolute pointer or relative mouse",
    count: Count::Many,
    presets: &[
        Preset { value: "keyboard", on: Machines::Viewed },
        Preset { value: "tablet", on: Machines::Viewed },
        Preset { value: "mouse", on: Machines::Viewed },
    ],
    can_be_off: false,
    served_elsewhere: false,
    parse: config::InputConfig::parse,
    sample: config::InputConfig::sample,
};
