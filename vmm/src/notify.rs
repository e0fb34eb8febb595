//! Readiness for the service manager (sd_notify(3)): `READY=1` and `STOPPING=1` of our own, or, with
//! `--vsock …,notify=on`, what the guest's systemd says about itself.
//!
//! The guest is told where to report by the credential `vmm.notify_socket`, and opens a connection
//! for each report, which ends when both sides have closed it: since systemd 256 the guest's PID 1
//! waits for that, so it must not take long.

use std::{
    env,
    ffi::OsStr,
    io::{self, Read},
    os::{
        linux::net::SocketAddrExt,
        unix::{
            ffi::OsStrExt,
            net::{SocketAddr, UnixDatagram},
        },
    },
    sync::Arc,
    thread,
};

use devices::virtio::vsock::{Listener, VsockHandle};
use rustix::event::{PollFd, PollFlags};

use crate::credentials::OemString;

/// Longest report that is relayed, in bytes.
const MAX_REPORT: u64 = 16 * 1024;
/// The report that a unit of `Type=notify` waits for.
const READY: &str = "READY=1";
/// Reports per log line about those that were dropped.
const LOG_EVERY: u64 = 1000;

/// The service manager's end.
#[derive(Debug)]
pub struct Notifier {
    socket: UnixDatagram,
}

impl Notifier {
    /// Connects to `$NOTIFY_SOCKET`. `None` if nobody wants to know.
    pub fn from_environment() -> Option<Self> {
        let address = env::var_os("NOTIFY_SOCKET").filter(|address| !address.is_empty())?;
        Self::connect(&address)
            .inspect_err(|error| {
                tracing::warn!(
                    %error,
                    "NOTIFY_SOCKET={}: the service manager will not be told when the machine is \
                     ready; a unit of Type=notify will time out",
                    address.display()
                );
            })
            .ok()
    }

    fn connect(address: &OsStr) -> io::Result<Self> {
        let address = match address.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
            [b'/', ..] => SocketAddr::from_pathname(address)?,
            _ => return Err(io::Error::other("neither a path nor an abstract socket")),
        };
        let socket = UnixDatagram::unbound()?;
        socket.connect_addr(&address)?;
        // A service manager that does not read is no reason to stop.
        socket.set_nonblocking(true)?;
        Ok(Self { socket })
    }

    /// Sends assignments, one a line. What cannot be sent at once is dropped.
    pub fn send(&self, state: &str) {
        if let Err(error) = self.socket.send(state.as_bytes()) {
            tracing::warn!(%error, state, "the service manager could not be notified");
        }
    }

    /// Sends assignments that must not be lost: while the service manager's queue is full a thread
    /// waits for it.
    fn send_surely(self: &Arc<Self>, state: &str) {
        match self.socket.send(state.as_bytes()) {
            Ok(_) => return,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                tracing::warn!(%error, state, "the service manager could not be notified");
                return;
            }
        }
        tracing::info!("the service manager is busy; it is told as soon as it listens");
        let (notifier, text) = (self.clone(), state.to_owned());
        let waiting = host::threads::spawn("notify-wait", move || {
            loop {
                let mut fds = [PollFd::new(&notifier.socket, PollFlags::OUT)];
                // Interrupted is as good as ready: the next attempt shows it.
                let _ = rustix::event::poll(&mut fds, None);
                match notifier.socket.send(text.as_bytes()) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => {
                        tracing::warn!(%error, "the service manager could not be notified");
                        return;
                    }
                    Ok(_) => return,
                }
            }
        });
        if let Err(error) = waiting {
            tracing::warn!(%error, state, "the service manager could not be notified");
        }
    }
}

/// Who tells the service manager what.
#[derive(Debug)]
pub struct Readiness {
    notifier: Option<Arc<Notifier>>,
    listener: Option<Listener>,
}

impl Readiness {
    /// We do, if anybody wants to know.
    pub fn from_environment() -> Self {
        Self { notifier: Notifier::from_environment().map(Arc::new), listener: None }
    }

    /// The guest does, if that is what `--vsock` says. Returns what it has to know for that.
    pub fn report_by(&mut self, vsock: VsockHandle) -> Option<OemString> {
        let listener = vsock.notify?;
        if self.notifier.is_none() {
            tracing::info!("notify=on: there is no service manager to notify");
            return None;
        }
        // Context 2 is the host.
        let address = format!("vsock-stream:2:{}", listener.port());
        self.listener = Some(listener);
        Some(OemString::text("vmm.notify_socket", &address))
    }

    /// The guest's processors run.
    ///
    /// # Errors
    /// When there is no thread to be had for the guest's reports.
    pub fn running(&mut self) -> io::Result<()> {
        let Some(notifier) = &self.notifier else { return Ok(()) };
        match self.listener.take() {
            Some(listener) => {
                notifier.send("STATUS=The guest is starting");
                relay(notifier.clone(), listener)
            }
            None => {
                notifier.send_surely("READY=1\nSTATUS=The guest runs");
                Ok(())
            }
        }
    }

