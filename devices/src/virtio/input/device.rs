//! Configuration space, worker and handle of an input device.

use std::{
    fmt, io,
    io::{Read, Write},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{
    InputEvent, InputKind,
    codes::*,
    config::TABLET_MAX,
    queue::{EventQueue, Group},
};
use crate::virtio::{
    ActivateError, Activation, DeviceType, RING_FEATURES, VirtioDevice, ring::Ring, worker::Worker,
};

/// Events to the driver, and status (lights) from it.
const EVENT_QUEUE: u16 = 0;
const STATUS_QUEUE: u16 = 1;
/// Linux never gives more than 64 buffers.
const QUEUE_SIZES: [u16; 2] = [64, 64];

/// Selectors of configuration space (§5.8.4).
mod select {
    pub(super) const ID_NAME: u8 = 0x01;
    pub(super) const ID_SERIAL: u8 = 0x02;
    pub(super) const ID_DEVIDS: u8 = 0x03;
    pub(super) const EV_BITS: u8 = 0x11;
    pub(super) const ABS_INFO: u8 = 0x12;
}

/// Bytes before and of the selected information.
const CONFIG_HEADER: usize = 8;
const CONFIG_PAYLOAD: usize = 128;

/// The lights of a keyboard.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Leds {
    /// Num lock.
    pub num_lock: bool,
    /// Caps lock.
    pub caps_lock: bool,
    /// Scroll lock.
    pub scroll_lock: bool,
}

type LedListener = Box<dyn Fn(Leds) + Send + Sync>;

struct Shared {
    kind: InputKind,
    state: Mutex<State>,
    led_listener: Mutex<Option<LedListener>>,
    wake: EventFd,
}

struct State {
    queue: EventQueue,
    /// A driver is there.
    active: bool,
    leds: Leds,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_leds(&self, leds: Leds) {
        if std::mem::replace(&mut self.state().leds, leds) == leds {
            return;
        }
        let listener = self.led_listener.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(listener) = &*listener {
            listener(leds);
        }
    }

    fn set_active(&self, active: bool) {
        let mut state = self.state();
        state.active = active;
        state.queue.clear();
    }
}

/// Sends events to the guest. Clones are the same device.
#[derive(Clone)]
pub struct InputHandle(Arc<Shared>);

impl fmt::Debug for InputHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("InputHandle").field(&self.0.kind).finish()
    }
}

impl InputHandle {
    /// What the device is.
    pub fn kind(&self) -> InputKind {
        self.0.kind
    }

    /// Sends events as one group, or several if there are `InputEvent::SYN`s among them; the last
    /// group is closed by itself. Never blocks. Returns `false` if something was dropped: because
    /// the guest has no driver yet, or does not keep up (see [`EventQueue`] for what goes first).
    pub fn send(&self, events: &[InputEvent]) -> bool {
        self.with_queue(|queue| queue.push(events))
    }

    /// Releases every key and button that is down, as when the client that pressed them is gone.
    pub fn release_all(&self) {
        self.with_queue(|queue| {
            queue.release_all();
            true
        });
    }

    fn with_queue(&self, change: impl FnOnce(&mut EventQueue) -> bool) -> bool {
        let mut state = self.0.state();
        if !state.active {
            return false;
        }
        let was_empty = state.queue.is_empty();
        let complete = change(&mut state.queue);
        let wake = was_empty && !state.queue.is_empty();
        drop(state);
        if wake && let Err(error) = self.0.wake.write(1) {
            tracing::error!(%error, "an input device's worker cannot be woken");
        }
        complete
    }

    /// The lights as the guest set them last.
    pub fn leds(&self) -> Leds {
        self.0.state().leds
    }

    /// Calls `listener` on the device's worker thread whenever the guest changes the lights; it
    /// replaces an earlier listener. It must not block.
    pub fn on_led(&self, listener: impl Fn(Leds) + Send + Sync + 'static) {
        let mut slot = self.0.led_listener.lock().unwrap_or_else(PoisonError::into_inner);
        *slot = Some(Box::new(listener));
    }
}

/// The device.
pub(super) struct Input {
    shared: Arc<Shared>,
    serial: String,
    select: u8,
    subselect: u8,
    worker: Option<Worker<InputWorker>>,
}

impl Input {
    pub(super) fn new(kind: InputKind, serial: String) -> io::Result<(Self, InputHandle)> {
        let state = State { queue: EventQueue::new(kind), active: false, leds: Leds::default() };
        let shared = Arc::new(Shared {
            kind,
            state: Mutex::new(state),
            led_listener: Mutex::default(),
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        });
        let handle = InputHandle(shared.clone());
        Ok((Self { shared, serial, select: 0, subselect: 0, worker: None }, handle))
    }

    /// The selected information; empty if there is none.
    fn payload(&self) -> Vec<u8> {
        let kind = self.shared.kind;
        match (self.select, self.subselect) {
            (select::ID_NAME, 0) => kind.device_name().into(),
            (select::ID_SERIAL, 0) => self.serial.as_bytes().to_vec(),
            (select::ID_DEVIDS, 0) => kind.ids().into_iter().flat_map(u16::to_le_bytes).collect(),
            (select::EV_BITS, event) => bitmap(kind.codes(u16::from(event))),
            (select::ABS_INFO, axis) if kind.has(EV_ABS, u16::from(axis)) => {
                // Minimum, maximum, fuzz, flat, resolution.
                [0, TABLET_MAX, 0, 0, 0].into_iter().flat_map(i32::to_le_bytes).collect()
            }
            // PROP_BITS is empty for all kinds: pointers that are neither touch screens nor pads.
            _ => Vec::new(),
        }
    }
}

