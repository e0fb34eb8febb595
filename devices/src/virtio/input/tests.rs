use std::sync::mpsc;

use super::{
    InputEvent, InputHandle, InputKind, Leds,
    codes::*,
    config::{InputConfig, TABLET_MAX, tablet_position},
    device::Input,
};
use crate::{
    spec::Spec,
    virtio::{
        VirtioDevice,
        testing::{Driver, Part},
    },
};

fn open(kind: InputKind) -> (Input, InputHandle) {
    InputConfig { kind, serial: "s1".to_owned() }.open().unwrap()
}

/// Reads configuration space the way Linux does: select, then size, then the payload.
fn query(device: &mut Input, select: u8, subselect: u8) -> Vec<u8> {
    device.write_config(0, &[select]);
    device.write_config(1, &[subselect]);
    let mut size = [0];
    device.read_config(2, &mut size);
    let mut payload = vec![0; usize::from(size[0])];
    device.read_config(8, &mut payload);
    payload
}

fn has_bit(bitmap: &[u8], code: u16) -> bool {
    bitmap.get(usize::from(code / 8)).is_some_and(|byte| byte & (1 << (code % 8)) != 0)
}

#[test]
fn configuration_space_describes_each_kind() {
    let (mut keyboard, _) = open(InputKind::Keyboard);
    assert_eq!(query(&mut keyboard, 1, 0), b"drago keyboard");
    assert_eq!(query(&mut keyboard, 2, 0), b"s1");
    assert_eq!(query(&mut keyboard, 3, 0), [6, 0, 0xf4, 0x1a, 1, 0, 1, 0]);
    let keys = query(&mut keyboard, 0x11, EV_KEY as u8);
    for code in [KEY_ESC, 30, KEY_F12, KEY_UP, KEY_VOLUMEUP, KEY_PLAYPAUSE, KEY_F24, KEY_LEFTMETA] {
        assert!(has_bit(&keys, code), "key {code}");
    }
    assert!(!has_bit(&keys, 0) && !has_bit(&keys, 84), "reserved codes");
    assert_eq!(query(&mut keyboard, 0x11, EV_LED as u8), [0b111]);
    assert!(!query(&mut keyboard, 0x11, EV_REP as u8).is_empty());
    assert!(query(&mut keyboard, 0x11, EV_ABS as u8).is_empty());
    assert!(query(&mut keyboard, 0x12, 0).is_empty());
    assert!(query(&mut keyboard, 0xff, 0xff).is_empty());

    let (mut tablet, _) = open(InputKind::Tablet);
    assert_eq!(query(&mut tablet, 0x11, EV_ABS as u8), [0b11]);
    let wheel = query(&mut tablet, 0x11, EV_REL as u8);
    assert!(has_bit(&wheel, REL_WHEEL) && !has_bit(&wheel, REL_X));
    let buttons = query(&mut tablet, 0x11, EV_KEY as u8);
    assert!((BTN_LEFT..=BTN_EXTRA).all(|code| has_bit(&buttons, code)));
    let info = query(&mut tablet, 0x12, ABS_Y as u8);
    assert_eq!(info.len(), 20);
    assert_eq!(info[4..8], TABLET_MAX.to_le_bytes());
    assert!(query(&mut tablet, 0x12, 2).is_empty());

    let (mut mouse, _) = open(InputKind::Mouse);
    let axes = query(&mut mouse, 0x11, EV_REL as u8);
    assert!([REL_X, REL_Y, REL_WHEEL, REL_HWHEEL].iter().all(|code| has_bit(&axes, *code)));
    // Reads and writes beyond the end.
    mouse.write_config(1, &[0; 200]);
    mouse.write_config(u64::MAX, &[1]);
    let mut data = [7; 16];
    mouse.read_config(130, &mut data);
    assert_eq!(data[..6], [0; 6]);
    assert_eq!(data[6..], [7; 10]);
    mouse.read_config(u64::MAX, &mut data);
}

#[test]
fn events_reach_the_driver_in_groups() {
    let (mut device, handle) = open(InputKind::Keyboard);
    let press = InputEvent::key(30, true);
    assert!(!handle.send(&[press]), "nobody is there yet");
    let mut driver = Driver::start(&mut device);
    assert!(handle.send(&[press]));
    // Without buffers the events wait.
    let events = &mut driver.queues[0];
    events.fill(1, 8);
    assert_eq!(events.wait_used().1, press.encode());
    assert!(handle.send(&[InputEvent::key(30, false)]));
    events.fill(40, 8);
    assert_eq!(events.wait_used().1, InputEvent::SYN.encode());
    assert_eq!(events.wait_used().1, InputEvent::key(30, false).encode());
    assert_eq!(events.wait_used().1, InputEvent::SYN.encode());

    device.reset();
    device.reset();
    assert!(!handle.send(&[press]));
    let mut driver = Driver::start(&mut device);
    driver.queues[0].fill(10, 8);
    assert!(handle.send(&[press]), "the press before the reset is forgotten");
    assert_eq!(driver.queues[0].wait_used().1, press.encode());
    handle.release_all();
    driver.queues[0].wait_used();
    assert_eq!(driver.queues[0].wait_used().1, InputEvent::key(30, false).encode());
    assert!(!driver.interrupt.needs_reset());
}

#[test]
fn lights_are_reported() {
    let (mut device, handle) = open(InputKind::Keyboard);
    let (sender, changes) = mpsc::channel();
    handle.on_led(move |leds| {
        let _ = sender.send(leds);
    });
    let mut driver = Driver::start(&mut device);
    let light = |code, value| InputEvent { kind: EV_LED, code, value }.encode();
    driver.queues[1].send(&[Part::Out(&light(LED_CAPSL, 1))]);
    driver.queues[1].wait_used();
    let caps = Leds { caps_lock: true, ..Leds::default() };
    assert_eq!(changes.recv().unwrap(), caps);
    assert_eq!(handle.leds(), caps);
    driver.queues[1].add(&[Part::Out(&light(LED_CAPSL, 1))]);
    driver.queues[1].send(&[Part::Out(&light(LED_NUML, 1))]);
    assert!(changes.recv().unwrap().num_lock);
    device.reset();
    assert_eq!(changes.recv().unwrap(), Leds::default());
}

#[test]
fn a_buffer_that_is_too_small_is_a_violation() {
    let (mut device, handle) = open(InputKind::Mouse);
    let mut driver = Driver::start(&mut device);
    driver.queues[0].fill(1, 4);
    handle.send(&[InputEvent::relative(REL_X, 1)]);
    driver.interrupt.wait_config_change();
    assert!(driver.interrupt.needs_reset());
}

#[test]
fn tablet_positions_find_their_pixel() {
    for pixels in [1u32, 2, 640, 1024, 1279, 3840, 7680] {
        for pixel in [0, 1, pixels / 3, pixels / 2, pixels - 1] {
            let pixel = pixel.min(pixels - 1);
            let position = tablet_position(pixel, pixels) as u64;
            assert!(position <= TABLET_MAX as u64);
            let libinput = position * u64::from(pixels) / 32768;
            assert_eq!(libinput, u64::from(pixel), "{pixel} of {pixels}");
        }
    }
    assert_eq!(tablet_position(9, 0), 16384);
}

#[test]
fn options() {
    let parse = |text: &str| InputConfig::parse(Spec::parse("input", text).unwrap());
    assert!(format!("{:?}", parse("tablet,serial=a").unwrap()).contains("Tablet"));
    for wrong in ["", "joystick", "mouse,x=1", "kind=mouse"] {
        assert!(parse(wrong).is_err(), "{wrong}");
    }
}
