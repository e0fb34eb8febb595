//! Picks kernel modules for an initramfs: dependency order from `modules.dep` (see modules.dep(5)).

use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cpio::Archive;

/// The modules of one kernel version.
#[derive(Debug)]
pub struct ModuleTree {
    root: PathBuf,
    /// Module name with `_` → path below `root`, and the paths it needs.
    modules: HashMap<String, (String, Vec<String>)>,
}

/// One module to load: its file name without compression and its plain ELF bytes.
#[derive(Debug)]
pub struct Module {
    /// File name, for example `kvm-amd.ko`.
    pub file_name: String,
    /// The uncompressed object.
    pub object: Vec<u8>,
}

impl ModuleTree {
    /// Reads `modules.dep` of `lib/modules/VERSION`; makes it with depmod(8) if the package ships none.
    ///
    /// # Errors
    /// If there is no such folder or depmod fails.
    pub fn open(unpacked: &Path, version: &str) -> Result<Self> {
        let root = [unpacked.join("usr/lib/modules"), unpacked.join("lib/modules")]
            .into_iter()
            .map(|dir| dir.join(version))
            .find(|dir| dir.is_dir())
            .with_context(|| format!("no modules of {version} in {}", unpacked.display()))?;
        let dep_file = root.join("modules.dep");
        if !dep_file.exists() {
            // depmod wants BASE/lib/modules/VERSION.
            let base = root
                .ancestors()
                .nth(3)
                .with_context(|| format!("{} has no base folder", root.display()))?;
            let status = Command::new("depmod")
                .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
                .arg("-b")
                .arg(base)
                .arg(version)
                .status()
                .context("cannot run depmod (package kmod)")?;
            if !status.success() {
                bail!("depmod for {version}: {status}");
            }
        }
        let text = std::fs::read_to_string(&dep_file)
            .with_context(|| format!("cannot read {}", dep_file.display()))?;
        Ok(Self { root, modules: parse(&text) })
    }

    /// The named modules and all they need, in an order in which insmod(8) can load them.
    /// Names built into the kernel are an error: list only modules.
    ///
    /// # Errors
    /// If a module does not exist or cannot be unpacked.
    pub fn closure(&self, names: &[&str]) -> Result<Vec<Module>> {
        let mut order: Vec<&str> = Vec::new();
        for name in names {
            let (path, needs) = self
                .modules
                .get(&key(name))
                .with_context(|| format!("no module {name} in {}", self.root.display()))?;
            // depmod lists needs so that the last must be loaded first.
            for file in needs.iter().rev().chain([path]) {
                if !order.contains(&file.as_str()) {
                    order.push(file);
                }
            }
        }
        order.into_iter().map(|file| self.unpack(file)).collect()
    }

    /// The names that exist as modules: what is missing is built into some kernels.
    pub fn existing<'a>(&self, names: &[&'a str]) -> Vec<&'a str> {
        names.iter().copied().filter(|name| self.modules.contains_key(&key(name))).collect()
    }

    /// The folder with the kernel version as its name.
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn unpack(&self, file: &str) -> Result<Module> {
        let path = self.root.join(file);
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or(file);
        let (tool, plain) = match name.rsplit_once('.') {
            Some((stem, "xz")) => ("xz", stem),
            Some((stem, "zst")) => ("zstd", stem),
            Some((stem, "gz")) => ("gzip", stem),
            _ => ("cat", name),
        };
        let mut command = Command::new(tool);
        if tool != "cat" {
            command.arg("-dc");
        }
        let out = command.arg(&path).output().with_context(|| format!("cannot run {tool}"))?;
        if !out.status.success() {
            bail!("{tool} {}: {}", path.display(), String::from_utf8_lossy(&out.stderr).trim());
        }
        Ok(Module { file_name: plain.to_owned(), object: out.stdout })
    }
}

fn key(name: &str) -> String {
    name.replace('-', "_")
}

fn parse(text: &str) -> HashMap<String, (String, Vec<String>)> {
    let mut modules = HashMap::new();
    for line in text.lines() {
        let Some((path, needs)) = line.split_once(':') else { continue };
        let file = path.rsplit('/').next().unwrap_or(path);
        let name = file.split(".ko").next().unwrap_or(file);
        let needs = needs.split_whitespace().map(str::to_owned).collect();
        modules.insert(key(name), (path.to_owned(), needs));
    }
    modules
}

/// Puts modules into a folder of an archive, and `order`: their names in the order in which they are loaded.
///
/// # Errors
/// If the archive cannot be written to.
pub fn pack(
    archive: &mut Archive<impl Write>,
    folder: &str,
    modules: &[Module],
) -> std::io::Result<()> {
    let mut order = String::new();
    for module in modules {
        archive.file(&format!("{folder}/{}", module.file_name), 0o644, &module.object)?;
        order.push_str(&format!("{}\n", module.file_name));
    }
    archive.file(&format!("{folder}/order"), 0o644, order.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn needs_come_before_the_module() {
        let tree = ModuleTree {
            root: PathBuf::from("/"),
            modules: parse(
                "kernel/a/kvm-amd.ko.xz: kernel/a/kvm.ko.xz kernel/b/irqbypass.ko.xz\n\
                 kernel/a/kvm.ko.xz: kernel/b/irqbypass.ko.xz\nkernel/b/irqbypass.ko.xz:\n",
            ),
        };
        let (path, needs) = &tree.modules["kvm_amd"];
        assert_eq!(path, "kernel/a/kvm-amd.ko.xz");
        assert_eq!(needs.last().unwrap(), "kernel/b/irqbypass.ko.xz");
        assert!(tree.closure(&["nonesuch"]).is_err());
    }
}
