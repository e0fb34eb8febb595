//! What microvm.nix asks of a hypervisor, with the minimal guest: memory of huge pages, a shared folder,
//! sockets, readiness, credentials, a tap interface with several queues, the balloon.
//!
//! Run by `cargo xtask test --suite nested`; needs the test host, so every test is `#[ignore]`d by default.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::Command,
};

use drago_tests::{
    console::Console,
    guest::Guest,
    testbed::{Options, RemoteChild, Stream, Testbed},
    vm::PATIENCE,
};

const PROMPT: &str = "minimal# ";

/// Starts what `--fs` connects to, after whatever was there before; Debian 12 has the one, later versions
/// the other.
const VIRTIOFSD: &str = "\
    if [ -x /usr/libexec/virtiofsd ]; then \
        set -- /usr/libexec/virtiofsd --socket-path=/run/m/fs --shared-dir=/run/m/share --sandbox=chroot; \
    else \
        set -- /usr/lib/qemu/virtiofsd --socket-path=/run/m/fs -o source=/run/m/share -o sandbox=chroot; \
    fi; \
    rm -f /run/m/fs; \
    setsid \"$@\" >/run/m/virtiofsd.log 2>&1 </dev/null & echo $! >/run/m/virtiofsd.pid; \
    until [ -S /run/m/fs ]; do sleep 0.1; done";

struct Machine {
    host: Testbed,
    child: RemoteChild,
    serial: Console,
    log: Console,
}

impl Machine {
    /// Runs a shell script in the test host.
    fn host(&self, script: &str) -> String {
        shell(&self.host, script)
    }

    /// Waits until a shell command succeeds in the test host.
    fn until(&self, condition: &str) {
        let tries = PATIENCE.as_millis() / 100;
        self.host(&format!(
            "for n in $(seq {tries}); do if {condition}; then exit 0; fi; sleep 0.1; done; \
             cat /proc/meminfo; exit 1"
        ));
    }

    /// Runs a command in the guest.
    fn guest(&mut self, command: &str) -> String {
        let said = self.serial.shell(&mut self.child.stdin(), command, PATIENCE);
        said.unwrap_or_else(|error| panic!("{error}\n{}", self.log.since(0)))
    }
}

fn shell(host: &Testbed, script: &str) -> String {
    host.shell(script).unwrap()
}

/// Compiles a program of `tests/guest`, to run in the guest.
fn compile(name: &str, folder: &Path) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest").join(format!("{name}.c"));
    let status = Command::new("cc")
        .args(["-static", "-Os", "-Wall", "-Werror", "-o"])
        .arg(folder.join(name))
        .arg(source)
        .status()
        .unwrap();
    assert!(status.success());
}

/// Free huge pages of the test host that no program has reserved.
const FREE_PAGES: &str = "awk '/^HugePages_Free/ { free = $2 } /^HugePages_Rsvd/ { rsvd = $2 } \
                          END { print free - rsvd }' /proc/meminfo";

