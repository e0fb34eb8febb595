//! An EDID for a virtual monitor of any size (VESA E-EDID A2 = 1.4; DisplayID 1.3 for modes that
//! do not fit into EDID's detailed timing).
//!
//! Guests take three things from it: the preferred mode, the physical size (hence the scale
//! factor), and an identity under which desktops remember settings.

use alloc::{format, vec::Vec};

/// What the monitor looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Monitor {
    /// Preferred width in pixels, 1 to 16384.
    pub width: u32,
    /// Preferred height in pixels, 1 to 16384.
    pub height: u32,
    /// Physical width in millimetres; 0: as if at 96 dpi.
    pub width_mm: u32,
    /// Physical height in millimetres; 0: as if at 96 dpi.
    pub height_mm: u32,
    /// Refresh rate in Hz.
    pub refresh: u32,
    /// Tells the monitors of one machine apart, from 0.
    pub index: u32,
}

impl Monitor {
    /// A monitor at 60 Hz and 96 dpi.
    pub fn new(index: u32, width: u32, height: u32) -> Self {
        Self { width, height, width_mm: 0, height_mm: 0, refresh: 60, index }
    }
}

const BLOCK: usize = 128;

/// Largest active size and clock in EDID's detailed timing: 12 bits, and 16 bits of 10 kHz.
const MAX_DTD_PIXELS: u32 = 4095;
const MAX_DTD_CLOCK: u64 = 65_535;

/// What is in the base block's detailed timing where the real mode does not fit there.
const FALLBACK: (u32, u32) = (1920, 1080);

/// Makes the EDID: 128 bytes, or 256 where the mode needs DisplayID.
pub fn generate(monitor: &Monitor) -> Vec<u8> {
    let width = monitor.width.clamp(1, 16_384);
    let height = monitor.height.clamp(1, 16_384);
    let refresh = monitor.refresh.clamp(1, 240);
    let mm = |given: u32, pixels: u32| match given {
        // Decoders take less than 10 cm for a mistake.
        0 => (pixels * 254).div_ceil(960).max(100),
        given => given,
    };
    let size_mm = (mm(monitor.width_mm, width), mm(monitor.height_mm, height));
    let timing = Timing::reduced_blanking(width, height, refresh);
    let fits = timing.clock <= MAX_DTD_CLOCK && width.max(height) <= MAX_DTD_PIXELS;
    let base_timing = match fits {
        true => timing,
        false => Timing::reduced_blanking(FALLBACK.0, FALLBACK.1, 60),
    };
    let mut edid = base_block(monitor.index, size_mm, &base_timing, !fits);
    if !fits {
        edid.extend_from_slice(&display_id_block(monitor.index, &timing));
    }
    edid
}

/// A mode, with VESA CVT 1.2 reduced blanking.
#[derive(Debug, Clone, Copy)]
struct Timing {
    /// Pixel clock in units of 10 kHz.
    clock: u64,
    width: u32,
    height: u32,
    v_blank: u32,
    v_sync: u32,
}

impl Timing {
    const H_BLANK: u32 = 160;
    const H_FRONT: u32 = 48;
    const H_SYNC: u32 = 32;
    const V_FRONT: u32 = 3;
    const MIN_V_BACK: u32 = 6;

    fn reduced_blanking(width: u32, height: u32, refresh: u32) -> Self {
        let is = |w: u64, h: u64| u64::from(width) * h == u64::from(height) * w;
        let v_sync = match () {
            () if is(4, 3) => 4,
            () if is(16, 9) => 5,
            () if is(16, 10) => 6,
            () if is(5, 4) || is(15, 9) => 7,
            () => 10,
        };
        // Nanoseconds per line if all of the frame but 460 µs is picture.
        let line = ((1_000_000_000 / u64::from(refresh)).saturating_sub(460_000)
            / u64::from(height))
        .max(1);
        let blank_lines = u32::try_from(460_000 / line).unwrap_or(u32::MAX).saturating_add(1);
        // Decoders take a clock below 10 MHz for a mistake, so tiny pictures get a long pause.
        let least = (10_250_000_u32.div_ceil(refresh * (width + Self::H_BLANK)))
            .saturating_sub(height)
            .max(Self::V_FRONT + v_sync + Self::MIN_V_BACK);
        let v_blank = blank_lines.max(least).min(4095);
        let total = u64::from(width + Self::H_BLANK) * u64::from(height + v_blank);
        // CVT rounds the clock down to 250 kHz.
        let clock = (total * u64::from(refresh) / 250_000 * 25).max(25);
        Self { clock, width, height, v_blank, v_sync }
    }
}

