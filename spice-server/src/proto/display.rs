//! Display channel messages (spice.proto, `DisplayChannel`).

use super::{
    DecodeError,
    channel::{BASE_LIMIT, BaseMessage, decode_base},
    framing::Framer,
    wire::{Put, Reader},
};
use crate::{Rect, VideoCodec};

/// Client capability: stream frames of another size than the stream.
pub(crate) const CAP_SIZED_STREAM: u32 = 0;
/// Server capability, and what `MONITORS_CONFIG` needs.
pub(crate) const CAP_MONITORS_CONFIG: u32 = 1;
/// Both sides: reports about streams are understood.
pub(crate) const CAP_STREAM_REPORT: u32 = 4;
/// Client capability: LZ4 images.
pub(crate) const CAP_LZ4: u32 = 5;
/// Server capability: the client may prefer a compression.
pub(crate) const CAP_PREF_COMPRESSION: u32 = 6;

/// Server capability: the client may prefer a video codec.
pub(crate) const CAP_PREF_VIDEO_CODEC: u32 = 12;
/// Client capability: the codecs it knows are told by bits of their own.
pub(crate) const CAP_MULTI_CODEC: u32 = 8;
/// Client capability: MJPEG streams.
pub(crate) const CAP_CODEC_MJPEG: u32 = 9;
/// Client capability: VP8 streams.
pub(crate) const CAP_CODEC_VP8: u32 = 10;
/// Client capability: H.264 streams.
pub(crate) const CAP_CODEC_H264: u32 = 11;

/// A codec's number in messages (`SpiceVideoCodecType`).
fn codec_number(codec: VideoCodec) -> u8 {
    match codec {
        VideoCodec::Mjpeg => 1,
        VideoCodec::Vp8 => 2,
        VideoCodec::H264 => 3,
    }
}

/// Codecs in the order a client prefers, as far as its message is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PreferredCodecs([u8; 8]);

impl PreferredCodecs {
    /// A codec's place in the list, if it is in it.
    pub(crate) fn place(&self, codec: VideoCodec) -> Option<usize> {
        self.0.iter().position(|number| *number == codec_number(codec))
    }
}

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
    /// Pixels the client's image cache holds.
    Init {
        cache_pixels: u64,
    },
    StreamReport(StreamReport),
    PreferredCompression(Compression),
    PreferredCodecs(PreferredCodecs),
    /// GL scanouts.
    Ignored,
}

/// How a client fared with a stream's frames (`STREAM_REPORT`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StreamReport {
    /// The stream.
    pub(crate) stream: u32,
    /// The number it was told to report under.
    pub(crate) unique: u32,
    /// Frames received, late ones included.
    pub(crate) frames: u32,
    /// Frames that came too late to be shown; `u32::MAX` if the client cannot show the stream.
    pub(crate) drops: u32,
    /// Milliseconds between the last frame's arrival and its time; negative if it was late.
    pub(crate) last_delay: i32,
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
            reader.u8()?;
            let cache_pixels = reader.u64()?;
            reader.bytes(5)?;
            ClientMessage::Init { cache_pixels: cache_pixels.min(i64::MAX as u64) }
        }
        102 => {
            let (stream, unique) = (reader.u32()?, reader.u32()?);
            reader.bytes(8)?;
            let (frames, drops, last_delay) = (reader.u32()?, reader.u32()?, reader.i32()?);
            reader.u32()?;
            let report = StreamReport { stream, unique, frames, drops, last_delay };
            ClientMessage::StreamReport(report)
        }
        103 => ClientMessage::PreferredCompression(match reader.u8()? {
            1 => Compression::Off,
            7 => Compression::Lz4,
            _ => Compression::Automatic,
        }),
        104 => ClientMessage::Ignored,
        105 => {
            let mut codecs = [0; 8];
            let count = reader.u8()?;
            for (to, from) in codecs.iter_mut().zip(reader.bytes(count.into())?) {
                *to = *from;
            }
            ClientMessage::PreferredCodecs(PreferredCodecs(codecs))
        }
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

