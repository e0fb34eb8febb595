//! Peers for `bench/soak.py` that no SPICE client can play: `soak-peer MODE ADDRESS:PORT FROM SECONDS
//! [PASSWORD]`. It says at its end how the server took it.
#![allow(missing_docs, unreachable_pub, dead_code, reason = "example")]

mod peer;
mod tls;

use std::{
    net::{IpAddr, SocketAddr},
    process::ExitCode,
    time::Duration,
};

use peer::{Layers, Peer};

const USAGE: &str = "soak-peer MODE ADDRESS:PORT FROM SECONDS [PASSWORD]
  MODE: LAYERS, or LAYERS-empty (nothing in endless frames or records), or LAYERS-inside (the same from a
        client that was let in); LAYERS: plain, web, tls or tls+web
  FROM: its own address";

fn run(mode: &str, more: &[String]) -> Option<std::io::Result<&'static str>> {
    let [address, from, seconds, password @ ..] = more else { return None };
    let address: SocketAddr = address.parse().ok()?;
    let from: IpAddr = from.parse().ok()?;
    let time = Duration::from_secs_f64(seconds.parse().ok()?);
    let password = password.first().map_or("", String::as_str);
    let (layers, empty) = match mode.split_once('-') {
        None => (mode, None),
        Some((layers, how @ ("empty" | "inside"))) => (layers, Some(how)),
        Some(_) => return None,
    };
    let layers = Layers::from_name(layers)?;
    let act = || {
        let mut peer = Peer::connect(address, Some(from), layers)?;
        if empty != Some("empty") {
            peer.link(0, 1, password)?;
            peer.message()?;
        }
        if empty.is_some() {
            return Ok(match peer.send_nothing(time) {
                Ok(()) => "kept",
                Err(_) => "cut off",
            });
        }
        std::thread::sleep(time);
        Ok("served")
    };
    Some(act())
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let result = arguments.split_first().and_then(|(mode, more)| run(mode, more));
    match result {
        Some(Ok(outcome)) => {
            println!("{outcome}");
            ExitCode::SUCCESS
        }
        Some(Err(error)) => {
            println!("{error}");
            ExitCode::FAILURE
        }
        None => {
            eprintln!("{USAGE}");
            ExitCode::from(2)
        }
    }
}
