//! Boots and ends the test host.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Stdio};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::carry::ForwardedSocket;
use super::proto::{AGENT_PORT, FAILED, READY, Request};
use super::remote::RemoteCommand;
use super::watch::Watch;
use super::{image, leftovers};
use crate::console::last_lines;
use crate::{paths, progress};

/// A boot takes 4-6 s on an idle machine; a loaded one gets much longer.
const BOOT_LIMIT: Duration = Duration::from_secs(300);

/// How a test host is to be.
#[derive(Debug, Clone)]
pub struct Options {
    /// The agent's executable on this machine (`drago-testbed-agent`).
    pub agent: PathBuf,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Number of virtual CPUs.
    pub cpus: u32,
    /// What they are, in QEMU's words; they need SVM.
    pub cpu: String,
    /// Folders that are writable inside, under the same path. The checkout always is.
    pub rw: Vec<PathBuf>,
    /// Disk images, inside `/dev/vda` and so on. What is written to them is lost at the end. (Files in
    /// shared folders can be disks too, but Linux 6.12 may lock up when it writes much to 9p.)
    pub disks: Vec<PathBuf>,
    /// TCP ports (this machine's 127.0.0.1:first → second inside); 0 as first picks a free one.
    pub forward: Vec<(u16, u16)>,
    /// Unix sockets (this machine's first, which is made → second inside).
    pub forward_sockets: Vec<(PathBuf, String)>,
    /// Devices that no driver of the test host has, as QEMU's arguments. With any there is an IOMMU,
    /// and they can be passed through.
    pub spare_devices: Vec<String>,
}

impl Options {
    /// 4 GiB, 2 CPUs, no disks, nothing forwarded.
    pub fn new(agent: PathBuf) -> Self {
        Self {
            agent,
            memory_mib: 4096,
            cpus: 2,
            cpu: image::CPU.to_owned(),
            rw: Vec::new(),
            disks: Vec::new(),
            forward: Vec::new(),
            forward_sockets: Vec::new(),
            spare_devices: Vec::new(),
        }
    }
}

/// A running test host. Dropping it ends it at once.
#[derive(Debug)]
pub struct Testbed {
    qemu: Arc<Mutex<Child>>,
    agent_port: u16,
    token: String,
    forward: Vec<(u16, u16)>,
    log: PathBuf,
    _lease: TcpStream,
    _sockets: Vec<ForwardedSocket>,
    watch: Option<Watch>,
}

impl Testbed {
    /// Boots a test host and waits until it takes commands.
    ///
    /// # Errors
    /// If something needed is missing or the boot fails; the text names the log.
    pub fn boot(options: &Options) -> Result<Self> {
        let (kernel, initramfs) = image::kernel_and_initramfs()?;
        let what = format!(
            "booting the nested-KVM test host (QEMU TCG, Linux {}, {} MiB, {} CPUs)",
            kernel.version, options.memory_mib, options.cpus
        );
        progress::step(what, || Self::start(options, &kernel, &initramfs))
    }

