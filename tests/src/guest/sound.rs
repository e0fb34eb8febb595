//! The minimal guest with a sound card's driver and ALSA's own tools: a second archive behind the first.

use std::path::Path;

use anyhow::{Context, Result};

use super::Guest;
use crate::cpio::Archive;
use crate::debian::{self, Kernel, Release};
use crate::modules::{self, ModuleTree};
use crate::{paths, progress};

/// aplay (which is arecord, too), what it is linked with, and ALSA's configuration.
const PACKAGES: &[&str] = &["alsa-utils", "libasound2t64", "libasound2-data", "libc6"];
const LIBRARIES: &[&str] = &["libasound.so.2", "libm.so.6", "libc.so.6"];
const LOADER: &str = "ld-linux-x86-64.so.2";

pub(super) fn guest() -> Result<Guest> {
    let minimal = super::minimal::guest()?;
    let trixie = Release::open("trixie")?;
    let kernel = trixie.kernel("linux-image-amd64")?;
    let digest = debian::digest(&format!("{}{PACKAGES:?}", minimal.initrd.display()));
    let initrd = paths::cache("guests")?.join(format!("sound-{digest}.cpio"));
    if !initrd.exists() {
        let roots = PACKAGES.iter().map(|name| trixie.package(name)).collect::<Result<Vec<_>>>()?;
        progress::step("making the sound guest", || build(&minimal, &kernel, &roots, &initrd))?;
    }
    Ok(Guest { name: "sound".to_owned(), initrd, ..minimal })
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// The first of these folders that has the file.
fn find(roots: &[impl AsRef<Path>], file: &str) -> Result<Vec<u8>> {
    let paths = roots.iter().map(|root| root.as_ref().join(file));
    let path = paths.into_iter().find(|path| path.exists());
    read(&path.with_context(|| format!("none of {PACKAGES:?} has {file}"))?)
}

fn build(minimal: &Guest, kernel: &Kernel, roots: &[impl AsRef<Path>], path: &Path) -> Result<()> {
    let mut archive = Archive::new(read(&minimal.initrd)?);
    for dir in [
        "sound",
        "lib64",
        "usr",
        "usr/lib",
        "usr/lib/x86_64-linux-gnu",
        "usr/share",
        "usr/share/alsa",
        "usr/share/alsa/cards",
        "usr/share/alsa/pcm",
    ] {
        archive.dir(dir)?;
    }
    for program in ["aplay", "arecord"] {
        archive.file(&format!("sound/{program}"), 0o755, &find(roots, "usr/bin/aplay")?)?;
    }
    let libraries = "usr/lib/x86_64-linux-gnu";
    archive.file(
        &format!("lib64/{LOADER}"),
        0o755,
        &find(roots, &format!("{libraries}/{LOADER}"))?,
    )?;
    for library in LIBRARIES {
        let file = format!("{libraries}/{library}");
        archive.file(&file, 0o644, &find(roots, &file)?)?;
    }
    for file in ["alsa.conf", "cards/aliases.conf", "pcm/default.conf"] {
        let file = format!("usr/share/alsa/{file}");
        archive.file(&file, 0o644, &find(roots, &file)?)?;
    }
    let tree = ModuleTree::open(&kernel.root, &kernel.version)?;
    modules::pack(&mut archive, "sound", &tree.closure(&["virtio_snd"])?)?;
    archive.save(path).with_context(|| format!("cannot write {}", path.display()))
}
