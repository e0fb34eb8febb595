//! The VMM's side of the control socket.

use std::{
    fs,
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::{fs::FileTypeExt, net::UnixListener, net::UnixStream},
    path::{Path, PathBuf},
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};

use super::{
    ControlTarget, Greeting, MAX_LINE, PROTOCOL_VERSION, Request, Response, SocketError,
    events::{Next, Subscription},
    expiry,
};

/// More clients than this at once are turned away: each has a thread.
const MAX_CONNECTIONS: usize = 16;

/// How long the guest gets before the power button is pressed again: a guest that is still booting
/// has nobody listening to it yet.
const POWER_BUTTON_INTERVAL: Duration = Duration::from_secs(3);

/// How often it is looked whether a listener has left while nothing happens.
const EVENT_PAUSE: Duration = Duration::from_secs(1);

/// A listening control socket. Dropping it removes the socket file.
#[derive(Debug)]
pub struct ControlServer {
    path: PathBuf,
    shutdown: Arc<ShutdownRequest>,
}

impl ControlServer {
    /// Listens on `path` and serves clients on threads of its own until the process ends. A stale
    /// socket is replaced; one that somebody listens on, or another kind of file, is not.
    pub fn start(path: &Path, target: Arc<dyn ControlTarget>) -> Result<Self, SocketError> {
        remove_stale(path)?;
        let listener = UnixListener::bind(path).map_err(|error| refused(path, error))?;
        let shutdown = Arc::new(ShutdownRequest::default());
        let server = Self { path: path.to_owned(), shutdown: shutdown.clone() };
        thread::Builder::new()
            .name("control".into())
            .spawn(move || accept_loop(&listener, &target, &shutdown))
            .map_err(|source| SocketError::Bind { path: path.to_owned(), source })?;
        Ok(server)
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        self.shutdown.withdraw();
        if let Err(error) = fs::remove_file(&self.path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %self.path.display(), %error, "control socket not removed");
        }
    }
}

/// Why no socket could be made. 9p answers mknod(2) of a socket with `ENXIO`, FAT with `EPERM`.
fn refused(path: &Path, source: io::Error) -> SocketError {
    let path = path.to_owned();
    match Errno::from_io_error(&source) {
        Some(Errno::NXIO | Errno::PERM | Errno::OPNOTSUPP) => {
            SocketError::NoSocketsThere { path, source }
        }
        _ => SocketError::Bind { path, source },
    }
}

fn remove_stale(path: &Path) -> Result<(), SocketError> {
    let Ok(metadata) = fs::symlink_metadata(path) else { return Ok(()) };
    if !metadata.file_type().is_socket() {
        return Err(SocketError::NotASocket { path: path.to_owned() });
    }
    if UnixStream::connect(path).is_ok() {
        return Err(SocketError::InUse { path: path.to_owned() });
    }
    fs::remove_file(path).map_err(|source| SocketError::Bind { path: path.to_owned(), source })
}

fn accept_loop(
    listener: &UnixListener,
    target: &Arc<dyn ControlTarget>,
    shutdown: &Arc<ShutdownRequest>,
) {
    let connections = Arc::new(AtomicUsize::new(0));
    for stream in listener.incoming() {
        let stream = match stream {
            Ok(stream) => stream,
            Err(error) => {
                tracing::warn!(%error, "a control connection could not be accepted");
                continue;
            }
        };
        if connections.fetch_add(1, Ordering::Relaxed) >= MAX_CONNECTIONS {
            connections.fetch_sub(1, Ordering::Relaxed);
            tracing::warn!("more than {MAX_CONNECTIONS} control connections: one was refused");
            continue;
        }
        let (target, shutdown) = (target.clone(), shutdown.clone());
        let counter = connections.clone();
        let spawned = thread::Builder::new().name("control-client".into()).spawn(move || {
            if let Err(error) = serve(&stream, target.as_ref(), &target, &shutdown) {
                tracing::debug!(%error, "a control connection ended");
            }
            counter.fetch_sub(1, Ordering::Relaxed);
        });
        if let Err(error) = spawned {
            connections.fetch_sub(1, Ordering::Relaxed);
            tracing::warn!(%error, "no thread for a control connection");
        }
    }
}

