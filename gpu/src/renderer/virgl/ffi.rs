//! `libvirglrenderer` as it is at run time: loaded with `dlopen`, every call behind a safe method.
//!
//! Signatures are those of `virglrenderer.h` 0.10.4, which later versions have kept. The library is
//! one instance per process that must stay on one thread; [`Instance`] is neither `Send` nor made
//! twice. Only the fence callbacks come from a thread of the library's own.
#![allow(unsafe_code)] // a C library

use std::{
    ffi::{CStr, CString, c_char, c_int, c_uint, c_void},
    marker::PhantomData,
    os::fd::{BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd},
    path::Path,
    ptr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
};

use gpu_protocol::virtio::Blob;
use libc::iovec;
use vm_memory::{GuestMemoryBackend, VolatileSlice};

use crate::{
    GuestMemory,
    backing::Backing,
    renderer::{FenceSink, Timeline},
};

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

/// `libvirglrenderer`'s name for the dynamic linker.
pub(super) const SONAME: &CStr = c"libvirglrenderer.so.1";

/// Messages of the library that are logged; a guest can cause any number.
const MAX_MESSAGES: u32 = 100;

/// Why the library cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum VirglError {
    /// The dynamic linker does not find it.
    #[error("{} is not there (Debian package libvirglrenderer1): {reason}", SONAME.to_string_lossy())]
    Missing {
        /// What the dynamic linker says.
        reason: String,
    },
    /// A function is missing.
    #[error(
        "{} has no {symbol}: version 0.10.4 or newer is needed (Debian 12 or newer, package \
         libvirglrenderer1)",
        SONAME.to_string_lossy()
    )]
    TooOld {
        /// Which function.
        symbol: &'static str,
    },
    /// The render node cannot be opened.
    #[error("{}: cannot be opened (is the user in the group `render`?)", path.display())]
    Node {
        /// Which.
        path: std::path::PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The render server does not answer.
    #[error(
        "the render server does not work (Debian packages virgl-server and mesa-vulkan-drivers), or \
         libvirglrenderer was built without Vulkan"
    )]
    Vulkan,
    /// It is in use already.
    #[error("libvirglrenderer can be used once in a process")]
    InUse,
    /// The library's own initialisation failed.
    #[error(
        "virgl_renderer_init failed with {code}: no OpenGL driver works here (Debian packages \
         libegl1 and libgl1-mesa-dri)"
    )]
    Init {
        /// What it returned.
        code: i32,
    },
}

/// What `virgl_renderer_resource_create` takes.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct CreateArgs {
    pub(super) handle: u32,
    pub(super) target: u32,
    pub(super) format: u32,
    pub(super) bind: u32,
    pub(super) width: u32,
    pub(super) height: u32,
    pub(super) depth: u32,
    pub(super) array_size: u32,
    pub(super) last_level: u32,
    pub(super) nr_samples: u32,
    pub(super) flags: u32,
}

#[repr(C)]
struct BlobArgs {
    res_handle: u32,
    ctx_id: u32,
    blob_mem: u32,
    blob_flags: u32,
    blob_id: u64,
    size: u64,
    iovecs: *const iovec,
    num_iovs: u32,
}

/// A part of a resource.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct Part {
    pub(super) x: u32,
    pub(super) y: u32,
    pub(super) z: u32,
    pub(super) width: u32,
    pub(super) height: u32,
    pub(super) depth: u32,
}

/// Where a transfer starts and how its rows follow each other.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub(super) level: u32,
    pub(super) stride: u32,
    pub(super) layer_stride: u32,
    pub(super) offset: u64,
}

#[repr(C)]
struct Callbacks {
    version: c_int,
    write_fence: extern "C" fn(*mut c_void, u32),
    create_gl_context: Option<extern "C" fn()>,
    destroy_gl_context: Option<extern "C" fn()>,
    make_current: Option<extern "C" fn()>,
    get_drm_fd: extern "C" fn(*mut c_void) -> c_int,
    write_context_fence: extern "C" fn(*mut c_void, u32, u32, u64),
    get_server_fd: Option<extern "C" fn(*mut c_void, u32) -> c_int>,
    get_egl_display: Option<extern "C" fn()>,
}

type DebugCallback = extern "C" fn(*const c_char, *mut c_void);

unsafe extern "C" {
    // A `va_list` argument is a pointer on x86-64 and AArch64.
    fn vsnprintf(
        target: *mut c_char,
        size: usize,
        format: *const c_char,
        list: *mut c_void,
    ) -> c_int;
}

