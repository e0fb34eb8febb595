//! `cargo xtask test`.

use std::{
    collections::BTreeMap,
    env, fs,
    io::{self, BufRead, BufReader, Read, Write},
    path::PathBuf,
    process::{Command, ExitCode, Stdio},
    thread,
};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use drago_tests::{
    console::STUCK,
    debian::Release,
    paths,
    progress::{note, step},
    testbed::{Options, STILL, Testbed},
};
use serde_json::Value;

use crate::{
    build,
    packages::{self, For},
    report::{Log, Report},
    skips::Skips,
};

/// The crates whose types meet in our interfaces: two versions of one do not fit together.
const RUST_VMM: &[&str] = &[
    "acpi_tables",
    "event-manager",
    "kvm-bindings",
    "kvm-ioctls",
    "linux-loader",
    "seccompiler",
    "vfio-bindings",
    "vfio-ioctls",
    "vhost",
    "vhost-user-backend",
    "virtio-bindings",
    "virtio-queue",
    "vm-memory",
    "vm-superio",
    "vmm-sys-util",
];

/// Seconds for each fuzz target.
const FUZZ_SECONDS: &str = "60";

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Which tests
    #[arg(long, value_enum, default_value_t = Suite::Default)]
    suite: Suite,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Suite {
    /// fast, nested and fuzz: what CI runs
    Default,
    /// Format, lints, licences, unit tests, real SPICE clients; no virtual machine with a kernel
    Fast,
    /// Stock Debian guests on drago-vmm inside the nested-KVM test host
    Nested,
    /// A minute of fuzzing for each target
    Fuzz,
    /// rust-vmm's GPU back end; OpenGL and the GNOME desktop inside the nested-KVM test host
    Slow,
    /// Everything
    All,
}

impl Suite {
    fn includes(self, other: Self) -> bool {
        match self {
            Self::All => true,
            Self::Default => other != Self::Slow,
            _ => self == other,
        }
    }
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    packages::install(For::Tests)?;
    let mut report = Report::default();
    let done = suites(args.suite, &mut report);
    let missing = report.end(&mut io::stderr());
    done?;
    ensure!(missing == 0, "{missing} tests missed what was to be installed: see the list above");
    Ok(ExitCode::SUCCESS)
}

fn suites(suite: Suite, report: &mut Report) -> Result<()> {
    if suite.includes(Suite::Fast) {
        fast(report)?;
    }
    if suite.includes(Suite::Nested) {
        nested(
            &["minimal", "sound", "vfio", "microvm", "units", "cycles", "peers", "weston"],
            &mut report.skips,
        )?;
    }
    if suite.includes(Suite::Fuzz) {
        fuzz()?;
    }
    if suite.includes(Suite::Slow) {
        rust_back_end(report)?;
        step("pictures in real dmabufs", dmabufs)?;
        nested(&["vnc", "virgl", "graphics", "gnome"], &mut report.skips)?;
    }
    Ok(())
}

fn fast(report: &mut Report) -> Result<()> {
    step("format", || cargo(&["fmt", "--all", "--check"]))?;
    step("one version of each rust-vmm crate", single_versions)?;
    step("licences and sources", || deny(&mut report.skips))?;
    step("lints", || {
        cargo(&["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"])
    })?;
    // Binaries first: device tests start drago-gpu, which is not their crate's.
    step("build", || cargo(&["build", "--quiet", "--workspace", "--all-targets"]))?;
    packages::ryll()?;
    step("tests", || tests(prepared(paths::cargo()), &["--workspace", "--no-fail-fast"], report))?;
    step("OpenGL on Debian 13's libraries", || newer_opengl(report))
}

