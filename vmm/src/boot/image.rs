//! Recognising and checking kernel images.
//!
//! * bzImage: Linux `Documentation/arch/x86/boot.rst`, protocol 2.12 or later with a 64-bit entry.
//! * ELF: System V gABI; entered by PVH where the image carries a `XEN_ELFNOTE_PHYS32_ENTRY` note
//!   (Xen `docs/misc/pvh.pandoc`), otherwise at its entry point in 64-bit mode.
//!
//! Everything here only reads; [`super::load`] copies.

use std::{fs::File, io, os::unix::fs::FileExt};

use linux_loader::bootparam::setup_header;
use vm_memory::ByteValued;
use zerocopy::{FromBytes, Immutable, KnownLayout, little_endian as le};

/// Random access to an image, so that checks run on bytes as well as on files.
pub trait Source {
    /// Length in bytes.
    fn length(&self) -> u64;

    /// Fills `bytes` from `offset`.
    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()>;
}

impl Source for [u8] {
    fn length(&self) -> u64 {
        self.len() as u64
    }

    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let piece = usize::try_from(offset)
            .ok()
            .and_then(|start| self.get(start..start.checked_add(bytes.len())?))
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        bytes.copy_from_slice(piece);
        Ok(())
    }
}

/// A file of known length.
#[derive(Debug)]
pub struct ImageFile {
    /// The open file.
    pub file: File,
    /// Its length when it was opened.
    pub length: u64,
}

impl Source for ImageFile {
    fn length(&self) -> u64 {
        self.length
    }

    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(bytes, offset)
    }
}

/// What is wrong with a kernel image.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// Reading failed.
    #[error("the file cannot be read")]
    Read(#[source] io::Error),
    /// The file ends before something its headers promise.
    #[error("the file is truncated: {what} needs {needed} bytes, it has {length}")]
    Truncated {
        /// Which part is missing.
        what: &'static str,
        /// Bytes the file should have at least.
        needed: u64,
        /// Bytes it has.
        length: u64,
    },
    /// Neither bzImage nor ELF.
    #[error("this is neither a Linux bzImage nor an ELF image{0}")]
    Unknown(&'static str),
    /// For another processor.
    #[error("the image is for another machine type ({0}); x86-64 is needed")]
    WrongMachine(String),
    /// A bzImage that cannot be entered in 64-bit mode.
    #[error("the kernel has no 64-bit entry point (boot protocol {major}.{minor:02}): {reason}")]
    NoEntry64 {
        /// Protocol version, major.
        major: u8,
        /// Protocol version, minor.
        minor: u8,
        /// What is missing.
        reason: &'static str,
    },
    /// Headers that contradict themselves.
    #[error("the image is damaged: {0}")]
    Damaged(&'static str),
}

/// A checked bzImage.
#[derive(Debug, Clone, PartialEq)]
pub struct BzImage {
    /// The setup header, from file offset `0x1f1`.
    pub setup_header: setup_header,
    /// File offset of the protected-mode kernel.
    pub payload_offset: u64,
    /// Its length.
    pub payload_length: u64,
    /// Where it wants to be.
    pub preferred_address: u64,
    /// Memory it needs from there on until it is up.
    pub init_size: u64,
    /// Highest address of the last byte of an initrd.
    pub initrd_max: u64,
    /// Longest command line without its zero.
    pub command_line_max: u64,
}

/// One loadable piece of an ELF image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Physical address.
    pub address: u64,
    /// Offset in the file.
    pub offset: u64,
    /// Bytes to copy from the file.
    pub file_size: u64,
    /// Bytes in memory; what the file does not give is zero.
    pub memory_size: u64,
}

/// How to enter an ELF image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ElfEntry {
    /// 32-bit protected mode without paging, `ebx` points to the start info.
    Pvh(u32),
    /// 64-bit mode with identity mapping, `rsi` points to the Linux boot parameters.
    Long(u64),
}

/// A checked ELF image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Elf {
    /// What to load, in file order.
    pub segments: Vec<Segment>,
    /// Where to start.
    pub entry: ElfEntry,
}

