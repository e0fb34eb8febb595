//! Drives a real SPICE client (spice-gtk through `tests/clients/spice_client.py`).

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::{keys, paths};

/// An answer of the client itself takes no time; this is for a machine that is very busy.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// A connected (or connecting) client. Dropping it disconnects.
#[derive(Debug)]
pub struct SpiceClient {
    child: Child,
    stdin: ChildStdin,
    lines: mpsc::Receiver<Value>,
    next: u64,
    events: Vec<Value>,
}

impl SpiceClient {
    /// Connects to a server on 127.0.0.1.
    ///
    /// # Errors
    /// If the client cannot be started.
    pub fn connect(port: u16) -> Result<Self> {
        Self::start(port, None)
    }

    /// The same with a password, which may be the wrong one: then its `MainChannel` has the event
    /// `error-auth` and the client ends.
    ///
    /// # Errors
    /// As above.
    pub fn connect_with_password(port: u16, password: &str) -> Result<Self> {
        Self::start(port, Some(password))
    }

    fn start(port: u16, password: Option<&str>) -> Result<Self> {
        let script = paths::workspace().join("tests/clients/spice_client.py");
        // Debian's own interpreter: a virtual environment's has no GObject.
        let mut child = Command::new("/usr/bin/python3")
            .arg(script)
            .args(["127.0.0.1", &port.to_string()])
            .args(password)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot run python3 (packages python3-gi gir1.2-spiceclientglib-2.0)")?;
        let stdin = child.stdin.take().context("client has no input")?;
        let stdout = child.stdout.take().context("client has no output")?;
        let (tell, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if let Ok(value) = serde_json::from_str(&line)
                    && tell.send(value).is_err()
                {
                    break;
                }
            }
        });
        Ok(Self { child, stdin, lines, next: 0, events: Vec::new() })
    }

    /// Sends a command and returns its answer.
    ///
    /// # Errors
    /// If the client ended or says that the command failed.
    pub fn ask(&mut self, name: &str, args: Value) -> Result<Value> {
        self.next += 1;
        let mut request = args;
        request["id"] = json!(self.next);
        request["do"] = json!(name);
        writeln!(self.stdin, "{request}").context("the SPICE client has ended")?;
        let end = Instant::now() + ANSWER_LIMIT;
        loop {
            let line = self
                .lines
                .recv_timeout(end.saturating_duration_since(Instant::now()))
                .with_context(|| format!("the SPICE client did not answer {name}"))?;
            if line["re"] == self.next {
                if let Some(error) = line["error"].as_str() {
                    bail!("SPICE client: {name}: {error}");
                }
                return Ok(line);
            }
            self.events.push(line);
        }
    }

    /// Waits until `is` finds what it looks for in the client's state, asking again at each event.
    ///
    /// # Errors
    /// If it does not come about in time.
    pub fn wait_state(
        &mut self,
        what: &str,
        limit: Duration,
        is: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        let end = Instant::now() + limit;
        loop {
            let state = self.ask("state", json!({}))?;
            if is(&state) {
                return Ok(state);
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("the SPICE client did not see {what} within {limit:?}; its state: {state}");
            }
            // Not every change comes with an event: ask now and then.
            match self.lines.recv_timeout(left.min(Duration::from_secs(1))) {
                Ok(event) => self.events.push(event),
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    bail!("the SPICE client ended before it saw {what}: {:?}", self.events);
                }
            }
        }
    }

    /// Waits for an event of a channel, as spice-gtk names both: `MainChannel`, `error-auth`.
    ///
    /// # Errors
    /// If it does not come, in time or before the client ends.
    pub fn wait_channel(&mut self, channel: &str, event: &str, limit: Duration) -> Result<()> {
        let end = Instant::now() + limit;
        let is = |line: &Value| line["channel"] == channel && line["event"] == event;
        while !self.events.iter().any(is) {
            let left = end.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => self.events.push(line),
                Err(_) => bail!("the SPICE client saw no {event} of {channel}: {:?}", self.events),
            }
        }
        Ok(())
    }

    /// Saves the picture as the client has it (PPM); its size.
    ///
    /// # Errors
    /// If the client has ended.
    pub fn screenshot(&mut self, path: &Path) -> Result<(u32, u32)> {
        let answer = self.ask("screenshot", json!({ "path": path }))?;
        let size =
            |key: &str| answer[key].as_u64().and_then(|n| u32::try_from(n).ok()).unwrap_or(0);
        Ok((size("width"), size("height")))
    }

    /// Types a text on an American keyboard, a few keys at a time: the next ones when the screen shows
    /// something new. A guest program that is slow to read loses keys that come faster than anyone types
    /// (evdev keeps some 64 events).
    ///
    /// # Errors
    /// If a character is not on the keyboard, the client has ended or the screen does not change.
    pub fn type_text(&mut self, text: &str, limit: Duration) -> Result<()> {
        let characters: Vec<char> = text.chars().collect();
        for few in characters.chunks(4) {
            let few: String = few.iter().collect();
            let seen = self.ask("state", json!({}))?["invalidated"].as_u64();
            self.press(&keys::strokes(&few)?)?;
            self.wait_state(&format!("an echo of {few:?}"), limit, |state| {
                state["invalidated"].as_u64() != seen
            })?;
        }
        Ok(())
    }

    /// Presses (true) and releases keys.
    ///
    /// # Errors
    /// If the client has ended.
    pub fn press(&mut self, keys: &[(u32, bool)]) -> Result<()> {
        let keys: Vec<Value> = keys.iter().map(|(code, down)| json!([code, down])).collect();
        self.ask("keys", json!({ "keys": keys })).map(drop)
    }

    /// Moves the pointer (client mouse mode).
    ///
    /// # Errors
    /// If the client has ended.
    pub fn position(&mut self, x: u32, y: u32) -> Result<()> {
        self.ask("position", json!({ "x": x, "y": y })).map(drop)
    }

    /// Presses and releases a mouse button (1 = left).
    ///
    /// # Errors
    /// If the client has ended.
    pub fn click(&mut self, button: u32) -> Result<()> {
        self.ask("button", json!({ "button": button, "down": true }))?;
        self.ask("button", json!({ "button": button, "down": false })).map(drop)
    }

    /// What the client said so far that was no answer.
    pub fn events(&self) -> &[Value] {
        &self.events
    }
}

impl Drop for SpiceClient {
    fn drop(&mut self) {
        let _ = writeln!(self.stdin, "{}", json!({ "id": 0, "do": "quit" }));
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
