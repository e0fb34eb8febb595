//! What the guest shows: the sizes of its pictures, and frames of them.

use std::{
    fs::File,
    io,
    os::fd::OwnedFd,
    sync::{Arc, PoisonError, RwLock, Weak},
};

use gpu_protocol::{
    Rect,
    format::BYTES_PER_PIXEL,
    frames::{self, MAX_SIZE, ShmScanout},
    socket::FromFrontEnd,
};
use rustix::fs::{MemfdFlags, SealFlags};

use super::{Display, Event, State};
use crate::virtio::gpu::frame::{Frame, Shadow, SlotMemory};

/// Slots per scanout: one that is drawn, one on its way, one that is read.
const SLOTS: u32 = 3;

/// Largest picture that gets memory: 8K at 4 bytes per pixel, and half as much again.
const MAX_PICTURE: u64 = 192 << 20;

impl State {
    pub(super) fn set_size(&mut self, id: u32, size: Option<(u32, u32)>) {
        let shm = self.has_shm();
        // Nobody is told of a picture that nobody could show.
        let size = size.filter(|(width, height)| {
            let fits = picture_bytes(*width, *height).is_some();
            if !fits && !std::mem::replace(&mut self.warned_size, true) {
                tracing::error!(width, height, "the guest's picture is too large to be shown");
            }
            fits
        });
        let Some(scanout) = self.scanouts.get_mut(id as usize) else { return };
        // The picture of a new back end that takes over: nothing changes but the memory.
        let taken_over = std::mem::take(&mut scanout.stale) && size.is_some();
        let same = scanout.size == size;
        // Also where the next picture is as large: it comes in another way.
        scanout.dmabuf = None;
        if same && !taken_over {
            return;
        }
        scanout.size = size;
        scanout.slots = None;
        scanout.newest = None;
        scanout.in_guest = None;
        scanout.held = 0;
        let old_shadow = scanout.shadow.take().filter(|_| same);
        scanout.generation = scanout.generation.wrapping_add(1);
        let generation = scanout.generation;
        if !same {
            self.events.push_back(Event::Scanout(id, size));
        }
        let Some((width, height)) = size else { return };
        let Some(bytes) = picture_bytes(width, height) else { return };
        if shm {
            let made = ShmScanout::layout(id, generation, width, height, SLOTS)
                .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))
                .and_then(make_slots);
            match made {
                Ok((memory, fd)) => {
                    let layout = *memory.layout();
                    if let Some(scanout) = self.scanouts.get_mut(id as usize) {
                        scanout.slots = Some(Arc::new(memory));
                    }
                    self.send(&FromFrontEnd::ShmScanout(layout), Some(fd));
                }
                Err(error) => tracing::error!(%error, "no memory for the guest's picture"),
            }
        } else if let Some(scanout) = self.scanouts.get_mut(id as usize) {
            let shadow = old_shadow.unwrap_or_else(|| {
                let pixels = RwLock::new(vec![0; bytes as usize]);
                Arc::new(Shadow { pixels })
            });
            scanout.shadow = Some(shadow);
            scanout.full = scanout.max_fps > 0;
        }
    }

    pub(super) fn update(&mut self, id: u32, rect: Rect, pixels: &[u8]) {
        let Some(scanout) = self.scanouts.get_mut(id as usize) else { return };
        let (Some(shadow), Some((width, height))) = (&scanout.shadow, scanout.size) else { return };
        if rect.is_empty() || !rect.fits(width, height) {
            tracing::debug!(?rect, width, height, "an update outside its scanout is ignored");
            return;
        }
        let row = rect.width as usize * BYTES_PER_PIXEL as usize;
        let stride = width as usize * BYTES_PER_PIXEL as usize;
        let first = rect.y as usize * stride + rect.x as usize * BYTES_PER_PIXEL as usize;
        {
            let mut target = shadow.pixels.write().unwrap_or_else(PoisonError::into_inner);
            for (line, source) in pixels.chunks_exact(row).enumerate() {
                let start = first + line * stride;
                if let Some(target) = target.get_mut(start..start + row) {
                    target.copy_from_slice(source);
                }
            }
        }
        if scanout.max_fps > 0 {
            scanout.sequence = scanout.sequence.wrapping_add(1);
            let damage = match std::mem::take(&mut scanout.full) {
                true => Rect::of_size(width, height),
                false => rect,
            };
            let frame = Frame::over_shadow(shadow.clone(), (width, height), scanout.sequence);
            self.events.push_back(Event::Frame(id, frame, vec![damage]));
        }
    }

    /// Makes the complete frames that were asked for and that no back end will send.
    pub(super) fn full_frames(&mut self, owner: &Weak<Display>) {
        let alive = self.socket.is_some();
        for (id, scanout) in self.scanouts.iter_mut().enumerate() {
            let Some((width, height)) = scanout.size.filter(|_| scanout.full) else { continue };
            let frame = if let Some(shadow) = scanout.shadow.clone() {
                let is_new = scanout.read_dmabuf(Rect::of_size(width, height));
                if scanout.dmabuf.is_some() && !is_new {
                    // With its next update, then all of it.
                    continue;
                }
                scanout.sequence = scanout.sequence.wrapping_add(1);
                Frame::over_shadow(shadow, (width, height), scanout.sequence)
            } else if alive {
                continue;
            } else if let Some(last) = &scanout.in_guest {
                last.frame.clone()
            } else if let (Some(memory), Some((slot, sequence))) = (&scanout.slots, scanout.newest)
            {
                Frame::in_slot(memory.clone(), slot, sequence, owner.clone())
            } else {
                continue;
            };
            scanout.full = false;
            let damage = vec![Rect::of_size(width, height)];
            self.events.push_back(Event::Frame(id as u32, frame, damage));
        }
    }

    /// `None` if there is nothing in it to be shown.
    pub(super) fn frame(&mut self, frame: &frames::Frame, owner: &Weak<Display>) -> Option<()> {
        let scanout = self.scanouts.get_mut(frame.scanout as usize)?;
        let memory = scanout.slots.clone()?;
        let layout = *memory.layout();
        if frame.generation != layout.generation {
            // Sent before the back end saw the memory for the new size.
            return None;
        }
        let bit = 1 << frame.slot.min(31);
        if frame.slot >= layout.slots || scanout.held & bit != 0 {
            tracing::debug!(slot = frame.slot, "a frame in a slot that is not the back end's");
            return None;
        }
        let damage = clipped(&frame.damage, layout.width, layout.height);
        scanout.held |= bit;
        let sequence = scanout.sequence_base.wrapping_add(frame.sequence);
        scanout.sequence = sequence;
        scanout.newest = Some((frame.slot, sequence));
        scanout.in_guest = None;
        let picture = Frame::in_slot(memory, frame.slot, sequence, owner.clone());
        let shown = (!damage.is_empty()).then_some(());
        self.events.push_back(Event::Frame(frame.scanout, picture, damage));
        shown
    }
}

