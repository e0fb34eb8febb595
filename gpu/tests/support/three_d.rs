//! 3D commands of a guest, and virgl's own commands for a clear (numbers from `virgl_protocol.h`).

use gpu_protocol::virtio::{
    ContextCreate, Create3d, CtrlHdr, FLAG_FENCE, FLAG_INFO_RING_IDX, ResourceCommand,
    ResourceCreate3d, Submit3d, Transfer3d, TransferHost3d, WireBox, kind,
};
use zerocopy::IntoBytes;

use super::FrontEnd;

pub const TARGET_2D: u32 = 2;
pub const BIND_RENDER_TARGET: u32 = 1 << 1;
pub const BIND_SAMPLER_VIEW: u32 = 1 << 3;
pub const BIND_SCANOUT: u32 = 1 << 18;

const TARGET_BUFFER: u32 = 0;
const BIND_VERTEX_BUFFER: u32 = 1 << 4;
const R8: u32 = 64;
const R32G32B32A32_FLOAT: u32 = 31;
const MODE_TRIANGLES: u32 = 4;

const BIND_OBJECT: u32 = 2;
const SET_VIEWPORT_STATE: u32 = 4;
const SET_VERTEX_BUFFERS: u32 = 6;
const DRAW_VBO: u32 = 8;
const RESOURCE_INLINE_WRITE: u32 = 9;
const SET_SAMPLER_VIEWS: u32 = 10;
const BIND_SAMPLER_STATES: u32 = 18;
const BIND_SHADER: u32 = 31;
const OBJECT_BLEND: u32 = 1;
const OBJECT_RASTERIZER: u32 = 2;
const OBJECT_DSA: u32 = 3;
const OBJECT_SHADER: u32 = 4;
const OBJECT_VERTEX_ELEMENTS: u32 = 5;
const OBJECT_SAMPLER_VIEW: u32 = 6;
const OBJECT_SAMPLER_STATE: u32 = 7;
const SHADER_VERTEX: u32 = 0;
const SHADER_FRAGMENT: u32 = 1;
const MIP_NONE: u32 = 2;

const CREATE_OBJECT: u32 = 1;
const SET_FRAMEBUFFER_STATE: u32 = 5;
const CLEAR: u32 = 7;
const OBJECT_SURFACE: u32 = 8;
const CREATE_SUB_CTX: u32 = 29;
const SET_SUB_CTX: u32 = 28;
const RESOURCE_COPY_REGION: u32 = 17;
const CLEAR_COLOR0: u32 = 1 << 2;

/// One of virgl's commands: object and length go into its first word.
pub fn command(number: u32, object: u32, body: &[u32]) -> Vec<u32> {
    let mut words = vec![number | object << 8 | (body.len() as u32) << 16];
    words.extend_from_slice(body);
    words
}

/// Draws into this resource from now on.
pub fn target(surface: u32, resource: u32, format: u32) -> Vec<u32> {
    [
        command(CREATE_OBJECT, OBJECT_SURFACE, &[surface, resource, format, 0, 0]),
        command(SET_FRAMEBUFFER_STATE, 0, &[1, 0, surface]),
    ]
    .concat()
}

/// Fills the target with a colour, red first.
pub fn clear(colour: [f32; 4]) -> Vec<u32> {
    let [r, g, b, a] = colour.map(f32::to_bits);
    command(CLEAR, 0, &[CLEAR_COLOR0, r, g, b, a, 0, 0, 0])
}

/// Copies a rectangle from one resource to another.
pub fn copy(to: u32, at: (u32, u32), from: u32, origin: (u32, u32), size: (u32, u32)) -> Vec<u32> {
    let body = [to, 0, at.0, at.1, 0, from, 0, origin.0, origin.1, 0, size.0, size.1, 1];
    command(RESOURCE_COPY_REGION, 0, &body)
}

/// Writes into a buffer.
pub fn write_buffer(id: u32, words: &[u32]) -> Vec<u32> {
    let bytes = size_of_val(words) as u32;
    let head = [id, 0, 0, 0, 0, 0, 0, 0, bytes, 1, 1];
    command(RESOURCE_INLINE_WRITE, 0, &[&head[..], words].concat())
}

/// A shader in TGSI's text form, bound.
fn shader(handle: u32, kind: u32, text: &str) -> Vec<u32> {
    let mut bytes = text.as_bytes().to_vec();
    bytes.push(0);
    let length = bytes.len() as u32;
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    let mut body = vec![handle, kind, length, 300, 0];
    body.extend(bytes.chunks(4).map(|c| u32::from_le_bytes([c[0], c[1], c[2], c[3]])));
    [command(CREATE_OBJECT, OBJECT_SHADER, &body), command(BIND_SHADER, 0, &[handle, kind])]
        .concat()
}

