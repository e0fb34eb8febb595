//! Kernel images, initrds and command lines into guest memory. A raw file, or a good one with some
//! of its bytes replaced, so that every check gets its turn.

#![no_main]

use std::sync::{Mutex, OnceLock};

use devices::GuestMemory;
use drago_fuzz::{Input, MemoryFile};
use drago_vmm::{
    boot::{self, BootConfig, image},
    layout::{self, MIB},
    memory,
};
use libfuzzer_sys::fuzz_target;

const RAM: u64 = 64 * MIB;
/// A sparse initrd longer than this would only cost time.
const LONG_INITRD: u64 = 128 * MIB;

struct Fixture {
    memory: GuestMemory,
    kernel: MemoryFile,
    initrd: MemoryFile,
}

fn fixture() -> &'static Mutex<Fixture> {
    static FIXTURE: OnceLock<Mutex<Fixture>> = OnceLock::new();
    FIXTURE.get_or_init(|| {
        Mutex::new(Fixture {
            memory: memory::allocate(RAM / MIB, false).unwrap(),
            kernel: MemoryFile::new().unwrap(),
            initrd: MemoryFile::new().unwrap(),
        })
    })
}

/// A bzImage with a kernel of 1 KiB (Linux `Documentation/arch/x86/boot.rst`).
fn bzimage() -> Vec<u8> {
    let mut image = vec![0; 2048];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x1f4, &64_u32.to_le_bytes());
    put(0x202, b"HdrS\x0f\x02");
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes());
    put(0x236, &1_u16.to_le_bytes());
    put(0x238, &2047_u32.to_le_bytes());
    put(0x258, &(16 * MIB).to_le_bytes());
    put(0x260, &0x10_0000_u32.to_le_bytes());
    image
}

/// An ELF image: a segment of 32 bytes at 1 MiB and, if wanted, a note with the PVH entry.
fn elf(pvh: bool) -> Vec<u8> {
    let mut image = b"\x7fELF\x02\x01\x01".to_vec();
    image.resize(16, 0);
    image.extend_from_slice(&[2, 0, 62, 0, 1, 0, 0, 0]);
    for word in [MIB, 64, 0] {
        image.extend_from_slice(&word.to_le_bytes());
    }
    image.extend_from_slice(&[0, 0, 0, 0, 64, 0, 56, 0, 1 + u8::from(pvh), 0, 0, 0, 0, 0, 0, 0]);
    let header = |kind: u32, offset: u64, address: u64, sizes: (u64, u64)| {
        let mut bytes = [kind.to_le_bytes(), 7_u32.to_le_bytes()].concat();
        for word in [offset, address, address, sizes.0, sizes.1, 4] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        bytes
    };
    image.extend(header(1, 256, MIB, (32, 4096)));
    if pvh {
        image.extend(header(4, 192, 0, (20, 20)));
    }
    image.resize(192, 0);
    for word in [4_u32, 4, 18, u32::from_le_bytes(*b"Xen\0"), MIB as u32] {
        image.extend_from_slice(&word.to_le_bytes());
    }
    image.resize(256 + 32, 0x90);
    image
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    let kind = input.u8();
    let mut image = match kind & 3 {
        0 => Vec::new(),
        1 => bzimage(),
        2 => elf(false),
        _ => elf(true),
    };
    let initrd_size = match kind >> 2 & 3 {
        0 => None,
        1 => Some(u64::from(input.number()) % LONG_INITRD),
        _ => Some(u64::from(input.u8())),
    };
    let line = match kind >> 4 {
        0 => "x".repeat(input.number() as usize % 0x1_1000),
        length => String::from_utf8_lossy(input.take(length.into())).into_owned(),
    };
    let good = kind & 3 != 0
        && input.is_empty()
        && initrd_size.unwrap_or(0) < MIB
        && line.len() < 2048
        && !line.contains('\0');
    if image.is_empty() {
        image = input.rest().to_vec();
    } else {
        // A place in the headers, a width, and a number of any magnitude or its complement.
        let headers = if kind & 3 == 1 { 0x1f0 } else { 0 };
        while !input.is_empty() {
            let (at, how) = (headers + usize::from(input.u8()), input.u8());
            let value = u64::from(input.number()).rotate_left(u32::from(how & 7) * 8);
            let value = if how & 0x80 == 0 { value } else { !value };
            let width = 1 << (how >> 3 & 3);
            image[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
        }
    }
    // Both ways to read must agree on what an image is.
    let parsed = image::parse(image.as_slice());

    let mut fixture = fixture().lock().unwrap();
    let Fixture { memory, kernel, initrd } = &mut *fixture;
    kernel.fill(&image, image.len() as u64).unwrap();
    if let Some(size) = initrd_size {
        initrd.fill(b"0707", size).unwrap();
    }
    let config = BootConfig {
        kernel: kernel.path.clone(),
        initrd: initrd_size.map(|_| initrd.path.clone()),
        command_line: line,
    };
    match boot::load(memory, RAM, &config, layout::ACPI) {
        Ok(registers) => {
            assert!(parsed.is_ok());
            assert!((MIB..RAM).contains(&registers.rip()), "starts at {:#x}", registers.rip());
        }
        Err(error) => assert!(!good, "a good image is refused: {error}"),
    }
});
