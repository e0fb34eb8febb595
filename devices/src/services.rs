//! What the device models need from the virtual machine monitor.
//!
//! Everything is expressed with eventfds, because that is what KVM (irqfd, ioeventfd), vhost-user
//! back ends and tests can all share: raising an interrupt is a write to an eventfd, a queue
//! notification arrives as a readable eventfd.

use std::{io, sync::Arc};

use vmm_sys_util::eventfd::EventFd;

use crate::{vfio::DeviceMemory, virtio::shared_memory::SharedMemory};

/// An MSI message as the guest programmed it (PCI Local Bus 3.0, §6.8.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsiMessage {
    /// Message address, normally inside the local APIC window at `0xfee0_0000`.
    pub address: u64,
    /// Message data: vector, delivery mode, trigger mode.
    pub data: u32,
}

/// One message signalled interrupt.
///
/// Whoever wants to raise it writes 1 to [`eventfd`](Self::eventfd). While the vector has no route
/// (masked or never programmed) the count stays in the eventfd, which is exactly the pending bit;
/// the implementation delivers it when a route is set again.
pub trait MsiVector: Send + Sync {
    /// The eventfd that raises this interrupt. It may be handed to another process.
    fn eventfd(&self) -> &EventFd;

    /// Connects the eventfd to an interrupt message, or disconnects it (`None`: masked).
    fn set_route(&self, message: Option<MsiMessage>) -> io::Result<()>;
}

/// Services of the VMM for devices. One instance is shared by all devices of a machine.
pub trait VmServices: Send + Sync {
    /// Allocates an interrupt vector without a route.
    fn allocate_msi(&self) -> io::Result<Arc<dyn MsiVector>>;

    /// Makes a guest write of any value and width to the guest physical `address` signal `fd`
    /// without leaving the kernel (`KVM_IOEVENTFD`).
    fn register_ioevent(&self, address: u64, fd: &EventFd) -> io::Result<()>;

    /// Takes back [`register_ioevent`](Self::register_ioevent).
    fn unregister_ioevent(&self, address: u64, fd: &EventFd) -> io::Result<()>;

    /// Lets the guest see the window at the guest physical `address`, and nowhere else, as memory
    /// of its own; `None`: nowhere.
    fn place_shared_memory(
        &self,
        window: &Arc<SharedMemory>,
        address: Option<u64>,
    ) -> io::Result<()>;

    /// The same for registers of a device of the host.
    fn place_device_memory(
        &self,
        memory: &Arc<DeviceMemory>,
        address: Option<u64>,
    ) -> io::Result<()> {
        let _ = (memory, address);
        Err(io::ErrorKind::Unsupported.into())
    }
}
