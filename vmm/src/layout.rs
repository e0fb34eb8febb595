//! The guest physical address map.
//!
//! ```text
//! 0x0000_0000  low memory: real-mode leftovers, boot structures (see below)
//! 0x0009_fc00  reserved: EBDA, VGA hole, SMBIOS structures, ACPI tables, SMBIOS entry point
//! 0x0010_0000  RAM, up to 3 GiB
//! 0xc000_0000  32-bit PCI window, 512 MiB
//! 0xe000_0000  PCI configuration space (ECAM), one bus
//! 0xfec0_0000  I/O APIC
//! 0xfee0_0000  local APIC, MSI
//! 0xfffb_c000  KVM's identity map page and task state segment
//! 0x1_0000_0000  RAM beyond 3 GiB, then the 64-bit PCI window
//! ```

/// One mebibyte.
pub const MIB: u64 = 1 << 20;
/// One gibibyte.
pub const GIB: u64 = 1 << 30;

/// Where the memory that real-mode firmware would own begins.
pub const LOW_MEMORY_END: u64 = 0x9_fc00;
/// Start of RAM above the VGA hole and the BIOS area.
pub const EXTENDED_MEMORY: u64 = MIB;
/// RAM never reaches beyond this below 4 GiB.
pub const LOW_RAM_LIMIT: u64 = 3 * GIB;
/// RAM that does not fit below [`LOW_RAM_LIMIT`] goes on here.
pub const HIGH_RAM: u64 = 4 * GIB;

/// 32-bit PCI window.
pub const PCI_MMIO32: std::ops::Range<u64> = 0xc000_0000..0xe000_0000;
/// Enhanced configuration space of bus 0; later buses would follow.
pub const ECAM: std::ops::Range<u64> = 0xe000_0000..0xe010_0000;
/// Largest 64-bit PCI window.
pub const PCI_MMIO64_MAX: u64 = 64 * GIB;
/// I/O APIC registers, where KVM puts them.
pub const IO_APIC: u64 = 0xfec0_0000;
/// Local APIC registers, where KVM puts them.
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// One page KVM uses on processors that cannot run real mode.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages KVM uses for the same purpose.
pub const KVM_TSS: u64 = 0xfffb_d000;

/// Global descriptor table for the first instructions.
pub const BOOT_GDT: u64 = 0x500;
/// Empty interrupt descriptor table.
pub const BOOT_IDT: u64 = 0x580;
/// PVH start info, followed by module list and memory map.
pub const PVH_START_INFO: u64 = 0x6000;
/// Linux boot parameters ("zero page").
pub const ZERO_PAGE: u64 = 0x7000;
/// Page tables for the 64-bit entry: one PML4, one PDPT, four page directories.
pub const BOOT_PAGE_TABLES: u64 = 0x9000;
/// The kernel's command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Room for the command line with its terminating zero.
pub const COMMAND_LINE_ROOM: u64 = 0x1_0000;
/// RSDP and the ACPI tables; inside the range that is scanned for the RSDP.
pub const ACPI: u64 = 0xe_0000;
/// Room for the ACPI tables.
pub const ACPI_ROOM: u64 = 0x1_0000;
/// SMBIOS structures, where the option ROMs of a PC would be.
pub const SMBIOS_STRUCTURES: u64 = 0xc_0000;
/// Room for the SMBIOS structures. Linux maps at most 256 KiB of them while it boots.
pub const SMBIOS_STRUCTURES_ROOM: u64 = 0x2_0000;
/// SMBIOS entry point; inside the range that is scanned for it.
pub const SMBIOS: u64 = 0xf_0000;

/// Interrupt line of the generic event device.
pub const GED_GSI: u32 = 9;
/// Interrupt lines of the I/O APIC; message signalled interrupts get numbers above.
pub const IO_APIC_PINS: u32 = 24;

/// Splits `size` bytes of RAM into `(guest address, length)` pieces.
pub fn ram(size: u64) -> Vec<(u64, u64)> {
    let low = size.min(LOW_RAM_LIMIT);
    let mut pieces = vec![(0, low)];
    if size > low {
        pieces.push((HIGH_RAM, size - low));
    }
    pieces
}

