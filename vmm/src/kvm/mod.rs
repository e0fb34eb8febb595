//! The KVM side of a machine: virtual machine, interrupt controllers, processors.

use std::io;

use kvm_bindings::{
    KVM_PIT_SPEAKER_DUMMY, kvm_create_device, kvm_device_type_KVM_DEV_TYPE_VFIO, kvm_pit_config,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use vfio_ioctls::VfioDeviceFd;

pub mod activity;
pub mod cpuid;
pub mod msr;
pub mod services;
pub mod vcpu;

use crate::layout;

/// The API version this is written for; it has not changed since 2007.
pub(crate) const API_VERSION: i32 = 12;
/// What cannot be done without, with its name for the error message.
const REQUIRED: [(Cap, &str); 7] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// KVM cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `/dev/kvm` cannot be opened.
    #[error("/dev/kvm cannot be opened{}", hint(.0))]
    Open(#[source] io::Error),
    /// A KVM of another age.
    #[error("KVM speaks API version {0}, {API_VERSION} is needed")]
    Version(i32),
    /// A capability is missing.
    #[error("KVM lacks {0}; a newer host kernel is needed")]
    Missing(&'static str),
    /// More processors than KVM allows.
    #[error("--cpus {wanted}: KVM allows at most {max}")]
    TooManyCpus {
        /// Asked for.
        wanted: u32,
        /// Allowed.
        max: usize,
    },
    /// A call failed.
    #[error("KVM refused to {what}")]
    Call {
        /// What was tried.
        what: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => {
            " (load the module: modprobe kvm_amd or kvm_intel; in a virtual machine, switch nested virtualisation on)"
        }
        io::ErrorKind::PermissionDenied => {
            " (join its group: usermod -aG kvm USER, then log in again)"
        }
        _ => "",
    }
}

/// Names a failed call.
pub(crate) fn call(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Error {
    move |errno| Error::Call { what, source: io::Error::from_raw_os_error(errno.errno()) }
}

/// Opens KVM and checks that it has what this program needs.
pub fn open() -> Result<Kvm, Error> {
    let kvm =
        Kvm::new().map_err(|errno| Error::Open(io::Error::from_raw_os_error(errno.errno())))?;
    let version = kvm.get_api_version();
    if version != API_VERSION {
        return Err(Error::Version(version));
    }
    match REQUIRED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
        Some((_, name)) => Err(Error::Missing(name)),
        None => Ok(kvm),
    }
}

/// Whether the local APIC has a TSC deadline timer.
pub fn has_tsc_deadline(kvm: &Kvm) -> bool {
    kvm.check_extension(Cap::TscDeadlineTimer)
}

/// Something for the process in the middle of a slow call, be it no signal of ours, is no failure.
pub(crate) fn uninterrupted<T>(
    mut request: impl FnMut() -> Result<T, kvm_ioctls::Error>,
) -> Result<T, kvm_ioctls::Error> {
    loop {
        match request() {
            Err(errno) if errno.errno() == libc::EINTR => {}
            other => return other,
        }
    }
}

/// Creates a virtual machine with interrupt controllers; a timer chip only where the processors
/// have no TSC deadline timer. Returns whether there is one.
pub fn create_vm(kvm: &Kvm) -> Result<(VmFd, bool), Error> {
    let vm = uninterrupted(|| kvm.create_vm()).map_err(call("create a virtual machine"))?;
    if kvm.check_extension(Cap::SetIdentityMapAddr) {
        vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .map_err(call("place its identity map"))?;
    }
    if kvm.check_extension(Cap::SetTssAddr) {
        vm.set_tss_address(layout::KVM_TSS as usize)
            .map_err(call("place its task state segment"))?;
    }
    vm.create_irq_chip().map_err(call("create interrupt controllers"))?;
    let timer = !has_tsc_deadline(kvm);
    if timer {
        // The dummy speaker answers port 0x61, which guests poll when they calibrate.
        let config = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        vm.create_pit2(config).map_err(call("create a timer"))?;
    }
    Ok((vm, timer))
}

/// What KVM is told about devices of the host with: their writes may bypass caches, and their
/// interrupts may go to a processor without the kernel's help.
pub fn passthrough(vm: &VmFd) -> Result<VfioDeviceFd, Error> {
    let mut device =
        kvm_create_device { type_: kvm_device_type_KVM_DEV_TYPE_VFIO, fd: 0, flags: 0 };
    let fd = vm.create_device(&mut device).map_err(call("pass devices of the host through"))?;
    Ok(VfioDeviceFd::new_from_kvm(fd))
}
