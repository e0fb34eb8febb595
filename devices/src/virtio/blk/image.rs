//! The file or block device behind a disk: opening, locking, and the operations on it.

use std::{
    fs::{File, OpenOptions},
    io::{self, Seek, SeekFrom},
    os::{
        fd::AsRawFd,
        unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    },
    path::Path,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};

use rustix::fs::{AtFlags, FallocateFlags, FlockOperation, StatxFlags};

use super::MODULE;
use crate::virtio::{pieces::Pieces, registry::BuildError};

/// The unit of addresses on the wire, whatever the block size (VIRTIO 1.3 §5.2.4).
pub(super) const SECTOR: u64 = 512;

/// How a disk is to be opened.
#[derive(Debug, Clone, Default)]
pub(super) struct ImageOptions {
    pub(super) read_only: bool,
    pub(super) direct: bool,
}

/// What direct I/O demands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Alignment {
    memory: usize,
    offset: u64,
}

/// An open disk image.
#[derive(Debug)]
pub(super) struct Image {
    name: String,
    /// Through the page cache.
    buffered: File,
    /// Past the page cache, and what that demands.
    direct: Option<(File, Alignment)>,
    /// Length in bytes when it was opened; the last sector may be partial.
    length: u64,
    read_only: bool,
    block_size: u32,
    /// Smallest unit that the file system allocates, as a hint for the guest.
    allocation_size: u32,
    can_discard: bool,
    /// Until the file system says otherwise, it can tell what is in the page cache.
    nowait_read: AtomicBool,
    nowait_write: AtomicBool,
    errors: AtomicU64,
    flushes: AtomicU64,
}

/// How far a transfer got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    /// All of it.
    Done,
    /// The rest would have to wait for the disk.
    WouldWait,
}

/// Which way a transfer goes, as the guest says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    Read,
    Write {
        /// Stable before it is reported done.
        stable: bool,
    },
}

impl Image {
    /// Opens and locks the file or block device at `path`.
    pub(super) fn open(path: &Path, options: &ImageOptions) -> Result<Self, BuildError> {
        let name = path.display().to_string();
        let host = |what: &str, source| BuildError::Host {
            option: MODULE.option,
            what: format!("'{name}' {what}"),
            source,
        };
        let open = |flags: i32| {
            OpenOptions::new()
                .read(true)
                .write(!options.read_only)
                .custom_flags(flags | libc::O_CLOEXEC)
                .open(path)
        };
        let file = open(0).map_err(|error| {
            let hint = match error.kind() {
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem
                    if !options.read_only =>
                {
                    "cannot be opened for writing (ro=on needs no write permission)"
                }
                _ => "cannot be opened",
            };
            host(hint, error)
        })?;
        let direct = if options.direct {
            let file = reopen(&file, options.read_only, libc::O_DIRECT)
                .or_else(|_| open(libc::O_DIRECT))
                .map_err(|error| host("does not support direct=on", error))?;
            Some(file)
        } else {
            None
        };
        Self::new(name, file, direct, options.read_only)
    }

