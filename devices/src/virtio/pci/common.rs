//! The common configuration structure (VIRTIO 1.3 §4.1.4.3) and the rules of device
//! initialisation (§3.1). Pure bookkeeping: what has to be done to the device is an [`Effect`].

use super::interrupt::Interrupts;
use crate::virtio::device::{F_VERSION_1, VirtioDevice};

const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;
const NEEDS_RESET: u8 = 0x40;
const FAILED: u8 = 0x80;

const SIZE: usize = super::capability::Layout::COMMON_SIZE as usize;
/// Bytes of device configuration whose changes the generation counter notices.
const WATCHED: usize = 256;

/// What a write to the structure demands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Effect {
    /// Nothing further.
    None,
    /// The driver broke a rule; the write had no effect.
    Violation(&'static str),
    /// Check this queue and enable it.
    Enable(usize),
    /// Start the device.
    Activate,
    /// Stop the device; when it has stopped, [`CommonConfig::reset`].
    Reset,
}

/// The registers of one queue, as the driver wrote them.
#[derive(Debug, Clone)]
pub(super) struct QueueSetup {
    pub(super) max_size: u16,
    pub(super) size: u16,
    pub(super) descriptors: u64,
    pub(super) driver: u64,
    pub(super) device: u64,
    enabled: bool,
}

impl QueueSetup {
    fn new(max_size: u16) -> Self {
        Self { max_size, size: max_size, descriptors: 0, driver: 0, device: 0, enabled: false }
    }
}

/// The structure's registers.
#[derive(Debug)]
pub(super) struct CommonConfig {
    offered: u64,
    accepted: u64,
    device_feature_select: u32,
    driver_feature_select: u32,
    status: u8,
    queue_select: u16,
    queues: Vec<QueueSetup>,
    generation: u8,
    watched: [u8; WATCHED],
}

impl CommonConfig {
    pub(super) fn new(offered: u64, queue_sizes: &[u16]) -> Self {
        Self {
            offered,
            accepted: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            status: 0,
            queue_select: 0,
            queues: queue_sizes.iter().map(|size| QueueSetup::new(*size)).collect(),
            generation: 0,
            watched: [0; WATCHED],
        }
    }

    /// Back to the state after power on. The generation goes on, as nothing says it may restart.
    pub(super) fn reset(&mut self) {
        self.accepted = 0;
        self.device_feature_select = 0;
        self.driver_feature_select = 0;
        self.status = 0;
        self.queue_select = 0;
        for queue in &mut self.queues {
            *queue = QueueSetup::new(queue.max_size);
        }
    }

    /// The features agreed on.
    pub(super) fn driver_features(&self) -> u64 {
        self.accepted
    }

    /// Queues the driver enabled, with their index.
    pub(super) fn enabled_queues(&self) -> impl Iterator<Item = (usize, &QueueSetup)> {
        self.queues.iter().enumerate().filter(|(_, queue)| queue.enabled)
    }

