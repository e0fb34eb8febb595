//! How to tell from a picture that a guest has come up.

use anyhow::Result;

use crate::picture::{Picture, reads};

/// The colour of weston's background in the recipe.
pub const WESTON_BACKGROUND: [u8; 3] = [0x1f, 0x5f, 0x8b];

/// A text console has few colours, the overview with its background picture some 1600.
const GNOME_COLOURS: usize = 500;

/// The text of the search field in GNOME's overview, without its icons: grey on grey, it is found only
/// in a crop.
pub fn gnome_search_field(picture: &Picture) -> (u32, u32, u32, u32) {
    (picture.width / 2 - 150, 48, 300, 32)
}

/// Whether `picture` shows the desktop of the guest called `guest`, as far as can be told without reading:
/// programs may still be about to appear on it.
pub fn has_come(guest: &str, picture: &Picture) -> bool {
    match guest {
        "weston" => picture.share_of(WESTON_BACKGROUND, 6) > 0.2,
        "gnome" => picture.colours() > GNOME_COLOURS,
        _ => true,
    }
}

/// Whether `picture` shows the guest called `guest`, ready to be used.
///
/// # Errors
/// If the text on the picture cannot be read because a program for that is missing.
pub fn is_shown(guest: &str, picture: &Picture) -> Result<bool> {
    let text = || picture.text(None);
    Ok(match guest {
        "weston" => has_come(guest, picture) && reads(&text()?, "DRAGO GUEST DESKTOP"),
        "gnome" => reads(&picture.text(Some(gnome_search_field(picture)))?, "Type to search"),
        _ => reads(&text()?, "minimal#"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_console_is_no_desktop() {
        let folder = tempfile::tempdir().unwrap();
        let picture = |colour: fn(u16) -> [u8; 3]| {
            let path = folder.path().join("a.ppm");
            let pixels = (0..64 * 64).flat_map(colour);
            std::fs::write(
                &path,
                b"P6\n64 64\n255\n".iter().copied().chain(pixels).collect::<Vec<_>>(),
            )
            .unwrap();
            Picture::open(&path).unwrap()
        };
        let console = picture(|at| if at % 7 == 0 { [0xaa; 3] } else { [0; 3] });
        let weston = picture(|at| if at < 2048 { WESTON_BACKGROUND } else { [0; 3] });
        let gnome = picture(|at| [at as u8, (at >> 8) as u8, 0x40]);
        for (guest, desktop) in [("weston", &weston), ("gnome", &gnome)] {
            assert!(!has_come(guest, &console), "{guest}");
            assert!(has_come(guest, desktop), "{guest}");
        }
    }
}
