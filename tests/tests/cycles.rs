//! Machines started and ended over and over, while virtiofsd, passt and drago-gpu are killed: nothing
//! crashes, hangs or stays behind.
//!
//! Run by `cargo xtask test --suite nested`; `DRAGO_CYCLES` is the number of machines. Guests are of a few
//! dozen instructions, so any `/dev/kvm` will do.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::{
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use drago_tests::{debian::Release, progress::note};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, set_child_subreaper, wait};

/// Only a hang takes so long.
const LIMIT: Duration = Duration::from_secs(60);

/// An ELF file with code at 1 MiB, entered in 64-bit mode.
fn elf(code: &[u8]) -> Vec<u8> {
    const ADDRESS: u64 = 0x10_0000;
    let mut image = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    for word in [ADDRESS, 64, 0] {
        image.extend(word.to_le_bytes());
    }
    image.extend([0; 4]);
    for half in [64u16, 56, 1, 0, 0, 0, 1, 0, 7, 0] {
        image.extend(half.to_le_bytes());
    }
    for word in [120, ADDRESS, ADDRESS, code.len() as u64, code.len() as u64, 4] {
        image.extend(word.to_le_bytes());
    }
    image.extend(code);
    image
}

/// `mov dx, PORT; mov al, VALUE; out dx, al`
fn out(port: u16, value: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0x66, 0xba, low, high, 0xb0, value, 0xee]
}

fn greeting() -> Vec<u8> {
    b"up\n".iter().flat_map(|byte| out(0x3f8, *byte)).collect()
}

const HALT: [u8; 3] = [0xf4, 0xeb, 0xfd];

/// How a machine ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Terminate,
    Interrupt,
    Quit,
    Kill,
    PowerOff,
    Reset,
}

const ENDS: [End; 6] =
    [End::Terminate, End::PowerOff, End::Quit, End::Kill, End::Reset, End::Interrupt];

/// Numbers that are the same in every run (xorshift).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// Where the machine's files are.
struct Place {
    folder: tempfile::TempDir,
    vmm: PathBuf,
    virtiofsd: Vec<Vec<String>>,
}

