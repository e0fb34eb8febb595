//! The nested suite with the weston guest: one boot, seen and driven by a real SPICE client and by ssh.
//!
//! Run by `cargo xtask test --suite nested`; needs the test host, so it is `#[ignore]`d by default. The
//! steps build on one another's boot, hence one test; each says what it is about.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use drago_tests::client::SpiceClient;
use drago_tests::debian::Release;
use drago_tests::desktop::{WESTON_BACKGROUND, is_shown};
use drago_tests::guest::{Desktop, Guest};
use drago_tests::progress::step;
use drago_tests::viewer::RemoteViewer;
use drago_tests::vm::{GUEST_DISK, Host, PATIENCE, Vm};
use serde_json::json;

/// The guest's boot: 45 s on an idle machine, six times that on a busy one.
const BOOT: Duration = Duration::from_secs(1200);

struct World {
    host: Host,
    guest: Guest,
    vm: Vm,
    client: SpiceClient,
}

#[test]
#[ignore = "nested"]
fn a_desktop_is_seen_and_driven_by_real_clients() {
    let guest = Guest::desktop(Desktop::Weston).unwrap();
    let agent = Path::new(env!("CARGO_BIN_EXE_drago-testbed-agent"));
    let host = Host::boot_with_disk("weston", agent, 4096, &guest).unwrap();
    let disk = format!("path={GUEST_DISK}");
    let options = [
        "--cpus",
        "2",
        "--disk",
        &disk,
        "--net",
        "user,hostfwd=tcp::2223-:22",
        "--spice",
        "127.0.0.1:5900",
        "--control",
        "/run/drago.sock",
    ];
    let vm = host.start("weston", &guest, &options).unwrap();
    let client = connect(&host, &vm);
    let mut world = World { host, guest, vm, client };

    world.step("the desktop is shown", World::desktop_is_shown);
    world.step("keys arrive in the terminal", World::keys_arrive);
    world.step("ssh through hostfwd", World::ssh_works);
    world.step("drago-gpu is killed", World::gpu_process_dies);
    world.step("the pointer lands where it is put", World::pointer_lands);
    world.step("clipboard from client to guest", World::clipboard_to_guest);
    world.step("clipboard from guest to client", World::clipboard_to_client);
    world.step("an image on the clipboard", World::image_to_guest);
    world.step("an image on the guest's clipboard", World::image_to_client);
    world.step("the client's volume", World::volume_to_guest);
    world.step("a file sent by the client", World::file_to_guest);
    world.step("resize by the client", World::resize);
    world.step("resize by remote-viewer", World::remote_viewer);
    world.step("power button", World::power_button);
}

/// drago-vmm listens at once, but not before it runs.
fn connect(host: &Host, vm: &Vm) -> SpiceClient {
    vm.log.wait_for(0, "SPICE server listens", PATIENCE).unwrap();
    host.spice().unwrap()
}

impl World {
    fn step(&mut self, what: &str, run: impl FnOnce(&mut Self) -> anyhow::Result<()>) {
        if let Err(error) = step(what, || run(self)) {
            panic!("{what}: {error:#}\n{}", self.vm.state());
        }
    }

    fn desktop_is_shown(&mut self) -> anyhow::Result<()> {
        self.vm.wait_picture_within(&mut self.client, "the desktop", BOOT, |picture| {
            is_shown("weston", picture)
        })?;
        self.desktop_has_a_clock()
    }

    fn desktop_has_a_clock(&mut self) -> anyhow::Result<()> {
        let picture = self.vm.picture(&mut self.client)?;
        // The panel's clock, at the right end of the top line: a date and a time of day.
        let clock = picture.text(Some((picture.width - 260, 0, 260, 32)))?;
        anyhow::ensure!(clock.contains(':'), "no clock in the panel: {clock:?}");
        Ok(())
    }

    fn keys_arrive(&mut self) -> anyhow::Result<()> {
        self.client.type_text("echo \"Typed: $((6*7)) OK\" | tee /tmp/typed\n", PATIENCE)?;
        self.vm.wait_text(&mut self.client, "Typed: 42 OK").map(drop)
    }

