//! What the fuzz targets share: a way to read structure out of arbitrary bytes.
//!
//! `arbitrary` would do as well; this keeps small mutations of the input small changes of what is
//! done, and lets the numbers that meet limits come up often.

use std::{
    fs::File,
    io::{Seek, SeekFrom, Write},
};

/// Reads fields from the front of the input; past its end everything is zero.
#[derive(Debug, Clone, Copy)]
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    /// The whole input.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// At most `count` bytes.
    pub fn take(&mut self, count: usize) -> &'a [u8] {
        let (now, later) = self.0.split_at(count.min(self.0.len()));
        self.0 = later;
        now
    }

    /// Everything that is left.
    pub fn rest(&mut self) -> &'a [u8] {
        self.take(usize::MAX)
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let taken = self.take(N);
        bytes[..taken.len()].copy_from_slice(taken);
        bytes
    }

    /// A byte.
    pub fn u8(&mut self) -> u8 {
        u8::from_le_bytes(self.array())
    }

    /// Two bytes.
    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    /// Four bytes.
    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    /// Eight bytes.
    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// One to five bytes for a number that is mostly small, often a limit, sometimes anything.
    pub fn number(&mut self) -> u32 {
        const LIMITS: [u32; 13] = [
            0xff,
            0x100,
            0xfff,
            0x1000,
            0x4000,
            0x4001,
            0x7fff,
            0xffff,
            0x1_0000,
            0x7fff_ffff,
            0x8000_0000,
            u32::MAX - 1,
            u32::MAX,
        ];
        match self.u8() {
            0xff => self.u32(),
            0xfe => self.u16().into(),
            byte @ 0xf1.. => LIMITS[usize::from(byte - 0xf1)],
            byte => byte.into(),
        }
    }
}

/// A file in memory with these contents and length, and the path to open it by.
pub struct MemoryFile {
    /// The file.
    pub file: File,
    /// Valid in this process while `file` is open.
    pub path: std::path::PathBuf,
}

impl MemoryFile {
    /// An empty file.
    pub fn new() -> std::io::Result<Self> {
        use std::os::fd::AsRawFd;
        let flags = rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING;
        let file = File::from(rustix::fs::memfd_create("fuzz", flags)?);
        let path = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
        Ok(Self { file, path })
    }

    /// Replaces the contents; behind them the file is sparse up to `length`.
    pub fn fill(&mut self, bytes: &[u8], length: u64) -> std::io::Result<()> {
        self.file.set_len(0)?;
        self.file.seek(SeekFrom::Start(0))?;
        self.file.write_all(bytes)?;
        self.file.set_len(length)
    }
}
