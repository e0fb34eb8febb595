//! Fetches and unpacks Debian packages without installing them, whatever release this machine runs.
//!
//! apt-get(8) works in a private folder with its own list of sources, checked against Debian's archive
//! keyring; what it downloads is kept in the cache and never becomes part of the repository.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::{paths, progress};

pub(crate) const MIRROR: &str = "http://deb.debian.org/debian";
pub(crate) const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// What drago-gpu and virglrenderer's own servers draw with. (libepoxy, which virglrenderer is linked with,
/// ends the process where it finds neither libOpenGL nor libGL, and does not depend on them.)
const GRAPHICS: &[&str] = &[
    "libvirglrenderer1",
    "libegl1",
    "libopengl0",
    "libgl1-mesa-dri",
    "virgl-server",
    "mesa-vulkan-drivers",
];

/// A Debian release seen through a private apt folder.
#[derive(Debug)]
pub struct Release {
    suite: String,
    dir: PathBuf,
}

/// A kernel unpacked from its package.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// The version, as in `uname -r`.
    pub version: String,
    /// The bzImage.
    pub image: PathBuf,
    /// The folder that the package was unpacked into; modules are below it.
    pub root: PathBuf,
}

impl Release {
    /// Opens (and on first use makes) the private apt folder of a release, such as `trixie`.
    ///
    /// # Errors
    /// If the folder cannot be made.
    pub fn open(suite: &str) -> Result<Self> {
        let dir = paths::cache(&format!("debian/{suite}"))?;
        Ok(Self { suite: suite.to_owned(), dir })
    }

    /// The current kernel of a meta package such as `linux-image-amd64`, unpacked.
    ///
    /// # Errors
    /// If the mirror cannot be reached or the package has an unexpected form.
    pub fn kernel(&self, meta: &str) -> Result<Kernel> {
        let _lock = self.lock()?;
        let stamp = self.dir.join(format!("{meta}.current"));
        let package = match std::fs::read_to_string(&stamp) {
            Ok(name) if self.dir.join("root").join(name.trim()).is_dir() => name.trim().to_owned(),
            _ => {
                self.update()?;
                let depends = self.apt("apt-cache", &["depends", meta])?;
                depends
                    .lines()
                    .filter_map(|line| line.trim().strip_prefix("Depends: "))
                    .find(|name| name.starts_with("linux-image-"))
                    .with_context(|| format!("{meta} of {} depends on no kernel", self.suite))?
                    .to_owned()
            }
        };
        let root = self.unpacked(&package)?;
        std::fs::write(&stamp, &package)?;
        let version = package.trim_start_matches("linux-image-").to_owned();
        let image = root.join("boot").join(format!("vmlinuz-{version}"));
        if !image.is_file() {
            bail!("{package} holds no {}", image.display());
        }
        Ok(Kernel { version, image, root })
    }

    /// A package's files, unpacked into a folder of their own.
    ///
    /// # Errors
    /// If the mirror cannot be reached or there is no such package.
    pub fn package(&self, name: &str) -> Result<PathBuf> {
        let _lock = self.lock()?;
        self.unpacked(name)
    }

    /// Packages with all they depend on, unpacked into one folder: programs of this release that run on
    /// another one, started through the folder's own dynamic loader.
    ///
    /// # Errors
    /// If the mirror cannot be reached.
    pub fn tree(&self, name: &str, packages: &[&str]) -> Result<PathBuf> {
        let _lock = self.lock()?;
        let root = self.dir.join("root").join(format!("{name}.tree"));
        if root.is_dir() {
            return Ok(root);
        }
        progress::step(format!("fetching {name} of Debian {}", self.suite), || {
            let work = tempfile::tempdir_in(&self.dir)?;
            let fresh = work.path().join("root");
            let mut mmdebstrap = Command::new("mmdebstrap");
            mmdebstrap
                .args([
                    "--quiet",
                    "--variant=extract",
                    "--aptopt=APT::Install-Recommends \"false\"",
                ])
                .arg(format!("--include={}", packages.join(",")))
                .arg(&self.suite)
                .arg(&fresh)
                .arg(format!("deb [signed-by={KEYRING}] {MIRROR} {} main", self.suite));
            check(&mut mmdebstrap).context("mmdebstrap (package mmdebstrap)")?;
            std::fs::create_dir_all(self.dir.join("root"))?;
            std::fs::rename(&fresh, &root)?;
            Ok(root.clone())
        })
    }

