//! Inputs channel messages (spice.proto, `InputsChannel`) and the AT set 1 scan code stream.

use super::{
    DecodeError,
    channel::{BASE_LIMIT, BaseMessage, decode_base},
    framing::Framer,
    wire::{Put, Reader},
};
use crate::{Button, Leds, Scancode, ScancodePrefix};

/// Motions a client may send before it waits for an acknowledgement, and the step in which they
/// are acknowledged (`SPICE_INPUT_MOTION_ACK_BUNCH`).
pub(crate) const MOTION_ACK_BUNCH: u32 = 4;

/// Server capability: `KEY_SCANCODE` is understood.
pub(crate) const CAP_KEY_SCANCODE: u32 = 0;

/// What a client says on its inputs channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ClientMessage<'a> {
    Base(BaseMessage),
    /// Scan code bytes of a key going down or up; only the meaningful ones.
    Scancodes(ScancodeBytes<'a>),
    /// The client's own lock keys.
    Modifiers(Leds),
    Motion {
        dx: i32,
        dy: i32,
        buttons: u16,
    },
    Position {
        x: u32,
        y: u32,
        buttons: u16,
        display: u8,
    },
    Press(WireButton),
    Release(WireButton),
}

/// Scan code bytes, inline or borrowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ScancodeBytes<'a> {
    /// A little-endian word as `KEY_DOWN` and `KEY_UP` send it.
    Word([u8; 4]),
    /// The body of `KEY_SCANCODE`.
    Raw(&'a [u8]),
}

impl ScancodeBytes<'_> {
    pub(crate) fn as_slice(&self) -> &[u8] {
        match self {
            Self::Word(word) => {
                let used = word.iter().rposition(|b| *b != 0).map_or(0, |last| last + 1);
                &word[..used]
            }
            Self::Raw(bytes) => bytes,
        }
    }
}

/// A button number of the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WireButton {
    Button(Button),
    WheelUp,
    WheelDown,
    /// One of the numbers up to 16 that nobody has a meaning for.
    Other,
}

/// Bits of a button mask, in the mask's order.
pub(crate) const MASK_BUTTONS: [(u16, Button); 5] = [
    (1, Button::Left),
    (2, Button::Middle),
    (4, Button::Right),
    (32, Button::Side),
    (64, Button::Extra),
];

/// Largest body of a client message.
pub(crate) fn limit(kind: u16) -> u32 {
    if kind <= 100 { BASE_LIMIT } else { 64 }
}

pub(crate) fn decode(kind: u16, body: &[u8]) -> Result<ClientMessage<'_>, DecodeError> {
    if let Some(base) = decode_base(kind, body)? {
        return Ok(ClientMessage::Base(base));
    }
    let mut reader = Reader::new(body);
    Ok(match kind {
        101 | 102 => ClientMessage::Scancodes(ScancodeBytes::Word(reader.u32()?.to_le_bytes())),
        103 => {
            let bits = reader.u16()?;
            ClientMessage::Modifiers(Leds {
                scroll_lock: bits & 1 != 0,
                num_lock: bits & 2 != 0,
                caps_lock: bits & 4 != 0,
            })
        }
        104 => ClientMessage::Scancodes(ScancodeBytes::Raw(body)),
        111 => {
            ClientMessage::Motion { dx: reader.i32()?, dy: reader.i32()?, buttons: reader.u16()? }
        }
        112 => ClientMessage::Position {
            x: reader.u32()?,
            y: reader.u32()?,
            buttons: reader.u16()?,
            display: reader.u8()?,
        },
        113 => ClientMessage::Press(button(reader.u8()?)),
        114 => ClientMessage::Release(button(reader.u8()?)),
        _ => return Err(DecodeError::UnexpectedType(kind)),
    })
}

fn button(number: u8) -> WireButton {
    match number {
        1 => WireButton::Button(Button::Left),
        2 => WireButton::Button(Button::Middle),
        3 => WireButton::Button(Button::Right),
        4 => WireButton::WheelUp,
        5 => WireButton::WheelDown,
        6 => WireButton::Button(Button::Side),
        7 => WireButton::Button(Button::Extra),
        _ => WireButton::Other,
    }
}

fn leds_bits(leds: Leds) -> u16 {
    u16::from(leds.scroll_lock) | u16::from(leds.num_lock) << 1 | u16::from(leds.caps_lock) << 2
}

