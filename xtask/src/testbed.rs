//! `cargo xtask testbed -- COMMAND…`.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, anyhow};
use drago_tests::testbed::{Options, Stream, Testbed};

use crate::{build, ports};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Forward 127.0.0.1:HOSTPORT here to INNERPORT inside (repeatable)
    #[arg(long, value_name = "HOSTPORT:INNERPORT", value_parser = port_pair)]
    forward: Vec<(u16, u16)>,
    /// Memory in MiB
    #[arg(long, default_value_t = 4096)]
    memory: u32,
    /// Virtual CPUs
    #[arg(long, default_value_t = 2)]
    cpus: u32,
    /// A further folder that is writable inside (repeatable); the checkout always is
    #[arg(long, value_name = "DIR")]
    rw: Vec<PathBuf>,
    /// Add an IOMMU, and a device behind it that is free to be passed through: a further argument of
    /// QEMU (repeatable)
    #[arg(long, value_name = "ARGUMENT", allow_hyphen_values = true)]
    spare_device: Vec<String>,
    /// Set an environment variable inside (repeatable)
    #[arg(long, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// The program to run and its arguments
    #[arg(trailing_var_arg = true, required = true)]
    command: Vec<String>,
}

fn port_pair(text: &str) -> Result<(u16, u16)> {
    text.split_once(':')
        .and_then(|(host, inner)| Some((host.parse().ok()?, inner.parse().ok()?)))
        .ok_or_else(|| anyhow!("expected HOSTPORT:INNERPORT, for example 5900:5900"))
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    // 0 is any free one.
    for (outer, inner) in args.forward.iter().filter(|(outer, _)| *outer != 0) {
        ports::ensure_free(*outer, |outer| format!("--forward {outer}:{inner}"))?;
    }
    let mut options = Options::new(build::agent()?);
    options.memory_mib = args.memory;
    options.cpus = args.cpus;
    options.rw.clone_from(&args.rw);
    options.forward.clone_from(&args.forward);
    options.spare_devices.clone_from(&args.spare_device);
    let host = Testbed::boot(&options)?;

    let mut command = host.command(&args.command[0]).args(&args.command[1..]);
    for pair in &args.env {
        let (name, value) =
            pair.split_once('=').ok_or_else(|| anyhow!("--env {pair}: expected NAME=VALUE"))?;
        command = command.env(name, value);
    }
    let mut child = command.spawn(|stream, bytes| {
        // A closed pipe on our side must not end what runs inside.
        let _ = match stream {
            Stream::Out => {
                std::io::stdout().write_all(bytes).and_then(|()| std::io::stdout().flush())
            }
            Stream::Err => std::io::stderr().write_all(bytes),
        };
    })?;
    let mut stdin = child.stdin();
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut std::io::stdin(), &mut stdin);
        let _ = stdin.close();
    });
    let code = child.wait()?;
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX)))
}
