//! A SPICE server that shows a test picture and prints keys and pointer, without any machine behind
//! it: `cargo run -p spice-server --example test-picture -- --listen 127.0.0.1:5930`.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, reason = "example")]

mod picture;

use std::{
    path::PathBuf,
    process::ExitCode,
    sync::{Arc, mpsc},
};

use picture::{Event, Mode, Picture, Reporter};
use spice_server::{ClientPolicy, Secret, SpiceServer};

const USAGE: &str = "\
test-picture [--listen ADDRESS:PORT] [--password-file FILE] [--mode MODE] [--size WxH]
             [--fps N] [--policy exclusive|refuse|shared] [--quiet]
  MODE: moving (default), noise, texture, key, static";

struct Options {
    listen: Vec<std::net::SocketAddr>,
    password: Option<PathBuf>,
    mode: Mode,
    size: (u32, u32),
    fps: u32,
    policy: ClientPolicy,
    quiet: bool,
}

fn options() -> Result<Options, String> {
    let mut options = Options {
        listen: Vec::new(),
        password: None,
        mode: Mode::Moving,
        size: (1024, 768),
        fps: 60,
        policy: ClientPolicy::Exclusive,
        quiet: false,
    };
    let mut args = std::env::args().skip(1);
    while let Some(name) = args.next() {
        if name == "--quiet" {
            options.quiet = true;
            continue;
        }
        if name == "--help" {
            return Err(USAGE.into());
        }
        let value = args.next().ok_or_else(|| format!("{name} needs a value\n{USAGE}"))?;
        let wrong = |what: &dyn std::fmt::Display| format!("{name} {value}: {what}");
        match name.as_str() {
            "--listen" => options.listen.push(value.parse().map_err(|e| wrong(&e))?),
            "--password-file" => options.password = Some(value.clone().into()),
            "--mode" => options.mode = value.parse().map_err(|e: String| wrong(&e))?,
            "--fps" => options.fps = value.parse().map_err(|e| wrong(&e))?,
            "--size" => {
                let (w, h) = value.split_once('x').ok_or_else(|| wrong(&"want WxH"))?;
                options.size =
                    (w.parse().map_err(|e| wrong(&e))?, h.parse().map_err(|e| wrong(&e))?);
            }
            "--policy" => {
                options.policy = match value.as_str() {
                    "exclusive" => ClientPolicy::Exclusive,
                    "refuse" => ClientPolicy::Refuse,
                    "shared" => ClientPolicy::Shared,
                    _ => return Err(wrong(&"want exclusive, refuse or shared")),
                }
            }
            _ => return Err(format!("no option {name}\n{USAGE}")),
        }
    }
    if options.listen.is_empty() {
        options.listen.push(([127, 0, 0, 1], 5930).into());
    }
    Ok(options)
}

fn main() -> ExitCode {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let options = match options() {
        Ok(options) => options,
        Err(text) => {
            eprintln!("{text}");
            return ExitCode::from(2);
        }
    };
    let (events, inbox) = mpsc::channel();
    let reporter = Arc::new(Reporter(events));
    let mut builder = SpiceServer::builder()
        .name("test picture")
        .client_policy(options.policy)
        .input(reporter.clone())
        .display_events(reporter);
    for address in options.listen {
        builder = builder.listen(address);
    }
    if let Some(path) = options.password {
        match Secret::from_file(&path) {
            Ok(secret) => builder = builder.password(Some(secret)),
            Err(error) => {
                eprintln!("{error}");
                return ExitCode::FAILURE;
            }
        }
    }
    let server = match builder.start() {
        Ok(server) => server,
        Err(error) => {
            let cause = std::error::Error::source(&error).map(|e| format!(": {e}"));
            eprintln!("{error}{}", cause.unwrap_or_default());
            return ExitCode::FAILURE;
        }
    };
    for address in server.local_addrs() {
        println!("listening on {address}");
    }
    let display = server.display(0).expect("one display");
    let picture = Picture::new(display, options.mode, options.size);
    picture.run(&inbox, options.fps, |event: Event| {
        if !options.quiet {
            println!("{event:?}");
        }
    });
    ExitCode::SUCCESS
}
