//! MSI-X (PCI Local Bus 3.0 §6.8.2): the capability, the vector table and the pending bits.
//!
//! A vector that may fire has a route, a masked one has none. Raising a vector is a write to its
//! eventfd either way: without a route the count stays there, and that is its pending bit.

use std::{fmt, sync::Arc};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::services::{MsiMessage, MsiVector};

/// Capability id of MSI-X.
pub const CAPABILITY: u8 = 0x11;
/// Size of one table entry in bytes.
pub const ENTRY_SIZE: usize = 16;

const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_MASK_ALL: u16 = 1 << 14;
const VECTOR_MASKED: u32 = 1;

/// One entry of the vector table, and what the VMM was last told about it.
struct Entry {
    address: u64,
    data: u32,
    control: u32,
    vector: Arc<dyn MsiVector>,
    route: Option<MsiMessage>,
}

/// The MSI-X state of one function.
pub struct Msix {
    entries: Vec<Entry>,
    enabled: bool,
    all_masked: bool,
}

impl fmt::Debug for Msix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Msix")
            .field("vectors", &self.entries.len())
            .field("enabled", &self.enabled)
            .field("all_masked", &self.all_masked)
            .finish()
    }
}

impl Msix {
    /// MSI-X with these vectors (1 to 2048), disabled and masked as after power on.
    pub fn new(vectors: impl IntoIterator<Item = Arc<dyn MsiVector>>) -> Self {
        let entries = vectors
            .into_iter()
            .map(|vector| Entry {
                address: 0,
                data: 0,
                control: VECTOR_MASKED,
                vector,
                route: None,
            })
            .collect();
        Self { entries, enabled: false, all_masked: false }
    }

    /// The capability's bytes after id and next pointer, and their write mask, for a table and
    /// pending bits at these offsets (multiples of 8) of base address register `bar`.
    pub fn capability(&self, bar: u8, table: u32, pending: u32) -> ([u8; 10], [u8; 2]) {
        let mut body = [0; 10];
        let last = self.entries.len().saturating_sub(1) as u16;
        body[0..2].copy_from_slice(&last.to_le_bytes());
        body[2..6].copy_from_slice(&(table | u32::from(bar)).to_le_bytes());
        body[6..10].copy_from_slice(&(pending | u32::from(bar)).to_le_bytes());
        (body, (CONTROL_ENABLE | CONTROL_MASK_ALL).to_le_bytes())
    }

    /// Whether the guest switched MSI-X on.
    pub fn enabled(&self) -> bool {
        self.enabled
    }

    /// Takes over the message control register after the guest wrote it.
    pub fn set_control(&mut self, control: u16) {
        let enabled = control & CONTROL_ENABLE != 0;
        let all_masked = control & CONTROL_MASK_ALL != 0;
        if (enabled, all_masked) != (self.enabled, self.all_masked) {
            (self.enabled, self.all_masked) = (enabled, all_masked);
            for index in 0..self.entries.len() {
                self.update_route(index);
            }
        }
    }

    /// Reads the vector table; bytes past its end are zero.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            let at = usize::try_from(offset).unwrap_or(usize::MAX).saturating_add(index);
            *byte = match self.entries.get(at / ENTRY_SIZE) {
                Some(entry) => entry.bytes()[at % ENTRY_SIZE],
                None => 0,
            };
        }
    }

    /// Writes the vector table: aligned accesses of 4 or 8 bytes, as §6.8.2 demands; others are
    /// ignored.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) {
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        if !matches!(data.len(), 4 | 8) || offset % data.len() != 0 {
            return;
        }
        let (index, within) = (offset / ENTRY_SIZE, offset % ENTRY_SIZE);
        let Some(entry) = self.entries.get_mut(index) else { return };
        let mut bytes = entry.bytes();
        bytes[within..within + data.len()].copy_from_slice(data);
        entry.load(bytes);
        self.update_route(index);
    }

    /// Reads the pending bits; bytes past their end are zero.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let pending = self.pending();
        for (index, byte) in data.iter_mut().enumerate() {
            let at = usize::try_from(offset).unwrap_or(usize::MAX).saturating_add(index);
            *byte = pending.get(at).copied().unwrap_or(0);
        }
    }

    fn pending(&self) -> Vec<u8> {
        let mut bits = vec![0_u8; self.entries.len().div_ceil(64) * 8];
        for (index, entry) in self.entries.iter().enumerate() {
            // With a route the interrupt is on its way and no longer pending.
            if entry.route.is_none() && is_readable(entry.vector.as_ref()) {
                bits[index / 8] |= 1 << (index % 8);
            }
        }
        bits
    }

    fn update_route(&mut self, index: usize) {
        let open = self.enabled && !self.all_masked;
        let Some(entry) = self.entries.get_mut(index) else { return };
        let route = (open && entry.control & VECTOR_MASKED == 0)
            .then_some(MsiMessage { address: entry.address, data: entry.data });
        if route == entry.route {
            return;
        }
        match entry.vector.set_route(route) {
            Ok(()) => entry.route = route,
            Err(error) => {
                tracing::error!(vector = index, ?route, %error, "an interrupt could not be routed");
            }
        }
    }
}

