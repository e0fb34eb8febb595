//! Video encoders for streams of films.
//!
//! MJPEG is built in. VP8 comes from libvpx and H.264 from OpenH264, which are loaded when a server
//! starts, if they are there.

mod convert;
mod encoder;
mod h264;
mod sys;
mod vp8;

pub(crate) use convert::I420;

use std::{borrow::Cow, fmt, str::FromStr, time::Duration};

use crate::{Error, Rect};
use encoder::Encoder;
use sys::{openh264::OpenH264, vpx::Vpx};

/// A codec of video streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum VideoCodec {
    /// Motion JPEG: always there, every client knows it.
    Mjpeg,
    /// VP8 by libvpx, if that library is installed.
    Vp8,
    /// H.264 by OpenH264, if that library is installed.
    H264,
}

impl VideoCodec {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Mjpeg, Self::Vp8, Self::H264];

    /// Its name in options and counters.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mjpeg => "mjpeg",
            Self::Vp8 => "vp8",
            Self::H264 => "h264",
        }
    }

    /// Whether its frames build on one another. Then a library makes them, clients have to make a
    /// decoder first, and width and height are even.
    pub(crate) fn is_predictive(self) -> bool {
        self != Self::Mjpeg
    }

    /// Whether its encoder takes pictures as large as this.
    pub(crate) fn takes(self, rect: Rect) -> bool {
        self != Self::H264 || u64::from(rect.width) * u64::from(rect.height) <= h264::MAX_PIXELS
    }

    /// Where its encoder comes from.
    pub(crate) fn library(self) -> &'static str {
        match self {
            Self::Mjpeg => "none",
            Self::Vp8 => "libvpx7 or libvpx9 in Debian, libvpx elsewhere",
            Self::H264 => "libopenh264-7 or libopenh264-8 in Debian, openh264 elsewhere",
        }
    }
}

impl fmt::Display for VideoCodec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Which codecs video streams may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum VideoCodecs {
    /// The best one whose library is there and which the client knows.
    #[default]
    Auto,
    /// This one, and MJPEG for clients that do not know it.
    Prefer(VideoCodec),
    /// None: films are pictures like all others.
    Off,
}

impl FromStr for VideoCodecs {
    type Err = UnknownVideoCodec;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            "off" => Ok(Self::Off),
            _ => {
                let mut codecs = VideoCodec::ALL.into_iter();
                codecs.find(|codec| codec.name() == text).map(Self::Prefer).ok_or(UnknownVideoCodec)
            }
        }
    }
}

/// A text that names no [`VideoCodecs`].
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("auto, mjpeg, vp8, h264 and off are known")]
pub struct UnknownVideoCodec;

/// Why there is no encoder, or no frame.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum VideoError {
    /// There is no such library.
    #[error("{reason}")]
    Missing {
        /// What the loader says.
        reason: String,
    },
    /// It is another library, or an old one.
    #[error("the library has no function {name}")]
    Symbol {
        /// The function.
        name: &'static str,
    },
    /// Its structures are not known.
    #[error("the library is of a version this program does not know")]
    Version,
    /// It does not do what it was asked to.
    #[error("the library refuses {what} (error {code})")]
    Library {
        /// What was asked for.
        what: &'static str,
        /// Its error number.
        code: i32,
    },
    /// A picture of another size than the encoder's.
    #[error("the picture is of another size than the encoder's")]
    Size,
}

/// How colours become luma and chroma.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Matrix {
    Bt601,
    Bt709,
}

impl Matrix {
    /// What GStreamer takes a picture of this height for, when its stream does not say.
    pub(crate) fn of_height(height: u32) -> Self {
        if height > 576 { Self::Bt709 } else { Self::Bt601 }
    }
}

/// XRGB8888 pixels, perhaps a part of a larger picture.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View<'a> {
    pub(crate) pixels: &'a [u8],
    /// Bytes from one row to the next.
    pub(crate) stride: usize,
    pub(crate) size: (u32, u32),
}

impl<'a> View<'a> {
    /// Pixels without padding.
    pub(crate) fn new(pixels: &'a [u8], size: (u32, u32)) -> Self {
        Self { pixels, stride: size.0 as usize * 4, size }
    }

    /// The same without padding.
    pub(crate) fn without_padding(self) -> Cow<'a, [u8]> {
        match self.size.0 as usize * 4 == self.stride {
            true => Cow::Borrowed(self.pixels),
            false => Cow::Owned(self.rows().flatten().copied().collect()),
        }
    }

    /// Its rows.
    pub(crate) fn rows(self) -> impl Iterator<Item = &'a [u8]> {
        let bytes = self.size.0 as usize * 4;
        let rows = self.pixels.chunks(self.stride.max(1)).take(self.size.1 as usize);
        rows.map_while(move |row| row.get(..bytes))
    }

    /// Two rows at a time; without a last odd one.
    pub(crate) fn pairs_of_rows(self) -> impl Iterator<Item = (&'a [u8], &'a [u8])> {
        let (upper, lower) = (self.rows().step_by(2), self.rows().skip(1).step_by(2));
        upper.zip(lower)
    }
}

