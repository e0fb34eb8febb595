//! Listening sockets and the options of accepted ones.

use std::{
    fs, io,
    net::{SocketAddr, TcpListener, TcpStream},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::{
            fs::{FileTypeExt, PermissionsExt},
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::{
    io::Errno,
    net::{
        AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with, sockopt,
    },
};

use super::{
    stream::{Peer, Socket},
    sys::set_tcp_notsent_lowat,
};

const BACKLOG: i32 = 64;
/// Unsent bytes the kernel may hold per connection.
const NOTSENT_LOWAT: i32 = 128 * 1024;
/// A peer that acknowledges nothing for this long is gone.
const DEAD_PEER: Duration = Duration::from_secs(30);
/// Silence after which the kernel asks whether the peer is still there.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);

/// Listens on an address, even one the machine does not have yet (`IP_FREEBIND`).
fn listen_on(address: SocketAddr) -> io::Result<TcpListener> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, SocketType::STREAM, flags, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    if address.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    match bind(&socket, &address) {
        Err(Errno::ADDRNOTAVAIL) => {
            if address.is_ipv4() {
                sockopt::set_ip_freebind(&socket, true)?;
            } else {
                sockopt::set_ipv6_freebind(&socket, true)?;
            }
            bind(&socket, &address)?;
            tracing::warn!(%address, "the machine does not have this address yet");
        }
        result => result?,
    }
    listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

/// Listens on a Unix socket whose file gets the permissions `mode`. A socket nobody listens on any more
/// is replaced.
fn listen_at(path: &Path, mode: u32) -> io::Result<UnixListener> {
    let in_the_way = |text| io::Error::new(io::ErrorKind::AlreadyExists, text);
    if let Ok(metadata) = fs::symlink_metadata(path) {
        if !metadata.file_type().is_socket() {
            return Err(in_the_way("the file exists and is not a socket"));
        }
        if UnixStream::connect(path).is_ok() {
            return Err(in_the_way("another program listens there"));
        }
        fs::remove_file(path)?;
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    // Nobody can connect before `listen`, whatever the umask was.
    fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

#[derive(Debug)]
enum Listening {
    Tcp(TcpListener),
    Unix(UnixListener, PathBuf),
}

/// A listening socket. A Unix socket's file goes with it.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: Listening,
    /// Clients without TLS are turned away.
    pub(crate) tls_only: bool,
}

impl Listener {
    pub(crate) fn tcp(address: SocketAddr, tls_only: bool) -> io::Result<Self> {
        Ok(Self { socket: Listening::Tcp(listen_on(address)?), tls_only })
    }

    pub(crate) fn unix(path: &Path, mode: u32) -> io::Result<Self> {
        let socket = Listening::Unix(listen_at(path, mode)?, path.to_owned());
        Ok(Self { socket, tls_only: false })
    }

    /// The address of a TCP listener, with the real port.
    pub(crate) fn local_addr(&self) -> io::Result<Option<SocketAddr>> {
        match &self.socket {
            Listening::Tcp(socket) => socket.local_addr().map(Some),
            Listening::Unix(..) => Ok(None),
        }
    }

    /// Accepts a connection and sets its options.
    pub(crate) fn accept(&self) -> io::Result<(Socket, Peer)> {
        match &self.socket {
            Listening::Tcp(socket) => {
                let (stream, peer) = socket.accept()?;
                if let Err(error) = prepare(&stream) {
                    // The client may have left already.
                    return Err(io::Error::new(io::ErrorKind::ConnectionAborted, error));
                }
                Ok((Socket::Tcp(stream), Peer::Net(peer)))
            }
            Listening::Unix(socket, _) => {
                let (stream, _) = socket.accept()?;
                stream.set_nonblocking(true)?;
                let who = sockopt::socket_peercred(&stream)?;
                let pid = rustix::process::Pid::as_raw(Some(who.pid));
                Ok((Socket::Unix(stream), Peer::Unix { uid: who.uid.as_raw(), pid }))
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.socket {
            Listening::Tcp(socket) => socket.as_fd(),
            Listening::Unix(socket, _) => socket.as_fd(),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Listening::Unix(_, path) = &self.socket
            && let Err(error) = fs::remove_file(path)
        {
            tracing::warn!(path = %path.display(), %error, "a SPICE socket was not removed");
        }
    }
}

/// Sets the options of an accepted connection: no delay, no stale data, dead peers found without
/// any traffic of our own.
fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nonblocking(true)?;
    stream.set_nodelay(true)?;
    set_tcp_notsent_lowat(stream, NOTSENT_LOWAT)?;
    sockopt::set_tcp_user_timeout(stream, DEAD_PEER.as_millis() as u32)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(stream, KEEPALIVE_INTERVAL)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_addresses_can_be_bound() {
        // TEST-NET-1, which no machine has.
        let listener = listen_on("192.0.2.7:0".parse().unwrap()).unwrap();
        assert_eq!(listener.local_addr().unwrap().ip().to_string(), "192.0.2.7");
    }

    #[test]
    fn a_taken_port_is_an_error() {
        let first = listen_on("127.0.0.1:0".parse().unwrap()).unwrap();
        assert!(listen_on(first.local_addr().unwrap()).is_err());
    }

    #[test]
    fn unix_sockets_have_the_permissions_asked_for_and_go_away() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("spice");
        let listener = Listener::unix(&path, 0o620).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o620);
        let _client = UnixStream::connect(&path).unwrap();
        let (_, peer) = listener.accept().unwrap();
        let pid = std::process::id() as i32;
        assert_eq!(peer, Peer::Unix { uid: rustix::process::getuid().as_raw(), pid });
        assert!(Listener::unix(&path, 0o600).is_err(), "somebody listens");
        drop(listener);
        assert!(!path.exists());

        drop(UnixListener::bind(&path).unwrap());
        drop(Listener::unix(&path, 0o600).expect("a stale socket is replaced"));
        fs::write(&path, "precious").unwrap();
        assert!(Listener::unix(&path, 0o600).is_err());
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }
}
