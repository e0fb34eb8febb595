//! A TCP proxy that delays every byte, to see what a long line does to a protocol without having
//! one: `delay-proxy LISTEN TARGET RTT_MS [MBIT]`. Half of the round trip is added each way; the
//! bandwidth is unlimited unless a limit in Mbit/s is given.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "example")]

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::mpsc::sync_channel,
    thread,
    time::{Duration, Instant},
};

/// Chunks on the way in each direction: what a long fat line holds.
const LINE_CHUNKS: usize = 1024;
const CHUNK: usize = 32 * 1024;
/// Smaller, so that a thin line delivers evenly.
const LIMITED_CHUNK: usize = 2 * 1024;
/// What waits before a thin line at most, in bytes: a router's queue.
const QUEUE: usize = 64 * 1024;

/// Carries one direction until its end.
fn carry(mut from: TcpStream, mut to: TcpStream, delay: Duration, mbit: Option<f64>) {
    let (line_in, line_out) = sync_channel::<(Instant, Vec<u8>)>(LINE_CHUNKS);
    thread::spawn(move || {
        let mut free_at = Instant::now();
        let size = if mbit.is_some() { LIMITED_CHUNK } else { CHUNK };
        loop {
            let mut chunk = vec![0; size];
            let Ok(count @ 1..) = from.read(&mut chunk) else { break };
            chunk.truncate(count);
            let now = Instant::now();
            if let Some(mbit) = mbit {
                // The line is busy for as long as these bytes take.
                free_at = free_at.max(now) + Duration::from_secs_f64(count as f64 * 8e-6 / mbit);
                thread::sleep(free_at.saturating_duration_since(now));
            }
            if line_in.send((Instant::now() + delay, chunk)).is_err() {
                break;
            }
        }
    });
    while let Ok((due, chunk)) = line_out.recv() {
        thread::sleep(due.saturating_duration_since(Instant::now()));
        if to.write_all(&chunk).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Both);
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [listen, target, rtt, limit @ ..] = &args[..] else {
        eprintln!("delay-proxy LISTEN TARGET RTT_MS [MBIT]");
        std::process::exit(2);
    };
    let delay = Duration::from_secs_f64(rtt.parse::<f64>().expect("RTT in ms") / 2000.0);
    let mbit = limit.first().map(|text| text.parse::<f64>().expect("Mbit/s"));
    let listener = TcpListener::bind(listen).expect("listen address");
    println!("listening on {}", listener.local_addr().expect("address"));
    for client in listener.incoming().map_while(Result::ok) {
        let Ok(server) = TcpStream::connect(target) else { continue };
        if mbit.is_some() {
            let _ = rustix::net::sockopt::set_socket_recv_buffer_size(&server, QUEUE);
        }
        let _ = client.set_nodelay(true);
        let _ = server.set_nodelay(true);
        let (client2, server2) = (client.try_clone().unwrap(), server.try_clone().unwrap());
        thread::spawn(move || carry(client, server, delay, mbit));
        thread::spawn(move || carry(server2, client2, delay, mbit));
    }
}