impl Entry {
    fn bytes(&self) -> [u8; ENTRY_SIZE] {
        let mut bytes = [0; ENTRY_SIZE];
        bytes[0..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.data.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.control.to_le_bytes());
        bytes
    }

    fn load(&mut self, bytes: [u8; ENTRY_SIZE]) {
        let [a0, a1, a2, a3, a4, a5, a6, a7, d0, d1, d2, d3, c0, _, _, _] = bytes;
        // Messages are double words: the low address bits are reserved.
        self.address = u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]) & !3;
        self.data = u32::from_le_bytes([d0, d1, d2, d3]);
        self.control = u32::from(c0) & VECTOR_MASKED;
    }
}

/// Whether the vector was raised and nobody consumed it. Pending bits are read so seldom that a
/// descriptor kept open for them would be the greater waste.
fn is_readable(vector: &dyn MsiVector) -> bool {
    use std::os::fd::AsRawFd as _;
    let check = || {
        let poll = Epoll::new()?;
        let event = EpollEvent::new(EventSet::IN, 0);
        poll.ctl(ControlOperation::Add, vector.eventfd().as_raw_fd(), event)?;
        Ok::<_, std::io::Error>(poll.wait(0, &mut [EpollEvent::default()])? > 0)
    };
    check().unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use std::{io, sync::Mutex};

    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::*;

    struct Vector {
        fd: EventFd,
        route: Mutex<Option<MsiMessage>>,
    }

    impl MsiVector for Vector {
        fn eventfd(&self) -> &EventFd {
            &self.fd
        }

        fn set_route(&self, message: Option<MsiMessage>) -> io::Result<()> {
            *self.route.lock().unwrap() = message;
            Ok(())
        }
    }

    fn msix() -> (Vec<Arc<Vector>>, Msix) {
        let vectors: Vec<_> = (0..3)
            .map(|_| {
                let fd = EventFd::new(EFD_NONBLOCK).unwrap();
                Arc::new(Vector { fd, route: Mutex::new(None) })
            })
            .collect();
        let msix = Msix::new(vectors.iter().cloned().map(|vector| vector as Arc<dyn MsiVector>));
        (vectors, msix)
    }

    #[test]
    fn a_vector_is_routed_only_while_enabled_and_unmasked() {
        let (vectors, mut msix) = msix();
        let route = |index: usize| *vectors[index].route.lock().unwrap();
        let message = MsiMessage { address: 0xfee0_1000, data: 0x41 };
        msix.write_table(16, &0xfee0_1003_u64.to_le_bytes());
        msix.write_table(24, &0x41_u32.to_le_bytes());
        msix.write_table(28, &0_u32.to_le_bytes());
        assert_eq!(route(1), None, "not enabled yet");
        msix.set_control(0x8000);
        assert_eq!((route(0), route(1)), (None, Some(message)));
        msix.set_control(0xc000);
        assert_eq!(route(1), None, "function mask");
        msix.set_control(0x8000);
        msix.write_table(28, &1_u32.to_le_bytes());
        assert_eq!(route(1), None, "vector mask");
        msix.write_table(28, &0_u32.to_le_bytes());
        msix.write_table(24, &0x42_u32.to_le_bytes());
        assert_eq!(route(1), Some(MsiMessage { data: 0x42, ..message }), "changed while open");
    }

    #[test]
    fn pending_is_an_unconsumed_event_of_a_masked_vector() {
        let (vectors, mut msix) = msix();
        msix.set_control(0x8000);
        vectors[2].fd.write(1).unwrap();
        let mut bits = [0xff; 8];
        msix.read_pending(0, &mut bits);
        assert_eq!(bits, [4, 0, 0, 0, 0, 0, 0, 0]);
        msix.read_pending(8, &mut bits);
        assert_eq!(bits, [0; 8], "past the end");
        vectors[2].fd.read().unwrap();
        msix.read_pending(0, &mut bits);
        assert_eq!(bits, [0; 8]);
    }

    #[test]
    fn odd_table_accesses_are_ignored() {
        let (_, mut msix) = msix();
        msix.write_table(1, &[0xaa; 4]);
        msix.write_table(0, &[0xaa; 2]);
        msix.write_table(4, &[0xaa; 8]);
        msix.write_table(48, &[0xaa; 4]);
        msix.write_table(u64::MAX - 7, &[0xaa; 8]);
        let mut table = [0xff; 64];
        msix.read_table(0, &mut table);
        let mut expected = [0; 64];
        for entry in 0..3 {
            expected[entry * 16 + 12] = 1;
        }
        assert_eq!(table, expected);
        msix.write_table(0, &[0xff; 8]);
        msix.write_table(8, &[0xff; 8]);
        msix.read_table(0, &mut table[..16]);
        assert_eq!(
            table[..16],
            [0xfc, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 1, 0, 0, 0]
        );
    }
}
