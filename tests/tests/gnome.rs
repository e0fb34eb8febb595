//! The slow suite: GNOME, the desktop this product is for, booted by drago-vmm and used by a real client.
//!
//! Run by `cargo xtask test --suite slow`. The steps build on one another's boot, hence one test.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use drago_tests::client::SpiceClient;
use drago_tests::desktop::{gnome_search_field, is_shown};
use drago_tests::guest::{Desktop, Guest};
use drago_tests::keys;
use drago_tests::picture::{Picture, reads};
use drago_tests::progress::step;
use drago_tests::vm::{GUEST_DISK, Host, PATIENCE, Vm};
use serde_json::json;

/// A desktop of this size takes many minutes to come up on an emulated CPU.
const BOOT: Duration = Duration::from_secs(2400);

/// Height of GNOME's top bar.
const BAR: u32 = 32;

struct World {
    host: Host,
    guest: Guest,
    vm: Vm,
    client: SpiceClient,
}

#[test]
#[ignore = "slow"]
fn gnome_is_seen_and_used_by_a_real_client() {
    let guest = Guest::desktop(Desktop::Gnome).unwrap();
    let agent = Path::new(env!("CARGO_BIN_EXE_drago-testbed-agent"));
    let host = Host::boot_with_disk("gnome", agent, 6144, &guest).unwrap();
    let disk = format!("path={GUEST_DISK}");
    let options = ["--cpus", "2", "--disk", &disk, "--net", "user,hostfwd=tcp::2223-:22"];
    let options = [&options[..], &["--spice", "127.0.0.1:5900"]].concat();
    let vm = host.start("gnome", &guest, &options).unwrap();
    vm.log.wait_for(0, "SPICE server listens", PATIENCE).unwrap();
    let client = host.spice().unwrap();
    let mut world = World { host, guest, vm, client };

    world.step("the overview is shown", World::overview);
    world.step("the clock shows the guest's time", World::clock);
    world.step("the search field takes typed text", World::search);
    world.step("clipboard from guest to client", World::clipboard_to_client);
    world.step("clipboard from client to guest", World::clipboard_to_guest);
    world.step("mutter follows the client's size", |world| world.resize(1440, 904));
    world.step("the same without the guest's agent", World::resize_without_agent);

    world.vm.signal(15).unwrap();
    assert_eq!(world.vm.wait().unwrap(), 0, "{}", world.vm.state());
}

/// The text in the middle of the top bar.
fn bar(picture: &Picture) -> Result<String> {
    picture.text(Some((picture.width / 2 - 150, 0, 300, BAR)))
}

/// The text in the search field.
fn field(picture: &Picture) -> Result<String> {
    picture.text(Some(gnome_search_field(picture)))
}

/// The names below the first row of what was found.
fn found(picture: &Picture) -> Result<String> {
    picture.text(Some((picture.width / 2 - 300, 208, 600, 36)))
}

impl World {
    fn step(&mut self, what: &str, run: impl FnOnce(&mut Self) -> Result<()>) {
        if let Err(error) = step(what, || run(self)) {
            panic!("{what}: {error:#}\n{}", self.vm.state());
        }
    }

    fn see(&mut self, what: &str, is: impl FnMut(&Picture) -> Result<bool>) -> Result<()> {
        self.vm.wait_picture(&mut self.client, what, is).map(drop)
    }

    fn overview(&mut self) -> Result<()> {
        self.vm
            .wait_picture_within(&mut self.client, "the overview", BOOT, |picture| {
                is_shown("gnome", picture)
            })
            .map(drop)
    }

    fn clock(&mut self) -> Result<()> {
        let time = || self.host.ssh(&self.guest, "demo", "date +%H:%M");
        self.vm
            .wait_picture(&mut self.client, "the clock", |picture| {
                Ok(reads(&bar(picture)?, time()?.trim()))
            })
            .map(drop)
    }

    /// What is typed appears in the field, and the shell finds programs by it.
    fn search(&mut self) -> Result<()> {
        self.client.type_text("foot", PATIENCE)?;
        self.see("the search", |picture| {
            Ok(reads(&field(picture)?, "foot") && reads(&found(picture)?, "Foot Server"))
        })
    }

    /// The shell's own field holds what was typed: select all, copy.
    fn clipboard_to_client(&mut self) -> Result<()> {
        self.client.wait_state("the guest's agent", PATIENCE, |state| state["agent"] == true)?;
        self.client.press(&keys::with_control("ac")?)?;
        self.client
            .wait_state("the guest's clipboard", PATIENCE, |state| state["clipboard"] == "foot")
            .map(drop)
    }

    /// What the client offers is pasted over it. A Wayland program gets it through mutter and Xwayland
    /// from the agent.
    fn clipboard_to_guest(&mut self) -> Result<()> {
        self.client.ask("copy", json!({ "text": "foot serv" }))?;
        self.client
            .wait_state("the agent's request", PATIENCE, |state| state["requested"] == true)?;
        self.client.press(&keys::with_control("av")?)?;
        self.see("the pasted text", |picture| {
            let found = found(picture)?;
            Ok(reads(&field(picture)?, "foot serv")
                && reads(&found, "Foot Server")
                && !reads(&found, "Foot Client"))
        })
    }

    fn resize(&mut self, width: u32, height: u32) -> Result<()> {
        self.client.ask("resize", json!({ "width": width, "height": height }))?;
        self.client.wait_state("the new size", PATIENCE, |state| {
            state["width"] == width && state["height"] == height
        })?;
        let modes = "head -n1 /sys/class/drm/card0-Virtual-1/modes";
        let mode = self.host.ssh(&self.guest, "root", modes)?;
        ensure!(mode.trim() == format!("{width}x{height}"), "{mode:?}");
        // The desktop is drawn in the new size: the clock is in the middle again.
        self.see("the desktop resized", |picture| {
            Ok(picture.width == width && bar(picture)?.contains(':'))
        })
    }

    /// The display's event alone: no agent in the guest hears of the size.
    fn resize_without_agent(&mut self) -> Result<()> {
        self.host.ssh(
            &self.guest,
            "root",
            "systemctl stop spice-vdagentd.socket spice-vdagentd.service; \
             pkill -x spice-vdagent; while pgrep vdagent; do sleep 0.2; done",
        )?;
        self.resize(1600, 1000)
    }
}