/// Takes nearly all of the guest's memory by the balloon, lets the guest need most of it, and free it again.
fn memory_follows_the_guest(vm: &mut Machine, ctl: &str) {
    let number = |text: String| text.parse::<u64>().unwrap_or_else(|_| panic!("{text:?}"));
    let free = number(vm.guest("awk '/^MemAvailable/ { print int($2 / 1024) }' /proc/meminfo"));
    let (balloon, file) = (free - 32, free * 2 / 3);
    vm.host(&format!("{ctl} balloon {balloon}"));
    vm.until(&format!("[ \"$({ctl} balloon)\" = {balloon} ]"));
    let left = number(vm.guest("awk '/^MemFree/ { print int($2 / 1024) }' /proc/meminfo"));
    assert!(left + 32 < file, "{left} of {free} MiB are left");

    // The guest takes it back rather than end a program.
    vm.guest("mkdir /full; mount -t tmpfs -o size=100% full /full");
    let said = vm.guest(&format!(
        "dd if=/dev/zero of=/full/much bs=1M count={file} 2>/dev/null && stat -c %s /full/much; \
         awk '/^oom_kill / {{ print $2 }}' /proc/vmstat"
    ));
    assert_eq!(said, format!("{}\n0", file << 20));
    let kept = number(vm.host(&format!("{ctl} balloon")));
    assert!(kept + 32 <= balloon, "{kept} of {balloon} MiB in the balloon, {file} in the file");

    // What the guest frees is the host's again, without anybody asking: less is taken than the file had.
    let taken = |vm: &Machine| 2 * (128 - number(vm.host(FREE_PAGES)));
    assert_eq!(vm.host(&format!("{ctl} balloon 0")), "0");
    assert!(taken(vm) >= file, "{} MiB are taken", taken(vm));
    vm.guest("rm /full/much");
    vm.until(&format!("[ \"$({FREE_PAGES})\" -gt {} ]", 128 - file / 2));
}

/// Upstream's checks run inside machines whose processor is `kvm64`: no SSE 4, no XSAVE, no AVX, no
/// invariant TSC. (It needs AMD's name here, without which Linux does not use SVM.)
#[test]
#[ignore = "nested"]
fn a_guest_starts_on_a_poor_processor() {
    let guest = Guest::minimal().unwrap();
    let agent = Path::new(env!("CARGO_BIN_EXE_drago-testbed-agent"));
    let programs =
        std::env::var_os("DRAGO_PROGRAMS").map_or(agent.parent().unwrap().into(), PathBuf::from);
    let mut options = Options::new(agent.to_path_buf());
    options.memory_mib = 2048;
    options.cpu = "kvm64,vendor=AuthenticAMD,+svm,+npt".to_owned();
    let host = Testbed::boot(&options).unwrap();
    let has = shell(&host, "grep -m1 ^flags /proc/cpuinfo");
    let poor = |flags: &str| {
        assert!(flags.split_whitespace().any(|flag| flag == "sse2"), "{flags}");
        for flag in ["sse4_1", "xsave", "avx", "rdrand", "constant_tsc"] {
            assert!(!flags.split_whitespace().any(|own| own == flag), "{flag}: {flags}");
        }
    };
    poor(&has);
    let (serial, log) = (Console::default(), Console::default());
    let (to_serial, to_log) = (serial.clone(), log.clone());
    let child = host
        .command(programs.join("drago-vmm").display().to_string())
        .cwd(Path::new("/run"))
        .args(["--kernel", &guest.kernel.display().to_string()])
        .args(["--initrd", &guest.initrd.display().to_string()])
        .args(["--cmdline", &guest.cmdline, "--memory", "256", "--cpus", "2"])
        .args(["--spice", "127.0.0.1:5900", "--gpu", "2d", "--control", "control"])
        .spawn(move |stream, bytes| match stream {
            Stream::Out => to_serial.push(bytes),
            Stream::Err => to_log.push(bytes),
        })
        .unwrap();
    let mut vm = Machine { host, child, serial, log };
    if let Err(error) = vm.serial.wait_for(0, PROMPT, PATIENCE) {
        panic!("{error}\n{}", vm.log.since(0));
    }
    poor(&vm.guest("grep -m1 ^flags /proc/cpuinfo"));
    assert_eq!(vm.guest("grep -c ^processor /proc/cpuinfo"), "2");
    let clock = vm.guest("cat /sys/devices/system/clocksource/clocksource0/current_clocksource");
    assert_eq!(clock, "kvm-clock");
    // Both processors get their interrupts: a timer of each ends.
    assert_eq!(
        vm.guest("for cpu in 1 2; do taskset $cpu sleep 1 && echo slept; done"),
        "slept\nslept"
    );
    vm.child.stdin().write_all(b"poweroff\n").unwrap();
    assert_eq!(vm.child.wait_timeout(PATIENCE).unwrap(), 0, "{}", vm.log.since(0));
}

