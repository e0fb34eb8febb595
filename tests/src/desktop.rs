//! How to tell from a picture that a guest has come up.

use anyhow::Result;

use crate::picture::{Picture, reads};

/// The colour of weston's background in the recipe.
pub const WESTON_BACKGROUND: [u8; 3] = [0x1f, 0x5f, 0x8b];

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
        "gnome" => reads(&text()?, "Type to search"),
        _ => reads(&text()?, "minimal#"),
    })
}
