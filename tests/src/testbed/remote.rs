//! Programs that run inside the test host, handled like `std::process::Command`.

use std::fs::File;
use std::io::{self, BufReader, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::proto::{self, Kind, Request};
use crate::console::{Console, Sink};

/// Which of a program's two outputs some bytes came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Out,
    /// Standard error.
    Err,
}

/// A program to be run inside.
#[derive(Debug, Clone)]
pub struct RemoteCommand {
    port: u16,
    token: String,
    argv: Vec<String>,
    env: Vec<(String, String)>,
    cwd: String,
}

/// What a program wrote and how it ended.
#[derive(Debug, Clone)]
pub struct RemoteOutput {
    /// The exit code, or 128 + the signal's number.
    pub code: i32,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
}

/// A program running inside. Dropping it kills it.
#[derive(Debug)]
pub struct RemoteChild {
    stream: Arc<Mutex<TcpStream>>,
    end: mpsc::Receiver<Result<i32>>,
}

impl RemoteCommand {
    pub(crate) fn new(port: u16, token: String, program: String) -> Self {
        let cwd =
            std::env::current_dir().map_or_else(|_| "/".into(), |dir| dir.display().to_string());
        let mut env: Vec<(String, String)> = [
            ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
            ("HOME", "/tmp/home"),
            ("TERM", "xterm"),
            ("LANG", "C.UTF-8"),
            ("USER", "root"),
            ("SHELL", "/bin/sh"),
            ("XDG_RUNTIME_DIR", "/run"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into();
        for name in ["RUST_LOG", "RUST_BACKTRACE"] {
            if let Ok(value) = std::env::var(name) {
                env.push((name.to_owned(), value));
            }
        }
        Self { port, token, argv: vec![program], env, cwd }
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, arg: impl Into<String>) -> Self {
        self.argv.push(arg.into());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<A: Into<String>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.argv.extend(args.into_iter().map(Into::into));
        self
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    /// Sets the working directory.
    #[must_use]
    pub fn cwd(mut self, dir: &Path) -> Self {
        self.cwd = dir.display().to_string();
        self
    }

    /// Starts the program; its output goes to `sink` as it comes, from another thread.
    ///
    /// # Errors
    /// If the test host is gone. That the program cannot be started is told by [`RemoteChild::wait`].
    pub fn spawn(
        self,
        mut sink: impl FnMut(Stream, &[u8]) + Send + 'static,
    ) -> Result<RemoteChild> {
        let mut stream =
            TcpStream::connect(("127.0.0.1", self.port)).context("the test host is gone")?;
        stream.set_nodelay(true)?;
        let request =
            Request::Run { token: self.token, argv: self.argv, env: self.env, cwd: self.cwd };
        writeln!(stream, "{}", serde_json::to_string(&request)?)?;
        let mut reader = BufReader::new(stream.try_clone()?);
        let (tell, end) = mpsc::channel();
        std::thread::spawn(move || {
            let end = loop {
                match proto::receive(&mut reader) {
                    Ok(Some((Kind::Stdout, bytes))) => sink(Stream::Out, &bytes),
                    Ok(Some((Kind::Stderr, bytes))) => sink(Stream::Err, &bytes),
                    Ok(Some((Kind::Exit, code))) => {
                        break <[u8; 4]>::try_from(code.as_slice())
                            .map(i32::from_le_bytes)
                            .context("bad exit frame");
                    }
                    Ok(Some((Kind::Failed, why))) => {
                        break Err(anyhow::anyhow!("{}", String::from_utf8_lossy(&why)));
                    }
                    Ok(Some(_)) => {}
                    Ok(None) => break Err(anyhow::anyhow!("the test host ended")),
                    Err(error) => break Err(error).context("the test host ended"),
                }
            };
            let _ = tell.send(end);
        });
        Ok(RemoteChild { stream: Arc::new(Mutex::new(stream)), end })
    }

    /// Starts the program; its standard output and standard error go to a console each, and to a file.
    ///
    /// # Errors
    /// As [`RemoteCommand::spawn`].
    pub fn spawn_with_consoles(self, mut files: [File; 2]) -> Result<(RemoteChild, [Console; 2])> {
        let consoles = [Console::default(), Console::default()];
        let sinks = consoles.clone().map(Sink);
        let child = self.spawn(move |stream, bytes| {
            let number = usize::from(stream == Stream::Err);
            sinks[number].0.push(bytes);
            // A full disk must not end what runs.
            let _ = files[number].write_all(bytes);
        })?;
        Ok((child, consoles))
    }

    /// Runs the program to its end and keeps what it wrote.
    ///
    /// # Errors
    /// If it cannot be started or the test host ends.
    pub fn output(self) -> Result<RemoteOutput> {
        let (tell, told) = mpsc::channel();
        let mut child = self.spawn(move |stream, bytes| {
            let _ = tell.send((stream, bytes.to_vec()));
        })?;
        child.stdin().close()?;
        let code = child.wait()?;
        let mut output = RemoteOutput { code, stdout: Vec::new(), stderr: Vec::new() };
        for (stream, bytes) in told {
            match stream {
                Stream::Out => output.stdout.extend(bytes),
                Stream::Err => output.stderr.extend(bytes),
            }
        }
        Ok(output)
    }
}

impl RemoteChild {
    /// Waits for the program's end: its exit code, or 128 + the signal's number.
    ///
    /// # Errors
    /// If it could not be started or the test host ended.
    pub fn wait(&mut self) -> Result<i32> {
        self.end.recv().context("the program's end was told already")?
    }

    /// Waits for the program's end, but not for ever.
    ///
    /// # Errors
    /// As [`RemoteChild::wait`], and if the time is over.
    pub fn wait_timeout(&mut self, limit: Duration) -> Result<i32> {
        match self.end.recv_timeout(limit) {
            Ok(end) => end,
            Err(mpsc::RecvTimeoutError::Timeout) => bail!("still running after {limit:?}"),
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                bail!("the program's end was told already")
            }
        }
    }

    /// The exit code if the program has ended.
    ///
    /// # Errors
    /// As [`RemoteChild::wait`].
    pub fn try_wait(&mut self) -> Result<Option<i32>> {
        match self.end.try_recv() {
            Ok(end) => end.map(Some),
            Err(mpsc::TryRecvError::Empty) => Ok(None),
            Err(mpsc::TryRecvError::Disconnected) => bail!("the program's end was told already"),
        }
    }

    /// Sends a signal to the program's process group.
    ///
    /// # Errors
    /// If the test host is gone.
    pub fn signal(&self, number: u8) -> Result<()> {
        send(&self.stream, Kind::Signal, &[number]).context("the test host is gone")
    }

    /// The program's standard input. Dropping it leaves the input open; [`RemoteStdin::close`] ends it.
    pub fn stdin(&self) -> RemoteStdin {
        RemoteStdin { stream: Arc::clone(&self.stream) }
    }
}

impl Drop for RemoteChild {
    fn drop(&mut self) {
        if let Ok(stream) = self.stream.lock() {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }
}

/// The standard input of a program running inside.
#[derive(Debug)]
pub struct RemoteStdin {
    stream: Arc<Mutex<TcpStream>>,
}

impl RemoteStdin {
    /// Ends the program's input.
    ///
    /// # Errors
    /// If the test host is gone.
    pub fn close(self) -> io::Result<()> {
        send(&self.stream, Kind::Stdin, &[])
    }
}

impl Write for RemoteStdin {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let part = &bytes[..bytes.len().min(32 * 1024)];
        if !part.is_empty() {
            send(&self.stream, Kind::Stdin, part)?;
        }
        Ok(part.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn send(stream: &Mutex<TcpStream>, kind: Kind, payload: &[u8]) -> io::Result<()> {
    let stream = stream.lock().unwrap_or_else(PoisonError::into_inner);
    proto::send(&*stream, kind, payload)
}
