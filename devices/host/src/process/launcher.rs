//! The process that starts programs for a process that cannot any more.
//!
//! Both sides talk over a `SOCK_SEQPACKET` pair, one request a packet, with a socket for each child:
//!
//! ```text
//! request  'L' group count number… path\0 argument\0…   with the child's socket and `count` descriptors
//!          'S'                                          from now on only what was started before
//! child's socket   <- errno or 0, process number        (two times 32 bits, native)
//!                  <- wait status                       (32 bits) when it has ended
//!                  -> KILL
//! ```
//!
//! The launcher ends when the other side does: its children see the end of their own sockets.

use std::{
    ffi::{OsStr, OsString},
    io::{self, IoSlice, IoSliceMut, Read, Write},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{ffi::OsStrExt, net::UnixStream, process::ExitStatusExt},
    },
    process::Child,
    sync::OnceLock,
    thread,
};

use rustix::{
    event::{PollFd, PollFlags},
    io::Errno,
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
    },
    process::{Pid, PidfdFlags},
};

use super::{Inner, Process, Program, Remote, spawn, sys};

/// Name of the process in `ps -o comm`.
pub const NAME: &str = "drago-launcher";

/// Tells the launcher to kill a child.
pub(super) const KILL: u8 = b'K';

const LAUNCH: u8 = b'L';
const SEAL: u8 = b'S';
const MAX_REQUEST: usize = 64 << 10;
const MAX_FDS: usize = 8;
/// Different programs that can be started again.
const MAX_KNOWN: usize = 64;

static LAUNCHER: OnceLock<Launcher> = OnceLock::new();

/// Our end.
#[derive(Debug)]
pub(super) struct Launcher {
    socket: OwnedFd,
    /// None in tests.
    pid: Option<Pid>,
}

/// Forks the launcher off. To be called before any thread is started; programs are started by it
/// from now on.
///
/// # Errors
///
/// When there are threads already, or no room for a process.
pub fn fork() -> io::Result<()> {
    let flags = SocketFlags::CLOEXEC;
    let (ours, theirs) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    match sys::fork()? {
        sys::Fork::Parent(pid) => {
            let _ = LAUNCHER.set(Launcher { socket: ours, pid: Pid::from_raw(pid) });
            Ok(())
        }
        sys::Fork::Child => {
            // Everything of the parent's is closed by number.
            std::mem::forget(ours);
            if let Ok(socket) = sys::strip(theirs) {
                let _ = rustix::thread::set_name(c"drago-launcher");
                serve(&socket);
            }
            sys::end()
        }
    }
}

/// From now on the launcher starts nothing that it has not started before. Without a launcher
/// nothing happens.
///
/// # Errors
///
/// When the launcher is gone.
pub fn seal() -> io::Result<()> {
    match LAUNCHER.get() {
        Some(launcher) => launcher.send(&[SEAL], &[]),
        None => Ok(()),
    }
}

/// Ends the launcher and collects it, so that nothing is left when this process is gone. Programs
/// cannot be started after that; those that run are left alone.
pub fn end() {
    let Some(launcher) = LAUNCHER.get() else { return };
    let _ = rustix::net::shutdown(&launcher.socket, rustix::net::Shutdown::Both);
    if let Some(pid) = launcher.pid {
        while let Err(Errno::INTR) =
            rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty())
        {}
    }
}

pub(super) fn get() -> Option<&'static Launcher> {
    LAUNCHER.get()
}

