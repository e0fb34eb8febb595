//! The nested suite of devices that are passed through: the test host has an IOMMU (of Intel's kind,
//! emulated by QEMU), an NVMe disk and an Intel network card for the guest.
//!
//! Run by `cargo xtask test --suite nested`; needs the test host, so every test is `#[ignore]`d by default.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use drago_tests::guest::Guest;
use drago_tests::vm::{Host, PATIENCE, Vm};

const PROMPT: &str = "minimal# ";
/// What the test host calls them.
const DISK: &str = "0000:00:10.0";
const CARD: &str = "0000:00:11.0";
/// Behind a bridge of the old kind, which makes one IOMMU group of all that is behind it.
const SHARED: &str = "0000:01:01.0";
const SIBLING: &str = "0000:01:02.0 (virtio-pci)";
const BLOCK: u64 = 4096;
const BLOCKS: u64 = 4096;

struct Rig {
    host: Host,
    guest: Guest,
    image: tempfile::NamedTempFile,
}

/// What is in a block of the disk.
fn pattern(block: u64) -> Vec<u8> {
    (0..BLOCK / 8).flat_map(|word| (block << 32 | word).to_le_bytes()).collect()
}

/// One test host for all tests, which take turns in it.
fn rig() -> MutexGuard<'static, Rig> {
    static RIG: OnceLock<Mutex<Rig>> = OnceLock::new();
    RIG.get_or_init(|| {
        let guest = Guest::passthrough().unwrap();
        let mut image = tempfile::NamedTempFile::new().unwrap();
        for block in 0..BLOCKS {
            image.write_all(&pattern(block)).unwrap();
        }
        let devices = [
            format!("-drive if=none,id=spare,format=raw,file={}", image.path().display()),
            "-device nvme,drive=spare,serial=spare,addr=0x10".to_owned(),
            "-netdev user,id=spare -device e1000e,netdev=spare,addr=0x11".to_owned(),
            "-device pcie-pci-bridge,id=bridge,addr=0x12".to_owned(),
            "-device virtio-balloon-pci,bus=bridge,addr=1".to_owned(),
            "-device virtio-serial-pci,bus=bridge,addr=2".to_owned(),
        ];
        let devices = devices.iter().flat_map(|text| text.split(' ')).map(str::to_owned).collect();
        let agent = Path::new(env!("CARGO_BIN_EXE_drago-testbed-agent"));
        let host = Host::boot_with_spare_devices("vfio", agent, 3072, devices).unwrap();
        Mutex::new(Rig { host, guest, image })
    })
    .lock()
    .unwrap_or_else(PoisonError::into_inner)
}

fn run(host: &Host, script: &str) -> String {
    host.shell(script).unwrap()
}

/// What our own message tells people to do.
fn bind(host: &Host, address: &str) {
    run(
        host,
        &format!(
            "echo vfio-pci >/sys/bus/pci/devices/{address}/driver_override; \
             echo {address} >/sys/bus/pci/drivers_probe; \
             [ -e /sys/bus/pci/drivers/vfio-pci/{address} ]"
        ),
    );
}

/// drago-vmm as a user who may do nothing but what the files' owners and the limit say.
const NOBODY: &str = "setpriv --reuid 65534 --regid 65534 --clear-groups --no-new-privs";

fn booted(rig: &Rig, name: &str, options: &[&str]) -> Vm {
    let (guest, host) = (&rig.guest, &rig.host);
    let command = host
        .command("prlimit")
        .arg("--memlock=unlimited")
        .args(NOBODY.split(' '))
        .arg(host.program("drago-vmm"))
        .args(["--kernel", &guest.kernel.display().to_string()])
        .args(["--initrd", &guest.initrd.display().to_string()])
        .args(["--cmdline", &guest.cmdline, "--memory", "256"])
        .args(options.iter().copied());
    let vm = host.spawn(name, command).unwrap();
    vm.serial
        .wait_for(0, PROMPT, PATIENCE)
        .unwrap_or_else(|error| panic!("{error}\n{}", vm.state()));
    vm.serial_command("for m in $(cat /passthrough/order); do insmod /passthrough/$m; done")
        .unwrap();
    vm
}

/// Lets everybody use a device that is bound to vfio-pci.
fn give_away(host: &Host, address: &str) {
    let group = format!("$(basename $(readlink /sys/bus/pci/devices/{address}/iommu_group))");
    run(host, &format!("chown 65534 /dev/vfio/{group}"));
}

/// What drago-vmm says when it does not start.
fn refused(rig: &Rig, way: &str, options: &str) -> String {
    let out = rig.host.run(&format!(
        "timeout 60 {way} {} --kernel {} {options} </dev/null",
        rig.host.program("drago-vmm"),
        rig.guest.kernel.display()
    ));
    let out = out.unwrap();
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.code, 1, "{said}");
    println!("{options}: {said}");
    said
}

