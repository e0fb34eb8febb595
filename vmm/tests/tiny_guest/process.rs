//! The process as whoever starts it sees it: signals, standard streams, systemd, errors.

use super::*;

#[test]
fn signals_and_quit_end_an_idle_guest() {
    if no_kvm("signals_and_quit_end_an_idle_guest") {
        return;
    }
    let image = elf(&[code::print("up\n"), code::HALT.to_vec()].concat(), false);
    for signal in [rustix::process::Signal::TERM, rustix::process::Signal::INT] {
        let mut guest = Guest::start(&image, &["--name", "idle"]);
        guest.wait_for("up\n");
        // The end of standard input is nothing to the guest.
        drop(guest.child.stdin.take());
        // A thread that does not answer within a quarter of a second is reported as such; on a busy machine
        // it may have had no turn.
        let deadline = Instant::now() + LIMIT;
        loop {
            let status = guest.ctl(&["status", "--json"]);
            let text = String::from_utf8_lossy(&status.stdout).into_owned();
            assert!(text.contains("\"idle\""), "{text}");
            if text.contains("\"processors\":[\"in the guest at 0x") {
                break;
            }
            assert!(Instant::now() < deadline, "{text}");
        }
        let refused = guest.ctl(&["resize", "800x600"]);
        assert!(!refused.status.success());
        assert!(String::from_utf8_lossy(&refused.stderr).contains("no display"));
        guest.signal(signal);
        let (status, _, errors) = guest.end();
        assert!(status.success(), "{errors}");
    }
    let mut guest = Guest::start(&image, &[]);
    guest.wait_for("up\n");
    assert!(guest.ctl(&["quit"]).status.success());
    let control = guest.control();
    let (status, _, errors) = guest.end();
    assert!(status.success(), "{errors}");
    let gone = Command::new(env!("CARGO_BIN_EXE_drago-vmm"))
        .args(["ctl", "--control"])
        .arg(control)
        .args(["shutdown", "--wait"])
        .status()
        .unwrap();
    assert!(gone.success(), "shutting down what is gone already is a success");
}

/// However a machine ends, all its disks are flushed before the process does.
#[test]
fn every_end_flushes_the_disks() {
    if no_kvm("every_end_flushes_the_disks") {
        return;
    }
    let wait = [code::print("up\n"), code::HALT.to_vec()].concat();
    let reset = [code::print("up\n"), code::out(0x602, 1), code::HALT.to_vec()].concat();
    let off = [code::print("up\n"), code::power_off()].concat();
    let disks = tempfile::tempdir().unwrap();
    let path = |name: &str| disks.path().join(name).display().to_string();
    for name in ["first", "second", "third"] {
        std::fs::write(path(name), [0; 4096]).unwrap();
    }
    let disk = |name: &str, more: &str| format!("path={}{more}", path(name));
    let (first, second, third) = (disk("first", ""), disk("second", ""), disk("third", ",ro=on"));
    let options = ["--disk", &first, "--disk", &second, "--disk", &third, "--log", "debug"];
    for (code, signal) in [(off, false), (reset, false), (wait, true)] {
        let mut guest = Guest::start(&elf(&code, false), &options);
        guest.wait_for("up\n");
        if signal {
            guest.signal(rustix::process::Signal::TERM);
        }
        let (status, _, errors) = guest.end();
        assert!(status.success(), "{errors}");
        let (before, _) = errors.split_once("the virtual machine ended").unwrap();
        let stable = |name: &str| {
            let mut lines = before.lines().filter(|line| line.contains("written is stable"));
            lines.any(|line| line.contains(&path(name)) && line.contains("flushes=1"))
        };
        assert!(stable("first") && stable("second"), "{errors}");
    }
}

