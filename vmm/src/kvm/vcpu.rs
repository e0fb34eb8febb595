//! Processors and the threads that run them.

use std::{
    io,
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use devices::bus::Bus;
use kvm_bindings::{kvm_fpu, kvm_lapic_state};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use vmm_sys_util::signal::Killable;

use super::{
    Error,
    activity::{Access, Activities, Activity, Place},
    call,
    cpuid::Template,
    msr,
};
use crate::{boot::Registers, seccomp::VcpuFilter, sys};

/// Why a processor stopped running for good.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stop {
    /// Asked to by [`VcpuThreads::stop`].
    Asked,
    /// Triple fault: the guest resets itself the hard way.
    TripleFault,
    /// KVM gave up; the text tells everything that is known.
    Failed(String),
}

/// Receives the reason when a processor stops for good, on its thread.
pub type StopSink = Arc<dyn Fn(u32, Stop) + Send + Sync>;

/// Creates the processors in their initial state. The first one gets `registers`, the others wait
/// for it to start them (INIT, SIPI).
pub fn create(
    vm: &VmFd,
    template: &Template,
    count: u32,
    registers: &Registers,
) -> Result<Vec<VcpuFd>, Error> {
    (0..count)
        .map(|id| {
            let vcpu = vm.create_vcpu(u64::from(id)).map_err(call("create a processor"))?;
            vcpu.set_cpuid2(&template.for_cpu(id)?).map_err(call("set CPUID"))?;
            msr::apply(&vcpu)?;
            set_local_interrupts(&vcpu)?;
            if id == 0 {
                set_registers(&vcpu, registers)?;
            }
            Ok(vcpu)
        })
        .collect()
}

fn set_registers(vcpu: &VcpuFd, registers: &Registers) -> Result<(), Error> {
    let mut sregs = vcpu.get_sregs().map_err(call("tell system registers"))?;
    registers.apply_system(&mut sregs);
    vcpu.set_sregs(&sregs).map_err(call("set system registers"))?;
    vcpu.set_regs(registers.general()).map_err(call("set registers"))?;
    // The state FNINIT and the reset of MXCSR give (Intel SDM volume 1, 8.1.5 and 10.2.3).
    let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
    vcpu.set_fpu(&fpu).map_err(call("set floating point registers"))
}

/// Wires the local interrupt pins as firmware does: LINT0 to the PIC, LINT1 to NMI (Intel SDM
/// volume 3, 10.5.1).
fn set_local_interrupts(vcpu: &VcpuFd) -> Result<(), Error> {
    const LINT0: usize = 0x350;
    const LINT1: usize = 0x360;
    const MODE_NMI: u32 = 4;
    const MODE_EXTINT: u32 = 7;
    let mut lapic = vcpu.get_lapic().map_err(call("tell the local APIC's state"))?;
    set_delivery_mode(&mut lapic, LINT0, MODE_EXTINT);
    set_delivery_mode(&mut lapic, LINT1, MODE_NMI);
    vcpu.set_lapic(&lapic).map_err(call("set the local APIC's state"))
}

fn set_delivery_mode(lapic: &mut kvm_lapic_state, register: usize, mode: u32) {
    let slot = &mut lapic.regs[register..register + 4];
    let mut bytes = [0; 4];
    for (to, from) in bytes.iter_mut().zip(slot.iter()) {
        *to = *from as u8;
    }
    let value = (u32::from_le_bytes(bytes) & !0x700) | (mode << 8);
    for (to, from) in slot.iter_mut().zip(value.to_le_bytes()) {
        *to = from as _;
    }
}

#[derive(Default)]
struct Control {
    stop: AtomicBool,
    running: Mutex<usize>,
    changed: Condvar,
}

/// The running processors of a machine.
pub struct VcpuThreads {
    threads: Arc<Vec<JoinHandle<()>>>,
    control: Arc<Control>,
}

impl std::fmt::Debug for VcpuThreads {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VcpuThreads").field("threads", &self.threads.len()).finish_non_exhaustive()
    }
}

