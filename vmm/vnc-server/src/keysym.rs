//! Keysyms to scancodes, for clients that do not send scancodes themselves.
//!
//! The keys of a US keyboard: such a client has applied its own layout already, so what arrives is the
//! character, and the guest's layout has to be US for it to come out right. Clients that know the
//! extended key event (gtk-vnc, TigerVNC, noVNC) have no such trouble.

/// A key: scancode of set 1, and whether the prefix 0xe0 belongs to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Scancode {
    /// Without prefix and release bit.
    pub code: u8,
    /// Whether 0xe0 stands in front.
    pub extended: bool,
}

impl Scancode {
    pub(crate) const fn plain(code: u8) -> Self {
        Self { code, extended: false }
    }

    pub(crate) const fn extended(code: u8) -> Self {
        Self { code, extended: true }
    }

    /// From the extended key event, where the high bit stands for the prefix.
    pub(crate) fn from_wire(code: u32) -> Option<Self> {
        let byte = u8::try_from(code).ok()?;
        let scancode = Self { code: byte & 0x7f, extended: byte & 0x80 != 0 };
        (scancode.code != 0).then_some(scancode)
    }

    /// The key that makes a character or function.
    pub(crate) fn from_keysym(keysym: u32) -> Option<Self> {
        if let Ok(latin) = u8::try_from(keysym) {
            let find = |row: &(u8, &[u8])| {
                let at = row.1.iter().position(|c| *c == latin.to_ascii_lowercase())?;
                Some(Self::plain(row.0 + at as u8))
            };
            return PLAIN.iter().chain(&SHIFTED).find_map(find);
        }
        if (0xffbe..=0xffc7).contains(&keysym) {
            return Some(Self::plain(0x3b + (keysym - 0xffbe) as u8));
        }
        FUNCTIONS.iter().find(|(from, _)| *from == keysym).map(|(_, to)| *to)
    }
}

/// First scancode of a row of keys and what the keys say.
const PLAIN: [(u8, &[u8]); 6] = [
    (0x02, b"1234567890-="),
    (0x10, b"qwertyuiop[]"),
    (0x1e, b"asdfghjkl;'`"),
    (0x2b, b"\\zxcvbnm,./"),
    (0x39, b" "),
    (0x56, b"\xa6"),
];

/// The same with Shift, which the client presses itself.
const SHIFTED: [(u8, &[u8]); 5] =
    [(0x02, b"!@#$%^&*()_+"), (0x1a, b"{}"), (0x27, b":\"~"), (0x2b, b"|"), (0x33, b"<>?")];

/// X11's `keysymdef.h`.
const FUNCTIONS: &[(u32, Scancode)] = &[
    (0xff08, Scancode::plain(0x0e)),    // BackSpace
    (0xff09, Scancode::plain(0x0f)),    // Tab
    (0xfe20, Scancode::plain(0x0f)),    // ISO_Left_Tab
    (0xff0d, Scancode::plain(0x1c)),    // Return
    (0xff13, Scancode::extended(0x46)), // Pause, as Break
    (0xff14, Scancode::plain(0x46)),    // Scroll_Lock
    (0xff1b, Scancode::plain(0x01)),    // Escape
    (0xff50, Scancode::extended(0x47)), // Home
    (0xff51, Scancode::extended(0x4b)), // Left
    (0xff52, Scancode::extended(0x48)), // Up
    (0xff53, Scancode::extended(0x4d)), // Right
    (0xff54, Scancode::extended(0x50)), // Down
    (0xff55, Scancode::extended(0x49)), // Page_Up
    (0xff56, Scancode::extended(0x51)), // Page_Down
    (0xff57, Scancode::extended(0x4f)), // End
    (0xff61, Scancode::extended(0x37)), // Print
    (0xff63, Scancode::extended(0x52)), // Insert
    (0xff67, Scancode::extended(0x5d)), // Menu
    (0xff7f, Scancode::plain(0x45)),    // Num_Lock
    (0xff8d, Scancode::extended(0x1c)), // KP_Enter
    (0xffaa, Scancode::plain(0x37)),    // KP_Multiply
    (0xffab, Scancode::plain(0x4e)),    // KP_Add
    (0xffad, Scancode::plain(0x4a)),    // KP_Subtract
    (0xffae, Scancode::plain(0x53)),    // KP_Decimal
    (0xffaf, Scancode::extended(0x35)), // KP_Divide
    (0xffb0, Scancode::plain(0x52)),    // KP_0
    (0xffb1, Scancode::plain(0x4f)),
    (0xffb2, Scancode::plain(0x50)),
    (0xffb3, Scancode::plain(0x51)),
    (0xffb4, Scancode::plain(0x4b)),
    (0xffb5, Scancode::plain(0x4c)),
    (0xffb6, Scancode::plain(0x4d)),
    (0xffb7, Scancode::plain(0x47)),
    (0xffb8, Scancode::plain(0x48)),
    (0xffb9, Scancode::plain(0x49)),    // KP_9
    (0xffc8, Scancode::plain(0x57)),    // F11
    (0xffc9, Scancode::plain(0x58)),    // F12
    (0xffe1, Scancode::plain(0x2a)),    // Shift_L
    (0xffe2, Scancode::plain(0x36)),    // Shift_R
    (0xffe3, Scancode::plain(0x1d)),    // Control_L
    (0xffe4, Scancode::extended(0x1d)), // Control_R
    (0xffe5, Scancode::plain(0x3a)),    // Caps_Lock
    (0xffe7, Scancode::extended(0x5b)), // Meta_L
    (0xffe9, Scancode::plain(0x38)),    // Alt_L
    (0xffea, Scancode::extended(0x38)), // Alt_R
    (0xfe03, Scancode::extended(0x38)), // ISO_Level3_Shift
    (0xffeb, Scancode::extended(0x5b)), // Super_L
    (0xffec, Scancode::extended(0x5c)), // Super_R
    (0xffff, Scancode::extended(0x53)), // Delete
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters() {
        let code = |c: char| Scancode::from_keysym(c as u32).map(|key| key.code);
        assert_eq!(code('a'), Some(0x1e));
        assert_eq!(code('A'), Some(0x1e));
        assert_eq!(code('z'), Some(0x2c));
        assert_eq!(code('/'), Some(0x35));
        assert_eq!(code('?'), Some(0x35));
        assert_eq!(code('<'), Some(0x33));
        assert_eq!(code('|'), code('\\'));
        assert_eq!(code('~'), code('`'));
        assert_eq!(code('"'), code('\''));
        assert_eq!(code(':'), code(';'));
        assert_eq!(code('+'), code('='));
        assert_eq!(code('0'), Some(0x0b));
        assert_eq!(code(')'), Some(0x0b));
        assert_eq!(code('{'), Some(0x1a));
        assert_eq!(code('ü'), None);
        // Every printable character of ASCII can be typed.
        assert!((' '..='~').all(|c| code(c).is_some()));
    }

    #[test]
    fn functions() {
        assert_eq!(Scancode::from_keysym(0xffbe), Some(Scancode::plain(0x3b)), "F1");
        assert_eq!(Scancode::from_keysym(0xffc7), Some(Scancode::plain(0x44)), "F10");
        assert_eq!(Scancode::from_keysym(0xffff), Some(Scancode::extended(0x53)), "Delete");
        assert_eq!(Scancode::from_wire(0xc8), Some(Scancode::extended(0x48)), "Up");
        assert_eq!(Scancode::from_wire(0x80), None);
        assert_eq!(Scancode::from_wire(0x1_00), None);
    }
}