    /// Enables a queue if `check` finds nothing wrong with it.
    pub(super) fn try_enable<T>(
        &mut self,
        index: usize,
        check: impl FnOnce(&QueueSetup) -> Result<T, &'static str>,
    ) -> Result<(), &'static str> {
        if let Some(queue) = self.queues.get_mut(index) {
            check(queue)?;
            queue.enabled = true;
        }
        Ok(())
    }

    /// Reads at any offset and size; bytes past the structure are left alone.
    pub(super) fn read(
        &mut self,
        offset: u64,
        data: &mut [u8],
        interrupts: &Interrupts,
        device: &dyn VirtioDevice,
    ) {
        let Some(start) = usize::try_from(offset).ok().filter(|start| *start < SIZE) else {
            return;
        };
        if (start..start.saturating_add(data.len())).contains(&0x15) {
            self.update_generation(device);
        }
        let image = self.image(interrupts);
        for (byte, value) in data.iter_mut().zip(image.iter().skip(start)) {
            *byte = *value;
        }
    }

    fn image(&self, interrupts: &Interrupts) -> [u8; SIZE] {
        let selected = usize::from(self.queue_select);
        let queue = self.queues.get(selected);
        let mut image = [0; SIZE];
        let mut put = |offset: usize, bytes: &[u8]| {
            image[offset..offset + bytes.len()].copy_from_slice(bytes);
        };
        put(0x00, &self.device_feature_select.to_le_bytes());
        put(0x04, &word(self.offered, self.device_feature_select).to_le_bytes());
        put(0x08, &self.driver_feature_select.to_le_bytes());
        put(0x0c, &word(self.accepted, self.driver_feature_select).to_le_bytes());
        put(0x10, &interrupts.config_vector().to_le_bytes());
        put(0x12, &(self.queues.len() as u16).to_le_bytes());
        let needs_reset = if interrupts.needs_reset() { NEEDS_RESET } else { 0 };
        put(0x14, &[self.status | needs_reset, self.generation]);
        put(0x16, &self.queue_select.to_le_bytes());
        put(0x1a, &interrupts.queue_vector(selected).to_le_bytes());
        if let Some(queue) = queue {
            put(0x18, &queue.size.to_le_bytes());
            put(0x1c, &u16::from(queue.enabled).to_le_bytes());
            put(0x1e, &self.queue_select.to_le_bytes());
            put(0x20, &queue.descriptors.to_le_bytes());
            put(0x28, &queue.driver.to_le_bytes());
            put(0x30, &queue.device.to_le_bytes());
        }
        image
    }

    /// The generation changes whenever the configuration does between two reads of it (§2.5.1):
    /// comparing contents spares every device from having to say so.
    fn update_generation(&mut self, device: &dyn VirtioDevice) {
        let mut now = [0; WATCHED];
        device.read_config(0, &mut now);
        if now != self.watched {
            self.watched = now;
            self.generation = self.generation.wrapping_add(1);
        }
    }

    /// Writes one field; 64-bit fields also by halves. Anything else is ignored.
    pub(super) fn write(&mut self, offset: u64, data: &[u8], interrupts: &Interrupts) -> Effect {
        let mut bytes = [0; 8];
        let Some(slot) = bytes.get_mut(..data.len()) else { return Effect::None };
        slot.copy_from_slice(data);
        let value = u64::from_le_bytes(bytes);
        match (offset, data.len()) {
            (0x00, 4) => self.device_feature_select = value as u32,
            (0x08, 4) => self.driver_feature_select = value as u32,
            (0x0c, 4) => return self.write_features(value as u32),
            (0x10, 2) => interrupts.set_config_vector(value as u16),
            (0x14, 1) => return self.write_status(value as u8),
            (0x16, 2) => self.queue_select = value as u16,
            (0x1a, 2) => interrupts.set_queue_vector(self.queue_select.into(), value as u16),
            (0x1c, 2) => return self.write_enable(value as u16),
            (0x18, 2) | (0x20 | 0x28 | 0x30, 4 | 8) | (0x24 | 0x2c | 0x34, 4) => {
                return self.write_queue(offset, data.len(), value);
            }
            _ => return Effect::Violation("write to a read-only or misaligned common register"),
        }
        Effect::None
    }

    fn write_features(&mut self, value: u32) -> Effect {
        if self.status & FEATURES_OK != 0 {
            return Effect::Violation("features changed after FEATURES_OK");
        }
        let shift = match self.driver_feature_select {
            0 => 0,
            1 => 32,
            // Features beyond bit 63 are never offered; writing zero to them is usual.
            _ if value == 0 => return Effect::None,
            _ => return Effect::Violation("features beyond bit 63 accepted"),
        };
        self.accepted = self.accepted & !(0xffff_ffff << shift) | u64::from(value) << shift;
        Effect::None
    }

    fn write_queue(&mut self, offset: u64, length: usize, value: u64) -> Effect {
        let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) else {
            return Effect::Violation("set-up of a queue that does not exist");
        };
        if queue.enabled {
            return Effect::Violation("set-up of an enabled queue");
        }
        let address = match offset {
            // Whether the size is possible is seen when the queue is enabled.
            0x18 => {
                queue.size = value as u16;
                return Effect::None;
            }
            0x20 | 0x24 => &mut queue.descriptors,
            0x28 | 0x2c => &mut queue.driver,
            _ => &mut queue.device,
        };
        *address = match (length, offset & 4) {
            (8, _) => value,
            (_, 0) => *address & !0xffff_ffff | value,
            _ => *address & 0xffff_ffff | value << 32,
        };
        Effect::None
    }

    fn write_enable(&mut self, value: u16) -> Effect {
        let index = usize::from(self.queue_select);
        let Some(queue) = self.queues.get(index) else {
            return Effect::Violation("a queue that does not exist was enabled");
        };
        match value {
            // §4.1.4.3.2: only a reset disables queues.
            0 => Effect::Violation("a queue was disabled by writing queue_enable"),
            _ if queue.enabled => Effect::None,
            _ if self.status & FEATURES_OK == 0 => {
                Effect::Violation("a queue was enabled before FEATURES_OK")
            }
            _ if self.status & DRIVER_OK != 0 => {
                Effect::Violation("a queue was enabled after DRIVER_OK")
            }
            _ => Effect::Enable(index),
        }
    }

    /// Takes the bits in the order of §3.1.1; a bit whose predecessor is missing stays clear, which
    /// is how the driver finds out.
    fn write_status(&mut self, value: u8) -> Effect {
        if value == 0 {
            return Effect::Reset;
        }
        let mut effect = Effect::None;
        self.status |= value & (ACKNOWLEDGE | FAILED);
        for (bit, needed) in
            [(DRIVER, ACKNOWLEDGE), (FEATURES_OK, DRIVER), (DRIVER_OK, FEATURES_OK)]
        {
            if value & bit == 0 || self.status & bit != 0 {
                continue;
            }
            if self.status & needed == 0 {
                effect = Effect::Violation("a status bit was set before its predecessor");
                continue;
            }
            if bit == FEATURES_OK && !self.features_acceptable() {
                effect = Effect::Violation("features not offered, or VERSION_1 not accepted");
                continue;
            }
            self.status |= bit;
            if bit == DRIVER_OK {
                effect = Effect::Activate;
            }
        }
        effect
    }

    fn features_acceptable(&self) -> bool {
        self.accepted & !self.offered == 0 && self.accepted & F_VERSION_1 != 0
    }
}

/// The 32 bits of `features` that `select` chooses.
fn word(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}
