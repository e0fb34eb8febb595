//! The RFB protocol without sockets: bytes in, messages out, and the other way round.
//!
//! RFC 6143, and for its extensions the "RFB Protocol" document of the rfbproto project.

pub mod auth;
pub mod clipboard;
pub mod handshake;
pub mod message;
pub mod pixel;
pub mod update;

/// Numbers of encodings and pseudo-encodings.
pub mod encoding {
    /// Pixels as they are.
    pub const RAW: i32 = 0;
    /// Tiles, palettes and one JPEG or zlib stream per kind of content.
    pub const TIGHT: i32 = 7;
    /// Tiles of 64×64 in one zlib stream.
    pub const ZRLE: i32 = 16;
    /// Lowest JPEG quality that a client may name; the highest is nine above it.
    pub const JPEG_QUALITY_0: i32 = -32;
    /// The picture gets another size.
    pub const DESKTOP_SIZE: i32 = -223;
    /// The pointer's picture, with a mask.
    pub const CURSOR: i32 = -239;
    /// Keys by scancode (registered by QEMU).
    pub const EXTENDED_KEY: i32 = -258;
    /// The picture gets another size, and the client may ask for one.
    pub const EXTENDED_DESKTOP_SIZE: i32 = -308;
    /// The pointer's picture, with alpha.
    pub const CURSOR_WITH_ALPHA: i32 = -314;
    /// Clipboard text in UTF-8, handed over when somebody wants it.
    pub const EXTENDED_CLIPBOARD: i32 = 0xc0a1_e5ce_u32 as i32;
}

/// The client sent what no client may send.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// Not an RFB client.
    #[error("the peer does not speak RFB")]
    Version,
    /// A security type that was not offered.
    #[error("the client chose security type {0}, which was not offered")]
    SecurityType(u8),
    /// A message nobody knows, so its length is not known either.
    #[error("unknown message type {0}")]
    MessageType(u8),
    /// A pixel format that cannot be served.
    #[error("the client asked for a pixel format that cannot be served: {0}")]
    PixelFormat(&'static str),
    /// A clipboard's content that cannot be unpacked.
    #[error("the client's clipboard cannot be unpacked")]
    Clipboard,
    /// More than a client may send at once.
    #[error("{what} of {length} bytes is too long")]
    TooLong {
        /// What.
        what: &'static str,
        /// Announced length in bytes.
        length: u32,
    },
}

/// Reads big-endian numbers off the front of a message that is complete.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reader<'a>(pub(crate) &'a [u8]);

impl<'a> Reader<'a> {
    /// The next bytes; zeroes if there are fewer, which callers have ruled out.
    fn array<const N: usize>(&mut self) -> [u8; N] {
        match self.0.split_first_chunk::<N>() {
            Some((head, tail)) => {
                self.0 = tail;
                *head
            }
            None => [0; N],
        }
    }

    pub(crate) fn u8(&mut self) -> u8 {
        u8::from_be_bytes(self.array())
    }

    pub(crate) fn u16(&mut self) -> u16 {
        u16::from_be_bytes(self.array())
    }

    pub(crate) fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.array())
    }

    pub(crate) fn skip(&mut self, count: usize) {
        self.0 = self.0.get(count..).unwrap_or(&[]);
    }
}
