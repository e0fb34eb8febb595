//! Libraries of video encoders as they are at run time: loaded with `dlopen`, every call behind a
//! safe method.
#![allow(unsafe_code, reason = "the C interfaces of libvpx and OpenH264 are called through dlopen")]

use std::{
    ffi::{CStr, CString, c_void},
    ptr::NonNull,
};

use super::{
    VideoError,
    convert::{self, Factors, TwoRows},
};

/// Functions of a library: fields with their names there and their types.
macro_rules! functions {
    ($table:ident: $($field:ident = $name:literal: $type:ty;)*) => {
        #[derive(Clone, Copy)]
        struct $table {
            $($field: $type,)*
        }

        impl $table {
            fn load(library: &Library) -> Result<Self, VideoError> {
                Ok(Self {
                    $($field: {
                        let symbol = library.symbol($name)?;
                        // SAFETY: the function has this name and this type in the library's headers
                        // of all known versions.
                        unsafe { std::mem::transmute::<NonNull<c_void>, $type>(symbol) }
                    },)*
                })
            }
        }
    };
}

pub(super) mod openh264;
pub(super) mod vpx;

/// Libraries are sure of pictures up to the size that an encoder was made for.
fn check_size(size: (u32, u32), largest: (u32, u32)) -> Result<(), VideoError> {
    let fits = (1..=largest.0).contains(&size.0) && (1..=largest.1).contains(&size.1);
    if fits { Ok(()) } else { Err(VideoError::Size) }
}

/// The conversion of two rows of pixels that suits this processor.
pub(super) fn two_rows() -> fn(&Factors, TwoRows<'_>) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        #[target_feature(enable = "avx2")]
        fn with_avx2(factors: &Factors, rows: TwoRows<'_>) {
            convert::two_rows(factors, rows);
        }
        // SAFETY: the processor knows the instructions.
        return |factors, rows| unsafe { with_avx2(factors, rows) };
    }
    convert::two_rows
}

/// A loaded library; never unloaded.
struct Library(NonNull<c_void>);

// SAFETY: the handle is only used for `dlsym`, which any thread may call.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

impl Library {
    fn open(name: &CStr) -> Result<Self, VideoError> {
        // SAFETY: a valid string. The library's initialisers are trusted like the library.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        NonNull::new(handle).map(Self).ok_or_else(|| {
            // SAFETY: no preconditions.
            let error = unsafe { libc::dlerror() };
            let reason = match error.is_null() {
                true => "unknown reason".to_owned(),
                // SAFETY: not null: a string that stays until the next call of `dlerror`.
                false => unsafe { CStr::from_ptr(error) }.to_string_lossy().into_owned(),
            };
            VideoError::Missing { reason }
        })
    }

    /// The first of these names, with what is known of it, that is there and that `check` takes.
    fn newest<K, T>(
        versions: &[(&CStr, K)],
        check: impl Fn(Self, &K) -> Result<T, VideoError>,
    ) -> Result<T, VideoError> {
        let mut error = None;
        for (name, known) in versions {
            match Self::open(name).and_then(|library| check(library, known)) {
                Ok(found) => return Ok(found),
                // One that is there and does not fit says more than one that is missing.
                Err(new) if error.is_none() || !matches!(new, VideoError::Missing { .. }) => {
                    error = Some(new);
                }
                Err(_) => {}
            }
        }
        Err(error.unwrap_or(VideoError::Version))
    }

    fn symbol(&self, name: &'static str) -> Result<NonNull<c_void>, VideoError> {
        let text = CString::new(name).ok();
        let found = text.and_then(|text| {
            // SAFETY: the library is open and the name is a string.
            NonNull::new(unsafe { libc::dlsym(self.0.as_ptr(), text.as_ptr()) })
        });
        found.ok_or(VideoError::Symbol { name })
    }
}
