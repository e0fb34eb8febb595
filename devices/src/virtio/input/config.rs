//! The `--input` option, and what each kind tells the guest about itself (VIRTIO 1.3 §5.8.4).

use std::fmt;

use super::{
    codes::*,
    device::{Input, InputHandle},
};
use crate::{
    spec::{Spec, SpecError},
    virtio::registry::{BuildError, BuiltDevice, DeviceConfig},
};

/// Largest position on both axes of the tablet; the smallest is 0. The guest stretches this range
/// over all its screens together; [`tablet_position`] says where a pixel is.
pub const TABLET_MAX: i32 = 32767;

/// The tablet's position for pixel `pixel` (from 0) of `pixels` along an axis: the middle of the
/// pixel, so that a guest finds this very pixel whether it scales by `pixels / (TABLET_MAX + 1)`
/// and rounds down, as libinput does, or by `(pixels - 1) / TABLET_MAX`.
pub fn tablet_position(pixel: u32, pixels: u32) -> i32 {
    let pixels = u64::from(pixels.max(1));
    let pixel = u64::from(pixel).min(pixels - 1);
    let range = TABLET_MAX as u64 + 1;
    ((2 * pixel + 1) * range / (2 * pixels)).min(TABLET_MAX as u64) as i32
}

/// What an input device is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum InputKind {
    /// A PC keyboard with lights.
    Keyboard,
    /// A pointer with absolute positions, buttons and wheels.
    Tablet,
    /// A mouse with relative movements, buttons and wheels.
    Mouse,
}

impl InputKind {
    /// The word on the command line.
    pub fn word(self) -> &'static str {
        match self {
            Self::Keyboard => "keyboard",
            Self::Tablet => "tablet",
            Self::Mouse => "mouse",
        }
    }

    /// The name the guest shows.
    pub(super) fn device_name(self) -> &'static str {
        match self {
            Self::Keyboard => "drago keyboard",
            Self::Tablet => "drago tablet",
            Self::Mouse => "drago mouse",
        }
    }

    /// Bus, vendor, product, version: a virtual bus, virtio's PCI vendor, ours to number.
    pub(super) fn ids(self) -> [u16; 4] {
        const BUS_VIRTUAL: u16 = 0x06;
        const VENDOR: u16 = 0x1af4;
        [BUS_VIRTUAL, VENDOR, 1 + self as u16, 1]
    }

    /// The codes of an event type as inclusive ranges.
    pub(super) fn codes(self, kind: u16) -> &'static [(u16, u16)] {
        const BUTTONS: &[(u16, u16)] = &[(BTN_LEFT, BTN_EXTRA)];
        const WHEELS: &[(u16, u16)] = &[(REL_HWHEEL, REL_HWHEEL), (REL_WHEEL, REL_WHEEL)];
        const MOTION: &[(u16, u16)] =
            &[(REL_X, REL_Y), (REL_HWHEEL, REL_HWHEEL), (REL_WHEEL, REL_WHEEL)];
        match (self, kind) {
            (Self::Keyboard, EV_KEY) => KEYBOARD,
            (Self::Keyboard, EV_LED) => &[(LED_NUML, LED_SCROLLL)],
            // The guest repeats held keys itself, at its own rate, whatever the latency.
            (Self::Keyboard, EV_REP) => &[(0, 0)],
            (Self::Tablet | Self::Mouse, EV_KEY) => BUTTONS,
            (Self::Tablet, EV_REL) => WHEELS,
            (Self::Tablet, EV_ABS) => &[(ABS_X, ABS_Y)],
            (Self::Mouse, EV_REL) => MOTION,
            _ => &[],
        }
    }

    /// Whether the device can have such an event.
    pub(super) fn has(self, kind: u16, code: u16) -> bool {
        self.codes(kind).iter().any(|(first, last)| (*first..=*last).contains(&code))
    }
}

impl fmt::Display for InputKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// A parsed `--input` option.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InputConfig {
    /// What it is.
    pub kind: InputKind,
    /// A serial number the guest can tell several of one kind apart by.
    pub serial: String,
}

impl InputConfig {
    /// Parses `keyboard|tablet|mouse[,serial=TEXT]`.
    pub fn parse(mut spec: Spec) -> Result<Box<dyn DeviceConfig>, SpecError> {
        let word = spec.take_word();
        let kinds = [InputKind::Keyboard, InputKind::Tablet, InputKind::Mouse];
        let kind = kinds.into_iter().find(|kind| word.as_deref() == Some(kind.word()));
        let Some(kind) = kind else {
            return Err(SpecError::UnexpectedWord {
                option: spec.option().to_owned(),
                word: word.unwrap_or_default(),
                expected: "expected keyboard, tablet or mouse".to_owned(),
            });
        };
        let serial = spec.take("serial")?.unwrap_or_default();
        if serial.len() > 128 {
            return Err(spec.invalid("serial", &serial, "at most 128 bytes"));
        }
        spec.finish()?;
        Ok(Box::new(Self { kind, serial }))
    }

    /// A tablet, the kind with most of everything, for the conformance test.
    pub(super) fn sample() -> Result<BuiltDevice, BuildError> {
        Box::new(Self { kind: InputKind::Tablet, serial: "sample".to_owned() }).build()
    }

    /// Builds the device together with its handle.
    pub(super) fn open(self) -> Result<(Input, InputHandle), BuildError> {
        Input::new(self.kind, self.serial).map_err(|source| BuildError::Host {
            option: "input",
            what: "no eventfd can be made".to_owned(),
            source,
        })
    }
}

impl DeviceConfig for InputConfig {
    fn build(self: Box<Self>) -> Result<BuiltDevice, BuildError> {
        let (device, handle) = self.open()?;
        Ok(BuiltDevice { device: Box::new(device), handle: Some(Box::new(handle)) })
    }
}
