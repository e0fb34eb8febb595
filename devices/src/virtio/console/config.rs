//! The `--console` option.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{
    CONSOLE_PORT, GUEST_AGENT_PORT, VDAGENT_PORT,
    device::Console,
    port::{ConsoleHandle, Port, PortHandle, PortListener},
    protocol::ConsoleSize,
    socket::SocketServer,
};
use crate::{
    spec::{Spec, SpecError},
    virtio::registry::{BuildError, BuiltDevice, DeviceConfig},
};

const OPTION: &str = "console";
/// Named ports at most: two queues and interrupt vectors each.
const MAX_PORTS: usize = 30;
/// Longest port name; udev makes it a file name.
const MAX_NAME: usize = 127;

/// Where a port's host end is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PortBackend {
    /// A [`PortListener`] may be set at run time.
    Handle,
    /// What the guest writes is appended to a file.
    File(PathBuf),
    /// A listening Unix socket.
    Socket(PathBuf),
}

/// A named port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortConfig {
    /// The name the guest sees.
    pub name: String,
    /// Its host end.
    pub backend: PortBackend,
}

/// A parsed `--console` option.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConsoleConfig {
    /// Where port 0 leads; `Handle` keeps it out of the guest until somebody listens.
    pub console: PortBackend,
    /// Whether the guest sees port 0 although nobody listens.
    pub console_on: bool,
    /// Size of the terminal behind port 0.
    pub size: Option<ConsoleSize>,
    /// Ports 1 and up.
    pub ports: Vec<PortConfig>,
}

impl Default for ConsoleConfig {
    /// No console in the guest, and the SPICE agent's port.
    fn default() -> Self {
        let vdagent = PortConfig { name: VDAGENT_PORT.to_owned(), backend: PortBackend::Handle };
        Self { console: PortBackend::Handle, console_on: false, size: None, ports: vec![vdagent] }
    }
}

impl ConsoleConfig {
    /// Parses `[hvc0=off|on|FILE|socket=PATH][,size=COLSxROWS][,vdagent=on|off][,qga=PATH]
    /// [,port=NAME[:socket=PATH]…]`.
    pub fn parse(mut spec: Spec) -> Result<Box<dyn DeviceConfig>, SpecError> {
        let mut config = Self { ports: Vec::new(), ..Self::default() };
        match spec.take("hvc0")?.as_deref() {
            None | Some("off") => {}
            Some("on") => config.console_on = true,
            Some("") => return Err(spec.invalid("hvc0", "", "expected off, on or a path")),
            Some(value) => {
                config.console = match value.strip_prefix("socket=") {
                    Some(path) => PortBackend::Socket(path.into()),
                    None => PortBackend::File(value.into()),
                }
            }
        }
        if let Some(text) = spec.take("size")? {
            let size = text.split_once('x').and_then(|(columns, rows)| {
                Some(ConsoleSize { columns: columns.parse().ok()?, rows: rows.parse().ok()? })
            });
            match size {
                Some(size) => config.size = Some(size),
                None => return Err(spec.invalid("size", &text, "expected COLUMNSxROWS")),
            }
        }
        if spec.take_switch("vdagent")?.unwrap_or(true) {
            config.add(&spec, "vdagent", VDAGENT_PORT, PortBackend::Handle)?;
        }
        if let Some(path) = spec.take_path("qga")? {
            config.add(&spec, "qga", GUEST_AGENT_PORT, PortBackend::Socket(path))?;
        }
        for text in spec.take_all("port")? {
            let (name, backend) = match text.split_once(":socket=") {
                None => (text.as_str(), PortBackend::Handle),
                Some((_, "")) => return Err(spec.invalid("port", &text, "the path is empty")),
                Some((name, path)) => (name, PortBackend::Socket(path.into())),
            };
            config.add(&spec, "port", name, backend)?;
        }
        spec.finish()?;
        Ok(Box::new(config))
    }

