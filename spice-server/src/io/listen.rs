//! Listening sockets and the options of accepted ones.

use std::{
    io,
    net::{SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

use rustix::{
    io::Errno,
    net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt},
};

use super::sys::set_tcp_notsent_lowat;

const BACKLOG: i32 = 64;
/// Unsent bytes the kernel may hold per connection.
const NOTSENT_LOWAT: i32 = 128 * 1024;
/// A peer that acknowledges nothing for this long is gone.
const DEAD_PEER: Duration = Duration::from_secs(30);
/// Silence after which the kernel asks whether the peer is still there.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);

/// Listens on an address, even one the machine does not have yet (`IP_FREEBIND`).
pub(crate) fn listen_on(address: SocketAddr) -> io::Result<TcpListener> {
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
            tracing::info!(%address, "the machine does not have this address yet");
        }
        result => result?,
    }
    listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

/// Sets the options of an accepted connection: no delay, no stale data, dead peers found without
/// any traffic of our own.
pub(crate) fn prepare(stream: &TcpStream) -> io::Result<()> {
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
}