#[test]
#[ignore = "nested"]
fn a_guest_has_what_microvm_nix_promises_it() {
    let guest = Guest::minimal().unwrap();
    let agent = Path::new(env!("CARGO_BIN_EXE_drago-testbed-agent"));
    let programs =
        std::env::var_os("DRAGO_PROGRAMS").map_or(agent.parent().unwrap().into(), PathBuf::from);
    let vmm = programs.join("drago-vmm").display().to_string();
    let folder = drago_tests::paths::cache("e2e/microvm").unwrap();
    compile("report", &folder);
    compile("listen", &folder);
    let mut options = Options::new(agent.to_path_buf());
    options.memory_mib = 3072;
    let host = Testbed::boot(&options).unwrap();

    shell(
        &host,
        &format!(
            "sysctl -q vm.nr_hugepages=128 && \
             mkdir -p /run/m/share && cd /run/m && echo from the host >share/hello && \
             cp {0}/report {0}/listen share/ && printf 's3cret\\0' >secret && \
             ip tuntap add dev mtap0 mode tap vnet_hdr multi_queue && \
             ip addr add 10.7.0.1/24 dev mtap0 && ip link set mtap0 up && \
             (setsid socat -u UNIX-RECV:/run/m/notify OPEN:/run/m/told,creat,append \
                 >/dev/null 2>&1 </dev/null &) && \
             until [ -S notify ]; do sleep 0.1; done",
            folder.display()
        ),
    );
    let (serial, log) = (Console::default(), Console::default());
    let (to_serial, to_log) = (serial.clone(), log.clone());
    let kernel = guest.kernel.display().to_string();
    let initrd = guest.initrd.display().to_string();
    let child = host
        .command(&vmm)
        .cwd(Path::new("/run/m"))
        .env("NOTIFY_SOCKET", "/run/m/notify")
        .args(["--kernel", &kernel, "--initrd", &initrd, "--cmdline", &guest.cmdline])
        .args(["--memory", "256", "--hugepages", "--cpus", "2", "--control", "control"])
        .args(["--credential", "test.secret=secret"])
        .args(["--uuid", "6ba7b810-9dad-11d1-80b4-00c04fd430c8"])
        .args(["--vsock", "cid=4242,notify=on"])
        .args(["--fs", "tag=share,socket=fs"])
        .args(["--net", "tap=mtap0,mac=02:00:00:00:00:07,queues=2,vhost=on"])
        .args(["--balloon", "deflate-on-oom=on"])
        .spawn(move |stream, bytes| match stream {
            Stream::Out => to_serial.push(bytes),
            Stream::Err => to_log.push(bytes),
        })
        .unwrap();
    let mut vm = Machine { host, child, serial, log };

    // virtiofsd comes later than the machine.
    vm.log.wait_for(0, "waiting for virtiofsd", PATIENCE).unwrap();
    // All of its memory is the host's huge pages, before the guest runs and reports some of them as free.
    assert_eq!(vm.host("awk '/^HugePages_Total/ { print $2 }' /proc/meminfo"), "128");
    assert_eq!(vm.host(FREE_PAGES), "0");
    vm.host(VIRTIOFSD);
    if let Err(error) = vm.serial.wait_for(0, PROMPT, PATIENCE) {
        panic!("{error}\n{}", vm.log.since(0));
    }

    // Credentials and UUID.
    let strings = vm.guest("strings /sys/firmware/dmi/tables/DMI | grep io.systemd");
    assert!(strings.contains("io.systemd.credential.binary:test.secret=czNjcmV0AA=="), "{strings}");
    let uuid = vm.guest("cat /sys/class/dmi/id/product_uuid");
    assert_eq!(uuid, "6ba7b810-9dad-11d1-80b4-00c04fd430c8");

    // The shared folder, in both directions.
    let said = vm.guest("mkdir /mnt; mount -t virtiofs share /mnt && cat /mnt/hello");
    assert_eq!(said, "from the host");
    vm.guest("echo from the guest >/mnt/back");
    assert_eq!(vm.host("cat /run/m/share/back"), "from the guest");

    // Readiness as systemd reports it, and nothing that is not the guest's business.
    let (_, port) = strings.split_once("vmm.notify_socket=vsock-stream:2:").unwrap();
    let port: u32 = port.split_whitespace().next().unwrap().parse().unwrap();
    let told = vm.host("cat /run/m/told");
    assert!(!told.contains("READY=1"), "{told}");
    vm.guest("printf 'READY=1\\nMAINPID=1' >/tmp/report");
    let said = vm.guest(&format!("/mnt/report {port} \"$(cat /tmp/report)\""));
    assert_eq!(said, "closed");
    let told = vm.host("until grep -q READY=1 /run/m/told; do sleep 0.1; done; cat /run/m/told");
    assert!(!told.contains("MAINPID"), "{told}");

    // The host reaches what listens in the guest, by the number of the machine.
    vm.guest(
        "/mnt/listen 22 'from the guest' >/tmp/heard 2>&1 & \
         until grep -q listening /tmp/heard; do sleep 0.1; done",
    );
    let said = vm.host("echo from the host | socat -t 60 - VSOCK-CONNECT:4242:22");
    assert_eq!(said, "from the guest");
    assert_eq!(vm.guest("wait; cat /tmp/heard"), "listening\nfrom the host");

    // The network, through the kernel and by two pairs of queues.
    let said = vm.guest("ip addr add 10.7.0.2/24 dev eth0; ping -c 3 10.7.0.1");
    assert!(said.contains(" 0% packet loss"), "{said}");
    assert_eq!(vm.guest("ls /sys/class/net/eth0/queues | grep -c rx"), "2");

    // The balloon.
    let ctl = format!("cd /run/m && {vmm} ctl --control control");
    assert_eq!(vm.host(&format!("{ctl} balloon 64")), "64");
    assert_eq!(vm.host(&format!("{ctl} balloon")), "64");
    assert_eq!(vm.host(&format!("{ctl} balloon 0")), "0");
    // What it gave back is memory as any other.
    let said =
        vm.guest("dd if=/dev/zero of=/tmp/much bs=1M count=60 2>/dev/null; md5sum </tmp/much");
    assert_eq!(said, "76c136bc0d680abd978d9934070c01e5  -");
    vm.guest("rm /tmp/much");
    memory_follows_the_guest(&mut vm, &ctl);

    // virtiofsd dies: nothing hangs. It comes back: mounting again works.
    vm.host("kill -9 $(cat /run/m/virtiofsd.pid)");
    vm.log.wait_for(0, "virtiofsd is gone", PATIENCE).unwrap();
    let said = vm.guest("cat /mnt/hello; ls /mnt/nothing");
    assert!(!said.contains("from the host"), "{said}");
    vm.host(VIRTIOFSD);
    vm.log.wait_for(0, "virtiofsd is back", PATIENCE).unwrap();
    let said = vm.guest("umount -l /mnt; mount -t virtiofs share /mnt && cat /mnt/hello");
    assert!(said.ends_with("from the host"), "{said}");

    vm.host(&format!("{ctl} status"));
    vm.child.stdin().write_all(b"poweroff\n").unwrap();
    assert_eq!(vm.child.wait_timeout(PATIENCE).unwrap(), 0, "{}", vm.log.since(0));
    let told = vm.host("cat /run/m/told; ls /run/m");
    assert!(told.contains("STOPPING=1"), "{told}");
    assert!(!told.contains("control"), "the control socket is removed: {told}");
    // Its memory is the host's again, as soon as virtiofsd has noticed.
    vm.until(&format!("[ \"$({FREE_PAGES})\" = 128 ]"));
    // Stopping what is off already.
    vm.host(&format!("{ctl} shutdown --wait"));
}
