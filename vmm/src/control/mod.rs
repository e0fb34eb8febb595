//! The control socket: JSON lines over a Unix stream socket, described in
//! `docs/control-protocol.md`.
//!
//! | module | what it holds |
//! |---|---|
//! | this one | the messages, shared by both sides |
//! | [`server`] | the VMM's side, over the [`ControlTarget`] trait |
//! | [`client`] | `drago-vmm ctl` |
//! | [`events`] | what `ctl events` hears |

pub mod client;
pub mod events;
pub mod server;

use std::{
    fmt,
    path::PathBuf,
    time::{Duration, SystemTime},
};

use events::Subscription;
use serde::{Deserialize, Serialize};
use spice_server::Expiry;

/// Version of the protocol, in the greeting. It grows when a client has to know about a change.
pub const PROTOCOL_VERSION: u32 = 1;

/// Longest line either side accepts, in bytes.
pub const MAX_LINE: usize = 16 * 1024;

/// The first line the server sends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Greeting {
    /// Always `drago-vmm`.
    pub server: String,
    /// Version of the program.
    pub version: String,
    /// [`PROTOCOL_VERSION`] of the server.
    pub protocol: u32,
}

/// One line from the client. (Variants without fields have braces because serde refuses unknown
/// fields only in those.)
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// What is running.
    Status {},
    /// Press the power button, again every few seconds until the machine is off.
    Shutdown {},
    /// Press Ctrl+Alt+Delete.
    CtrlAltDel {},
    /// Take a picture of a display.
    Screenshot {
        /// Display number, 0 if left out.
        #[serde(default)]
        display: u32,
    },
    /// Give a display another size.
    Resize {
        /// Display number, 0 if left out.
        #[serde(default)]
        display: u32,
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
    },
    /// Take memory from the guest, or give it back.
    Balloon {
        /// What the guest is to do without, in MiB; left out: only tell.
        #[serde(default)]
        mib: Option<u32>,
    },
    /// What the SPICE server counts, by client.
    SpiceClients {},
    /// Another password for SPICE clients.
    SetPassword {
        /// 1 to 60 bytes.
        password: Password,
        /// Until when it is good, see [`expiry`].
        #[serde(default, skip_serializing_if = "Option::is_none")]
        expires: Option<String>,
        /// Whether clients that are connected have to go.
        #[serde(default)]
        disconnect: bool,
    },
    /// Until when the password for SPICE clients is good.
    ExpirePassword {
        /// See [`expiry`].
        expires: String,
    },
    /// Another certificate for SPICE clients with TLS.
    SetCertificate {
        /// The chain, as PEM.
        certificate: String,
        /// Its key, as PEM.
        key: Password,
    },
    /// From now on the connection carries events, one a line.
    Events {},
    /// End the virtual machine at once (disks are flushed).
    Quit {},
}

/// A secret on its way; not shown by `Debug`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Password(pub String);

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Password(..)")
    }
}

/// Until when a password is good, as QEMU's `expire_password` has it: `never`, `now`, `+SECONDS` from
/// now, or seconds since 1970.
pub fn expiry(text: &str) -> Result<Expiry, ControlError> {
    let wrong = || {
        let known = "never, now, +SECONDS, or seconds since 1970";
        ControlError(format!("expires={text}: expected {known}"))
    };
    let seconds = |text: &str| text.parse().map(Duration::from_secs).map_err(|_| wrong());
    let moment = match (text, text.strip_prefix('+')) {
        ("never", _) => return Ok(Expiry::Never),
        ("now", _) => return Ok(Expiry::Now),
        (_, Some(after)) => SystemTime::now().checked_add(seconds(after)?),
        (_, None) => SystemTime::UNIX_EPOCH.checked_add(seconds(text)?),
    };
    moment.map(Expiry::At).ok_or_else(wrong)
}

/// One line from the server, the answer to one request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Response {
    /// Done; nothing more to say.
    Done {},
    /// Answer to [`Request::Status`].
    Status(Status),
    /// Answer to [`Request::Screenshot`]: after this line follow `bytes` bytes of a PNG file.
    Screenshot {
        /// Length of the file.
        bytes: usize,
    },
    /// Answer to [`Request::Balloon`].
    Balloon {
        /// What the guest does without now, in MiB.
        mib: u32,
    },
    /// Answer to [`Request::SpiceClients`].
    SpiceClients {
        /// One object per client; fields may be added.
        clients: Vec<serde_json::Value>,
    },
    /// The request failed.
    Error {
        /// Why, and what would help.
        message: String,
    },
}