macro_rules! functions {
    (required { $($field:ident = $symbol:literal: fn($($argument:ty),*) $(-> $result:ty)?;)* }
     optional { $($optional:ident = $optional_symbol:literal:
        fn($($optional_argument:ty),*) $(-> $optional_result:ty)?;)* }) => {
        struct Functions {
            $($field: unsafe extern "C" fn($($argument),*) $(-> $result)?,)*
            $($optional:
                Option<unsafe extern "C" fn($($optional_argument),*) $(-> $optional_result)?>,)*
        }

        impl Functions {
            fn load(library: &Library) -> Result<Self, VirglError> {
                Ok(Self {
                    $($field: {
                        let found = library.symbol($symbol);
                        let found = found.ok_or(VirglError::TooOld { symbol: $symbol })?;
                        // SAFETY: the symbol has this type, see the head of this file.
                        unsafe {
                            std::mem::transmute::<
                                ptr::NonNull<c_void>,
                                unsafe extern "C" fn($($argument),*) $(-> $result)?,
                            >(found)
                        }
                    },)*
                    $($optional: library.symbol($optional_symbol).map(|found| {
                        // SAFETY: as above.
                        unsafe {
                            std::mem::transmute::<
                                ptr::NonNull<c_void>,
                                unsafe extern "C" fn($($optional_argument),*)
                                    $(-> $optional_result)?,
                            >(found)
                        }
                    }),)*
                })
            }
        }
    };
}

functions! {
required {
    init = "virgl_renderer_init": fn(*mut c_void, c_int, *mut Callbacks) -> c_int;
    cleanup = "virgl_renderer_cleanup": fn(*mut c_void);
    poll = "virgl_renderer_poll": fn();
    get_poll_fd = "virgl_renderer_get_poll_fd": fn() -> c_int;
    get_cap_set = "virgl_renderer_get_cap_set": fn(u32, *mut u32, *mut u32);
    fill_caps = "virgl_renderer_fill_caps": fn(u32, u32, *mut c_void);
    resource_create = "virgl_renderer_resource_create":
        fn(*mut CreateArgs, *mut iovec, u32) -> c_int;
    resource_unref = "virgl_renderer_resource_unref": fn(u32);
    attach_iov = "virgl_renderer_resource_attach_iov": fn(c_int, *mut iovec, c_int) -> c_int;
    detach_iov = "virgl_renderer_resource_detach_iov": fn(c_int, *mut *mut iovec, *mut c_int);
    transfer_read = "virgl_renderer_transfer_read_iov":
        fn(u32, u32, u32, u32, u32, *mut Part, u64, *mut iovec, c_int) -> c_int;
    transfer_write = "virgl_renderer_transfer_write_iov":
        fn(u32, u32, c_int, u32, u32, *mut Part, u64, *mut iovec, c_uint) -> c_int;
    context_create = "virgl_renderer_context_create_with_flags":
        fn(u32, u32, u32, *const c_char) -> c_int;
    context_destroy = "virgl_renderer_context_destroy": fn(u32);
    force_ctx_0 = "virgl_renderer_force_ctx_0": fn();
    attach_resource = "virgl_renderer_ctx_attach_resource": fn(c_int, c_int);
    detach_resource = "virgl_renderer_ctx_detach_resource": fn(c_int, c_int);
    submit = "virgl_renderer_submit_cmd": fn(*mut c_void, c_int, c_int) -> c_int;
    create_fence = "virgl_renderer_create_fence": fn(c_int, u32) -> c_int;
    create_blob = "virgl_renderer_resource_create_blob": fn(*const BlobArgs) -> c_int;
}
optional {
    // "Unstable" in the header of 0.10.
    context_fence = "virgl_renderer_context_create_fence": fn(u32, u32, u32, u64) -> c_int;
    export_blob = "virgl_renderer_resource_export_blob": fn(u32, *mut u32, *mut c_int) -> c_int;
    get_map_info = "virgl_renderer_resource_get_map_info": fn(u32, *mut u32) -> c_int;
    // Absent from builds without messages.
    set_debug_callback = "virgl_set_debug_callback": fn(DebugCallback) -> *mut c_void;
}
}

/// The loaded library; never unloaded, because OpenGL drivers do not bear it.
struct Library(ptr::NonNull<c_void>);