    fn ssh_works(&mut self) -> anyhow::Result<()> {
        let typed = self.host.ssh(&self.guest, "demo", "id -un; cat /tmp/typed")?;
        anyhow::ensure!(typed == "demo\nTyped: 42 OK\n", "{typed:?}");
        Ok(())
    }

    /// The machine outlives its GPU process: the desktop comes back by itself, and goes on.
    fn gpu_process_dies(&mut self) -> anyhow::Result<()> {
        for _ in 0..2 {
            let mark = self.vm.log.mark();
            let killed = self.host.run("kill -9 $(pgrep -x drago-gpu)")?;
            anyhow::ensure!(killed.code == 0, "no drago-gpu to kill");
            self.vm.log.wait_for(mark, "another drago-gpu has taken over", PATIENCE)?;
        }
        self.vm
            .wait_picture(&mut self.client, "the desktop", |picture| is_shown("weston", picture))?;
        self.desktop_has_a_clock()?;
        self.client.type_text("echo \"After that: $((6*8)) OK\"\n", PATIENCE)?;
        self.vm.wait_text(&mut self.client, "After that: 48 OK")?;
        let errors = self.host.ssh(&self.guest, "root", "dmesg | grep -F '*ERROR*'; true")?;
        anyhow::ensure!(errors.is_empty(), "the guest's driver noticed: {errors}");
        Ok(())
    }

    /// The whole way to a program: a full-screen window is told the pointer's place by the compositor.
    fn pointer_lands(&mut self) -> anyhow::Result<()> {
        self.client.wait_state("client mouse mode", PATIENCE, |state| state["mouse"] == 2)?;
        self.open_window()?;
        let state = self.client.ask("state", json!({}))?;
        let (width, height) = (state["width"].as_u64(), state["height"].as_u64());
        let (width, height) = (width.unwrap_or(0) as u32, height.unwrap_or(0) as u32);
        for (x, y) in
            [(width / 2, height / 2), (17, 31), (width - 2, height - 2), (333, 222), (1, 1)]
        {
            self.client.position(x, y)?;
            let (px, py) = (i64::from(x), i64::from(y));
            // wl_pointer.motion(time, x, y) or enter(serial, surface, x, y) with the place wanted.
            let check = format!(
                "for i in $(seq 300); do tail -n 40 /tmp/pointer.log | \
                 grep -aE 'wl_pointer.*(motion|enter)' | tail -n 1 | \
                 sed -E 's/.*[, ](-?[0-9.]+), (-?[0-9.]+)\\)$/\\1 \\2/' | \
                 awk '{{ dx = $1 - {px}; dy = $2 - {py}; if (dx <= 1 && dx >= -1 && dy <= 1 && dy >= -1) exit 0; exit 1 }}' \
                 && exit 0; sleep 0.2; done; tail -n 5 /tmp/pointer.log >&2; exit 1"
            );
            self.host.ssh(&self.guest, "demo", &check).map_err(|error| {
                error.context(format!("the pointer was put at {x},{y} and did not land there"))
            })?;
        }
        self.close_window()
    }

    /// A full-screen window, where weston thinks its user is. It says in /tmp/pointer.log what it hears.
    fn open_window(&self) -> anyhow::Result<()> {
        let open = "export XDG_RUNTIME_DIR=/run/user/1000; cd /tmp; \
             WAYLAND_DISPLAY=wayland-1 WAYLAND_DEBUG=client setsid weston-terminal --fullscreen \
             >/dev/null 2>/tmp/pointer.log </dev/null & \
             until grep -q 'wl_keyboard.*enter' /tmp/pointer.log; do sleep 0.2; done";
        self.host.ssh(&self.guest, "demo", open).map(drop)
    }

    fn close_window(&self) -> anyhow::Result<()> {
        self.host.ssh(&self.guest, "demo", "pkill -f 'weston-terminal --fullscreen'").map(drop)
    }

    fn clipboard_to_guest(&mut self) -> anyhow::Result<()> {
        self.client.wait_state("the guest's agent", PATIENCE, |state| state["agent"] == true)?;
        self.client.ask("copy", json!({ "text": "from the client: żółć 42" }))?;
        let pasted = self.host.ssh(
            &self.guest,
            "demo",
            "export DISPLAY=:0; for i in $(seq 100); do \
             timeout 20 xclip -selection clipboard -o 2>/dev/null | grep -a client && exit 0; sleep 0.5; \
             done; exit 1",
        )?;
        anyhow::ensure!(pasted.trim() == "from the client: żółć 42", "{pasted:?}");
        Ok(())
    }

