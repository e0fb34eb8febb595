//! OpenGL for the guest: virglrenderer turns virgl's commands into the host's OpenGL.
//!
//! Without a render node the same library draws with Mesa's software rasteriser (surfaceless EGL).
//! Pictures leave it by `transfer_read` into the frame slot: on every driver, the right way up,
//! without a dmabuf.

mod ffi;

use std::{
    collections::HashMap,
    os::fd::{BorrowedFd, OwnedFd},
    path::Path,
    sync::Arc,
};

use gpu_protocol::{
    Rect,
    format::{BYTES_PER_PIXEL, PixelFormat},
    virtio::{
        Blob, Create3d, Features, MAX_CAPSET, RESOURCE_Y_0_TOP, Refusal, Transfer3d, capset,
        map_info,
    },
};
use vm_memory::{Bytes, VolatileSlice};

pub use self::ffi::VirglError;
use self::ffi::{CreateArgs, Instance, IoVecs, Part, Place};
use super::{Capset, FenceSink, Layout, Renderer, Timeline};
use crate::{GuestMemory, backing::Backing, render_server::Servers};

/// `PIPE_TEXTURE_2D`.
const TARGET_2D: u32 = 2;
/// `VIRGL_RES_BIND_RENDER_TARGET`.
const BIND_RENDER_TARGET: u32 = 1 << 1;

/// Where the driver's name is in the second capability set: `renderer` in `virgl_caps_v2`.
const RENDERER_NAME: std::ops::Range<usize> = 696..760;

/// Refused commands that are logged; a guest can cause any number.
const MAX_ERRORS: u32 = 10;

struct Resource {
    /// What `read_pixels` has to convert.
    format: Option<PixelFormat>,
    backing: Option<IoVecs>,
}

/// The renderer with OpenGL behind it.
pub struct Virgl {
    instance: Instance,
    capsets: Vec<Capset>,
    resources: HashMap<u32, Resource>,
    commands: Vec<u64>,
    node: String,
    /// How many refused commands were logged.
    errors: u32,
}

impl std::fmt::Debug for Virgl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Virgl").field("resources", &self.resources.len()).finish_non_exhaustive()
    }
}

/// Whether the library is there and new enough, without starting it.
pub fn probe() -> Result<(), VirglError> {
    ffi::probe()
}

fn refusal(code: i32) -> Refusal {
    match code.abs() {
        libc::ENOMEM => Refusal::OutOfMemory,
        libc::EINVAL => Refusal::InvalidParameter,
        _ => Refusal::Unspecified,
    }
}

impl Virgl {
    /// Starts the library on this thread, on a render node or, with `None`, in software. With
    /// render servers, guests get Vulkan too.
    pub fn start(
        sink: Arc<dyn FenceSink>,
        node: Option<&Path>,
        servers: Option<Servers>,
    ) -> Result<Self, VirglError> {
        let opened = match node {
            Some(path) => Some(ffi::open_node(path)?),
            None => None,
        };
        let vulkan = servers.is_some();
        let mut instance = Instance::start(sink, opened, servers)?;
        let mut capsets: Vec<Capset> = [capset::VIRGL, capset::VIRGL2]
            .into_iter()
            .map(|id| {
                let (version, size) = instance.capset(id);
                Capset { id, version, size }
            })
            .filter(|set| (1..=MAX_CAPSET).contains(&(set.size as usize)))
            .collect();
        if vulkan {
            capsets.push(venus(&mut instance).ok_or(VirglError::Vulkan)?);
        }
        let node = node.map_or_else(|| "no render node".to_owned(), |p| p.display().to_string());
        Ok(Self {
            instance,
            capsets,
            resources: HashMap::new(),
            commands: Vec::new(),
            node,
            errors: 0,
        })
    }

    /// Whether the CPUs draw.
    pub fn is_software(&self) -> bool {
        let driver = self.driver().to_lowercase();
        ["llvmpipe", "softpipe", "swrast"].iter().any(|name| driver.contains(name))
    }

    fn has_vulkan(&self) -> bool {
        self.capsets.iter().any(|set| set.id == capset::VENUS)
    }

    fn driver(&self) -> String {
        let set = self.capsets.iter().find(|set| set.id == capset::VIRGL2);
        let Some(set) = set else { return "unknown driver".to_owned() };
        let mut bytes = vec![0; set.size as usize];
        self.instance.fill_caps(set.id, set.version, &mut bytes);
        let name = bytes.get(RENDERER_NAME).unwrap_or(&[]);
        let length = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
        let text = String::from_utf8_lossy(&name[..length]);
        let printable = text.chars().filter(|c| !c.is_control()).collect::<String>();
        if printable.is_empty() { "unknown driver".to_owned() } else { printable }
    }

