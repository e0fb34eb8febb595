//! The nested suite with the minimal guest: serial console, ways to end, text console on the screen.
//!
//! Run by `cargo xtask test --suite nested`; needs the test host, so every test is `#[ignore]`d by default.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod devices;
mod programs;

use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use drago_tests::guest::Guest;
use drago_tests::picture::{Picture, reads};
use drago_tests::vm::{Host, PATIENCE, VNC_PORT, Vm};

const SPICE: &[&str] = &["--spice", "127.0.0.1:5900"];
const PROMPT: &str = "minimal# ";

/// One test host for all tests, which take turns in it.
fn host() -> MutexGuard<'static, (Host, Guest)> {
    static HOST: OnceLock<Mutex<(Host, Guest)>> = OnceLock::new();
    HOST.get_or_init(|| {
        let guest = Guest::minimal().unwrap();
        let agent = Path::new(env!("CARGO_BIN_EXE_drago-testbed-agent"));
        Mutex::new((Host::boot("minimal", agent, 4096).unwrap(), guest))
    })
    .lock()
    .unwrap_or_else(PoisonError::into_inner)
}

/// What a command in the test host prints.
fn on_host(host: &Host, script: &str) -> String {
    host.shell(script).unwrap()
}

fn booted(host: &(Host, Guest), name: &str, options: &[&str]) -> Vm {
    let vm = host.0.start(name, &host.1, options).unwrap();
    vm.serial
        .wait_for(0, PROMPT, PATIENCE)
        .unwrap_or_else(|error| panic!("{error}\n{}", vm.state()));
    vm
}

#[test]
#[ignore = "nested"]
fn poweroff_ends_with_0() {
    let host = host();
    let mut vm = booted(&host, "poweroff", &[]);
    assert!(vm.serial_command("uname -r").unwrap().contains("amd64"));
    vm.type_serial("poweroff").unwrap();
    assert_eq!(vm.wait().unwrap(), 0, "{}", vm.state());
}

#[test]
#[ignore = "nested"]
fn reboot_ends_with_0() {
    let host = host();
    let mut vm = booted(&host, "reboot", &[]);
    vm.type_serial("reboot").unwrap();
    assert_eq!(vm.wait().unwrap(), 0, "{}", vm.state());
}

#[test]
#[ignore = "nested"]
fn a_panic_is_told_apart() {
    let host = host();
    let mut vm = booted(&host, "panic", &["--panic-exit-code", "42"]);
    vm.type_serial("echo c >/proc/sysrq-trigger").unwrap();
    assert_eq!(vm.wait().unwrap(), 42, "{}", vm.state());
    assert!(vm.log.since(0).to_lowercase().contains("panic"), "{}", vm.state());
}

#[test]
#[ignore = "nested"]
fn sigterm_ends_with_0() {
    let host = host();
    let mut vm = booted(&host, "sigterm", &[]);
    vm.signal(15).unwrap();
    assert_eq!(vm.wait().unwrap(), 0, "{}", vm.state());
}

#[test]
#[ignore = "nested"]
fn the_end_of_stdin_is_harmless() {
    let host = host();
    let mut vm = host.0.start("stdin-eof", &host.1, &["--rng", "source=/dev/urandom"]).unwrap();
    vm.close_stdin().unwrap();
    vm.serial
        .wait_for(0, PROMPT, PATIENCE)
        .unwrap_or_else(|error| panic!("{error}\n{}", vm.state()));
    assert_eq!(vm.ended().unwrap(), None);
}

#[test]
#[ignore = "nested"]
fn every_processor_and_all_memory_is_there() {
    let host = host();
    // One more than lies below the hole for devices.
    let vm = booted(&host, "smp", &["--cpus", "4", "--memory", "3073"]);
    assert_eq!(vm.serial_command("grep -c ^processor /proc/cpuinfo").unwrap(), "4");
    let total = vm.serial_command("awk '/MemTotal/{print $2}' /proc/meminfo").unwrap();
    let total: u32 = total.parse().unwrap();
    assert!((2_900_000..3_073 * 1024).contains(&total), "{total} KiB of 3073 MiB");
}

