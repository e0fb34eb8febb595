//! One connection to a front end, from handshake to hang-up.

use std::{
    io,
    os::{
        fd::OwnedFd,
        unix::net::{UnixListener, UnixStream},
    },
};

use rustix::{
    io::Errno,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType},
};
use vhost::vhost_user::Listener;
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon};
use vm_memory::GuestMemoryAtomic;

use crate::{GuestMemory, device::GpuDevice, relay};

/// Why serving a front end ended early.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A resource of the host could not be had.
    #[error("the back end could not be set up")]
    Setup(#[source] io::Error),
    /// The vhost-user library could not start.
    #[error("the vhost-user daemon could not start: {0}")]
    Daemon(String),
    /// The front end broke the protocol or the connection.
    #[error("the connection to the front end failed")]
    Connection(#[source] io::Error),
}

/// Serves the front end at the other end of `front` until it hangs up. `ready` is called when all
/// threads run and nothing of the front end's has been read.
pub fn serve(
    front: &UnixStream,
    door: Door,
    device: &GpuDevice,
    ready: impl FnOnce(),
) -> Result<(), ServeError> {
    let features = device.features();
    let memory = GuestMemoryAtomic::new(GuestMemory::new());
    let mut daemon = VhostUserDaemon::new("drago-gpu".into(), device.clone(), memory)
        .map_err(|error| ServeError::Daemon(error.to_string()))?;
    let Door { listener, near } = door;
    daemon
        .start(&mut Listener::from(listener))
        .map_err(|error| ServeError::Daemon(error.to_string()))?;
    ready();
    let result = relay::run(front, &near, features, &mut device.clone());
    // Whatever the library says about the end of its connection, the cause is known above.
    if let Err(error) = daemon.wait() {
        tracing::debug!(%error, "the vhost-user daemon ended");
    }
    result.map_err(ServeError::Connection)
}

/// A way into the vhost-user library, which accepts connections and takes none that exists: a
/// listener, and a connection that waits in it.
#[derive(Debug)]
pub struct Door {
    listener: UnixListener,
    near: UnixStream,
}

/// How often somebody else may be faster than we are.
const ATTEMPTS: usize = 16;

impl Door {
    /// Listens under a name that the kernel chooses and that is in no folder, so nothing is left of
    /// it whenever this process dies. To be called before the sandbox is entered.
    pub fn open() -> Result<Self, ServeError> {
        Self::open_despite(|_| Ok(())).map_err(ServeError::Setup)
    }

    /// `stranger` acts while everybody can find the name.
    fn open_despite(
        mut stranger: impl FnMut(&SocketAddrUnix) -> io::Result<()>,
    ) -> io::Result<Self> {
        let mut last = io::Error::from(io::ErrorKind::WouldBlock);
        for _ in 0..ATTEMPTS {
            let listener = stream()?;
            rustix::net::bind(&listener, &SocketAddrUnix::new_unnamed())?;
            // Room for one. If our connection finds it, no other one can be accepted.
            rustix::net::listen(&listener, 0)?;
            let name = SocketAddrUnix::try_from(rustix::net::getsockname(&listener)?)?;
            stranger(&name)?;
            let near = UnixStream::from(stream()?);
            near.set_nonblocking(true)?;
            match rustix::net::connect(&near, &name) {
                Ok(()) => {
                    near.set_nonblocking(false)?;
                    return Ok(Self { listener: UnixListener::from(listener), near });
                }
                Err(Errno::AGAIN) => last = Errno::AGAIN.into(),
                Err(error) => return Err(error.into()),
            }
        }
        Err(last)
    }
}

fn stream() -> io::Result<OwnedFd> {
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    );
    Ok(socket?)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn who_comes_in_between_does_not_get_in() {
        let mut strangers = Vec::new();
        let door = Door::open_despite(|name| {
            if strangers.len() < 3 {
                let stranger = stream()?;
                rustix::net::connect(&stranger, name)?;
                strangers.push(UnixStream::from(stranger));
            }
            Ok(())
        });
        let Door { listener, mut near } = door.unwrap();
        assert_eq!(strangers.len(), 3);
        let (mut inside, _) = listener.accept().unwrap();
        near.write_all(b"us").unwrap();
        let mut bytes = [0; 2];
        inside.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"us");
        // What they connected to is gone.
        for mut stranger in strangers {
            assert_eq!(stranger.read(&mut bytes).unwrap_or(0), 0);
        }
    }

    #[test]
    fn nobody_is_let_in_after_us() {
        let mut name = None;
        let door = Door::open_despite(|found| {
            name = Some(found.clone());
            Ok(())
        });
        let Door { listener, near } = door.unwrap();
        let late = UnixStream::from(stream().unwrap());
        late.set_nonblocking(true).unwrap();
        assert_eq!(rustix::net::connect(&late, &name.unwrap()), Err(Errno::AGAIN));
        assert!(listener.local_addr().unwrap().as_pathname().is_none(), "in no folder");
        drop(near);
    }

    #[test]
    fn a_stranger_who_is_always_faster_ends_it() {
        let mut strangers = Vec::new();
        let door = Door::open_despite(|name| {
            let stranger = stream()?;
            rustix::net::connect(&stranger, name)?;
            strangers.push(stranger);
            Ok(())
        });
        assert_eq!(door.unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert_eq!(strangers.len(), ATTEMPTS);
    }
}
