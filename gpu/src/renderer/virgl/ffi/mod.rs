//! `libvirglrenderer` as it is at run time: loaded with `dlopen`, every call behind a safe method.
//!
//! The library is one instance per process that must stay on one thread; [`Instance`] is neither `Send`
//! nor made twice.
#![allow(unsafe_code)] // a C library

mod callbacks;
mod library;
mod server;

use std::{
    ffi::c_int,
    marker::PhantomData,
    os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd},
    path::Path,
    ptr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use gpu_protocol::virtio::{Blob, capset};
use libc::iovec;
use vm_memory::{GuestMemoryBackend, VolatileSlice};

pub use self::library::VirglError;
pub(super) use self::{
    callbacks::last_messages,
    library::{CreateArgs, Part, probe},
};
use self::{
    callbacks::{Cookie, get_drm_fd, get_server_fd, message, write_context_fence, write_fence},
    library::{BlobArgs, Callbacks, Functions, Library},
    server::Connection,
};
use crate::{GuestMemory, backing::Backing, render_server::Servers, renderer::FenceSink};

const USE_EGL: c_int = 1 << 0;
const THREAD_SYNC: c_int = 1 << 1;
const USE_SURFACELESS: c_int = 1 << 3;
/// Memory of the host must be a file: the guest's address space belongs to another process.
const USE_EXTERNAL_BLOB: c_int = 1 << 5;
const VENUS: c_int = 1 << 6;
const ASYNC_FENCE_CB: c_int = 1 << 8;
const RENDER_SERVER: c_int = 1 << 9;

/// Kinds of descriptors of blobs.
const FD_DMABUF: u32 = 1;
const FD_SHM: u32 = 3;

/// Merges a fence with the one before it on the same ring where the library can.
const FENCE_FLAG_MERGEABLE: u32 = 1 << 0;

/// The version that knows `write_context_fence` and `get_server_fd`.
const CALLBACKS_VERSION: c_int = 3;

/// Where a transfer starts and how its rows follow each other.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub(super) level: u32,
    pub(super) stride: u32,
    pub(super) layer_stride: u32,
    pub(super) offset: u64,
}

/// Guest memory as the library takes it. It stays mapped as long as this exists.
pub(super) struct IoVecs {
    vectors: Box<[iovec]>,
    _memory: GuestMemory,
}

impl IoVecs {
    /// The pieces of `backing`; neighbours become one.
    pub(super) fn new(backing: &Backing, memory: &GuestMemory) -> Option<Self> {
        let entries = backing.pieces().entries();
        let mut vectors: Vec<iovec> = Vec::with_capacity(entries.len());
        for entry in entries {
            if entry.length == 0 {
                continue;
            }
            let address = vm_memory::GuestAddress(entry.address);
            for slice in memory.get_slices(address, entry.length as usize) {
                let slice = slice.ok()?;
                let base = slice.ptr_guard_mut().as_ptr();
                match vectors.last_mut() {
                    Some(last) if last.iov_base.cast::<u8>().wrapping_add(last.iov_len) == base => {
                        last.iov_len += slice.len();
                    }
                    _ => vectors.push(iovec { iov_base: base.cast(), iov_len: slice.len() }),
                }
            }
        }
        Some(Self { vectors: vectors.into_boxed_slice(), _memory: memory.clone() })
    }
}

/// The running library. Every method may be called with any numbers: the library checks its ids,
/// sizes and offsets, and [`crate::control`] has done so before.
pub(super) struct Instance {
    functions: Functions,
    cookie: *mut Cookie,
    /// Negative where there is none.
    poll_fd: RawFd,
    /// To the render server, for Vulkan.
    server: Option<Connection>,
    _one_thread: PhantomData<*mut ()>,
}

fn status(code: c_int) -> Result<(), c_int> {
    if code == 0 { Ok(()) } else { Err(code) }
}

