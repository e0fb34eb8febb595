//! Guests made by mmdebstrap: once for each recipe, then kept in the cache.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail, ensure};

use crate::console::last_lines;
use crate::{debian, paths, progress};

/// The file in a guest's folder that is locked by who uses it.
const IN_USE: &str = "in-use";

/// What a guest is being made in.
pub(super) struct Workshop {
    /// What is put here is the guest when it is finished.
    pub(super) out: PathBuf,
    /// What mmdebstrap says.
    log: PathBuf,
}

/// The folder of a guest made by `recipe`, all of it as one text; made by `build` if it is not in the
/// cache. It is held until this process ends.
pub(super) fn made(
    name: &str,
    recipe: &str,
    build: impl FnOnce(&Workshop) -> Result<()>,
) -> Result<PathBuf> {
    let cache = paths::cache("guests")?;
    let lock = File::create(cache.join(format!("{name}.lock")))?;
    lock.lock()?;
    let dir = cache.join(format!("{name}-{}", debian::digest(recipe)));
    if !dir.is_dir() {
        let log = cache.join(format!("{name}.log"));
        let what = format!(
            "making the guest {name} from Debian packages (some minutes; log: {})",
            log.display()
        );
        progress::step(what, || {
            let work = tempfile::tempdir_in(&cache)?;
            let shop = Workshop { out: work.path().to_owned(), log };
            // mmdebstrap may work as another (subordinate) user.
            fs::set_permissions(&shop.out, fs::Permissions::from_mode(0o777))?;
            build(&shop)?;
            fs::set_permissions(&shop.out, fs::Permissions::from_mode(0o755))?;
            // Only now it is there: whoever is interrupted leaves no half of a guest.
            fs::rename(work.keep(), &dir)?;
            Ok(())
        })?;
        forget_older(&cache, name, &dir)?;
    }
    hold(&dir)?;
    Ok(dir)
}

impl Workshop {
    /// mmdebstrap with what all guests have in common, for these packages.
    pub(super) fn mmdebstrap(&self, variant: &str, packages: &[String]) -> Command {
        let mut mmdebstrap = Command::new("mmdebstrap");
        mmdebstrap
            .arg(format!("--variant={variant}"))
            .arg("--format=null")
            .arg("--aptopt=APT::Install-Recommends \"false\"")
            .arg("--aptopt=Acquire::Languages \"none\"");
        for folder in ["man", "doc", "locale"] {
            mmdebstrap.arg(format!("--dpkgopt=path-exclude=/usr/share/{folder}/*"));
        }
        mmdebstrap.arg(format!("--include={}", packages.join(",")));
        mmdebstrap
    }

    /// Lets it make Debian 13, which is to leave these files.
    pub(super) fn run(&self, mut mmdebstrap: Command, files: &[&str]) -> Result<()> {
        let log = File::create(&self.log)?;
        mmdebstrap
            .args(["trixie", "/dev/null"])
            .arg(format!("deb [signed-by={}] {} trixie main", debian::KEYRING, debian::MIRROR))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let status = mmdebstrap.status().context("cannot run mmdebstrap (package mmdebstrap)")?;
        if !status.success() {
            let said = fs::read_to_string(&self.log).unwrap_or_default();
            bail!("mmdebstrap: {status}; log: {}\n{}", self.log.display(), last_lines(&said, 15));
        }
        for file in files {
            let log = self.log.display();
            ensure!(self.out.join(file).is_file(), "mmdebstrap left no {file}; log: {log}");
        }
        Ok(())
    }
}

/// The packages that a recipe names, one a line.
pub(super) fn packages(recipe: &Path) -> Result<Vec<String>> {
    let list = recipe.join("packages");
    let text =
        fs::read_to_string(&list).with_context(|| format!("cannot read {}", list.display()))?;
    let names = text.lines().map(str::trim).filter(|line| !line.starts_with('#'));
    Ok(names.map(str::to_owned).collect())
}

/// Marks a guest as in use until this process ends.
fn hold(dir: &Path) -> Result<()> {
    static HELD: Mutex<Vec<File>> = Mutex::new(Vec::new());
    let file = File::create(dir.join(IN_USE))?;
    file.lock_shared()?;
    HELD.lock().unwrap_or_else(PoisonError::into_inner).push(file);
    Ok(())
}

/// Removes guests of older recipes, which only fill the disk, except those that another checkout with the
/// same cache runs.
fn forget_older(cache: &Path, name: &str, keep: &Path) -> Result<()> {
    for entry in fs::read_dir(cache)? {
        let path = entry?.path();
        let old = path
            .file_name()
            .is_some_and(|file| file.to_string_lossy().starts_with(&format!("{name}-")));
        let unused = || File::create(path.join(IN_USE)).is_ok_and(|file| file.try_lock().is_ok());
        if old && path != keep && path.is_dir() && unused() {
            let _ = fs::remove_dir_all(&path);
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
        folders.iter().for_each(|folder| fs::create_dir(folder).unwrap());
        hold(&folders[1]).unwrap();
        forget_older(cache.path(), "weston", &folders[0]).unwrap();
        assert_eq!(folders.each_ref().map(|folder| folder.is_dir()), [true, true, false, true]);
    }
}
