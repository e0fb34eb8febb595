//! The slow suite's programs that draw: benchmarks and conformance tests in a guest, OpenGL by virgl and
//! Vulkan by Venus, on Debian 13's libraries in the test host, whose CPUs draw (llvmpipe, lavapipe).
//!
//! Run by `cargo xtask test --suite slow`. The steps build on one another's boot; one that fails does not
//! keep the others from being tried.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::{
    collections::BTreeMap,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use drago_tests::{
    client::SpiceClient,
    debian::Release,
    desktop::WESTON_BACKGROUND,
    guest::{Desktop, Guest},
    picture::Picture,
    progress::{note, step},
    vm::{GUEST_DISK, Host, PATIENCE, Vm},
};

/// Two emulated CPUs draw for the guest and run it.
const BOOT: Duration = Duration::from_secs(1200);

/// Puts another system's graphics in the place of this one's and becomes a program. The root is bound
/// first: seen through the writable share of the checkout a file has a new identity at each look, so that
/// Landlock's rules do not hold for it.
const ON_OTHER_LIBRARIES: &str = "set -e; tree=$1; shift; mkdir -p /run/outer; \
    mount --bind / /run/outer; tree=/run/outer$tree; \
    mount --bind $tree/usr/share /usr/share; mount --bind $tree/usr/libexec /usr/libexec; \
    mount --bind $tree/usr/lib/x86_64-linux-gnu /usr/lib/x86_64-linux-gnu; exec \"$@\"";

/// Scenes of glmark2 that look at their own pixels.
const VALIDATED: [&str; 3] = ["build", "texture", "shading"];

/// Piglit's tests for OpenGL: where, and how many of them at most.
const PIGLIT: &[(&str, usize)] = &[
    ("glsl-1.10/execution", 16),
    ("glsl-1.20/execution", 6),
    ("glsl-1.30/execution", 6),
    ("glsl-es-3.00/execution", 4),
    ("arb_shader_bit_encoding/execution", 2),
];

/// The same for OpenGL on Vulkan (zink), which starts slowly.
const PIGLIT_VULKAN: &[(&str, usize)] = &[("glsl-1.10/execution", 6)];

/// Piglit's tests that are known to fail here, with the reason.
const KNOWN: &[(&str, &str)] = &[];

/// Mesa draws OpenGL with the guest's Vulkan device, although CPUs are behind it.
const ZINK: &str = "VK_DRIVER_FILES=/usr/share/vulkan/icd.d/virtio_icd.json LIBGL_ALWAYS_SOFTWARE=1 \
    MESA_LOADER_DRIVER_OVERRIDE=zink";

const AS_DEMO: &str =
    "runuser -u demo -- env XDG_RUNTIME_DIR=/run/user/1000 WAYLAND_DISPLAY=wayland-1";

struct World {
    host: Host,
    guest: Guest,
    vm: Vm,
    /// Who looks, if somebody does.
    client: Option<SpiceClient>,
    tree: String,
    failed: Vec<String>,
}

impl World {
    fn start(suite: &str, gpu: &str, cpus: u32) -> Self {
        let mut guest = Guest::desktop(Desktop::Graphics).unwrap();
        // The replugged monitor of the weston guest would be in the way of those that have the screen
        // before it.
        guest.cmdline.push_str(" guest.renderer=gl systemd.mask=follow-monitor.service");
        let tree = Release::open("trixie").unwrap().graphics().unwrap();
        let tree = tree.canonicalize().unwrap().display().to_string();
        let agent = Path::new(env!("CARGO_BIN_EXE_drago-testbed-agent"));
        let host = Host::boot_with_disk(suite, agent, 6144, &guest).unwrap();
        // The test host's only render node is vgem's, which cannot draw.
        assert_eq!(host.run("mount -t tmpfs none /dev/dri").unwrap().code, 0);
        let command = host
            .command("unshare")
            .env("DRAGO_LOG", "info")
            .args(["--mount", "sh", "-c", ON_OTHER_LIBRARIES, "sh", &tree])
            .args([&host.program("drago-vmm")])
            .args(["--kernel", &guest.kernel.display().to_string()])
            .args(["--initrd", &guest.initrd.display().to_string()])
            .args(["--cmdline", &guest.cmdline, "--memory", &guest.memory_mib.to_string()])
            .args(["--cpus", &cpus.to_string(), "--disk", &format!("path={GUEST_DISK}")])
            .args(["--net", "user,hostfwd=tcp::2223-:22"])
            .args(["--gpu", gpu, "--spice", "127.0.0.1:5900"]);
        let vm = host.spawn(suite, command).unwrap();
        vm.log
            .wait_for(0, "SPICE server listens", PATIENCE)
            .unwrap_or_else(|error| panic!("{error}\n{}", vm.state()));
        let client = Some(host.spice().unwrap());
        let world = Self { host, guest, vm, client, tree, failed: Vec::new() };
        step("the guest has started", || world.vm.serial.wait_for(0, "login:", BOOT).map(drop))
            .unwrap_or_else(|error| panic!("{error:#}\n{}", world.vm.state()));
        step("and lets one in", || {
            let end = Instant::now() + PATIENCE;
            loop {
                match world.run("true") {
                    Err(_) if Instant::now() < end => std::thread::sleep(Duration::from_secs(1)),
                    done => return done.map(drop),
                }
            }
        })
        .unwrap_or_else(|error| panic!("{error:#}\n{}", world.vm.state()));
        world
    }

