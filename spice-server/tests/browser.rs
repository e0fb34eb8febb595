//! spice-html5 in a headless Chromium: the page, the picture, keys and pointer, plain and with TLS.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use std::{
    io::{Read, Write},
    net::TcpStream,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use spice_server::{Secret, SecureChannels, ServerBuilder, TlsConfig, WebPage};
use support::{Browser, PATIENCE, Setup, have, picture::Event, setup};

const PAGE: &str = "/usr/share/spice-html5";
const SIZE: (u32, u32) = (640, 480);

/// Whether there are a browser and a page; says that the test is skipped if not.
fn have_browser() -> bool {
    let page = Path::new(PAGE).exists();
    if !page {
        eprintln!("SKIPPED: spice-html5 is not installed");
    }
    page && have("chromium") && have("convert")
}

fn web_setup(configure: impl FnOnce(ServerBuilder) -> ServerBuilder) -> Setup {
    let page = WebPage::from_folder(Path::new(PAGE)).unwrap();
    setup(|builder| configure(builder.web(Some(page))))
}

/// Where the picture begins in a screenshot, if all of it is there, pixel by pixel.
fn find(screenshot: &Path, pixels: &[u8]) -> Option<(u32, u32)> {
    let out =
        Command::new("convert").arg(screenshot).args(["-depth", "8", "ppm:-"]).output().ok()?;
    let ppm = out.stdout;
    let header: Vec<&[u8]> = ppm.splitn(4, |byte| byte.is_ascii_whitespace()).collect();
    let width: usize = std::str::from_utf8(header.get(1)?).ok()?.parse().ok()?;
    // `P6`, width, height, 255.
    let body = header.get(3)?.get(4..)?;
    let rgb: Vec<u8> = pixels.chunks_exact(4).flat_map(|p| [p[2], p[1], p[0]]).collect();
    let row = SIZE.0 as usize * 3;
    let mut rows = rgb.chunks_exact(row);
    let first = rows.next()?;
    let at = body.windows(row).position(|window| window == first).filter(|at| at % 3 == 0)?;
    let complete = rows.enumerate().all(|(y, wanted)| {
        let start = at + (y + 1) * width * 3;
        body.get(start..start + row) == Some(wanted)
    });
    let pixel = at / 3;
    complete.then_some(((pixel % width) as u32, (pixel / width) as u32))
}

/// Takes screenshots until one shows the picture; where it is.
fn shown(browser: &mut Browser, folder: &Path, pixels: &[u8]) -> (u32, u32) {
    let file = folder.join("browser.png");
    let end = Instant::now() + 2 * PATIENCE;
    loop {
        browser.tell(&format!("screenshot {}", file.display()));
        browser.named("screenshot");
        if let Some(at) = find(&file, pixels) {
            return at;
        }
        if Instant::now() > end {
            let kept = std::env::temp_dir().join("browser-failed.png");
            std::fs::copy(&file, &kept).unwrap();
            panic!("the picture is not in {}", kept.display());
        }
    }
}

/// Picture, keys and pointer through one address.
fn drive(setup: &Setup, url: &str, transport: &str) {
    let folder = tempfile::tempdir().unwrap();
    let mut browser = Browser::open(url);
    browser.named("started");
    let first = setup.show_background(SIZE);
    let (left, top) = shown(&mut browser, folder.path(), &first);

    // The page's picture follows.
    let mut second = first.clone();
    for pixel in second.chunks_exact_mut(4).skip(100 * 640).take(50 * 640) {
        pixel.copy_from_slice(&[0x20, 0xc0, 0xff, 0]);
    }
    setup.show(SIZE, second.clone());
    assert_eq!(shown(&mut browser, folder.path(), &second), (left, top));

    browser.tell(&format!("mouse mouseMoved {} {}", left + 123, top + 45));
    setup.event("the pointer", |event| match event {
        Event::Absolute(position) => ((position.x, position.y) == (123, 45)).then_some(()),
        _ => None,
    });
    browser.tell(&format!("mouse mousePressed {} {}", left + 123, top + 45));
    setup.event("the button", |event| matches!(event, Event::Button(_, true)).then_some(()));
    browser.tell(&format!("mouse mouseReleased {} {}", left + 123, top + 45));
    setup.event("its release", |event| matches!(event, Event::Button(_, false)).then_some(()));
    browser.tell("key d");
    let is_d = |down| {
        move |event| {
            matches!(event, Event::Key(key) if key.scancode.code == 0x20 && key.down == down)
                .then_some(())
        }
    };
    setup.event("the key", is_d(true));
    setup.event("its release", is_d(false));

    let status = setup.server.status();
    let channels: Vec<_> = status.clients[0]
        .channels
        .iter()
        .map(|c| (c.name.as_str(), c.transport.as_str()))
        .collect();
    for name in ["main", "display 0", "inputs", "cursor 0"] {
        assert!(channels.contains(&(name, transport)), "{name}: {channels:?}");
    }
}