pub(crate) fn put_init(framer: &mut Framer, out: &mut Vec<u8>, leds: Leds) {
    framer.message(out, 101, |out| out.put_u16(leds_bits(leds)));
}

pub(crate) fn put_key_modifiers(framer: &mut Framer, out: &mut Vec<u8>, leds: Leds) {
    framer.message(out, 102, |out| out.put_u16(leds_bits(leds)));
}

pub(crate) fn put_motion_ack(framer: &mut Framer, out: &mut Vec<u8>) {
    framer.message(out, 111, |_| {});
}

/// Makes keys from the bytes an AT keyboard sends.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ScancodeDecoder {
    #[default]
    Start,
    E0,
    E1,
    E1Second {
        up: bool,
    },
}

impl ScancodeDecoder {
    /// Takes one byte; returns a key and whether it went down when one is complete.
    pub(crate) fn byte(&mut self, byte: u8) -> Option<(Scancode, bool)> {
        let state = std::mem::take(self);
        let code = byte & 0x7f;
        let down = byte & 0x80 == 0;
        match (state, byte) {
            (Self::E1, 0x1d | 0x9d) => {
                *self = Self::E1Second { up: !down };
                None
            }
            (Self::E1Second { up }, 0x45 | 0xc5) => Some((Scancode::PAUSE, !up)),
            (_, 0xe0) => {
                *self = Self::E0;
                None
            }
            (_, 0xe1) => {
                *self = Self::E1;
                None
            }
            // The shifts an AT keyboard fakes around some grey keys mean nothing by themselves.
            (Self::E0, 0x2a | 0xaa | 0x36 | 0xb6) => None,
            (_, 0x00 | 0x80 | 0xff) => None,
            (Self::E0, _) => Some((Scancode::extended(code), down)),
            (_, _) => Some((Scancode { code, prefix: ScancodePrefix::None }, down)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(bytes: &[u8]) -> Vec<(Scancode, bool)> {
        let mut decoder = ScancodeDecoder::default();
        bytes.iter().filter_map(|b| decoder.byte(*b)).collect()
    }

    #[test]
    fn scan_codes() {
        assert_eq!(
            keys(&[0x1e, 0x9e]),
            [(Scancode::plain(0x1e), true), (Scancode::plain(0x1e), false)]
        );
        assert_eq!(
            keys(&[0xe0, 0x4d, 0xe0, 0xcd]),
            [(Scancode::extended(0x4d), true), (Scancode::extended(0x4d), false)]
        );
        assert_eq!(
            keys(&[0xe1, 0x1d, 0x45, 0xe1, 0x9d, 0xc5]),
            [(Scancode::PAUSE, true), (Scancode::PAUSE, false)]
        );
        // Print screen with its fake shift.
        assert_eq!(keys(&[0xe0, 0x2a, 0xe0, 0x37]), [(Scancode::extended(0x37), true)]);
        assert_eq!(keys(&[0xe0, 0xe0, 0x00, 0xff, 0xe1, 0xe1]), []);
    }

    #[test]
    fn client_messages() {
        let Ok(ClientMessage::Scancodes(bytes)) = decode(101, &[0xe0, 0x4d, 0, 0]) else {
            panic!("not scan codes");
        };
        assert_eq!(bytes.as_slice(), [0xe0, 0x4d]);
        assert_eq!(decode(104, &[0x1e]), Ok(ClientMessage::Scancodes(ScancodeBytes::Raw(&[0x1e]))));
        let mut body = Vec::new();
        body.put_u32(640);
        body.put_u32(479);
        body.put_u16(1);
        body.put_u8(0);
        assert_eq!(
            decode(112, &body),
            Ok(ClientMessage::Position { x: 640, y: 479, buttons: 1, display: 0 })
        );
        for end in 0..body.len() {
            assert_eq!(decode(112, &body[..end]), Err(DecodeError::Truncated));
        }
        assert_eq!(
            decode(113, &[3, 4, 0]),
            Ok(ClientMessage::Press(WireButton::Button(Button::Right)))
        );
        assert_eq!(decode(114, &[16, 0, 0]), Ok(ClientMessage::Release(WireButton::Other)));
        assert_eq!(decode(120, &[]), Err(DecodeError::UnexpectedType(120)));
    }
}
