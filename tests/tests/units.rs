//! Guests in the shape of NixOS, run by microvm.nix's units with our runners, under a real systemd with
//! a real systemd in the guest: what the checks of microvm.nix ask for, see docs/testing.md.
//!
//! Run by `cargo xtask test --suite nested`; needs the test host, so
//! every test is `#[ignore]`d by default.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::{
    path::{Path, PathBuf},
    time::Instant,
};

use drago_tests::{
    client::SpiceClient,
    guest::{Nixos, Shape, Store},
    keys, paths,
    picture::Picture,
    testbed::{Options, Testbed},
    units::{STORE, Units},
    vm::{PATIENCE, SPICE_PORT},
};
use serde_json::{Value, json};

fn start() -> (Units, Nixos) {
    let nixos = Nixos::new().unwrap();
    let agent = Path::new(env!("CARGO_BIN_EXE_drago-testbed-agent"));
    let programs =
        std::env::var_os("DRAGO_PROGRAMS").map_or(agent.parent().unwrap().into(), PathBuf::from);
    let mut options = Options::new(agent.to_path_buf());
    options.memory_mib = 4096;
    options.forward = vec![(0, SPICE_PORT)];
    let host = Testbed::boot(&options).unwrap();
    let units = Units::start(host, &nixos, &programs).unwrap();
    (units, nixos)
}

/// A volume with all that microvm.nix has defaults for.
fn volume(image: &str, label: &str) -> Value {
    json!({
        "image": image, "label": label, "size": 64, "fsType": "ext4", "imageType": "raw",
        "autoCreate": true, "readOnly": false, "direct": false, "serial": null,
        "mkfsExtraArgs": [], "mountPoint": null,
    })
}

/// For those who look for what happens seldom.
fn env_number(name: &str) -> Option<u32> {
    std::env::var(name).ok()?.parse().ok()
}

/// What a machine says and how it ended.
fn state(units: &Units, name: &str, property: &str) -> String {
    units.run(&format!("systemctl show --value -p {property} microvm@{name}")).unwrap()
}

/// The file `result` on a volume of a machine that is off, whose file system must have been unmounted.
fn result(units: &Units, image: &str) -> String {
    let features = units.run(&format!("/usr/sbin/dumpe2fs -h {image} 2>/dev/null")).unwrap();
    let clean = !features.contains("needs_recovery") && features.contains("state:         clean");
    assert!(clean, "{image} was not unmounted: {features}");
    units.run(&format!("/usr/sbin/debugfs -R 'cat result' {image} 2>/dev/null")).unwrap()
}

/// Waits until the client's picture is as wanted.
fn wait_picture(client: &mut SpiceClient, what: &str, is: impl Fn(&Picture) -> bool) {
    let path = paths::cache("e2e/units").unwrap().join("screen.ppm");
    let end = Instant::now() + PATIENCE;
    loop {
        let seen = client.ask("state", json!({})).unwrap()["invalidated"].as_u64();
        if client.screenshot(&path).unwrap() != (0, 0) && is(&Picture::open(&path).unwrap()) {
            return;
        }
        // A cursor that blinks changes the picture for ever.
        assert!(Instant::now() < end, "the screen never showed {what}: {}", path.display());
        let changed = |state: &Value| state["invalidated"].as_u64() != seen;
        client.wait_state(what, PATIENCE, changed).unwrap();
    }
}

/// The machine's screen for those who know the password alone: its console is seen, and types what
/// `test.script` wants.
fn use_screen(units: &Units) {
    let port = units.testbed.outer_port(SPICE_PORT).unwrap();
    let mut stranger = SpiceClient::connect_with_password(port, "mellon").unwrap();
    stranger.wait_channel("MainChannel", "error-auth", PATIENCE).unwrap();
    assert!(!stranger.events().iter().any(|event| event["event"] == "opened"));

    let mut client = SpiceClient::connect_with_password(port, "sesame").unwrap();
    wait_picture(&mut client, "a console", |picture| picture.colours() > 1);
    client.press(&keys::strokes("key\n").unwrap()).unwrap();
    wait_picture(&mut client, "blue", |picture| picture.share_of([0, 0, 170], 8) > 0.9);
}

