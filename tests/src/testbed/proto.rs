//! What the driver on the outer machine and the agent in the test host say to each other.
//!
//! One TCP connection per request, which the driver sends as one JSON line ([`Request`]). After
//! [`Request::Run`] both sides send frames: one byte kind, four bytes little-endian length, payload.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

/// The agent's port inside.
pub const AGENT_PORT: u16 = 9;

/// The line on the serial console which says that the agent listens.
pub const READY: &str = "drago-testbed: ready";

/// The line with which the test host's init gives up.
pub const FAILED: &str = "drago-testbed: FAILED:";

/// The largest frame either side sends.
const MAX_FRAME: usize = 1 << 20;

/// What a connection is for.
#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    /// Run a program.
    Run {
        /// The secret given to the agent at boot.
        token: String,
        /// Program and arguments.
        argv: Vec<String>,
        /// The whole environment.
        env: Vec<(String, String)>,
        /// The working directory.
        cwd: String,
    },
    /// Carry bytes between this connection and a Unix socket inside, until both sides have closed.
    Connect {
        /// The secret given to the agent at boot.
        token: String,
        /// The socket's path.
        socket: String,
    },
    /// Keep the test host on for as long as this connection is open.
    Lease {
        /// The secret given to the agent at boot.
        token: String,
    },
}

impl Request {
    /// The secret that came with the request.
    pub fn token(&self) -> &str {
        match self {
            Self::Run { token, .. } | Self::Connect { token, .. } | Self::Lease { token } => token,
        }
    }
}

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Driver → agent: standard input; an empty frame is its end.
    Stdin,
    /// Driver → agent: a signal number (one byte) for the program's process group.
    Signal,
    /// Agent → driver: bytes of standard output.
    Stdout,
    /// Agent → driver: bytes of standard error.
    Stderr,
    /// Agent → driver: the program ended; the payload is the exit code as i32, or 128 + signal.
    Exit,
    /// Agent → driver: the program could not be started; the payload is the reason.
    Failed,
}

const KINDS: [Kind; 6] =
    [Kind::Stdin, Kind::Signal, Kind::Stdout, Kind::Stderr, Kind::Exit, Kind::Failed];

/// Sends one frame.
///
/// # Errors
/// If the connection fails.
pub fn send(mut to: impl Write, kind: Kind, payload: &[u8]) -> io::Result<()> {
    let length = u32::try_from(payload.len())
        .ok()
        .filter(|length| *length as usize <= MAX_FRAME)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "frame too long"))?;
    let mut frame = Vec::with_capacity(payload.len() + 5);
    frame.push(KINDS.iter().position(|k| *k == kind).unwrap_or_default() as u8);
    frame.extend(length.to_le_bytes());
    frame.extend(payload);
    to.write_all(&frame)
}

/// Receives one frame; `None` at an orderly end of the connection.
///
/// # Errors
/// If the connection fails or holds something else than frames.
pub fn receive(mut from: impl Read) -> io::Result<Option<(Kind, Vec<u8>)>> {
    let mut kind = [0];
    if from.read(&mut kind)? == 0 {
        return Ok(None);
    }
    let kind = *KINDS
        .get(usize::from(kind[0]))
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "unknown frame"))?;
    let mut length = [0; 4];
    from.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_FRAME {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "frame too long"));
    }
    let mut payload = vec![0; length];
    from.read_exact(&mut payload)?;
    Ok(Some((kind, payload)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_arrive_as_sent() {
        let mut wire = Vec::new();
        send(&mut wire, Kind::Stdin, b"").unwrap();
        send(&mut wire, Kind::Exit, &3i32.to_le_bytes()).unwrap();
        let mut from = wire.as_slice();
        assert_eq!(receive(&mut from).unwrap(), Some((Kind::Stdin, Vec::new())));
        assert_eq!(receive(&mut from).unwrap(), Some((Kind::Exit, vec![3, 0, 0, 0])));
        assert_eq!(receive(&mut from).unwrap(), None);
        assert!(receive(&[9u8, 0, 0, 0, 0][..]).is_err());
        assert!(receive(&[1u8, 255, 255, 255, 255][..]).is_err());
    }
}
