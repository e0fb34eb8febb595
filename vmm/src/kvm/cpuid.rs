//! What CPUID tells the guest.
//!
//! The base is what KVM supports on this host. A table of rows, each with its reason, patches single
//! fields; registers are never overwritten as a whole, so that bits nobody here thought of survive.
//!
//! The topology is one package whose cores have one thread each, the APIC id being the index of the
//! processor, as the MADT says. Sources: Intel SDM volume 2 "CPUID", AMD APM volume 3 appendix E,
//! Linux `Documentation/virt/kvm/x86/cpuid.rst`.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;

use super::{Error, call};
use crate::sys;

const FLAG_SIGNIFICANT_INDEX: u32 = 1;

/// One of the four result registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}
use Register::{Eax, Ebx, Ecx, Edx};

/// Which processors a row is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Vendor {
    Any,
    /// AMD and its licensees.
    Amd,
    Intel,
}

/// What a value depends on.
#[derive(Debug, Clone, Copy)]
struct Context {
    /// Index of the processor, which is its APIC id.
    id: u32,
    /// Number of processors.
    count: u32,
    /// Whether the local APIC has a TSC deadline timer.
    tsc_deadline: bool,
}

impl Context {
    /// Bits of an APIC id that number the cores of the package.
    fn core_bits(&self) -> u32 {
        self.count.next_power_of_two().trailing_zeros()
    }
}

/// Replaces one field of one register.
struct Row {
    vendor: Vendor,
    leaf: u32,
    /// `None`: every sub-leaf there is.
    subleaf: Option<u32>,
    register: Register,
    /// Lowest bit and width of the field.
    field: (u32, u32),
    value: fn(&Context) -> u32,
    reason: &'static str,
}

const fn row(
    vendor: Vendor,
    (leaf, subleaf): (u32, Option<u32>),
    register: Register,
    field: (u32, u32),
    value: fn(&Context) -> u32,
    reason: &'static str,
) -> Row {
    Row { vendor, leaf, subleaf, register, field, value, reason }
}

use Vendor::{Amd, Any, Intel};

#[rustfmt::skip]
static TABLE: &[Row] = &[
    row(Any, (0x1, None), Ebx, (24, 8), |c| c.id, "initial APIC id agrees with the MADT"),
    row(Any, (0x1, None), Ebx, (16, 8), |c| c.count.min(255), "logical processors in the package"),
    row(Any, (0x1, None), Edx, (28, 1), |c| u32::from(c.count > 1), "HTT: the field above is valid"),
    row(Any, (0x1, None), Ecx, (24, 1), |c| u32::from(c.tsc_deadline),
        "the CPUID bit KVM reports and its capability may disagree; the capability is right"),
    row(Any, (0x1, None), Ecx, (31, 1), |_| 1, "hypervisor: guests look for KVM's leaves"),
    row(Any, (0x1, None), Ecx, (3, 1), |_| 0, "MONITOR would let an idle guest burn the host's CPU"),
    row(Intel, (0x4, None), Eax, (26, 6), |c| (c.count - 1).min(63), "cores in the package"),
    row(Intel, (0x4, Some(0)), Eax, (14, 12), |_| 0, "L1 data cache: not shared"),
    row(Intel, (0x4, Some(1)), Eax, (14, 12), |_| 0, "L1 instruction cache: not shared"),
    row(Intel, (0x4, Some(2)), Eax, (14, 12), |_| 0, "L2 cache: not shared"),
    row(Intel, (0x4, Some(3)), Eax, (14, 12), |c| (1 << c.core_bits()) - 1,
        "L3 cache: shared by the package"),
    row(Any, (0x6, None), Ecx, (3, 1), |_| 0, "the energy bias register is not emulated"),
    row(Any, (0xb, Some(0)), Eax, (0, 5), |_| 0, "no APIC id bits number threads"),
    row(Any, (0xb, Some(0)), Ebx, (0, 16), |_| 1, "one thread per core"),
    row(Any, (0xb, Some(0)), Ecx, (0, 16), |_| 0x100, "sub-leaf 0 describes threads"),
    row(Any, (0xb, Some(1)), Eax, (0, 5), Context::core_bits, "APIC id bits that number cores"),
    row(Any, (0xb, Some(1)), Ebx, (0, 16), |c| c.count, "processors in the package"),
    row(Any, (0xb, Some(1)), Ecx, (0, 16), |_| 0x201, "sub-leaf 1 describes cores"),
    row(Any, (0xb, Some(2)), Ecx, (0, 16), |_| 2, "sub-leaf 2 ends the list"),
    row(Any, (0xb, None), Edx, (0, 32), |c| c.id, "x2APIC id agrees with the MADT in every sub-leaf"),
    row(Amd, (0x8000_0001, None), Ecx, (1, 1), |c| u32::from(c.count > 1),
        "CmpLegacy: more than one core in the package"),
    row(Amd, (0x8000_0008, None), Ecx, (0, 8), |c| (c.count - 1).min(255), "cores in the package"),
    row(Amd, (0x8000_0008, None), Ecx, (12, 4), Context::core_bits, "APIC id bits that number cores"),
    row(Amd, (0x8000_001d, Some(0)), Eax, (14, 12), |_| 0, "L1 data cache: not shared"),
    row(Amd, (0x8000_001d, Some(1)), Eax, (14, 12), |_| 0, "L1 instruction cache: not shared"),
    row(Amd, (0x8000_001d, Some(2)), Eax, (14, 12), |_| 0, "L2 cache: not shared"),
    row(Amd, (0x8000_001d, Some(3)), Eax, (14, 12), |c| c.count - 1, "L3 cache: shared by the package"),
    row(Amd, (0x8000_001e, None), Eax, (0, 32), |c| c.id,
        "extended APIC id; Linux compares it with the MADT since 6.12"),
    row(Amd, (0x8000_001e, None), Ebx, (0, 8), |c| c.id, "core id"),
    row(Amd, (0x8000_001e, None), Ebx, (8, 8), |_| 0, "threads per core, less one"),
    row(Amd, (0x8000_001e, None), Ecx, (0, 11), |_| 0, "one node"),
];