impl Instance {
    /// Starts the library on this thread, on a render node or without any device.
    pub(super) fn start(
        sink: Arc<dyn FenceSink>,
        render_node: Option<OwnedFd>,
        servers: Option<Servers>,
    ) -> Result<Self, VirglError> {
        static IN_USE: AtomicBool = AtomicBool::new(false);
        let functions = Functions::load(&Library::open()?)?;
        if IN_USE.swap(true, Ordering::AcqRel) {
            return Err(VirglError::InUse);
        }
        if let Some(set) = functions.set_debug_callback {
            // SAFETY: the callback lives as long as the program.
            unsafe { set(message) };
        }
        let mut flags =
            USE_EGL | USE_SURFACELESS | THREAD_SYNC | ASYNC_FENCE_CB | USE_EXTERNAL_BLOB;
        let (mut pending, mut end) = (None, None);
        if let Some(servers) = servers {
            flags |= VENUS | RENDER_SERVER;
            let (connection, its) = Connection::prepare(servers).map_err(VirglError::Server)?;
            (pending, end) = (Some(connection), Some(its));
        }
        let cookie = Box::into_raw(Box::new(Cookie {
            sink,
            render_node: Mutex::new(render_node),
            render_server: Mutex::new(end),
        }));
        let callbacks = Box::into_raw(Box::new(Callbacks {
            version: CALLBACKS_VERSION,
            write_fence,
            create_gl_context: None,
            destroy_gl_context: None,
            make_current: None,
            get_drm_fd,
            write_context_fence,
            get_server_fd: Some(get_server_fd),
            get_egl_display: None,
        }));
        // SAFETY: the library keeps both pointers; they are never freed.
        let code = unsafe { (functions.init)(cookie.cast(), flags, callbacks) };
        if code != 0 {
            // What is half initialised cannot be cleaned up; the library stays in use.
            return Err(match flags & RENDER_SERVER {
                0 => VirglError::Init { code },
                _ => VirglError::Vulkan,
            });
        }
        let server = match pending {
            None => None,
            Some(pending) => Some(pending.open().map_err(|error| match error.kind() {
                // Nothing was said to it.
                std::io::ErrorKind::WouldBlock => VirglError::Vulkan,
                _ => VirglError::Server(error),
            })?),
        };
        // SAFETY: initialised, on this thread.
        let poll_fd = unsafe { (functions.get_poll_fd)() };
        Ok(Self { functions, cookie, poll_fd, server, _one_thread: PhantomData })
    }

