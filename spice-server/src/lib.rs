//! A SPICE server for any program that has a picture to show.
//!
//! The server shows frames and plays sound to clients such as remote-viewer and hands their keyboard,
//! pointer, microphone, resize requests and guest agent data to the program. It knows nothing of
//! virtual machines. How it works and what its limits are is told in `docs/spice.md`.
//!
//! ```no_run
//! use std::sync::Arc;
//! use spice_server::{MemoryFrame, Rect, SpiceServer};
//!
//! let server = SpiceServer::builder()
//!     .name("hello")
//!     .listen("127.0.0.1:5930".parse()?)
//!     .start()?;
//! let display = server.display(0).ok_or("no display")?;
//! let grey = MemoryFrame::new(640, 480, vec![0x80; 640 * 480 * 4]).ok_or("wrong size")?;
//! display.present(Arc::new(grey), &[Rect::new(0, 0, 640, 480)]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

// For the pictures of the examples, which are in tests, too.
#[cfg(test)]
extern crate self as spice_server;

mod agent;
mod audio;
mod capture;
mod display;
mod error;
mod events;
#[doc(hidden)]
pub mod fuzz;
mod input;
mod io;
mod proto;
mod secret;
mod server;
mod tls;
mod video;
mod web;

pub use agent::{AgentPolicy, AgentPort, AgentText, Clipboard};
pub use audio::{PlaybackHandle, RecordHandle};
pub use capture::{Capture, CaptureError, CaptureEvent, CaptureRecord, read_capture};
pub use display::{
    Codec, CodecStats, CursorImage, DisplayEvents, DisplayHandle, DisplayStats, Frame, FrameGone,
    FrameSource, MemoryFrame, MonitorConfig, PixelFormat, Rect, Snapshot, SurfaceInfo,
};
pub use error::Error;
pub use events::{EventSink, Refusal, ServerEvent, VideoChange};
pub use input::{
    Button, InputSink, KeyEvent, Leds, MouseMode, PointerPosition, Scancode, ScancodePrefix,
};
pub use io::{
    stream::Peer,
    sys::{ask_for_short_turns, give_free_memory_back},
};
pub use secret::{MAX_PASSWORD, Secret};
pub use server::{
    AgentHandle, ChannelStatus, ClientPolicy, ClientStatus, Expiry, ServerBuilder, ServerStatus,
    Severity, SpiceServer,
};
pub use tls::{SecureChannels, TlsConfig};
pub use video::{UnknownVideoCodec, VideoCodec, VideoCodecs, VideoError};
pub use web::WebPage;
