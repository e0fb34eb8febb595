//! A client with several monitors: each has its picture, its size and its place.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use std::sync::Arc;

use spice_server::{DisplayHandle, MemoryFrame, MonitorConfig, PointerPosition, Rect};
use support::{
    Client, eventually, hash, have_client,
    picture::{self, Event},
    setup,
};

const DISPLAYS: u32 = 4;

/// Shows a picture of this size that no other display shows; its hash.
fn show(display: &DisplayHandle, number: u32, size: (u32, u32)) -> String {
    let mut pixels = picture::background(size.0, size.1);
    for pixel in pixels.chunks_exact_mut(4).take(5000) {
        pixel.copy_from_slice(&[number as u8 * 60, 255, number as u8, 0]);
    }
    let wanted = hash(&pixels);
    let frame = MemoryFrame::new(size.0, size.1, pixels).unwrap();
    display.present(Arc::new(frame), &[Rect::new(0, 0, size.0, size.1)]);
    wanted
}

#[test]
fn four_monitors_have_their_own_pictures_sizes_and_places() {
    if !have_client() {
        return;
    }
    let setup = setup(|builder| builder.displays(DISPLAYS));
    let displays: Vec<_> = (0..DISPLAYS).map(|id| setup.server.display(id).unwrap()).collect();
    assert!(setup.server.display(DISPLAYS).is_none());
    let sizes = [(640, 480), (800, 600), (320, 240), (1024, 300)];
    let numbered = || (0u32..).zip(&displays);
    let shown: Vec<_> =
        numbered().map(|(id, display)| show(display, id, sizes[id as usize])).collect();
    let mut client = Client::connect_ready(&setup);
    for id in 0..DISPLAYS {
        eventually("its picture", || client.pixels_of(id) == shown[id as usize]);
    }

    // Two of them change, one beside the other; the others are switched off, which changes nothing.
    client.tell("monitors 800 608 0 0 1024 768 800 0");
    let mut wanted = vec![];
    while wanted.len() < 2 {
        let resize = |event| match event {
            Event::Resize(id, MonitorConfig { width, height, x, y, .. }) => {
                Some((id, (width, height), (x, y)))
            }
            _ => None,
        };
        wanted.push(setup.event("a size", resize));
    }
    assert_eq!(wanted, [(0, (800, 608), (0, 0)), (1, (1024, 768), (800, 0))]);
    for (id, size, _) in wanted {
        let shown = show(&displays[id as usize], id, size);
        eventually("its new picture", || client.pixels_of(id) == shown);
    }
    for id in 2..DISPLAYS {
        assert_eq!(client.pixels_of(id), shown[id as usize], "as it was");
    }

    // A pointer is somewhere on one of them.
    client.tell("position 1000 700 1 0");
    let position = setup.event("a position", |event| match event {
        Event::Absolute(position) => Some(position),
        _ => None,
    });
    let (surface_width, surface_height) = (1024, 768);
    let expected = PointerPosition { display: 1, x: 1000, y: 700, surface_width, surface_height };
    assert_eq!(position, expected);

    // Each counts for itself.
    let status = setup.server.status();
    let mut counted: Vec<u32> = status.clients[0].displays.iter().map(|d| d.display).collect();
    counted.sort_unstable();
    assert_eq!(counted, [0, 1, 2, 3]);
}
