//! Mesa as the guest's driver: glmark2 draws through the vtest bridge, our queues, drago-gpu and
//! virglrenderer, and checks pixels of its own pictures.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

use std::{
    fs::File,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// Mesa's client knows no other place.
const SOCKET: &str = "/tmp/.virgl_test";
const PATIENCE: Duration = Duration::from_secs(120);
const SCENES: [&str; 5] = ["build", "texture", "shading:shading=phong", "bump", "shadow"];

struct Bridge(Child);

impl Drop for Bridge {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
        let _ = std::fs::remove_file(SOCKET);
    }
}

/// `cargo test --test vtest` alone does not build it.
fn build_bridge() {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["build", "--quiet", "-p", "drago-gpu", "--example", "vtest-bridge"]);
    if !cfg!(debug_assertions) {
        cargo.arg("--release");
    }
    assert!(cargo.status().unwrap().success(), "the bridge could not be built");
}

fn is_installed(program: &str) -> bool {
    std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
        .any(|folder| folder.join(program).is_file())
}

#[test]
fn mesa_draws_through_the_device() {
    if let Some(missing) =
        ["xvfb-run", "glmark2-es2"].into_iter().find(|program| !is_installed(program))
    {
        println!("SKIPPED: {missing} is not installed (packages xvfb, glmark2-es2-x11)");
        return;
    }
    build_bridge();
    // The bench uses the same socket.
    let lock = File::create("/tmp/.virgl_test.lock").unwrap();
    lock.lock().unwrap();
    let _ = std::fs::remove_file(SOCKET);
    let programs = Path::new(env!("CARGO_BIN_EXE_drago-gpu")).parent().unwrap();
    let child = Command::new(programs.join("examples/vtest-bridge"))
        .args([SOCKET, "--screen", "800x600@60", "--renderer", "virgl"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut bridge = Bridge(child);
    let begin = Instant::now();
    while !Path::new(SOCKET).exists() {
        assert!(begin.elapsed() < PATIENCE, "the bridge does not listen");
        std::thread::sleep(Duration::from_millis(10));
    }
    // The X server must not draw with virpipe as well: it would be a client of its own.
    let out = Command::new("xvfb-run")
        .args(["-a", "timeout", "600", "env", "LIBGL_ALWAYS_SOFTWARE=1", "GALLIUM_DRIVER=virpipe"])
        .args(["glmark2-es2", "--off-screen", "--validate"])
        .args(SCENES.into_iter().flat_map(|scene| ["-b", scene]))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(text.contains("virgl ("), "glmark2 did not use the bridge:\n{text}");
    // Some scenes do not know what they look like.
    assert!(text.matches("Validation: Success").count() >= 3, "{text}");
    assert!(!text.contains("Validation: Failure"), "{text}");
    assert_eq!(text.matches("Validation: ").count(), SCENES.len(), "{text}");
    let mut said = String::new();
    let stdout = bridge.0.stdout.as_mut().unwrap();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(stdout), &mut said).unwrap();
    assert!(said.contains("\"refused\": 0,") && !said.contains("\"frames\": 0,"), "{said}");
}
