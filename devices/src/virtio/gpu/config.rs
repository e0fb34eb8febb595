//! `--gpu [auto|virgl|2d][,render-node=PATH][,socket=PATH][,scanouts=N][,size=WxH]`.

use std::path::PathBuf;

use gpu_protocol::{frames::MAX_SIZE, virtio::MAX_SCANOUTS};

use super::{device, handle::DisplayMode, recovery::RestartPolicy};
use crate::{
    spec::{Spec, SpecError},
    virtio::registry::{BuildError, BuiltDevice, Count, DeviceConfig, DeviceModule},
};

/// The GPU in the registry.
pub static MODULE: DeviceModule = DeviceModule {
    option: "gpu",
    value_name: "[auto|virgl|2d][,render-node=PATH][,socket=PATH][,scanouts=N][,size=WxH]",
    help: "a display, with OpenGL where a GPU can draw it (auto), everywhere (virgl) or nowhere (2d); \
           served by drago-gpu, or by the vhost-user-gpu back end at socket=",
    count: Count::One,
    parse,
    sample: || Box::new(GpuConfig::default()).build(),
};

/// Who draws for the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Renderer {
    /// OpenGL where a GPU can draw it.
    #[default]
    Auto,
    /// OpenGL, by the CPUs if there is no GPU.
    Virgl,
    /// No OpenGL.
    TwoD,
}

impl Renderer {
    /// The name, for us and for `drago-gpu`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Virgl => "virgl",
            Self::TwoD => "2d",
        }
    }
}

/// `--gpu`.
#[derive(Debug, Clone)]
pub struct GpuConfig {
    /// Who draws.
    pub renderer: Renderer,
    /// The GPU; `None`: the first one.
    pub render_node: Option<PathBuf>,
    /// Socket of a back end that runs already; `None`: start `drago-gpu`.
    pub socket: Option<PathBuf>,
    /// Number of monitors the guest can have, 1 to 16.
    pub scanouts: u32,
    /// Size of the first monitor until somebody asks for another one.
    pub mode: DisplayMode,
    /// Offer the back end frames in shared memory; without, pixels come through the socket.
    pub shared_frames: bool,
    /// How often a back end that dies is started again.
    pub restart: RestartPolicy,
    /// The sandbox of a `drago-gpu` that we start: on, off or log.
    pub sandbox: &'static str,
}

impl Default for GpuConfig {
    fn default() -> Self {
        Self {
            renderer: Renderer::Auto,
            render_node: None,
            socket: None,
            scanouts: 1,
            mode: DisplayMode::new(1280, 800),
            shared_frames: true,
            restart: RestartPolicy::default(),
            sandbox: "on",
        }
    }
}

pub(super) fn parse(mut spec: Spec) -> Result<Box<dyn DeviceConfig>, SpecError> {
    let mut config = GpuConfig::default();
    if let Some(word) = spec.take_word() {
        config.renderer = match word.as_str() {
            "auto" | "on" => Renderer::Auto,
            "virgl" => Renderer::Virgl,
            "2d" => Renderer::TwoD,
            _ => {
                return Err(SpecError::UnexpectedWord {
                    option: spec.option().to_owned(),
                    word,
                    expected: "expected auto, virgl or 2d".to_owned(),
                });
            }
        };
    }
    if let Some(node) = spec.take_path("render-node")? {
        if config.renderer == Renderer::TwoD {
            let node = node.display().to_string();
            return Err(spec.invalid("render-node", &node, "2d draws without a GPU"));
        }
        // Whoever names a GPU wants to hear if it cannot be used.
        config.renderer = Renderer::Virgl;
        config.render_node = Some(node);
    }
    config.socket = spec.take_path("socket")?;
    if let Some(scanouts) = spec.take_parsed::<u32>("scanouts")? {
        if !(1..=MAX_SCANOUTS as u32).contains(&scanouts) {
            let reason = format!("expected 1 to {MAX_SCANOUTS}");
            return Err(spec.invalid("scanouts", &scanouts.to_string(), reason));
        }
        config.scanouts = scanouts;
    }
    if let Some(size) = spec.take("size")? {
        let parsed = size.split_once('x').and_then(|(width, height)| {
            let (width, height) = (width.parse().ok()?, height.parse().ok()?);
            let sizes = 1..=MAX_SIZE;
            (sizes.contains(&width) && sizes.contains(&height)).then_some((width, height))
        });
        let Some((width, height)) = parsed else {
            let reason = format!("expected WIDTHxHEIGHT, each 1 to {MAX_SIZE}");
            return Err(spec.invalid("size", &size, reason));
        };
        config.mode = DisplayMode::new(width, height);
    }
    spec.finish()?;
    Ok(Box::new(config))
}

impl DeviceConfig for GpuConfig {
    fn set_sandbox(&mut self, mode: &'static str) {
        self.sandbox = mode;
    }

    fn build(self: Box<Self>) -> Result<BuiltDevice, BuildError> {
        let (device, handle) = device::build(&self)?;
        Ok(BuiltDevice { device: Box::new(device), handle: Some(Box::new(handle)) })
    }
}