/// The store in a shared folder, mounted in the initrd, under a writable overlay; readiness over vsock;
/// credentials; a tap; a screen with a password; machined; the power button, which systemd-logind handles.
#[test]
#[ignore = "nested"]
fn a_machine_is_ready_when_its_systemd_says_so_and_ends_by_the_power_button() {
    let (units, nixos) = start();
    units
        .run(
            "printf 's3cret\\0\\n' >/run/secret; echo sesame >/run/password; \
             chown microvm /run/secret /run/password; chmod 400 /run/secret /run/password; \
             cat >/run/script <<'END'
exec >/output/result 2>&1
uname
cat /etc/machine-id
od -An -c $CREDENTIALS_DIRECTORY/test.secret
findmnt -no FSTYPE /nix/.ro-store
findmnt -no FSTYPE /nix/store
echo it >/nix/store/written && cat /nix/store/written
systemd-run --quiet iperf3 --server
udevadm wait --timeout=120 /dev/virtio-ports/com.redhat.spice.0 /dev/fb0 && echo a screen
systemd-run --quiet sh -c 'exec </dev/tty1 >/dev/tty1
    echo Type!
    head -n 1 >>/output/result
    printf \"\\033[44m\\033[2J\"'
END",
        )
        .unwrap();
    let shape = Shape { store: Store::Virtiofs, writable: true, output: Some("/dev/vdb") };
    let configuration = json!({
        "mem": 512,
        // In the emulated test host, on a busy machine, a guest of two that boots like this one goes astray
        // now and then (docs/testing.md). Others with several processors are in the other suites.
        "vcpu": env_number("DRAGO_UNITS_CPUS").unwrap_or(1),
        "storeOnDisk": false,
        "machineId": "6ba7b810-9dad-11d1-80b4-00c04fd430c8",
        "registerWithMachined": true,
        "vsock": { "cid": 4242 },
        "balloon": true,
        "volumes": [volume("rw.img", "rw-store"), volume("output.img", "output")],
        "shares": [{
            "tag": "ro-store", "proto": "virtiofs", "socket": "ro-store.sock", "source": STORE,
            "readOnly": false,
        }],
        "interfaces": [{
            "type": "tap", "id": "vm-agent", "mac": "02:00:00:00:00:01", "bridge": null,
            "tap": { "vhost": true },
        }],
        "credentialFiles": { "test.secret": "/run/secret", "test.script": "/run/script" },
        "graphics": { "enable": true },
        "drago-vmm": { "spice": {
            "address": "127.0.0.1", "port": SPICE_PORT, "passwordFile": "/run/password", "clients": null,
        } },
    });
    units.install("agent", &nixos, &nixos.bzimage, &shape, configuration).unwrap();

    // Returns when the guest's systemd has sent READY=1.
    units.start_machine("agent").unwrap();

    assert_eq!(state(&units, "agent", "ActiveState"), "active");
    let status = state(&units, "agent", "StatusText");
    assert!(!status.contains("The guest is starting"), "no report of the guest's: {status}");
    let pid = state(&units, "agent", "MainPID");
    let of_process = units
        .run(&format!(
            "grep -E '^(Uid|Gid|CapEff)' /proc/{pid}/status; \
        tr '\\0' '\\n' </proc/{pid}/environ | grep ^PATH; tr '\\0' ' ' </proc/{pid}/cmdline"
        ))
        .unwrap();
    assert!(of_process.contains("CapEff:\t0000000000000000"), "{of_process}");
    assert!(of_process.contains("PATH=\n"), "{of_process}");
    assert!(of_process.contains("microvm@agent --name agent"), "{of_process}");

    // The program that draws has the rights of the unit, too.
    let user = of_process.lines().find(|line| line.starts_with("Uid")).unwrap();
    let helpers = units
        .run(
            "cd /sys/fs/cgroup$(systemctl show --value -p ControlGroup microvm@agent) && \
             for pid in $(cat cgroup.procs); do grep -HE '^(Name|Uid)' /proc/$pid/status; done",
        )
        .unwrap();
    let draws = helpers.lines().find_map(|line| line.strip_suffix("Name:\tdrago-gpu")).unwrap();
    assert!(helpers.contains(&format!("{draws}{user}")), "{helpers}");

    // machined knows it.
    let machine = units.run("machinectl show agent -p Class -p Leader -p State").unwrap();
    assert!(
        machine.contains("Class=vm") && machine.contains(&format!("Leader={pid}")),
        "{machine}"
    );

    // The network, both ways.
    for way in ["", "--reverse"] {
        let said = units.run(&format!("iperf3 --client 10.0.0.1 --time 2 {way}")).unwrap();
        assert!(said.contains("receiver"), "{said}");
    }

    use_screen(&units);

    // systemd-logind answers the power button.
    units.run("systemctl stop microvm@agent").unwrap();
    assert_eq!(state(&units, "agent", "Result"), "success");
    assert_eq!(state(&units, "agent", "ExecMainStatus"), "0");
    let images = "/var/lib/microvms/agent";
    let text = result(&units, &format!("{images}/output.img"));
    assert_eq!(
        text.lines().map(str::trim).collect::<Vec<_>>(),
        [
            "Linux",
            "6ba7b8109dad11d180b400c04fd430c8",
            "s   3   c   r   e   t  \\0  \\n",
            "virtiofs",
            "overlay",
            "it",
            "a screen",
            "key"
        ]
    );
    // Nothing of the machine is left.
    let left = units.run(&format!("ls {images}; ip -br link; cat /proc/[0-9]*/comm")).unwrap();
    assert!(!left.contains("agent.sock") && !left.contains("drago"), "{left}");
    for round in 1..env_number("DRAGO_UNITS_ROUNDS").unwrap_or(1) {
        units.start_machine("agent").unwrap();
        units.run("systemctl stop microvm@agent").unwrap();
        eprintln!("round {round} is over");
    }
}

