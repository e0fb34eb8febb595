//! A TLS client that trusts everybody, and can send what no TLS library sends: records without content.

use std::{
    io::{self, Read, Write},
    sync::Arc,
};

use rustls::{
    ClientConfig, ClientConnection, ContentType, DigitallySignedStruct, Error, ProtocolVersion,
    SignatureScheme, StreamOwned, SupportedCipherSuite,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{
        cipher::{MessageEncrypter, OutboundChunks, OutboundPlainMessage},
        ring,
    },
    pki_types::{CertificateDer, ServerName, UnixTime},
};

#[derive(Debug)]
struct Anybody;

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        ring::default_provider().signature_verification_algorithms.supported_schemes()
    }
}

/// TLS 1.3 over a connected socket.
pub fn connect<S: Read + Write>(socket: S) -> io::Result<StreamOwned<ClientConnection, S>> {
    let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(io::Error::other)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anybody))
        .with_no_client_auth();
    config.enable_secret_extraction = true;
    let name = ServerName::try_from("localhost").map_err(io::Error::other)?;
    let connection = ClientConnection::new(Arc::new(config), name).map_err(io::Error::other)?;
    let mut stream = StreamOwned::new(connection, socket);
    while stream.conn.is_handshaking() {
        stream.conn.complete_io(&mut stream.sock)?;
    }
    Ok(stream)
}

/// A connection that has nothing to say any more, and says so for ever.
pub struct EmptyRecords<S> {
    socket: S,
    cipher: Box<dyn MessageEncrypter>,
    sequence: u64,
}

impl<S: Read + Write> EmptyRecords<S> {
    /// Goes on where the connection is.
    pub fn after(stream: StreamOwned<ClientConnection, S>) -> io::Result<Self> {
        let Some(SupportedCipherSuite::Tls13(suite)) = stream.conn.negotiated_cipher_suite() else {
            return Err(io::Error::other("not TLS 1.3"));
        };
        let secrets = stream.conn.dangerous_extract_secrets().map_err(io::Error::other)?;
        use rustls::ConnectionTrafficSecrets::{Aes128Gcm, Aes256Gcm, Chacha20Poly1305};
        let (
            sequence,
            Aes128Gcm { key, iv } | Aes256Gcm { key, iv } | Chacha20Poly1305 { key, iv },
        ) = secrets.tx
        else {
            return Err(io::Error::other("an unknown cipher"));
        };
        let cipher = suite.aead_alg.encrypter(key, iv);
        Ok(Self { socket: stream.sock, cipher, sequence })
    }

    /// Sends some 16 KiB of them; how many bytes.
    pub fn send(&mut self) -> io::Result<usize> {
        let mut bytes = Vec::new();
        while bytes.len() < 16_000 {
            let message = OutboundPlainMessage {
                typ: ContentType::ApplicationData,
                version: ProtocolVersion::TLSv1_2,
                payload: OutboundChunks::Single(&[]),
            };
            let record = self.cipher.encrypt(message, self.sequence).map_err(io::Error::other)?;
            self.sequence += 1;
            bytes.extend_from_slice(&record.encode());
        }
        self.socket.write_all(&bytes)?;
        Ok(bytes.len())
    }
}