#[test]
fn spice_html5_shows_and_drives_the_display() {
    if !have_browser() {
        return;
    }
    let setup = web_setup(|builder| builder.password(Some(Secret::new("sesame").unwrap())));
    drive(&setup, &format!("http://{}/?password=sesame", setup.address()), "tcp+websocket");
}

#[test]
fn spice_html5_comes_through_tls() {
    if !have_browser() || !have("openssl") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let made = Command::new("openssl")
        .args(["req", "-x509", "-nodes", "-newkey", "ec", "-pkeyopt"])
        .args(["ec_paramgen_curve:prime256v1", "-keyout", "key", "-out", "cert"])
        .args(["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"])
        .current_dir(folder.path())
        .output()
        .unwrap();
    assert!(made.status.success());
    let tls =
        TlsConfig::from_files(&folder.path().join("cert"), &folder.path().join("key")).unwrap();
    let setup = web_setup(|builder| builder.tls(Some(tls)).secure_channels(SecureChannels::ALL));
    // In the clear it is sent to https, on the same port.
    drive(&setup, &format!("http://{}/", setup.address()), "tcp+tls1.3+websocket");
}

/// What the server answers to raw bytes, until it closes or has said enough.
fn answer(setup: &Setup, request: &str, enough: usize) -> String {
    let mut stream = TcpStream::connect(setup.address()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    // In two pieces, as networks do.
    let half_closed = enough == usize::MAX;
    let (one, two) = request.as_bytes().split_at(request.len() / 2);
    stream.write_all(one).unwrap();
    std::thread::sleep(Duration::from_millis(5));
    stream.write_all(two).unwrap();
    if half_closed {
        // As some programs do when they have nothing more to say.
        stream.shutdown(std::net::Shutdown::Write).unwrap();
    }
    let mut answer = Vec::new();
    stream.take(enough as u64).read_to_end(&mut answer).unwrap();
    String::from_utf8_lossy(&answer).into_owned()
}

#[test]
fn pages_and_what_is_none() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("index.html"), "<p>hello</p>").unwrap();
    let large = "x".repeat(3_000_000);
    std::fs::write(folder.path().join("large.js"), &large).unwrap();
    let page = WebPage::from_folder(folder.path()).unwrap();
    let setup = setup(|builder| builder.web(Some(page)));
    let get =
        |path: &str| answer(&setup, &format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n"), usize::MAX);
    let start = get("/?a=b");
    assert!(start.starts_with("HTTP/1.1 307") && start.contains("Location: /index.html?a=b\r\n"));
    let index = get("/index.html");
    assert!(
        index.starts_with("HTTP/1.1 200") && index.ends_with("\r\n\r\n<p>hello</p>"),
        "{index}"
    );
    assert!(get("/large.js").ends_with(&large));
    assert!(get("/../../etc/passwd").starts_with("HTTP/1.1 404"));
    // As much as a head may have, and no end of it.
    let endless = format!("GET / HTTP/1.1\r\nx: {}", "y".repeat(8192 - 19));
    assert!(answer(&setup, &endless, usize::MAX).starts_with("HTTP/1.1 431"));
    assert!(setup.server.status().pending_connections <= 1);
}

#[test]
fn websockets_are_for_pages_of_this_server() {
    let setup = setup(|builder| builder.web_origin("https://desk.example"));
    let ask = |origin: &str| {
        let request = format!(
            "GET / HTTP/1.1\r\nHost: x:1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{origin}\r\n"
        );
        answer(&setup, &request, 12)
    };
    assert_eq!(ask(""), "HTTP/1.1 101");
    assert_eq!(ask("Origin: http://x:1\r\n"), "HTTP/1.1 101");
    assert_eq!(ask("Origin: https://desk.example\r\n"), "HTTP/1.1 101");
    assert_eq!(ask("Origin: http://evil.example\r\n"), "HTTP/1.1 403");
    let none = answer(&setup, "GET / HTTP/1.1\r\nHost: x\r\n\r\n", 12);
    assert_eq!(none, "HTTP/1.1 404", "there is no page");
}
