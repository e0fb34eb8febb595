//! The configuration space that the guest sees: which bytes are the device's own, and what is in the
//! others (PCI Local Bus 3.0 §6.1 and §6.7, PCI Express 4.0 §7.5.3, PCI Power Management 1.2 §3.2).
//!
//! | part | where it comes from |
//! |---|---|
//! | identity | the device, read once |
//! | command | ours; [`super::function`] tells the device |
//! | base address registers | ours: the device stays where the host put it |
//! | option ROM, CardBus, interrupt pin | none |
//! | capabilities: MSI, MSI-X | ours |
//! | power management | ours: the device stays in D0 whatever the guest's driver says, because the guest must not be able to make mapped registers vanish |
//! | PCI Express | the device's, but an endpoint becomes one of the root complex, as there is no port above it |
//! | vendor specific | the device's |
//! | other capabilities | not in the list |
//! | everything else behind the header | the device's |
//!
//! The kernel has its own rules on top (`drivers/vfio/pci/vfio_pci_config.c`): what the guest must
//! not change it does not pass on.

use std::ops::Range;

use super::bars::{self, Bar};
use crate::pci::config::{COMMAND, COMMAND_BUS_MASTER, COMMAND_MEMORY};

/// Bytes of a function's configuration space without the extended one.
pub const SIZE: usize = 256;

const STATUS: usize = 0x06;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const STATUS_INTX: u8 = 1 << 3;
const HEADER_TYPE: usize = 0x0e;
const MULTI_FUNCTION: u8 = 1 << 7;
const POINTER: usize = 0x34;
const LINE: usize = 0x3c;
const PIN: usize = 0x3d;
const FIRST_CAPABILITY: usize = 0x40;
/// Command bit: the function must not raise its interrupt pin.
pub const COMMAND_NO_INTX: u16 = 1 << 10;

const CAP_POWER: u8 = 0x01;
const CAP_MSI: u8 = 0x05;
const CAP_VENDOR: u8 = 0x09;
const CAP_EXPRESS: u8 = 0x10;
const CAP_MSIX: u8 = 0x11;

const MSI_64_BIT: u16 = 1 << 7;
const MSI_LARGEST: u16 = 5;

/// Why a device's configuration space cannot be the base of a guest's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unsuitable {
    /// Header type 1 or 2.
    #[error("it is a bridge, and only the devices behind it can be passed through")]
    Bridge,
    /// Neither MSI nor MSI-X.
    #[error(
        "it has neither MSI nor MSI-X interrupts; devices that raise interrupt pins (INTx) only \
         cannot be passed through"
    )]
    PinOnly,
    /// Nothing answers.
    #[error("it does not answer (all of its configuration reads as ones)")]
    Gone,
}

/// Where the MSI-X structures of a device are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MsixPlace {
    /// Offset of the capability.
    pub capability: u16,
    /// Vectors, 1 to 2048.
    pub vectors: u16,
    /// Base address register and bytes of the vector table.
    pub table: (u8, Range<u64>),
    /// The same of the pending bits.
    pub pending: (u8, Range<u64>),
}

/// What the guest wrote into an MSI capability.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MsiRegisters {
    /// How many vectors are on; 0: MSI is off.
    pub enabled: u16,
    /// Message address.
    pub address: u64,
    /// Message data of the first vector.
    pub data: u16,
}

/// The guest's view. Bytes in, bytes out: whoever uses it talks to the device.
#[derive(Debug, Clone)]
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    /// Bytes that are the device's own.
    passed: [bool; SIZE],
    msi: Option<u16>,
    msix: Option<MsixPlace>,
}

