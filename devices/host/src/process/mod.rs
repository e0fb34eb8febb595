//! Child processes.
//!
//! Once the sandbox is closed no thread of ours can start a program, and still passt and drago-gpu
//! have to be started again when they end. So a [`launcher`] is forked off before: it starts programs
//! on request, and once it is sealed only those that it has started before, with the same arguments.
//! Without a launcher the same calls start children of this process.

pub mod launcher;
mod spawn;
mod sys;

use std::{
    ffi::OsString,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, OwnedFd, RawFd},
        unix::{net::UnixStream, process::ExitStatusExt},
    },
    process::{Child, ExitStatus},
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec},
    process::{Pid, PidfdFlags},
};

/// Descriptor number for a child's socket, where it is none of the first three. Far from the numbers
/// that are handed out first, so that nothing is in its way.
pub const CHILD_SOCKET: RawFd = 100;

/// A program to be started. Descriptors it is not given are `/dev/null` (0 and 1), our own (2), or
/// not there.
#[derive(Debug)]
pub struct Program {
    path: OsString,
    arguments: Vec<OsString>,
    own_group: bool,
    fds: Vec<(RawFd, OwnedFd)>,
}

impl Program {
    /// The program at `path`, or of that name in `PATH`.
    pub fn new(path: impl Into<OsString>) -> Self {
        Self { path: path.into(), arguments: Vec::new(), own_group: false, fds: Vec::new() }
    }

    /// Appends arguments.
    #[must_use]
    pub fn arguments(mut self, arguments: impl IntoIterator<Item = impl Into<OsString>>) -> Self {
        self.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// Keeps the signals of our terminal away from it.
    #[must_use]
    pub fn own_group(mut self) -> Self {
        self.own_group = true;
        self
    }

    /// Lets it have `fd` as number `number`: 0, 1, 2 or [`CHILD_SOCKET`].
    #[must_use]
    pub fn fd(mut self, number: RawFd, fd: OwnedFd) -> Self {
        self.fds.push((number, fd));
        self
    }

    /// Starts it.
    ///
    /// # Errors
    ///
    /// Those of execve(2), `NotFound` for a program that is not there; `PermissionDenied` for one
    /// that a sealed launcher has not started before.
    pub fn start(self) -> io::Result<Process> {
        match launcher::get() {
            Some(launcher) => launcher.start(self),
            None => spawn::start(self).map(|child| Process(Inner::Child(child))),
        }
    }
}

/// A started program. It goes on when this is dropped.
#[derive(Debug)]
pub struct Process(Inner);

#[derive(Debug)]
enum Inner {
    Child(Child),
    Remote(Remote),
}

/// A child of the launcher, which reports its end on `channel` and kills it when told so there.
#[derive(Debug)]
struct Remote {
    pid: u32,
    channel: UnixStream,
    status: Option<ExitStatus>,
}

impl Process {
    /// Its number.
    pub fn id(&self) -> u32 {
        match &self.0 {
            Inner::Child(child) => child.id(),
            Inner::Remote(remote) => remote.pid,
        }
    }

    /// Kills it (SIGKILL), unless it has ended.
    ///
    /// # Errors
    ///
    /// When the launcher is gone.
    pub fn kill(&mut self) -> io::Result<()> {
        match &mut self.0 {
            Inner::Child(child) => child.kill(),
            Inner::Remote(remote) if remote.status.is_some() => Ok(()),
            Inner::Remote(remote) => match remote.channel.write_all(&[launcher::KILL]) {
                // It has ended and been waited for; the status is on its way.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
                other => other,
            },
        }
    }

    /// Waits for its end.
    ///
    /// # Errors
    ///
    /// When the launcher is gone, so that nobody knows the status.
    pub fn wait(&mut self) -> io::Result<ExitStatus> {
        match &mut self.0 {
            Inner::Child(child) => child.wait(),
            Inner::Remote(remote) => remote.wait(),
        }
    }

    /// Waits for its end, but not longer than `limit`; `None` if it still runs.
    ///
    /// # Errors
    ///
    /// As for [`wait`](Self::wait).
    pub fn wait_for(&mut self, limit: Duration) -> io::Result<Option<ExitStatus>> {
        let ended = match &self.0 {
            Inner::Remote(remote) if remote.status.is_some() => true,
            Inner::Remote(remote) => readable(&remote.channel, limit)?,
            Inner::Child(child) => {
                let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
                let pid = pid.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
                match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
                    Ok(pidfd) => readable(&pidfd, limit)?,
                    // Waited for already.
                    Err(rustix::io::Errno::SRCH) => true,
                    Err(error) => return Err(error.into()),
                }
            }
        };
        if ended { self.wait().map(Some) } else { Ok(None) }
    }
}

impl Remote {
    fn wait(&mut self) -> io::Result<ExitStatus> {
        if let Some(status) = self.status {
            return Ok(status);
        }
        let mut status = [0; 4];
        self.channel.read_exact(&mut status)?;
        let status = ExitStatus::from_raw(i32::from_ne_bytes(status));
        self.status = Some(status);
        Ok(status)
    }
}

fn readable(fd: &impl AsFd, limit: Duration) -> io::Result<bool> {
    let timeout = Timespec {
        tv_sec: limit.as_secs().try_into().unwrap_or(i64::MAX),
        tv_nsec: limit.subsec_nanos().into(),
    };
    let mut fds = [PollFd::new(fd, PollFlags::IN)];
    loop {
        match rustix::event::poll(&mut fds, Some(&timeout)) {
            Ok(count) => return Ok(count > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
