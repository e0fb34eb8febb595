//! The minimal guest with drivers for the devices that the test host can pass through: a second
//! archive behind the first.

use std::path::Path;

use anyhow::{Context, Result};

use super::Guest;
use crate::cpio::Archive;
use crate::debian::{self, Kernel, Release};
use crate::modules::{self, ModuleTree};
use crate::{paths, progress};

const MODULES: &[&str] = &["nvme", "e1000e"];

pub(super) fn guest() -> Result<Guest> {
    let minimal = super::minimal::guest()?;
    let kernel = Release::open("trixie")?.kernel("linux-image-amd64")?;
    let digest = debian::digest(&format!("{}{MODULES:?}", minimal.initrd.display()));
    let initrd = paths::cache("guests")?.join(format!("passthrough-{digest}.cpio"));
    if !initrd.exists() {
        progress::step("making the guest for passed-through devices", || {
            build(&minimal, &kernel, &initrd)
        })?;
    }
    Ok(Guest { name: "passthrough".to_owned(), initrd, ..minimal })
}

fn build(minimal: &Guest, kernel: &Kernel, path: &Path) -> Result<()> {
    let first = std::fs::read(&minimal.initrd)
        .with_context(|| format!("cannot read {}", minimal.initrd.display()))?;
    let mut archive = Archive::new(first);
    archive.dir("passthrough")?;
    let tree = ModuleTree::open(&kernel.root, &kernel.version)?;
    modules::pack(&mut archive, "passthrough", &tree.closure(MODULES)?)?;
    archive.save(path).with_context(|| format!("cannot write {}", path.display()))
}
