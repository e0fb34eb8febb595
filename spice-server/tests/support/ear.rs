//! A client that listens.
#![allow(unreachable_pub, dead_code, reason = "shared")]

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc::Receiver,
    time::Instant,
};

use serde_json::Value;

use crate::{
    support::{self, PATIENCE},
    tone::TONE,
};

/// `tests/sound_client.py`.
pub struct Ear {
    child: Child,
    stdin: Option<ChildStdin>,
    events: Receiver<Value>,
    played: PathBuf,
    _folder: tempfile::TempDir,
}

impl Ear {
    pub fn new(address: SocketAddr, opus: bool, speed: f64) -> Self {
        Self::with_environment(address, opus, speed, &[])
    }

    /// With variables in its environment.
    pub fn with_environment(
        address: SocketAddr,
        opus: bool,
        speed: f64,
        variables: &[(&str, &str)],
    ) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let played = folder.path().join("played");
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/sound_client.py");
        let mut command = Command::new("/usr/bin/python3");
        command.arg(script).arg(address.ip().to_string()).arg(address.port().to_string());
        command.arg(&played).arg(TONE.to_string()).arg(speed.to_string());
        command.envs(variables.iter().copied());
        if !opus {
            command.env("SPICE_DISABLE_OPUS", "1");
        }
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let events = support::events(child.stdout.take().unwrap());
        let stdin = child.stdin.take();
        Self { child, stdin, events, played, _folder: folder }
    }

    pub fn pid(&self) -> rustix::process::Pid {
        rustix::process::Pid::from_child(&self.child)
    }

    /// The next event of this name.
    pub fn event(&self, name: &str) -> Value {
        let end = Instant::now() + PATIENCE;
        loop {
            let event = self.events.recv_timeout(end.saturating_duration_since(Instant::now()));
            let event = event.unwrap_or_else(|error| panic!("no {name}: {error}"));
            if event["ev"] == name {
                return event;
            }
        }
    }

    pub fn wait_open(&self, channels: &[&str]) {
        let mut missing = channels.to_vec();
        while !missing.is_empty() {
            let event = self.event("channel");
            if event["event"] == "opened" {
                missing.retain(|name| event["channel"] != *name);
            }
        }
    }

    /// Number of frames that it got so far.
    pub fn heard(&self) -> usize {
        std::fs::metadata(&self.played).map_or(0, |file| file.len() as usize / 4)
    }

    /// The left samples that it played so far.
    pub fn played(&self) -> Vec<f64> {
        let bytes = std::fs::read(&self.played).unwrap();
        bytes.chunks_exact(4).map(|f| i16::from_le_bytes([f[0], f[1]]).into()).collect()
    }

    /// Ends the client, so that everything it got is in the file.
    pub fn finish(mut self) -> Vec<f64> {
        self.stdin = None;
        self.child.wait().unwrap();
        self.played()
    }
}

impl Drop for Ear {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
