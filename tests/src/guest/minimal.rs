//! The minimal guest: Debian's kernel and an initramfs with busybox and the virtio drivers.

use std::path::Path;

use anyhow::{Context, Result};

use super::{Guest, recipe_text};
use crate::cpio::Archive;
use crate::debian::{self, Kernel, Release};
use crate::modules::{self, ModuleTree};
use crate::{paths, progress};

/// `virtio_pci` is built in; so are fbcon and the console on DRM.
const MODULES: &[&str] = &[
    "virtio-gpu",
    "virtio_input",
    "evdev",
    "virtio_net",
    "virtio_blk",
    "virtio_console",
    "virtio-rng",
    "virtio_balloon",
    "virtiofs",
    "vmw_vsock_virtio_transport",
    "i8042",
    "pvpanic-pci",
    "pvpanic-mmio",
];

pub(crate) fn guest() -> Result<Guest> {
    let trixie = Release::open("trixie")?;
    let kernel = trixie.kernel("linux-image-amd64")?;
    let recipe = paths::resources().join("guests/minimal");
    let digest = debian::digest(&format!("{}{}{MODULES:?}", kernel.version, recipe_text(&recipe)?));
    let initrd = paths::cache("guests")?.join(format!("minimal-{digest}.cpio"));
    if !initrd.exists() {
        let busybox = trixie.package("busybox-static")?.join("usr/bin/busybox");
        progress::step("making the minimal guest", || build(&kernel, &busybox, &recipe, &initrd))?;
    }
    Ok(Guest {
        name: "minimal".to_owned(),
        kernel: kernel.image,
        initrd,
        cmdline: "console=tty0 console=ttyS0 mitigations=off quiet".to_owned(),
        disk: None,
        ssh_key: None,
        memory_mib: 256,
    })
}

fn build(kernel: &Kernel, busybox: &Path, recipe: &Path, path: &Path) -> Result<()> {
    let tree = ModuleTree::open(&kernel.root, &kernel.version)?;
    let drivers = tree.closure(&tree.existing(MODULES))?;
    let read = |path: &Path| {
        std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))
    };
    let mut archive = Archive::new(Vec::new());
    for dir in ["bin", "dev", "etc", "modules"] {
        archive.dir(dir)?;
    }
    archive.char_device("dev/console", 5, 1)?;
    archive.file("bin/busybox", 0o755, &read(busybox)?)?;
    archive.file("init", 0o755, &read(&recipe.join("init"))?)?;
    archive.file("etc/inittab", 0o644, &read(&recipe.join("inittab"))?)?;
    archive.file("etc/shell", 0o755, &read(&recipe.join("shell"))?)?;
    archive.file("etc/udhcpc.sh", 0o755, &read(&recipe.join("udhcpc.sh"))?)?;
    archive.file("etc/passwd", 0o644, b"root::0:0:root:/root:/bin/sh\n")?;
    modules::pack(&mut archive, "modules", &drivers)?;
    archive.save(path).with_context(|| format!("cannot write {}", path.display()))
}
