//! System credentials for the guest's systemd (`--credential NAME=FILE`), handed over as OEM strings
//! of SMBIOS (type 11): `io.systemd.credential.binary:NAME=BASE64`, see systemd.system-credentials(7).
//!
//! The files are read when the machine is built, so that no secret is on a command line, which
//! everybody can read in `/proc`. What was read is never part of a message.

use std::{
    fmt,
    fs::File,
    io::{self, Read},
    path::PathBuf,
    str::FromStr,
};

use crate::smbios;

/// Longest name systemd accepts, in bytes.
const MAX_NAME: usize = 255;

/// A `--credential` option.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CredentialConfig {
    /// The credential's name in the guest.
    pub name: String,
    /// The file that holds it.
    pub file: PathBuf,
}

impl FromStr for CredentialConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, file) = text
            .split_once('=')
            .filter(|(_, file)| !file.is_empty())
            .ok_or("expected NAME=FILE, such as ssh.authorized_keys.root=keys")?;
        if !is_name(name) {
            return Err(format!(
                "'{name}' is no credential's name: 1 to {MAX_NAME} printable ASCII characters \
                 other than '/' and ':' are, but '.' and '..' are not"
            ));
        }
        Ok(Self { name: name.to_owned(), file: file.into() })
    }
}

/// What systemd takes for the name of a credential: a file name and a descriptor's name at once.
fn is_name(name: &str) -> bool {
    let allowed = |byte: u8| (b' '..0x7f).contains(&byte) && !matches!(byte, b'/' | b':');
    (1..=MAX_NAME).contains(&name.len()) && !matches!(name, "." | "..") && name.bytes().all(allowed)
}

/// A credential could not be had.
#[derive(Debug, thiserror::Error)]
pub enum CredentialError {
    /// Its file cannot be read.
    #[error("--credential {name}={}: the file cannot be read", file.display())]
    Read {
        /// Name of the credential.
        name: String,
        /// The file.
        file: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// There is no room for it.
    #[error(
        "--credential {name}: the file does not fit; all credentials together may have about {} KiB \
         (put more into a disk or a shared folder)",
        smbios::ROOM * 3 / 4 / 1024
    )]
    TooLarge {
        /// Name of the credential.
        name: String,
    },
}

/// A string for the guest that is not for anybody else.
#[derive(Clone, PartialEq, Eq)]
pub struct OemString(String);

impl OemString {
    /// A credential with a public content, such as an address.
    pub fn text(name: &str, content: &str) -> Self {
        Self(format!("io.systemd.credential:{name}={content}"))
    }

    fn secret(name: &str, content: &[u8]) -> Self {
        Self(format!("io.systemd.credential.binary:{name}={}", base64(content)))
    }

    /// The string.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for OemString {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.0.split('=').next().unwrap_or_default();
        write!(f, "OemString({name}=…)")
    }
}

/// Reads the files. Of several credentials of one name the last one counts, as with all options.
pub fn read(configs: &[CredentialConfig]) -> Result<Vec<OemString>, CredentialError> {
    let mut strings = Vec::new();
    let mut room = smbios::ROOM;
    for (index, config) in configs.iter().enumerate() {
        let CredentialConfig { name, file } = config;
        if configs[index + 1..].iter().any(|later| later.name == *name) {
            continue;
        }
        let failed =
            |source| CredentialError::Read { name: name.clone(), file: file.clone(), source };
        let mut content = Vec::new();
        // Also a pipe or a device that never ends is not read for ever.
        let limit = room as u64 * 3 / 4 + 1;
        File::open(file).map_err(failed)?.take(limit).read_to_end(&mut content).map_err(failed)?;
        let string = OemString::secret(name, &content);
        room = room
            .checked_sub(string.0.len() + smbios::STRING_OVERHEAD)
            .ok_or_else(|| CredentialError::TooLarge { name: name.clone() })?;
        strings.push(string);
    }
    Ok(strings)
}

/// RFC 4648, section 4.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let group = chunk.iter().fold(0u32, |group, byte| (group << 8) | u32::from(*byte));
        let group = group << (8 * (3 - chunk.len()));
        for position in 0..4 {
            let digit = (group >> (18 - 6 * position)) as usize % 64;
            text.push(if position <= chunk.len() { char::from(ALPHABET[digit]) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> CredentialConfig {
        text.parse().unwrap()
    }

    #[test]
    fn base64_of_rfc_4648() {
        let pairs = [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ];
        for (plain, encoded) in pairs {
            assert_eq!(base64(plain.as_bytes()), encoded);
        }
        assert_eq!(base64(&[0xfb, 0xff, 0xbf]), "+/+/");
    }

    #[test]
    fn options() {
        assert_eq!(config("a.b=c=d").file, PathBuf::from("c=d"));
        for wrong in ["", "a", "a=", "=f", "a/b=f", "..=f", "a:b=f", "ä=f"] {
            wrong.parse::<CredentialConfig>().unwrap_err();
        }
        format!("{}=f", "x".repeat(256)).parse::<CredentialConfig>().unwrap_err();
    }

    #[test]
    fn files_are_read_and_never_shown() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("secret");
        std::fs::write(&file, b"hunter2\0\n").unwrap();
        let one = CredentialConfig { name: "one".into(), file: file.clone() };
        let null = config("one=/dev/null");
        let strings = read(&[null.clone(), one.clone()]).unwrap();
        assert_eq!(strings.len(), 1, "the last one of a name counts");
        assert_eq!(strings[0].as_str(), "io.systemd.credential.binary:one=aHVudGVyMgAK");
        assert!(!format!("{strings:?}").contains("aHVu"), "{strings:?}");
        assert_eq!(read(&[one, null]).unwrap()[0].as_str(), "io.systemd.credential.binary:one=");
    }

    #[test]
    fn errors_name_the_credential() {
        let error = read(&[config("gone=/nonexistent/file")]).unwrap_err().to_string();
        assert!(error.starts_with("--credential gone=/nonexistent/file:"), "{error}");
        // A file without an end.
        let error = read(&[config("endless=/dev/zero")]).unwrap_err().to_string();
        assert!(error.starts_with("--credential endless:") && error.contains("KiB"), "{error}");
    }
}
