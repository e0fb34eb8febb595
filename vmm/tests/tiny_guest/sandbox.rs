//! Filters on every thread, and what works although they are there.

use super::*;

/// Name, number of filters of each thread of a process.
fn filters(pid: u32) -> Vec<(String, u32)> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let status = threads.filter_map(|thread| {
        // Some threads are there for a moment only.
        let text = std::fs::read_to_string(thread.ok()?.path().join("status")).ok()?;
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            line.map(str::trim).unwrap_or_default().to_owned()
        };
        Some((field("Name:"), field("Seccomp_filters:").parse().unwrap()))
    });
    status.collect()
}

/// Processes below `pid` called `name`.
fn descendants(pid: u32, name: &str) -> Vec<u32> {
    let mut found = Vec::new();
    for thread in std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
        let list = std::fs::read_to_string(thread.path().join("children")).unwrap_or_default();
        for child in list.split_whitespace().filter_map(|pid| pid.parse().ok()) {
            let comm = std::fs::read_to_string(format!("/proc/{child}/comm"));
            if comm.is_ok_and(|comm| comm.starts_with(name)) {
                found.push(child);
            }
            found.extend(descendants(child, name));
        }
    }
    found
}

#[test]
fn every_thread_is_filtered_and_processors_more_than_others() {
    if no_kvm("every_thread_is_filtered_and_processors_more_than_others") {
        return;
    }
    let image = elf(&[code::print("up\n"), code::HALT.to_vec()].concat(), false);
    for (options, filtered) in [(&["--cpus", "2"][..], true), (&["--sandbox", "off"], false)] {
        let mut guest = Guest::start(&image, options);
        guest.wait_for("up\n");
        let pid = guest.child.id();
        // Processors of the guest that have not run yet install theirs any moment.
        let complete = |threads: &[(String, u32)]| {
            let main = threads.iter().find(|(name, _)| name == "drago-vmm").unwrap().1;
            threads.iter().all(|(name, count)| {
                if name.starts_with("vcpu") { *count > main } else { *count >= main }
            }) && main > 0
        };
        let mut threads = filters(pid);
        let deadline = Instant::now() + LIMIT;
        while filtered && !complete(&threads) {
            assert!(Instant::now() < deadline, "{threads:?}");
            thread::sleep(Duration::from_millis(5));
            threads = filters(pid);
        }
        assert!(filtered || threads.iter().all(|(_, count)| *count == 0), "{threads:?}");
        let launchers = descendants(pid, "drago-launcher");
        assert_eq!(launchers.len(), usize::from(filtered));
        guest.signal(rustix::process::Signal::TERM);
        let (status, _, errors) = guest.end();
        assert!(status.success(), "{errors}");
        for launcher in launchers {
            assert!(!Path::new(&format!("/proc/{launcher}")).exists(), "it is collected");
        }
    }
}

/// What is started again cannot be a child of a process that may not start any.
#[test]
fn passt_comes_back_although_the_sandbox_is_closed() {
    let test = "passt_comes_back_although_the_sandbox_is_closed";
    if no_kvm(test) {
        return;
    }
    if Command::new("passt").arg("--version").output().is_err() {
        println!("SKIPPED {test}: passt is not installed");
        return;
    }
    let image = elf(&[code::print("up\n"), code::HALT.to_vec()].concat(), false);
    let mut guest = Guest::start(&image, &["--net", "user"]);
    guest.wait_for("up\n");
    let pid = guest.child.id();
    let first = descendants(pid, "passt");
    assert_eq!(first.len(), 1);
    let victim = rustix::process::Pid::from_raw(first[0] as i32).unwrap();
    rustix::process::kill_process(victim, rustix::process::Signal::KILL).unwrap();
    let deadline = Instant::now() + LIMIT;
    while !descendants(pid, "passt").iter().any(|pid| !first.contains(pid)) {
        assert!(Instant::now() < deadline, "passt was not started again");
        thread::sleep(Duration::from_millis(20));
    }
    guest.signal(rustix::process::Signal::TERM);
    let (status, _, errors) = guest.end();
    assert!(status.success(), "{errors}");
    assert!(errors.contains("passt ended"), "{errors}");
}

