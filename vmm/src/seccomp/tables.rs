//! Which thread needs which system call, and for what.
//!
//! Numbers of ioctl requests are from `linux/kvm.h`, `linux/vhost.h`, `linux/if_tun.h` and
//! `linux/fs.h`.

use host::seccomp::{Row, Rule, allow, allow_if, refuse};

const WORD: u64 = u32::MAX as u64;
/// `PR_GET_AUXV` of `linux/prctl.h`: the process reads its own auxiliary vector.
const PR_GET_AUXV: u64 = 0x4155_5856;
const EXEC: u64 = libc::PROT_EXEC as u64;
/// The letter of an ioctl request's group (`_IOC_TYPE`).
const IOCTL_GROUP: u64 = 0xff00;

/// What the C library and Rust's need in any thread.
#[rustfmt::skip]
pub(super) static RUNTIME: &[Row] = &[
    allow(libc::SYS_read, "eventfds, files, sockets"),
    allow(libc::SYS_write, "eventfds, files, sockets, the log"),
    allow(libc::SYS_writev, "the log"),
    allow(libc::SYS_close, "descriptors"),
    allow(libc::SYS_futex, "locks, channels, ends of threads"),
    allow_if(libc::SYS_mmap, 2, EXEC, &[0], "malloc, stacks, frames; no code"),
    allow_if(libc::SYS_mprotect, 2, EXEC, &[0], "malloc, stacks; no code"),
    allow(libc::SYS_munmap, "malloc, stacks, frames"),
    allow(libc::SYS_mremap, "realloc"),
    allow(libc::SYS_madvise, "malloc; memory the guest gave back"),
    allow(libc::SYS_brk, "malloc"),
    allow(libc::SYS_getrandom, "hash tables, keys"),
    allow(libc::SYS_clock_gettime, "where the vDSO has no clock"),
    allow(libc::SYS_gettimeofday, "where the vDSO has no clock"),
    allow(libc::SYS_clock_nanosleep, "waiting for a moment"),
    allow(libc::SYS_sched_yield, "spinning locks; the network lets others go first"),
    allow(libc::SYS_sched_getaffinity, "number of processors, size of a stack"),
    allow(libc::SYS_set_robust_list, "start of a thread"),
    allow(libc::SYS_rseq, "start of a thread"),
    allow(libc::SYS_sigaltstack, "start and end of a thread"),
    allow(libc::SYS_rt_sigprocmask, "start and end of a thread"),
    allow(libc::SYS_rt_sigaction, "abort"),
    allow(libc::SYS_rt_sigreturn, "the signal that makes a processor leave the guest"),
    allow(libc::SYS_restart_syscall, "waits that go on after SIGCONT"),
    Row { number: libc::SYS_tgkill, rule: Rule::AllowOwnPid { index: 0 },
        reason: "makes processors leave the guest; abort" },
    allow(libc::SYS_getpid, "the same"),
    allow(libc::SYS_gettid, "the same"),
    allow(libc::SYS_exit, "end of a thread"),
    allow(libc::SYS_exit_group, "the end"),
    allow(libc::SYS_membarrier, "C library"),
    allow(libc::SYS_sysinfo, "C library, sorting"),
    allow_if(libc::SYS_prctl, 0, WORD,
        &[libc::PR_SET_NAME as u64, libc::PR_GET_NAME as u64, libc::PR_SET_NO_NEW_PRIVS as u64,
            PR_GET_AUXV],
        "names of threads; the filter of a processor's thread; rustix looks for the vDSO"),
    allow_if(libc::SYS_seccomp, 0, WORD, &[libc::SECCOMP_SET_MODE_FILTER as u64],
        "the filter of a processor's thread; filters only ever add up"),
    refuse(libc::SYS_openat, libc::EACCES, "the C library looks for files and does without"),
    refuse(libc::SYS_open, libc::EACCES, "the same"),
    refuse(libc::SYS_getcwd, libc::EACCES, "backtraces"),
];

