//! `cargo xtask bench`, OpenGL: glmark2 through our device (the vtest bridge feeds its commands into
//! our queues) against the same virglrenderer's own vtest server; with a viewer against without; and
//! read-back times.
//!
//! Scene by scene and second by second in turns, because machines that build other things are never as
//! fast as a minute before; beside frames per second, the processor time that the server's side took for
//! a frame (device, virglrenderer and Mesa's threads; for us the bridge, which stands for guest and VMM,
//! is counted apart).

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufRead, BufReader},
    ops::Div,
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
const SECONDS: u32 = 2;
const SIZE: &str = "1280x720";

/// Who serves Mesa's client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Side {
    /// Our device, nothing on screen.
    Drago,
    /// virglrenderer's own server.
    Vtest,
    /// Our device, what is drawn on screen, nobody looks.
    Screen,
    /// The same with a viewer at 60 Hz.
    Viewer,
}

/// A server for Mesa's client; killed when dropped.
struct Server {
    child: Child,
    side: Side,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(SOCKET);
    }
}

/// User and system time of a process so far, in seconds.
fn cpu_seconds(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    let ticks: f64 = fields.skip(11).take(2).filter_map(|field| field.parse::<f64>().ok()).sum();
    // USER_HZ, proc_pid_stat(5).
    ticks / 100.0
}

/// What one scene showed.
#[derive(Debug, Clone, Copy)]
struct Seen {
    fps: f64,
    /// Processor time of the server for a frame, in milliseconds.
    cpu_ms: f64,
    /// Frames that the viewer got, per second.
    viewed: f64,
}

impl Server {
    fn start(side: Side, programs: &Path) -> Result<Self> {
        let cache = paths::cache("bench/shaders")?.join(match side {
            Side::Vtest => "vtest",
            _ => "drago",
        });
        std::fs::create_dir_all(&cache)?;
        let mut command;
        if side == Side::Vtest {
            command = Command::new("virgl_test_server");
            // In one process, whose time is counted.
            command.args(["--no-fork", "--use-egl-surfaceless"]);
            command.env("MESA_SHADER_CACHE_DIR", &cache);
        } else {
            command = Command::new(programs.join("examples/vtest-bridge"));
            command.arg(SOCKET);
            match side {
                Side::Screen => drop(command.args(["--screen", &format!("{SIZE}@0")])),
                Side::Viewer => drop(command.args(["--screen", &format!("{SIZE}@60")])),
                Side::Drago | Side::Vtest => {}
            }
            command.args(["--renderer", "virgl", "--shader-cache"]).arg(&cache);
        }
        let _ = std::fs::remove_file(SOCKET);
        let name = command.get_program().display().to_string();
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        let mut server = Self { child, side };
        let begin = Instant::now();
        while !Path::new(SOCKET).exists() {
            if let Some(status) = server.child.try_wait()? {
                bail!("{name} ended with {status}");
            }
            ensure!(begin.elapsed() < PATIENCE, "{name} does not listen at {SOCKET}");
            thread::sleep(Duration::from_millis(20));
        }
        Ok(server)
    }

    /// Draws a scene for so many seconds.
    fn draw(mut self, scene: &str, seconds: u32) -> Result<Seen> {
        let before = cpu_seconds(self.child.id());
        let fps = glmark2(scene, seconds)?;
        let (cpu, viewed) = match self.side {
            Side::Vtest => (cpu_seconds(self.child.id()) - before, 0.0),
            _ => {
                let mut line = String::new();
                let out = self.child.stdout.as_mut().context("no output")?;
                BufReader::new(out).read_line(&mut line)?;
                let said: Value = serde_json::from_str(&line).context("vtest-bridge")?;
                ensure!(said["refused"] == 0, "commands were refused: {line}");
                let number = |name: &str| said[name].as_f64().unwrap_or(0.0);
                (number("cpu_seconds"), number("frames") / f64::from(seconds))
            }
        };
        let frames = fps * f64::from(seconds);
        Ok(Seen { fps, cpu_ms: 1e3 * cpu / frames, viewed })
    }
}

/// Frames per second of a scene.
fn glmark2(scene: &str, seconds: u32) -> Result<f64> {
    // The X server must not draw with virpipe as well: it would be a client of its own.
    let out = Command::new("xvfb-run")
        .args(["-a", "timeout", "120", "env", "LIBGL_ALWAYS_SOFTWARE=1", "GALLIUM_DRIVER=virpipe"])
        .args(["glmark2-es2", "--off-screen", "-s", SIZE])
        .args(["-b", &format!("{scene}:duration={seconds}")])
        .stdin(Stdio::null())
        .output()
        .context("cannot run xvfb-run glmark2-es2")?;
    let text = String::from_utf8_lossy(&out.stdout);
    ensure!(text.contains("virgl ("), "glmark2 did not use the server:\n{text}");
    // Frames per second are rounded up, these milliseconds are not.
    let time =
        text.lines().find_map(|line| line.split("FrameTime: ").nth(1)?.split_whitespace().next());
    let time = time.and_then(|time| time.parse::<f64>().ok()).filter(|time| *time > 0.0);
    let time = time.with_context(|| format!("glmark2 did not draw {scene}:\n{text}"))?;
    Ok(1e3 / time)
}

