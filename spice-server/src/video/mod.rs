//! Video encoders for streams of films.
//!
//! MJPEG is built in. VP8 comes from libvpx, which is loaded when a server starts, if it is there.

mod convert;
mod sys;
mod vp8;

pub(crate) use convert::I420;

use std::{fmt, str::FromStr, time::Duration};

use crate::Error;

/// A codec of video streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum VideoCodec {
    /// Motion JPEG: always there, every client knows it.
    Mjpeg,
    /// VP8 by libvpx, if that library is installed.
    Vp8,
}

impl VideoCodec {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Mjpeg, Self::Vp8];

    /// Its name in options and counters.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mjpeg => "mjpeg",
            Self::Vp8 => "vp8",
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
        Ok(match text {
            "auto" => Self::Auto,
            "mjpeg" => Self::Prefer(VideoCodec::Mjpeg),
            "vp8" => Self::Prefer(VideoCodec::Vp8),
            "off" => Self::Off,
            _ => return Err(UnknownVideoCodec),
        })
    }
}

/// A text that names no [`VideoCodecs`].
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("auto, mjpeg, vp8 and off are known")]
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

/// A frame to be encoded.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Picture<'a> {
    /// XRGB8888 pixels without padding.
    pub(crate) pixels: &'a [u8],
    pub(crate) size: (u32, u32),
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

/// The codecs a server has.
#[derive(Default)]
pub(crate) struct Video {
    codecs: Vec<VideoCodec>,
    vpx: Option<sys::Vpx>,
}

impl Video {
    /// Loads what is wanted. A library that nobody asked for may be missing.
    pub(crate) fn load(wanted: VideoCodecs) -> Result<Self, Error> {
        let mut video = Self::default();
        if wanted == VideoCodecs::Off {
            return Ok(video);
        }
        let vp8 = VideoCodec::Vp8;
        if matches!(wanted, VideoCodecs::Auto) || wanted == VideoCodecs::Prefer(vp8) {
            match sys::Vpx::load() {
                Ok(vpx) => {
                    tracing::debug!("VP8 streams by libvpx {}", vpx.version());
                    video.vpx = Some(vpx);
                    video.codecs.push(vp8);
                }
                Err(source) if wanted == VideoCodecs::Prefer(vp8) => {
                    return Err(Error::Video { codec: vp8, source });
                }
                Err(error) => {
                    tracing::info!(%error, "no libvpx: video streams are MJPEG, not VP8");
                }
            }
        }
        video.codecs.push(VideoCodec::Mjpeg);
        Ok(video)
    }

    /// Those there are, the best one first.
    pub(crate) fn codecs(&self) -> &[VideoCodec] {
        &self.codecs
    }

    /// An encoder for pictures of this even size, so many per second; `None` for MJPEG, whose frames
    /// do not build on one another.
    pub(crate) fn encoder(
        &self,
        codec: VideoCodec,
        size: (u32, u32),
        fps: f64,
    ) -> Result<Option<Box<dyn VideoEncoder>>, VideoError> {
        Ok(match (codec, &self.vpx) {
            (VideoCodec::Mjpeg, _) => None,
            (VideoCodec::Vp8, Some(vpx)) => Some(Box::new(vp8::Vp8::new(vpx, size, fps)?)),
            (VideoCodec::Vp8, None) => {
                return Err(VideoError::Missing { reason: "libvpx is not loaded".to_owned() });
            }
        })
    }
}

#[cfg(test)]
mod tests;
