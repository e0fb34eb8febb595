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

#[test]
fn hello_and_power_off() {
    if no_kvm("hello_and_power_off") {
        return;
    }
    let code = [code::print("hello\n"), code::power_off()].concat();
    for pvh in [false, true] {
        let (status, output, errors) = Guest::start(&elf(&code, pvh), &[]).end();
        assert!(status.success(), "{errors}");
        assert_eq!(output, "hello\n", "PVH: {pvh}");
        assert!(errors.contains("switched itself off"), "{errors}");
    }
}

#[test]
fn pvh_start_info_is_where_ebx_points() {
    if no_kvm("pvh_start_info_is_where_ebx_points") {
        return;
    }
    // cmp dword [ebx], 0x336ec578; jne over the output
    let good = code::print("pvh");
    let mut code = vec![0x81, 0x3b, 0x78, 0xc5, 0x6e, 0x33, 0x75, good.len() as u8];
    code.extend(good);
    code.extend(code::power_off());
    let (status, output, errors) = Guest::start(&elf(&code, true), &[]).end();
    assert!(status.success(), "{errors}");
    assert_eq!(output, "pvh");
}

/// On both sides of each boundary of the layout: the hole for devices begins at 3 GiB.
#[test]
fn ram_of_every_size_is_there_to_its_last_byte() {
    if no_kvm("ram_of_every_size_is_there_to_its_last_byte") {
        return;
    }
    #[rustfmt::skip]
    let code = [
        // rax: the page directory pointers. What lies behind 4 GiB gets a directory at 2 MiB.
        &b"\x0f\x20\xd8"[..],                          // mov rax, cr3
        b"\x48\x8b\x00",                               // mov rax, [rax]
        b"\x48\x25\x00\xf0\xff\xff",                   // and rax, ~0xfff
        b"\x48\xc7\x40\x20\x03\x00\x20\x00",           // mov qword [rax + 4 * 8], 0x200003
        b"\xbf\x00\x00\x20\x00",                       // mov edi, 0x200000
        b"\x48\xbb\x83\x00\x00\x00\x01\x00\x00\x00",   // mov rbx, 0x100000083
        b"\xb9\x00\x02\x00\x00",                       // mov ecx, 512
        b"\x48\x89\x1f",                               // fill: mov [rdi], rbx
        b"\x48\x81\xc3\x00\x00\x20\x00",               // add rbx, 0x200000
        b"\x48\x83\xc7\x08",                           // add rdi, 8
        b"\xff\xc9\x75\xee",                           // dec ecx; jnz fill
        // Each entry of the memory map in the zero page that is RAM; rbx: their lengths.
        b"\x31\xdb",                                   // xor ebx, ebx
        b"\x0f\xb6\x8e\xe8\x01\x00\x00",               // movzx ecx, byte [rsi + e820_entries]
        b"\x48\x81\xc6\xd0\x02\x00\x00",               // add rsi, e820_table
        b"\x83\x7e\x10\x01\x75\x1b",                   // entry: cmp dword [rsi + 16], 1; jne next
        b"\x48\x8b\x3e\xe8\x32\x00\x00\x00",           // mov rdi, [rsi]; call touch
        b"\x48\x8b\x3e\x48\x03\x7e\x08",               // mov rdi, [rsi]; add rdi, [rsi + 8]
        b"\x48\xff\xcf\xe8\x23\x00\x00\x00",           // dec rdi; call touch
        b"\x48\x03\x5e\x08",                           // add rbx, [rsi + 8]
        b"\x48\x83\xc6\x14\xff\xc9\x75\xd7",           // next: add rsi, 20; dec ecx; jnz entry
        // MiB, rounded up: there is a hole below 1 MiB.
        b"\x48\x81\xc3\xff\xff\x0f\x00",               // add rbx, 0xfffff
        b"\x48\xc1\xeb\x14",                           // shr rbx, 20
        b"\x66\xba\xf8\x03\x88\xd8\xee\x88\xf8\xee",   // mov dx, COM1; out dx, bl; out dx, bh
        b"\xeb\x14",                                   // jmp end
        // Whether the byte at rdi is one that can be changed; it keeps what it was.
        b"\x8a\x07\xf6\xd0\x88\x07",                   // touch: mov al, [rdi]; not al; mov [rdi], al
        b"\x38\x07\x75\x05",                           // cmp [rdi], al; jne bad
        b"\xf6\xd0\x88\x07\xc3",                       // not al; mov [rdi], al; ret
        b"\x31\xdb\xff\xcb\xc3",                       // bad: mov ebx, -1; ret
    ].concat();
    let code = [code, code::power_off()].concat();
    for mib in [64_u16, 2047, 2048, 2049, 3071, 3072, 3073, 4096] {
        let memory = mib.to_string();
        let mut guest = Guest::start(&elf(&code, false), &["--memory", &memory]);
        let mut seen = [0; 2];
        let read = guest.child.stdout.as_mut().unwrap().read_exact(&mut seen);
        let (status, _, errors) = guest.end();
        assert!(read.is_ok() && status.success(), "{mib} MiB: {errors}");
        assert_eq!(u16::from_le_bytes(seen), mib, "{errors}");
    }
}

