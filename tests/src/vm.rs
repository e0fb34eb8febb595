//! A virtual machine under test: drago-vmm in the test host, its console, its log and its end.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::client::SpiceClient;
use crate::console::{Console, last_lines};
use crate::guest::Guest;
use crate::paths;
use crate::picture::{Picture, reads};
use crate::progress::note;
use crate::testbed::{Options, RemoteChild, RemoteCommand, RemoteOutput, Testbed};

/// How long anything may take. Nested on a busy machine everything is some 50 times slower than life, so
/// this only ends what hangs.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// How long to wait for a picture before a look at the guest.
const LOOK: Duration = Duration::from_secs(20);

/// A guest's disk in a test host booted with one.
pub const GUEST_DISK: &str = "/dev/vda";

/// The port inside on which the suites' machines serve SPICE.
pub const SPICE_PORT: u16 = 5900;

/// The port inside on which machines serve VNC.
pub const VNC_PORT: u16 = 5901;

/// The port inside that leads to the guest's ssh server.
pub const SSH_PORT: u16 = 2223;

/// The test host with what a suite needs.
#[derive(Debug)]
pub struct Host {
    testbed: Testbed,
    programs: PathBuf,
    sockets: tempfile::TempDir,
    users: Mutex<Vec<String>>,
    /// Where logs and pictures of this suite go.
    pub results: PathBuf,
    /// Two runs must not write to one copy of a disk.
    _lock: File,
}

/// A running drago-vmm.
#[derive(Debug)]
pub struct Vm {
    child: RemoteChild,
    /// The guest's first serial port.
    pub serial: Console,
    /// What drago-vmm says on stderr.
    pub log: Console,
    results: PathBuf,
    name: String,
    shots: u32,
}

impl Host {
    /// Boots a test host for a suite. `agent` is the test host agent's executable; drago-vmm is taken
    /// from the same folder unless `DRAGO_PROGRAMS` names another one.
    ///
    /// # Errors
    /// If the programs are not built or the test host does not boot.
    pub fn boot(suite: &str, agent: &Path, memory_mib: u32) -> Result<Self> {
        Self::boot_with(suite, agent, Options::new(agent.to_path_buf()), memory_mib)
    }

    /// The same with an IOMMU and devices for a guest ([`Options::spare_devices`]).
    ///
    /// # Errors
    /// As above.
    pub fn boot_with_spare_devices(
        suite: &str,
        agent: &Path,
        memory_mib: u32,
        devices: Vec<String>,
    ) -> Result<Self> {
        let mut options = Options::new(agent.to_path_buf());
        options.spare_devices = devices;
        Self::boot_with(suite, agent, options, memory_mib)
    }

    /// The same with a guest's disk, which is [`GUEST_DISK`] in the test host. What the guest writes to
    /// it is lost at the end.
    ///
    /// # Errors
    /// As above, and if the guest has no disk.
    pub fn boot_with_disk(
        suite: &str,
        agent: &Path,
        memory_mib: u32,
        guest: &Guest,
    ) -> Result<Self> {
        let mut options = Options::new(agent.to_path_buf());
        options.disks = vec![guest.disk.clone().context("this guest has no disk")?];
        Self::boot_with(suite, agent, options, memory_mib)
    }

    fn boot_with(suite: &str, agent: &Path, mut options: Options, memory_mib: u32) -> Result<Self> {
        let programs = match std::env::var_os("DRAGO_PROGRAMS") {
            Some(dir) => PathBuf::from(dir),
            None => agent.parent().context("the agent has no folder")?.to_path_buf(),
        };
        for program in ["drago-vmm", "drago-gpu"] {
            if !programs.join(program).is_file() {
                bail!(
                    "no {program} in {}: cargo build -p drago-vmm -p drago-gpu, or run cargo xtask test",
                    programs.display()
                );
            }
        }
        let results = paths::cache(&format!("e2e/{suite}"))?;
        let lock = File::create(results.join("lock"))?;
        if lock.try_lock().is_err() {
            note(format_args!(
                "another run of the suite {suite} goes on here: waiting for its end"
            ));
            lock.lock().context("cannot lock the suite's folder")?;
        }
        options.memory_mib = memory_mib;
        // The cache, which may lie elsewhere, for the project's own tools.
        options.rw = vec![paths::cache("debian")?, paths::cache("guests")?];
        options.forward = vec![(0, SPICE_PORT), (0, VNC_PORT), (0, SSH_PORT)];
        let testbed = Testbed::boot(&options)?;
        // Not below the checkout: a socket's path has room for 108 bytes.
        let sockets = tempfile::tempdir()?;
        Ok(Self { testbed, programs, sockets, users: Mutex::default(), results, _lock: lock })
    }

