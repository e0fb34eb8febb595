//! Pictures that a back end which is not ours has in a dmabuf (DMABUF_SCANOUT).
//!
//! Where the memory is linear, is mapped: what changed is copied from it when somebody looks, in between
//! for the one who watches and the back end does not wait longer than for that. Other layouts belong to
//! one GPU, whose driver we do not have. Only files that cannot shrink are mapped, or a back end could end
//! this process by cutting one off.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
    sync::PoisonError,
};

use gpu_protocol::{Rect, format::BYTES_PER_PIXEL, socket::DmabufScanout};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::SealFlags,
};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

use super::{Event, State};
use crate::virtio::gpu::{
    frame::{Frame, Shadow},
    sys,
};

/// `DMA_BUF_MAGIC` of `linux/magic.h`.
const DMA_BUF_MAGIC: u64 = 0x444d_4142;
/// `TMPFS_MAGIC` of `linux/magic.h`: memfds, but for those of huge pages, which cannot be unmapped in part.
const TMPFS_MAGIC: u64 = 0x0102_1994;
/// `DRM_FORMAT_MOD_LINEAR` of `drm_fourcc.h`.
const LINEAR: u64 = 0;
/// `DRM_FORMAT_MOD_INVALID`: the layout was not said.
const NOT_SAID: u64 = 0x00ff_ffff_ffff_ffff;
/// How long to wait for a GPU that still draws into the buffer. The state is locked for that long.
const DRAWN: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
/// In `fd_flags`: row 0 of the memory is the bottom one of the picture.
const Y_0_TOP: u32 = 1;

/// The order of a pixel's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    Bgr,
    Rgb,
}

/// Why a dmabuf cannot be shown.
#[derive(Debug, thiserror::Error)]
pub(super) enum DmabufError {
    #[error("no descriptor came with it")]
    NoFile,
    #[error("its layout {0:#x} is a GPU's own")]
    Layout(u64),
    #[error("its format {} is not one of XR24, AR24, XB24 and AB24", name(*.0))]
    Format(u32),
    #[error("the picture does not lie in the buffer")]
    Geometry,
    #[error("the file is neither a dmabuf nor sealed against shrinking")]
    NotDmabuf,
    #[error("it cannot be mapped")]
    System(#[source] io::Error),
}

/// A fourcc's letters.
fn name(fourcc: u32) -> String {
    fourcc.to_le_bytes().map(|byte| char::from(byte).escape_default().to_string()).concat()
}

/// A picture in memory of somebody else's.
pub(super) struct Dmabuf {
    file: File,
    memory: MmapRegion,
    order: Order,
    upside_down: bool,
    stride: usize,
    /// The shown part of the buffer.
    part: Rect,
    height: u32,
}

impl Dmabuf {
    /// Maps it.
    pub(super) fn open(
        scanout: &DmabufScanout,
        modifier: Option<u64>,
        fd: Option<OwnedFd>,
    ) -> Result<Self, DmabufError> {
        let fd = fd.ok_or(DmabufError::NoFile)?;
        let modifier = modifier.filter(|modifier| ![LINEAR, NOT_SAID].contains(modifier));
        if let Some(layout) = modifier {
            return Err(DmabufError::Layout(layout));
        }
        let order = match &scanout.fd_drm_fourcc.to_le_bytes() {
            b"XR24" | b"AR24" => Order::Bgr,
            b"XB24" | b"AB24" => Order::Rgb,
            _ => return Err(DmabufError::Format(scanout.fd_drm_fourcc)),
        };
        let (width, height) = (scanout.fd_width, scanout.fd_height);
        let stride = u64::from(scanout.fd_stride);
        if !scanout.rect.fits(width, height)
            || stride < u64::from(width) * u64::from(BYTES_PER_PIXEL)
        {
            return Err(DmabufError::Geometry);
        }
        let size = stride * u64::from(height.saturating_sub(1))
            + u64::from(width) * u64::from(BYTES_PER_PIXEL);
        let system = |error: rustix::io::Errno| DmabufError::System(error.into());
        let kind = rustix::fs::fstatfs(&fd).map_err(system)?.f_type;
        let sealed = || {
            kind as u64 == TMPFS_MAGIC
                && rustix::fs::fcntl_get_seals(&fd)
                    .is_ok_and(|seals| seals.contains(SealFlags::SHRINK))
        };
        if kind as u64 != DMA_BUF_MAGIC && !sealed() {
            return Err(DmabufError::NotDmabuf);
        }
        let there = rustix::fs::seek(&fd, rustix::fs::SeekFrom::End(0)).map_err(system)?;
        if there < size {
            return Err(DmabufError::Geometry);
        }
        let file = File::from(fd);
        let mapped = file.try_clone().map_err(DmabufError::System)?;
        let (protection, flags) = (libc::PROT_READ, libc::MAP_SHARED);
        let offset = Some(FileOffset::new(mapped, 0));
        let memory = MmapRegion::build(offset, size as usize, protection, flags)
            .map_err(|error| DmabufError::System(io::Error::other(error)))?;
        Ok(Self {
            file,
            memory,
            order,
            upside_down: scanout.fd_flags & Y_0_TOP != 0,
            stride: stride as usize,
            part: scanout.rect,
            height,
        })
    }

