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
