//! The slow suite: GNOME, the desktop this product is for, booted by drago-vmm and used by a real client.
//!
//! Run by `cargo xtask test --suite slow`.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::time::Duration;

use drago_tests::desktop::is_shown;
use drago_tests::guest::{Desktop, Guest};
use drago_tests::picture::reads;
use drago_tests::vm::{Host, PATIENCE};

/// A desktop of this size takes many minutes to come up on an emulated CPU.
const BOOT: Duration = Duration::from_secs(2400);

#[test]
#[ignore = "slow"]
fn the_overview_is_seen_and_searched() {
    let guest = Guest::desktop(Desktop::Gnome).unwrap();
    let agent = Path::new(env!("CARGO_BIN_EXE_drago-testbed-agent"));
    let host = Host::boot("gnome", agent, 6144).unwrap();
    let disk = format!("path={}", host.disk(&guest).unwrap().display());
    let options = ["--cpus", "2", "--disk", &disk, "--net", "user,hostfwd=tcp::2223-:22"];
    let options = [&options[..], &["--spice", "127.0.0.1:5900"]].concat();
    let mut vm = host.start("gnome", &guest, &options).unwrap();
    vm.log.wait_for(0, "SPICE server listens", PATIENCE).unwrap();
    let mut client = host.spice().unwrap();

    vm.wait_picture_within(&mut client, "the overview", BOOT, |picture| is_shown("gnome", picture))
        .unwrap();

    // The clock in the middle of the top bar shows the guest's time.
    vm.wait_picture_within(&mut client, "the clock", PATIENCE, |picture| {
        let now = host.ssh(&guest, "demo", "date +%H:%M")?;
        let middle = picture.width / 2;
        Ok(reads(&picture.text(Some((middle - 150, 0, 300, 32)))?, now.trim()))
    })
    .unwrap();

    // The search field has the focus: what is typed appears in it.
    client.type_text("terminal", PATIENCE).unwrap();
    vm.wait_picture_within(&mut client, "the typed text", PATIENCE, |picture| {
        Ok(reads(&picture.text(None)?, "terminal"))
    })
    .unwrap();

    vm.signal(15).unwrap();
    assert_eq!(vm.wait().unwrap(), 0, "{}", vm.state());
}
