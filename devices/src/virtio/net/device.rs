//! Configuration space and life cycle of the card.

use std::sync::{Arc, atomic::Ordering};

use super::{
    backend::{Backend, Link, Stream},
    mac::MacAddress,
    passt::Passt,
    tap::Tap,
    worker::{Counters, NetWorker, RECEIVE_QUEUE, TRANSMIT_QUEUE},
};
use crate::virtio::{
    ActivateError, Activation, DeviceType, RING_FEATURES, VirtioDevice, ring::Ring, worker::Worker,
};

// Feature bits, §5.1.3.
const CSUM: u32 = 0;
pub(super) const GUEST_CSUM: u32 = 1;
const MTU: u32 = 3;
const MAC: u32 = 5;
pub(super) const GUEST_TSO4: u32 = 7;
pub(super) const GUEST_TSO6: u32 = 8;
pub(super) const GUEST_ECN: u32 = 9;
const HOST_TSO4: u32 = 11;
const HOST_TSO6: u32 = 12;
const HOST_ECN: u32 = 13;
pub(super) const MRG_RXBUF: u32 = 15;
const STATUS: u32 = 16;

/// What a backend needs the virtio header for.
const OFFLOADS: &[u32] =
    &[CSUM, GUEST_CSUM, GUEST_TSO4, GUEST_TSO6, GUEST_ECN, HOST_TSO4, HOST_TSO6, HOST_ECN];

/// VIRTIO_NET_S_LINK_UP.
const LINK_UP: u16 = 1;

const QUEUE_SIZES: [u16; 2] = [256, 256];

/// The device.
pub(super) struct Net {
    mac: MacAddress,
    mtu: Option<u16>,
    features: u64,
    link: Arc<Link>,
    /// While there is no worker.
    backend: Option<Backend>,
    worker: Option<Worker<NetWorker>>,
    counters: Arc<Counters>,
    passt: Option<Passt>,
}

impl Net {
    /// A card on a tap interface.
    pub(super) fn tap(tap: Tap, link: Arc<Link>, mac: MacAddress, mtu: Option<u16>) -> Self {
        let offloads = if tap.has_header() { OFFLOADS } else { &[] };
        let offloads = offloads.iter().fold(0, |bits, bit| bits | 1 << bit);
        Self::new(Backend::Tap(tap), link, mac, mtu, offloads)
    }

    /// A card on a stream socket, which `passt` serves.
    pub(super) fn stream(
        passt: Option<Passt>,
        link: Arc<Link>,
        mac: MacAddress,
        mtu: Option<u16>,
    ) -> Self {
        let backend = Backend::Stream(Stream::new(link.clone()));
        let mut net = Self::new(backend, link, mac, mtu, 0);
        net.passt = passt;
        net
    }

    /// The process behind the card.
    #[cfg(test)]
    pub(super) fn passt_id(&self) -> Option<u32> {
        self.passt.as_ref().and_then(Passt::id)
    }

    fn new(
        backend: Backend,
        link: Arc<Link>,
        mac: MacAddress,
        mtu: Option<u16>,
        offloads: u64,
    ) -> Self {
        let mtu_bit = if mtu.is_some() { 1 << MTU } else { 0 };
        let own = 1 << MAC | 1 << STATUS | 1 << MRG_RXBUF;
        Self {
            mac,
            mtu,
            features: RING_FEATURES | own | mtu_bit | offloads,
            link,
            backend: Some(backend),
            worker: None,
            counters: Arc::default(),
            passt: None,
        }
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> DeviceType {
        DeviceType::NET
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut space = [0; 12];
        space[..6].copy_from_slice(&self.mac.0);
        let status = if self.link.is_up() { LINK_UP } else { 0 };
        space[6..8].copy_from_slice(&status.to_le_bytes());
        // One pair of queues, whether or not the driver looks.
        space[8..10].copy_from_slice(&1u16.to_le_bytes());
        space[10..12].copy_from_slice(&self.mtu.unwrap_or_default().to_le_bytes());
        let rest = usize::try_from(offset).ok().and_then(|offset| space.get(offset..));
        for (to, from) in data.iter_mut().zip(rest.unwrap_or_default()) {
            *to = *from;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, features, queues, interrupt } = activation;
        let Some(backend) = self.backend.take() else {
            return Err(ActivateError::Backend("its worker had failed before".to_owned()));
        };
        if let Backend::Tap(tap) = &backend
            && let Err(error) = tap.set_features(features)
        {
            self.backend = Some(backend);
            return Err(ActivateError::Host("the tap interface's offloads", error));
        }
        let memory = Arc::new(memory);
        let (mut receive, mut transmit) = (None, None);
        for active in queues {
            let index = active.index;
            let ring = Ring::new("net", active, &memory, &interrupt);
            match index {
                RECEIVE_QUEUE => receive = Some(ring),
                TRANSMIT_QUEUE => transmit = Some(ring),
                _ => {}
            }
        }
        self.link.set_interrupt(Some(interrupt));
        let mergeable = features & (1 << MRG_RXBUF) != 0;
        let (link, counters) = (self.link.clone(), self.counters.clone());
        let worker = NetWorker::new(backend, receive, transmit, mergeable, link, counters);
        let worker = Worker::spawn("vio-net", worker)
            .map_err(|error| ActivateError::Host("a network card's worker thread", error))?;
        self.worker = Some(worker);
        Ok(())
    }

    fn reset(&mut self) {
        self.link.set_interrupt(None);
        if let Some(worker) = self.worker.take() {
            self.backend = worker.stop().map(|worker| worker.into_backend());
            let lost = self.counters.receive_dropped.load(Ordering::Relaxed)
                + self.counters.transmit_dropped.load(Ordering::Relaxed);
            if lost > 0 {
                tracing::info!(mac = %self.mac, lost, "packets lost so far");
            }
        }
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        self.reset();
        if let Some(passt) = self.passt.take() {
            passt.stop();
        }
    }
}
