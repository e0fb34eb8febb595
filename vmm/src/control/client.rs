//! `drago-vmm ctl`: the other end of the control socket.

use std::{
    fs,
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
};

use super::{Greeting, MAX_LINE, PROTOCOL_VERSION, Password, Request, Response};

/// A picture larger than this is refused: 16384 x 16384 pixels need less as PNG.
const MAX_PICTURE: usize = 1 << 30;

/// What `drago-vmm ctl` may be asked to do.
#[derive(Debug, Clone, PartialEq, Eq, clap::Subcommand)]
pub enum Action {
    /// Show what is running
    Status {
        /// Print one line of JSON
        #[arg(long)]
        json: bool,
    },
    /// Press the power button until the guest has shut down
    Shutdown {
        /// Return only when the VMM is gone
        #[arg(long)]
        wait: bool,
    },
    /// Press Ctrl+Alt+Delete
    CtrlAltDel,
    /// Save a picture of the screen as a PNG file
    Screenshot {
        /// The file to write
        file: PathBuf,
        /// Display number
        #[arg(long, default_value_t = 0)]
        display: u32,
    },
    /// Change the size of the screen
    Resize {
        /// Width and height in pixels, such as 1920x1080
        #[arg(value_parser = parse_size)]
        size: (u32, u32),
        /// Display number
        #[arg(long, default_value_t = 0)]
        display: u32,
    },
    /// Take MIB of memory from the guest and print how much it does without then
    Balloon {
        /// Size of the balloon in MiB; left out: only print it
        mib: Option<u32>,
    },
    /// Print what the SPICE server counts, one line of JSON per client
    SpiceClients,
    /// Set another password for SPICE clients; those that are connected stay
    SetPassword {
        /// File whose first line is the password (- for standard input)
        file: PathBuf,
        /// Until when it is good: never, now, +SECONDS, or seconds since 1970
        #[arg(long, default_value = "never")]
        expires: String,
        /// Disconnect those that are connected
        #[arg(long)]
        disconnect: bool,
    },
    /// Say until when the password for SPICE clients is good
    ExpirePassword {
        /// never, now, +SECONDS, or seconds since 1970
        expires: String,
    },
    /// Show SPICE clients with TLS another certificate from now on
    SetCertificate {
        /// PEM file with the certificate chain
        certificate: PathBuf,
        /// PEM file with its key
        key: PathBuf,
    },
    /// Print what happens, one line of JSON per event, until the virtual machine ends
    Events,
    /// End the virtual machine at once, as if unplugged (disks are flushed)
    Quit,
}

fn parse_size(text: &str) -> Result<(u32, u32), String> {
    text.split_once('x')
        .and_then(|(width, height)| Some((width.parse().ok()?, height.parse().ok()?)))
        .ok_or_else(|| "expected WIDTHxHEIGHT, for example 1920x1080".to_owned())
}