/// The image may be a block device of the host: its size comes from the device, and what the guest
/// writes is there when the guest is off.
#[test]
#[ignore = "nested"]
fn a_disk_may_be_a_block_device() {
    let host = host();
    let device = on_host(
        &host.0,
        "set -e; truncate -s 33M /tmp/image; printf 'from the host' | dd of=/tmp/image conv=notrunc \
         2>/dev/null; losetup --find --show /tmp/image",
    );
    let disk = format!("path={device}");
    let mut vm = booted(&host, "block-device", &["--disk", &disk]);
    assert_eq!(vm.serial_command("cat /sys/block/vda/size").unwrap(), (33 * 2048).to_string());
    assert_eq!(vm.serial_command("head -c 13 /dev/vda").unwrap(), "from the host");
    // At the far end, which a wrong size would cut off.
    vm.serial_command("printf 'from the guest' | dd of=/dev/vda bs=512 seek=67583 conv=fsync")
        .unwrap();
    vm.type_serial("poweroff").unwrap();
    assert_eq!(vm.wait().unwrap(), 0, "{}", vm.state());

    let read =
        format!("dd if={device} bs=512 skip=67583 2>/dev/null | head -c 14; losetup -d {device}");
    assert_eq!(on_host(&host.0, &read), "from the guest");
}

#[test]
#[ignore = "nested"]
fn the_screen_shows_the_console_and_takes_keys() {
    let host = host();
    let mut vm = booted(&host, "console", SPICE);
    vm.log.wait_for(0, "SPICE server listens", PATIENCE).unwrap();
    let mut client = host.0.spice().unwrap();
    vm.wait_text(&mut client, "minimal#").unwrap();

    // What the guest prints is read on the client's screen.
    vm.serial_command("clear >/dev/tty1; echo PICTURE WORKS >/dev/tty1").unwrap();
    vm.wait_text(&mut client, "PICTURE WORKS").unwrap();

    // What the client types is done by the guest's shell, shifted keys too.
    client.type_text("echo \"Keys_Work: $((40+2))\" >/tmp/typed\n", PATIENCE).unwrap();
    let typed = vm
        .serial_command("until [ -s /tmp/typed ]; do usleep 100000; done; cat /tmp/typed")
        .unwrap();
    assert_eq!(typed, "Keys_Work: 42");
    let picture = vm.wait_text(&mut client, "Keys_Work").unwrap();
    assert!(reads(&picture.text(None).unwrap(), "PICTURE WORKS"));

    // The client may leave and come back.
    drop(client);
    let mut again = host.0.spice().unwrap();
    vm.wait_text(&mut again, "PICTURE WORKS").unwrap();

    vm.type_serial("poweroff").unwrap();
    assert_eq!(vm.wait().unwrap(), 0, "{}", vm.state());
}

#[test]
#[ignore = "nested"]
fn a_vnc_viewer_sees_the_console_beside_a_spice_one() {
    let host = host();
    let options = [SPICE, &["--vnc", "127.0.0.1:5901"]].concat();
    let mut vm = booted(&host, "vnc", &options);
    let mut spice = host.0.spice().unwrap();
    vm.serial_command("clear >/dev/tty1; echo BOTH SEE THIS >/dev/tty1").unwrap();
    vm.wait_text(&mut spice, "BOTH SEE THIS").unwrap();

    let display = format!("127.0.0.1:{}", i32::from(host.0.outer(VNC_PORT).unwrap()) - 5900);
    let [png, ppm] = ["png", "ppm"].map(|kind| host.0.results.join(format!("vnc.{kind}")));
    for (program, arguments) in [
        ("gvnccapture", [OsStr::new(&display), png.as_os_str()]),
        ("convert", [png.as_os_str(), ppm.as_os_str()]),
    ] {
        let done = Command::new(program).args(arguments).output().unwrap();
        assert!(done.status.success(), "{program}: {done:?}\n{}", vm.state());
    }
    let text = Picture::open(&ppm).unwrap().text(None).unwrap();
    assert!(reads(&text, "BOTH SEE THIS"), "{text}");

    vm.type_serial("poweroff").unwrap();
    assert_eq!(vm.wait().unwrap(), 0, "{}", vm.state());
}
