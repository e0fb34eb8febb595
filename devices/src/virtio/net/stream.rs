//! Packets on a stream socket, as QEMU's `-netdev stream` and passt frame them: the length as a
//! big-endian 32 bit number, then the Ethernet frame, without any virtio header.

use super::MAX_FRAME;

/// Bytes before each frame.
pub const LENGTH: usize = 4;

/// A peer sent a length that no frame has.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the peer announced a frame of {0} bytes")]
pub struct FrameLengthError(pub u32);

/// Splits a byte stream into frames.
#[derive(Debug)]
pub struct FrameDecoder {
    buffer: Vec<u8>,
    /// Unread bytes: `buffer[start..end]`.
    start: usize,
    end: usize,
}

impl Default for FrameDecoder {
    fn default() -> Self {
        Self { buffer: vec![0; 2 * (LENGTH + MAX_FRAME)], start: 0, end: 0 }
    }
}

impl FrameDecoder {
    /// A decoder at the start of a stream.
    pub fn new() -> Self {
        Self::default()
    }

    /// Where to read more bytes of the stream to; never empty after [`next_frame`](Self::next_frame) had
    /// nothing. [`filled`](Self::filled) says how many there were.
    pub fn space(&mut self) -> &mut [u8] {
        if self.start > 0 {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        &mut self.buffer[self.end..]
    }

    /// Takes over `count` bytes that were put into [`space`](Self::space).
    pub fn filled(&mut self, count: usize) {
        self.end = (self.end + count).min(self.buffer.len());
    }

    /// Whether [`next_frame`](Self::next_frame) has something to say.
    pub fn has_frame(&self) -> bool {
        let bytes = &self.buffer[self.start..self.end];
        bytes.split_first_chunk::<LENGTH>().is_some_and(|(header, rest)| {
            let length = u32::from_be_bytes(*header) as usize;
            length == 0 || length > MAX_FRAME || rest.len() >= length
        })
    }

    /// The next complete frame.
    pub fn next_frame(&mut self) -> Result<Option<&[u8]>, FrameLengthError> {
        let bytes = &self.buffer[self.start..self.end];
        let Some((header, rest)) = bytes.split_first_chunk::<LENGTH>() else { return Ok(None) };
        let announced = u32::from_be_bytes(*header);
        let length = announced as usize;
        if length == 0 || length > MAX_FRAME {
            return Err(FrameLengthError(announced));
        }
        if rest.len() < length {
            return Ok(None);
        }
        let frame = self.start + LENGTH;
        self.start = frame + length;
        Ok(Some(&self.buffer[frame..frame + length]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn framed(frame: &[u8]) -> Vec<u8> {
        [&(frame.len() as u32).to_be_bytes(), frame].concat()
    }

    #[test]
    fn frames_survive_any_segmentation() {
        let frames: Vec<Vec<u8>> = [1, 14, 1514, MAX_FRAME, 60]
            .iter()
            .map(|n| (0..*n).map(|i| i as u8).collect())
            .collect();
        let wire: Vec<u8> = frames.iter().flat_map(|frame| framed(frame)).collect();
        for step in [1, 3, 1000, 100_000] {
            let mut decoder = FrameDecoder::new();
            let mut seen = Vec::new();
            let mut rest = &wire[..];
            while !rest.is_empty() {
                let space = decoder.space();
                assert!(!space.is_empty());
                let count = rest.len().min(step).min(space.len());
                space[..count].copy_from_slice(&rest[..count]);
                decoder.filled(count);
                rest = &rest[count..];
                while decoder.has_frame() {
                    seen.push(decoder.next_frame().unwrap().unwrap().to_vec());
                }
                assert_eq!(decoder.next_frame(), Ok(None));
            }
            assert!(seen == frames, "in steps of {step}");
        }
    }

    #[test]
    fn absurd_lengths_are_refused() {
        for length in [0, MAX_FRAME as u32 + 1, u32::MAX] {
            let mut decoder = FrameDecoder::new();
            decoder.space()[..4].copy_from_slice(&length.to_be_bytes());
            decoder.filled(4);
            assert!(decoder.has_frame());
            assert_eq!(decoder.next_frame(), Err(FrameLengthError(length)));
        }
    }
}
