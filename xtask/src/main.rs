//! Developer commands: `cargo xtask demo|test|testbed|guest|bench`.

mod bench;
mod bench_bars;
mod bench_gpu;
mod bench_io;
mod build;
mod check;
mod demo;
mod guest;
mod packages;
mod ports;
mod report;
mod skips;
mod testbed;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use drago_tests::stop;

/// Developer commands of drago-vmm.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Shows a guest's desktop over SPICE on 127.0.0.1:5900
    Demo(demo::Args),
    /// Installs what tests need and runs them
    Test(check::Args),
    /// Measures against QEMU in the same run
    Bench(bench::Args),
    /// Runs a command on a machine with real KVM, /dev/dri, udmabuf, tun and vhost: the nested-KVM test host
    Testbed(testbed::Args),
    /// Makes a guest if need be and prints where its kernel, initrd and disk are
    Guest(guest::Args),
}

fn main() -> ExitCode {
    let task = Cli::parse().command;
    let result = stop::install().and_then(|()| match task {
        Task::Demo(args) => demo::run(&args),
        Task::Test(args) => check::run(&args),
        Task::Bench(args) => bench::run(&args),
        Task::Testbed(args) => testbed::run(&args),
        Task::Guest(args) => guest::run(&args),
    });
    if let Some(signal) = stop::requested() {
        // What failed for it is of no interest.
        eprintln!("stopped");
        return ExitCode::from(stop::status(signal));
    }
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
