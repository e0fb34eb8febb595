//! VNC viewers: frames to them, keys and pointer from them.

use std::{
    net::{SocketAddr, TcpListener},
    sync::Arc,
};

use devices::virtio::{console::PortHandle, gpu};
use spice_server::{
    Clipboard, InputSink, KeyEvent, MonitorConfig, PointerPosition, ScancodePrefix,
};
use vnc_server::{Button, Config, Events, Frame, FrameGone, Rect, Scancode, VncServer};

use super::{
    DisplayError,
    clipboard::GuestClipboard,
    input::Inputs,
    options::VncConfig,
    screen::{Screen, Through},
};

/// Where VNC viewers come in.
pub(super) struct Door {
    address: SocketAddr,
    listener: TcpListener,
    password: Option<Vec<u8>>,
    copy_paste: Clipboard,
}

impl Door {
    pub(super) fn open(config: &VncConfig) -> Result<Self, DisplayError> {
        let address = config.address()?;
        let password = config.password()?;
        let listener =
            vnc_server::listen(address).map_err(|source| DisplayError::Vnc { address, source })?;
        Ok(Self { address, listener, password, copy_paste: config.copy_paste })
    }
}

/// Serves a screen.
pub(super) fn start(
    door: Door,
    name: String,
    screen: &Arc<Screen>,
    inputs: &Arc<Inputs>,
    agent: Option<PortHandle>,
) -> Result<Arc<VncServer>, DisplayError> {
    let Door { address, listener, password, copy_paste } = door;
    if password.is_none() && !address.ip().is_loopback() {
        tracing::warn!(%address, "--vnc without password-file: anybody who reaches it may connect");
    }
    let clipboard = agent
        .filter(|_| copy_paste != Clipboard::Off)
        .map(|port| GuestClipboard::new(port, copy_paste));
    let viewers =
        Viewers { screen: screen.clone(), inputs: inputs.clone(), clipboard: clipboard.clone() };
    let server = VncServer::start(listener, Config { name, password }, Arc::new(viewers))
        .map_err(|source| DisplayError::Vnc { address, source })?;
    let server = Arc::new(server);
    if let Some(clipboard) = clipboard {
        clipboard.connect(&server);
    }
    screen.set_vnc(server.screen());
    tracing::info!(address = %server.local_addr().unwrap_or(address), "VNC server listens");
    Ok(server)
}

struct Viewers {
    screen: Arc<Screen>,
    inputs: Arc<Inputs>,
    clipboard: Option<Arc<GuestClipboard>>,
}

impl Events for Viewers {
    fn key(&self, key: Scancode, down: bool) {
        let prefix = if key.extended { ScancodePrefix::E0 } else { ScancodePrefix::None };
        let scancode = spice_server::Scancode { prefix, code: key.code };
        self.inputs.key(KeyEvent { scancode, down, repeat: false });
    }

    fn pointer(&self, (x, y): (u32, u32), (width, height): (u32, u32)) {
        self.inputs.pointer_absolute(PointerPosition {
            x,
            y,
            surface_width: width,
            surface_height: height,
            display: 0,
        });
    }

    fn button(&self, button: Button, down: bool) {
        let button = match button {
            Button::Left => spice_server::Button::Left,
            Button::Middle => spice_server::Button::Middle,
            Button::Right => spice_server::Button::Right,
        };
        self.inputs.button(button, down);
    }

    fn wheel(&self, steps: i32) {
        self.inputs.wheel(steps);
    }

    fn resize(&self, width: u32, height: u32) -> bool {
        self.screen.resize(MonitorConfig { width, height, x: 0, y: 0, width_mm: 0, height_mm: 0 })
    }

    fn copied(&self, text: &str) {
        if let Some(clipboard) = &self.clipboard {
            clipboard.copy(text);
        }
    }

    fn watched(&self, any: bool) {
        self.screen.set_watched(Through::Vnc, any);
    }
}

/// Shows a frame of the GPU.
pub(super) fn present(screen: &vnc_server::Screen, frame: gpu::Frame, damage: &[gpu::Rect]) {
    let damage: Vec<Rect> = damage.iter().map(|r| Rect::new(r.x, r.y, r.width, r.height)).collect();
    screen.present(Arc::new(Picture(frame)), &damage);
}

/// Dropping the last copy frees the GPU's slot.
struct Picture(gpu::Frame);

impl Frame for Picture {
    fn width(&self) -> u32 {
        self.0.width()
    }

    fn height(&self) -> u32 {
        self.0.height()
    }

    fn copy_rect(&self, rect: Rect, out: &mut [u8], stride: usize) -> Result<(), FrameGone> {
        let rect = gpu::Rect { x: rect.x, y: rect.y, width: rect.width, height: rect.height };
        self.0.copy_rect(rect, out, stride).map_err(|error| {
            if error == gpu::CopyError::OutOfFrame {
                tracing::error!(?rect, "the VNC server asked for pixels that do not exist");
            }
            FrameGone
        })
    }
}