impl Launcher {
    fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS + 1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let iov = [IoSlice::new(bytes)];
        loop {
            match rustix::net::sendmsg(&self.socket, &iov, &mut control, SendFlags::NOSIGNAL) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Has `program` started.
    pub(super) fn start(&self, program: Program) -> io::Result<Process> {
        let (mut channel, theirs) = UnixStream::pair()?;
        let request = Request::of(&program);
        let bytes = request.encode()?;
        let mut fds = vec![theirs.as_fd()];
        fds.extend(program.fds.iter().map(|(_, fd)| fd.as_fd()));
        self.send(&bytes, &fds)?;
        drop(theirs);
        // The child's descriptors must be the child's alone.
        drop(program);
        let mut answer = [0; 8];
        channel.read_exact(&mut answer).map_err(|error| {
            io::Error::new(error.kind(), "the process that starts programs is gone")
        })?;
        let [a, b, c, d, e, f, g, h] = answer;
        match i32::from_ne_bytes([a, b, c, d]) {
            0 => {
                let pid = u32::from_ne_bytes([e, f, g, h]);
                Ok(Process(Inner::Remote(Remote { pid, channel, status: None })))
            }
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

/// What makes two starts the same.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Request {
    own_group: bool,
    numbers: Vec<u8>,
    words: Vec<OsString>,
}

impl Request {
    fn of(program: &Program) -> Self {
        let mut words = vec![program.path.clone()];
        words.extend(program.arguments.iter().cloned());
        Self {
            own_group: program.own_group,
            numbers: program.fds.iter().map(|(number, _)| *number as u8).collect(),
            words,
        }
    }

    fn encode(&self) -> io::Result<Vec<u8>> {
        let mut bytes = vec![LAUNCH, u8::from(self.own_group), self.numbers.len() as u8];
        bytes.extend(&self.numbers);
        for word in &self.words {
            bytes.extend(word.as_bytes());
            bytes.push(0);
        }
        let zeroes = bytes[3 + self.numbers.len()..].iter().filter(|byte| **byte == 0).count();
        if bytes.len() > MAX_REQUEST || self.numbers.len() > MAX_FDS || zeroes != self.words.len() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        Ok(bytes)
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let [LAUNCH, group, count, rest @ ..] = bytes else { return None };
        let (numbers, words) = rest.split_at_checked(usize::from(*count))?;
        let words = words.strip_suffix(&[0])?;
        Some(Self {
            own_group: *group != 0,
            numbers: numbers.to_vec(),
            words: words.split(|byte| *byte == 0).map(|w| OsStr::from_bytes(w).into()).collect(),
        })
    }

    fn program(self, fds: impl Iterator<Item = OwnedFd>) -> Option<Program> {
        let mut words = self.words.into_iter();
        let program = Program {
            path: words.next()?,
            arguments: words.collect(),
            own_group: self.own_group,
            fds: self.numbers.iter().map(|number| i32::from(*number)).zip(fds).collect(),
        };
        (program.fds.len() == self.numbers.len()).then_some(program)
    }
}

/// The launcher's life.
fn serve(socket: &OwnedFd) {
    let mut known: Vec<Request> = Vec::new();
    let mut sealed = false;
    let mut buffer = vec![0; MAX_REQUEST];
    loop {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS + 1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut iov = [IoSliceMut::new(&mut buffer)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let length = match rustix::net::recvmsg(socket, &mut iov, &mut control, flags) {
            Err(Errno::INTR) => continue,
            Ok(message) if message.bytes > 0 => message.bytes,
            Ok(_) | Err(_) => return,
        };
        let mut fds = Vec::new();
        for part in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = part {
                fds.extend(received);
            }
        }
        if buffer[0] == SEAL {
            sealed = true;
            continue;
        }
        let mut fds = fds.into_iter();
        let (Some(channel), Some(request)) = (fds.next(), Request::decode(&buffer[..length]))
        else {
            continue;
        };
        let channel = UnixStream::from(channel);
        let is_known = known.contains(&request);
        if sealed && !is_known {
            answer(&channel, Errno::ACCESS.raw_os_error(), 0);
            continue;
        }
        if !is_known && known.len() < MAX_KNOWN {
            known.push(request.clone());
        }
        let Some(program) = request.program(fds) else {
            answer(&channel, Errno::INVAL.raw_os_error(), 0);
            continue;
        };
        match spawn::start(program) {
            Ok(child) => {
                answer(&channel, 0, child.id());
                let _ = thread::Builder::new().spawn(move || attend(child, channel));
            }
            Err(error) => {
                let errno = error.raw_os_error().unwrap_or(Errno::IO.raw_os_error());
                answer(&channel, errno, 0);
            }
        }
    }
}

fn answer(mut channel: &UnixStream, errno: i32, pid: u32) {
    let _ = channel.write_all(&[errno.to_ne_bytes(), pid.to_ne_bytes()].concat());
}

/// Waits for a child's end, or for the order to bring it about.
fn attend(mut child: Child, mut channel: UnixStream) {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let pidfd = pid.and_then(|pid| rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok());
    let mut listen = true;
    if let Some(pidfd) = pidfd {
        loop {
            let mut fds = vec![PollFd::new(&pidfd, PollFlags::IN)];
            if listen {
                fds.push(PollFd::new(&channel, PollFlags::IN));
            }
            if !matches!(rustix::event::poll(&mut fds, None), Ok(_) | Err(Errno::INTR)) {
                break;
            }
            let ended = !fds[0].revents().is_empty();
            let told = fds.get(1).is_some_and(|fd| !fd.revents().is_empty());
            if ended {
                break;
            }
            if told {
                let mut order = [0];
                match channel.read(&mut order) {
                    Ok(1) if order == [KILL] => {
                        let _ = child.kill();
                    }
                    // Nobody waits for it any more.
                    _ => listen = false,
                }
            }
        }
    }
    if let Ok(status) = child.wait() {
        let _ = channel.write_all(&status.into_raw().to_ne_bytes());
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic, reason = "tests")]
mod tests {
    use std::{io::ErrorKind, time::Duration};

    use super::*;

    /// A launcher on a thread of this process: tests have threads, so it cannot be forked here.
    fn launcher() -> Launcher {
        let flags = SocketFlags::CLOEXEC;
        let (socket, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
                .unwrap();
        thread::spawn(move || serve(&theirs));
        Launcher { socket, pid: None }
    }

    fn shell(script: &str) -> Program {
        Program::new("sh").arguments(["-c", script])
    }

    #[test]
    fn a_program_gets_its_descriptors_and_its_status_comes_back() {
        let launcher = launcher();
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let script = "read word <&100; echo $word >&100; exit 7";
        let program = Program::new("bash")
            .arguments(["-c", script])
            .fd(super::super::CHILD_SOCKET, theirs.into());
        let mut process = launcher.start(program).unwrap();
        assert_eq!(process.wait_for(Duration::ZERO).unwrap(), None);
        ours.write_all(b"hello\n").unwrap();
        let mut text = String::new();
        ours.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello\n", "and nobody else holds the child's end");
        assert_eq!(process.wait().unwrap().code(), Some(7));
        assert_eq!(process.wait().unwrap().code(), Some(7));
        process.kill().unwrap();
    }

    #[test]
    fn it_can_be_killed() {
        let launcher = launcher();
        let mut process = launcher.start(shell("exec sleep 1000")).unwrap();
        assert!(process.id() > 1);
        process.kill().unwrap();
        assert_eq!(process.wait().unwrap().signal(), Some(libc::SIGKILL));
    }

    #[test]
    fn sealed_it_only_starts_what_it_has_started() {
        let launcher = launcher();
        let error = launcher.start(Program::new("/nonexistent/program")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert!(launcher.start(shell("exit 3")).unwrap().wait().is_ok());
        launcher.send(&[SEAL], &[]).unwrap();
        assert_eq!(launcher.start(shell("exit 3")).unwrap().wait().unwrap().code(), Some(3));
        let other = launcher.start(shell("exit 4")).unwrap_err();
        assert_eq!(other.kind(), ErrorKind::PermissionDenied);
        let group = launcher.start(shell("exit 3").own_group()).unwrap_err();
        assert_eq!(group.kind(), ErrorKind::PermissionDenied);
    }

    #[test]
    fn requests_that_make_no_sense_are_survived() {
        let launcher = launcher();
        for bytes in [&b"x"[..], b"L", b"L\0\x09sh\0", b"L\0\0", b"L\0\x01\0sh\0"] {
            launcher.send(bytes, &[]).unwrap();
        }
        assert!(launcher.start(Program::new("a\0b")).is_err());
        assert!(launcher.start(shell("exit 0")).unwrap().wait().unwrap().success());
    }

    #[test]
    fn without_a_launcher_it_is_a_child() {
        let mut process = shell("exit 5").start().unwrap();
        let ended = process.wait_for(Duration::from_secs(60)).unwrap();
        assert_eq!(ended.and_then(|status| status.code()), Some(5));
    }
}
