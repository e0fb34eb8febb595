//! Ports that somebody else has are found before anything is installed, built or booted.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    net::TcpListener,
    process::{Command, Output},
};

fn xtask(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(arguments)
        // Nothing can be built or installed with these: the check comes first.
        .env("CARGO", "/nonexistent")
        .env("PATH", "/nonexistent")
        .output()
        .unwrap()
}

/// The same with a port for SPICE that is free, whatever else this machine serves.
fn with_free_spice_port(arguments: &[&str]) -> Output {
    loop {
        let free = TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
        let other = format!("--spice-port={free}");
        let out = xtask(&[arguments, &[other.as_str()]].concat());
        // Somebody may have got it since.
        let taken = format!("--spice-port {free}: port {free} of");
        if !String::from_utf8_lossy(&out.stderr).contains(&taken) {
            return out;
        }
    }
}

#[test]
fn a_taken_port_is_told_first() {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    let forward = format!("{port}:1");
    for arguments in [
        &["demo", "--spice-port", &port, "--minimal"][..],
        &["demo", "--ssh-port", &port, "--minimal"],
        &["testbed", "--forward", &forward, "true"],
    ] {
        let out = match arguments[1] {
            "--ssh-port" => with_free_spice_port(arguments),
            _ => xtask(arguments),
        };
        let said = String::from_utf8(out.stderr).unwrap();
        let option = format!("xtask: {} {}: port {port} of", arguments[1], arguments[2]);
        assert!(said.starts_with(&option), "{said}");
        assert!(said.contains(&format!("(process {})", std::process::id())), "{said}");
        assert!(said.contains(&format!("for example {} ", arguments[1])), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        assert_eq!(out.status.code(), Some(1));
    }
    for arguments in [
        ["demo", "--spice-port=5900", "--ssh-port=5900"],
        ["demo", "--spice-port=0", "--minimal"],
        ["demo", "--guest=nixos", "--screenshot=a.png"],
    ] {
        assert!(!xtask(&arguments).status.success(), "{arguments:?}");
    }
}
