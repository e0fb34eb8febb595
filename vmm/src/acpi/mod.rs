//! ACPI tables (ACPI 6.5): a hardware-reduced machine, that is one without the fixed registers of
//! a PC chip set. Built once, written below 1 MiB, found by the boot parameters or by the legacy
//! scan.

use acpi_tables::{
    Aml,
    fadt::{FADTBuilder, Flags, PmProfile},
    gas::{AccessSize, AddressSpace, GAS},
    madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic},
    mcfg::MCFG,
    rsdp::Rsdp,
    sdt::Sdt,
    xsdt::XSDT,
};
use devices::{
    GuestMemory,
    legacy::{cmos, power},
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

pub mod dsdt;

use crate::layout;

const OEM: [u8; 6] = *b"DRAGO ";
const OEM_TABLE: [u8; 8] = *b"DRAGOVMM";
const OEM_REVISION: u32 = 1;

/// Most processors the MADT describes: beyond 255, APIC ids need x2APIC structures.
pub const MAX_CPUS: u32 = 254;

/// What the tables describe.
#[derive(Debug, Clone)]
pub struct Platform {
    /// Number of processors; their APIC ids count from 0.
    pub cpus: u32,
    /// 64-bit PCI window, may be empty.
    pub mmio64: std::ops::Range<u64>,
    /// Whether COM1 is there.
    pub serial: bool,
}

/// One table and where it goes.
#[derive(Debug, Clone)]
pub struct Table {
    /// Guest physical address.
    pub address: u64,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// Builds all tables. The first one is the RSDP.
pub fn build(platform: &Platform) -> Vec<Table> {
    let mut place = Placer { next: layout::ACPI };
    // The RSDP comes first, where the legacy scan finds it; it points back to the XSDT.
    let rsdp_at = place.reserve(Rsdp::len());
    let dsdt = place.table(bytes(&dsdt::build(platform)));
    let fadt = place.table(bytes(&fadt(dsdt.address)));
    let madt = place.table(bytes(&madt(platform.cpus)));
    let mcfg = place.table(bytes(&mcfg()));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    for table in [&fadt, &madt, &mcfg] {
        xsdt.add_entry(table.address);
    }
    let xsdt = place.table(bytes(&xsdt));
    let rsdp = Table { address: rsdp_at, bytes: bytes(&Rsdp::new(OEM, xsdt.address)) };
    vec![rsdp, xsdt, fadt, madt, mcfg, dsdt]
}

/// Writes the tables; returns the address of the RSDP.
pub fn write(memory: &GuestMemory, platform: &Platform) -> Result<u64, GuestMemoryError> {
    for table in build(platform) {
        memory.write_slice(&table.bytes, GuestAddress(table.address))?;
    }
    Ok(layout::ACPI)
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

struct Placer {
    next: u64,
}

impl Placer {
    fn reserve(&mut self, length: usize) -> u64 {
        let address = self.next;
        self.next = (address + length as u64).next_multiple_of(16);
        address
    }

    fn table(&mut self, bytes: Vec<u8>) -> Table {
        Table { address: self.reserve(bytes.len()), bytes }
    }
}

fn port(address: u64) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, address)
}

fn fadt(dsdt: u64) -> impl Aml {
    // §5.2.9.3: VGA and 8042 absent, so nobody probes for them; MSI is fine; no ASPM.
    const VGA_NOT_PRESENT: u16 = 1 << 2;
    let mut table = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::Desktop)
        .flag(Flags::Wbinvd)
        // The buttons are control method devices, not fixed hardware.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        .flag(Flags::HwReducedAcpi);
    table.iapc_boot_arch = VGA_NOT_PRESENT.into();
    table.century = cmos::CENTURY_REGISTER;
    table.reset_reg = port(power::PORT + power::RESET);
    table.reset_value = power::RESET_VALUE;
    table.sleep_control_reg = port(power::PORT + power::SLEEP_CONTROL);
    table.sleep_status_reg = port(power::PORT + power::SLEEP_STATUS);
    table.hypervisor_vendor_identity = u64::from_le_bytes(OEM_TABLE).into();
    table.finalize()
}

