//! The device models of drago-vmm.
//!
//! * [`bus`]: which device answers at which port or address.
//! * [`legacy`]: the few devices of a PC that sit on I/O ports.
//! * [`services`]: what a device may ask of the VMM (interrupt vectors, ioeventfds). The VMM answers
//!   with KVM, tests with plain eventfds, so no device in this crate ever sees a hypervisor.
//! * [`pci`]: configuration space, MSI-X, the bus that virtio devices sit on.
//! * [`spec`]: the `key=value,key=value` option syntax shared by every `--device` flag.
//! * [`vfio`]: devices of the host, handed to the guest.
//! * [`virtio`]: the virtio device trait, the PCI transport, the registry and one folder per device.
//!
//! A device is one folder plus one line in [`virtio::registry`].

pub mod bus;
pub mod legacy;
pub mod pci;
pub mod services;
pub mod spec;
pub mod vfio;
pub mod virtio;

/// The guest's memory. One shared memfd, laid out once at boot and never changed afterwards, so
/// devices hold a plain clone (the regions inside are reference counted).
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;