    /// Runs a command in the test host to its end.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn run(&self, script: &str) -> Result<RemoteOutput> {
        self.testbed.command("sh").args(["-c", script]).output()
    }

    /// Runs a command in the test host that is to succeed; what it printed.
    ///
    /// # Errors
    /// If it does not end with 0.
    pub fn shell(&self, script: &str) -> Result<String> {
        self.testbed.shell(script)
    }

    /// The path of one of the project's programs.
    pub fn program(&self, name: &str) -> String {
        self.programs.join(name).display().to_string()
    }

    /// Starts drago-vmm with a guest and further options.
    ///
    /// # Errors
    /// If the test host is gone.
    pub fn start(&self, name: &str, guest: &Guest, options: &[&str]) -> Result<Vm> {
        let mut command = self
            .testbed
            .command(self.program("drago-vmm"))
            .args(["--kernel", &guest.kernel.display().to_string()])
            .args(["--initrd", &guest.initrd.display().to_string()]);
        if !options.contains(&"--cmdline") {
            command = command.args(["--cmdline", &guest.cmdline]);
        }
        if !options.contains(&"--memory") {
            command = command.args(["--memory", &guest.memory_mib.to_string()]);
        }
        self.spawn(name, command.args(options.iter().copied()))
    }

    /// A program to run in the test host with [`Host::spawn`].
    pub fn command(&self, program: impl Into<String>) -> RemoteCommand {
        self.testbed.command(program)
    }

    /// Starts a program that runs a guest, with the guest's serial port as its standard output; or one
    /// that helps to.
    ///
    /// # Errors
    /// If the test host is gone.
    pub fn spawn(&self, name: &str, command: RemoteCommand) -> Result<Vm> {
        let file = |what| File::create(self.results.join(format!("{name}-{what}.log")));
        let (child, [serial, log]) =
            command.spawn_with_consoles([file("serial")?, file("vmm")?])?;
        Ok(Vm {
            child,
            serial,
            log,
            results: self.results.clone(),
            name: name.to_owned(),
            shots: 0,
        })
    }

    /// Connects a real SPICE client to the machine.
    ///
    /// # Errors
    /// If the client cannot be started.
    pub fn spice(&self) -> Result<SpiceClient> {
        SpiceClient::connect(self.outer(SPICE_PORT)?)
    }

    /// The port on this machine that leads to the machine's SPICE server.
    ///
    /// # Errors
    /// Never for a host made by [`Host::boot`].
    pub fn spice_port(&self) -> Result<u16> {
        self.outer(SPICE_PORT)
    }

    /// The port on this machine that leads to one inside.
    ///
    /// # Errors
    /// If it was not forwarded.
    pub fn outer(&self, inner: u16) -> Result<u16> {
        self.testbed.outer_port(inner).with_context(|| format!("port {inner} is not forwarded"))
    }

    /// Runs a command in the guest over ssh, as `root` or `demo`.
    ///
    /// # Errors
    /// If ssh fails or the command does not end with 0.
    pub fn ssh(&self, guest: &Guest, user: &str, command: &str) -> Result<String> {
        // Logging in takes seconds on an emulated CPU: one connection per user serves all commands.
        let mut users = self.users.lock().unwrap_or_else(PoisonError::into_inner);
        if !users.iter().any(|known| known == user) {
            let status = self
                .ssh_command(guest, user)?
                .args(["-M", "-N", "-f"])
                .arg(format!("{user}@127.0.0.1"))
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status()
                .context("cannot run ssh (package openssh-client)")?;
            if !status.success() {
                bail!("ssh as {user} through hostfwd: {status}");
            }
            users.push(user.to_owned());
        }
        drop(users);
        let mut ssh = self.ssh_command(guest, user)?;
        ssh.arg(format!("{user}@127.0.0.1")).arg(command);
        crate::debian::check(&mut ssh)
    }

    /// Copies a program to a place in the guest, as root.
    ///
    /// # Errors
    /// As [`ssh`](Self::ssh).
    pub fn install(&self, guest: &Guest, program: &Path, path: &str) -> Result<()> {
        let file = File::open(program).with_context(|| program.display().to_string())?;
        let mut ssh = self.ssh_command(guest, "root")?;
        ssh.arg("root@127.0.0.1").arg(format!("cat >{path} && chmod 755 {path}")).stdin(file);
        crate::debian::check(&mut ssh).map(drop)
    }

    fn ssh_command(&self, guest: &Guest, user: &str) -> Result<Command> {
        let key = guest.ssh_key.as_ref().context("this guest has no ssh key")?;
        let mut ssh = Command::new("ssh");
        ssh.arg("-i")
            .arg(key)
            .args(["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"])
            .args(["-o", "LogLevel=ERROR", "-o", "BatchMode=yes", "-o", "ConnectTimeout=300"])
            .arg("-o")
            .arg(format!("ControlPath={}/{user}", self.sockets.path().display()))
            .args(["-p", &self.outer(SSH_PORT)?.to_string()])
            .stdin(Stdio::null());
        Ok(ssh)
    }
}

