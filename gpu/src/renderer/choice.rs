//! Which renderer a machine gets, and why not a better one.

use std::{
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
};

use host::render_nodes;

use super::{
    FenceSink, Renderer, Soft2d,
    virgl::{Virgl, VirglError},
};
use crate::render_server::Servers;

/// What was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Choice {
    /// OpenGL where a GPU can draw it, else 2D.
    #[default]
    Auto,
    /// OpenGL, in software if there is no GPU.
    Virgl,
    /// No OpenGL.
    TwoD,
}

/// An unknown name.
#[derive(Debug, thiserror::Error)]
#[error("expected auto, virgl or 2d")]
pub struct UnknownRenderer;

impl FromStr for Choice {
    type Err = UnknownRenderer;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        match name {
            "auto" => Ok(Self::Auto),
            "virgl" => Ok(Self::Virgl),
            "2d" => Ok(Self::TwoD),
            _ => Err(UnknownRenderer),
        }
    }
}

/// The driver of the device behind a render node, if it is the kind of device that has one. What
/// kernels offer for tests (vgem, vkms) has none, or one that stands for nothing.
fn gpu_driver(node: &Path) -> Option<String> {
    let link = Path::new("/sys/class/drm").join(node.file_name()?).join("device/driver");
    let driver = std::fs::read_link(link).ok()?.file_name()?.to_string_lossy().into_owned();
    (!matches!(driver.as_str(), "faux_driver" | "vgem" | "vkms")).then_some(driver)
}

/// The first render node of a GPU that can be opened; the error says why there is none.
fn find_node() -> Result<PathBuf, String> {
    let mut reason = format!("there is no {}/renderD*", render_nodes::FOLDER);
    for node in render_nodes::all() {
        if gpu_driver(&node).is_none() {
            reason = format!("{} is not a GPU's", node.display());
            continue;
        }
        match std::fs::File::options().read(true).write(true).open(&node) {
            Ok(_) => return Ok(node),
            Err(error) => reason = format!("{}: {error}", node.display()),
        }
    }
    Err(reason)
}

/// Finds the render node, and out whether there will be OpenGL, before the sandbox is entered that
/// depends on both. Without a node the reason is in its place.
pub fn settle(choice: Choice, node: Option<PathBuf>) -> (Choice, Result<PathBuf, String>) {
    let found = match (choice, node) {
        (Choice::TwoD, _) => Err("not wanted".to_owned()),
        (_, Some(node)) => Ok(node),
        (_, None) => find_node(),
    };
    match (choice, found) {
        (Choice::Auto, Err(reason)) => {
            tracing::info!(
                "no 3D for the guest: {reason} (with the renderer virgl the host's CPUs draw it)"
            );
            (Choice::TwoD, Err(reason))
        }
        settled => settled,
    }
}

/// Makes the renderer that was [settled](settle), on the thread that will use it, and logs what it
/// is. `servers` starts virglrenderer's render server, for Vulkan.
pub fn start(
    choice: Choice,
    node: Result<PathBuf, String>,
    servers: Option<Servers>,
    sink: Arc<dyn FenceSink>,
) -> Result<Box<dyn Renderer>, VirglError> {
    let renderer: Box<dyn Renderer> = match (choice, node) {
        (Choice::TwoD, _) | (Choice::Auto, Err(_)) => Box::new(Soft2d::new()),
        (Choice::Virgl, Ok(node)) => Box::new(Virgl::start(sink, Some(&node), servers)?),
        (Choice::Virgl, Err(reason)) => {
            tracing::warn!("{reason}: OpenGL is drawn by the host's CPUs");
            Box::new(Virgl::start(sink, None, servers)?)
        }
        (Choice::Auto, Ok(node)) => match Virgl::start(sink, Some(&node), servers) {
            Ok(virgl) if virgl.is_software() => {
                tracing::info!("no 3D for the guest: {} draws without a GPU", virgl.describe());
                drop(virgl);
                Box::new(Soft2d::new())
            }
            Ok(virgl) => Box::new(virgl),
            Err(error) => {
                tracing::warn!("no 3D for the guest: {}", with_causes(&error));
                Box::new(Soft2d::new())
            }
        },
    };
    let sets: Vec<String> =
        renderer.capsets().iter().map(|set| format!("{}v{}", set.id, set.version)).collect();
    tracing::info!(capsets = sets.join(" "), "renderer: {}", renderer.describe());
    Ok(renderer)
}

fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}
