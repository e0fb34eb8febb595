//! `cargo xtask bench --io-only`: disks, networks and shared folders on drago-vmm and on QEMU (q35) in the
//! nested-KVM test host; and how long a systemd guest takes to report that it is ready, and to go when its
//! power button is pressed.
//!
//! Both machines run at the same time and are measured in turns, figure by figure, and what counts is the
//! median of the rounds' ratios: what else this machine does changes more from minute to minute than they
//! differ.
//!
//! What is measured with is fio and iperf3 from the store of the NixOS-shaped guest, which the minimal
//! guest mounts: that one boots in seconds.

use std::{
    collections::BTreeMap,
    io::Write,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use drago_tests::{
    console::Console,
    cpio::Archive,
    debian::Release,
    guest::{DEBIAN, Guest, Nixos, Shape, Store},
    modules::{self, ModuleTree},
    paths,
    progress::{note, step},
    testbed::{Options, RemoteChild, Stream, Testbed},
};
use serde_json::{Value, json};

use crate::{bench::pss_mib, bench_gpu::median, build};

const PATIENCE: Duration = Duration::from_secs(240);
const PROMPT: &str = "minimal# ";
const MEMORY_MIB: u32 = 512;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Part {
    /// A raw file as a disk
    Disk,
    /// A shared folder
    Fs,
    /// A tap interface served by the VMM
    Tap,
    /// A tap interface served by the kernel
    Vhost,
    /// User networking by passt
    Passt,
    /// A systemd guest: until it is ready, until it is gone
    Life,
}

const PARTS: [Part; 6] = [Part::Disk, Part::Fs, Part::Tap, Part::Vhost, Part::Passt, Part::Life];

/// One figure: its name, and what the guest's script is told.
const MEASURES: &[(Part, &str, &str)] = &[
    (Part::Disk, "disk randread 4k, iops", "disk randread 4k"),
    (Part::Disk, "disk randwrite 4k, iops", "disk randwrite 4k"),
    (Part::Disk, "disk read 1M, MB/s", "disk read 1M"),
    (Part::Disk, "disk write 1M, MB/s", "disk write 1M"),
    (Part::Fs, "virtiofs read 1M, MB/s", "fs read 1M"),
    (Part::Fs, "virtiofs randread 4k, iops", "fs randread 4k --direct=1"),
    (Part::Fs, "virtiofs write 1M, MB/s", "fs write 1M"),
    (Part::Tap, "tap out, 1 stream, Mbit/s", "net 02:00:00:00:00:01 TAP.1 TAP.2 -P1"),
    (Part::Tap, "tap in, 1 stream, Mbit/s", "net 02:00:00:00:00:01 TAP.1 TAP.2 -P1 -R"),
    (Part::Tap, "tap out, 4 streams, Mbit/s", "net 02:00:00:00:00:01 TAP.1 TAP.2 -P4"),
    (Part::Tap, "tap in, 4 streams, Mbit/s", "net 02:00:00:00:00:01 TAP.1 TAP.2 -P4 -R"),
    (Part::Vhost, "vhost out, 1 stream, Mbit/s", "net 02:00:00:00:00:02 VHOST.1 VHOST.2 -P1"),
    (Part::Vhost, "vhost in, 1 stream, Mbit/s", "net 02:00:00:00:00:02 VHOST.1 VHOST.2 -P1 -R"),
    (Part::Vhost, "vhost out, 4 streams, Mbit/s", "net 02:00:00:00:00:02 VHOST.1 VHOST.2 -P4"),
    (Part::Vhost, "vhost in, 4 streams, Mbit/s", "net 02:00:00:00:00:02 VHOST.1 VHOST.2 -P4 -R"),
    (Part::Passt, "passt out, 1 stream, Mbit/s", "net 02:00:00:00:00:03 10.0.2.15 10.0.2.2 -P1"),
    (Part::Passt, "passt in, 1 stream, Mbit/s", "net 02:00:00:00:00:03 10.0.2.15 10.0.2.2 -P1 -R"),
    (Part::Passt, "passt out, 4 streams, Mbit/s", "net 02:00:00:00:00:03 10.0.2.15 10.0.2.2 -P4"),
    (Part::Passt, "passt in, 4 streams, Mbit/s", "net 02:00:00:00:00:03 10.0.2.15 10.0.2.2 -P4 -R"),
];

/// The figures for which more is better; of the others less is.
fn more_is_better(name: &str) -> bool {
    name.ends_with("/s") || name.ends_with("iops")
}

/// In the test host: what both sides need. The disk's file system is in memory, and so is what it is on:
/// writing it back costs as little as can be.
const PREPARE: &str = "\
    mkdir -p -m 777 /run/b && mkdir -p /run/b/share /run/b/d && cd /run/b && \
    truncate -s 600M image && mkfs.ext4 -q image && mount -o loop image d && \
    for n in 0 1; do dd if=/dev/zero of=d/disk$n bs=1M count=192 status=none; done && \
    dd if=/dev/zero of=share/file bs=1M count=128 status=none && sync && \
    mount -t debugfs d /sys/kernel/debug 2>/dev/null; \
    for n in 0 1 3 4; do ip tuntap add dev tap$n mode tap vnet_hdr && \
    ip addr add 10.0.$n.2/24 dev tap$n && ip link set tap$n up || exit 1; done; \
    (setsid iperf3 --server --bind 0.0.0.0 --logfile /run/b/iperf3.log >/dev/null 2>&1 </dev/null &); \
    n=0; until ss -ltn | grep -q :5201; do n=$((n + 1)); sleep 0.1; \
    [ $n -lt 100 ] || { ip addr; cat iperf3.log; exit 1; }; done";

/// In the minimal guest: `/bench/run WHAT…`.
const SCRIPT: &str = r#"#!/bin/sh
r=/bench/root
if [ ! -d $r ]; then
    while read -r module; do insmod "/bench/$module"; done </bench/order
    mkdir -p $r /bench/store
    mount -t erofs -o ro /dev/vda /bench/store
    mount -t tmpfs root $r
    for dir in usr dev proc sys tmp mnt; do mkdir $r/$dir; done
    for dir in bin sbin lib lib64; do ln -s usr/$dir $r/$dir; done
    mount --bind "/bench/store/DEBIAN/usr" $r/usr
    for dir in dev proc sys; do mount --bind /$dir $r/$dir; done
    mount -t virtiofs share $r/mnt
    for net in /sys/class/net/*; do ip addr flush dev "${net##*/}"; done
    ip addr add 127.0.0.1/8 dev lo