/// Draws triangles with these shaders from a buffer whose vertices are `inputs` times four floats.
fn draw(
    buffer: u32,
    vertices: u32,
    inputs: u32,
    size: (u32, u32),
    vertex: &str,
    fragment: &str,
) -> Vec<u32> {
    let [width, height] = [size.0, size.1].map(|side| (side as f32 / 2.0).to_bits());
    let half = 0.5_f32.to_bits();
    // All channels of the first target are written; pixel centres lie at halves.
    let blend = [101, 0, 0, 0xf << 27, 0, 0, 0, 0, 0, 0, 0];
    let rasterizer = [102, 1 << 1 | 1 << 29, 1_f32.to_bits(), 0, 0, 1_f32.to_bits(), 0, 0, 0];
    let element = |input: u32| [input * 16, 0, 0, R32G32B32A32_FLOAT];
    let elements: Vec<u32> = [104].into_iter().chain((0..inputs).flat_map(element)).collect();
    [
        command(CREATE_OBJECT, OBJECT_BLEND, &blend),
        command(BIND_OBJECT, OBJECT_BLEND, &[101]),
        command(CREATE_OBJECT, OBJECT_RASTERIZER, &rasterizer),
        command(BIND_OBJECT, OBJECT_RASTERIZER, &[102]),
        command(CREATE_OBJECT, OBJECT_DSA, &[103, 0, 0, 0, 0]),
        command(BIND_OBJECT, OBJECT_DSA, &[103]),
        command(CREATE_OBJECT, OBJECT_VERTEX_ELEMENTS, &elements),
        command(BIND_OBJECT, OBJECT_VERTEX_ELEMENTS, &[104]),
        command(SET_VERTEX_BUFFERS, 0, &[inputs * 16, 0, buffer]),
        command(SET_VIEWPORT_STATE, 0, &[0, width, height, half, width, height, half]),
        shader(105, SHADER_VERTEX, vertex),
        shader(106, SHADER_FRAGMENT, fragment),
        command(DRAW_VBO, 0, &[0, vertices, MODE_TRIANGLES, 0, 1, 0, 0, 0, 0, 0, vertices - 1, 0]),
    ]
    .concat()
}

/// Draws triangles of one colour (red first): four floats a vertex, from a buffer.
pub fn triangles(buffer: u32, vertices: u32, size: (u32, u32), colour: [f32; 4]) -> Vec<u32> {
    let [r, g, b, a] = colour;
    let vertex = "VERT\nDCL IN[0]\nDCL OUT[0], POSITION\n  0: MOV OUT[0], IN[0]\n  1: END\n";
    let fragment = format!(
        "FRAG\nDCL OUT[0], COLOR\nIMM[0] FLT32 {{ {r:.8}, {g:.8}, {b:.8}, {a:.8} }}\n  \
         0: MOV OUT[0], IMM[0]\n  1: END\n"
    );
    draw(buffer, vertices, 1, size, vertex, &fragment)
}

/// Draws triangles with a texture that repeats itself, each pixel that of the nearest texel: position
/// and place in the texture, four floats each, from a buffer.
pub fn textured(
    buffer: u32,
    vertices: u32,
    size: (u32, u32),
    texture: u32,
    format: u32,
) -> Vec<u32> {
    let vertex = "VERT\nDCL IN[0]\nDCL IN[1]\nDCL OUT[0], POSITION\nDCL OUT[1], GENERIC[0]\n  \
                  0: MOV OUT[0], IN[0]\n  1: MOV OUT[1], IN[1]\n  2: END\n";
    let fragment = "FRAG\nDCL IN[0], GENERIC[0], PERSPECTIVE\nDCL OUT[0], COLOR\nDCL SAMP[0]\n\
                    DCL SVIEW[0], 2D, FLOAT\n  0: TEX OUT[0], IN[0], SAMP[0], 2D\n  1: END\n";
    // Red, green, blue and alpha each from where they are.
    let swizzle = 1 << 3 | 2 << 6 | 3 << 9;
    let view = [107, texture, TARGET_2D << 24 | format, 0, 0, swizzle];
    let sampler = [108, MIP_NONE << 11, 0, 0, 0, 0, 0, 0, 0];
    [
        command(CREATE_OBJECT, OBJECT_SAMPLER_VIEW, &view),
        command(SET_SAMPLER_VIEWS, 0, &[SHADER_FRAGMENT, 0, 107]),
        command(CREATE_OBJECT, OBJECT_SAMPLER_STATE, &sampler),
        command(BIND_SAMPLER_STATES, 0, &[SHADER_FRAGMENT, 0, 108]),
        draw(buffer, vertices, 2, size, vertex, fragment),
    ]
    .concat()
}

/// What a driver does first.
pub fn prologue() -> Vec<u32> {
    [command(CREATE_SUB_CTX, 0, &[1]), command(SET_SUB_CTX, 0, &[1])].concat()
}

fn header(kind: u32, context: u32) -> CtrlHdr {
    CtrlHdr { ctx_id: context.into(), ..CtrlHdr::new(kind) }
}

