//! Builds the project's programs.

use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use drago_tests::{paths, progress::step};

/// Builds drago-vmm and drago-gpu as they are used, with cargo's own progress: the first time it takes
/// minutes. Returns where cargo put drago-vmm; drago-gpu is beside it.
pub(crate) fn vmm() -> Result<PathBuf> {
    let what = "building drago-vmm and drago-gpu (optimised; minutes if it is the first time)";
    let programs = step(what, || {
        cargo(&["drago-vmm", "drago-gpu"], &["drago-vmm", "drago-gpu"], &["--release"])
    })?;
    programs.into_iter().next().context("cargo named no program")
}

/// The agent that runs in the test host.
pub(crate) fn agent() -> Result<PathBuf> {
    let programs = cargo(&["drago-tests"], &["drago-testbed-agent"], &["--quiet"])?;
    programs.into_iter().next().context("cargo named no program")
}

/// Builds programs of some packages and returns where cargo put them, in this order.
fn cargo(packages: &[&str], programs: &[&str], options: &[&str]) -> Result<Vec<PathBuf>> {
    let mut cargo = paths::cargo();
    cargo.args(["build", "--message-format=json"]).args(options);
    for package in packages {
        cargo.args(["-p", package]);
    }
    for program in programs {
        cargo.args(["--bin", program]);
    }
    let out = cargo.stderr(Stdio::inherit()).output().context("cannot run cargo")?;
    if !out.status.success() {
        bail!("{} does not build", programs.join(" or "));
    }
    let messages: Vec<serde_json::Value> = String::from_utf8_lossy(&out.stdout)
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect();
    let path = |program: &&str| {
        let mut of_it = messages.iter().filter(|message| message["target"]["name"] == **program);
        of_it
            .find_map(|message| message["executable"].as_str().map(PathBuf::from))
            .with_context(|| format!("cargo named no executable for {program}"))
    };
    programs.iter().map(path).collect()
}