fi
what=$1
shift
job() {
    rw=$1
    bs=$2
    shift 2
    chroot $r fio --thread --name=t --rw="$rw" --bs="$bs" --runtime=2 --time_based --minimal "$@" | cut -d';' -f1,7,8,48,49
}
case $what in
setup) chroot $r fio --version && chroot $r iperf3 --version && echo "set up" ;;
disk) job "$1" "$2" --filename=/dev/vdb --size=160M --direct=1 --ioengine=libaio --iodepth=16 ;;
fs)
    file=/mnt/file
    [ "$1" = write ] && file=/mnt/out
    job "$1" "$2" --filename=$file --size=96M --invalidate=1 "${3:---direct=0}"
    ;;
net)
    for net in /sys/class/net/*; do
        [ "$(cat "$net/address")" = "$1" ] || continue
        net=${net##*/}
        ip addr flush dev "$net"
        ip addr add "$2/24" dev "$net"
        ip link set "$net" up
    done
    host=$3
    shift 3
    ping -c 1 -w 5 "$host" >/dev/null 2>&1
    chroot $r iperf3 --client "$host" --time 2 --omit 1 --format m "$@" | grep receiver
    ;;
esac
"#;

/// The figure in what a command printed.
fn figure(name: &str, text: &str) -> Result<f64> {
    let missing = || format!("no figure for {name} in: {text}");
    if name.ends_with("Mbit/s") {
        let line = text.lines().rfind(|line| line.contains("receiver")).with_context(missing)?;
        let before = line.split("Mbits/sec").next().unwrap_or_default();
        return before
            .split_whitespace()
            .last()
            .with_context(missing)?
            .parse()
            .with_context(missing);
    }
    // Of fio's terse format, version 3: bandwidth (KiB/s) and operations of reads, then of writes.
    let line = text.lines().rfind(|line| line.starts_with("3;")).with_context(missing)?;
    let fields: Vec<&str> = line.split(';').collect();
    let at = |index: usize| -> Result<f64> {
        fields.get(index).with_context(missing)?.parse().with_context(missing)
    };
    let write = name.contains("write");
    if name.ends_with("iops") {
        at(if write { 4 } else { 2 })
    } else {
        Ok(at(if write { 3 } else { 1 })? * 1024.0 / 1e6)
    }
}

