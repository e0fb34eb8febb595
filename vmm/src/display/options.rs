//! The `--spice` and `--vnc` options.

use std::{
    fs, io,
    net::{SocketAddr, ToSocketAddrs},
    path::PathBuf,
};

use devices::spec::{Spec, SpecError};
use spice_server::{ClientPolicy, Secret};
use vnc_server::proto::auth::PASSWORD;

use super::DisplayError;

/// Where to listen and who may come in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpiceConfig {
    /// `address:port`.
    pub listen: String,
    /// File whose first line is the password; without one anybody may connect.
    pub password_file: Option<PathBuf>,
    /// What happens when a second viewer comes.
    pub clients: ClientPolicy,
}

/// Where VNC viewers come in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VncConfig {
    /// `address:port`.
    pub listen: String,
    /// File whose first line is the password; without one anybody may connect.
    pub password_file: Option<PathBuf>,
}

impl VncConfig {
    /// Parses `ADDRESS:PORT[,password-file=FILE]`.
    pub fn parse(mut spec: Spec) -> Result<Self, SpecError> {
        let listen = take_listen(&mut spec)?;
        let password_file = spec.take_path("password-file")?;
        spec.finish()?;
        Ok(Self { listen, password_file })
    }

    /// The address to listen on.
    pub(super) fn address(&self) -> Result<SocketAddr, DisplayError> {
        address("vnc", &self.listen)
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

fn take_listen(spec: &mut Spec) -> Result<String, SpecError> {
    spec.take_word().ok_or_else(|| SpecError::MissingKey {
        option: spec.option().to_owned(),
        key: "ADDRESS:PORT".to_owned(),
    })
}

fn address(option: &'static str, text: &str) -> Result<SocketAddr, DisplayError> {
    let error = |source| DisplayError::Address { option, text: text.to_owned(), source };
    let mut addresses = text.to_socket_addrs().map_err(error)?;
    addresses.next().ok_or_else(|| error(io::ErrorKind::AddrNotAvailable.into()))
}

impl SpiceConfig {
    /// Parses `ADDRESS:PORT[,password-file=FILE][,clients=exclusive|refuse|shared]`.
    pub fn parse(mut spec: Spec) -> Result<Self, SpecError> {
        let listen = take_listen(&mut spec)?;
        let password_file = spec.take_path("password-file")?;
        let clients = match spec.take("clients")?.as_deref() {
            None | Some("exclusive") => ClientPolicy::Exclusive,
            Some("refuse") => ClientPolicy::Refuse,
            Some("shared") => ClientPolicy::Shared,
            Some(other) => {
                return Err(spec.invalid("clients", other, "expected exclusive, refuse or shared"));
            }
        };
        spec.finish()?;
        Ok(Self { listen, password_file, clients })
    }

    /// The address to listen on.
    pub(super) fn address(&self) -> Result<SocketAddr, DisplayError> {
        address("spice", &self.listen)
    }

    /// The password, read now so that it is in no command line.
    pub(super) fn password(&self) -> Result<Option<Secret>, DisplayError> {
        let Some(path) = &self.password_file else { return Ok(None) };
        let secret = Secret::from_file(path)
            .map_err(|source| DisplayError::Password { path: path.clone(), source })?;
        Ok(Some(secret))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn parse(text: &str) -> Result<SpiceConfig, SpecError> {
        SpiceConfig::parse(Spec::parse("spice", text).unwrap())
    }

    #[test]
    fn addresses_and_policies() {
        let config = parse("[::1]:5901,clients=shared").unwrap();
        assert_eq!(config.address().unwrap(), "[::1]:5901".parse().unwrap());
        assert_eq!(config.clients, ClientPolicy::Shared);
        assert!(parse("clients=shared").is_err(), "the address is missing");
        assert!(parse("127.0.0.1:1,clients=some").is_err());
        let error = parse("no-port").unwrap().address().unwrap_err();
        assert!(error.to_string().starts_with("--spice no-port:"), "{error}");
    }

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
    }

    #[test]
    fn passwords_come_from_a_file_and_are_never_shown() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("password");
        fs::write(&path, "open sesame\n").unwrap();
        let config = parse(&format!("127.0.0.1:1,password-file={}", path.display())).unwrap();
        let secret = config.password().unwrap().unwrap();
        assert!(!format!("{secret:?}").contains("sesame"));
        fs::remove_file(&path).unwrap();
        let error = config.password().unwrap_err();
        assert!(error.to_string().contains("password-file="), "{error}");
        fs::write(&path, "\n").unwrap();
        assert!(config.password().is_err(), "an empty password is a mistake");
    }
}
