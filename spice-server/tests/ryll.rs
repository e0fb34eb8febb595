//! ryll, a client in Rust that shares no code with spice-gtk and spice-html5: picture, keys, size, password
//! and TLS. `cargo xtask test` puts it below `target/tools`; it is driven by its control socket (lines of
//! JSON), without a window.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::Path,
    process::{Child, Command, Stdio},
};

use serde_json::{Value, json};
use spice_server::{ScancodePrefix, Secret, SecureChannels};
use support::{
    PATIENCE, Setup,
    certificates::{Certificates, EC},
    eventually,
    picture::Event,
    setup,
};

/// Where `cargo xtask test` puts it.
const PROGRAM: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/tools/ryll/bin/ryll");

fn have_ryll() -> bool {
    let found = Path::new(PROGRAM).exists();
    if !found {
        eprintln!("SKIPPED: ryll is not installed (cargo xtask test does it)");
    }
    found
}

/// ryll, connected.
struct Ryll {
    child: Child,
    lines: BufReader<UnixStream>,
    id: u64,
    _folder: tempfile::TempDir,
}

impl Ryll {
    /// `connection`: lines of a connection file beside type and host.
    fn connect(connection: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (file, socket) = (folder.path().join("to.vv"), folder.path().join("control"));
        let head = "[virt-viewer]\ntype=spice\nhost=127.0.0.1\n";
        std::fs::write(&file, [head, connection].concat()).unwrap();
        let child = Command::new(PROGRAM)
            .args(["--headless", "--file"])
            .arg(&file)
            .arg("--control-socket")
            .arg(&socket)
            // Its log and its reports go there.
            .env("TMPDIR", folder.path())
            .env("HOME", folder.path())
            .current_dir(folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let mut stream = None;
        eventually("ryll's control socket", || {
            stream = UnixStream::connect(&socket).ok();
            stream.is_some()
        });
        let stream = stream.unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut ryll = Self { child, lines: BufReader::new(stream), id: 0, _folder: folder };
        ryll.call("hello", &json!({ "client_name": "test", "protocol_version": "1.2" })).unwrap();
        ryll
    }

    /// The result of a method, or its error.
    fn call(&mut self, method: &str, params: &Value) -> Result<Value, Value> {
        self.id += 1;
        let request = json!({ "id": self.id, "method": method, "params": params });
        writeln!(self.lines.get_mut(), "{request}").unwrap();
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        let answer: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(answer["id"], self.id);
        if answer["ok"] == true { Ok(answer["result"].clone()) } else { Err(answer) }
    }

    /// What it shows: size and pixels as BGRX, if it shows anything.
    fn shown(&mut self) -> Option<((u32, u32), Vec<u8>)> {
        let picture = self
            .call("screenshot", &json!({ "channel_id": 0, "surface_id": 0, "format": "rgba" }))
            .ok()?;
        let side = |name: &str| picture[name].as_u64().unwrap() as u32;
        let mut pixels = decode_base64(picture["data_base64"].as_str().unwrap());
        for pixel in pixels.chunks_exact_mut(4) {
            pixel.swap(0, 2);
            pixel[3] = 0;
        }
        Some(((side("width"), side("height")), pixels))
    }

    /// Waits until it shows exactly this.
    fn wait_for(&mut self, size: (u32, u32), pixels: &[u8]) {
        eventually("the picture in ryll", || {
            self.shown().is_some_and(|(got, shown)| got == size && shown == pixels)
        });
    }
}

impl Drop for Ryll {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn decode_base64(text: &str) -> Vec<u8> {
    let value = |byte: u8| match byte {
        b'A'..=b'Z' => byte - b'A',
        b'a'..=b'z' => byte - b'a' + 26,
        b'0'..=b'9' => byte - b'0' + 52,
        b'+' => 62,
        b'/' => 63,
        _ => panic!("byte {byte} in base64"),
    };
    let mut out = Vec::with_capacity(text.len() / 4 * 3);
    for four in text.trim_end_matches('=').as_bytes().chunks(4) {
        let word = four.iter().fold(0, |word, byte| word << 6 | u32::from(value(*byte)));
        let word = word << (6 * (4 - four.len()));
        out.extend_from_slice(&word.to_be_bytes()[1..four.len()]);
    }
    out
}

/// A frame's pixels with the unused byte 0, as [`Ryll::shown`] has them.
fn clean(mut pixels: Vec<u8>) -> Vec<u8> {
    pixels.iter_mut().skip(3).step_by(4).for_each(|unused| *unused = 0);
    pixels
}

#[test]
fn ryll_shows_and_drives_the_display() {
    if !have_ryll() {
        return;
    }
    const SIZE: (u32, u32) = (640, 480);
    let setup = setup(|builder| builder.password(Some(Secret::new("sesame").unwrap())));
    let mut pixels = clean(setup.show_background(SIZE));
    let mut ryll = Ryll::connect(&format!("port={}\npassword=sesame\n", setup.address().port()));
    // The first picture, which clients that can are sent on a second surface.
    ryll.wait_for(SIZE, &pixels);

    // Something new, a part that scrolls, one colour, and what was there before.
    let first = pixels.clone();
    for pixel in pixels.chunks_exact_mut(4).skip(100 * 640).take(50 * 640) {
        pixel.copy_from_slice(&[0x20, 0xc0, 0xff, 0]);
    }
    setup.show(SIZE, pixels.clone());
    ryll.wait_for(SIZE, &pixels);
    pixels.copy_within(17 * 640 * 4.., 0);
    setup.show(SIZE, pixels.clone());
    ryll.wait_for(SIZE, &pixels);
    setup.show(SIZE, first.clone());
    ryll.wait_for(SIZE, &first);

    // D and the left arrow key.
    let (d, left) = ((0x20, ScancodePrefix::None), (0x4b, ScancodePrefix::E0));
    for (sent, wanted) in [(0x20, d), (0xe04b, left)] {
        ryll.call("send_key", &json!({ "scancode": sent, "state": "press" })).unwrap();
        for down in [true, false] {
            setup.event("the key", |event| {
                let Event::Key(key) = event else { return None };
                let got = (key.scancode.code, key.scancode.prefix);
                (got == wanted && key.down == down).then_some(())
            });
        }
    }

    // Its window's size becomes the display's, without an agent in the guest.
    ryll.call("resize", &json!({ "width": 800, "height": 600 })).unwrap();
    let size = setup.event("the size", |event| match event {
        Event::Resize(0, monitor) => Some((monitor.width, monitor.height)),
        _ => None,
    });
    assert_eq!(size, (800, 600));
    let larger = clean(setup.show_background(size));
    ryll.wait_for(size, &larger);

    let channels = channels(&setup);
    for name in ["main", "display 0", "inputs", "cursor 0"] {
        assert!(channels.contains(&(name.into(), "tcp".into())), "{name}: {channels:?}");
    }
}

fn channels(setup: &Setup) -> Vec<(String, String)> {
    let status = setup.server.status();
    let channels = &status.clients[0].channels;
    channels.iter().map(|channel| (channel.name.clone(), channel.transport.clone())).collect()
}

#[test]
fn ryll_comes_through_tls() {
    if !have_ryll() {
        return;
    }
    let Some(certificates) = Certificates::new(EC) else { return };
    const SIZE: (u32, u32) = (300, 200);
    let setup = setup(|builder| {
        builder.tls(Some(certificates.config())).secure_channels(SecureChannels::ALL)
    });
    let pixels = clean(setup.show_background(SIZE));
    let port = setup.address().port();
    let authority = std::fs::read_to_string(certificates.path("ca.pem")).unwrap();
    let authority = authority.replace('\n', "\\n");
    let mut ryll = Ryll::connect(&format!("tls-port={port}\nca={authority}\n"));
    ryll.wait_for(SIZE, &pixels);
    eventually("all channels", || channels(&setup).len() >= 4);
    let channels = channels(&setup);
    assert!(channels.iter().all(|(_, transport)| transport == "tcp+tls1.3"), "{channels:?}");
}
