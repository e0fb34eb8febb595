//! Who may come in: passwords that change and expire, lock-outs, floods, watchers, events.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    sync::{Arc, mpsc},
    time::{Duration, SystemTime},
};

use spice_server::{ClientPolicy, EventSink, Expiry, Refusal, Secret, ServerBuilder, ServerEvent};
use support::{Client, PATIENCE, Setup, eventually, have_client, picture::Event, setup};

struct Observer(mpsc::Sender<ServerEvent>);

impl EventSink for Observer {
    fn event(&self, event: ServerEvent) {
        let _ = self.0.send(event);
    }
}

fn observed(
    configure: impl FnOnce(ServerBuilder) -> ServerBuilder,
) -> (Setup, mpsc::Receiver<ServerEvent>) {
    let (sender, events) = mpsc::channel();
    let setup = setup(|builder| configure(builder.observer(Arc::new(Observer(sender)))));
    setup.show_background((64, 64));
    (setup, events)
}

fn secret(text: &str) -> Secret {
    Secret::new(text).unwrap()
}

fn is_refused(setup: &Setup, password: &str) {
    let client = Client::connect_with(setup.address(), Some(password));
    client.event("authentication error", |e| (e["event"] == "error-auth").then_some(()));
}

fn gets_in(setup: &Setup, password: &str) -> Client {
    let client = Client::connect_with(setup.address(), Some(password));
    client.wait_ready();
    client
}

#[test]
fn passwords_change_and_expire_at_run_time() {
    if !have_client() {
        return;
    }
    let (setup, events) =
        observed(|builder| builder.password_required(true).client_policy(ClientPolicy::Shared));
    is_refused(&setup, "first");
    setup.server.set_password(secret("first"), Expiry::Never);
    let stays = gets_in(&setup, "first");
    setup.server.set_password(secret("second"), Expiry::Never);
    is_refused(&setup, "first");
    drop(gets_in(&setup, "second"));
    setup.server.expire_password(Expiry::Now);
    is_refused(&setup, "second");
    setup.server.expire_password(Expiry::At(SystemTime::now() + Duration::from_secs(3600)));
    drop(gets_in(&setup, "second"));
    eventually("the first client stayed", || setup.server.status().clients.len() == 1);
    setup.server.disconnect();
    stays.named("stopped");
    assert_eq!(setup.server.status().wrong_passwords, 3);
    let wrong = events.try_iter().filter(|e| matches!(e, ServerEvent::WrongPassword { .. }));
    assert_eq!(wrong.count(), 3);
}

#[test]
fn who_is_in_may_open_more_channels_after_the_password_has_changed() {
    let (setup, events) = observed(|builder| builder.password(Some(secret("old"))));
    // A hand-made client, because spice-gtk opens everything at once.
    let mut main = Link::new(setup.address());
    let session = main.open(0, 1, "old").expect("the main channel opens");
    setup.server.set_password(secret("new"), Expiry::Now);
    let mut inputs = Link::new(setup.address());
    assert!(inputs.open(session, 3, "old").is_some());
    let mut cursor = Link::new(setup.address());
    assert!(cursor.open(session, 4, "new").is_none());
    let wrong = |event| matches!(event, ServerEvent::WrongPassword { .. });
    assert!(events.iter().take(2).any(wrong));
}

#[test]
fn an_address_that_guesses_is_locked_out() {
    if !have_client() {
        return;
    }
    let (setup, events) = observed(|builder| {
        builder.password(Some(secret("right"))).client_policy(ClientPolicy::Shared)
    });
    let inside = gets_in(&setup, "right");
    let address = setup.address();
    std::thread::scope(|scope| {
        for _ in 0..10 {
            scope.spawn(move || assert!(Link::new(address).open(0, 1, "wrong").is_none()));
        }
    });
    let locked = events.iter().find_map(|event| match event {
        ServerEvent::WrongPassword { locked_out, .. } => locked_out,
        _ => None,
    });
    assert!(locked.unwrap() >= Duration::from_secs(60));
    // The right password does not help now, and is not even looked at.
    assert!(Link::new(setup.address()).open(0, 1, "right").is_none());
    assert!(Link::from(setup.address(), 2).open(0, 1, "wrong").is_none(), "the usual answer");
    let mut elsewhere = Link::from(setup.address(), 3);
    assert!(elsewhere.open(0, 1, "right").is_some(), "another address is not concerned");
    let refused = |event| matches!(event, ServerEvent::Refused { reason: Refusal::LockedOut, .. });
    assert!(events.iter().any(refused));
    // Who is in stays in and notices nothing.
    drop(elsewhere);
    eventually("one is left", || setup.server.status().clients.len() == 1);
    let wanted = support::hash(&setup.show_background((80, 60)));
    let mut inside = inside;
    eventually("the next picture", || inside.pixels() == wanted);
}

#[test]
fn a_flood_is_cut_off() {
    let (setup, events) = observed(|builder| builder);
    let connections: Vec<_> =
        (0..400).filter_map(|_| TcpStream::connect(setup.address()).ok()).collect();
    let refused =
        |event| matches!(event, ServerEvent::Refused { reason: Refusal::TooManyConnections, .. });
    assert!(events.iter().any(refused));
    eventually("few are kept", || setup.server.status().pending_connections <= 48);
    drop(connections);
}