fn serve(
    stream: &UnixStream,
    target: &dyn ControlTarget,
    shared: &Arc<dyn ControlTarget>,
    shutdown: &Arc<ShutdownRequest>,
) -> io::Result<()> {
    let mut writer = stream;
    let greeting = Greeting {
        server: "drago-vmm".into(),
        version: env!("CARGO_PKG_VERSION").into(),
        protocol: PROTOCOL_VERSION,
    };
    write_line(&mut writer, &greeting)?;
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = Vec::new();
        let limit = MAX_LINE as u64 + 1;
        if reader.by_ref().take(limit).read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        if line.len() > MAX_LINE {
            let message = format!("a request may have {MAX_LINE} bytes at most");
            return write_line(&mut writer, &Response::Error { message });
        }
        if line.trim_ascii().is_empty() {
            continue;
        }
        let request = match serde_json::from_slice(&line) {
            Ok(request) => request,
            Err(error) => {
                let message = format!("the request is not understood: {error}");
                write_line(&mut writer, &Response::Error { message })?;
                continue;
            }
        };
        let (response, attachment) = answer(&request, target);
        write_line(&mut writer, &response)?;
        writer.write_all(&attachment)?;
        match request {
            Request::Shutdown {} => shutdown.begin(shared),
            // Only after the answer is out: the process may end before this thread runs again.
            Request::Quit {} => target.quit(),
            Request::Events {} => return stream_events(writer, &target.events()),
            _ => {}
        }
    }
}

/// Writes events until the client leaves.
fn stream_events(mut stream: &UnixStream, events: &Subscription) -> io::Result<()> {
    loop {
        let event = match events.next(EVENT_PAUSE) {
            Next::Event(event) => event,
            Next::Lost(count) => serde_json::json!({ "event": "lost", "count": count }),
            Next::End => return Ok(()),
            // A client that has left is not noticed by writing to it while nothing happens.
            Next::Quiet if has_left(stream)? => return Ok(()),
            Next::Quiet => continue,
        };
        write_line(&mut stream, &event)?;
    }
}

/// Whether a client has closed its socket, whatever it said before. One that has only said all it will say
/// may still listen.
fn has_left(stream: &UnixStream) -> io::Result<bool> {
    let mut client = [PollFd::new(stream, PollFlags::empty())];
    match poll(&mut client, Some(&Timespec::default())) {
        Err(Errno::INTR) => return Ok(false),
        result => result?,
    };
    let [client] = client.map(|client| client.revents());
    Ok(client.intersects(PollFlags::HUP | PollFlags::ERR))
}

fn answer(request: &Request, target: &dyn ControlTarget) -> (Response, Vec<u8>) {
    let result = match *request {
        Request::SetPassword { ref password, ref expires, disconnect } => {
            expiry(expires.as_deref().unwrap_or("never"))
                .and_then(|expires| target.set_password(&password.0, expires, disconnect))
        }
        Request::SetCertificate { ref certificate, ref key } => {
            target.set_certificate(certificate, &key.0)
        }
        Request::ExpirePassword { ref expires } => {
            expiry(expires).and_then(|expires| target.expire_password(expires))
        }
        Request::Status {} => return (Response::Status(target.status()), Vec::new()),
        Request::Screenshot { display } => match target.screenshot(display) {
            Ok(png) => return (Response::Screenshot { bytes: png.len() }, png),
            Err(error) => Err(error),
        },
        Request::Resize { display, width, height } => target.resize(display, width, height),
        Request::CtrlAltDel {} => target.ctrl_alt_del(),
        Request::Balloon { mib } => match target.balloon(mib) {
            Ok(mib) => return (Response::Balloon { mib }, Vec::new()),
            Err(error) => Err(error),
        },
        Request::SpiceClients {} => {
            return (Response::SpiceClients { clients: target.spice_clients() }, Vec::new());
        }
        Request::Shutdown {} | Request::Quit {} | Request::Events {} => Ok(()),
    };
    match result {
        Ok(()) => (Response::Done {}, Vec::new()),
        Err(error) => (Response::Error { message: error.0 }, Vec::new()),
    }
}

