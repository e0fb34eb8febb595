//! Display channel messages (spice.proto, `DisplayChannel`).

use super::{
    DecodeError,
    channel::{BASE_LIMIT, BaseMessage, decode_base},
    framing::Framer,
    wire::{Put, Reader},
};
use crate::Rect;

/// Server capability, and what `MONITORS_CONFIG` needs.
pub(crate) const CAP_MONITORS_CONFIG: u32 = 1;
/// Client capability: LZ4 images.
pub(crate) const CAP_LZ4: u32 = 5;
/// Server capability: the client may prefer a compression.
pub(crate) const CAP_PREF_COMPRESSION: u32 = 6;

/// The image compressions a client can ask for (`SpiceImageCompression`), as far as they matter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    Off,
    Lz4,
    /// Any of the others: the server chooses.
    Automatic,
}

/// What a client says on a display channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ClientMessage {
    Base(BaseMessage),
    /// Cache sizes, which this server does not use.
    Init,
    PreferredCompression(Compression),
    /// Reports about video streams, codecs and GL scanouts, none of which this server starts.
    Ignored,
}

/// Largest body of a client message.
pub(crate) fn limit(kind: u16) -> u32 {
    if kind <= 100 { BASE_LIMIT } else { 512 }
}

pub(crate) fn decode(kind: u16, body: &[u8]) -> Result<ClientMessage, DecodeError> {
    if let Some(base) = decode_base(kind, body)? {
        return Ok(ClientMessage::Base(base));
    }
    let mut reader = Reader::new(body);
    Ok(match kind {
        101 => {
            reader.bytes(14)?;
            ClientMessage::Init
        }
        103 => ClientMessage::PreferredCompression(match reader.u8()? {
            1 => Compression::Off,
            7 => Compression::Lz4,
            _ => Compression::Automatic,
        }),
        102 | 104 | 105 => ClientMessage::Ignored,
        _ => return Err(DecodeError::UnexpectedType(kind)),
    })
}

const SURFACE_FORMAT_XRGB32: u32 = 32;
const SURFACE_FLAG_PRIMARY: u32 = 1;
const ROP_PUT: u16 = 8;

/// The surfaces a channel has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Surface {
    /// What the client shows.
    Primary = 0,
    /// Not shown: collects the parts of a new picture.
    Staging = 1,
}

pub(crate) fn put_surface_create(
    framer: &mut Framer,
    out: &mut Vec<u8>,
    surface: Surface,
    size: (u32, u32),
) {
    framer.message(out, 314, |out| {
        out.put_u32(surface as u32);
        out.put_u32(size.0);
        out.put_u32(size.1);
        out.put_u32(SURFACE_FORMAT_XRGB32);
        out.put_u32(match surface {
            Surface::Primary => SURFACE_FLAG_PRIMARY,
            Surface::Staging => 0,
        });
    });
}

pub(crate) fn put_surface_destroy(framer: &mut Framer, out: &mut Vec<u8>, surface: Surface) {
    framer.message(out, 315, |out| out.put_u32(surface as u32));
}

/// `MARK`: the picture is complete, show it.
pub(crate) fn put_mark(framer: &mut Framer, out: &mut Vec<u8>) {
    framer.message(out, 102, |_| {});
}

/// `MONITORS_CONFIG` with the one head this channel's surface is.
pub(crate) fn put_monitors_config(framer: &mut Framer, out: &mut Vec<u8>, size: (u32, u32)) {
    framer.message(out, 317, |out| {
        out.put_u16(1);
        out.put_u16(1);
        out.put_u32(0);
        out.put_u32(0);
        out.put_u32(size.0);
        out.put_u32(size.1);
        out.put_u32(0);
        out.put_u32(0);
        out.put_u32(0);
    });
}

/// `DRAW_FILL` of a rectangle with one colour (`0xRRGGBB`).
pub(crate) fn put_fill(
    framer: &mut Framer,
    out: &mut Vec<u8>,
    surface: Surface,
    rect: Rect,
    colour: u32,
) {
    framer.message(out, 302, |out| {
        put_base(out, surface, rect);
        // Brush SOLID, then rop and an absent mask.
        out.put_u8(1);
        out.put_u32(colour);
        out.put_u16(ROP_PUT);
        put_no_mask(out);
    });
}

/// `DRAW_COPY` of an image onto `rect`; `image` appends descriptor and data (see `image.rs`).
pub(crate) fn put_copy(
    framer: &mut Framer,
    out: &mut Vec<u8>,
    surface: Surface,
    rect: Rect,
    image: impl FnOnce(&mut Vec<u8>),
) {
    framer.message(out, 304, |out| {
        let body = out.len();
        put_base(out, surface, rect);
        let pointer_at = out.len();
        out.put_u32(0);
        put_rect(out, Rect::new(0, 0, rect.width, rect.height));
        out.put_u16(ROP_PUT);
        out.put_u8(0);
        put_no_mask(out);
        let offset = (out.len() - body) as u32;
        super::wire::patch_u32(out, pointer_at, offset);
        image(out);
    });
}

fn put_base(out: &mut Vec<u8>, surface: Surface, rect: Rect) {
    out.put_u32(surface as u32);
    put_rect(out, rect);
    out.put_u8(0);
}

fn put_rect(out: &mut Vec<u8>, rect: Rect) {
    out.put_u32(rect.y);
    out.put_u32(rect.x);
    out.put_u32(rect.bottom());
    out.put_u32(rect.right());
}

fn put_no_mask(out: &mut Vec<u8>) {
    out.put_u8(0);
    out.put_i32(0);
    out.put_i32(0);
    out.put_u32(0);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::framing::HeaderKind;

    #[test]
    fn copy_points_at_its_image() {
        let mut out = Vec::new();
        let mut framer = Framer::new(HeaderKind::Mini);
        put_copy(&mut framer, &mut out, Surface::Primary, Rect::new(8, 16, 32, 64), |out| {
            out.extend_from_slice(b"IMAGE");
        });
        let body = &out[6..];
        let mut reader = Reader::new(body);
        assert_eq!(reader.u32(), Ok(0));
        assert_eq!(
            [reader.u32(), reader.u32(), reader.u32(), reader.u32()].map(Result::unwrap),
            [16, 8, 80, 40]
        );
        assert_eq!(reader.u8(), Ok(0));
        let pointer = reader.u32().unwrap() as usize;
        assert_eq!(&body[pointer..], b"IMAGE");
    }

    #[test]
    fn client_messages() {
        assert_eq!(decode(101, &[0; 14]), Ok(ClientMessage::Init));
        assert_eq!(decode(101, &[0; 13]), Err(DecodeError::Truncated));
        assert_eq!(decode(103, &[7]), Ok(ClientMessage::PreferredCompression(Compression::Lz4)));
        assert_eq!(decode(104, &[]), Ok(ClientMessage::Ignored));
        assert_eq!(decode(200, &[]), Err(DecodeError::UnexpectedType(200)));
    }
}
