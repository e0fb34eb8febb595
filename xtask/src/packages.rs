//! The Debian packages that demo and tests need, in one place, with the reason for each, and what comes
//! from elsewhere.

use std::{
    fs,
    io::ErrorKind,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail, ensure};
use drago_tests::{
    paths,
    progress::{note, step},
};

/// Package and what it is for.
type Need = (&'static str, &'static str);

/// Without these nothing can be built or made.
const BASE: &[Need] = &[
    ("gcc", "links Rust programs"),
    ("libc6-dev", "links Rust programs"),
    ("pkg-config", "finds libraries while building"),
    ("passt", "user networking of the guest"),
    ("qemu-system-x86", "the nested-KVM test host, and QEMU as a peer to compare with"),
    ("mmdebstrap", "makes guests from Debian packages"),
    ("uidmap", "lets it do so for others than root"),
    ("debian-archive-keyring", "checks those packages' signatures"),
    ("e2fsprogs", "makes the guests' disks"),
    ("busybox-static", "programs of the test host and of the minimal guest"),
    ("kmod", "finds the kernel modules a guest needs"),
    ("cpio", "packs initial RAM disks"),
    ("zstd", "packs initial RAM disks"),
    ("xz-utils", "unpacks kernel modules"),
    ("openssh-client", "ssh into the guest"),
    ("iproute2", "network of the test host"),
];

/// A real client that looks at the screen.
const CLIENT: &[Need] = &[
    ("spice-client-gtk", "a real SPICE client: screenshots"),
    ("python3-gi", "a real SPICE client, remote-controlled"),
    ("gir1.2-spiceclientglib-2.0", "a real SPICE client, remote-controlled"),
    ("imagemagick", "converts screenshots"),
    ("tesseract-ocr", "reads the text on screenshots"),
];

/// What only the tests need.
const TESTS: &[Need] = &[
    ("virt-viewer", "remote-viewer, the client people use"),
    ("xvfb", "a screen for remote-viewer"),
    ("xauth", "a screen for remote-viewer"),
    ("xdotool", "keys and mouse for remote-viewer"),
    ("chromium", "a browser as a SPICE client, without a screen"),
    ("spice-html5", "the page with a SPICE client that --web shows"),
    ("python3-pip", "fetches ryll, a SPICE client of another make, from PyPI"),
    ("openssl", "certificates for TLS, made by somebody else"),
    ("gvncviewer", "a real VNC client: gtk-vnc, the one in remote-viewer"),
    ("tigervnc-viewer", "a second real VNC client"),
    ("gir1.2-gtk-vnc-2.0", "gtk-vnc's clipboard, read by a script"),
    ("xclip", "the clipboard of the screen that a viewer runs on"),
    ("acpica-tools", "iasl checks our ACPI tables"),
    ("edid-decode", "checks our EDID"),
    ("qemu-system-gui", "QEMU's own vhost-user-gpu as a foreign back end"),
    ("fonts-dejavu-core", "text on pictures that the tests draw"),
    ("libvirglrenderer1", "OpenGL for guests, in drago-gpu's tests"),
    ("libegl1", "OpenGL without a screen for it"),
    ("libopengl0", "OpenGL's functions, which libvirglrenderer looks for"),
    ("libgl1-mesa-dri", "draws it in software"),
    ("virgl-server", "virglrenderer's render server: Vulkan for guests, in drago-gpu's tests"),
    ("glmark2-es2-x11", "draws through the vtest bridge: Mesa as the guest's driver"),
    ("gstreamer1.0-plugins-good", "decodes VP8 in spice-gtk; brings libvpx, which encodes it"),
    ("gstreamer1.0-plugins-bad", "decodes H.264 in spice-gtk; brings OpenH264, which encodes it"),
    ("gstreamer1.0-tools", "says whether it can"),
    ("socat", "the service manager's end of a machine's readiness"),
    ("util-linux", "unshare: network namespaces for the tap tests"),
    ("procps", "looks for processes left behind"),
    ("nix-bin", "evaluates resources/nix"),
    ("shellcheck", "checks the scripts that resources/nix makes"),
];

/// What only `cargo xtask bench` needs.
const BENCH: &[Need] = &[
    ("virgl-server", "virglrenderer's own server, to compare our device with"),
    ("gcc", "compiles the guests that QEMU shows beside our SPICE server"),
    ("iperf3", "the other end of the networks that are measured"),
];