/// The minimal guest and what it measures with.
fn guest(folder: &Path) -> Result<Guest> {
    let minimal = Guest::minimal()?;
    let kernel = Release::open("trixie")?.kernel("linux-image-amd64")?;
    let mut archive = Archive::new(std::fs::read(&minimal.initrd)?);
    archive.dir("bench")?;
    archive.file("bench/run", 0o755, SCRIPT.replace("DEBIAN", DEBIAN).as_bytes())?;
    let tree = ModuleTree::open(&kernel.root, &kernel.version)?;
    modules::pack(&mut archive, "bench", &tree.closure(&["crc32c_generic", "erofs"])?)?;
    let initrd = folder.join("io.cpio");
    std::fs::write(&initrd, archive.finish()?)?;
    Ok(Guest { initrd, cmdline: "console=ttyS0 mitigations=off quiet".to_owned(), ..minimal })
}

struct Bench {
    host: Testbed,
    guest: Guest,
    nixos: Nixos,
    nixos_initrd: PathBuf,
    vmm: String,
    cpus: u32,
}

/// A machine with everything attached.
struct Machine<'a> {
    drago: bool,
    host: &'a Testbed,
    child: RemoteChild,
    serial: Console,
    log: Console,
}

/// What was measured: of each figure ours and QEMU's.
type Seen = BTreeMap<String, [Vec<f64>; 2]>;

impl Machine<'_> {
    /// Runs a command in the guest.
    fn guest(&mut self, command: &str) -> Result<String> {
        let said = self.serial.shell(&mut self.child.stdin(), command, PATIENCE);
        said.with_context(|| format!("standard error: {}", self.log.since(0)))
    }

    /// A command that says which process it is.
    fn process(&self) -> &'static str {
        if self.drago { "pgrep -o drago-vmm" } else { "pgrep -o qemu-system" }
    }

    /// What it took so far: exits of the guest; of these instructions that KVM had to carry out (nearly all
    /// of them notifications of the driver's) and halts; interrupts; and the VMM's processor time without
    /// the guest's, in seconds.
    fn cost(&self) -> Result<[f64; 5]> {
        let script = format!(
            "p=$({}); cd /sys/kernel/debug/kvm/$p-* && \
             cat exits insn_emulation halt_exits irq_injections; cat /proc/$p/stat",
            self.process()
        );
        let said = self.host.shell(&script)?;
        let lines: Vec<&str> = said.lines().collect();
        let &[exits, instructions, halts, interrupts, stat] = &lines[..] else {
            bail!("the machine is gone: {said}")
        };
        let stat = stat.rsplit_once(')').context("no process")?.1;
        // proc(5): the 14th, the 15th and the 43rd field, counted from behind the name.
        let fields: Vec<f64> =
            stat.split_whitespace().map(|field| field.parse().unwrap_or_default()).collect();
        let at = |index: usize| fields.get(index - 3).copied().unwrap_or_default();
        let seconds = (at(14) + at(15) - at(43)) / 100.0;
        Ok([exits.parse()?, instructions.parse()?, halts.parse()?, interrupts.parse()?, seconds])
    }

    /// Proportional set size without mappings that are the guest's RAM, in MiB.
    fn memory(&self) -> Result<f64> {
        pss_mib(self.host, &format!("$({})", self.process()), MEMORY_MIB)
    }

    /// One figure.
    fn measure(&mut self, name: &str, what: &str) -> Result<f64> {
        let [tap, vhost] = if self.drago { ["10.0.0", "10.0.1"] } else { ["10.0.3", "10.0.4"] };
        let what = what.replace("TAP", tap).replace("VHOST", vhost);
        let before = self.cost()?;
        let said = self.guest(&format!("/bench/run {what}"))?;
        let after = self.cost()?;
        let value = figure(name, &said)?;
        let [exits, kicks, halts, interrupts, seconds] =
            std::array::from_fn(|index| after[index] - before[index]);
        note(format_args!(
            "{:<10} {name:<30} {value:>10.1}   exits {exits:>6.0} (kicks {kicks:>6.0}, \
             halts {halts:>6.0}), interrupts {interrupts:>6.0}, VMM {seconds:>5.2} s",
            if self.drago { "drago-vmm" } else { "QEMU" },
        ));
        Ok(value)
    }
}

