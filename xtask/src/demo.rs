//! `cargo xtask demo`: a guest desktop over SPICE on 127.0.0.1.

use std::{
    fs::File,
    io::{Read, Write},
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use drago_tests::{
    client::SpiceClient,
    console::{Console, Sink},
    desktop,
    guest::Guest,
    paths,
    picture::Picture,
    progress::{note, step},
    testbed::{Options, RemoteChild, Stream, Testbed},
    vm::GUEST_DISK,
};
use serde_json::json;

use crate::{
    build,
    guest::Kind,
    packages::{self, For},
};

/// Longer than any guest takes to come up, even nested on a busy machine.
const PATIENCE: Duration = Duration::from_secs(2400);

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
    #[arg(long, default_value_t = 5900)]
    spice_port: u16,
    /// Port on 127.0.0.1 that leads to the guest's ssh server
    #[arg(long, default_value_t = 2223)]
    ssh_port: u16,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let purpose = if args.screenshot.is_some() { For::Screenshot } else { For::Demo };
    packages::install(purpose)?;
    let vmm = step("building drago-vmm", || build::program("drago-vmm", "drago-vmm", true))?;
    step("building drago-gpu", || build::program("drago-gpu", "drago-gpu", true))?;
    let kind = if args.minimal { Kind::Minimal } else { args.guest };
    let guest = kind.make()?;
    let folder = paths::cache(&format!("demo/{}", guest.name))?;
    let native = kvm_is_native(&vmm)?;
    let disk = match &guest.disk {
        Some(disk) if native => Some(copy_disk(disk, &folder)?),
        // A disk of the test host, which keeps nothing of what is written to it.
        Some(_) => Some(GUEST_DISK.into()),
        None => None,
    };
    // Inside the test host the documented ports are free whatever is taken outside.
    let (spice, ssh) = if native { (args.spice_port, args.ssh_port) } else { (5900, 2223) };
    let command = vmm_command(&vmm, &guest, disk.as_deref(), spice, ssh);
    let mut machine = if native {
        note("this machine's KVM is native: the guest runs directly on it");
        Machine::start_native(&command, &folder)?
    } else {
        note("this machine has no KVM that can run a stock kernel (see `drago-vmm doctor`):");
        note("the same command runs inside an emulated machine that has one, some 20 times slower");
        Machine::start_nested(&command, &guest, &folder, args)?
    };
    note(format_args!("running: {}", shell_line(&command)));
    machine.log.wait_for(0, "SPICE server listens", PATIENCE).context("drago-vmm did not start")?;
    eprintln!();
    println!("look at it:  remote-viewer spice://127.0.0.1:{}", args.spice_port);
    if !packages::in_path("remote-viewer") {
        println!("             (of the package virt-viewer, which is not installed here)");
    }
    if let Some(key) = &guest.ssh_key {
        println!(
            "log in:      ssh -i {} -p {} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null \
             demo@127.0.0.1",
            key.display(),
            args.ssh_port
        );
    }
    println!("logs:        {}/vmm.log and serial.log", folder.display());
    match &args.screenshot {
        Some(file) => {
            step("waiting for the desktop", || screenshot(&guest, args.spice_port, &folder, file))?;
            println!("picture:     {}", file.display());
            machine.end()?;
            Ok(ExitCode::SUCCESS)
        }
        None => {
            println!("end it:      shut the guest down, or press Ctrl+C");
            if let Some(prompt) = kind.prompt() {
                step("the guest boots", || machine.serial.wait_for(0, prompt, PATIENCE).map(drop))?;
            }
            let code = machine.wait()?;
            Ok(ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX)))
        }
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

fn kvm_is_native(vmm: &Path) -> Result<bool> {
    let out = Command::new(vmm).args(["doctor", "--json"]).output()?;
    let findings: serde_json::Value =
        serde_json::from_slice(&out.stdout).context("drago-vmm doctor said nothing")?;
    Ok(findings[0]["name"] == "kvm" && findings[0]["level"] == "ok")
}

