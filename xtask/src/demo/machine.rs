//! A running drago-vmm: on this machine, or in the test host.

use std::{
    fs::File,
    io::{Read, Write},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
};

use anyhow::{Context, Result, bail};
use drago_tests::{
    console::Console,
    guest::Guest,
    progress::step,
    testbed::{Options, RemoteChild, Testbed},
    vm::{GUEST_DISK, SPICE_PORT, SSH_PORT},
};

use crate::build;

/// What the test host needs beside the guest's memory, in MiB.
const TESTBED_MEMORY_MIB: u32 = 3072;

/// The control socket in the test host.
const INNER_CONTROL: &str = "/run/demo.sock";

/// What a machine is made of, and how it is reached from here.
pub(super) struct Plan<'a> {
    pub(super) vmm: &'a Path,
    pub(super) guest: &'a Guest,
    /// For the logs, a copy of the disk, the control socket.
    pub(super) folder: &'a Path,
    pub(super) spice_port: u16,
    pub(super) ssh_port: u16,
    /// `None`: the path would be too long for a socket.
    pub(super) control: Option<PathBuf>,
}

/// A running drago-vmm.
pub(super) struct Machine {
    /// What it says on standard error.
    pub(super) log: Console,
    /// The guest's serial port.
    pub(super) serial: Console,
    place: Place,
}

enum Place {
    Native(Local),
    Nested { child: RemoteChild, _host: Box<Testbed> },
}

/// A drago-vmm on this machine, which does not outlive the demo.
struct Local(Child);

impl Local {
    fn end(&self) -> Result<()> {
        Command::new("kill").arg(self.0.id().to_string()).status().context("cannot run kill")?;
        Ok(())
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(None)) && self.end().is_ok() {
            let _ = self.0.wait();
        }
    }
}

impl Plan<'_> {
    /// The command for this machine; the guest writes to a copy of its disk.
    pub(super) fn native(&self) -> Result<Vec<String>> {
        let disk = match &self.guest.disk {
            Some(disk) => Some(copy_disk(disk, self.folder)?),
            None => None,
        };
        let control = self.control.as_ref().map(|path| path.display().to_string());
        Ok(self.command(disk.as_deref(), self.spice_port, self.ssh_port, control.as_deref()))
    }

    /// The command for the test host, where the usual ports are free, and which keeps nothing of what is
    /// written to its disk.
    pub(super) fn nested(&self) -> Vec<String> {
        let disk = self.guest.disk.as_ref().map(|_| Path::new(GUEST_DISK));
        self.command(disk, SPICE_PORT, SSH_PORT, self.control.as_ref().map(|_| INNER_CONTROL))
    }

    /// The documented command.
    fn command(
        &self,
        disk: Option<&Path>,
        spice: u16,
        ssh: u16,
        control: Option<&str>,
    ) -> Vec<String> {
        let guest = self.guest;
        let mut command = vec![self.vmm.display().to_string()];
        let mut option = |name: &str, value: String| command.extend([name.to_owned(), value]);
        option("--kernel", guest.kernel.display().to_string());
        option("--initrd", guest.initrd.display().to_string());
        option("--cmdline", guest.cmdline.clone());
        option("--memory", guest.memory_mib.to_string());
        option("--cpus", "2".to_owned());
        if let Some(disk) = disk {
            option("--disk", format!("path={}", disk.display()));
        }
        option("--net", format!("user,hostfwd=tcp::{ssh}-:22"));
        option("--spice", format!("127.0.0.1:{spice}"));
        if let Some(control) = control {
            option("--control", control.to_owned());
        }
        command
    }

    /// Files with what the guest's serial port and drago-vmm say.
    fn logs(&self) -> Result<[File; 2]> {
        let create = |name| {
            let path = self.folder.join(name);
            File::create(&path).with_context(|| format!("cannot write {}", path.display()))
        };
        Ok([create("serial.log")?, create("vmm.log")?])
    }
}

/// The guest may write to its disk; the original stays as it was made.
fn copy_disk(from: &Path, folder: &Path) -> Result<PathBuf> {
    let to = folder.join("root.img");
    step("copying the guest's disk", || {
        let status = Command::new("cp")
            .args(["--reflink=auto", "--sparse=always"])
            .args([from, &to])
            .status()
            .context("cannot run cp")?;
        if !status.success() {
            bail!("{} could not be copied to {}", from.display(), to.display());
        }
        Ok(())
    })?;
    Ok(to)
}

/// Keeps what a program writes.
fn keep(mut from: impl Read + Send + 'static, mut file: File) -> Console {
    let console = Console::default();
    let to = console.clone();
    thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok(length @ 1..) = from.read(&mut bytes) {
            to.push(&bytes[..length]);
            // A full disk must not end the machine.
            let _ = file.write_all(&bytes[..length]);
        }
        to.end();
    });
    console
}

impl Machine {
    pub(super) fn start_native(plan: &Plan<'_>, command: &[String]) -> Result<Self> {
        let [serial_log, vmm_log] = plan.logs()?;
        let child = Command::new(&command[0])
            .args(&command[1..])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot run drago-vmm")?;
        let mut local = Local(child);
        let serial = local.0.stdout.take().context("drago-vmm has no standard output")?;
        let log = local.0.stderr.take().context("drago-vmm has no standard error")?;
        Ok(Self {
            log: keep(log, vmm_log),
            serial: keep(serial, serial_log),
            place: Place::Native(local),
        })
    }

    pub(super) fn start_nested(plan: &Plan<'_>, command: &[String]) -> Result<Self> {
        let mut options = Options::new(build::agent()?);
        options.memory_mib = TESTBED_MEMORY_MIB + plan.guest.memory_mib;
        options.disks.extend(plan.guest.disk.clone());
        options.forward = vec![(plan.spice_port, SPICE_PORT), (plan.ssh_port, SSH_PORT)];
        options.forward_sockets =
            plan.control.iter().map(|path| (path.clone(), INNER_CONTROL.to_owned())).collect();
        let host = Box::new(Testbed::boot(&options)?);
        let command = host.command(&command[0]).args(&command[1..]);
        let (child, [serial, log]) = command.spawn_with_consoles(plan.logs()?)?;
        Ok(Self { log, serial, place: Place::Nested { child, _host: host } })
    }

    pub(super) fn wait(&mut self) -> Result<i32> {
        match &mut self.place {
            Place::Native(local) => Ok(local.0.wait()?.code().unwrap_or(1)),
            Place::Nested { child, .. } => child.wait(),
        }
    }

    /// Asks drago-vmm to end and waits for it.
    pub(super) fn end(&mut self) -> Result<()> {
        match &mut self.place {
            Place::Native(local) => local.end()?,
            Place::Nested { child, .. } => child.signal(15)?,
        }
        self.wait().map(drop)
    }
}
