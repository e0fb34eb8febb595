//! User networking: a supervised `passt` process, one for each card.
//!
//! passt inherits one end of a socket pair (`--fd`, so there is no socket file to protect) and ends
//! when the other end is closed, so it cannot outlive the VMM. It gives the guest the addresses
//! that users know from QEMU: the guest 10.0.2.15 by DHCP, the host 10.0.2.2.

use std::{
    collections::VecDeque,
    env,
    io::{self, BufRead, BufReader, ErrorKind, PipeReader, Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, UdpSocket},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::ExitStatus,
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use host::process::{CHILD_SOCKET, Process, Program};

use super::{
    backend::Link,
    hostfwd::{GUEST_ADDRESS, HostForward, Protocol},
    mac::MacAddress,
    stream::FrameDecoder,
};
use crate::virtio::registry::BuildError;

/// The host as the guest sees it: router, and the host's own services unless that is switched off.
pub(super) const HOST_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// The router's hardware address. Given explicitly, since passt otherwise wants the address of an
/// interface with a default route, which not every host has.
const HOST_MAC: &str = "9a:55:9a:55:9a:55";
/// How long passt may take to start; it needs some milliseconds.
const START_LIMIT: Duration = Duration::from_secs(10);
/// Between restarts, doubling from the first to the last; back to the first after a good run.
const FIRST_DELAY: Duration = Duration::from_millis(100);
const LAST_DELAY: Duration = Duration::from_secs(10);
const GOOD_RUN: Duration = Duration::from_secs(30);
/// Longest line of passt's that is logged.
const LINE_LIMIT: u64 = 512;

/// The largest MTU that passt offers. It passes on what connections carry, not the guest's packets, so
/// what they are cut into costs only time, and nothing on the host's way out need be as large.
pub(super) const LARGEST_MTU: u16 = 65_520;

/// What passt is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PasstConfig {
    pub(super) forwards: Vec<HostForward>,
    /// Whether the guest reaches services on the host's loopback at [`HOST_ADDRESS`].
    pub(super) host_access: bool,
    pub(super) mtu: u16,
    pub(super) ipv6: bool,
    /// The program, where it is to be no other one.
    pub(super) program: Option<PathBuf>,
}

impl PasstConfig {
    /// The program: services often have no `PATH`.
    fn program(&self) -> Result<PathBuf, StartError> {
        if let Some(program) = &self.program {
            let there = program.is_file().then(|| program.clone());
            return there.ok_or_else(|| StartError::NotThere(program.clone()));
        }
        let own = env::current_exe().ok();
        let beside = own.as_deref().and_then(Path::parent).map(Path::to_owned);
        let path = env::var_os("PATH").unwrap_or_default();
        beside
            .into_iter()
            .chain(env::split_paths(&path).filter(|folder| folder.is_absolute()))
            .chain([PathBuf::from("/usr/bin")])
            .map(|folder| folder.join("passt"))
            .find(|program| program.is_file())
            .ok_or(StartError::Missing)
    }

