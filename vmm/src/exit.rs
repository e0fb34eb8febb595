//! How a machine ends, told by whichever thread notices first.

use std::{
    io,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Why the machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExitReason {
    /// The guest switched itself off (ACPI S5).
    PowerOff,
    /// The guest reset itself; there is no restart in the same process. Names the way.
    Reset(&'static str),
    /// The guest's kernel panicked and `--panic-exit-code` says to end then.
    Panicked,
    /// A signal of the host.
    Signal(i32),
    /// `ctl quit`, or the escape sequence of the terminal.
    Quit,
    /// The machine cannot go on.
    Failed(String),
}

/// Collects the first reason and wakes the main loop.
#[derive(Debug)]
pub struct Exit {
    reason: Mutex<Option<ExitReason>>,
    panicked: AtomicBool,
    event: EventFd,
}

impl Exit {
    /// Nothing has happened yet.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            reason: Mutex::new(None),
            panicked: AtomicBool::new(false),
            event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        })
    }

    /// Asks for the end. Later reasons do not replace the first one.
    pub fn request(&self, reason: ExitReason) {
        let mut first = self.reason.lock().unwrap_or_else(PoisonError::into_inner);
        if first.is_none() {
            *first = Some(reason);
            // Cannot fail: the counter is far from its limit.
            let _ = self.event.write(1);
        }
    }

    /// Remembers that the guest's kernel panicked.
    pub fn note_panic(&self) {
        self.panicked.store(true, Ordering::SeqCst);
    }

    /// Whether the guest's kernel panicked.
    pub fn panicked(&self) -> bool {
        self.panicked.load(Ordering::SeqCst)
    }

    /// The reason, once there is one.
    pub fn reason(&self) -> Option<ExitReason> {
        self.reason.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Becomes readable when there is a reason.
    pub fn event(&self) -> &EventFd {
        &self.event
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_wins() {
        let exit = Exit::new().unwrap();
        assert_eq!(exit.reason(), None);
        exit.request(ExitReason::PowerOff);
        exit.request(ExitReason::Quit);
        assert_eq!(exit.reason(), Some(ExitReason::PowerOff));
        assert_eq!(exit.event().read().unwrap(), 1);
    }
}
