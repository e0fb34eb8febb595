//! The few devices of a PC that are not on the PCI bus, all on I/O ports.
//!
//! | module | ports | purpose |
//! |---|---|---|
//! | [`serial`] | `0x3f8` | 16550A UART, the guest's first console |
//! | [`i8042`] | `0x60`, `0x64` | reset pulse; no keyboard (that is virtio-input's job) |
//! | [`cmos`] | `0x70`, `0x71` | MC146818 clock, so that nobody waits for a missing one |
//! | [`pvpanic`] | `0x505` | the guest tells that it panicked |
//! | [`power`] | `0x600`–`0x603` | ACPI sleep and reset registers, power button event |
//! | [`port61`] | `0x61` | timer 2 gate, for guests that calibrate against the PIT |
//!
//! Devices that can end the machine report a [`SystemEvent`] through a [`SystemEventSink`]; what to
//! do about it is the VMM's business.

use std::sync::Arc;

pub mod cmos;
pub mod i8042;
pub mod port61;
pub mod power;
pub mod pvpanic;
pub mod serial;

/// Something the guest did that concerns the whole machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SystemEvent {
    /// The guest entered ACPI state S5: it is switched off.
    PowerOff,
    /// The guest asked to be reset; the value names the way, for the log.
    Reset(&'static str),
    /// The guest's kernel panicked (pvpanic). It may still write a dump or reboot by itself.
    Panicked,
    /// The guest's kernel panicked and has loaded a crash kernel (kdump).
    CrashLoaded,
}

/// Receives [`SystemEvent`]s on a vCPU thread. Must be quick.
pub type SystemEventSink = Arc<dyn Fn(SystemEvent) + Send + Sync>;