/// `cargo test` with these arguments.
fn tests(mut cargo: Command, arguments: &[&str], report: &mut Report) -> Result<()> {
    let path = paths::workspace().join("target/tests.log");
    let (mut log, errors) = Log::create(&path).with_context(|| path.display().to_string())?;
    let mut tests = cargo
        .arg("test")
        .args(arguments)
        .args(["--", "--show-output"])
        .stdout(Stdio::piped())
        .stderr(errors)
        .spawn()
        .context("cannot run cargo")?;
    if let Some(out) = tests.stdout.take() {
        report.relay(out, io::stdout(), &mut log);
    }
    let status = tests.wait()?;
    if !status.success() {
        log.rest();
    }
    ensure!(status.success(), "cargo test {} failed", arguments.join(" "));
    Ok(())
}

/// The same pictures as in the step before, with virglrenderer 1.1 and Mesa 25; Vulkan on lavapipe.
fn newer_opengl(report: &mut Report) -> Result<()> {
    let root = Release::open("trixie")?.graphics()?;
    let mut cargo = prepared(paths::cargo());
    cargo.env("DRAGO_TEST_ROOT", &root).env("DRAGO_TEST_DRIVER", "LLVM 19");
    tests(cargo, &["-p", "drago-gpu", "--test", "virgl", "--test", "venus"], report)
        .with_context(|| format!("on the libraries in {}", root.display()))
}

/// Our front end with rust-vmm's GPU back end, which takes minutes to build.
fn rust_back_end(report: &mut Report) -> Result<()> {
    let root = paths::workspace().join("target/tools");
    if !root.join("bin/vhost-device-gpu").is_file() {
        step("cargo install vhost-device-gpu", || {
            let root = root.display().to_string();
            let options = ["--quiet", "--locked", "--no-default-features", "--root", &root];
            cargo(&[&["install"], &options[..], &["vhost-device-gpu@0.2.0"]].concat())
        })?;
    }
    step("rust-vmm's back end", || {
        let arguments = ["-p", "drago-devices", "--lib", "vhost_device"];
        tests(prepared(paths::cargo()), &arguments, report)
    })
}

/// The device's tests of other back ends' pictures, where there is `/dev/udmabuf`: in the test host.
fn dmabufs() -> Result<()> {
    let mut build = prepared(paths::cargo());
    build.args(["test", "--quiet", "-p", "drago-devices", "--lib", "--no-run"]);
    let out = build.arg("--message-format=json").stderr(Stdio::inherit()).output()?;
    ensure!(out.status.success(), "drago-devices' tests do not build");
    let said = String::from_utf8_lossy(&out.stdout);
    let program = said
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .find_map(|message| message["executable"].as_str().map(str::to_owned))
        .context("cargo names no program")?;
    let host = Testbed::boot(&Options::new(build::agent()?))?;
    let out = host.command(program).args(["dmabufs", "--nocapture"]).output()?;
    let said = String::from_utf8_lossy(&out.stdout);
    ensure!(out.code == 0 && !said.contains("SKIPPED"), "{said}");
    Ok(())
}

fn nested(suites: &[&str], skips: &mut Skips) -> Result<()> {
    step("build", || {
        cargo(&["build", "--quiet", "-p", "drago-vmm", "-p", "drago-gpu", "-p", "drago-tests"])
    })?;
    // Of all suites together: more than that is no accident.
    let mut again = 1;
    for suite in suites {
        step(format_args!("nested suite {suite}"), || {
            loop {
                let (passed, sign) = nested_suite(suite, skips)?;
                match sign {
                    _ if passed => return Ok(()),
                    // That suite starts such guests again itself.
                    Some(sign) if again > 0 && *suite != "units" => {
                        again -= 1;
                        note(format_args!(
                            "FAILED where a kernel in the emulated machine had gone astray \
                             ({sign:?}): once more, and no other suite after that"
                        ));
                    }
                    _ => bail!("the suite {suite} failed"),
                }
            }
        })?;
    }
    Ok(())
}

