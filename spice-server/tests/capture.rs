//! What a client sent is kept, and does the same when it is played again.
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
#[path = "../examples/soak-peer/play.rs"]
mod play;
mod support;
#[path = "../examples/soak-peer/tls.rs"]
mod tls;

use spice_server::{Capture, CaptureEvent, read_capture};
use support::{Client, Setup, eventually, have_client, picture::Event, setup};

/// What the program hears up to the release of the last key.
fn inputs(setup: &Setup) -> Vec<String> {
    let mut heard = Vec::new();
    setup.event("the last key", |event| {
        let last = matches!(&event, Event::Key(key) if key.scancode.code == 57 && !key.down);
        if !matches!(event, Event::Viewers(_)) {
            heard.push(format!("{event:?}"));
        }
        last.then_some(())
    });
    heard
}

#[test]
fn a_capture_does_the_same_again() {
    if !have_client() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("capture");
    let capture = Capture::create(&file).unwrap();
    let first = setup(|builder| builder.capture(Some(capture)));
    first.show_background((640, 480));
    let mut client = Client::connect_ready(&first);
    client.tell("position 100 200 0 0");
    for code in [30, 48, 46, 57] {
        client.tell(&format!("key-press {code}"));
        client.tell(&format!("key-release {code}"));
    }
    let wanted = inputs(&first);
    assert!(wanted.iter().any(|event| event.contains("Absolute")), "{wanted:?}");
    assert_eq!(wanted.iter().filter(|event| event.contains("Key")).count(), 8, "{wanted:?}");
    drop(client);
    eventually("the client's end", || first.server.status().clients.is_empty());
    drop(first);

    let records = read_capture(&std::fs::read(&file).unwrap()).unwrap();
    let opened = |event: &&CaptureEvent| matches!(event, CaptureEvent::Opened { .. });
    assert_eq!(records.iter().map(|record| &record.event).filter(opened).count(), 4);
    let second = setup(|builder| builder);
    second.show_background((640, 480));
    play::replay(&records, second.address(), "").unwrap();
    assert_eq!(inputs(&second), wanted);
}
