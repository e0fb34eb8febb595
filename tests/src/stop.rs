//! Ctrl+C and SIGTERM, in order: what was started is ended, what was made for a moment is removed.
//!
//! What a developer command does takes long only where it waits for a program it has started. So a signal
//! ends those programs; the steps that waited for them fail, one after the other, up to `main`, and on the
//! way everything that cleans up when dropped does.

use std::collections::HashSet;
use std::fs;
use std::os::fd::OwnedFd;
use std::process;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use libc::{c_int, c_void, siginfo_t};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, getpid, kill_process, set_child_subreaper};
use vmm_sys_util::signal::register_signal_handler;

/// How often it is looked whether there are new programs to end.
const LOOK: Duration = Duration::from_millis(100);

/// How long the process may go on after a signal before it is ended as it stands.
#[derive(Clone, Copy)]
struct Limits {
    /// Without any program.
    alone: Duration,
    /// In any case.
    all: Duration,
}

const LIMITS: Limits = Limits { alone: Duration::from_secs(3), all: Duration::from_secs(15) };

/// The first signal that came.
static SIGNAL: AtomicI32 = AtomicI32::new(0);

/// Written to by the handler, read by the thread that ends what runs.
static WAKE: OnceLock<OwnedFd> = OnceLock::new();

/// From now on signals end this process in order.
///
/// # Errors
/// If the system refuses.
pub fn install() -> Result<()> {
    install_with(LIMITS)
}

fn install_with(limits: Limits) -> Result<()> {
    let wake = eventfd(0, EventfdFlags::CLOEXEC).context("no eventfd")?;
    if WAKE.set(wake).is_err() {
        return Ok(());
    }
    let ignored = ignored();
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // As nohup(1) wants it, and a shell for what runs in the background.
        if ignored & (1 << (signal - 1)) == 0 {
            register_signal_handler(signal, on_signal)
                .map_err(|error| std::io::Error::from_raw_os_error(error.errno()))
                .context("signals cannot be received")?;
        }
    }
    std::thread::Builder::new().name("stop".into()).spawn(move || {
        wait(None);
        end_all(limits);
    })?;
    Ok(())
}

/// The signal that this process is being ended by.
pub fn requested() -> Option<i32> {
    Some(SIGNAL.load(Ordering::SeqCst)).filter(|signal| *signal != 0)
}

/// What the process's exit status is after a signal, as shells have it.
pub fn status(signal: i32) -> u8 {
    u8::try_from(128 + signal).unwrap_or(u8::MAX)
}

/// Only what is allowed in a signal handler: an atomic and a system call.
extern "C" fn on_signal(signal: c_int, _: *mut siginfo_t, _: *mut c_void) {
    let _ = SIGNAL.compare_exchange(0, signal, Ordering::SeqCst, Ordering::SeqCst);
    if let Some(wake) = WAKE.get() {
        let _ = rustix::io::write(wake, &1_u64.to_ne_bytes());
    }
}

/// The signals that are ignored, as a set of bits (proc_pid_status(5)).
fn ignored() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let set = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    set.and_then(|set| u64::from_str_radix(set.trim(), 16).ok()).unwrap_or(0)
}

/// Waits for a signal, or so long; whether one came.
fn wait(limit: Option<Duration>) -> bool {
    let Some(wake) = WAKE.get() else { return false };
    let limit = limit.and_then(|limit| limit.try_into().ok());
    loop {
        let mut fds = [PollFd::new(wake, PollFlags::IN)];
        match poll(&mut fds, limit.as_ref()) {
            Err(Errno::INTR) => {}
            Ok(0) | Err(_) => return false,
            Ok(_) => return rustix::io::read(wake, &mut [0; 8]).is_ok(),
        }
    }
}

