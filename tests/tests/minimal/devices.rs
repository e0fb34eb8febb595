//! What the drivers of a stock kernel make of devices that no other suite uses.

use drago_tests::vm::{PATIENCE, Vm};
use serde_json::json;

use crate::{SPICE, booted, host, on_host};

#[test]
#[ignore = "nested"]
fn consoles_and_the_guest_agents_port_carry_text() {
    let host = host();
    let consoles = "hvc0=/tmp/hvc0.txt,qga=/run/qga.sock";
    let vm = booted(&host, "consoles", &["--console", consoles]);
    vm.serial_command("echo through hvc0 >/dev/hvc0").unwrap();
    let read = "until grep -s through /tmp/hvc0.txt; do sleep 0.2; done";
    assert_eq!(on_host(&host.0, read), "through hvc0");

    // A guest agent of one line: it gets nothing before somebody has connected.
    let agent = "{ (exec 3<>/dev/virtio-ports/org.qemu.guest_agent.0; \
                 until read -r line <&3; do usleep 100000; done; echo \"answer to $line\" >&3) & }";
    vm.serial_command(agent).unwrap();
    // Who shuts the connection down, if only his side, has gone.
    let ask = r#"touch /tmp/said; (echo '{"execute":"guest-ping"}'
        until grep -q answer /tmp/said; do sleep 0.2; done) | socat - UNIX-CONNECT:/run/qga.sock \
        >/tmp/said; cat /tmp/said"#;
    assert_eq!(on_host(&host.0, ask), r#"answer to {"execute":"guest-ping"}"#);
}

#[test]
#[ignore = "nested"]
fn the_guest_has_clocks() {
    let host = host();
    let vm = booted(&host, "clocks", &["--cpus", "2"]);
    let guest = |command: &str| vm.serial_command(command).unwrap();
    let sources = "/sys/devices/system/clocksource/clocksource0/available_clocksource";
    let sources = guest(&format!("cat {sources}"));
    assert!(sources.contains("kvm-clock"), "{sources}");
    let timers = guest("dmesg | grep -c 'TSC deadline timer'");
    assert_ne!(timers, "0", "the local timer counts down");

    let now = || on_host(&host.0, "date +%s").parse::<u64>().unwrap();
    let before = now();
    let rtc: u64 = guest("cat /sys/class/rtc/rtc0/since_epoch").parse().unwrap();
    assert!((before..=now() + 1).contains(&rtc), "the RTC says {rtc}, the host {before}");
}

/// What the guest discards takes no room in the image any more.
#[test]
#[ignore = "nested"]
fn discarded_blocks_are_given_back() {
    let host = host();
    on_host(&host.0, "truncate -s 32M /tmp/thin");
    let blocks = || on_host(&host.0, "stat -c %b /tmp/thin").parse::<u32>().unwrap();
    let vm = booted(&host, "thin", &["--disk", "path=/tmp/thin"]);
    vm.serial_command("dd if=/dev/urandom of=/dev/vda bs=1M count=16 conv=fsync").unwrap();
    assert!(blocks() >= 16 * 2048, "{} blocks", blocks());
    vm.serial_command("blkdiscard /dev/vda").unwrap();
    assert!(blocks() < 2048, "{} blocks are left", blocks());
}

/// In server mode the pointer moves by steps, on a mouse of its own.
#[test]
#[ignore = "nested"]
fn a_relative_mouse_moves_by_steps() {
    let host = host();
    let vm = booted(&host, "mouse", SPICE);
    let mut client = host.0.spice().unwrap();
    client.wait_state("a picture", PATIENCE, |state| state["width"].as_u64() > Some(0)).unwrap();
    client.ask("mouse-mode", json!({"mode": 1})).unwrap();
    client.wait_state("server mode", PATIENCE, |state| state["mouse"] == 1).unwrap();

    // Three events of 24 bytes: REL_X, REL_Y, SYN_REPORT. It may only move when somebody reads.
    let read = "dd if=$(grep -il mouse /sys/class/input/event*/device/name | head -n 1 | \
                sed 's,/sys/class/input/\\(event[0-9]*\\)/.*,/dev/input/\\1,') bs=24 count=3 \
                of=/tmp/moved 2>/dev/null & \
                until ls -l /proc/$!/fd | grep -q /dev/input; do usleep 10000; done";
    vm.serial_command(read).unwrap();
    client.ask("motion", json!({"x": 21, "y": -9})).unwrap();
    assert_eq!(events(&vm, "/tmp/moved"), [[2, 0, 21], [2, 1, -9], [0, 0, 0]]);
}

/// Type, code and value of input events that the guest has read.
fn events(vm: &Vm, file: &str) -> Vec<[i64; 3]> {
    let dump = format!("wait; od -An -v -t d2 {file}");
    let words: Vec<i64> = vm
        .serial_command(&dump)
        .unwrap()
        .split_whitespace()
        .map(|word| word.parse().unwrap())
        .collect();
    // Eight words of time come first; values here are small.
    words.chunks_exact(12).map(|event| [event[8], event[9], event[10]]).collect()
}
