//! A Unix socket of the test host, reached from outside: bytes carried between two connections.

use std::io::{self, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result};

use super::proto::Request;

/// Carries bytes both ways until both sides have nothing more to say.
pub(super) fn carry(tcp: &TcpStream, unix: &UnixStream) {
    thread::scope(|scope| {
        scope.spawn(|| {
            let _ = io::copy(&mut &*tcp, &mut &*unix);
            let _ = unix.shutdown(Shutdown::Write);
        });
        let _ = io::copy(&mut &*unix, &mut &*tcp);
        let _ = tcp.shutdown(Shutdown::Write);
    });
}

/// A socket of this machine that leads to one inside. Dropping it removes it; what is connected stays so.
#[derive(Debug)]
pub(super) struct ForwardedSocket {
    path: PathBuf,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl ForwardedSocket {
    /// Makes the socket `outer`, in place of one that is left there; who connects to it is connected to
    /// `inner` by the agent at this port.
    pub(super) fn new(outer: &Path, inner: &str, agent_port: u16, token: &str) -> Result<Self> {
        let _ = std::fs::remove_file(outer);
        let listener = UnixListener::bind(outer)
            .with_context(|| format!("cannot make the socket {}", outer.display()))?;
        let request = serde_json::to_string(&Request::Connect {
            token: token.to_owned(),
            socket: inner.to_owned(),
        })?;
        let over = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&over);
        let thread = thread::spawn(move || {
            while let Ok((outside, _)) = listener.accept() {
                if seen.load(Ordering::SeqCst) {
                    return;
                }
                let request = request.clone();
                thread::spawn(move || {
                    // Without the agent the connection ends at once, which is what there is to say.
                    if let Ok(mut inside) = TcpStream::connect(("127.0.0.1", agent_port))
                        && writeln!(inside, "{request}").is_ok()
                    {
                        carry(&inside, &outside);
                    }
                });
            }
        });
        Ok(Self { path: outer.to_owned(), over, thread: Some(thread) })
    }
}

impl Drop for ForwardedSocket {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        // The thread waits for somebody to come.
        if UnixStream::connect(&self.path).is_ok()
            && let Some(thread) = self.thread.take()
        {
            let _ = thread.join();
        }
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Read};
    use std::net::TcpListener;
    use std::sync::mpsc;

    use super::super::agent;
    use super::*;

    #[test]
    fn a_socket_inside_is_reached_from_outside() {
        let folder = tempfile::tempdir().unwrap();
        let (outer, inner) = (folder.path().join("outer"), folder.path().join("inner"));
        let port_of_agent = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = port_of_agent.local_addr().unwrap().port();
        thread::spawn(move || {
            for stream in port_of_agent.incoming() {
                let (lease, _) = mpsc::channel();
                thread::spawn(move || agent::connection(&stream.unwrap(), "secret", &lease));
            }
        });
        let server = UnixListener::bind(&inner).unwrap();
        let echo = thread::spawn(move || {
            let (stream, _) = server.accept().unwrap();
            writeln!(&stream, "hello").unwrap();
            let mut said = String::new();
            BufReader::new(&stream).read_line(&mut said).unwrap();
            write!(&stream, "{said}").unwrap();
        });
        // One that somebody left there.
        std::fs::write(&outer, "").unwrap();
        let socket = ForwardedSocket::new(&outer, inner.to_str().unwrap(), port, "secret").unwrap();
        let mut stream = UnixStream::connect(&outer).unwrap();
        writeln!(stream, "world").unwrap();
        let mut said = String::new();
        // To the end, which the server's end brings about.
        stream.read_to_string(&mut said).unwrap();
        assert_eq!(said, "hello\nworld\n");
        echo.join().unwrap();
        // Nobody is there any more.
        let mut stream = UnixStream::connect(&outer).unwrap();
        assert_eq!(stream.read(&mut [0]).unwrap_or(0), 0);
        drop(socket);
        assert!(!outer.exists());
    }
}