#[test]
fn every_way_to_reset_ends_the_process_with_success() {
    if no_kvm("every_way_to_reset_ends_the_process_with_success") {
        return;
    }
    for (code, way) in [
        (code::out(0x602, 1), "reset register"),
        (code::out(0x64, 0xfe), "keyboard controller"),
        (code::out(0xcf9, 0x06), "port 0xcf9"),
        (code::out(0xcf9, 0x0e), "port 0xcf9"),
    ] {
        let (status, _, errors) = run(&[code, code::HALT.to_vec()].concat(), &[]);
        assert!(status.success(), "{way}: {errors}");
        assert!(errors.contains(way), "{way}: {errors}");
    }
}

#[test]
fn the_reset_vector_of_a_bios_resets() {
    if no_kvm("the_reset_vector_of_a_bios_resets") {
        return;
    }
    // The second processor starts in real mode and jumps there, as Linux does in the end.
    let jump = u64::from_le_bytes([0xea, 0xf0, 0xff, 0x00, 0xf0, 0xf4, 0xeb, 0xfd]);
    let mut code = vec![0x48, 0xb8];
    code.extend(jump.to_le_bytes());
    code.extend([0x48, 0x89, 0x04, 0x25, 0x00, 0x40, 0, 0]);
    code.extend([0xbf, 0x00, 0x03, 0xe0, 0xfe]);
    code.extend([0xc7, 0x07, 0x00, 0x45, 0x0c, 0x00]);
    code.extend([0xc7, 0x07, 0x04, 0x46, 0x0c, 0x00]);
    code.extend(code::HALT);
    let (status, _, errors) = run(&code, &["--cpus", "2"]);
    assert!(status.success() && errors.contains("reset register"), "{errors}");
}

#[test]
fn a_triple_fault_is_a_reset() {
    if no_kvm("a_triple_fault_is_a_reset") {
        return;
    }
    // lidt [rip + 1]; int3; 10 zero bytes: every exception faults until the processor gives up
    let code = [vec![0x0f, 0x01, 0x1d, 1, 0, 0, 0, 0xcc], vec![0; 10]].concat();
    let (status, _, errors) = run(&code, &[]);
    if let KvmClass::Interpreted { .. } = probe_kvm() {
        // Such a KVM reports an internal error instead; that must be told with the registers.
        println!("interpreted KVM: {errors}");
        assert!(status.success() || errors.contains("rip 0x"), "{errors}");
        return;
    }
    assert!(status.success(), "{errors}");
    assert!(errors.contains("triple fault"), "{errors}");
}