    /// Takes an open file; `direct` is the same file opened with `O_DIRECT`.
    pub(super) fn new(
        name: String,
        mut buffered: File,
        direct: Option<File>,
        read_only: bool,
    ) -> Result<Self, BuildError> {
        let unusable = |reason: String| BuildError::Unusable { option: MODULE.option, reason };
        let host = |what: &str, source: io::Error| BuildError::Host {
            option: MODULE.option,
            what: format!("'{name}' {what}"),
            source,
        };
        let metadata = buffered.metadata().map_err(|error| host("cannot be examined", error))?;
        let kind = metadata.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(unusable(format!("'{name}' is neither a file nor a block device")));
        }
        lock(&buffered, read_only).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => unusable(format!(
                "'{name}' is in use by another virtual machine or program; a disk can be shared \
                 only if all of its users open it with ro=on"
            )),
            _ => host("cannot be locked", error),
        })?;
        // Works for files and for block devices, whose metadata says 0.
        let length = buffered
            .seek(SeekFrom::End(0))
            .map_err(|error| host("does not tell its size", error))?;
        if length == 0 {
            return Err(unusable(format!(
                "'{name}' is empty; give it a size first, for instance with 'truncate -s 10G'"
            )));
        }
        let (block_size, allocation_size) = if kind.is_block_device() {
            let logical = rustix::fs::ioctl_blksszget(&buffered).unwrap_or(SECTOR as u32);
            (logical, rustix::fs::ioctl_blkpbszget(&buffered).unwrap_or(logical))
        } else {
            // Partition tables in images count in 512-byte blocks.
            (SECTOR as u32, metadata.blksize().try_into().unwrap_or(u32::MAX))
        };
        let direct = direct.map(|file| {
            let alignment = alignment(&file, block_size);
            (file, alignment)
        });
        let can_discard = !read_only
            && (kind.is_block_device() || {
                // Beyond the end nothing changes, but the file system says whether it could.
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                let end = length.next_multiple_of(4096);
                rustix::fs::fallocate(&buffered, flags, end, 4096).is_ok()
            });
        Ok(Self {
            name,
            buffered,
            direct,
            length,
            read_only,
            block_size,
            allocation_size: allocation_unit(allocation_size, block_size),
            can_discard,
            nowait_read: AtomicBool::new(true),
            nowait_write: AtomicBool::new(true),
            errors: AtomicU64::new(0),
            flushes: AtomicU64::new(0),
        })
    }

    /// What it is called in the log.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Size in sectors; a partial one at the end counts and reads as if filled with zeros.
    pub(super) fn sectors(&self) -> u64 {
        self.length.div_ceil(SECTOR)
    }

    pub(super) fn read_only(&self) -> bool {
        self.read_only
    }

    pub(super) fn block_size(&self) -> u32 {
        self.block_size
    }

    pub(super) fn allocation_size(&self) -> u32 {
        self.allocation_size
    }

    pub(super) fn can_discard(&self) -> bool {
        self.can_discard
    }

    /// Whether `count` bytes at `offset` lie on the disk.
    pub(super) fn contains(&self, offset: u64, count: u64) -> bool {
        offset.checked_add(count).is_some_and(|end| end <= self.sectors() * SECTOR)
    }

    /// Moves data from or to the page cache as far as that needs no waiting.
    pub(super) fn try_transfer(
        &self,
        direction: Direction,
        offset: &mut u64,
        buffers: &mut Pieces,
    ) -> io::Result<Progress> {
        let possible = match direction {
            Direction::Read => &self.nowait_read,
            Direction::Write { stable: false } => &self.nowait_write,
            Direction::Write { stable: true } => return Ok(Progress::WouldWait),
        };
        if self.direct.is_some() || !possible.load(Ordering::Relaxed) {
            return Ok(Progress::WouldWait);
        }
        match self.move_all(direction, offset, buffers, libc::RWF_NOWAIT) {
            Ok(()) => Ok(Progress::Done),
            Err(error) => match error.raw_os_error() {
                Some(libc::EAGAIN) => Ok(Progress::WouldWait),
                Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL) => {
                    possible.store(false, Ordering::Relaxed);
                    Ok(Progress::WouldWait)
                }
                _ => Err(error),
            },
        }
    }

    /// Moves all that is left in `buffers`.
    pub(super) fn transfer(
        &self,
        direction: Direction,
        offset: &mut u64,
        buffers: &mut Pieces,
    ) -> io::Result<()> {
        self.move_all(direction, offset, buffers, 0)
    }

    fn move_all(
        &self,
        direction: Direction,
        offset: &mut u64,
        buffers: &mut Pieces,
        flags: libc::c_int,
    ) -> io::Result<()> {
        let mut refused = false;
        while buffers.len() > 0 {
            // What direct I/O cannot take goes through the page cache; the kernel keeps both views
            // of the file the same.
            let aligned = self.direct.as_ref().filter(|(_, alignment)| {
                !refused
                    && offset.is_multiple_of(alignment.offset)
                    && buffers.is_aligned(alignment.memory, alignment.offset as usize)
            });
            let file = aligned.map_or(&self.buffered, |(file, _)| file);
            let moved = match direction {
                Direction::Read => buffers.read_at(file, *offset, flags),
                Direction::Write { stable } => {
                    let stable = if stable { libc::RWF_DSYNC } else { 0 };
                    buffers.write_at(file, *offset, flags | stable)
                }
            };
            match moved {
                Ok(0) if direction == Direction::Read && *offset >= self.length => {
                    buffers.zero_rest();
                    return Ok(());
                }
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => {
                    buffers.consume(count);
                    *offset += count as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error)
                    if error.raw_os_error() == Some(libc::EINVAL)
                        && aligned.is_some()
                        && !refused =>
                {
                    refused = true;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Makes all completed writes stable.
    pub(super) fn flush(&self) -> io::Result<()> {
        if self.read_only {
            return Ok(());
        }
        rustix::fs::fdatasync(&self.buffered)?;
        self.flushes.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// How often all writes were made stable.
    pub(super) fn flushes(&self) -> u64 {
        self.flushes.load(Ordering::Relaxed)
    }

    /// Gives the storage of a range back; it reads as zeros or as before.
    pub(super) fn discard(&self, offset: u64, count: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(&self.buffered, flags, offset, count)?)
    }

    /// Makes a range read as zeros, and gives its storage back if `unmap` and that is possible.
    pub(super) fn write_zeroes(&self, offset: u64, count: u64, unmap: bool) -> io::Result<()> {
        if unmap && self.discard(offset, count).is_ok() {
            return Ok(());
        }
        let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        if rustix::fs::fallocate(&self.buffered, flags, offset, count).is_ok() {
            return Ok(());
        }
        const ZEROS: &[u8] = &[0; 64 << 10];
        let (mut offset, mut left) = (offset, count);
        while left > 0 {
            let piece = &ZEROS[..left.min(ZEROS.len() as u64) as usize];
            match rustix::io::pwrite(&self.buffered, piece, offset) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(done) => {
                    offset += done as u64;
                    left -= done as u64;
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Logs a failed operation; the log stays small however often it fails.
    pub(super) fn report(&self, what: &str, error: &io::Error) {
        let count = self.errors.fetch_add(1, Ordering::Relaxed) + 1;
        if count <= 8 || count.is_power_of_two() {
            tracing::error!(disk = self.name, count, %error, "{what} failed; the guest is told");
        }
    }
}

/// The unit to tell the guest. Network file systems report their transfer size, which is no unit
/// of allocation and may be no power of two either.
fn allocation_unit(reported: u32, block_size: u32) -> u32 {
    let plausible = reported.is_power_of_two() && reported <= 64 << 10;
    if plausible { reported } else { 4096 }.max(block_size)
}

/// Opens the same file once more; by its descriptor, so that a rename cannot come between.
fn reopen(file: &File, read_only: bool, flags: i32) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(!read_only)
        .custom_flags(flags | libc::O_CLOEXEC)
        .open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Writers exclude everybody, readers exclude writers. The lock goes with the descriptor.
fn lock(file: &File, read_only: bool) -> io::Result<()> {
    let operation = if read_only {
        FlockOperation::NonBlockingLockShared
    } else {
        FlockOperation::NonBlockingLockExclusive
    };
    match rustix::fs::flock(file, operation) {
        // A file system without locks leaves nothing to check.
        Err(rustix::io::Errno::NOSYS | rustix::io::Errno::NOTSUP | rustix::io::Errno::NOLCK) => {
            Ok(())
        }
        other => Ok(other?),
    }
}

/// What the kernel says about direct I/O on this file (Linux 6.1), or a safe guess.
fn alignment(file: &File, block_size: u32) -> Alignment {
    let stat = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
    if let Ok(stat) = stat
        && stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0
        && stat.stx_dio_mem_align > 0
        && stat.stx_dio_offset_align > 0
    {
        return Alignment {
            memory: stat.stx_dio_mem_align as usize,
            offset: stat.stx_dio_offset_align.into(),
        };
    }
    let size = block_size.max(4096);
    Alignment { memory: size as usize, offset: size.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn implausible_units_are_replaced() {
        assert_eq!(allocation_unit(4096, 512), 4096);
        assert_eq!(allocation_unit(512, 4096), 4096);
        assert_eq!(allocation_unit(507_904, 512), 4096, "9p with a message size of 500 KiB");
        assert_eq!(allocation_unit(1 << 20, 512), 4096, "NFS");
        assert_eq!(allocation_unit(0, 512), 4096);
    }
}