impl VcpuThreads {
    /// Starts a thread per processor.
    pub fn start(
        vcpus: Vec<VcpuFd>,
        ports: &Arc<Bus>,
        mmio: &Arc<Bus>,
        activities: &Arc<Activities>,
        sink: &StopSink,
        filter: VcpuFilter,
    ) -> io::Result<Self> {
        let filter = Arc::new(filter);
        sys::install_kick_handler()?;
        let control = Arc::new(Control::default());
        *control.running.lock().unwrap_or_else(PoisonError::into_inner) = vcpus.len();
        let mut threads = Vec::with_capacity(vcpus.len());
        for (id, fd) in vcpus.into_iter().enumerate() {
            let vcpu = Vcpu {
                fd,
                ports: ports.clone(),
                mmio: mmio.clone(),
                activity: activities.of(id),
                control: control.clone(),
            };
            let (sink, control) = (sink.clone(), control.clone());
            let filter = filter.clone();
            let thread = thread::Builder::new().name(format!("vcpu{id}")).spawn(move || {
                filter.install();
                let reason = vcpu.run();
                *control.running.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
                control.changed.notify_all();
                if reason != Stop::Asked {
                    sink(id as u32, reason);
                }
            })?;
            threads.push(thread);
        }
        let threads = Arc::new(threads);
        let shared = threads.clone();
        activities.interrupted_by(Box::new(move |id| {
            if let Some(thread) = shared.get(id).filter(|thread| !thread.is_finished()) {
                interrupt(thread);
            }
        }));
        Ok(Self { threads, control })
    }