impl Bench {
    fn qemu(&self) -> String {
        format!(
            "qemu-system-x86_64 -accel kvm -cpu host -M q35 -nodefaults -no-user-config \
             -display none -serial stdio -no-reboot -device virtio-rng-pci -m {MEMORY_MIB} -smp {} \
             -object memory-backend-memfd,id=ram,size={MEMORY_MIB}M,share=on -numa node,memdev=ram",
            self.cpus
        )
    }

    /// A machine with all devices, whichever part is measured.
    fn command(&self, drago: bool) -> String {
        let guest = &self.guest;
        let (kernel, initrd) = (guest.kernel.display(), guest.initrd.display());
        let (cmdline, store) = (&guest.cmdline, self.nixos.store());
        let store = store.display();
        let socket = if drago { "fs0" } else { "fs1" };
        let share = format!(
            "rm -f {socket}; setsid /usr/lib/qemu/virtiofsd --socket-path=/run/b/{socket} \
             -o source=/run/b/share -o sandbox=chroot >/dev/null 2>&1 </dev/null & \
             until [ -S /run/b/{socket} ]; do sleep 0.1; done"
        );
        if drago {
            return format!(
                "cd /run/b; {share}; exec {} --kernel {kernel} --initrd {initrd} \
                 --memory {MEMORY_MIB} --cpus {} --cmdline '{cmdline}' --control control \
                 --disk path={store},ro=on --disk path=d/disk0 --fs tag=share,socket=fs0 \
                 --net tap=tap0,mac=02:00:00:00:00:01 \
                 --net tap=tap1,mac=02:00:00:00:00:02,vhost=on \
                 --net user,mac=02:00:00:00:00:03",
                self.vmm, self.cpus
            );
        }
        // passt and its MTU as ours are, and the disk as microvm.nix has it.
        format!(
            "cd /run/b; {share}; rm -f passt; setsid passt --foreground --quiet --socket passt \
             --mac-addr 9a:55:9a:55:9a:55 --address 10.0.2.15 --netmask 24 --gateway 10.0.2.2 \
             --mtu 65520 >/dev/null 2>&1 </dev/null & until [ -S passt ]; do sleep 0.1; done; \
             exec {} -kernel {kernel} -initrd {initrd} -append '{cmdline}' \
             -drive file={store},format=raw,if=none,id=s,readonly=on,file.locking=off \
             -device virtio-blk-pci,drive=s \
             -drive file=d/disk1,format=raw,if=none,id=d,aio=io_uring,discard=unmap \
             -device virtio-blk-pci,drive=d \
             -chardev socket,id=f,path=fs1 -device vhost-user-fs-pci,chardev=f,tag=share \
             -netdev tap,id=n0,ifname=tap3,script=no,downscript=no \
             -device virtio-net-pci,netdev=n0,mac=02:00:00:00:00:01,romfile= \
             -netdev tap,id=n1,ifname=tap4,script=no,downscript=no,vhost=on \
             -device virtio-net-pci,netdev=n1,mac=02:00:00:00:00:02,romfile= \
             -netdev stream,id=n2,server=off,addr.type=unix,addr.path=passt \
             -device virtio-net-pci,netdev=n2,mac=02:00:00:00:00:03,host_mtu=65520,romfile=",
            self.qemu()
        )
    }

