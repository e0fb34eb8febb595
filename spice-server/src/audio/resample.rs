//! A change of sample rate by any ratio, which may change while it runs: the bridge between two
//! clocks. Windowed sinc with a table of phases (J. O. Smith, "Digital Audio Resampling").

use std::{collections::VecDeque, f64::consts::PI};

/// A stereo frame.
pub(crate) type Frame = [i16; 2];

/// Taps on each side of a place, at rates that do not fall.
const HALF: usize = 16;
/// Phases in the table; between two of them it is interpolated.
const PHASES: usize = 128;
/// The pass band ends at this share of the lower rate's half.
const CUTOFF: f64 = 0.94;

/// Takes frames in at one rate and gives them out at another.
#[derive(Debug)]
pub(crate) struct Resampler {
    /// The filter: for each phase the weights of `2 * half` frames.
    table: Box<[f32]>,
    half: usize,
    /// Input frames, the oldest first; there are always `half` ones before the place.
    input: VecDeque<Frame>,
    /// The place of the next output frame, counted from the first frame of `input`.
    place: f64,
    /// Input frames for each output frame.
    nominal: f64,
    step: f64,
}

impl Resampler {
    /// From `from` frames per second to `to`.
    pub(crate) fn new(from: u32, to: u32) -> Self {
        let nominal = f64::from(from) / f64::from(to.max(1));
        let stretch = nominal.max(1.0);
        let half = (HALF as f64 * stretch).ceil() as usize;
        let cutoff = CUTOFF / stretch;
        let mut table = Vec::with_capacity((PHASES + 1) * 2 * half);
        for phase in 0..=PHASES {
            let fraction = phase as f64 / PHASES as f64;
            let start = table.len();
            for tap in 0..2 * half {
                // Distance from the place, which lies between taps half - 1 and half.
                let x = tap as f64 - (half - 1) as f64 - fraction;
                let sinc =
                    if x.abs() < 1e-9 { 1.0 } else { (PI * cutoff * x).sin() / (PI * cutoff * x) };
                let t = (x / half as f64).clamp(-1.0, 1.0);
                // Blackman.
                let window = 0.42 + 0.5 * (PI * t).cos() + 0.08 * (2.0 * PI * t).cos();
                table.push((cutoff * sinc * window) as f32);
            }
            // What goes in at full height comes out at full height.
            let weights = table.get_mut(start..).unwrap_or_default();
            let sum: f32 = weights.iter().sum();
            weights.iter_mut().for_each(|weight| *weight /= sum);
        }
        let mut resampler = Self {
            table: table.into(),
            half,
            input: VecDeque::new(),
            place: 0.0,
            nominal,
            step: nominal,
        };
        resampler.clear();
        resampler
    }

    /// Forgets all input.
    pub(crate) fn clear(&mut self) {
        self.input.clear();
        self.input.extend(std::iter::repeat_n([0, 0], self.half));
        self.place = self.half as f64;
        self.step = self.nominal;
    }

    /// Reads the input faster by this share (or slower, if it is negative).
    pub(crate) fn set_correction(&mut self, share: f64) {
        self.step = self.nominal * (1.0 + share);
    }

    pub(crate) fn push(&mut self, frames: impl IntoIterator<Item = Frame>) {
        self.input.extend(frames);
    }

    /// Input frames that have not been used.
    pub(crate) fn waiting(&self) -> usize {
        self.input.len().saturating_sub(self.place as usize)
    }

    /// Drops the oldest `count` of the waiting frames.
    pub(crate) fn skip(&mut self, count: usize) {
        self.place += count.min(self.waiting()) as f64;
        self.forget();
    }

    /// Fills `out` as far as there is input, and tells how far.
    pub(crate) fn pull(&mut self, out: &mut [Frame]) -> usize {
        let mut filled = 0;
        for frame in out {
            let index = self.place as usize;
            if index + self.half >= self.input.len() {
                break;
            }
            *frame = self.at(index, self.place - index as f64);
            self.place += self.step;
            filled += 1;
        }
        self.forget();
        filled
    }