/// The 64-bit PCI window behind `size` bytes of RAM on a processor with `address_bits` physical
/// address bits; empty if there is no room for one.
pub fn pci_mmio64(size: u64, address_bits: u32) -> std::ops::Range<u64> {
    let ram_end = ram(size).last().map_or(0, |(start, length)| start + length);
    let start = ram_end.max(HIGH_RAM).next_multiple_of(4 * GIB);
    let limit = 1u64.checked_shl(address_bits).unwrap_or(1 << 52);
    start..limit.min(start + PCI_MMIO64_MAX).max(start)
}

/// What a range of guest physical addresses is, in the words of the memory map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MapKind {
    /// Usable memory.
    Ram,
    /// Not to be touched by the operating system's allocator.
    Reserved,
}

/// One line of the memory map given to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapEntry {
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub length: u64,
    /// What is there.
    pub kind: MapKind,
}

/// The memory map (e820) of a machine with `size` bytes of RAM, ascending.
pub fn memory_map(size: u64) -> Vec<MapEntry> {
    let entry = |start, end, kind| MapEntry { start, length: end - start, kind };
    let mut map = vec![
        entry(0, LOW_MEMORY_END, MapKind::Ram),
        entry(LOW_MEMORY_END, EXTENDED_MEMORY, MapKind::Reserved),
    ];
    for (start, length) in ram(size) {
        map.push(entry(start.max(EXTENDED_MEMORY), start + length, MapKind::Ram));
    }
    // Linux trusts the MCFG table only where the memory map reserves the range.
    map.push(entry(ECAM.start, ECAM.end, MapKind::Reserved));
    map.sort_by_key(|entry| entry.start);
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_around_every_boundary() {
        for mib in [64, 2047, 2048, 2049, 3071, 3072, 3073, 4096, 65_536] {
            let size = mib * MIB;
            let pieces = ram(size);
            assert_eq!(pieces.iter().map(|(_, length)| length).sum::<u64>(), size, "{mib} MiB");
            assert!(pieces[0].1 <= PCI_MMIO32.start, "{mib} MiB reach into the PCI window");
            assert_eq!(pieces.len(), 1 + usize::from(mib > 3072), "{mib} MiB");
            let map = memory_map(size);
            for pair in map.windows(2) {
                assert!(pair[0].start + pair[0].length <= pair[1].start, "{mib} MiB: {map:x?}");
            }
            let usable: u64 = map.iter().filter(|e| e.kind == MapKind::Ram).map(|e| e.length).sum();
            assert_eq!(usable, size - (EXTENDED_MEMORY - LOW_MEMORY_END), "{mib} MiB");
        }
    }

    #[test]
    fn the_64_bit_window_lies_behind_ram_and_below_the_address_limit() {
        for mib in [64, 3073, 4096, 30_000] {
            let window = pci_mmio64(mib * MIB, 40);
            let (start, length) = *ram(mib * MIB).last().unwrap();
            assert!(window.start >= start + length && window.start >= HIGH_RAM);
            assert_eq!(window.end - window.start, PCI_MMIO64_MAX);
        }
        assert!(pci_mmio64(70 * 1024 * MIB, 36).is_empty());
        assert_eq!(pci_mmio64(MIB * 64, 36).end, 64 * GIB);
    }

    #[test]
    fn boot_structures_do_not_overlap() {
        let areas = [
            (BOOT_GDT, 0x80),
            (BOOT_IDT, 0x80),
            (PVH_START_INFO, 0x1000),
            (ZERO_PAGE, 0x1000),
            (BOOT_PAGE_TABLES, 0x6000),
            (COMMAND_LINE, COMMAND_LINE_ROOM),
            (SMBIOS_STRUCTURES, SMBIOS_STRUCTURES_ROOM),
            (ACPI, ACPI_ROOM),
            (SMBIOS, 0x1_0000),
        ];
        for pair in areas.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0);
        }
    }
}
