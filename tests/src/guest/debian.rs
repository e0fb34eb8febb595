//! Guests with a Debian root file system: mmdebstrap installs it, `mke2fs -d` makes a disk of it.
//!
//! mmdebstrap's customize hook sees the finished root with the right owners even when mmdebstrap runs
//! unprivileged, so the disk is made there and nothing is ever mounted.

use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use super::image::{self, Workshop};
use super::{Guest, recipe_text};
use crate::{debian, paths};

/// Which desktop a Debian guest has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Desktop {
    /// Weston with a terminal and a clock.
    Weston,
    /// GNOME Shell.
    Gnome,
    /// The weston guest with programs that draw; the desktop is not started.
    Graphics,
}

impl Desktop {
    /// The recipe's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Weston => "weston",
            Self::Gnome => "gnome",
            Self::Graphics => "graphics",
        }
    }

    fn disk_mib(self) -> u32 {
        match self {
            Self::Weston => 2048,
            Self::Gnome => 4096,
            Self::Graphics => 3072,
        }
    }

    fn memory_mib(self) -> u32 {
        match self {
            Self::Weston => 1024,
            Self::Gnome => 3072,
            Self::Graphics => 1536,
        }
    }

    /// The recipes it is made by, in order.
    fn recipes(self) -> &'static [&'static str] {
        match self {
            Self::Weston => &["common", "weston"],
            Self::Gnome => &["common", "gnome"],
            Self::Graphics => &["common", "weston", "graphics"],
        }
    }
}

pub(crate) fn guest(desktop: Desktop) -> Result<Guest> {
    let name = desktop.name();
    let folder = paths::resources().join("guests");
    let recipes: Vec<PathBuf> = desktop.recipes().iter().map(|name| folder.join(name)).collect();
    let texts = recipes.iter().map(|recipe| recipe_text(recipe)).collect::<Result<Vec<_>>>()?;
    let dir = image::made(name, &texts.concat(), |shop| build(desktop, &recipes, shop))?;
    Ok(Guest {
        name: name.to_owned(),
        kernel: dir.join("vmlinuz"),
        initrd: dir.join("initrd"),
        cmdline: "root=/dev/vda rw console=tty0 console=ttyS0 mitigations=off quiet net.ifnames=0 \
                  systemd.show_status=0"
            .to_owned(),
        disk: Some(dir.join("root.img")),
        ssh_key: Some(dir.join("id_ed25519")),
        memory_mib: desktop.memory_mib(),
    })
}

fn build(desktop: Desktop, recipes: &[PathBuf], shop: &Workshop) -> Result<()> {
    let out = shop.out.display();
    let key = shop.out.join("id_ed25519");
    debian::check(
        Command::new("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-C", "guest", "-f"])
            .arg(&key),
    )?;

    let packages =
        recipes.iter().map(|recipe| image::packages(recipe)).collect::<Result<Vec<_>>>()?;
    let mut mmdebstrap = shop.mmdebstrap("apt", &packages.concat());
    for recipe in recipes {
        let options = recipe.join("dpkg.cfg");
        if options.is_file() {
            mmdebstrap.arg(format!("--dpkgopt={}", options.display()));
        }
        let files = recipe.join("files");
        if files.is_dir() {
            mmdebstrap.arg(format!("--customize-hook=sync-in '{}' /", files.display()));
        }
    }
    mmdebstrap.arg(format!("--customize-hook=upload '{}.pub' /tmp/authorized_keys", key.display()));
    for recipe in recipes {
        let setup = recipe.join("setup");
        mmdebstrap
            .arg(format!("--customize-hook=upload '{}' /tmp/setup", setup.display()))
            .arg("--customize-hook=chroot \"$1\" sh /tmp/setup && rm \"$1/tmp/setup\"");
    }
    mmdebstrap
        .arg("--customize-hook=rm -rf \"$1\"/var/lib/apt/lists/* \"$1\"/var/cache/apt/*")
        .arg(format!("--customize-hook=cp \"$1\"/boot/vmlinuz-* '{out}/vmlinuz'"))
        .arg(format!("--customize-hook=cp \"$1\"/boot/initrd.img-* '{out}/initrd'"))
        .arg("--customize-hook=rm \"$1\"/boot/*")
        .arg(format!(
            // The bind mount shows the root without what mmdebstrap has mounted in it.
            "--customize-hook=mkdir \"$1.bare\" && mount --bind \"$1\" \"$1.bare\" && \
             /sbin/mke2fs -q -t ext4 -L root -m 0 -E lazy_itable_init=1 -d \"$1.bare\" '{out}/root.img' {}M && \
             umount \"$1.bare\" && rmdir \"$1.bare\"",
            desktop.disk_mib()
        ));
    shop.run(mmdebstrap, &["vmlinuz", "initrd", "root.img"])
}