impl Vm {
    /// Types a line on the guest's serial console.
    ///
    /// # Errors
    /// If the test host is gone.
    pub fn type_serial(&self, line: &str) -> Result<()> {
        self.child.stdin().write_all(format!("{line}\n").as_bytes()).context("no serial console")
    }

    /// Runs a command in a root shell on the serial console and returns what it printed.
    ///
    /// # Errors
    /// If the end of the command is not seen.
    pub fn serial_command(&self, command: &str) -> Result<String> {
        self.serial.shell(&mut self.child.stdin(), command, PATIENCE)
    }

    /// Waits for the end of drago-vmm: its exit status.
    ///
    /// # Errors
    /// If it does not end.
    pub fn wait(&mut self) -> Result<i32> {
        self.child.wait_timeout(PATIENCE).with_context(|| self.state())
    }

    /// Whether drago-vmm has ended.
    ///
    /// # Errors
    /// If the test host is gone.
    pub fn ended(&mut self) -> Result<Option<i32>> {
        self.child.try_wait()
    }

    /// Sends drago-vmm a signal.
    ///
    /// # Errors
    /// If the test host is gone.
    pub fn signal(&self, number: u8) -> Result<()> {
        self.child.signal(number)
    }

    /// Ends drago-vmm's standard input.
    ///
    /// # Errors
    /// If the test host is gone.
    pub fn close_stdin(&self) -> Result<()> {
        self.child.stdin().close().context("the test host is gone")
    }

    /// A picture of the screen as a client shows it, kept with the suite's results.
    ///
    /// # Errors
    /// If the client has none.
    pub fn picture(&mut self, client: &mut SpiceClient) -> Result<Picture> {
        client.wait_state("a picture", PATIENCE, |state| state["width"].as_u64() > Some(0))?;
        self.shots += 1;
        let path = self.results.join(format!("{}-{}.ppm", self.name, self.shots % 4));
        client.screenshot(&path)?;
        Picture::open(&path)
    }

    /// Waits until the picture satisfies a condition; looks again whenever it changes.
    ///
    /// # Errors
    /// If that does not come about in time; the last picture is saved.
    pub fn wait_picture(
        &mut self,
        client: &mut SpiceClient,
        what: &str,
        is: impl FnMut(&Picture) -> Result<bool>,
    ) -> Result<Picture> {
        self.wait_picture_within(client, what, PATIENCE, is)
    }

    /// As [`Vm::wait_picture`], with a limit of its own.
    ///
    /// # Errors
    /// As [`Vm::wait_picture`].
    pub fn wait_picture_within(
        &mut self,
        client: &mut SpiceClient,
        what: &str,
        limit: Duration,
        mut is: impl FnMut(&Picture) -> Result<bool>,
    ) -> Result<Picture> {
        let end = std::time::Instant::now() + limit;
        loop {
            let seen = client.ask("state", json!({}))?["invalidated"].as_u64();
            let picture = self.picture(client)?;
            if is(&picture)? {
                let kept =
                    self.results.join(format!("{}-{}.png", self.name, what.replace(' ', "-")));
                picture.save_png(&kept)?;
                return Ok(picture);
            }
            if let Some(code) = self.ended()? {
                bail!(
                    "drago-vmm ended with {code} before the screen showed {what}\n{}",
                    self.state()
                );
            }
            // A guest that is stuck says so on its serial port, and its picture never changes.
            let changed = loop {
                let now = std::time::Instant::now();
                let left = end.saturating_duration_since(now);
                let changed = client
                    .wait_state(what, left.min(LOOK), |state| state["invalidated"].as_u64() != seen)
                    .map(drop);
                match self.serial.stuck() {
                    Some(sign) => {
                        break Err(anyhow::anyhow!("the guest's kernel is stuck: {sign}"));
                    }
                    // Nothing but the look was over.
                    None if changed.is_err()
                        && left > LOOK
                        && now.elapsed() >= LOOK
                        && self.ended()?.is_none() => {}
                    None => break changed,
                }
            };
            if let Err(error) = changed {
                let kept = self.results.join(format!("{}-last.png", self.name));
                picture.save_png(&kept)?;
                return Err(error.context(format!(
                    "the screen never showed {what}; last picture: {}\n{}",
                    kept.display(),
                    self.state()
                )));
            }
        }
    }

    /// Waits until a text can be read on the screen.
    ///
    /// # Errors
    /// As [`Vm::wait_picture`].
    pub fn wait_text(&mut self, client: &mut SpiceClient, text: &str) -> Result<Picture> {
        let what = format!("the text {text}");
        self.wait_picture(client, &what, |picture| Ok(reads(&picture.text(None)?, text)))
    }

    /// The ends of both logs, for an error.
    pub fn state(&self) -> String {
        let tail = |console: &Console| last_lines(&console.since(0), 25);
        format!(
            "--- drago-vmm says:\n{}\n--- serial console:\n{}\n--- all of it: {}",
            tail(&self.log),
            tail(&self.serial),
            self.results.display()
        )
    }
}