    fn create(&mut self, args: CreateArgs) -> Result<(), Refusal> {
        self.instance.create(args).map_err(refusal)?;
        let format = PixelFormat::from_wire(args.format);
        self.resources.insert(args.handle, Resource { format, backing: None });
        Ok(())
    }
}

/// Vulkan's capability set. The library has one whether the server works or not, so a context is
/// made for a moment.
fn venus(instance: &mut Instance) -> Option<Capset> {
    let id = capset::VENUS;
    let (version, size) = instance.capset(id);
    if !(1..=MAX_CAPSET).contains(&(size as usize)) {
        return None;
    }
    let mut bytes = vec![0; size as usize];
    instance.fill_caps(id, version, &mut bytes);
    if bytes.iter().all(|byte| *byte == 0) {
        return None;
    }
    instance.create_context(1, id, b"test").ok()?;
    instance.destroy_context(1);
    Some(Capset { id, version, size })
}

fn place(transfer: &Transfer3d) -> (Part, Place) {
    let Transfer3d { x, y, z, width, height, depth, offset, level, stride, layer_stride } =
        *transfer;
    (Part { x, y, z, width, height, depth }, Place { level, stride, layer_stride, offset })
}

impl Renderer for Virgl {
    fn describe(&self) -> String {
        let vulkan = match self.has_vulkan() {
            true => ", Vulkan by venus",
            false => "",
        };
        format!("virgl on {}, {}{vulkan}", self.driver(), self.node)
    }

    fn features(&self) -> Features {
        let features = Features::VIRGL | Features::RESOURCE_UUID | Features::RESOURCE_BLOB;
        match self.instance.has_context_fences() {
            true => features | Features::CONTEXT_INIT,
            false => features,
        }
    }

    fn capsets(&self) -> &[Capset] {
        &self.capsets
    }

    fn fill_capset(&mut self, set: u32, version: u32, target: &mut [u8]) {
        self.instance.fill_caps(set, version, target);
    }

    fn create_2d(&mut self, id: u32, layout: Layout) -> Result<(), Refusal> {
        self.create(CreateArgs {
            handle: id,
            target: TARGET_2D,
            format: layout.format as u32,
            bind: BIND_RENDER_TARGET,
            width: layout.width,
            height: layout.height,
            depth: 1,
            array_size: 1,
            flags: RESOURCE_Y_0_TOP,
            ..CreateArgs::default()
        })
    }

    fn create_3d(&mut self, id: u32, create: &Create3d) -> Result<(), Refusal> {
        self.create(CreateArgs {
            handle: id,
            target: create.target,
            format: create.format,
            bind: create.bind,
            width: create.width,
            height: create.height,
            depth: create.depth,
            array_size: create.array_size,
            last_level: create.last_level,
            nr_samples: create.nr_samples,
            flags: create.flags,
        })
    }

    fn create_blob(
        &mut self,
        id: u32,
        size: u64,
        backing: &Backing,
        memory: &GuestMemory,
    ) -> Result<(), Refusal> {
        let vectors = IoVecs::new(backing, memory).ok_or(Refusal::InvalidParameter)?;
        self.instance.create_blob(id, size, &vectors).map_err(refusal)?;
        self.resources.insert(id, Resource { format: None, backing: Some(vectors) });
        Ok(())
    }

    fn create_host_blob(&mut self, id: u32, context: u32, blob: &Blob) -> Result<(), Refusal> {
        // Buffers of OpenGL cannot be files.
        if !self.has_vulkan() {
            return Err(Refusal::InvalidParameter);
        }
        self.instance.create_host_blob(id, context, blob).map_err(refusal)?;
        self.resources.insert(id, Resource { format: None, backing: None });
        Ok(())
    }

    fn export_blob(&mut self, id: u32) -> Result<(OwnedFd, u32), Refusal> {
        let (fd, info) = self.instance.export_blob(id).map_err(refusal)?;
        Ok((fd, info & map_info::CACHE_MASK))
    }

    fn destroy(&mut self, id: u32) {
        self.detach(id);
        if self.resources.remove(&id).is_some() {
            self.instance.unref(id);
        }
    }

    fn attach(&mut self, id: u32, backing: &Backing, memory: &GuestMemory) -> Result<(), Refusal> {
        let resource = self.resources.get_mut(&id).ok_or(Refusal::InvalidResource)?;
        let mut vectors = IoVecs::new(backing, memory).ok_or(Refusal::InvalidParameter)?;
        self.instance.attach(id, &mut vectors).map_err(refusal)?;
        resource.backing = Some(vectors);
        Ok(())
    }