/// A header with a fence.
pub fn fenced(kind: u32, context: u32, fence: u64, ring: Option<u8>) -> CtrlHdr {
    let flags = FLAG_FENCE | if ring.is_some() { FLAG_INFO_RING_IDX } else { 0 };
    CtrlHdr {
        flags: flags.into(),
        fence_id: fence.into(),
        ring_idx: ring.unwrap_or(0),
        ..header(kind, context)
    }
}

impl FrontEnd {
    /// A buffer for vertices, of this many bytes.
    pub fn create_vertices(&mut self, resource: u32, bytes: u32) {
        let buffer = Create3d {
            target: TARGET_BUFFER,
            format: R8,
            bind: BIND_VERTEX_BUFFER,
            width: bytes,
            height: 1,
            depth: 1,
            array_size: 1,
            ..Create3d::default()
        };
        assert_eq!(self.try_create_3d(resource, &buffer), kind::OK_NODATA);
    }

    /// A context; returns the kind of the answer.
    pub fn create_context(&mut self, context: u32, capset: u32) -> u32 {
        let mut debug_name = [0; 64];
        debug_name[..4].copy_from_slice(b"test");
        let command = ContextCreate {
            hdr: header(kind::CTX_CREATE, context),
            name_length: 4.into(),
            context_init: capset.into(),
            debug_name,
        };
        self.run(&[command.as_bytes()])
    }

    pub fn destroy_context(&mut self, context: u32) -> u32 {
        self.run(&[header(kind::CTX_DESTROY, context).as_bytes()])
    }

    pub fn try_create_3d(&mut self, resource: u32, create: &Create3d) -> u32 {
        let command = ResourceCreate3d {
            hdr: CtrlHdr::new(kind::RESOURCE_CREATE_3D),
            resource_id: resource.into(),
            target: create.target.into(),
            format: create.format.into(),
            bind: create.bind.into(),
            width: create.width.into(),
            height: create.height.into(),
            depth: create.depth.into(),
            array_size: create.array_size.into(),
            last_level: create.last_level.into(),
            nr_samples: create.nr_samples.into(),
            flags: create.flags.into(),
            padding: 0.into(),
        };
        self.run(&[command.as_bytes()])
    }

    /// A texture that can be drawn into and shown.
    pub fn create_texture(&mut self, resource: u32, format: u32, size: (u32, u32), flags: u32) {
        let create = Create3d {
            target: TARGET_2D,
            format,
            bind: BIND_RENDER_TARGET | BIND_SAMPLER_VIEW,
            width: size.0,
            height: size.1,
            depth: 1,
            array_size: 1,
            last_level: 0,
            nr_samples: 0,
            flags,
        };
        assert_eq!(self.try_create_3d(resource, &create), kind::OK_NODATA);
    }

    pub fn about_resource(&mut self, kind: u32, context: u32, resource: u32) -> u32 {
        let command = ResourceCommand {
            hdr: header(kind, context),
            resource_id: resource.into(),
            padding: 0.into(),
        };
        self.run(&[command.as_bytes()])
    }

    /// A context may use a resource.
    pub fn use_in(&mut self, context: u32, resource: u32) {
        let answer = self.about_resource(kind::CTX_ATTACH_RESOURCE, context, resource);
        assert_eq!(answer, kind::OK_NODATA);
    }

    /// One of the two transfers; returns the kind of the answer.
    pub fn transfer(
        &mut self,
        kind: u32,
        context: u32,
        resource: u32,
        transfer: &Transfer3d,
    ) -> u32 {
        let command = transfer_command(header(kind, context), resource, transfer);
        self.run(&[command.as_bytes()])
    }

    /// Submits commands; returns the slot of the answer.
    pub fn submit_3d(&mut self, hdr: CtrlHdr, words: &[u32]) -> u16 {
        let size = (size_of_val(words) as u32).into();
        let command = Submit3d { hdr, size, padding: 0.into() };
        self.submit_parts(0, &[command.as_bytes(), words.as_bytes()])
    }

    /// Submits commands and waits for the answer.
    pub fn draw(&mut self, context: u32, words: &[u32]) -> u32 {
        let slot = self.submit_3d(header(kind::SUBMIT_3D, context), words);
        self.wait_for::<CtrlHdr>(0, slot).kind.get()
    }
}

/// TRANSFER_TO_HOST_3D or TRANSFER_FROM_HOST_3D.
pub fn transfer_command(hdr: CtrlHdr, resource: u32, transfer: &Transfer3d) -> TransferHost3d {
    TransferHost3d {
        hdr,
        part: WireBox {
            x: transfer.x.into(),
            y: transfer.y.into(),
            z: transfer.z.into(),
            width: transfer.width.into(),
            height: transfer.height.into(),
            depth: transfer.depth.into(),
        },
        offset: transfer.offset.into(),
        resource_id: resource.into(),
        level: transfer.level.into(),
        stride: transfer.stride.into(),
        layer_stride: transfer.layer_stride.into(),
    }
}
