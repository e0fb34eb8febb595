//! `drago-vmm doctor`: what this machine can do, and how to mend what it cannot.

mod kvm;
mod node;

use std::{
    env, fmt, fs,
    io::{self, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde::Serialize;

pub use kvm::{KvmClass, Unusable, probe as probe_kvm};

use crate::huge;
use node::Node;

/// How much a finding matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// Works.
    Ok,
    /// Some feature will not work or be slow.
    Limited,
    /// Virtual machines cannot run.
    Broken,
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ok => "ok",
            Self::Limited => "limited",
            Self::Broken => "broken",
        })
    }
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at, stable for scripts.
    pub name: &'static str,
    /// How it is.
    pub level: Level,
    /// What was seen.
    pub seen: String,
    /// How to mend it; empty if there is nothing to mend.
    pub hint: String,
}

impl Finding {
    fn ok(name: &'static str, seen: impl Into<String>) -> Self {
        Self { name, level: Level::Ok, seen: seen.into(), hint: String::new() }
    }

    fn limited(name: &'static str, seen: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { name, level: Level::Limited, seen: seen.into(), hint: hint.into() }
    }
}

/// Looks at everything.
pub fn examine() -> Vec<Finding> {
    vec![
        kvm_finding(),
        memory(),
        gpu_process(),
        sandbox(),
        render_node(),
        opengl(),
        vulkan(),
        tun(),
        passt(),
        vhost(),
        udmabuf(),
    ]
}

/// Looks at everything and prints it; `true` if virtual machines can run.
pub fn run(json: bool, out: &mut impl Write) -> io::Result<bool> {
    let findings = examine();
    if json {
        serde_json::to_writer(&mut *out, &findings)?;
        writeln!(out)?;
    } else {
        for finding in &findings {
            writeln!(out, "{:<12} {:<8} {}", finding.name, finding.level, finding.seen)?;
            if !finding.hint.is_empty() {
                writeln!(out, "{:<12} {:<8} -> {}", "", "", finding.hint)?;
            }
        }
    }
    Ok(findings.iter().all(|finding| finding.level != Level::Broken))
}

fn kvm_finding() -> Finding {
    let (level, seen, hint) = match kvm::probe() {
        KvmClass::Native { rate } => {
            (Level::Ok, format!("native, {:.0} M instructions/s", rate / 1e6), String::new())
        }
        KvmClass::Interpreted { rate } => (
            Level::Broken,
            format!(
                "interpreted: guest kernels run at {:.1} M instructions/s, too slow to boot",
                rate / 1e6
            ),
            "use a machine with hardware virtualisation, or `cargo xtask testbed` to run inside \
             an emulated one"
                .to_owned(),
        ),
        KvmClass::None { reason } => {
            let hint = reason.hint(&Node::examine(Path::new("/dev/kvm")));
            (Level::Broken, reason.to_string(), hint)
        }
    };
    Finding { name: "kvm", level, seen, hint }
}

fn memory() -> Finding {
    const NAME: &str = "huge-pages";
    match (huge::setting(), huge::file()) {
        (huge::Setting::Memfds, _) => Finding::ok(NAME, "guest memory: memfd"),
        (huge::Setting::OwnFileSystem, Ok(_)) => Finding::ok(NAME, "guest memory: own tmpfs"),
        (setting, own) => Finding::limited(
            NAME,
            match own {
                Err(error) if setting != huge::Setting::Denied => {
                    format!("guest memory has none: no tmpfs of our own: {error}")
                }
                _ => "guest memory has none: the kernel denies them to shared memory".to_owned(),
            },
            format!(
                "guests start faster with them: echo advise > {}, or reserve some for --hugepages",
                huge::SETTING
            ),
        ),
    }
}

/// Where `drago-gpu` has to be.
fn gpu_program() -> Option<PathBuf> {
    Some(env::current_exe().ok()?.parent()?.join("drago-gpu"))
}

fn gpu_process() -> Finding {
    const NAME: &str = "gpu-process";
    match gpu_program() {
        Some(path) if is_executable(&path) => Finding::ok(NAME, path.display().to_string()),
        path => Finding::limited(
            NAME,
            "drago-gpu is not beside drago-vmm",
            format!(
                "install drago-gpu as {}, or give --gpu socket=PATH of a running back end; \
                 without either there is no display",
                path.unwrap_or_else(|| PathBuf::from("drago-gpu")).display()
            ),
        ),
    }
}

/// Lets `drago-gpu` try what `--gpu virgl` would do.
fn opengl() -> Finding {
    let hint = "apt-get install libvirglrenderer1 libegl1 libopengl0 libgl1-mesa-dri (or your system's packages); \
                without them the guest's desktop is drawn by its CPUs";
    renderer("opengl", &[], hint)
}

