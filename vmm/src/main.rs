//! The `drago-vmm` program.

use std::{
    error::Error,
    io::{self, IsTerminal},
    process::ExitCode,
};

use drago_vmm::{
    cli::{self, CliError, Invocation},
    control::client,
    doctor,
    log::Log,
    machine, seccomp,
};
use tracing_subscriber::EnvFilter;

/// Status for a wrong command line, the same as clap's.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    spice_server::give_free_memory_back();
    let invocation = match cli::parse(std::env::args_os()) {
        Ok(invocation) => invocation,
        Err(CliError::Clap(error)) => error.exit(),
        Err(error) => {
            fail(&error);
            return ExitCode::from(USAGE);
        }
    };
    match invocation {
        Invocation::Run { config, log } => {
            if let Err(error) = start_log(&log) {
                return fail(error.as_ref());
            }
            if let Err(error) = seccomp::prepare(config.sandbox) {
                tracing::warn!(%error, "programs that end cannot be started again");
            }
            let result = machine::run(*config);
            seccomp::finish();
            match result {
                Ok(outcome) => ExitCode::from(outcome.0),
                Err(error) => fail(&error),
            }
        }
        Invocation::Ctl { control, action } => {
            match client::run(&control, &action, &mut io::stdout()) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => fail(&error),
            }
        }
        Invocation::Doctor { json } => match doctor::run(json, &mut io::stdout()) {
            Ok(true) => ExitCode::SUCCESS,
            Ok(false) => ExitCode::FAILURE,
            Err(error) => fail(&error),
        },
    }
}

fn start_log(filter: &str) -> Result<(), Box<dyn Error>> {
    let filter = EnvFilter::builder()
        .parse(filter)
        .map_err(|error| format!("--log {filter}: {error}; expected something like debug"))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(|| Log)
        .with_ansi(io::stderr().is_terminal())
        .with_target(false)
        .init();
    Ok(())
}

/// Prints an error with all its causes.
fn fail(error: &dyn Error) -> ExitCode {
    eprintln!("drago-vmm: {error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        eprintln!("  caused by: {error}");
        cause = error.source();
    }
    ExitCode::FAILURE
}
