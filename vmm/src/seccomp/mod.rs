//! The system calls that are left to drago-vmm once the guest runs (see `docs/sandbox.md`).
//!
//! One filter is for the whole process; vCPU threads, which see what the guest does first, add a
//! narrower one of their own. Programs that have to be started again are started by the launcher
//! ([`host::process::launcher`]), which is forked off before, and threads that a vCPU wants by the
//! nursery ([`host::threads`]).

mod tables;

use std::{io, str::FromStr};

use host::{
    process::launcher,
    seccomp::{Error, Filter, Scope, Violation},
    threads,
};

/// `--sandbox`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// A system call that is not in a table ends the process.
    #[default]
    On,
    /// No filter, here and in drago-gpu.
    Off,
    /// Such system calls are carried out and the kernel's log tells about them.
    Log,
}

impl Mode {
    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::On => "on",
            Self::Off => "off",
            Self::Log => "log",
        }
    }
}

impl FromStr for Mode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [Self::On, Self::Off, Self::Log]
            .into_iter()
            .find(|mode| mode.name() == text)
            .ok_or_else(|| "expected on, off or log".to_owned())
    }
}

/// To be called first of all, while there is one thread: forks the launcher off.
pub fn prepare(mode: Mode) -> io::Result<()> {
    if mode == Mode::Off {
        return Ok(());
    }
    launcher::fork()
}

/// To be called last, when the machine is gone.
pub fn finish() {
    launcher::end();
}

/// What a vCPU's thread adds when it starts.
#[derive(Debug, Default)]
pub struct VcpuFilter(Option<Filter>);

impl VcpuFilter {
    /// Installs it for this thread.
    pub fn install(&self) {
        if let Some(filter) = &self.0
            && let Err(error) = filter.install(Scope::Thread)
        {
            tracing::warn!(%error, "a processor's thread has the filter of the process only");
        }
    }
}

/// What some machines have and others do without.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Extras {
    /// A device that connects with its socket again later.
    pub connecting: bool,
    /// Devices of the host.
    pub host_devices: bool,
}

/// Closes the sandbox of the whole process. To be called when all that needs files and other
/// programs is there, before the guest runs.
pub fn close(mode: Mode, extras: Extras) -> VcpuFilter {
    let violation = match mode {
        Mode::Off => {
            tracing::warn!("no filter of system calls: --sandbox off");
            return VcpuFilter::default();
        }
        Mode::On => Violation::Kill,
        Mode::Log => Violation::Log,
    };
    match try_close(violation, extras) {
        Ok(filter) => VcpuFilter(Some(filter)),
        Err(error) => {
            tracing::warn!(
                cause = error.source().map(ToString::to_string),
                "there is no sandbox: {error}"
            );
            VcpuFilter::default()
        }
    }
}

fn try_close(violation: Violation, extras: Extras) -> Result<Filter, Box<dyn std::error::Error>> {
    threads::start_nursery()?;
    launcher::seal()?;
    let process = process_filter(violation, extras)?;
    let vcpu = vcpu_filter(violation, extras)?;
    process.install(Scope::Process)?;
    tracing::debug!(?process, ?vcpu, "sandbox closed");
    Ok(vcpu)
}

fn process_filter(violation: Violation, extras: Extras) -> Result<Filter, Error> {
    let connecting = if extras.connecting { tables::CONNECTING } else { &[] };
    let host_devices = if extras.host_devices { tables::HOST_DEVICES } else { &[] };
    let tables = [tables::RUNTIME, tables::VCPU, tables::OTHERS, connecting, host_devices];
    Filter::new(&tables, violation)
}

fn vcpu_filter(violation: Violation, extras: Extras) -> Result<Filter, Error> {
    let host_devices = if extras.host_devices { tables::HOST_DEVICES } else { &[] };
    Filter::new(&[tables::RUNTIME, tables::VCPU, host_devices], violation)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tables_are_filters() {
        for violation in [Violation::Kill, Violation::Log] {
            for extras in [Extras::default(), Extras { connecting: true, host_devices: true }] {
                process_filter(violation, extras).unwrap();
                vcpu_filter(violation, extras).unwrap();
            }
        }
    }

    #[test]
    fn modes_have_names() {
        assert_eq!("log".parse(), Ok(Mode::Log));
        assert!("maybe".parse::<Mode>().is_err());
        assert_eq!(Mode::default().name(), "on");
    }
}
