//! Conversion, and encoders with the libraries that are there.

use super::*;

/// Every byte different from its neighbours, in smooth ramps.
fn ramps((width, height): (u32, u32), step: u32) -> Vec<u8> {
    let pixel = |at: u32| {
        let (x, y) = (at % width + step * 3, at / width + step);
        [(x / 2) as u8, (y / 2 + x / 5) as u8, (x / 3 + y) as u8, 0xff]
    };
    (0..width * height).flat_map(pixel).collect()
}

#[test]
fn conversion_is_that_of_the_standards() {
    // Red, green and blue factors of luma.
    for (matrix, kr, kb) in [(Matrix::Bt601, 0.299, 0.114), (Matrix::Bt709, 0.2126, 0.0722)] {
        // Of odd size, the last row and column of which are left out, in a larger picture.
        let (size, all) = ((67u32, 35u32), (80, 36));
        let picture_of_all = ramps(all, 7);
        let mut picture = I420::default();
        let view = View { pixels: &picture_of_all, stride: all.0 as usize * 4, size };
        assert!(view.rows().eq(picture_of_all.chunks(320).take(35).map(|row| &row[..268])));
        let pixels = view.without_padding();
        picture.convert(view, matrix);
        assert_eq!(picture.size(), (66, 34));
        let (luma, u, v) = picture.planes();
        let rgb = |x: u32, y: u32| {
            let at = ((y * size.0 + x) * 4) as usize;
            [2, 1, 0].map(|channel| f64::from(pixels[at + channel]))
        };
        let to_luma = |[r, g, b]: [f64; 3]| r * kr + g * (1.0 - kr - kb) + b * kb;
        for y in 0..34u32 {
            for x in 0..66u32 {
                let wanted = 16.0 + to_luma(rgb(x, y)) * 219.0 / 255.0;
                let got = f64::from(luma[(y * 66 + x) as usize]);
                assert!((got - wanted).abs() < 2.0, "{matrix:?} {x},{y}: {got}, not {wanted}");
            }
        }
        for y in 0..17u32 {
            for x in 0..33u32 {
                let four = [(0, 0), (1, 0), (0, 1), (1, 1)].map(|(i, j)| rgb(x * 2 + i, y * 2 + j));
                let mean =
                    [0, 1, 2].map(|at| four.iter().map(|pixel| pixel[at]).sum::<f64>() / 4.0);
                let luma = to_luma(mean);
                let at = (y * 33 + x) as usize;
                for (got, colour, k) in [(u[at], mean[2], kb), (v[at], mean[0], kr)] {
                    let wanted = 128.0 + (colour - luma) / (2.0 - 2.0 * k) * 224.0 / 255.0;
                    let got = f64::from(got);
                    assert!((got - wanted).abs() < 2.0, "{matrix:?} {x},{y}: {got}, not {wanted}");
                }
            }
        }
    }
}

#[test]
fn tiny_pictures_are_no_pictures() {
    let mut picture = I420::default();
    for size in [(0, 0), (1, 1), (1, 9), (9, 1)] {
        let pixels = ramps((size.0.max(1), size.1.max(1)), 0);
        picture.convert(View::new(&pixels, size), Matrix::Bt601);
        assert_eq!(picture.bytes().len(), 0, "{size:?}");
    }
}

/// Frames of a film with a rate, one after the other.
fn encode(codec: VideoCodec, size: (u32, u32), rate: f64) -> Option<Vec<Vec<u8>>> {
    let video = match Video::load(VideoCodecs::Prefer(codec)) {
        Ok(video) => video,
        Err(error) => {
            eprintln!("SKIPPED: {error}");
            return None;
        }
    };
    assert_eq!(video.codecs(), [codec, VideoCodec::Mjpeg]);
    let mut encoder = video.encoder(codec, size, (rate, 30.0)).unwrap().unwrap();
    // The clock wraps around on the way.
    let frame = |step: u32| {
        let mut pixels = ramps(size, step);
        let mut state = step.wrapping_mul(0x9e37_79b9) | 1;
        for byte in &mut pixels {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            *byte ^= (state >> 28) as u8;
        }
        let mut out = Vec::new();
        let picture = Picture {
            view: View::new(&pixels, size),
            clock: (u32::MAX - 500).wrapping_add(step * 33),
            duration: Duration::from_millis(33),
            rate,
        };
        encoder.encode(picture, &mut out).unwrap();
        out
    };
    Some((0..60).map(frame).collect())
}

