//! Clipboard text: CutText in Latin-1 (RFC 6143 §7.5.6, §7.6.4), and the Extended Clipboard
//! pseudo-encoding (rfbproto §7.7.27) in UTF-8.
//!
//! Extended messages are CutText with a negative length. A side that has something new says so
//! (notify), the other one asks for it (request) and gets it (provide).

use std::io::{Read, Write};

use flate2::{Compression, read::ZlibDecoder, write::ZlibEncoder};

use super::{ProtocolError, Reader};

/// Longest text in bytes of UTF-8, either way.
pub const MAX_TEXT: usize = 1 << 20;

const TEXT: u32 = 1;
const CAPS: u32 = 1 << 24;
const REQUEST: u32 = 1 << 25;
const PEEK: u32 = 1 << 26;
const NOTIFY: u32 = 1 << 27;
const PROVIDE: u32 = 1 << 28;
const ACTIONS: u32 = CAPS | REQUEST | PEEK | NOTIFY | PROVIDE;

/// ServerCutText.
const SERVER_CUT_TEXT: u8 = 3;

/// What a client says about its clipboard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Clipboard {
    /// Text, unasked: in the old way, or because a request was answered.
    Text(String),
    /// It has new text, if `true`, or something else, which is of no interest here.
    Notify(bool),
    /// It wants the text that the server has.
    Request,
    /// It wants to be told again whether the server has text.
    Peek,
    /// Its abilities, other formats, and the like.
    Other,
}

/// Decodes what follows the length of a CutText in the old way.
pub(super) fn decode_plain(bytes: &[u8]) -> Clipboard {
    Clipboard::Text(bytes.iter().map(|byte| char::from(*byte)).collect())
}

/// Decodes what follows a negative length.
pub(super) fn decode_extended(bytes: &[u8]) -> Result<Clipboard, ProtocolError> {
    let mut reader = Reader(bytes);
    let flags = reader.u32();
    let text = flags & TEXT != 0;
    Ok(match flags & ACTIONS {
        NOTIFY => Clipboard::Notify(text),
        REQUEST if text => Clipboard::Request,
        PEEK => Clipboard::Peek,
        PROVIDE if text => match provided(reader.0)? {
            Some(text) => Clipboard::Text(text),
            None => Clipboard::Other,
        },
        _ => Clipboard::Other,
    })
}

/// Unpacks a text: its size in front, a NUL at its end, `\r\n` for new lines. `None` if it is longer
/// than this server takes.
fn provided(packed: &[u8]) -> Result<Option<String>, ProtocolError> {
    let broken = |_| ProtocolError::Clipboard;
    let mut unpacked = ZlibDecoder::new(packed);
    let mut size = [0; 4];
    unpacked.read_exact(&mut size).map_err(broken)?;
    let size = u32::from_be_bytes(size) as usize;
    if size > MAX_TEXT {
        return Ok(None);
    }
    let mut text = vec![0; size];
    unpacked.read_exact(&mut text).map_err(broken)?;
    let end = text.iter().position(|byte| *byte == 0).unwrap_or(text.len());
    text.truncate(end);
    Ok(Some(String::from_utf8_lossy(&text).replace("\r\n", "\n")))
}

/// ServerCutText in the old way; what Latin-1 does not have becomes a question mark.
pub fn plain(text: &str) -> Vec<u8> {
    let bytes: Vec<u8> = text.chars().map(|c| u8::try_from(u32::from(c)).unwrap_or(b'?')).collect();
    let mut out = vec![SERVER_CUT_TEXT, 0, 0, 0];
    out.extend((bytes.len() as u32).to_be_bytes());
    out.extend(bytes);
    out
}

fn extended(flags: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = vec![SERVER_CUT_TEXT, 0, 0, 0];
    out.extend((-(payload.len() as i32 + 4)).to_be_bytes());
    out.extend(flags.to_be_bytes());
    out.extend(payload);
    out
}

/// What this server can do: text, which clients had better not send before they are asked.
pub fn abilities() -> Vec<u8> {
    extended(ACTIONS | TEXT, &0_u32.to_be_bytes())
}

/// There is new text.
pub fn notify() -> Vec<u8> {
    extended(NOTIFY | TEXT, &[])
}

/// The client's text is wanted.
pub fn request() -> Vec<u8> {
    extended(REQUEST | TEXT, &[])
}

/// The answer to a request.
pub fn provide(text: &str) -> Vec<u8> {
    let text = text.replace("\r\n", "\n").replace('\n', "\r\n");
    let mut packer = ZlibEncoder::new(Vec::new(), Compression::fast());
    let size = text.len() as u32 + 1;
    // Writing into memory does not fail.
    let _ = packer.write_all(&size.to_be_bytes());
    let _ = packer.write_all(text.as_bytes());
    let _ = packer.write_all(&[0]);
    extended(PROVIDE | TEXT, &packer.finish().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_there_and_back() {
        let text = "Grüße\naus 東京";
        let message = provide(text);
        assert_eq!(message[0], SERVER_CUT_TEXT);
        let length = i32::from_be_bytes(message[4..8].try_into().unwrap());
        assert_eq!(length, 8 - message.len() as i32);
        assert_eq!(decode_extended(&message[8..]).unwrap(), Clipboard::Text(text.to_owned()));
        assert_eq!(plain("aß東")[4..], [0, 0, 0, 3, b'a', 0xdf, b'?']);
        assert_eq!(decode_plain(b"a\xdf"), Clipboard::Text("aß".to_owned()));
    }

    #[test]
    fn actions() {
        assert_eq!(decode_extended(&notify()[8..]).unwrap(), Clipboard::Notify(true));
        assert_eq!(decode_extended(&request()[8..]).unwrap(), Clipboard::Request);
        assert_eq!(decode_extended(&abilities()[8..]).unwrap(), Clipboard::Other);
        // HTML only.
        assert_eq!(decode_extended(&[8, 0, 0, 4]).unwrap(), Clipboard::Notify(false));
        assert_eq!(decode_extended(&[4, 0, 0, 0]).unwrap(), Clipboard::Peek);
        assert_eq!(decode_extended(&[]).unwrap(), Clipboard::Other);
    }

    #[test]
    fn bombs_and_rubbish() {
        let packed = |size: u32, content: usize| {
            let mut packer = ZlibEncoder::new(Vec::new(), Compression::best());
            packer.write_all(&size.to_be_bytes()).unwrap();
            packer.write_all(&vec![b'x'; content]).unwrap();
            let mut message = (PROVIDE | TEXT).to_be_bytes().to_vec();
            message.extend(packer.finish().unwrap());
            message
        };
        let largest = packed(MAX_TEXT as u32, MAX_TEXT);
        assert!(matches!(decode_extended(&largest), Ok(Clipboard::Text(_))));
        assert_eq!(decode_extended(&packed(u32::MAX, 10 << 20)), Ok(Clipboard::Other));
        assert_eq!(decode_extended(&packed(100, 10)), Err(ProtocolError::Clipboard));
        assert_eq!(decode_extended(&[0x10, 0, 0, 1, 1, 2, 3]), Err(ProtocolError::Clipboard));
    }
}
