//! remote-viewer on a screen of its own (Xvfb).

use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};

use crate::{debian::check, xvfb::Xvfb};

/// A running remote-viewer. Dropping it closes it.
#[derive(Debug)]
pub struct RemoteViewer {
    viewer: Child,
    window: String,
    screen: Xvfb,
    _home: tempfile::TempDir,
}

impl RemoteViewer {
    /// Starts remote-viewer for an address and waits for its window.
    ///
    /// # Errors
    /// If a program is missing or no window appears.
    pub fn start(address: &str) -> Result<Self> {
        let screen = Xvfb::start(1700, 1200).context("an X server (package xvfb)")?;
        // Nothing of this user's settings.
        let home = tempfile::tempdir()?;
        let viewer = Command::new("remote-viewer")
            .arg(address)
            .env("DISPLAY", &screen.display)
            .env("HOME", home.path())
            .env("NO_AT_BRIDGE", "1")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("cannot run remote-viewer (package virt-viewer)")?;
        let mut this = Self { viewer, window: String::new(), screen, _home: home };
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
                .env("DISPLAY", &self.screen.display),
        )
        .context("xdotool (package xdotool)")
    }
}

impl Drop for RemoteViewer {
    fn drop(&mut self) {
        let _ = self.viewer.kill();
        let _ = self.viewer.wait();
    }
}