/// Upstream's `startup-shutdown`, `shutdown-command` and what of `machined` the test above leaves: the
/// runner alone, in an empty environment, for a guest that switches itself off and one that reboots, from
/// both forms of the kernel and both places of the store; one whose power button is pressed too early; then
/// a machine that machined ends.
#[test]
#[ignore = "nested"]
fn a_runner_returns_success_however_the_guest_ends() {
    let (units, nixos) = start();
    let shape = |store| Shape { store, writable: false, output: Some("/dev/vdb") };
    for (name, end, kernel, store) in [
        ("off", "poweroff", &nixos.bzimage, Store::FirstDisk),
        ("again", "reboot", &nixos.vmlinux, Store::Label),
    ] {
        units
            .run(&format!(
                "printf 'exec >/output/result 2>&1\\nuname -m\\nsystemctl {end}\\n' >/run/script"
            ))
            .unwrap();
        let configuration = json!({
            "mem": 512,
            "volumes": [volume("output.img", "output")],
            "credentialFiles": { "test.script": "/run/script" },
        });
        units.install(name, &nixos, kernel, &shape(store), configuration).unwrap();
        // No environment, no terminal, the rights of the unit's user and group alone.
        units
            .run(&format!(
                "cd /var/lib/microvms/{name} && setpriv --reuid=microvm --regid=kvm --clear-groups \
                 --no-new-privs env -i current/bin/microvm-run >run.log 2>&1 </dev/null || \
                 {{ tail -n 40 run.log; exit 1; }}"
            ))
            .unwrap();
        let text = result(&units, &format!("/var/lib/microvms/{name}/output.img"));
        assert_eq!(text, "x86_64", "{name}");
        // Stopping what is gone already, as ExecStop does.
        units
            .run(&format!("cd /var/lib/microvms/{name} && env -i current/bin/microvm-shutdown"))
            .unwrap();
    }

    // Upstream's `shutdown-command`: asked to end 10 s after its start, when nobody in the guest listens to
    // its power button yet; here that is somewhere in its initrd.
    units.run("printf 'echo it was up >/output/result\\n' >/run/script").unwrap();
    let configuration = json!({
        "mem": 512,
        "volumes": [volume("output.img", "output")],
        "credentialFiles": { "test.script": "/run/script" },
    });
    let kernel = &nixos.bzimage;
    units.install("asked", &nixos, kernel, &shape(Store::Label), configuration).unwrap();
    units
        .run(
            "cd /var/lib/microvms/asked && user='setpriv --reuid=microvm --regid=kvm --clear-groups \
             --no-new-privs env -i' && { $user current/bin/microvm-run >run.log 2>&1 </dev/null & } && \
             run=$! && sleep 10 && $user current/bin/microvm-shutdown </dev/null && wait $run || \
             { tail -n 40 run.log; exit 1; }",
        )
        .unwrap();
    assert_eq!(result(&units, "/var/lib/microvms/asked/output.img"), "it was up");

    units.run("echo true >/run/script").unwrap();
    let configuration = json!({
        "mem": 512,
        "registerWithMachined": true,
        "vsock": { "cid": 4243 },
        "credentialFiles": { "test.script": "/run/script" },
    });
    let shape = Shape { store: Store::Label, writable: false, output: None };
    units.install("ended", &nixos, &nixos.vmlinux, &shape, configuration).unwrap();
    units.start_machine("ended").unwrap();
    let pid = state(&units, "ended", "MainPID");
    units.run("machinectl terminate ended").unwrap();
    units.run(&format!("while [ -d /proc/{pid} ]; do sleep 0.1; done")).unwrap();
    // Restart=always has it started again.
    units.run("systemctl stop microvm@ended").unwrap();
}