/// What of the rectangles is in a picture of that size.
pub(super) fn clipped(damage: &[Rect], width: u32, height: u32) -> Vec<Rect> {
    let picture = Rect::of_size(width, height);
    let parts = damage.iter().map(|rect| rect.intersection(&picture));
    parts.filter(|rect| !rect.is_empty()).collect()
}

/// Bytes of a picture, if it is one that gets memory.
pub(super) fn picture_bytes(width: u32, height: u32) -> Option<u64> {
    let sides = 1..=MAX_SIZE;
    if !sides.contains(&width) || !sides.contains(&height) {
        return None;
    }
    let bytes = u64::from(width) * u64::from(height) * u64::from(BYTES_PER_PIXEL);
    (bytes <= MAX_PICTURE).then_some(bytes)
}

/// Makes the memory for frames; the descriptor is for the back end.
fn make_slots(layout: ShmScanout) -> io::Result<(SlotMemory, OwnedFd)> {
    let size = layout.checked_size().ok_or(io::ErrorKind::InvalidInput)?;
    let fd = rustix::fs::memfd_create(
        "drago-gpu-frames",
        MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
    )?;
    rustix::fs::ftruncate(&fd, size)?;
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    let memory = SlotMemory::map(layout, File::from(fd.try_clone()?))?;
    Ok((memory, fd))
}
