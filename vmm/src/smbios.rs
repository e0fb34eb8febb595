//! SMBIOS tables (DMTF DSP0134, version 3.4): who made this machine and its UUID. Guests use them
//! to tell that they are virtual and to name themselves.

use devices::GuestMemory;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::{credentials::OemString, layout};

const MANUFACTURER: &str = "drago-vmm";
const PRODUCT: &str = "Virtual Machine";
const ENTRY_POINT_LENGTH: u8 = 24;
const STRUCTURES: u64 = layout::SMBIOS_STRUCTURES;

/// Bytes there are for OEM strings, each with [`STRING_OVERHEAD`].
pub const ROOM: usize = layout::SMBIOS_STRUCTURES_ROOM as usize - FIXED_ROOM;
/// What a string takes besides its bytes: a structure's header, its count of strings, two zeroes.
pub const STRING_OVERHEAD: usize = 7;
/// More than the other structures need, and strings of our own.
const FIXED_ROOM: usize = 4096;

/// Writes the entry point and the structures; `uuid` in the order in which it is written as text.
/// The strings fit if they keep to [`ROOM`].
pub fn write(
    memory: &GuestMemory,
    uuid: Option<[u8; 16]>,
    strings: &[OemString],
) -> Result<(), GuestMemoryError> {
    let structures = structures(uuid, strings);
    memory.write_slice(&entry_point(structures.len() as u32), GuestAddress(layout::SMBIOS))?;
    memory.write_slice(&structures, GuestAddress(STRUCTURES))
}

/// The 64-bit entry point, §5.2.2.
fn entry_point(length: u32) -> Vec<u8> {
    let mut entry = b"_SM3_".to_vec();
    // Checksum, length, version 3.4.0, revision of this structure, reserved.
    entry.extend_from_slice(&[0, ENTRY_POINT_LENGTH, 3, 4, 0, 1, 0]);
    entry.extend_from_slice(&length.to_le_bytes());
    entry.extend_from_slice(&STRUCTURES.to_le_bytes());
    let sum = entry.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    entry[5] = sum.wrapping_neg();
    entry
}

fn structures(uuid: Option<[u8; 16]>, strings: &[OemString]) -> Vec<u8> {
    let mut table = Table::default();
    // Type 0, firmware: vendor, version, date; characteristics "not supported", extension byte 2
    // bit 4: "the structures describe a virtual machine".
    let mut firmware = vec![1, 2, 0, 0, 3, 0];
    firmware.extend_from_slice(&(1u64 << 3).to_le_bytes());
    firmware.extend_from_slice(&[0, 1 << 4, 0, 0, 0xff, 0xff, 0, 0]);
    table.add(0, &firmware, &[MANUFACTURER, env!("CARGO_PKG_VERSION"), "01/01/2026"]);
    // Type 1, system: manufacturer, product, version, no serial number, UUID, wake-up by power
    // switch, no SKU, no family.
    let mut system = vec![1, 2, 3, 0];
    system.extend_from_slice(&uuid.map_or([0; 16], little_endian));
    system.extend_from_slice(&[6, 0, 0]);
    table.add(1, &system, &[MANUFACTURER, PRODUCT, env!("CARGO_PKG_VERSION")]);
    // Type 3, chassis: kind "other"; everything safe.
    let chassis = [1, 1, 0, 0, 0, 3, 3, 3, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    table.add(3, &chassis, &[MANUFACTURER]);
    // Type 11, OEM strings: how many follow. One each, for a structure has 255 at most.
    for string in strings {
        table.add(11, &[1], &[string.as_str()]);
    }
    // Type 127: the end.
    table.add(127, &[], &[]);
    table.bytes
}

/// The first three fields of a UUID are stored little endian, §7.2.1.
fn little_endian(mut uuid: [u8; 16]) -> [u8; 16] {
    uuid[..4].reverse();
    uuid[4..6].reverse();
    uuid[6..8].reverse();
    uuid
}

#[derive(Default)]
struct Table {
    bytes: Vec<u8>,
    handle: u16,
}

impl Table {
    fn add(&mut self, kind: u8, formatted: &[u8], strings: &[&str]) {
        const HEADER: usize = 4;
        self.bytes.push(kind);
        self.bytes.push((HEADER + formatted.len()) as u8);
        self.bytes.extend_from_slice(&self.handle.to_le_bytes());
        self.handle += 1;
        self.bytes.extend_from_slice(formatted);
        for string in strings {
            self.bytes.extend_from_slice(string.as_bytes());
            self.bytes.push(0);
        }
        if strings.is_empty() {
            self.bytes.push(0);
        }
        self.bytes.push(0);
    }
}

/// Parses `xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx`.
pub fn parse_uuid(text: &str) -> Result<[u8; 16], String> {
    let expected = || "expected a UUID such as 6ba7b810-9dad-11d1-80b4-00c04fd430c8".to_owned();
    let groups: Vec<_> = text.split('-').map(str::len).collect();
    if groups != [8, 4, 4, 4, 12] {
        return Err(expected());
    }
    let digits: Vec<u8> = text
        .chars()
        .filter(|c| *c != '-')
        .map(|c| c.to_digit(16).map(|digit| digit as u8))
        .collect::<Option<_>>()
        .ok_or_else(expected)?;
    let mut uuid = [0; 16];
    for (byte, pair) in uuid.iter_mut().zip(digits.chunks(2)) {
        *byte = pair.iter().fold(0, |value, digit| (value << 4) | digit);
    }
    Ok(uuid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entry_point_sums_to_zero_and_structures_are_well_formed() {
        let uuid = parse_uuid("00112233-4455-6677-8899-aabbccddeeff").unwrap();
        let strings = [OemString::text("a", "x"), OemString::text("b", "y")];
        let table = structures(Some(uuid), &strings);
        let entry = entry_point(table.len() as u32);
        assert_eq!(entry.len(), usize::from(ENTRY_POINT_LENGTH));
        assert_eq!(entry.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
        let mut rest = table.as_slice();
        let mut kinds = Vec::new();
        while !rest.is_empty() {
            kinds.push(rest[0]);
            if rest[0] == 1 {
                assert_eq!(rest[1], 0x1b);
                assert_eq!(rest[8..16], [0x33, 0x22, 0x11, 0, 0x55, 0x44, 0x77, 0x66]);
            }
            let strings = &rest[usize::from(rest[1])..];
            if rest[0] == 11 {
                assert_eq!(rest[..2], [11, 5]);
                assert_eq!(rest[4], 1, "one string");
                assert!(strings.starts_with(b"io.systemd.credential:"));
            }
            let end = strings.windows(2).position(|pair| pair == [0, 0]).unwrap();
            rest = &strings[end + 2..];
        }
        assert_eq!(kinds, [0, 1, 3, 11, 11, 127]);
        let strings_in_all: usize =
            strings.iter().map(|s| s.as_str().len() + STRING_OVERHEAD).sum();
        assert_eq!(table.len(), structures(None, &[]).len() + strings_in_all);
        assert!(structures(None, &[]).len() < FIXED_ROOM / 2);
    }

    #[test]
    fn uuid_text() {
        assert!(parse_uuid("00112233445566778899aabbccddeeff").is_err());
        assert!(parse_uuid("0011223x-4455-6677-8899-aabbccddeeff").is_err());
    }
}
