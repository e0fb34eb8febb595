//! Starting a program as a child of this process.

use std::{
    io,
    os::unix::process::CommandExt,
    process::{Child, Command, Stdio},
};

use super::{CHILD_SOCKET, Program, sys};

/// Starts `program`.
pub(super) fn start(program: Program) -> io::Result<Child> {
    let mut command = Command::new(program.path);
    command.args(program.arguments).stdin(Stdio::null()).stdout(Stdio::null());
    if program.own_group {
        command.process_group(0);
    }
    for (number, fd) in program.fds {
        match number {
            0 => command.stdin(Stdio::from(fd)),
            1 => command.stdout(Stdio::from(fd)),
            2 => command.stderr(Stdio::from(fd)),
            CHILD_SOCKET => sys::give(&mut command, &fd, number)?,
            _ => return Err(io::ErrorKind::InvalidInput.into()),
        };
    }
    // With the command go our copies of the descriptors, so that the child's end is seen.
    command.spawn()
}