/// Why `drago-vmm ctl` failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody answers on the socket.
    #[error("--control {}: no virtual machine answers there", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The connection broke.
    #[error("--control {}: the connection broke", path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The other side speaks something else.
    #[error("--control {}: {reason}", path.display())]
    Protocol {
        /// The socket.
        path: PathBuf,
        /// What was odd.
        reason: String,
    },
    /// The virtual machine refused.
    #[error("{0}")]
    Refused(String),
    /// A file for the virtual machine could not be read.
    #[error("{}: the file could not be read", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The picture could not be written.
    #[error("{}: the picture could not be written", file.display())]
    Write {
        /// The file.
        file: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

/// Carries out `action` and writes what there is to say to `out`.
pub fn run(path: &Path, action: &Action, out: &mut impl Write) -> Result<(), ClientError> {
    let io_error = |source| ClientError::Io { path: path.to_owned(), source };
    let mut connection = match Connection::open(path) {
        Ok(connection) => connection,
        // A machine that is off needs no shutdown: systemd's ExecStop also runs after the guest
        // has powered off by itself.
        Err(error) if matches!(action, Action::Shutdown { .. }) && error.machine_is_gone() => {
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    let (request, file) = match action.clone() {
        Action::Status { .. } => (Request::Status {}, None),
        Action::Shutdown { .. } => (Request::Shutdown {}, None),
        Action::CtrlAltDel => (Request::CtrlAltDel {}, None),
        Action::Screenshot { file, display } => (Request::Screenshot { display }, Some(file)),
        Action::Resize { size: (width, height), display } => {
            (Request::Resize { display, width, height }, None)
        }
        Action::Balloon { mib } => (Request::Balloon { mib }, None),
        Action::SpiceClients => (Request::SpiceClients {}, None),
        Action::SetPassword { file, expires, disconnect } => {
            let password = read_password(&file)?;
            (Request::SetPassword { password, expires: Some(expires), disconnect }, None)
        }
        Action::SetCertificate { certificate, key } => {
            let read = |file: &Path| {
                fs::read_to_string(file)
                    .map_err(|source| ClientError::Read { file: file.to_owned(), source })
            };
            let (certificate, key) = (read(&certificate)?, Password(read(&key)?));
            (Request::SetCertificate { certificate, key }, None)
        }
        Action::ExpirePassword { expires } => (Request::ExpirePassword { expires }, None),
        Action::Events => (Request::Events {}, None),
        Action::Quit => (Request::Quit {}, None),
    };
    match connection.ask(&request)? {
        Response::Status(status) => match action {
            Action::Status { json: true } => {
                let line = serde_json::to_string(&status).map_err(io::Error::from);
                writeln!(out, "{}", line.map_err(io_error)?).map_err(io_error)?;
            }
            _ => writeln!(out, "{status}").map_err(io_error)?,
        },
        Response::Screenshot { bytes } => {
            let picture = connection.read_exact(bytes)?;
            if let Some(file) = file {
                fs::write(&file, picture).map_err(|source| ClientError::Write { file, source })?;
            }
        }
        Response::Balloon { mib } => writeln!(out, "{mib}").map_err(io_error)?,
        Response::SpiceClients { clients } => {
            for client in clients {
                writeln!(out, "{client}").map_err(io_error)?;
            }
        }
        Response::Done {} => {}
        Response::Error { message } => return Err(ClientError::Refused(message)),
    }
    if *action == Action::Events {
        return connection.copy_lines(out);
    }
    if matches!(action, Action::Shutdown { wait: true }) {
        connection.wait_for_end()?;
    }
    Ok(())
}

/// The first line of a file, or of standard input.
fn read_password(file: &Path) -> Result<Password, ClientError> {
    let failed = |source| ClientError::Read { file: file.to_owned(), source };
    let mut reader: Box<dyn Read> = if file == Path::new("-") {
        Box::new(io::stdin())
    } else {
        Box::new(fs::File::open(file).map_err(failed)?)
    };
    let mut text = String::new();
    reader.by_ref().take(MAX_LINE as u64 / 2).read_to_string(&mut text).map_err(failed)?;
    Ok(Password(text.lines().next().unwrap_or_default().to_owned()))
}

impl ClientError {
    fn machine_is_gone(&self) -> bool {
        use io::ErrorKind::{ConnectionRefused, ConnectionReset, NotFound, UnexpectedEof};
        match self {
            Self::Connect { source, .. } => {
                matches!(source.kind(), NotFound | ConnectionRefused)
            }
            Self::Io { source, .. } => matches!(source.kind(), ConnectionReset | UnexpectedEof),
            _ => false,
        }
    }
}

struct Connection<'a> {
    path: &'a Path,
    reader: BufReader<UnixStream>,
}

impl<'a> Connection<'a> {
    fn open(path: &'a Path) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(path)
            .map_err(|source| ClientError::Connect { path: path.to_owned(), source })?;
        let mut connection = Self { path, reader: BufReader::new(stream) };
        let greeting: Greeting = connection.read_message()?;
        if greeting.server != "drago-vmm" || greeting.protocol < PROTOCOL_VERSION {
            return Err(connection.protocol_error(format!(
                "{} {} speaks version {} of the control protocol, this program version {}",
                greeting.server, greeting.version, greeting.protocol, PROTOCOL_VERSION
            )));
        }
        Ok(connection)
    }

    fn ask(&mut self, request: &Request) -> Result<Response, ClientError> {
        let mut line = serde_json::to_vec(request).map_err(|error| self.io_error(error.into()))?;
        line.push(b'\n');
        self.reader.get_mut().write_all(&line).map_err(|source| self.io_error(source))?;
        self.read_message()
    }

    fn read_message<T: serde::de::DeserializeOwned>(&mut self) -> Result<T, ClientError> {
        let mut line = Vec::new();
        let read = self.reader.by_ref().take(MAX_LINE as u64).read_until(b'\n', &mut line);
        match read {
            Ok(0) => Err(self.io_error(io::ErrorKind::UnexpectedEof.into())),
            Ok(_) => serde_json::from_slice(&line)
                .map_err(|error| self.protocol_error(format!("an answer made no sense: {error}"))),
            Err(source) => Err(self.io_error(source)),
        }
    }

    fn read_exact(&mut self, bytes: usize) -> Result<Vec<u8>, ClientError> {
        if bytes > MAX_PICTURE {
            return Err(self.protocol_error(format!("a picture of {bytes} bytes is too large")));
        }
        let mut data = vec![0; bytes];
        self.reader.read_exact(&mut data).map_err(|source| self.io_error(source))?;
        Ok(data)
    }

    /// Hands on what comes, line by line, until the end.
    fn copy_lines(&mut self, out: &mut impl Write) -> Result<(), ClientError> {
        loop {
            let mut line = Vec::new();
            match self.reader.read_until(b'\n', &mut line) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(()),
                Err(source) => return Err(self.io_error(source)),
            }
            out.write_all(&line).and_then(|()| out.flush()).map_err(|e| self.io_error(e))?;
        }
    }

    fn wait_for_end(&mut self) -> Result<(), ClientError> {
        match io::copy(&mut self.reader, &mut io::sink()) {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(()),
            Err(source) => Err(self.io_error(source)),
        }
    }

    fn io_error(&self, source: io::Error) -> ClientError {
        ClientError::Io { path: self.path.to_owned(), source }
    }

    fn protocol_error(&self, reason: String) -> ClientError {
        ClientError::Protocol { path: self.path.to_owned(), reason }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, mpsc};

    use super::*;
    use crate::control::server::{ControlServer, tests::Recorder};

    #[test]
    fn every_action_reaches_the_machine() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control");
        let (sender, calls) = mpsc::sync_channel(16);
        let server = ControlServer::start(&path, Arc::new(Recorder(sender))).unwrap();

        let mut out = Vec::new();
        run(&path, &Action::Status { json: false }, &mut out).unwrap();
        assert!(String::from_utf8(out).unwrap().contains("name     guest"));

        let file = folder.path().join("picture.png");
        run(&path, &Action::Screenshot { file: file.clone(), display: 7 }, &mut io::sink())
            .unwrap();
        assert_eq!(fs::read(&file).unwrap(), vec![7; 70_000]);

        let size = parse_size("1024x768").unwrap();
        run(&path, &Action::Resize { size, display: 0 }, &mut io::sink()).unwrap();
        assert_eq!(calls.recv().unwrap(), "1024x768");

        for (mib, printed) in [(Some(512), "512\n"), (None, "7\n")] {
            let mut out = Vec::new();
            run(&path, &Action::Balloon { mib }, &mut out).unwrap();
            assert_eq!(String::from_utf8(out).unwrap(), printed);
            assert_eq!(calls.recv().unwrap(), format!("balloon {mib:?}"));
        }

        let mut out = Vec::new();
        run(&path, &Action::SpiceClients, &mut out).unwrap();
        assert_eq!(String::from_utf8(out).unwrap(), "{\"peer\":\"somebody\"}\n");

        let file = folder.path().join("password");
        fs::write(&file, "open sesame\nand more\n").unwrap();
        let expires = "never".to_owned();
        let action = Action::SetPassword { file: file.clone(), expires, disconnect: true };
        run(&path, &action, &mut io::sink()).unwrap();
        assert_eq!(calls.recv().unwrap(), "password open sesame Never true");
        let (certificate, key) = (folder.path().join("cert"), folder.path().join("key"));
        fs::write(&certificate, "C").unwrap();
        fs::write(&key, "K").unwrap();
        let action = Action::SetCertificate { certificate, key };
        run(&path, &action, &mut io::sink()).unwrap();
        assert_eq!(calls.recv().unwrap(), "certificate C K");
        let expire = |when: &str| {
            run(&path, &Action::ExpirePassword { expires: when.into() }, &mut io::sink())
        };
        expire("now").unwrap();
        assert_eq!(calls.recv().unwrap(), "expire Now");
        expire("+3600").unwrap();
        assert!(calls.recv().unwrap().starts_with("expire At("));
        let error = expire("tomorrow").unwrap_err().to_string();
        assert!(error.contains("expires=tomorrow: expected never"), "{error}");

        let mut out = Vec::new();
        run(&path, &Action::Events, &mut out).unwrap();
        let event: serde_json::Value = serde_json::from_slice(&out).unwrap();
        assert_eq!((&event["event"], &event["answer"]), (&"test".into(), &42.into()));

        let error = run(&path, &Action::CtrlAltDel, &mut io::sink()).unwrap_err();
        assert_eq!(error.to_string(), "there is no keyboard");

        run(&path, &Action::Quit, &mut io::sink()).unwrap();
        assert_eq!(calls.recv().unwrap(), "quit");
        drop(server);
    }

    #[test]
    fn shutting_down_a_machine_that_is_off_succeeds() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("nobody");
        run(&path, &Action::Shutdown { wait: true }, &mut io::sink()).unwrap();
        let error = run(&path, &Action::Quit, &mut io::sink()).unwrap_err();
        assert!(error.to_string().contains("nobody"), "{error}");
        assert!(parse_size("1024").is_err());
    }
}
