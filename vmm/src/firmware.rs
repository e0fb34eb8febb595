//! All the firmware there is: a stub at the reset vector.
//!
//! On a hardware-reduced ACPI machine Linux resets by UEFI and, where there is none, goes back to
//! real mode and jumps to where a BIOS would start again (`f000:fff0`). The stub there turns that
//! into a write to the reset register.

use devices::{GuestMemory, legacy::power};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

/// Linear address of `f000:fff0`.
pub const RESET_VECTOR: u64 = 0xf_fff0;

/// `mov dx, PORT; mov al, VALUE; out dx, al; hlt; jmp back to hlt`, in 16-bit code.
const STUB: [u8; 9] = {
    let [low, high] = ((power::PORT + power::RESET) as u16).to_le_bytes();
    [0xba, low, high, 0xb0, power::RESET_VALUE, 0xee, 0xf4, 0xeb, 0xfd]
};

/// Writes the stub.
pub fn write(memory: &GuestMemory) -> Result<(), GuestMemoryError> {
    memory.write_slice(&STUB, GuestAddress(RESET_VECTOR))
}
