//! `cargo xtask bench`: figures against QEMU in the same run, as JSON and as a table.
//!
//! * boot: exec → the guest's init, KVM exits until then, memory without the guest's own, all in the
//!   nested-KVM test host with the same kernel, initrd and memory for every side; with a display, memory
//!   at the prompt and again with a SPICE client that has typed something;
//! * gpu: [`bench_gpu`];
//! * disks, networks, shared folders: [`bench_io`], with `--io-only`;
//! * spice: `spice-server/bench/spice_bench.py` on this machine.
//!
//! In the end each bar is "met" or "NOT met" ([`bench_bars`]).

use std::{
    fs,
    process::{Command, ExitCode},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use drago_tests::{
    client::SpiceClient,
    console::Console,
    debian::Release,
    guest::Guest,
    paths,
    progress::{note, step},
    testbed::{Options, RemoteChild, Stream, Testbed},
};
use serde_json::{Value, json};

use crate::{
    bench_bars::{Part, Verdict, judge, judge_content, judge_io},
    bench_gpu, bench_io, build,
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
    /// Of the part in the test host only the machines with a display: their memory
    #[arg(long, conflicts_with_all = ["boot_only", "gpu_only"])]
    memory_only: bool,
    /// Only the SPICE server, on this machine
    #[arg(long, conflicts_with_all = ["boot_only", "gpu_only", "memory_only"])]
    spice_only: bool,
    /// End with status 1 if a bar is not met
    #[arg(long)]
    strict: bool,
    /// Only disks, networks, shared folders, in the test host
    #[arg(long, conflicts_with_all = ["boot_only", "gpu_only", "memory_only", "spice_only"])]
    io_only: bool,
    /// Only some of these
    #[arg(long, value_enum, requires = "io_only")]
    io_part: Vec<bench_io::Part>,
    /// Processors of the guest whose input and output is measured
    #[arg(long, default_value_t = 1, requires = "io_only")]
    io_cpus: u32,
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

/// Where the machines' SPICE servers listen, in the test host.
const PORT: u16 = 5900;

/// One program under measurement.
struct Side {
    name: &'static str,
    /// Those with a display show something: that takes a kernel with the driver for it.
    guest: Guest,
    command: String,
    /// Processes that make up its memory.
    processes: &'static str,
    display: bool,
}

impl Side {
    fn new(
        name: &'static str,
        guest: &Guest,
        command: String,
        processes: &'static str,
        display: bool,
    ) -> Self {
        Self { name, guest: guest.clone(), command, processes, display }
    }
}

/// What one run showed.
struct Run {
    seconds: f64,
    exits: f64,
    memory_mib: f64,
    /// The same with a viewer.
    viewed_memory_mib: Option<f64>,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    packages::install(For::Bench)?;
    let folder = paths::cache("bench")?;
    let write = |name: &str, report: &Value| {
        let path = folder.join(name);
        fs::write(&path, serde_json::to_string_pretty(report)?)?;
        note(format_args!("written to {}", path.display()));
        anyhow::Ok(())
    };
    let rounds = args.rounds.max(1);
    let all =
        !(args.io_only || args.boot_only || args.gpu_only || args.memory_only || args.spice_only);
    let mut verdicts = Vec::new();
    if args.io_only {
        let report = bench_io::run(rounds, args.io_cpus, &args.io_part)?;
        write("io.json", &report)?;
        verdicts.extend(judge_io(&report));
    }
    if all || args.gpu_only {
        let report = bench_gpu::run(rounds)?;
        write("gpu.json", &report)?;
        verdicts.extend(judge(Part::Gpu, &report));
    }
    if all || args.boot_only || args.memory_only {
        let (name, parts): (_, &[Part]) = if args.memory_only {
            ("memory.json", &[Part::Display])
        } else {
            ("boot.json", &[Part::Boot, Part::Display])
        };
        let report = boot(rounds, args.kernel, args.memory_only)?;
        write(name, &report)?;
        verdicts.extend(parts.iter().flat_map(|part| judge(*part, &report)));
    }
    if all || args.spice_only {
        let report = spice(all)?;
        write("spice.json", &report)?;
        verdicts.extend(judge(Part::Spice, &report));
        verdicts.extend(judge_content(&report));
    }
    for verdict in &verdicts {
        println!("{verdict}");
    }
    let met = verdicts.iter().all(Verdict::is_met);
    Ok(if args.strict && !met { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Those without a display, with `guest`.
fn plain_sides(vmm: &str, guest: &Guest) -> Vec<Side> {
    let side = |name, command, processes| Side::new(name, guest, command, processes, false);
    vec![
        side("drago", drago(vmm, guest), "drago-vmm"),
        side("qemu q35", qemu("q35", guest), "qemu-system-x86_64"),
        side("qemu microvm", qemu("microvm", guest), "qemu-system-x86_64"),
        // As microvm.nix starts it.
        side(
            "qemu microvm tuned",
            qemu("microvm,acpi=on,pcie=on,pit=off,pic=off,rtc=on", guest),
            "qemu-system-x86_64",
        ),
    ]
}

/// Those with one, with `guest`.
fn display_sides(vmm: &str, guest: &Guest) -> Vec<Side> {
    let side = |name, command, processes| Side::new(name, guest, command, processes, true);
    vec![
        side(
            "drago + display",
            format!("{} --spice 127.0.0.1:{PORT}", drago(vmm, guest)),
            "drago-vmm drago-gpu",
        ),
        side(
            "qemu q35 + display",
            format!(
                "{} -device virtio-gpu-pci -device virtio-keyboard-pci -device virtio-tablet-pci \
                 -spice addr=127.0.0.1,port={PORT},disable-ticketing=on",
                qemu("q35", guest)
            ),
            "qemu-system-x86_64",
        ),
    ]
}

fn command_line(guest: &Guest) -> String {
    guest.cmdline.replace("quiet", "loglevel=5")
}

fn drago(vmm: &str, guest: &Guest) -> String {
    format!(
        "exec {vmm} --kernel {} --initrd {} --memory {} --cpus 2 --cmdline '{}'",
        guest.kernel.display(),
        guest.initrd.display(),
        guest.memory_mib,
        command_line(guest)
    )
}

fn qemu(machine: &str, guest: &Guest) -> String {
    // As QEMU has it, `microvm` is without PCI.
    let rng = if machine == "microvm" { "virtio-rng-device" } else { "virtio-rng-pci" };
    format!(
        "exec {QEMU} -M {machine} -device {rng} -kernel {} -initrd {} -m {} -smp 2 -append '{}'",
        guest.kernel.display(),
        guest.initrd.display(),
        guest.memory_mib,
        command_line(guest)
    )
}

fn boot(rounds: usize, kernel: Kernel, display_only: bool) -> Result<Value> {
    let vmm = build::vmm()?;
    let vmm = vmm.display().to_string();
    let mut sides = display_sides(&vmm, &Guest::minimal()?);
    if !display_only {
        sides = plain_sides(&vmm, &kernel.guest()?).into_iter().chain(sides).collect();
    }
    let mut options = Options::new(build::agent()?);
    options.forward = vec![(0, PORT)];
    let host = Testbed::boot(&options)?;
    let mut runs: Vec<Vec<Run>> = sides.iter().map(|_| Vec::new()).collect();
    let mut stopped = vec![0; sides.len()];
    // One round of all sides after the other: what disturbs the machine disturbs all of them.
    for round in 0..rounds {
        for ((side, runs), stopped) in sides.iter().zip(&mut runs).zip(&mut stopped) {
            loop {
                let name = format!("round {}: {}", round + 1, side.name);
                match step(name, || measure(&host, side)) {
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

fn measure(host: &Testbed, side: &Side) -> Result<Run> {
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
    let limit = if side.display { PATIENCE } else { STOPPED };
    let booted = console.wait_for(0, INIT, limit).with_context(said);
    if booted.is_err() {
        end(&mut child)?;
    }
    booted?;
    let seconds = start.elapsed().as_secs_f64();
    let exits = number(host, "cat /sys/kernel/debug/kvm/exits")?;
    console.wait_for(0, PROMPT, PATIENCE).with_context(said)?;
    let memory_mib = memory(host, side)?;
    let viewed_memory_mib = if side.display {
        Some(view(host, || memory(host, side)).with_context(said)?)
    } else {
        None
    };
    end(&mut child)?;
    Ok(Run { seconds, exits, memory_mib, viewed_memory_mib })
}

/// What `measure` finds while a SPICE client looks on, who has a picture and has seen it change.
fn view(host: &Testbed, measure: impl FnOnce() -> Result<f64>) -> Result<f64> {
    let port = host.outer_port(PORT).context("the viewer's port is not forwarded")?;
    let mut viewer = SpiceClient::connect(port)?;
    viewer.wait_state("a picture", PATIENCE, |state| {
        state["width"].as_u64().is_some_and(|width| width > 0)
            && state["invalidated"].as_u64().is_some_and(|count| count > 0)
    })?;
    viewer.type_text("ls /\n", PATIENCE)?;
    measure()
}

fn end(child: &mut RemoteChild) -> Result<()> {
    child.signal(15)?;
    child.wait_timeout(PATIENCE).map(drop)
}

/// Proportional set size of the processes, without mappings that are the guest's RAM.
fn memory(host: &Testbed, side: &Side) -> Result<f64> {
    let pids = format!("$(for p in {}; do pidof $p; done)", side.processes);
    pss_mib(host, &pids, side.guest.memory_mib)
}

/// The same of the processes with these numbers, in the shell's words, in MiB.
pub(crate) fn pss_mib(host: &Testbed, pids: &str, ram_mib: u32) -> Result<f64> {
    let ram_kib = ram_mib * 1024 / 2;
    let script = format!(
        "for p in {pids}; do cat /proc/$p/smaps; done | \
         awk '/^Size:/ {{ size = $2 }} /^Pss:/ {{ if (size < {ram_kib}) sum += $2 }} END {{ print sum }}'"
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
        "{:<20} {:>14} {:>12} {:>14} {:>14} {:>8}",
        "", "exec→init s", "KVM exits", "memory MiB", "with a viewer", "stopped"
    );
    let mut rows = serde_json::Map::new();
    for ((side, runs), stopped) in sides.iter().zip(runs).zip(stopped) {
        let seconds = median(runs.iter().map(|run| run.seconds));
        let exits = median(runs.iter().map(|run| run.exits));
        let memory = median(runs.iter().map(|run| run.memory_mib));
        let all: Vec<f64> = runs.iter().map(|run| run.seconds).collect();
        let viewed: Vec<f64> = runs.iter().filter_map(|run| run.viewed_memory_mib).collect();
        let mut row = json!({ "init_seconds": seconds, "init_seconds_all": all, "exits": exits, "memory_mib": memory, "stopped": stopped });
        let mut with_viewer = String::new();
        if side.display {
            let memory = median(viewed.iter().copied());
            with_viewer = format!("{memory:.1}");
            row["viewed_memory_mib"] = json!(memory);
            row["viewed_memory_mib_all"] = json!(viewed);
        }
        println!(
            "{:<20} {seconds:>14.2} {exits:>12.0} {memory:>14.1} {with_viewer:>14} {stopped:>8}",
            side.name
        );
        rows.insert(side.name.to_owned(), row);
    }
    if sides.iter().all(|side| side.display) {
        return Ok(Value::Object(rows));
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

/// `content`: also what real work costs, which takes a quarter of an hour.
fn spice(content: bool) -> Result<Value> {
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
            .args((!content).then_some("--no-content"))
            .stderr(std::process::Stdio::inherit())
            .output()?;
        ensure!(out.status.success(), "spice_bench.py failed");
        serde_json::from_slice(&out.stdout).context("spice_bench.py")
    })
}