    fn at(&self, index: usize, fraction: f64) -> Frame {
        let width = 2 * self.half;
        let phase = fraction * PHASES as f64;
        let row = phase as usize;
        let mix = (phase - row as f64) as f32;
        let (Some(low), Some(high)) = (
            self.table.get(row * width..(row + 1) * width),
            self.table.get((row + 1) * width..(row + 2) * width),
        ) else {
            return [0, 0];
        };
        let first = (index + 1).saturating_sub(self.half);
        let mut sum = [0f32; 2];
        for ((low, high), frame) in low.iter().zip(high).zip(self.input.range(first..)) {
            let weight = low + (high - low) * mix;
            sum[0] += weight * f32::from(frame[0]);
            sum[1] += weight * f32::from(frame[1]);
        }
        // `as` saturates.
        sum.map(|value| value.round() as i16)
    }

    fn forget(&mut self) {
        let old = (self.place as usize).saturating_sub(self.half).min(self.input.len());
        self.input.drain(..old);
        self.place -= old as f64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sine(rate: u32, frequency: f64, count: usize) -> Vec<Frame> {
        (0..count)
            .map(|i| {
                let angle = 2.0 * PI * frequency * i as f64 / f64::from(rate);
                [(10_000.0 * angle.sin()) as i16, (10_000.0 * angle.cos()) as i16]
            })
            .collect()
    }

    /// Ratio of a sine to everything else in `frames`, in decibels.
    fn purity(frames: &[Frame], rate: u32, frequency: f64) -> f64 {
        let (mut re, mut im, mut all) = (0.0, 0.0, 0.0);
        for (i, frame) in frames.iter().enumerate() {
            let angle = 2.0 * PI * frequency * i as f64 / f64::from(rate);
            let value = f64::from(frame[0]);
            re += value * angle.cos();
            im += value * angle.sin();
            all += value * value;
        }
        let tone = 2.0 * (re * re + im * im) / frames.len() as f64;
        10.0 * (tone / (all - tone).max(1e-9)).log10()
    }

    #[test]
    fn a_sine_stays_one_at_any_ratio() {
        for (from, to) in [(44_100, 48_000), (8_000, 48_000), (48_000, 44_100), (48_000, 16_000)] {
            let mut resampler = Resampler::new(from, to);
            let mut out = Vec::new();
            for part in sine(from, 1000.0, from as usize).chunks(377) {
                resampler.push(part.iter().copied());
                let mut piece = [[0; 2]; 4096];
                let count = resampler.pull(&mut piece);
                out.extend_from_slice(&piece[..count]);
            }
            assert!(out.len().abs_diff(to as usize) < 400, "{} of {to}", out.len());
            // A whole number of periods, past the start.
            let middle = &out[to as usize / 10..][..to as usize / 2];
            let purity = purity(middle, to, 1000.0);
            assert!(purity > 65.0, "{from} to {to}: {purity} dB");
        }
    }

    #[test]
    fn what_the_lower_rate_cannot_have_is_gone() {
        let mut resampler = Resampler::new(48_000, 16_000);
        resampler.push(sine(48_000, 12_000.0, 48_000));
        let mut out = vec![[0; 2]; 16_000];
        let count = resampler.pull(&mut out);
        let loudest = out[1000..count].iter().map(|frame| frame[0].unsigned_abs()).max();
        assert!(loudest.unwrap() < 100, "{loudest:?}");
    }

    #[test]
    fn corrections_change_how_much_is_used() {
        let mut resampler = Resampler::new(48_000, 48_000);
        resampler.push(std::iter::repeat_n([1000, -1000], 48_000));
        resampler.set_correction(0.005);
        let before = resampler.waiting();
        let mut out = vec![[0; 2]; 20_000];
        assert_eq!(resampler.pull(&mut out), 20_000);
        assert!((before - resampler.waiting()).abs_diff(20_100) <= 1);
        assert_eq!(out[10_000], [1000, -1000], "a constant stays one");
        resampler.skip(1_000_000);
        assert_eq!(resampler.waiting(), 0);
        assert_eq!(resampler.pull(&mut out), 0);
    }
}
