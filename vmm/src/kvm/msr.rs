//! Model specific registers a processor starts with.
//!
//! KVM's reset values are kept for everything not listed. A register KVM does not know is skipped:
//! what is supported differs between hosts, nested ones above all.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::{Error, call};

/// A register, its value and why it is set.
#[derive(Debug)]
struct Row {
    index: u32,
    value: u64,
    reason: &'static str,
}

const fn row(index: u32, value: u64, reason: &'static str) -> Row {
    Row { index, value, reason }
}

/// Intel SDM volume 4, table 2-2; AMD APM volume 2, appendix A.
static TABLE: &[Row] = &[
    row(0x1a0, 1, "IA32_MISC_ENABLE: fast string operations, as firmware leaves it"),
    row(0x2ff, 0x806, "IA32_MTRR_DEF_TYPE: MTRRs on, write-back; otherwise memory is uncached"),
];

/// Sets the table's registers.
pub fn apply(vcpu: &VcpuFd) -> Result<(), Error> {
    for row in TABLE {
        let entry = kvm_msr_entry { index: row.index, data: row.value, ..Default::default() };
        let Ok(msrs) = Msrs::from_entries(&[entry]) else { continue };
        let set = vcpu.set_msrs(&msrs).map_err(call("set model specific registers"))?;
        if set == 0 {
            tracing::debug!(
                register = format_args!("{:#x}", row.index),
                reason = row.reason,
                "KVM does not let this register be set"
            );
        }
    }
    Ok(())
}