/// Leaves that must exist for the rows above, with their sub-leaves.
#[rustfmt::skip]
static INSERT: &[(Vendor, u32, u32, &str)] = &[
    (Any, 0xb, 0, "extended topology: some hosts give none"),
    (Any, 0xb, 1, "extended topology: some hosts give none"),
    (Any, 0xb, 2, "extended topology: some hosts give none"),
];

/// Leaves KVM leaves empty although the guest may know them.
#[rustfmt::skip]
static COPY: &[(Vendor, u32, &str)] = &[
    (Any, 0x8000_0002, "brand string: what the user sees as the processor's name"),
    (Any, 0x8000_0003, "brand string, second part"),
    (Any, 0x8000_0004, "brand string, third part"),
    (Amd, 0x8000_0005, "L1 cache sizes"),
];

/// Leaves that describe the host's topology in ways not patched here.
#[rustfmt::skip]
static REMOVE: &[(u32, &str)] = &[
    (0x1f, "V2 extended topology: guests fall back to leaf 0xb"),
    (0x8000_0026, "AMD's newer topology leaf: guests fall back to leaf 0xb"),
];

/// The CPUID of all processors of a machine.
#[derive(Debug)]
pub struct Template {
    entries: Vec<kvm_cpuid_entry2>,
    vendor: Vendor,
    count: u32,
    tsc_deadline: bool,
}

impl Template {
    /// Asks KVM what it supports, for a machine with `count` processors.
    pub fn new(kvm: &Kvm, count: u32) -> Result<Self, Error> {
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(call("tell which CPUID leaves it supports"))?;
        let tsc_deadline = super::has_tsc_deadline(kvm);
        Ok(Self::from_entries(supported.as_slice(), count, tsc_deadline, sys::cpuid))
    }

