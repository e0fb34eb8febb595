//! Pictures that stay where the guest has them ([`gpu_protocol::guest_frames`]).

use std::{
    collections::HashMap,
    sync::{Arc, RwLock},
};

use gpu_protocol::{
    Rect,
    format::BYTES_PER_PIXEL,
    frames::MAX_SIZE,
    guest_frames::{self, GuestFrame, MAX_MEMORIES},
    socket::{FromFrontEnd, ProtocolFeatures},
};

use super::{
    Event, State,
    pictures::{clipped, picture_bytes},
};
use crate::{
    GuestMemory,
    virtio::gpu::frame::{Frame, GuestPixels, Shadow},
};

/// What of the guest's memory a back end has spoken of.
#[derive(Default)]
pub(super) struct Memories {
    /// `None`: there is no driver.
    guest: Option<GuestMemory>,
    resources: HashMap<u32, Arc<GuestPixels>>,
    /// Resets that the back end was asked for and has not told of: what it says of memory is about the
    /// driver before, whose messages may wait in the socket while the next one starts.
    resets: u32,
}

/// The last frame of a scanout, if it is in such memory.
pub(super) struct InGuest {
    resource: u32,
    pub(super) frame: Frame,
}

impl State {
    /// Guest memory as the driver has it.
    pub(super) fn set_guest_memory(&mut self, memory: Option<GuestMemory>) {
        self.memories.guest = memory;
    }

    /// The back end is about to be asked for a reset, of which it tells if it said that it does.
    pub(super) fn expect_reset(&mut self) {
        if self.knows(ProtocolFeatures::DEVICE_RESET) {
            self.memories.resets += 1;
        }
    }

    /// It has told of one. What it said before the first one that was expected was taken seriously where
    /// nobody knew yet that it would tell.
    pub(super) fn device_reset(&mut self) {
        match self.memories.resets.checked_sub(1) {
            Some(left) => self.memories.resets = left,
            None => self.forget_all_memory(),
        }
    }

    /// There is another back end, or none.
    pub(super) fn expect_no_reset(&mut self) {
        self.memories.resets = 0;
    }

    pub(super) fn guest_memory(&mut self, memory: guest_frames::GuestMemory) {
        let Some(guest) = self.memories.guest.as_ref().filter(|_| self.memories.resets == 0) else {
            return;
        };
        let resource = memory.resource;
        let Some(pixels) = GuestPixels::new(memory.pieces, guest) else {
            tracing::warn!(resource, "the GPU's back end speaks of memory that the guest has not");
            return;
        };
        self.forget(resource);
        if self.memories.resources.len() < MAX_MEMORIES {
            self.memories.resources.insert(resource, Arc::new(pixels));
        } else {
            tracing::warn!(resource, "the GPU's back end speaks of too many resources");
        }
    }

    pub(super) fn forget_memory(&mut self, resource: u32) {
        self.forget(resource);
        self.send(&FromFrontEnd::MemoryForgotten, None);
    }

    fn forget(&mut self, resource: u32) {
        let Some(pixels) = self.memories.resources.remove(&resource) else { return };
        pixels.forget();
        for scanout in &mut self.scanouts {
            scanout.in_guest.take_if(|last| last.resource == resource);
        }
    }

    /// When this returns nobody reads what back ends spoke of, and the guest may use it otherwise.
    pub(super) fn forget_all_memory(&mut self) {
        for (_, pixels) in self.memories.resources.drain() {
            pixels.forget();
        }
        self.scanouts.iter_mut().for_each(|scanout| scanout.in_guest = None);
    }

    /// The same, but what is shown stays to be seen, in memory of our own: the back end is gone.
    pub(super) fn keep_pictures(&mut self) {
        for (id, scanout) in self.scanouts.iter_mut().enumerate() {
            let Some(InGuest { frame, .. }) = scanout.in_guest.take() else { continue };
            let (width, height) = (frame.width(), frame.height());
            let Some(bytes) = picture_bytes(width, height) else { continue };
            let mut pixels = vec![0; bytes as usize];
            let whole = Rect::of_size(width, height);
            if frame.copy_rect(whole, &mut pixels, frame.stride() as usize).is_err() {
                continue;
            }
            let shadow = Arc::new(Shadow { pixels: RwLock::new(pixels) });
            scanout.shadow = Some(shadow.clone());
            scanout.sequence = scanout.sequence.wrapping_add(1);
            let frame = Frame::over_shadow(shadow, (width, height), scanout.sequence);
            self.events.push_back(Event::Frame(id as u32, frame, vec![whole]));
        }
        self.forget_all_memory();
    }

    /// `None` if there is nothing in it to be shown.
    pub(super) fn guest_frame(&mut self, frame: &GuestFrame) -> Option<()> {
        let scanout = self.scanouts.get_mut(frame.scanout as usize)?;
        let size = (frame.part.width, frame.part.height);
        let pixels = self.memories.resources.get(&frame.resource)?;
        let row = u64::from(frame.part.width) * u64::from(BYTES_PER_PIXEL);
        // With such numbers no offset overflows, and no byte belongs to two rows.
        let is_picture = frame.part.fits(MAX_SIZE, MAX_SIZE)
            && u64::from(frame.layout.stride) >= row
            && frame.layout.end_of(frame.part) <= pixels.len();
        if scanout.size != Some(size) || !is_picture {
            tracing::debug!(?frame, "a frame that is not in its memory, or of another size");
            return None;
        }
        let damage = clipped(&frame.damage, size.0, size.1);
        scanout.sequence = scanout.sequence_base.wrapping_add(frame.sequence);
        let picture = Frame::in_guest(pixels.clone(), frame.layout, frame.part, scanout.sequence);
        scanout.newest = None;
        scanout.in_guest = Some(InGuest { resource: frame.resource, frame: picture.clone() });
        let shown = (!damage.is_empty()).then_some(());
        self.events.push_back(Event::Frame(frame.scanout, picture, damage));
        shown
    }
}
