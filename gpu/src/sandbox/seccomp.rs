//! The system calls that are left.
//!
//! 2D gets what memory, sockets and threads that exist already need. A graphics driver gets more:
//! files within Landlock's rules, its ioctls, code made at run time.

use host::seccomp::{Error, Filter, Row, Rule, Scope, Violation, allow, allow_if, refuse};

use super::Needs;

const EXEC: u64 = libc::PROT_EXEC as u64;
const WORD: u64 = u32::MAX as u64;
/// The letter of an ioctl request's group (`_IOC_TYPE`).
const IOCTL_GROUP: u64 = 0xff00;

/// Installs the filter for all threads.
pub(super) fn install(needs: &Needs, violation: Violation) -> Result<(), Error> {
    tables(needs, violation)?.install(Scope::Process)
}

fn tables(needs: &Needs, violation: Violation) -> Result<Filter, Error> {
    match needs {
        Needs::Nothing => Filter::new(&[BOTH, SOFT_2D], violation),
        Needs::Driver { .. } => Filter::new(&[BOTH, DRIVER], violation),
        Needs::RenderServer { .. } => Filter::new(&[BOTH, DRIVER, SERVER], violation),
    }
}

/// Every renderer.
#[rustfmt::skip]
static BOTH: &[Row] = &[
    // Queues, sockets, wake-ups
    allow(libc::SYS_read, "eventfds of queues; relay"),
    allow(libc::SYS_write, "eventfds of queues; the log"),
    allow(libc::SYS_readv, "eventfds through vectors"),
    allow(libc::SYS_writev, "the log"),
    allow(libc::SYS_recvmsg, "vhost-user and GPU socket, with descriptors"),
    allow(libc::SYS_sendmsg, "vhost-user and GPU socket, with descriptors"),
    allow(libc::SYS_recvfrom, "the same without descriptors"),
    allow(libc::SYS_sendto, "the same without descriptors"),
    allow(libc::SYS_shutdown, "ends of connections"),
    allow(libc::SYS_getsockopt, "SO_ERROR"),
    allow(libc::SYS_setsockopt, "buffer sizes"),
    allow(libc::SYS_close, "descriptors that came with messages"),
    allow_if(libc::SYS_ioctl, 1, WORD, &[libc::FIONBIO, libc::FIOCLEX, libc::TCGETS],
        "non-blocking mode, close on exec, isatty"),
    allow(libc::SYS_fcntl, "non-blocking mode, duplicates, seals of frame memory"),
    allow(libc::SYS_dup, "duplicates"),
    allow(libc::SYS_eventfd2, "wake-ups"),
    allow(libc::SYS_epoll_create1, "event loops"),
    allow(libc::SYS_epoll_ctl, "event loops: queues come and go"),
    allow(libc::SYS_epoll_wait, "event loops"),
    allow(libc::SYS_epoll_pwait, "event loops"),
    allow(libc::SYS_epoll_pwait2, "event loops"),
    allow(libc::SYS_poll, "GPU socket"),
    allow(libc::SYS_ppoll, "GPU socket"),
    // Memory
    allow(libc::SYS_munmap, "frame slots, guest memory, stacks"),
    allow(libc::SYS_mremap, "realloc"),
    allow(libc::SYS_madvise, "free, stacks of ended threads"),
    allow(libc::SYS_brk, "malloc"),
    allow(libc::SYS_lseek, "size of a file that is mapped"),
    allow(libc::SYS_fstat, "size of a file that is mapped"),
    allow(libc::SYS_statx, "size of a file that is mapped"),
    // Threads
    allow(libc::SYS_futex, "locks"),
    allow_if(libc::SYS_clone, 0, libc::CLONE_THREAD as u64, &[libc::CLONE_THREAD as u64],
        "threads; no processes"),
    refuse(libc::SYS_clone3, libc::ENOSYS, "its flags are in memory; glibc falls back to clone"),
    allow(libc::SYS_set_robust_list, "start of a thread"),
    allow(libc::SYS_rseq, "start of a thread"),
    allow(libc::SYS_sched_getaffinity, "start of a thread: size of its stack"),
    allow(libc::SYS_sched_yield, "spinning locks"),
    allow(libc::SYS_sigaltstack, "start and end of a thread"),
    allow(libc::SYS_rt_sigprocmask, "start and end of a thread, abort"),
    allow(libc::SYS_rt_sigaction, "abort"),
    allow(libc::SYS_rt_sigreturn, "end of a signal handler"),
    allow(libc::SYS_restart_syscall, "waits that go on after SIGCONT"),
    Row { number: libc::SYS_tgkill, rule: Rule::AllowOwnPid { index: 0 }, reason: "abort" },
    allow_if(libc::SYS_prctl, 0, WORD, &[libc::PR_SET_NAME as u64, libc::PR_GET_NAME as u64],
        "names of threads"),
    allow(libc::SYS_gettid, "abort, the log"),
    allow(libc::SYS_getpid, "abort"),
    allow(libc::SYS_exit, "end of a thread"),
    allow(libc::SYS_exit_group, "the end"),
    // Time and chance
    allow(libc::SYS_clock_gettime, "where the vDSO has no clock"),
    allow(libc::SYS_gettimeofday, "where the vDSO has no clock"),
    allow(libc::SYS_clock_nanosleep, "thread::sleep"),
    allow(libc::SYS_nanosleep, "thread::sleep"),
    allow(libc::SYS_getrandom, "hash tables"),
    allow(libc::SYS_membarrier, "glibc, Mesa"),
    // Habits
    refuse(libc::SYS_openat, libc::EACCES, "glibc and std look for files and do without"),
    refuse(libc::SYS_open, libc::EACCES, "the same"),
    refuse(libc::SYS_readlink, libc::EACCES, "backtraces look for the program's name"),
    refuse(libc::SYS_readlinkat, libc::EACCES, "the same"),
    refuse(libc::SYS_newfstatat, libc::EACCES, "backtraces look for files"),
    refuse(libc::SYS_getcwd, libc::EACCES, "backtraces"),
];