    fn from_entries(
        entries: &[kvm_cpuid_entry2],
        count: u32,
        tsc_deadline: bool,
        host: fn(u32) -> [u32; 4],
    ) -> Self {
        let mut entries: Vec<_> = entries
            .iter()
            .filter(|entry| !REMOVE.iter().any(|(leaf, _)| *leaf == entry.function))
            .copied()
            .collect();
        let vendor = match entries.iter().find(|entry| entry.function == 0) {
            // "GenuineIntel" in EBX, EDX, ECX.
            Some(leaf) if leaf.ebx == u32::from_le_bytes(*b"Genu") => Intel,
            _ => Amd,
        };
        for &(who, function, index, _) in INSERT {
            let there = entries.iter().any(|e| e.function == function && e.index == index);
            if there || (who != Any && who != vendor) {
                continue;
            }
            entries.push(kvm_cpuid_entry2 {
                function,
                index,
                flags: FLAG_SIGNIFICANT_INDEX,
                ..Default::default()
            });
        }
        for &(who, function, _) in COPY {
            if who != Any && who != vendor {
                continue;
            }
            let [eax, ebx, ecx, edx] = host(function);
            match entries.iter_mut().find(|entry| entry.function == function) {
                Some(entry) if [entry.eax, entry.ebx, entry.ecx, entry.edx] == [0; 4] => {
                    [entry.eax, entry.ebx, entry.ecx, entry.edx] = [eax, ebx, ecx, edx];
                }
                Some(_) => {}
                None => entries.push(kvm_cpuid_entry2 {
                    function,
                    eax,
                    ebx,
                    ecx,
                    edx,
                    ..Default::default()
                }),
            }
        }
        for entry in &mut entries {
            if entry.function == 0 {
                entry.eax = entry.eax.max(0xb);
            }
        }
        entries.sort_by_key(|entry| (entry.function, entry.index));
        Self { entries, vendor, count, tsc_deadline }
    }

    /// The entries for processor `id`.
    pub fn for_cpu(&self, id: u32) -> Result<CpuId, Error> {
        CpuId::from_entries(&self.patched(id))
            .map_err(|_| Error::Missing("room for all CPUID leaves"))
    }

    /// Physical address bits of the guest's processors.
    pub fn address_bits(&self) -> u32 {
        const DEFAULT: u32 = 36;
        self.entries
            .iter()
            .find(|entry| entry.function == 0x8000_0008)
            .map_or(DEFAULT, |entry| entry.eax & 0xff)
            .clamp(DEFAULT, 52)
    }