    fn step(&mut self, what: &str, run: impl FnOnce(&mut Self) -> Result<()>) {
        if let Err(error) = step(what, || run(self)) {
            note(format_args!("FAILED {what}: {error:#}"));
            self.failed.push(format!("{what}: {error:#}"));
        }
    }

    fn end(mut self) {
        assert!(self.failed.is_empty(), "{}\n{}", self.failed.join("\n"), self.vm.state());
        self.vm.signal(15).unwrap();
        assert_eq!(self.vm.wait().unwrap(), 0, "{}", self.vm.state());
    }

    /// Runs a command in the guest as root.
    fn run(&self, command: &str) -> Result<String> {
        self.host.ssh(&self.guest, "root", command)
    }

    /// Runs a program in the guest that has the screen until the picture is as it should be.
    fn shows(&mut self, program: &str, command: &str, is: impl Fn(&Picture) -> bool) -> Result<()> {
        // They end when their standard input does.
        self.run(&format!(
            "(sleep 1000 | setsid {command} 2>&1) >/tmp/{program}.log 2>&1 </dev/null & sleep 1"
        ))?;
        let client = self.client.as_mut().context("nobody looks")?;
        let seen = self.vm.wait_picture(client, program, |picture| Ok(is(picture)));
        let said = self.run(&format!("pkill {program}; sleep 1; cat /tmp/{program}.log"))?;
        seen.map(drop).with_context(|| said)
    }

    fn kmscube(&mut self) -> Result<()> {
        self.shows("kmscube", "kmscube", |picture| {
            let grey = picture.share_of([0x80; 3], 3);
            // All of it: the client shows a picture strip by strip.
            let (x, y) = (picture.width / 2, picture.height / 2);
            let around = [(x, y), (x, y - 120), (x, y + 120), (x - 150, y), (x + 150, y)];
            let cube = |(x, y)| picture.pixel(x, y).iter().any(|part| part.abs_diff(0x80) > 12);
            (0.3..0.95).contains(&grey) && around.into_iter().all(cube)
        })
    }

    /// What the kernel promises programs that set modes, with the driver's requests ending in our device.
    /// After all of it a picture is seen as it is.
    fn kms(&mut self) -> Result<()> {
        let program = Path::new(env!("CARGO_BIN_EXE_drago-kms-checks"));
        self.host.install(&self.guest, program, "/usr/local/bin/drago-kms-checks")?;
        let said = self.run("timeout 200 drago-kms-checks 2>&1; echo \"status $?\"")?;
        note(&said);
        ensure!(said.contains("status 0") && said.matches(": pass").count() >= 12, "{said}");
        self.shows("drago-kms-check", "drago-kms-checks show", |picture| {
            let (x, y) = (picture.width, picture.height);
            let quarters =
                [(1, 1), (3, 1), (1, 3), (3, 3)].map(|(a, b)| picture.pixel(a * x / 4, b * y / 4));
            quarters == [[0xff, 0, 0], [0, 0xff, 0], [0, 0, 0xff], [0xff; 3]]
        })
    }

