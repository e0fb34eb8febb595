//! The nested suite's foreign peers: both sides of vhost-user-gpu with somebody else's other side, each
//! with a guest whose console must be read on a screenshot.
//!
//! Run by `cargo xtask test --suite nested`; needs the test host, so every test is `#[ignore]`d by default.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use drago_tests::guest::Guest;
use drago_tests::picture::{Picture, reads};
use drago_tests::vm::{Host, PATIENCE, Vm};
use serde_json::{Value, json};

const SOCKET: &str = "/run/foreign-gpu.sock";

/// One test host for all tests, which take turns in it.
fn host() -> MutexGuard<'static, (Host, Guest)> {
    static HOST: OnceLock<Mutex<(Host, Guest)>> = OnceLock::new();
    HOST.get_or_init(|| {
        let guest = Guest::minimal().unwrap();
        let agent = Path::new(env!("CARGO_BIN_EXE_drago-testbed-agent"));
        Mutex::new((Host::boot("peers", agent, 3072).unwrap(), guest))
    })
    .lock()
    .unwrap_or_else(PoisonError::into_inner)
}

/// Starts a back end and waits until it listens at [`SOCKET`].
fn back_end(host: &Host, name: &str, program: &str, dmabufs: bool) -> Vm {
    host.run(&format!("rm -f {SOCKET}")).unwrap();
    // QEMU's crashes on the test host's render node, vgem's, which can make no dmabuf. With udmabuf it
    // sends its pictures in those.
    let mut hide = "mount -t tmpfs none /dev/dri; ".to_owned();
    if !dmabufs {
        hide += "mount --bind /dev/udmabuf /dev/udmabuf; \
                 mount -o remount,bind,nodev /dev/udmabuf; ";
    }
    let command = host
        .command("unshare")
        .args(["--mount", "sh", "-c", &(hide + "exec \"$@\""), "sh", program])
        .arg(format!("--socket-path={SOCKET}"));
    let mut back_end = host.spawn(name, command).unwrap();
    let end = Instant::now() + PATIENCE;
    while host.run(&format!("test -S {SOCKET}")).unwrap().code != 0 {
        let code = back_end.ended().unwrap();
        assert!(code.is_none() && Instant::now() < end, "{name}: {code:?}\n{}", back_end.state());
    }
    back_end
}

/// A guest on drago-vmm whose display is served by the back end at [`SOCKET`].
fn drago_vmm(host: &(Host, Guest), name: &str) -> Vm {
    let gpu = format!("socket={SOCKET}");
    let options = ["--gpu", &gpu, "--spice", "127.0.0.1:5900"];
    let vm = host.0.start(name, &host.1, &options).unwrap();
    vm.log
        .wait_for(0, "SPICE server listens", PATIENCE)
        .unwrap_or_else(|error| panic!("{error}\n{}", vm.state()));
    vm
}

#[test]
#[ignore = "nested"]
fn qemus_back_end_shows_our_guest() {
    qemus_back_end("vhost-user-gpu", false);
}

#[test]
#[ignore = "nested"]
fn qemus_back_end_shows_our_guest_in_dmabufs() {
    qemus_back_end("vhost-user-gpu-dmabuf", true);
}

fn qemus_back_end(name: &str, dmabufs: bool) {
    let host = host();
    let mut theirs = back_end(&host.0, name, "/usr/lib/qemu/vhost-user-gpu", dmabufs);
    let mut vm = drago_vmm(&host, &format!("on-{name}"));
    let mut client = host.0.spice().unwrap();
    vm.wait_text(&mut client, "minimal#").unwrap();

    // The screen lives: what comes later is shown, and keys come back as pictures.
    vm.serial_command("clear >/dev/tty1; echo PICTURE WORKS >/dev/tty1").unwrap();
    vm.wait_text(&mut client, "PICTURE WORKS").unwrap();
    client.type_text("echo Sum $((40+2))\n", PATIENCE).unwrap();
    vm.wait_text(&mut client, "Sum 42").unwrap();
    let maps = "for p in $(pidof drago-vmm); do cat /proc/$p/maps; done | grep dmabuf";
    let mapped = host.0.run(maps).unwrap();
    assert_eq!(mapped.code == 0, dmabufs, "{}", String::from_utf8_lossy(&mapped.stdout));

    vm.type_serial("poweroff").unwrap();
    assert_eq!(vm.wait().unwrap(), 0, "{}", vm.state());
    // It serves one front end and ends with it.
    theirs.wait().unwrap();
}

