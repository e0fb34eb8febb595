//! The command line of the virtio-gpu back end.

use std::{
    io::{self, IsTerminal},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, Result};
use clap::{ArgGroup, Parser};
use drago_gpu::{
    control::Limits,
    daemon,
    device::GpuDevice,
    render_server::{self, Servers},
    renderer::{
        FenceSink, Timeline,
        choice::{self, Choice},
    },
    sandbox::{self, Mode, Needs, Sandbox, Walls},
    sys,
};
use tracing_subscriber::EnvFilter;

/// A virtio-gpu device served over vhost-user, for drago-vmm and QEMU.
#[derive(Debug, Parser)]
#[command(version, about)]
#[command(group(ArgGroup::new("front-end").required(true)))]
struct Arguments {
    /// Listen at this path, serve one front end and exit.
    #[arg(long, value_name = "PATH", group = "front-end")]
    socket_path: Option<PathBuf>,

    /// Serve the front end at the other end of this inherited, connected socket.
    #[arg(long, value_name = "N", group = "front-end")]
    fd: Option<i32>,

    /// Print what this back end can do, as JSON (vhost-user back end conventions), and exit.
    #[arg(long, group = "front-end")]
    print_capabilities: bool,

    /// Start the renderer, say what draws, and exit.
    #[arg(long, group = "front-end")]
    probe: bool,

    /// What draws: auto (OpenGL where a GPU can, else 2D), virgl (OpenGL, without a GPU by the
    /// CPUs) or 2d.
    #[arg(long, value_name = "NAME", default_value = "auto")]
    renderer: Choice,

    /// The GPU's render node, instead of the first one in /dev/dri.
    #[arg(long, value_name = "PATH")]
    render_node: Option<PathBuf>,

    /// What draws Vulkan: none, or venus (virglrenderer's render server with the host's Vulkan driver).
    #[arg(long, value_name = "NAME", default_value = "none")]
    vulkan: Vulkan,

    /// virglrenderer's render server; given several times: its first arguments.
    #[arg(long, value_name = "PATH")]
    render_server: Vec<PathBuf>,

    /// Most memory the guest's resources may take here, in MiB (default: 512, with OpenGL 2048).
    #[arg(long, value_name = "MIB")]
    max_memory: Option<u64>,

    /// What the kernel lets this process do: on, off, or log (system calls that are not permitted
    /// are carried out and logged by the kernel).
    #[arg(long, value_name = "MODE", default_value = "on")]
    sandbox: Mode,

    /// Folder for compiled shaders, to be kept between runs.
    #[arg(long, value_name = "FOLDER")]
    shader_cache: Option<PathBuf>,

    /// Try something from inside the sandbox and say how that went; `walls`: say what stands of it.
    #[arg(long, value_name = "WHAT", group = "front-end", hide = true)]
    self_test: Option<String>,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    if arguments.print_capabilities {
        println!(r#"{{ "type": "gpu", "features": [] }}"#);
        return Ok(());
    }
    let filter = EnvFilter::try_from_env("DRAGO_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .init();
    let (renderer, node) = choice::settle(arguments.renderer, arguments.render_node);
    let memory = arguments.max_memory.unwrap_or(match renderer {
        Choice::TwoD => 512,
        Choice::Auto | Choice::Virgl => 2048,
    });
    let bytes = memory.checked_mul(1 << 20).context("--max-memory: too big")?;
    // First of all descriptors, and not for the render server: whoever has it is the VMM's back end.
    let inherited = arguments
        .fd
        .map(|fd| {
            sys::inherited_socket(fd)
                .with_context(|| format!("--fd {fd}: not an inherited, connected Unix socket"))
        })
        .transpose()?;
    // Before the sandbox, which it would not get out of, and before any thread.
    let server = match arguments.vulkan {
        Vulkan::None => None,
        Vulkan::Venus => {
            anyhow::ensure!(renderer == Choice::Virgl, "--vulkan venus needs --renderer virgl");
            let words = render_server::find(arguments.render_server)?;
            let node = node.as_deref().ok();
            Some(Servers::new(words, arguments.sandbox, node, bytes)?)
        }
    };
    if arguments.probe {
        println!("{}", choice::start(renderer, node, server, Arc::new(Deaf))?.describe());
        return Ok(());
    }
    let needs = match renderer {
        Choice::TwoD => Needs::Nothing,
        Choice::Auto | Choice::Virgl => Needs::Driver {
            render_node: node.clone().ok(),
            shader_cache: arguments.shader_cache.clone(),
        },
    };
    let front = match (inherited, &arguments.socket_path) {
        (Some(front), _) => Some(front),
        (None, Some(path)) => Some(accept(path)?),
        (None, None) => None,
    };
    let limits = Limits { bytes, ..Limits::default() };
    let door = daemon::Door::open()?;
    // The threads that are started from now on inherit it.
    let sandbox = Sandbox::enter(arguments.sandbox, needs, bytes);
    let device = GpuDevice::new(move |sink| choice::start(renderer, node, server, sink), limits)
        .context("the device cannot be made")?;
    let Some(front) = front else {
        let walls = sandbox.close();
        self_test(arguments.self_test.as_deref().unwrap_or_default(), &walls);
        return Ok(());
    };
    daemon::serve(&front, door, &device, || drop(sandbox.close()))?;
    tracing::info!("the front end hung up");
    Ok(())
}

/// `--vulkan`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Vulkan {
    None,
    Venus,
}

/// Makes no fences, so hears of none.
struct Deaf;

impl FenceSink for Deaf {
    fn retired(&self, _timeline: Timeline, _id: u64) {}
}

/// Tries what the sandbox should prevent. Told about its walls, `drago-vmm doctor` reads this: one line,
/// the status is 3 if some are missing.
fn self_test(what: &str, walls: &Walls) {
    if what == "walls" {
        println!("{walls}");
        if !walls.refused.is_empty() {
            std::process::exit(3);
        }
        return;
    }
    match sandbox::attempt(what) {
        Ok(done) => println!("{done}"),
        Err(error) => println!("refused: {error}"),
    }
}

/// Waits for one front end.
fn accept(path: &Path) -> Result<UnixStream> {
    let name = path.display();
    // A socket that a killed back end left behind would be in the way; a file of any other kind is
    // somebody's data.
    if let Ok(metadata) = std::fs::symlink_metadata(path) {
        use std::os::unix::fs::FileTypeExt;
        anyhow::ensure!(
            metadata.file_type().is_socket(),
            "--socket-path {name}: the file exists and is no socket"
        );
        std::fs::remove_file(path).with_context(|| format!("--socket-path {name}"))?;
    }
    let listener =
        UnixListener::bind(path).with_context(|| format!("--socket-path {name}: cannot listen"))?;
    let accepted = listener.accept();
    let _ = std::fs::remove_file(path);
    let (front, _) = accepted.with_context(|| format!("--socket-path {name}: cannot accept"))?;
    Ok(front)
}