/// Ends what this process has started and starts until it ends itself, or does not, or a second signal
/// says that it takes too long.
fn end_all(limits: Limits) -> ! {
    // Programs whose parents end before them are this process's children from now on: cargo does not wait
    // for what it runs.
    let _ = set_child_subreaper(Some(getpid()));
    let begin = Instant::now();
    let mut alone_since = begin;
    let mut told = HashSet::new();
    loop {
        let running = descendants();
        for pid in &running {
            // Only once: some programs take the second one for impatience.
            if told.insert(*pid) {
                let _ = kill_process(*pid, Signal::TERM);
            }
        }
        if !running.is_empty() {
            alone_since = Instant::now();
        }
        if wait(Some(LOOK)) || alone_since.elapsed() > limits.alone || begin.elapsed() > limits.all
        {
            process::exit(i32::from(status(SIGNAL.load(Ordering::SeqCst))));
        }
    }
}

/// The processes that run and that this one has started, and those that they have.
fn descendants() -> Vec<Pid> {
    let mut found = children(getpid());
    let mut at = 0;
    while let Some(pid) = found.get(at) {
        found.extend(children(*pid));
        at += 1;
    }
    // Nobody waits for those that came here when their parents ended.
    found.retain(|pid| !has_ended(*pid));
    found
}

/// The processes that a process has started and not yet waited for (proc_tid_children(5)).
fn children(pid: Pid) -> Vec<Pid> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    threads
        .filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok())
        .flat_map(|list| list.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
        .filter_map(|number| Pid::from_raw(number.parse().ok()?))
        .collect()
}

/// Whether a process is gone, or has only not been waited for (proc_pid_stat(5)).
fn has_ended(pid: Pid) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { return true };
    stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with(['Z', 'X']))
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};

    use rustix::process::{PidfdFlags, pidfd_open};

    use super::*;

    /// Set in a process that is to be ended.
    const VICTIM: &str = "DRAGO_STOP_VICTIM";

    fn victim() {
        // However slow this machine is now.
        install_with(Limits { alone: Duration::MAX, all: Duration::MAX }).unwrap();
        let folder = tempfile::tempdir().unwrap();
        // As cargo does: what it runs outlives it.
        let script = "sleep 3600 & echo $!; wait";
        let mut long =
            Command::new("sh").args(["-c", script]).stdout(Stdio::piped()).spawn().unwrap();
        let mut sleep = String::new();
        BufReader::new(long.stdout.take().unwrap()).read_line(&mut sleep).unwrap();
        println!("\nruns {} {}", sleep.trim(), folder.path().display());
        assert!(!long.wait().unwrap().success());
        drop(folder);
        println!("\nended by {:?}", requested());
    }

    #[test]
    fn a_signal_ends_children_and_removes_folders() {
        const NAME: &str = "stop::tests::a_signal_ends_children_and_removes_folders";
        if std::env::var_os(VICTIM).is_some() {
            victim();
            return;
        }
        for signal in [Signal::INT, Signal::TERM] {
            let mut process = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", NAME, "--nocapture"])
                .env(VICTIM, "1")
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
            let mut find = |start: &str| {
                lines.find_map(|line| line.unwrap().strip_prefix(start).map(str::to_owned)).unwrap()
            };
            let said = find("runs ");
            let (sleep, folder) = said.split_once(' ').unwrap();
            let sleep =
                pidfd_open(sleep.parse().map(Pid::from_raw).unwrap().unwrap(), PidfdFlags::empty());
            let sleep = sleep.unwrap();
            let pid = Pid::from_raw(i32::try_from(process.id()).unwrap()).unwrap();
            kill_process(pid, signal).unwrap();
            assert_eq!(find("ended by "), format!("Some({})", signal.as_raw()));
            assert!(!fs::exists(folder).unwrap());
            process.wait().unwrap();
            let limit = Duration::from_secs(60).try_into().unwrap();
            let mut fds = [PollFd::new(&sleep, PollFlags::IN)];
            assert_eq!(poll(&mut fds, Some(&limit)), Ok(1), "what the child had started lives on");
        }
    }
}
