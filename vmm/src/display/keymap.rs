//! AT set 1 scancodes (what SPICE clients send) to Linux evdev key codes (what virtio-input wants).
//!
//! Codes without prefix up to 0x58 are the same numbers in both worlds, by design of Linux' input
//! layer; the tables below hold the rest. Sources: the kernel's `atkbd` set 1 keymap as documented
//! by `showkey -s`, and `input-event-codes.h`.

use spice_server::{Scancode, ScancodePrefix};

/// One plain code that differs: `(set 1, evdev)`.
const PLAIN: &[(u8, u16)] = &[
    (0x54, 99),  // SysRq (Alt+PrintScreen)
    (0x55, 186), // F16
    (0x59, 117), // keypad equal
    (0x5a, 190), // F20
    (0x5d, 183), // F13
    (0x5e, 184), // F14
    (0x5f, 185), // F15
    (0x6d, 193), // F23
    (0x6f, 194), // F24
    (0x70, 93),  // katakana / hiragana
    (0x71, 123), // hanja
    (0x72, 122), // hangul
    (0x73, 89),  // ro
    (0x74, 191), // F21
    (0x76, 85),  // zenkaku / hankaku
    (0x77, 91),  // hiragana
    (0x78, 90),  // katakana
    (0x79, 92),  // henkan
    (0x7b, 94),  // muhenkan
    (0x7d, 124), // yen
    (0x7e, 121), // keypad comma
];

/// Codes behind the 0xe0 prefix: `(set 1, evdev)`.
const EXTENDED: &[(u8, u16)] = &[
    (0x03, 187), // F17
    (0x04, 189), // F19
    (0x10, 165), // previous track
    (0x19, 163), // next track
    (0x1c, 96),  // keypad enter
    (0x1d, 97),  // right control
    (0x20, 113), // mute
    (0x21, 140), // calculator
    (0x22, 164), // play / pause
    (0x24, 166), // stop
    (0x2e, 114), // volume down
    (0x30, 115), // volume up
    (0x32, 172), // home page
    (0x35, 98),  // keypad slash
    (0x37, 99),  // print screen
    (0x38, 100), // right alt
    (0x46, 119), // pause (Ctrl+Break)
    (0x47, 102), // home
    (0x48, 103), // up
    (0x49, 104), // page up
    (0x4b, 105), // left
    (0x4d, 106), // right
    (0x4f, 107), // end
    (0x50, 108), // down
    (0x51, 109), // page down
    (0x52, 110), // insert
    (0x53, 111), // delete
    (0x5b, 125), // left meta
    (0x5c, 126), // right meta
    (0x5d, 127), // menu
    (0x5e, 116), // power
    (0x5f, 142), // sleep
    (0x63, 143), // wake up
    (0x65, 217), // search
    (0x66, 156), // bookmarks
    (0x67, 173), // refresh
    (0x68, 128), // stop loading
    (0x69, 159), // forward
    (0x6a, 158), // back
    (0x6b, 157), // computer
    (0x6c, 155), // mail
    (0x6d, 226), // media
    (0x77, 188), // F18
    (0x79, 192), // F22
];

/// `KEY_PAUSE`; its make code is the sequence `e1 1d 45`.
const KEY_PAUSE: u16 = 119;

/// The evdev code of a key. `None` for codes that no keyboard sends.
pub(crate) fn evdev_code(scancode: Scancode) -> Option<u16> {
    let code = scancode.code;
    let table = match scancode.prefix {
        ScancodePrefix::None => PLAIN,
        ScancodePrefix::E0 => EXTENDED,
        ScancodePrefix::E1 => return (scancode == Scancode::PAUSE).then_some(KEY_PAUSE),
    };
    match table.iter().find(|(set1, _)| *set1 == code) {
        Some((_, evdev)) => Some(*evdev),
        None if scancode.prefix == ScancodePrefix::None && (1..=0x58).contains(&code) => {
            Some(u16::from(code))
        }
        None => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_extended_and_pause() {
        assert_eq!(evdev_code(Scancode::plain(0x1e)), Some(30), "A");
        assert_eq!(evdev_code(Scancode::extended(0x48)), Some(103), "arrow up");
        assert_eq!(evdev_code(Scancode::plain(0x48)), Some(72), "keypad 8 is not arrow up");
        assert_eq!(evdev_code(Scancode::PAUSE), Some(119));
        assert_eq!(evdev_code(Scancode::plain(0)), None);
        assert_eq!(evdev_code(Scancode::extended(0)), None);
        assert_eq!(evdev_code(Scancode { code: 1, prefix: ScancodePrefix::E1 }), None);
    }

    #[test]
    fn tables_have_no_doubles() {
        for table in [PLAIN, EXTENDED] {
            for (index, (code, _)) in table.iter().enumerate() {
                assert!(table[index + 1..].iter().all(|(other, _)| other != code), "{code:#x}");
            }
        }
    }
}
