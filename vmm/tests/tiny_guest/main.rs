//! Guests of a few dozen instructions, written in bytes, run by the real program. They work on any
//! `/dev/kvm`, even one that interprets guest kernels; without one the tests say so and pass.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

use std::{
    io::{BufRead, BufReader, Read, Write},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use drago_vmm::doctor::{KvmClass, probe_kvm};

mod machine;
mod process;
mod sandbox;

/// Generous: only a hang is an error, on however slow a machine.
const LIMIT: Duration = Duration::from_secs(120);
const LOAD_ADDRESS: u64 = 0x10_0000;

/// `true` if there is no KVM to test with.
fn no_kvm(test: &str) -> bool {
    match probe_kvm() {
        KvmClass::None { reason } => {
            println!("SKIPPED {test}: no KVM here ({reason})");
            true
        }
        _ => false,
    }
}

/// x86 machine code that is the same in 32- and 64-bit mode.
mod code {
    /// `mov dx, PORT; mov al, VALUE; out dx, al`
    pub(crate) fn out(port: u16, value: u8) -> Vec<u8> {
        let [low, high] = port.to_le_bytes();
        vec![0x66, 0xba, low, high, 0xb0, value, 0xee]
    }

    /// Writes `text` to COM1.
    pub(crate) fn print(text: &str) -> Vec<u8> {
        text.bytes().flat_map(|byte| out(0x3f8, byte)).collect()
    }

    /// `hlt` for ever.
    pub(crate) const HALT: [u8; 3] = [0xf4, 0xeb, 0xfd];

    /// S5 through the sleep control register.
    pub(crate) fn power_off() -> Vec<u8> {
        [out(0x600, (5 << 2) | (1 << 5)), HALT.to_vec()].concat()
    }
}

/// An ELF image of `code` at 1 MiB, entered by PVH or in 64-bit mode.
fn elf(code: &[u8], pvh: bool) -> Vec<u8> {
    const HEADERS: u64 = 64 + 2 * 56;
    let note: Vec<u8> = [4u32, 4, 18]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .chain(*b"Xen\0")
        .chain((LOAD_ADDRESS as u32).to_le_bytes())
        .collect();
    let code_at = HEADERS + note.len() as u64;
    let mut image = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    for half in [2u16, 62] {
        image.extend(half.to_le_bytes());
    }
    image.extend(1u32.to_le_bytes());
    for word in [LOAD_ADDRESS, 64, 0] {
        image.extend(word.to_le_bytes());
    }
    image.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 1 + u16::from(pvh), 0, 0, 0] {
        image.extend(half.to_le_bytes());
    }
    for (kind, offset, address, size) in
        [(1u32, code_at, LOAD_ADDRESS, code.len() as u64), (4, HEADERS, 0, note.len() as u64)]
    {
        image.extend(kind.to_le_bytes());
        image.extend(7u32.to_le_bytes());
        for word in [offset, address, address, size, size, 4] {
            image.extend(word.to_le_bytes());
        }
    }
    image.extend(note);
    image.extend(code);
    image
}

struct Guest {
    folder: tempfile::TempDir,
    child: Child,
}

impl Guest {
    fn start(image: &[u8], arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let kernel = folder.path().join("guest.elf");
        std::fs::write(&kernel, image).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_drago-vmm"))
            .current_dir(folder.path())
            .args(["--kernel", "guest.elf", "--memory", "64", "--control", "control"])
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Self { folder, child }
    }

    /// Standard output up to and including `text`.
    fn wait_for(&mut self, text: &str) {
        let stdout = self.child.stdout.as_mut().unwrap();
        let mut seen = Vec::new();
        let mut byte = [0];
        while !seen.ends_with(text.as_bytes()) {
            assert_eq!(stdout.read(&mut byte).unwrap(), 1, "ended after {seen:?}");
            seen.push(byte[0]);
        }
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }

    fn ctl(&self, arguments: &[&str]) -> std::process::Output {
        Command::new(env!("CARGO_BIN_EXE_drago-vmm"))
            .args(["ctl", "--control"])
            .arg(self.control())
            .args(arguments)
            .output()
            .unwrap()
    }

    fn control(&self) -> PathBuf {
        self.folder.path().join("control")
    }

    /// Waits for the end: status, standard output, standard error.
    fn end(mut self) -> (ExitStatus, String, String) {
        let deadline = Instant::now() + LIMIT;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if Instant::now() > deadline {
                self.child.kill().unwrap();
                panic!("the guest did not end");
            }
            thread::sleep(Duration::from_millis(5));
        };
        let read = |source: Option<&mut dyn Read>| {
            let mut bytes = Vec::new();
            source.unwrap().read_to_end(&mut bytes).unwrap();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let output = read(self.child.stdout.as_mut().map(|s| s as &mut dyn Read));
        let errors = read(self.child.stderr.as_mut().map(|s| s as &mut dyn Read));
        assert!(!self.control().exists(), "the control socket is removed");
        (status, output, errors)
    }
}

fn run(code: &[u8], arguments: &[&str]) -> (ExitStatus, String, String) {
    Guest::start(&elf(code, false), arguments).end()
}
