//! virglrenderer's render server: Vulkan for the guest, in processes of its own.
//!
//! The library would start it by itself, but not from within our sandbox, and without one around the
//! server. So it is started before, behind walls of its own kind (it makes a process for each
//! context), and the library gets its end of the connection. It ends with that connection, and with us.

use std::{
    ffi::OsString,
    fs::File,
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    path::{Path, PathBuf},
    process::Command,
};

use rustix::{
    io::FdFlags,
    net::{AddressFamily, SocketFlags, SocketType},
    process::Signal,
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

/// Starts the server and returns our end of the connection to it. To be called by the only thread
/// there is. `words` are what [`find`] found; `max_memory` is what guests may have, in bytes.
pub fn start(
    words: &[PathBuf],
    mode: Mode,
    render_node: Option<&Path>,
    max_memory: u64,
) -> Result<OwnedFd, ServerError> {
    let program = words.first().cloned().unwrap_or_default();
    let failed = |source: io::Error| ServerError::Start { program: program.clone(), source };
    let (ours, theirs) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .map_err(|error| failed(error.into()))?;
    match sys::fork().map_err(failed)? {
        Fork::Parent => Ok(ours),
        Fork::Child => {
            drop(ours);
            let error = become_server(words, mode, render_node, max_memory, &theirs);
            tracing::error!(%error, program = %program.display(), "the render server cannot be started");
            std::process::exit(1)
        }
    }
}

/// Only returns if that is not possible.
fn become_server(
    words: &[PathBuf],
    mode: Mode,
    render_node: Option<&Path>,
    max_memory: u64,
    socket: &OwnedFd,
) -> io::Error {
    let prepare = || -> io::Result<File> {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        // This one, standard output and errors are all it gets, whatever else is open: above all not
        // the VMM's socket, which may be drago-gpu's standard input.
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
        programs: words.to_vec(),
    };
    let arguments = rest.iter().map(|word| word.clone().into_os_string());
    let arguments =
        arguments.chain(["--socket-fd".into(), OsString::from(socket.as_raw_fd().to_string())]);
    let mut command = Command::new(program);
    command.args(arguments).stdin(nothing);
    drop(Sandbox::enter(mode, needs, max_memory).close());
    command.exec()
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
