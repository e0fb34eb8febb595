//! The SPICE wire protocol without any I/O: bytes in, typed messages out, and back.
//!
//! Layouts follow `spice.proto` of spice-common and the headers of spice-protocol 0.14. All
//! integers are little endian and unaligned. Whatever a peer sends is bounded here before anything
//! is allocated for it.

pub(crate) mod agent;
pub(crate) mod channel;
pub(crate) mod cursor;
pub(crate) mod display;
pub(crate) mod framing;
pub(crate) mod http;
pub(crate) mod image;
pub(crate) mod inputs;
pub(crate) mod link;
pub(crate) mod main;
pub(crate) mod playback;
pub(crate) mod record;
pub(crate) mod sound;
pub(crate) mod ticket;
pub(crate) mod wire;

/// Why bytes from a peer are not a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum DecodeError {
    /// The message ends before its last field.
    #[error("message is too short")]
    Truncated,
    /// The message is longer than its type may be.
    #[error("message of type {kind} has {size} bytes, {limit} are allowed")]
    Oversize { kind: u16, size: u32, limit: u32 },
    /// A field holds a value outside of its range.
    #[error("field {0} is out of range")]
    Value(&'static str),
    /// This message may not come on this channel.
    #[error("message type {0} does not belong on this channel")]
    UnexpectedType(u16),
}