/// vCPU threads: the guest, and the registers of devices, which a driver sets up from there.
#[rustfmt::skip]
pub(super) static VCPU: &[Row] = &[
    allow_if(libc::SYS_ioctl, 1, WORD, &[
        0xae80,      // KVM_RUN
        0x8090_ae81, // KVM_GET_REGS, for the log and `ctl status`
        0x4090_ae82, // KVM_SET_REGS, behind an instruction that KVM could not read
        0x8138_ae83, // KVM_GET_SREGS, the same
        0x4040_ae79, // KVM_IOEVENTFD: doorbells move with their BAR
        0x4020_ae76, // KVM_IRQFD: MSI-X vectors come and go
        0x4008_ae6a, // KVM_SET_GSI_ROUTING: MSI-X messages
        0x4020_ae46, // KVM_SET_USER_MEMORY_REGION: windows for the host's memory move with their BAR
    ], "KVM"),
    allow_if(libc::SYS_ioctl, 1, IOCTL_GROUP, &[0xaf00], "vhost: activation of kernel devices"),
    allow_if(libc::SYS_ioctl, 1, WORD, &[
        0x4004_54d0, // TUNSETOFFLOAD
        0x4004_54d8, // TUNSETVNETHDRSZ
        0x4004_54d9, // TUNSETQUEUE
    ], "tap interfaces: activation"),
    allow_if(libc::SYS_ioctl, 1, WORD, &[libc::FIONBIO, libc::FIOCLEX, libc::FIONREAD],
        "descriptors: activation"),
    allow(libc::SYS_eventfd2, "activation of a device"),
    allow(libc::SYS_fcntl, "duplicates of eventfds: activation"),
    allow(libc::SYS_dup, "the same"),
    allow(libc::SYS_epoll_ctl, "the same"),
    allow(libc::SYS_recvmsg, "vhost-user: activation of the GPU"),
    allow(libc::SYS_sendmsg, "vhost-user: activation of the GPU"),
    allow(libc::SYS_recvfrom, "vhost-user"),
    allow(libc::SYS_sendto, "vhost-user"),
    allow(libc::SYS_shutdown, "a GPU that does not stop when it is reset"),
    allow(libc::SYS_poll, "vhost-user"),
    allow(libc::SYS_ppoll, "vhost-user"),
    allow(libc::SYS_fdatasync, "a disk that is reset flushes"),
    allow(libc::SYS_fstat, "sizes of disks"),
    allow(libc::SYS_statx, "sizes of disks"),
    allow(libc::SYS_fstatfs, "page size of guest memory: activation of the balloon"),
    allow(libc::SYS_lseek, "sizes of disks"),
];

