//! File access by Landlock (landlock(7)): a graphics driver's files and no others.
//!
//! What is open stays usable, so 2D needs no rule at all. Paths that do not exist are left out;
//! symbolic links are followed, as on NixOS, where most of these lead into the store.

use std::{
    env, fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, LandlockStatus,
    PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError, RulesetStatus,
    Scope,
};

use super::{Needs, Sandbox, elf};

/// Accesses this was written for; an older kernel restricts fewer of them.
const KNOWN: ABI = ABI::V6;

/// Libraries, their configuration and their data. To read is to be able to map as code: Landlock's right
/// to execute is for execve(2) only.
const DRIVER_FILES: &[&str] = &[
    "/usr/lib",
    "/usr/lib32",
    "/usr/lib64",
    "/usr/libexec",
    "/usr/local/lib",
    "/usr/share",
    "/usr/local/share",
    "/lib",
    "/lib64",
    "/opt",
    "/etc/ld.so.cache",
    "/etc/ld.so.preload",
    "/etc/drirc",
    "/etc/egl",
    "/etc/glvnd",
    "/etc/vulkan",
    "/etc/nvidia",
    "/etc/OpenCL",
    "/etc/localtime",
    "/run/opengl-driver",
    "/run/opengl-driver-32",
    "/nix/store",
    "/gnu/store",
];

/// What drivers and the C library ask about the machine.
const FACTS: &[&str] = &[
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/proc/stat",
    "/proc/devices",
    "/proc/modules",
    "/proc/driver/nvidia",
    "/sys/devices/system/cpu",
    "/sys/devices/system/node",
    "/sys/kernel/mm/transparent_hugepage",
];

/// Devices without hardware behind them.
const PLAIN_DEVICES: &[&str] =
    &["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/udmabuf"];

/// Beside the render node, NVIDIA's driver uses these.
const NVIDIA_DEVICES: &[&str] =
    &["/dev/nvidiactl", "/dev/nvidia-modeset", "/dev/nvidia-uvm", "/dev/nvidia-caps"];

/// Environment variables that name files or folders (separated by colons) with libraries or their
/// configuration.
const PATH_VARIABLES: &[&str] = &[
    "LD_LIBRARY_PATH",
    "LIBGL_DRIVERS_PATH",
    "GBM_BACKENDS_PATH",
    "LIBVA_DRIVERS_PATH",
    "__EGL_VENDOR_LIBRARY_DIRS",
    "__EGL_VENDOR_LIBRARY_FILENAMES",
    "__EGL_EXTERNAL_PLATFORM_CONFIG_DIRS",
    "VK_DRIVER_FILES",
    "VK_ICD_FILENAMES",
    "DRIRC_CONFIGDIR",
];

/// What they ask about themselves.
const OWN_FACTS: &str = "/proc/self";

/// Files that stay accessible.
#[derive(Default)]
pub(super) struct Rules(Vec<(PathFd, BitFlags<AccessFs>)>);

impl Rules {
    /// Opens what `needs` is made of.
    pub(super) fn new(needs: &Needs) -> Self {
        let mut rules = Self::default();
        let (render_node, shader_cache, programs) = match needs {
            Needs::Nothing => return rules,
            Needs::Driver { render_node, shader_cache } => (render_node, shader_cache, &[][..]),
            Needs::RenderServer { render_node, programs } => (render_node, &None, &programs[..]),
        };
        let read = AccessFs::ReadFile | AccessFs::ReadDir;
        let device = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev;
        for path in DRIVER_FILES {
            rules.add(Path::new(path), read);
        }
        for variable in PATH_VARIABLES {
            for path in env::var_os(variable).iter().flat_map(env::split_paths) {
                if path.is_absolute() && path.parent().is_some() {
                    rules.add(&path, read);
                }
            }
        }
        for path in programs {
            let execute = AccessFs::ReadFile | AccessFs::Execute;
            rules.add(path, execute);
            if let Some(interpreter) = elf::interpreter(path) {
                rules.add(&interpreter, execute);
            }
        }
        for path in FACTS {
            rules.add(Path::new(path), read);
        }
        for path in PLAIN_DEVICES {
            rules.add(Path::new(path), device);
        }
        if let Some(node) = render_node {
            rules.add(node, device);
            // Names only: libdrm looks for the node among its neighbours.
            rules.add(Path::new("/dev/dri"), AccessFs::ReadDir.into());
            if let Some(folder) = sysfs_folder(node) {
                rules.add(&folder, read);
            }
            for path in NVIDIA_DEVICES {
                rules.add(Path::new(path), device | AccessFs::ReadDir);
            }
            for number in 0..8 {
                rules.add(&PathBuf::from(format!("/dev/nvidia{number}")), device);
            }
        }
        if let Some(cache) = shader_cache {
            rules.add(cache, AccessFs::from_all(KNOWN) & !AccessFs::Execute);
        }
        rules
    }

    fn add(&mut self, path: &Path, access: BitFlags<AccessFs>) {
        let Ok(fd) = PathFd::new(path) else { return };
        let is_folder = fs::metadata(path).is_ok_and(|metadata| metadata.is_dir());
        let access = if is_folder { access } else { access & AccessFs::from_file(KNOWN) };
        self.0.push((fd, access));
    }
}

/// The folder in `/sys` that describes the device behind a node, as in
/// `/sys/devices/pci0000:00/0000:00:02.0`.
fn sysfs_folder(node: &Path) -> Option<PathBuf> {
    let device = fs::metadata(node).ok()?.rdev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    fs::canonicalize(format!("/sys/dev/char/{major}:{minor}/device")).ok()
}

/// Shuts everything else, for this thread and those it starts.
pub(super) fn apply(sandbox: &mut Sandbox, mut rules: Rules) {
    if sandbox.needs != Needs::Nothing {
        // Not opened with the others: that may have been in the process that this one was made by.
        rules.add(Path::new(OWN_FACTS), AccessFs::ReadFile | AccessFs::ReadDir);
    }
    match restrict(rules) {
        Ok((RulesetStatus::NotEnforced, _)) => {
            let error = std::io::Error::from(std::io::ErrorKind::Unsupported);
            sandbox.note("Landlock", Err(error));
        }
        Ok((_, LandlockStatus::Available { effective_abi, .. })) => {
            sandbox.note(&format!("Landlock {effective_abi}"), Ok(()));
        }
        Ok(_) => sandbox.note("Landlock", Ok(())),
        Err(error) => sandbox.note("Landlock", Err(std::io::Error::other(error))),
    }
}

fn restrict(rules: Rules) -> Result<(RulesetStatus, LandlockStatus), RulesetError> {
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(KNOWN))?
        .handle_access(AccessNet::from_all(KNOWN))?
        .scope(Scope::from_all(KNOWN))?
        .create()?;
    for (path, access) in rules.0 {
        ruleset = ruleset.add_rule(PathBeneath::new(path, access))?;
    }
    let status = ruleset.restrict_self()?;
    Ok((status.ruleset, status.landlock))
}