/// Without a driver.
#[rustfmt::skip]
static SOFT_2D: &[Row] = &[
    allow(libc::SYS_memfd_create, "the journal"),
    allow(libc::SYS_pwrite64, "the journal's size; not ftruncate, which could shorten guest memory"),
    allow_if(libc::SYS_mmap, 2, EXEC, &[0], "guest memory, frame slots, malloc; no code"),
    allow_if(libc::SYS_mprotect, 2, EXEC, &[0], "malloc, stacks; no code"),
];

/// With a driver. The yardstick was the list of crosvm's GPU process, as to which kinds of calls
/// drivers make; each was looked at with strace (see docs/sandbox.md).
#[rustfmt::skip]
static DRIVER: &[Row] = &[
    // Memory
    allow(libc::SYS_mmap, "also code: shaders are compiled at run time"),
    allow(libc::SYS_mprotect, "the same"),
    allow(libc::SYS_msync, "drivers"),
    allow(libc::SYS_mincore, "LLVM, libunwind"),
    allow(libc::SYS_mlock, "NVIDIA"),
    allow(libc::SYS_munlock, "NVIDIA"),
    allow(libc::SYS_get_mempolicy, "NVIDIA"),
    allow(libc::SYS_set_mempolicy, "NVIDIA"),
    allow(libc::SYS_mbind, "NVIDIA"),
    allow(libc::SYS_memfd_create, "buffers that are shared"),
    allow(libc::SYS_ftruncate, "buffers that are shared; shader cache"),
    allow(libc::SYS_fallocate, "shader cache"),
    // Devices
    allow_if(libc::SYS_ioctl, 1, IOCTL_GROUP,
        &[0x6400 /* 'd': DRM */, 0x6200 /* 'b': dma-buf */, 0x7500 /* 'u': udmabuf */,
          0x3e00 /* '>': sync files */, 0x4600 /* 'F': NVIDIA */],
        "render node, dma-buf, udmabuf, sync files, NVIDIA"),
    allow_if(libc::SYS_ioctl, 1, WORD, &[libc::FIONREAD], "inotify"),
    // Files, within Landlock's rules
    allow(libc::SYS_openat, "libraries and their configuration are loaded late too"),
    allow(libc::SYS_open, "the same"),
    allow(libc::SYS_newfstatat, "the same"),
    allow(libc::SYS_stat, "the same"),
    allow(libc::SYS_lstat, "the same"),
    allow(libc::SYS_access, "the same"),
    allow(libc::SYS_faccessat, "the same"),
    allow(libc::SYS_faccessat2, "the same"),
    allow(libc::SYS_readlink, "/sys, /proc/self/exe"),
    allow(libc::SYS_readlinkat, "/sys, /proc/self/exe"),
    allow(libc::SYS_getdents64, "folders of drivers and devices"),
    allow(libc::SYS_getcwd, "relative paths"),
    allow(libc::SYS_pread64, "libraries, shader cache"),
    allow(libc::SYS_pwrite64, "shader cache"),
    allow(libc::SYS_statfs, "shader cache"),
    allow(libc::SYS_fstatfs, "shader cache"),
    allow(libc::SYS_flock, "shader cache"),
    allow(libc::SYS_fsync, "shader cache"),
    allow(libc::SYS_fdatasync, "shader cache"),
    allow(libc::SYS_rename, "shader cache"),
    allow(libc::SYS_renameat, "shader cache"),
    allow(libc::SYS_renameat2, "shader cache"),
    allow(libc::SYS_unlink, "shader cache"),
    allow(libc::SYS_unlinkat, "shader cache"),
    allow(libc::SYS_mkdir, "shader cache"),
    allow(libc::SYS_mkdirat, "shader cache"),
    allow(libc::SYS_utimensat, "shader cache"),
    allow(libc::SYS_fadvise64, "shader cache"),
    allow(libc::SYS_inotify_init1, "changes of driver options"),
    allow(libc::SYS_inotify_add_watch, "changes of driver options"),
    allow(libc::SYS_inotify_rm_watch, "changes of driver options"),
    // Threads and descriptors
    allow(libc::SYS_pipe2, "fences"),
    allow(libc::SYS_pipe, "fences"),
    allow(libc::SYS_eventfd, "fences"),
    allow(libc::SYS_dup2, "duplicates"),
    allow(libc::SYS_dup3, "duplicates"),
    allow(libc::SYS_select, "fences"),
    allow(libc::SYS_pselect6, "fences"),
    allow(libc::SYS_kcmp, "AMD: whether two descriptors are one file"),
    allow(libc::SYS_sched_setaffinity, "Mesa's threads keep to a cache (AMD)"),
    allow(libc::SYS_sched_setscheduler, "threads of low priority"),
    allow(libc::SYS_sched_getscheduler, "the same"),
    allow(libc::SYS_sched_getparam, "the same"),
    allow(libc::SYS_sched_setparam, "the same"),
    allow(libc::SYS_sched_get_priority_min, "the same"),
    allow(libc::SYS_sched_get_priority_max, "the same"),
    allow(libc::SYS_setpriority, "the same"),
    allow(libc::SYS_getpriority, "the same"),
    allow(libc::SYS_getcpu, "Mesa, without vDSO"),
    allow_if(libc::SYS_prctl, 0, WORD,
        &[libc::PR_SET_VMA as u64, libc::PR_SET_TIMERSLACK as u64, libc::PR_GET_DUMPABLE as u64],
        "names of mappings, timers"),
    allow_if(libc::SYS_prlimit64, 2, u64::MAX, &[0], "asks for limits"),
    allow(libc::SYS_getrlimit, "asks for limits"),
    // Questions
    allow(libc::SYS_getuid, "shader cache"),
    allow(libc::SYS_geteuid, "shader cache"),
    allow(libc::SYS_getgid, "shader cache"),
    allow(libc::SYS_getegid, "shader cache"),
    allow(libc::SYS_getppid, "NVIDIA"),
    allow(libc::SYS_uname, "libdrm, LLVM"),
    allow(libc::SYS_sysinfo, "size of memory"),
    allow(libc::SYS_getrusage, "drivers' counters"),
    allow(libc::SYS_times, "drivers' counters"),
    allow(libc::SYS_time, "shader cache"),
    allow(libc::SYS_clock_getres, "drivers' clocks"),
    // Habits
    refuse(libc::SYS_socket, libc::EACCES, "drivers look for X servers and daemons"),
    refuse(libc::SYS_mknodat, libc::EPERM, "NVIDIA makes device nodes where they are missing"),
    refuse(libc::SYS_chmod, libc::EPERM, "the same"),
    refuse(libc::SYS_setxattr, libc::EPERM, "the same"),
];

