//! Keyboard and pointer, driven by spice-gtk.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use spice_server::{Button, KeyEvent, Leds, Scancode};
use support::{Client, have_client, picture::Event, setup};

const SIZE: (u32, u32) = (640, 480);

fn key(scancode: Scancode, down: bool) -> Event {
    Event::Key(KeyEvent { scancode, down, repeat: false })
}

#[test]
fn keys_arrive_as_they_were_pressed() {
    if !have_client() {
        return;
    }
    let setup = setup(|builder| builder);
    setup.show_background(SIZE);
    let mut client = Client::connect_ready(&setup);
    let is_key = |event| matches!(event, Event::Key(_)).then_some(event);
    // spice-gtk's codes: 0x100 marks the 0xe0 prefix.
    for (code, scancode) in [
        (0x1e, Scancode::plain(0x1e)),
        (0x14d, Scancode::extended(0x4d)),
        (0x11d, Scancode::extended(0x1d)),
        (0x56, Scancode::plain(0x56)),
    ] {
        client.tell(&format!("key-press {code}"));
        assert_eq!(setup.event("key", is_key), key(scancode, true));
        client.tell(&format!("key-press {code}"));
        let repeat = Event::Key(KeyEvent { scancode, down: true, repeat: true });
        assert_eq!(setup.event("key", is_key), repeat);
        client.tell(&format!("key-release {code}"));
        assert_eq!(setup.event("key", is_key), key(scancode, false));
    }
}

#[test]
fn held_keys_and_buttons_are_released_when_the_client_goes() {
    if !have_client() {
        return;
    }
    let setup = setup(|builder| builder);
    setup.show_background(SIZE);
    let mut client = Client::connect_ready(&setup);
    client.tell("key-press 42");
    client.tell("button-press 3 0");
    setup.event("press", |event| (event == Event::Button(Button::Right, true)).then_some(()));
    drop(client);
    let mut missing = vec![Event::Button(Button::Right, false), key(Scancode::plain(42), false)];
    setup.event("releases", |event| {
        missing.retain(|wanted| *wanted != event);
        missing.is_empty().then_some(())
    });
}

#[test]
fn the_pointer_lands_where_the_client_puts_it() {
    if !have_client() {
        return;
    }
    let setup = setup(|builder| builder);
    setup.show_background(SIZE);
    let mut client = Client::connect_ready(&setup);
    let position = |event| match event {
        Event::Absolute(p) => Some((p.display, p.x, p.y, p.surface_width, p.surface_height)),
        _ => None,
    };
    // More moves than the client sends without acknowledgement.
    for step in 0..30 {
        client.tell(&format!("position {} {} 0 0", step * 20, step * 15));
        assert_eq!(setup.event("position", position), (0, step * 20, step * 15, 640, 480));
    }
    client.tell("position 5000 6000 0 0");
    assert_eq!(setup.event("position", position), (0, 639, 479, 640, 480));
    let button = |event| match event {
        Event::Button(..) | Event::Wheel(_) => Some(event),
        _ => None,
    };
    for (number, button_name) in
        [(1, Button::Left), (2, Button::Middle), (3, Button::Right), (6, Button::Side)]
    {
        client.tell(&format!("button-press {number} 0"));
        assert_eq!(setup.event("button", button), Event::Button(button_name, true));
        client.tell(&format!("button-release {number} 0"));
        assert_eq!(setup.event("button", button), Event::Button(button_name, false));
    }
    for (number, steps) in [(4, 1), (5, -1)] {
        client.tell(&format!("button-press {number} 0"));
        client.tell(&format!("button-release {number} 0"));
        assert_eq!(setup.event("wheel", button), Event::Wheel(steps));
    }
}

#[test]
fn server_mouse_mode_sends_movement() {
    if !have_client() {
        return;
    }
    let setup = setup(|builder| builder);
    setup.show_background(SIZE);
    let mut client = Client::connect_ready(&setup);
    client.tell("mouse-mode 1");
    client.event("server mode", |e| (e["ev"] == "mouse" && e["mode"] == 1).then_some(()));
    assert_eq!(setup.server.mouse_mode(), spice_server::MouseMode::Server);
    let mut sum = (0, 0);
    for _ in 0..30 {
        client.tell("motion 3 -2 0");
    }
    // The client may merge moves, but it loses none as long as they are acknowledged.
    setup.event("all movement", |event| {
        if let Event::Relative(dx, dy) = event {
            sum = (sum.0 + dx, sum.1 + dy);
        }
        (sum == (90, -60)).then_some(())
    });
    setup.display.move_cursor(33, 44);
    setup.display.set_cursor(support::picture::cursor());
    setup.display.move_cursor(55, 66);
    client.event("cursor", |e| (e["ev"] == "cursor-move" && e["x"] == 55).then_some(()));
    client.tell("mouse-mode 2");
    client.event("client mode", |e| (e["ev"] == "mouse" && e["mode"] == 2).then_some(()));
}

#[test]
fn lights_follow_the_guest_and_locks_follow_the_client() {
    if !have_client() {
        return;
    }
    let setup = setup(|builder| builder);
    setup.show_background(SIZE);
    let mut client = Client::connect_ready(&setup);
    // Before the guest has said anything about its lights nothing is guessed.
    client.tell("locks 4");
    client.tell("key-press 30");
    let is_key = |event| matches!(event, Event::Key(_)).then_some(event);
    assert_eq!(setup.event("key", is_key), key(Scancode::plain(30), true));
    client.tell("key-release 30");
    setup.event("key", is_key);
    setup.server.set_leds(Leds { num_lock: true, ..Leds::default() });
    client.event("num lock", |e| (e["ev"] == "leds" && e["bits"] == 2).then_some(()));
    // The client wants caps lock and no num lock: both keys are struck.
    client.tell("locks 4");
    for code in [0x45, 0x3a] {
        assert_eq!(setup.event("key", is_key), key(Scancode::plain(code), true));
        assert_eq!(setup.event("key", is_key), key(Scancode::plain(code), false));
    }
}
