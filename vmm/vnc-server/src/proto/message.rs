//! What clients say after the handshake (RFC 6143 §7.5).

use super::{
    ProtocolError, Reader,
    clipboard::{self, Clipboard},
    pixel::{self, PixelFormat},
};

/// Encodings a client may list; clients know some thirty.
const MAX_ENCODINGS: u16 = 1024;

/// Bytes of a clipboard message; a text that does not shrink is somewhat longer in it.
const MAX_CUT_TEXT: u32 = clipboard::MAX_TEXT as u32 + 4096;

/// A message from a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClientMessage {
    /// Pixels shall have this format from now on.
    SetPixelFormat(PixelFormat),
    /// Encodings the client knows, best first.
    SetEncodings(Vec<i32>),
    /// The client is ready for an update.
    UpdateRequest {
        /// Only what changed.
        incremental: bool,
        /// Left edge in pixels.
        x: u16,
        /// Top edge in pixels.
        y: u16,
        /// Pixels.
        width: u16,
        /// Pixels.
        height: u16,
    },
    /// A key, by its X keysym.
    Key {
        /// Pressed or released.
        down: bool,
        /// Keysym.
        keysym: u32,
    },
    /// A key, by scancode of set 1; the high bit stands for the prefix 0xe0.
    ExtendedKey {
        /// Pressed or released.
        down: bool,
        /// Keysym.
        keysym: u32,
        /// Scancode.
        scancode: u32,
    },
    /// Where the pointer is and which buttons are pressed, the first one in the lowest bit.
    Pointer {
        /// Pressed buttons.
        buttons: u8,
        /// Pixels from the left.
        x: u16,
        /// Pixels from the top.
        y: u16,
    },
    /// The client's window has this size.
    SetDesktopSize {
        /// Pixels.
        width: u16,
        /// Pixels.
        height: u16,
    },
    /// What the client says about its clipboard.
    Clipboard(Clipboard),
}

/// Takes a message off the front of what the client has sent; `None` if it is not complete.
///
/// # Errors
///
/// If the stream cannot be understood any further; hang up.
pub fn take(input: &mut Vec<u8>) -> Result<Option<ClientMessage>, ProtocolError> {
    let Some(length) = length(input)? else { return Ok(None) };
    if input.len() < length {
        return Ok(None);
    }
    let message = decode(&input[..length])?;
    input.drain(..length);
    Ok(Some(message))
}

/// Bytes of the message at the front, as soon as that can be told.
fn length(input: &[u8]) -> Result<Option<usize>, ProtocolError> {
    let Some(kind) = input.first() else { return Ok(None) };
    let number = |at: usize| input.get(at..at + 2).map(|b| u16::from_be_bytes([b[0], b[1]]));
    Ok(match kind {
        0 => Some(4 + pixel::WIRE_SIZE),
        2 => match number(2) {
            Some(count) if count > MAX_ENCODINGS => {
                let length = u32::from(count) * 4;
                return Err(ProtocolError::TooLong { what: "a list of encodings", length });
            }
            count => count.map(|count| 4 + usize::from(count) * 4),
        },
        3 => Some(10),
        4 => Some(8),
        5 => Some(6),
        6 => match input.get(4..8).map(|b| i32::from_be_bytes([b[0], b[1], b[2], b[3]])) {
            // Negative lengths belong to the extended clipboard.
            Some(length) if length.unsigned_abs() > MAX_CUT_TEXT => {
                let length = length.unsigned_abs();
                return Err(ProtocolError::TooLong { what: "clipboard text", length });
            }
            length => length.map(|length| 8 + length.unsigned_abs() as usize),
        },
        251 => input.get(6).map(|screens| 8 + usize::from(*screens) * 16),
        255 => match input.get(1) {
            None => None,
            Some(0) => Some(12),
            Some(_) => return Err(ProtocolError::MessageType(255)),
        },
        other => return Err(ProtocolError::MessageType(*other)),
    })
}

