//! The display: connects the run-time handles of the GPU, input, console and sound devices with the
//! SPICE and VNC servers and the control socket.
//!
//! | module | direction |
//! |---|---|
//! | [`screen`] | frames and pointer images: virtio-gpu → viewers, screenshots |
//! | [`input`] | keys and pointer: viewers → virtio-input |
//! | [`agent`] | clipboard and files: spice-vdagent in the guest ↔ viewers |
//! | [`sound`] | virtio-snd ↔ SPICE viewers |
//! | [`vnc`] | the same for VNC viewers, which see display 0 |
//! | [`clipboard`] | clipboard text: spice-vdagent in the guest ↔ VNC viewers, without `--spice` |
//! | [`spice`], [`options`] | `--spice`, `--web`, `--vnc` |

mod agent;
mod clipboard;
mod counters;
mod input;
mod observer;
mod options;
mod screen;
mod sound;
mod spice;
mod vnc;

use std::{
    any::Any,
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{Arc, Weak},
};

use devices::virtio::{
    console::{ConsoleHandle, VDAGENT_PORT},
    gpu::GpuHandle,
    input::InputHandle,
    snd::SoundHandle,
};
use spice_server::{
    DisplayEvents, Expiry, Leds, MonitorConfig, Secret, ServerBuilder, SpiceServer, TlsConfig,
};
use vnc_server::VncServer;

use crate::control::{ControlError, events::EventHub};
use agent::Port;
use input::Inputs;
use observer::Observer;
pub use options::VncConfig;
use screen::{Screen, Through};
pub use spice::{SpiceConfig, WebConfig};

/// The run-time handles of the devices that have one.
#[derive(Default)]
pub struct Handles {
    /// Option name (`gpu`, `input`, …) and handle, in the order of the devices on the bus.
    pub by_option: Vec<(&'static str, Box<dyn Any + Send>)>,
}

/// What viewers are told about the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// `--name`.
    pub name: String,
    /// `--uuid`.
    pub uuid: Option<[u8; 16]>,
}

/// What the control socket may do with a display.
pub trait DisplayControl: Send + Sync {
    /// `address:port` of the SPICE server, or `unix:path`.
    fn address(&self) -> Option<String>;
    /// `address:port` of the VNC server.
    fn vnc_address(&self) -> Option<String>;
    /// Disconnects SPICE viewers, removes what the server left in the file system.
    fn end(&self);
    /// Connected SPICE viewers.
    fn clients(&self) -> Vec<String>;
    /// What the SPICE server counts, by client.
    fn spice_counters(&self) -> Vec<serde_json::Value>;
    /// Another password for SPICE clients.
    fn set_password(
        &self,
        password: &str,
        expires: Expiry,
        disconnect: bool,
    ) -> Result<(), ControlError>;
    /// Another certificate for SPICE clients with TLS, as PEM.
    fn set_certificate(&self, certificate: &str, key: &str) -> Result<(), ControlError>;
    /// Who came to the SPICE server's door.
    fn spice_totals(&self) -> Option<serde_json::Value>;
    /// Until when it is good.
    fn expire_password(&self, expires: Expiry) -> Result<(), ControlError>;
    /// Connected VNC viewers.
    fn vnc_clients(&self) -> Vec<String>;
    /// A display's picture as a PNG file.
    fn screenshot(&self, display: u32) -> Result<Vec<u8>, ControlError>;
    /// Gives a display another size.
    fn resize(&self, display: u32, width: u32, height: u32) -> Result<(), ControlError>;
    /// Presses and releases Ctrl+Alt+Delete.
    fn ctrl_alt_del(&self) -> Result<(), ControlError>;
}