#[test]
fn a_panic_is_logged_and_may_choose_the_status() {
    if no_kvm("a_panic_is_logged_and_may_choose_the_status") {
        return;
    }
    let code = [code::out(0x505, 1), code::power_off()].concat();
    let (status, _, errors) = run(&code, &[]);
    assert!(status.success() && errors.contains("panicked"), "{errors}");
    let (status, _, errors) = run(&code, &["--panic-exit-code", "42"]);
    assert_eq!(status.code(), Some(42), "{errors}");
}

#[test]
fn a_second_processor_starts_by_init_and_sipi() {
    if no_kvm("a_second_processor_starts_by_init_and_sipi") {
        return;
    }
    // Real mode at 0x4000: mov byte [0x5000], 1; hlt; jmp back
    let second = u64::from_le_bytes([0xc6, 0x06, 0x00, 0x50, 0x01, 0xf4, 0xeb, 0xfd]);
    let mut code = vec![0x48, 0xb8]; // mov rax, imm64
    code.extend(second.to_le_bytes());
    code.extend([0x48, 0x89, 0x04, 0x25, 0x00, 0x40, 0, 0]); // mov [0x4000], rax
    code.extend([0xbf, 0x00, 0x03, 0xe0, 0xfe]); // mov edi, 0xfee00300 (interrupt command)
    code.extend([0xc7, 0x07, 0x00, 0x45, 0x0c, 0x00]); // mov dword [rdi], INIT to all others
    code.extend([0xc7, 0x07, 0x04, 0x46, 0x0c, 0x00]); // mov dword [rdi], SIPI to page 4
    // pause; cmp byte [0x5000], 1; jne back
    code.extend([0xf3, 0x90, 0x80, 0x3c, 0x25, 0x00, 0x50, 0, 0, 1, 0x75, 0xf4]);
    code.extend(code::print("two"));
    code.extend(code::power_off());
    let (status, output, errors) = run(&code, &["--cpus", "2"]);
    assert!(status.success(), "{errors}");
    assert_eq!(output, "two");
}

#[test]
fn what_is_typed_arrives() {
    if no_kvm("what_is_typed_arrives") {
        return;
    }
    // in al, 0x3fd until data is ready; in al, 0x3f8; out 0x3f8, al
    let mut code = code::print(">");
    code.extend([0x66, 0xba, 0xfd, 0x03]); // mov dx, 0x3fd
    code.extend([0xec, 0xa8, 0x01, 0x74, 0xfb]); // in al, dx; test al, 1; jz back
    code.extend([0x66, 0xba, 0xf8, 0x03, 0xec, 0xee]); // mov dx, 0x3f8; in al, dx; out dx, al
    code.extend(code::power_off());
    let mut guest = Guest::start(&elf(&code, false), &[]);
    guest.wait_for(">");
    guest.child.stdin.take().unwrap().write_all(b"k").unwrap();
    let (status, output, errors) = guest.end();
    assert!(status.success(), "{errors}");
    assert_eq!(output, "k");
}

#[test]
fn signals_and_quit_end_an_idle_guest() {
    if no_kvm("signals_and_quit_end_an_idle_guest") {
        return;
    }
    let image = elf(&[code::print("up\n"), code::HALT.to_vec()].concat(), false);
    for signal in [rustix::process::Signal::TERM, rustix::process::Signal::INT] {
        let mut guest = Guest::start(&image, &["--name", "idle"]);
        guest.wait_for("up\n");
        // The end of standard input is nothing to the guest.
        drop(guest.child.stdin.take());
        // A thread that does not answer within a quarter of a second is reported as such; on a busy machine
        // it may have had no turn.
        let deadline = Instant::now() + LIMIT;
        loop {
            let status = guest.ctl(&["status", "--json"]);
            let text = String::from_utf8_lossy(&status.stdout).into_owned();
            assert!(text.contains("\"idle\""), "{text}");
            if text.contains("\"processors\":[\"in the guest at 0x") {
                break;
            }
            assert!(Instant::now() < deadline, "{text}");
        }
        let refused = guest.ctl(&["resize", "800x600"]);
        assert!(!refused.status.success());
        assert!(String::from_utf8_lossy(&refused.stderr).contains("no display"));
        guest.signal(signal);
        let (status, _, errors) = guest.end();
        assert!(status.success(), "{errors}");
    }
    let mut guest = Guest::start(&image, &[]);
    guest.wait_for("up\n");
    assert!(guest.ctl(&["quit"]).status.success());
    let control = guest.control();
    let (status, _, errors) = guest.end();
    assert!(status.success(), "{errors}");
    let gone = Command::new(env!("CARGO_BIN_EXE_drago-vmm"))
        .args(["ctl", "--control"])
        .arg(control)
        .args(["shutdown", "--wait"])
        .status()
        .unwrap();
    assert!(gone.success(), "shutting down what is gone already is a success");
}