    fn start(&self, drago: bool) -> Result<Machine<'_>> {
        let (serial, log) = (Console::default(), Console::default());
        let (to_serial, to_log) = (serial.clone(), log.clone());
        let child = self.host.command("sh").args(["-c", &self.command(drago)]).spawn(
            move |stream, bytes| match stream {
                Stream::Out => to_serial.push(bytes),
                Stream::Err => to_log.push(bytes),
            },
        )?;
        let mut machine = Machine { drago, host: &self.host, child, serial, log };
        let said = || format!("standard error: {}", machine.log.since(0));
        machine.serial.wait_for(0, PROMPT, PATIENCE).with_context(said)?;
        let said = machine.guest("/bench/run setup")?;
        ensure!(said.ends_with("set up"), "the guest cannot be set up: {said}");
        Ok(machine)
    }

    /// Measures both machines, figure by figure.
    fn devices(&self, rounds: usize, parts: &[Part], seen: &mut Seen) -> Result<()> {
        let mut machines = [self.start(true)?, self.start(false)?];
        for round in 1..=rounds {
            note(format_args!("round {round} of {rounds}, load {}", load()));
            for (part, name, what) in MEASURES {
                if !parts.contains(part) {
                    continue;
                }
                // Not always the same one first.
                let turns = if round % 2 == 0 { [1, 0] } else { [0, 1] };
                let mut pair = [None; 2];
                for side in turns {
                    let Some(machine) = machines.get_mut(side) else { continue };
                    match machine.measure(name, what) {
                        Ok(value) => pair[side] = Some(value),
                        // The others are worth something without it. A guest that the emulator led
                        // astray (docs/testing.md) is not one to measure any more.
                        Err(error) => {
                            note(format_args!("{error:#}; another machine takes its place"));
                            machine.child.signal(9)?;
                            machine.child.wait_timeout(PATIENCE)?;
                            *machine = self.start(side == 0)?;
                        }
                    }
                }
                if let [Some(ours), Some(theirs)] = pair {
                    let [mine, other] = seen.entry((*name).to_owned()).or_default();
                    mine.push(ours);
                    other.push(theirs);
                }
            }
        }
        for (side, machine) in machines.iter_mut().enumerate() {
            let memory = machine.memory()?;
            seen.entry("memory without the guest's, MiB".to_owned()).or_default()[side]
                .push(memory);
            machine.child.stdin().write_all(b"poweroff -f\n")?;
            machine.child.wait_timeout(PATIENCE)?;
        }
        self.host.shell("pkill -x passt; pkill -x virtiofsd; true")?;
        Ok(())
    }

    /// The systemd guest, timed by the test host's own clock.
    fn life(&self, drago: bool) -> Result<Vec<(String, f64)>> {
        let kernel = self.nixos.bzimage.display();
        let (store, initrd) = (self.nixos.store(), self.nixos_initrd.display());
        let (store, cmdline) = (store.display(), self.nixos.cmdline());
        let (listen, command, stop) = if drago {
            (
                "socat -u UNIX-RECV:/run/b/notify -".to_owned(),
                format!(
                    "NOTIFY_SOCKET=/run/b/notify {} --kernel {kernel} --initrd {initrd} \
                     --memory {MEMORY_MIB} --cpus {} --cmdline '{cmdline}' --disk path={store},ro=on \
                     --vsock cid=77,notify=on --control control",
                    self.vmm, self.cpus
                ),
                format!("{} ctl --control control shutdown --wait", self.vmm),
            )
        } else {
            (
                "socat -u VSOCK-LISTEN:8888,fork -".to_owned(),
                format!(
                    "{} -kernel {kernel} -initrd {initrd} -append '{cmdline}' \
                     -drive file={store},format=raw,if=none,id=s,readonly=on \
                     -device virtio-blk-pci,drive=s -device vhost-vsock-pci,guest-cid=78 \
                     -smbios type=11,value=io.systemd.credential:vmm.notify_socket=vsock-stream:2:8888 \
                     -qmp unix:qmp,server=on,wait=off",
                    self.qemu()
                ),
                "printf '{\"execute\":\"qmp_capabilities\"}\\n{\"execute\":\"system_powerdown\"}\\n' | \
                 socat -t 60 - UNIX-CONNECT:qmp >/dev/null"
                    .to_owned(),
            )
        };
        let said = self.host.shell(&format!(
            "cd /run/b; rm -f notify ready; \
                 ({listen} & echo $! >listener; wait) | \
                 {{ grep -a -q -m1 READY=1 && date +%s%N >ready; }} & \
                 sleep 1; begin=$(date +%s%N); {command} >serial 2>log </dev/null & vmm=$!; \
                 n=0; until [ -s ready ]; do sleep 0.5; n=$((n + 1)); \
                 [ $n -lt 400 ] && kill -0 $vmm || {{ tail -n 40 serial log; exit 1; }}; done; \
                 kill $(cat listener); sleep 8; down=$(date +%s%N); {stop} || exit 1; wait $vmm; \
                 echo $? $(($(cat ready) - begin)) $(($(date +%s%N) - down))"
        ))?;
        let line = said.lines().last().unwrap_or_default();
        let numbers: Vec<f64> = line
            .split_whitespace()
            .map(str::parse)
            .collect::<Result<_, _>>()
            .context(said.clone())?;
        let [status, ready, gone] = numbers[..] else { bail!("three numbers expected: {said}") };
        ensure!(status == 0.0, "ended with {status}");
        let figures = vec![
            ("exec to READY=1, s".to_owned(), ready / 1e9),
            ("power button to end, s".to_owned(), gone / 1e9),
        ];
        for (name, value) in &figures {
            note(format_args!("{name:<30} {value:>10.2}"));
        }
        Ok(figures)
    }
}

