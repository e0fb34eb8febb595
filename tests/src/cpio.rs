//! Writes initramfs archives in the "newc" format (kernel: `Documentation/driver-api/early-userspace/buffer-format.rst`).
//!
//! Written here rather than with cpio(1) because that needs root to put device nodes in.

use std::io::{self, Write};
use std::path::Path;

const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;
const S_IFCHR: u32 = 0o020_000;

/// An archive being written.
#[derive(Debug)]
pub struct Archive<W> {
    out: W,
    inode: u32,
    written: usize,
}

impl<W: Write> Archive<W> {
    /// Begins an archive.
    pub fn new(out: W) -> Self {
        Self { out, inode: 1, written: 0 }
    }

    /// Adds a directory with mode 0755. Parents are not made.
    ///
    /// # Errors
    /// If the output fails.
    pub fn dir(&mut self, path: &str) -> io::Result<()> {
        self.entry(path, S_IFDIR | 0o755, (0, 0), &[])
    }

    /// Adds a regular file.
    ///
    /// # Errors
    /// If the output fails.
    pub fn file(&mut self, path: &str, mode: u32, data: &[u8]) -> io::Result<()> {
        self.entry(path, S_IFREG | mode, (0, 0), data)
    }

    /// Adds a symbolic link.
    ///
    /// # Errors
    /// If the output fails.
    pub fn symlink(&mut self, path: &str, target: &str) -> io::Result<()> {
        self.entry(path, S_IFLNK | 0o777, (0, 0), target.as_bytes())
    }

    /// Adds a character device with mode 0600.
    ///
    /// # Errors
    /// If the output fails.
    pub fn char_device(&mut self, path: &str, major: u32, minor: u32) -> io::Result<()> {
        self.entry(path, S_IFCHR | 0o600, (major, minor), &[])
    }

    /// Ends the archive and returns the output. The length is a multiple of 512, so that archives can be
    /// put behind each other.
    ///
    /// # Errors
    /// If the output fails.
    pub fn finish(mut self) -> io::Result<W> {
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        self.pad(512)?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn entry(&mut self, path: &str, mode: u32, rdev: (u32, u32), data: &[u8]) -> io::Result<()> {
        let size = u32::try_from(data.len())
            .map_err(|_| io::Error::new(io::ErrorKind::FileTooLarge, "cpio member over 4 GiB"))?;
        let links = if mode & S_IFDIR == S_IFDIR { 2 } else { 1 };
        let name_size = path.len() + 1;
        let mut header = String::from("070701");
        for field in [
            self.inode,
            mode,
            0, // uid
            0, // gid
            links,
            0, // mtime: the same input gives the same archive
            size,
            0,
            0,
            rdev.0,
            rdev.1,
            u32::try_from(name_size).unwrap_or(u32::MAX),
            0, // checksum, unused in this format
        ] {
            header.push_str(&format!("{field:08X}"));
        }
        self.inode += 1;
        self.put(header.as_bytes())?;
        self.put(path.as_bytes())?;
        self.put(&[0])?;
        self.pad(4)?;
        self.put(data)?;
        self.pad(4)
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len();
        self.out.write_all(bytes)
    }

    fn pad(&mut self, to: usize) -> io::Result<()> {
        let missing = self.written.next_multiple_of(to) - self.written;
        self.put(&vec![0; missing])
    }
}

impl Archive<Vec<u8>> {
    /// Ends the archive and makes a file of it, which is there when it is whole.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn save(self, path: &Path) -> io::Result<()> {
        let fresh = path.with_extension(format!("tmp{}", std::process::id()));
        std::fs::write(&fresh, self.finish()?)?;
        std::fs::rename(&fresh, path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn cpio_reads_it_back() {
        let mut archive = Archive::new(Vec::new());
        archive.dir("dev").unwrap();
        archive.file("init", 0o755, b"#!/bin/sh\n").unwrap();
        archive.symlink("bin", "usr/bin").unwrap();
        archive.char_device("dev/console", 5, 1).unwrap();
        let bytes = archive.finish().unwrap();
        assert_eq!(bytes.len() % 512, 0);

        let mut cpio = Command::new("cpio")
            .args(["-tv", "--quiet"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("cpio(1) is part of Debian's standard system");
        cpio.stdin.take().unwrap().write_all(&bytes).unwrap();
        let listing = String::from_utf8(cpio.wait_with_output().unwrap().stdout).unwrap();
        let lines: Vec<&str> = listing.lines().collect();
        assert_eq!(lines.len(), 4, "{listing}");
        assert!(lines[0].starts_with("drwxr-xr-x"), "{listing}");
        assert!(lines[1].starts_with("-rwxr-xr-x") && lines[1].contains(" 10 "), "{listing}");
        assert!(lines[2].ends_with("bin -> usr/bin"), "{listing}");
        assert!(lines[3].starts_with("crw-------") && lines[3].contains("5,   1"), "{listing}");
    }
}
