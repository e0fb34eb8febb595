//! The agent: runs inside the test host, starts programs and carries their input, output and end, and what
//! is said on Unix sockets in there.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process_group};

use super::carry::carry;
use super::proto::{self, AGENT_PORT, Kind, READY, Request};

/// The driver takes the lease as soon as it has read [`READY`]. After so long it was ended before that.
const LEASE_LIMIT: Duration = Duration::from_secs(300);

/// What becomes of the lease.
pub(super) enum Lease {
    Taken,
    Over,
}

/// Serves until the driver's lease ends, or is not taken.
///
/// # Errors
/// If the agent cannot listen.
pub fn serve(token: &str) -> Result<()> {
    let listener = TcpListener::bind(("0.0.0.0", AGENT_PORT)).context("agent cannot listen")?;
    println!("{READY}");
    let (tell, lease) = mpsc::channel();
    let token: Arc<str> = token.into();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let (token, tell) = (Arc::clone(&token), tell.clone());
            std::thread::spawn(move || {
                if let Err(error) = connection(&stream, &token, &tell) {
                    println!("drago-testbed: {error:#}");
                }
            });
        }
    });
    if let Ok(Lease::Taken) = lease.recv_timeout(LEASE_LIMIT) {
        let _ = lease.recv();
    }
    println!("drago-testbed: the driver has gone");
    Ok(())
}

/// Serves one connection to its end.
pub(super) fn connection(
    stream: &TcpStream,
    token: &str,
    lease: &mpsc::Sender<Lease>,
) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.by_ref().take(1 << 20).read_line(&mut line)?;
    if line.is_empty() {
        return Ok(());
    }
    let request: Request = serde_json::from_str(&line).context("bad request")?;
    if request.token() != token {
        bail!("a request with the wrong token");
    }
    match request {
        Request::Lease { .. } => {
            let _ = lease.send(Lease::Taken);
            // Nothing more is ever sent on it: a read returns when the driver is gone.
            let _ = reader.read(&mut [0]);
            let _ = lease.send(Lease::Over);
        }
        Request::Run { argv, env, cwd, .. } => run(stream, reader, &argv, env, &cwd)?,
        Request::Connect { socket, .. } => {
            // Where nobody listens, the connection ends without a word: programs come and go.
            if let Ok(mut unix) = UnixStream::connect(socket) {
                unix.write_all(reader.buffer())?;
                carry(stream, &unix);
            }
        }
    }
    Ok(())
}

fn run(
    stream: &TcpStream,
    from_driver: BufReader<TcpStream>,
    argv: &[String],
    env: Vec<(String, String)>,
    cwd: &str,
) -> Result<()> {
    let out = Arc::new(Mutex::new(stream.try_clone()?));
    let mut child = match start(argv, env, cwd) {
        Ok(child) => child,
        Err(error) => {
            send(&out, Kind::Failed, format!("{error:#}").as_bytes());
            return Ok(());
        }
    };
    let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let stdin = child.stdin.take();
    let readers: Vec<_> = [
        child.stdout.take().map(|pipe| copy_out(pipe, Kind::Stdout, &out)),
        child.stderr.take().map(|pipe| copy_out(pipe, Kind::Stderr, &out)),
    ]
    .into_iter()
    .flatten()
    .collect();
    let ended = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&ended);
    std::thread::spawn(move || from_driver_loop(from_driver, stdin, group, &seen));
    let status = child.wait().context("cannot wait")?;
    // A daemon that kept the pipes open must not keep the command open: end the group, then read the rest.
    if let Some(group) = group {
        let _ = kill_process_group(group, Signal::KILL);
    }
    ended.store(true, Ordering::SeqCst);
    for reader in readers {
        let _ = reader.join();
    }
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    send(&out, Kind::Exit, &code.to_le_bytes());
    let _ = stream.shutdown(Shutdown::Both);
    Ok(())
}

fn start(argv: &[String], env: Vec<(String, String)>, cwd: &str) -> Result<Child> {
    let (program, args) = argv.split_first().context("no program given")?;
    // The program is looked up in the PATH it will run with.
    Command::new("/usr/bin/env")
        .arg("--")
        .arg(program)
        .args(args)
        .env_clear()
        .envs(env)
        .current_dir(cwd)
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {program} in {cwd}"))
}

fn copy_out(
    mut pipe: impl Read + Send + 'static,
    kind: Kind,
    out: &Arc<Mutex<TcpStream>>,
) -> std::thread::JoinHandle<()> {
    let out = Arc::clone(out);
    std::thread::spawn(move || {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(length @ 1..) = pipe.read(&mut buffer) {
            send(&out, kind, &buffer[..length]);
        }
    })
}

fn send(out: &Mutex<TcpStream>, kind: Kind, payload: &[u8]) {
    if let Ok(out) = out.lock() {
        // A driver that has gone is seen by the reading side.
        let _ = proto::send(&*out, kind, payload);
    }
}

/// Carries input and signals to the program. When the driver goes, the program goes.
fn from_driver_loop(
    mut from: BufReader<TcpStream>,
    mut stdin: Option<impl std::io::Write>,
    group: Option<Pid>,
    ended: &AtomicBool,
) {
    loop {
        match proto::receive(&mut from) {
            Ok(Some((Kind::Stdin, bytes))) if bytes.is_empty() => stdin = None,
            Ok(Some((Kind::Stdin, bytes))) => {
                if let Some(pipe) = &mut stdin
                    && pipe.write_all(&bytes).and_then(|()| pipe.flush()).is_err()
                {
                    stdin = None;
                }
            }
            Ok(Some((Kind::Signal, bytes))) => {
                let signal = bytes.first().and_then(|n| Signal::from_named_raw(i32::from(*n)));
                if let (Some(group), Some(signal)) = (group, signal) {
                    let _ = kill_process_group(group, signal);
                }
            }
            Ok(Some(_)) => {}
            Ok(None) | Err(_) => break,
        }
    }
    // After its end the number may be another process group's.
    if let Some(group) = group
        && !ended.load(Ordering::SeqCst)
    {
        let _ = kill_process_group(group, Signal::KILL);
    }
}