/// Films in a thin and a thick rate, whose frames have to be in them.
fn in_two_rates(codec: VideoCodec, size: (u32, u32)) -> Option<[Vec<Vec<u8>>; 2]> {
    let films = [encode(codec, size, 5e5)?, encode(codec, size, 3e6)?];
    let [thin, thick] = films.each_ref().map(|frames| {
        assert!(frames.iter().all(|frame| !frame.is_empty()));
        let bytes: usize = frames[30..].iter().map(Vec::len).sum();
        bytes as f64 * 8.0 / (30.0 * 0.033)
    });
    assert!((2e5..7e5).contains(&thin), "{thin}");
    assert!((1.5e6..4e6).contains(&thick), "{thick}");
    Some(films)
}

/// The kinds of the units of an H.264 byte stream (Rec. ITU-T H.264 7.3.1 and B.1).
fn units(stream: &[u8]) -> Vec<u8> {
    let starts = stream.windows(4).filter(|four| four.starts_with(&[0, 0, 1]));
    starts.map(|four| four[3] & 31).collect()
}
const SLICE: u8 = 1;
const IDR: u8 = 5;
const SEI: u8 = 6;
const SPS: u8 = 7;
const PPS: u8 = 8;
const DELIMITER: u8 = 9;

#[test]
fn h264_keeps_to_its_rate_and_begins_with_its_only_idr_frame() {
    let films = in_two_rates(VideoCodec::H264, (640, 360)).into_iter().flatten();
    // Main, where bits are few; else Constrained Baseline, which all decoders show at once.
    for (frames, profile) in films.zip([77, 66]) {
        assert_eq!(frames[0][..4], [0, 0, 0, 1], "a byte stream");
        // The begin of the next access unit tells the client that this one is whole.
        assert_eq!(units(&frames[0]), [SPS, PPS, IDR, DELIMITER, SEI]);
        // `profile_idc` and `constraint_set1_flag`.
        assert_eq!((frames[0][5], frames[0][6] & 0x40), (profile, 0x40));
        for frame in &frames[1..] {
            assert_eq!(units(frame), [SLICE, DELIMITER, SEI], "one slice each");
        }
    }
}

#[test]
fn a_line_without_a_limit_is_generous_to_films_of_all_sizes() {
    for size in [(640, 360), (1920, 1080), (3840, 2160), (4096, 2304)] {
        assert!(is_generous(size, full_rate(size)), "{size:?}");
        assert!(!is_generous(size, full_rate(size) / 4.0), "{size:?}");
    }
}

#[test]
fn vp8_keeps_to_its_rate_and_begins_with_a_key_frame() {
    for frames in in_two_rates(VideoCodec::Vp8, (640, 360)).into_iter().flatten() {
        // RFC 6386 9.1: the lowest bit is 0 in key frames; start code, width and height follow.
        assert_eq!(frames[0][0] & 1, 0);
        assert_eq!(frames[0][3..10], [0x9d, 0x01, 0x2a, 0x80, 0x02, 0x68, 0x01]);
        assert!(frames[1..].iter().all(|frame| frame[0] & 1 == 1), "one key frame");
    }
}