/// What is about to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum For {
    /// `cargo xtask demo`.
    Demo,
    /// `cargo xtask demo --screenshot`.
    Screenshot,
    /// `cargo xtask test`.
    Tests,
    /// `cargo xtask bench`.
    Bench,
}

/// Installs what is missing, after saying what and why.
pub(crate) fn install(purpose: For) -> Result<()> {
    let lists: &[&[Need]] = match purpose {
        For::Demo => &[BASE],
        For::Screenshot => &[BASE, CLIENT],
        For::Tests => &[BASE, CLIENT, TESTS],
        For::Bench => &[BASE, CLIENT, TESTS, BENCH],
    };
    let mut missing = Vec::new();
    for need in lists.iter().copied().flatten() {
        if !installed(need.0)? {
            missing.push(need);
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    eprintln!("==> these Debian packages are missing and will be installed:");
    for (package, reason) in &missing {
        note(format_args!("{package:<28} {reason}"));
    }
    let names: Vec<&str> = missing.iter().map(|need| need.0).collect();
    step("apt-get update", || apt(&["update", "-q"]))?;
    let mut arguments = vec!["install", "-y", "-q", "--no-install-recommends"];
    arguments.extend(&names);
    step("apt-get install", || apt(&arguments))
}

/// A SPICE client that shares no code with others, which PyPI has as a program (Apache-2.0): this file and
/// no other.
pub(crate) fn ryll() -> Result<()> {
    const VERSION: &str = "0.3.0";
    const HASH: &str = "fe63638dfd1a9fcc65f6be23c34b57c47d719474413bdd1598001caede91baae";
    let tools = paths::workspace().join("target/tools");
    let root = tools.join("ryll");
    if root.join(format!("ryll-{VERSION}.dist-info")).is_dir() {
        return Ok(());
    }
    step("pip install ryll", || {
        // Leaves nothing half made where tests look.
        let folder = tools.join("ryll.new");
        if folder.exists() {
            fs::remove_dir_all(&folder)?;
        }
        fs::create_dir_all(&folder)?;
        let list = folder.join("list");
        fs::write(&list, format!("ryll=={VERSION} --hash=sha256:{HASH}\n"))?;
        let made = folder.join("ryll");
        let pip = ["-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-deps"];
        let out = Command::new("/usr/bin/python3")
            .stdin(Stdio::null())
            .args(pip)
            .args(["--only-binary=:all:", "--require-hashes", "--root-user-action=ignore"])
            .arg("--target")
            .arg(&made)
            .arg("--requirement")
            .arg(&list)
            .output()
            .context("cannot run /usr/bin/python3")?;
        let said = String::from_utf8_lossy(&out.stderr);
        ensure!(out.status.success(), "pip cannot install ryll {VERSION}:\n{said}");
        if root.exists() {
            fs::remove_dir_all(&root)?;
        }
        fs::rename(&made, &root).with_context(|| root.display().to_string())?;
        Ok(fs::remove_dir_all(&folder)?)
    })
}

/// Whether there is such a program.
pub(crate) fn in_path(program: &str) -> bool {
    let folders = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&folders).any(|folder| folder.join(program).is_file())
}

fn installed(package: &str) -> Result<bool> {
    let out = Command::new("dpkg-query")
        .args(["-W", "-f", "${db:Status-Status}", package])
        .stderr(Stdio::null())
        .output();
    match out {
        Ok(out) => Ok(out.stdout == b"installed"),
        Err(error) if error.kind() == ErrorKind::NotFound => bail!(
            "there is no dpkg-query: this needs Debian. Elsewhere install the packages listed in \
             xtask/src/packages.rs by hand and run cargo test"
        ),
        Err(error) => Err(error).context("cannot run dpkg-query"),
    }
}

fn apt(arguments: &[&str]) -> Result<()> {
    // Root needs no sudo, and often has none.
    let root = Command::new("id").arg("-u").output().is_ok_and(|out| out.stdout == b"0\n");
    let mut command = if root {
        Command::new("apt-get")
    } else {
        let mut sudo = Command::new("sudo");
        sudo.arg("apt-get");
        sudo
    };
    let out = command
        .args(arguments)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null())
        .output()
        .context("cannot run apt-get (as another user than root it needs sudo)")?;
    if !out.status.success() {
        bail!("apt-get {} failed:\n{}", arguments[0], String::from_utf8_lossy(&out.stderr));
    }
    Ok(())
}
