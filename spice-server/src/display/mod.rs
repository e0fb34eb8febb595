//! Displays: frames in, damage per viewer, messages out; the pointer.

pub(crate) mod cache;
pub(crate) mod cursor;
pub(crate) mod damage;
pub(crate) mod encoder;
pub(crate) mod events;
pub(crate) mod frame;
pub(crate) mod geometry;
pub(crate) mod handle;
pub(crate) mod heat;
pub(crate) mod motion;
pub(crate) mod resize;
pub(crate) mod state;
pub(crate) mod stats;
pub(crate) mod stream;
pub(crate) mod tiles;

pub use cursor::CursorImage;
pub use events::{DisplayEvents, MonitorConfig};
pub use frame::{Frame, FrameGone, FrameSource, MemoryFrame, PixelFormat, Snapshot, SurfaceInfo};
pub use geometry::Rect;
pub use handle::DisplayHandle;
pub use stats::{Codec, CodecStats, DisplayStats};