    fn patched(&self, id: u32) -> Vec<kvm_cpuid_entry2> {
        let context = Context { id, count: self.count, tsc_deadline: self.tsc_deadline };
        let mut entries = self.entries.clone();
        for row in TABLE {
            if row.vendor != Any && row.vendor != self.vendor {
                continue;
            }
            let matching = entries.iter_mut().filter(|entry| {
                entry.function == row.leaf && row.subleaf.is_none_or(|index| index == entry.index)
            });
            for entry in matching {
                let register = match row.register {
                    Eax => &mut entry.eax,
                    Ebx => &mut entry.ebx,
                    Ecx => &mut entry.ecx,
                    Edx => &mut entry.edx,
                };
                let before = *register;
                let (shift, width) = row.field;
                let mask = (u32::MAX >> (32 - width)) << shift;
                *register = (before & !mask) | (((row.value)(&context) << shift) & mask);
                if *register != before {
                    tracing::trace!(
                        cpu = id,
                        leaf = format_args!("{:#x}.{}", row.leaf, entry.index),
                        register = ?row.register,
                        reason = row.reason,
                        "CPUID patched"
                    );
                }
            }
        }
        entries
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, words: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = words;
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    fn amd(count: u32) -> Template {
        let entries = [
            entry(0, 0, [0x10, u32::from_le_bytes(*b"Auth"), 0, 0]),
            entry(1, 0, [0, 0x0708_0800, 0x0100_2008, 0]),
            entry(0x8000_0001, 0, [0, 0, 0x0040_0004, 0]),
            entry(0x8000_0002, 0, [0; 4]),
            entry(0x8000_0003, 0, [1, 2, 3, 4]),
            entry(0x8000_0008, 0, [0x3028, 0, 0x7007, 0]),
            // A host with two threads in a core and sixteen under an L3 cache.
            entry(0x8000_001d, 0, [0x0000_4121, 0x01c0_003f, 63, 0]),
            entry(0x8000_001d, 1, [0x0000_4122, 0x00c0_003f, 255, 0]),
            entry(0x8000_001d, 2, [0x0000_4143, 0x01c0_003f, 1023, 2]),
            entry(0x8000_001d, 3, [0x0003_c163, 0x03c0_003f, 0x7fff, 1]),
            entry(0x8000_001d, 4, [0; 4]),
            entry(0x8000_001e, 0, [7, 0x103, 0x105, 0]),
            entry(0x8000_0026, 0, [1, 2, 3, 4]),
        ];
        Template::from_entries(&entries, count, true, |leaf| [leaf; 4])
    }

    fn intel(count: u32) -> Template {
        let entries = [
            entry(0, 0, [0x1f, u32::from_le_bytes(*b"Genu"), 0, 0]),
            entry(1, 0, [0, 0x0708_0800, 0x0000_2008, 0]),
            // A host with 16 cores of two threads.
            entry(4, 0, [0x7c00_4121, 0x02c0_003f, 63, 0]),
            entry(4, 1, [0x7c00_4122, 0x01c0_003f, 63, 0]),
            entry(4, 2, [0x7c00_4143, 0x03c0_003f, 1023, 0]),
            entry(4, 3, [0x7c07_c163, 0x02c0_003f, 0x7fff, 4]),
            entry(6, 0, [0x77, 2, 9, 0]),
            entry(0x1f, 0, [1, 2, 3, 4]),
            entry(0x8000_0008, 0, [0x3028, 0, 0x7007, 0]),
        ];
        Template::from_entries(&entries, count, false, |leaf| [leaf; 4])
    }

    fn find(entries: &[kvm_cpuid_entry2], leaf: u32, index: u32) -> kvm_cpuid_entry2 {
        *entries.iter().find(|e| e.function == leaf && e.index == index).unwrap()
    }

    #[test]
    fn every_place_that_tells_the_apic_id_tells_the_same() {
        let template = amd(3);
        for id in 0..3 {
            let entries = template.patched(id);
            assert_eq!(find(&entries, 1, 0).ebx >> 24, id);
            for index in 0..3 {
                assert_eq!(find(&entries, 0xb, index).edx, id);
            }
            assert_eq!(find(&entries, 0x8000_001e, 0).eax, id);
            assert!(!entries.iter().any(|e| e.function == 0x8000_0026));
        }
    }

    /// APIC ids of the processors in the bytes of a MADT (ACPI 6.5 §5.2.12.2).
    fn madt_ids(count: u32) -> Vec<u32> {
        const HEADER: usize = 44;
        const LOCAL_APIC: u8 = 0;
        let platform = crate::acpi::Platform { cpus: count, mmio64: 0..0, serial: false };
        let tables = crate::acpi::build(&platform);
        let madt = tables.iter().find(|table| table.bytes.starts_with(b"APIC")).unwrap();
        let mut rest = &madt.bytes[HEADER..];
        let mut ids = Vec::new();
        while let [kind, length, _, id, flags, ..] = *rest {
            if kind == LOCAL_APIC {
                assert_eq!((length, flags), (8, 1), "enabled");
                ids.push(u32::from(id));
            }
            rest = &rest[usize::from(length)..];
        }
        ids
    }

    /// Where CPUID tells an APIC id (Linux `arch/x86/kernel/cpu/topology*.c` reads all of them).
    fn told_ids(entries: &[kvm_cpuid_entry2]) -> Vec<u32> {
        let told = |entry: &kvm_cpuid_entry2| match entry.function {
            1 => Some(entry.ebx >> 24),
            0xb | 0x1f => Some(entry.edx),
            0x8000_001e => Some(entry.eax),
            _ => None,
        };
        entries.iter().filter_map(told).collect()
    }

    #[test]
    fn topology_leaves_agree_with_the_bytes_of_the_madt() {
        for count in [1, 2, 3, 8, 254] {
            let ids = madt_ids(count);
            assert_eq!(ids.len(), count as usize);
            for (template, places) in [(amd(count), 5), (intel(count), 4)] {
                for (cpu, id) in (0..count).zip(&ids) {
                    let entries = template.patched(cpu);
                    let told = told_ids(&entries);
                    assert_eq!(told, vec![*id; places], "processor {cpu} of {count}");
                    // One package, one thread in each core: no id needs more bits than said.
                    let package = find(&entries, 0xb, 1);
                    assert_eq!(id >> package.eax, 0, "processor {cpu} of {count}");
                    assert_eq!(package.ebx, count);
                    assert_eq!(find(&entries, 0xb, 0).eax, 0);
                }
            }
            for (cpu, id) in (0..count).zip(&ids) {
                let entries = amd(count).patched(cpu);
                let core = find(&entries, 0x8000_001e, 0);
                assert_eq!(core.ebx & 0xff, *id & 0xff, "core id");
                assert_eq!((core.ebx >> 8) & 0xff, 0, "one thread in a core");
                assert_eq!(core.ecx & 0x7ff, 0, "one node");
                let size = find(&entries, 0x8000_0008, 0).ecx;
                assert_eq!((size & 0xff) + 1, count);
                assert_eq!(id >> ((size >> 12) & 0xf), 0);
            }
        }
    }

    #[test]
    fn caches_are_shared_by_nobody_but_the_last_level_by_all() {
        for count in [1, 3, 16] {
            let entries = amd(count).patched(count - 1);
            let sharing = |index| (find(&entries, 0x8000_001d, index).eax >> 14) & 0xfff;
            assert_eq!([0, 1, 2, 3].map(sharing), [0, 0, 0, count - 1], "AMD, {count}");
            // Level, type and size are the host's.
            assert_eq!(find(&entries, 0x8000_001d, 0).eax & 0x3fff, 0x0121);
            let last = find(&entries, 0x8000_001d, 3);
            assert_eq!((last.eax & 0x3fff, last.ebx, last.ecx), (0x0163, 0x03c0_003f, 0x7fff));
            assert_eq!(find(&entries, 0x8000_001d, 4).eax, 0, "the list ends where it did");

            let entries = intel(count).patched(count - 1);
            let leaf = |index| find(&entries, 4, index).eax;
            // Intel counts ids, which are a power of two (SDM volume 2, leaf 4).
            let ids = count.next_power_of_two() - 1;
            assert_eq!([0, 1, 2, 3].map(|i| (leaf(i) >> 14) & 0xfff), [0, 0, 0, ids]);
            assert!((0..4).all(|index| leaf(index) >> 26 == count - 1), "cores, {count}");
            assert_eq!(leaf(3) & 0x3fff, 0x0163);
        }
        let entries = intel(2).patched(0);
        assert!(!entries.iter().any(|entry| entry.function == 0x1f));
        assert_eq!(find(&entries, 6, 0).ecx, 1, "no energy bias, the rest as it was");
        assert_eq!(find(&entries, 1, 0).ecx, 0x8000_2000, "no TSC deadline, no MONITOR");
    }

    /// A row for a leaf that no processor here has would be tested by nothing.
    #[test]
    fn every_row_meets_a_leaf_of_these_processors() {
        for template in [amd(3), intel(3)] {
            for row in TABLE.iter().filter(|row| [Any, template.vendor].contains(&row.vendor)) {
                let meets = template.entries.iter().any(|entry| {
                    entry.function == row.leaf && row.subleaf.is_none_or(|i| i == entry.index)
                });
                let elsewhere = row.vendor == Any && row.leaf == 6 && template.vendor == Amd;
                assert!(meets || elsewhere, "{:#x}.{:?}: {}", row.leaf, row.subleaf, row.reason);
            }
        }
    }

    #[test]
    fn counts_and_untouched_neighbours() {
        let entries = amd(3).patched(0);
        let one = find(&entries, 1, 0);
        assert_eq!((one.ebx >> 16) & 0xff, 3);
        assert_eq!(one.ebx & 0xffff, 0x0800, "CLFLUSH size is not ours");
        assert_eq!(one.edx >> 28, 1);
        assert_eq!(one.ecx, 0x8100_2000, "hypervisor and TSC deadline on, MONITOR off");
        let size = find(&entries, 0x8000_0008, 0);
        assert_eq!(size.ecx, 0x2002);
        assert_eq!(size.eax, 0x3028);
        let core = find(&entries, 0xb, 1);
        assert_eq!((core.eax, core.ebx, core.ecx), (2, 3, 0x201));
        assert_eq!(find(&entries, 0x8000_0001, 0).ecx, 0x0040_0006, "SVM stays");
        assert_eq!(find(&entries, 0, 0).eax, 0x10);
        assert_eq!(find(&entries, 0x8000_0002, 0).ebx, 0x8000_0002, "from the host");
        assert_eq!(find(&entries, 0x8000_0003, 0).ebx, 2, "KVM's word comes first");
        let single = amd(1).patched(0);
        assert_eq!(find(&single, 1, 0).edx >> 28, 0);
        assert_eq!(find(&single, 0xb, 1).eax, 0);
    }

    #[test]
    fn rows_have_reasons_and_sane_fields() {
        for row in TABLE {
            assert!(!row.reason.is_empty());
            assert!(row.field.1 > 0 && row.field.0 + row.field.1 <= 32);
        }
        assert_eq!(amd(1).address_bits(), 40);
    }
}
