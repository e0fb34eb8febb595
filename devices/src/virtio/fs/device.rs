//! Configuration space and life cycle.

use super::{config::MAX_TAG, supervisor::Supervisor};
use crate::virtio::{ActivateError, Activation, DeviceType, RING_FEATURES, VirtioDevice};

/// High priority, and one for requests: virtiofsd has no more.
pub(super) const QUEUES: usize = 2;
const QUEUE_SIZES: [u16; QUEUES] = [1024; QUEUES];

/// The device.
pub(super) struct Fs {
    /// Tag, number of request queues (§5.11.4).
    space: [u8; MAX_TAG + 4],
    features: u64,
    supervisor: Option<Supervisor>,
}

impl Fs {
    /// A folder that the guest mounts as `tag`.
    pub(super) fn new(tag: &str, supervisor: Option<Supervisor>) -> Self {
        let mut space = [0; MAX_TAG + 4];
        for (to, from) in space.iter_mut().zip(tag.bytes().take(MAX_TAG)) {
            *to = from;
        }
        space[MAX_TAG..].copy_from_slice(&(QUEUES as u32 - 1).to_le_bytes());
        let features = supervisor.as_ref().map_or(RING_FEATURES, Supervisor::features);
        Self { space, features, supervisor }
    }
}

impl VirtioDevice for Fs {
    fn device_type(&self) -> DeviceType {
        DeviceType::FS
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let rest = usize::try_from(offset).ok().and_then(|offset| self.space.get(offset..));
        for (to, from) in data.iter_mut().zip(rest.unwrap_or_default()) {
            *to = *from;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        match &self.supervisor {
            Some(supervisor) => supervisor.activate(activation),
            None => Ok(()),
        }
    }

    fn reset(&mut self) {
        if let Some(supervisor) = &self.supervisor {
            supervisor.reset();
        }
    }
}
