//! `cargo xtask bench`: figures against QEMU in the same run, as JSON and as a table.
//!
//! * boot: exec → the guest's init, KVM exits until then, memory without the guest's own, all in the
//!   nested-KVM test host with the same kernel, initrd and memory for every side;
//! * gpu: [`bench_gpu`];
//! * spice: `spice-server/bench/spice_bench.py` on this machine.

use std::{
    fs,
    process::{Command, ExitCode},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use drago_tests::{
    console::Console,
    debian::Release,
    guest::Guest,
    paths,
    progress::{note, step},
    testbed::{Options, RemoteChild, Stream, Testbed},
};
use serde_json::{Value, json};

use crate::{
    bench_gpu, build,
    packages::{self, For},
};

const PATIENCE: Duration = Duration::from_secs(300);
/// A kernel that needs this long has stopped, which happens under nested emulation to every VMM.
const STOPPED: Duration = Duration::from_secs(60);
/// Guests of one side that may stop before the bench is given up.
const MAX_STOPPED: usize = 3;
/// What the minimal guest's init writes first, as a warning so that `loglevel=5` shows it.
const INIT: &str = "minimal-guest: init after";
const PROMPT: &str = "minimal# ";

/// QEMU without what users of microVMs leave out.
const QEMU: &str = "qemu-system-x86_64 -accel kvm -cpu host -nodefaults -no-user-config -display none \
                    -serial stdio -no-reboot";

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Rounds; the figure of a side is the median
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Only the part in the test host
    #[arg(long)]
    boot_only: bool,
    /// Only OpenGL, on this machine
    #[arg(long, conflicts_with = "boot_only")]
    gpu_only: bool,
    /// Kernel whose boot is measured
    #[arg(long, value_enum, default_value_t = Kernel::Cloud)]
    kernel: Kernel,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Kernel {
    /// Debian 12's 6.1 for virtual machines: little but what a VMM causes
    Cloud,
    /// Debian 13's 6.12 for every machine: self-tests and keys take most of its time
    Stock,
}

impl Kernel {
    /// The minimal guest with this kernel.
    fn guest(self) -> Result<Guest> {
        let mut guest = Guest::minimal()?;
        if let Self::Cloud = self {
            guest.kernel = Release::open("bookworm")?.kernel("linux-image-cloud-amd64")?.image;
        }
        Ok(guest)
    }
}

/// One program under measurement.
struct Side {
    name: &'static str,
    command: String,
    /// Processes that make up its memory.
    processes: &'static str,
    display: bool,
}

/// What one run showed.
struct Run {
    seconds: f64,
    exits: f64,
    memory_mib: f64,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    packages::install(For::Bench)?;
    let folder = paths::cache("bench")?;
    if !args.boot_only {
        let gpu = bench_gpu::run(args.rounds.max(1))?;
        fs::write(folder.join("gpu.json"), serde_json::to_string_pretty(&gpu)?)?;
        note(format_args!("written to {}", folder.join("gpu.json").display()));
    }
    if args.gpu_only {
        return Ok(ExitCode::SUCCESS);
    }
    let boot = boot(args.rounds.max(1), args.kernel)?;
    fs::write(folder.join("boot.json"), serde_json::to_string_pretty(&boot)?)?;
    note(format_args!("written to {}", folder.join("boot.json").display()));
    if !args.boot_only {
        let spice = spice()?;
        fs::write(folder.join("spice.json"), &spice)?;
        note(format_args!("written to {}", folder.join("spice.json").display()));
    }
    Ok(ExitCode::SUCCESS)
}

fn sides(vmm: &str, guest: &Guest) -> Vec<Side> {
    let cmdline = guest.cmdline.replace("quiet", "loglevel=5");
    let common = format!(
        "--kernel {} --initrd {} --memory {} --cpus 2 --cmdline '{cmdline}'",
        guest.kernel.display(),
        guest.initrd.display(),
        guest.memory_mib
    );
    let qemu = |machine: &str| {
        // As QEMU has it, `microvm` is without PCI.
        let rng = if machine == "microvm" { "virtio-rng-device" } else { "virtio-rng-pci" };
        format!(
            "exec {QEMU} -M {machine} -device {rng} -kernel {} -initrd {} -m {} -smp 2 -append '{cmdline}'",
            guest.kernel.display(),
            guest.initrd.display(),
            guest.memory_mib
        )
    };
    let side = |name, command, processes, display| Side { name, command, processes, display };
    vec![
        side("drago", format!("exec {vmm} {common}"), "drago-vmm", false),
        side("qemu q35", qemu("q35"), "qemu-system-x86_64", false),
        side("qemu microvm", qemu("microvm"), "qemu-system-x86_64", false),
        // As microvm.nix starts it.
        side(
            "qemu microvm tuned",
            qemu("microvm,acpi=on,pcie=on,pit=off,pic=off,rtc=on"),
            "qemu-system-x86_64",
            false,
        ),
        side(
            "drago + display",
            format!("exec {vmm} {common} --spice 127.0.0.1:5900"),
            "drago-vmm drago-gpu",
            true,
        ),
        side(
            "qemu q35 + display",
            format!(
                "{} -device virtio-gpu-pci -device virtio-keyboard-pci -device virtio-tablet-pci \
                 -spice addr=127.0.0.1,port=5900,disable-ticketing=on",
                qemu("q35")
            ),
            "qemu-system-x86_64",
            true,
        ),
    ]
}

fn boot(rounds: usize, kernel: Kernel) -> Result<Value> {
    let vmm = step("building drago-vmm", || build::program("drago-vmm", "drago-vmm", true))?;
    step("building drago-gpu", || build::program("drago-gpu", "drago-gpu", true))?;
    let guest = kernel.guest()?;
    let host = Testbed::boot(&Options::new(build::agent()?))?;
    let sides = sides(&vmm.display().to_string(), &guest);
    let mut runs: Vec<Vec<Run>> = sides.iter().map(|_| Vec::new()).collect();
    let mut stopped = vec![0; sides.len()];
    // One round of all sides after the other: what disturbs the machine disturbs all of them.
    for round in 0..rounds {
        for ((side, runs), stopped) in sides.iter().zip(&mut runs).zip(&mut stopped) {
            // A display's memory does not change from round to round.
            if side.display && round > 0 {
                continue;
            }
            loop {
                let name = format!("round {}: {}", round + 1, side.name);
                match step(name, || measure(&host, side, &guest)) {
                    Ok(run) => break runs.push(run),
                    Err(error) if *stopped < MAX_STOPPED => {
                        note(format_args!("once more: {error:#}"));
                        *stopped += 1;
                    }
                    Err(error) => return Err(error),
                }
            }
        }
    }
    report(&sides, &runs, &stopped)
}

fn measure(host: &Testbed, side: &Side, guest: &Guest) -> Result<Run> {
    let console = Console::default();
    let log = Console::default();
    let (to, to_log) = (console.clone(), log.clone());
    let start = Instant::now();
    let mut child = host.command("sh").args(["-c", &side.command]).spawn(
        move |stream, bytes| match stream {
            Stream::Out => to.push(bytes),
            _ => to_log.push(bytes),
        },
    )?;
    let said = || format!("{} says on standard error:\n{}", side.name, log.since(0));
    let booted = console.wait_for(0, INIT, STOPPED).with_context(said);
    if booted.is_err() {
        end(&mut child)?;
    }
    booted?;
    let seconds = start.elapsed().as_secs_f64();
    let exits = number(host, "cat /sys/kernel/debug/kvm/exits")?;
    console.wait_for(0, PROMPT, PATIENCE).with_context(said)?;
    let memory_mib = memory(host, side, guest)?;
    end(&mut child)?;
    Ok(Run { seconds, exits, memory_mib })
}

fn end(child: &mut RemoteChild) -> Result<()> {
    child.signal(15)?;
    child.wait_timeout(PATIENCE).map(drop)
}

/// Proportional set size of the processes, without mappings that are the guest's RAM.
fn memory(host: &Testbed, side: &Side, guest: &Guest) -> Result<f64> {
    let ram_kib = guest.memory_mib * 1024 / 2;
    let script = format!(
        "cat $(for p in {}; do for i in $(pidof $p); do echo /proc/$i/smaps; done; done) | \
         awk '/^Size:/ {{ size = $2 }} /^Pss:/ {{ if (size < {ram_kib}) sum += $2 }} END {{ print sum }}'",
        side.processes
    );
    Ok(number(host, &script)? / 1024.0)
}

fn number(host: &Testbed, script: &str) -> Result<f64> {
    let mounted = format!(
        "mountpoint -q /sys/kernel/debug || mount -t debugfs d /sys/kernel/debug; {script}"
    );
    let out = host.command("sh").args(["-c", &mounted]).output()?;
    let text = String::from_utf8_lossy(&out.stdout).trim().to_owned();
    ensure!(out.code == 0, "{script}: {}", String::from_utf8_lossy(&out.stderr));
    text.parse().with_context(|| format!("{script}: {text:?} is no number"))
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn report(sides: &[Side], runs: &[Vec<Run>], stopped: &[usize]) -> Result<Value> {
    println!(
        "{:<20} {:>14} {:>12} {:>14} {:>8}",
        "", "exec→init s", "KVM exits", "memory MiB", "stopped"
    );
    let mut rows = serde_json::Map::new();
    for ((side, runs), stopped) in sides.iter().zip(runs).zip(stopped) {
        let seconds = median(runs.iter().map(|run| run.seconds));
        let exits = median(runs.iter().map(|run| run.exits));
        let memory = median(runs.iter().map(|run| run.memory_mib));
        println!("{:<20} {seconds:>14.2} {exits:>12.0} {memory:>14.1} {stopped:>8}", side.name);
        let all: Vec<f64> = runs.iter().map(|run| run.seconds).collect();
        rows.insert(
            side.name.to_owned(),
            json!({ "init_seconds": seconds, "init_seconds_all": all, "exits": exits, "memory_mib": memory, "stopped": stopped }),
        );
    }
    // Our time against the fastest of these in the same round: the two machines as QEMU has
    // them, then with the one that microvm.nix has cut down by hand.
    for (key, text, peers) in [
        ("init_ratio", "q35 and microvm", &runs[1..3]),
        ("init_ratio_tuned", "all three", &runs[1..4]),
    ] {
        let best = |round: usize| {
            let times = peers.iter().filter_map(|runs| runs.get(round)).map(|run| run.seconds);
            times.fold(f64::INFINITY, f64::min)
        };
        let ours = runs[0].iter().enumerate();
        let ratios: Vec<f64> = ours.map(|(round, run)| run.seconds / best(round)).collect();
        let ratio = median(ratios.iter().copied());
        println!("drago / fastest of {text}, median of the rounds: {ratio:.2}");
        rows.insert(key.to_owned(), json!({ "median": ratio, "all": ratios }));
    }
    Ok(Value::Object(rows))
}

fn spice() -> Result<String> {
    step("building the example server", || {
        let status = paths::cargo()
            .args(["build", "--quiet", "--release", "-p", "spice-server", "--examples"])
            .status()?;
        ensure!(status.success(), "the examples of spice-server do not build");
        Ok(())
    })?;
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| paths::workspace().join("target"), Into::into);
    step("measuring the SPICE server", || {
        let out = Command::new("/usr/bin/python3")
            .arg(paths::workspace().join("spice-server/bench/spice_bench.py"))
            .arg("--bin-dir")
            .arg(target.join("release/examples"))
            .stderr(std::process::Stdio::inherit())
            .output()?;
        ensure!(out.status.success(), "spice_bench.py failed");
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    })
}