/// The display could not be started.
#[derive(Debug, thiserror::Error)]
pub enum DisplayError {
    /// The address is not one.
    #[error("--{option} {text}: not an address; expected ADDRESS:PORT, such as 127.0.0.1:5900")]
    Address {
        /// `spice` or `vnc`.
        option: &'static str,
        /// As given.
        text: String,
        /// Why it was not understood.
        #[source]
        source: io::Error,
    },
    /// The password cannot be used.
    #[error("--spice password-file={}: no password can be had from there", path.display())]
    Password {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: spice_server::Error,
    },
    /// There is no page for browsers.
    #[error(
        "--web dir={}: there is no page for browsers; install the package spice-html5, or name \
         the folder it is in with dir=", folder.display()
    )]
    Web {
        /// The folder.
        folder: PathBuf,
        /// Why.
        #[source]
        source: spice_server::Error,
    },
    /// TLS cannot be offered.
    #[error("--spice tls-cert-file=, tls-key-file=: TLS cannot be offered with these files")]
    Certificate {
        /// Why.
        #[source]
        source: spice_server::Error,
    },
    /// What viewers send cannot be kept.
    #[error("--spice capture={}: the file cannot be written", path.display())]
    Capture {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The password cannot be used.
    #[error("--vnc password-file={}: no password can be had from there", path.display())]
    VncPassword {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The server did not start.
    #[error("--vnc {address}: cannot listen there")]
    Vnc {
        /// Where.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The server did not start.
    #[error("--spice: the server cannot be started")]
    Server(#[from] spice_server::Error),
    /// The page's own address cannot be listened on.
    #[error("--web {address}: cannot listen there; is another program using the port?")]
    WebListen {
        /// Where.
        address: SocketAddr,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// A server without anything to show.
    #[error("--{0}: there is no display to serve: the machine has no --gpu")]
    NoGpu(&'static str),
}

/// Where viewers will come in: open already, nothing to see yet.
#[derive(Default)]
pub struct Doors {
    spice: Option<(ServerBuilder, Option<PathBuf>)>,
    vnc: Option<vnc::Door>,
}

impl Doors {
    /// Reads passwords and certificates and listens, before anything is started for the display.
    pub fn open(
        spice: Option<&SpiceConfig>,
        web: Option<&WebConfig>,
        vnc: Option<&VncConfig>,
    ) -> Result<Self, DisplayError> {
        let spice = match spice {
            Some(config) => {
                let mut builder = config.apply(SpiceServer::builder())?.bind()?;
                if let Some(web) = web {
                    builder = web.apply(builder)?.bind().map_err(|error| match error {
                        spice_server::Error::Listen { address, source } => {
                            DisplayError::WebListen { address, source }
                        }
                        other => other.into(),
                    })?;
                }
                Some((builder, config.unix.as_ref().map(|(path, _)| path.clone())))
            }
            None => None,
        };
        Ok(Self { spice, vnc: vnc.map(vnc::Door::open).transpose()? })
    }
}

/// Connects viewers and devices. `None` if the machine has no display.
pub fn start(
    doors: Doors,
    identity: Identity,
    handles: &Handles,
    observers: &Arc<EventHub>,
) -> Result<Option<Arc<dyn DisplayControl>>, DisplayError> {
    let mut inputs = Inputs::default();
    let mut gpu = None;
    let mut agent_port = None;
    let mut card = None;
    for (_, handle) in &handles.by_option {
        if let Some(input) = handle.downcast_ref::<InputHandle>() {
            inputs.add(input);
        } else if let Some(handle) = handle.downcast_ref::<GpuHandle>() {
            gpu = Some(handle.clone());
        } else if let Some(console) = handle.downcast_ref::<ConsoleHandle>() {
            agent_port = agent_port.or_else(|| console.port(VDAGENT_PORT));
        } else if let Some(handle) = handle.downcast_ref::<SoundHandle>() {
            card = Some(handle);
        }
    }
    let Some(gpu) = gpu else {
        return match (doors.spice, doors.vnc) {
            (Some(_), _) => Err(DisplayError::NoGpu("spice")),
            (None, Some(_)) => Err(DisplayError::NoGpu("vnc")),
            (None, None) => Ok(None),
        };
    };
    let screens: Vec<Arc<Screen>> = (0..gpu.scanouts()).map(|id| Screen::new(id, &gpu)).collect();
    inputs.span(&screens);
    let inputs = Arc::new(inputs);
    let (builder, spice_socket) = doors.spice.unzip();
    let spice_socket = spice_socket.flatten();
    let server = match builder {
        None => None,
        Some(builder) => {
            let events = Arc::new(Viewers { screens: screens.clone() });
            let mut builder = builder
                .name(identity.name.clone())
                .observer(Arc::new(Observer(observers.clone())))
                .displays(gpu.scanouts())
                .sound(card.is_some())
                .input(inputs.clone())
                .display_events(events);
            if let Some(uuid) = identity.uuid {
                builder = builder.uuid(uuid);
            }
            if let Some(port) = &agent_port {
                builder = builder.agent(Arc::new(Port(port.clone())));
            }
            Some(Arc::new(builder.start()?))
        }
    };
    if let Some(server) = &server {
        for screen in &screens {
            screen.set_viewer(server.display(screen.id()));
        }
        if let Some(port) = &agent_port {
            agent::connect(port, server.agent());
        }
        if let Some(card) = card {
            sound::connect(card, server);
        }
        if let Some(keyboard) = inputs.keyboard() {
            show_leds(keyboard, Arc::downgrade(server));
        }
        for address in server.local_addrs() {
            tracing::info!(%address, "SPICE server listens");
        }
    }
    if let Some(path) = &spice_socket {
        tracing::info!(path = %path.display(), "SPICE server listens");
    }
    let vnc = match (doors.vnc, screens.first()) {
        (Some(door), Some(screen)) => {
            // SPICE viewers exchange more with the agent, and it knows only one of them at a time.
            let agent = agent_port.filter(|_| server.is_none());
            Some(vnc::start(door, identity.name, screen, &inputs, agent)?)
        }
        _ => None,
    };
    gpu.set_sink(Arc::new(screen::Sink::new(screens.clone(), server.as_ref())));
    Ok(Some(Arc::new(Display { server, spice_socket, vnc, screens, inputs })))
}

fn show_leds(keyboard: &InputHandle, server: Weak<SpiceServer>) {
    keyboard.on_led(move |leds| {
        if let Some(server) = server.upgrade() {
            server.set_leds(Leds {
                scroll_lock: leds.scroll_lock,
                num_lock: leds.num_lock,
                caps_lock: leds.caps_lock,
            });
        }
    });
}

/// Hears what viewers want.
struct Viewers {
    screens: Vec<Arc<Screen>>,
}

impl DisplayEvents for Viewers {
    fn viewers_changed(&self, any: bool) {
        for screen in &self.screens {
            screen.set_watched(Through::Spice, any);
        }
    }

    fn resize_requested(&self, id: u32, monitor: MonitorConfig) {
        match self.screens.get(id as usize) {
            Some(screen) => {
                screen.resize(monitor);
            }
            None => {
                tracing::debug!(id, "a viewer asked for a display that is not there");
            }
        }
    }
}

/// Everything that makes a running display.
struct Display {
    server: Option<Arc<SpiceServer>>,
    spice_socket: Option<PathBuf>,
    vnc: Option<Arc<VncServer>>,
    screens: Vec<Arc<Screen>>,
    inputs: Arc<Inputs>,
}

impl Display {
    fn screen(&self, display: u32) -> Result<&Screen, ControlError> {
        self.screens.get(display as usize).map(Arc::as_ref).ok_or_else(|| {
            let last = self.screens.len().saturating_sub(1);
            ControlError(format!("there is no display {display}; the last one is {last}"))
        })
    }
}

impl Display {
    fn spice(&self) -> Result<&SpiceServer, ControlError> {
        let none =
            || ControlError("this machine has no SPICE server; start it with --spice".into());
        self.server.as_deref().ok_or_else(none)
    }
}

impl DisplayControl for Display {
    fn address(&self) -> Option<String> {
        match self.server.as_ref()?.local_addr() {
            Some(address) => Some(address.to_string()),
            None => self.spice_socket.as_ref().map(|path| format!("unix:{}", path.display())),
        }
    }

    fn end(&self) {
        if let Some(server) = &self.server {
            server.stop();
        }
    }

    fn clients(&self) -> Vec<String> {
        let Some(server) = &self.server else { return Vec::new() };
        server.status().clients.iter().map(|client| client.peer.to_string()).collect()
    }

    fn spice_counters(&self) -> Vec<serde_json::Value> {
        let Some(server) = &self.server else { return Vec::new() };
        server.status().clients.iter().map(counters::client).collect()
    }

    fn set_password(
        &self,
        password: &str,
        expires: Expiry,
        disconnect: bool,
    ) -> Result<(), ControlError> {
        let server = self.spice()?;
        let secret = Secret::new(password).map_err(|error| ControlError(error.to_string()))?;
        server.set_password(secret, expires);
        if disconnect {
            server.disconnect();
        }
        Ok(())
    }

    fn set_certificate(&self, certificate: &str, key: &str) -> Result<(), ControlError> {
        let server = self.spice()?;
        let certificate = (Path::new("certificate"), certificate.as_bytes());
        match TlsConfig::from_pem(certificate, (Path::new("key"), key.as_bytes())) {
            Ok(tls) => {
                server.set_tls(&tls);
                Ok(())
            }
            Err(error) => {
                let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}"));
                Err(ControlError(format!("{error}{}", cause.unwrap_or_default())))
            }
        }
    }

    fn spice_totals(&self) -> Option<serde_json::Value> {
        self.server.as_ref().map(|server| counters::totals(&server.status()))
    }

    fn expire_password(&self, expires: Expiry) -> Result<(), ControlError> {
        self.spice()?.expire_password(expires);
        Ok(())
    }

    fn vnc_address(&self) -> Option<String> {
        let address = self.vnc.as_ref()?.local_addr().ok()?;
        Some(address.to_string())
    }

    fn vnc_clients(&self) -> Vec<String> {
        let viewers = self.vnc.as_deref().map(VncServer::viewers).unwrap_or_default();
        viewers.iter().map(SocketAddr::to_string).collect()
    }

    fn screenshot(&self, display: u32) -> Result<Vec<u8>, ControlError> {
        self.screen(display)?.screenshot()
    }

    fn resize(&self, display: u32, width: u32, height: u32) -> Result<(), ControlError> {
        const SIDES: std::ops::RangeInclusive<u32> = 64..=16384;
        if !SIDES.contains(&width) || !SIDES.contains(&height) {
            let message = format!("{width}x{height}: both sides must be 64 to 16384 pixels");
            return Err(ControlError(message));
        }
        let monitor = MonitorConfig { width, height, x: 0, y: 0, width_mm: 0, height_mm: 0 };
        self.screen(display)?.resize(monitor);
        Ok(())
    }

    fn ctrl_alt_del(&self) -> Result<(), ControlError> {
        if self.inputs.keyboard().is_none() {
            return Err(ControlError("this machine has no keyboard; add --input keyboard".into()));
        }
        if self.inputs.ctrl_alt_del() {
            Ok(())
        } else {
            Err(ControlError("the guest has no driver for its keyboard yet".into()))
        }
    }
}