/// A bitmap of inclusive ranges, as short as possible.
fn bitmap(ranges: &[(u16, u16)]) -> Vec<u8> {
    let mut bits = Vec::new();
    for code in ranges.iter().flat_map(|(first, last)| *first..=*last) {
        let byte = usize::from(code / 8);
        if bits.len() <= byte {
            bits.resize(byte + 1, 0);
        }
        bits[byte] |= 1 << (code % 8);
    }
    bits
}

impl VirtioDevice for Input {
    fn device_type(&self) -> DeviceType {
        DeviceType::INPUT
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        RING_FEATURES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut payload = self.payload();
        payload.truncate(CONFIG_PAYLOAD);
        let mut space = [0; CONFIG_HEADER + CONFIG_PAYLOAD];
        space[0] = self.select;
        space[1] = self.subselect;
        space[2] = payload.len() as u8;
        space[CONFIG_HEADER..CONFIG_HEADER + payload.len()].copy_from_slice(&payload);
        let rest = usize::try_from(offset).ok().and_then(|offset| space.get(offset..));
        for (to, from) in data.iter_mut().zip(rest.unwrap_or_default()) {
            *to = *from;
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let at = |field: u64| field.checked_sub(offset).and_then(|index| data.get(index as usize));
        self.select = *at(0).unwrap_or(&self.select);
        self.subselect = *at(1).unwrap_or(&self.subselect);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, queues, interrupt, .. } = activation;
        let memory = Arc::new(memory);
        let (mut events, mut status) = (None, None);
        for active in queues {
            let index = active.index;
            let ring = Ring::new("input", active, &memory, &interrupt);
            match index {
                EVENT_QUEUE => events = Some(ring),
                STATUS_QUEUE => status = Some(ring),
                _ => {}
            }
        }
        self.shared.set_active(events.is_some());
        let worker =
            InputWorker { shared: self.shared.clone(), events, status, current: Group::new() };
        let worker = Worker::spawn("vio-input", worker)
            .map_err(|error| ActivateError::Host("an input device's worker thread", error))?;
        self.worker = Some(worker);
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(worker) = self.worker.take() {
            worker.stop();
        }
        self.shared.set_active(false);
        self.shared.set_leds(Leds::default());
        (self.select, self.subselect) = (0, 0);
    }
}

impl Drop for Input {
    fn drop(&mut self) {
        self.reset();
    }
}

/// Event data of the wake-up; queues use their index.
const WAKE: u32 = u32::MAX;

struct InputWorker {
    shared: Arc<Shared>,
    events: Option<Ring>,
    status: Option<Ring>,
    /// The rest of the group that is being delivered.
    current: Group,
}

impl InputWorker {
    fn deliver(&mut self) {
        let Some(ring) = &mut self.events else { return };
        let mut used = false;
        'groups: loop {
            while let Some(event) = self.current.front() {
                let Some(chain) = ring.pop() else {
                    if ring.enable_kicks() {
                        continue;
                    }
                    break 'groups;
                };
                let memory = ring.memory();
                let Some(mut writer) = ring.writer(&chain, &memory) else { break 'groups };
                if writer.available_bytes() < InputEvent::SIZE
                    || writer.write_all(&event.encode()).is_err()
                {
                    ring.fail("an event buffer is too small for an event");
                    break 'groups;
                }
                ring.push_used(chain.head_index(), InputEvent::SIZE as u32);
                used = true;
                self.current.pop_front();
            }
            match self.shared.state().queue.pop() {
                Some(group) => self.current = group,
                None => break,
            }
        }
        if used {
            ring.notify_driver();
        }
    }

    fn take_status(&mut self) {
        let Some(ring) = &mut self.status else { return };
        let mut leds = self.shared.state().leds;
        let mut used = false;
        loop {
            ring.disable_kicks();
            while let Some(chain) = ring.pop() {
                let memory = ring.memory();
                let Some(mut reader) = ring.reader(&chain, &memory) else { break };
                // One event per buffer is what drivers send; a few more do no harm.
                for _ in 0..16 {
                    let mut bytes = [0; InputEvent::SIZE];
                    if reader.read_exact(&mut bytes).is_err() {
                        break;
                    }
                    let event = InputEvent::decode(bytes);
                    match (event.kind, event.code) {
                        (EV_LED, LED_NUML) => leds.num_lock = event.value != 0,
                        (EV_LED, LED_CAPSL) => leds.caps_lock = event.value != 0,
                        (EV_LED, LED_SCROLLL) => leds.scroll_lock = event.value != 0,
                        _ => {}
                    }
                }
                ring.push_used(chain.head_index(), 0);
                used = true;
            }
            if !ring.enable_kicks() {
                break;
            }
        }
        if used {
            ring.notify_driver();
            self.shared.set_leds(leds);
        }
    }
}

impl MutEventSubscriber for InputWorker {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        for ring in [&self.events, &self.status].into_iter().flatten() {
            ring.register(ops, u32::from(ring.index()));
        }
        if let Err(error) = ops.add(Events::with_data(&self.shared.wake, WAKE, EventSet::IN)) {
            tracing::error!(%error, "an input device cannot be woken");
        }
        self.take_status();
        self.deliver();
    }

    fn process(&mut self, events: Events, _: &mut EventOps<'_>) {
        match (events.data(), &self.events, &self.status) {
            (0, Some(ring), _) | (1, _, Some(ring)) => ring.take_kick(),
            _ => {
                let _ = self.shared.wake.read();
            }
        }
        if events.data() == u32::from(STATUS_QUEUE) {
            self.take_status();
        } else {
            self.deliver();
        }
    }
}
