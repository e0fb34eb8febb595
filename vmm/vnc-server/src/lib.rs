//! A VNC server for any program that has a picture to show.
//!
//! ```text
//!  program ── Screen: frames, pointer ──▶ [screen] ── damage ──▶ [viewer] ──▶ vnc-writer thread
//!                                                                   ▲          [painter] [encode]
//!  program ◀── Events: keys, pointer ─── [server] vnc-client thread ┘                │
//!                                          [proto] ◀── client ◀──────────────────────┘
//! ```
//!
//! | module | what it does |
//! |---|---|
//! | [`proto`] | bytes to messages and back, without sockets |
//! | [`screen`] | the newest frame and the pointer's picture |
//! | `viewer` | what one client waits for |
//! | `painter` | compares the frame with what the client has, makes updates |
//! | `encode` | raw, ZRLE, Tight |
//! | `gate` | limits on strangers and wrong passwords |
//! | [`server`] | sockets and threads |
//!
//! Each viewer gets the newest frame at its own pace; a slow one costs nobody else anything. Tiles that
//! did not change are not sent, whatever the damage says, and what was sent as JPEG is sent again as it
//! is when it comes to rest.

mod encode;
mod gate;
mod geometry;
mod keysym;
mod painter;
pub mod proto;
pub mod screen;
pub mod server;
mod tiles;
mod viewer;

pub use geometry::Rect;
pub use keysym::Scancode;
pub use screen::{Cursor, Frame, FrameGone, FrameSource, Screen};
pub use server::{Button, Config, Events, VncServer, listen};
