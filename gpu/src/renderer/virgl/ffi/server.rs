//! The library's connection to its render server, over the lives of several servers.
//!
//! The library asks for a connection once, sends what it wants of the server on it, and keeps it for good.
//! So it is given one end of a connection to nowhere; what it says there is kept, and said to each server,
//! and each server's connection is put in the place of the library's descriptor. A server knows nothing of
//! the contexts of the one before: orders to end them are ignored, and each context has a connection of
//! its own, which ended with its process.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd, RawFd},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec},
    io::Errno,
    net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType},
};

use crate::render_server::Servers;

/// Longest first message; the library's has 8 bytes.
const MAX_GREETING: usize = 256;

/// Before the library has been initialised.
pub(super) struct Pending {
    servers: Servers,
    /// The number of the library's end.
    number: RawFd,
    near: OwnedFd,
}

/// A connection that outlives servers.
pub(super) struct Connection {
    servers: Servers,
    /// The library's descriptor.
    number: RawFd,
    /// A duplicate of it.
    current: OwnedFd,
    greeting: Vec<u8>,
    /// Whether the loss of the present server was reported.
    told: bool,
}

impl Connection {
    /// What the library is to get as its connection, and how to go on when it has.
    pub(super) fn prepare(servers: Servers) -> io::Result<(Pending, OwnedFd)> {
        let (kind, flags) = (SocketType::SEQPACKET, SocketFlags::CLOEXEC);
        let (near, far) = rustix::net::socketpair(AddressFamily::UNIX, kind, flags, None)?;
        Ok((Pending { servers, number: far.as_raw_fd(), near }, far))
    }

    /// Whether the server is gone.
    pub(super) fn is_lost(&self) -> bool {
        let mut fds = [PollFd::new(&self.current, PollFlags::empty())];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let polled = rustix::event::poll(&mut fds, Some(&now));
        polled.is_ok_and(|count| count > 0)
    }

    /// Starts another server where the last one is gone. If that fails the library finds out.
    pub(super) fn ensure(&mut self) {
        if !self.is_lost() {
            return;
        }
        let connected = connect(&mut self.servers, &self.greeting, self.number);
        match connected {
            Ok(current) => {
                tracing::warn!("the render server had died: Vulkan goes on in another one");
                self.current = current;
                self.told = false;
            }
            Err(error) => {
                if !std::mem::replace(&mut self.told, true) {
                    tracing::error!(%error, "the render server has died: no Vulkan for the time being");
                }
            }
        }
    }
}

impl Pending {
    /// Connects the library, which has been initialised, to the first server.
    pub(super) fn open(self) -> io::Result<Connection> {
        let Self { mut servers, number, near } = self;
        let mut greeting = vec![0; MAX_GREETING];
        let (length, _) = rustix::net::recv(&near, &mut greeting[..], RecvFlags::DONTWAIT)?;
        greeting.truncate(length);
        let current = connect(&mut servers, &greeting, number)?;
        Ok(Connection { servers, number, current, greeting, told: false })
    }
}

/// Starts a server, greets it, and puts it behind the library's descriptor; a duplicate of that.
fn connect(servers: &mut Servers, greeting: &[u8], number: RawFd) -> io::Result<OwnedFd> {
    let server = servers.start()?;
    match rustix::net::send(&server, greeting, SendFlags::NOSIGNAL) {
        Ok(_) => {}
        // Ended already: the library finds out, as with one that ends later.
        Err(Errno::PIPE | Errno::CONNRESET) => {}
        Err(error) => return Err(error.into()),
    }
    // SAFETY: the number is the library's since `Connection::prepare` made it, stays open until the library is
    // cleaned up, and the library is not called meanwhile: what it does with it reaches the new server.
    let code = unsafe { libc::dup3(server.as_fd().as_raw_fd(), number, libc::O_CLOEXEC) };
    if code == -1 { Err(io::Error::last_os_error()) } else { Ok(server) }
}
