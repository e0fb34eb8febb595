//! The entropy device (VIRTIO 1.3 §5.4): fills the guest's buffers from a file of random bytes.

use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use event_manager::{EventOps, Events, MutEventSubscriber};
use vm_memory::Bytes;

use super::{
    device::{ActivateError, Activation, DeviceType, RING_FEATURES, VirtioDevice},
    registry::{BuildError, BuiltDevice, Count, DeviceConfig, DeviceModule, Machines, Preset},
    ring::{Chain, Ring},
    worker::Worker,
};
use crate::{
    GuestMemory,
    spec::{Spec, SpecError},
};

/// The entropy device in the registry.
pub static MODULE: DeviceModule = DeviceModule {
    option: "rng",
    value_name: "[source=FILE]",
    help: "entropy for the guest, from /dev/urandom unless another source is given",
    count: Count::One,
    // Without it a guest without RDRAND waits for entropy for minutes.
    presets: &[Preset { value: "", on: Machines::All }],
    can_be_off: false,
    served_elsewhere: false,
    parse,
    sample: || Box::new(RngConfig::default()).build(),
};

const DEFAULT_SOURCE: &str = "/dev/urandom";
const QUEUE_SIZES: [u16; 1] = [64];
/// The most bytes a chain gets; the driver asks again for more. Linux asks for 64 at a time.
const MAX_CHAIN: usize = 64 << 10;
/// Chains served before other events get their turn.
const BATCH: usize = 64;

/// `--rng`.
#[derive(Debug)]
pub struct RngConfig {
    source: PathBuf,
}

impl Default for RngConfig {
    fn default() -> Self {
        Self { source: PathBuf::from(DEFAULT_SOURCE) }
    }
}

fn parse(mut spec: Spec) -> Result<Box<dyn DeviceConfig>, SpecError> {
    let source = spec.take_path("source")?;
    // `--rng on` reads naturally and means the same as `--rng` with nothing.
    if let Some(word) = spec.take_word()
        && word != "on"
    {
        return Err(SpecError::UnexpectedWord {
            option: spec.option().to_owned(),
            word,
            expected: "expected source=FILE".to_owned(),
        });
    }
    spec.finish()?;
    let default = RngConfig::default();
    Ok(Box::new(RngConfig { source: source.unwrap_or(default.source) }))
}

impl DeviceConfig for RngConfig {
    fn build(self: Box<Self>) -> Result<BuiltDevice, BuildError> {
        let source = open(&self.source)?;
        let device = Rng { source, worker: None };
        Ok(BuiltDevice { device: Box::new(device), handle: None })
    }
}

fn open(path: &Path) -> Result<File, BuildError> {
    File::open(path).map_err(|source| BuildError::Host {
        option: MODULE.option,
        what: format!("'{}' cannot be opened", path.display()),
        source,
    })
}

struct Rng {
    source: File,
    worker: Option<Worker<RngWorker>>,
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> DeviceType {
        DeviceType::RNG
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        RING_FEATURES
    }

    fn read_config(&self, _: u64, _: &mut [u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, queues, interrupt, .. } = activation;
        let memory = Arc::new(memory);
        let Some(queue) = queues.into_iter().next() else {
            return Err(ActivateError::Driver("the request queue is not set up".to_owned()));
        };
        let source = self
            .source
            .try_clone()
            .map_err(|error| ActivateError::Host("the entropy source", error))?;
        let ring = Ring::new("virtio-rng", queue, &memory, &interrupt);
        let worker = Worker::spawn("rng", RngWorker { ring, memory, source })
            .map_err(|error| ActivateError::Host("the worker thread", error))?;
        self.worker = Some(worker);
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(worker) = self.worker.take() {
            worker.stop();
        }
    }
}

struct RngWorker {
    ring: Ring,
    memory: Arc<GuestMemory>,
    source: File,
}