impl Place {
    fn new() -> Option<Self> {
        let there = fs::File::options().read(true).write(true).open("/dev/kvm").is_ok();
        if !there || !rustix::process::geteuid().is_root() {
            note("SKIPPED: needs /dev/kvm, and to be root for virtiofsd");
            return None;
        }
        let agent = Path::new(env!("CARGO_BIN_EXE_drago-testbed-agent"));
        let programs = std::env::var_os("DRAGO_PROGRAMS")
            .map_or(agent.parent().unwrap().into(), PathBuf::from);
        let folder = tempfile::tempdir().unwrap();
        for name in ["temporary", "runtime", "share", "cwd"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        let at = |name: &str| folder.path().join(name);
        fs::write(at("idle"), elf(&[greeting(), HALT.to_vec()].concat())).unwrap();
        let off = [greeting(), out(0x600, (5 << 2) | (1 << 5)), HALT.to_vec()].concat();
        fs::write(at("off"), elf(&off)).unwrap();
        fs::write(at("reset"), elf(&[greeting(), out(0xcf9, 6), HALT.to_vec()].concat())).unwrap();

        // QEMU's, written in C, and the one in Rust that took its place.
        let mut virtiofsd = Vec::new();
        if Path::new("/usr/lib/qemu/virtiofsd").exists() {
            let source = format!("sandbox=chroot,source={}", at("share").display());
            virtiofsd.push(vec!["/usr/lib/qemu/virtiofsd".to_owned(), "-o".to_owned(), source]);
        }
        let tree = Release::open("trixie").unwrap().tree("virtiofsd", &["virtiofsd"]).unwrap();
        let libraries = tree.join("usr/lib/x86_64-linux-gnu");
        virtiofsd.push(
            [
                libraries.join("ld-linux-x86-64.so.2"),
                "--library-path".into(),
                libraries,
                tree.join("usr/libexec/virtiofsd"),
                "--sandbox=chroot".into(),
                format!("--shared-dir={}", at("share").display()).into(),
            ]
            .map(|word| word.display().to_string())
            .to_vec(),
        );
        Some(Self { folder, vmm: programs.join("drago-vmm"), virtiofsd })
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn virtiofsd(&self, which: usize) -> Child {
        let words = &self.virtiofsd[which % self.virtiofsd.len()];
        let _ = fs::remove_file(self.at("cwd/fs"));
        let _ = fs::remove_file(self.at("cwd/fs.pid"));
        Command::new(&words[0])
            .args(&words[1..])
            .arg("--socket-path=fs")
            .current_dir(self.at("cwd"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    }

    fn machine(&self, guest: &str) -> Machine {
        let mut child = Command::new(&self.vmm)
            .args(["--kernel", &format!("../{guest}"), "--memory", "64", "--control", "control"])
            .args(["--fs", "tag=t,socket=fs", "--net", "user", "--spice", "unix:spice"])
            .args(["--balloon", "deflate-on-oom=on", "--log", "warn"])
            .current_dir(self.at("cwd"))
            .env("TMPDIR", self.at("temporary"))
            .env("XDG_RUNTIME_DIR", self.at("runtime"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (tell, said) = mpsc::channel();
        for pipe in [
            Box::new(child.stdout.take().unwrap()) as Box<dyn std::io::Read + Send>,
            Box::new(child.stderr.take().unwrap()),
        ] {
            let tell = tell.clone();
            thread::spawn(move || {
                for line in BufReader::new(pipe).lines().map_while(Result::ok) {
                    let _ = tell.send(line);
                }
            });
        }
        Machine { child, said, log: Vec::new() }
    }

    fn ctl(&self, action: &str) {
        let status = Command::new(&self.vmm)
            .args(["ctl", "--control"])
            .arg(self.at("cwd/control"))
            .arg(action)
            .status()
            .unwrap();
        assert!(status.success(), "ctl {action}: {status}");
    }

    /// What is there besides what was put there.
    fn left(&self) -> Vec<String> {
        let mut left = Vec::new();
        for folder in ["temporary", "runtime", "cwd"] {
            for entry in fs::read_dir(self.at(folder)).unwrap() {
                left.push(entry.unwrap().file_name().to_string_lossy().into_owned());
            }
        }
        // Those of virtiofsd, which is ours to clear up after.
        left.retain(|name| !name.starts_with("fs"));
        left.sort();
        left
    }
}

struct Machine {
    child: Child,
    said: mpsc::Receiver<String>,
    log: Vec<String>,
}

impl Machine {
    fn wait_up(&mut self) {
        let end = Instant::now() + LIMIT;
        while !self.log.iter().any(|line| line == "up") {
            let left = end.saturating_duration_since(Instant::now());
            match self.said.recv_timeout(left) {
                Ok(line) => self.log.push(line),
                Err(error) => panic!("not up: {error}: {:#?}", self.log),
            }
        }
    }

    fn wait(&mut self) -> ExitStatus {
        let end = Instant::now() + LIMIT;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                self.log.extend(self.said.try_iter());
                return status;
            }
            if Instant::now() > end {
                let pid = self.child.id();
                let stacks: String = tasks(pid)
                    .into_iter()
                    .map(|task| {
                        let read = |name| fs::read_to_string(task.join(name)).unwrap_or_default();
                        format!("{} {}\n", read("comm").trim(), read("wchan"))
                    })
                    .collect();
                self.log.extend(self.said.try_iter());
                panic!("it hangs:\n{stacks}{:#?}", self.log);
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }

    fn threads(&self) -> usize {
        tasks(self.child.id()).len()
    }
}

fn tasks(pid: u32) -> Vec<PathBuf> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"));
    tasks.map_or_else(|_| Vec::new(), |tasks| tasks.map(|task| task.unwrap().path()).collect())
}

/// Processes below `pid` with a name.
fn below(pid: u32, name: &str) -> Vec<Pid> {
    let mut found = Vec::new();
    for task in tasks(pid) {
        let children = fs::read_to_string(task.join("children")).unwrap_or_default();
        for child in children.split_whitespace().filter_map(|word| word.parse::<u32>().ok()) {
            let comm = fs::read_to_string(format!("/proc/{child}/comm")).unwrap_or_default();
            if comm.trim().starts_with(name) {
                found.extend(Pid::from_raw(child.cast_signed()));
            }
            found.extend(below(child, name));
        }
    }
    found
}

/// Waits until this process, which inherits all orphans below it, has no child any more.
fn nobody_is_left() {
    let end = Instant::now() + LIMIT;
    loop {
        match wait(WaitOptions::NOHANG) {
            Err(rustix::io::Errno::CHILD) => return,
            Ok(Some(_)) => {}
            Ok(None) | Err(_) => {
                if Instant::now() > end {
                    let all = Command::new("ps").args(["-ef"]).output().unwrap();
                    panic!("left behind: {}", String::from_utf8_lossy(&all.stdout));
                }
                thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

/// Kills one of the machine's helpers; virtiofsd comes back at once, as its unit sees to.
fn harm(place: &Place, machine: &Machine, virtiofsd: &mut Child, random: &mut Random) {
    let victim = random.below(4);
    if victim == 0 {
        virtiofsd.kill().unwrap();
        virtiofsd.wait().unwrap();
        *virtiofsd = place.virtiofsd(random.below(2) as usize);
        return;
    }
    let name = if victim == 1 { "passt" } else { "drago-gpu" };
    for pid in below(machine.child.id(), name) {
        let _ = kill_process(pid, Signal::KILL);
    }
}

#[test]
#[ignore = "needs the programs, and takes half a minute"]
fn machines_come_and_go_and_leave_nothing() {
    let Some(place) = Place::new() else { return };
    set_child_subreaper(Some(rustix::process::getpid())).unwrap();
    let cycles = std::env::var("DRAGO_CYCLES").map_or(200, |text| text.parse().unwrap());
    let begin = Instant::now();
    let mut harms = 0;
    for cycle in 0..cycles {
        let mut random = Random(0x9e37_79b9_7f4a_7c15 ^ (cycle + 1));
        let end = ENDS[cycle as usize % ENDS.len()];
        let mut virtiofsd = place.virtiofsd(random.below(2) as usize);
        let guest = match end {
            End::PowerOff => "off",
            End::Reset => "reset",
            _ => "idle",
        };
        let mut machine = place.machine(guest);
        // Now and then before it is built.
        let early = random.below(8) == 0 && end != End::Quit;
        if early {
            thread::sleep(Duration::from_millis(random.below(120)));
            harm(&place, &machine, &mut virtiofsd, &mut random);
            harms += 1;
        } else {
            machine.wait_up();
            if guest == "idle" {
                for _ in 0..random.below(4) {
                    harm(&place, &machine, &mut virtiofsd, &mut random);
                    harms += 1;
                    thread::sleep(Duration::from_millis(random.below(60)));
                }
            }
        }
        match end {
            End::Terminate => machine.signal(Signal::TERM),
            End::Interrupt => machine.signal(Signal::INT),
            End::Kill => machine.signal(Signal::KILL),
            End::Quit => place.ctl("quit"),
            End::PowerOff | End::Reset => {}
        }
        let status = machine.wait();
        let fine = match end {
            End::Kill => true,
            // A helper that was killed while the machine was built is an error of its own.
            _ if early => status.code().is_some_and(|code| code == 0 || code == 1),
            _ => status.success(),
        };
        assert!(fine, "cycle {cycle}, {end:?}: {status}\n{:#?}", machine.log);
        let panicked = machine.log.iter().any(|line| line.contains("panicked"));
        assert!(!panicked, "cycle {cycle}: {:#?}", machine.log);
        let _ = virtiofsd.kill();
        let _ = virtiofsd.wait();
        nobody_is_left();
        let left = place.left();
        // Of a machine that was killed its sockets are left, for the next one to replace.
        let killed = end == End::Kill || early;
        let fine = left.iter().all(|name| killed && (name == "control" || name == "spice"));
        assert!(fine, "cycle {cycle}, {end:?}: left behind: {left:?}\n{:#?}", machine.log);
    }
    println!("{cycles} machines, {harms} kills of helpers, {:.0?}", begin.elapsed());
}

#[test]
#[ignore = "needs the programs, and takes half a minute"]
fn a_machine_outlives_a_hundred_kills_and_holds_no_more_than_before() {
    let Some(place) = Place::new() else { return };
    let mut random = Random(77);
    let mut virtiofsd = place.virtiofsd(1);
    let mut machine = place.machine("idle");
    machine.wait_up();
    let (descriptors, threads) = (machine.descriptors(), machine.threads());
    for _ in 0..100 {
        harm(&place, &machine, &mut virtiofsd, &mut random);
        thread::sleep(Duration::from_millis(random.below(150)));
        assert!(machine.child.try_wait().unwrap().is_none(), "it ended: {:#?}", machine.log);
    }
    // All are back, and nothing piled up.
    let end = Instant::now() + LIMIT;
    loop {
        let pid = machine.child.id();
        let back = !below(pid, "passt").is_empty() && !below(pid, "drago-gpu").is_empty();
        let now = (machine.descriptors(), machine.threads());
        if back && now.0 <= descriptors && now.1 <= threads {
            break;
        }
        assert!(Instant::now() < end, "{descriptors} and {threads} before, {now:?} now");
        thread::sleep(Duration::from_millis(50));
    }
    println!("{descriptors} descriptors and {threads} threads before and after 100 kills");
    machine.signal(Signal::TERM);
    assert!(machine.wait().success());
    virtiofsd.kill().unwrap();
    virtiofsd.wait().unwrap();
}