fn base_block(index: u32, size_mm: (u32, u32), timing: &Timing, extension: bool) -> Vec<u8> {
    let mut b = Vec::with_capacity(2 * BLOCK);
    b.extend_from_slice(&[0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0]);
    b.extend_from_slice(&manufacturer(*b"DRG"));
    b.extend_from_slice(&1_u16.to_le_bytes()); // product code
    b.extend_from_slice(&index.saturating_add(1).to_le_bytes()); // serial number
    b.extend_from_slice(&[1, 2026_u16.wrapping_sub(1990) as u8, 1, 4]); // week, year, EDID 1.4
    b.push(0b1010_0101); // digital, 8 bits per colour, DisplayPort
    // Centimetres; a monitor beyond 2.55 m has no size here and only one in the timing.
    match (round_cm(size_mm.0), round_cm(size_mm.1)) {
        (Some(w), Some(h)) => b.extend_from_slice(&[w, h]),
        _ => b.extend_from_slice(&[0, 0]),
    }
    b.push(120); // gamma 2.2
    b.push(0b0000_0110); // RGB 4:4:4 only; sRGB is the default; the first timing is native
    b.extend_from_slice(&[0xee, 0x91, 0xa3, 0x54, 0x4c, 0x99, 0x26, 0x0f, 0x50, 0x54]); // sRGB
    b.extend_from_slice(&[0x21, 0x08, 0x00]); // 640x480, 800x600 and 1024x768 at 60 Hz
    for (width, aspect) in STANDARD_TIMINGS {
        b.extend_from_slice(&[(width / 8 - 31) as u8, aspect << 6]);
    }
    detailed_timing(&mut b, timing, size_mm);
    text_descriptor(&mut b, 0xfc, "drago-vmm");
    text_descriptor(&mut b, 0xff, &format!("{}", index.saturating_add(1)));
    b.extend_from_slice(&[0, 0, 0, 0x10]); // an unused descriptor
    b.resize(126, 0);
    b.push(u8::from(extension));
    b.push(checksum(&b));
    b
}

/// Widths with their aspect ratio code, all at 60 Hz.
const STANDARD_TIMINGS: [(u32, u8); 8] = [
    (1280, WIDE_16_9),
    (1280, WIDE_16_10),
    (1280, TALL_5_4),
    (1440, WIDE_16_10),
    (1600, WIDE_16_9),
    (1680, WIDE_16_10),
    (1920, WIDE_16_9),
    (1920, WIDE_16_10),
];
const WIDE_16_10: u8 = 0;
const TALL_5_4: u8 = 2;
const WIDE_16_9: u8 = 3;

/// Three letters of five bits each, big-endian.
fn manufacturer(letters: [u8; 3]) -> [u8; 2] {
    let packed = letters.iter().fold(0_u16, |all, letter| (all << 5) | u16::from(letter - b'@'));
    packed.to_be_bytes()
}

fn round_cm(mm: u32) -> Option<u8> {
    u8::try_from(mm.saturating_add(5) / 10).ok().map(|cm| cm.max(1))
}

fn detailed_timing(b: &mut Vec<u8>, t: &Timing, size_mm: (u32, u32)) {
    let low = |value: u32| value as u8;
    // The upper four of twelve bits of two values, side by side.
    let high = |a: u32, b: u32| ((a >> 8 & 0xf) << 4 | (b >> 8 & 0xf)) as u8;
    let (h_mm, v_mm) = (size_mm.0.min(4095), size_mm.1.min(4095));
    b.extend_from_slice(&(t.clock as u16).to_le_bytes());
    b.extend_from_slice(&[low(t.width), low(Timing::H_BLANK), high(t.width, Timing::H_BLANK)]);
    b.extend_from_slice(&[low(t.height), low(t.v_blank), high(t.height, t.v_blank)]);
    b.extend_from_slice(&[
        low(Timing::H_FRONT),
        low(Timing::H_SYNC),
        ((Timing::V_FRONT & 0xf) << 4 | (t.v_sync & 0xf)) as u8,
        0, // upper bits of the four values above
    ]);
    b.extend_from_slice(&[low(h_mm), low(v_mm), high(h_mm, v_mm)]);
    b.extend_from_slice(&[0, 0]); // no border
    b.push(0b0001_1010); // digital separate sync, vertical negative, horizontal positive
}

fn text_descriptor(b: &mut Vec<u8>, tag: u8, text: &str) {
    b.extend_from_slice(&[0, 0, 0, tag, 0]);
    let end = b.len() + 13;
    b.extend(text.bytes().take(13));
    if b.len() < end {
        b.push(b'\n');
    }
    b.resize(end, b' ');
}

fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)).wrapping_neg()
}