/// A checked kernel image.
#[derive(Debug, Clone, PartialEq)]
pub enum Image {
    /// Compressed Linux kernel.
    BzImage(BzImage),
    /// Executable, such as `vmlinux`.
    Elf(Elf),
}

/// Offset of the setup header in a bzImage.
pub const SETUP_HEADER: u64 = 0x1f1;
const SECTOR: u64 = 512;
/// `loadflags`: the protected-mode code goes to 1 MiB (a "big" zImage).
const LOADED_HIGH: u8 = 1 << 0;
/// `xloadflags`: there is a 64-bit entry point at offset `0x200`.
const XLF_KERNEL_64: u16 = 1 << 0;
const PROTOCOL_2_12: u16 = 0x020c;

#[derive(FromBytes, KnownLayout, Immutable)]
#[repr(C)]
struct ElfHeader {
    magic: [u8; 4],
    class: u8,
    data: u8,
    ident: [u8; 10],
    kind: le::U16,
    machine: le::U16,
    version: le::U32,
    entry: le::U64,
    program_offset: le::U64,
    section_offset: le::U64,
    flags: le::U32,
    header_size: le::U16,
    program_size: le::U16,
    program_count: le::U16,
    section_size: le::U16,
    section_count: le::U16,
    names: le::U16,
}

#[derive(FromBytes, KnownLayout, Immutable)]
#[repr(C)]
struct ProgramHeader {
    kind: le::U32,
    flags: le::U32,
    offset: le::U64,
    virtual_address: le::U64,
    physical_address: le::U64,
    file_size: le::U64,
    memory_size: le::U64,
    align: le::U64,
}

const ELF_MAGIC: [u8; 4] = *b"\x7fELF";
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const MACHINE_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// `XEN_ELFNOTE_PHYS32_ENTRY`.
const NOTE_PHYS32_ENTRY: u32 = 18;
/// Kernels have half a dozen; more than this is not a kernel.
const MAX_PROGRAM_HEADERS: u16 = 128;
/// Kernels have less than a kilobyte of notes.
const MAX_NOTES: u64 = 64 * 1024;

fn read<T: FromBytes>(
    source: &(impl Source + ?Sized),
    offset: u64,
    what: &'static str,
) -> Result<T, ImageError> {
    let mut bytes = vec![0; size_of::<T>()];
    read_bytes(source, offset, &mut bytes, what)?;
    T::read_from_bytes(&bytes).map_err(|_| ImageError::Damaged(what))
}

fn read_bytes(
    source: &(impl Source + ?Sized),
    offset: u64,
    bytes: &mut [u8],
    what: &'static str,
) -> Result<(), ImageError> {
    check_end(source, offset, bytes.len() as u64, what)?;
    source.read_at(offset, bytes).map_err(ImageError::Read)
}

fn check_end(
    source: &(impl Source + ?Sized),
    offset: u64,
    size: u64,
    what: &'static str,
) -> Result<(), ImageError> {
    let length = source.length();
    match offset.checked_add(size) {
        Some(needed) if needed <= length => Ok(()),
        needed => Err(ImageError::Truncated { what, needed: needed.unwrap_or(u64::MAX), length }),
    }
}

/// Recognises an image and checks that all of it is there.
pub fn parse(source: &(impl Source + ?Sized)) -> Result<Image, ImageError> {
    let mut magic = [0; 4];
    read_bytes(source, 0, &mut magic, "the file header")?;
    if magic == ELF_MAGIC {
        return parse_elf(source).map(Image::Elf);
    }
    const MAGIC_OFFSET: u64 = 0x202;
    let mut setup_magic = [0; 4];
    if read_bytes(source, MAGIC_OFFSET, &mut setup_magic, "").is_ok() && setup_magic == *b"HdrS" {
        return parse_bzimage(source).map(Image::BzImage);
    }
    Err(match magic {
        // An arm64 Image and PE executables start with "MZ"; the former has "ARM\x64" at 56.
        [b'M', b'Z', ..] => {
            let mut arm = [0; 4];
            match source.read_at(56, &mut arm) {
                Ok(()) if arm == *b"ARM\x64" => ImageError::WrongMachine("arm64".to_owned()),
                _ => ImageError::Unknown(" (it looks like an EFI program)"),
            }
        }
        [0x1f, 0x8b, ..] => ImageError::Unknown(" (it is gzip data: unpack it first)"),
        [0x28, 0xb5, 0x2f, 0xfd] => ImageError::Unknown(" (it is zstd data: unpack it first)"),
        _ => ImageError::Unknown(""),
    })
}