    /// What drago-gpu draws with, OpenGL and Vulkan, unpacked into one folder.
    ///
    /// # Errors
    /// If the mirror cannot be reached.
    pub fn graphics(&self) -> Result<PathBuf> {
        self.tree("drawing", GRAPHICS)
    }

    fn unpacked(&self, package: &str) -> Result<PathBuf> {
        let root = self.dir.join("root").join(package);
        if root.is_dir() {
            return Ok(root);
        }
        progress::step(format!("fetching {package} of Debian {}", self.suite), || {
            self.update()?;
            let work = tempfile::tempdir_in(&self.dir)?;
            let mut fetch = self.command("apt-get");
            fetch.args(["-qq", "download", package]).current_dir(work.path());
            check(&mut fetch)?;
            let deb = std::fs::read_dir(work.path())?
                .filter_map(Result::ok)
                .map(|entry| entry.path())
                .find(|path| path.extension().is_some_and(|ext| ext == "deb"))
                .with_context(|| format!("apt-get download {package} left no file"))?;
            let fresh = work.path().join("root");
            check(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(&fresh))?;
            std::fs::create_dir_all(self.dir.join("root"))?;
            // The rename is what makes the folder visible: an interrupted unpack leaves nothing behind.
            std::fs::rename(&fresh, &root)?;
            Ok(root.clone())
        })
    }

    /// Refreshes the package lists once a day.
    fn update(&self) -> Result<()> {
        let stamp = self.dir.join("updated");
        let fresh = std::fs::metadata(&stamp)
            .and_then(|meta| meta.modified())
            .is_ok_and(|when| when.elapsed().is_ok_and(|age| age.as_secs() < 24 * 3600));
        if fresh {
            return Ok(());
        }
        if !Path::new(KEYRING).exists() {
            bail!("{KEYRING} is missing: apt-get install debian-archive-keyring");
        }
        for sub in
            ["state/lists/partial", "cache/archives/partial", "etc/preferences.d", "etc/parts"]
        {
            std::fs::create_dir_all(self.dir.join("apt").join(sub))?;
        }
        std::fs::write(self.dir.join("apt/state/status"), "")?;
        std::fs::write(
            self.dir.join("apt/etc/sources.list"),
            format!("deb [signed-by={KEYRING}] {MIRROR} {} main\n", self.suite),
        )?;
        let apt = self.dir.join("apt");
        let apt = apt.display();
        std::fs::write(
            self.dir.join("apt.conf"),
            format!(
                "Dir \"{apt}\";\nDir::State \"{apt}/state\";\nDir::State::status \"{apt}/state/status\";\n\
                 Dir::Cache \"{apt}/cache\";\nDir::Etc \"{apt}/etc\";\n\
                 Dir::Etc::sourcelist \"{apt}/etc/sources.list\";\nDir::Etc::sourceparts \"{apt}/etc/parts\";\n\
                 Dir::Etc::parts \"{apt}/etc/parts\";\nAPT::Architecture \"amd64\";\n\
                 APT::Sandbox::User \"root\";\nAcquire::Languages \"none\";\nAcquire::Retries \"3\";\n"
            ),
        )?;
        progress::step(format!("fetching the package list of Debian {}", self.suite), || {
            self.apt("apt-get", &["-qq", "update"]).map(drop)
        })?;
        File::create(&stamp)?;
        Ok(())
    }

    fn command(&self, tool: &str) -> Command {
        let mut command = Command::new(tool);
        command.env("APT_CONFIG", self.dir.join("apt.conf"));
        command
    }

    fn apt(&self, tool: &str, args: &[&str]) -> Result<String> {
        check(self.command(tool).args(args))
    }

    /// Two processes must not fetch into one folder at the same time.
    fn lock(&self) -> Result<File> {
        let path = self.dir.join("lock");
        let file =
            File::create(&path).with_context(|| format!("cannot make {}", path.display()))?;
        file.lock().with_context(|| format!("cannot lock {}", path.display()))?;
        Ok(file)
    }
}

/// Runs a command to its end; its standard output, or an error that holds what it said.
pub(crate) fn check(command: &mut Command) -> Result<String> {
    let shown = format!("{command:?}");
    let out = command.output().with_context(|| format!("cannot run {shown}"))?;
    if !out.status.success() {
        bail!("{shown}: {}\n{}", out.status, String::from_utf8_lossy(&out.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// A short name for a recipe: FNV-1a, good enough to tell versions of our own files apart.
pub(crate) fn digest(recipe: &str) -> String {
    let hash = recipe.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{hash:016x}")
}
