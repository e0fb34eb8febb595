//! The library as a file: loaded, its functions found, its structures.
//!
//! Signatures are those of `virglrenderer.h` 0.10.4, which later versions have kept.

use std::{
    ffi::{CStr, CString, c_char, c_int, c_uint, c_void},
    ptr,
};

use libc::iovec;

/// `libvirglrenderer`'s name for the dynamic linker.
const SONAME: &CStr = c"libvirglrenderer.so.1";

/// One of these must be there: where libepoxy, which it is linked with, finds neither when it is used, it
/// ends the process. Debian's packages do not depend on them.
const OPENGL: [&CStr; 2] = [c"libOpenGL.so.0", c"libGL.so.1"];

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
    /// Nothing has OpenGL's functions.
    #[error("neither libOpenGL.so.0 nor libGL.so.1 is there (Debian package libopengl0): {reason}")]
    NoOpenGl {
        /// What the dynamic linker says.
        reason: String,
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
        "no Vulkan: the render server does not work (what it said is above; Debian packages \
         virgl-server and mesa-vulkan-drivers), libvirglrenderer was built without it, or OpenGL \
         does not work either"
    )]
    Vulkan,
    /// No render server can be started.
    #[error("no Vulkan: the render server does not start")]
    Server(#[source] std::io::Error),
    /// It is in use already.
    #[error("libvirglrenderer can be used once in a process")]
    InUse,
    /// The library's own initialisation failed.
    #[error(
        "virgl_renderer_init failed with {code}: no OpenGL driver works here (Debian packages \
         libegl1, libopengl0 and libgl1-mesa-dri)"
    )]
    Init {
        /// What it returned.
        code: i32,
    },
}

/// What `virgl_renderer_resource_create` takes.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(in super::super) struct CreateArgs {
    pub(in super::super) handle: u32,
    pub(in super::super) target: u32,
    pub(in super::super) format: u32,
    pub(in super::super) bind: u32,
    pub(in super::super) width: u32,
    pub(in super::super) height: u32,
    pub(in super::super) depth: u32,
    pub(in super::super) array_size: u32,
    pub(in super::super) last_level: u32,
    pub(in super::super) nr_samples: u32,
    pub(in super::super) flags: u32,
}

#[repr(C)]
pub(super) struct BlobArgs {
    pub(super) res_handle: u32,
    pub(super) ctx_id: u32,
    pub(super) blob_mem: u32,
    pub(super) blob_flags: u32,
    pub(super) blob_id: u64,
    pub(super) size: u64,
    pub(super) iovecs: *const iovec,
    pub(super) num_iovs: u32,
}

/// A part of a resource.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct Part {
    pub(in super::super) x: u32,
    pub(in super::super) y: u32,
    pub(in super::super) z: u32,
    pub(in super::super) width: u32,
    pub(in super::super) height: u32,
    pub(in super::super) depth: u32,
}

#[repr(C)]
pub(super) struct Callbacks {
    pub(super) version: c_int,
    pub(super) write_fence: extern "C" fn(*mut c_void, u32),
    pub(super) create_gl_context: Option<extern "C" fn()>,
    pub(super) destroy_gl_context: Option<extern "C" fn()>,
    pub(super) make_current: Option<extern "C" fn()>,
    pub(super) get_drm_fd: extern "C" fn(*mut c_void) -> c_int,
    pub(super) write_context_fence: extern "C" fn(*mut c_void, u32, u32, u64),
    pub(super) get_server_fd: Option<extern "C" fn(*mut c_void, u32) -> c_int>,
    pub(super) get_egl_display: Option<extern "C" fn()>,
}

pub(super) type DebugCallback = extern "C" fn(*const c_char, *mut c_void);

macro_rules! functions {
    (required { $($field:ident = $symbol:literal: fn($($argument:ty),*) $(-> $result:ty)?;)* }
     optional { $($optional:ident = $optional_symbol:literal:
        fn($($optional_argument:ty),*) $(-> $optional_result:ty)?;)* }) => {
        pub(super) struct Functions {
            $(pub(super) $field: unsafe extern "C" fn($($argument),*) $(-> $result)?,)*
            $(pub(super) $optional:
                Option<unsafe extern "C" fn($($optional_argument),*) $(-> $optional_result)?>,)*
        }

        impl Functions {
            pub(super) fn load(library: &Library) -> Result<Self, VirglError> {
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
pub(super) struct Library(ptr::NonNull<c_void>);

impl Library {
    pub(super) fn open() -> Result<Self, VirglError> {
        let handle = load(SONAME).map_err(|reason| VirglError::Missing { reason })?;
        load(OPENGL[0])
            .or_else(|_| load(OPENGL[1]))
            .map_err(|reason| VirglError::NoOpenGl { reason })?;
        Ok(Self(handle))
    }

    fn symbol(&self, name: &str) -> Option<ptr::NonNull<c_void>> {
        let name = CString::new(name).ok()?;
        // SAFETY: the library is open and the name is a string.
        ptr::NonNull::new(unsafe { libc::dlsym(self.0.as_ptr(), name.as_ptr()) })
    }
}

/// Opens a library for good.
fn load(name: &CStr) -> Result<ptr::NonNull<c_void>, String> {
    // SAFETY: a valid string. The library's initialisers are trusted like the library.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    ptr::NonNull::new(handle).ok_or_else(|| {
        // SAFETY: no preconditions.
        let error = unsafe { libc::dlerror() };
        match error.is_null() {
            true => "unknown reason".to_owned(),
            // SAFETY: not null: a string that stays until the next call of `dlerror`.
            false => unsafe { CStr::from_ptr(error) }.to_string_lossy().into_owned(),
        }
    })
}

/// Whether the library is there and new enough, without starting it.
pub(in super::super) fn probe() -> Result<(), VirglError> {
    Functions::load(&Library::open()?).map(drop)
}