    /// passt is content with one of IPv4 and IPv6: whoever connects by the other one would meet another
    /// program.
    fn look_for_ports(&self) -> Result<(), StartError> {
        for forward in &self.forwards {
            let families: &[IpAddr] = match &forward.address {
                Some(address) => std::slice::from_ref(address),
                None if self.ipv6 => {
                    &[IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)]
                }
                None => &[IpAddr::V4(Ipv4Addr::UNSPECIFIED)],
            };
            for address in families {
                let address = (*address, forward.host_port);
                let bound = match forward.protocol {
                    Protocol::Tcp => TcpListener::bind(address).map(drop),
                    Protocol::Udp => UdpSocket::bind(address).map(drop),
                };
                // Whatever else is wrong passt itself will say.
                if bound.is_err_and(|error| error.kind() == ErrorKind::AddrInUse) {
                    return Err(StartError::Taken { rule: forward.to_string() });
                }
            }
        }
        Ok(())
    }

    /// The command line, apart from the socket.
    fn arguments(&self, host: HostRoutes) -> Vec<String> {
        let mut arguments: Vec<String> = Vec::new();
        let mut add =
            |words: &[&str]| arguments.extend(words.iter().map(|word| (*word).to_owned()));
        add(&["--foreground", "--quiet", "--mac-addr", HOST_MAC]);
        add(&["--address", &GUEST_ADDRESS.to_string(), "--netmask", "24"]);
        add(&["--gateway", &HOST_ADDRESS.to_string()]);
        add(&["--mtu", &self.mtu.to_string()]);
        if host == HostRoutes::None {
            // passt insists on a template interface. Any one will do, as addresses are given.
            add(&["--interface", "lo"]);
        }
        if !self.ipv6 {
            add(&["--ipv4-only"]);
        }
        if !self.host_access {
            add(&["--no-map-gw"]);
        }
        for forward in &self.forwards {
            let option = match forward.protocol {
                Protocol::Tcp => "--tcp-ports",
                Protocol::Udp => "--udp-ports",
            };
            add(&[option, &forward.to_passt()]);
        }
        arguments
    }
}

/// Whether the host has a way out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum HostRoutes {
    Some,
    None,
}

impl HostRoutes {
    fn look() -> Self {
        let read = |path| std::fs::read_to_string(path).unwrap_or_default();
        let v4 = read("/proc/net/route").lines().any(|line| {
            let fields: Vec<_> = line.split_ascii_whitespace().collect();
            fields.get(1) == Some(&"00000000") && fields.get(7) == Some(&"00000000")
        });
        let v6 = read("/proc/net/ipv6_route").lines().any(|line| {
            let fields: Vec<_> = line.split_ascii_whitespace().collect();
            fields.get(1) == Some(&"00") && fields.last().is_some_and(|name| *name != "lo")
        });
        if v4 || v6 { Self::Some } else { Self::None }
    }
}

/// What to start, found out once.
struct Recipe {
    program: PathBuf,
    arguments: Vec<String>,
}

/// A started process that has answered once.
struct Running {
    child: Process,
    socket: UnixStream,
    errors: BufReader<PipeReader>,
}

/// Why passt did not start.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error(
        "the program 'passt' is neither beside drago-vmm nor in PATH nor in /usr/bin; install it \
         (package 'passt' on Debian, Fedora, Arch, NixOS) or name it with passt=FILE"
    )]
    Missing,
    #[error("passt={}: there is no such program", .0.display())]
    NotThere(PathBuf),
    #[error(
        "hostfwd={rule}: another program has this port of the host ('ss -ltunp' says which); take another \
         one"
    )]
    Taken { rule: String },
    #[error("passt cannot be started")]
    Spawn(#[source] io::Error),
    #[error("passt ended at its start ({status}): {said}")]
    Ended { status: ExitStatus, said: String },
    #[error("passt does not answer: {said}")]
    Silent { said: String },
}

/// A passt process that is kept alive.
pub(super) struct Passt {
    stop: mpsc::Sender<()>,
    child: Arc<Mutex<Option<Process>>>,
    thread: JoinHandle<()>,
}

impl Passt {
    /// Starts passt for a guest with the address `mac`, and waits until it works.
    pub(super) fn start(
        config: &PasstConfig,
        mac: MacAddress,
        link: Arc<Link>,
    ) -> Result<Self, BuildError> {
        let host =
            |what: &str, source| BuildError::Host { option: "net", what: what.to_owned(), source };
        // Looked at once: started again, it is to be exactly the same program (see
        // `host::process::launcher`).
        let recipe = config.program().and_then(|program| {
            config.look_for_ports()?;
            Ok(Recipe { program, arguments: config.arguments(HostRoutes::look()) })
        });
        let started = recipe.and_then(|recipe| Ok((launch(&recipe, mac)?, recipe)));
        let (running, recipe) = started.map_err(|error| match error {
            StartError::Spawn(source) => host("passt cannot be started", source),
            other => BuildError::Unusable { option: "net", reason: other.to_string() },
        })?;
        let (stop, stopped) = mpsc::channel();
        let Running { child, socket, errors } = running;
        let child = Arc::new(Mutex::new(Some(child)));
        let slot = child.clone();
        link.connect(socket);
        let thread = thread::Builder::new()
            .name("passt".to_owned())
            .spawn(move || supervise(&recipe, mac, &link, &slot, &stopped, errors))
            .map_err(|source| host("passt cannot be supervised", source))?;
        Ok(Self { stop, child, thread })
    }

