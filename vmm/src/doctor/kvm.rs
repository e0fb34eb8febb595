//! Which kind of KVM a machine has: measured, because neither `/dev/kvm` nor CPU flags tell.
//!
//! Some clouds offer a KVM without hardware virtualisation that interprets guest kernel code about
//! a hundred times slower than the processor runs it. Every set-up call works there, tiny guests
//! run, and a stock kernel never gets to its init.

use std::{
    fmt, io,
    time::{Duration, Instant},
};

use kvm_ioctls::{Kvm, VcpuExit, VmFd};
use vm_memory::{Bytes, GuestAddress};

use super::node::Node;
use crate::{
    kvm::{self, uninterrupted},
    sys,
};
use devices::GuestMemory;

/// Iterations of the two-instruction loop that is timed: 0.2 s where kernels are interpreted,
/// under a millisecond on hardware.
const ITERATIONS: u32 = 100_000;

/// So often the loop is timed before a KVM is said to interpret.
const RUNS: usize = 3;

/// Below this rate guest kernel code is being interpreted. Measured: about 1 M/s interpreted, 200
/// M/s and more with hardware support or under a binary translator that emulates it.
const NATIVE_INSTRUCTIONS_PER_SECOND: f64 = 20e6;

/// What a machine's KVM is good for.
#[derive(Debug, Clone, PartialEq)]
pub enum KvmClass {
    /// Guests run on the processor.
    Native {
        /// Guest kernel instructions per second.
        rate: f64,
    },
    /// Guest kernel code is interpreted: good for tiny test guests only.
    Interpreted {
        /// Guest kernel instructions per second.
        rate: f64,
    },
    /// No usable KVM.
    None {
        /// Why.
        reason: Unusable,
    },
}

/// Why KVM cannot be used. System errors are kept by their number, so that they can be compared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unusable {
    /// `/dev/kvm` cannot be opened.
    Open(i32),
    /// It has this API version, which is not Linux' own.
    Version(i32),
    /// The host's kernel is too old for this capability.
    Missing(&'static str),
    /// No virtual machine can be created.
    Create(i32),
    /// A test guest of seven instructions did not run, for this reason.
    Guest(String),
}

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Open(errno) => write!(f, "/dev/kvm: {}", io::Error::from_raw_os_error(*errno)),
            Self::Version(version) => {
                write!(f, "/dev/kvm has API version {version}, not {}", kvm::API_VERSION)
            }
            Self::Missing(capability) => write!(f, "KVM lacks {capability}"),
            Self::Create(errno) => {
                let error = io::Error::from_raw_os_error(*errno);
                write!(f, "KVM creates no virtual machine: {error}")
            }
            Self::Guest(reason) => write!(f, "a test guest did not run: {reason}"),
        }
    }
}

impl Unusable {
    /// What mends it. `node`: what `/dev/kvm` is on this machine.
    pub(super) fn hint(&self, node: &Node) -> String {
        match self {
            Self::Open(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
                "enable virtualisation (SVM or VT-x) in the firmware and load kvm_amd or \
                 kvm_intel; in a virtual machine, enable nested virtualisation on its host; in a \
                 container, give it /dev/kvm"
                    .to_owned()
            }
            Self::Open(libc::EACCES) => node.permission("kvm"),
            Self::Open(libc::EPERM) => {
                "the file may be opened, the device may not: allow it to the container or service \
                 (DeviceAllow=/dev/kvm rw, --device /dev/kvm)"
                    .to_owned()
            }
            Self::Open(libc::EBUSY) | Self::Create(libc::EBUSY) => {
                "another hypervisor has the processor's virtualisation: end its machines \
                 (VirtualBox, VMware) and unload its module (vboxdrv, vmmon)"
                    .to_owned()
            }
            Self::Create(libc::ENOMEM) => {
                "the kernel has no memory for it: end other virtual machines, or raise the limit \
                 of this service or container (MemoryMax=)"
                    .to_owned()
            }
            Self::Version(_) => {
                "this is not the KVM of Linux 2.6.22 and later: see what /dev/kvm is on this \
                 machine, and use a kernel with kvm_amd or kvm_intel"
                    .to_owned()
            }
            Self::Missing(_) => "use a newer kernel on this machine (5.10 or later)".to_owned(),
            Self::Open(_) | Self::Create(_) => {
                "see what the kernel says of it: dmesg | grep -i kvm".to_owned()
            }
            Self::Guest(_) => {
                "the processor's virtualisation does not work: see dmesg | grep -i kvm, update the \
                 kernel and the firmware; in a virtual machine, its host's nested virtualisation \
                 is at fault"
                    .to_owned()
            }
        }
    }
}

impl KvmClass {
    /// One word for scripts: `native`, `interpreted` or `none`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Native { .. } => "native",
            Self::Interpreted { .. } => "interpreted",
            Self::None { .. } => "none",
        }
    }
}

/// Measures this machine's KVM. Takes under a second.
pub fn probe() -> KvmClass {
    match kvm::open() {
        Ok(kvm) => classify(|| time_loop(&kvm)),
        Err(error) => KvmClass::None { reason: unusable(&error) },
    }
}

/// The class by the fastest of some runs of the loop: other work on the machine makes runs slower, and
/// nothing makes one faster than its KVM is.
fn classify(mut run: impl FnMut() -> Result<Duration, Unusable>) -> KvmClass {
    let mut fastest: f64 = 0.0;
    for _ in 0..RUNS {
        match run() {
            Ok(elapsed) => {
                let rate = f64::from(2 * ITERATIONS) / elapsed.as_secs_f64().max(1e-9);
                fastest = fastest.max(rate);
            }
            Err(reason) => return KvmClass::None { reason },
        }
        if fastest >= NATIVE_INSTRUCTIONS_PER_SECOND {
            return KvmClass::Native { rate: fastest };
        }
    }
    KvmClass::Interpreted { rate: fastest }
}

