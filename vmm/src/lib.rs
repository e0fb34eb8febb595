//! drago-vmm: a virtual machine monitor for graphical microVMs on KVM.
//!
//! ```text
//! cli ──▶ config ──▶ machine::run ──▶ exit status
//!         (validate)   │ build: memory, kvm, acpi, smbios, boot, devices, display, control
//!                      │ run:   processor threads, main loop (signals, exit)
//!                      └ end:   stop processors, flush devices and serial output
//! ```

pub mod acpi;
pub mod boot;
pub mod cli;
pub mod config;
pub mod control;
pub mod credentials;
pub mod display;
pub mod doctor;
pub mod exit;
pub mod firmware;
pub mod huge;
pub mod kvm;
pub mod layout;
pub mod log;
pub mod machine;
pub mod memory;
pub mod notify;
pub mod seccomp;
pub mod smbios;
pub mod sys;
pub mod terminal;
