//! Clients unlike spice-gtk: the old message header, no LZ4, no mechanism selection.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use spice_server::{AgentPort, Severity};
use support::{PATIENCE, eventually, guest_message, setup};

const CLIPBOARD: u32 = 4;

/// A channel with the 18-byte header.
struct Plain {
    stream: TcpStream,
    /// How often it had to say something.
    turns: usize,
}

impl Plain {
    /// Without any capabilities.
    fn link(address: SocketAddr, connection_id: u32, kind: u8) -> Self {
        Self::link_with(address, connection_id, kind, 0)
    }

    fn link_with(address: SocketAddr, connection_id: u32, kind: u8, capabilities: u32) -> Self {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut hello = b"REDQ".to_vec();
        for word in [2u32, 2, 22, connection_id] {
            hello.extend_from_slice(&word.to_le_bytes());
        }
        hello.extend_from_slice(&[kind, 0]);
        for word in [0u32, 1, 18, capabilities] {
            hello.extend_from_slice(&word.to_le_bytes());
        }
        stream.write_all(&hello).unwrap();
        let mut reply = [0; 16 + 178 + 8];
        stream.read_exact(&mut reply).unwrap();
        assert_eq!(reply[16..20], [0; 4]);
        stream.write_all(&[0x11; 128]).unwrap();
        let mut result = [0; 4];
        stream.read_exact(&mut result).unwrap();
        assert_eq!(result, [0; 4]);
        Self { stream, turns: 2 }
    }

    /// The next message that is no PING, which this client never answers.
    fn message(&mut self) -> (u16, Vec<u8>) {
        loop {
            let mut header = [0; 18];
            self.stream.read_exact(&mut header).unwrap();
            let size = u32::from_le_bytes(header[10..14].try_into().unwrap());
            let mut body = vec![0; size as usize];
            self.stream.read_exact(&mut body).unwrap();
            let kind = u16::from_le_bytes(header[8..10].try_into().unwrap());
            if kind != 4 {
                return (kind, body);
            }
        }
    }

    fn send(&mut self, kind: u16, body: &[u8]) {
        self.turns += 1;
        self.stream.write_all(&packet(kind, body)).unwrap();
    }
}

