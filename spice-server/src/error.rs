//! Errors of starting a server.

use std::{io, net::SocketAddr, path::PathBuf};

use crate::{VideoCodec, VideoError};

/// Why a server could not be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No address was given to listen on.
    #[error("no address to listen on: call ServerBuilder::listen at least once")]
    NoAddress,
    /// An address cannot be listened on.
    #[error("cannot listen on {address}: is another program using the port?")]
    Listen {
        /// The address asked for.
        address: SocketAddr,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// A Unix socket cannot be listened on.
    #[error("cannot listen on the socket {}", path.display())]
    ListenUnix {
        /// Its file.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The video codec that was asked for is not there.
    #[error(
        "there is no {codec} encoder: install its library ({}), or ask for auto", codec.library()
    )]
    Video {
        /// The codec.
        codec: VideoCodec,
        /// What is wrong with its library.
        #[source]
        source: VideoError,
    },
    /// A thread or a descriptor could not be made.
    #[error("cannot start the server's {what}")]
    Start {
        /// What was being made.
        what: &'static str,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The password file cannot be read.
    #[error("cannot read the password file {}", path.display())]
    PasswordFile {
        /// The file.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The password does not fit the protocol.
    #[error("a password of {length} bytes: SPICE takes 1 to {max} bytes without NUL")]
    PasswordLength {
        /// Its length in bytes.
        length: usize,
        /// The protocol's limit.
        max: usize,
    },
    /// The page for browsers cannot be read.
    #[error("{}: the page for browsers cannot be read", path.display())]
    WebFolder {
        /// The folder.
        path: PathBuf,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// There is no page for browsers.
    #[error("{}: there is no page in it (expected one of {expected})", path.display())]
    WebNothing {
        /// The folder.
        path: PathBuf,
        /// Files that would do.
        expected: String,
    },
    /// A certificate or key file cannot be read.
    #[error("{}: this is no PEM file that can be read", path.display())]
    TlsFile {
        /// The file.
        path: PathBuf,
        /// What the system or the parser says.
        #[source]
        source: io::Error,
    },
    /// What should be in a file is not.
    #[error("{}: there is no {what} in it", path.display())]
    TlsMissing {
        /// The file.
        path: PathBuf,
        /// `certificate`, or `private key without a passphrase`.
        what: &'static str,
    },
    /// Certificate and key cannot be used together.
    #[error("{}: this key cannot be used with the certificate", path.display())]
    TlsKey {
        /// The key's file.
        path: PathBuf,
        /// Why.
        #[source]
        source: rustls::Error,
    },
}