    /// Waits, but not for ever, until nobody draws into it any more; a copy would wait without end.
    fn is_drawn(&self) -> bool {
        let mut fds = [PollFd::new(&self.file, PollFlags::IN)];
        matches!(poll(&mut fds, Some(&DRAWN)), Ok(1..))
    }

    /// Copies what is in `rect` of the picture to the same place of `target`, which is as big as the
    /// shown part and has B, G, R and a byte without meaning.
    fn copy(&self, rect: Rect, target: &mut [u8]) {
        // Memory that is none of a device's needs no such call, and does not know it.
        let _ = sys::reads(self.file.as_fd(), true);
        let pixel = BYTES_PER_PIXEL as usize;
        let (row, pitch) = (rect.width as usize * pixel, self.part.width as usize * pixel);
        for line in rect.y..rect.y + rect.height {
            let y = self.part.y + line;
            let y = if self.upside_down { self.height - 1 - y } else { y } as usize;
            let from = y * self.stride + (self.part.x + rect.x) as usize * pixel;
            let to = line as usize * pitch + rect.x as usize * pixel;
            let (Ok(source), Some(target)) =
                (self.memory.get_slice(from, row), target.get_mut(to..to + row))
            else {
                continue;
            };
            if source.read_slice(target, 0).is_ok() && self.order == Order::Rgb {
                target.chunks_exact_mut(pixel).for_each(|bytes| bytes.swap(0, 2));
            }
        }
        let _ = sys::reads(self.file.as_fd(), false);
    }
}

impl State {
    /// The picture is in a dmabuf from now on.
    pub(super) fn set_dmabuf(
        &mut self,
        scanout: &DmabufScanout,
        modifier: Option<u64>,
        fd: Option<OwnedFd>,
    ) {
        let id = scanout.scanout;
        let size = (scanout.rect.width, scanout.rect.height);
        let size = (size.0 > 0 && size.1 > 0).then_some(size);
        // Of that size, with memory of ours.
        self.set_size(id, size);
        let Some(target) = self.scanouts.get_mut(id as usize) else { return };
        if target.size.is_none() {
            return;
        }
        match Dmabuf::open(scanout, modifier, fd) {
            Ok(dmabuf) => {
                target.dmabuf = Some(dmabuf);
                target.full = target.max_fps > 0;
            }
            Err(error) => {
                if !std::mem::replace(&mut self.warned_dmabuf, true) {
                    tracing::warn!(
                        "the GPU's back end has its picture in memory that cannot be shown ({}): \
                         start it without 3D (QEMU's vhost-user-gpu: without --virgl)",
                        with_cause(&error)
                    );
                }
            }
        }
    }

    /// What is in the dmabuf has changed there.
    pub(super) fn dmabuf_update(&mut self, id: u32, rect: Rect) {
        let Some(scanout) = self.scanouts.get_mut(id as usize) else { return };
        let Some((width, height)) = scanout.size else { return };
        let Some(part) = scanout.dmabuf.as_ref().map(|dmabuf| dmabuf.part) else { return };
        // Rectangles are the buffer's.
        let rect = rect.intersection(&part);
        if scanout.max_fps == 0 || rect.is_empty() {
            return;
        }
        let changed = Rect { x: rect.x - part.x, y: rect.y - part.y, ..rect };
        let damage = match std::mem::take(&mut scanout.full) {
            true => Rect::of_size(width, height),
            false => changed,
        };
        if !scanout.read_dmabuf(damage) {
            // With the next one all of it.
            scanout.full = true;
            return;
        }
        scanout.sequence = scanout.sequence.wrapping_add(1);
        if let Some(shadow) = &scanout.shadow {
            let frame = Frame::over_shadow(shadow.clone(), (width, height), scanout.sequence);
            self.events.push_back(Event::Frame(id, frame, vec![damage]));
        }
    }
}

impl super::Scanout {
    /// Brings the picture's own memory up to date; `false` if it is in no dmabuf, or the GPU has not
    /// finished with it.
    pub(super) fn read_dmabuf(&self, rect: Rect) -> bool {
        let (Some(dmabuf), Some(shadow)) = (&self.dmabuf, &self.shadow) else { return false };
        let Shadow { pixels } = &**shadow;
        if !dmabuf.is_drawn() {
            return false;
        }
        dmabuf.copy(rect, &mut pixels.write().unwrap_or_else(PoisonError::into_inner));
        true
    }
}

fn with_cause(error: &dyn std::error::Error) -> String {
    error.source().map_or_else(|| error.to_string(), |cause| format!("{error}: {cause}"))
}
