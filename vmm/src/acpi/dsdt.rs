//! The DSDT: devices that cannot be discovered, as AML.

use acpi_tables::{
    Aml,
    aml::{
        Acquire, AddressSpace, AddressSpaceCacheable, And, Arg, BufferData, CreateDWordField,
        Device, EISAName, Equal, Field, FieldAccessType, FieldEntry, FieldLockRule,
        FieldUpdateRule, IO, If, Interrupt, Local, Memory32Fixed, Method, Mutex, Name, Notify, ONE,
        OpRegion, OpRegionSpace, Or, Package, Path, Release, ResourceTemplate, Return, Scope,
        Store, Uuid, ZERO,
    },
};
use devices::legacy::{cmos, power, pvpanic, serial};

use super::Platform;
use crate::layout;

/// Builds the table.
pub(super) fn build(platform: &Platform) -> impl Aml + use<> {
    let mut aml = Vec::new();
    sleep_states(&mut aml);
    processors(platform, &mut aml);
    let mut bus = Vec::new();
    pci(platform, &mut bus);
    if platform.serial {
        com1(&mut bus);
    }
    clock(&mut bus);
    panic_port(&mut bus);
    buttons(&mut bus);
    aml.extend(Scope::raw("_SB_".into(), bus));
    super::definition_block(&aml)
}

/// `\_S5`: what goes into the sleep control register for "off".
fn sleep_states(aml: &mut Vec<u8>) {
    let kind = power::S5_SLEEP_TYPE;
    Name::new("_S5_".into(), &Package::new(vec![&kind, &ZERO, &ZERO, &ZERO])).to_aml_bytes(aml);
}

/// One processor device each; the `_UID` is the one in the MADT.
fn processors(platform: &Platform, aml: &mut Vec<u8>) {
    let mut devices = Vec::new();
    for id in 0..platform.cpus.min(super::MAX_CPUS) {
        Device::new(
            format!("C{id:03X}").as_str().into(),
            vec![&Name::new("_HID".into(), &"ACPI0007"), &Name::new("_UID".into(), &id)],
        )
        .to_aml_bytes(&mut devices);
    }
    aml.extend(Scope::raw("_SB_".into(), devices));
}

/// The PCI host bridge with its windows, and the configuration space it decodes.
fn pci(platform: &Platform, aml: &mut Vec<u8>) {
    let last_bus = ((layout::ECAM.end - layout::ECAM.start) / layout::MIB - 1) as u16;
    let buses = AddressSpace::new_bus_number(0u16, last_bus);
    let config_ports = IO::new(0xcf8, 0xcf8, 1, 8);
    let ports_below = AddressSpace::new_io(0x0000u16, 0x0cf7, None);
    let ports_above = AddressSpace::new_io(0x0d00u16, 0xffff, None);
    let window32 = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        layout::PCI_MMIO32.start as u32,
        (layout::PCI_MMIO32.end - 1) as u32,
        None,
    );
    let window64 = (!platform.mmio64.is_empty()).then(|| {
        AddressSpace::new_memory(
            AddressSpaceCacheable::NotCacheable,
            true,
            platform.mmio64.start,
            platform.mmio64.end - 1,
            None,
        )
    });
    let mut resources: Vec<&dyn Aml> =
        vec![&buses, &config_ports, &ports_below, &ports_above, &window32];
    if let Some(window) = &window64 {
        resources.push(window);
    }
    Device::new(
        "PCI0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_SEG".into(), &ZERO),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_BBN".into(), &ZERO),
            // DMA is coherent.
            &Name::new("_CCA".into(), &ONE),
            &Name::new("_CRS".into(), &ResourceTemplate::new(resources)),
            // PCI Firmware 3.3, §4.6: function 0 tells which exist; function 5 answers 1: the
            // addresses of devices need not be kept, the operating system may move them.
            &Method::new(
                "_DSM".into(),
                4,
                false,
                vec![
                    &If::new(
                        &Equal::new(&Arg(0), &Uuid::new("E5C937D0-3553-4D7A-9117-EA4D19C3434D")),
                        vec![
                            &If::new(
                                &Equal::new(&Arg(2), &ZERO),
                                vec![&Return::new(&BufferData::new(vec![0x21]))],
                            ),
                            &If::new(&Equal::new(&Arg(2), &5u8), vec![&Return::new(&ONE)]),
                        ],
                    ),
                    &Return::new(&BufferData::new(vec![0])),
                ],
            ),
            // PCI Firmware 3.3, §4.5: the operating system gets control over whatever it asks for,
            // since no firmware uses any of it.
            &Method::new(
                "_OSC".into(),
                4,
                true,
                vec![
                    &CreateDWordField::new(&Path::new("CDW1"), &Arg(3), &ZERO),
                    &If::new(
                        &Equal::new(&Arg(0), &Uuid::new("33DB4D5B-1FF7-401C-9657-7441C03DD766")),
                        vec![&Return::new(&Arg(3))],
                    ),
                    // Unrecognised UUID.
                    &Or::new(&Path::new("CDW1"), &Path::new("CDW1"), &4u8),
                    &Return::new(&Arg(3)),
                ],
            ),
        ],
    )
    .to_aml_bytes(aml);
    Device::new(
        "MBRD".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&Memory32Fixed::new(
                    true,
                    layout::ECAM.start as u32,
                    (layout::ECAM.end - layout::ECAM.start) as u32,
                )]),
            ),
        ],
    )
    .to_aml_bytes(aml);
}

