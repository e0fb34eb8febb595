//! Who holds the pixels of resources, and who draws.
//!
//! [`crate::control`] keeps the books (ids, sizes, backing, scanouts, limits) and checks every
//! number a guest gives; a [`Renderer`] only moves pixels and draws, and may rely on those checks. A
//! renderer with a GPU behind it reads pictures back in [`Renderer::read_pixels`], straight into the
//! frame slot.

pub mod choice;
mod soft2d;
pub mod virgl;

use std::os::fd::{BorrowedFd, OwnedFd};

use gpu_protocol::{
    Rect,
    format::{BYTES_PER_PIXEL, PixelFormat},
    virtio::{Blob, Create3d, Features, Refusal, Transfer3d},
};
use vm_memory::VolatileSlice;

pub use self::soft2d::Soft2d;
use crate::{GuestMemory, backing::Backing};

/// Format and size of a picture; both sides are 1 to [`gpu_protocol::frames::MAX_SIZE`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Pixel format.
    pub format: PixelFormat,
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
}

impl Layout {
    /// Bytes from one row to the next, in the resource and in its backing.
    pub fn stride(&self) -> u64 {
        u64::from(self.width) * u64::from(BYTES_PER_PIXEL)
    }

    /// Bytes of the whole resource.
    pub fn bytes(&self) -> u64 {
        self.stride() * u64::from(self.height)
    }
}

/// A capability set: what a guest's 3D driver is told about the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capset {
    /// One of [`gpu_protocol::virtio::capset`].
    pub id: u32,
    /// Newest version.
    pub version: u32,
    /// Bytes.
    pub size: u32,
}

/// An order of work: fences on one retire in the order in which they were made, those on different
/// ones in any.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Timeline {
    /// That of all commands that name no ring.
    Global,
    /// One of a context's rings.
    Ring {
        /// Which context.
        context: u32,
        /// Which of its rings.
        ring: u8,
    },
}

/// Is told of fences that retire, from any thread.
pub trait FenceSink: Send + Sync {
    /// Everything up to this fence of the timeline is done. Only the lowest 32 bits of the number
    /// count on [`Timeline::Global`].
    fn retired(&self, timeline: Timeline, id: u64);
}

/// Moves pixels and draws. A renderer stays on the thread that made it; ids exist and rectangles fit.
/// What only 3D needs is refused unless a renderer says otherwise.
pub trait Renderer {
    /// What draws, for the log.
    fn describe(&self) -> String;

    /// Device features beyond those of a 2D device.
    fn features(&self) -> Features;

    /// Capability sets, in the order of GET_CAPSET_INFO.
    fn capsets(&self) -> &[Capset] {
        &[]
    }

    /// Fills in a set; `target` is zero and has the set's size.
    fn fill_capset(&mut self, _set: u32, _version: u32, _target: &mut [u8]) {}

    /// Makes a black resource under an id that is free.
    fn create_2d(&mut self, id: u32, layout: Layout) -> Result<(), Refusal>;

    /// Makes a 3D resource under an id that is free.
    fn create_3d(&mut self, _id: u32, _create: &Create3d) -> Result<(), Refusal> {
        Err(Refusal::Unspecified)
    }

    /// A resource that is a piece of guest memory and nothing else.
    fn create_blob(
        &mut self,
        _id: u32,
        _size: u64,
        _backing: &Backing,
        _memory: &GuestMemory,
    ) -> Result<(), Refusal> {
        Ok(())
    }

    /// A resource that is memory of the host, of a context that exists.
    fn create_host_blob(&mut self, _id: u32, _context: u32, _blob: &Blob) -> Result<(), Refusal> {
        Err(Refusal::InvalidParameter)
    }

    /// The memory of such a resource as a file whose beginning it is, and how it is cached (the
    /// specification's `map_info`).
    fn export_blob(&mut self, _id: u32) -> Result<(OwnedFd, u32), Refusal> {
        Err(Refusal::InvalidParameter)
    }

    /// Forgets a resource, its backing included.
    fn destroy(&mut self, id: u32);

    /// The resource is backed by this memory from now on.
    fn attach(
        &mut self,
        _id: u32,
        _backing: &Backing,
        _memory: &GuestMemory,
    ) -> Result<(), Refusal> {
        Ok(())
    }

    /// The resource is no longer backed.
    fn detach(&mut self, _id: u32) {}

    /// TRANSFER_TO_HOST_2D: copies `rect` from the backing, where its first pixel is at `offset`
    /// and rows follow each other by [`Layout::stride`].
    fn upload(
        &mut self,
        id: u32,
        rect: Rect,
        offset: u64,
        backing: &Backing,
        memory: &GuestMemory,
    ) -> Result<(), Refusal>;

    /// Writes `rect` as B, G, R, A/X to `target`, whose rows are `stride` bytes apart.
    fn read_pixels(
        &mut self,
        id: u32,
        rect: Rect,
        target: &VolatileSlice<'_>,
        stride: usize,
    ) -> Result<(), Refusal>;

    /// Makes a context under an id that is free; `capset` is the id of one of our sets, or 0.
    fn create_context(&mut self, _context: u32, _capset: u32, _name: &[u8]) -> Result<(), Refusal> {
        Err(Refusal::Unspecified)
    }

    /// Forgets a context.
    fn destroy_context(&mut self, _context: u32) {}

    /// The context may use the resource.
    fn attach_resource(&mut self, _context: u32, _id: u32) {}

    /// The context may no longer use the resource.
    fn detach_resource(&mut self, _context: u32, _id: u32) {}

    /// TRANSFER_TO_HOST_3D; done when this returns. Context 0 is none.
    fn transfer_to_host(
        &mut self,
        _context: u32,
        _id: u32,
        _transfer: &Transfer3d,
    ) -> Result<(), Refusal> {
        Err(Refusal::Unspecified)
    }

    /// TRANSFER_FROM_HOST_3D; done when this returns. Context 0 is none.
    fn transfer_from_host(
        &mut self,
        _context: u32,
        _id: u32,
        _transfer: &Transfer3d,
    ) -> Result<(), Refusal> {
        Err(Refusal::Unspecified)
    }

    /// Executes commands in the context's format; their length is a multiple of 4.
    fn submit(&mut self, _context: u32, _commands: &[u8]) -> Result<(), Refusal> {
        Err(Refusal::Unspecified)
    }

    /// Tells the [`FenceSink`] when all that was submitted to the timeline before is done.
    fn fence(&mut self, _timeline: Timeline, _id: u64) -> Result<(), Refusal> {
        Err(Refusal::Unspecified)
    }

    /// [`Renderer::poll`] has to be called when this is readable.
    fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Does what has become possible.
    fn poll(&mut self) {}
}