/// What kernels say, or drago-vmm of one, that the emulator led astray: it now and then stops a
/// processor for good, of a guest or of the test host, or executes what the guest never had in its memory
/// (docs/testing.md).
const ASTRAY: [&str; 6] =
    [STUCK[0], STUCK[1], STUCK[2], "KVM internal error", "reset itself by a triple fault", STILL];

/// Whether a suite passed, and the sign in its output that the emulator is to blame if it did not.
fn nested_suite(suite: &str, skips: &mut Skips) -> Result<(bool, Option<&'static str>)> {
    let mut tests = prepared(paths::cargo())
        .args(["test", "-p", "drago-tests", "--test", suite, "--"])
        .args(["--ignored", "--nocapture", "--test-threads=1"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run cargo")?;
    let (out, log) = (tests.stdout.take(), tests.stderr.take());
    let mut of_log = Skips::default();
    let sign = thread::scope(|scope| {
        let log = scope.spawn(|| {
            log.and_then(|log| relay(log, io::stderr(), |line| of_log.look(suite, line)))
        });
        let sign = out.and_then(|out| relay(out, io::stdout(), |line| skips.look(suite, line)));
        sign.or(log.join().ok().flatten())
    });
    skips.add(of_log);
    Ok((tests.wait()?.success(), sign))
}

/// Passes on what a suite says as it comes; the first of [`ASTRAY`] in it.
fn relay(from: impl Read, mut to: impl Write, mut look: impl FnMut(&str)) -> Option<&'static str> {
    let mut from = BufReader::new(from);
    let mut found = None;
    let mut line = Vec::new();
    while from.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
        let _ = to.write_all(&line).and_then(|()| to.flush());
        let text = String::from_utf8_lossy(&line);
        look(&text);
        found = found.or_else(|| ASTRAY.into_iter().find(|sign| text.contains(sign)));
        line.clear();
    }
    found
}

fn fuzz() -> Result<()> {
    tool("cargo-fuzz")?;
    step("fuzzing", || {
        let script = paths::workspace().join("tests/fuzz/run.sh");
        let status = command(&script.display().to_string()).arg(FUZZ_SECONDS).status()?;
        ensure!(status.success(), "a fuzz target failed");
        Ok(())
    })
}

/// A command in the workspace that finds the tools installed by [`tool`].
fn command(program: &str) -> Command {
    prepared(Command::new(program))
}

fn prepared(mut command: Command) -> Command {
    command.current_dir(paths::workspace()).stdin(Stdio::null());
    if let Some(path) = env::var_os("PATH") {
        let mut folders: Vec<PathBuf> = env::split_paths(&path).collect();
        folders.push(paths::workspace().join("target/tools/bin"));
        if let Ok(joined) = env::join_paths(folders) {
            command.env("PATH", joined);
        }
    }
    command
}

fn cargo(arguments: &[&str]) -> Result<()> {
    let status = prepared(paths::cargo()).args(arguments).status().context("cannot run cargo")?;
    ensure!(status.success(), "cargo {} failed", arguments.join(" "));
    Ok(())
}

/// Makes a cargo subcommand available: as installed, or installed below `target/`.
fn tool(name: &str) -> Result<()> {
    let found = command(name).arg("--version").output().is_ok_and(|out| out.status.success());
    if found {
        return Ok(());
    }
    let root = paths::workspace().join("target/tools");
    step(format_args!("cargo install {name}"), || {
        cargo(&["install", "--quiet", "--locked", "--root", &root.display().to_string(), name])
    })
}

fn deny(skips: &mut Skips) -> Result<()> {
    tool("cargo-deny")?;
    cargo(&["deny", "--log-level", "error", "check", "licenses", "bans", "sources"])?;
    // The database of advisories lives on a server that not every machine reaches.
    let fetched = prepared(paths::cargo()).args(["deny", "fetch", "db"]).output()?;
    if fetched.status.success() {
        cargo(&["deny", "--log-level", "error", "check", "advisories"])
    } else {
        skips.look("cargo deny", "SKIPPED: the database of advisories cannot be fetched");
        Ok(())
    }
}