/// Decodes a complete message.
fn decode(bytes: &[u8]) -> Result<ClientMessage, ProtocolError> {
    let mut reader = Reader(bytes);
    let kind = reader.u8();
    Ok(match kind {
        0 => {
            let wire = bytes.last_chunk::<{ pixel::WIRE_SIZE }>();
            let wire = wire.ok_or(ProtocolError::MessageType(kind))?;
            ClientMessage::SetPixelFormat(PixelFormat::from_wire(wire)?)
        }
        2 => {
            reader.skip(1);
            let count = reader.u16();
            ClientMessage::SetEncodings((0..count).map(|_| reader.u32() as i32).collect())
        }
        3 => ClientMessage::UpdateRequest {
            incremental: reader.u8() != 0,
            x: reader.u16(),
            y: reader.u16(),
            width: reader.u16(),
            height: reader.u16(),
        },
        4 => {
            let down = reader.u8() != 0;
            reader.skip(2);
            ClientMessage::Key { down, keysym: reader.u32() }
        }
        5 => ClientMessage::Pointer { buttons: reader.u8(), x: reader.u16(), y: reader.u16() },
        6 => {
            reader.skip(3);
            let extended = (reader.u32() as i32) < 0;
            ClientMessage::Clipboard(match extended {
                true => clipboard::decode_extended(reader.0)?,
                false => clipboard::decode_plain(reader.0),
            })
        }
        251 => {
            reader.skip(1);
            ClientMessage::SetDesktopSize { width: reader.u16(), height: reader.u16() }
        }
        255 => {
            reader.skip(1);
            ClientMessage::ExtendedKey {
                down: reader.u16() != 0,
                keysym: reader.u32(),
                scancode: reader.u32(),
            }
        }
        // `length` lets no other through.
        other => return Err(ProtocolError::MessageType(other)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever the pieces are that it arrives in.
    fn all(stream: &[u8], piece: usize) -> Result<Vec<ClientMessage>, ProtocolError> {
        let mut input = Vec::new();
        let mut messages = Vec::new();
        for piece in stream.chunks(piece) {
            input.extend(piece);
            while let Some(message) = take(&mut input)? {
                messages.push(message);
            }
        }
        assert!(input.is_empty());
        Ok(messages)
    }

    #[test]
    fn every_message_in_any_pieces() {
        let mut stream = vec![0, 0, 0, 0];
        stream.extend(PixelFormat::BGRX.to_wire());
        stream.extend([2, 0, 0, 2, 0, 0, 0, 16, 0xff, 0xff, 0xff, 0x21]);
        stream.extend([3, 1, 0, 1, 0, 2, 0, 3, 0, 4]);
        stream.extend([4, 1, 0, 0, 0, 0, 0xff, 0x0d]);
        stream.extend([5, 0b101, 1, 0, 2, 0]);
        stream.extend([6, 0, 0, 0, 0, 0, 0, 2, b'h', b'i']);
        stream.extend([6, 0, 0, 0, 0xff, 0xff, 0xff, 0xfc, 8, 0, 0, 1]);
        stream.extend([251, 0, 3, 0x20, 2, 0x58, 1, 0]);
        stream.extend([0; 16]);
        stream.extend([255, 0, 0, 1, 0, 0, 0, 0x61, 0, 0, 0, 0x9d]);
        let wanted = vec![
            ClientMessage::SetPixelFormat(PixelFormat::BGRX),
            ClientMessage::SetEncodings(vec![16, -223]),
            ClientMessage::UpdateRequest { incremental: true, x: 1, y: 2, width: 3, height: 4 },
            ClientMessage::Key { down: true, keysym: 0xff0d },
            ClientMessage::Pointer { buttons: 5, x: 256, y: 512 },
            ClientMessage::Clipboard(Clipboard::Text("hi".to_owned())),
            ClientMessage::Clipboard(Clipboard::Notify(true)),
            ClientMessage::SetDesktopSize { width: 800, height: 600 },
            ClientMessage::ExtendedKey { down: true, keysym: 0x61, scancode: 0x9d },
        ];
        for piece in [1, 3, 7, 4096] {
            assert_eq!(all(&stream, piece).unwrap(), wanted);
        }
    }

    #[test]
    fn what_has_no_end_is_refused() {
        all(&[1], 1).unwrap_err();
        all(&[255, 1], 1).unwrap_err();
        all(&[2, 0, 0xff, 0xff], 1).unwrap_err();
        all(&[6, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff], 1).unwrap_err();
        all(&[6, 0, 0, 0, 0x80, 0, 0, 0], 1).unwrap_err();
    }
}
