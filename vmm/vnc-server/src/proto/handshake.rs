//! From the first byte to ClientInit (RFC 6143 §7.1 to §7.3.1).

use super::{
    ProtocolError,
    auth::{self, CHALLENGE},
};

/// What the server says first: the highest version it knows.
pub const GREETING: &[u8; 12] = b"RFB 003.008\n";

const NO_AUTHENTICATION: u8 = 1;
const VNC_AUTHENTICATION: u8 = 2;

/// Versions whose handshakes differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Version {
    V3,
    V7,
    V8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Version,
    Security,
    Response,
    Init,
    Done,
}

/// What has to be done next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// More bytes are needed.
    Read,
    /// Send these bytes and go on.
    Send(Vec<u8>),
    /// The password was wrong: send these bytes, after a pause, and hang up.
    Refuse(Vec<u8>),
    /// The client is in; whether it is content with others beside it.
    Done {
        /// ClientInit's flag.
        shared: bool,
    },
}

/// The server's side of a handshake.
#[derive(Debug)]
pub struct Handshake {
    password: Option<Vec<u8>>,
    challenge: [u8; CHALLENGE],
    state: State,
    version: Version,
}

impl Handshake {
    /// A handshake that demands `password`, if there is one. `challenge` must be random.
    pub fn new(password: Option<Vec<u8>>, challenge: [u8; CHALLENGE]) -> Self {
        Self { password, challenge, state: State::Version, version: Version::V8 }
    }

    /// Takes bytes off the front of what the client has sent.
    ///
    /// # Errors
    ///
    /// If the client cannot be served; hang up.
    pub fn advance(&mut self, input: &mut Vec<u8>) -> Result<Step, ProtocolError> {
        Ok(match self.state {
            State::Version => match take::<12>(input) {
                None if !GREETING.starts_with(&input[..input.len().min(4)]) => {
                    return Err(ProtocolError::Version);
                }
                None => Step::Read,
                Some(version) => self.version(&version)?,
            },
            State::Security => match take::<1>(input) {
                None => Step::Read,
                Some([chosen]) if chosen == self.security_type() => self.chosen(),
                Some([chosen]) => return Err(ProtocolError::SecurityType(chosen)),
            },
            State::Response => match take::<CHALLENGE>(input) {
                None => Step::Read,
                Some(answer) => self.answered(&answer),
            },
            State::Init => match take::<1>(input) {
                None => Step::Read,
                Some([shared]) => {
                    self.state = State::Done;
                    Step::Done { shared: shared != 0 }
                }
            },
            State::Done => Step::Read,
        })
    }

    fn security_type(&self) -> u8 {
        if self.password.is_some() { VNC_AUTHENTICATION } else { NO_AUTHENTICATION }
    }

    fn version(&mut self, text: &[u8; 12]) -> Result<Step, ProtocolError> {
        // Anything below 3.7, and odd numbers that some clients made up, mean 3.3.
        self.version = match text {
            b"RFB 003.008\n" => Version::V8,
            b"RFB 003.007\n" => Version::V7,
            [b'R', b'F', b'B', b' ', b'0', b'0', b'3', b'.', .., b'\n'] => Version::V3,
            // A later major version is served as the highest one we know.
            [b'R', b'F', b'B', b' ', .., b'\n'] => Version::V8,
            _ => return Err(ProtocolError::Version),
        };
        if self.version >= Version::V7 {
            self.state = State::Security;
            return Ok(Step::Send(vec![1, self.security_type()]));
        }
        // Version 3.3: the server decides.
        let mut bytes = u32::from(self.security_type()).to_be_bytes().to_vec();
        self.state = State::Init;
        if self.password.is_some() {
            bytes.extend(self.challenge);
            self.state = State::Response;
        }
        Ok(Step::Send(bytes))
    }

    fn chosen(&mut self) -> Step {
        if self.password.is_some() {
            self.state = State::Response;
            return Step::Send(self.challenge.to_vec());
        }
        self.state = State::Init;
        // Only 3.8 confirms that no authentication succeeded.
        match self.version {
            Version::V8 => Step::Send(0_u32.to_be_bytes().to_vec()),
            _ => Step::Send(Vec::new()),
        }
    }

    fn answered(&mut self, answer: &[u8; CHALLENGE]) -> Step {
        let password = self.password.as_deref().unwrap_or_default();
        if auth::is_right(password, &self.challenge, answer) {
            self.state = State::Init;
            return Step::Send(0_u32.to_be_bytes().to_vec());
        }
        self.state = State::Done;
        let mut bytes = 1_u32.to_be_bytes().to_vec();
        if self.version == Version::V8 {
            let reason = b"wrong password";
            bytes.extend((reason.len() as u32).to_be_bytes());
            bytes.extend(reason);
        }
        Step::Refuse(bytes)
    }
}

/// Takes the first bytes if there are enough.
fn take<const N: usize>(input: &mut Vec<u8>) -> Option<[u8; N]> {
    let taken = *input.first_chunk::<N>()?;
    input.drain(..N);
    Some(taken)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(password: Option<&[u8]>, client: &[&[u8]]) -> Result<(Vec<u8>, Step), ProtocolError> {
        let mut handshake = Handshake::new(password.map(<[u8]>::to_vec), [9; CHALLENGE]);
        let mut sent = Vec::new();
        let mut input = Vec::new();
        for byte in client.iter().copied().flatten() {
            input.push(*byte);
            loop {
                match handshake.advance(&mut input)? {
                    Step::Read => break,
                    Step::Send(bytes) => sent.extend(bytes),
                    last => return Ok((sent, last)),
                }
            }
        }
        Ok((sent, Step::Read))
    }

    #[test]
    fn without_password() {
        let (sent, step) = run(None, &[GREETING, &[1], &[1]]).unwrap();
        assert_eq!(sent, [1, 1, 0, 0, 0, 0]);
        assert_eq!(step, Step::Done { shared: true });
        let (sent, step) = run(None, &[b"RFB 003.007\n", &[1], &[0]]).unwrap();
        assert_eq!(sent, [1, 1]);
        assert_eq!(step, Step::Done { shared: false });
        let (sent, step) = run(None, &[b"RFB 003.003\n", &[1]]).unwrap();
        assert_eq!(sent, [0, 0, 0, 1]);
        assert_eq!(step, Step::Done { shared: true });
    }

    #[test]
    fn with_password() {
        let right = auth::response(b"pw", &[9; CHALLENGE]);
        for (version, choice) in [(GREETING, &[2][..]), (b"RFB 003.003\n", &[])] {
            let (_, step) = run(Some(b"pw"), &[version, choice, &right, &[1]]).unwrap();
            assert_eq!(step, Step::Done { shared: true });
            let (_, step) = run(Some(b"pw"), &[version, choice, &[0; 16], &[1]]).unwrap();
            assert!(matches!(step, Step::Refuse(_)));
        }
        let error = run(Some(b"pw"), &[GREETING, &[1]]).unwrap_err();
        assert_eq!(error, ProtocolError::SecurityType(1), "there is no way round it");
    }

    #[test]
    fn others_are_told_apart_at_once() {
        assert_eq!(run(None, &[b"GET "]).unwrap_err(), ProtocolError::Version);
        assert_eq!(run(None, &[b"RFB 003.008X"]).unwrap_err(), ProtocolError::Version);
    }
}