/// However a machine ends, all its disks are flushed before the process does.
#[test]
fn every_end_flushes_the_disks() {
    if no_kvm("every_end_flushes_the_disks") {
        return;
    }
    let wait = [code::print("up\n"), code::HALT.to_vec()].concat();
    let reset = [code::print("up\n"), code::out(0x602, 1), code::HALT.to_vec()].concat();
    let off = [code::print("up\n"), code::power_off()].concat();
    let disks = tempfile::tempdir().unwrap();
    let path = |name: &str| disks.path().join(name).display().to_string();
    for name in ["first", "second", "third"] {
        std::fs::write(path(name), [0; 4096]).unwrap();
    }
    let disk = |name: &str, more: &str| format!("path={}{more}", path(name));
    let (first, second, third) = (disk("first", ""), disk("second", ""), disk("third", ",ro=on"));
    let options = ["--disk", &first, "--disk", &second, "--disk", &third, "--log", "debug"];
    for (code, signal) in [(off, false), (reset, false), (wait, true)] {
        let mut guest = Guest::start(&elf(&code, false), &options);
        guest.wait_for("up\n");
        if signal {
            guest.signal(rustix::process::Signal::TERM);
        }
        let (status, _, errors) = guest.end();
        assert!(status.success(), "{errors}");
        let (before, _) = errors.split_once("the virtual machine ended").unwrap();
        let stable = |name: &str| {
            let mut lines = before.lines().filter(|line| line.contains("written is stable"));
            lines.any(|line| line.contains(&path(name)) && line.contains("flushes=1"))
        };
        assert!(stable("first") && stable("second"), "{errors}");
    }
}

