//! The virtio device: configuration space, and life of the queues between driver and back end.

use std::{
    os::unix::net::UnixStream,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use gpu_protocol::{
    socket::ProtocolFeatures,
    virtio::{Config, Features, QUEUES},
};
use zerocopy::IntoBytes;

use super::{
    config::{GpuConfig, MODULE},
    display::Display,
    handle::GpuHandle,
    orphan::Refuser,
    process::{self, BackEndProcess},
    server::{Server, Watch},
    vhost_user::VhostUser,
};
use crate::{
    GuestMemory,
    virtio::{
        device::{
            ActivateError, Activation, ActiveQueue, DeviceType, RING_FEATURES, VirtioDevice,
            VirtioInterrupt,
        },
        registry::BuildError,
        worker::Worker,
    },
};

/// As in QEMU's device; the back ends accept up to 1024.
const QUEUE_SIZES: [u16; QUEUES] = [256, 16];

/// What the driver set up, kept for the case that the back end dies.
struct Active {
    queues: Vec<ActiveQueue>,
    memory: Arc<GuestMemory>,
    interrupt: Arc<dyn VirtioInterrupt>,
}

#[derive(Default)]
struct Queues {
    active: Option<Active>,
    dead: bool,
    refuser: Option<Worker<Refuser>>,
}

impl Queues {
    /// Answers the driver in place of the dead back end.
    fn take_over(&mut self) {
        let Some(active) = &self.active else { return };
        match Refuser::start(&active.queues, &active.memory, &active.interrupt) {
            Ok(refuser) => self.refuser = Some(refuser),
            Err(error) => {
                tracing::error!(%error, "the GPU's queues cannot be taken over");
                active.interrupt.set_needs_reset();
            }
        }
    }
}

/// The device.
pub(super) struct VirtioGpu {
    // Dropped in this order: the connections first, then the process that waits for their end.
    vhost: VhostUser,
    _server: Server,
    watch: Arc<Watch>,
    display: Arc<Display>,
    queues: Arc<Mutex<Queues>>,
    features: u64,
    capsets: u32,
    _process: Option<BackEndProcess>,
}

/// Starts or finds the back end and makes the device.
pub(super) fn build(config: &GpuConfig) -> Result<(VirtioGpu, GpuHandle), BuildError> {
    let (socket, process) = match &config.socket {
        Some(path) => (process::connect(path)?, None),
        None => process::start(config).map(|(socket, process)| (socket, Some(process)))?,
    };
    let failed = |reason: String| BuildError::Unusable {
        option: MODULE.option,
        reason: match &config.socket {
            Some(path) => format!("socket={}: {reason}", path.display()),
            None => format!("drago-gpu: {reason}"),
        },
    };
    let host = |source| BuildError::Host {
        option: MODULE.option,
        what: "setting up the GPU socket".to_owned(),
        source,
    };
    let (ours, theirs) = UnixStream::pair().map_err(host)?;
    let ours = Arc::new(ours);
    let watch = Watch::new(socket.try_clone().map_err(host)?);
    let mut offered = ProtocolFeatures::EDID;
    offered.set(ProtocolFeatures::SHM_FRAMES, config.shared_frames);
    let display =
        Display::new(ours.clone(), config.scanouts, config.mode, offered).map_err(host)?;
    let queues = Arc::new(Mutex::new(Queues::default()));
    let for_death = queues.clone();
    let server = Server::spawn(display.clone(), ours, watch.clone(), move || {
        let mut queues = lock(&for_death);
        queues.dead = true;
        queues.take_over();
    })
    .map_err(host)?;
    let vhost = watch
        .guard(&display, || VhostUser::connect(socket, &theirs))
        .map_err(|error| failed(error.to_string()))?;
    drop(theirs);
    let known = Features::all().bits() | RING_FEATURES;
    let device = VirtioGpu {
        features: vhost.features() & known,
        capsets: vhost.capsets(),
        vhost,
        _server: server,
        watch,
        display: display.clone(),
        queues,
        _process: process,
    };
    Ok((device, GpuHandle { display }))
}

fn lock(queues: &Mutex<Queues>) -> MutexGuard<'_, Queues> {
    queues.lock().unwrap_or_else(PoisonError::into_inner)
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
        let Activation { memory, features, queues, interrupt } = activation;
        let memory = Arc::new(memory);
        let started = self
            .watch
            .guard(&self.display, || self.vhost.start(features, &memory, &queues, &*interrupt));
        if let Err(error) = started {
            return Err(ActivateError::Backend(error.to_string()));
        }
        self.display.set_interrupt(Some(interrupt.clone()));
        let mut state = lock(&self.queues);
        state.active = Some(Active { queues, memory, interrupt });
        if state.dead {
            // It died between its last answer and now.
            state.take_over();
        }
        Ok(())
    }

    fn reset(&mut self) {
        let (active, dead, refuser) = {
            let mut state = lock(&self.queues);
            (state.active.take(), state.dead, state.refuser.take())
        };
        if let Some(refuser) = refuser {
            refuser.stop();
        }
        let Some(active) = active else { return };
        if !dead {
            let indices = active.queues.iter().map(|queue| queue.index);
            let stopped = self.watch.guard(&self.display, || self.vhost.stop(indices));
            if let Err(error) = stopped {
                // It may still write to guest memory; without its connection it ends.
                tracing::error!(%error, "the GPU's back end could not be stopped");
                let _ = self.watch.vhost.shutdown(std::net::Shutdown::Both);
            }
        }
        self.display.reset();
    }
}

impl Drop for VirtioGpu {
    fn drop(&mut self) {
        // Orderly where possible: the server must not report this end as a death.
        self.reset();
        self.watch.stop(&self.display);
        let _ = self.watch.vhost.shutdown(std::net::Shutdown::Both);
    }
}
