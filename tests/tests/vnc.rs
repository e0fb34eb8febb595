//! The weston guest without SPICE: TigerVNC and the guest's own vdagent exchange clipboard text.
//!
//! Run by `cargo xtask test --suite slow`; needs the test host, so it is `#[ignore]`d by default.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use drago_tests::guest::{Desktop, Guest};
use drago_tests::progress::step;
use drago_tests::vm::{GUEST_DISK, Host, PATIENCE, VNC_PORT};
use drago_tests::xvfb::Xvfb;

/// The guest's boot: 45 s on an idle machine, many times that on a busy one.
const BOOT: Duration = Duration::from_secs(1200);

#[test]
#[ignore = "nested"]
fn text_is_copied_between_a_guest_and_a_vnc_viewer() {
    let guest = Guest::desktop(Desktop::Weston).unwrap();
    let agent = Path::new(env!("CARGO_BIN_EXE_drago-testbed-agent"));
    let host = Host::boot_with_disk("vnc", agent, 4096, &guest).unwrap();
    let disk = format!("path={GUEST_DISK}");
    let options = [
        ["--cpus", "2"],
        ["--disk", &disk],
        ["--net", "user,hostfwd=tcp::2223-:22"],
        ["--vnc", "127.0.0.1:5901"],
    ];
    let vm = host.start("vnc", &guest, options.as_flattened()).unwrap();
    vm.log.wait_for(0, "VNC server listens", PATIENCE).unwrap();

    let screen = Xvfb::start(1400, 1000).unwrap();
    let home = tempfile::tempdir().unwrap();
    let mut viewer = Command::new("vncviewer")
        .args(["-RemoteResize=0", "-ReconnectOnError=0", "-AlertOnFatalError=0"])
        .arg(format!("127.0.0.1::{}", host.outer(VNC_PORT).unwrap()))
        .env("DISPLAY", &screen.display)
        .env("HOME", home.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let on_screen = |program: &str, arguments: &[&str]| {
        let mut command = Command::new("timeout");
        let command = command.args(["120", program]).args(arguments);
        let out = command.env("DISPLAY", &screen.display).output().unwrap();
        String::from_utf8_lossy(&out.stdout).trim().to_owned()
    };
    let window = on_screen("xdotool", &["search", "--sync", "--onlyvisible", "--name", "TigerVNC"]);
    // It only looks after the clipboard while it has the keyboard.
    let focus = || on_screen("xdotool", &["windowfocus", window.lines().last().unwrap()]);
    focus();

    step("the guest answers to ssh", || {
        vm.serial.wait_for(0, "login:", BOOT)?;
        // passt takes the connection, and ends it while nobody listens in the guest.
        let deadline = Instant::now() + PATIENCE;
        while let Err(error) = host.ssh(&guest, "demo", "true") {
            anyhow::ensure!(Instant::now() < deadline, error);
        }
        Ok(())
    })
    .unwrap();

    step("from guest to viewer", || {
        let ready =
            "for i in $(seq 600); do pgrep -x spice-vdagent >/dev/null && exit; sleep 1; done";
        host.ssh(&guest, "demo", ready)?;
        let copy = "export DISPLAY=:0; pkill -x xclip; echo -n 'from the guest: žluťoučký 17' | \
                    setsid xclip -selection clipboard -i >/dev/null 2>&1 </dev/stdin";
        let target = ["-selection", "clipboard", "-out", "-target", "UTF8_STRING"];
        let deadline = Instant::now() + PATIENCE;
        loop {
            // The agent does not see what was copied before it had come up.
            host.ssh(&guest, "demo", copy)?;
            focus();
            let copied = on_screen("xclip", &target);
            if copied == "from the guest: žluťoučký 17" {
                return Ok(());
            }
            if Instant::now() > deadline {
                let agent =
                    "journalctl -b --no-pager | grep -i vdagent; pgrep -a spice; pgrep -a xclip";
                let agent = host.ssh(&guest, "root", agent);
                anyhow::bail!(
                    "the viewer has {copied:?}; the guest: {agent:?}\n{}",
                    vm.log.since(0)
                );
            }
        }
    })
    .unwrap();

    step("from viewer to guest", || {
        let mut copy = Command::new("xclip")
            .args(["-selection", "clipboard", "-in", "-quiet"])
            .env("DISPLAY", &screen.display)
            .stdin(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        copy.stdin.take().unwrap().write_all("from the viewer: żółć 42".as_bytes())?;
        let pasted = host.ssh(
            &guest,
            "demo",
            "export DISPLAY=:0; for i in $(seq 100); do \
             timeout 20 xclip -selection clipboard -o 2>/dev/null | grep -a viewer && exit 0; sleep 0.5; \
             done; exit 1",
        );
        copy.kill()?;
        copy.wait()?;
        let pasted = pasted?;
        anyhow::ensure!(pasted.trim() == "from the viewer: żółć 42", "{pasted:?}");
        Ok(())
    })
    .unwrap();
    viewer.kill().unwrap();
    viewer.wait().unwrap();
}
