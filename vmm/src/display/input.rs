//! Keyboard and pointer: from SPICE clients to the virtio input devices.

use std::sync::{Arc, Mutex};

use devices::virtio::input::{
    InputEvent, InputHandle, InputKind,
    codes::{
        ABS_X, ABS_Y, BTN_EXTRA, BTN_LEFT, BTN_MIDDLE, BTN_RIGHT, BTN_SIDE, REL_WHEEL, REL_X, REL_Y,
    },
    config::tablet_position,
    scancode::ScancodeDecoder,
};
use spice_server::{Button, InputSink, KeyEvent, PointerPosition, Scancode, ScancodePrefix};

use super::screen::Screen;

/// Bit of a set 1 scancode that makes it a release.
const BREAK: u8 = 0x80;

/// Ctrl, Alt and Delete.
const CTRL_ALT_DEL: [Scancode; 3] =
    [Scancode::plain(0x1d), Scancode::plain(0x38), Scancode::extended(0x53)];

/// The input devices of a machine; each may be missing.
#[derive(Default)]
pub(super) struct Inputs {
    keyboard: Option<InputHandle>,
    tablet: Option<InputHandle>,
    mouse: Option<InputHandle>,
    /// The device that had the last movement: buttons and wheel belong to it.
    pointer: Mutex<Option<InputKind>>,
    /// What the tablet spans.
    screens: Vec<Arc<Screen>>,
}

impl Inputs {
    /// The tablet spans these, which the guest has side by side.
    pub(super) fn span(&mut self, screens: &[Arc<Screen>]) {
        self.screens = screens.to_vec();
    }

    /// Takes the first device of each kind.
    pub(super) fn add(&mut self, handle: &InputHandle) {
        let slot = match handle.kind() {
            InputKind::Keyboard => &mut self.keyboard,
            InputKind::Tablet => &mut self.tablet,
            InputKind::Mouse => &mut self.mouse,
        };
        slot.get_or_insert_with(|| handle.clone());
    }

    pub(super) fn keyboard(&self) -> Option<&InputHandle> {
        self.keyboard.as_ref()
    }

    /// Presses and releases Ctrl+Alt+Delete; `false` without a keyboard or driver for it.
    pub(super) fn ctrl_alt_del(&self) -> bool {
        let Some(keyboard) = &self.keyboard else { return false };
        let down = CTRL_ALT_DEL.iter().map(|key| (*key, true));
        let up = CTRL_ALT_DEL.iter().rev().map(|key| (*key, false));
        down.chain(up).all(|(key, down)| match key_event(key, down) {
            Some(event) => keyboard.send(&[event]),
            None => false,
        })
    }

    fn moved(&self, kind: InputKind) {
        let mut pointer = self.pointer.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if pointer.replace(kind) == Some(kind) {
            return;
        }
        // A button held while the client changed its mode would never be released otherwise.
        let other = if kind == InputKind::Mouse { &self.tablet } else { &self.mouse };
        if let Some(other) = other {
            other.release_all();
        }
    }

    fn pointer(&self) -> Option<&InputHandle> {
        let pointer = *self.pointer.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match pointer {
            Some(InputKind::Mouse) => self.mouse.as_ref(),
            _ => self.tablet.as_ref().or(self.mouse.as_ref()),
        }
    }
}

/// A place on one of several screens as one on the guest's desktop, on which they are side by side as
/// the GPU's display information has them: along each axis, where it is and how long that is.
fn on_desktop(
    sizes: impl Iterator<Item = Option<(u32, u32)>>,
    position: PointerPosition,
) -> ((u32, u32), (u32, u32)) {
    let (mut left, mut width, mut height) = (0, 0, position.surface_height);
    for (screen, size) in (0..).zip(sizes) {
        let own = screen == position.display;
        if own {
            left = width;
        }
        // What the client points at may be older than what the guest shows.
        let size = if own { Some((position.surface_width, position.surface_height)) } else { size };
        let (screen_width, screen_height) = size.unwrap_or_default();
        width += screen_width;
        height = height.max(screen_height);
    }
    ((left + position.x, width.max(position.surface_width)), (position.y, height))
}

