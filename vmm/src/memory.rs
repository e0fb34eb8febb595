//! Guest RAM: one shared file without a name, so that back ends in other processes can map it.

use std::{fs::File, io};

use devices::GuestMemory;
use rustix::fs::{MemfdFlags, SealFlags};
use vm_memory::{FileOffset, GuestAddress};

use crate::{
    huge,
    layout::{self, MIB},
};

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
    /// The file could not be made or sized.
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
    let file = if huge_pages {
        reserved(size).map_err(|error| Error::HugePages(mib, error.into()))?
    } else {
        shared(size).map_err(|error| Error::Allocate(mib, error.into()))?
    };
    let file = std::sync::Arc::new(file);
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

/// What [`warm_up`] takes at most, in bytes: what a kernel uses until its init runs.
const WARM: u64 = 256 * MIB;

/// Has the first part of RAM cleared while the guest's first processor, alone at first, unpacks its
/// kernel: it finds its pages there instead of waiting for each of them. Only with huge pages, which
/// take long to clear; failure is of no consequence.
pub fn warm_up(memory: &GuestMemory) {
    if huge::setting() == huge::Setting::Denied {
        return;
    }
    let memory = memory.clone();
    let work = move || crate::sys::populate(&memory, WARM);
    if let Err(error) = host::threads::spawn("warm-up", work) {
        tracing::debug!(%error, "guest memory is cleared as it is used");
    }
}

/// A file of pages that were set aside for programs that ask for them.
fn reserved(size: u64) -> rustix::io::Result<File> {
    let file = memfd(size, MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB)?;
    // A missing huge page would be a SIGBUS later on; take them all now.
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, size)?;
    Ok(file)
}

/// A file of huge pages where the host lets us have them, else of small ones.
fn shared(size: u64) -> rustix::io::Result<File> {
    if huge::setting() == huge::Setting::OwnFileSystem {
        match huge::file() {
            Ok(file) => {
                rustix::fs::ftruncate(&file, size)?;
                return Ok(file);
            }
            Err(error) => tracing::debug!(%error, "guest memory will be made of small pages"),
        }
    }
    memfd(size, MemfdFlags::empty())
}

fn memfd(size: u64, flags: MemfdFlags) -> rustix::io::Result<File> {
    let flags = flags | MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = rustix::fs::memfd_create("guest-ram", flags)?;
    rustix::fs::ftruncate(&fd, size)?;
    // Another process that has the memory must not be able to pull it away from under us.
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(fd.into())
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion};

    use super::*;

    #[test]
    fn one_file_behind_all_pieces() {
        let memory = match allocate(3073, false) {
            Err(Error::TooLarge { available, .. }) => {
                println!("SKIPPED: this host has {available} MiB");
                return;
            }
            other => other.unwrap(),
        };
        let offsets: Vec<_> = memory
            .iter()
            .map(|region| {
                let offset = region.file_offset().unwrap();
                (region.start_addr().0, offset.start())
            })
            .collect();
        assert_eq!(offsets, [(0, 0), (layout::HIGH_RAM, layout::LOW_RAM_LIMIT)]);
        memory.write_slice(b"end", GuestAddress(layout::HIGH_RAM + MIB - 3)).unwrap();
        memory.write_slice(b"x", GuestAddress(layout::LOW_RAM_LIMIT)).unwrap_err();
    }

    #[test]
    fn nobody_shortens_a_memfd() {
        let file = memfd(MIB, MemfdFlags::empty()).unwrap();
        file.set_len(0).unwrap_err();
        file.set_len(2 * MIB).unwrap_err();
    }

    #[test]
    fn errors_name_the_option() {
        assert!(allocate(63, false).unwrap_err().to_string().starts_with("--memory 63:"));
        assert!(allocate(1 << 40, false).unwrap_err().to_string().contains("only"));
        assert!(allocate(65, true).unwrap_err().to_string().contains("multiple of 2"));
    }
}