fn unusable(error: &kvm::Error) -> Unusable {
    match error {
        kvm::Error::Open(source) => Unusable::Open(source.raw_os_error().unwrap_or_default()),
        kvm::Error::Version(version) => Unusable::Version(*version),
        kvm::Error::Missing(capability) => Unusable::Missing(capability),
        other => Unusable::Guest(other.to_string()),
    }
}

/// Creates a virtual machine and runs a real-mode guest in it that counts down and halts.
fn time_loop(kvm: &Kvm) -> Result<Duration, Unusable> {
    let vm = uninterrupted(|| kvm.create_vm());
    let vm = vm.map_err(|errno| Unusable::Create(errno.errno()))?;
    time_guest(&vm).map_err(|error| Unusable::Guest(error.to_string()))
}

fn time_guest(vm: &VmFd) -> Result<Duration, Box<dyn std::error::Error>> {
    const START: u64 = 0x1000;
    let mut code = vec![0x66, 0xb9]; // mov ecx, ITERATIONS
    code.extend_from_slice(&ITERATIONS.to_le_bytes());
    code.extend_from_slice(&[0x66, 0x49, 0x75, 0xfc, 0xf4]); // dec ecx; jnz -4; hlt

    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x4000)])?;
    memory.write_slice(&code, GuestAddress(START))?;
    sys::map_guest_memory(vm, &memory)?;
    let mut vcpu = uninterrupted(|| vm.create_vcpu(0))?;
    let mut special = vcpu.get_sregs()?;
    special.cs.base = 0;
    special.cs.selector = 0;
    vcpu.set_sregs(&special)?;
    let mut registers = vcpu.get_regs()?;
    registers.rip = START;
    registers.rflags = 2;
    vcpu.set_regs(&registers)?;
    let start = Instant::now();
    let unexpected = uninterrupted(|| match vcpu.run()? {
        VcpuExit::Hlt => Ok(None),
        other => Ok(Some(format!("unexpected exit {other:?}"))),
    })?;
    match unexpected {
        None => Ok(start.elapsed()),
        Some(exit) => Err(io::Error::other(exit).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is wrong, a word of what mends it, and one of what would not.
    #[test]
    fn each_failure_has_a_remedy_of_its_own() {
        let node = Node { mode: 0o660, group: Some("virt".to_owned()), number: Some(300) };
        let cases = [
            (Unusable::Open(libc::ENOENT), "firmware", "usermod"),
            (Unusable::Open(libc::ENODEV), "firmware", "usermod"),
            (Unusable::Open(libc::EACCES), "usermod -aG virt USER", "firmware"),
            (Unusable::Open(libc::EPERM), "DeviceAllow", "usermod"),
            (Unusable::Open(libc::EBUSY), "VirtualBox", "usermod"),
            (Unusable::Open(libc::EIO), "dmesg", "usermod"),
            (Unusable::Version(11), "kernel", "usermod"),
            (Unusable::Missing("KVM_CAP_IRQFD"), "newer kernel", "usermod"),
            (Unusable::Create(libc::EBUSY), "VirtualBox", "usermod"),
            (Unusable::Create(libc::ENOMEM), "memory", "usermod"),
            (Unusable::Create(libc::EINVAL), "dmesg", "usermod"),
            (Unusable::Guest("exit 9".to_owned()), "nested", "usermod"),
        ];
        let mut hints = Vec::new();
        for (problem, word, never) in cases {
            let hint = problem.hint(&node);
            assert!(hint.contains(word), "{problem}: {hint}");
            assert!(!hint.contains(never), "{problem}: {hint}");
            hints.push(hint);
        }
        hints.sort();
        hints.dedup();
        assert_eq!(hints.len(), 9, "{hints:#?}");
        assert_eq!(
            Unusable::Open(libc::EACCES).to_string(),
            "/dev/kvm: Permission denied (os error 13)"
        );
        assert_eq!(Unusable::Version(11).to_string(), "/dev/kvm has API version 11, not 12");
    }

    #[test]
    fn errors_of_the_machine_are_recognised() {
        let denied = kvm::Error::Open(io::Error::from_raw_os_error(libc::EACCES));
        assert_eq!(unusable(&denied), Unusable::Open(libc::EACCES));
        assert_eq!(unusable(&kvm::Error::Version(11)), Unusable::Version(11));
        assert_eq!(unusable(&kvm::Error::Missing("X")), Unusable::Missing("X"));
    }

    #[test]
    fn one_slow_run_does_not_make_an_interpreter() {
        let class = |milliseconds: &[u64]| {
            let mut runs = milliseconds.iter();
            classify(|| match runs.next() {
                Some(0) => Err(Unusable::Version(11)),
                Some(run) => Ok(Duration::from_millis(*run)),
                None => panic!("more runs than there are"),
            })
        };
        assert_eq!(class(&[1]), KvmClass::Native { rate: 200e6 });
        assert_eq!(class(&[20, 2]), KvmClass::Native { rate: 100e6 });
        assert_eq!(class(&[200, 100, 400]), KvmClass::Interpreted { rate: 2e6 });
        assert_eq!(class(&[20, 0]), KvmClass::None { reason: Unusable::Version(11) });
    }

    #[test]
    fn the_class_is_consistent_with_the_device_node() {
        let class = probe();
        println!("this machine's KVM: {class:?}");
        let openable = std::fs::File::options().read(true).write(true).open("/dev/kvm").is_ok();
        assert_eq!(openable, class.name() != "none", "{class:?}");
    }
}
