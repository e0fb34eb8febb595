//! What a kernel finds when it starts: boot parameters in memory and the state of the first
//! processor.
//!
//! * 64-bit Linux protocol: Linux `Documentation/arch/x86/boot.rst`, "64-bit boot protocol".
//! * PVH: Xen `docs/misc/pvh.pandoc` and `xen/include/public/arch-x86/hvm/start_info.h`.

use devices::GuestMemory;
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use linux_loader::{
    bootparam::{boot_e820_entry, boot_params, setup_header},
    start_info::{
        XEN_HVM_MEMMAP_TYPE_RAM, XEN_HVM_MEMMAP_TYPE_RESERVED, XEN_HVM_START_MAGIC_VALUE,
        hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
    },
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::image::BzImage;
use crate::layout::{self, MapKind};

/// What every protocol hands over.
#[derive(Debug)]
pub struct Boot {
    /// Bytes of RAM.
    pub ram_size: u64,
    /// ACPI root pointer.
    pub rsdp: u64,
    /// Address and size of the initrd.
    pub initrd: Option<(u64, u64)>,
    /// Length of the command line.
    pub command_line: usize,
}

/// The state in which the first processor starts.
#[derive(Debug, Clone)]
pub struct Registers {
    regs: kvm_regs,
    mode: Mode,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// Protected mode, flat segments, no paging.
    Protected,
    /// Long mode, the first 4 GiB mapped one to one.
    Long,
}

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// The bit of RFLAGS that is always set.
const RFLAGS_FIXED: u64 = 1 << 1;
/// Above the start info and below the zero page, for kernels that push before they have a stack.
const BOOT_STACK: u64 = layout::ZERO_PAGE;

/// Selectors the Linux boot protocol prescribes.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;

impl Registers {
    /// First instruction.
    pub fn rip(&self) -> u64 {
        self.regs.rip
    }

    /// General purpose registers.
    pub fn general(&self) -> &kvm_regs {
        &self.regs
    }

    /// Sets system registers, keeping what KVM initialised (local APIC base for one).
    pub fn apply_system(&self, sregs: &mut kvm_sregs) {
        let flat = |selector: u16, type_: u8, long: bool, code: bool| kvm_segment {
            base: 0,
            limit: u32::MAX,
            selector,
            type_,
            present: 1,
            dpl: 0,
            db: u8::from(!(long && code)),
            s: 1,
            l: u8::from(long && code),
            g: 1,
            ..Default::default()
        };
        let long = self.mode == Mode::Long;
        sregs.cs = flat(CODE_SELECTOR, 0xb, long, true);
        let data = flat(DATA_SELECTOR, 0x3, long, false);
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.tr = kvm_segment {
            limit: 0x67,
            selector: TASK_SELECTOR,
            type_: 0xb,
            present: 1,
            ..Default::default()
        };
        sregs.gdt.base = layout::BOOT_GDT;
        sregs.gdt.limit = (GDT.len() * 8 - 1) as u16;
        sregs.idt.base = layout::BOOT_IDT;
        sregs.idt.limit = 7;
        sregs.cr0 = CR0_PE | CR0_ET;
        if long {
            sregs.cr0 |= CR0_PG | CR0_NE;
            sregs.cr3 = layout::BOOT_PAGE_TABLES;
            sregs.cr4 = CR4_PAE;
            sregs.efer = EFER_LME | EFER_LMA;
        }
    }
}

/// Null, unused, 64-bit code, flat data, task state; the descriptors of the prescribed selectors.
const GDT: [u64; 5] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067];
/// The same with 32-bit code.
const GDT32: [u64; 5] = [0, 0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067];

fn write_gdt(memory: &GuestMemory, table: [u64; 5]) -> Result<(), GuestMemoryError> {
    for (index, entry) in table.into_iter().enumerate() {
        memory.write_obj(entry.to_le(), GuestAddress(layout::BOOT_GDT + 8 * index as u64))?;
    }
    memory.write_obj(0u64, GuestAddress(layout::BOOT_IDT))
}

