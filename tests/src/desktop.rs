//! How to tell from a picture that a guest has come up.

use anyhow::Result;

use crate::picture::{Picture, reads};

/// The colour of weston's background in the recipe.
pub const WESTON_BACKGROUND: [u8; 3] = [0x1f, 0x5f, 0x8b];

/// The text of the search field in GNOME's overview, without its icons: grey on grey, it is found only
/// in a crop.
pub fn gnome_search_field(picture: &Picture) -> (u32, u32, u32, u32) {
    (picture.width / 2 - 150, 48, 300, 32)
}

/// Whether `picture` shows the guest called `guest`, ready to be used.
///
/// # Errors
/// If the text on the picture cannot be read because a program for that is missing.
pub fn is_shown(guest: &str, picture: &Picture) -> Result<bool> {
    let text = || picture.text(None);
    Ok(match guest {
        "weston" => {
            picture.share_of(WESTON_BACKGROUND, 6) > 0.2 && reads(&text()?, "DRAGO GUEST DESKTOP")
        }
        "gnome" => reads(&picture.text(Some(gnome_search_field(picture)))?, "Type to search"),
        _ => reads(&text()?, "minimal#"),
    })
}
