//! What the server says after the handshake (RFC 6143 §7.3.2, §7.6 to §7.8).

use super::{encoding, pixel::PixelFormat};

/// ServerInit: size, pixel format and name of the desktop.
pub fn server_init(width: u16, height: u16, name: &str) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend(width.to_be_bytes());
    out.extend(height.to_be_bytes());
    out.extend(PixelFormat::BGRX.to_wire());
    out.extend((name.len() as u32).to_be_bytes());
    out.extend(name.as_bytes());
    out
}

/// A FramebufferUpdate in the making.
#[derive(Debug)]
pub struct Update<'a> {
    out: &'a mut Vec<u8>,
    count_at: usize,
    count: u16,
}

impl<'a> Update<'a> {
    /// Starts an update at the end of `out`.
    pub fn new(out: &'a mut Vec<u8>) -> Self {
        out.extend([0, 0]);
        let count_at = out.len();
        out.extend([0, 0]);
        Self { out, count_at, count: 0 }
    }

    /// Rectangles so far.
    pub fn count(&self) -> u16 {
        self.count
    }

    /// Starts a rectangle; its content follows in the returned buffer.
    pub fn rectangle(
        &mut self,
        (x, y): (u16, u16),
        (width, height): (u16, u16),
        encoding: i32,
    ) -> &mut Vec<u8> {
        self.count = self.count.saturating_add(1);
        for number in [x, y, width, height] {
            self.out.extend(number.to_be_bytes());
        }
        self.out.extend(encoding.to_be_bytes());
        self.out
    }

    /// The desktop has another size; `reason` and `status` are those of ExtendedDesktopSize.
    pub fn extended_size(&mut self, size: (u16, u16), reason: u16, status: u16) {
        let (width, height) = size;
        let out = self.rectangle((reason, status), size, encoding::EXTENDED_DESKTOP_SIZE);
        // One screen, number 0, all of the desktop.
        out.extend([1, 0, 0, 0]);
        out.extend([0; 8]);
        out.extend(width.to_be_bytes());
        out.extend(height.to_be_bytes());
        out.extend([0; 4]);
    }
}

impl Drop for Update<'_> {
    fn drop(&mut self) {
        if let Some(target) = self.out.get_mut(self.count_at..self.count_at + 2) {
            target.copy_from_slice(&self.count.to_be_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_count_is_filled_in() {
        let mut out = vec![9];
        let mut update = Update::new(&mut out);
        update.rectangle((1, 2), (3, 4), encoding::RAW).extend([5; 48]);
        update.extended_size((640, 480), 0, 0);
        drop(update);
        assert_eq!(out[..5], [9, 0, 0, 0, 2]);
        assert_eq!(out[5..17], [0, 1, 0, 2, 0, 3, 0, 4, 0, 0, 0, 0]);
        assert_eq!(out.len(), 5 + 12 + 48 + 12 + 4 + 16);
    }
}