/// spice-gtk, until a line of what it says has all of `words`.
fn spice_client(folder: &Path, arguments: &[&str], words: &[&str]) -> Child {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../spice-server/tests/client.py");
    let mut client = Command::new("/usr/bin/python3")
        .arg(script)
        .args(arguments)
        .current_dir(folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(client.stdout.take().unwrap()).lines().map_while(Result::ok);
    let (sender, receiver) = std::sync::mpsc::channel();
    let wanted: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
    thread::spawn(move || {
        let found = lines.any(|line| wanted.iter().all(|word| line.contains(word)));
        let _ = sender.send(found);
        // Whatever else it says must find a reader.
        lines.for_each(drop);
    });
    let found = receiver.recv_timeout(LIMIT);
    if found != Ok(true) {
        let _ = client.kill();
        let _ = client.wait();
        panic!("{arguments:?}: never {words:?}");
    }
    client
}

/// TLS, WebSockets, passwords at run time and Unix sockets need nothing that the sandbox refuses.
#[test]
fn viewers_come_in_through_the_closed_sandbox() {
    let test = "viewers_come_in_through_the_closed_sandbox";
    if no_kvm(test) {
        return;
    }
    let gpu = Path::new(env!("CARGO_BIN_EXE_drago-vmm")).with_file_name("drago-gpu");
    let probe = "import gi; gi.require_version('SpiceClientGLib', '2.0')";
    let python =
        Command::new("/usr/bin/python3").args(["-c", probe]).stderr(Stdio::null()).status();
    let folder = tempfile::tempdir().unwrap();
    let openssl = Command::new("openssl")
        .args(["req", "-x509", "-nodes", "-newkey", "ec", "-pkeyopt"])
        .args(["ec_paramgen_curve:prime256v1", "-keyout", "key", "-out", "cert"])
        .args(["-subj", "/CN=guest", "-addext", "subjectAltName=IP:127.0.0.1"])
        .current_dir(&folder)
        .output();
    if !gpu.exists()
        || !python.is_ok_and(|s| s.success())
        || !openssl.is_ok_and(|o| o.status.success())
    {
        println!(
            "SKIPPED {test}: drago-gpu is not built, or spice-gtk or openssl is not installed"
        );
        return;
    }
    let at = |name: &str| folder.path().join(name).display().to_string();
    std::fs::write(at("index.html"), "<p>").unwrap();
    std::fs::write(at("password"), "sesame\n").unwrap();
    let (socket, cert, key) = (at("spice.sock"), at("cert"), at("key"));
    let spice = format!(
        "127.0.0.1:0,unix={socket},tls-cert-file={cert},tls-key-file={key},password-required,clients=shared"
    );
    let web = format!("dir={}", folder.path().display());
    let image = elf(&[code::print("up\n"), code::HALT.to_vec()].concat(), false);
    let mut guest = Guest::start(&image, &["--spice", &spice, "--web", &web, "--gpu", "2d"]);
    guest.wait_for("up\n");
    let status = guest.ctl(&["status", "--json"]).stdout;
    let status: serde_json::Value = serde_json::from_slice(&status).unwrap();
    let address = status["spice"].as_str().unwrap().to_owned();
    let port = address.rsplit_once(':').unwrap().1;
    let mut events = Command::new(env!("CARGO_BIN_EXE_drago-vmm"))
        .args(["ctl", "--control"])
        .arg(guest.control())
        .arg("events")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut event_lines =
        BufReader::new(events.stdout.take().unwrap()).lines().map_while(Result::ok);
    let mut event = |words: &[&str]| {
        let found = event_lines.find(|line| words.iter().all(|word| line.contains(word)));
        assert!(found.is_some(), "no event {words:?}");
    };

    let (tls_port, ca) = (format!("tls-port={port}"), format!("ca-file={cert}"));
    let secure = ["127.0.0.1", "-", "sesame", &tls_port, &ca];
    let opened = ["InputsChannel", "opened"];
    // Nobody may come in before there is a password. (Trying again makes sure that `ctl events`
    // listens by then.)
    for _ in 0..2 {
        let mut refused = spice_client(folder.path(), &secure, &["error-auth"]);
        refused.kill().unwrap();
        refused.wait().unwrap();
    }
    event(&["spice-wrong-password", "127.0.0.1"]);
    assert!(guest.ctl(&["set-password", &at("password"), "--expires", "+3600"]).status.success());
    let mut one = spice_client(folder.path(), &secure, &opened);
    let unix = format!("unix-path={socket}");
    let mut two = spice_client(folder.path(), &["", "-", "sesame", &unix], &opened);
    event(&["spice-client-connected", "tcp+tls1.3"]);
    event(&["spice-client-connected", "unix:uid="]);
    let clients = String::from_utf8(guest.ctl(&["spice-clients"]).stdout).unwrap();
    assert_eq!(clients.lines().count(), 2, "{clients}");
    assert!(clients.contains("tcp+tls1.3") && clients.contains("\"drives\":true"), "{clients}");
    assert!(guest.ctl(&["set-certificate", &cert, &key]).status.success());
    let wrong = guest.ctl(&["set-certificate", &cert, &cert]);
    let told = String::from_utf8(wrong.stderr).unwrap();
    assert!(!wrong.status.success() && told.contains("no private key"), "{told}");
    assert!(guest.ctl(&["expire-password", "now"]).status.success());
    let mut late = spice_client(folder.path(), &secure, &["error-auth"]);

    let status = String::from_utf8(guest.ctl(&["status", "--json"]).stdout).unwrap();
    assert!(status.contains("\"wrong_passwords\":3"), "{status}");
    let mut browser = std::net::TcpStream::connect(&address).unwrap();
    browser.write_all(b"GET / HTTP/1.1\r\nHost: vm\r\n\r\n").unwrap();
    let mut answer = String::new();
    browser.read_to_string(&mut answer).unwrap();
    assert!(answer.contains("Location: https://vm/\r\n"), "{answer}");

    for client in [&mut one, &mut two, &mut late] {
        client.kill().unwrap();
        client.wait().unwrap();
    }
    event(&["spice-client-disconnected"]);
    assert!(guest.ctl(&["quit"]).status.success());
    let (status, _, errors) = guest.end();
    assert!(status.success(), "{errors}");
    assert!(events.wait().unwrap().success());
    assert!(!Path::new(&socket).exists());
    assert!(!errors.contains("sesame"), "{errors}");
}