fn key_event(scancode: Scancode, down: bool) -> Option<InputEvent> {
    let release = if down { 0 } else { BREAK };
    let mut decoder = ScancodeDecoder::new();
    let sequence: &[u8] = match scancode.prefix {
        ScancodePrefix::None => &[scancode.code | release],
        ScancodePrefix::E0 => &[0xe0, scancode.code | release],
        ScancodePrefix::E1 => &[0xe1, 0x1d | release, scancode.code | release],
    };
    let change = sequence.iter().find_map(|byte| decoder.push(*byte))?;
    Some(InputEvent::key(change.code, change.pressed))
}

impl InputSink for Inputs {
    fn key(&self, event: KeyEvent) {
        // The guest repeats held keys itself (EV_REP), at its own rate.
        if event.repeat {
            return;
        }
        let Some(keyboard) = &self.keyboard else { return };
        match key_event(event.scancode, event.down) {
            Some(key) => {
                keyboard.send(&[key]);
            }
            None => tracing::debug!(scancode = ?event.scancode, "a key no keyboard has"),
        }
    }

    fn pointer_absolute(&self, position: PointerPosition) {
        let Some(tablet) = &self.tablet else { return };
        self.moved(InputKind::Tablet);
        let sizes = self.screens.iter().map(|screen| screen.size());
        let ((x, width), (y, height)) = on_desktop(sizes, position);
        tablet.send(&[
            InputEvent::absolute(ABS_X, tablet_position(x, width)),
            InputEvent::absolute(ABS_Y, tablet_position(y, height)),
        ]);
    }

    fn pointer_relative(&self, dx: i32, dy: i32) {
        let Some(mouse) = &self.mouse else { return };
        self.moved(InputKind::Mouse);
        mouse.send(&[InputEvent::relative(REL_X, dx), InputEvent::relative(REL_Y, dy)]);
    }

    fn button(&self, button: Button, down: bool) {
        let code = match button {
            Button::Left => BTN_LEFT,
            Button::Middle => BTN_MIDDLE,
            Button::Right => BTN_RIGHT,
            Button::Side => BTN_SIDE,
            Button::Extra => BTN_EXTRA,
        };
        if let Some(pointer) = self.pointer() {
            pointer.send(&[InputEvent::key(code, down)]);
        }
    }

    fn wheel(&self, steps: i32) {
        if let Some(pointer) = self.pointer() {
            pointer.send(&[InputEvent::relative(REL_WHEEL, steps)]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_keep_their_prefix() {
        let code =
            |scancode, down| key_event(scancode, down).map(|event| (event.code, event.value));
        assert_eq!(code(Scancode::plain(0x1e), true), Some((30, 1)), "A");
        assert_eq!(code(Scancode::extended(0x48), false), Some((103, 0)), "arrow up");
        assert_eq!(code(Scancode::plain(0x48), true), Some((72, 1)), "keypad 8");
        assert_eq!(code(Scancode::PAUSE, true), Some((119, 1)));
        assert_eq!(code(Scancode::PAUSE, false), Some((119, 0)));
        assert_eq!(code(Scancode::extended(0x00), true), None);
    }

    #[test]
    fn the_tablet_spans_all_screens() {
        let position = |display, x, y| PointerPosition {
            display,
            x,
            y,
            surface_width: 800,
            surface_height: 600,
        };
        let place =
            |sizes: &[Option<(u32, u32)>], position| on_desktop(sizes.iter().copied(), position);
        assert_eq!(place(&[], position(0, 5, 7)), ((5, 800), (7, 600)));
        assert_eq!(place(&[Some((800, 600))], position(0, 5, 7)), ((5, 800), (7, 600)));
        // The second one is off.
        let sizes = [Some((1024, 768)), None, Some((800, 600)), Some((640, 480))];
        assert_eq!(place(&sizes, position(0, 5, 7)), ((5, 2240), (7, 600)));
        assert_eq!(place(&sizes, position(2, 5, 7)), ((1029, 2464), (7, 768)));
        assert_eq!(place(&sizes, position(3, 5, 7)), ((1829, 2624), (7, 768)));
    }

    #[test]
    fn without_devices_events_go_nowhere() {
        let inputs = Inputs::default();
        inputs.wheel(1);
        inputs.button(Button::Left, true);
        inputs.pointer_relative(1, 1);
        assert!(!inputs.ctrl_alt_del());
    }
}
