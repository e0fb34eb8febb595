//! The layout of the registers and the capabilities that describe it (VIRTIO 1.3 §4.1.4).
//!
//! Everything is in one 64-bit base address register; each structure has a page of its own.

use crate::pci::{
    config::ConfigSpace,
    msix::{self, Msix},
};

/// Index of the base address register (it takes two).
pub const BAR: u8 = 0;
/// Index of the one for shared memory (it takes two as well).
pub const SHARED_MEMORY_BAR: u8 = 2;

const PAGE: u64 = 0x1000;

/// Pages of the base address register.
#[derive(Debug)]
pub struct Layout;

impl Layout {
    /// Page of the common configuration (§4.1.4.3).
    pub const COMMON: u64 = 0;
    /// Page of the interrupt status (§4.1.4.5).
    pub const ISR: u64 = 1;
    /// Page of the device's own configuration (§4.1.4.6).
    pub const DEVICE: u64 = 2;
    /// Page of the notification addresses (§4.1.4.4).
    pub const NOTIFY: u64 = 3;
    /// Page of the MSI-X table.
    pub const MSIX_TABLE: u64 = 4;
    /// Page of the MSI-X pending bits.
    pub const MSIX_PENDING: u64 = 5;
    /// Size of the base address register.
    pub const SIZE: u64 = 8 * PAGE;
    /// Vectors that fit the table.
    pub const VECTORS: usize = PAGE as usize / msix::ENTRY_SIZE;
    /// Distance between the notification addresses of two queues.
    pub const NOTIFY_MULTIPLIER: u32 = 4;
    /// Size of the common configuration structure in VIRTIO 1.3.
    pub const COMMON_SIZE: u64 = 0x40;

    /// Splits an offset into page number and offset in that page.
    pub fn find(offset: u64) -> (u64, u64) {
        (offset / PAGE, offset % PAGE)
    }

    /// Offset of a queue's notification address.
    pub fn notify_offset(queue: usize) -> u64 {
        Self::NOTIFY * PAGE + queue as u64 * u64::from(Self::NOTIFY_MULTIPLIER)
    }
}

/// Capability id: vendor specific.
const VENDOR: u8 = 0x09;
const COMMON_CFG: u8 = 1;
const NOTIFY_CFG: u8 = 2;
const ISR_CFG: u8 = 3;
const DEVICE_CFG: u8 = 4;
const PCI_CFG: u8 = 5;
const SHARED_MEMORY_CFG: u8 = 8;

/// Adds all capabilities; returns the offsets of the MSI-X and the configuration access one.
pub(super) fn add_all(config: &mut ConfigSpace, msix: &Msix) -> (u16, u16) {
    let multiplier = Layout::NOTIFY_MULTIPLIER.to_le_bytes();
    // 5 × 16..20 + 12 bytes always fit behind the header, so no result can be missing.
    config.add_capability(VENDOR, &body(COMMON_CFG, Layout::COMMON, Layout::COMMON_SIZE, &[]), &[]);
    config.add_capability(VENDOR, &body(NOTIFY_CFG, Layout::NOTIFY, PAGE, &multiplier), &[]);
    config.add_capability(VENDOR, &body(ISR_CFG, Layout::ISR, 1, &[]), &[]);
    config.add_capability(VENDOR, &body(DEVICE_CFG, Layout::DEVICE, PAGE, &[]), &[]);
    // Bar, offset, length and data are the guest's to write.
    let access = [0, 0, 0xff, 0, 0, 0].into_iter().chain([0xff; 12]).collect::<Vec<u8>>();
    let pci_cfg = config.add_capability(VENDOR, &body(PCI_CFG, 0, 0, &[0; 4]), &access);
    let (table, writable) = msix.capability(
        BAR,
        (Layout::MSIX_TABLE * PAGE) as u32,
        (Layout::MSIX_PENDING * PAGE) as u32,
    );
    let msix = config.add_capability(msix::CAPABILITY, &table, &writable);
    (msix.unwrap_or_default(), pci_cfg.unwrap_or_default())
}

/// Adds the capability that says where the shared memory region `id` is (§4.1.4.7).
pub(super) fn add_shared_memory(config: &mut ConfigSpace, id: u8, size: u64) {
    // `struct virtio_pci_cap64` without its first two bytes; the region is the whole register.
    let mut bytes = vec![24, SHARED_MEMORY_CFG, SHARED_MEMORY_BAR, id, 0, 0];
    bytes.extend([0; 4]);
    bytes.extend((size as u32).to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(((size >> 32) as u32).to_le_bytes());
    // Fits behind the others (124 bytes).
    config.add_capability(VENDOR, &bytes, &[]);
}

/// `struct virtio_pci_cap` without its first two bytes.
fn body(kind: u8, page: u64, length: u64, extra: &[u8]) -> Vec<u8> {
    let mut bytes = vec![16 + extra.len() as u8, kind, BAR, 0, 0, 0];
    bytes.extend(((page * PAGE) as u32).to_le_bytes());
    bytes.extend((length as u32).to_le_bytes());
    bytes.extend(extra);
    bytes
}

/// An access to the registers through configuration space (§4.1.4.9).
#[derive(Debug)]
pub(super) struct PciCfgAccess {
    bar: u8,
    /// Offset in the base address register.
    pub(super) offset: u32,
    length: u32,
    /// The data field as it is now.
    pub(super) data: [u8; 4],
}

impl PciCfgAccess {
    /// Offset of the data field, given that of the capability.
    pub(super) fn data_offset(capability: u16) -> u16 {
        capability + 16
    }

    /// The access that `length` bytes at `offset` of configuration space cause: none unless they
    /// touch the data field.
    pub(super) fn find(
        config: &ConfigSpace,
        capability: u16,
        offset: u16,
        length: usize,
    ) -> Option<Self> {
        let start = usize::from(Self::data_offset(capability));
        let first = usize::from(offset);
        if first >= start + 4 || first + length <= start {
            return None;
        }
        let mut fields = [0; 16];
        config.read(capability + 4, &mut fields);
        let [bar, _, _, _, o0, o1, o2, o3, l0, l1, l2, l3, data @ ..] = fields;
        Some(Self {
            bar,
            offset: u32::from_le_bytes([o0, o1, o2, o3]),
            length: u32::from_le_bytes([l0, l1, l2, l3]),
            data,
        })
    }

    /// How many bytes to access, if the guest set the fields to something that is allowed.
    pub(super) fn valid_length(&self) -> Option<usize> {
        let valid = self.bar == BAR
            && matches!(self.length, 1 | 2 | 4)
            && self.offset.is_multiple_of(self.length)
            && u64::from(self.offset) + u64::from(self.length) <= Layout::SIZE;
        valid.then_some(self.length as usize)
    }
}