impl RngWorker {
    fn serve(&mut self) {
        self.ring.disable_kicks();
        for _ in 0..BATCH {
            let Some(chain) = self.ring.pop() else { break };
            let head = chain.head_index();
            match self.fill(chain) {
                Ok(written) => self.ring.push_used(head, written),
                Err(error) => {
                    self.ring.fail(error);
                    return;
                }
            }
        }
        self.ring.notify_driver();
        if self.ring.enable_kicks() {
            self.ring.come_back();
        }
    }

    /// Fills the writable part of `chain`, up to a bound and as far as the source has something.
    fn fill(&mut self, chain: Chain) -> io::Result<u32> {
        let mut total = 0;
        for part in chain.writable() {
            let wanted = (part.len() as usize).min(MAX_CHAIN - total);
            let mut filled = 0;
            while filled < wanted {
                let address = part
                    .addr()
                    .0
                    .checked_add(filled as u64)
                    .map(vm_memory::GuestAddress)
                    .ok_or(io::ErrorKind::InvalidInput)?;
                match self.memory.read_volatile_from(address, &mut self.source, wanted - filled) {
                    Ok(0) => return Ok((total + filled) as u32),
                    Ok(read) => filled += read,
                    Err(vm_memory::GuestMemoryError::IOError(error))
                        if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(io::Error::other(error)),
                }
            }
            total += filled;
            if total == MAX_CHAIN {
                break;
            }
        }
        Ok(total as u32)
    }
}

impl MutEventSubscriber for RngWorker {
    fn process(&mut self, _: Events, _: &mut EventOps<'_>) {
        self.ring.take_kick();
        self.serve();
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        self.ring.register(ops, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{Driver, Part};

    fn sample(text: &str) -> Box<dyn VirtioDevice> {
        parse(Spec::parse("rng", text).unwrap()).unwrap().build().unwrap().device
    }

    #[test]
    fn buffers_are_filled_from_the_source_across_descriptors() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let bytes: Vec<u8> = (0..=255).cycle().take(100_000).collect();
        std::fs::write(file.path(), &bytes).unwrap();
        let mut device = sample(&format!("source={}", file.path().display()));
        let mut driver = Driver::start(device.as_mut());
        let queue = &mut driver.queues[0];
        queue.send(&[Part::In(10), Part::In(1000)]);
        assert_eq!(queue.wait_used().1, bytes[..1010]);
        queue.send(&[Part::In(90_000)]);
        assert_eq!(queue.wait_used().1, bytes[1010..1010 + MAX_CHAIN], "bounded");
        queue.send(&[Part::In(90_000)]);
        assert_eq!(queue.wait_used().1, bytes[1010 + MAX_CHAIN..], "the source ended");
        device.reset();
        let mut driver = Driver::start(device.as_mut());
        driver.queues[0].send(&[Part::Out(b"nothing to fill")]);
        assert_eq!(driver.queues[0].wait_used().1, []);
    }

    #[test]
    fn a_buffer_outside_of_memory_needs_a_reset() {
        let mut device = sample("");
        let mut driver = Driver::start(device.as_mut());
        driver.queues[0].add_raw(&[(1 << 40, 16, true)]);
        driver.queues[0].kick();
        driver.interrupt.wait_config_change();
        assert!(driver.interrupt.needs_reset());
        device.reset();
        let mut driver = Driver::start(device.as_mut());
        driver.queues[0].send(&[Part::In(64)]);
        let random = driver.queues[0].wait_used().1;
        assert_eq!(random.len(), 64);
        assert_ne!(random, [0; 64]);
    }

    #[test]
    fn options() {
        let error = |text: &str| parse(Spec::parse("rng", text).unwrap()).unwrap_err().to_string();
        assert_eq!(error("sauce=x"), "--rng: unknown key 'sauce' (known: source)");
        assert_eq!(error("source="), "--rng: source=: the path is empty");
        let missing = parse(Spec::parse("rng", "source=/does/not/exist").unwrap()).unwrap();
        let text = missing.build().unwrap_err().to_string();
        assert_eq!(text, "--rng: '/does/not/exist' cannot be opened");
    }
}