fn parse_bzimage(source: &(impl Source + ?Sized)) -> Result<BzImage, ImageError> {
    let mut header = setup_header::default();
    read_bytes(source, SETUP_HEADER, header.as_mut_slice(), "the setup header")?;
    let version = u16::from_le(header.version);
    let no_entry = |reason| ImageError::NoEntry64 {
        major: (version >> 8) as u8,
        minor: version as u8,
        reason,
    };
    if version < PROTOCOL_2_12 {
        return Err(no_entry("version 2.12 or later is needed"));
    }
    if header.loadflags & LOADED_HIGH == 0 {
        return Err(no_entry("it is a zImage"));
    }
    if u16::from_le(header.xloadflags) & XLF_KERNEL_64 == 0 {
        return Err(no_entry("it is a 32-bit kernel"));
    }
    let setup_sectors = match header.setup_sects {
        0 => 4,
        sectors => u64::from(sectors),
    };
    let payload_offset = (setup_sectors + 1) * SECTOR;
    // `syssize` counts 16-byte paragraphs. Signed images have more behind it.
    let payload_length = u64::from(u32::from_le(header.syssize)) * 16;
    check_end(source, payload_offset, payload_length, "the compressed kernel")?;
    if payload_length == 0 {
        return Err(ImageError::Damaged("there is no compressed kernel in it"));
    }
    let init_size = u64::from(u32::from_le(header.init_size));
    if init_size < payload_length {
        return Err(ImageError::Damaged("its init_size is smaller than the file"));
    }
    Ok(BzImage {
        payload_offset,
        payload_length,
        preferred_address: u64::from_le(header.pref_address),
        init_size,
        initrd_max: u64::from(u32::from_le(header.initrd_addr_max)),
        command_line_max: u64::from(u32::from_le(header.cmdline_size)),
        setup_header: header,
    })
}

fn parse_elf(source: &(impl Source + ?Sized)) -> Result<Elf, ImageError> {
    let header: ElfHeader = read(source, 0, "the ELF header")?;
    if header.class != CLASS_64 || header.data != LITTLE_ENDIAN {
        return Err(ImageError::WrongMachine("not 64-bit little endian".to_owned()));
    }
    if header.machine.get() != MACHINE_X86_64 {
        return Err(ImageError::WrongMachine(format!("ELF machine {}", header.machine)));
    }
    if usize::from(header.program_size.get()) != size_of::<ProgramHeader>() {
        return Err(ImageError::Damaged("its program headers have an unknown size"));
    }
    if header.program_count.get() > MAX_PROGRAM_HEADERS {
        return Err(ImageError::Damaged("it has too many program headers"));
    }
    let mut segments = Vec::new();
    let mut pvh = None;
    for index in 0..u64::from(header.program_count.get()) {
        let offset = header
            .program_offset
            .get()
            .checked_add(index * size_of::<ProgramHeader>() as u64)
            .ok_or(ImageError::Damaged("its program headers wrap around"))?;
        let program: ProgramHeader = read(source, offset, "a program header")?;
        match program.kind.get() {
            PT_LOAD if program.memory_size.get() > 0 => {
                let segment = Segment {
                    address: program.physical_address.get(),
                    offset: program.offset.get(),
                    file_size: program.file_size.get(),
                    memory_size: program.memory_size.get(),
                };
                check_end(source, segment.offset, segment.file_size, "a segment")?;
                if segment.file_size > segment.memory_size
                    || segment.address.checked_add(segment.memory_size).is_none()
                {
                    return Err(ImageError::Damaged("a segment has an impossible size"));
                }
                segments.push(segment);
            }
            PT_NOTE if pvh.is_none() => {
                let size = program.file_size.get();
                if size > MAX_NOTES {
                    return Err(ImageError::Damaged("its notes are too long"));
                }
                let mut notes = vec![0; size as usize];
                read_bytes(source, program.offset.get(), &mut notes, "a note segment")?;
                pvh = find_pvh_entry(&notes, program.align.get());
            }
            _ => {}
        }
    }
    if segments.is_empty() {
        return Err(ImageError::Damaged("there is nothing to load in it"));
    }
    let entry = match pvh {
        Some(address) => ElfEntry::Pvh(address),
        None => ElfEntry::Long(header.entry.get()),
    };
    let address = match entry {
        ElfEntry::Pvh(address) => u64::from(address),
        ElfEntry::Long(address) => address,
    };
    let inside = |s: &Segment| address >= s.address && address - s.address < s.file_size;
    if !segments.iter().any(inside) {
        return Err(ImageError::Damaged("its entry point lies outside of what it loads"));
    }
    Ok(Elf { segments, entry })
}