    fn clipboard_to_client(&mut self) -> anyhow::Result<()> {
        self.host.ssh(
            &self.guest,
            "demo",
            "export DISPLAY=:0; echo -n 'from the guest: žluťoučký 17' | \
             setsid xclip -selection clipboard -i >/dev/null 2>&1 </dev/stdin",
        )?;
        self.client
            .wait_state("the guest's clipboard", PATIENCE, |state| {
                state["clipboard"] == "from the guest: žluťoučký 17"
            })
            .map(drop)
    }

    fn image_to_guest(&mut self) -> anyhow::Result<()> {
        let image = self.host.results.join("clipboard.png");
        let drawn =
            Command::new("convert").args(["rose:", "-resize", "320x200!"]).arg(&image).status()?;
        anyhow::ensure!(drawn.success(), "convert failed");
        self.client.ask("copy-image", json!({ "path": image }))?;
        let size = std::fs::metadata(&image)?.len();
        self.host.ssh(
            &self.guest,
            "demo",
            &format!(
                "export DISPLAY=:0; for i in $(seq 100); do \
                 timeout 20 xclip -selection clipboard -t image/png -o >/tmp/pasted.png 2>/dev/null; \
                 [ $(stat -c %s /tmp/pasted.png) = {size} ] && exit 0; sleep 0.5; done; exit 1"
            ),
        )?;
        self.same_in_guest(&image, "/tmp/pasted.png")
    }

    /// The same image, back from the guest, by a program for X11.
    fn image_to_client(&mut self) -> anyhow::Result<()> {
        let sum = self.host.ssh(
            &self.guest,
            "demo",
            "export DISPLAY=:0; \
             setsid xclip -selection clipboard -t image/png -i /tmp/pasted.png >/dev/null 2>&1; \
             sha256sum </tmp/pasted.png",
        )?;
        let sum = sum.split_whitespace().next().unwrap_or_default();
        let is = |state: &serde_json::Value| state["image"] == sum;
        self.client.wait_state("the guest's image", PATIENCE, is).map(drop)
    }

    /// The guest's agent sets the mixer of its first sound card to what the client has. virtio-snd has no mixer,
    /// so it is given a card that has one.
    fn volume_to_guest(&mut self) -> anyhow::Result<()> {
        let tools = Release::open("trixie")?.package("alsa-utils")?;
        self.host.install(&self.guest, &tools.join("usr/bin/amixer"), "/usr/local/bin/amixer")?;
        let mixer = "amixer -c 0 sget Master";
        let before = self.host.ssh(
            &self.guest,
            "root",
            &format!(
                "modprobe -r virtio_snd && modprobe snd-dummy && udevadm settle && \
                 {mixer}"
            ),
        )?;
        anyhow::ensure!(!before.contains("[50%]"), "{before}");
        // A client says it once, to the agent that it finds.
        self.client = self.host.spice()?;
        self.client.wait_state("the guest's agent", PATIENCE, |state| state["agent"] == true)?;
        let end = Instant::now() + PATIENCE;
        loop {
            // spice-gtk writes it when it has something else to say.
            self.client.ask("copy", json!({ "text": "and a volume" }))?;
            let now = self.host.ssh(&self.guest, "demo", mixer)?;
            if now.matches("[50%]").count() == 2 {
                return Ok(());
            }
            if Instant::now() > end {
                let log = "journalctl -b -t spice-vdagent -t spice-vdagentd; cat /tmp/spice-vdagent.log; \
                           ls -l /dev/snd; cat /proc/asound/cards";
                let log = self.host.ssh(&self.guest, "root", log)?;
                anyhow::bail!("it is not set: {now}\n{log}");
            }
        }
    }

