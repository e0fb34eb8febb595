//! The few system calls without a safe wrapper in the libraries used.
#![allow(unsafe_code, reason = "raw system calls; each block states why it is sound")]

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
};

use devices::GuestMemory;
use kvm_bindings::{kvm_run, kvm_userspace_memory_region};
use kvm_ioctls::{VcpuFd, VmFd};
use rustix::pipe::PipeFlags;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use crate::kvm::services::Content;

/// Lets the kernel back guest memory with huge pages where it is allowed to; saves page faults
/// during boot. Refusal is of no consequence.
pub fn advise_huge_pages(memory: &GuestMemory) {
    for region in memory.iter() {
        let Ok(address) = region.get_host_address(MemoryRegionAddress(0)) else { continue };
        // SAFETY: the range is one mapping that lives as long as `memory`; this advice changes
        // neither its content nor its extent.
        let result =
            unsafe { libc::madvise(address.cast(), region.len() as usize, libc::MADV_HUGEPAGE) };
        if result != 0 {
            tracing::debug!(error = %io::Error::last_os_error(), "no huge page advice");
        }
    }
}

/// Makes the kernel provide the first `limit` bytes of guest memory now.
pub fn populate(memory: &GuestMemory, limit: u64) {
    const STEP: u64 = 2 << 20;
    let Some(region) = memory.iter().next() else { return };
    let end = region.len().min(limit);
    for offset in (0..end).step_by(STEP as usize) {
        let Ok(address) = region.get_host_address(MemoryRegionAddress(offset)) else { return };
        let length = STEP.min(end - offset) as usize;
        // SAFETY: the range is mapped as long as `memory` lives; populating pages does not change
        // what is in them.
        let result = unsafe { libc::madvise(address.cast(), length, libc::MADV_POPULATE_WRITE) };
        if result != 0 {
            tracing::debug!(error = %io::Error::last_os_error(), "memory is not populated");
            return;
        }
    }
}

/// Runs `child` in a process that has user and mount namespaces of its own but shares this one's
/// descriptors, and returns the descriptor which it made.
///
/// `child` must do nothing but system calls: in a copy of a process with several threads a lock, such
/// as the allocator's, may be held by a thread that is not there.
pub fn in_namespaces_of_its_own(
    child: impl FnOnce() -> rustix::io::Result<RawFd>,
) -> io::Result<OwnedFd> {
    let (from_child, to_parent) =
        rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    let flags = libc::CLONE_FILES | libc::CLONE_NEWUSER | libc::CLONE_NEWNS | libc::SIGCHLD;
    // SAFETY: without CLONE_VM this is a fork: the child runs on a copy of this stack, does nothing
    // but what `child` may do, and ends without returning from here.
    let pid = unsafe { libc::syscall(libc::SYS_clone, libc::c_long::from(flags), 0, 0, 0, 0) };
    if pid == 0 {
        let answer = match child() {
            Ok(fd) => fd,
            Err(errno) => -errno.raw_os_error(),
        };
        let status = rustix::io::write(&to_parent, &answer.to_ne_bytes()).map_or(1, |_| 0);
        // SAFETY: ends the child without running anything of the parent's.
        unsafe { libc::_exit(status) };
    }
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut status = 0;
    // SAFETY: waits for the process just made; `status` is writable.
    while unsafe { libc::waitpid(pid as libc::pid_t, &raw mut status, 0) } < 0 {
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    let mut answer = [0; 4];
    rustix::io::read(&from_child, &mut answer)?;
    match i32::from_ne_bytes(answer) {
        errno if errno < 0 => Err(io::Error::from_raw_os_error(-errno)),
        // SAFETY: the child opened this descriptor in the table shared with it, for us alone.
        fd => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
    }
}

/// Tells KVM where each piece of guest memory is.
pub fn map_guest_memory(vm: &VmFd, memory: &GuestMemory) -> io::Result<()> {
    for (slot, region) in memory.iter().enumerate() {
        let address = region
            .get_host_address(MemoryRegionAddress(0))
            .map_err(|error| io::Error::other(error.to_string()))?;
        let slot = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: 0,
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: address as u64,
        };
        // SAFETY: the range is mapped and, because the machine keeps a clone of `memory` until
        // after the VM is gone, stays so; guest memory is only ever accessed as volatile.
        unsafe { vm.set_user_memory_region(slot) }?;
    }
    Ok(())
}

/// Tells KVM where the guest sees a window for memory of the host; `None`: nowhere. The window must be
/// kept until then.
pub(crate) fn set_window(
    vm: &VmFd,
    slot: u32,
    window: &Content,
    address: Option<u64>,
) -> io::Result<()> {
    let slot = kvm_userspace_memory_region {
        slot,
        flags: 0,
        guest_phys_addr: address.unwrap_or_default(),
        memory_size: if address.is_some() { window.size() } else { 0 },
        userspace_addr: window.host_address(),
    };
    // SAFETY: the range stays mapped as long as `window` lives, which is as long as the slot by the
    // contract above; nothing in this process refers to what is in it.
    unsafe { vm.set_user_memory_region(slot) }?;
    Ok(())
}

/// Looks at the width of port accesses of a vCPU, which `VcpuExit` does not tell.
#[derive(Debug)]
pub struct PortWidth(*const kvm_run);

