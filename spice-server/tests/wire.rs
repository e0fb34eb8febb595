//! Clients unlike spice-gtk: the old message header, no LZ4, no mechanism selection.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
};

use spice_server::Severity;
use support::{PATIENCE, setup};

/// A channel with the 18-byte header and no capabilities at all.
struct Plain(TcpStream);

impl Plain {
    fn link(address: SocketAddr, connection_id: u32, kind: u8) -> Self {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut hello = b"REDQ".to_vec();
        for word in [2u32, 2, 18, connection_id] {
            hello.extend_from_slice(&word.to_le_bytes());
        }
        hello.extend_from_slice(&[kind, 0]);
        for word in [0u32, 0, 18] {
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
        Self(stream)
    }

    /// The next message that is no PING, which this client never answers.
    fn message(&mut self) -> (u16, Vec<u8>) {
        loop {
            let mut header = [0; 18];
            self.0.read_exact(&mut header).unwrap();
            let size = u32::from_le_bytes(header[10..14].try_into().unwrap());
            let mut body = vec![0; size as usize];
            self.0.read_exact(&mut body).unwrap();
            let kind = u16::from_le_bytes(header[8..10].try_into().unwrap());
            if kind != 4 {
                return (kind, body);
            }
        }
    }

    fn send(&mut self, kind: u16, body: &[u8]) {
        let mut out = vec![0; 8];
        out.extend_from_slice(&kind.to_le_bytes());
        out.extend_from_slice(&(body.len() as u32).to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(body);
        self.0.write_all(&out).unwrap();
    }
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
    assert_eq!(inputs.0.read(&mut [0; 16]).unwrap_or(0), 0, "closed");
    main.send(999, &[]);
    while main.0.read(&mut [0; 1024]).is_ok_and(|count| count > 0) {}
    support::eventually("the session's end", || setup.server.status().clients.is_empty());
    let mut main = Plain::link(setup.address(), 0, 1);
    assert_eq!(main.message().0, 103);
}