fn madt(cpus: u32) -> impl Aml {
    let address = LocalInterruptController::Address(layout::LOCAL_APIC as u32);
    let mut table = MADT::new(OEM, OEM_TABLE, OEM_REVISION, address);
    for id in 0..cpus.min(MAX_CPUS) as u8 {
        table.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    table.add_structure(IoApic::new(0, layout::IO_APIC as u32, 0));
    table
}

fn mcfg() -> impl Aml {
    let mut table = MCFG::new(OEM, OEM_TABLE, OEM_REVISION);
    let last_bus = ((layout::ECAM.end - layout::ECAM.start) / layout::MIB - 1) as u8;
    table.add_ecam(layout::ECAM.start, 0, 0, last_bus);
    table
}

/// A table header around AML.
fn definition_block(aml: &[u8]) -> Sdt {
    const HEADER: u32 = 36;
    const REVISION_64_BIT_INTEGERS: u8 = 2;
    let mut table =
        Sdt::new(*b"DSDT", HEADER, REVISION_64_BIT_INTEGERS, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(aml);
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn platform(cpus: u32) -> Platform {
        Platform { cpus, mmio64: layout::pci_mmio64(layout::GIB, 40), serial: true }
    }

    #[test]
    fn tables_fit_and_their_checksums_are_right() {
        for cpus in [1, 2, 255] {
            let tables = build(&platform(cpus));
            let mut end = 0;
            let mut sorted = tables.clone();
            sorted.sort_by_key(|table| table.address);
            for table in &sorted {
                assert!(table.address >= end);
                end = table.address + table.bytes.len() as u64;
                let sum = table.bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
                assert_eq!(sum, 0, "{}", String::from_utf8_lossy(&table.bytes[..4]));
            }
            assert!(end <= layout::ACPI + layout::ACPI_ROOM, "{cpus} processors");
            assert_eq!(tables[0].address, layout::ACPI);
            assert_eq!(&tables[0].bytes[..8], b"RSD PTR ");
        }
    }

    /// Runs Intel's compiler; what it says of a file, without a complaint. `None` if it is not there.
    fn iasl(folder: &std::path::Path, arguments: &[&str]) -> Option<String> {
        let output =
            match std::process::Command::new("iasl").current_dir(folder).args(arguments).output() {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                    println!("SKIPPED: iasl is not installed (Debian: acpica-tools)");
                    return None;
                }
                other => other.unwrap(),
            };
        let text = String::from_utf8_lossy(&output.stdout).into_owned()
            + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {text}");
        assert!(!text.contains("Warning") || text.contains(" 0 Warnings"), "{text}");
        assert!(!text.contains("Error") || text.contains(" 0 Errors"), "{text}");
        Some(text)
    }

    /// Intel's compiler takes the tables apart and puts them together again without a complaint.
    #[test]
    fn iasl_has_no_complaint() {
        for cpus in [1, 5] {
            let folder = tempfile::tempdir().unwrap();
            // It takes no RSDP apart, see below.
            for table in &build(&platform(cpus))[1..] {
                let name = String::from_utf8(table.bytes[..4].to_vec()).unwrap().to_lowercase();
                let file = |extension| format!("{name}.{extension}");
                std::fs::write(folder.path().join(file("dat")), &table.bytes).unwrap();
                if iasl(folder.path(), &["-d", &file("dat")]).is_none() {
                    return;
                }
                iasl(folder.path(), &["-we", &file("dsl")]);
            }
        }
    }

    /// It makes the same RSDP of the same fields, checksums among them.
    #[test]
    fn iasl_makes_the_same_rsdp() {
        let tables = build(&platform(2));
        let (rsdp, xsdt) = (&tables[0].bytes, &tables[1]);
        let source = format!(
            "[0008] Signature : \"RSD PTR \"\n[0001] Checksum : 00\n[0006] Oem ID : \"{}\"\n\
             [0001] Revision : 02\n[0004] RSDT Address : 00000000\n[0004] Length : {:08x}\n\
             [0008] XSDT Address : {:016x}\n[0001] Extended Checksum : 00\n[0003] Reserved : 000000\n",
            String::from_utf8_lossy(&OEM),
            rsdp.len(),
            xsdt.address
        );
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("rsdp.asl"), source).unwrap();
        if iasl(folder.path(), &["-we", "rsdp.asl"]).is_some() {
            assert_eq!(&std::fs::read(folder.path().join("rsdp.aml")).unwrap(), rsdp);
        }
    }
}
