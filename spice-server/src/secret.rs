//! A password that does not end up in logs.

use std::{fmt, fs, hint, path::Path};

use crate::Error;

/// Longest password SPICE can carry, in bytes (`SPICE_MAX_PASSWORD_LENGTH`).
pub const MAX_PASSWORD: usize = 60;

/// A password: not shown by `Debug`, overwritten when dropped.
#[derive(Clone)]
pub struct Secret(Vec<u8>);

impl Secret {
    /// A password of 1 to 60 bytes without NUL.
    pub fn new(password: impl Into<Vec<u8>>) -> Result<Self, Error> {
        let secret = Self(password.into());
        let length = secret.0.len();
        if length == 0 || length > MAX_PASSWORD || secret.0.contains(&0) {
            return Err(Error::PasswordLength { length, max: MAX_PASSWORD });
        }
        Ok(secret)
    }

    /// Reads a password from a file: its first line.
    pub fn from_file(path: &Path) -> Result<Self, Error> {
        let mut bytes = fs::read(path)
            .map_err(|source| Error::PasswordFile { path: path.to_owned(), source })?;
        let line = bytes.split(|byte| *byte == b'\n').next().unwrap_or_default();
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let secret = Self::new(line);
        bytes.fill(0);
        hint::black_box(&bytes);
        secret
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        self.0.fill(0);
        hint::black_box(&self.0);
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::{MAX_PASSWORD, Secret};

    #[test]
    fn limits_and_debug() {
        assert!(Secret::new("").is_err());
        assert!(Secret::new("a\0b").is_err());
        assert!(Secret::new(vec![b'x'; MAX_PASSWORD + 1]).is_err());
        let secret = Secret::new("hunter2").unwrap();
        assert!(!format!("{secret:?}").contains("hunter2"));
    }

    #[test]
    fn a_files_first_line_counts() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "top secret\r\nand more\n").unwrap();
        assert_eq!(Secret::from_file(file.path()).unwrap().as_bytes(), b"top secret");
        let missing = Secret::from_file("/nonexistent/pw".as_ref()).unwrap_err();
        assert!(missing.to_string().contains("/nonexistent/pw"));
    }
}