#[test]
fn watchers_watch_until_it_is_their_turn() {
    if !have_client() {
        return;
    }
    let (setup, events) = observed(|builder| builder.client_policy(ClientPolicy::ViewOnly));
    let mut driver = Client::connect_ready(&setup);
    let mut watcher = Client::connect_ready(&setup);
    let status = setup.server.status();
    assert_eq!(status.clients.iter().map(|c| c.drives).collect::<Vec<_>>(), [true, false]);
    let is_key = |code: u8| {
        move |event| matches!(event, Event::Key(key) if key.scancode.code == code).then_some(())
    };
    let wanted = support::hash(&setup.show_background((300, 200)));
    eventually("the watcher sees", || watcher.pixels() == wanted);
    // More motions than a client sends without an acknowledgement, a key and a size: all in vain.
    for i in 0..20 {
        watcher.tell(&format!("position {i} 5 0 0"));
    }
    watcher.tell("key-press 30");
    watcher.tell("monitor 640 480");
    watcher.tell("bytes");
    watcher.named("bytes");
    driver.tell("key-press 31");
    let mut others = Vec::new();
    setup.event("the driver's key", |event| {
        let found = matches!(&event, Event::Key(key) if key.scancode.code == 31);
        if !found {
            others.push(format!("{event:?}"));
        }
        found.then_some(())
    });
    assert!(!others.iter().any(|e| e.contains("Key") || e.contains("Absolute")), "{others:?}");
    drop(driver);
    eventually("the watcher's turn", || {
        setup.server.status().clients.iter().map(|c| c.drives).eq([true])
    });
    watcher.tell("key-press 32");
    setup.event("the watcher's key", is_key(32));
    watcher.tell("monitor 640 480");
    let size = events.iter().find_map(|event| match event {
        ServerEvent::Resize { width, height, .. } => Some((width, height)),
        _ => None,
    });
    assert_eq!(size, Some((640, 480)));
}

#[test]
fn events_tell_who_comes_and_goes() {
    if !have_client() {
        return;
    }
    let (setup, events) = observed(|builder| builder);
    let client = Client::connect_ready(&setup);
    let Ok(ServerEvent::ClientConnected { session, peer, transport }) =
        events.recv_timeout(PATIENCE)
    else {
        panic!("nobody came");
    };
    assert_eq!(transport, "tcp");
    assert!(peer.is_local());
    drop(client);
    let Ok(ServerEvent::ClientDisconnected { session: gone, bytes_sent, .. }) =
        events.recv_timeout(PATIENCE)
    else {
        panic!("nobody left");
    };
    assert!(gone == session && bytes_sent > 100);
    let agent = setup.server.agent();
    agent.guest_opened(true);
    agent.guest_opened(true);
    agent.guest_opened(false);
    assert_eq!(events.recv_timeout(PATIENCE), Ok(ServerEvent::Agent { open: true }));
    assert_eq!(events.recv_timeout(PATIENCE), Ok(ServerEvent::Agent { open: false }));
}

/// A client that gets as far as a channel's first message. Its ticket is sealed as ours is opened: spice-gtk is the judge elsewhere.
struct Link(TcpStream);

impl Link {
    fn new(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self(stream)
    }

    /// The same from 127.0.0.`host`.
    fn from(address: SocketAddr, host: u8) -> Self {
        use rustix::net::{AddressFamily, SocketType, bind, connect, socket};
        let socket = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
        bind(&socket, &SocketAddr::from(([127, 0, 0, host], 0))).unwrap();
        connect(&socket, &address).unwrap();
        let stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self(stream)
    }

    /// Opens a channel; the session's number (that of INIT for a main channel), if it was let in.
    fn open(&mut self, session: u32, kind: u8, password: &str) -> Option<u32> {
        let mut hello = b"REDQ".to_vec();
        for word in [2u32, 2, 22, session] {
            hello.extend_from_slice(&word.to_le_bytes());
        }
        hello.extend_from_slice(&[kind, 0]);
        for word in [1u32, 0, 18, 0xd] {
            hello.extend_from_slice(&word.to_le_bytes());
        }
        self.0.write_all(&hello).ok()?;
        let mut reply = [0; 16 + 178 + 8];
        self.0.read_exact(&mut reply).ok()?;
        let word = |bytes: &[u8]| u32::from_le_bytes(bytes[..4].try_into().unwrap());
        if word(&reply[16..]) != 0 {
            return None;
        }
        let mut ticket = 1u32.to_le_bytes().to_vec();
        ticket.extend_from_slice(&support::seal(&reply[20..182], password));
        self.0.write_all(&ticket).ok()?;
        let mut result = [0; 4];
        self.0.read_exact(&mut result).ok()?;
        if word(&result) != 0 {
            return None;
        }
        if kind != 1 {
            return Some(session);
        }
        let mut init = [0; 6 + 32];
        self.0.read_exact(&mut init).ok()?;
        Some(word(&init[6..]))
    }
}
