#![allow(unsafe_code, reason = "a signal handler; each block states why it is sound")]
//! The message of a caught system call.
//!
//! The handler runs in the offending thread, at any point of its work: it allocates nothing, takes
//! no lock and makes two system calls that every table allows.

use std::{
    ffi::{c_int, c_long, c_void},
    sync::Once,
};

use super::names;

/// Longest message; a line of this length reaches a pipe in one piece.
const LENGTH: usize = 512;

/// `si_call_addr`, `si_syscall` and `si_arch` of `siginfo_t` (sigaction(2)), which `libc` lacks.
#[repr(C)]
struct SigSys {
    si_signo: c_int,
    si_errno: c_int,
    si_code: c_int,
    _padding: c_int,
    si_call_addr: *mut c_void,
    si_syscall: c_int,
    si_arch: u32,
}

/// `si_code` of a SIGSYS that a filter raised.
const SYS_SECCOMP: c_int = 1;

/// Installs the handler of SIGSYS for the whole process.
pub(super) fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(set_handler);
}

fn set_handler() {
    // SAFETY: all zeroes is a valid `sigaction`.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = caught as *const () as usize;
    // Back to the default at once: the second violation ends the process.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_RESETHAND | libc::SA_NODEFER;
    // SAFETY: the handler has the signature that SA_SIGINFO asks for and lives for ever.
    let result = unsafe { libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) };
    if result != 0 {
        tracing::debug!("no handler for SIGSYS");
    }
}

extern "C" fn caught(_: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes a valid siginfo_t, and the layout above is a prefix of it.
    let info = unsafe { &*info.cast::<SigSys>() };
    let number = if info.si_code == SYS_SECCOMP { i64::from(info.si_syscall) } else { -1 };
    let mut line = Line { bytes: [0; LENGTH], used: 0 };
    let mut name = [0_u8; 16];
    // SAFETY: PR_GET_NAME writes 16 bytes at most.
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    line.text("sandbox: thread '");
    let length = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    line.bytes_of(&name[..length]);
    line.text("' made system call ");
    line.number(number.unsigned_abs());
    line.text(" (");
    line.text(names::name(number));
    line.text("), which its table does not allow; arguments");
    // SAFETY: with SA_SIGINFO the third argument is the interrupted context.
    let context = unsafe { &*context.cast::<libc::ucontext_t>() };
    let registers =
        [libc::REG_RDI, libc::REG_RSI, libc::REG_RDX, libc::REG_R10, libc::REG_R8, libc::REG_R9];
    let arguments = registers.map(|register| context.uc_mcontext.gregs[register as usize]);
    for value in &arguments[..4] {
        line.text(" 0x");
        line.hexadecimal(value.cast_unsigned());
    }
    line.text(". The process ends. See docs/sandbox.md; --sandbox off does without.\n");
    // SAFETY: writes initialised bytes of a live buffer.
    unsafe { libc::write(libc::STDERR_FILENO, line.bytes.as_ptr().cast(), line.used) };
    // Once more, now with the default action.
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: the filter refuses this very call, so that it is not carried out.
    unsafe { libc::syscall(number as c_long, a, b, c, d, e, f) };
    // Not reached, unless the signal was sent by somebody.
    // SAFETY: ends the process without running anything of ours.
    unsafe { libc::_exit(128 + libc::SIGSYS) };
}

struct Line {
    bytes: [u8; LENGTH],
    used: usize,
}

impl Line {
    fn bytes_of(&mut self, bytes: &[u8]) {
        for (to, from) in self.bytes.iter_mut().skip(self.used).zip(bytes) {
            *to = *from;
            self.used += 1;
        }
    }

    fn text(&mut self, text: &str) {
        self.bytes_of(text.as_bytes());
    }

    fn digits(&mut self, mut value: u64, base: u64) {
        let mut digits = [0; 20];
        let mut at = digits.len();
        while at > 0 {
            at -= 1;
            digits[at] = b"0123456789abcdef"[(value % base) as usize];
            value /= base;
            if value == 0 {
                break;
            }
        }
        self.bytes_of(&digits[at..]);
    }

    fn number(&mut self, value: u64) {
        self.digits(value, 10);
    }

    fn hexadecimal(&mut self, value: u64) {
        self.digits(value, 16);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_without_allocating() {
        let mut line = Line { bytes: [0; LENGTH], used: 0 };
        for value in [0, 9, 257, u64::MAX] {
            line.number(value);
            line.text(" ");
            line.hexadecimal(value);
            line.text(",");
        }
        let text = String::from_utf8_lossy(&line.bytes[..line.used]);
        assert_eq!(text, "0 0,9 9,257 101,18446744073709551615 ffffffffffffffff,");
        line.bytes_of(&[b'x'; 2 * LENGTH]);
        assert_eq!(line.used, LENGTH);
    }
}