    /// The machine is about to end.
    pub fn stopping(&self) {
        if let Some(notifier) = &self.notifier {
            notifier.send("STOPPING=1");
        }
    }
}

/// Relays the guest's reports on a thread of its own until the process ends.
fn relay(notifier: Arc<Notifier>, listener: Listener) -> io::Result<()> {
    thread::Builder::new().name("notify".into()).spawn(move || {
        let mut dropped = 0u64;
        let mut ready = false;
        loop {
            // One after another: there is one guest, and it has only one PID 1.
            let report = match listener.accept() {
                Ok(mut connection) => read_report(&mut connection),
                Err(error) => {
                    tracing::warn!(%error, "the guest's state is not relayed any more");
                    return;
                }
            };
            match report.as_deref().map(filter) {
                // Once: whatever else the guest reports may be lost.
                Ok(Some(state)) if !ready && state.lines().any(|line| line == READY) => {
                    ready = true;
                    notifier.send_surely(&state);
                }
                Ok(Some(state)) => notifier.send(&state),
                Ok(None) => {}
                Err(error) => {
                    if dropped.is_multiple_of(LOG_EVERY) {
                        tracing::warn!(%error, dropped, "a report of the guest was dropped");
                    }
                    dropped += 1;
                }
            }
        }
    })?;
    Ok(())
}

/// Reads until the guest closes its half.
fn read_report(connection: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut report = Vec::new();
    connection.take(MAX_REPORT + 1).read_to_end(&mut report)?;
    if report.len() as u64 > MAX_REPORT {
        return Err(io::Error::other("it is too long"));
    }
    Ok(report)
}

/// What of a report concerns the host's service manager. Not `MAINPID=`, `WATCHDOG=`, `FDSTORE=` and
/// the like: the guest has no say in how this process is supervised. Nor `STOPPING=1`, after which the
/// service manager kills a service that does not end in time: any program of the guest can send it, as
/// systemd itself uses no port that only root has. We say it when the machine ends.
fn filter(report: &[u8]) -> Option<String> {
    let lines: Vec<&str> = report
        .split(|byte| *byte == b'\n')
        .filter_map(|line| str::from_utf8(line).ok())
        .filter(|line| match line.split_once('=') {
            Some(("READY", value)) => value == "1",
            Some((name, _)) => name == "STATUS" || name.starts_with("X_SYSTEMD_"),
            None => false,
        })
        .collect();
    (!lines.is_empty()).then(|| lines.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_service_manager_is_reached_by_path_and_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        let mut buffer = [0; 64];
        Notifier::connect(path.as_os_str()).unwrap().send("READY=1");
        let length = manager.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"READY=1");

        let name = format!("drago-vmm-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let manager = UnixDatagram::bind_addr(&address).unwrap();
        Notifier::connect(OsStr::new(&format!("@{name}"))).unwrap().send("STOPPING=1");
        let length = manager.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"STOPPING=1");
    }

    #[test]
    fn a_wrong_address_is_an_error_and_a_full_socket_no_obstacle() {
        Notifier::connect(OsStr::new("vsock:2:1234")).unwrap_err();
        Notifier::connect(OsStr::new("/nonexistent/socket")).unwrap_err();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let _manager = UnixDatagram::bind(&path).unwrap();
        let notifier = Notifier::connect(path.as_os_str()).unwrap();
        for _ in 0..10_000 {
            if notifier.socket.send(b"STATUS=x").is_err() {
                break;
            }
        }
        notifier.send("READY=1");
    }

    #[test]
    fn readiness_waits_for_a_busy_service_manager() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        let notifier = Arc::new(Notifier::connect(path.as_os_str()).unwrap());
        let mut queued = 0;
        while notifier.socket.send(b"STATUS=x").is_ok() {
            queued += 1;
        }
        notifier.send_surely("READY=1");
        let mut buffer = [0; 64];
        for _ in 0..queued {
            let length = manager.recv(&mut buffer).unwrap();
            assert_eq!(&buffer[..length], b"STATUS=x");
        }
        let length = manager.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"READY=1");
    }

    #[test]
    fn the_guest_reports_its_state_and_nothing_else() {
        let report =
            b"READY=1\nSTOPPING=1\nSTATUS=Startup finished\nMAINPID=1\nX_SYSTEMD_UNIT_ACTIVE=a\nFDSTORE=1\n\
                       READY=2\nWATCHDOG=1\nno assignment\nSTATUS=\xff";
        assert_eq!(
            filter(report).unwrap(),
            "READY=1\nSTATUS=Startup finished\nX_SYSTEMD_UNIT_ACTIVE=a"
        );
        assert_eq!(filter(b"MAINPID=1\n"), None);
        assert_eq!(read_report(&mut io::repeat(b'x')).unwrap_err().to_string(), "it is too long");
    }
}