    fn glmark2_has_the_screen(&mut self) -> Result<()> {
        // There it takes the biggest size, at which it would look at the wrong pixels.
        let said = self.run("timeout 60 glmark2-es2-drm -b build:duration=2 2>&1")?;
        ensure!(said.contains("virgl (") && said.contains("FPS: "), "{said}");
        Ok(())
    }

    fn glmark2_validates(&mut self) -> Result<()> {
        let scenes: String =
            VALIDATED.iter().map(|scene| format!(" -b {scene}:duration=1")).collect();
        let said = self.run(&format!(
            "{AS_DEMO} timeout 200 glmark2-es2-wayland --off-screen --validate{scenes} 2>&1"
        ))?;
        ensure!(said.contains("virgl ("), "{said}");
        ensure!(said.matches("Validation: Success").count() == VALIDATED.len(), "{said}");
        Ok(())
    }

    /// Piglit's results by the names of tests.
    fn piglit(
        &self,
        sets: &[(&str, usize)],
        environment: &str,
    ) -> Result<BTreeMap<String, String>> {
        let files: Vec<String> = sets
            .iter()
            .map(|(folder, count)| {
                format!("$(ls tests/spec/{folder}/*.shader_test | head -n {count})")
            })
            .collect();
        let said = self.run(&format!(
            "cd /usr/lib/x86_64-linux-gnu/piglit; export {environment}; \
             timeout 300 bin/shader_runner {} -auto -fbo -report-subtests 2>&1; true",
            files.join(" ")
        ))?;
        let mut results = BTreeMap::new();
        for line in said.lines().filter(|line| line.contains("\"subtest\"")) {
            // PIGLIT: {"subtest": {"name" : "pass"}}
            let words: Vec<&str> = line.split('"').collect();
            if let [_, _, _, name, _, result, ..] = words[..] {
                results.insert(name.to_owned(), result.to_owned());
            }
        }
        let count = |what: &str| results.values().filter(|result| *result == what).count();
        note(format_args!(
            "piglit: {} pass, {} skip, {} of {}",
            count("pass"),
            count("skip"),
            results.len() - count("pass") - count("skip"),
            results.len()
        ));
        let unexpected: Vec<_> = results
            .iter()
            .filter(|(name, result)| {
                !["pass", "skip"].contains(&result.as_str())
                    && !KNOWN.iter().any(|(known, _)| known == name)
            })
            .collect();
        ensure!(unexpected.is_empty(), "{unexpected:?}\n{said}");
        let wanted: usize = sets.iter().map(|(_, count)| count).sum();
        // Some folders may have fewer.
        ensure!(count("pass") * 10 >= wanted * 7, "too few of {wanted}: {results:?}\n{said}");
        Ok(results)
    }

    fn vulkan_is_there(&mut self) -> Result<()> {
        let said = self.run("timeout 200 vulkaninfo --summary 2>&1")?;
        ensure!(said.contains("Virtio-GPU Venus (llvmpipe"), "{said}");
        Ok(())
    }

    /// Pixels are not looked at here; [`PIGLIT_VULKAN`] does that.
    fn vulkan_draws(&mut self) -> Result<()> {
        let said =
            self.run("timeout 200 vkmark --winsys headless -s 320x240 -b vertex:duration=5 2>&1")?;
        ensure!(said.contains("Virtio-GPU Venus"), "{said}");
        ensure!(said.contains("FPS: "), "{said}");
        note(said.lines().filter(|line| line.contains("FPS")).collect::<Vec<_>>().join("\n"));
        Ok(())
    }

    /// OpenGL by zink: the pixels that a Vulkan device of the guest's has drawn are read back.
    fn piglit_on_vulkan(&mut self) -> Result<()> {
        let said = self.run(&format!("{ZINK} eglinfo -B -p surfaceless 2>&1; true"))?;
        ensure!(said.contains("zink Vulkan") && said.contains("Venus"), "{said}");
        let environment = format!("PIGLIT_PLATFORM=surfaceless_egl {ZINK}");
        self.piglit(PIGLIT_VULKAN, &environment).map(drop)
    }

