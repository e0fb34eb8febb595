//! Loading a kernel: image, initrd and command line into guest memory, boot parameters for the
//! protocol the image is entered by.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
};

use devices::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

pub mod handover;
pub mod image;

pub use handover::Registers;
use image::{BzImage, Elf, ElfEntry, Image, ImageError, ImageFile};

use crate::layout;

/// Limit for kernels that do not state one: `COMMAND_LINE_SIZE` of Linux on x86, without the zero.
const DEFAULT_COMMAND_LINE_MAX: u64 = 2047;
/// Where an initrd may end for kernels that do not state it.
const DEFAULT_INITRD_MAX: u64 = 0x37ff_ffff;
const PAGE: u64 = 4096;

/// What to boot.
#[derive(Debug, Clone, Default)]
pub struct BootConfig {
    /// Kernel image, bzImage or ELF.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub command_line: String,
}

/// A kernel could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file cannot be opened.
    #[error("--{option} {}: the file cannot be opened", path.display())]
    Open {
        /// `kernel` or `initrd`.
        option: &'static str,
        /// Its path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The path is a directory, socket or the like.
    #[error("--{option} {}: this is not a regular file", path.display())]
    NotAFile {
        /// `kernel` or `initrd`.
        option: &'static str,
        /// Its path.
        path: PathBuf,
    },
    /// The kernel image is no good.
    #[error("--kernel {}: the image cannot be booted", path.display())]
    Image {
        /// Its path.
        path: PathBuf,
        /// Why.
        #[source]
        source: ImageError,
    },
    /// The file changed or vanished while it was copied.
    #[error("--{option} {}: the file cannot be copied into guest memory", path.display())]
    Copy {
        /// `kernel` or `initrd`.
        option: &'static str,
        /// Its path.
        path: PathBuf,
        /// Why.
        #[source]
        source: vm_memory::GuestMemoryError,
    },
    /// The kernel does not fit.
    #[error(
        "--kernel {}: the kernel needs memory up to {needed} MiB; give --memory {suggestion} or more",
        path.display()
    )]
    KernelTooBig {
        /// Its path.
        path: PathBuf,
        /// MiB.
        needed: u64,
        /// MiB.
        suggestion: u64,
    },
    /// The kernel wants memory that can never be RAM.
    #[error("--kernel {}: a segment at {address:#x} lies outside of RAM", path.display())]
    Outside {
        /// Its path.
        path: PathBuf,
        /// Physical address.
        address: u64,
    },
    /// The initrd does not fit beside the kernel.
    #[error(
        "--initrd {}: {size} bytes do not fit beside the kernel in {available} bytes; \
         give --memory {suggestion} or more",
        path.display()
    )]
    InitrdTooBig {
        /// Its path.
        path: PathBuf,
        /// Bytes of the initrd.
        size: u64,
        /// Bytes there are.
        available: u64,
        /// MiB.
        suggestion: u64,
    },
    /// The command line is too long for this kernel.
    #[error("--cmdline: {length} bytes are too long, this kernel takes {limit}")]
    CommandLineTooLong {
        /// Bytes given.
        length: u64,
        /// Bytes allowed.
        limit: u64,
    },
    /// A zero byte would cut the command line off.
    #[error("--cmdline: contains a zero byte")]
    CommandLineZero,
    /// Boot structures cannot be written; RAM is laid out wrongly.
    #[error("boot structures cannot be written to guest memory")]
    Structures(#[source] vm_memory::GuestMemoryError),
}

