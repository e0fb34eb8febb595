//! The host's end of the serial port.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    path::PathBuf,
    sync::Arc,
    thread,
};

use devices::legacy::serial::Serial;

use crate::{
    exit::{Exit, ExitReason},
    sys::RawTerminal,
};

/// `--serial`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum SerialConfig {
    /// Standard input and output.
    #[default]
    Stdio,
    /// No serial port.
    Off,
    /// Output into a file, no input.
    File(PathBuf),
}

impl std::str::FromStr for SerialConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "stdio" => Ok(Self::Stdio),
            "off" => Ok(Self::Off),
            _ => match text.strip_prefix("file=") {
                Some(path) if !path.is_empty() => Ok(Self::File(path.into())),
                _ => Err("expected stdio, off or file=PATH".to_owned()),
            },
        }
    }
}

impl SerialConfig {
    /// Opens the output side; `None` for no port at all.
    pub fn open(&self) -> io::Result<Option<Box<dyn Write + Send>>> {
        Ok(match self {
            Self::Stdio => Some(Box::new(io::stdout())),
            Self::Off => None,
            Self::File(path) => {
                Some(Box::new(OpenOptions::new().create(true).append(true).open(path)?))
            }
        })
    }
}

/// Feeds standard input to the serial port until it ends. A terminal is put into raw mode until
/// the returned guard is dropped.
pub fn read_stdin(serial: Arc<Serial>, exit: Arc<Exit>) -> io::Result<Option<RawTerminal>> {
    let stdin = io::stdin();
    let terminal = RawTerminal::new(&stdin);
    let is_terminal = terminal.is_some();
    thread::Builder::new().name("serial-in".to_owned()).spawn(move || {
        // Past std's buffer: a byte typed must arrive at once.
        let Ok(fd) = rustix::io::dup(io::stdin()) else { return };
        carry(&mut File::from(fd), is_terminal, &serial, &exit);
    })?;
    if is_terminal {
        tracing::info!("the terminal belongs to the guest; Ctrl-A X ends the machine");
    }
    Ok(terminal)
}

fn carry(input: &mut impl Read, is_terminal: bool, serial: &Serial, exit: &Exit) {
    let mut escape = Escape::default();
    let mut buffer = [0; 256];
    loop {
        match input.read(&mut buffer) {
            // The end, as with /dev/null: the guest simply gets no more input.
            Ok(0) => return,
            Ok(count) if is_terminal => match escape.filter(&buffer[..count]) {
                Some(bytes) => serial.enqueue(&bytes),
                None => return exit.request(ExitReason::Quit),
            },
            Ok(count) => serial.enqueue(&buffer[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                tracing::debug!(%error, "standard input ended");
                return;
            }
        }
    }
}

/// Recognises Ctrl-A X (quit) and Ctrl-A Ctrl-A (one Ctrl-A for the guest).
#[derive(Default)]
struct Escape {
    pending: bool,
}

impl Escape {
    const KEY: u8 = 1;

    /// What goes to the guest; `None`: quit.
    fn filter(&mut self, bytes: &[u8]) -> Option<Vec<u8>> {
        let mut through = Vec::with_capacity(bytes.len());
        for &byte in bytes {
            match (std::mem::take(&mut self.pending), byte) {
                (true, b'x' | b'X') => return None,
                (false, Self::KEY) => self.pending = true,
                (_, byte) => through.push(byte),
            }
        }
        Some(through)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escape_sequences() {
        let mut escape = Escape::default();
        assert_eq!(escape.filter(b"ls\n").unwrap(), b"ls\n");
        assert_eq!(escape.filter(b"\x01").unwrap(), b"");
        assert_eq!(escape.filter(b"\x01y").unwrap(), b"\x01y");
        assert_eq!(escape.filter(b"\x01x"), None);
    }

    #[test]
    fn option_values() {
        assert_eq!("off".parse(), Ok(SerialConfig::Off));
        assert_eq!("file=a,b".parse(), Ok(SerialConfig::File("a,b".into())));
        assert!("file=".parse::<SerialConfig>().is_err());
    }
}
