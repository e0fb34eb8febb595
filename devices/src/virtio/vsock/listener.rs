//! A socket of the host's that takes connections of one guest only.

use std::{
    io::{self, Read},
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use rustix::net::sockopt::{Timeout, set_socket_timeout};

use super::sys::{self, ANY_CID, ANY_PORT};

/// How long a connection may take.
const PATIENCE: Duration = Duration::from_secs(10);
const BACKLOG: i32 = 16;

/// A listening stream socket on a port that the kernel has chosen.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    port: u32,
    /// Whose connections are taken.
    cid: u32,
}

impl Listener {
    /// Listens for the guest `cid`.
    ///
    /// # Errors
    /// If the host has no `AF_VSOCK`.
    pub fn bind(cid: u32) -> io::Result<Self> {
        let socket = sys::socket()?;
        sys::bind(&socket, ANY_CID, ANY_PORT)?;
        let (_, port) = sys::local_address(&socket)?;
        rustix::net::listen(&socket, BACKLOG)?;
        Ok(Self { socket, port, cid })
    }

    /// The port.
    pub fn port(&self) -> u32 {
        self.port
    }

    /// Waits for the guest's next connection. Those of anybody else are closed.
    ///
    /// # Errors
    /// If nobody can connect any more.
    pub fn accept(&self) -> io::Result<Connection> {
        loop {
            match sys::accept(&self.socket) {
                Ok((socket, (cid, _))) if cid == self.cid => {
                    return Ok(Connection { socket, deadline: Instant::now() + PATIENCE });
                }
                Ok((_, (cid, port))) => tracing::debug!(cid, port, "not our guest: turned away"),
                Err(error) => match error.raw_os_error() {
                    // The peer was too quick, or we were interrupted.
                    Some(libc::ECONNABORTED | libc::EINTR | libc::EAGAIN) => {}
                    // There will be some again.
                    Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM) => {
                        std::thread::sleep(Duration::from_millis(100));
                    }
                    _ => return Err(error),
                },
            }
        }
    }
}

/// A connection of the guest's. All that it has to say must come within ten seconds: while it speaks
/// nobody else is heard.
#[derive(Debug)]
pub struct Connection {
    socket: OwnedFd,
    deadline: Instant,
}

impl Read for Connection {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        set_socket_timeout(&self.socket, Timeout::Recv, Some(left))?;
        Ok(rustix::io::read(&self.socket, buffer)?)
    }
}