/// `COPY_BITS`: the pixels at `from` to `to`.
pub(crate) fn put_copy_bits(
    framer: &mut Framer,
    out: &mut Vec<u8>,
    surface: Surface,
    to: Rect,
    from: (u32, u32),
) {
    framer.message(out, 104, |out| {
        put_base(out, surface, to);
        out.put_u32(from.0);
        out.put_u32(from.1);
    });
}

/// `INVAL_LIST`: the client may forget these images.
pub(crate) fn put_forget_images(framer: &mut Framer, out: &mut Vec<u8>, ids: &[u64]) {
    const RESOURCE_PIXMAP: u8 = 1;
    framer.message(out, 105, |out| {
        out.put_u16(ids.len() as u16);
        for id in ids {
            out.put_u8(RESOURCE_PIXMAP);
            out.put_u64(*id);
        }
    });
}

/// `STREAM_CREATE` of a stream of this codec and size, drawn over `to` of the primary surface.
pub(crate) fn put_stream_create(
    framer: &mut Framer,
    out: &mut Vec<u8>,
    id: u32,
    codec: VideoCodec,
    size: (u32, u32),
    to: Rect,
) {
    const FLAG_TOP_DOWN: u8 = 1;
    framer.message(out, 122, |out| {
        out.put_u32(Surface::Primary as u32);
        out.put_u32(id);
        out.put_u8(FLAG_TOP_DOWN);
        out.put_u8(codec_number(codec));
        out.put_u64(0);
        for _ in 0..2 {
            out.put_u32(size.0);
            out.put_u32(size.1);
        }
        put_rect(out, to);
        // Not clipped.
        out.put_u8(0);
    });
}

/// `STREAM_DATA`: a frame to be shown at `mm_time`; `data` appends it. `STREAM_DATA_SIZED` if it has
/// another size than the stream, to be scaled to a rectangle.
pub(crate) fn put_stream_data(
    framer: &mut Framer,
    out: &mut Vec<u8>,
    id: u32,
    mm_time: u32,
    sized: Option<((u32, u32), Rect)>,
    data: impl FnOnce(&mut Vec<u8>),
) {
    framer.message(out, if sized.is_some() { 316 } else { 123 }, |out| {
        out.put_u32(id);
        // 0 is no time.
        out.put_u32(mm_time.max(1));
        if let Some(((width, height), to)) = sized {
            out.put_u32(width);
            out.put_u32(height);
            put_rect(out, to);
        }
        let size_at = out.len();
        out.put_u32(0);
        data(out);
        let size = (out.len() - size_at - 4) as u32;
        super::wire::patch_u32(out, size_at, size);
    });
}

pub(crate) fn put_stream_destroy(framer: &mut Framer, out: &mut Vec<u8>, id: u32) {
    framer.message(out, 125, |out| out.put_u32(id));
}

/// `STREAM_ACTIVATE_REPORT`: report after so many frames or milliseconds.
pub(crate) fn put_stream_report_wanted(
    framer: &mut Framer,
    out: &mut Vec<u8>,
    id: u32,
    unique: u32,
    (frames, milliseconds): (u32, u32),
) {
    framer.message(out, 319, |out| {
        out.put_u32(id);
        out.put_u32(unique);
        out.put_u32(frames);
        out.put_u32(milliseconds);
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
        let init = [7, 0, 0, 4, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0];
        assert_eq!(decode(101, &init), Ok(ClientMessage::Init { cache_pixels: 0x4_0000 }));
        assert_eq!(decode(101, &[0; 13]), Err(DecodeError::Truncated));
        assert_eq!(decode(103, &[7]), Ok(ClientMessage::PreferredCompression(Compression::Lz4)));
        assert_eq!(decode(104, &[]), Ok(ClientMessage::Ignored));
        let Ok(ClientMessage::PreferredCodecs(codecs)) = decode(105, &[4, 9, 3, 2, 1]) else {
            panic!()
        };
        assert_eq!(
            [VideoCodec::H264, VideoCodec::Vp8, VideoCodec::Mjpeg].map(|c| codecs.place(c)),
            [Some(1), Some(2), Some(3)]
        );
        assert_eq!(decode(105, &[2, 1]), Err(DecodeError::Truncated));
        assert_eq!(decode(200, &[]), Err(DecodeError::UnexpectedType(200)));
    }
}