/// What is running.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Status {
    /// `--name`.
    pub name: String,
    /// Process id of the VMM.
    pub pid: u32,
    /// Seconds since the start of the VMM.
    pub uptime_seconds: u64,
    /// Number of virtual CPUs.
    pub cpus: u32,
    /// What each of them is doing, for people.
    #[serde(default)]
    pub processors: Vec<String>,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// `host:port` of the SPICE server, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spice: Option<String>,
    /// Connected SPICE clients.
    #[serde(default)]
    pub spice_clients: Vec<String>,
    /// Who came to the SPICE server's door since the start; members may be added.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spice_totals: Option<serde_json::Value>,
    /// `host:port` of the VNC server, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vnc: Option<String>,
    /// Connected VNC clients.
    #[serde(default)]
    pub vnc_clients: Vec<String>,
}

/// A request that could not be carried out; the text goes to the client as it is.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0}")]
pub struct ControlError(pub String);

/// What the server acts on.
pub trait ControlTarget: Send + Sync {
    /// Answers [`Request::Status`].
    fn status(&self) -> Status;
    /// Presses the ACPI power button once.
    fn power_button(&self);
    /// Ends the machine.
    fn quit(&self);
    /// Presses and releases Ctrl+Alt+Delete.
    fn ctrl_alt_del(&self) -> Result<(), ControlError>;
    /// A display's picture as a PNG file.
    fn screenshot(&self, display: u32) -> Result<Vec<u8>, ControlError>;
    /// Gives a display another size.
    fn resize(&self, display: u32, width: u32, height: u32) -> Result<(), ControlError>;
    /// Answers [`Request::SpiceClients`].
    fn spice_clients(&self) -> Vec<serde_json::Value>;
    /// Answers [`Request::SetPassword`].
    fn set_password(
        &self,
        password: &str,
        expires: Expiry,
        disconnect: bool,
    ) -> Result<(), ControlError>;
    /// Answers [`Request::SetCertificate`].
    fn set_certificate(&self, certificate: &str, key: &str) -> Result<(), ControlError>;
    /// Answers [`Request::ExpirePassword`].
    fn expire_password(&self, expires: Expiry) -> Result<(), ControlError>;
    /// Answers [`Request::Events`].
    fn events(&self) -> Subscription;
    /// Answers [`Request::Balloon`].
    fn balloon(&self, mib: Option<u32>) -> Result<u32, ControlError>;
}

/// A control socket could not be used.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The server's socket could not be made.
    #[error("--control {}: the socket could not be made", path.display())]
    Bind {
        /// The socket.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// The file system cannot hold sockets.
    #[error(
        "--control {}: the file system there holds no sockets (9p, FAT and some others do not); \
         choose a path on another one, for example /run/drago-vmm.sock",
        path.display()
    )]
    NoSocketsThere {
        /// The socket.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// Somebody else answers on that socket.
    #[error("--control {}: another process is listening there", path.display())]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// Something that is not a socket is in the way.
    #[error("--control {}: the file exists and is not a socket; it was left alone", path.display())]
    NotASocket {
        /// The file.
        path: PathBuf,
    },
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "name     {}", self.name)?;
        writeln!(f, "pid      {}", self.pid)?;
        writeln!(f, "uptime   {} s", self.uptime_seconds)?;
        writeln!(f, "cpus     {}", self.cpus)?;
        for (id, doing) in self.processors.iter().enumerate() {
            writeln!(f, "cpu {id:<4} {doing}")?;
        }
        write!(f, "memory   {} MiB", self.memory_mib)?;
        let servers =
            [("spice", &self.spice, &self.spice_clients), ("vnc", &self.vnc, &self.vnc_clients)];
        for (name, address, clients) in servers {
            let Some(address) = address else { continue };
            write!(f, "\n{name:<8} {address}")?;
            for client in clients {
                write!(f, "\nviewer   {client}")?;
            }
        }
        Ok(())
    }
}