    /// A picture that does not change costs drago-gpu nothing, with a viewer as well. Looked at three times
    /// at most, because a clock is in it.
    fn stands_still(&mut self) -> Result<()> {
        const SECONDS: f64 = 20.0;
        let mut seen = Vec::new();
        for _ in 0..3 {
            let before = self.busy()?.gpu;
            self.host.run(&format!("sleep {SECONDS}"))?;
            let percent = 100.0 * (self.busy()?.gpu - before) / SECONDS;
            note(format_args!("{percent:.2} % of a processor for drago-gpu"));
            if percent < 1.0 {
                return Ok(());
            }
            seen.push(percent);
        }
        bail!("drago-gpu took {seen:?} % of a processor for a picture that stands still")
    }

    /// It counts its frames every five seconds; without stdbuf nothing of that would be in a file before
    /// it ends, nor after that, because a signal ends it.
    fn weston_simple_egl(&mut self) -> Result<()> {
        // The names of processes have 15 characters.
        let (program, log) = ("weston-simple-e", "/tmp/weston-simple-egl.log");
        self.run(&format!(
            "(sleep 1000 | setsid {AS_DEMO} stdbuf -oL weston-simple-egl -f -o 2>&1) \
             >{log} 2>&1 </dev/null & sleep 1"
        ))?;
        let client = self.client.as_mut().context("nobody looks")?;
        // It turns round: now and then there is little of it.
        let seen = self.vm.wait_picture(client, program, |picture| {
            let corner = |colour| picture.share_of(colour, 100) > 0.003;
            let corners = [[0xff, 0, 0], [0, 0xff, 0], [0, 0, 0xff]].into_iter().all(corner);
            Ok(corners && picture.share_of([0; 3], 3) > 0.6)
        });
        let counted = self.run(&format!(
            "end=$(($(date +%s) + 60)); \
             until grep -q 'frames in' {log} || [ $(date +%s) -ge $end ]; do sleep 1; done; \
             pkill {program}; cat {log}"
        ))?;
        seen.with_context(|| counted.clone())?;
        let frames = counted.lines().find(|line| line.contains("frames in"));
        note(frames.with_context(|| format!("no frames were counted: {counted:?}"))?);
        Ok(())
    }

    /// Its pictures are dmabufs that weston imports, which it can with OpenGL only.
    fn vkcube(&mut self) -> Result<()> {
        let said = self.run(&format!(
            "{AS_DEMO} VN_DEBUG=init,result,wsi timeout 120 vkcube --wsi wayland --c 40 --gpu_number 0 2>&1; \
             echo \"status $?\"; dmesg | tail -5"
        ))?;
        ensure!(said.contains("status 0") && said.contains("Virtio-GPU Venus"), "{said}");
        Ok(())
    }

    /// Another server takes over, and programs that start then have Vulkan.
    fn server_dies(&mut self) -> Result<()> {
        let killed = self.host.run("kill -9 $(pgrep -f '[v]irgl_render_server --socket')")?;
        ensure!(killed.code == 0, "no render server to kill");
        self.vulkan_draws()?;
        let log = self.vm.log.since(0);
        ensure!(log.contains("Vulkan goes on in another one"), "{log}");
        Ok(())
    }

    fn weston(&mut self) -> Result<()> {
        self.run("systemctl start weston")?;
        let client = self.client.as_mut().context("nobody looks")?;
        self.vm.wait_picture_within(client, "weston", BOOT, |picture| {
            Ok(picture.share_of(WESTON_BACKGROUND, 6) > 0.2)
        })?;
        let log = self.run("cat /tmp/weston.log")?;
        ensure!(log.contains("GL renderer: virgl"), "{log}");
        Ok(())
    }
}

