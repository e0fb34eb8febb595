//! A SPICE server for any program that has a picture to show.

mod agent;
mod display;
mod error;
#[doc(hidden)]
pub mod fuzz;
mod input;
mod io;
mod proto;
mod secret;
mod server;

pub use agent::AgentPort;
pub use display::{
    CursorImage, DisplayEvents, DisplayHandle, Frame, MemoryFrame, MonitorConfig, PixelFormat,
    Rect, Snapshot, SurfaceInfo,
};
pub use error::Error;
pub use input::{
    Button, InputSink, KeyEvent, Leds, MouseMode, PointerPosition, Scancode, ScancodePrefix,
};
pub use secret::{MAX_PASSWORD, Secret};
pub use server::{
    AgentHandle, ClientPolicy, ClientStatus, ServerBuilder, ServerStatus, SpiceServer,
};