/// Flags of clone(2) that make namespaces.
const NAMESPACES: u64 = (libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET) as u64;

/// The render server, beside what a driver needs: it is a program of its own and makes processes.
#[rustfmt::skip]
static SERVER: &[Row] = &[
    allow(libc::SYS_execve, "the server itself; Landlock permits it and its dynamic loader only"),
    allow(libc::SYS_arch_prctl, "start of a program"),
    allow(libc::SYS_set_tid_address, "start of a program"),
    allow_if(libc::SYS_clone, 0, NAMESPACES, &[0], "a process for each context; no namespaces"),
    allow(libc::SYS_wait4, "ends of those"),
    allow(libc::SYS_waitid, "ends of those"),
    allow(libc::SYS_kill, "the same; Landlock keeps it to those, before Linux 6.12 nothing does"),
    allow(libc::SYS_signalfd4, "ends of those"),
    allow(libc::SYS_socketpair, "connections to them"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tables_are_filters() {
        let driver = Needs::Driver { render_node: None, shader_cache: None };
        let server = Needs::RenderServer { render_node: None, programs: Vec::new() };
        for needs in [Needs::Nothing, driver, server] {
            for violation in [Violation::Kill, Violation::Log] {
                tables(&needs, violation).unwrap();
            }
        }
    }
}