fn packet(kind: u16, body: &[u8]) -> Vec<u8> {
    let mut out = vec![0; 8];
    out.extend_from_slice(&kind.to_le_bytes());
    out.extend_from_slice(&(body.len() as u32).to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(body);
    out
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

#[test]
fn an_old_client_gets_raw_pictures_on_its_one_surface() {
    let setup = setup(|builder| builder);
    let size = (300, 200);
    let pixels = setup.show_background(size);
    let mut main = Plain::link(setup.address(), 0, 1);
    let (kind, init) = main.message();
    assert_eq!(kind, 103);
    let session = word(&init, 0);
    main.send(104, &[]);
    let (kind, list) = main.message();
    assert_eq!((kind, word(&list, 0)), (104, 3));

    let mut display = Plain::link(setup.address(), session, 2);
    display.send(101, &[0; 14]);
    let (kind, create) = display.message();
    assert_eq!(kind, 314);
    assert_eq!([0, 4, 8, 12, 16].map(|at| word(&create, at)), [0, 300, 200, 32, 1]);
    assert_eq!(display.message().0, 317);
    let mut canvas = vec![0xee; pixels.len()];
    loop {
        let (kind, body) = display.message();
        match kind {
            102 => break,
            _ => assert_eq!(kind, 304),
        }
        assert_eq!(word(&body, 0), 0);
        let [top, left, bottom, right] = [4, 8, 12, 16].map(|at| word(&body, at) as usize);
        let image = &body[word(&body, 21) as usize..];
        assert_eq!(image[8], 0, "a raw bitmap");
        let rows = image[36..].chunks((right - left) * 4);
        for (y, row) in (top..bottom).zip(rows) {
            let at = (y * 300 + left) * 4;
            canvas[at..at + row.len()].copy_from_slice(row);
        }
    }
    assert!(canvas == pixels);
}

/// What a connect takes at least: the ticket needs the key in the answer to a link, and the display's link
/// needs the session's number. Nothing of this server's own comes on top.
#[test]
fn four_answers_lead_to_the_whole_picture() {
    const LZ4: u32 = 1 << 5;
    let setup = setup(|builder| builder);
    setup.show_background((160, 120));
    for capabilities in [0, LZ4] {
        let mut main = Plain::link(setup.address(), 0, 1);
        let (kind, init) = main.message();
        assert_eq!(kind, 103);
        // The channels are told without being asked for.
        assert_eq!(main.message().0, 104);
        let mut display = Plain::link_with(setup.address(), word(&init, 0), 2, capabilities);
        // On the surface that is shown, and on all.
        let (mut painted, mut drawn) = (0, 0);
        loop {
            let (kind, body) = display.message();
            let rect = |at: usize| [0, 4, 8, 12].map(|side| word(&body, at + side));
            match kind {
                102 => break,
                302 | 304 => {
                    let [top, left, bottom, right] = rect(4);
                    let area = (bottom - top) * (right - left);
                    painted += if word(&body, 0) == 0 { area } else { 0 };
                    drawn += area;
                }
                _ => {}
            }
        }
        assert_eq!(painted, 160 * 120, "the picture is whole when it may be shown");
        let copied = if capabilities == LZ4 { painted } else { 0 };
        assert_eq!(drawn, painted + copied, "and so is what it is copied from");
        // Nothing is sent after the links; what would wait for an answer never comes.
        assert_eq!(main.turns + display.turns, 4);
    }
}

#[test]
fn notices_reach_who_is_there() {
    let setup = setup(|builder| builder);
    setup.show_background((64, 64));
    setup.server.notify(Severity::Error, "long ago");
    let mut main = Plain::link(setup.address(), 0, 1);
    assert_eq!(main.message().0, 103);
    assert_eq!(main.message().0, 104);
    for text in ["the first", "and the second"] {
        setup.server.notify(Severity::Warning, text);
        // Whatever else there is to say; PING is one of it.
        let body = loop {
            match main.message() {
                (7, body) => break body,
                (kind, _) => assert_ne!(kind, 6),
            }
        };
        assert_eq!([8, 12, 16, 20].map(|at| word(&body, at)), [1, 2, 0, text.len() as u32]);
        assert_eq!(body[24..], [text.as_bytes(), &[0]].concat());
    }
}

#[test]
fn nonsense_ends_the_session_and_nothing_else() {
    let setup = setup(|builder| builder);
    setup.show_background((64, 64));
    let mut main = Plain::link(setup.address(), 0, 1);
    let session = word(&main.message().1, 0);
    let mut inputs = Plain::link(setup.address(), session, 3);
    assert_eq!(inputs.message().0, 101);
    // Too large a message, then one that does not exist.
    inputs.send(101, &[0; 1000]);
    assert_eq!(inputs.stream.read(&mut [0; 16]).unwrap_or(0), 0, "closed");
    main.send(999, &[]);
    while main.stream.read(&mut [0; 1024]).is_ok_and(|count| count > 0) {}
    support::eventually("the session's end", || setup.server.status().clients.is_empty());
    let mut main = Plain::link(setup.address(), 0, 1);
    assert_eq!(main.message().0, 103);
}

/// A client without acknowledgements, ever: there is no window of messages that would fill up.
#[test]
fn frames_need_no_acknowledgement() {
    let setup = setup(|builder| builder);
    setup.show((64, 64), vec![0; 64 * 64 * 4]);
    let mut main = Plain::link(setup.address(), 0, 1);
    let session = word(&main.message().1, 0);
    main.send(104, &[]);
    let mut display = Plain::link(setup.address(), session, 2);
    display.send(101, &[0; 14]);
    while display.message().0 != 102 {}
    for frame in 1..=200 {
        setup.show((64, 64), vec![frame; 64 * 64 * 4]);
        let kind = display.message().0;
        assert!((302..=318).contains(&kind), "frame {frame}: {kind}");
    }
}

#[test]
fn a_pointer_is_sent_once() {
    /// `FLAG_CACHE_ME` and `FLAG_FROM_CACHE`.
    const FLAGS: [u16; 2] = [2, 4];
    let setup = setup(|builder| builder);
    setup.show_background((64, 64));
    let arrow = support::picture::cursor();
    let mut hand = arrow.clone();
    hand.argb.iter_mut().for_each(|byte| *byte /= 2);
    let mut main = Plain::link(setup.address(), 0, 1);
    let session = word(&main.message().1, 0);
    let mut cursor = Plain::link(setup.address(), session, 4);
    assert_eq!(cursor.message().0, 101);
    let mut seen = Vec::new();
    for (image, flags) in [(&arrow, FLAGS[0]), (&hand, FLAGS[0]), (&arrow, FLAGS[1])] {
        setup.display.set_cursor(image.clone());
        let (kind, body) = loop {
            match cursor.message() {
                (104, _) => {}
                message => break message,
            }
        };
        assert_eq!(kind, 103);
        // Behind the position and the visibility.
        assert_eq!(u16::from_le_bytes([body[5], body[6]]), flags);
        let number = body[7..15].to_vec();
        let pixels = (image.width * image.height * 4) as usize;
        let expected = 5 + 19 + if flags == FLAGS[0] { pixels } else { 0 };
        assert_eq!(body.len(), expected);
        seen.push(number);
    }
    assert_eq!(seen[0], seen[2]);
    assert_ne!(seen[0], seen[1]);
}

/// A guest's port whose reader comes by when the test says so.
#[derive(Default)]
struct Gate {
    open: AtomicBool,
    received: AtomicUsize,
    refused: AtomicUsize,
    wanted: AtomicUsize,
}

impl AgentPort for Gate {
    fn to_guest(&self, bytes: &[u8]) -> usize {
        if !self.open.load(Ordering::Acquire) {
            self.refused.fetch_add(1, Ordering::Release);
            return 0;
        }
        self.received.fetch_add(bytes.len(), Ordering::Release);
        bytes.len()
    }

    fn guest_data_wanted(&self) {
        self.wanted.fetch_add(1, Ordering::Release);
    }
}

/// What the agent's part of a main channel is told; PONGs, LEDs and such aside.
fn agent_message(main: &mut Plain) -> (u16, Vec<u8>) {
    loop {
        let (kind, body) = main.message();
        if matches!(kind, 109 | 110) {
            return (kind, body);
        }
    }
}

/// Nothing else goes on that would wake the server by chance.
#[test]
fn a_client_gets_its_tokens_back_as_soon_as_the_guest_reads() {
    let port = Arc::new(Gate::default());
    let setup = setup(|builder| builder.agent(port.clone()));
    setup.show_background((64, 64));
    let agent = setup.server.agent();
    agent.guest_opened(true);
    let mut main = Plain::link(setup.address(), 0, 1);
    let (kind, init) = main.message();
    assert_eq!((kind, word(&init, 16)), (103, 1));
    let all = word(&init, 20);
    main.send(106, &u32::MAX.to_le_bytes());

    let count = |bytes: &AtomicUsize| bytes.load(Ordering::Acquire);
    for round in 0..20 {
        port.open.store(false, Ordering::Release);
        let before = (count(&port.refused), count(&port.received), read(&setup));
        let message = guest_message(CLIPBOARD, &vec![round; 2000 * all as usize]);
        let chunks: Vec<_> = message[8..].chunks(2048).collect();
        assert_eq!(chunks.len(), all as usize);
        let packets: Vec<u8> = chunks.iter().flat_map(|chunk| packet(107, chunk)).collect();
        main.stream.write_all(&packets).unwrap();
        eventually("all is read", || read(&setup) - before.2 >= packets.len() as u64);
        eventually("the port is full", || count(&port.refused) > before.0);
        port.open.store(true, Ordering::Release);
        agent.writable();
        let mut tokens = 0;
        while tokens < all {
            let (kind, given) = agent_message(&mut main);
            assert_eq!(kind, 110);
            tokens += word(&given, 0);
        }
        let wire = message.len() - 8 + 8 * chunks.len();
        assert_eq!(count(&port.received) - before.1, wire);
    }
}

/// Bytes that the server has read from its one client.
fn read(setup: &support::Setup) -> u64 {
    setup.server.status().clients.first().map_or(0, |client| client.bytes_received)
}

/// With a client that takes everything.
#[test]
fn the_guest_is_asked_for_what_was_refused_as_soon_as_the_client_has_read() {
    let port = Arc::new(Gate::default());
    port.open.store(true, Ordering::Release);
    let setup = setup(|builder| builder.agent(port.clone()));
    setup.show_background((64, 64));
    let agent = setup.server.agent();
    agent.guest_opened(true);
    let mut main = Plain::link(setup.address(), 0, 1);
    assert_eq!(main.message().0, 103);
    main.send(106, &u32::MAX.to_le_bytes());
    // What the guest says before the client has begun is lost; this comes after the beginning.
    main.send(107, &guest_message(6, &[0; 8])[8..]);
    eventually("the client's capabilities", || port.received.load(Ordering::Acquire) > 0);

    let mut message = Vec::new();
    for chunk in guest_message(CLIPBOARD, &vec![9; 300_000])[8..].chunks(2048) {
        message.extend_from_slice(&1u32.to_le_bytes());
        message.extend_from_slice(&(chunk.len() as u32).to_le_bytes());
        message.extend_from_slice(chunk);
    }
    let reader = std::thread::spawn(move || {
        let mut bytes = 0;
        while bytes < 300_020 {
            if let (109, body) = agent_message(&mut main) {
                bytes += body.len();
            }
        }
        bytes
    });
    let mut rest = &message[..];
    let mut seen = 0;
    while !rest.is_empty() {
        rest = &rest[agent.guest_data(rest)..];
        if !rest.is_empty() {
            eventually("room", || port.wanted.load(Ordering::Acquire) > seen);
            seen = port.wanted.load(Ordering::Acquire);
        }
    }
    assert_eq!(reader.join().unwrap(), 300_020);
}

/// As that of a tailnet is, which is there when somebody has logged in.
#[test]
fn an_address_that_comes_later_is_served_then() {
    const ADDRESS: &str = "192.0.2.7";
    // Nobody else is in this namespace.
    const PORT: u16 = 5900;
    let run = |program: &str, arguments: &[&str]| Command::new(program).args(arguments).output();
    if std::env::var_os("DRAGO_TEST_NAMESPACE").is_none() {
        if !run("unshare", &["-rn", "true"]).is_ok_and(|output| output.status.success()) {
            eprintln!("SKIPPED: no network namespaces here");
            return;
        }
        let done = Command::new("unshare")
            .arg("-rn")
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "an_address_that_comes_later_is_served_then", "--nocapture"])
            .env("DRAGO_TEST_NAMESPACE", "1")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&done.stdout);
        let errors = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success() && said.contains("1 passed"), "{said}{errors}");
        return;
    }
    let address = SocketAddr::new(ADDRESS.parse().unwrap(), PORT);
    let _setup = setup(|builder| builder.listen(address));
    assert!(TcpStream::connect(address).is_err(), "there is no such address yet");
    for arguments in [&["link", "set", "lo", "up"][..], &["addr", "add", ADDRESS, "dev", "lo"]] {
        assert!(run("ip", arguments).unwrap().status.success(), "ip {arguments:?}");
    }
    let mut main = Plain::link(address, 0, 1);
    assert_eq!(main.message().0, 103);
}
