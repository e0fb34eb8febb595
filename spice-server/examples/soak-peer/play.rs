//! A capture, played to a server.

use std::{
    collections::HashMap,
    io::{self, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    thread,
};

use spice_server::{CaptureEvent, CaptureRecord};

use super::peer::{Layers, Peer};

const MAIN: u8 = 1;

/// Sends what is in the records, one after the other. Whatever the server says is taken and not looked at.
pub fn replay(records: &[CaptureRecord], to: SocketAddr, password: &str) -> io::Result<()> {
    let mut sockets: HashMap<u32, TcpStream> = HashMap::new();
    // Their numbers then and now.
    let mut sessions = HashMap::new();
    let mut readers = Vec::new();
    for record in records {
        match &record.event {
            CaptureEvent::Opened { session, channel: (kind, id), common_caps, channel_caps } => {
                let now =
                    if *kind == MAIN { 0 } else { sessions.get(session).copied().unwrap_or(0) };
                let mut peer = Peer::connect(to, None, Layers { tls: false, web: false })?;
                let key = peer.begin_link_with(now, (*kind, *id), common_caps, channel_caps)?;
                peer.send_ticket(&key, password)?;
                if peer.result()? != 0 {
                    return Err(io::Error::other("the server does not take the password"));
                }
                if *kind == MAIN {
                    let mini = common_caps.first().is_some_and(|word| word & 8 != 0);
                    sessions.insert(*session, peer.session(mini)?);
                }
                let socket = peer.into_socket()?;
                let mut from = socket.try_clone()?;
                readers.push(thread::spawn(move || {
                    let _ = io::copy(&mut from, &mut io::sink());
                }));
                sockets.insert(record.connection, socket);
            }
            CaptureEvent::Bytes(bytes) => {
                // A server that has had enough of a channel says so by closing it.
                if let Some(socket) = sockets.get_mut(&record.connection)
                    && socket.write_all(bytes).is_err()
                {
                    sockets.remove(&record.connection);
                }
            }
            CaptureEvent::Closed => {
                if let Some(socket) = sockets.remove(&record.connection) {
                    let _ = socket.shutdown(Shutdown::Write);
                }
            }
            CaptureEvent::Full => break,
            _ => {}
        }
    }
    for socket in sockets.values() {
        let _ = socket.shutdown(Shutdown::Write);
    }
    readers.into_iter().for_each(|reader| drop(reader.join()));
    Ok(())
}