fn write_line(writer: &mut impl Write, message: &impl serde::Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    writer.write_all(&line)
}

/// Presses the power button until the machine is off.
#[derive(Debug, Default)]
struct ShutdownRequest {
    state: Mutex<ShutdownState>,
    changed: Condvar,
}

#[derive(Debug, Default, PartialEq, Eq)]
enum ShutdownState {
    #[default]
    Idle,
    Pressing,
    Withdrawn,
}

impl ShutdownRequest {
    fn begin(self: &Arc<Self>, target: &Arc<dyn ControlTarget>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if *state != ShutdownState::Idle {
            return;
        }
        let (request, button) = (self.clone(), target.clone());
        let spawned = thread::Builder::new().name("power-button".into()).spawn(move || {
            request.press(button.as_ref());
        });
        match spawned {
            Ok(_) => *state = ShutdownState::Pressing,
            Err(error) => {
                tracing::warn!(%error, "no thread for the power button; pressing it once");
                target.power_button();
            }
        }
    }

    fn press(&self, target: &dyn ControlTarget) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while *state != ShutdownState::Withdrawn {
            target.power_button();
            state = self
                .changed
                .wait_timeout(state, POWER_BUTTON_INTERVAL)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    fn withdraw(&self) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = ShutdownState::Withdrawn;
        self.changed.notify_all();
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::control::{ControlError, Status, events::EventHub};
    use spice_server::Expiry;

    /// Reports every call on a channel.
    pub(in crate::control) struct Recorder(pub(in crate::control) mpsc::SyncSender<String>);

    impl ControlTarget for Recorder {
        fn status(&self) -> Status {
            Status { name: "guest".into(), cpus: 2, ..Status::default() }
        }

        fn power_button(&self) {
            let _ = self.0.try_send("power-button".into());
        }

        fn quit(&self) {
            let _ = self.0.try_send("quit".into());
        }

        fn ctrl_alt_del(&self) -> Result<(), ControlError> {
            Err(ControlError("there is no keyboard".into()))
        }

        fn screenshot(&self, display: u32) -> Result<Vec<u8>, ControlError> {
            Ok(vec![display as u8; 70_000])
        }

        fn resize(&self, _: u32, width: u32, height: u32) -> Result<(), ControlError> {
            let _ = self.0.try_send(format!("{width}x{height}"));
            Ok(())
        }

        fn spice_clients(&self) -> Vec<serde_json::Value> {
            vec![serde_json::json!({ "peer": "somebody" })]
        }

        fn set_password(
            &self,
            password: &str,
            expires: Expiry,
            disconnect: bool,
        ) -> Result<(), ControlError> {
            let _ = self.0.try_send(format!("password {password} {expires:?} {disconnect}"));
            Ok(())
        }

        fn set_certificate(&self, certificate: &str, key: &str) -> Result<(), ControlError> {
            let _ = self.0.try_send(format!("certificate {certificate} {key}"));
            Ok(())
        }

        fn expire_password(&self, expires: Expiry) -> Result<(), ControlError> {
            let _ = self.0.try_send(format!("expire {expires:?}"));
            Ok(())
        }

        fn events(&self) -> Subscription {
            let events = EventHub::default();
            let subscription = events.subscribe();
            events.publish("test", serde_json::json!({ "answer": 42 }));
            subscription
        }

        fn balloon(&self, mib: Option<u32>) -> Result<u32, ControlError> {
            let _ = self.0.try_send(format!("balloon {mib:?}"));
            Ok(mib.unwrap_or(7))
        }
    }

    fn start() -> (tempfile::TempDir, PathBuf, ControlServer, mpsc::Receiver<String>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control");
        let (sender, calls) = mpsc::sync_channel(16);
        let server = ControlServer::start(&path, Arc::new(Recorder(sender))).unwrap();
        (folder, path, server, calls)
    }

    fn lines(path: &Path, requests: &[u8], answers: usize) -> Vec<String> {
        let mut stream = UnixStream::connect(path).unwrap();
        stream.write_all(requests).unwrap();
        BufReader::new(stream).lines().take(answers).map(Result::unwrap).collect()
    }

    #[test]
    fn greets_with_a_version_and_survives_bad_requests() {
        let (_folder, path, _server, calls) = start();
        let answers = lines(
            &path,
            b"nonsense\n{\"command\":\"status\",\"extra\":1}\n\n{\"command\":\"ctrl-alt-del\"}\n{\"command\":\"quit\"}\n",
            5,
        );
        assert!(answers[0].contains("\"protocol\":1"), "{answers:?}");
        assert!(answers[1].contains("not understood"));
        assert!(answers[2].contains("not understood"));
        assert_eq!(answers[3], r#"{"error":{"message":"there is no keyboard"}}"#);
        assert_eq!(answers[4], r#"{"done":{}}"#);
        assert_eq!(calls.recv().unwrap(), "quit");
    }

    #[test]
    fn an_endless_line_is_cut_off() {
        let (_folder, path, _server, _calls) = start();
        let answers = lines(&path, &vec![b'x'; MAX_LINE + 1], 3);
        assert_eq!(answers.len(), 2, "the connection is closed after the error");
        assert!(answers[1].contains("at most"));
    }

    #[test]
    fn listeners_who_have_left_are_noticed_while_nothing_happens() {
        let hub = Arc::new(EventHub::default());
        let (server, mut client) = UnixStream::pair().unwrap();
        let (done, ended) = mpsc::channel();
        let listener = hub.subscribe();
        let serving = thread::spawn(move || {
            let result = stream_events(&server, &listener);
            done.send(()).unwrap();
            result
        });
        // It has said more than anybody reads, and that this was all, which is not leaving.
        client.write_all(b"{\"command\":\"status\"}\n").unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        ended.recv_timeout(EVENT_PAUSE * 2).unwrap_err();
        hub.publish("test", serde_json::json!({}));
        let mut line = String::new();
        BufReader::new(&client).read_line(&mut line).unwrap();
        assert!(line.contains("test"), "{line}");
        drop(client);
        ended.recv_timeout(Duration::from_secs(60)).unwrap();
        serving.join().unwrap().unwrap();
    }

    #[test]
    fn the_power_button_is_pressed_until_the_machine_is_gone() {
        let (_folder, path, server, calls) = start();
        lines(&path, b"{\"command\":\"shutdown\"}\n", 2);
        assert_eq!(calls.recv().unwrap(), "power-button");
        assert_eq!(calls.recv().unwrap(), "power-button");
        drop(server);
        assert!(!path.exists());
    }

    #[test]
    fn a_file_system_without_sockets_is_told_apart() {
        let told = |errno: Errno| refused(Path::new("/mnt/s"), errno.into()).to_string();
        assert!(told(Errno::NXIO).contains("--control /mnt/s: the file system there"));
        assert!(told(Errno::NXIO).contains("/run"), "{}", told(Errno::NXIO));
        assert!(told(Errno::NOENT).contains("could not be made"), "{}", told(Errno::NOENT));
    }

    #[test]
    fn only_stale_sockets_are_replaced() {
        let (folder, path, server, _calls) = start();
        let (sender, _) = mpsc::sync_channel(1);
        let target = Arc::new(Recorder(sender));
        let error = ControlServer::start(&path, target.clone()).unwrap_err();
        assert!(matches!(error, SocketError::InUse { .. }), "{error}");
        drop(server);

        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "a stale socket");
        ControlServer::start(&path, target.clone()).unwrap();

        let file = folder.path().join("file");
        fs::write(&file, "precious").unwrap();
        let error = ControlServer::start(&file, target).unwrap_err();
        assert!(matches!(error, SocketError::NotASocket { .. }), "{error}");
        assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
    }
}