impl PortWidth {
    /// For the exits of `vcpu`. Must not outlive it.
    pub fn new(vcpu: &mut VcpuFd) -> Self {
        Self(std::ptr::from_ref(vcpu.get_kvm_run()))
    }

    /// Bytes per access (1, 2 or 4) of the port exit that `KVM_RUN` just returned.
    pub fn get(&self) -> usize {
        // SAFETY: the run area stays mapped while the vCPU lives, and the kernel does not write it
        // outside of KVM_RUN, which this thread is not in.
        let run = unsafe { &*self.0 };
        // SAFETY: for other exits the value is meaningless, but still initialised memory.
        let size = unsafe { run.__bindgen_anon_1.io.size };
        usize::from(size.max(1))
    }
}

/// Details of a `KVM_EXIT_INTERNAL_ERROR`: the suberror and its data words.
pub fn internal_error(vcpu: &mut VcpuFd) -> (u32, Vec<u64>) {
    // SAFETY: called right after that exit, so the union holds this member; the run area is plain
    // initialised memory in any case.
    let details = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal };
    let count = (details.ndata as usize).min(details.data.len());
    (details.suberror, details.data[..count].to_vec())
}

/// A CPUID leaf of the host: EAX, EBX, ECX, EDX. Zero beyond what it has.
pub fn cpuid(leaf: u32) -> [u32; 4] {
    use std::arch::x86_64::__cpuid_count;
    #[allow(unused_unsafe, reason = "became a safe function in later compilers")]
    // SAFETY: every x86-64 processor has CPUID.
    let highest = unsafe { __cpuid_count(leaf & 0x8000_0000, 0) }.eax;
    if leaf > highest {
        return [0; 4];
    }
    #[allow(unused_unsafe, reason = "became a safe function in later compilers")]
    // SAFETY: as above.
    let result = unsafe { __cpuid_count(leaf, 0) };
    [result.eax, result.ebx, result.ecx, result.edx]
}

/// Blocks `signals` in this thread and all it starts later, and returns a descriptor from which
/// they can be read.
pub fn signal_fd(signals: &[libc::c_int]) -> io::Result<OwnedFd> {
    // SAFETY: a signal set is plain data for which all zeroes is valid; sigemptyset makes it so.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` is a valid, writable signal set.
    unsafe { libc::sigemptyset(&raw mut set) };
    for &signal in signals {
        // SAFETY: as above; an invalid number is refused.
        if unsafe { libc::sigaddset(&raw mut set, signal) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    // SAFETY: `set` is initialised; the old set is not asked for.
    let error =
        unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
    if error != 0 {
        return Err(io::Error::from_raw_os_error(error));
    }
    // SAFETY: `set` is initialised; -1 asks for a new descriptor.
    let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and ours.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Reads the number of the next signal from [`signal_fd`]'s descriptor, if one is pending.
pub fn read_signal(fd: &OwnedFd) -> Option<i32> {
    let mut info = [0u8; size_of::<libc::signalfd_siginfo>()];
    let count = rustix::io::read(fd, &mut info).ok()?;
    // `ssi_signo` is the first member.
    (count == info.len()).then(|| u32::from_ne_bytes([info[0], info[1], info[2], info[3]]) as i32)
}

extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// The signal that makes `KVM_RUN` return.
pub fn kick_signal() -> libc::c_int {
    vmm_sys_util::signal::SIGRTMIN()
}

/// Installs the empty handler of [`kick_signal`], so that it interrupts system calls.
pub fn install_kick_handler() -> io::Result<()> {
    vmm_sys_util::signal::register_signal_handler(kick_signal(), nothing)
        .map_err(|error| io::Error::from_raw_os_error(error.errno()))
}

/// Puts a terminal into raw mode and gives it its old settings back when dropped.
#[derive(Debug)]
pub struct RawTerminal {
    fd: OwnedFd,
    before: libc::termios,
}

impl RawTerminal {
    /// `None` if `fd` is no terminal or its settings cannot be changed.
    pub fn new(fd: &impl AsRawFd) -> Option<Self> {
        // SAFETY: duplicates an open descriptor; the result is checked.
        let copy = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 0) };
        if copy < 0 {
            return None;
        }
        // SAFETY: the descriptor is new and ours.
        let fd = unsafe { OwnedFd::from_raw_fd(copy) };
        // SAFETY: plain data, filled by the next call before it is used.
        let mut before: libc::termios = unsafe { std::mem::zeroed() };
        // SAFETY: `before` is writable; fails on anything that is not a terminal.
        if unsafe { libc::tcgetattr(fd.as_raw_fd(), &raw mut before) } != 0 {
            return None;
        }
        let mut raw = before;
        // SAFETY: `raw` is an initialised termios.
        unsafe { libc::cfmakeraw(&raw mut raw) };
        // The guest's kernel sends bare line feeds early on.
        raw.c_oflag |= libc::OPOST | libc::ONLCR;
        // SAFETY: `raw` is an initialised termios.
        if unsafe { libc::tcsetattr(fd.as_raw_fd(), libc::TCSANOW, &raw const raw) } != 0 {
            return None;
        }
        Some(Self { fd, before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // SAFETY: `before` was filled by tcgetattr.
        unsafe { libc::tcsetattr(self.fd.as_raw_fd(), libc::TCSANOW, &raw const self.before) };
    }
}
