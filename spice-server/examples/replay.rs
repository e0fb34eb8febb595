//! Plays to a server what clients of another one once sent (`drago-vmm --spice …,capture=FILE`, or
//! `ServerBuilder::capture`): `replay FILE ADDRESS:PORT [PASSWORD]`.
#![allow(missing_docs, unreachable_pub, dead_code, reason = "example")]

#[path = "soak-peer/peer.rs"]
mod peer;
#[path = "soak-peer/play.rs"]
mod play;
#[path = "soak-peer/tls.rs"]
mod tls;

use std::process::ExitCode;

fn run(arguments: &[String]) -> Result<(), String> {
    let [file, address, password @ ..] = arguments else {
        return Err("replay FILE ADDRESS:PORT [PASSWORD]".into());
    };
    let address = address.parse().map_err(|error| format!("{address}: {error}"))?;
    let bytes = std::fs::read(file).map_err(|error| format!("{file}: {error}"))?;
    let records = spice_server::read_capture(&bytes).map_err(|error| format!("{file}: {error}"))?;
    let password = password.first().map_or("", String::as_str);
    play::replay(&records, address, password).map_err(|error| error.to_string())
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