    /// The process, while there is one.
    #[cfg(test)]
    pub(super) fn id(&self) -> Option<u32> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(Process::id)
    }

    /// Ends passt.
    pub(super) fn stop(self) {
        let _ = self.stop.send(());
        if let Some(child) = &mut *self.child.lock().unwrap_or_else(PoisonError::into_inner) {
            // It holds nothing worth saving; its connections end with the guest.
            let _ = child.kill();
        }
        if self.thread.join().is_err() {
            tracing::error!("the supervisor of passt panicked");
        }
    }
}

fn supervise(
    recipe: &Recipe,
    mac: MacAddress,
    link: &Link,
    slot: &Mutex<Option<Process>>,
    stopped: &mpsc::Receiver<()>,
    first: BufReader<PipeReader>,
) {
    let slot = || slot.lock().unwrap_or_else(PoisonError::into_inner);
    let mut next = Some(first);
    let mut delay = FIRST_DELAY;
    loop {
        if let Some(mut errors) = next.take() {
            let since = Instant::now();
            while let Some(line) = read_line(&mut errors) {
                if !is_noise(&line) {
                    tracing::warn!(target: "passt", "{line}");
                }
            }
            let child = slot().take();
            let status = finish(child);
            link.set_up(false);
            if stopped.try_recv().is_ok() {
                return;
            }
            if since.elapsed() >= GOOD_RUN {
                delay = FIRST_DELAY;
            }
            tracing::warn!(?status, ?delay, "passt ended; user networking is interrupted");
        }
        match stopped.recv_timeout(delay) {
            Err(mpsc::RecvTimeoutError::Timeout) => {}
            Ok(()) | Err(mpsc::RecvTimeoutError::Disconnected) => return,
        }
        delay = (2 * delay).min(LAST_DELAY);
        match launch(recipe, mac) {
            Ok(Running { mut child, socket, errors }) => {
                let mut slot = slot();
                // Under the lock, so that `stop` either is seen here or finds the child.
                if stopped.try_recv().is_ok() {
                    let _ = child.kill();
                    let _ = child.wait();
                    return;
                }
                *slot = Some(child);
                link.connect(socket);
                next = Some(errors);
            }
            Err(error) => tracing::warn!(%error, ?delay, "user networking is not back yet"),
        }
    }
}

/// Collects a process whose standard error is closed, which means that it has ended or is about to.
fn finish(child: Option<Process>) -> Option<ExitStatus> {
    let mut child = child?;
    let _ = child.kill();
    child.wait().ok()
}

fn launch(recipe: &Recipe, mac: MacAddress) -> Result<Running, StartError> {
    let (ours, theirs) = UnixStream::pair().map_err(StartError::Spawn)?;
    let (errors, their_errors) = io::pipe().map_err(StartError::Spawn)?;
    let mut child = Program::new(&recipe.program)
        .arguments(&recipe.arguments)
        .arguments(["--fd", &CHILD_SOCKET.to_string()])
        // Ctrl-C in a terminal is for the VMM, which still needs the network to shut down.
        .own_group()
        .fd(CHILD_SOCKET, theirs.into())
        .fd(2, their_errors.into())
        .start()
        .map_err(|error| match error.kind() {
            ErrorKind::NotFound => StartError::Missing,
            _ => StartError::Spawn(error),
        })?;
    let mut errors = BufReader::new(errors);
    match probe(ours, mac) {
        Ok(socket) => Ok(Running { child, socket, errors }),
        Err(error) => {
            let silent = matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut);
            if silent {
                let _ = child.kill();
            }
            // Its last words; they say what is wrong.
            let mut said = VecDeque::new();
            while let Some(line) = read_line(&mut errors) {
                if !is_noise(&line) {
                    said.push_back(line);
                    if said.len() > 4 {
                        said.pop_front();
                    }
                }
            }
            let said = Vec::from(said).join("; ");
            let status = finish(Some(child));
            Err(match status {
                Some(status) if !silent => StartError::Ended { status, said },
                _ => StartError::Silent { said },
            })
        }
    }
}