/// An EDID extension block that holds one DisplayID section with one Type I timing.
fn display_id_block(index: u32, t: &Timing) -> [u8; BLOCK] {
    const IDENTITY: u8 = 12;
    const TIMING: u8 = 20;
    let mut b = Vec::with_capacity(BLOCK);
    b.push(0x70);
    let section = b.len();
    b.extend_from_slice(&[0x13, 3 + IDENTITY + 3 + TIMING, 0x01, 0]); // 1.3, no kind of product
    b.extend_from_slice(&[0x00, 0x00, IDENTITY]); // product identification block
    b.extend_from_slice(b"DRG");
    b.extend_from_slice(&1_u16.to_le_bytes());
    b.extend_from_slice(&index.saturating_add(1).to_le_bytes());
    b.extend_from_slice(&[1, 26, 0]); // week, year, no name
    b.extend_from_slice(&[0x03, 0x00, TIMING]); // Type I timing block
    let clock = (t.clock - 1).min(0xff_ffff) as u32;
    b.extend_from_slice(&clock.to_le_bytes()[..3]);
    b.push(0b1000_1000); // preferred; aspect ratio not in the list
    let less_one = |value: u32| ((value - 1) as u16).to_le_bytes();
    b.extend_from_slice(&less_one(t.width));
    b.extend_from_slice(&less_one(Timing::H_BLANK));
    b.extend_from_slice(&((Timing::H_FRONT as u16 - 1) | 0x8000).to_le_bytes()); // positive sync
    b.extend_from_slice(&less_one(Timing::H_SYNC));
    b.extend_from_slice(&less_one(t.height));
    b.extend_from_slice(&less_one(t.v_blank));
    b.extend_from_slice(&less_one(Timing::V_FRONT));
    b.extend_from_slice(&less_one(t.v_sync));
    b.push(checksum(&b[section..]));
    b.resize(BLOCK - 1, 0);
    b.push(checksum(&b));
    let mut block = [0; BLOCK];
    block.copy_from_slice(&b);
    block
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write,
        process::{Command, Stdio},
        string::String,
    };

    use super::*;

    const SIZES: [(u32, u32); 12] = [
        (1280, 800),
        (1920, 1080),
        (1366, 768),
        (641, 479),
        (64, 64),
        (1, 1),
        (4095, 2160),
        (3840, 2160),
        (4096, 2160),
        (5120, 2880),
        (7680, 4320),
        (1080, 1920),
    ];

    fn preferred(edid: &[u8]) -> (u32, u32) {
        let d = &edid[54..];
        let v = |low: usize, high: usize| u32::from(d[low]) | u32::from(d[high] >> 4) << 8;
        (v(2, 4), v(5, 7))
    }

    #[test]
    fn preferred_mode_and_size_are_those_asked_for() {
        for (width, height) in SIZES {
            let edid = generate(&Monitor::new(0, width, height));
            assert!(edid.chunks(BLOCK).all(|block| checksum(block) == 0));
            if edid.len() == BLOCK {
                assert_eq!(preferred(&edid), (width, height));
            } else {
                assert_eq!(preferred(&edid), FALLBACK);
                let active = |at: usize| u32::from(edid[at]) + (u32::from(edid[at + 1]) << 8) + 1;
                assert_eq!((active(BLOCK + 27), active(BLOCK + 35)), (width, height));
            }
        }
    }

    #[test]
    fn millimetres_give_the_scale() {
        let hidpi = Monitor { width_mm: 344, height_mm: 194, ..Monitor::new(1, 3840, 2160) };
        let edid = generate(&hidpi);
        assert_eq!(edid[21..23], [34, 19]);
        assert_eq!(edid[54 + 12..54 + 15], [(344 - 256) as u8, 194, 0x10]);
        let plain = generate(&Monitor::new(0, 1920, 1080));
        assert_eq!(plain[21..23], [51, 29]);
        let huge = Monitor { width_mm: u32::MAX, height_mm: u32::MAX, ..hidpi };
        assert_eq!(generate(&huge)[21..23], [0, 0], "a size that does not fit is not told");
        assert_ne!(hidpi.index, 0);
        assert_ne!(edid[12..16], plain[12..16], "monitors have serial numbers of their own");
    }

    /// Lines in the section of warnings that say something. The decoder takes every PNP vendor
    /// in DisplayID for an IEEE number that it does not know.
    fn warnings(text: &str) -> usize {
        let Some((_, section)) = text.split_once("Warnings:") else { return 0 };
        let section = section.split("EDID conformity").next().unwrap();
        let lines = section.lines().map(str::trim).filter(|line| !line.is_empty());
        lines.filter(|line| !line.starts_with("Block") && !line.contains("Unknown OUI")).count()
    }

    /// The reference decoder (Debian: `edid-decode`) must find nothing to complain about.
    #[test]
    fn edid_decode_is_content() {
        for (width, height) in SIZES {
            let edid = generate(&Monitor::new(0, width, height));
            let child = Command::new("edid-decode")
                .args(["--check", "-"])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn();
            let Ok(mut child) = child else {
                std::println!("SKIPPED: edid-decode is not installed");
                return;
            };
            child.stdin.take().unwrap().write_all(&edid).unwrap();
            let output = child.wait_with_output().unwrap();
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(
                output.status.success()
                    && text.contains("EDID conformity: PASS")
                    && warnings(&text) == 0,
                "{width}x{height}: {text}{}",
                String::from_utf8_lossy(&output.stderr)
            );
            let mode = format!("{width}x{height}");
            assert!(text.contains(&mode), "{mode} is missing in: {text}");
        }
    }
}