/// Loads everything and returns the state the first processor starts in. `rsdp` is the guest
/// physical address of the ACPI root pointer.
pub fn load(
    memory: &GuestMemory,
    ram_size: u64,
    config: &BootConfig,
    rsdp: u64,
) -> Result<Registers, LoadError> {
    let (mut kernel, length) = open("kernel", &config.kernel)?;
    let source = ImageFile {
        file: kernel.try_clone().map_err(|s| open_error("kernel", &config.kernel, s))?,
        length,
    };
    let image = image::parse(&source)
        .map_err(|source| LoadError::Image { path: config.kernel.clone(), source })?;
    drop(source);
    let low_end = ram_size.min(layout::LOW_RAM_LIMIT);
    let limits = match &image {
        Image::BzImage(image) => Limits {
            kernel_start: image.preferred_address.max(layout::EXTENDED_MEMORY),
            kernel_end: image
                .preferred_address
                .max(layout::EXTENDED_MEMORY)
                .saturating_add(image.init_size),
            initrd_max: image.initrd_max,
            command_line: image.command_line_max,
        },
        Image::Elf(image) => elf_limits(image, &config.kernel, low_end)?,
    };
    if limits.kernel_end > low_end {
        let needed = limits.kernel_end.div_ceil(layout::MIB);
        return Err(LoadError::KernelTooBig {
            path: config.kernel.clone(),
            needed,
            suggestion: needed.next_multiple_of(16),
        });
    }
    write_command_line(memory, &config.command_line, limits.command_line)?;
    let initrd = match &config.initrd {
        Some(path) => Some(load_initrd(memory, path, &limits, low_end)?),
        None => None,
    };
    let boot = handover::Boot { ram_size, rsdp, initrd, command_line: config.command_line.len() };
    let copy = |memory: &GuestMemory, file: &mut File, address, offset, size| {
        copy_file(memory, file, address, offset, size).map_err(|source| LoadError::Copy {
            option: "kernel",
            path: config.kernel.clone(),
            source,
        })
    };
    match image {
        Image::BzImage(image) => {
            let start = limits.kernel_start;
            copy(memory, &mut kernel, start, image.payload_offset, image.payload_length)?;
            handover::linux64(memory, &boot, Some(&image), start + BzImage::ENTRY64)
        }
        Image::Elf(image) => {
            for segment in &image.segments {
                // Fresh memory is zero already, so only the file's part needs writing.
                copy(memory, &mut kernel, segment.address, segment.offset, segment.file_size)?;
            }
            match image.entry {
                ElfEntry::Pvh(entry) => handover::pvh(memory, &boot, entry),
                ElfEntry::Long(entry) => handover::linux64(memory, &boot, None, entry),
            }
        }
    }
    .map_err(LoadError::Structures)
}

impl BzImage {
    /// The 64-bit entry point, from the start of the protected-mode kernel.
    pub const ENTRY64: u64 = 0x200;
}

/// What an image demands of its surroundings.
struct Limits {
    kernel_start: u64,
    kernel_end: u64,
    initrd_max: u64,
    command_line: u64,
}

fn elf_limits(image: &Elf, path: &Path, low_end: u64) -> Result<Limits, LoadError> {
    let start = image.segments.iter().map(|s| s.address).min().unwrap_or(0);
    let end = image.segments.iter().map(|s| s.address + s.memory_size).max().unwrap_or(0);
    let outside = |address| LoadError::Outside { path: path.to_path_buf(), address };
    if start < layout::EXTENDED_MEMORY {
        return Err(outside(start));
    }
    if let Some(far) = image.segments.iter().find(|s| s.address >= low_end.max(layout::GIB)) {
        return Err(outside(far.address));
    }
    Ok(Limits {
        kernel_start: start,
        kernel_end: end,
        initrd_max: DEFAULT_INITRD_MAX.max(low_end - 1).min(0x7fff_ffff),
        command_line: DEFAULT_COMMAND_LINE_MAX,
    })
}

fn open_error(option: &'static str, path: &Path, source: io::Error) -> LoadError {
    LoadError::Open { option, path: path.to_path_buf(), source }
}

fn open(option: &'static str, path: &Path) -> Result<(File, u64), LoadError> {
    let file = File::open(path).map_err(|source| open_error(option, path, source))?;
    let metadata = file.metadata().map_err(|source| open_error(option, path, source))?;
    if !metadata.is_file() {
        return Err(LoadError::NotAFile { option, path: path.to_path_buf() });
    }
    Ok((file, metadata.len()))
}

fn copy_file(
    memory: &GuestMemory,
    file: &mut File,
    address: u64,
    offset: u64,
    size: u64,
) -> Result<(), vm_memory::GuestMemoryError> {
    io::Seek::seek(file, io::SeekFrom::Start(offset))
        .map_err(vm_memory::GuestMemoryError::IOError)?;
    // Straight from the page cache into guest memory: one copy.
    memory.read_exact_volatile_from(GuestAddress(address), file, size as usize)
}

fn write_command_line(memory: &GuestMemory, line: &str, limit: u64) -> Result<(), LoadError> {
    let limit = limit.min(layout::COMMAND_LINE_ROOM - 1);
    let length = line.len() as u64;
    if length > limit {
        return Err(LoadError::CommandLineTooLong { length, limit });
    }
    if line.contains('\0') {
        return Err(LoadError::CommandLineZero);
    }
    let address = GuestAddress(layout::COMMAND_LINE);
    memory.write_slice(line.as_bytes(), address).map_err(LoadError::Structures)?;
    memory
        .write_obj(0u8, GuestAddress(layout::COMMAND_LINE + length))
        .map_err(LoadError::Structures)
}

