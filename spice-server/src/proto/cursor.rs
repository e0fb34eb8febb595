//! Cursor channel messages (spice.proto, `CursorChannel`).

use super::{
    DecodeError,
    channel::{BASE_LIMIT, BaseMessage, decode_base},
    framing::Framer,
    wire::Put,
};
use crate::CursorImage;

const FLAG_NONE: u16 = 1;
const FLAG_CACHE_ME: u16 = 2;
const FLAG_FROM_CACHE: u16 = 4;
const TYPE_ALPHA: u8 = 0;

/// Largest body of a client message: only base messages come on this channel.
pub(crate) fn limit(_kind: u16) -> u32 {
    BASE_LIMIT
}

pub(crate) fn decode(kind: u16, body: &[u8]) -> Result<BaseMessage, DecodeError> {
    decode_base(kind, body)?.ok_or(DecodeError::UnexpectedType(kind))
}

/// What to send as the pointer's shape.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Shape<'a> {
    None,
    /// An image the client has not seen; `id` names it for later.
    New {
        id: u64,
        image: &'a CursorImage,
    },
    /// An image sent before with this `id`.
    Cached {
        id: u64,
        image: &'a CursorImage,
    },
}

/// `INIT`, the first message: no picture yet.
pub(crate) fn put_init(framer: &mut Framer, out: &mut Vec<u8>) {
    framer.message(out, 101, |out| {
        put_position(out, (0, 0));
        out.put_u16(0);
        out.put_u16(0);
        out.put_u8(0);
        put_shape(out, Shape::None);
    });
}

pub(crate) fn put_set(
    framer: &mut Framer,
    out: &mut Vec<u8>,
    position: (u32, u32),
    shape: Shape<'_>,
) {
    framer.message(out, 103, |out| {
        put_position(out, position);
        out.put_u8(1);
        put_shape(out, shape);
    });
}

pub(crate) fn put_move(framer: &mut Framer, out: &mut Vec<u8>, position: (u32, u32)) {
    framer.message(out, 104, |out| put_position(out, position));
}

pub(crate) fn put_hide(framer: &mut Framer, out: &mut Vec<u8>) {
    framer.message(out, 105, |_| {});
}

pub(crate) fn put_invalidate_all(framer: &mut Framer, out: &mut Vec<u8>) {
    framer.message(out, 108, |_| {});
}

fn put_position(out: &mut Vec<u8>, (x, y): (u32, u32)) {
    out.put_u16(x.min(i16::MAX as u32) as u16);
    out.put_u16(y.min(i16::MAX as u32) as u16);
}

fn put_shape(out: &mut Vec<u8>, shape: Shape<'_>) {
    let header = |out: &mut Vec<u8>, flags, id, image: &CursorImage| {
        out.put_u16(flags);
        out.put_u64(id);
        out.put_u8(TYPE_ALPHA);
        out.put_u16(image.width as u16);
        out.put_u16(image.height as u16);
        out.put_u16(image.hot_x.min(image.width) as u16);
        out.put_u16(image.hot_y.min(image.height) as u16);
    };
    match shape {
        Shape::None => out.put_u16(FLAG_NONE),
        Shape::New { id, image } => {
            header(out, FLAG_CACHE_ME, id, image);
            out.extend(image.argb.chunks_exact(4).flat_map(straight_alpha));
        }
        Shape::Cached { id, image } => header(out, FLAG_FROM_CACHE, id, image),
    }
}

/// Clients draw pointers with straight alpha (GDK pixbufs), so the premultiplication is undone.
fn straight_alpha(pixel: &[u8]) -> [u8; 4] {
    let &[b, g, r, a] = pixel else { return [0; 4] };
    let divide = |colour: u8| match a {
        0 => 0,
        255 => colour,
        _ => {
            let scaled = (u32::from(colour) * 255 + u32::from(a) / 2) / u32::from(a);
            scaled.min(255) as u8
        }
    };
    [divide(b), divide(g), divide(r), a]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::framing::HeaderKind;

    #[test]
    fn shapes() {
        let image = CursorImage {
            width: 2,
            height: 1,
            hot_x: 1,
            hot_y: 0,
            argb: vec![64, 32, 0, 128, 9, 9, 9, 0],
        };
        let mut out = Vec::new();
        let mut framer = Framer::new(HeaderKind::Mini);
        put_set(&mut framer, &mut out, (3, 70_000), Shape::New { id: 5, image: &image });
        let body = &out[6..];
        assert_eq!(body[..5], [3, 0, 0xff, 0x7f, 1]);
        assert_eq!(body[5..7], [2, 0]);
        assert_eq!(body[7..15], 5u64.to_le_bytes());
        assert_eq!(body[15..24], [0, 2, 0, 1, 0, 1, 0, 0, 0]);
        assert_eq!(body[24..], [128, 64, 0, 128, 0, 0, 0, 0]);
        out.clear();
        put_set(&mut framer, &mut out, (0, 0), Shape::Cached { id: 5, image: &image });
        assert_eq!(out.len(), 6 + 24);
        out.clear();
        put_init(&mut framer, &mut out);
        assert_eq!(out[6..], [0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    }
}
