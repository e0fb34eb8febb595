//! Guest RAM: one memfd, shared, so that back ends in other processes can map it.

use std::{fs::File, io};

use devices::GuestMemory;
use rustix::fs::{MemfdFlags, SealFlags};
use vm_memory::{FileOffset, GuestAddress};

use crate::layout::{self, MIB};

/// Smallest amount of RAM in MiB.
pub const MINIMUM_MIB: u64 = 64;

/// RAM could not be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Fewer than [`MINIMUM_MIB`].
    #[error("--memory {0}: a machine needs at least {MINIMUM_MIB} MiB")]
    TooSmall(u64),
    /// More than the host has.
    #[error("--memory {wanted}: this host has only {available} MiB")]
    TooLarge {
        /// MiB asked for.
        wanted: u64,
        /// MiB of the host.
        available: u64,
    },
    /// Not a multiple of the huge page size.
    #[error("--memory {0}: with --hugepages the size must be a multiple of 2 MiB")]
    Unaligned(u64),
    /// The memfd could not be made or sized.
    #[error("{0} MiB of guest memory cannot be allocated")]
    Allocate(u64, #[source] io::Error),
    /// The huge pages are not there.
    #[error(
        "--hugepages: {0} MiB of free 2 MiB huge pages are needed; \
         reserve them with 'sysctl vm.nr_hugepages=N'"
    )]
    HugePages(u64, #[source] io::Error),
    /// The memory could not be mapped.
    #[error("guest memory cannot be mapped")]
    Map(#[source] vm_memory::mmap::FromRangesError),
}

/// Checks a size without allocating anything.
pub fn validate(mib: u64, huge_pages: bool) -> Result<(), Error> {
    if mib < MINIMUM_MIB {
        return Err(Error::TooSmall(mib));
    }
    if huge_pages && !mib.is_multiple_of(2) {
        return Err(Error::Unaligned(mib));
    }
    let info = rustix::system::sysinfo();
    let available = (info.totalram as u64).saturating_mul(u64::from(info.mem_unit)) / MIB;
    if mib > available {
        return Err(Error::TooLarge { wanted: mib, available });
    }
    Ok(())
}

/// Allocates and maps `mib` MiB of RAM.
pub fn allocate(mib: u64, huge_pages: bool) -> Result<GuestMemory, Error> {
    validate(mib, huge_pages)?;
    let size = mib * MIB;
    let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    if huge_pages {
        flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    }
    let refused = |error: rustix::io::Errno| {
        if huge_pages {
            Error::HugePages(mib, error.into())
        } else {
            Error::Allocate(mib, error.into())
        }
    };
    let fd = rustix::fs::memfd_create("guest-ram", flags).map_err(refused)?;
    rustix::fs::ftruncate(&fd, size).map_err(refused)?;
    // Another process that has the memory must not be able to pull it away from under us.
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
        .map_err(refused)?;
    if huge_pages {
        // A missing huge page would be a SIGBUS later on; take them all now.
        rustix::fs::fallocate(&fd, rustix::fs::FallocateFlags::empty(), 0, size)
            .map_err(refused)?;
    }
    let file = std::sync::Arc::new(File::from(fd));
    let mut offset = 0;
    let ranges: Vec<_> = layout::ram(size)
        .into_iter()
        .map(|(start, length)| {
            let piece = FileOffset::from_arc(file.clone(), offset);
            offset += length;
            (GuestAddress(start), length as usize, Some(piece))
        })
        .collect();
    let memory = GuestMemory::from_ranges_with_files(ranges).map_err(Error::Map)?;
    crate::sys::advise_huge_pages(&memory);
    Ok(memory)
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion};

    use super::*;

    #[test]
    fn one_sealed_file_behind_all_pieces() {
        let memory = match allocate(3073, false) {
            Err(Error::TooLarge { available, .. }) => {
                println!("skipped: this host has {available} MiB");
                return;
            }
            other => other.unwrap(),
        };
        let offsets: Vec<_> = memory
            .iter()
            .map(|region| {
                let offset = region.file_offset().unwrap();
                let seals = rustix::fs::fcntl_get_seals(offset.file()).unwrap();
                assert!(seals.contains(SealFlags::SHRINK));
                (region.start_addr().0, offset.start())
            })
            .collect();
        assert_eq!(offsets, [(0, 0), (layout::HIGH_RAM, layout::LOW_RAM_LIMIT)]);
        memory.write_slice(b"end", GuestAddress(layout::HIGH_RAM + MIB - 3)).unwrap();
        memory.write_slice(b"x", GuestAddress(layout::LOW_RAM_LIMIT)).unwrap_err();
    }

    #[test]
    fn errors_name_the_option() {
        assert!(allocate(63, false).unwrap_err().to_string().starts_with("--memory 63:"));
        assert!(allocate(1 << 40, false).unwrap_err().to_string().contains("only"));
        assert!(allocate(65, true).unwrap_err().to_string().contains("multiple of 2"));
    }
}
