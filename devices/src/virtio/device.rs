//! The virtio device trait (VIRTIO 1.3 §2 and §5, without any transport).
//!
//! ```text
//!            build            activate (DRIVER_OK)
//!   config ───────▶ inactive ────────────────────▶ active ──▶ needs reset
//!                      ▲                              │            │
//!                      └────────── reset ─────────────┴────────────┘
//! ```
//!
//! A device does its work on threads of its own ([`super::worker`]); the transport calls the trait
//! from a vCPU thread and expects every method to be quick, except [`VirtioDevice::reset`], which
//! returns only when no worker touches guest memory any more.

use std::{fmt, io, sync::Arc};

use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use super::shared_memory::SharedMemory;
use crate::GuestMemory;

/// Virtio device type (VIRTIO 1.3 §5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DeviceType(pub u16);

impl DeviceType {
    /// Network card, §5.1.
    pub const NET: Self = Self(1);
    /// Block device, §5.2.
    pub const BLOCK: Self = Self(2);
    /// Console, §5.3.
    pub const CONSOLE: Self = Self(3);
    /// Entropy source, §5.4.
    pub const RNG: Self = Self(4);
    /// Traditional memory balloon, §5.5.
    pub const BALLOON: Self = Self(5);
    /// GPU, §5.7.
    pub const GPU: Self = Self(16);
    /// Input, §5.8.
    pub const INPUT: Self = Self(18);
    /// Socket, §5.10.
    pub const VSOCK: Self = Self(19);
    /// Sound, §5.14.
    pub const SOUND: Self = Self(25);
    /// File system, §5.11.
    pub const FS: Self = Self(26);
}

impl fmt::Display for DeviceType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NET => f.write_str("virtio-net"),
            Self::BLOCK => f.write_str("virtio-blk"),
            Self::CONSOLE => f.write_str("virtio-console"),
            Self::RNG => f.write_str("virtio-rng"),
            Self::BALLOON => f.write_str("virtio-balloon"),
            Self::GPU => f.write_str("virtio-gpu"),
            Self::INPUT => f.write_str("virtio-input"),
            Self::VSOCK => f.write_str("virtio-vsock"),
            Self::SOUND => f.write_str("virtio-snd"),
            Self::FS => f.write_str("virtio-fs"),
            Self(other) => write!(f, "virtio-{other}"),
        }
    }
}

/// `VIRTIO_F_INDIRECT_DESC | VIRTIO_F_EVENT_IDX` (§6): what `virtio_queue::Queue` implements, and
/// so what a device whose queues are served in this process should offer.
pub const RING_FEATURES: u64 = (1 << 28) | (1 << 29);

/// `VIRTIO_F_VERSION_1` (§6). The transport offers it for every device and refuses a driver that
/// does not accept it; devices need not mention it.
pub const F_VERSION_1: u64 = 1 << 32;

/// Why a device could not start. The transport logs it and sets DEVICE_NEEDS_RESET.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// A host resource (thread, eventfd, socket) could not be had.
    #[error("a host resource could not be set up for {0}")]
    Host(&'static str, #[source] io::Error),
    /// The driver did something the specification forbids.
    #[error("the driver set the device up wrongly: {0}")]
    Driver(String),
    /// The process that serves the device did not cooperate.
    #[error("the back end of the device failed: {0}")]
    Backend(String),
}

/// Interrupts of one active virtio device, whatever the transport.
pub trait VirtioInterrupt: Send + Sync {
    /// Tells the driver that buffers of `queue` were used. Callers check
    /// `Queue::needs_notification` first.
    fn signal_used(&self, queue: u16);

    /// Tells the driver that the configuration space changed.
    fn signal_config_change(&self);

    /// Sets DEVICE_NEEDS_RESET (§2.1.1) and tells the driver. For violations by the driver after
    /// which a queue cannot be served any further.
    fn set_needs_reset(&self);

    /// An eventfd which raises the interrupt of `queue` when written, for back ends in other
    /// processes or in the kernel (vhost "call" fd).
    fn queue_eventfd(&self, queue: u16) -> io::Result<EventFd>;
}

/// A queue the driver enabled.
#[derive(Debug)]
pub struct ActiveQueue {
    /// Index of the queue in the device.
    pub index: u16,
    /// The ring: addresses, size and EVENT_IDX are set and checked against guest memory.
    pub queue: Queue,
    /// Becomes readable when the driver notifies the queue.
    pub kick: EventFd,
}

/// Everything a device gets when the driver sets DRIVER_OK.
pub struct Activation {
    /// Guest memory.
    pub memory: GuestMemory,
    /// The features that driver and device agreed on, transport bits included.
    pub features: u64,
    /// The enabled queues in ascending index order; queues the driver left alone are absent.
    pub queues: Vec<ActiveQueue>,
    /// How to raise interrupts.
    pub interrupt: Arc<dyn VirtioInterrupt>,
}

impl fmt::Debug for Activation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Activation")
            .field("features", &format_args!("{:#x}", self.features))
            .field("queues", &self.queues)
            .finish_non_exhaustive()
    }
}

/// A virtio device, seen from its transport.
pub trait VirtioDevice: Send {
    /// Which device this is.
    fn device_type(&self) -> DeviceType;

    /// Maximum size of each queue; powers of two, at most 32768.
    fn queue_sizes(&self) -> &[u16];

    /// Features offered to the driver, without [`F_VERSION_1`].
    fn features(&self) -> u64;

    /// The device's shared memory region and its id (§2.10), if it has one.
    fn shared_memory(&self) -> Option<(u8, Arc<SharedMemory>)> {
        None
    }

    /// Reads device configuration space. Bytes past its end must be left as they are; the
    /// transport passes a zeroed buffer.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes device configuration space. Writes to read-only fields or past the end are ignored.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }

    /// Starts serving the queues. Called at most once between two resets.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Stops all workers, waits until they no longer touch guest memory, and returns the device to
    /// its state before activation. Must be callable at any time, any number of times.
    fn reset(&mut self);

    /// The machine is about to end: flush what the guest believes to be stable. Workers may go on.
    fn shutdown(&mut self) {}
}
