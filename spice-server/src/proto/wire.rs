//! Little-endian fields.

use super::DecodeError;

/// Reads fields from the front of a byte slice.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
}

macro_rules! read_int {
    ($($name:ident: $ty:ty),*) => {$(
        pub(crate) fn $name(&mut self) -> Result<$ty, DecodeError> {
            let (head, rest) = self.rest.split_first_chunk().ok_or(DecodeError::Truncated)?;
            self.rest = rest;
            Ok(<$ty>::from_le_bytes(*head))
        }
    )*};
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    read_int!(u8: u8, u16: u16, u32: u32, i32: i32, u64: u64);

    pub(crate) fn bytes(&mut self, count: usize) -> Result<&'a [u8], DecodeError> {
        let (head, rest) = self.rest.split_at_checked(count).ok_or(DecodeError::Truncated)?;
        self.rest = rest;
        Ok(head)
    }
}

/// Appends fields to a byte vector.
pub(crate) trait Put {
    fn put_u8(&mut self, value: u8);
    fn put_u16(&mut self, value: u16);
    fn put_u32(&mut self, value: u32);
    fn put_i32(&mut self, value: i32);
    fn put_u64(&mut self, value: u64);
}

impl Put for Vec<u8> {
    fn put_u8(&mut self, value: u8) {
        self.push(value);
    }

    fn put_u16(&mut self, value: u16) {
        self.extend_from_slice(&value.to_le_bytes());
    }

    fn put_u32(&mut self, value: u32) {
        self.extend_from_slice(&value.to_le_bytes());
    }

    fn put_i32(&mut self, value: i32) {
        self.extend_from_slice(&value.to_le_bytes());
    }

    fn put_u64(&mut self, value: u64) {
        self.extend_from_slice(&value.to_le_bytes());
    }
}

/// Overwrites four bytes written earlier, such as a length not known before.
pub(crate) fn patch_u32(out: &mut [u8], at: usize, value: u32) {
    if let Some(field) = out.get_mut(at..).and_then(|tail| tail.first_chunk_mut()) {
        *field = value.to_le_bytes();
    }
}

#[cfg(test)]
mod tests {
    use super::{Put, Reader, patch_u32};
    use crate::proto::DecodeError;

    #[test]
    fn fields_round_trip() {
        let mut out = Vec::new();
        out.put_u8(1);
        out.put_u16(0x0203);
        out.put_u32(0x0405_0607);
        out.put_i32(-5);
        out.put_u64(u64::MAX - 1);
        patch_u32(&mut out, 3, 9);
        let mut reader = Reader::new(&out);
        assert_eq!(reader.u8(), Ok(1));
        assert_eq!(reader.u16(), Ok(0x0203));
        assert_eq!(reader.u32(), Ok(9));
        assert_eq!(reader.i32(), Ok(-5));
        assert_eq!(reader.u64(), Ok(u64::MAX - 1));
        assert_eq!(reader.u8(), Err(DecodeError::Truncated));
        assert_eq!(reader.bytes(1), Err(DecodeError::Truncated));
    }

    #[test]
    fn patching_outside_does_nothing() {
        let mut out = vec![1, 2, 3];
        patch_u32(&mut out, 1, 0);
        patch_u32(&mut out, 9, 0);
        assert_eq!(out, [1, 2, 3]);
    }
}