/// Maps the first 4 GiB one to one with 2 MiB pages.
fn write_page_tables(memory: &GuestMemory) -> Result<(), GuestMemoryError> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    const TABLE: u64 = 4096;
    let pml4 = layout::BOOT_PAGE_TABLES;
    let pdpt = pml4 + TABLE;
    memory.write_obj((pdpt | PRESENT_WRITABLE).to_le(), GuestAddress(pml4))?;
    for gib in 0..4 {
        let directory = pdpt + TABLE * (gib + 1);
        memory.write_obj((directory | PRESENT_WRITABLE).to_le(), GuestAddress(pdpt + 8 * gib))?;
        let entries: Vec<u8> = (0..512u64)
            .flat_map(|page| ((gib << 30) | (page << 21) | LARGE | PRESENT_WRITABLE).to_le_bytes())
            .collect();
        memory.write_slice(&entries, GuestAddress(directory))?;
    }
    Ok(())
}

/// Prepares entry by the 64-bit Linux protocol at `entry`. Images without a setup header (ELF) get
/// one made up.
pub fn linux64(
    memory: &GuestMemory,
    boot: &Boot,
    image: Option<&BzImage>,
    entry: u64,
) -> Result<Registers, GuestMemoryError> {
    const BOOT_FLAG: u16 = 0xaa55;
    const LOADER_UNDEFINED: u8 = 0xff;
    let mut params = boot_params {
        hdr: image.map_or_else(
            || setup_header {
                boot_flag: BOOT_FLAG,
                header: u32::from_le_bytes(*b"HdrS"),
                version: 0x020f,
                kernel_alignment: 0x100_0000,
                ..Default::default()
            },
            |image| image.setup_header,
        ),
        acpi_rsdp_addr: boot.rsdp,
        ..Default::default()
    };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = layout::COMMAND_LINE as u32;
    params.hdr.cmdline_size = boot.command_line as u32;
    if let Some((address, size)) = boot.initrd {
        params.hdr.ramdisk_image = address as u32;
        params.hdr.ramdisk_size = size as u32;
    }
    let map = layout::memory_map(boot.ram_size);
    params.e820_entries = map.len() as u8;
    let mut table = params.e820_table;
    for (slot, entry) in table.iter_mut().zip(&map) {
        const E820_RAM: u32 = 1;
        const E820_RESERVED: u32 = 2;
        *slot = boot_e820_entry {
            addr: entry.start,
            size: entry.length,
            r#type: match entry.kind {
                MapKind::Ram => E820_RAM,
                MapKind::Reserved => E820_RESERVED,
            },
        };
    }
    params.e820_table = table;
    memory.write_obj(params, GuestAddress(layout::ZERO_PAGE))?;
    write_gdt(memory, GDT)?;
    write_page_tables(memory)?;
    Ok(Registers {
        regs: kvm_regs {
            rip: entry,
            rsi: layout::ZERO_PAGE,
            rsp: BOOT_STACK,
            rbp: BOOT_STACK,
            rflags: RFLAGS_FIXED,
            ..Default::default()
        },
        mode: Mode::Long,
    })
}

/// Prepares entry by PVH at `entry`.
pub fn pvh(memory: &GuestMemory, boot: &Boot, entry: u32) -> Result<Registers, GuestMemoryError> {
    let modules = layout::PVH_START_INFO + size_of::<hvm_start_info>() as u64;
    let map_at = modules + size_of::<hvm_modlist_entry>() as u64;
    let map = layout::memory_map(boot.ram_size);
    let mut info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        cmdline_paddr: layout::COMMAND_LINE,
        rsdp_paddr: boot.rsdp,
        memmap_paddr: map_at,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    if let Some((paddr, size)) = boot.initrd {
        info.nr_modules = 1;
        info.modlist_paddr = modules;
        memory.write_obj(
            hvm_modlist_entry { paddr, size, ..Default::default() },
            GuestAddress(modules),
        )?;
    }
    memory.write_obj(info, GuestAddress(layout::PVH_START_INFO))?;
    for (index, entry) in map.iter().enumerate() {
        let line = hvm_memmap_table_entry {
            addr: entry.start,
            size: entry.length,
            type_: match entry.kind {
                MapKind::Ram => XEN_HVM_MEMMAP_TYPE_RAM,
                MapKind::Reserved => XEN_HVM_MEMMAP_TYPE_RESERVED,
            },
            reserved: 0,
        };
        let at = map_at + (index * size_of::<hvm_memmap_table_entry>()) as u64;
        memory.write_obj(line, GuestAddress(at))?;
    }
    write_gdt(memory, GDT32)?;
    Ok(Registers {
        regs: kvm_regs {
            rip: u64::from(entry),
            rbx: layout::PVH_START_INFO,
            rflags: RFLAGS_FIXED,
            ..Default::default()
        },
        mode: Mode::Protected,
    })
}
