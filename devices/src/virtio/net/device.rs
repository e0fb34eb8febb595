//! Configuration space and life cycle of the card.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError, atomic::Ordering},
    time::Instant,
};

use super::{
    backend::{Backend, Link, Stream},
    control::{self, Allowance, Control, Switch},
    kernel::KernelPair,
    mac::MacAddress,
    passt::Passt,
    tap::Tap,
    worker::{Counters, NetWorker},
};
use crate::{
    GuestMemory,
    virtio::{
        ActivateError, Activation, ActiveQueue, DeviceType, RING_FEATURES, VirtioDevice,
        VirtioInterrupt, ring::Ring, vhost::Faults, worker::Worker,
    },
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
const CTRL_VQ: u32 = 17;
const MQ: u32 = 22;

/// What a backend needs the virtio header for.
const OFFLOADS: &[u32] =
    &[CSUM, GUEST_CSUM, GUEST_TSO4, GUEST_TSO6, GUEST_ECN, HOST_TSO4, HOST_TSO6, HOST_ECN];

/// VIRTIO_NET_S_LINK_UP.
const LINK_UP: u16 = 1;

/// Of each queue, also the control queue.
const QUEUE_SIZE: u16 = 256;

/// The device.
pub(super) struct Net {
    mac: MacAddress,
    mtu: Option<u16>,
    features: u64,
    link: Arc<Link>,
    queue_sizes: Vec<u16>,
    /// One for each pair of queues, with several of them.
    switches: Vec<Arc<Switch>>,
    /// One for each pair of queues, while it has no worker.
    backends: Vec<Option<Backend>>,
    workers: Vec<Worker<NetWorker>>,
    control: Option<Worker<Control>>,
    /// What the driver may still change about the interface.
    allowance: Arc<Mutex<Allowance>>,
    /// Serve the queues in place of workers, if there are any.
    kernel: Vec<KernelPair>,
    /// While the kernel serves them.
    running: Option<Worker<Faults>>,
    counters: Arc<Counters>,
    passt: Option<Passt>,
}

impl Net {
    /// A card on the queues of a tap interface, which the kernel serves if `kernel` is not empty.
    pub(super) fn tap(
        taps: Vec<Tap>,
        kernel: Vec<KernelPair>,
        link: Arc<Link>,
        mac: MacAddress,
        mtu: Option<u16>,
    ) -> io::Result<Self> {
        let mut features = 0;
        if taps.iter().all(Tap::has_header) {
            features = OFFLOADS.iter().fold(features, |bits, bit| bits | 1 << bit);
        }
        let mut switches = Vec::new();
        if taps.len() > 1 {
            features |= 1 << CTRL_VQ | 1 << MQ;
            for tap in &taps {
                switches.push(Arc::new(Switch::new(tap.file().try_clone()?.into())?));
            }
        }
        let backends: Vec<_> = taps.into_iter().map(|tap| Some(Backend::Tap(tap))).collect();
        let mut net = Self::new(backends, link, mac, mtu, features);
        net.switches = switches;
        for pair in &kernel {
            let both = RING_FEATURES | 1 << MRG_RXBUF;
            net.features &= !both | pair.features();
        }
        net.kernel = kernel;
        Ok(net)
    }

    /// A card on a stream socket, which `passt` serves.
    pub(super) fn stream(
        passt: Option<Passt>,
        link: Arc<Link>,
        mac: MacAddress,
        mtu: Option<u16>,
    ) -> Self {
        let backend = Backend::Stream(Stream::new(link.clone()));
        let mut net = Self::new(vec![Some(backend)], link, mac, mtu, 0);
        net.passt = passt;
        net
    }

    /// The process behind the card.
    #[cfg(test)]
    pub(super) fn passt_id(&self) -> Option<u32> {
        self.passt.as_ref().and_then(Passt::id)
    }

    fn new(
        backends: Vec<Option<Backend>>,
        link: Arc<Link>,
        mac: MacAddress,
        mtu: Option<u16>,
        features: u64,
    ) -> Self {
        let mtu_bit = if mtu.is_some() { 1 << MTU } else { 0 };
        let own = 1 << MAC | 1 << STATUS | 1 << MRG_RXBUF;
        let control = usize::from(features & (1 << CTRL_VQ) != 0);
        let allowance = Allowance::new(backends.len(), Instant::now());
        Self {
            mac,
            mtu,
            allowance: Arc::new(Mutex::new(allowance)),
            features: RING_FEATURES | own | mtu_bit | features,
            link,
            queue_sizes: vec![QUEUE_SIZE; 2 * backends.len() + control],
            switches: Vec::new(),
            backends,
            workers: Vec::new(),
            control: None,
            kernel: Vec::new(),
            running: None,
            counters: Arc::default(),
            passt: None,
        }
    }

    /// Whether the driver may start the card: that changes the interface, which keeps everybody waiting
    /// who does anything about the host's network.
    fn may_start(&self) -> Result<(), ActivateError> {
        let taps = self.backends.iter().flatten();
        let taps = taps.filter(|backend| matches!(backend, Backend::Tap(_))).count();
        let switches = &self.switches;
        let changes = if self.kernel.is_empty() {
            control::changes(switches, 1)
        } else {
            control::changes(switches, switches.len()) + switches.len().saturating_sub(1)
        };
        let mut allowance = self.allowance.lock().unwrap_or_else(PoisonError::into_inner);
        if allowance.take(taps + changes, Instant::now()) {
            return Ok(());
        }
        Err(ActivateError::Driver("it is started too often".to_owned()))
    }

    /// Has the kernel serve the pairs.
    fn start_kernel(
        &mut self,
        features: u64,
        memory: &GuestMemory,
        queues: &[ActiveQueue],
        interrupt: &Arc<dyn VirtioInterrupt>,
    ) -> Result<(), ActivateError> {
        let backend = |error| ActivateError::Backend(format!("vhost-net: {error}"));
        let faults = Faults::new("net", interrupt)
            .map_err(|error| ActivateError::Host("a network card's broken rings", error))?;
        let mut started = Ok(());
        for (number, (pair, backend)) in self.kernel.iter().zip(&self.backends).enumerate() {
            let find = |index| queues.iter().find(|active| usize::from(active.index) == index);
            let (Some(Backend::Tap(tap)), Some(receive), Some(transmit)) =
                (backend, find(2 * number), find(2 * number + 1))
            else {
                continue;
            };
            let queues = [receive, transmit];
            started = pair.start(features, memory, queues, tap.file(), interrupt, &faults);
            if started.is_err() {
                break;
            }
        }
        // Before any error: what was started has to be stopped.
        self.running = Some(faults.start().map_err(backend)?);
        started.map_err(backend)
    }

    /// Serves a pair by a thread of our own.
    fn start_worker(
        &mut self,
        number: usize,
        rings: (Option<Ring>, Option<Ring>),
        mergeable: bool,
    ) -> Result<(), ActivateError> {
        let Some(backend) = self.backends.get_mut(number).and_then(Option::take) else {
            return Err(ActivateError::Backend("its worker had failed before".to_owned()));
        };
        let (link, counters) = (self.link.clone(), self.counters.clone());
        let switch = self.switches.get(number).cloned();
        let worker = NetWorker::new(backend, rings.0, rings.1, mergeable, link, switch, counters);
        let worker = Worker::spawn("vio-net", worker)
            .map_err(|error| ActivateError::Host("a network card's worker thread", error))?;
        self.workers.push(worker);
        Ok(())
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> DeviceType {
        DeviceType::NET
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut space = [0; 12];
        space[..6].copy_from_slice(&self.mac.0);
        let status = if self.link.is_up() { LINK_UP } else { 0 };
        space[6..8].copy_from_slice(&status.to_le_bytes());
        space[8..10].copy_from_slice(&(self.backends.len() as u16).to_le_bytes());
        space[10..12].copy_from_slice(&self.mtu.unwrap_or_default().to_le_bytes());
        let rest = usize::try_from(offset).ok().and_then(|offset| space.get(offset..));
        for (to, from) in data.iter_mut().zip(rest.unwrap_or_default()) {
            *to = *from;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, features, queues, interrupt } = activation;
        self.may_start()?;
        for backend in self.backends.iter().flatten() {
            if let Backend::Tap(tap) = backend {
                tap.set_features(features)
                    .map_err(|error| ActivateError::Host("the tap interface's offloads", error))?;
            }
        }
        let pairs = if features & (1 << MQ) != 0 { self.backends.len() } else { 1 };
        let no_queue = |error| ActivateError::Host("the tap interface's queues", error);
        if !self.kernel.is_empty() {
            // The kernel takes no queue that is not in use.
            control::use_pairs(&self.switches, self.switches.len()).map_err(no_queue)?;
            self.start_kernel(features, &memory, &queues, &interrupt)?;
        }
        // Until the driver says how many pairs it uses it is one.
        control::use_pairs(&self.switches, 1).map_err(no_queue)?;
        let memory = Arc::new(memory);
        let mut rings: Vec<Option<Ring>> = (0..=2 * pairs).map(|_| None).collect();
        for active in queues {
            if let Some(ring) = rings.get_mut(usize::from(active.index)) {
                *ring = Some(Ring::new("net", active, &memory, &interrupt));
            }
        }
        if let Some(ring) = rings.pop().flatten()
            && features & (1 << CTRL_VQ) != 0
        {
            let switches = self.switches[..pairs].to_vec();
            let control = Control::new(ring, switches, self.allowance.clone());
            let control = Worker::spawn("vio-net-ctrl", control)
                .map_err(|error| ActivateError::Host("a network card's control thread", error))?;
            self.control = Some(control);
        }
        self.link.set_interrupt(Some(interrupt));
        if self.kernel.is_empty() {
            let mergeable = features & (1 << MRG_RXBUF) != 0;
            let mut rings = rings.into_iter();
            for number in 0..pairs {
                let pair = (rings.next().flatten(), rings.next().flatten());
                self.start_worker(number, pair, mergeable)?;
            }
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.link.set_interrupt(None);
        if let Some(control) = self.control.take() {
            control.stop();
        }
        if self.running.take().is_some() {
            for pair in &self.kernel {
                if let Err(error) = pair.stop() {
                    tracing::error!(%error, "the kernel does not let go of a card's queues");
                }
            }
        }
        for (backend, worker) in self.backends.iter_mut().zip(self.workers.drain(..)) {
            *backend = worker.stop().map(|worker| worker.into_backend());
        }
        let lost = self.counters.receive_dropped.swap(0, Ordering::Relaxed)
            + self.counters.transmit_dropped.swap(0, Ordering::Relaxed);
        if lost > 0 {
            tracing::info!(mac = %self.mac, lost, "packets were lost");
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
