//! The back end's process: `drago-gpu` beside our own executable, or one that runs already.

use std::{
    env,
    ffi::{OsStr, OsString},
    io,
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    time::Duration,
};

use host::process::{Process, Program};

use super::config::{GpuConfig, MODULE};
use crate::virtio::registry::BuildError;

const PROGRAM: &str = "drago-gpu";

/// How long the process may take to end after its sockets were closed.
const GRACE: Duration = Duration::from_secs(2);

/// A process that we started. Ended when dropped; it ends by itself when we do.
#[derive(Debug)]
pub(super) struct BackEndProcess(Process);

/// How to start the back end, as often as needed. Found once: a program that is replaced while the
/// machine runs is started from its place all the same.
#[derive(Debug, Clone)]
pub(super) struct Launcher {
    program: PathBuf,
    arguments: Vec<OsString>,
}

fn host_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> BuildError {
    let what = what.into();
    move |source| BuildError::Host { option: MODULE.option, what, source }
}

/// Connects to a back end that listens at `path`.
pub(super) fn connect(path: &Path) -> Result<UnixStream, BuildError> {
    let what = format!("socket={}: no vhost-user-gpu back end listens there", path.display());
    UnixStream::connect(path).map_err(host_error(what))
}

impl Launcher {
    /// Finds the program.
    pub(super) fn find(config: &GpuConfig) -> Result<Self, BuildError> {
        let program = find()?;
        let mut arguments: Vec<OsString> =
            ["--fd", "0", "--renderer", config.renderer.name()].map(OsString::from).into();
        if let Some(node) = &config.render_node {
            arguments.extend([OsString::from("--render-node"), node.into()]);
        }
        if config.vulkan {
            arguments.extend(["--vulkan", "venus"].map(OsString::from));
        }
        arguments.extend(["--sandbox", config.sandbox].map(OsString::from));
        Ok(Self { program, arguments })
    }

    /// Starts `drago-gpu` with one end of a socket pair as its standard input: when we end, for
    /// whatever reason, it reads the end of the stream and ends too.
    pub(super) fn start(&self) -> Result<(UnixStream, BackEndProcess), BuildError> {
        let (ours, theirs) = UnixStream::pair().map_err(host_error("socket pair for drago-gpu"))?;
        let process = Program::new(&self.program)
            .arguments(&self.arguments)
            .fd(0, OwnedFd::from(theirs))
            .start()
            .map_err(host_error(format!("cannot start {}", self.program.display())))?;
        tracing::debug!(pid = process.id(), program = %self.program.display(), "drago-gpu started");
        Ok((ours, BackEndProcess(process)))
    }
}

/// The program beside our own executable, or one directory up from cargo's test executables.
fn find() -> Result<PathBuf, BuildError> {
    let own = env::current_exe().map_err(host_error("where drago-vmm itself is"))?;
    let directory = own.parent().unwrap_or_else(|| Path::new("/"));
    let up = (directory.file_name() == Some(OsStr::new("deps"))).then(|| directory.parent());
    let candidates = [Some(directory), up.flatten()];
    let found = candidates.into_iter().flatten().map(|d| d.join(PROGRAM)).find(|p| p.is_file());
    found.ok_or_else(|| BuildError::Unusable {
        option: MODULE.option,
        reason: format!(
            "the program {PROGRAM} is not in {}: install it there (or build it with `cargo build \
             -p {PROGRAM}`), or start a back end yourself and name its socket=",
            directory.display()
        ),
    })
}

impl BackEndProcess {
    /// Its number.
    #[cfg(test)]
    pub(super) fn id(&self) -> u32 {
        self.0.id()
    }

    /// Ends it at once, for when it must not touch guest memory any more.
    pub(super) fn kill(&mut self) {
        match self.0.kill().and_then(|()| self.0.wait_for(GRACE)) {
            Ok(Some(_)) => {}
            // It runs no instruction of its own any more; the kernel ends it when its driver lets go.
            Ok(None) => tracing::error!("drago-gpu is held by a driver and cannot end yet"),
            Err(error) => tracing::error!(%error, "drago-gpu could not be killed"),
        }
    }
}

impl Drop for BackEndProcess {
    fn drop(&mut self) {
        let ended = match self.0.wait_for(GRACE) {
            Ok(None) => {
                tracing::warn!("drago-gpu did not end by itself");
                return self.kill();
            }
            Ok(Some(status)) => Ok(status),
            Err(error) => Err(error),
        };
        match ended {
            Ok(status) if status.success() => {}
            Ok(status) => tracing::warn!(%status, "drago-gpu failed"),
            Err(error) => tracing::warn!(%error, "drago-gpu is lost"),
        }
    }
}
