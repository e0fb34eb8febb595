//! Builds the project's programs.

use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use drago_tests::paths;

/// Builds one program and returns where cargo put it.
pub(crate) fn program(package: &str, name: &str, release: bool) -> Result<PathBuf> {
    let mut cargo = paths::cargo();
    cargo
        .args(["build", "--quiet", "--message-format=json", "-p", package, "--bin", name])
        .stderr(Stdio::inherit());
    if release {
        cargo.arg("--release");
    }
    let out = cargo.output().context("cannot run cargo")?;
    if !out.status.success() {
        bail!("{name} does not build");
    }
    String::from_utf8_lossy(&out.stdout)
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|message| message["target"]["name"] == name)
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .with_context(|| format!("cargo named no executable for {name}"))
}

/// The agent that runs in the test host.
pub(crate) fn agent() -> Result<PathBuf> {
    program("drago-tests", "drago-testbed-agent", false)
}