/// As `microvm@.service` of microvm.nix does: hardly any environment, another name, no input.
#[test]
fn a_service_manager_is_told_and_finds_nothing_left_behind() {
    if no_kvm("a_service_manager_is_told_and_finds_nothing_left_behind") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let code = [code::print("up\n"), code::HALT.to_vec()].concat();
    std::fs::write(at("guest.elf"), elf(&code, false)).unwrap();
    std::fs::write(at("secret"), "hunter2").unwrap();
    // A machine that was killed left its socket.
    drop(std::os::unix::net::UnixListener::bind(at("control")).unwrap());
    let manager = std::os::unix::net::UnixDatagram::bind(at("notify")).unwrap();
    manager.set_read_timeout(Some(LIMIT)).unwrap();
    let told = || {
        let mut buffer = [0; 4096];
        let length = manager.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    };
    let mut child = Command::new(env!("CARGO_BIN_EXE_drago-vmm"));
    std::os::unix::process::CommandExt::arg0(&mut child, "microvm@guest");
    let child = child
        .current_dir(folder.path())
        .env_clear()
        .env("NOTIFY_SOCKET", at("notify"))
        .args(["--log", "trace", "--kernel", "guest.elf", "--memory", "1", "--control", "control"])
        .args(["--credential", "a=/nonexistent", "--serial", "off"])
        // What a runner appends overrides.
        .args(["--credential", "a=secret", "--serial", "stdio", "--memory", "64"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut guest = Guest { folder, child };
    guest.wait_for("up\n");
    let ready = told();
    assert!(ready.starts_with("READY=1\n"), "{ready}");
    guest.signal(rustix::process::Signal::TERM);
    assert_eq!(told(), "STOPPING=1");
    let (status, _, errors) = guest.end();
    assert!(status.success(), "{errors}");
    for shown in ["hunter2", "aHVudGVyMg"] {
        assert!(!errors.contains(shown), "a secret in the log: {errors}");
    }
}

#[test]
fn a_signal_ends_the_wait_for_virtiofsd() {
    if no_kvm("a_signal_ends_the_wait_for_virtiofsd") {
        return;
    }
    let image = elf(&code::HALT, false);
    let mut guest = Guest::start(&image, &["--fs", "tag=t,socket=nobody"]);
    let mut errors = std::io::BufReader::new(guest.child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("waiting for virtiofsd") {
        line.clear();
        assert!(std::io::BufRead::read_line(&mut errors, &mut line).unwrap() > 0, "it ended");
    }
    guest.signal(rustix::process::Signal::TERM);
    assert!(guest.child.wait().unwrap().success());
}

/// As upstream's checks run in the sandbox of a Nix build: no `/sys`, no terminal, no network, of `/dev` only
/// what every build has and KVM; no user by name, no folder of temporary files that is written to.
#[test]
fn a_machine_runs_in_the_sandbox_of_a_nix_build() {
    const TEST: &str = "a_machine_runs_in_the_sandbox_of_a_nix_build";
    if no_kvm(TEST) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let code = [code::print("up\n"), code::power_off()].concat();
    std::fs::write(at("guest.elf"), elf(&code, true)).unwrap();
    std::fs::write(at("output.img"), [0; 4096]).unwrap();
    std::fs::create_dir(at("dev")).unwrap();
    let script = "set -e
        cd \"$1\"
        mount -t tmpfs dev dev
        for node in kvm null zero full random urandom; do
            touch dev/$node
            mount --bind /dev/$node dev/$node
        done
        mount --rbind dev /dev
        mount -t tmpfs sys /sys
        mount -t tmpfs etc /etc
        [ ! -e /sys/class ] && [ ! -e /dev/tty ] && [ ! -e /dev/shm ]
        echo prepared
        exec env -i \"$2\" --kernel guest.elf --memory 64 --control microvm.sock \\
            --disk path=output.img </dev/null";
    let output = Command::new("unshare")
        .args(["--mount", "--net", "--ipc", "--map-root-user", "sh", "-c", script, "sh"])
        .arg(folder.path())
        .arg(env!("CARGO_BIN_EXE_drago-vmm"))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    if !said.starts_with("prepared\n") {
        println!("SKIPPED {TEST}: no namespaces here: {errors}");
        return;
    }
    assert_eq!(said, "prepared\nup\n", "{errors}");
    assert!(output.status.success(), "{errors}");
    assert!(!at("microvm.sock").exists());
}

/// A virtiofsd that loses its machine ends: what is shared is to be there until the last write to a disk.
#[test]
fn virtiofsd_is_left_last() {
    if no_kvm("virtiofsd_is_left_last") {
        return;
    }
    let image = elf(&[code::print("up\n"), code::HALT.to_vec()].concat(), false);
    let mut guest = Guest::start(&image, &["--fs", "tag=t,socket=fs"]);
    let control = guest.control();
    let listener = std::os::unix::net::UnixListener::bind(guest.folder.path().join("fs")).unwrap();
    let virtiofsd = thread::spawn(move || {
        const GET_FEATURES: u32 = 1;
        let (mut machine, _) = listener.accept().unwrap();
        let mut header = [0; 12];
        while machine.read_exact(&mut header).is_ok() {
            let [request, _, size] = [0, 4, 8]
                .map(|at| u32::from_le_bytes(std::array::from_fn(|byte| header[at + byte])));
            machine.read_exact(&mut vec![0; size as usize]).unwrap();
            if request == GET_FEATURES {
                // VIRTIO_F_VERSION_1 and no protocol features, so that nothing else wants an answer.
                let answer = [1_u32, 5, 8].map(u32::to_le_bytes).concat();
                machine
                    .write_all(&[answer, (1_u64 << 32).to_le_bytes().to_vec()].concat())
                    .unwrap();
            }
        }
        control.exists()
    });
    guest.wait_for("up\n");
    assert!(guest.control().exists());
    guest.signal(rustix::process::Signal::TERM);
    assert!(!virtiofsd.join().unwrap(), "virtiofsd was left before the control socket was gone");
    let (status, _, errors) = guest.end();
    assert!(status.success(), "{errors}");
}

#[test]
fn errors_come_before_the_guest_and_name_the_option() {
    let run = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_drago-vmm"))
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    assert!(run(&["--kernel", "x", "--memory", "8"]).contains("--memory 8"));
    assert!(run(&["--kernel", "x", "--cpus", "0"]).contains("--cpus 0"));
    assert!(run(&["--kernel", "x", "stray"]).contains("stray"));
    assert!(run(&["--memory", "64"]).contains("--kernel"));
    if no_kvm("errors_come_before_the_guest_and_name_the_option") {
        return;
    }
    assert!(Path::new("/dev/kvm").exists());
    let missing = run(&["--kernel", "/nonexistent/vmlinuz"]);
    assert!(missing.contains("--kernel /nonexistent/vmlinuz"), "{missing}");
    assert!(missing.contains("caused by"), "{missing}");
}
