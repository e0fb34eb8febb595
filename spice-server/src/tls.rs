//! The server's certificate, and which channels must be encrypted.

use std::{fmt, fs, io, path::Path, sync::Arc};

use rustls::{
    ServerConfig,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, pem, pem::PemObject},
};

use crate::{Error, proto::channel::ChannelType};

/// A certificate with its key: what clients that want TLS (1.2 or 1.3) are shown. Cheap to clone.
#[derive(Clone)]
pub struct TlsConfig(pub(crate) Arc<ServerConfig>);

impl TlsConfig {
    /// Reads PEM files: the certificate chain, the server's own first, and its private key (PKCS #8,
    /// PKCS #1 or SEC 1).
    pub fn from_files(certificate: &Path, key: &Path) -> Result<Self, Error> {
        let read = |path: &Path| {
            fs::read(path).map_err(|source| Error::TlsFile { path: path.to_owned(), source })
        };
        Self::from_pem((certificate, &read(certificate)?), (key, &read(key)?))
    }

    /// The same from files' contents; their names are for errors.
    pub fn from_pem(certificate: (&Path, &[u8]), key: (&Path, &[u8])) -> Result<Self, Error> {
        let wrong = |path: &Path, error, what| {
            let path = path.to_owned();
            match error {
                pem::Error::NoItemsFound => Error::TlsMissing { path, what },
                error => Error::TlsFile { path, source: io::Error::other(error) },
            }
        };
        const CERTIFICATE: &str = "certificate";
        let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(certificate.1)
            .collect::<Result<_, _>>()
            .map_err(|error| wrong(certificate.0, error, CERTIFICATE))?;
        if chain.is_empty() {
            return Err(wrong(certificate.0, pem::Error::NoItemsFound, CERTIFICATE));
        }
        let private = PrivateKeyDer::from_pem_slice(key.1)
            .map_err(|error| wrong(key.0, error, "private key without a passphrase"))?;
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, private))
            .map_err(|source| Error::TlsKey { path: key.0.to_owned(), source })?;
        Ok(Self(Arc::new(config)))
    }
}

impl fmt::Debug for TlsConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TlsConfig(..)")
    }
}

/// Channels that may only be opened on a connection nobody can read along: TLS, or a Unix socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SecureChannels(u32);

impl SecureChannels {
    /// Every channel may be in the clear.
    pub const NONE: Self = Self(0);
    /// No channel may be in the clear.
    pub const ALL: Self = Self(u32::MAX);

    /// Adds the channel of this name (`main`, `display`, …); `false` if there is none.
    #[must_use]
    pub fn add(&mut self, name: &str) -> bool {
        let found = (0..=u8::MAX).filter_map(ChannelType::from_wire).find(|c| c.name() == name);
        if let Some(kind) = found {
            self.0 |= 1 << kind as u32;
        }
        found.is_some()
    }

    /// The names [`add`](Self::add) knows.
    pub fn names() -> impl Iterator<Item = &'static str> {
        (0..=u8::MAX).filter_map(ChannelType::from_wire).map(ChannelType::name)
    }

    pub(crate) fn contains(self, kind: ChannelType) -> bool {
        self.0 >> kind as u32 & 1 == 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channels_have_names() {
        let mut secure = SecureChannels::NONE;
        assert!(secure.add("main") && secure.add("inputs") && !secure.add("mian"));
        assert!(secure.contains(ChannelType::Main) && secure.contains(ChannelType::Inputs));
        assert!(!secure.contains(ChannelType::Display));
        assert!(SecureChannels::ALL.contains(ChannelType::Cursor));
        assert!(SecureChannels::names().any(|name| name == "display"));
    }

    #[test]
    fn a_bad_file_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let (cert, key) = (folder.path().join("cert.pem"), folder.path().join("key.pem"));
        let error = || TlsConfig::from_files(&cert, &key).unwrap_err().to_string();
        assert!(error().contains("cert.pem"), "{}", error());
        fs::write(&cert, "nothing of the kind").unwrap();
        assert!(error().contains("key.pem"), "{}", error());
        fs::write(&key, "nor here").unwrap();
        assert!(error().ends_with("cert.pem: there is no certificate in it"), "{}", error());
    }
}
