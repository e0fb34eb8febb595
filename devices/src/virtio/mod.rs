//! Virtio 1.3 devices and their PCI transport.
//!
//! | module | what it holds |
//! |---|---|
//! | [`device`] | the trait each device implements, and what it is given at activation |
//! | [`registry`] | the one list of devices; a new device is a folder and a line there |
//! | [`worker`] | a device's thread: an epoll loop that can be stopped and hands its state back |

pub mod device;
pub mod registry;
pub mod worker;

pub use device::{
    ActivateError, Activation, ActiveQueue, DeviceType, RING_FEATURES, VirtioDevice,
    VirtioInterrupt,
};
