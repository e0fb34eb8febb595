//! What the library calls: fences that are done, descriptors it needs, messages. Only fences come from
//! a thread of its own.

use std::{
    collections::VecDeque,
    ffi::{c_char, c_int, c_void},
    os::fd::{IntoRawFd, OwnedFd, RawFd},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
};

use crate::renderer::{FenceSink, Timeline};

/// Messages of the library that are logged; a guest can cause any number.
const MAX_MESSAGES: u32 = 100;

/// Messages that are kept for the next refusal.
const KEPT: usize = 4;

unsafe extern "C" {
    // A `va_list` argument is a pointer on x86-64 and AArch64.
    fn vsnprintf(
        target: *mut c_char,
        size: usize,
        format: *const c_char,
        list: *mut c_void,
    ) -> c_int;
}

/// What the callbacks get.
pub(super) struct Cookie {
    pub(super) sink: Arc<dyn FenceSink>,
    pub(super) render_node: Mutex<Option<OwnedFd>>,
    pub(super) render_server: Mutex<Option<OwnedFd>>,
}

pub(super) extern "C" fn write_fence(cookie: *mut c_void, fence: u32) {
    // SAFETY: the library passes what `init` gave it, which is never freed.
    let cookie = unsafe { &*cookie.cast::<Cookie>() };
    cookie.sink.retired(Timeline::Global, fence.into());
}

pub(super) extern "C" fn write_context_fence(
    cookie: *mut c_void,
    context: u32,
    ring: u32,
    fence: u64,
) {
    // SAFETY: as above.
    let cookie = unsafe { &*cookie.cast::<Cookie>() };
    // Fences are made with rings of one byte only.
    let ring = u8::try_from(ring).unwrap_or(u8::MAX);
    cookie.sink.retired(Timeline::Ring { context, ring }, fence);
}

pub(super) extern "C" fn get_drm_fd(cookie: *mut c_void) -> RawFd {
    // SAFETY: as above.
    let cookie = unsafe { &*cookie.cast::<Cookie>() };
    let node = cookie.render_node.lock().unwrap_or_else(PoisonError::into_inner).take();
    // The library closes it.
    node.map_or(-1, IntoRawFd::into_raw_fd)
}

pub(super) extern "C" fn get_server_fd(cookie: *mut c_void, _version: u32) -> RawFd {
    // SAFETY: as above.
    let cookie = unsafe { &*cookie.cast::<Cookie>() };
    let server = cookie.render_server.lock().unwrap_or_else(PoisonError::into_inner).take();
    // The library closes it.
    server.map_or(-1, IntoRawFd::into_raw_fd)
}

/// What the library said last.
static LAST_MESSAGES: Mutex<VecDeque<String>> = Mutex::new(VecDeque::new());

/// What the library said since the last call, the end of it.
pub(in super::super) fn last_messages() -> String {
    let mut kept = LAST_MESSAGES.lock().unwrap_or_else(PoisonError::into_inner);
    std::mem::take(&mut *kept).into_iter().collect::<Vec<_>>().join("; ")
}

/// Takes one of its messages.
pub(super) extern "C" fn message(format: *const c_char, list: *mut c_void) {
    static MESSAGES: AtomicU32 = AtomicU32::new(0);
    let mut buffer = [0_u8; 400];
    // SAFETY: format and list fit each other, as the library promises; the buffer has this size.
    let length = unsafe { vsnprintf(buffer.as_mut_ptr().cast(), buffer.len(), format, list) };
    let length = usize::try_from(length).unwrap_or(0).min(buffer.len() - 1);
    let text = String::from_utf8_lossy(&buffer[..length]).trim_end().to_owned();
    let number = MESSAGES.fetch_add(1, Ordering::Relaxed);
    if number < MAX_MESSAGES {
        tracing::debug!("virglrenderer: {text}");
    } else {
        // Stay away from the overflow.
        MESSAGES.store(MAX_MESSAGES, Ordering::Relaxed);
    }
    if number + 1 == MAX_MESSAGES {
        tracing::debug!("virglrenderer: no more messages are logged");
    }
    let mut kept = LAST_MESSAGES.lock().unwrap_or_else(PoisonError::into_inner);
    if kept.len() == KEPT {
        kept.pop_front();
    }
    kept.push_back(text);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_what_was_said_is_kept() {
        LAST_MESSAGES.lock().unwrap().extend(["a", "b"].map(String::from));
        assert_eq!(last_messages(), "a; b");
        assert_eq!(last_messages(), "");
    }
}