fn load() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or_default().to_owned()
}

/// Runs `parts`, or all if there are none.
pub(crate) fn run(rounds: usize, cpus: u32, parts: &[Part]) -> Result<Value> {
    let parts = if parts.is_empty() { &PARTS } else { parts };
    let vmm = match std::env::var_os("DRAGO_PROGRAMS") {
        Some(folder) => PathBuf::from(folder).join("drago-vmm"),
        None => build::vmm()?,
    };
    let folder = paths::cache("bench")?;
    let nixos = Nixos::new()?;
    let shape = Shape { store: Store::Label, writable: false, output: None };
    let nixos_initrd = nixos.initrd(&shape, &folder)?;
    let guest = guest(&folder)?;
    let host = Testbed::boot(&Options::new(build::agent()?))?;
    host.shell(PREPARE)?;
    let vmm = vmm.display().to_string();
    let bench = Bench { host, guest, nixos, nixos_initrd, vmm, cpus };
    let mut seen = Seen::new();
    if parts.iter().any(|part| *part != Part::Life) {
        bench.devices(rounds, parts, &mut seen)?;
    }
    if parts.contains(&Part::Life) {
        for round in 1..=rounds {
            for side in if round % 2 == 0 { [1, 0] } else { [0, 1] } {
                let name = if side == 0 { "drago-vmm" } else { "QEMU" };
                let name = format!("round {round}: {name} (load {})", load());
                for (name, value) in step(name, || bench.life(side == 0))? {
                    seen.entry(name).or_default()[side].push(value);
                }
            }
        }
    }
    let mut rows = serde_json::Map::new();
    note(format_args!("{:<32} {:>10} {:>10} {:>7}", "", "drago-vmm", "QEMU", "ratio"));
    for (name, [ours, theirs]) in &seen {
        let middle = |values: &[f64]| median(values.to_vec()).unwrap_or(f64::NAN);
        let (mine, other) = (middle(ours), middle(theirs));
        // The two of a round met the same machine.
        let ratios = ours.iter().zip(theirs);
        let ratios: Vec<f64> = ratios
            .map(|(mine, other)| if more_is_better(name) { mine / other } else { other / mine })
            .collect();
        let ratio = middle(&ratios);
        note(format_args!("{name:<32} {mine:>10.1} {other:>10.1} {ratio:>7.2}"));
        rows.insert(
            name.clone(),
            json!({ "drago": ours, "qemu": theirs, "median_of_ratios": ratio }),
        );
    }
    note(format_args!("load {}", load()));
    Ok(Value::Object(rows))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_found() {
        let one = "[  5]   0.00-4.00   sec  1.2 GBytes  2500 Mbits/sec        receiver";
        assert_eq!(figure("tap out, Mbit/s", one).unwrap(), 2500.0);
        let four = format!("{one}\n[SUM]   0.00-4.00   sec  3 GBytes  6001 Mbits/sec    receiver");
        assert_eq!(figure("tap out, Mbit/s", &four).unwrap(), 6001.0);
        let terse = "3;1000;250;2000;500";
        assert_eq!(figure("disk randread 4k, iops", terse).unwrap(), 250.0);
        assert_eq!(figure("disk randwrite 4k, iops", terse).unwrap(), 500.0);
        assert_eq!(figure("disk write 1M, MB/s", terse).unwrap(), 2.048);
        assert!(figure("x, iops", "fio: no such file").is_err());
    }
}
