//! Looks at screenshots: reads text from them (tesseract) and colours.

use std::collections::HashSet;
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::debian::check;

/// A screenshot in memory.
#[derive(Debug, Clone)]
pub struct Picture {
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
    rgb: Vec<u8>,
    path: PathBuf,
}

impl Picture {
    /// Reads a binary PPM, as the SPICE client writes it.
    ///
    /// # Errors
    /// If the file is something else.
    pub fn open(path: &Path) -> Result<Self> {
        let bytes =
            std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        let mut fields = bytes.splitn(4, |byte| byte.is_ascii_whitespace());
        let mut next = || fields.next().map(String::from_utf8_lossy);
        let (magic, width, height) = (next(), next(), next());
        let number = |text: Option<std::borrow::Cow<'_, str>>| {
            text.and_then(|text| text.parse::<u32>().ok()).unwrap_or(0)
        };
        let is_ppm = magic.as_deref() == Some("P6");
        let (width, height) = (number(width), number(height));
        let size = width as usize * height as usize * 3;
        if !is_ppm || size == 0 || bytes.len() < size {
            bail!("{} is no picture", path.display());
        }
        let rgb = bytes[bytes.len() - size..].to_vec();
        Ok(Self { width, height, rgb, path: path.to_path_buf() })
    }

    /// Reads a PNG, as `drago-vmm ctl screenshot` writes it.
    ///
    /// # Errors
    /// If the file is something else.
    pub fn open_png(path: &Path) -> Result<Self> {
        let no_picture = || format!("{} is no picture", path.display());
        let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
        let mut reader =
            png::Decoder::new(BufReader::new(file)).read_info().with_context(no_picture)?;
        let mut rgb = vec![0; reader.output_buffer_size().with_context(no_picture)?];
        let info = reader.next_frame(&mut rgb).with_context(no_picture)?;
        if (info.color_type, info.bit_depth) != (png::ColorType::Rgb, png::BitDepth::Eight) {
            bail!("{}: a kind of PNG that drago-vmm does not write", path.display());
        }
        rgb.truncate(info.buffer_size());
        Ok(Self { width: info.width, height: info.height, rgb, path: path.to_path_buf() })
    }

    /// The number of different colours.
    pub fn colours(&self) -> usize {
        self.rgb.chunks_exact(3).collect::<HashSet<_>>().len()
    }

    /// The colour of a pixel; black outside.
    pub fn pixel(&self, x: u32, y: u32) -> [u8; 3] {
        let at = (y as usize * self.width as usize + x as usize) * 3;
        match self.rgb.get(at..at + 3) {
            Some([r, g, b]) if x < self.width => [*r, *g, *b],
            _ => [0; 3],
        }
    }

    /// The share (0 to 1) of pixels within `tolerance` of a colour in each component.
    pub fn share_of(&self, colour: [u8; 3], tolerance: u8) -> f64 {
        let near = self
            .rgb
            .chunks_exact(3)
            .filter(|pixel| {
                pixel.iter().zip(colour).all(|(have, want)| have.abs_diff(want) <= tolerance)
            })
            .count();
        near as f64 / (f64::from(self.width) * f64::from(self.height))
    }

    /// The text in a rectangle (x, y, width, height), or in the whole picture.
    ///
    /// # Errors
    /// If ImageMagick or tesseract is missing.
    pub fn text(&self, part: Option<(u32, u32, u32, u32)>) -> Result<String> {
        let (x, y, width, height) = part.unwrap_or((0, 0, self.width, self.height));
        let enlarged = self.path.with_extension("ocr.png");
        // Tesseract is trained on dark text of some 30 pixels' height on white.
        check(
            Command::new("convert")
                .arg(&self.path)
                .args(["-crop", &format!("{width}x{height}+{x}+{y}"), "+repage"])
                .args(["-colorspace", "Gray", "-negate", "-resize", "300%"])
                .arg(&enlarged),
        )
        .context("ImageMagick (package imagemagick)")?;
        check(Command::new("tesseract").arg(&enlarged).args(["-", "--psm", "11"]))
            .context("tesseract (package tesseract-ocr)")
    }

    /// Saves a copy that people's programs can open.
    ///
    /// # Errors
    /// If ImageMagick is missing.
    pub fn save_png(&self, path: &Path) -> Result<()> {
        check(Command::new("convert").arg(&self.path).arg(path)).map(drop)
    }
}

/// Whether OCR found a text, forgiving what OCR takes for each other.
pub fn reads(found: &str, wanted: &str) -> bool {
    let plain = |text: &str| -> String {
        text.chars()
            .filter(|c| !c.is_whitespace())
            .map(|c| match c.to_ascii_lowercase() {
                '0' | 'o' => 'o',
                '1' | 'i' | 'l' | '|' => 'l',
                '5' | 's' => 's',
                '8' | 'b' => 'b',
                '–' | '—' => '-',
                other => other,
            })
            .collect()
    };
    plain(found).contains(&plain(wanted))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_colour_are_found_in_a_picture() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.ppm");
        // By path: ImageMagick's own names of fonts depend on what else is installed.
        let font = "/usr/share/fonts/truetype/dejavu/DejaVuSansMono.ttf";
        check(
            Command::new("convert")
                .args(["-size", "400x80", "xc:black", "-fill", "white", "-pointsize", "16"])
                .args(["-font", font])
                .args(["-annotate", "+20+40", "demo$ echo works"])
                .arg(&path),
        )
        .unwrap();
        let picture = Picture::open(&path).unwrap();
        assert_eq!((picture.width, picture.height), (400, 80));
        assert_eq!(picture.pixel(1, 1), [0; 3]);
        assert!(picture.share_of([0; 3], 8) > 0.8);
        assert!((2..=256).contains(&picture.colours()), "{}", picture.colours());
        assert!(Picture::open_png(&path).is_err());
        let text = picture.text(None).unwrap();
        assert!(reads(&text, "echo works"), "{text}");
        assert!(!reads(&text, "echo fails"), "{text}");
        assert!(reads("uname —m", "uname -m"));
    }
}
