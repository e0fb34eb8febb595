//! `drago-vmm ctl`, `drago-vmm doctor` and `cargo xtask`, with what they are for.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use drago_tests::paths;
use drago_tests::picture::{Picture, reads};
use drago_tests::vm::{Host, PATIENCE};

use crate::{SPICE, booted, host, on_host};

const CONTROL: &str = "/run/ctl.sock";

fn ctl(host: &Host, action: &str) -> String {
    on_host(host, &format!("{} ctl --control {CONTROL} {action}", host.program("drago-vmm")))
}

#[test]
#[ignore = "nested"]
fn ctl_takes_pictures_resizes_and_presses_keys() {
    let host = host();
    let mut vm = booted(&host, "ctl", &[SPICE, &["--control", CONTROL]].concat());
    vm.serial_command("clear >/dev/tty1; echo SEEN BY CTL >/dev/tty1").unwrap();
    let png = host.0.results.join("ctl.png");
    let mut text = String::new();
    // The console draws when it gets round to it.
    for _ in 0..100 {
        ctl(&host.0, &format!("screenshot {}", png.display()));
        text = Picture::open_png(&png).unwrap().text(None).unwrap();
        if reads(&text, "SEEN BY CTL") {
            break;
        }
    }
    assert!(reads(&text, "SEEN BY CTL"), "{text}");

    ctl(&host.0, "resize 1000x600");
    let mode = "until head -n 1 /sys/class/drm/card0-Virtual-1/modes | grep 1000x600; do \
                usleep 200000; done";
    assert_eq!(vm.serial_command(mode).unwrap(), "1000x600");

    // init restarts the guest for it.
    ctl(&host.0, "ctrl-alt-del");
    assert_eq!(vm.wait().unwrap(), 0, "{}", vm.state());
}

/// The test host is what docs/testing.md promises, and `doctor` tells that its KVM is a real one.
#[test]
#[ignore = "nested"]
fn doctor_finds_what_the_test_host_has() {
    let host = host();
    let said = on_host(&host.0, &format!("{} doctor --json", host.0.program("drago-vmm")));
    let findings: Vec<serde_json::Value> = serde_json::from_str(&said).unwrap();
    for name in ["kvm", "gpu-process", "render-node", "tun", "passt", "vhost-net", "udmabuf"] {
        let finding = findings.iter().find(|finding| finding["name"] == name);
        assert_eq!(finding.unwrap()["level"], "ok", "{finding:?}");
    }
}

/// Where KVM is native, the demo runs the guest right on it: the test host is such a machine.
#[test]
#[ignore = "nested"]
fn the_demo_uses_native_kvm() {
    let host = host();
    let folder = paths::cache("e2e/minimal/demo").unwrap();
    // Programs are built outside.
    let cargo = folder.join("cargo");
    let built: String = ["drago-vmm", "drago-gpu"]
        .map(|name| {
            let built = serde_json::json!({
                "target": {"name": name}, "executable": host.0.program(name),
            });
            format!("echo '{built}'\n")
        })
        .concat();
    std::fs::write(&cargo, format!("#!/bin/sh\n{built}")).unwrap();
    let picture = folder.join("demo.png");
    let _ = std::fs::remove_file(&picture);
    let said = on_host(
        &host.0,
        &format!(
            "chmod +x {0}; CARGO={0} {1} demo --minimal --screenshot {2} 2>&1",
            cargo.display(),
            host.0.program("xtask"),
            picture.display()
        ),
    );
    assert!(said.contains("KVM is native"), "{said}");
    assert!(said.contains("remote-viewer spice://127.0.0.1:5900"), "{said}");
    assert!(picture.is_file(), "{said}");
    // It has ended its machine.
    assert_eq!(on_host(&host.0, "pgrep -x drago-vmm || echo none"), "none");

    // Without a picture to take it says when there is something to see, and how to reach the machine.
    for ends_by in ["ctl", "signal"] {
        let command = host
            .0
            .command(host.0.program("xtask"))
            .args(["demo", "--minimal", "--spice-port", "5907", "--ssh-port", "2300"])
            .env("CARGO", cargo.display().to_string());
        let mut demo = host.0.spawn("demo", command).unwrap();
        let (said, log) = (demo.serial.clone(), demo.log.clone());
        let ready = "the console is there: remote-viewer spice://127.0.0.1:5907\n";
        let said = said
            .wait_for(0, ready, PATIENCE)
            .unwrap_or_else(|error| panic!("{error}\n{}", log.since(0)));
        let (_, control) = said.split_once("control:     ").unwrap();
        let (ctl, _) = control.split_once(" status").unwrap();
        assert!(on_host(&host.0, &format!("{ctl} status")).contains("5907"));
        if ends_by == "ctl" {
            on_host(&host.0, &format!("{ctl} quit"));
            assert_eq!(demo.wait().unwrap(), 0, "{}", log.since(0));
        } else {
            // To the demo alone, and not to all of its process group.
            on_host(&host.0, "kill $(pgrep -x xtask)");
            assert_eq!(demo.wait().unwrap(), 128 + 15, "{}", log.since(0));
            assert!(log.since(0).ends_with("stopped\n"), "{}", log.since(0));
        }
        assert_eq!(on_host(&host.0, "pgrep -x drago-vmm || echo none"), "none");
    }
}

/// Ctrl+C ends the test host with the command in it.
#[test]
#[ignore = "nested"]
fn testbed_ends_with_its_driver() {
    let program = Path::new(env!("CARGO_BIN_EXE_drago-testbed-agent")).with_file_name("xtask");
    let mut testbed = Command::new(program)
        .args(["testbed", "--memory", "1024", "--", "sh", "-c", "echo runs; sleep 3600"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(testbed.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "runs\n");
    let host = |driver: u32| {
        let found = Command::new("pgrep").args(["-P", &driver.to_string()]).output().unwrap();
        String::from_utf8(found.stdout).unwrap()
    };
    let qemu = host(testbed.id());
    assert!(!qemu.is_empty());
    let kill = Command::new("kill").args(["-INT", &testbed.id().to_string()]).status().unwrap();
    assert!(kill.success());
    let done = testbed.wait_with_output().unwrap();
    assert_eq!(done.status.code(), Some(128 + 2));
    assert!(done.stderr.ends_with(b"stopped\n"), "{}", String::from_utf8_lossy(&done.stderr));
    assert!(!Path::new("/proc").join(qemu.trim()).exists());
}

#[test]
#[ignore = "nested"]
fn testbed_runs_any_command() {
    let program = Path::new(env!("CARGO_BIN_EXE_drago-testbed-agent")).with_file_name("xtask");
    let script = r#"read -r line; echo "$WORD $line $(ls /dev/kvm)"; exit 7"#;
    let mut testbed = Command::new(program)
        .args(["testbed", "--memory", "1024", "--env", "WORD=hello", "--", "sh", "-c", script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    testbed.stdin.take().unwrap().write_all(b"from outside\n").unwrap();
    let done = testbed.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&done.stdout), "hello from outside /dev/kvm\n");
    assert_eq!(done.status.code(), Some(7));
}
