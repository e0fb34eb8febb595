//! What a client does with keyboard and mouse, as a program wants to hear it.
//!
//! Scan codes are AT set 1, the code set SPICE uses on the wire (spice.proto, inputs channel).

/// Receives keyboard and pointer events.
///
/// Methods are called from the server's I/O thread: hand the event on and return. A server that
/// loses a client releases everything that client still held, so every press is followed by a
/// release.
pub trait InputSink: Send + Sync {
    /// A key went down or up.
    fn key(&self, event: KeyEvent);

    /// The pointer is at this place of a display (client mouse mode).
    fn pointer_absolute(&self, position: PointerPosition);

    /// The pointer moved by this many pixels (server mouse mode; y grows downwards).
    fn pointer_relative(&self, dx: i32, dy: i32);

    /// A mouse button went down or up.
    fn button(&self, button: Button, down: bool);

    /// The wheel moved by `steps` notches; positive is away from the user (up).
    fn wheel(&self, steps: i32);
}

/// One key going down or up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct KeyEvent {
    /// Which key.
    pub scancode: Scancode,
    /// `true` for make, `false` for break.
    pub down: bool,
    /// A make for a key that was down already: the client's own key repeat. Programs whose guest
    /// repeats keys itself ignore these.
    pub repeat: bool,
}

/// An AT set 1 scan code without its break bit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Scancode {
    /// Code without the break bit, `0x01..=0x7f`.
    pub code: u8,
    /// The prefix byte in front of it.
    pub prefix: ScancodePrefix,
}

impl Scancode {
    /// A key without prefix, such as `0x1e` for the A key.
    pub const fn plain(code: u8) -> Self {
        Self { code, prefix: ScancodePrefix::None }
    }

    /// A key with an `0xe0` prefix, such as `0x4d` for cursor right.
    pub const fn extended(code: u8) -> Self {
        Self { code, prefix: ScancodePrefix::E0 }
    }

    /// The Pause key, the only one that sends `e1 1d 45`.
    pub const PAUSE: Self = Self { code: 0x45, prefix: ScancodePrefix::E1 };
}

/// Prefix of a scan code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ScancodePrefix {
    /// No prefix.
    None,
    /// `0xe0`: the keys an AT keyboard got later (arrows, right control and so on).
    E0,
    /// `0xe1`: Pause.
    E1,
}

/// A place on a display.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PointerPosition {
    /// Display number.
    pub display: u32,
    /// Pixels from the left edge, less than `surface_width`.
    pub x: u32,
    /// Pixels from the top edge, less than `surface_height`.
    pub y: u32,
    /// Width in pixels of the picture the client points at, at least 1.
    pub surface_width: u32,
    /// Height in pixels of the picture the client points at, at least 1.
    pub surface_height: u32,
}

/// Mouse buttons. The wheel is reported by [`InputSink::wheel`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Button {
    /// Primary button.
    Left,
    /// Wheel button.
    Middle,
    /// Secondary button.
    Right,
    /// First thumb button ("back").
    Side,
    /// Second thumb button ("forward").
    Extra,
}

/// Keyboard lights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Leds {
    /// Scroll lock.
    pub scroll_lock: bool,
    /// Num lock.
    pub num_lock: bool,
    /// Caps lock.
    pub caps_lock: bool,
}

/// Who draws the pointer (spice.proto, `mouse_mode`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MouseMode {
    /// The client grabs the pointer and sends relative movement.
    Server,
    /// The client sends absolute positions and draws the pointer itself.
    Client,
}
