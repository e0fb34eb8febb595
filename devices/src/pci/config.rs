//! Configuration space of one function: type 0 header (PCI Local Bus 3.0 §6.1), capability list
//! (§6.7), base address registers (§6.2.5). Every bit has a write mask, which is all that sizing
//! and reserved fields need.

/// Offset of the command register.
pub const COMMAND: u16 = 0x04;
/// Command bit: the function answers at its memory base addresses.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// Command bit: the function may write to memory, which includes interrupt messages.
pub const COMMAND_BUS_MASTER: u16 = 1 << 2;
/// Offset of the first base address register.
pub const BAR0: u16 = 0x10;

const STATUS: usize = 0x06;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const CAPABILITIES_POINTER: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;
const SIZE: usize = 256;

/// What a function is.
#[derive(Debug, Clone)]
pub struct Ids {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Revision of the device.
    pub revision: u8,
    /// Base class, sub class and programming interface, highest byte first (24 bits).
    pub class: u32,
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem: u16,
}

/// What a 64-bit base address register leads to; the value is that of its lowest bits (PCI Local Bus
/// 3.0 §6.2.5.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum BarKind {
    /// Registers: reading may have effects.
    Registers = 0b0100,
    /// Memory: prefetchable.
    Memory = 0b1100,
}

/// 256 bytes and which of their bits the guest may change.
#[derive(Debug)]
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    /// Where the pointer to the next capability goes.
    link: usize,
    free: usize,
}

impl ConfigSpace {
    /// A type 0 header without base addresses, capabilities or interrupt pin.
    pub fn new(ids: &Ids) -> Self {
        let mut space = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            link: CAPABILITIES_POINTER,
            free: FIRST_CAPABILITY,
        };
        space.set(0x00, &ids.vendor.to_le_bytes());
        space.set(0x02, &ids.device.to_le_bytes());
        space.set(0x08, &(ids.class << 8 | u32::from(ids.revision)).to_le_bytes());
        space.set(0x2c, &ids.subsystem_vendor.to_le_bytes());
        space.set(0x2e, &ids.subsystem.to_le_bytes());
        // Memory, bus master, parity and SERR enable, interrupt disable. There are no I/O ports.
        space.allow(COMMAND.into(), &0x0546_u16.to_le_bytes());
        // Cache line size and interrupt line hold whatever the guest notes there.
        space.allow(0x0c, &[0xff]);
        space.allow(0x3c, &[0xff]);
        space
    }

    /// Makes base address registers `index` and `index + 1` one 64-bit register of `size` bytes (a
    /// power of two, at least 16) that starts out at `address`.
    pub fn set_bar64(&mut self, index: u16, size: u64, address: u64, kind: BarKind) {
        let offset = usize::from(BAR0 + 4 * index);
        self.set(offset, &(address | kind as u64).to_le_bytes());
        self.allow(offset, &(!(size - 1) & !0xf).to_le_bytes());
    }

    /// The address in the 64-bit register made by [`set_bar64`](Self::set_bar64).
    pub fn bar64(&self, index: u16) -> u64 {
        let mut bytes = [0; 8];
        self.read(BAR0 + 4 * index, &mut bytes);
        u64::from_le_bytes(bytes) & !0xf
    }

    /// The command register.
    pub fn command(&self) -> u16 {
        let mut bytes = [0; 2];
        self.read(COMMAND, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    /// Appends a capability whose bytes after id and next pointer are `body`; `writable` holds the
    /// mask of bits the guest may change, and may be shorter. Returns the capability's offset, or
    /// `None` if there is no room.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Option<u16> {
        let offset = self.free;
        let end = offset + 2 + body.len();
        if end > SIZE || writable.len() > body.len() {
            return None;
        }
        self.set(offset, &[id, 0]);
        self.set(offset + 2, body);
        self.allow(offset + 2, writable);
        self.bytes[STATUS] |= STATUS_CAPABILITIES;
        self.bytes[self.link] = offset as u8;
        self.link = offset + 1;
        self.free = end.next_multiple_of(4);
        Some(offset as u16)
    }

    /// Reads any number of bytes; those past the 256 are zero.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = self.bytes.get(usize::from(offset) + index).copied().unwrap_or(0);
        }
    }

    /// Writes the bits that the guest may change.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        let places = self.bytes.iter_mut().zip(&self.writable).skip(offset.into());
        for ((byte, mask), value) in places.zip(data) {
            *byte = *byte & !mask | value & mask;
        }
    }

    fn set(&mut self, offset: usize, data: &[u8]) {
        for (byte, value) in self.bytes.iter_mut().skip(offset).zip(data) {
            *byte = *value;
        }
    }

    fn allow(&mut self, offset: usize, mask: &[u8]) {
        for (byte, value) in self.writable.iter_mut().skip(offset).zip(mask) {
            *byte = *value;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        ConfigSpace::new(&Ids {
            vendor: 0x1234,
            device: 0x5678,
            revision: 9,
            class: 0x03_80_00,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1050,
        })
    }

    fn dword(space: &ConfigSpace, offset: u16) -> u32 {
        let mut bytes = [0; 4];
        space.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    #[test]
    fn header_fields_and_read_only_bits() {
        let mut space = space();
        space.write(0, &[0xff; 64]);
        assert_eq!(dword(&space, 0x00), 0x5678_1234);
        assert_eq!(dword(&space, 0x08), 0x0380_0009);
        assert_eq!(dword(&space, 0x2c), 0x1050_1af4);
        assert_eq!(space.command(), 0x0546);
        assert_eq!(dword(&space, 0x10), 0, "no base address register");
        assert_eq!(dword(&space, 0x3c), 0x0000_00ff, "no interrupt pin");
    }

    #[test]
    fn a_bar_can_be_sized_and_moved() {
        let mut space = space();
        space.set_bar64(0, 0x8000, 0xc000_0000, BarKind::Registers);
        assert_eq!(dword(&space, 0x10), 0xc000_0004);
        space.write(0x10, &[0xff; 4]);
        space.write(0x14, &[0xff; 4]);
        assert_eq!(dword(&space, 0x10), 0xffff_8004);
        assert_eq!(dword(&space, 0x14), 0xffff_ffff);
        space.write(0x10, &0x1000_8000_u32.to_le_bytes());
        space.write(0x14, &0x23_u32.to_le_bytes());
        assert_eq!(space.bar64(0), 0x23_1000_8000);
    }

    #[test]
    fn capabilities_form_a_list() {
        let mut space = space();
        let first = space.add_capability(9, &[1, 2, 3], &[]).unwrap();
        let second = space.add_capability(0x11, &[0, 0], &[0, 0xc0]).unwrap();
        assert_eq!(dword(&space, 0x34) & 0xff, u32::from(first));
        assert_eq!(dword(&space, 0x04) >> 20 & 1, 1, "capability list bit");
        assert_eq!(dword(&space, first), u32::from_le_bytes([9, second as u8, 1, 2]));
        space.write(second, &[0xff; 4]);
        assert_eq!(dword(&space, second), u32::from_le_bytes([0x11, 0, 0, 0xc0]));
        assert_eq!(space.add_capability(9, &[0; 200], &[]), None, "no room");
    }
}
