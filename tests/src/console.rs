//! Text that a running program writes, and waiting for it.

use std::io::Write;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// What a kernel says when one of its processors will not go on (docs/testing.md).
pub const STUCK: [&str; 3] = ["soft lockup", "detected stalls", "kthread starved"];

/// Everything a program has written so far; clones share it.
#[derive(Debug, Clone, Default)]
pub struct Console {
    shared: Arc<(Mutex<Text>, Condvar)>,
}

#[derive(Debug, Default)]
struct Text {
    bytes: Vec<u8>,
    ended: bool,
}

impl Console {
    /// Adds what was written.
    pub fn push(&self, bytes: &[u8]) {
        let mut text = self.shared.0.lock().unwrap_or_else(PoisonError::into_inner);
        text.bytes.extend(bytes);
        self.shared.1.notify_all();
    }

    /// Says that nothing more will come.
    pub fn end(&self) {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner).ended = true;
        self.shared.1.notify_all();
    }

    /// Waits so long, or until nothing more will come; whether that is so.
    pub fn has_ended_within(&self, limit: Duration) -> bool {
        let text = self.shared.0.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.shared.1.wait_timeout_while(text, limit, |text| !text.ended);
        waited.unwrap_or_else(PoisonError::into_inner).0.ended
    }

    /// How much was written: a place from which to wait.
    pub fn mark(&self) -> usize {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner).bytes.len()
    }

    /// Everything from a place on.
    pub fn since(&self, mark: usize) -> String {
        let text = self.shared.0.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(text.bytes.get(mark..).unwrap_or_default()).into_owned()
    }

    /// Runs a command in the shell that writes here and reads from `stdin`; what it printed.
    ///
    /// # Errors
    /// If the shell cannot be written to, or the end of the command is not seen in time.
    pub fn shell(&self, stdin: &mut impl Write, command: &str, limit: Duration) -> Result<String> {
        let mark = self.mark();
        // The quotes keep the markers out of the echo of the line.
        let line = format!("echo 'BE''GIN'; {command}; echo 'E''ND'\n");
        stdin.write_all(line.as_bytes()).context("no serial console")?;
        let said = self.wait_for(mark, "END", limit)?;
        let said = said.rsplit_once("BEGIN").map_or(said.as_str(), |(_, rest)| rest);
        Ok(said.trim_end_matches("END").trim().replace('\r', ""))
    }

    /// What the kernel that writes here says if it is stuck.
    pub fn stuck(&self) -> Option<&'static str> {
        let text = self.shared.0.lock().unwrap_or_else(PoisonError::into_inner);
        let text = String::from_utf8_lossy(&text.bytes);
        STUCK.into_iter().find(|sign| text.contains(sign))
    }

    /// Waits until something is written after a place; returns all from there to its end.
    ///
    /// # Errors
    /// If it is not written in time, or a kernel says before that it is stuck.
    pub fn wait_for(&self, mark: usize, wanted: &str, limit: Duration) -> Result<String> {
        let end = Instant::now() + limit;
        let mut text = self.shared.0.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let have = String::from_utf8_lossy(text.bytes.get(mark..).unwrap_or_default());
            if let Some(at) = have.find(wanted) {
                return Ok(have[..at + wanted.len()].to_owned());
            }
            let left = end.saturating_duration_since(Instant::now());
            let stuck = STUCK.iter().any(|sign| have.contains(sign));
            if left.is_zero() || text.ended || stuck {
                let tail: String = have.chars().rev().take(2000).collect();
                let tail: String = tail.chars().rev().collect();
                let why = match text.ended {
                    _ if stuck => "the kernel is stuck",
                    true => "the program ended",
                    false => "time is over",
                };
                bail!("{wanted:?} was not written ({why}); the last that was:\n{tail}");
            }
            text = self.shared.1.wait_timeout(text, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// A console that ends with the program that writes to it: goes when that program's reader does.
#[derive(Debug)]
pub struct Sink(pub Console);

impl Drop for Sink {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// The last lines of a log, as many at most.
pub fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_for_what_another_thread_writes() {
        let console = Console::default();
        let writer = console.clone();
        let thread = std::thread::spawn(move || {
            writer.push(b"one tw");
            writer.push(b"o three");
            writer.end();
        });
        assert_eq!(console.wait_for(0, "two", Duration::from_secs(60)).unwrap(), "one two");
        assert!(console.wait_for(7, "two", Duration::from_secs(60)).is_err());
        assert!(console.has_ended_within(Duration::from_secs(3600)));
        assert!(!Console::default().has_ended_within(Duration::ZERO));
        assert_eq!((last_lines("a\nb\nc\n", 2), last_lines("", 2)), ("b\nc".into(), String::new()));
        assert_eq!(console.stuck(), None);
        let console = Console::default();
        console.push(b"watchdog: BUG: soft lockup - CPU#1");
        let error = console.wait_for(0, "login:", Duration::from_secs(3600)).unwrap_err();
        assert!(error.to_string().contains("the kernel is stuck"), "{error}");
        assert_eq!(console.stuck(), Some("soft lockup"));
        thread.join().unwrap();
    }
}