impl Library {
    fn open() -> Result<Self, VirglError> {
        // SAFETY: a valid string. The library's initialisers are trusted like the library.
        let handle = unsafe { libc::dlopen(SONAME.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        ptr::NonNull::new(handle).map(Self).ok_or_else(|| {
            // SAFETY: no preconditions.
            let error = unsafe { libc::dlerror() };
            let reason = match error.is_null() {
                true => "unknown reason".to_owned(),
                // SAFETY: not null: a string that stays until the next call of `dlerror`.
                false => unsafe { CStr::from_ptr(error) }.to_string_lossy().into_owned(),
            };
            VirglError::Missing { reason }
        })
    }

    fn symbol(&self, name: &str) -> Option<ptr::NonNull<c_void>> {
        let name = CString::new(name).ok()?;
        // SAFETY: the library is open and the name is a string.
        ptr::NonNull::new(unsafe { libc::dlsym(self.0.as_ptr(), name.as_ptr()) })
    }
}

/// Whether the library is there and new enough, without starting it.
pub(super) fn probe() -> Result<(), VirglError> {
    Functions::load(&Library::open()?).map(drop)
}

/// What the callbacks get.
struct Cookie {
    sink: Arc<dyn FenceSink>,
    render_node: Mutex<Option<OwnedFd>>,
    render_server: Mutex<Option<OwnedFd>>,
}

extern "C" fn write_fence(cookie: *mut c_void, fence: u32) {
    // SAFETY: the library passes what `init` gave it, which is never freed.
    let cookie = unsafe { &*cookie.cast::<Cookie>() };
    cookie.sink.retired(Timeline::Global, fence.into());
}

extern "C" fn write_context_fence(cookie: *mut c_void, context: u32, ring: u32, fence: u64) {
    // SAFETY: as above.
    let cookie = unsafe { &*cookie.cast::<Cookie>() };
    // Fences are made with rings of one byte only.
    let ring = u8::try_from(ring).unwrap_or(u8::MAX);
    cookie.sink.retired(Timeline::Ring { context, ring }, fence);
}

extern "C" fn get_drm_fd(cookie: *mut c_void) -> RawFd {
    // SAFETY: as above.
    let cookie = unsafe { &*cookie.cast::<Cookie>() };
    let node = cookie.render_node.lock().unwrap_or_else(PoisonError::into_inner).take();
    // The library closes it.
    node.map_or(-1, IntoRawFd::into_raw_fd)
}

extern "C" fn get_server_fd(cookie: *mut c_void, _version: u32) -> RawFd {
    // SAFETY: as above.
    let cookie = unsafe { &*cookie.cast::<Cookie>() };
    let server = cookie.render_server.lock().unwrap_or_else(PoisonError::into_inner).take();
    // The library closes it.
    server.map_or(-1, IntoRawFd::into_raw_fd)
}

/// What the library said last.
static LAST_MESSAGE: Mutex<String> = Mutex::new(String::new());

/// What the library said last, as far as it is listened to.
pub(super) fn last_message() -> String {
    LAST_MESSAGE.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

extern "C" fn message(format: *const c_char, list: *mut c_void) {
    static MESSAGES: AtomicU32 = AtomicU32::new(0);
    let number = MESSAGES.fetch_add(1, Ordering::Relaxed);
    if number >= MAX_MESSAGES {
        // Stay away from the overflow.
        MESSAGES.store(MAX_MESSAGES, Ordering::Relaxed);
        return;
    }
    let mut buffer = [0_u8; 400];
    // SAFETY: format and list fit each other, as the library promises; the buffer has this size.
    let length = unsafe { vsnprintf(buffer.as_mut_ptr().cast(), buffer.len(), format, list) };
    let length = usize::try_from(length).unwrap_or(0).min(buffer.len() - 1);
    let text = String::from_utf8_lossy(&buffer[..length]);
    tracing::debug!("virglrenderer: {}", text.trim_end());
    text.trim_end().clone_into(&mut LAST_MESSAGE.lock().unwrap_or_else(PoisonError::into_inner));
    if number + 1 == MAX_MESSAGES {
        tracing::debug!("virglrenderer: no more messages are logged");
    }
}

/// Guest memory as the library takes it. It stays mapped as long as this exists.
pub(super) struct IoVecs {
    vectors: Box<[iovec]>,
    _memory: GuestMemory,
}

impl IoVecs {
    /// The pieces of `backing`; neighbours become one.
    pub(super) fn new(backing: &Backing, memory: &GuestMemory) -> Option<Self> {
        let mut vectors: Vec<iovec> = Vec::with_capacity(backing.entries().len());
        for entry in backing.entries() {
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
        render_server: Option<OwnedFd>,
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
        if render_server.is_some() {
            flags |= VENUS | RENDER_SERVER;
        }
        let cookie = Box::into_raw(Box::new(Cookie {
            sink,
            render_node: Mutex::new(render_node),
            render_server: Mutex::new(render_server),
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
            return Err(VirglError::Init { code });
        }
        // SAFETY: initialised, on this thread.
        let poll_fd = unsafe { (functions.get_poll_fd)() };
        Ok(Self { functions, cookie, poll_fd, _one_thread: PhantomData })
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
        // SAFETY: initialised; the name ends with a zero.
        let code =
            unsafe { (self.functions.context_create)(context, capset & 0xff, length as u32, name) };
        self.settle_context();
        status(code)
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