/// As `microvm@.service` of microvm.nix does: hardly any environment, another name, no input.
#[test]
fn a_service_manager_is_told_and_finds_nothing_left_behind() {
    if no_kvm("a_service_manager_is_told_and_finds_nothing_left_behind") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let code = [code::print("up\n"), code::HALT.to_vec()].concat();
    std::fs::write(at("guest.elf"), elf(&code, false)).unwrap();
    std::fs::write(at("secret"), "hunter2").unwrap();
    // A machine that was killed left its socket.
    drop(std::os::unix::net::UnixListener::bind(at("control")).unwrap());
    let manager = std::os::unix::net::UnixDatagram::bind(at("notify")).unwrap();
    manager.set_read_timeout(Some(LIMIT)).unwrap();
    let told = || {
        let mut buffer = [0; 4096];
        let length = manager.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    };
    let mut child = Command::new(env!("CARGO_BIN_EXE_drago-vmm"));
    std::os::unix::process::CommandExt::arg0(&mut child, "microvm@guest");
    let child = child
        .current_dir(folder.path())
        .env_clear()
        .env("NOTIFY_SOCKET", at("notify"))
        .args(["--log", "trace", "--kernel", "guest.elf", "--memory", "1", "--control", "control"])
        .args(["--credential", "a=/nonexistent", "--serial", "off"])
        // What a runner appends overrides.
        .args(["--credential", "a=secret", "--serial", "stdio", "--memory", "64"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut guest = Guest { folder, child };
    guest.wait_for("up\n");
    let ready = told();
    assert!(ready.starts_with("READY=1\n"), "{ready}");
    guest.signal(rustix::process::Signal::TERM);
    assert_eq!(told(), "STOPPING=1");
    let (status, _, errors) = guest.end();
    assert!(status.success(), "{errors}");
    for shown in ["hunter2", "aHVudGVyMg"] {
        assert!(!errors.contains(shown), "a secret in the log: {errors}");
    }
}

#[test]
fn a_signal_ends_the_wait_for_virtiofsd() {
    if no_kvm("a_signal_ends_the_wait_for_virtiofsd") {
        return;
    }
    let image = elf(&code::HALT, false);
    let mut guest = Guest::start(&image, &["--fs", "tag=t,socket=nobody"]);
    let mut errors = std::io::BufReader::new(guest.child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("waiting for virtiofsd") {
        line.clear();
        assert!(std::io::BufRead::read_line(&mut errors, &mut line).unwrap() > 0, "it ended");
    }
    guest.signal(rustix::process::Signal::TERM);
    assert!(guest.child.wait().unwrap().success());
}

/// As upstream's checks run in the sandbox of a Nix build: no `/sys`, no terminal, no network, of `/dev` only
/// what every build has and KVM; no user by name, no folder of temporary files that is written to.
#[test]
fn a_machine_runs_in_the_sandbox_of_a_nix_build() {
    const TEST: &str = "a_machine_runs_in_the_sandbox_of_a_nix_build";
    if no_kvm(TEST) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let code = [code::print("up\n"), code::power_off()].concat();
    std::fs::write(at("guest.elf"), elf(&code, true)).unwrap();
    std::fs::write(at("output.img"), [0; 4096]).unwrap();
    std::fs::create_dir(at("dev")).unwrap();
    let script = "set -e
        cd \"$1\"
        mount -t tmpfs dev dev
        for node in kvm null zero full random urandom; do
            touch dev/$node
            mount --bind /dev/$node dev/$node
        done
        mount --rbind dev /dev
        mount -t tmpfs sys /sys
        mount -t tmpfs etc /etc
        [ ! -e /sys/class ] && [ ! -e /dev/tty ] && [ ! -e /dev/shm ]
        echo prepared
        exec env -i \"$2\" --kernel guest.elf --memory 64 --control microvm.sock \\
            --disk path=output.img </dev/null";
    let output = Command::new("unshare")
        .args(["--mount", "--net", "--ipc", "--map-root-user", "sh", "-c", script, "sh"])
        .arg(folder.path())
        .arg(env!("CARGO_BIN_EXE_drago-vmm"))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    if !said.starts_with("prepared\n") {
        println!("SKIPPED {TEST}: no namespaces here: {errors}");
        return;
    }
    assert_eq!(said, "prepared\nup\n", "{errors}");
    assert!(output.status.success(), "{errors}");
    assert!(!at("microvm.sock").exists());
}

/// A virtiofsd that loses its machine ends: what is shared is to be there until the last write to a disk.
#[test]
fn virtiofsd_is_left_last() {
    if no_kvm("virtiofsd_is_left_last") {
        return;
    }
    let image = elf(&[code::print("up\n"), code::HALT.to_vec()].concat(), false);
    let mut guest = Guest::start(&image, &["--fs", "tag=t,socket=fs"]);
    let control = guest.control();
    let listener = std::os::unix::net::UnixListener::bind(guest.folder.path().join("fs")).unwrap();
    let virtiofsd = thread::spawn(move || {
        const GET_FEATURES: u32 = 1;
        let (mut machine, _) = listener.accept().unwrap();
        let mut header = [0; 12];
        while machine.read_exact(&mut header).is_ok() {
            let [request, _, size] = [0, 4, 8]
                .map(|at| u32::from_le_bytes(std::array::from_fn(|byte| header[at + byte])));
            machine.read_exact(&mut vec![0; size as usize]).unwrap();
            if request == GET_FEATURES {
                // VIRTIO_F_VERSION_1 and no protocol features, so that nothing else wants an answer.
                let answer = [1_u32, 5, 8].map(u32::to_le_bytes).concat();
                machine
                    .write_all(&[answer, (1_u64 << 32).to_le_bytes().to_vec()].concat())
                    .unwrap();
            }
        }
        control.exists()
    });
    guest.wait_for("up\n");
    assert!(guest.control().exists());
    guest.signal(rustix::process::Signal::TERM);
    assert!(!virtiofsd.join().unwrap(), "virtiofsd was left before the control socket was gone");
    let (status, _, errors) = guest.end();
    assert!(status.success(), "{errors}");
}

/// Name, number of filters of each thread of a process.
fn filters(pid: u32) -> Vec<(String, u32)> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let status = threads.filter_map(|thread| {
        // Some threads are there for a moment only.
        let text = std::fs::read_to_string(thread.ok()?.path().join("status")).ok()?;
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            line.map(str::trim).unwrap_or_default().to_owned()
        };
        Some((field("Name:"), field("Seccomp_filters:").parse().unwrap()))
    });
    status.collect()
}

/// Processes below `pid` called `name`.
fn descendants(pid: u32, name: &str) -> Vec<u32> {
    let mut found = Vec::new();
    for thread in std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
        let list = std::fs::read_to_string(thread.path().join("children")).unwrap_or_default();
        for child in list.split_whitespace().filter_map(|pid| pid.parse().ok()) {
            let comm = std::fs::read_to_string(format!("/proc/{child}/comm"));
            if comm.is_ok_and(|comm| comm.starts_with(name)) {
                found.push(child);
            }
            found.extend(descendants(child, name));
        }
    }
    found
}