#[test]
#[ignore = "slow"]
fn opengl_and_vulkan_in_a_guest() {
    let mut world = World::start("graphics", "vulkan=venus", 2);
    world.step("kmscube draws a cube on grey", World::kmscube);
    world.step("modetest shows bars", |world| {
        let command = "modetest -M virtio_gpu -s \
            $(modetest -M virtio_gpu -c | awk '$3==\"connected\"{print $1}'):1280x800";
        world.shows("modetest", command, |picture| {
            // Yellow, cyan, green, magenta, red at 75 %.
            let bars =
                [[0xc0, 0xc0, 0], [0, 0xc0, 0xc0], [0, 0xc0, 0], [0xc0, 0, 0xc0], [0xc0, 0, 0]];
            bars.iter().all(|bar| picture.share_of(*bar, 4) > 0.04)
        })
    });
    world.step("glmark2 on a screen of its own", World::glmark2_has_the_screen);
    world.step("piglit", |world| world.piglit(PIGLIT, "PIGLIT_PLATFORM=gbm").map(drop));
    world.step("the guest has Vulkan", World::vulkan_is_there);
    world.step("Vulkan draws", World::vulkan_draws);
    world.step("piglit on Vulkan", World::piglit_on_vulkan);
    world.step("the render server dies", World::server_dies);
    world.step("weston", World::weston);
    world.step("weston-simple-egl turns a triangle", World::weston_simple_egl);
    world.step("glmark2 looks at its pixels", World::glmark2_validates);
    world.step("vkcube", World::vkcube);
    world.end();
}

/// Screens in guest memory, and screens that are OpenGL's.
#[test]
#[ignore = "slow"]
fn modes_are_set_in_a_guest() {
    for gpu in ["2d", "virgl"] {
        let mut world = World::start(&format!("graphics-kms-{gpu}"), gpu, 1);
        world.step(gpu, World::kms);
        world.end();
    }
}

/// What is drawn in the comparisons, and for how long.
const SCENES: [&str; 2] = ["build", "shading:shading=phong"];
const SECONDS: u32 = 8;
const SIZE: &str = "800x600";
const ROUNDS: usize = 2;

/// What glmark2 says of a scene, from the time for a frame: the number of frames a second is rounded up.
fn fps(said: &str) -> Result<f64> {
    let number = said.split("FrameTime: ").nth(1).and_then(|rest| rest.split_whitespace().next());
    let time = number.and_then(|number| number.parse::<f64>().ok()).filter(|time| *time > 0.0);
    time.map(|time| 1e3 / time).with_context(|| said.to_owned())
}

/// Prints what [`Busy`] has. Threads that have ended count with their process only.
const BUSY: &str = "[ -d /sys/kernel/debug/kvm ] || mount -t debugfs none /sys/kernel/debug; \
    used() { cat \"$@\" | awk '{ sum += $14 + $15 } END { print sum / 100 }'; }; \
    used $(for p in $(pgrep -x drago-vmm); do grep -l vcpu /proc/$p/task/*/stat; done); \
    for name in drago-vmm drago-gpu; do \
        used $(for p in $(pgrep -x $name); do echo /proc/$p/stat; done); \
    done; cat /sys/kernel/debug/kvm/exits";

/// What a machine has taken of the test host so far.
struct Busy {
    /// Seconds of processors: the guest's own.
    guest: f64,
    /// drago-vmm, these included.
    vmm: f64,
    /// drago-gpu.
    gpu: f64,
    /// KVM's exits.
    exits: f64,
}

impl World {
    fn busy(&self) -> Result<Busy> {
        let out = self.host.run(BUSY)?;
        let said = String::from_utf8_lossy(&out.stdout).into_owned();
        let numbers: Vec<f64> =
            said.split_whitespace().filter_map(|number| number.parse().ok()).collect();
        match numbers[..] {
            [guest, vmm, gpu, exits] => Ok(Busy { guest, vmm, gpu, exits }),
            _ => bail!("{said:?}"),
        }
    }

    /// In the guest, in a window or in a picture that is not shown.
    fn guest_fps(&self, scene: &str, place: &str) -> Result<f64> {
        let before = self.busy()?;
        let said = self.run(&format!(
            "{AS_DEMO} timeout 120 glmark2-es2-wayland {place} -s {SIZE} \
             -b {scene}:duration={SECONDS} 2>&1"
        ))?;
        ensure!(said.contains("virgl ("), "{said}");
        let after = self.busy()?;
        let fps = fps(&said)?;
        let guest = after.guest - before.guest;
        note(format_args!(
            "{fps:.2} frames a second; with glmark2's start {guest:.1} s of processors for the guest, {:.1} s \
             for the rest of drago-vmm, {:.1} s for drago-gpu, {:.0} exits",
            after.vmm - before.vmm - guest,
            after.gpu - before.gpu,
            after.exits - before.exits
        ));
        Ok(fps)
    }