    fn file_to_guest(&mut self) -> anyhow::Result<()> {
        let file = self.host.results.join("sent.bin");
        // Longer than all queues on the way together.
        let content: Vec<u8> = (0..1_000_000_u32).map(|n| (n.wrapping_mul(n) >> 7) as u8).collect();
        std::fs::write(&file, content)?;
        self.client.ask("send-file", json!({ "path": file }))?;
        let state = self
            .client
            .wait_state("the end of the transfer", PATIENCE, |state| state["sent"].is_string())?;
        anyhow::ensure!(state["sent"] == "whole", "{}", state["sent"]);
        let there = self.host.ssh(&self.guest, "demo", "find ~ -name sent.bin")?;
        self.same_in_guest(&file, there.trim())
    }

    /// Compares a file of this machine with one of the guest.
    fn same_in_guest(&self, ours: &Path, theirs: &str) -> anyhow::Result<()> {
        let sum = |text: &str| text.split_whitespace().next().unwrap_or_default().to_owned();
        let out = Command::new("sha256sum").arg(ours).output()?;
        let wanted = sum(&String::from_utf8_lossy(&out.stdout));
        let got = sum(&self.host.ssh(&self.guest, "demo", &format!("sha256sum '{theirs}'"))?);
        anyhow::ensure!(!wanted.is_empty() && got == wanted, "{theirs}: {got}, not {wanted}");
        Ok(())
    }

    fn resize(&mut self) -> anyhow::Result<()> {
        for (width, height) in [(1440, 904), (1024, 768)] {
            self.client.ask("resize", json!({ "width": width, "height": height }))?;
            self.client.wait_state("the new size", PATIENCE, |state| {
                state["width"] == width && state["height"] == height
            })?;
            let modes = self.host.ssh(
                &self.guest,
                "root",
                "head -n1 /sys/class/drm/card0-Virtual-1/modes",
            )?;
            anyhow::ensure!(modes.trim() == format!("{width}x{height}"), "{modes:?}");
            self.vm.wait_picture(&mut self.client, "the desktop resized", |picture| {
                Ok((picture.width, picture.height) == (width, height)
                    && picture.share_of(WESTON_BACKGROUND, 6) > 0.1)
            })?;
        }
        Ok(())
    }

    /// The client people use: the guest's screen follows its window.
    fn remote_viewer(&mut self) -> anyhow::Result<()> {
        let viewer =
            RemoteViewer::start(&format!("spice://127.0.0.1:{}", self.host.spice_port()?))?;
        // Until it shows the guest, it takes its window's size from the guest instead; then the user
        // drags again. Its frame takes a few pixels of the width, its tool bar more of the height.
        let mut tries =
            [(1304, 903), (1284, 893), (1300, 901), (1280, 891), (1296, 899)].into_iter();
        let mode = loop {
            let Some((width, height)) = tries.next() else {
                anyhow::bail!("the guest's mode does not follow the window");
            };
            viewer.resize(width, height)?;
            let answer = self.host.ssh(
                &self.guest,
                "root",
                &format!(
                    "for i in $(seq 100); do mode=$(head -n1 /sys/class/drm/card0-Virtual-1/modes); \
                     [ ${{mode%x*}} -gt $(({width} - 20)) ] && [ ${{mode%x*}} -le {width} ] && \
                     echo $mode && exit 0; sleep 0.2; done; echo no: $mode",
                ),
            )?;
            if !answer.starts_with("no") {
                break answer;
            }
            println!("at {width}x{height} the guest has {answer}");
        };
        drop(viewer);
        self.client = self.host.spice()?;
        self.client.wait_state("the size that remote-viewer left", PATIENCE, |state| {
            mode.trim() == format!("{}x{}", state["width"], state["height"])
        })?;
        Ok(())
    }

    fn power_button(&mut self) -> anyhow::Result<()> {
        let ctl = format!("{} ctl --control /run/drago.sock", self.host.program("drago-vmm"));
        let asked = self.host.run(&format!("{ctl} status && {ctl} shutdown"))?;
        anyhow::ensure!(asked.code == 0, "{}", String::from_utf8_lossy(&asked.stderr));
        let code = self.vm.wait()?;
        anyhow::ensure!(code == 0, "drago-vmm ended with {code}");
        // Long after the machine is off nothing may be left behind.
        let left = self.host.run("pgrep -a 'drago-gpu|passt'; true")?;
        anyhow::ensure!(left.stdout.is_empty(), "{}", String::from_utf8_lossy(&left.stdout));
        Ok(())
    }
}
