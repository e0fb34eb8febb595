//! A tone, and what is left of it after a journey. Also used by the end-to-end suites.
#![allow(unreachable_pub, reason = "shared")]

use std::f64::consts::TAU;

/// Frames per second.
pub const RATE: usize = 48_000;
/// The tone's frequency: not a whole number of periods in any packet, so that a lost one shows.
pub const TONE: f64 = 431.7;

/// `count` frames of the tone beginning with frame `from`, 10 000 loud on the left.
pub fn tone(from: usize, count: usize) -> Vec<[i16; 2]> {
    (from..from + count)
        .map(|i| {
            let angle = i as f64 * TONE * TAU / RATE as f64;
            [(10_000.0 * angle.sin()) as i16, (5_000.0 * angle.cos()) as i16]
        })
        .collect()
}

/// Amplitude and phase of a tone in overlapping windows of 20 ms.
fn demodulate(samples: &[f64], frequency: f64) -> Vec<(f64, f64)> {
    const WINDOW: usize = 960;
    let starts = (0..samples.len().saturating_sub(WINDOW)).step_by(WINDOW / 4);
    starts
        .map(|start| {
            let (mut re, mut im) = (0.0, 0.0);
            for i in 0..WINDOW {
                let hann = 1.0 - (i as f64 * TAU / WINDOW as f64).cos();
                let angle = (start + i) as f64 * frequency * TAU / RATE as f64;
                re += samples[start + i] * hann * angle.cos();
                im += samples[start + i] * hann * angle.sin();
            }
            ((re * re + im * im).sqrt() * 2.0 / WINDOW as f64, im.atan2(re))
        })
        .collect()
}

/// The longest time without a crackle, in seconds: amplitude within 6 % (Opus varies by 4), and no
/// jump of the phase larger than `jump` (one lost sample is 0.056).
pub fn clean(samples: &[f64], amplitude: f64, jump: f64) -> f64 {
    let windows = demodulate(samples, TONE);
    let (mut longest, mut run, mut last) = (0, 0, None);
    for (loud, phase) in windows {
        let turned = last.map_or(0.0, |last: f64| {
            let turn = (phase - last).rem_euclid(TAU);
            turn.min(TAU - turn)
        });
        last = Some(phase);
        if (loud / amplitude - 1.0).abs() < 0.06 && turned < jump {
            run += 1;
        } else {
            run = 0;
        }
        longest = longest.max(run);
    }
    longest as f64 * 240.0 / RATE as f64
}