/// Puts the initrd as high as the kernel allows, page aligned. Returns address and size.
fn load_initrd(
    memory: &GuestMemory,
    path: &Path,
    limits: &Limits,
    low_end: u64,
) -> Result<(u64, u64), LoadError> {
    let (mut file, size) = open("initrd", path)?;
    let top = low_end.min(limits.initrd_max.saturating_add(1)) / PAGE * PAGE;
    let bottom = limits.kernel_end.next_multiple_of(PAGE);
    let available = top.saturating_sub(bottom);
    let too_big = || LoadError::InitrdTooBig {
        path: path.to_path_buf(),
        size,
        available,
        suggestion: (bottom + size).div_ceil(layout::MIB).next_multiple_of(16),
    };
    let padded = size.checked_next_multiple_of(PAGE).ok_or_else(too_big)?;
    if padded > available {
        return Err(too_big());
    }
    let address = top - padded;
    copy_file(memory, &mut file, address, 0, size).map_err(|source| LoadError::Copy {
        option: "initrd",
        path: path.to_path_buf(),
        source,
    })?;
    Ok((address, size))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::layout::MIB;

    fn machine(mib: u64) -> GuestMemory {
        crate::memory::allocate(mib, false).unwrap()
    }

    fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    fn config(kernel: &Path) -> BootConfig {
        BootConfig {
            kernel: kernel.to_path_buf(),
            initrd: None,
            command_line: "console=ttyS0".into(),
        }
    }

    #[test]
    fn bzimage_with_initrd() {
        let memory = machine(64);
        let kernel = file(&image::tests::bzimage(0x20f, 1, 64));
        let initrd = file(&[0xaa; 5000]);
        let mut config = config(kernel.path());
        config.initrd = Some(initrd.path().to_path_buf());
        let registers = load(&memory, 64 * MIB, &config, layout::ACPI).unwrap();
        assert_eq!(registers.rip(), 0x100_0200);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x100_0000)).unwrap(), 0x90);
        let zero_page = layout::ZERO_PAGE;
        let word = |offset| memory.read_obj::<u32>(GuestAddress(zero_page + offset)).unwrap();
        assert_eq!(word(0x218), (64 * MIB - 8192) as u32, "initrd address");
        assert_eq!(word(0x21c), 5000);
        assert_eq!(word(0x228), layout::COMMAND_LINE as u32);
        assert_eq!(word(0x70), layout::ACPI as u32);
        assert_eq!(word(0x202), u32::from_le_bytes(*b"HdrS"));
        assert_eq!(memory.read_obj::<u8>(GuestAddress(zero_page + 0x210)).unwrap(), 0xff);
    }

    #[test]
    fn errors_name_option_path_and_remedy() {
        let memory = machine(64);
        let text =
            |config: &BootConfig| load(&memory, 64 * MIB, config, 0).unwrap_err().to_string();
        let missing = config(Path::new("/nonexistent/vmlinuz"));
        assert!(text(&missing).starts_with("--kernel /nonexistent/vmlinuz:"));
        assert!(text(&config(Path::new("/"))).contains("not a regular file"));
        let mut big = image::tests::bzimage(0x20f, 1, 64);
        big[0x260..0x264].copy_from_slice(&0x400_0000u32.to_le_bytes());
        let big = file(&big);
        assert!(text(&config(big.path())).contains("give --memory 80 or more"));
        let mut far = image::tests::bzimage(0x20f, 1, 64);
        far[0x258..0x260].fill(0xff);
        let far = file(&far);
        assert!(text(&config(far.path())).contains("the kernel needs memory"), "no wrap around");
        let kernel = file(&image::tests::bzimage(0x20f, 1, 64));
        let mut long = config(kernel.path());
        long.command_line = "x".repeat(2048);
        assert_eq!(text(&long), "--cmdline: 2048 bytes are too long, this kernel takes 2047");
        let initrd = tempfile::NamedTempFile::new().unwrap();
        initrd.as_file().set_len(100 * MIB).unwrap();
        let mut fat = config(kernel.path());
        fat.initrd = Some(initrd.path().to_path_buf());
        let message = text(&fat);
        assert!(
            message.starts_with("--initrd") && message.contains("give --memory 128"),
            "{message}"
        );
    }
}