/// The same of `--gpu vulkan=venus`. Whether there is a Vulkan driver, its programs find out.
fn vulkan() -> Finding {
    let hint = "apt-get install virgl-server mesa-vulkan-drivers (or your system's packages; the \
                server's path may be in RENDER_SERVER_EXEC_PATH) for --gpu vulkan=venus";
    renderer("vulkan", &["--vulkan", "venus"], hint)
}

fn renderer(name: &'static str, arguments: &[&str], hint: &'static str) -> Finding {
    let failed = |seen: String| Finding::limited(name, seen, hint);
    let Some(program) = gpu_program() else {
        return failed("drago-gpu is not there to try it".to_owned());
    };
    let tried = Command::new(&program)
        .args(["--probe", "--renderer", "virgl"])
        .args(arguments)
        .env("DRAGO_LOG", "off")
        .stdin(Stdio::null())
        .output();
    match tried {
        Ok(out) if out.status.success() => {
            Finding::ok(name, String::from_utf8_lossy(&out.stdout).trim())
        }
        Ok(out) => {
            let text = String::from_utf8_lossy(&out.stderr);
            let lines: Vec<&str> = text.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
            failed(lines.join(" "))
        }
        Err(error) => failed(format!("{}: {error}", program.display())),
    }
}

/// Lets `drago-gpu` put up its sandbox and say what stands.
fn sandbox() -> Finding {
    const NAME: &str = "sandbox";
    let tried = gpu_program().map(|program| {
        Command::new(program)
            .args(["--self-test", "walls", "--renderer", "2d"])
            .env("DRAGO_LOG", "off")
            .stdin(Stdio::null())
            .output()
    });
    match tried {
        Some(Ok(out)) if out.status.success() => {
            Finding::ok(NAME, format!("drago-gpu: {}", String::from_utf8_lossy(&out.stdout).trim()))
        }
        Some(Ok(out)) => Finding::limited(
            NAME,
            format!("drago-gpu: {}", String::from_utf8_lossy(&out.stdout).trim()),
            "the layers that stand are used; allow unprivileged user namespaces (sysctl \
             kernel.unprivileged_userns_clone=1 or kernel.apparmor_restrict_unprivileged_userns=0) \
             and enable Landlock (lsm=…,landlock) for the others",
        ),
        _ => Finding::limited(NAME, "drago-gpu is not there to try it", "see gpu-process above"),
    }
}

fn render_node() -> Finding {
    const NAME: &str = "render-node";
    let nodes = host::render_nodes::all();
    let Some(node) = nodes.first() else {
        return Finding::limited(
            NAME,
            "no /dev/dri/renderD*",
            "load the GPU's kernel driver; without one the guest's desktop is drawn by its CPUs",
        );
    };
    access(NAME, node, "render")
}

fn tun() -> Finding {
    access("tun", Path::new("/dev/net/tun"), "netdev")
}

fn vhost() -> Finding {
    access("vhost-net", Path::new("/dev/vhost-net"), "kvm")
}

fn udmabuf() -> Finding {
    access("udmabuf", Path::new("/dev/udmabuf"), "kvm")
}

/// Whether a device node can be opened for reading and writing.
fn access(name: &'static str, node: &Path, group: &str) -> Finding {
    match fs::File::options().read(true).write(true).open(node) {
        Ok(_) => Finding::ok(name, node.display().to_string()),
        Err(error) => {
            let hint = match error.kind() {
                io::ErrorKind::NotFound => format!(
                    "load the kernel module that provides {} if the feature is wanted",
                    node.display()
                ),
                io::ErrorKind::PermissionDenied => Node::examine(node).permission(group),
                _ => "see the kernel log".to_owned(),
            };
            Finding::limited(name, format!("{}: {error}", node.display()), hint)
        }
    }
}

fn passt() -> Finding {
    const NAME: &str = "passt";
    let found = env::var_os("PATH")
        .iter()
        .flat_map(env::split_paths)
        .map(|folder| folder.join("passt"))
        .find(|path| is_executable(path));
    match found {
        Some(path) => Finding::ok(NAME, path.display().to_string()),
        None => Finding::limited(
            NAME,
            "passt is not in PATH",
            "apt-get install passt (or your system's package) for --net user; --net tap= works \
             without",
        ),
    }
}

fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_well_says_how_to_mend_it() {
        for finding in examine() {
            assert_eq!(finding.level == Level::Ok, finding.hint.is_empty(), "{finding:?}");
        }
    }

    #[test]
    fn a_missing_node_is_not_mistaken_for_missing_permission() {
        let finding = access("tun", Path::new("/nonexistent/node"), "netdev");
        assert_eq!(finding.level, Level::Limited);
        assert!(finding.hint.contains("load the kernel module"), "{}", finding.hint);
    }

    #[test]
    fn json_is_one_line() {
        let mut out = Vec::new();
        run(true, &mut out).unwrap();
        let parsed: serde_json::Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(parsed[0]["name"], "kvm");
        assert_eq!(out.iter().filter(|byte| **byte == b'\n').count(), 1);
    }
}
