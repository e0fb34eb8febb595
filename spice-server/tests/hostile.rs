//! Peers that keep to the protocols' letters and mean no good. What they do is that of `bench/soak.py`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    missing_docs,
    unreachable_pub,
    dead_code
)]

#[path = "../examples/soak-peer/peer.rs"]
mod peer;
mod support;
#[path = "../examples/soak-peer/tls.rs"]
mod tls;

use std::{
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpStream},
    path::Path,
    process::Command,
    sync::{Arc, Mutex, mpsc},
    thread,
    time::Duration,
};

use peer::{Layers, Peer};
use spice_server::{ClientPolicy, EventSink, Secret, ServerEvent, TlsConfig};
use support::{PATIENCE, Setup, eventually, setup};

const PASSWORD: &str = "right";

/// Longer than any test: whoever sends for so long is cut off before.
const EVER: Duration = Duration::from_secs(600);

fn tls_config() -> Option<TlsConfig> {
    if !support::have("openssl") {
        return None;
    }
    let folder = tempfile::tempdir().unwrap();
    let (key, certificate) = (folder.path().join("key"), folder.path().join("certificate"));
    let made = Command::new("openssl")
        .args(["req", "-x509", "-nodes", "-newkey", "ec", "-pkeyopt"])
        .args(["ec_paramgen_curve:prime256v1", "-subj", "/CN=localhost", "-keyout"])
        .args([&*key, Path::new("-out"), &*certificate])
        .output()
        .unwrap();
    assert!(made.status.success());
    Some(TlsConfig::from_files(&certificate, &key).unwrap())
}

fn server(tls: Option<TlsConfig>) -> Setup {
    let password = Secret::new(PASSWORD).unwrap();
    let setup = setup(|builder| {
        builder.client_policy(ClientPolicy::Shared).password(Some(password)).tls(tls)
    });
    setup.show_background((64, 64));
    setup
}

fn from(host: u8) -> Option<IpAddr> {
    Some([127, 0, 0, host].into())
}

fn layers() -> Vec<(Layers, Option<TlsConfig>)> {
    let all = ["web", "tls", "tls+web"].map(|name| Layers::from_name(name).unwrap());
    let tls = tls_config();
    let possible = |layers: &Layers| tls.is_some() || !layers.tls;
    all.into_iter().filter(possible).map(|layers| (layers, tls.clone())).collect()
}

/// Somebody else is served.
fn serves(address: SocketAddr) {
    let plain = Layers { tls: false, web: false };
    let mut honest = Peer::connect(address, from(1), plain).unwrap();
    honest.link(0, 1, PASSWORD).unwrap();
    honest.message().unwrap();
}

/// Stops the server, which must not take for ever.
fn stops(setup: Setup) {
    let (done, stopped) = mpsc::channel();
    thread::spawn(move || {
        drop(setup);
        done.send(()).unwrap();
    });
    stopped.recv_timeout(PATIENCE).expect("the server stops");
}

#[test]
fn strangers_who_say_nothing_without_end_are_cut_off() {
    for (layers, tls) in layers() {
        let setup = server(tls);
        let address = setup.address();
        let strangers: Vec<_> = (0..3)
            .map(|_| {
                thread::spawn(move || {
                    let peer = Peer::connect(address, from(2), layers).unwrap();
                    peer.send_nothing(EVER)
                })
            })
            .collect();
        serves(address);
        for stranger in strangers {
            stranger.join().unwrap().expect_err("cut off");
        }
        eventually("nobody is left", || setup.server.status().pending_connections == 0);
    }
}

#[test]
fn clients_who_say_nothing_without_end_hold_nobody_up() {
    const MAIN: u8 = 1;
    const DISPLAY: u8 = 2;
    for (layers, tls) in layers() {
        let setup = server(tls);
        let address = setup.address();
        // One on the thread of all, one on a thread of its own.
        let mut main = Peer::connect(address, from(2), layers).unwrap();
        main.link(0, MAIN, PASSWORD).unwrap();
        let (_, init) = main.message().unwrap();
        let session = u32::from_le_bytes(*init.first_chunk().unwrap());
        let mut display = Peer::connect(address, from(2), layers).unwrap();
        display.link(session, DISPLAY, PASSWORD).unwrap();
        let channels =
            || setup.server.status().clients.iter().map(|c| c.channels.len()).sum::<usize>();
        eventually("both channels", || channels() == 2);
        let endless = [main, display].map(|peer| thread::spawn(move || peer.send_nothing(EVER)));
        for _ in 0..3 {
            serves(address);
        }
        if layers.web {
            // They are slow to come to the point, which is no crime. Empty records are one.
            eventually("only they are left", || channels() == 2);
        }
        stops(setup);
        for peer in endless {
            peer.join().unwrap().expect_err("the server is gone");
        }
    }
}

#[test]
fn links_begun_before_the_lock_out_are_locked_out_as_well() {
    let (setup, plain) = (server(None), Layers { tls: false, web: false });
    let inside = {
        let mut main = Peer::connect(setup.address(), from(2), plain).unwrap();
        main.link(0, 1, PASSWORD).unwrap();
        let (_, init) = main.message().unwrap();
        (u32::from_le_bytes(*init.first_chunk().unwrap()), main)
    };
    let mut links: Vec<_> = (0..30)
        .map(|_| {
            let mut link = Peer::connect(setup.address(), from(2), plain).unwrap();
            let key = link.begin_link(0, 1).unwrap();
            (link, key)
        })
        .collect();
    let mut late = links.pop().unwrap();
    // All of them at once, so that none waits for the others' answers.
    for (link, key) in &mut links {
        link.send_ticket(key, "wrong").unwrap();
    }
    // Not the answers, which take seconds: a link has ten until it is cut off.
    eventually("the lock-out", || setup.server.status().wrong_passwords == 10);
    late.0.send_ticket(&late.1, PASSWORD).unwrap();
    assert_ne!(late.0.result().unwrap(), 0, "the right one is not looked at either");
    for (link, _) in &mut links {
        assert_ne!(link.result().unwrap(), 0);
    }
    assert_eq!(setup.server.status().wrong_passwords, 10, "the others are not looked at");
    // Who is in may open more, from where it is.
    let mut more = Peer::connect(setup.address(), from(2), plain).unwrap();
    more.link(inside.0, 3, PASSWORD).unwrap();
    serves(setup.address());
}

#[test]
fn a_callback_that_does_not_return_does_not_keep_the_program_from_ending() {
    struct Stuck(Mutex<mpsc::Sender<()>>, Arc<Mutex<()>>);
    impl EventSink for Stuck {
        fn event(&self, _: ServerEvent) {
            self.0.lock().unwrap().send(()).unwrap();
            drop(self.1.lock());
        }
    }
    let (sender, called) = mpsc::channel();
    let gate = Arc::new(Mutex::new(()));
    let closed = gate.lock().unwrap();
    let setup =
        setup(|builder| builder.observer(Arc::new(Stuck(Mutex::new(sender), gate.clone()))));
    let mut stream = TcpStream::connect(setup.address()).unwrap();
    let request = "GET / HTTP/1.1\r\nHost: here\r\nOrigin: http://elsewhere\r\nUpgrade: websocket\r\n\
                   Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n\
                   Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
                   Sec-WebSocket-Protocol: binary\r\n\r\n";
    stream.write_all(request.as_bytes()).unwrap();
    called.recv_timeout(PATIENCE).unwrap();
    stops(setup);
    drop(closed);
    let _ = stream.read(&mut [0]);
}