/// The middle one, or the mean of the two in the middle; `None` of no values.
pub(crate) fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let last = values.len().checked_sub(1)?;
    Some(f64::midpoint(*values.get(values.len() / 2)?, *values.get(last / 2)?))
}

fn build() -> Result<PathBuf> {
    let status = paths::cargo()
        .args(["build", "--quiet", "--release", "-p", "drago-gpu", "--bins", "--examples"])
        .status()?;
    ensure!(status.success(), "drago-gpu does not build");
    let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    Ok(target.unwrap_or_else(|| paths::workspace().join("target")).join("release"))
}

/// Runs it all.
pub(crate) fn run(rounds: usize) -> Result<Value> {
    let programs = step("building drago-gpu and the vtest bridge", build)?;
    // A test of drago-gpu's uses the same socket.
    let lock = File::create("/tmp/.virgl_test.lock")?;
    lock.lock()?;
    let sides = [Side::Drago, Side::Vtest, Side::Screen, Side::Viewer];
    let mut seen: BTreeMap<(usize, Side), Vec<Seen>> = BTreeMap::new();
    for (number, scene) in SCENES.iter().enumerate() {
        step(format_args!("{scene}"), || {
            // Shaders are compiled.
            for side in [Side::Drago, Side::Vtest] {
                Server::start(side, &programs)?.draw(scene, 1)?;
            }
            for round in 0..rounds {
                let mut turn = sides;
                if round % 2 == 1 {
                    turn.reverse();
                }
                for side in turn {
                    let one = Server::start(side, &programs)?.draw(scene, SECONDS)?;
                    seen.entry((number, side)).or_default().push(one);
                }
            }
            Ok(())
        })?;
    }
    // The median of the rounds' ratios: the two of a round met the same machine.
    let percent = |of: Side, against: Side, what: fn(&Seen) -> f64| {
        let ratios = (0..SCENES.len()).map(|scene| {
            let (of, against) = (&seen[&(scene, of)], &seen[&(scene, against)]);
            median(of.iter().zip(against).map(|(a, b)| what(a) / what(b)).collect())
                .unwrap_or_default()
        });
        let ratios: Vec<f64> = ratios.collect();
        100.0 * ratios.iter().map(|ratio| ratio.ln()).sum::<f64>().div(ratios.len() as f64).exp()
    };
    let mut scenes = serde_json::Map::new();
    for (number, scene) in SCENES.iter().enumerate() {
        let mut figures = serde_json::Map::new();
        for side in sides {
            let all = &seen[&(number, side)];
            let fps = median(all.iter().map(|one| one.fps).collect()).unwrap_or_default();
            let cpu_ms = median(all.iter().map(|one| one.cpu_ms).collect()).unwrap_or_default();
            let viewed = median(all.iter().map(|one| one.viewed).collect()).unwrap_or_default();
            note(format_args!(
                "{scene:<24} {side:?}: {fps:>5.0} fps, {cpu_ms:>6.2} ms CPU a frame, {viewed:.0} viewed"
            ));
            let name = format!("{side:?}").to_lowercase();
            figures.insert(name, json!({ "fps": fps, "cpu_ms": cpu_ms, "viewed": viewed }));
        }
        scenes.insert((*scene).to_owned(), Value::Object(figures));
    }
    let fps: fn(&Seen) -> f64 = |one| one.fps;
    let speed: fn(&Seen) -> f64 = |one| 1.0 / one.cpu_ms;
    let figures = json!({
        "drago_of_vtest_fps": percent(Side::Drago, Side::Vtest, fps),
        "drago_of_vtest_per_cpu": percent(Side::Drago, Side::Vtest, speed),
        "viewer_of_none_fps": percent(Side::Viewer, Side::Screen, fps),
        "viewer_of_none_per_cpu": percent(Side::Viewer, Side::Screen, speed),
    });
    for (name, value) in figures.as_object().into_iter().flatten() {
        note(format_args!("{name}: {:.0} %", value.as_f64().unwrap_or(0.0)));
    }

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
        "glmark2": { "scenes": scenes, "percent": figures },
        "readback_ms": readback,
    }))
}
