//! When the guest's screen is worth a look.

use std::{
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use drago_tests::{client::SpiceClient, desktop, guest::Guest, picture::Picture, progress::step};
use serde_json::json;

use super::{
    PATIENCE,
    machine::{Machine, Plan},
};
use crate::guest::Kind;

/// Between looks at the screen.
const PAUSE: Duration = Duration::from_secs(3);

/// Waits until the guest has booted and shows what it is to show; whether that has come about. There is
/// nothing to wait for in guests of which nobody knows what that is.
pub(super) fn wait(plan: &Plan<'_>, kind: Kind, machine: &Machine) -> bool {
    if !kind.has_desktop() {
        let Some(prompt) = kind.prompt() else { return false };
        let boots = || machine.serial.wait_for(0, prompt, PATIENCE).map(drop);
        return step("the guest boots", boots).is_ok();
    }
    let Some(control) = &plan.control else { return false };
    step("the guest boots and its desktop starts", || {
        let end = Instant::now() + PATIENCE;
        while !has_come(plan, control) {
            ensure!(Instant::now() < end, "it took too long");
            ensure!(!machine.log.has_ended_within(PAUSE), "drago-vmm ended");
        }
        Ok(())
    })
    .is_ok()
}

/// Looks at the screen by the control socket: a client of SPICE is more than a demo needs.
fn has_come(plan: &Plan<'_>, control: &Path) -> bool {
    let file = plan.folder.join("screen.png");
    let taken = Command::new(plan.vmm)
        .args(["ctl", "--control"])
        .arg(control)
        .arg("screenshot")
        .arg(&file)
        .output()
        // There is no picture before the guest has a driver for its screen.
        .is_ok_and(|out| out.status.success());
    taken
        && Picture::open_png(&file)
            .is_ok_and(|picture| desktop::has_come(&plan.guest.name, &picture))
}

/// Whether [`screenshot`] knows what to wait for.
pub(super) fn can_be_read(kind: Kind) -> bool {
    kind == Kind::Minimal || kind.has_desktop()
}

/// Waits with a real client until the desktop is there, and keeps its picture.
pub(super) fn screenshot(guest: &Guest, port: u16, folder: &Path, file: &Path) -> Result<()> {
    let mut client = SpiceClient::connect(port)?;
    let shot = folder.join("screenshot.ppm");
    let end = Instant::now() + PATIENCE;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        client.wait_state("a picture", left, |state| state["width"].as_u64() > Some(0))?;
        let seen = client.ask("state", json!({}))?["invalidated"].as_u64();
        client.screenshot(&shot)?;
        let picture = Picture::open(&shot)?;
        if desktop::is_shown(&guest.name, &picture)? {
            return picture.save_png(file);
        }
        let left = end.saturating_duration_since(Instant::now());
        client
            .wait_state("a change on the screen", left, |state| {
                state["invalidated"].as_u64() != seen
            })
            .with_context(|| {
                format!("the desktop never came up; last picture: {}", shot.display())
            })?;
    }
}
