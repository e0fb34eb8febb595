//! What this process may still do once a guest's commands arrive: see `docs/sandbox.md`.
//!
//! | module | when | what |
//! |---|---|---|
//! | [`namespaces`] | before any thread | own user, network, IPC, UTS and mount namespaces; 2D: an empty root |
//! | [`limits`] | before any thread | no core dump, bounded heap and descriptors |
//! | [`landlock`] | before any thread | the files a graphics driver needs, no others; no TCP |
//! | [`seccomp`] | when the driver is up | the system calls that are left, for all threads |
//!
//! Every layer is optional to the kernel: what it refuses is named in one line of the log, and the
//! others stand.

mod elf;
mod landlock;
mod limits;
mod namespaces;
mod seccomp;
mod sys;

use std::{fmt, io, path::PathBuf, str::FromStr};

use host::seccomp::Violation;

/// `--sandbox`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// All that the kernel permits; a system call that is not in the table ends the process.
    #[default]
    On,
    /// Nothing.
    Off,
    /// As on, but such system calls are carried out and the kernel's log tells about them.
    Log,
}

/// An unknown mode.
#[derive(Debug, thiserror::Error)]
#[error("expected on, off or log")]
pub struct UnknownMode;

impl FromStr for Mode {
    type Err = UnknownMode;

    fn from_str(text: &str) -> Result<Self, UnknownMode> {
        match text {
            "on" => Ok(Self::On),
            "off" => Ok(Self::Off),
            "log" => Ok(Self::Log),
            _ => Err(UnknownMode),
        }
    }
}

/// What the renderer needs from the system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Needs {
    /// 2D: memory and sockets that are there already.
    Nothing,
    /// OpenGL or Vulkan.
    Driver {
        /// The GPU; none: the host's CPUs draw.
        render_node: Option<PathBuf>,
        /// Where compiled shaders may be kept between runs; none: nowhere.
        shader_cache: Option<PathBuf>,
    },
    /// virglrenderer's server for Vulkan: a driver in another program, which makes a process for each
    /// context.
    RenderServer {
        /// The GPU; none: the host's CPUs draw.
        render_node: Option<PathBuf>,
        /// What is executed.
        programs: Vec<PathBuf>,
    },
}

/// The part of a sandbox that a process which is made now shares: its limits and namespaces.
#[must_use = "files are shut by `enter`"]
pub struct Prepared {
    sandbox: Sandbox,
    rules: Option<landlock::Rules>,
}

/// A sandbox of which the last wall is missing.
#[derive(Debug)]
#[must_use = "the system calls are filtered by `close`"]
pub struct Sandbox {
    mode: Mode,
    needs: Needs,
    done: Vec<String>,
    refused: Vec<String>,
    own_processes: bool,
}

impl Prepared {
    /// Whether the next process that is made is the first one of a PID namespace.
    pub fn has_own_processes(&self) -> bool {
        self.sandbox.own_processes
    }

    /// Puts up the walls that are this process' own. To be called by the only thread there is.
    pub fn enter(self) -> Sandbox {
        let Self { mut sandbox, rules } = self;
        let Some(rules) = rules else { return sandbox };
        landlock::apply(&mut sandbox, rules);
        let none = rustix::thread::CapabilitySets {
            effective: rustix::thread::CapabilitySet::empty(),
            permitted: rustix::thread::CapabilitySet::empty(),
            inheritable: rustix::thread::CapabilitySet::empty(),
        };
        let dropped = rustix::thread::set_capabilities(None, none).map_err(io::Error::from);
        sandbox.note("no capabilities", dropped);
        match &sandbox.needs {
            Needs::Nothing => {}
            Needs::Driver { shader_cache, .. } => sys::tell_driver(shader_cache.as_deref()),
            Needs::RenderServer { .. } => sys::tell_driver(None),
        }
        sandbox
    }
}

impl Sandbox {
    /// Puts up the walls a driver can be started within. To be called by the only thread there is:
    /// most of this is inherited by threads and reaches none that exists. `max_memory` is what the
    /// guest's resources may take, in bytes.
    pub fn enter(mode: Mode, needs: Needs, max_memory: u64) -> Self {
        Self::prepare(mode, needs, max_memory).enter()
    }

    /// The first half of [`Sandbox::enter`], for one that makes a process before the other half.
    pub fn prepare(mode: Mode, needs: Needs, max_memory: u64) -> Prepared {
        let mut sandbox =
            Self { mode, needs, done: Vec::new(), refused: Vec::new(), own_processes: false };
        if mode == Mode::Off {
            return Prepared { sandbox, rules: None };
        }
        let privileges = rustix::thread::set_no_new_privs(true).map_err(io::Error::from);
        sandbox.note("no new privileges", privileges);
        limits::apply(&mut sandbox, max_memory);
        // Opened while their paths still lead somewhere.
        let rules = landlock::Rules::new(&sandbox.needs);
        namespaces::enter(&mut sandbox);
        Prepared { sandbox, rules: Some(rules) }
    }

    /// Filters the system calls of all threads; logs and returns what stands.
    pub fn close(mut self) -> Walls {
        let violation = match self.mode {
            Mode::Off => {
                tracing::warn!("no sandbox: --sandbox off");
                return Walls::default();
            }
            Mode::On => Violation::Kill,
            Mode::Log => Violation::Log,
        };
        let filter = seccomp::install(&self.needs, violation).map_err(io::Error::other);
        self.note("system calls", filter);
        let walls = Walls { done: self.done.join(", "), refused: self.refused.join(", ") };
        if walls.refused.is_empty() {
            tracing::info!("sandbox: {walls}");
        } else {
            tracing::warn!("sandbox: {walls}");
        }
        walls
    }

    /// Notes how a layer went.
    fn note(&mut self, what: &str, result: io::Result<()>) {
        match result {
            Ok(()) => self.done.push(what.to_owned()),
            Err(error) => self.refused.push(format!("{what} ({error})")),
        }
    }
}

/// What stands of a sandbox, and what the system refused, in words; empty for none.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Walls {
    /// The layers in force.
    pub done: String,
    /// The others, with their errors.
    pub refused: String,
}

impl fmt::Display for Walls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.done)?;
        if !self.refused.is_empty() {
            write!(f, "; this system refused: {}", self.refused)?;
        }
        Ok(())
    }
}

/// Tries something that the sandbox is there to prevent, for tests: `Ok` says that it was possible.
pub fn attempt(what: &str) -> io::Result<String> {
    let went = |what: &str| Ok(what.to_owned());
    match what {
        "open" => std::fs::File::open("/etc/passwd").and(went("opened /etc/passwd")),
        "create" => std::fs::File::create("/tmp/drago-gpu-self-test").and(went("created a file")),
        "connect" => match std::net::TcpStream::connect("127.0.0.1:1") {
            // Nobody listens there: the network was reached.
            Err(error) if error.kind() != io::ErrorKind::ConnectionRefused => Err(error),
            _ => went("reached the network"),
        },
        "exec" => std::process::Command::new("/bin/true").status().and(went("ran a program")),
        "fork" => sys::fork().and(went("forked")),
        "kill" => rustix::process::test_kill_process(rustix::process::Pid::INIT)
            .map_err(io::Error::from)
            .and(went("signalled another process")),
        "code" => sys::make_code().and(went("made code")),
        "thread" => std::thread::Builder::new()
            .spawn(|| ())
            .and_then(|thread| thread.join().map_err(|_| io::Error::other("panicked")))
            .and(went("started a thread")),
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "unknown attempt")),
    }
}