#[test]
fn smaller_pictures_are_taken_and_larger_ones_are_refused() {
    for codec in Video::PREDICTIVE {
        let Ok(video) = Video::load(VideoCodecs::Prefer(codec)) else { continue };
        let mut encoder = video.encoder(codec, (64, 64), (1e6, 30.0)).unwrap().unwrap();
        let mut encode = |size: (u32, u32)| {
            let mut out = Vec::new();
            let duration = Duration::from_millis(33);
            let pixels = ramps(size, 0);
            let view = View::new(&pixels, size);
            let picture = Picture { view, clock: 0, duration, rate: 1e6 };
            encoder.encode(picture, &mut out)?;
            assert!(encoder.quantizer().is_none_or(|quantizer| quantizer < 64));
            Ok(out)
        };
        for size in [(0, 0), (1, 1), (64, 66), (66, 64), (640, 480)] {
            assert_eq!(encode(size), Err(VideoError::Size), "{codec} {size:?}");
        }
        // Smaller ones are taken, and begin with a whole frame of their size; so does what follows.
        let is_whole = |frame: &[u8]| match codec {
            VideoCodec::H264 => units(frame).contains(&IDR),
            _ => frame[0] & 1 == 0,
        };
        for size in [(64, 64), (32, 32), (64, 64)] {
            let frame = encode(size).unwrap();
            assert!(is_whole(&frame), "{codec} {size:?}");
            if codec == VideoCodec::Vp8 {
                assert_eq!((frame[6], frame[8]), (size.0 as u8, size.1 as u8));
            }
            assert!(!is_whole(&encode(size).unwrap()), "{codec} {size:?}");
        }
        assert!(video.encoder(codec, (20_000, 20_000), (1e6, 30.0)).is_err());
    }
}

#[test]
fn nothing_is_tried_with_a_codec_that_is_too_large_for_it() {
    let takes = |codec: VideoCodec, width, height| codec.takes(Rect::new(0, 0, width, height));
    assert!(takes(VideoCodec::H264, 4096, 2304) && !takes(VideoCodec::H264, 4096, 2306));
    assert!(takes(VideoCodec::Vp8, 5120, 2880) && takes(VideoCodec::Mjpeg, 5120, 2880));
    let video = Video::load(VideoCodecs::Auto).unwrap();
    if video.codecs().contains(&VideoCodec::H264) {
        assert!(video.encoder(VideoCodec::H264, (4096, 2304), (1e6, 30.0)).is_ok());
        assert!(video.encoder(VideoCodec::H264, (4096, 2306), (1e6, 30.0)).is_err());
    }
}

#[test]
fn a_library_may_be_missing_unless_it_was_asked_for() {
    use VideoCodec::{H264, Mjpeg, Vp8};
    // Where only some are installed.
    let load = |wanted, there: &[VideoCodec]| {
        Video::load_by(wanted, |_, codec| match there.contains(&codec) {
            true => Ok("1.0".to_owned()),
            false => Err(VideoError::Missing { reason: "no such file".to_owned() }),
        })
    };
    for (there, codecs) in [
        (&[Vp8, H264][..], &[Vp8, H264, Mjpeg][..]),
        (&[Vp8], &[Vp8, Mjpeg]),
        (&[H264], &[H264, Mjpeg]),
        (&[], &[Mjpeg]),
    ] {
        assert_eq!(load(VideoCodecs::Auto, there).unwrap().codecs(), codecs);
    }
    let Err(error) = load(VideoCodecs::Prefer(H264), &[Vp8]) else { panic!("what was loaded?") };
    let text = error.to_string();
    assert!(text.contains("h264") && text.contains("libopenh264-7"), "{text}");
}

#[test]
fn names() {
    for codec in VideoCodec::ALL {
        assert_eq!(codec.name().parse(), Ok(VideoCodecs::Prefer(codec)));
    }
    assert_eq!("auto".parse(), Ok(VideoCodecs::Auto));
    assert_eq!("off".parse(), Ok(VideoCodecs::Off));
    assert_eq!("vp9".parse::<VideoCodecs>(), Err(UnknownVideoCodec));
    let known = UnknownVideoCodec.to_string();
    assert!(VideoCodec::ALL.iter().all(|codec| known.contains(codec.name())), "{known}");
    assert_eq!(Video::load(VideoCodecs::Off).unwrap().codecs(), []);
}
