//! Displays: frames in, damage per viewer, cursor.

pub(crate) mod cursor;
pub(crate) mod damage;
pub(crate) mod events;
pub(crate) mod frame;
pub(crate) mod geometry;
pub(crate) mod handle;
pub(crate) mod resize;
pub(crate) mod state;

pub use cursor::CursorImage;
pub use events::{DisplayEvents, MonitorConfig};
pub use frame::{Frame, MemoryFrame, PixelFormat, Snapshot, SurfaceInfo};
pub use geometry::Rect;
pub use handle::DisplayHandle;
