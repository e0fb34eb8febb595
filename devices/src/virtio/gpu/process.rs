//! The back end's process: `drago-gpu` beside our own executable, or one that runs already.

use std::{
    env,
    ffi::OsStr,
    io,
    os::{fd::OwnedFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec},
    process::{Pid, PidfdFlags},
};

use super::config::{GpuConfig, MODULE};
use crate::virtio::registry::BuildError;

const PROGRAM: &str = "drago-gpu";

/// How long the process may take to end after its sockets were closed, in seconds.
const GRACE: i64 = 2;

/// A process that we started. Ended when dropped; it ends by itself when we do.
#[derive(Debug)]
pub(super) struct BackEndProcess {
    child: Child,
}

fn host(what: impl Into<String>) -> impl FnOnce(io::Error) -> BuildError {
    let what = what.into();
    move |source| BuildError::Host { option: MODULE.option, what, source }
}

/// Connects to a back end that listens at `path`.
pub(super) fn connect(path: &Path) -> Result<UnixStream, BuildError> {
    let what = format!("socket={}: no vhost-user-gpu back end listens there", path.display());
    UnixStream::connect(path).map_err(host(what))
}

/// Starts `drago-gpu` with one end of a socket pair as its standard input: when we end, for
/// whatever reason, it reads the end of the stream and ends too.
pub(super) fn start(config: &GpuConfig) -> Result<(UnixStream, BackEndProcess), BuildError> {
    let program = find()?;
    let (ours, theirs) = UnixStream::pair().map_err(host("socket pair for drago-gpu"))?;
    let mut command = Command::new(&program);
    command.args(["--fd", "0", "--renderer", config.renderer.name()]);
    if let Some(node) = &config.render_node {
        command.arg("--render-node").arg(node);
    }
    let child = command
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .spawn()
        .map_err(host(format!("cannot start {}", program.display())))?;
    tracing::debug!(pid = child.id(), program = %program.display(), "drago-gpu started");
    Ok((ours, BackEndProcess { child }))
}

/// The program beside our own executable, or one directory up from cargo's test executables.
fn find() -> Result<PathBuf, BuildError> {
    let own = env::current_exe().map_err(host("where drago-vmm itself is"))?;
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

impl Drop for BackEndProcess {
    fn drop(&mut self) {
        if !self.ended_by_itself() {
            tracing::warn!("drago-gpu did not end by itself");
            let _ = self.child.kill();
        }
        match self.child.wait() {
            Ok(status) if status.success() => {}
            Ok(status) => tracing::warn!(%status, "drago-gpu failed"),
            Err(error) => tracing::warn!(%error, "drago-gpu is lost"),
        }
    }
}

impl BackEndProcess {
    fn ended_by_itself(&self) -> bool {
        let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) else {
            return false;
        };
        let Ok(pidfd) = rustix::process::pidfd_open(pid, PidfdFlags::empty()) else {
            return false;
        };
        let timeout = Timespec { tv_sec: GRACE, tv_nsec: 0 };
        let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
        matches!(rustix::event::poll(&mut fds, Some(&timeout)), Ok(1))
    }
}
