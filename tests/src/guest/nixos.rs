//! The guest that has the shape microvm.nix gives to NixOS: tmpfs as root, a store on a disk or in a
//! shared folder, systemd in a zstd initrd with microcode in front of it, credentials, readiness.
//!
//! It is made from Debian packages: `resources/guests/nixos/setup` makes the store and the initrd. The
//! same store is the system under which the test host runs the units of a microvm.nix host
//! ([`crate::units`]).

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};

use super::{
    Guest,
    image::{self, Workshop},
    recipe_text,
};
use crate::{
    cpio::Archive,
    debian::{Kernel, Release},
    modules::ModuleTree,
    paths,
};

/// Where the packages are in the store.
pub const DEBIAN: &str = "0dr4g0000000000000000000000debian-debian";
/// The guest's system in the store.
pub const SYSTEM: &str = "0dr4g0000000000000000000000system-nixos-system-guest";

/// What guests of microvm.nix load, early and late.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_mmio",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "virtio_balloon",
    "virtio-rng",
    "virtio_input",
    // Loaded where there is a display; `microvm.graphics.enable = false` would forbid it.
    "virtio-gpu",
    "virtiofs",
    "vmw_vsock_virtio_transport",
    "crc32c_generic",
    "crc32c-intel",
    "erofs",
    "ext4",
    "overlay",
    "dmi-sysfs",
    "button",
    "evdev",
    "i8042",
    "rtc-cmos",
    "pvpanic-mmio",
    "autofs4",
];

/// The guest's files.
#[derive(Debug, Clone)]
pub struct Nixos {
    dir: PathBuf,
    /// The bzImage.
    pub bzimage: PathBuf,
    /// The same kernel as an ELF file.
    pub vmlinux: PathBuf,
}

/// Where the guest's store is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Store {
    /// On a disk, found by its label.
    Label,
    /// On the first disk.
    FirstDisk,
    /// In the shared folder `ro-store`.
    Virtiofs,
}

/// How a guest is put together.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Where the store is.
    pub store: Store,
    /// What is written to the store goes to a volume with the label `rw-store`.
    pub writable: bool,
    /// A volume for results: `/output`.
    pub output: Option<&'static str>,
}

impl Shape {
    /// What is mounted in the initrd, and later.
    fn tables(&self) -> (String, String) {
        let mut early = "tmpfs /sysroot tmpfs size=50%,mode=0755,x-initrd.mount 0 0\n".to_owned();
        let below = if self.writable { "/sysroot/nix/.ro-store" } else { "/sysroot/nix/store" };
        early.push_str(&match self.store {
            Store::Label => format!("LABEL=nix-store {below} erofs ro,x-initrd.mount 0 0\n"),
            Store::FirstDisk => format!("/dev/vda {below} erofs ro,x-initrd.mount 0 0\n"),
            Store::Virtiofs => format!("ro-store {below} virtiofs defaults,x-initrd.mount 0 0\n"),
        });
        if self.writable {
            early.push_str(
                "LABEL=rw-store /sysroot/nix/.rw-store ext4 x-initrd.mount 0 0\n\
                 overlay /sysroot/nix/store overlay lowerdir=/sysroot/nix/.ro-store,\
                 upperdir=/sysroot/nix/.rw-store/store,workdir=/sysroot/nix/.rw-store/work,\
                 x-initrd.mount,x-systemd.requires=rw-store.service,\
                 x-systemd.requires-mounts-for=/sysroot/nix/.ro-store 0 0\n",
            );
        }
        let late = self.output.map_or_else(String::new, |what| {
            format!("{what} /output ext4 nofail,x-systemd.device-timeout=300 0 0\n")
        });
        (early, late)
    }
}

impl Nixos {
    /// Makes it if need be.
    ///
    /// # Errors
    /// If a package cannot be fetched or the recipe fails.
    pub fn new() -> Result<Self> {
        let kernel = Release::open("trixie")?.kernel("linux-image-amd64")?;
        let recipe = paths::resources().join("guests/nixos");
        let text = format!("{}{}{MODULES:?}", kernel.version, recipe_text(&recipe)?);
        let dir = image::made("nixos", &text, |shop| build(&kernel, &recipe, shop))?;
        Ok(Self { bzimage: kernel.image, vmlinux: dir.join("vmlinux"), dir })
    }

    /// As a guest with its store on the first disk.
    pub(super) fn guest(&self) -> Result<Guest> {
        let shape = Shape { store: Store::Label, writable: false, output: None };
        Ok(Guest {
            name: "nixos".to_owned(),
            kernel: self.bzimage.clone(),
            initrd: self.initrd(&shape, &self.dir)?,
            cmdline: self.cmdline(),
            disk: Some(self.store()),
            ssh_key: None,
            memory_mib: 512,
        })
    }

    /// The store as an erofs image.
    pub fn store(&self) -> PathBuf {
        self.dir.join("store.erofs")
    }

