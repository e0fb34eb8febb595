//! Guests with a Debian root file system: mmdebstrap installs it, `mke2fs -d` makes a disk of it.
//!
//! mmdebstrap's customize hook sees the finished root with the right owners even when mmdebstrap runs
//! unprivileged, so the disk is made there and nothing is ever mounted.

use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail};

use super::{Guest, recipe_text};
use crate::{debian, paths, progress};

/// The file in a guest's folder that is locked by who uses it.
const IN_USE: &str = "in-use";

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
    let digest = debian::digest(&texts.concat());
    let cache = paths::cache("guests")?;
    let lock = File::create(cache.join(format!("{name}.lock")))?;
    lock.lock()?;
    let dir = cache.join(format!("{name}-{digest}"));
    if !dir.is_dir() {
        progress::step(
            format!(
                "making the {name} guest from Debian packages (some minutes; log: {})",
                log(&cache, name).display()
            ),
            || build(desktop, &recipes, &cache, &dir),
        )?;
        forget_older(&cache, name, &dir)?;
    }
    hold(&dir)?;
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

fn log(cache: &Path, name: &str) -> PathBuf {
    cache.join(format!("{name}.log"))
}

fn build(desktop: Desktop, recipes: &[PathBuf], cache: &Path, dir: &Path) -> Result<()> {
    let work = tempfile::tempdir_in(cache)?;
    let out = work.path();
    // mmdebstrap may work as another (subordinate) user.
    std::fs::set_permissions(out, std::fs::Permissions::from_mode(0o777))?;
    let key = out.join("id_ed25519");
    debian::check(
        Command::new("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-C", "guest", "-f"])
            .arg(&key),
    )?;

    let mut packages = Vec::new();
    for recipe in recipes {
        let list = recipe.join("packages");
        let text = std::fs::read_to_string(&list)
            .with_context(|| format!("cannot read {}", list.display()))?;
        packages.extend(
            text.lines().filter(|line| !line.starts_with('#')).map(str::trim).map(str::to_owned),
        );
    }
    let log_path = log(cache, desktop.name());
    let log = File::create(&log_path)?;
    let mut mmdebstrap = Command::new("mmdebstrap");
    mmdebstrap
        .args(["--variant=apt", "--format=null", "--aptopt=APT::Install-Recommends \"false\""])
        .arg("--aptopt=Acquire::Languages \"none\"")
        .arg("--dpkgopt=path-exclude=/usr/share/man/*")
        .arg("--dpkgopt=path-exclude=/usr/share/doc/*")
        .arg("--dpkgopt=path-exclude=/usr/share/locale/*")
        .arg(format!("--include={}", packages.join(",")));
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
        .arg(format!("--customize-hook=cp \"$1\"/boot/vmlinuz-* '{}/vmlinuz'", out.display()))
        .arg(format!("--customize-hook=cp \"$1\"/boot/initrd.img-* '{}/initrd'", out.display()))
        .arg("--customize-hook=rm \"$1\"/boot/*")
        .arg(format!(
            // The bind mount shows the root without what mmdebstrap has mounted in it.
            "--customize-hook=mkdir \"$1.bare\" && mount --bind \"$1\" \"$1.bare\" && \
             /sbin/mke2fs -q -t ext4 -L root -m 0 -E lazy_itable_init=1 -d \"$1.bare\" '{}/root.img' {}M && \
             umount \"$1.bare\" && rmdir \"$1.bare\"",
            out.display(),
            desktop.disk_mib()
        ))
        .args(["trixie", "/dev/null"])
        .arg(format!("deb [signed-by={}] {} trixie main", debian::KEYRING, debian::MIRROR))
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    let status = mmdebstrap.status().context("cannot run mmdebstrap (package mmdebstrap)")?;
    if !status.success() {
        let said = std::fs::read_to_string(&log_path).unwrap_or_default();
        let tail: Vec<&str> = said.lines().rev().take(15).collect();
        let tail: Vec<&str> = tail.into_iter().rev().collect();
        bail!("mmdebstrap: {status}; log: {}\n{}", log_path.display(), tail.join("\n"));
    }
    for name in ["vmlinuz", "initrd", "root.img"] {
        if !out.join(name).is_file() {
            bail!("mmdebstrap left no {name}; log: {}", log_path.display());
        }
    }
    std::fs::set_permissions(out, std::fs::Permissions::from_mode(0o755))?;
    std::fs::rename(work.keep(), dir)?;
    Ok(())
}

/// Images of older recipes only fill the disk.
/// Marks a guest as in use until this process ends.
pub(super) fn hold(dir: &Path) -> Result<()> {
    static HELD: Mutex<Vec<File>> = Mutex::new(Vec::new());
    let file = File::create(dir.join(IN_USE))?;
    file.lock_shared()?;
    HELD.lock().unwrap_or_else(PoisonError::into_inner).push(file);
    Ok(())
}

/// Removes guests of older recipes, except those that another checkout with the same cache runs.
pub(super) fn forget_older(cache: &Path, name: &str, keep: &Path) -> Result<()> {
    for entry in std::fs::read_dir(cache)? {
        let path = entry?.path();
        let old = path
            .file_name()
            .is_some_and(|file| file.to_string_lossy().starts_with(&format!("{name}-")));
        let unused = || File::create(path.join(IN_USE)).is_ok_and(|file| file.try_lock().is_ok());
        if old && path != keep && path.is_dir() && unused() {
            let _ = std::fs::remove_dir_all(&path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_in_use_is_not_forgotten() {
        let cache = tempfile::tempdir().unwrap();
        let guests = ["weston-new", "weston-running", "weston-old", "gnome-old"];
        let folders = guests.map(|name| cache.path().join(name));
        folders.iter().for_each(|folder| std::fs::create_dir(folder).unwrap());
        hold(&folders[1]).unwrap();
        forget_older(cache.path(), "weston", &folders[0]).unwrap();
        assert_eq!(folders.each_ref().map(|folder| folder.is_dir()), [true, true, false, true]);
    }
}
