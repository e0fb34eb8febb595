#![allow(unsafe_code, reason = "rustix does not ask for pending signals")]
//! Signals that wait.

use std::mem::MaybeUninit;

/// Whether one of the signals that end this program was sent and waits, being blocked, for somebody
/// to fetch it.
pub(super) fn told_to_end() -> bool {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: the pointer is to room for a signal set.
    if unsafe { libc::sigpending(set.as_mut_ptr()) } != 0 {
        return false;
    }
    [libc::SIGTERM, libc::SIGINT, libc::SIGHUP].into_iter().any(|signal| {
        // SAFETY: sigpending has filled the set, and the signals exist.
        unsafe { libc::sigismember(set.as_ptr(), signal) == 1 }
    })
}