    /// Writes the initrd of a shape into a folder.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn initrd(&self, shape: &Shape, folder: &Path) -> Result<PathBuf> {
        // The kernel looks for this at the very start of the initrd, before anything is unpacked.
        let mut microcode = Archive::new(Vec::new());
        for dir in ["kernel", "kernel/x86", "kernel/x86/microcode"] {
            microcode.dir(dir)?;
        }
        for vendor in ["AuthenticAMD", "GenuineIntel"] {
            microcode.file(&format!("kernel/x86/microcode/{vendor}.bin"), 0o644, &[0; 4096])?;
        }
        let (early, late) = shape.tables();
        let mut tables = Archive::new(Vec::new());
        tables.dir("etc")?;
        tables.file("etc/fstab", 0o644, early.as_bytes())?;
        tables.file("etc/fstab.guest", 0o644, late.as_bytes())?;
        let mut initrd = microcode.finish()?;
        initrd.extend(tables.finish()?);
        initrd.extend(fs::read(self.dir.join("initrd.zst"))?);
        let name = format!(
            "initrd-{:?}{}{}",
            shape.store,
            if shape.writable { "-writable" } else { "" },
            if shape.output.is_some() { "-output" } else { "" }
        );
        let path = folder.join(name);
        fs::write(&path, initrd).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }

    /// The kernel's command line, as microvm.nix's runner for QEMU has it.
    pub fn cmdline(&self) -> String {
        format!(
            "earlyprintk=ttyS0 console=ttyS0 reboot=t panic=-1 8250.nr_uarts=1 root=fstab loglevel=4 \
             lsm=landlock,yama,bpf mitigations=off init=/nix/store/{SYSTEM}/init"
        )
    }
}

fn build(kernel: &Kernel, recipe: &Path, shop: &Workshop) -> Result<()> {
    let out = &shop.out;
    // The modules, as a tree that depmod and modprobe understand.
    let tree = ModuleTree::open(&kernel.root, &kernel.version)?;
    let modules = out.join("modules/usr/lib/modules").join(&kernel.version);
    fs::create_dir_all(modules.join("kernel"))?;
    for module in tree.closure(&tree.existing(MODULES))? {
        fs::write(modules.join("kernel").join(module.file_name), module.object)?;
    }
    for list in ["modules.order", "modules.builtin", "modules.builtin.modinfo"] {
        fs::copy(tree.root().join(list), modules.join(list))
            .with_context(|| format!("the kernel's package has no {list}"))?;
    }

    let shown = out.display();
    let mut mmdebstrap = shop.mmdebstrap("essential", &image::packages(recipe)?);
    mmdebstrap
        .arg(format!("--customize-hook=sync-in '{}' /", recipe.join("files").display()))
        .arg(format!("--customize-hook=sync-in '{shown}/modules' /"))
        .arg("--customize-hook=mkdir \"$1/build\"")
        .arg(format!("--customize-hook=upload '{}' /build/setup", recipe.join("setup").display()))
        .arg(format!(
            "--customize-hook=chroot \"$1\" env VERSION={} sh /build/setup",
            kernel.version
        ))
        .arg(format!("--customize-hook=cp \"$1\"/build/out/* '{shown}/'"));
    shop.run(mmdebstrap, &["initrd.zst", "store.erofs"])?;
    fs::remove_dir_all(out.join("modules"))?;
    let bytes = fs::read(&kernel.image)?;
    fs::write(out.join("vmlinux"), payload(&bytes)?)?;
    Ok(())
}

/// The ELF file in a bzImage (kernel: `Documentation/arch/x86/boot.rst`, `payload_offset`).
fn payload(image: &[u8]) -> Result<Vec<u8>> {
    let word = |at: usize| -> Result<usize> {
        let bytes = image.get(at..at + 4).context("the bzImage is too short")?;
        Ok(u32::from_le_bytes(bytes.try_into()?) as usize)
    };
    let sectors = usize::from(*image.get(0x1f1).context("the bzImage is too short")?);
    let start = (sectors + 1) * 512 + word(0x248)?;
    // Four bytes with the length of the content follow, which only some programs ignore.
    let packed = image
        .get(start..start + word(0x24c)? - 4)
        .context("the bzImage is shorter than it says")?;
    let tool = match packed {
        [0xfd, b'7', b'z', ..] => "xz",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "zstd",
        [0x1f, 0x8b, ..] => "gzip",
        _ => bail!("the kernel is packed in a way that is not known here"),
    };
    let mut file = tempfile::NamedTempFile::new()?;
    std::io::Write::write_all(&mut file, packed)?;
    let out = Command::new(tool)
        .args(["-d", "-c"])
        .stdin(file.reopen()?)
        .output()
        .with_context(|| format!("cannot run {tool}"))?;
    ensure!(out.stdout.starts_with(b"\x7fELF"), "{tool}: {}", String::from_utf8_lossy(&out.stderr));
    Ok(out.stdout)
}
