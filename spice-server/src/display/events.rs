//! What viewers want from the program's displays.

/// Receives what viewers want. Called from the server's threads; must not block.
pub trait DisplayEvents: Send + Sync {
    /// The first viewer came (`true`) or the last one went (`false`): without viewers nobody needs
    /// frames.
    fn viewers_changed(&self, any: bool) {
        let _ = any;
    }

    /// A viewer asks for another size of a display. Requests arrive debounced, the width a
    /// multiple of 8 and both sides within the limits given to the builder. The program answers,
    /// if it agrees, with frames of that size.
    fn resize_requested(&self, display: u32, monitor: MonitorConfig) {
        let _ = (display, monitor);
    }
}

/// The monitor a viewer would like to have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MonitorConfig {
    /// Width in pixels, a multiple of 8.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
    /// Horizontal position in the viewer's layout.
    pub x: i32,
    /// Vertical position in the viewer's layout.
    pub y: i32,
    /// Width in millimetres; 0 if the viewer does not know.
    pub width_mm: u16,
    /// Height in millimetres; 0 if the viewer does not know.
    pub height_mm: u16,
}