    /// In the test host, by the same virglrenderer's own server.
    fn host_fps(&self, scene: &str) -> Result<f64> {
        let server = format!(
            "unshare --mount sh -c '{}' sh {} virgl_test_server --no-fork --use-egl-surfaceless",
            ON_OTHER_LIBRARIES.replace('\'', "'\\''"),
            self.tree
        );
        let out = self.host.run(&format!(
            "rm -f /tmp/.virgl_test; {server} >/tmp/vtest.log 2>&1 & server=$!; \
             while [ ! -S /tmp/.virgl_test -o ! -S /tmp/.X11-unix/X77 ]; do kill -0 $server || exit 1; sleep 0.1; done; \
             timeout 120 env DISPLAY=:77 LIBGL_ALWAYS_SOFTWARE=1 GALLIUM_DRIVER=virpipe \
             glmark2-es2 --off-screen -s {SIZE} -b {scene}:duration={SECONDS} 2>&1; \
             awk '{{ print \"server\", ($14 + $15) / 100, \"s\" }}' /proc/$server/stat; kill $server; cat /tmp/vtest.log"
        ))?;
        let said = String::from_utf8_lossy(&out.stdout).into_owned();
        ensure!(said.contains("virgl ("), "{said}");
        let fps = fps(&said)?;
        let server = said.lines().find(|line| line.starts_with("server ")).unwrap_or_default();
        note(format_args!("{fps:.2} frames a second; {server} of processors"));
        Ok(fps)
    }

    fn guest_against_host(&mut self) -> Result<()> {
        let screen = self.host.command("Xvfb").args([":77", "-screen", "0", "1280x800x24"]);
        let _screen = self.host.spawn("xvfb", screen)?;
        let ratio = compare(["guest", "test host"], |side, scene| match side {
            0 => self.guest_fps(scene, "--off-screen"),
            _ => self.host_fps(scene),
        })?;
        // Two emulated processors draw for both sides and run the guest: a figure, no verdict.
        ensure!(ratio.is_finite(), "{ratio}");
        Ok(())
    }

    fn viewer_against_nobody(&mut self) -> Result<()> {
        self.client = None;
        let mut client = None;
        let ratio = compare(["viewer", "nobody"], |side, scene| {
            client = match side {
                0 => Some(self.host.spice()?),
                _ => None,
            };
            if let Some(client) = &mut client {
                client
                    .wait_state("a picture", PATIENCE, |state| state["width"].as_u64() > Some(0))?;
            }
            self.guest_fps(scene, "")
        })?;
        // Two emulated processors draw for both sides and run the guest: a figure, no verdict.
        ensure!(ratio.is_finite(), "{ratio}");
        Ok(())
    }
}

/// Figures of two sides that took turns, scene by scene; their geometric mean's ratio.
fn compare(names: [&str; 2], mut draw: impl FnMut(usize, &str) -> Result<f64>) -> Result<f64> {
    let mut product = 1.0;
    for scene in SCENES {
        let mut seen = [Vec::new(), Vec::new()];
        for round in 0..ROUNDS {
            for turn in 0..2 {
                let side = (turn + round) % 2;
                seen[side].push(draw(side, scene)?);
            }
        }
        let mean = |side: usize| seen[side].iter().sum::<f64>() / seen[side].len() as f64;
        note(format_args!(
            "{scene}: {} {:.2?}, {} {:.2?}: {:.0} %",
            names[0],
            seen[0],
            names[1],
            seen[1],
            100.0 * mean(0) / mean(1)
        ));
        product *= mean(0) / mean(1);
    }
    let ratio = product.powf(1.0 / SCENES.len() as f64);
    note(format_args!("{} of {}: {:.0} %", names[0], names[1], 100.0 * ratio));
    Ok(ratio)
}

/// glmark2 in the guest against virglrenderer's own server in the test host, and with a SPICE client
/// against without. Says what it saw.
#[test]
#[ignore = "slow"]
fn glmark2_in_a_guest() {
    // With two, the emulated test host leads one of them astray in some minutes of full load (docs/testing.md).
    let mut world = World::start("graphics-speed", "virgl", 1);
    world.step("weston", World::weston);
    world.step("a still picture costs nothing", World::stands_still);
    world.step("guest against test host", World::guest_against_host);
    world.step("with a SPICE client against without", World::viewer_against_nobody);
    world.end();
}