impl ConfigSpace {
    /// The guest's view of a device whose configuration space reads as `device`.
    pub fn new(device: &[u8; SIZE], bars: &[Bar]) -> Result<Self, Unsuitable> {
        if device[..4] == [0xff; 4] {
            return Err(Unsuitable::Gone);
        }
        if device[HEADER_TYPE] & !MULTI_FUNCTION != 0 {
            return Err(Unsuitable::Bridge);
        }
        let mut space = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            passed: [false; SIZE],
            msi: None,
            msix: None,
        };
        // Identity, revision, class; subsystem; latencies. Not BIST, whose bit starts something.
        for part in [0x00..0x04, 0x08..0x0d, 0x2c..0x30, 0x3e..0x40] {
            space.bytes[part.clone()].copy_from_slice(&device[part]);
        }
        space.bytes[STATUS] = device[STATUS] & !(STATUS_CAPABILITIES | STATUS_INTX);
        space.bytes[STATUS + 1] = device[STATUS + 1] & 0x06;
        let command = COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_NO_INTX | 0x0140;
        space.allow(COMMAND.into(), &command.to_le_bytes());
        space.allow(0x0c, &[0xff]);
        space.allow(LINE, &[0xff]);
        space.bytes[PIN] = 0;
        for bar in bars {
            space.add_bar(bar);
        }
        space.passed[FIRST_CAPABILITY..].fill(true);
        space.capabilities(device);
        if space.msi.is_none() && space.msix.is_none() {
            return Err(Unsuitable::PinOnly);
        }
        Ok(space)
    }

    fn add_bar(&mut self, bar: &Bar) {
        let offset = bars::FIRST + 4 * usize::from(bar.index);
        self.bytes[offset] = bar.flags();
        let mask = (!(bar.size - 1) & !0xf).to_le_bytes();
        self.allow(offset, if bar.wide { &mask } else { &mask[..4] });
    }

    /// Takes over the list of capabilities.
    fn capabilities(&mut self, device: &[u8; SIZE]) {
        if device[STATUS] & STATUS_CAPABILITIES == 0 {
            return;
        }
        let mut link = POINTER;
        let mut at = usize::from(device[POINTER] & !3);
        // A list that goes round in circles has more than fit.
        for _ in 0..(SIZE - FIRST_CAPABILITY) / 4 {
            if !(FIRST_CAPABILITY..SIZE - 1).contains(&at) {
                break;
            }
            let (id, next) = (device[at], usize::from(device[at + 1] & !3));
            if self.capability(id, at, device) {
                self.own(at..at + 2);
                self.bytes[at] = id;
                self.bytes[link] = at as u8;
                link = at + 1;
                self.bytes[STATUS] |= STATUS_CAPABILITIES;
            }
            at = next;
        }
    }

    /// Makes one capability; says whether the guest gets it.
    fn capability(&mut self, id: u8, at: usize, device: &[u8; SIZE]) -> bool {
        let word = |offset: usize| {
            let bytes = device.get(at + offset..at + offset + 2);
            bytes.map_or(0, |bytes| u16::from_le_bytes([bytes[0], bytes[1]]))
        };
        match id {
            CAP_VENDOR => true,
            CAP_EXPRESS => {
                // Type 0, an endpoint, becomes type 9.
                let kind = device[at + 2];
                self.own(at + 2..at + 3);
                self.bytes[at + 2] = if kind >> 4 == 0 { kind | 0x90 } else { kind };
                at + 4 <= SIZE
            }
            CAP_POWER if at + 8 <= SIZE => {
                self.own(at + 2..at + 8);
                // No wake-up events; the state can be written, and waking up resets nothing.
                self.set(at + 2, &(word(2) & 0x07ff).to_le_bytes());
                self.set(at + 4, &[0x08]);
                self.allow(at + 4, &[0x03]);
                true
            }
            CAP_MSI if self.msi.is_none() => {
                // Masks for each vector are not offered: that is bit 8, and some more registers.
                let wide = word(2) & MSI_64_BIT;
                let most = (word(2) >> 1 & 7).min(MSI_LARGEST);
                let end = at + if wide != 0 { 14 } else { 10 };
                if end > SIZE {
                    return false;
                }
                // Those registers are not the guest's business either.
                self.own(at + 2..(at + 24).min(SIZE));
                self.set(at + 2, &(wide | most << 1).to_le_bytes());
                self.allow(at + 2, &[0x71]);
                self.allow(at + 4, &[0xfc, 0xff, 0xff, 0xff]);
                if wide != 0 {
                    self.allow(at + 8, &[0xff; 4]);
                }
                self.allow(end - 2, &[0xff; 2]);
                self.msi = Some(at as u16);
                true
            }
            CAP_MSIX if self.msix.is_none() && at + 12 <= SIZE => {
                let vectors = (word(2) & 0x7ff) + 1;
                let place = |offset: usize, length: u64| {
                    let start = u64::from(word(offset) & !7) | u64::from(word(offset + 2)) << 16;
                    ((word(offset) & 7) as u8, start..start + length)
                };
                let table = place(4, u64::from(vectors) * 16);
                let pending = place(8, u64::from(vectors).div_ceil(64) * 8);
                self.own(at + 2..at + 12);
                self.set(at + 2, &(vectors - 1).to_le_bytes());
                self.allow(at + 2, &[0, 0xc0]);
                self.set(at + 4, &device[at + 4..at + 12]);
                let capability = at as u16;
                self.msix = Some(MsixPlace { capability, vectors, table, pending });
                true
            }
            _ => false,
        }
    }

    /// Whether the device must be asked for some of these bytes.
    pub fn is_passed(&self, offset: u16, length: usize) -> bool {
        self.passed.iter().skip(offset.into()).take(length).any(|passed| *passed)
    }

    /// Puts what is ours into `data`, which was read from the device. Behind the end is nothing.
    pub fn overlay(&self, offset: u16, data: &mut [u8]) {
        for (at, byte) in (usize::from(offset)..).zip(data) {
            if !self.passed.get(at).copied().unwrap_or(false) {
                *byte = self.bytes.get(at).copied().unwrap_or(0);
            }
        }
    }

    /// Takes a write of the guest's; returns the part of it, by indexes of `data`, that is for the
    /// device.
    pub fn write(&mut self, offset: u16, data: &[u8]) -> Range<usize> {
        let mut passed = 0..0;
        for (index, value) in data.iter().enumerate() {
            let at = usize::from(offset) + index;
            if at >= SIZE {
                break;
            }
            if self.passed[at] {
                passed.start = if passed.is_empty() { index } else { passed.start };
                passed.end = index + 1;
            } else {
                let mask = self.writable[at];
                self.bytes[at] = self.bytes[at] & !mask | value & mask;
            }
        }
        passed
    }

    /// The command register.
    pub fn command(&self) -> u16 {
        self.word(COMMAND.into())
    }

    /// Where a base address register leads to.
    pub fn bar(&self, bar: &Bar) -> u64 {
        let offset = bars::FIRST + 4 * usize::from(bar.index);
        let low = u64::from(self.double(offset)) & !0xf;
        if bar.wide { low | u64::from(self.double(offset + 4)) << 32 } else { low }
    }

    /// Sets a base address register, as firmware would.
    pub fn set_bar(&mut self, bar: &Bar, address: u64) {
        let bytes = (address | u64::from(bar.flags())).to_le_bytes();
        let offset = bars::FIRST + 4 * usize::from(bar.index);
        self.set(offset, if bar.wide { &bytes } else { &bytes[..4] });
    }

    /// Where the MSI-X structures are, if there are any.
    pub fn msix(&self) -> Option<&MsixPlace> {
        self.msix.as_ref()
    }

    /// The MSI-X message control register; 0 without MSI-X.
    pub fn msix_control(&self) -> u16 {
        self.msix.as_ref().map_or(0, |place| self.word(usize::from(place.capability) + 2))
    }

    /// The offset of the MSI capability and the most vectors it can have.
    pub fn msi(&self) -> Option<(u16, u16)> {
        self.msi.map(|at| (at, 1 << (self.word(usize::from(at) + 2) >> 1 & 7)))
    }

    /// What the guest wrote into it.
    pub fn msi_registers(&self) -> MsiRegisters {
        let Some((at, most)) = self.msi() else { return MsiRegisters::default() };
        let at = usize::from(at);
        let control = self.word(at + 2);
        let wide = control & MSI_64_BIT != 0;
        let high = if wide { self.double(at + 8) } else { 0 };
        MsiRegisters {
            enabled: if control & 1 != 0 { (1 << (control >> 4 & 7)).min(most) } else { 0 },
            address: u64::from(self.double(at + 4)) | u64::from(high) << 32,
            data: self.word(at + if wide { 12 } else { 8 }),
        }
    }

    fn word(&self, at: usize) -> u16 {
        self.double(at) as u16
    }

    fn double(&self, at: usize) -> u32 {
        let mut bytes = [0; 4];
        for (byte, value) in bytes.iter_mut().zip(self.bytes.iter().skip(at)) {
            *byte = *value;
        }
        u32::from_le_bytes(bytes)
    }

    fn own(&mut self, range: Range<usize>) {
        self.passed[range].fill(false);
    }

    fn set(&mut self, at: usize, data: &[u8]) {
        self.bytes[at..at + data.len()].copy_from_slice(data);
    }

    fn allow(&mut self, at: usize, mask: &[u8]) {
        self.writable[at..at + mask.len()].copy_from_slice(mask);
    }
}