/// Everybody else: device workers, display and SPICE, control socket, main thread.
#[rustfmt::skip]
pub(super) static OTHERS: &[Row] = &[
    // Threads
    allow_if(libc::SYS_clone, 0, libc::CLONE_THREAD as u64, &[libc::CLONE_THREAD as u64],
        "threads; no processes"),
    refuse(libc::SYS_clone3, libc::ENOSYS, "its flags are in memory; glibc falls back to clone"),
    allow(libc::SYS_setpriority, "threads that may wait"),
    allow(libc::SYS_sched_setscheduler, "threads that may wait"),
    allow(libc::SYS_sched_getparam, "the same"),
    allow(libc::SYS_sched_getscheduler, "the same"),
    allow(libc::SYS_sched_setattr, "the same; sound, which wants short turns"),
    allow(libc::SYS_sched_getattr, "sound"),
    // Event loops
    allow(libc::SYS_epoll_create1, "event loops"),
    allow(libc::SYS_epoll_wait, "event loops"),
    allow(libc::SYS_epoll_pwait, "event loops"),
    allow(libc::SYS_epoll_pwait2, "event loops"),
    allow(libc::SYS_timerfd_create, "event loops"),
    allow(libc::SYS_timerfd_settime, "event loops"),
    allow(libc::SYS_timerfd_gettime, "event loops"),
    allow(libc::SYS_nanosleep, "waiting for a moment"),
    // Sockets: SPICE, control, console ports, GPU, passt, readiness
    allow(libc::SYS_accept4, "SPICE, control and console clients; the guest's reports"),
    allow(libc::SYS_accept, "the same"),
    allow(libc::SYS_recvmmsg, "network cards"),
    allow(libc::SYS_sendmmsg, "network cards"),
    allow(libc::SYS_readv, "tap interfaces, sockets"),
    allow(libc::SYS_getsockopt, "SPICE: speed of a line, errors"),
    allow(libc::SYS_setsockopt, "SPICE: delays, limits"),
    allow(libc::SYS_getsockname, "addresses for status"),
    allow(libc::SYS_getpeername, "addresses for status"),
    allow(libc::SYS_socketpair, "passt and drago-gpu, started again"),
    allow(libc::SYS_listen, "console ports"),
    allow(libc::SYS_pipe2, "errors of passt, started again"),
    // Files that are open
    allow(libc::SYS_pread64, "disks"),
    allow(libc::SYS_pwrite64, "disks"),
    allow(libc::SYS_preadv, "disks"),
    allow(libc::SYS_pwritev, "disks"),
    allow(libc::SYS_preadv2, "disks, without waiting"),
    allow(libc::SYS_pwritev2, "disks, without waiting"),
    allow(libc::SYS_fsync, "disks"),
    allow(libc::SYS_sync_file_range, "disks"),
    allow(libc::SYS_fallocate, "disks: discard, zeroes; memory the guest gave back"),
    allow(libc::SYS_ftruncate, "memory of frames"),
    allow(libc::SYS_fadvise64, "disks"),
    allow(libc::SYS_memfd_create, "memory of frames"),
    allow(libc::SYS_msync, "guest memory"),
    allow_if(libc::SYS_ioctl, 1, WORD, &[
        0x1277,      // BLKDISCARD
        0x127f,      // BLKZEROOUT
        0x127d,      // BLKSECDISCARD
        0x8008_1272, // BLKGETSIZE64
    ], "disks that are block devices"),
    allow_if(libc::SYS_ioctl, 1, WORD, &[0x4008_6200 /* DMA_BUF_IOCTL_SYNC */],
        "pictures of other GPU back ends"),
    allow_if(libc::SYS_ioctl, 1, WORD, &[
        libc::TCGETS, libc::TCSETS, libc::TCSETSW, libc::TCSETSF, libc::TIOCGWINSZ,
    ], "the terminal, put back at the end"),
    // Names
    allow(libc::SYS_unlink, "sockets of ours, at the end"),
    allow(libc::SYS_unlinkat, "the same"),
    allow(libc::SYS_readlink, "where drago-gpu is, to start it again"),
    allow(libc::SYS_readlinkat, "the same"),
    allow(libc::SYS_newfstatat, "the same"),
    allow(libc::SYS_stat, "the same"),
    allow(libc::SYS_lstat, "the same"),
    // Processes
    allow(libc::SYS_wait4, "children, where there is no launcher"),
    allow(libc::SYS_waitid, "children, where there is no launcher"),
    allow(libc::SYS_pidfd_send_signal, "drago-gpu that does not end by itself"),
    allow(libc::SYS_getuid, "control clients"),
    allow(libc::SYS_geteuid, "control clients"),
    allow(libc::SYS_uname, "the log"),
    allow(libc::SYS_getrusage, "measurements"),
];

/// With devices that connect again later (`--fs`) only: who can connect to a path can talk to other
/// services of the user.
#[rustfmt::skip]
pub(super) static CONNECTING: &[Row] = &[
    allow_if(libc::SYS_socket, 0, WORD, &[libc::AF_UNIX as u64], "virtiofsd, started again"),
    allow(libc::SYS_connect, "the same; only Unix sockets can be made"),
];

/// With `--vfio` only, and for processors too: registers that are not mapped, configuration space.
#[rustfmt::skip]
pub(super) static HOST_DEVICES: &[Row] = &[
    allow(libc::SYS_pread64, "registers of devices of the host"),
    allow(libc::SYS_pwrite64, "registers of devices of the host"),
    allow_if(libc::SYS_ioctl, 1, WORD, &[
        0x3b6e, // VFIO_DEVICE_SET_IRQS
        0x3b6f, // VFIO_DEVICE_RESET, at the end
    ], "interrupts of devices of the host"),
];