/// Walks a note segment: name size, description size, type, then name and description, each padded
/// to the segment's alignment.
fn find_pvh_entry(mut notes: &[u8], align: u64) -> Option<u32> {
    let align = if align == 8 { 8 } else { 4 };
    let word = |bytes: &[u8], at: usize| {
        bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes)
    };
    loop {
        let name_size = word(notes, 0)? as usize;
        let description_size = word(notes, 4)? as usize;
        let kind = word(notes, 8)?;
        let name = notes.get(12..)?.get(..name_size)?;
        let start = 12usize.checked_add(name_size)?.checked_next_multiple_of(align)?;
        let description = notes.get(start..)?.get(..description_size)?;
        if kind == NOTE_PHYS32_ENTRY && name == b"Xen\0" {
            // 4 or 8 bytes wide; an entry above 4 GiB cannot be meant for 32-bit mode.
            return match description_size {
                4 => word(description, 0),
                8 if word(description, 4)? == 0 => word(description, 0),
                _ => None,
            };
        }
        let end = start.checked_add(description_size)?.checked_next_multiple_of(align)?;
        notes = notes.get(end..)?;
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A minimal ELF image with one segment, and a PVH note if `pvh` is given.
    pub(crate) fn elf(code: &[u8], address: u64, entry: u64, pvh: Option<u32>) -> Vec<u8> {
        let count = 1 + u64::from(pvh.is_some());
        let notes_at = 64 + 56 * count;
        let note: Vec<u8> = pvh.map_or_else(Vec::new, |address| {
            let mut note = Vec::new();
            for word in [4, 4, NOTE_PHYS32_ENTRY] {
                note.extend_from_slice(&word.to_le_bytes());
            }
            note.extend_from_slice(b"Xen\0");
            note.extend_from_slice(&address.to_le_bytes());
            note
        });
        let code_at = notes_at + note.len() as u64;
        let mut image = Vec::new();
        image.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
        image.extend_from_slice(&2u16.to_le_bytes());
        image.extend_from_slice(&MACHINE_X86_64.to_le_bytes());
        image.extend_from_slice(&1u32.to_le_bytes());
        for word in [entry, 64, 0] {
            image.extend_from_slice(&word.to_le_bytes());
        }
        image.extend_from_slice(&0u32.to_le_bytes());
        for half in [64u16, 56, count as u16, 0, 0, 0] {
            image.extend_from_slice(&half.to_le_bytes());
        }
        let mut header = |kind: u32, offset: u64, address: u64, size: u64, memory: u64| {
            image.extend_from_slice(&kind.to_le_bytes());
            image.extend_from_slice(&7u32.to_le_bytes());
            for word in [offset, address, address, size, memory, 4] {
                image.extend_from_slice(&word.to_le_bytes());
            }
        };
        header(PT_LOAD, code_at, address, code.len() as u64, code.len() as u64 + 4096);
        if pvh.is_some() {
            header(PT_NOTE, notes_at, 0, note.len() as u64, note.len() as u64);
        }
        image.extend_from_slice(&note);
        image.extend_from_slice(code);
        image
    }

    /// A bzImage header with a payload of `paragraphs` × 16 bytes.
    pub(crate) fn bzimage(version: u16, xloadflags: u16, paragraphs: u32) -> Vec<u8> {
        let mut image = vec![0u8; 1024];
        image[0x1f1] = 1;
        image[0x1f4..0x1f8].copy_from_slice(&paragraphs.to_le_bytes());
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&version.to_le_bytes());
        image[0x211] = LOADED_HIGH;
        image[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
        image[0x236..0x238].copy_from_slice(&xloadflags.to_le_bytes());
        image[0x238..0x23c].copy_from_slice(&2047u32.to_le_bytes());
        image[0x258..0x260].copy_from_slice(&0x100_0000u64.to_le_bytes());
        image[0x260..0x264].copy_from_slice(&0x10_0000u32.to_le_bytes());
        image.resize(1024 + paragraphs as usize * 16, 0x90);
        image
    }

    #[test]
    fn bzimage_fields() {
        let Image::BzImage(image) = parse(bzimage(0x20f, 1, 64).as_slice()).unwrap() else {
            panic!("not a bzImage")
        };
        assert_eq!(image.payload_offset, 1024);
        assert_eq!(image.payload_length, 1024);
        assert_eq!(image.preferred_address, 0x100_0000);
        assert_eq!(image.initrd_max, 0x7fff_ffff);
        assert_eq!(image.command_line_max, 2047);
    }

    #[test]
    fn elf_entries() {
        let code = [0xf4; 16];
        let Image::Elf(image) = parse(elf(&code, 0x10_0000, 0x10_0004, None).as_slice()).unwrap()
        else {
            panic!("not an ELF")
        };
        assert_eq!(image.entry, ElfEntry::Long(0x10_0004));
        assert_eq!(image.segments[0].memory_size, 16 + 4096);
        let pvh = elf(&code, 0x10_0000, 0, Some(0x10_0008));
        let Image::Elf(image) = parse(pvh.as_slice()).unwrap() else { panic!("not an ELF") };
        assert_eq!(image.entry, ElfEntry::Pvh(0x10_0008));
    }

    #[test]
    fn exact_errors() {
        let text = |bytes: &[u8]| parse(bytes).unwrap_err().to_string();
        assert_eq!(text(b""), "the file is truncated: the file header needs 4 bytes, it has 0");
        assert_eq!(text(&[7; 4096]), "this is neither a Linux bzImage nor an ELF image");
        assert!(text(&[0x1f, 0x8b, 8, 0]).contains("gzip"));
        let mut arm = b"MZ".to_vec();
        arm.resize(4096, 0);
        arm[56..60].copy_from_slice(b"ARM\x64");
        assert!(text(&arm).contains("arm64"));
        let mut short = bzimage(0x20f, 1, 64);
        short.pop();
        assert_eq!(
            text(&short),
            "the file is truncated: the compressed kernel needs 2048 bytes, it has 2047"
        );
        assert!(text(&bzimage(0x20a, 1, 64)).contains("boot protocol 2.10"));
        assert!(text(&bzimage(0x20f, 0, 64)).contains("32-bit kernel"));
        let mut other = elf(&[0x90; 4], 0x10_0000, 0x10_0000, None);
        other[18] = 0xb7;
        assert!(text(&other).contains("ELF machine 183"));
        let outside = elf(&[0x90; 4], 0x10_0000, 0x20_0000, None);
        assert!(text(&outside).contains("entry point"));
        let mut cut = elf(&[0x90; 4], 0x10_0000, 0x10_0000, None);
        cut.pop();
        assert!(text(&cut).contains("truncated: a segment"));
    }

    #[test]
    fn no_prefix_or_flip_of_an_image_panics() {
        for image in [elf(&[0xf4; 8], 1 << 20, 0, Some(1 << 20)), bzimage(0x20f, 1, 4)] {
            for length in 0..image.len() {
                let _ = parse(&image[..length]);
            }
            for byte in 0..image.len() {
                for value in [0, 0x7f, 0xff] {
                    let mut flipped = image.clone();
                    flipped[byte] = value;
                    let _ = parse(flipped.as_slice());
                }
            }
        }
    }
}
