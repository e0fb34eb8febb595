//! The `--vnc` option, and addresses.

use std::{
    fs, io,
    net::{SocketAddr, ToSocketAddrs},
    path::PathBuf,
};

use devices::spec::{Spec, SpecError};
use spice_server::Clipboard;
use vnc_server::proto::auth::PASSWORD;

use super::{DisplayError, spice::take_copy_paste};

/// Where VNC viewers come in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VncConfig {
    /// `address:port`.
    pub listen: String,
    /// File whose first line is the password; without one anybody may connect.
    pub password_file: Option<PathBuf>,
    /// Which way clipboard text may travel.
    pub copy_paste: Clipboard,
}

impl VncConfig {
    /// Parses `ADDRESS:PORT[,password-file=FILE][,copy-paste=on|off|to-guest|to-client]`.
    pub fn parse(mut spec: Spec) -> Result<Self, SpecError> {
        let listen = spec.take_word();
        let password_file = spec.take_path("password-file")?;
        let copy_paste = take_copy_paste(&mut spec)?;
        let missing = spec.missing_word("ADDRESS:PORT");
        spec.finish()?;
        Ok(Self { listen: listen.ok_or(missing)?, password_file, copy_paste })
    }

    /// The address to listen on.
    pub(super) fn address(&self) -> Result<SocketAddr, DisplayError> {
        resolve("vnc", &self.listen)
    }

    /// The password, read now so that it is in no command line.
    pub(super) fn password(&self) -> Result<Option<Vec<u8>>, DisplayError> {
        let Some(path) = &self.password_file else { return Ok(None) };
        let failed = |source| DisplayError::VncPassword { path: path.clone(), source };
        let text = fs::read(path).map_err(failed)?;
        let line = text.split(|byte| *byte == b'\n').next().unwrap_or_default().trim_ascii_end();
        if line.is_empty() {
            return Err(failed(io::Error::new(
                io::ErrorKind::InvalidData,
                "its first line is empty",
            )));
        }
        if line.len() > PASSWORD {
            tracing::warn!(
                "--vnc password-file={}: only the first {PASSWORD} characters count in VNC",
                path.display()
            );
        }
        Ok(Some(line.to_vec()))
    }
}

/// The address in an option's value.
pub(super) fn resolve(option: &'static str, text: &str) -> Result<SocketAddr, DisplayError> {
    let error = |source| DisplayError::Address { option, text: text.to_owned(), source };
    let mut addresses = text.to_socket_addrs().map_err(error)?;
    addresses.next().ok_or_else(|| error(io::ErrorKind::AddrNotAvailable.into()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn vnc() {
        let parse = |text: &str| VncConfig::parse(Spec::parse("vnc", text).unwrap());
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("password");
        fs::write(&path, "sesame \nmore").unwrap();
        let config = parse(&format!("0.0.0.0:5901,password-file={}", path.display())).unwrap();
        assert_eq!(config.address().unwrap(), "0.0.0.0:5901".parse().unwrap());
        assert_eq!(config.password().unwrap().unwrap(), b"sesame");
        fs::write(&path, "\n").unwrap();
        let error = config.password().unwrap_err().to_string();
        assert!(error.starts_with("--vnc password-file="), "{error}");
        assert!(parse("password-file=x").is_err(), "the address is missing");
        assert!(parse("127.0.0.1:1,clients=shared").is_err(), "not an option of VNC");
        assert_eq!(parse("127.0.0.1:1,copy-paste=off").unwrap().copy_paste, Clipboard::Off);
    }
}
