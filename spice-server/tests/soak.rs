//! Half a minute of `bench/soak.py`: connects, half of them hostile, while an honest viewer looks on. The
//! real soak takes an hour and is run by hand.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, dead_code, missing_docs)]

mod support;

use std::{path::Path, process::Command};

#[test]
fn hostile_peers_take_nothing_from_an_honest_viewer() {
    if !support::have_client() || !support::have("openssl") {
        return;
    }
    let examples = ["--example", "test-picture", "--example", "soak-peer"];
    let build = [&["build", "--quiet", "-p", "spice-server"][..], &examples].concat();
    assert!(Command::new(env!("CARGO")).args(build).status().unwrap().success());
    // Examples are built beside the folder of test executables.
    let own = std::env::current_exe().unwrap();
    let examples = own.ancestors().nth(2).unwrap().join("examples");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("bench/soak.py");
    let out = Command::new("/usr/bin/python3")
        .arg(script)
        .args(["--minutes", "0.5", "--rate", "120", "--bin-dir"])
        .arg(&examples)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success(), "{said}\n{}", String::from_utf8_lossy(&out.stderr));
}
