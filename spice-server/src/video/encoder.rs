//! What all encoders have in common that code differences to the frame before: conversion, the rate,
//! the time.

use std::time::Duration;

use super::{I420, Matrix, Picture, VideoEncoder, VideoError};

/// Change of the rate worth telling the library.
const RATE_STEP: f64 = 0.05;
/// Bounds of the bits per second a library is told.
const RATES: (f64, f64) = (5e4, 2e8);

/// An encoder of a library.
pub(super) trait Coder: Send {
    /// Bits and frames per second from now on.
    fn set_rate(&mut self, bits: f64, frames: f64) -> Result<(), VideoError>;

    /// Pictures of this even size from now on, none larger than the first; the next one is whole.
    fn set_size(&mut self, size: (u32, u32)) -> Result<(), VideoError>;

    /// Appends a picture that is shown from `time` on for `duration` milliseconds.
    fn code(
        &mut self,
        picture: &I420,
        time: i64,
        duration: u32,
        out: &mut Vec<u8>,
    ) -> Result<(), VideoError>;

    /// How coarse the last frame was, from 0 to 63; `None` where the library does not say.
    fn quantizer(&mut self) -> Option<u32>;
}

/// An encoder for one stream.
pub(super) struct Encoder<C> {
    coder: C,
    picture: I420,
    /// Bits and frames per second it was told.
    rate: (f64, f64),
    /// Time of the last frame, and the clock when it was encoded.
    last: Option<(i64, u32)>,
}

impl<C: Coder> Encoder<C> {
    pub(super) fn new(coder: C) -> Self {
        Self { coder, picture: I420::default(), rate: (0.0, 0.0), last: None }
    }
}

impl<C: Coder> VideoEncoder for Encoder<C> {
    fn encode(&mut self, picture: Picture<'_>, out: &mut Vec<u8>) -> Result<(), VideoError> {
        let matrix = Matrix::of_height(picture.view.size.1);
        self.picture.convert(picture.view, matrix);
        self.coder.set_size(self.picture.size())?;
        let duration = picture.duration.max(Duration::from_millis(1));
        let (bits, frames) = (picture.rate.clamp(RATES.0, RATES.1), 1.0 / duration.as_secs_f64());
        let differs = |new: f64, old: f64| (new - old).abs() > old * RATE_STEP;
        if differs(bits, self.rate.0) || differs(frames, self.rate.1) {
            self.coder.set_rate(bits, frames)?;
            self.rate = (bits, frames);
        }
        let duration = u32::try_from(duration.as_millis()).unwrap_or(1000);
        let time = match self.last {
            // The clock wraps around, and may show the same time twice. After a pause no frame may be
            // larger than others: it would be the reason of the next pause.
            Some((time, clock)) => {
                time + i64::from(picture.clock.wrapping_sub(clock).clamp(1, duration * 5 / 4))
            }
            None => 0,
        };
        self.last = Some((time, picture.clock));
        self.coder.code(&self.picture, time, duration, out)
    }

    fn quantizer(&mut self) -> Option<u32> {
        self.coder.quantizer()
    }
}
