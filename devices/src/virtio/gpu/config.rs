//! `--gpu [auto|virgl|2d][,render-node=PATH][,vulkan=none|venus][,hostmem=SIZE][,socket=PATH]`
//! `[,scanouts=N][,size=WxH]`.

use std::path::PathBuf;

use gpu_protocol::{frames::MAX_SIZE, virtio::MAX_SCANOUTS};

use super::{device, handle::DisplayMode, recovery::RestartPolicy};
use crate::{
    spec::{Spec, SpecError},
    virtio::{
        registry::{BuildError, BuiltDevice, Count, DeviceConfig, DeviceModule, Machines, Preset},
        shared_memory::SIZES,
    },
};

/// The GPU in the registry.
pub static MODULE: DeviceModule = DeviceModule {
    option: "gpu",
    value_name: "[auto|virgl|2d][,render-node=PATH][,vulkan=none|venus][,hostmem=SIZE]\
                 [,socket=PATH][,scanouts=N][,size=WxH]",
    help: "a display, with OpenGL where a GPU can draw it (auto), everywhere (virgl) or nowhere (2d); \
           with vulkan=venus also Vulkan, whose memory the guest sees in a window of hostmem (256M); \
           served by drago-gpu, or by the vhost-user-gpu back end at socket=",
    count: Count::One,
    presets: &[Preset { value: "", on: Machines::Viewed }],
    can_be_off: false,
    served_elsewhere: true,
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
    /// Whether the guest gets Vulkan.
    pub vulkan: bool,
    /// Bytes of the window in which the guest sees memory of the host; a power of two.
    pub host_memory: Option<u64>,
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
            vulkan: false,
            host_memory: None,
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
    parse_vulkan(&mut spec, &mut config)?;
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

/// As in QEMU's and microvm.nix' options.
const DEFAULT_HOST_MEMORY: u64 = 256 << 20;

fn parse_vulkan(spec: &mut Spec, config: &mut GpuConfig) -> Result<(), SpecError> {
    if let Some(name) = spec.take("vulkan")? {
        config.vulkan = match name.as_str() {
            "none" => false,
            "venus" if config.renderer == Renderer::TwoD => {
                return Err(spec.invalid("vulkan", &name, "2d draws nothing but pictures"));
            }
            "venus" => true,
            _ => return Err(spec.invalid("vulkan", &name, "expected none or venus")),
        };
    }
    if config.vulkan {
        // Whoever wants Vulkan wants to hear if it cannot be had.
        config.renderer = Renderer::Virgl;
        config.host_memory = Some(DEFAULT_HOST_MEMORY);
    }
    if let Some(text) = spec.take("hostmem")? {
        if !config.vulkan {
            return Err(spec.invalid("hostmem", &text, "only vulkan=venus needs such a window"));
        }
        let size = size(&text).filter(|size| size.is_power_of_two() && SIZES.contains(size));
        if size.is_none() {
            let reason = "expected a power of two from 1M to 64G, such as 256M";
            return Err(spec.invalid("hostmem", &text, reason));
        }
        config.host_memory = size;
    }
    Ok(())
}

/// A number of bytes with K, M or G behind it, or of mebibytes.
fn size(text: &str) -> Option<u64> {
    let (number, shift) = match text.as_bytes().last()? {
        b'K' | b'k' => (text.get(..text.len() - 1)?, 10),
        b'M' | b'm' => (text.get(..text.len() - 1)?, 20),
        b'G' | b'g' => (text.get(..text.len() - 1)?, 30),
        _ => (text, 20),
    };
    number.parse::<u64>().ok()?.checked_mul(1 << shift)
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