    fn detach(&mut self, id: u32) {
        if let Some(resource) = self.resources.get_mut(&id)
            && resource.backing.is_some()
        {
            self.instance.detach(id);
            resource.backing = None;
        }
    }

    fn upload(
        &mut self,
        id: u32,
        rect: Rect,
        offset: u64,
        backing: &Backing,
        _memory: &GuestMemory,
    ) -> Result<(), Refusal> {
        if rect.is_empty() {
            return Ok(());
        }
        if offset >= backing.pieces().len() {
            return Err(Refusal::InvalidParameter);
        }
        let part =
            Part { x: rect.x, y: rect.y, z: 0, width: rect.width, height: rect.height, depth: 1 };
        let place = Place { level: 0, stride: 0, layer_stride: 0, offset };
        self.instance.write(id, 0, part, place).map_err(refusal)
    }

    fn read_pixels(
        &mut self,
        id: u32,
        rect: Rect,
        target: &VolatileSlice<'_>,
        stride: usize,
    ) -> Result<(), Refusal> {
        let format = self.resources.get(&id).and_then(|resource| resource.format);
        let format = format.ok_or(Refusal::InvalidResource)?;
        if rect.is_empty() {
            return Ok(());
        }
        let part =
            Part { x: rect.x, y: rect.y, z: 0, width: rect.width, height: rect.height, depth: 1 };
        let pitch = u32::try_from(stride).map_err(|_| Refusal::InvalidParameter)?;
        self.instance.read_to(id, part, target, pitch).map_err(refusal)?;
        if !format.is_bgrx() {
            let mut row = vec![0; rect.width as usize * BYTES_PER_PIXEL as usize];
            for line in 0..rect.height as usize {
                let out_of_bounds = |_| Refusal::InvalidParameter;
                target.read_slice(&mut row, line * stride).map_err(out_of_bounds)?;
                format.to_bgrx(&mut row);
                target.write_slice(&row, line * stride).map_err(out_of_bounds)?;
            }
        }
        Ok(())
    }

    fn create_context(&mut self, context: u32, capset: u32, name: &[u8]) -> Result<(), Refusal> {
        // What a context that names no set has always spoken.
        let capset = if capset == 0 { capset::VIRGL } else { capset };
        self.instance.create_context(context, capset, name).map_err(refusal)
    }

    fn destroy_context(&mut self, context: u32) {
        self.instance.destroy_context(context);
    }

    fn attach_resource(&mut self, context: u32, id: u32) {
        self.instance.attach_resource(context, id);
    }

    fn detach_resource(&mut self, context: u32, id: u32) {
        self.instance.detach_resource(context, id);
    }

    fn transfer_to_host(
        &mut self,
        context: u32,
        id: u32,
        transfer: &Transfer3d,
    ) -> Result<(), Refusal> {
        let (part, place) = place(transfer);
        self.instance.write(id, context, part, place).map_err(refusal)
    }

    fn transfer_from_host(
        &mut self,
        context: u32,
        id: u32,
        transfer: &Transfer3d,
    ) -> Result<(), Refusal> {
        let (part, place) = place(transfer);
        self.instance.read(id, context, part, place).map_err(refusal)
    }

    fn submit(&mut self, context: u32, commands: &[u8]) -> Result<(), Refusal> {
        self.commands.clear();
        // Private and aligned: the library reads it more than once.
        self.commands.extend(commands.chunks(8).map(|chunk| {
            let mut bytes = [0; 8];
            bytes[..chunk.len()].copy_from_slice(chunk);
            u64::from_ne_bytes(bytes)
        }));
        let done = self.instance.submit(context, &mut self.commands, commands.len() / 4);
        done.map_err(|code| {
            // The library executes nothing more of such a context: a desktop stands still.
            if self.errors < MAX_ERRORS {
                self.errors += 1;
                let said = ffi::last_messages();
                tracing::warn!(context, code, said, "a program's 3D commands were refused");
            }
            refusal(code)
        })
    }

    fn fence(&mut self, timeline: Timeline, id: u64) -> Result<(), Refusal> {
        match timeline {
            Timeline::Global => self.instance.fence(id as u32),
            Timeline::Ring { context, ring } => self.instance.context_fence(context, ring, id),
        }
        .map_err(refusal)
    }

    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        self.instance.poll_fd()
    }

    fn poll(&mut self) {
        self.instance.poll();
    }
}

impl Drop for Virgl {
    fn drop(&mut self) {
        let ids: Vec<u32> = self.resources.keys().copied().collect();
        ids.into_iter().for_each(|id| self.destroy(id));
    }
}