    fn start(options: &Options, kernel: &crate::debian::Kernel, initramfs: &Path) -> Result<Self> {
        let agent = options
            .agent
            .canonicalize()
            .with_context(|| format!("no agent at {}", options.agent.display()))?;
        let mut rw = vec![paths::workspace().canonicalize()?];
        for dir in &options.rw {
            let dir = dir.canonicalize().with_context(|| format!("no folder {}", dir.display()))?;
            if dir.to_string_lossy().contains(char::is_whitespace) {
                bail!("{}: a folder with spaces cannot be shared", dir.display());
            }
            if !rw.iter().any(|known| dir.starts_with(known)) {
                rw.push(dir);
            }
        }

        let cache = paths::cache("testbed")?;
        leftovers::forget(&cache, initramfs);
        let log = paths::cache("testbed/logs")?.join(format!("serial-{}.log", std::process::id()));
        let mut token = [0; 16];
        File::open("/dev/urandom")?.read_exact(&mut token)?;
        let token: String = token.iter().map(|byte| format!("{byte:02x}")).collect();
        // A file without a name, which QEMU reads while it starts: however this process ends, nothing is
        // left behind.
        let mut both = tempfile::tempfile_in(&cache)?;
        both.write_all(&std::fs::read(initramfs)?)?;
        both.write_all(&image::config(&token, &agent, &rw)?)?;
        let path = format!("/proc/{}/fd/{}", std::process::id(), both.as_raw_fd());

        let mut free = free_ports(1 + options.forward.len())?.into_iter();
        let mut next = || free.next().context("too few TCP ports");
        let agent_port = next()?;
        let mut forward = options.forward.clone();
        for (outer, _) in &mut forward {
            if *outer == 0 {
                *outer = next()?;
            }
        }
        let mut net =
            format!("user,id=n,hostfwd=tcp:127.0.0.1:{agent_port}-10.0.2.15:{AGENT_PORT}");
        for (outer, inner) in &forward {
            net.push_str(&format!(",hostfwd=tcp:127.0.0.1:{outer}-127.0.0.1:{inner}"));
        }
        let mut qemu = image::qemu(kernel, path.as_ref(), options)?;
        qemu.args(["-netdev", &net, "-device", "virtio-net-pci,netdev=n,romfile="])
            .args([
                "-fsdev",
                "local,id=outer,path=/,security_model=none,readonly=on,multidevs=remap",
            ])
            .args(["-device", "virtio-9p-pci,fsdev=outer,mount_tag=outer"]);
        for (n, dir) in rw.iter().enumerate() {
            qemu.arg("-fsdev")
                .arg(format!(
                    "local,id=rw{n},path={},security_model=none,multidevs=remap",
                    dir.display()
                ))
                .args(["-device", &format!("virtio-9p-pci,fsdev=rw{n},mount_tag=rw{n}")]);
        }
        for (n, disk) in options.disks.iter().enumerate() {
            let disk =
                disk.canonicalize().with_context(|| format!("no disk {}", disk.display()))?;
            qemu.arg("-drive")
                .arg(format!(
                    "if=none,id=disk{n},format=raw,cache=unsafe,snapshot=on,file={}",
                    disk.display()
                ))
                .args(["-device", &format!("virtio-blk-pci,drive=disk{n}")]);
        }
        let mut qemu = qemu
            .args(&options.spare_devices)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(log.with_extension("qemu"))?)
            // Ctrl-C ends the driver, whose lease ends the test host in order.
            .process_group(0)
            .spawn()
            .context("cannot run QEMU for the test host")?;
        let ready = qemu
            .stdout
            .take()
            .context("QEMU has no output")
            .and_then(|console| wait_ready(console, &log));
        let connected = ready.and_then(|()| {
            let lease = lease(agent_port, &token)?;
            let sockets = options.forward_sockets.iter();
            let sockets: Result<Vec<_>> = sockets
                .map(|(outer, inner)| ForwardedSocket::new(outer, inner, agent_port, &token))
                .collect();
            Ok((lease, sockets?))
        });
        drop(both);
        match connected {
            Ok((lease, sockets)) => {
                let qemu = Arc::new(Mutex::new(qemu));
                Ok(Self {
                    watch: Some(Watch::new(agent_port, &token, Arc::clone(&qemu))),
                    qemu,
                    agent_port,
                    token,
                    forward,
                    log,
                    _lease: lease,
                    _sockets: sockets,
                })
            }
            Err(error) => {
                let _ = qemu.kill();
                let _ = qemu.wait();
                let said = std::fs::read_to_string(log.with_extension("qemu")).unwrap_or_default();
                let serial = std::fs::read_to_string(&log).unwrap_or_default();
                Err(error.context(format!(
                    "the test host did not boot; serial log: {}\n{said}{}",
                    log.display(),
                    last_lines(&serial, 12)
                )))
            }
        }
    }

    /// A program to run inside. It starts in the caller's working directory, with a plain environment.
    pub fn command(&self, program: impl Into<String>) -> RemoteCommand {
        RemoteCommand::new(self.agent_port, self.token.clone(), program.into())
    }

    /// Runs a shell script inside; what it printed, without white space around it.
    ///
    /// # Errors
    /// If it does not end with 0; the text has what it printed.
    pub fn shell(&self, script: &str) -> Result<String> {
        let out = self.command("sh").args(["-c", script]).output()?;
        let said = String::from_utf8_lossy(&out.stdout).trim().to_owned();
        ensure!(out.code == 0, "{script}: {said}{}", String::from_utf8_lossy(&out.stderr));
        Ok(said)
    }

    /// The port on this machine's 127.0.0.1 that leads to a port inside.
    pub fn outer_port(&self, inner: u16) -> Option<u16> {
        self.forward.iter().find(|(_, to)| *to == inner).map(|(from, _)| *from)
    }

    /// The log of the test host's serial console.
    pub fn log(&self) -> &Path {
        &self.log
    }
}

