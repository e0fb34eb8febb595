//! The `--spice` option.

use std::{
    io,
    net::{SocketAddr, ToSocketAddrs},
    path::PathBuf,
};

use devices::spec::{Spec, SpecError};
use spice_server::{ClientPolicy, Secret};

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

impl SpiceConfig {
    /// Parses `ADDRESS:PORT[,password-file=FILE][,clients=exclusive|refuse|shared]`.
    pub fn parse(mut spec: Spec) -> Result<Self, SpecError> {
        let listen = spec.take_word().ok_or_else(|| SpecError::MissingKey {
            option: spec.option().to_owned(),
            key: "ADDRESS:PORT".to_owned(),
        })?;
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
        let error = |source| DisplayError::Address { text: self.listen.clone(), source };
        let mut addresses = self.listen.to_socket_addrs().map_err(error)?;
        addresses.next().ok_or_else(|| error(io::ErrorKind::AddrNotAvailable.into()))
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
