//! The virtio device: configuration space, and life of the queues between driver and back end.

use std::{io, sync::Arc};

use gpu_protocol::{
    socket::ProtocolFeatures,
    virtio::{Config, Features, QUEUES, SHM_HOST_VISIBLE},
};
use zerocopy::IntoBytes;

use super::{
    config::{GpuConfig, MODULE},
    display::Display,
    handle::GpuHandle,
    process::Launcher,
    recovery::{BackEnd, Supervisor},
    server::{Server, Watch},
};
use crate::virtio::{
    device::{ActivateError, Activation, DeviceType, RING_FEATURES, VirtioDevice},
    registry::BuildError,
    shared_memory::SharedMemory,
};

/// As in QEMU's device; the back ends accept up to 1024.
const QUEUE_SIZES: [u16; QUEUES] = [256, 16];

/// The device.
pub(super) struct VirtioGpu {
    // Dropped in this order, after the connections were ended.
    supervisor: Option<Supervisor>,
    _server: Server,
    back_end: Arc<BackEnd>,
    watch: Arc<Watch>,
    display: Arc<Display>,
    features: u64,
    capsets: u32,
    region: Option<Arc<SharedMemory>>,
}

/// Starts or finds the back end and makes the device.
pub(super) fn build(config: &GpuConfig) -> Result<(VirtioGpu, GpuHandle), BuildError> {
    let failed = |reason: String| BuildError::Unusable {
        option: MODULE.option,
        reason: match &config.socket {
            Some(path) => format!("socket={}: {reason}", path.display()),
            None => format!("drago-gpu: {reason}"),
        },
    };
    let host = |source: io::Error| BuildError::Host {
        option: MODULE.option,
        what: "setting up the GPU".to_owned(),
        source,
    };
    let launcher = match &config.socket {
        Some(_) => None,
        None => Some(Launcher::find(config)?),
    };
    let mut offered = ProtocolFeatures::EDID | ProtocolFeatures::DMABUF2;
    let shared = ProtocolFeatures::SHM_FRAMES
        | ProtocolFeatures::GUEST_FRAMES
        | ProtocolFeatures::DEVICE_RESET;
    offered.set(shared, config.shared_frames);
    let region = config.host_memory.map(SharedMemory::new).transpose().map_err(host)?;
    let display =
        Display::new(config.scanouts, config.mode, offered, region.clone()).map_err(host)?;
    let watch = Watch::new().map_err(host)?;
    let back_end = BackEnd::new(display.clone(), watch.clone(), launcher, config.restart);
    let for_death = back_end.clone();
    let server =
        Server::spawn(display.clone(), watch.clone(), move |number| for_death.died(number))
            .map_err(host)?;
    let connected = back_end.connect(config.socket.as_deref(), failed)?;
    let supervisor = Supervisor::spawn(back_end.clone()).map_err(host)?;
    let known = Features::all().bits() | RING_FEATURES;
    let device = VirtioGpu {
        supervisor: Some(supervisor),
        _server: server,
        back_end,
        watch,
        display: display.clone(),
        features: connected.features & known,
        capsets: connected.capsets,
        region,
    };
    Ok((device, GpuHandle { display }))
}

impl VirtioDevice for VirtioGpu {
    fn device_type(&self) -> DeviceType {
        DeviceType::GPU
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn shared_memory(&self) -> Option<(u8, Arc<SharedMemory>)> {
        self.region.clone().map(|region| (SHM_HOST_VISIBLE, region))
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = Config {
            events_read: self.display.events_read().into(),
            events_clear: 0.into(),
            num_scanouts: self.display.scanouts().into(),
            num_capsets: self.capsets.into(),
        };
        let bytes = usize::try_from(offset).ok().and_then(|at| config.as_bytes().get(at..));
        for (target, source) in data.iter_mut().zip(bytes.unwrap_or(&[])) {
            *target = *source;
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        // Only events_clear can be written, also byte by byte.
        if offset >= size_of::<Config>() as u64 {
            return;
        }
        let mut clear = [0; 4];
        for (at, byte) in (offset..).zip(data) {
            if let Some(target) = at.checked_sub(4).and_then(|at| clear.get_mut(at as usize)) {
                *target = *byte;
            }
        }
        self.display.clear_events(u32::from_le_bytes(clear));
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.back_end.activate(activation)
    }

    fn reset(&mut self) {
        self.back_end.reset();
    }
}

#[cfg(test)]
impl VirtioGpu {
    pub(super) fn process_id(&self) -> Option<u32> {
        self.back_end.process_id()
    }

    pub(super) fn end_pause(&self) {
        self.back_end.end_pause();
    }
}

impl Drop for VirtioGpu {
    fn drop(&mut self) {
        // Nobody must start another one.
        self.supervisor = None;
        // Orderly where possible: the server must not report this end as a death.
        self.reset();
        self.watch.stop(&self.display);
        self.back_end.close();
    }
}
