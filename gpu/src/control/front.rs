//! The front end's side of the work: what it says, and pictures for it.

use std::{os::fd::OwnedFd, time::Instant};

use gpu_protocol::{
    Rect,
    frames::{Release, ShmScanout, Want},
    socket::{FromBackEnd, ProtocolFeatures},
    virtio::Refusal,
};
use vm_memory::VolatileSlice;

use super::{
    Control, Resources,
    blob::{self, Shared},
};
use crate::{
    link::Link,
    renderer::Renderer,
    scanout::{Pictures, Scanout, Source, Transport},
};

/// Pictures of resources, wherever they are.
struct Reader<'a> {
    renderer: &'a mut dyn Renderer,
    resources: &'a Resources,
    link: &'a Link,
    /// `None`: the front end reads no guest memory.
    shared: Option<&'a mut Shared>,
}

impl Pictures for Reader<'_> {
    fn share(&mut self, resource: u32) -> bool {
        let shared = self.shared.as_mut();
        shared.is_some_and(|shared| shared.share(resource, self.resources, self.link))
    }

    fn read(
        &mut self,
        source: &Source,
        part: Rect,
        target: &VolatileSlice<'_>,
        stride: usize,
    ) -> Result<(), Refusal> {
        match &source.blob {
            None => self.renderer.read_pixels(source.resource, part, target, stride),
            Some(layout) => {
                let resource =
                    self.resources.get(&source.resource).ok_or(Refusal::InvalidResource)?;
                blob::read_pixels(resource, layout, part, target, stride)
            }
        }
    }
}

/// The front end's side of the work.
impl Control {
    /// A GPU socket was connected: nothing is negotiated yet.
    pub fn connected(&mut self) {
        self.features = None;
        self.edids.clear();
        self.shared.clear();
        self.scanouts.iter_mut().for_each(Scanout::reconnect);
        self.link.send(&FromBackEnd::GetProtocolFeatures);
    }

    /// The front end offers these protocol features.
    pub fn negotiate(&mut self, offered: u64) {
        let known = ProtocolFeatures::EDID
            | ProtocolFeatures::SHM_FRAMES
            | ProtocolFeatures::GUEST_FRAMES
            | ProtocolFeatures::DEVICE_RESET
            | ProtocolFeatures::HOST_MEMORY;
        let features = ProtocolFeatures::from_bits_truncate(offered) & known;
        let knows = |feature| features.contains(feature);
        let path = if knows(ProtocolFeatures::SHM_FRAMES | ProtocolFeatures::GUEST_FRAMES) {
            "in shared memory; what is in guest memory is read there"
        } else if knows(ProtocolFeatures::SHM_FRAMES) {
            "in shared memory"
        } else {
            "through the socket (the front end offers no shared memory)"
        };
        tracing::info!(?features, "frames go {path}");
        self.link.send(&FromBackEnd::SetProtocolFeatures(features.bits()));
        self.features = Some(features);
        self.pump();
    }

    /// RESET_DEVICE has been carried out: the front end can tell what is about the next driver.
    pub fn tell_reset(&mut self) {
        if self.knows(ProtocolFeatures::DEVICE_RESET) {
            self.link.send(&FromBackEnd::DeviceReset);
        }
    }

    /// Whether the front end has agreed on a feature.
    pub(super) fn knows(&self, feature: ProtocolFeatures) -> bool {
        self.features.is_some_and(|features| features.contains(feature))
    }

    /// Whether [`negotiate`](Self::negotiate) has happened.
    pub fn is_negotiated(&self) -> bool {
        self.features.is_some()
    }

    /// SHM_SCANOUT arrived.
    pub fn set_slots(&mut self, layout: ShmScanout, fd: Option<OwnedFd>) {
        if let Some(scanout) = self.scanouts.get_mut(layout.scanout as usize) {
            scanout.set_slots(layout, fd);
            self.pump();
        }
    }

    /// RELEASE arrived.
    pub fn release(&mut self, release: &Release) {
        if let Some(scanout) = self.scanouts.get_mut(release.scanout as usize) {
            scanout.release(release);
            self.pump();
        }
    }

    /// WANT arrived.
    pub fn want(&mut self, want: &Want) {
        if let Some(scanout) = self.scanouts.get_mut(want.scanout as usize) {
            scanout.want(want);
            self.pump();
        }
    }

    /// Sends pictures as far as possible.
    pub fn pump(&mut self) {
        let transport =
            self.features.map(|features| match features.contains(ProtocolFeatures::SHM_FRAMES) {
                true => Transport::Shm,
                false => Transport::Update,
            });
        let in_guest = self.knows(ProtocolFeatures::GUEST_FRAMES);
        let mut pictures = Reader {
            renderer: &mut *self.renderer,
            resources: &self.resources,
            link: &self.link,
            shared: in_guest.then_some(&mut self.shared),
        };
        for (id, scanout) in self.scanouts.iter_mut().enumerate() {
            scanout.pump(id as u32, transport, &mut pictures, &self.link);
        }
    }

    /// When [`pump`](Self::pump) has to be called although nothing happens.
    pub fn deadline(&self) -> Option<Instant> {
        self.scanouts.iter().filter_map(Scanout::deadline).min()
    }
}
