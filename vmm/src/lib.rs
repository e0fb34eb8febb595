//! drago-vmm: a virtual machine monitor for graphical microVMs on KVM.

pub mod acpi;
pub mod boot;
pub mod kvm;
pub mod layout;
pub mod memory;
pub mod sys;
