//! `cargo xtask bench`, OpenGL: glmark2 through our device (the vtest bridge feeds its commands into
//! our queues) against the same virglrenderer's own vtest server, in turns; and read-back times.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use drago_tests::{
    paths,
    progress::{note, step},
};
use serde_json::{Value, json};

/// Mesa's client knows no other place.
const SOCKET: &str = "/tmp/.virgl_test";
const PATIENCE: Duration = Duration::from_secs(60);
const SCENES: [&str; 6] =
    ["build", "texture", "shading:shading=phong", "effect2d", "buffer", "ideas"];
const SECONDS: u32 = 3;

/// A server for Mesa's client; killed when dropped.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
        let _ = std::fs::remove_file(SOCKET);
    }
}

impl Server {
    fn start(mut command: Command) -> Result<Self> {
        let _ = std::fs::remove_file(SOCKET);
        let name = command.get_program().display().to_string();
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        let mut server = Self(child);
        let begin = Instant::now();
        while !Path::new(SOCKET).exists() {
            if let Some(status) = server.0.try_wait()? {
                bail!("{name} ended with {status}");
            }
            ensure!(begin.elapsed() < PATIENCE, "{name} does not listen at {SOCKET}");
            thread::sleep(Duration::from_millis(50));
        }
        Ok(server)
    }
}

/// Frames per second of each scene.
fn glmark2(seconds: u32) -> Result<Vec<f64>> {
    let mut command = Command::new("xvfb-run");
    command.args(["-a", "glmark2-es2", "--off-screen", "-s", "1280x720"]);
    for scene in SCENES {
        command.args(["-b", &format!("{scene}:duration={seconds}")]);
    }
    let out = command
        .env("LIBGL_ALWAYS_SOFTWARE", "1")
        .env("GALLIUM_DRIVER", "virpipe")
        .stdin(Stdio::null())
        .output()
        .context("cannot run xvfb-run glmark2-es2")?;
    let text = String::from_utf8_lossy(&out.stdout);
    ensure!(text.contains("virgl ("), "glmark2 did not use the server:\n{text}");
    let fps: Vec<f64> = text
        .lines()
        .filter_map(|line| line.split("FPS: ").nth(1)?.split_whitespace().next()?.parse().ok())
        .collect();
    ensure!(fps.len() == SCENES.len(), "glmark2 did not draw all scenes:\n{text}");
    Ok(fps)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

fn build() -> Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args(["build", "--quiet", "--release", "-p", "drago-gpu", "--bins", "--examples"])
        .current_dir(paths::workspace())
        .status()?;
    ensure!(status.success(), "drago-gpu does not build");
    let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    Ok(target.unwrap_or_else(|| paths::workspace().join("target")).join("release"))
}

/// Runs it all.
pub(crate) fn run(rounds: usize) -> Result<Value> {
    let programs = step("building drago-gpu and the vtest bridge", build)?;
    let caches = paths::cache("bench")?.join("shaders");
    let sides = ["drago-gpu", "virgl_test_server"];
    let start = |side: &str| -> Result<Server> {
        let cache = caches.join(side);
        std::fs::create_dir_all(&cache)?;
        let mut command;
        if side == "drago-gpu" {
            command = Command::new(programs.join("examples/vtest-bridge"));
            command.args([SOCKET, "--renderer", "virgl", "--shader-cache"]).arg(&cache);
        } else {
            command = Command::new("virgl_test_server");
            command.arg("--use-egl-surfaceless").env("MESA_SHADER_CACHE_DIR", &cache);
        }
        Server::start(command)
    };
    let mut seen: BTreeMap<&str, Vec<Vec<f64>>> = BTreeMap::new();
    for round in 0..=rounds {
        for side in sides {
            let _server = start(side)?;
            if round == 0 {
                step(format_args!("{side}: shaders are compiled"), || glmark2(1))?;
            } else {
                let fps = step(format_args!("{side}, round {round}"), || glmark2(SECONDS))?;
                seen.entry(side).or_default().push(fps);
            }
        }
    }
    let medians = |side: &str| -> Vec<f64> {
        let rounds = seen.get(side).map_or(&[][..], Vec::as_slice);
        (0..SCENES.len())
            .map(|scene| median(rounds.iter().map(|fps| fps[scene]).collect()))
            .collect()
    };
    let (ours, theirs) = (medians(sides[0]), medians(sides[1]));
    let mut scenes = serde_json::Map::new();
    for ((scene, ours), theirs) in SCENES.iter().zip(&ours).zip(&theirs) {
        let percent = 100.0 * ours / theirs;
        note(format_args!("{scene:<24} {ours:>7.0} fps, {theirs:>7.0} vtest, {percent:>4.0} %"));
        scenes.insert((*scene).to_owned(), json!({ "drago": ours, "vtest": theirs }));
    }
    let score = |fps: &[f64]| fps.iter().sum::<f64>() / fps.len() as f64;
    let percent = 100.0 * score(&ours) / score(&theirs);
    note(format_args!("glmark2 score: {percent:.0} % of virgl_test_server's"));

    let mut readback = serde_json::Map::new();
    for renderer in ["virgl", "2d"] {
        let out = Command::new(programs.join("examples/readback")).arg(renderer).output()?;
        let times: Value = serde_json::from_slice(&out.stdout).context("readback")?;
        for name in ["1920x1080", "256x256 of 1920x1080"] {
            note(format_args!("{renderer} {name}: {} ms", times[name]["median"]));
        }
        readback.insert(renderer.to_owned(), times);
    }
    Ok(json!({
        "glmark2": { "scenes": scenes, "percent_of_vtest": percent },
        "readback_ms": readback,
    }))
}
