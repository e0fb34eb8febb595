//! An X server without a screen.
//!
//! Its number is chosen here: servers that look for a free one themselves (`-displayfd` alone) take the
//! same one when several start at once and find the lock of one that was killed.

use std::{
    io::{self, BufRead, BufReader},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

/// How long it may take to end.
const END: Duration = Duration::from_secs(10);

/// A running Xvfb; ends when dropped.
#[derive(Debug)]
pub struct Xvfb {
    /// For `DISPLAY`.
    pub display: String,
    server: Child,
}

impl Xvfb {
    /// Starts one with a screen of `width` × `height` and waits until it is ready.
    ///
    /// # Errors
    /// If it is not installed or does not start.
    pub fn start(width: u32, height: u32) -> io::Result<Self> {
        static STARTED: AtomicU32 = AtomicU32::new(0);
        let number = STARTED.fetch_add(1, Ordering::Relaxed);
        // A process has at most 16 here, and their numbers come back to it after 3000 processes.
        let display = format!(":{}", 1000 + std::process::id() % 3000 * 16 + number % 16);
        let mut server = Command::new("Xvfb")
            // Left by its last client it would begin anew, and turn away who comes just then: a tool that
            // looks for a window and goes is often the first client, before the one with the window.
            .args([&display, "-noreset", "-displayfd", "1", "-nolisten", "tcp", "-screen", "0"])
            .arg(format!("{width}x{height}x24"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let mut ready = String::new();
        if let Some(out) = server.stdout.take() {
            BufReader::new(out).read_line(&mut ready)?;
        }
        let this = Self { display, server };
        if ready.trim().is_empty() {
            return Err(io::Error::other(format!("Xvfb {} did not start", this.display)));
        }
        Ok(this)
    }
}

impl Drop for Xvfb {
    fn drop(&mut self) {
        // Killed at once it would leave its lock and its socket behind.
        if let Ok(pid) = i32::try_from(self.server.id())
            && let Some(pid) = rustix::process::Pid::from_raw(pid)
        {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let deadline = Instant::now() + END;
        while matches!(self.server.try_wait(), Ok(None)) && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(10));
        }
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}