    /// Makes all processors leave the guest and waits until none executes it any more.
    pub fn stop(&self) {
        self.control.stop.store(true, Ordering::SeqCst);
        let mut running = self.control.running.lock().unwrap_or_else(PoisonError::into_inner);
        while *running > 0 {
            for thread in self.threads.iter().filter(|thread| !thread.is_finished()) {
                interrupt(thread);
            }
            // A signal that arrives just before KVM_RUN is lost, so it is sent again until it hits.
            running = self
                .control
                .changed
                .wait_timeout(running, Duration::from_millis(2))
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

/// `0F A2`. It may have prefixes, which do nothing, so nobody puts any in front of it; a guest that did
/// would go on in the middle of it.
const CPUID_LENGTH: u64 = 2;

/// Whether KVM has done a CPUID instruction but could not read it to go on behind it.
///
/// AMD's processors tell KVM where the next instruction is (`NRIPS`). On one that does not, such as QEMU's
/// emulated one, KVM has to look how long the instruction is, which fails when another processor of the
/// guest is just taking the page out of the page table: this one may then still execute what its TLB
/// holds. Programs start with some thirty CPUID instructions, and a file system without a cache of its own
/// (virtiofs) unmaps the C library whenever somebody opens it.
fn is_unskipped_cpuid(kind: u32, data: &[u64]) -> bool {
    /// `KVM_INTERNAL_ERROR_EMULATION`.
    const EMULATION: u32 = 1;
    /// `SVM_EXIT_CPUID`.
    const CPUID: u64 = 0x72;
    // The first word is without flags: there are no instruction bytes. The second is the reason of the
    // exit; without the flags it is there since Linux 5.14.
    kind == EMULATION && matches!(data, [0, CPUID, ..])
}

/// Makes a processor leave the guest.
fn interrupt(thread: &JoinHandle<()>) {
    if let Err(error) = thread.kill(sys::kick_signal()) {
        tracing::debug!(%error, "a processor's thread could not be interrupted");
    }
}

struct Vcpu {
    fd: VcpuFd,
    ports: Arc<Bus>,
    mmio: Arc<Bus>,
    activity: Arc<Activity>,
    control: Arc<Control>,
}

impl Vcpu {
    fn run(mut self) -> Stop {
        let width = sys::PortWidth::new(&mut self.fd);
        loop {
            if self.control.stop.load(Ordering::Acquire) {
                tracing::debug!("processor stopped{}", self.with_registers(String::new()));
                return Stop::Asked;
            }
            let activity = &*self.activity;
            match self.fd.run() {
                Ok(VcpuExit::IoOut(port, data)) => {
                    let address = u64::from(port);
                    activity.begin(Access { port: true, write: true, address });
                    // More than one access at once: a string instruction.
                    for access in data.chunks(width.get()) {
                        if !self.ports.write(address, access) {
                            tracing::trace!(port, ?access, "a write nobody answers");
                        }
                    }
                    activity.end();
                }
                Ok(VcpuExit::IoIn(port, data)) => {
                    let address = u64::from(port);
                    activity.begin(Access { port: true, write: false, address });
                    for access in data.chunks_mut(width.get()) {
                        self.ports.read(address, access);
                    }
                    activity.end();
                }
                Ok(VcpuExit::MmioRead(address, data)) => {
                    activity.begin(Access { port: false, write: false, address });
                    self.mmio.read(address, data);
                    activity.end();
                }
                Ok(VcpuExit::MmioWrite(address, data)) => {
                    activity.begin(Access { port: false, write: true, address });
                    self.mmio.write(address, data);
                    activity.end();
                }
                Ok(VcpuExit::Shutdown) => return Stop::TripleFault,
                // KVM_SYSTEM_EVENT_*: an in-kernel way to power off or reset.
                Ok(VcpuExit::SystemEvent(kind, _)) => {
                    return Stop::Failed(format!("KVM reported system event {kind}"));
                }
                Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::Hlt) => {
                    activity.other();
                    activity.answer(|| self.place());
                }
                Ok(VcpuExit::FailEntry(reason, cpu)) => {
                    let text = format!("entering the guest failed on host CPU {cpu}: {reason:#x}");
                    return Stop::Failed(self.with_registers(text));
                }
                Ok(VcpuExit::InternalError) => {
                    let (kind, data) = sys::internal_error(&mut self.fd);
                    if is_unskipped_cpuid(kind, &data) && self.skip(CPUID_LENGTH) {
                        activity.other();
                        continue;
                    }
                    let name = match kind {
                        1 => "an instruction could not be emulated",
                        2 => "two exceptions at once in the simulator",
                        3 => "an event could not be delivered",
                        4 => "an unexpected exit from the hardware",
                        _ => "unknown internal error",
                    };
                    let text = format!("KVM internal error {kind} ({name}), data {data:x?}");
                    return Stop::Failed(self.with_registers(text));
                }
                Ok(other) => {
                    let text = format!("KVM returned with an exit that is not handled: {other:?}");
                    return Stop::Failed(self.with_registers(text));
                }
                Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                    activity.other();
                    activity.answer(|| self.place());
                }
                Err(error) => {
                    return Stop::Failed(self.with_registers(format!("KVM_RUN failed: {error}")));
                }
            }
        }
    }

    /// Lets the guest go on `length` bytes further.
    fn skip(&self, length: u64) -> bool {
        let registers = self.fd.get_regs();
        let skipped = registers.and_then(|mut registers| {
            registers.rip = registers.rip.wrapping_add(length);
            self.fd.set_regs(&registers)
        });
        skipped.is_ok()
    }

    fn place(&self) -> Option<Place> {
        let (general, system) = (self.fd.get_regs().ok()?, self.fd.get_sregs().ok()?);
        Some(Place { rip: general.rip, rflags: general.rflags, cr3: system.cr3 })
    }

    /// Appends the registers, as far as they can be had.
    fn with_registers(&self, mut text: String) -> String {
        use std::fmt::Write;
        if let Ok(r) = self.fd.get_regs() {
            let _ = write!(
                text,
                "\n  rip {:#x} rsp {:#x} rflags {:#x}\n  rax {:#x} rbx {:#x} rcx {:#x} rdx {:#x} \
                 rsi {:#x} rdi {:#x} rbp {:#x}",
                r.rip, r.rsp, r.rflags, r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rbp
            );
        }
        if let Ok(s) = self.fd.get_sregs() {
            let _ = write!(
                text,
                "\n  cr0 {:#x} cr2 {:#x} cr3 {:#x} cr4 {:#x} efer {:#x} cs {:#x} base {:#x} l {} db {}",
                s.cr0, s.cr2, s.cr3, s.cr4, s.efer, s.cs.selector, s.cs.base, s.cs.l, s.cs.db
            );
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_cpuid_that_could_not_be_read_is_skipped() {
        assert!(is_unskipped_cpuid(1, &[0, 0x72, 0, 0, 0, 0]));
        assert!(!is_unskipped_cpuid(3, &[0, 0x72, 0, 0, 0, 0]), "another error");
        assert!(!is_unskipped_cpuid(1, &[0, 0x78, 0, 0, 0, 0]), "another instruction");
        assert!(!is_unskipped_cpuid(1, &[1, 0x72, 2, 0xa20f, 0, 0]), "it could be read");
        assert!(!is_unskipped_cpuid(1, &[]));
    }
}
