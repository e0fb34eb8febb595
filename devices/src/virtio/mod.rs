//! Virtio 1.3 devices and their PCI transport.
//!
//! | module | what it holds |
//! |---|---|
//! | [`balloon`] | memory balloon and free page reporting |
//! | [`blk`] | disks |
//! | [`console`] | hvc0 and named ports |
//! | [`device`] | the trait each device implements, and what it is given at activation |
//! | [`fs`] | shared folders, served by virtiofsd over vhost-user |
//! | [`gpu`] | display, served by another process over vhost-user |
//! | [`input`] | keyboard, tablet, mouse |
//! | [`net`] | network card on a tap interface or on passt |
//! | [`pci`] | the PCI transport |
//! | [`rng`] | entropy |
//! | [`registry`] | the one list of devices; a new device is a folder and a line there |
//! | [`shared_memory`] | a window of the guest's address space for memory of the host |
//! | [`snd`] | sound card |
//! | [`vsock`] | sockets between host and guest, served by the host's kernel |
//! | [`worker`] | a device's thread: an epoll loop that can be stopped and hands its state back |

pub mod balloon;
pub mod blk;
pub mod console;
pub mod device;
pub mod fs;
pub mod gpu;
pub mod input;
pub mod net;
pub mod pci;
mod pieces;
pub mod registry;
mod ring;
pub mod rng;
pub mod shared_memory;
pub mod snd;
#[cfg(test)]
mod testing;
pub(crate) mod vhost;
pub mod vsock;
pub mod worker;

pub use device::{
    ActivateError, Activation, ActiveQueue, DeviceType, RING_FEATURES, VirtioDevice,
    VirtioInterrupt,
};
