//! The guests: made from Debian packages by the recipes in `resources/guests`, kept in the cache, made
//! anew when their recipe changes.

mod debian;
mod image;
mod minimal;
mod nixos;
mod passthrough;
mod sound;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

pub use debian::Desktop;
pub use nixos::{DEBIAN, Nixos, SYSTEM, Shape, Store};

/// What a VMM is given to boot a guest.
#[derive(Debug, Clone)]
pub struct Guest {
    /// Its name, which is also the recipe's.
    pub name: String,
    /// A bzImage.
    pub kernel: PathBuf,
    /// The initrd.
    pub initrd: PathBuf,
    /// The kernel's command line.
    pub cmdline: String,
    /// The root disk (raw), if it has one. It is written to: give it to one VM at a time, or copy it.
    pub disk: Option<PathBuf>,
    /// The private key with which ssh lets one in as `demo` and `root`.
    pub ssh_key: Option<PathBuf>,
    /// The memory it needs to be at ease, in MiB.
    pub memory_mib: u32,
}

impl Guest {
    /// A busybox system: text console on the screen and on the first serial port.
    ///
    /// # Errors
    /// If a package cannot be fetched.
    pub fn minimal() -> Result<Self> {
        minimal::guest()
    }

    /// The busybox system with a sound card's driver (`/sound/order`), `aplay` and `arecord` in `/sound`.
    ///
    /// # Errors
    /// If a package cannot be fetched.
    pub fn sound() -> Result<Self> {
        sound::guest()
    }

    /// The busybox system with the drivers of an NVMe disk and an Intel network card
    /// (`/passthrough/order`).
    ///
    /// # Errors
    /// If a package cannot be fetched.
    pub fn passthrough() -> Result<Self> {
        passthrough::guest()
    }

    /// A Debian system with a desktop.
    ///
    /// # Errors
    /// If the image cannot be made.
    pub fn desktop(desktop: Desktop) -> Result<Self> {
        debian::guest(desktop)
    }

    /// A system in the shape of microvm.nix's guests, its store on the first disk, which is to be
    /// read-only.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn nixos() -> Result<Self> {
        Nixos::new()?.guest()
    }
}

/// Everything in a recipe's folder as one text, for the digest.
fn recipe_text(dir: &Path) -> Result<String> {
    let mut text = String::new();
    let mut names: Vec<PathBuf> = std::fs::read_dir(dir)
        .with_context(|| format!("cannot read {}", dir.display()))?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<std::io::Result<_>>()?;
    names.sort();
    for path in names {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        text.push_str(&format!("\n== {name}\n"));
        if path.is_dir() {
            text.push_str(&recipe_text(&path)?);
        } else {
            text.push_str(&String::from_utf8_lossy(&std::fs::read(&path)?));
        }
    }
    Ok(text)
}
