//! The test host's kernel and initramfs.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::{Options, leftovers};
use crate::cpio::Archive;
use crate::debian::{self, Kernel, Release};
use crate::modules::ModuleTree;
use crate::{paths, progress};

/// Modules in the order in which they are wanted; what they need is added. `virtio_pci` is built in.
const MODULES: &[&str] = &[
    "virtio_net",
    "9pnet_virtio",
    "9p",
    "virtio-rng",
    "overlay",
    "ccp",
    "kvm-amd",
    "vgem",
    "tun",
    "tap",
    "vhost_net",
    "vmw_vsock_virtio_transport_common",
    "vhost_vsock",
    "virtio_blk",
    "loop",
    "ext4",
    "crc32c_generic",
    "erofs",
    "macvtap",
    "vfio_iommu_type1",
    "vfio-pci",
];

/// The emulated CPU. With AVX, llvmpipe inside crashes under TCG; with XSAVE, guests of the test host
/// lose their FPU state now and then ("bad frame in rt_sigreturn") and the test host itself may die.
pub(super) const CPU: &str = "EPYC,+svm,+npt,-avx,-avx2,-fma,-f16c,-xsave";

/// Options of modules, by file name.
const OPTIONS: &[(&str, &str)] = &[("kvm-amd.ko", "nested=0")];

/// Kernel and initramfs, made if they are not in the cache.
pub(crate) fn kernel_and_initramfs() -> Result<(Kernel, PathBuf)> {
    let trixie = Release::open("trixie")?;
    let kernel = trixie.kernel("linux-image-amd64")?;
    let init = paths::resources().join("testbed/init");
    let init = std::fs::read(&init).with_context(|| format!("cannot read {}", init.display()))?;
    let recipe = format!("{}\n{MODULES:?}\n{OPTIONS:?}\n{init:?}", kernel.version);
    let path = paths::cache("testbed")?.join(format!("initramfs-{}.cpio", debian::digest(&recipe)));
    if path.exists() {
        leftovers::used(&path);
    } else {
        let busybox = trixie.package("busybox-static")?.join("usr/bin/busybox");
        progress::step("making the test host's initramfs", || {
            build(&kernel, &busybox, &init, &path)
        })?;
    }
    Ok((kernel, path))
}

fn build(kernel: &Kernel, busybox: &Path, init: &[u8], path: &Path) -> Result<()> {
    let busybox =
        std::fs::read(busybox).with_context(|| format!("cannot read {}", busybox.display()))?;
    let modules = ModuleTree::open(&kernel.root, &kernel.version)?.closure(MODULES)?;
    let mut archive = Archive::new(Vec::new());
    for dir in ["bin", "dev", "modules"] {
        archive.dir(dir)?;
    }
    archive.char_device("dev/console", 5, 1)?;
    archive.file("bin/busybox", 0o755, &busybox)?;
    archive.file("init", 0o755, init)?;
    let mut order = String::new();
    for module in &modules {
        archive.file(&format!("modules/{}", module.file_name), 0o644, &module.object)?;
        let options = OPTIONS.iter().find(|(name, _)| *name == module.file_name);
        order.push_str(&format!("{} {}\n", module.file_name, options.map_or("", |(_, o)| o)));
    }
    archive.file("modules/order", 0o644, order.as_bytes())?;
    archive.save(path).with_context(|| format!("cannot write {}", path.display()))
}

/// The per-boot archive that follows the initramfs: what init and agent have to know.
pub(crate) fn config(token: &str, agent: &Path, rw: &[PathBuf]) -> Result<Vec<u8>> {
    let rw: Vec<String> = rw.iter().map(|dir| dir.display().to_string()).collect();
    let text =
        format!("export TOKEN={token}\nAGENT='{}'\nRW_DIRS='{}'\n", agent.display(), rw.join(" "));
    let mut archive = Archive::new(Vec::new());
    archive.file("config", 0o600, text.as_bytes())?;
    Ok(archive.finish()?)
}

/// The oldest QEMU whose TCG locks pages while it translates. Older ones now and then run a stale `int3`
/// when a kernel with two processors patches itself, and the test host dies ("Oops: int3").
const QEMU_MIN: (u32, u32) = (8, 1);

/// This machine's QEMU if it is good enough, else Debian 13's.
fn qemu_program() -> Result<Command> {
    let own = Command::new("qemu-system-x86_64").arg("--version").output();
    let version = own.ok().and_then(|out| version(&String::from_utf8_lossy(&out.stdout)));
    if version >= Some(QEMU_MIN) {
        return Ok(Command::new("qemu-system-x86_64"));
    }
    let tree = Release::open("trixie")?.tree("qemu-system-x86", &["qemu-system-x86"])?;
    let libraries = tree.join("usr/lib/x86_64-linux-gnu");
    let mut qemu = Command::new(libraries.join("ld-linux-x86-64.so.2"));
    qemu.arg("--library-path")
        .arg(libraries)
        .arg(tree.join("usr/bin/qemu-system-x86_64"))
        .arg("-L")
        .arg(tree.join("usr/share/qemu"))
        .arg("-L")
        .arg(tree.join("usr/share/seabios"));
    Ok(qemu)
}

/// Major and minor number in what `--version` says.
fn version(said: &str) -> Option<(u32, u32)> {
    let numbers = said.split("version ").nth(1)?;
    let mut numbers = numbers.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// QEMU's command line for the test host, without network and folders.
pub(crate) fn qemu(kernel: &Kernel, initramfs: &Path, options: &Options) -> Result<Command> {
    let Options { memory_mib, cpus, cpu, .. } = options;
    let iommu = !options.spare_devices.is_empty();
    let mut qemu = qemu_program()?;
    qemu.args(["-accel", "tcg,thread=multi", "-M", "q35"])
        .args(["-cpu", cpu])
        .args(["-smp", &cpus.to_string(), "-m", &memory_mib.to_string()])
        .args(["-nodefaults", "-nographic", "-serial", "stdio", "-no-reboot"]);
    if iommu {
        // Before what it is to stand in front of.
        qemu.args(["-device", "intel-iommu,intremap=on"]);
    }
    qemu.args(["-object", "rng-random,id=rng,filename=/dev/urandom"])
        .args(["-device", "virtio-rng-pci,rng=rng"])
        .arg("-kernel")
        .arg(&kernel.image)
        .arg("-initrd")
        .arg(initramfs)
        .arg("-append")
        .arg(format!(
            "console=ttyS0 panic=-1 mitigations=off quiet tsc=reliable{}",
            if iommu { " intel_iommu=on" } else { "" }
        ));
    Ok(qemu)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_as_numbers() {
        assert_eq!(version("QEMU emulator version 10.0.13 (Debian 1:10)"), Some((10, 0)));
        assert!(version("QEMU emulator version 7.2.22 (Debian)") < Some(QEMU_MIN));
        assert!(version("QEMU emulator version 10.0.13") >= Some(QEMU_MIN));
        assert_eq!(version(""), None);
    }
}