/// The documented command.
fn vmm_command(
    vmm: &Path,
    guest: &Guest,
    disk: Option<&Path>,
    spice: u16,
    ssh: u16,
) -> Vec<String> {
    let mut command = vec![
        vmm.display().to_string(),
        "--kernel".to_owned(),
        guest.kernel.display().to_string(),
        "--initrd".to_owned(),
        guest.initrd.display().to_string(),
        "--cmdline".to_owned(),
        guest.cmdline.clone(),
        "--memory".to_owned(),
        guest.memory_mib.to_string(),
        "--cpus".to_owned(),
        "2".to_owned(),
    ];
    if let Some(disk) = disk {
        command.extend(["--disk".to_owned(), format!("path={}", disk.display())]);
    }
    command.extend(["--net".to_owned(), format!("user,hostfwd=tcp::{ssh}-:22")]);
    command.extend(["--spice".to_owned(), format!("127.0.0.1:{spice}")]);
    command
}

fn shell_line(command: &[String]) -> String {
    let quoted = |word: &String| {
        if word.contains(' ') { format!("\"{word}\"") } else { word.clone() }
    };
    command.iter().map(quoted).collect::<Vec<_>>().join(" ")
}

/// A running drago-vmm, here or in the test host.
struct Machine {
    log: Console,
    serial: Console,
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

/// Keeps what a program writes.
fn keep(mut from: impl Read + Send + 'static, file: &Path) -> Result<Console> {
    let mut file = File::create(file)?;
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
    Ok(console)
}

impl Machine {
    fn start_native(command: &[String], folder: &Path) -> Result<Self> {
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
            log: keep(log, &folder.join("vmm.log"))?,
            serial: keep(serial, &folder.join("serial.log"))?,
            place: Place::Native(local),
        })
    }

    fn start_nested(command: &[String], guest: &Guest, folder: &Path, args: &Args) -> Result<Self> {
        let (log, serial) = (Console::default(), Console::default());
        let mut options = Options::new(build::agent()?);
        options.memory_mib = 6144;
        options.disks.extend(guest.disk.clone());
        options.forward = vec![(args.spice_port, 5900), (args.ssh_port, 2223)];
        let host = Box::new(Testbed::boot(&options)?);
        let mut files =
            [File::create(folder.join("serial.log"))?, File::create(folder.join("vmm.log"))?];
        let (to_serial, to_log) = (Sink(serial.clone()), Sink(log.clone()));
        let child = host.command(&command[0]).args(&command[1..]).spawn(move |stream, bytes| {
            let (console, file) = match stream {
                Stream::Out => (&to_serial.0, &mut files[0]),
                Stream::Err => (&to_log.0, &mut files[1]),
            };
            console.push(bytes);
            // A full disk must not end the machine.
            let _ = file.write_all(bytes);
        })?;
        Ok(Self { log, serial, place: Place::Nested { child, _host: host } })
    }

    fn wait(&mut self) -> Result<i32> {
        match &mut self.place {
            Place::Native(local) => Ok(local.0.wait()?.code().unwrap_or(1)),
            Place::Nested { child, .. } => child.wait(),
        }
    }

    /// Asks drago-vmm to end and waits for it.
    fn end(&mut self) -> Result<()> {
        match &mut self.place {
            Place::Native(local) => local.end()?,
            Place::Nested { child, .. } => child.signal(15)?,
        }
        self.wait().map(drop)
    }
}

/// Waits with a real client until the desktop is there, and keeps its picture.
fn screenshot(guest: &Guest, port: u16, folder: &Path, file: &Path) -> Result<()> {
    let mut client = SpiceClient::connect(port)?;
    let shot = folder.join("screenshot.ppm");
    let end = Instant::now() + PATIENCE;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        client.wait_state("a picture", left, |state| state["width"].as_u64() > Some(0))?;
        let seen = client.ask("state", json!({}))?["invalidated"].as_u64();
        client.screenshot(&shot)?;
        let picture = Picture::open(&shot)?;
        if desktop::is_shown(&guest.name, &picture)? {
            return picture.save_png(file);
        }
        let left = end.saturating_duration_since(Instant::now());
        client
            .wait_state("a change on the screen", left, |state| {
                state["invalidated"].as_u64() != seen
            })
            .with_context(|| {
                format!("the desktop never came up; last picture: {}", shot.display())
            })?;
    }
}