fn com1(aml: &mut Vec<u8>) {
    let base = serial::PORT as u16;
    Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &ONE),
            &Name::new("_DDN".into(), &"COM1"),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &Interrupt::new(true, true, false, false, serial::GSI),
                    &IO::new(base, base, 1, serial::PORTS as u8),
                ]),
            ),
        ],
    )
    .to_aml_bytes(aml);
}

fn clock(aml: &mut Vec<u8>) {
    let base = cmos::PORT as u16;
    Device::new(
        "RTC0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0B00")),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&IO::new(base, base, 1, cmos::PORTS as u8)]),
            ),
        ],
    )
    .to_aml_bytes(aml);
}

fn panic_port(aml: &mut Vec<u8>) {
    let port = pvpanic::PORT as u16;
    // Present, enabled, shown, functioning.
    const PRESENT: u8 = 0x0f;
    Device::new(
        "PEVT".into(),
        vec![
            &Name::new("_HID".into(), &"QEMU0001"),
            &Name::new("_STA".into(), &PRESENT),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&IO::new(port, port, 1, 1)])),
        ],
    )
    .to_aml_bytes(aml);
}

/// The power button and the generic event device that tells of it.
fn buttons(aml: &mut Vec<u8>) {
    const STATUS_CHANGED: u8 = 0x80;
    Device::new(
        "PWRB".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C0C")),
            &Name::new("_UID".into(), &ZERO),
        ],
    )
    .to_aml_bytes(aml);
    let events = (power::PORT + power::EVENTS) as u16;
    Device::new(
        "GEDE".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&Interrupt::new(
                    true,
                    true,
                    false,
                    false,
                    layout::GED_GSI,
                )]),
            ),
            &OpRegion::new("EREG".into(), OpRegionSpace::SystemIO, &events, &ONE),
            &Field::new(
                "EREG".into(),
                FieldAccessType::Byte,
                FieldLockRule::NoLock,
                FieldUpdateRule::WriteAsZeroes,
                vec![FieldEntry::Named(*b"EVTS", 8)],
            ),
            &Mutex::new("ELCK".into(), 0),
            &Method::new(
                "_EVT".into(),
                1,
                true,
                vec![
                    &Acquire::new("ELCK".into(), 0xffff),
                    // Reading clears.
                    &Store::new(&Local(0), &Path::new("EVTS")),
                    &Release::new("ELCK".into()),
                    &And::new(&Local(1), &Local(0), &power::EVENT_POWER_BUTTON),
                    &If::new(
                        &Local(1),
                        vec![&Notify::new(&Path::new("\\_SB_.PWRB"), &STATUS_CHANGED)],
                    ),
                ],
            ),
        ],
    )
    .to_aml_bytes(aml);
}