    pub(super) fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        // SAFETY: the library keeps its descriptor open until it is cleaned up.
        (self.poll_fd >= 0).then(|| unsafe { BorrowedFd::borrow_raw(self.poll_fd) })
    }

    pub(super) fn poll(&mut self) {
        // SAFETY: initialised, on the thread that did it (this type does not leave it).
        unsafe { (self.functions.poll)() }
    }

    /// Newest version and size of a capability set; 0 bytes if there is none.
    pub(super) fn capset(&self, set: u32) -> (u32, u32) {
        let (mut version, mut size) = (0, 0);
        // SAFETY: initialised; two numbers to write to.
        unsafe { (self.functions.get_cap_set)(set, &raw mut version, &raw mut size) };
        (version, size)
    }

    /// Fills in a set if `target` is as big as it.
    pub(super) fn fill_caps(&self, set: u32, version: u32, target: &mut [u8]) {
        let (newest, size) = self.capset(set);
        if version <= newest && size > 0 && target.len() >= size as usize {
            // SAFETY: initialised; the set exists and the target has room for its newest version.
            unsafe { (self.functions.fill_caps)(set, version, target.as_mut_ptr().cast()) }
        }
    }

    pub(super) fn create(&mut self, mut args: CreateArgs) -> Result<(), c_int> {
        self.settle_context();
        // SAFETY: initialised; there is no backing yet.
        status(unsafe { (self.functions.resource_create)(&raw mut args, ptr::null_mut(), 0) })
    }

    /// A resource that is guest memory. `memory` must be kept until [`Self::unref`].
    pub(super) fn create_blob(&mut self, id: u32, size: u64, memory: &IoVecs) -> Result<(), c_int> {
        let args = BlobArgs {
            res_handle: id,
            ctx_id: 0,
            blob_mem: gpu_protocol::virtio::blob_mem::GUEST,
            blob_flags: 0,
            blob_id: 0,
            size,
            iovecs: memory.vectors.as_ptr(),
            num_iovs: memory.vectors.len() as u32,
        };
        // SAFETY: initialised; the vectors name memory that stays mapped while `memory` is kept.
        status(unsafe { (self.functions.create_blob)(&raw const args) })
    }

    /// A resource that is memory of the host.
    pub(super) fn create_host_blob(
        &mut self,
        id: u32,
        context: u32,
        blob: &Blob,
    ) -> Result<(), c_int> {
        let args = BlobArgs {
            res_handle: id,
            ctx_id: context,
            blob_mem: blob.memory,
            blob_flags: blob.flags,
            blob_id: blob.id,
            size: blob.size,
            iovecs: ptr::null(),
            num_iovs: 0,
        };
        // SAFETY: initialised; unknown contexts and objects are refused.
        status(unsafe { (self.functions.create_blob)(&raw const args) })
    }

    /// The memory of a blob as a file that can be mapped, and how it is cached.
    pub(super) fn export_blob(&mut self, id: u32) -> Result<(OwnedFd, u32), c_int> {
        let (Some(export), Some(get_map_info)) =
            (self.functions.export_blob, self.functions.get_map_info)
        else {
            return Err(libc::ENOSYS);
        };
        let mut info = 0;
        // SAFETY: initialised; a number to write to; unknown resources are refused.
        status(unsafe { get_map_info(id, &raw mut info) })?;
        let (mut kind, mut fd) = (0, -1);
        // SAFETY: initialised; two numbers to write to; unknown resources are refused.
        status(unsafe { export(id, &raw mut kind, &raw mut fd) })?;
        if fd < 0 {
            return Err(libc::EINVAL);
        }
        // SAFETY: the library gives a descriptor of its own away.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // What a Vulkan driver calls opaque has its contents somewhere inside.
        match kind {
            FD_DMABUF | FD_SHM => Ok((fd, info)),
            _ => Err(libc::EOPNOTSUPP),
        }
    }

    pub(super) fn unref(&mut self, id: u32) {
        // SAFETY: initialised; unknown ids are ignored.
        unsafe { (self.functions.resource_unref)(id) }
    }

    /// The resource is backed by `memory`, which must be kept until [`Self::detach`].
    pub(super) fn attach(&mut self, id: u32, memory: &mut IoVecs) -> Result<(), c_int> {
        let count = memory.vectors.len() as c_int;
        // SAFETY: initialised; the vectors name memory that stays mapped while `memory` is kept.
        let code =
            unsafe { (self.functions.attach_iov)(id as c_int, memory.vectors.as_mut_ptr(), count) };
        status(code)
    }

    pub(super) fn detach(&mut self, id: u32) {
        let mut vectors = ptr::null_mut();
        let mut count = 0;
        // SAFETY: initialised; what is returned is ours already.
        unsafe { (self.functions.detach_iov)(id as c_int, &raw mut vectors, &raw mut count) }
    }

    /// Copies from the resource's backing to the resource.
    pub(super) fn write(
        &mut self,
        id: u32,
        context: u32,
        mut part: Part,
        place: Place,
    ) -> Result<(), c_int> {
        let Place { level, stride, layer_stride, offset } = place;
        // SAFETY: initialised; the library checks part and place against resource and backing.
        let code = unsafe {
            (self.functions.transfer_write)(
                id,
                context,
                level as c_int,
                stride,
                layer_stride,
                &raw mut part,
                offset,
                ptr::null_mut(),
                0,
            )
        };
        status(code)
    }

    /// Copies from the resource to its backing.
    pub(super) fn read(
        &mut self,
        id: u32,
        context: u32,
        mut part: Part,
        place: Place,
    ) -> Result<(), c_int> {
        let Place { level, stride, layer_stride, offset } = place;
        // SAFETY: as for `write`.
        let code = unsafe {
            (self.functions.transfer_read)(
                id,
                context,
                level,
                stride,
                layer_stride,
                &raw mut part,
                offset,
                ptr::null_mut(),
                0,
            )
        };
        status(code)
    }

    /// Copies a part of a 2D picture with four bytes a pixel to `target`, rows `stride` bytes apart.
    pub(super) fn read_to(
        &mut self,
        id: u32,
        mut part: Part,
        target: &VolatileSlice<'_>,
        stride: u32,
    ) -> Result<(), c_int> {
        let rows = u64::from(part.height);
        let needed = match rows {
            0 => 0,
            _ => (rows - 1) * u64::from(stride) + u64::from(part.width) * 4,
        };
        if part.depth != 1 || needed > target.len() as u64 || part.width > stride / 4 {
            return Err(libc::EINVAL);
        }
        let guard = target.ptr_guard_mut();
        let mut vector = iovec { iov_base: guard.as_ptr().cast(), iov_len: target.len() };
        // SAFETY: initialised; the vector is memory that lives during the call, and the library
        // writes to nothing outside it.
        let code = unsafe {
            (self.functions.transfer_read)(
                id,
                0,
                0,
                stride,
                0,
                &raw mut part,
                0,
                &raw mut vector,
                1,
            )
        };
        status(code)
    }

    pub(super) fn create_context(
        &mut self,
        context: u32,
        capset: u32,
        name: &[u8],
    ) -> Result<(), c_int> {
        // The library copies 64 bytes or up to a zero, whatever length it is given.
        let mut buffer = [0_u8; 65];
        let length = name.len().min(64);
        buffer[..length].copy_from_slice(&name[..length]);
        let name = buffer.as_ptr().cast();
        // Once more where the server had died, or died of it.
        for _ in 0..2 {
            if capset == capset::VENUS
                && let Some(server) = &mut self.server
            {
                server.ensure();
            }
            // SAFETY: initialised; the name ends with a zero.
            let code = unsafe {
                (self.functions.context_create)(context, capset & 0xff, length as u32, name)
            };
            self.settle_context();
            let lost = self.server.as_ref().is_some_and(Connection::is_lost);
            if code == 0 || capset != capset::VENUS || !lost {
                return status(code);
            }
        }
        Err(libc::EIO)
    }

    pub(super) fn destroy_context(&mut self, context: u32) {
        // SAFETY: initialised; unknown ids are ignored.
        unsafe { (self.functions.context_destroy)(context) }
        self.settle_context();
    }

    /// Makes the library's own OpenGL context the current one. While it makes or destroys a context
    /// another one is current than it believes, and it would execute the next commands of a third one
    /// there; that ends in an error from which no context recovers. What goes wrong in between, such as
    /// a resource too big for the driver, would be taken for an error of whoever drew last.
    fn settle_context(&mut self) {
        // SAFETY: initialised, on its thread.
        unsafe { (self.functions.force_ctx_0)() }
    }

    pub(super) fn attach_resource(&mut self, context: u32, id: u32) {
        // SAFETY: initialised; unknown ids are ignored.
        unsafe { (self.functions.attach_resource)(context as c_int, id as c_int) }
    }

    pub(super) fn detach_resource(&mut self, context: u32, id: u32) {
        // SAFETY: initialised; unknown ids are ignored.
        unsafe { (self.functions.detach_resource)(context as c_int, id as c_int) }
    }

    /// Executes commands.
    pub(super) fn submit(
        &mut self,
        context: u32,
        commands: &mut [u64],
        words: usize,
    ) -> Result<(), c_int> {
        if words > commands.len() * 2 {
            return Err(libc::EINVAL);
        }
        let buffer = commands.as_mut_ptr().cast();
        // SAFETY: initialised; a private, aligned buffer of at least this many 32-bit words.
        status(unsafe { (self.functions.submit)(buffer, context as c_int, words as c_int) })
    }

    /// Makes a fence behind everything submitted so far; a number is never 0.
    pub(super) fn fence(&mut self, id: u32) -> Result<(), c_int> {
        // SAFETY: initialised.
        status(unsafe { (self.functions.create_fence)(id as c_int, 0) })
    }

    /// Makes a fence on a context's ring.
    pub(super) fn context_fence(&mut self, context: u32, ring: u8, id: u64) -> Result<(), c_int> {
        let Some(create) = self.functions.context_fence else { return Err(libc::ENOSYS) };
        // SAFETY: initialised; unknown contexts and rings are refused.
        status(unsafe { create(context, FENCE_FLAG_MERGEABLE, ring.into(), id) })
    }

    /// Whether [`Self::context_fence`] can work.
    pub(super) fn has_context_fences(&self) -> bool {
        self.functions.context_fence.is_some()
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        // SAFETY: initialised, on its thread. The callbacks' memory stays.
        unsafe { (self.functions.cleanup)(self.cookie.cast()) }
    }
}

/// Opens a render node for [`Instance::start`].
pub(super) fn open_node(path: &Path) -> Result<OwnedFd, VirglError> {
    let opened = std::fs::File::options().read(true).write(true).open(path);
    opened
        .map(OwnedFd::from)
        .map_err(|source| VirglError::Node { path: path.to_path_buf(), source })
}
