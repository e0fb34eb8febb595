//! Which kind of KVM a machine has: measured, because neither `/dev/kvm` nor CPU flags tell.
//!
//! Some clouds offer a KVM without hardware virtualisation that interprets guest kernel code about
//! a hundred times slower than the processor runs it. Every set-up call works there, tiny guests
//! run, and a stock kernel never gets to its init.

use std::{
    io,
    time::{Duration, Instant},
};

use kvm_ioctls::{Kvm, VcpuExit};
use vm_memory::{Bytes, GuestAddress};

use crate::sys;
use devices::GuestMemory;

/// Iterations of the two-instruction loop that is timed: 0.2 s where kernels are interpreted,
/// under a millisecond on hardware.
const ITERATIONS: u32 = 100_000;

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
        reason: String,
    },
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
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => return KvmClass::None { reason: format!("/dev/kvm: {error}") },
    };
    let version = kvm.get_api_version();
    if version != 12 {
        return KvmClass::None { reason: format!("/dev/kvm has API version {version}, not 12") };
    }
    match time_loop(&kvm) {
        Ok(elapsed) => {
            let rate = f64::from(2 * ITERATIONS) / elapsed.as_secs_f64().max(1e-9);
            if rate < NATIVE_INSTRUCTIONS_PER_SECOND {
                KvmClass::Interpreted { rate }
            } else {
                KvmClass::Native { rate }
            }
        }
        Err(error) => KvmClass::None { reason: format!("a test guest did not run: {error}") },
    }
}

/// Runs a real-mode guest that counts down and halts.
fn time_loop(kvm: &Kvm) -> Result<Duration, Box<dyn std::error::Error>> {
    const START: u64 = 0x1000;
    let mut code = vec![0x66, 0xb9]; // mov ecx, ITERATIONS
    code.extend_from_slice(&ITERATIONS.to_le_bytes());
    code.extend_from_slice(&[0x66, 0x49, 0x75, 0xfc, 0xf4]); // dec ecx; jnz -4; hlt

    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x4000)])?;
    memory.write_slice(&code, GuestAddress(START))?;
    let vm = kvm.create_vm()?;
    sys::map_guest_memory(&vm, &memory)?;
    let mut vcpu = vm.create_vcpu(0)?;
    let mut special = vcpu.get_sregs()?;
    special.cs.base = 0;
    special.cs.selector = 0;
    vcpu.set_sregs(&special)?;
    let mut registers = vcpu.get_regs()?;
    registers.rip = START;
    registers.rflags = 2;
    vcpu.set_regs(&registers)?;
    let start = Instant::now();
    match vcpu.run()? {
        VcpuExit::Hlt => Ok(start.elapsed()),
        other => Err(io::Error::other(format!("unexpected exit {other:?}")).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_class_is_consistent_with_the_device_node() {
        let class = probe();
        println!("this machine's KVM: {class:?}");
        let openable = std::fs::File::options().read(true).write(true).open("/dev/kvm").is_ok();
        assert_eq!(openable, class.name() != "none", "{class:?}");
    }
}
