//! What the codecs cost, and what they give for it: time, bytes and PSNR of the film of the benches,
//! decoded by GStreamer.
//!
//!     cargo test --release -p spice-server --lib video::bench -- --ignored --nocapture

use std::{fs, path::Path, process::Command, time::Instant};

use super::*;

#[path = "../../examples/test-picture/picture.rs"]
mod picture;

const FRAMES: u32 = 150;

/// One codec, size and rate; a line of the table.
fn measure(video: &Video, codec: VideoCodec, size: (u32, u32), (rate, fps): (f64, f64)) -> String {
    let mut scene = picture::Scene::new(picture::Mode::Film, size);
    let mut encoder = video.encoder(codec, size, (rate, fps)).unwrap().unwrap();
    let (mut frames, mut times, mut source) = (Vec::new(), Vec::new(), Vec::new());
    for step in 1..=FRAMES {
        scene.next(step);
        let (mut out, mut planes) = (Vec::new(), I420::default());
        planes.convert(View::new(scene.pixels(), size), Matrix::of_height(size.1));
        source.extend_from_slice(planes.planes().0);
        let (duration, clock) =
            (Duration::from_secs_f64(1.0 / fps), f64::from(step) * 1000.0 / fps);
        let start = Instant::now();
        let view = View::new(scene.pixels(), size);
        let picture = Picture { view, clock: clock as u32, duration, rate };
        encoder.encode(picture, &mut out).unwrap();
        times.push(start.elapsed().as_secs_f64() * 1000.0);
        frames.push(out);
    }
    let folder = tempfile::tempdir().unwrap();
    let shown = decode(codec, size, &frames, folder.path());
    let pixels = size.0 as usize * size.1 as usize;
    // Without the first second, in which the rate settles.
    let settled = fps as usize;
    let frame_psnr = |(a, b): (&[u8], &[u8])| {
        let sum: u64 = a.iter().zip(b).map(|(a, b)| u64::from(a.abs_diff(*b)).pow(2)).sum();
        10.0 * (255.0 * 255.0 * pixels as f64 / sum.max(1) as f64).log10()
    };
    let pairs = source.chunks_exact(pixels).zip(shown.chunks_exact(pixels * 3 / 2));
    let pairs = pairs.map(|(a, b)| (a, &b[..pixels]));
    let psnr: Vec<f64> = pairs.map(frame_psnr).collect();
    assert_eq!(psnr.len(), frames.len(), "a frame is missing");
    let psnr = &psnr[settled..];
    let (first, rest) = frames.split_first().unwrap();
    let settled_bytes: usize = rest[settled..].iter().map(Vec::len).sum();
    let mbit = settled_bytes as f64 * 8e-6 * fps / (rest.len() - settled) as f64;
    let largest = rest.iter().map(Vec::len).max().unwrap_or(0);
    times.sort_by(f64::total_cmp);
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let lowest = psnr.iter().copied().fold(f64::INFINITY, f64::min);
    format!(
        "{codec:<5} {}x{} {fps:>2} fps, {:.2} Mbit/s: {mbit:.2} Mbit/s, luma {:.2} dB (worst \
         {lowest:.2}), {:.1} ms p50, {:.1} p95, first {} KB, largest other {} KB, wanted {} KB",
        size.0,
        size.1,
        rate / 1e6,
        mean(psnr),
        times[times.len() / 2],
        times[times.len() * 95 / 100],
        first.len() / 1024,
        largest / 1024,
        (rate / fps / 8192.0) as u32,
    )
}

/// The frames as GStreamer decodes them: planes of I420.
fn decode(codec: VideoCodec, size: (u32, u32), frames: &[Vec<u8>], folder: &Path) -> Vec<u8> {
    let (stream, shown) = (folder.join("stream"), folder.join("shown"));
    let mut bytes = Vec::new();
    let decoder = match codec {
        VideoCodec::H264 => {
            bytes.extend(frames.iter().flatten());
            "h264parse ! openh264dec"
        }
        _ => {
            // IVF: a header of 32 bytes, then each frame with its size and time.
            bytes.extend(b"DKIF\0\0\x20\0VP80");
            bytes.extend((size.0 as u16).to_le_bytes());
            bytes.extend((size.1 as u16).to_le_bytes());
            bytes.extend([30u32, 1, frames.len() as u32, 0].map(u32::to_le_bytes).concat());
            for (number, frame) in frames.iter().enumerate() {
                bytes.extend((frame.len() as u32).to_le_bytes());
                bytes.extend((number as u64).to_le_bytes());
                bytes.extend(frame);
            }
            "ivfparse ! vp8dec"
        }
    };
    fs::write(&stream, bytes).unwrap();
    let pipeline = format!(
        "filesrc location={} ! {decoder} ! video/x-raw,format=I420 ! filesink location={}",
        stream.display(),
        shown.display()
    );
    let mut command = Command::new("gst-launch-1.0");
    assert!(command.arg("-q").args(pipeline.split(' ')).status().unwrap().success());
    fs::read(shown).unwrap()
}

#[test]
#[ignore = "a bench: minutes"]
fn codecs() {
    let video = Video::load(VideoCodecs::Auto).unwrap();
    let hd = (1920, 1080);
    for (size, fps, rates) in [
        ((1280, 720), 30.0, [1e6, 2e6, 4e6, 8e6]),
        (hd, 30.0, [2e6, 4e6, 7e6, 14e6]),
        (hd, 60.0, [2e6, 4e6, 7e6, 14e6]),
    ] {
        for rate in rates {
            for codec in Video::PREDICTIVE {
                eprintln!("{}", measure(&video, codec, size, (rate, fps)));
            }
        }
    }
}
