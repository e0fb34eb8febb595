//! A socket of the host's that takes connections of one guest only.

use std::{
    io::{self, Read},
    os::fd::OwnedFd,
    time::Duration,
};

use super::sys::{self, ANY_CID, ANY_PORT};

/// How long a connection may be silent.
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
                    let timeout = rustix::net::sockopt::Timeout::Recv;
                    rustix::net::sockopt::set_socket_timeout(&socket, timeout, Some(PATIENCE))?;
                    return Ok(Connection(socket));
                }
                Ok((_, (cid, port))) => tracing::debug!(cid, port, "not our guest: turned away"),
                Err(error) => match error.raw_os_error() {
                    // The peer was too quick, or we were interrupted.
                    Some(libc::ECONNABORTED | libc::EINTR | libc::EAGAIN) => {}
                    _ => return Err(error),
                },
            }
        }
    }
}

/// A connection of the guest's. Reading fails after ten seconds of silence.
#[derive(Debug)]
pub struct Connection(OwnedFd);

impl Read for Connection {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::read(&self.0, buffer)?)
    }
}
