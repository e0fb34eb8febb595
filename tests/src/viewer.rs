//! remote-viewer on a screen of its own (Xvfb).

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};

use crate::debian::check;

/// A running remote-viewer. Dropping it closes it.
#[derive(Debug)]
pub struct RemoteViewer {
    screen: Child,
    viewer: Child,
    display: String,
    window: String,
    _home: tempfile::TempDir,
}

impl RemoteViewer {
    /// Starts remote-viewer for an address and waits for its window.
    ///
    /// # Errors
    /// If a program is missing or no window appears.
    pub fn start(address: &str) -> Result<Self> {
        let mut screen = Command::new("Xvfb")
            .args(["-displayfd", "1", "-screen", "0", "1700x1200x24", "-nolisten", "tcp"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("cannot run Xvfb (package xvfb)")?;
        let mut display = String::new();
        BufReader::new(screen.stdout.take().context("Xvfb has no output")?)
            .read_line(&mut display)?;
        let display = format!(":{}", display.trim());
        // Nothing of this user's settings.
        let home = tempfile::tempdir()?;
        let viewer = Command::new("remote-viewer")
            .arg(address)
            .env("DISPLAY", &display)
            .env("HOME", home.path())
            .env("NO_AT_BRIDGE", "1")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("cannot run remote-viewer (package virt-viewer)")?;
        let mut this = Self { screen, viewer, display, window: String::new(), _home: home };
        let found =
            this.xdotool(&["search", "--sync", "--onlyvisible", "--class", "remote-viewer"])?;
        this.window = found.lines().next().context("remote-viewer has no window")?.to_owned();
        Ok(this)
    }

    /// Gives the window a size, as its user does by dragging.
    ///
    /// # Errors
    /// If the window is gone.
    pub fn resize(&self, width: u32, height: u32) -> Result<()> {
        self.xdotool(&[
            "windowsize",
            "--sync",
            &self.window,
            &width.to_string(),
            &height.to_string(),
        ])
        .map(drop)
    }

    fn xdotool(&self, arguments: &[&str]) -> Result<String> {
        // Its --sync waits without an end of its own.
        check(
            Command::new("timeout")
                .args(["120", "xdotool"])
                .args(arguments)
                .env("DISPLAY", &self.display),
        )
        .context("xdotool (package xdotool)")
    }
}

impl Drop for RemoteViewer {
    fn drop(&mut self) {
        for child in [&mut self.viewer, &mut self.screen] {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
