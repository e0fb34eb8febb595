//! Things to show: text, photographs, films.
#![allow(unreachable_pub, dead_code, reason = "shared by the example and the tests")]

/// A source of numbers that are the same every time.
#[derive(Debug, Clone)]
pub struct Random(pub u32);

impl Random {
    pub fn below(&mut self, limit: u32) -> u32 {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (self.0 >> 8) % limit.max(1)
    }
}

/// Size of a letter's cell.
pub const LETTER: (u32, u32) = (8, 17);

/// A canvas of XRGB8888 pixels.
#[derive(Debug, Clone)]
pub struct Canvas {
    pub width: u32,
    pub height: u32,
    pub pixels: Vec<u8>,
}

impl Canvas {
    pub fn new(width: u32, height: u32, colour: u32) -> Self {
        let pixels = colour.to_le_bytes().repeat(width as usize * height as usize);
        Self { width, height, pixels }
    }

    /// The bytes of a row.
    pub fn row(&self, y: u32) -> &[u8] {
        let stride = self.width as usize * 4;
        let start = (y % self.height) as usize * stride;
        &self.pixels[start..start + stride]
    }

    pub fn set(&mut self, x: u32, y: u32, colour: u32) {
        if x < self.width && y < self.height {
            let at = (y as usize * self.width as usize + x as usize) * 4;
            self.pixels[at..at + 4].copy_from_slice(&colour.to_le_bytes());
        }
    }

    /// Draws letter `number` with soft edges, as fonts have them.
    pub fn letter(&mut self, x: u32, y: u32, number: u32, ink: u32) {
        // Three strokes on a grid of 3 by 5 points.
        let mut random = Random(number.wrapping_mul(0x9e37_79b1) | 1);
        let mut points = [(0f32, 0f32); 4];
        for point in &mut points {
            *point = (1.0 + 2.5 * random.below(3) as f32, 2.0 + 2.8 * random.below(5) as f32);
        }
        for dy in 0..LETTER.1 {
            for dx in 0..LETTER.0 {
                let (px, py) = (dx as f32 + 0.5, dy as f32 + 0.5);
                let distance = points.windows(2).map(|pair| {
                    let ((ax, ay), (bx, by)) = (pair[0], pair[1]);
                    let (vx, vy) = (bx - ax, by - ay);
                    let length = (vx * vx + vy * vy).max(0.01);
                    let t = (((px - ax) * vx + (py - ay) * vy) / length).clamp(0.0, 1.0);
                    ((px - ax - t * vx).powi(2) + (py - ay - t * vy).powi(2)).sqrt()
                });
                let cover = (1.3 - distance.fold(9.0, f32::min)).clamp(0.0, 1.0);
                if cover > 0.0 {
                    let at = ((y + dy) as usize * self.width as usize + (x + dx) as usize) * 4;
                    if x + dx < self.width && y + dy < self.height {
                        let ink = ink.to_le_bytes();
                        for (byte, ink) in self.pixels[at..at + 3].iter_mut().zip(ink) {
                            let mixed = f32::from(*byte) * (1.0 - cover) + f32::from(ink) * cover;
                            *byte = mixed as u8;
                        }
                    }
                }
            }
        }
    }

    /// Fills the canvas with lines of words.
    pub fn text(&mut self, seed: u32) {
        let mut random = Random(seed);
        let mut y = 4;
        while y + LETTER.1 < self.height {
            // Paragraphs end, and begin with a line's space.
            let end = if random.below(6) == 0 { self.width / 3 } else { self.width - 40 };
            let heading = random.below(12) == 0;
            let ink = if heading { 0x10_3080 } else { 0x20_2020 };
            let mut x = 20;
            while x < end {
                for _ in 0..2 + random.below(9) {
                    if x < end {
                        self.letter(x, y, random.below(26), ink);
                    }
                    x += LETTER.0;
                }
                x += LETTER.0;
            }
            y += LETTER.1 * if end < self.width / 2 { 2 } else { 1 };
        }
    }

    /// Fills the canvas with something like a photograph: noise of several scales, and grain.
    pub fn photo(&mut self, seed: u32) {
        let mut random = Random(seed);
        let scales = [(160, 90.0), (48, 50.0), (14, 26.0), (5, 12.0)];
        let layers: Vec<_> = scales
            .iter()
            .map(|(scale, strength)| {
                let columns = self.width / scale + 2;
                let count = columns * (self.height / scale + 2) * 3;
                let values: Vec<f32> = (0..count)
                    .map(|_| (random.below(1000) as f32 / 500.0 - 1.0) * strength)
                    .collect();
                (*scale, columns, values)
            })
            .collect();
        for y in 0..self.height {
            for x in 0..self.width {
                let grain = random.below(9) as f32 - 4.0;
                let mut colour = [118.0 + grain, 124.0 + grain, 130.0 + grain];
                for (scale, columns, values) in &layers {
                    let (fx, fy) =
                        ((x % scale) as f32 / *scale as f32, (y % scale) as f32 / *scale as f32);
                    let at = |dx: u32, dy: u32, channel: usize| {
                        let index = ((y / scale + dy) * columns + x / scale + dx) as usize;
                        values[index * 3 + channel]
                    };
                    for (channel, value) in colour.iter_mut().enumerate() {
                        let top = at(0, 0, channel) * (1.0 - fx) + at(1, 0, channel) * fx;
                        let bottom = at(0, 1, channel) * (1.0 - fx) + at(1, 1, channel) * fx;
                        *value += top * (1.0 - fy) + bottom * fy;
                    }
                }
                let [b, g, r] = colour.map(|value| value.clamp(0.0, 255.0) as u32);
                self.set(x, y, b | g << 8 | r << 16);
            }
        }
    }

    /// Copies `from` starting at `offset`, over a rectangle of this canvas.
    pub fn copy(&mut self, from: &Canvas, offset: (u32, u32), to: (u32, u32), size: (u32, u32)) {
        let bytes = size.0 as usize * 4;
        for y in 0..size.1 {
            let source = &from.row(offset.1 + y)[offset.0 as usize * 4..][..bytes];
            let at = ((to.1 + y) as usize * self.width as usize + to.0 as usize) * 4;
            self.pixels[at..at + bytes].copy_from_slice(source);
        }
    }

    /// The mean of two canvases at two offsets: parts that move in different directions.
    pub fn blend(&mut self, a: (&Canvas, u32, u32), b: (&Canvas, u32, u32)) {
        let bytes = self.width as usize * 4;
        for (y, row) in (0..).zip(self.pixels.chunks_exact_mut(bytes)) {
            let a = &a.0.row(a.2 + y)[a.1 as usize * 4..][..bytes];
            let b = &b.0.row(b.2 + y)[b.1 as usize * 4..][..bytes];
            for ((out, a), b) in row.iter_mut().zip(a).zip(b) {
                *out = (a >> 1) + (b >> 1);
            }
        }
    }

    /// Draws a number of 16 bits as 16 blocks of 8 by 8 pixels, readable after any lossy coding.
    pub fn stamp(&mut self, number: u16) {
        for bit in 0..16 {
            let colour = if number >> bit & 1 == 1 { 0xff_ffff } else { 0 };
            for y in 0..8 {
                for x in 0..8 {
                    self.set(bit * 8 + x, y, colour);
                }
            }
        }
    }
}
