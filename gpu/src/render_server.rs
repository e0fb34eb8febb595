//! virglrenderer's render server: Vulkan for the guest, in processes of its own.
//!
//! The library would start it by itself, but not from within our sandbox, and without one around the
//! server. So a process is forked off before, the keeper, which does nothing but start servers when it is
//! asked to: one at first, another when the last one has died. Each gets walls of its own kind (it makes
//! a process for each context), and the library gets our end of the connection. A server ends with that
//! connection, with the keeper, and that one with us.

use std::{
    collections::VecDeque,
    ffi::OsString,
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::{net::UnixStream, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use host::socket_io;
use rustix::{
    io::FdFlags,
    net::{AddressFamily, RecvFlags, SocketFlags, SocketType},
    process::{Signal, WaitOptions},
};

use crate::{
    sandbox::{Mode, Needs, Sandbox},
    sys::{self, Fork},
};

/// Where Debian and others put it.
const PLACES: &[&str] = &[
    "/usr/libexec/virgl_render_server",
    "/usr/lib/virgl_render_server",
    "/usr/local/libexec/virgl_render_server",
];

/// virglrenderer's own variable for the same purpose.
const VARIABLE: &str = "RENDER_SERVER_EXEC_PATH";

/// So many servers are started in this time, then none: one that a guest's commands crash would be
/// started for ever.
const STARTS: usize = 6;
const STARTS_WITHIN: Duration = Duration::from_secs(60);

/// How the keeper answers.
const STARTED: u8 = 1;
const FAILED: u8 = 0;
const TOO_OFTEN: u8 = 2;

/// Why there is no Vulkan.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The program is nowhere.
    #[error(
        "--vulkan venus: there is no virgl_render_server (Debian package virgl-server; elsewhere name \
         it with --render-server or {VARIABLE})"
    )]
    Missing,
    /// It cannot be started.
    #[error("--vulkan venus: {} cannot be started", program.display())]
    Start {
        /// Its path.
        program: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The server's program and its first arguments: those that were named, or the one that is installed.
pub fn find(named: Vec<PathBuf>) -> Result<Vec<PathBuf>, ServerError> {
    if !named.is_empty() {
        return Ok(named);
    }
    let variable = std::env::var_os(VARIABLE).map(PathBuf::from);
    let places = variable.into_iter().chain(PLACES.iter().map(PathBuf::from));
    let found = places.into_iter().find(|path| path.is_file());
    found.map(|path| vec![path]).ok_or(ServerError::Missing)
}

/// Where connections to fresh servers come from.
#[derive(Debug)]
pub struct Servers {
    keeper: UnixStream,
}

impl Servers {
    /// Forks the keeper off. To be called by the only thread there is. `words` are what [`find`] found;
    /// `max_memory` is what guests may have, in bytes.
    pub fn new(
        words: Vec<PathBuf>,
        mode: Mode,
        render_node: Option<&Path>,
        max_memory: u64,
    ) -> Result<Self, ServerError> {
        let program = words.first().cloned().unwrap_or_default();
        let failed = |source: io::Error| ServerError::Start { program: program.clone(), source };
        let (ours, theirs) = UnixStream::pair().map_err(failed)?;
        match sys::fork().map_err(failed)? {
            Fork::Parent => Ok(Self { keeper: ours }),
            Fork::Child => {
                drop(ours);
                let recipe = Recipe { words, mode, render_node, max_memory };
                let code = match keep(&theirs, &recipe) {
                    Ok(()) => 0,
                    Err(error) => {
                        tracing::error!(%error, "no render server can be started any more");
                        1
                    }
                };
                std::process::exit(code)
            }
        }
    }

    /// Starts a server; our end of the connection to it. What is wrong with it shows when it is used.
    ///
    /// # Errors
    /// If the keeper is gone, could not do it, or has done it too often.
    pub fn start(&mut self) -> io::Result<OwnedFd> {
        socket_io::send_all(&self.keeper, &[STARTED], &[])?;
        let (mut answer, mut fds) = ([FAILED], VecDeque::new());
        let count = socket_io::receive(&self.keeper, &mut answer, &mut fds, RecvFlags::empty())?;
        match fds.pop_front() {
            Some(fd) if count == 1 && answer == [STARTED] => Ok(fd),
            None if count == 1 && answer == [TOO_OFTEN] => {
                Err(io::Error::other("it was started too often within a minute"))
            }
            _ => Err(io::Error::other("no process could be made for it, or who makes it is gone")),
        }
    }
}

/// How a server is started.
struct Recipe<'a> {
    words: Vec<PathBuf>,
    mode: Mode,
    render_node: Option<&'a Path>,
    max_memory: u64,
}

