//! `cargo xtask demo`: a guest desktop over SPICE on 127.0.0.1.

mod machine;
mod ready;

use std::{
    fs::{File, TryLockError},
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use clap::value_parser;
use drago_tests::{
    paths,
    progress::{note, step},
    vm::{SPICE_PORT, SSH_PORT},
};

use crate::{
    build,
    guest::Kind,
    packages::{self, For},
    ports,
};
use machine::{Machine, Plan};

/// Longer than any guest takes to come up, even nested on a busy machine.
const PATIENCE: Duration = Duration::from_secs(2400);

/// The longest path that a socket can have (unix(7)).
const SOCKET_PATH_MAX: usize = 107;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Which guest
    #[arg(long, value_enum, default_value = "weston", conflicts_with = "minimal")]
    guest: Kind,
    /// The same as --guest minimal: a text console, for a quick look
    #[arg(long)]
    minimal: bool,
    /// Take one picture with a real SPICE client when the desktop is up, and end
    #[arg(long, value_name = "FILE.png")]
    screenshot: Option<PathBuf>,
    /// Port of the SPICE server on 127.0.0.1
    #[arg(long, default_value_t = SPICE_PORT, value_parser = value_parser!(u16).range(1..))]
    spice_port: u16,
    /// Port on 127.0.0.1 that leads to the guest's ssh server
    #[arg(long, default_value_t = SSH_PORT, value_parser = value_parser!(u16).range(1..))]
    ssh_port: u16,
}

impl Args {
    fn kind(&self) -> Kind {
        if self.minimal { Kind::Minimal } else { self.guest }
    }

    /// That nobody else has the ports.
    fn check_ports(&self) -> Result<()> {
        ensure!(
            self.spice_port != self.ssh_port,
            "--spice-port and --ssh-port are the same: {}",
            self.ssh_port
        );
        ports::ensure_free(self.spice_port, |port| format!("--spice-port {port}"))?;
        ports::ensure_free(self.ssh_port, |port| format!("--ssh-port {port}"))
    }
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let kind = args.kind();
    ensure!(
        args.screenshot.is_none() || ready::can_be_read(kind),
        "--screenshot waits for what the guests minimal, weston and gnome show; this one shows nothing \
         of the kind"
    );
    // Before anything that takes minutes.
    args.check_ports()?;
    packages::install(if args.screenshot.is_some() { For::Screenshot } else { For::Demo })?;
    let vmm = build::vmm()?;
    let guest = kind.make()?;
    let (folder, _lock) = own_folder(&paths::cache("demo")?, &guest.name)?;
    let plan = Plan {
        vmm: &vmm,
        guest: &guest,
        folder: &folder,
        spice_port: args.spice_port,
        ssh_port: args.ssh_port,
        control: Some(folder.join("control.sock"))
            .filter(|path| path.as_os_str().len() <= SOCKET_PATH_MAX),
    };
    let mut machine = start(&plan, args)?;
    step("drago-vmm starts", || {
        let listens = machine.log.wait_for(0, "SPICE server listens", PATIENCE);
        listens.map(drop).context("drago-vmm did not start")
    })?;
    eprintln!();
    introduce(&plan, kind);
    let viewer = viewer(plan.spice_port);
    if let Some(file) = &args.screenshot {
        step(format_args!("waiting for the {}", kind.screen()), || {
            ready::screenshot(&guest, plan.spice_port, &folder, file)
        })?;
        println!("picture:     {}", file.display());
        machine.end()?;
        return Ok(ExitCode::SUCCESS);
    }
    if ready::wait(&plan, kind, &machine) {
        println!("ready:       the {} is there: {viewer}", kind.screen());
    }
    let status = machine.wait()?;
    ensure!(status == 0, "drago-vmm ended with status {status}: see {}/vmm.log", folder.display());
    println!("ended:       the guest is off");
    Ok(ExitCode::SUCCESS)
}

