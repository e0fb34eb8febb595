//! Pixels to bytes. An [`Encoder`] belongs to one client for as long as it is connected: its zlib
//! streams remember what went before.

mod palette;
mod tight;
pub(crate) use tight::MAX_WIDTH;
mod zrle;

use flate2::{Compress, Compression, FlushCompress};

use crate::{
    geometry::Rect,
    proto::{encoding, pixel::PixelFormat, update::Update},
};

/// How rectangles are sent to a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Method {
    #[default]
    Raw,
    Zrle,
    Tight,
}

/// A picture in memory: B, G, R, X.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Picture<'a> {
    pub(crate) pixels: &'a [u8],
    /// Pixels from one row to the next.
    pub(crate) width: u32,
}

impl<'a> Picture<'a> {
    /// The rows of a part of the picture; nothing of what lies outside.
    fn rows(&self, rect: Rect) -> impl Iterator<Item = &'a [[u8; 4]]> + use<'a> {
        let (pixels, _) = self.pixels.as_chunks::<4>();
        let stride = self.width as usize;
        let left = rect.x as usize;
        (rect.y as usize..(rect.y + rect.height) as usize)
            .filter_map(move |y| pixels.get(y * stride..)?.get(left..left + rect.width as usize))
    }

    fn iter(&self, rect: Rect) -> impl Iterator<Item = [u8; 4]> + use<'a> {
        self.rows(rect).flatten().copied()
    }
}

/// A zlib stream that goes on from rectangle to rectangle.
#[derive(Debug)]
struct Stream(Compress);

impl Default for Stream {
    fn default() -> Self {
        Self(Compress::new(Compression::new(3), true))
    }
}

impl Stream {
    /// Appends `input`, compressed, so that all of it can be decoded.
    fn push(&mut self, input: &[u8], out: &mut Vec<u8>) {
        let mut rest = input;
        loop {
            out.reserve(rest.len() / 2 + 1024);
            let before = self.0.total_in();
            // The only error is a call after the end of the stream, which there never is.
            let status = self.0.compress_vec(rest, out, FlushCompress::Sync);
            let taken = (self.0.total_in() - before) as usize;
            rest = rest.get(taken..).unwrap_or(&[]);
            // Room left over means that everything is out.
            if status.is_err() || (rest.is_empty() && out.len() < out.capacity()) {
                return;
            }
        }
    }
}

/// Makes rectangles of an update.
#[derive(Debug, Default)]
pub(crate) struct Encoder {
    zrle: Stream,
    tight: tight::Streams,
    scratch: Vec<u8>,
}

impl Encoder {
    /// Appends a part of a picture. `quality`: photographs may be JPEG of this quality, 0 to 9.
    /// Returns whether it was lossy.
    pub(crate) fn push(
        &mut self,
        update: &mut Update<'_>,
        picture: Picture<'_>,
        rect: Rect,
        method: Method,
        format: &PixelFormat,
        quality: Option<u8>,
    ) -> bool {
        let position = (rect.x as u16, rect.y as u16);
        let size = (rect.width as u16, rect.height as u16);
        match method {
            Method::Raw => {
                let out = update.rectangle(position, size, encoding::RAW);
                picture.iter(rect).for_each(|pixel| format.push(pixel, out));
                false
            }
            Method::Zrle => {
                let out = update.rectangle(position, size, encoding::ZRLE);
                self.scratch.clear();
                zrle::tiles(picture, rect, format, &mut self.scratch);
                let length_at = out.len();
                out.extend([0; 4]);
                self.zrle.push(&self.scratch, out);
                let length = (out.len() - length_at - 4) as u32;
                out[length_at..length_at + 4].copy_from_slice(&length.to_be_bytes());
                false
            }
            Method::Tight => {
                let out = update.rectangle(position, size, encoding::TIGHT);
                self.tight.push(picture, rect, format, quality, &mut self.scratch, out)
            }
        }
    }
}
