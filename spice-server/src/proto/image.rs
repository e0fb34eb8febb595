//! Images inside drawing messages (spice.proto, `Image`): raw bitmap, LZ4, JPEG.

use jpeg_encoder::{ColorType, Encoder};

use super::{
    display::Surface,
    wire::{Put, patch_u32},
};

const TYPE_BITMAP: u8 = 0;
const TYPE_FROM_CACHE: u8 = 103;
const TYPE_SURFACE: u8 = 104;
const TYPE_JPEG: u8 = 105;
const TYPE_LZ4: u8 = 109;
const BITMAP_FORMAT_32BIT: u8 = 8;
const BITMAP_TOP_DOWN: u8 = 4;

/// Whether the client should keep an image, and under which number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Keep {
    No,
    As(u64),
}

/// How the pixels of an image are carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Coding {
    /// As they are: for pixels that do not compress, and clients that know nothing else.
    Raw,
    /// LZ4, or raw where that is not smaller.
    Lz4,
    /// JPEG of this quality (1 to 100): lossy.
    Jpeg(u8),
}

/// Appends an image of `width * height` XRGB8888 pixels without padding, `pixels`, in the wanted
/// coding or, if it does not make them smaller, raw. Returns the coding used.
pub(crate) fn put_image(
    out: &mut Vec<u8>,
    (width, height): (u32, u32),
    pixels: &[u8],
    coding: Coding,
    keep: Keep,
) -> Coding {
    let start = out.len();
    match coding {
        Coding::Raw => {}
        Coding::Lz4 => {
            put_descriptor(out, TYPE_LZ4, width, height, keep);
            if put_lz4(out, pixels).is_some() {
                return coding;
            }
        }
        Coding::Jpeg(quality) => {
            put_descriptor(out, TYPE_JPEG, width, height, keep);
            let size_at = out.len();
            out.put_u32(0);
            let done = put_jpeg(out, (width, height), pixels, quality);
            let length = out.len() - size_at - 4;
            if done && length < pixels.len() {
                patch_u32(out, size_at, length as u32);
                return coding;
            }
        }
    }
    out.truncate(start);
    put_descriptor(out, TYPE_BITMAP, width, height, keep);
    out.put_u8(BITMAP_FORMAT_32BIT);
    out.put_u8(BITMAP_TOP_DOWN);
    out.put_u32(width);
    out.put_u32(height);
    out.put_u32(width * 4);
    out.put_u32(0);
    out.extend_from_slice(pixels);
    Coding::Raw
}

/// Appends an image that is another surface of the channel.
pub(crate) fn put_surface_image(out: &mut Vec<u8>, (width, height): (u32, u32), surface: Surface) {
    put_descriptor(out, TYPE_SURFACE, width, height, Keep::No);
    out.put_u32(surface as u32);
}

/// Appends an image that the client has kept.
pub(crate) fn put_kept_image(out: &mut Vec<u8>, (width, height): (u32, u32), id: u64) {
    put_descriptor(out, TYPE_FROM_CACHE, width, height, Keep::No);
    if let Some(field) = out.len().checked_sub(18).and_then(|at| out.get_mut(at..at + 8)) {
        field.copy_from_slice(&id.to_le_bytes());
    }
}

/// Appends pixels as a JPEG without anything around it.
pub(crate) fn put_jpeg(
    out: &mut Vec<u8>,
    (width, height): (u32, u32),
    pixels: &[u8],
    quality: u8,
) -> bool {
    let (Ok(width), Ok(height)) = (u16::try_from(width), u16::try_from(height)) else {
        return false;
    };
    let encoder = Encoder::new(out, quality.clamp(1, 100));
    encoder.encode(pixels, width, height, ColorType::Bgra).is_ok()
}

fn put_descriptor(out: &mut Vec<u8>, kind: u8, width: u32, height: u32, keep: Keep) {
    const FLAG_CACHE_ME: u8 = 1;
    let (id, flags) = match keep {
        Keep::No => (0, 0),
        Keep::As(id) => (id, FLAG_CACHE_ME),
    };
    out.put_u64(id);
    out.put_u8(kind);
    out.put_u8(flags);
    out.put_u32(width);
    out.put_u32(height);
}

/// `u32` size; then `top_down`, format, and blocks of a big-endian length and LZ4 data.
fn put_lz4(out: &mut Vec<u8>, pixels: &[u8]) -> Option<()> {
    let size_at = out.len();
    out.put_u32(0);
    out.put_u8(1);
    out.put_u8(BITMAP_FORMAT_32BIT);
    let block_at = out.len();
    out.put_u32(0);
    let data_at = out.len();
    out.resize(data_at + lz4_flex::block::get_maximum_output_size(pixels.len()), 0);
    let length = lz4_flex::block::compress_into(pixels, out.get_mut(data_at..)?).ok()?;
    if length + length / 16 >= pixels.len() {
        return None;
    }
    out.truncate(data_at + length);
    let length = u32::try_from(length).ok()?;
    out.get_mut(block_at..data_at)?.copy_from_slice(&length.to_be_bytes());
    let size = u32::try_from(out.len() - size_at - 4).ok()?;
    patch_u32(out, size_at, size);
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gradient(width: u32, height: u32) -> Vec<u8> {
        let pixel = |i: u32| [(i % width) as u8, (i / width) as u8, 7, 0];
        (0..width * height).flat_map(pixel).collect()
    }

    #[test]
    fn lz4_round_trips() {
        let pixels = gradient(64, 3);
        let flat = vec![9u8; 64 * 64 * 4];
        let mut out = vec![1, 2, 3];
        assert_eq!(put_image(&mut out, (64, 64), &flat, Coding::Lz4, Keep::No), Coding::Lz4);
        let image = &out[3..];
        assert_eq!(image[8], TYPE_LZ4);
        let size = u32::from_le_bytes(image[18..22].try_into().unwrap()) as usize;
        assert_eq!(size, image.len() - 22);
        assert_eq!(image[22..24], [1, 8]);
        let block = u32::from_be_bytes(image[24..28].try_into().unwrap()) as usize;
        assert_eq!(block, image.len() - 28);
        assert_eq!(lz4_flex::block::decompress(&image[28..], flat.len()).unwrap(), flat);
        let mut out = Vec::new();
        put_image(&mut out, (64, 3), &pixels, Coding::Lz4, Keep::No);
        assert!(out.len() <= 18 + 18 + pixels.len());
    }

    #[test]
    fn incompressible_pixels_go_raw() {
        let mut state = 1u64;
        let noise: Vec<u8> = (0..32 * 32 * 4)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 56) as u8
            })
            .collect();
        let mut out = Vec::new();
        assert_eq!(put_image(&mut out, (32, 32), &noise, Coding::Lz4, Keep::No), Coding::Raw);
        assert_eq!(out.len(), 18 + 18 + noise.len());
        assert_eq!(out[8], TYPE_BITMAP);
        assert_eq!(out[36..], noise);
    }

    #[test]
    fn jpeg_is_a_jpeg() {
        let mut out = Vec::new();
        let pixels = gradient(64, 64);
        assert_eq!(
            put_image(&mut out, (64, 64), &pixels, Coding::Jpeg(80), Keep::No),
            Coding::Jpeg(80)
        );
        let size = u32::from_le_bytes(out[18..22].try_into().unwrap()) as usize;
        assert_eq!(out.len(), 22 + size);
        assert_eq!(out[22..24], [0xff, 0xd8]);
        assert_eq!(out[out.len() - 2..], [0xff, 0xd9]);
    }
}
