#![allow(
    unsafe_code,
    reason = "rustix does not ask for pending signals, nor knows vmm-sys-util's eventfds"
)]
//! Signals that wait; eventfds to wait for.

use std::{
    mem::MaybeUninit,
    os::fd::{AsRawFd, BorrowedFd},
};

use vmm_sys_util::eventfd::EventFd;

/// An eventfd as the standard library sees descriptors.
pub(super) fn borrow(fd: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as `fd` lives, which is borrowed for as long.
    unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }
}

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