/// The keeper's life, up to the end of the connection.
fn keep(socket: &UnixStream, recipe: &Recipe<'_>) -> io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    rustix::thread::set_name(c"drago-servers")?;
    // Above all not the VMM's socket: whoever has it is the VMM's back end.
    sys::close_all_but(Some(socket.as_fd()))?;
    let mut fds = VecDeque::new();
    // Counted here: who asks is the one that the walls are for.
    let mut starts: VecDeque<Instant> = VecDeque::new();
    while socket_io::receive(socket, &mut [0], &mut fds, RecvFlags::empty())? == 1 {
        // Nothing is wanted but the byte.
        fds.clear();
        // Those that ended before.
        while let Ok(Some(_)) = rustix::process::wait(WaitOptions::NOHANG) {}
        let now = Instant::now();
        starts.retain(|at| now.duration_since(*at) < STARTS_WITHIN);
        if starts.len() >= STARTS {
            socket_io::send_all(socket, &[TOO_OFTEN], &[])?;
            continue;
        }
        starts.push_back(now);
        match start(recipe) {
            Ok(fd) => socket_io::send_all(socket, &[STARTED], &[fd.as_fd()])?,
            Err(error) => {
                tracing::error!(%error, "the render server cannot be started");
                socket_io::send_all(socket, &[FAILED], &[])?;
            }
        }
    }
    Ok(())
}

fn start(recipe: &Recipe<'_>) -> io::Result<OwnedFd> {
    let (ours, theirs) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?;
    match sys::fork()? {
        Fork::Parent => Ok(ours),
        Fork::Child => {
            drop(ours);
            let error = become_server(recipe, &theirs);
            let program = recipe.words.first().cloned().unwrap_or_default();
            tracing::error!(%error, program = %program.display(), "the render server cannot be started");
            std::process::exit(1)
        }
    }
}

/// Only returns if that is not possible.
fn become_server(recipe: &Recipe<'_>, socket: &OwnedFd) -> io::Error {
    let Recipe { words, mode, render_node, max_memory } = recipe;
    let prepare = || -> io::Result<File> {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        // This one, standard output and errors are all it gets: not the keeper's.
        sys::close_on_exec()?;
        rustix::io::fcntl_setfd(socket, FdFlags::empty())?;
        File::open("/dev/null")
    };
    let nothing = match prepare() {
        Ok(nothing) => nothing,
        Err(error) => return error,
    };
    let (Some(program), rest) = (words.first(), words.get(1..).unwrap_or(&[])) else {
        return io::ErrorKind::NotFound.into();
    };
    let needs = Needs::RenderServer {
        render_node: render_node.map(Path::to_path_buf),
        programs: words.clone(),
    };
    let arguments = rest.iter().map(|word| word.clone().into_os_string());
    let arguments =
        arguments.chain(["--socket-fd".into(), OsString::from(socket.as_raw_fd().to_string())]);
    let mut command = Command::new(program);
    command.args(arguments).stdin(nothing);
    let prepared = Sandbox::prepare(*mode, needs, *max_memory);
    if prepared.has_own_processes() {
        // The first process of the namespace is the one that is made next. When it ends, the kernel ends
        // all others in there, whatever they are stuck in.
        match sys::fork() {
            // Within no walls of its own: from behind them its end would not reach the server.
            Ok(Fork::Parent) => wait_for_server(),
            Ok(Fork::Child) => {}
            Err(error) => return error,
        }
        let bound = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
        if let Err(error) = bound {
            return error.into();
        }
    }
    drop(prepared.enter().close());
    command.exec()
}

/// Stands between the keeper and a server in a namespace of its own: ends with either.
fn wait_for_server() -> ! {
    let _ = rustix::thread::set_name(c"drago-server");
    // Above all not the server's end of its connection.
    let closed = sys::close_all_but(None);
    let ended = rustix::process::wait(WaitOptions::empty());
    std::process::exit(i32::from(closed.is_err() || ended.is_err()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_named_program_is_taken_as_it_is() {
        let words = vec![PathBuf::from("/a"), PathBuf::from("b")];
        assert_eq!(find(words.clone()).unwrap(), words);
    }
}