    fn add(
        &mut self,
        spec: &Spec,
        key: &str,
        name: &str,
        backend: PortBackend,
    ) -> Result<(), SpecError> {
        let printable = name.bytes().all(|byte| byte.is_ascii_graphic() && !b"/:".contains(&byte));
        if name.is_empty() || name.len() > MAX_NAME || !printable {
            let reason = "a port's name has 1 to 127 ASCII characters without '/', ':' and spaces";
            return Err(spec.invalid(key, name, reason));
        }
        if name == CONSOLE_PORT || self.ports.iter().any(|port| port.name == name) {
            return Err(spec.invalid(key, name, "there is a port with this name already"));
        }
        if self.ports.len() == MAX_PORTS {
            return Err(spec.invalid(key, name, format_args!("more than {MAX_PORTS} ports")));
        }
        self.ports.push(PortConfig { name: name.to_owned(), backend });
        Ok(())
    }

    /// A console for the conformance test.
    pub(super) fn sample() -> Result<BuiltDevice, BuildError> {
        let size = Some(ConsoleSize { columns: 80, rows: 25 });
        Box::new(Self { console_on: true, size, ..Self::default() }).build()
    }

    /// Builds the device together with its handle.
    pub(super) fn open(self) -> Result<(Console, ConsoleHandle), BuildError> {
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
            .map_err(|source| host("no eventfd can be made".to_owned(), source))?;
        let wake = Arc::new(wake);
        let console = PortConfig { name: CONSOLE_PORT.to_owned(), backend: self.console };
        let mut ports = Vec::new();
        let mut sockets = Vec::new();
        for (id, config) in std::iter::once(console).chain(self.ports).enumerate() {
            let port = Port::new(id as u32, config.name, wake.clone());
            let handle = PortHandle(port.clone());
            match config.backend {
                PortBackend::Handle => {}
                PortBackend::File(path) => {
                    let file = OpenOptions::new().create(true).append(true).open(&path);
                    let file = file.map_err(|source| {
                        host(format!("'{}' cannot be opened for writing", path.display()), source)
                    })?;
                    handle.set_listener(Arc::new(FileSink { file: Mutex::new(Some(file)) }));
                }
                PortBackend::Socket(path) => {
                    let server = SocketServer::start(handle, &path).map_err(|source| {
                        host(format!("'{}' cannot be listened on", path.display()), source)
                    })?;
                    sockets.push(server);
                }
            }
            ports.push(port);
        }
        if self.console_on {
            PortHandle(ports[0].clone()).set_listener(Arc::new(Nobody));
        }
        let ports: Arc<[_]> = ports.into();
        let size = Arc::new(Mutex::new(self.size));
        let handle = ConsoleHandle { ports: ports.clone(), size: size.clone() };
        Ok((Console::new(ports, wake, size, sockets), handle))
    }
}

impl DeviceConfig for ConsoleConfig {
    fn build(self: Box<Self>) -> Result<BuiltDevice, BuildError> {
        let (device, handle) = self.open()?;
        Ok(BuiltDevice { device: Box::new(device), handle: Some(Box::new(handle)) })
    }
}

fn host(what: String, source: io::Error) -> BuildError {
    BuildError::Host { option: OPTION, what, source }
}

/// Takes everything and keeps nothing.
struct Nobody;

impl PortListener for Nobody {
    fn data(&self, bytes: &[u8]) -> usize {
        bytes.len()
    }
}

/// Appends guest output to a file until that fails.
struct FileSink {
    file: Mutex<Option<File>>,
}

impl PortListener for FileSink {
    fn data(&self, bytes: &[u8]) -> usize {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Err(error)) = file.as_mut().map(|file| file.write_all(bytes)) {
            // The guest must not stand still because a disk of the host is full.
            tracing::warn!(%error, "guest output is lost: the console's file cannot be written");
            *file = None;
        }
        bytes.len()
    }
}
