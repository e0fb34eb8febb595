//! The guest's shared memory region: what the back end shows in it.

use std::os::fd::{AsFd, OwnedFd};

use gpu_protocol::host_memory::{Map, Unmap};

use super::State;
use crate::virtio::shared_memory::MapError;

impl State {
    pub(super) fn forget_host_memory(&mut self) {
        self.mappings.clear();
        if let Some(region) = &self.region {
            region.unmap_all();
        }
    }

    /// Shows memory of the back end to the guest; the error is a number of Linux.
    pub(super) fn map(&mut self, map: &Map, fd: Option<OwnedFd>) -> Result<(), u32> {
        let region = self.region.as_ref().ok_or(libc::EOPNOTSUPP as u32)?;
        let fd = fd.ok_or(libc::EBADF as u32)?;
        region.map(map.offset, map.length, fd.as_fd(), map.file_offset).map_err(|error| {
            tracing::warn!(%error, offset = map.offset, length = map.length, "the GPU's memory stays unseen");
            match error {
                MapError::Place { .. } | MapError::Short { .. } | MapError::HugePages => {
                    libc::EINVAL as u32
                }
                MapError::InUse(_) => libc::EBUSY as u32,
                MapError::TooMany => libc::ENOMEM as u32,
                MapError::System(source) => source.raw_os_error().unwrap_or(libc::EIO) as u32,
            }
        })?;
        self.mappings.insert(map.offset, map.mapping);
        Ok(())
    }

    /// Takes a mapping out, if it is the one that is there.
    pub(super) fn unmap(&mut self, unmap: Unmap) {
        let Some(region) = &self.region else { return };
        if self.mappings.get(&unmap.offset) == Some(&unmap.mapping) {
            self.mappings.remove(&unmap.offset);
            region.unmap(unmap.offset);
        }
    }
}