#[test]
#[ignore = "nested"]
fn our_back_end_shows_qemus_guest() {
    let host = host();
    let program = host.0.program("drago-gpu");
    let mut ours = back_end(&host.0, "drago-gpu", &program, false);
    let mut qemu = Qemu::start(&host);
    qemu.wait_text("minimal#");
    qemu.type_keys(&["u", "n", "a", "m", "e", "spc", "minus", "m", "ret"]);
    qemu.wait_text("x86_64");
    qemu.ask("quit", &json!({}));
    assert_eq!(qemu.vm.wait().unwrap(), 0, "{}", qemu.vm.state());
    assert_eq!(ours.wait().unwrap(), 0, "{}", ours.state());
}

/// QEMU with its vhost-user-gpu front end, driven by QMP on its standard input and output.
struct Qemu {
    vm: Vm,
    shot: PathBuf,
    asked: u32,
}

impl Qemu {
    fn start((host, guest): &(Host, Guest)) -> Self {
        let memory = guest.memory_mib;
        let command = host
            .command("qemu-system-x86_64")
            .args(["-M", "q35,memory-backend=ram", "-accel", "kvm", "-cpu", "host", "-smp", "1"])
            .args(["-m", &memory.to_string()])
            .args(["-object", &format!("memory-backend-memfd,id=ram,size={memory}M,share=on")])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .args(["-kernel", &guest.kernel.display().to_string()])
            .args(["-initrd", &guest.initrd.display().to_string()])
            .args(["-append", &guest.cmdline])
            .args(["-chardev", &format!("socket,id=gpu,path={SOCKET}")])
            .args(["-device", "vhost-user-gpu-pci,chardev=gpu", "-device", "virtio-keyboard-pci"])
            .arg("-serial")
            .arg(format!("file:{}", host.results.join("qemu-guest.log").display()))
            .args(["-qmp", "stdio"]);
        let vm = host.spawn("qemu", command).unwrap();
        let mut this = Self { vm, shot: host.results.join("qemu.ppm"), asked: 0 };
        this.ask("qmp_capabilities", &json!({}));
        this
    }

    fn ask(&mut self, command: &str, arguments: &Value) {
        self.asked += 1;
        let id = format!("ask-{}", self.asked);
        let mark = self.vm.serial.mark();
        let line = json!({ "execute": command, "arguments": arguments, "id": id });
        self.vm.type_serial(&line.to_string()).unwrap();
        let said = self
            .vm
            .serial
            .wait_for(mark, &format!("\"id\": \"{id}\"}}"), PATIENCE)
            .unwrap_or_else(|error| panic!("{error}\n{}", self.vm.state()));
        let answer = said.lines().last().unwrap_or_default();
        assert!(answer.contains("\"return\""), "{command}: {answer}");
    }

    fn type_keys(&mut self, keys: &[&str]) {
        for key in keys {
            let stroke = |down: bool| {
                let key = json!({ "type": "qcode", "data": key });
                json!({ "type": "key", "data": { "down": down, "key": key } })
            };
            // Both at once: a key that is held long on this slow machine would be repeated.
            self.ask("input-send-event", &json!({ "events": [stroke(true), stroke(false)] }));
        }
    }

    /// Looks at QEMU's screen until a text can be read there.
    fn wait_text(&mut self, text: &str) {
        let end = Instant::now() + PATIENCE;
        loop {
            self.ask("screendump", &json!({ "filename": self.shot }));
            let picture = Picture::open(&self.shot).unwrap();
            let read = picture.text(None).unwrap();
            if reads(&read, text) {
                picture.save_png(&self.shot.with_extension(format!("{text}.png"))).unwrap();
                return;
            }
            assert!(Instant::now() < end, "no {text} on QEMU's screen, but {read:?}");
            assert_eq!(self.vm.ended().unwrap(), None, "{}", self.vm.state());
        }
    }
}