/// A frame to be encoded.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Picture<'a> {
    pub(crate) view: View<'a>,
    /// The multimedia clock in milliseconds.
    pub(crate) clock: u32,
    /// How long it is probably shown.
    pub(crate) duration: Duration,
    /// Bits per second the stream may take.
    pub(crate) rate: f64,
}

/// An encoder of one stream, whose frames build on one another.
pub(crate) trait VideoEncoder: Send {
    /// Appends the next frame. Pictures may become smaller than the first, and as large again.
    fn encode(&mut self, picture: Picture<'_>, out: &mut Vec<u8>) -> Result<(), VideoError>;

    /// How coarse the last frame was, from 0 to 63; `None` where that is not known.
    fn quantizer(&mut self) -> Option<u32>;
}

/// Bits per second that a film of this size has where the line does not limit it: for every pixel of one
/// of 1920 by 1080 so many; smaller ones have more detail per pixel.
pub(crate) fn full_rate(size: (u32, u32)) -> f64 {
    const PER_PIXEL: f64 = 3.4;
    let pixels = pixels(size);
    pixels * PER_PIXEL * (1920.0 * 1080.0 / pixels.max(1.0)).powf(0.25)
}

/// Whether so many bits per second are enough for a film of this size to look good without every means
/// there is. All that a film ever has is.
fn is_generous(size: (u32, u32), bits: f64) -> bool {
    const PER_PIXEL: f64 = 2.5;
    bits >= (pixels(size) * PER_PIXEL).min(full_rate(size))
}

fn pixels((width, height): (u32, u32)) -> f64 {
    f64::from(width) * f64::from(height)
}

/// The codecs a server has.
#[derive(Default)]
pub(crate) struct Video {
    codecs: Vec<VideoCodec>,
    vpx: Option<Vpx>,
    openh264: Option<OpenH264>,
}

impl Video {
    /// Those a library makes, the best one first: by `video::bench`, VP8 of a film of 1920 by 1080
    /// is 0.5 dB better at the same rate and takes no more time, at 60 frames per second much less.
    const PREDICTIVE: [VideoCodec; 2] = [VideoCodec::Vp8, VideoCodec::H264];

    /// Loads what is wanted. A library that nobody asked for may be missing.
    pub(crate) fn load(wanted: VideoCodecs) -> Result<Self, Error> {
        Self::load_by(wanted, Self::load_library)
    }

    /// The same with a function that loads a codec's library, and says its version.
    fn load_by(
        wanted: VideoCodecs,
        load: impl Fn(&mut Self, VideoCodec) -> Result<String, VideoError>,
    ) -> Result<Self, Error> {
        let mut video = Self::default();
        if wanted == VideoCodecs::Off {
            return Ok(video);
        }
        for codec in Self::PREDICTIVE {
            let asked_for = wanted == VideoCodecs::Prefer(codec);
            if !asked_for && wanted != VideoCodecs::Auto {
                continue;
            }
            match load(&mut video, codec) {
                Ok(version) => {
                    tracing::debug!(%codec, version, "video streams by a library");
                    video.codecs.push(codec);
                }
                Err(source) if asked_for => return Err(Error::Video { codec, source }),
                Err(error) => tracing::debug!(%codec, %error, "no library for such video streams"),
            }
        }
        if wanted == VideoCodecs::Auto && video.codecs.is_empty() {
            tracing::info!("neither libvpx nor OpenH264: video streams are MJPEG");
        }
        video.codecs.push(VideoCodec::Mjpeg);
        Ok(video)
    }

    /// Loads a codec's library; its version.
    fn load_library(&mut self, codec: VideoCodec) -> Result<String, VideoError> {
        Ok(match codec {
            VideoCodec::Mjpeg => String::new(),
            VideoCodec::Vp8 => self.vpx.insert(Vpx::load()?).version().to_owned(),
            VideoCodec::H264 => self.openh264.insert(OpenH264::load()?).version().to_owned(),
        })
    }

    /// Those there are, the best one first.
    pub(crate) fn codecs(&self) -> &[VideoCodec] {
        &self.codecs
    }

    /// An encoder for pictures of this even size, with about so many bits and frames per second; `None` for
    /// MJPEG, whose frames do not build on one another.
    pub(crate) fn encoder(
        &self,
        codec: VideoCodec,
        size: (u32, u32),
        rate: (f64, f64),
    ) -> Result<Option<Box<dyn VideoEncoder>>, VideoError> {
        let missing = || VideoError::Missing { reason: format!("no library for {codec}") };
        Ok(match codec {
            VideoCodec::Mjpeg => None,
            VideoCodec::Vp8 => {
                let vpx = self.vpx.as_ref().ok_or_else(missing)?;
                Some(Box::new(Encoder::new(vp8::encoder(vpx, size, rate)?)))
            }
            VideoCodec::H264 => {
                let openh264 = self.openh264.as_ref().ok_or_else(missing)?;
                Some(Box::new(Encoder::new(h264::encoder(openh264, size, rate)?)))
            }
        })
    }
}

#[cfg(test)]
mod bench;
#[cfg(test)]
mod tests;