#[test]
fn every_thread_is_filtered_and_processors_more_than_others() {
    if no_kvm("every_thread_is_filtered_and_processors_more_than_others") {
        return;
    }
    let image = elf(&[code::print("up\n"), code::HALT.to_vec()].concat(), false);
    for (options, filtered) in [(&["--cpus", "2"][..], true), (&["--sandbox", "off"], false)] {
        let mut guest = Guest::start(&image, options);
        guest.wait_for("up\n");
        let pid = guest.child.id();
        // Processors of the guest that have not run yet install theirs any moment.
        let complete = |threads: &[(String, u32)]| {
            let main = threads.iter().find(|(name, _)| name == "drago-vmm").unwrap().1;
            threads.iter().all(|(name, count)| {
                if name.starts_with("vcpu") { *count > main } else { *count >= main }
            }) && main > 0
        };
        let mut threads = filters(pid);
        let deadline = Instant::now() + LIMIT;
        while filtered && !complete(&threads) {
            assert!(Instant::now() < deadline, "{threads:?}");
            thread::sleep(Duration::from_millis(5));
            threads = filters(pid);
        }
        assert!(filtered || threads.iter().all(|(_, count)| *count == 0), "{threads:?}");
        let launchers = descendants(pid, "drago-launcher");
        assert_eq!(launchers.len(), usize::from(filtered));
        guest.signal(rustix::process::Signal::TERM);
        let (status, _, errors) = guest.end();
        assert!(status.success(), "{errors}");
        for launcher in launchers {
            assert!(!Path::new(&format!("/proc/{launcher}")).exists(), "it is collected");
        }
    }
}

/// What is started again cannot be a child of a process that may not start any.
#[test]
fn passt_comes_back_although_the_sandbox_is_closed() {
    let test = "passt_comes_back_although_the_sandbox_is_closed";
    if no_kvm(test) {
        return;
    }
    if Command::new("passt").arg("--version").output().is_err() {
        println!("SKIPPED {test}: passt is not installed");
        return;
    }
    let image = elf(&[code::print("up\n"), code::HALT.to_vec()].concat(), false);
    let mut guest = Guest::start(&image, &["--net", "user"]);
    guest.wait_for("up\n");
    let pid = guest.child.id();
    let first = descendants(pid, "passt");
    assert_eq!(first.len(), 1);
    let victim = rustix::process::Pid::from_raw(first[0] as i32).unwrap();
    rustix::process::kill_process(victim, rustix::process::Signal::KILL).unwrap();
    let deadline = Instant::now() + LIMIT;
    while !descendants(pid, "passt").iter().any(|pid| !first.contains(pid)) {
        assert!(Instant::now() < deadline, "passt was not started again");
        thread::sleep(Duration::from_millis(20));
    }
    guest.signal(rustix::process::Signal::TERM);
    let (status, _, errors) = guest.end();
    assert!(status.success(), "{errors}");
    assert!(errors.contains("passt ended"), "{errors}");
}