/// How many interrupts whose names contain `name` the guest has had, and by how many message
/// signalled vectors.
fn interrupts(vm: &Vm, name: &str) -> (u64, usize) {
    // The quotes keep awk's word from being taken for the end of the command.
    let script = format!(
        "grep MSI /proc/interrupts | grep {name} | \
         awk '{{n=0; for (i=2; $i ~ /^[0-9]+$/; i++) n+=$i; s+=n; v+=1}} E''ND {{print s+0, v+0}}'"
    );
    let text = vm.serial_command(&script).unwrap();
    let (count, vectors) = text.split_once(' ').unwrap();
    (count.parse().unwrap(), vectors.parse().unwrap())
}

#[test]
#[ignore = "nested"]
fn a_disk_and_a_network_card_of_the_host_work_in_the_guest() {
    let rig = rig();
    bind(&rig.host, DISK);
    bind(&rig.host, CARD);
    give_away(&rig.host, DISK);
    give_away(&rig.host, CARD);
    let devices = format!("{DISK},/sys/bus/pci/devices/{CARD}");
    let mut vm = booted(&rig, "devices", &["--vfio", &devices, "--cpus", "2"]);
    println!("{}", vm.serial_command("cat /sys/bus/pci/devices/*/uevent").unwrap());

    // The disk: what is on it is read, what is written is on it. 16 MiB by DMA both ways.
    vm.serial_command("until [ -b /dev/nvme0n1 ]; do usleep 100000; done").unwrap();
    let sum = |blocks: std::ops::Range<u64>| {
        let mut child = std::process::Command::new("md5sum")
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        blocks.for_each(|block| stdin.write_all(&pattern(block)).unwrap());
        drop(stdin);
        let out = child.wait_with_output().unwrap();
        String::from_utf8(out.stdout).unwrap().split(' ').next().unwrap().to_owned()
    };
    let read = vm.serial_command("md5sum </dev/nvme0n1").unwrap();
    assert_eq!(read.split(' ').next(), Some(sum(0..BLOCKS).as_str()), "{read}\n{}", vm.state());
    vm.serial_command(
        "dd if=/dev/nvme0n1 of=/tmp/blocks bs=4096 skip=1024 count=1024 2>/dev/null; \
         dd if=/tmp/blocks of=/dev/nvme0n1 bs=4096 seek=3072 conv=fsync 2>/dev/null",
    )
    .unwrap();
    let mut written = vec![0; BLOCK as usize];
    let image = File::open(rig.image.path()).unwrap();
    for block in 0..1024 {
        image.read_exact_at(&mut written, (3072 + block) * BLOCK).unwrap();
        assert!(written == pattern(1024 + block), "block {block} is not what the guest wrote");
    }
    let (count, vectors) = interrupts(&vm, "nvme");
    println!("NVMe: {count} interrupts by {vectors} vectors");
    assert!(count > 8 && vectors >= 2, "{count} interrupts by {vectors} vectors");

    // The card: an address from QEMU's own DHCP server, and its gateway answers.
    let card =
        vm.serial_command("for n in /sys/class/net/*; do [ -e $n/device ] && basename $n; done");
    let card = card.unwrap();
    let script = format!(
        "ip link set {card} up; udhcpc -i {card} -q -n -t 20 -s /etc/udhcpc.sh 2>&1; \
         ping -c 3 10.0.2.2"
    );
    let said = vm.serial_command(&script).unwrap();
    assert!(said.contains("3 packets received"), "{said}\n{}", vm.state());
    let (count, vectors) = interrupts(&vm, &card);
    println!("{card}: {count} interrupts by {vectors} vectors");
    assert!(count > 8 && vectors >= 2, "{count} interrupts by {vectors} vectors");

    vm.type_serial("poweroff").unwrap();
    assert_eq!(vm.wait().unwrap(), 0, "{}", vm.state());
    // The host has them back.
    run(&rig.host, "dmesg | tail -30 >&2; ! dmesg | grep -E 'fault addr|BUG|Oops'");
}

#[test]
#[ignore = "nested"]
fn what_is_in_the_way_is_told() {
    let rig = rig();
    let says = |way: &str, address: &str, words: &[&str]| {
        let said = refused(&rig, way, &format!("--vfio {address}"));
        for word in [&[address], words].concat() {
            assert!(said.contains(word), "no '{word}' in: {said}");
        }
    };
    says("", "0000:00:1e.7", &["no such PCI device"]);
    // The commands in the message do what they are to.
    let said = refused(&rig, "", &format!("--vfio {SHARED}"));
    let commands = said.split_once("the host's driver virtio-pci has it; give it to vfio-pci: ");
    run(&rig.host, commands.unwrap_or_else(|| panic!("{said}")).1);
    says("", SHARED, &["as a whole", SIBLING]);
    bind(&rig.host, DISK);
    let nobody = format!("prlimit --memlock=1048576 {NOBODY}");
    run(&rig.host, "chown 0 /dev/vfio/[0-9]*");
    says(&nobody, DISK, &["belongs to somebody else", "chown USER /dev/vfio/"]);
    give_away(&rig.host, DISK);
    says(&nobody, DISK, &["512 MiB", "limit for that is 1 MiB", "LimitMEMLOCK=infinity"]);
}
