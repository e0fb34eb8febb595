//! One connection to a front end, from handshake to hang-up.

use std::{
    io,
    os::unix::{
        fs::DirBuilderExt,
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
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

impl Door {
    /// Listens in a directory that nobody else may enter, which is gone when this returns. To be
    /// called before the sandbox is entered.
    pub fn open() -> Result<Self, ServeError> {
        let (listener, near) = private_listener().map_err(ServeError::Setup)?;
        Ok(Self { listener, near })
    }
}

/// Removes the directories of processes that were killed while they had one.
fn forget_the_dead(parent: &Path) {
    for entry in std::fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix("drago-gpu-"));
        let Some(pid) = pid.and_then(|pid| pid.parse::<u32>().ok()) else { continue };
        if !Path::new(&format!("/proc/{pid}")).exists() {
            // Whoever may not do this is somebody else.
            let _ = std::fs::remove_file(entry.path().join("socket"));
            let _ = std::fs::remove_dir(entry.path());
        }
    }
}

fn private_listener() -> io::Result<(UnixListener, UnixStream)> {
    let candidates = [
        std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from),
        Some(std::env::temp_dir()),
        Some(PathBuf::from("/dev/shm")),
    ];
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    for parent in candidates.into_iter().flatten() {
        forget_the_dead(&parent);
        let directory = parent.join(format!("drago-gpu-{}", std::process::id()));
        match std::fs::DirBuilder::new().mode(0o700).create(&directory) {
            Ok(()) => {}
            Err(error) => {
                last = io::Error::new(error.kind(), format!("{}: {error}", directory.display()));
                continue;
            }
        }
        let path = directory.join("socket");
        let result = UnixListener::bind(&path).and_then(|listener| {
            let near = UnixStream::connect(&path)?;
            Ok((listener, near))
        });
        let _ = std::fs::remove_file(&path);
        let _ = std::fs::remove_dir(&directory);
        return result;
    }
    Err(last)
}