impl Drop for Testbed {
    fn drop(&mut self) {
        // Before it can take this for a standstill.
        drop(self.watch.take());
        // Nothing inside is worth an orderly shutdown: its writable folders are this machine's.
        let mut qemu = self.qemu.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = qemu.kill();
        let _ = qemu.wait();
    }
}

/// Copies the serial console to the log until the agent listens; goes on copying in the background.
fn wait_ready(console: ChildStdout, log: &Path) -> Result<()> {
    /// What a kernel writes when it is broken, which under emulation now and then happens.
    const FAILURES: [&str; 4] = ["soft lockup", "Oops", "BUG:", "Kernel panic"];
    let path = log.to_path_buf();
    let mut log = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
    let (said, heard) = mpsc::channel();
    std::thread::spawn(move || {
        let mut lines = BufReader::new(console);
        let mut line = Vec::new();
        let mut failed = false;
        while let Ok(1..) = lines.read_until(b'\n', &mut line) {
            let _ = log.write_all(&line);
            let text = String::from_utf8_lossy(&line);
            if !failed && FAILURES.iter().any(|words| text.contains(words)) {
                failed = true;
                progress::note(format_args!(
                    "the test host's own kernel fails, expect no more of it: {} ({})",
                    text.trim(),
                    path.display()
                ));
            }
            if let Some(at) = text.find("drago-testbed: ") {
                let _ = said.send(text[at..].trim_end().to_owned());
            }
            line.clear();
        }
    });
    let end = Instant::now() + BOOT_LIMIT;
    loop {
        match heard.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(line) if line == READY => return Ok(()),
            Ok(line) if line.starts_with(FAILED) => bail!("{line}"),
            Ok(line) => progress::note(line),
            Err(mpsc::RecvTimeoutError::Timeout) => bail!("no sign of life after {BOOT_LIMIT:?}"),
            Err(mpsc::RecvTimeoutError::Disconnected) => bail!("QEMU ended"),
        }
    }
}

fn lease(port: u16, token: &str) -> Result<TcpStream> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).context("cannot reach the agent")?;
    let request = serde_json::to_string(&Request::Lease { token: token.to_owned() })?;
    writeln!(stream, "{request}").context("the agent did not take the lease")?;
    Ok(stream)
}

/// Ports that are free now, no two of them the same.
fn free_ports(count: usize) -> Result<Vec<u16>> {
    // All are held until the last is there: the kernel may give one away again at once.
    let held: std::io::Result<Vec<TcpListener>> =
        (0..count).map(|_| TcpListener::bind(("127.0.0.1", 0))).collect();
    let held = held.context("no free TCP port")?;
    held.iter().map(|listener| Ok(listener.local_addr()?.port())).collect()
}