/// Starts drago-vmm on this machine if that can be, else in the test host.
fn start(plan: &Plan<'_>, args: &Args) -> Result<Machine> {
    let native = kvm_is_native(plan.vmm)?;
    let command = if native { plan.native()? } else { plan.nested() };
    // Somebody may have come meanwhile.
    args.check_ports()?;
    if native {
        note("this machine's KVM is native: the guest runs directly on it");
        note(format_args!("running: {}", shell_line(&command)));
        return Machine::start_native(plan, &command);
    }
    note(format_args!(
        "this machine has no KVM that can run a stock kernel (why: {} doctor):",
        plan.vmm.display()
    ));
    note("the same command runs inside an emulated machine that has one, some 20 times slower");
    let machine = Machine::start_nested(plan, &command)?;
    note(format_args!("running in there: {}", shell_line(&command)));
    note(format_args!(
        "its port {SPICE_PORT} (SPICE) is 127.0.0.1:{} here, its port {SSH_PORT} (the guest's ssh \
         server) 127.0.0.1:{}",
        plan.spice_port, plan.ssh_port
    ));
    Ok(machine)
}

/// Says what can be done with the machine.
fn introduce(plan: &Plan<'_>, kind: Kind) {
    let vmm = plan.vmm.display();
    println!(
        "look at it:  {} (it is booting; it is said when the {} is there)",
        viewer(plan.spice_port),
        kind.screen()
    );
    if !packages::in_path("remote-viewer") {
        println!("             (of the package virt-viewer, which is not installed here)");
    }
    if let Some(key) = &plan.guest.ssh_key {
        println!(
            "log in:      ssh -i {} -p {} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null \
             demo@127.0.0.1 (or root@)",
            key.display(),
            plan.ssh_port
        );
    }
    if let Some(control) = &plan.control {
        let ctl = format!("{vmm} ctl --control {}", control.display());
        println!("control:     {ctl} status (what else it can do: --help)");
        if kind.hears_power_button() {
            println!("shut down:   {ctl} shutdown");
        }
    }
    match kind {
        Kind::Minimal => println!("shut down:   poweroff, typed in its console"),
        _ => println!("             or in the guest: poweroff as root, su -c poweroff as demo"),
    }
    println!("end it:      Ctrl+C, which is like pulling the plug");
    println!("logs:        {0}/vmm.log and {0}/serial.log", plan.folder.display());
    println!("the host:    {vmm} doctor tells what machines can have on this one");
}

fn viewer(port: u16) -> String {
    format!("remote-viewer spice://127.0.0.1:{port}")
}

/// A folder for this run alone, locked: the first of NAME, NAME-2, … that no other demo has.
fn own_folder(demos: &Path, name: &str) -> Result<(PathBuf, File)> {
    let mut number = 1;
    loop {
        let folder =
            demos.join(if number == 1 { name.to_owned() } else { format!("{name}-{number}") });
        std::fs::create_dir_all(&folder)
            .with_context(|| format!("cannot make {}", folder.display()))?;
        let lock = File::create(folder.join("lock"))
            .with_context(|| format!("cannot write to {}", folder.display()))?;
        match lock.try_lock() {
            Ok(()) => return Ok((folder, lock)),
            Err(TryLockError::WouldBlock) => number += 1,
            Err(TryLockError::Error(error)) => {
                return Err(error)
                    .with_context(|| format!("the folder {} cannot be locked", folder.display()));
            }
        }
    }
}

fn kvm_is_native(vmm: &Path) -> Result<bool> {
    let out = Command::new(vmm).args(["doctor", "--json"]).output()?;
    let findings: serde_json::Value =
        serde_json::from_slice(&out.stdout).context("drago-vmm doctor said nothing")?;
    Ok(findings[0]["name"] == "kvm" && findings[0]["level"] == "ok")
}

fn shell_line(command: &[String]) -> String {
    let quoted = |word: &String| {
        if word.contains(' ') { format!("\"{word}\"") } else { word.clone() }
    };
    command.iter().map(quoted).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_demos_of_one_guest_have_folders_of_their_own() {
        let demos = tempfile::tempdir().unwrap();
        let mut runs: Vec<_> =
            (0..3).map(|_| own_folder(demos.path(), "weston").unwrap()).collect();
        let names = |runs: &[(PathBuf, File)]| {
            runs.iter()
                .map(|(folder, _)| folder.file_name().unwrap().display().to_string())
                .collect::<Vec<_>>()
        };
        assert_eq!(names(&runs), ["weston", "weston-2", "weston-3"]);
        // One ends: its folder is the next one's.
        runs.remove(0);
        runs.push(own_folder(demos.path(), "weston").unwrap());
        assert_eq!(names(&runs), ["weston-2", "weston-3", "weston"]);
    }
}
