//! MSI (PCI Local Bus 3.0 §6.8.1): up to 32 vectors whose messages differ in their lowest bits.
//! Vectors cannot be masked one by one.

use std::{fmt, sync::Arc};

use super::config_space::MsiRegisters;
use crate::services::{MsiMessage, MsiVector};

/// The MSI state of one function.
pub struct Msi {
    vectors: Vec<Arc<dyn MsiVector>>,
    registers: MsiRegisters,
}

impl fmt::Debug for Msi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Msi")
            .field("vectors", &self.vectors.len())
            .field("registers", &self.registers)
            .finish()
    }
}

impl Msi {
    /// MSI with these vectors, off.
    pub fn new(vectors: Vec<Arc<dyn MsiVector>>) -> Self {
        Self { vectors, registers: MsiRegisters::default() }
    }

    /// Takes over what the guest wrote. If other vectors are on than before: those that are now.
    pub fn update(&mut self, registers: MsiRegisters) -> Option<&[Arc<dyn MsiVector>]> {
        if registers == self.registers {
            return None;
        }
        let before = std::mem::replace(&mut self.registers, registers).enabled;
        let on = usize::from(registers.enabled).min(self.vectors.len());
        for (index, vector) in self.vectors.iter().enumerate() {
            let route = (index < on).then(|| MsiMessage {
                address: registers.address,
                // §6.8.1.6: as many of the lowest bits as there are vectors on.
                data: u32::from(registers.data & !(registers.enabled - 1)) | index as u32,
            });
            if let Err(error) = vector.set_route(route) {
                tracing::error!(vector = index, ?route, %error, "an interrupt could not be routed");
            }
        }
        (before != registers.enabled).then(|| self.vectors.get(..on).unwrap_or_default())
    }
}