/// spice-gtk, until a line of what it says has all of `words`.
fn spice_client(folder: &Path, arguments: &[&str], words: &[&str]) -> Child {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../spice-server/tests/client.py");
    let mut client = Command::new("/usr/bin/python3")
        .arg(script)
        .args(arguments)
        .current_dir(folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(client.stdout.take().unwrap()).lines().map_while(Result::ok);
    let (sender, receiver) = std::sync::mpsc::channel();
    let wanted: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
    thread::spawn(move || {
        let found = lines.any(|line| wanted.iter().all(|word| line.contains(word)));
        let _ = sender.send(found);
        // Whatever else it says must find a reader.
        lines.for_each(drop);
    });
    let found = receiver.recv_timeout(LIMIT);
    if found != Ok(true) {
        let _ = client.kill();
        let _ = client.wait();
        panic!("{arguments:?}: never {words:?}");
    }
    client
}

/// TLS, WebSockets, passwords at run time and Unix sockets need nothing that the sandbox refuses.
#[test]
fn viewers_come_in_through_the_closed_sandbox() {
    let test = "viewers_come_in_through_the_closed_sandbox";
    if no_kvm(test) {
        return;
    }
    let gpu = Path::new(env!("CARGO_BIN_EXE_drago-vmm")).with_file_name("drago-gpu");
    let probe = "import gi; gi.require_version('SpiceClientGLib', '2.0')";
    let python =
        Command::new("/usr/bin/python3").args(["-c", probe]).stderr(Stdio::null()).status();
    let folder = tempfile::tempdir().unwrap();
    let openssl = Command::new("openssl")
        .args(["req", "-x509", "-nodes", "-newkey", "ec", "-pkeyopt"])
        .args(["ec_paramgen_curve:prime256v1", "-keyout", "key", "-out", "cert"])
        .args(["-subj", "/CN=guest", "-addext", "subjectAltName=IP:127.0.0.1"])
        .current_dir(&folder)
        .output();
    if !gpu.exists()
        || !python.is_ok_and(|s| s.success())
        || !openssl.is_ok_and(|o| o.status.success())
    {
        println!(
            "SKIPPED {test}: drago-gpu is not built, or spice-gtk or openssl is not installed"
        );
        return;
    }
    let at = |name: &str| folder.path().join(name).display().to_string();
    std::fs::write(at("index.html"), "<p>").unwrap();
    std::fs::write(at("password"), "sesame\n").unwrap();
    let (socket, cert, key) = (at("spice.sock"), at("cert"), at("key"));
    let spice = format!(
        "127.0.0.1:0,unix={socket},tls-cert-file={cert},tls-key-file={key},password-required,clients=shared"
    );
    let web = format!("dir={}", folder.path().display());
    let image = elf(&[code::print("up\n"), code::HALT.to_vec()].concat(), false);
    let mut guest = Guest::start(&image, &["--spice", &spice, "--web", &web, "--gpu", "2d"]);
    guest.wait_for("up\n");
    let status = guest.ctl(&["status", "--json"]).stdout;
    let status: serde_json::Value = serde_json::from_slice(&status).unwrap();
    let address = status["spice"].as_str().unwrap().to_owned();
    let port = address.rsplit_once(':').unwrap().1;
    let mut events = Command::new(env!("CARGO_BIN_EXE_drago-vmm"))
        .args(["ctl", "--control"])
        .arg(guest.control())
        .arg("events")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut event_lines =
        BufReader::new(events.stdout.take().unwrap()).lines().map_while(Result::ok);
    let mut event = |words: &[&str]| {
        let found = event_lines.find(|line| words.iter().all(|word| line.contains(word)));
        assert!(found.is_some(), "no event {words:?}");
    };

    let (tls_port, ca) = (format!("tls-port={port}"), format!("ca-file={cert}"));
    let secure = ["127.0.0.1", "-", "sesame", &tls_port, &ca];
    let opened = ["InputsChannel", "opened"];
    // Nobody may come in before there is a password. (Trying again makes sure that `ctl events`
    // listens by then.)
    for _ in 0..2 {
        let mut refused = spice_client(folder.path(), &secure, &["error-auth"]);
        refused.kill().unwrap();
        refused.wait().unwrap();
    }
    event(&["spice-wrong-password", "127.0.0.1"]);
    assert!(guest.ctl(&["set-password", &at("password"), "--expires", "+3600"]).status.success());
    let mut one = spice_client(folder.path(), &secure, &opened);
    let unix = format!("unix-path={socket}");
    let mut two = spice_client(folder.path(), &["", "-", "sesame", &unix], &opened);
    event(&["spice-client-connected", "tcp+tls1.3"]);
    event(&["spice-client-connected", "unix:uid="]);
    let clients = String::from_utf8(guest.ctl(&["spice-clients"]).stdout).unwrap();
    assert_eq!(clients.lines().count(), 2, "{clients}");
    assert!(clients.contains("tcp+tls1.3") && clients.contains("\"drives\":true"), "{clients}");
    assert!(guest.ctl(&["set-certificate", &cert, &key]).status.success());
    let wrong = guest.ctl(&["set-certificate", &cert, &cert]);
    let told = String::from_utf8(wrong.stderr).unwrap();
    assert!(!wrong.status.success() && told.contains("no private key"), "{told}");
    assert!(guest.ctl(&["expire-password", "now"]).status.success());
    let mut late = spice_client(folder.path(), &secure, &["error-auth"]);

    let status = String::from_utf8(guest.ctl(&["status", "--json"]).stdout).unwrap();
    assert!(status.contains("\"wrong_passwords\":3"), "{status}");
    let mut browser = std::net::TcpStream::connect(&address).unwrap();
    browser.write_all(b"GET / HTTP/1.1\r\nHost: vm\r\n\r\n").unwrap();
    let mut answer = String::new();
    browser.read_to_string(&mut answer).unwrap();
    assert!(answer.contains("Location: https://vm/\r\n"), "{answer}");

    for client in [&mut one, &mut two, &mut late] {
        client.kill().unwrap();
        client.wait().unwrap();
    }
    event(&["spice-client-disconnected"]);
    assert!(guest.ctl(&["quit"]).status.success());
    let (status, _, errors) = guest.end();
    assert!(status.success(), "{errors}");
    assert!(events.wait().unwrap().success());
    assert!(!Path::new(&socket).exists());
    assert!(!errors.contains("sesame"), "{errors}");
}

#[test]
fn errors_come_before_the_guest_and_name_the_option() {
    let run = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_drago-vmm"))
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    assert!(run(&["--kernel", "x", "--memory", "8"]).contains("--memory 8"));
    assert!(run(&["--kernel", "x", "--cpus", "0"]).contains("--cpus 0"));
    assert!(run(&["--kernel", "x", "stray"]).contains("stray"));
    assert!(run(&["--memory", "64"]).contains("--kernel"));
    if no_kvm("errors_come_before_the_guest_and_name_the_option") {
        return;
    }
    assert!(Path::new("/dev/kvm").exists());
    let missing = run(&["--kernel", "/nonexistent/vmlinuz"]);
    assert!(missing.contains("--kernel /nonexistent/vmlinuz"), "{missing}");
    assert!(missing.contains("caused by"), "{missing}");
}
