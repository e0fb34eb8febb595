//! AT scancodes, set 1, as PC keyboards and remote desktop clients send them, to key codes.

use super::codes::*;

/// A key that goes down or up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeyChange {
    /// `codes::KEY_*`.
    pub code: u16,
    /// Down or up.
    pub pressed: bool,
}

/// Keys whose scancode follows the prefix `e0`.
const EXTENDED: &[(u8, u16)] = &[
    (0x10, KEY_PREVIOUSSONG),
    (0x19, KEY_NEXTSONG),
    (0x1c, KEY_KPENTER),
    (0x1d, KEY_RIGHTCTRL),
    (0x20, KEY_MUTE),
    (0x21, KEY_CALC),
    (0x22, KEY_PLAYPAUSE),
    (0x24, KEY_STOPCD),
    (0x2e, KEY_VOLUMEDOWN),
    (0x30, KEY_VOLUMEUP),
    (0x32, KEY_HOMEPAGE),
    (0x35, KEY_KPSLASH),
    (0x37, KEY_SYSRQ),
    (0x38, KEY_RIGHTALT),
    (0x46, KEY_PAUSE),
    (0x47, KEY_HOME),
    (0x48, KEY_UP),
    (0x49, KEY_PAGEUP),
    (0x4b, KEY_LEFT),
    (0x4d, KEY_RIGHT),
    (0x4f, KEY_END),
    (0x50, KEY_DOWN),
    (0x51, KEY_PAGEDOWN),
    (0x52, KEY_INSERT),
    (0x53, KEY_DELETE),
    (0x5b, KEY_LEFTMETA),
    (0x5c, KEY_RIGHTMETA),
    (0x5d, KEY_COMPOSE),
    (0x5e, KEY_POWER),
    (0x5f, KEY_SLEEP),
    (0x63, KEY_WAKEUP),
    (0x65, KEY_SEARCH),
    (0x66, KEY_BOOKMARKS),
    (0x67, KEY_REFRESH),
    (0x68, KEY_STOP),
    (0x69, KEY_FORWARD),
    (0x6a, KEY_BACK),
    (0x6b, KEY_COMPUTER),
    (0x6c, KEY_MAIL),
    (0x6d, KEY_MEDIA),
];

/// Keys beyond F12 without a prefix.
const PLAIN: &[(u8, u16)] = &[
    // Alt + Print screen.
    (0x54, KEY_SYSRQ),
    (0x59, KEY_KPEQUAL),
    // F13 to F23, F24.
    (0x5d, KEY_F13),
    (0x5e, KEY_F13 + 1),
    (0x5f, KEY_F13 + 2),
    (0x64, KEY_F13),
    (0x65, KEY_F13 + 1),
    (0x66, KEY_F13 + 2),
    (0x67, KEY_F13 + 3),
    (0x68, KEY_F13 + 4),
    (0x69, KEY_F13 + 5),
    (0x6a, KEY_F13 + 6),
    (0x6b, KEY_F13 + 7),
    (0x6c, KEY_F13 + 8),
    (0x6d, KEY_F13 + 9),
    (0x6e, KEY_F13 + 10),
    (0x76, KEY_F24),
    // Katakana/Hiragana, Ro, Hiragana, Katakana, Henkan, Muhenkan, keypad comma (Japanese).
    (0x70, 93),
    (0x73, 89),
    (0x77, 91),
    (0x78, 90),
    (0x79, 92),
    (0x7b, 94),
    (0x7c, 95),
    (0x7d, KEY_YEN),
    (0x7e, KEY_KPCOMMA),
    // Hanja and Hangul, which send no release on real keyboards.
    (0x71, KEY_HANJA),
    (0x72, KEY_HANGEUL),
];

/// Where the decoder is within a sequence.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Prefix {
    #[default]
    None,
    E0,
    /// Two bytes of the pause key (`e1 1d 45`, `e1 9d c5`) follow.
    E1,
    E1Second,
}

/// Decodes a stream of scancode bytes.
#[derive(Debug, Clone, Default)]
pub struct ScancodeDecoder {
    prefix: Prefix,
}

impl ScancodeDecoder {
    /// A decoder at the start of a sequence.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes one byte; returns the key that changed when a sequence is complete. Unknown keys and
    /// the "fake shifts" around grey keys yield nothing.
    pub fn push(&mut self, byte: u8) -> Option<KeyChange> {
        let (pressed, scancode) = (byte & 0x80 == 0, byte & 0x7f);
        let code = match (std::mem::take(&mut self.prefix), byte) {
            (Prefix::E1, _) => {
                self.prefix = Prefix::E1Second;
                return None;
            }
            (Prefix::E1Second, _) => Some(KEY_PAUSE),
            (_, 0xe0) => {
                self.prefix = Prefix::E0;
                return None;
            }
            (_, 0xe1) => {
                self.prefix = Prefix::E1;
                return None;
            }
            (Prefix::E0, _) => lookup(EXTENDED, scancode),
            // Up to the keypad's dot, then the 102nd key, F11 and F12: codes are scancodes.
            (Prefix::None, _) if matches!(scancode, 0x01..=0x53 | 0x56..=0x58) => {
                Some(u16::from(scancode))
            }
            (Prefix::None, _) => lookup(PLAIN, scancode),
        };
        code.map(|code| KeyChange { code, pressed })
    }
}

fn lookup(table: &[(u8, u16)], scancode: u8) -> Option<u16> {
    table.iter().find(|(from, _)| *from == scancode).map(|(_, to)| *to)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(bytes: &[u8]) -> Vec<(u16, bool)> {
        let mut decoder = ScancodeDecoder::new();
        let changes = bytes.iter().filter_map(|byte| decoder.push(*byte));
        changes.map(|change| (change.code, change.pressed)).collect()
    }

    #[test]
    fn sequences() {
        assert_eq!(decode(&[0x1e, 0x9e]), [(30, true), (30, false)]);
        assert_eq!(decode(&[0xe0, 0x48, 0xe0, 0xc8]), [(KEY_UP, true), (KEY_UP, false)]);
        assert_eq!(decode(&[0x57, 0x58, 0x56]), [(87, true), (88, true), (86, true)]);
        let pause = [0xe1, 0x1d, 0x45, 0xe1, 0x9d, 0xc5];
        assert_eq!(decode(&pause), [(KEY_PAUSE, true), (KEY_PAUSE, false)]);
        // Print screen with its fake shifts.
        let print = [0xe0, 0x2a, 0xe0, 0x37, 0xe0, 0xb7, 0xe0, 0xaa];
        assert_eq!(decode(&print), [(KEY_SYSRQ, true), (KEY_SYSRQ, false)]);
        assert_eq!(decode(&[0x00, 0x80, 0xff]), []);
    }

    #[test]
    fn every_key_is_one_that_the_keyboard_has() {
        let has = |code| KEYBOARD.iter().any(|(first, last)| (*first..=*last).contains(&code));
        for prefix in [&[][..], &[0xe0]] {
            for scancode in 0..0x80 {
                for (code, _) in decode(&[prefix, &[scancode]].concat()) {
                    assert!(has(code), "{prefix:x?} {scancode:#x} is {code}");
                }
            }
        }
    }
}