fn single_versions() -> Result<()> {
    let lock = |name| {
        let path = paths::workspace().join(name);
        fs::read_to_string(&path).with_context(|| path.display().to_string())
    };
    // The fuzz targets are a workspace of their own, of the same code.
    check_versions(&lock("Cargo.lock")?, &lock("tests/fuzz/Cargo.lock")?)
}

/// That the program is made of one version of each crate in [`RUST_VMM`], and the fuzz targets of none
/// but that.
fn check_versions(program: &str, fuzz: &str) -> Result<()> {
    let (program, fuzz) = (locked_versions(program), locked_versions(fuzz));
    for name in RUST_VMM {
        let version = match program.get(name).map(Vec::as_slice) {
            None => bail!("{name} is not used any more: remove it from the list in {}", file!()),
            Some([one]) => one,
            Some(several) => bail!("{name} is there in versions {}", several.join(" and ")),
        };
        let fuzzed = fuzz.get(name).map_or(&[][..], Vec::as_slice);
        ensure!(
            fuzzed.iter().all(|other| other == version),
            "{name} is there in version {version}, for the fuzz targets in {}: run \
             'cargo update -p {name}' in tests/fuzz",
            fuzzed.join(" and ")
        );
    }
    Ok(())
}

/// Every package of a Cargo.lock with its versions.
fn locked_versions(lock: &str) -> BTreeMap<&str, Vec<&str>> {
    let mut versions: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let mut name = "";
    for line in lock.lines() {
        match line.split_once(" = ") {
            Some(("name", value)) => name = value.trim_matches('"'),
            Some(("version", value)) => {
                versions.entry(name).or_default().push(value.trim_matches('"'));
            }
            _ => {}
        }
    }
    versions
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stuck_kernel_is_told_from_a_failed_test() {
        let mut shown = Vec::new();
        let said = "test a ... FAILED\n[  9.1] watchdog: BUG: soft lockup - CPU#0 stuck\nend";
        let mut lines = 0;
        assert_eq!(relay(said.as_bytes(), &mut shown, |_| lines += 1), Some("soft lockup"));
        assert_eq!(lines, 3);
        assert_eq!(shown, said.as_bytes());
        assert_eq!(relay(&b"test a ... FAILED\n"[..], &mut shown, |_| ()), None);
    }

    #[test]
    fn versions_are_read_from_the_lock_file() {
        let lock = "[[package]]\nname = \"a\"\nversion = \"1.0\"\n\n[[package]]\nname = \"a\"\n\
                    version = \"2.0\"\n[[package]]\nname = \"b\"\nversion = \"1.0\"\n";
        let versions = locked_versions(lock);
        assert_eq!(versions["a"], ["1.0", "2.0"]);
        assert_eq!(versions["b"], ["1.0"]);
    }

    #[test]
    fn one_version_of_each_crate_of_rust_vmm_in_both_lock_files() {
        let lock = |packages: &[(&str, &str)]| {
            let package = |(name, version)| format!("name = \"{name}\"\nversion = \"{version}\"\n");
            packages.iter().copied().map(package).collect::<String>()
        };
        let all: Vec<_> = RUST_VMM.iter().map(|name| (*name, "1.0.0")).collect();
        check_versions(&lock(&all), &lock(&all)).unwrap();
        check_versions(&lock(&all), "").unwrap();
        let vhost = ("vhost", "2.0.0");
        let two = lock(&[&all[..], &[vhost]].concat());
        assert!(check_versions(&two, "").unwrap_err().to_string().contains("1.0.0 and 2.0.0"));
        for fuzz in [lock(&[vhost]), two] {
            let error = check_versions(&lock(&all), &fuzz).unwrap_err().to_string();
            assert!(error.contains("vhost") && error.contains("2.0.0"), "{error}");
        }
        assert!(check_versions(&lock(&all[1..]), "").is_err());
    }
}
