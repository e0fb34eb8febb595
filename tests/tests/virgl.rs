//! The slow suite's OpenGL: weston and GNOME draw with the guest's Mesa through virtio-gpu, drago-gpu draws
//! with virglrenderer and, there being no GPU in the test host, the host's llvmpipe.
//!
//! Run by `cargo xtask test --suite slow`. The steps build on one another's boot, hence one test.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::path::Path;
use std::time::Duration;

use drago_tests::desktop::{WESTON_BACKGROUND, gnome_search_field, is_shown};
use drago_tests::guest::{Desktop, Guest};
use drago_tests::picture::reads;
use drago_tests::progress::step;
use drago_tests::vm::{GUEST_DISK, Host, PATIENCE};
use serde_json::json;

/// Two emulated CPUs draw for the guest and run it.
const BOOT: Duration = Duration::from_secs(2400);

#[test]
#[ignore = "slow"]
fn weston_draws_with_opengl() {
    let mut guest = Guest::desktop(Desktop::Weston).unwrap();
    guest.cmdline.push_str(" guest.renderer=gl");
    let agent = Path::new(env!("CARGO_BIN_EXE_drago-testbed-agent"));
    let host = Host::boot_with_disk("virgl", agent, 4096, &guest).unwrap();
    // The test host's only render node is vgem's, which cannot draw.
    assert_eq!(host.run("mount -t tmpfs none /dev/dri").unwrap().code, 0);
    let disk = format!("path={GUEST_DISK}");
    let options = ["--cpus", "2", "--disk", &disk, "--net", "user,hostfwd=tcp::2223-:22"];
    let options = [&options[..], &["--gpu", "virgl", "--spice", "127.0.0.1:5900"]].concat();
    let mut vm = host.start("virgl", &guest, &options).unwrap();
    vm.log
        .wait_for(0, "SPICE server listens", PATIENCE)
        .unwrap_or_else(|error| panic!("{error}\n{}", vm.state()));
    let mut client = host.spice().unwrap();

    step("the desktop is shown", || {
        vm.wait_picture_within(&mut client, "the desktop", BOOT, |picture| {
            is_shown("weston", picture)
        })
    })
    .unwrap();

    step("weston draws with virgl", || {
        let log = host.ssh(&guest, "demo", "cat /tmp/weston.log")?;
        let renderer = log.lines().find(|line| line.contains("GL renderer:")).unwrap_or_default();
        anyhow::ensure!(renderer.contains("virgl"), "{renderer:?} in\n{log}");
        Ok(())
    })
    .unwrap();

    step("so do its clients", || {
        let said = host.ssh(
            &guest,
            "demo",
            "XDG_RUNTIME_DIR=/run/user/1000 WAYLAND_DISPLAY=wayland-1 eglinfo -B -p wayland 2>&1",
        )?;
        anyhow::ensure!(said.contains("virgl"), "{said}");
        Ok(())
    })
    .unwrap();

    step("keys arrive in the terminal", || {
        client.type_text("echo \"Typed: $((6*7)) OK\"\n", PATIENCE)?;
        vm.wait_text(&mut client, "Typed: 42 OK")
    })
    .unwrap();

    step("the guest follows the client's size", || {
        client.ask("resize", json!({ "width": 1024, "height": 768 }))?;
        vm.wait_picture(&mut client, "the desktop resized", |picture| {
            Ok((picture.width, picture.height) == (1024, 768)
                && picture.share_of(WESTON_BACKGROUND, 6) > 0.1)
        })
    })
    .unwrap();

    vm.signal(15).unwrap();
    assert_eq!(vm.wait().unwrap(), 0, "{}", vm.state());
}

/// From the shell's 3D context on; seen: two to four minutes.
const OVERVIEW: Duration = Duration::from_secs(900);

/// What a guest whose desktop does not come knows about it.
fn inside(host: &Host, guest: &Guest) -> String {
    const SCRIPT: &str = "dmesg -l warn,err | tail -20; \
        journalctl -b -p notice --no-pager | grep -iE 'gnome|gdm|mutter|drm|virtio|session' | tail -60; \
        ps axo pid,etimes,stat,wchan:25,comm | grep -E 'gnome|Xway|gdm|mutter'; \
        for p in $(pgrep -x gnome-shell); do head -20 /proc/$p/task/*/stack; done; \
        cat /sys/class/tty/tty0/active; cat /sys/kernel/debug/dri/*/state";
    host.ssh(guest, "root", SCRIPT).unwrap_or_else(|error| format!("{error:#}"))
}

/// GNOME's shell makes a 3D context of its own, its overview comes out of it, and it takes keys.
#[test]
#[ignore = "slow"]
fn gnome_draws_with_opengl() {
    let guest = Guest::desktop(Desktop::Gnome).unwrap();
    let agent = Path::new(env!("CARGO_BIN_EXE_drago-testbed-agent"));
    let host = Host::boot_with_disk("virgl-gnome", agent, 6144, &guest).unwrap();
    // The test host's only render node is vgem's, which cannot draw.
    assert_eq!(host.run("mount -t tmpfs none /dev/dri").unwrap().code, 0);
    let command = host
        .command(host.program("drago-vmm"))
        .env("DRAGO_LOG", "info,drago_gpu::control=debug")
        .args(["--kernel", &guest.kernel.display().to_string()])
        .args(["--initrd", &guest.initrd.display().to_string()])
        .args(["--cmdline", &guest.cmdline, "--memory", &guest.memory_mib.to_string()])
        .args(["--cpus", "2", "--disk", &format!("path={GUEST_DISK}")])
        .args(["--net", "user,hostfwd=tcp::2223-:22"])
        .args(["--gpu", "virgl", "--spice", "127.0.0.1:5900"]);
    let mut vm = host.spawn("gnome", command).unwrap();
    vm.log
        .wait_for(0, "SPICE server listens", PATIENCE)
        .unwrap_or_else(|error| panic!("{error}\n{}", vm.state()));
    let mut client = host.spice().unwrap();

    step("the shell makes a 3D context", || vm.log.wait_for(0, "name=gnome-shell", BOOT).map(drop))
        .unwrap_or_else(|error| panic!("{error:#}\n{}", vm.state()));

    step("the overview is shown", || {
        vm.wait_picture_within(&mut client, "the overview", OVERVIEW, |picture| {
            is_shown("gnome", picture)
        })
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{}", inside(&host, &guest)));

    step("the search field takes typed text", || {
        client.type_text("foot", PATIENCE)?;
        vm.wait_picture(&mut client, "the search", |picture| {
            Ok(reads(&picture.text(Some(gnome_search_field(picture)))?, "foot"))
        })
    })
    .unwrap();

    vm.signal(15).unwrap();
    assert_eq!(vm.wait().unwrap(), 0, "{}", vm.state());
}