/// Asks passt for the router's address until it answers, which it does once it is set up; there is
/// no other sign that all versions give.
fn probe(mut socket: UnixStream, mac: MacAddress) -> io::Result<UnixStream> {
    let request = arp_request(mac);
    let mut message = (request.len() as u32).to_be_bytes().to_vec();
    message.extend(request);
    socket.write_all(&message)?;
    let deadline = Instant::now() + START_LIMIT;
    let mut decoder = FrameDecoder::new();
    loop {
        while let Some(frame) = decoder.next_frame().map_err(io::Error::other)? {
            if frame.get(12..14) == Some(&ARP) {
                socket.set_nonblocking(true)?;
                return Ok(socket);
            }
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        socket.set_read_timeout(Some(left))?;
        match socket.read(decoder.space())? {
            0 => return Err(ErrorKind::UnexpectedEof.into()),
            count => decoder.filled(count),
        }
    }
}

/// EtherType of ARP.
const ARP: [u8; 2] = [0x08, 0x06];

/// "Who has the router's address?", asked by the guest (RFC 826).
fn arp_request(mac: MacAddress) -> Vec<u8> {
    let mut frame = Vec::with_capacity(60);
    frame.extend([0xff; 6]);
    frame.extend(mac.0);
    frame.extend(ARP);
    // Ethernet, IPv4, their address lengths, request.
    frame.extend([0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(mac.0);
    frame.extend(GUEST_ADDRESS.octets());
    frame.extend([0; 6]);
    frame.extend(HOST_ADDRESS.octets());
    // The shortest frame on a wire.
    frame.resize(60, 0);
    frame
}

/// The next line, cut to a sane length; `None` at the end.
fn read_line(input: &mut BufReader<PipeReader>) -> Option<String> {
    let mut line = Vec::new();
    input.by_ref().take(LINE_LIMIT).read_until(b'\n', &mut line).ok()?;
    (!line.is_empty()).then(|| String::from_utf8_lossy(&line).trim_end().to_owned())
}

/// Lines that say nothing: banners, and complaints about a missing system logger.
fn is_noise(line: &str) -> bool {
    line.trim().is_empty()
        || line.starts_with("Failed to send")
        || line.contains("Changing to nobody")
        || line.contains("run as root")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments() {
        let config = PasstConfig {
            forwards: vec!["tcp:127.0.0.1:2223-:22".parse().unwrap(), "udp::5-:6".parse().unwrap()],
            host_access: false,
            mtu: 9000,
            ipv6: false,
            program: None,
        };
        let line = config.arguments(HostRoutes::None).join(" ");
        assert_eq!(
            line,
            "--foreground --quiet --mac-addr 9a:55:9a:55:9a:55 --address 10.0.2.15 --netmask 24 \
             --gateway 10.0.2.2 --mtu 9000 --interface lo --ipv4-only --no-map-gw \
             --tcp-ports 127.0.0.1/2223:22 --udp-ports 5:6"
        );
    }

    #[test]
    fn the_program_may_be_named() {
        let mut config = PasstConfig {
            forwards: Vec::new(),
            host_access: true,
            mtu: 1500,
            ipv6: true,
            program: Some("/bin/sh".into()),
        };
        assert_eq!(config.program().unwrap(), Path::new("/bin/sh"));
        config.program = Some("/nonexistent/passt".into());
        let error = config.program().unwrap_err().to_string();
        assert!(error.contains("passt=/nonexistent/passt"), "{error}");
    }
}
