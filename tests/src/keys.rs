//! PC/AT set 1 scancodes of an American keyboard.

use anyhow::{Result, bail};

/// The left shift key.
const SHIFT: u32 = 0x2a;

/// The left control key.
const CONTROL: u32 = 0x1d;

/// The super ("Windows") key: E0 5B, as SPICE clients write it.
pub const SUPER: u32 = 0x15b;

/// The escape key.
pub const ESCAPE: u32 = 0x01;

const ROWS: [(u32, &str, &str); 4] = [
    (0x02, "1234567890-=", "!@#$%^&*()_+"),
    (0x10, "qwertyuiop[]", "QWERTYUIOP{}"),
    (0x1e, "asdfghjkl;'`", "ASDFGHJKL:\"~"),
    (0x2b, "\\zxcvbnm,./", "|ZXCVBNM<>?"),
];

/// Key presses (true) and releases that type a text.
///
/// # Errors
/// If a character is not on the keyboard.
pub fn strokes(text: &str) -> Result<Vec<(u32, bool)>> {
    let mut strokes = Vec::new();
    for character in text.chars() {
        let (code, shifted) = key(character)?;
        if shifted {
            strokes.push((SHIFT, true));
        }
        strokes.extend([(code, true), (code, false)]);
        if shifted {
            strokes.push((SHIFT, false));
        }
    }
    Ok(strokes)
}

/// Presses and releases of keys while the control key is down.
///
/// # Errors
/// If a character is not on the keyboard.
pub fn with_control(keys: &str) -> Result<Vec<(u32, bool)>> {
    let mut all = vec![(CONTROL, true)];
    all.extend(strokes(keys)?);
    all.push((CONTROL, false));
    Ok(all)
}

fn key(character: char) -> Result<(u32, bool)> {
    match character {
        '\n' => return Ok((0x1c, false)),
        ' ' => return Ok((0x39, false)),
        '\t' => return Ok((0x0f, false)),
        _ => {}
    }
    for (first, plain, shifted) in ROWS {
        for (row, shift) in [(plain, false), (shifted, true)] {
            if let Some(at) = row.chars().position(|key| key == character) {
                return Ok((first + at as u32, shift));
            }
        }
    }
    bail!("{character:?} is not on an American keyboard")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_those_of_the_keyboard() {
        assert_eq!(strokes("a").unwrap(), [(0x1e, true), (0x1e, false)]);
        assert_eq!(
            strokes("Z").unwrap(),
            [(0x2a, true), (0x2c, true), (0x2c, false), (0x2a, false)]
        );
        assert_eq!(
            with_control("v").unwrap(),
            [(0x1d, true), (0x2f, true), (0x2f, false), (0x1d, false)]
        );
        assert_eq!(key('/').unwrap(), (0x35, false));
        assert_eq!(key('|').unwrap(), (0x2b, true));
        assert_eq!(key('=').unwrap(), (0x0d, false));
        assert!(strokes("ä").is_err());
    }
}
