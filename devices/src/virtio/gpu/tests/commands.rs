//! What a driver writes into its queues, and the memory that it does so in.

use gpu_protocol::{
    format::PixelFormat,
    virtio::{
        AttachBacking, CreateBlob, CtrlHdr, CursorPos, MemEntry, ResourceCommand, ResourceCreate2d,
        ResourceFlush, SetScanout, SetScanoutBlob, TransferToHost2d, UpdateCursor, blob_mem, kind,
    },
};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use zerocopy::IntoBytes;

use super::*;
use crate::virtio::testing::MEMORY_SIZE;

/// Guest physical address of the second region, where the pixels of the tests are.
pub(super) const HIGH: u64 = 5 << 30;
pub(super) const HIGH_SIZE: usize = 64 << 20;

/// Guest memory whose regions lie neither at their guest addresses nor at the start of the file.
pub(super) fn memory() -> GuestMemory {
    const LOW_AT: u64 = 0x30_0000;
    const HIGH_AT: u64 = 0x10_0000 + LOW_AT + MEMORY_SIZE as u64;
    let fd = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = std::fs::File::from(fd);
    file.set_len(HIGH_AT + HIGH_SIZE as u64).unwrap();
    let again = file.try_clone().unwrap();
    GuestMemoryMmap::from_ranges_with_files([
        (GuestAddress(0), MEMORY_SIZE, Some(FileOffset::new(file, LOW_AT))),
        (GuestAddress(HIGH), HIGH_SIZE, Some(FileOffset::new(again, HIGH_AT))),
    ])
    .unwrap()
}

pub(super) fn show(resource: u32, rect: Rect) -> SetScanout {
    SetScanout {
        hdr: CtrlHdr::new(kind::SET_SCANOUT),
        rect: rect.into(),
        scanout_id: 0.into(),
        resource_id: resource.into(),
    }
}

pub(super) fn cursor(kind: u32, x: u32, y: u32, resource: u32, hot: (u32, u32)) -> UpdateCursor {
    UpdateCursor {
        hdr: CtrlHdr::new(kind),
        pos: CursorPos { scanout_id: 0.into(), x: x.into(), y: y.into(), padding: 0.into() },
        resource_id: resource.into(),
        hot_x: hot.0.into(),
        hot_y: hot.1.into(),
        padding: 0.into(),
    }
}

/// A resource of the guest and where its pixels are.
#[derive(Debug, Clone, Copy)]
pub(super) struct Resource {
    pub(super) id: u32,
    pub(super) format: PixelFormat,
    pub(super) width: u32,
    pub(super) height: u32,
    pub(super) at: u64,
}

impl Resource {
    pub(super) fn new(id: u32, width: u32, height: u32) -> Self {
        Self { id, format: PixelFormat::B8G8R8X8, width, height, at: u64::from(id) * (8 << 20) }
    }

    pub(super) fn create(&self) -> Vec<u8> {
        let command = ResourceCreate2d {
            hdr: CtrlHdr::new(kind::RESOURCE_CREATE_2D),
            resource_id: self.id.into(),
            format: (self.format as u32).into(),
            width: self.width.into(),
            height: self.height.into(),
        };
        command.as_bytes().to_vec()
    }

    /// Pages in reverse order, the last one odd.
    pub(super) fn attach(&self) -> Vec<u8> {
        let command = AttachBacking {
            hdr: CtrlHdr::new(kind::RESOURCE_ATTACH_BACKING),
            resource_id: self.id.into(),
            entries: (self.pages().len() as u32).into(),
        };
        self.with_pages(command.as_bytes())
    }

    /// The picture's memory itself is the resource.
    pub(super) fn create_blob(&self) -> Vec<u8> {
        let command = CreateBlob {
            hdr: CtrlHdr::new(kind::RESOURCE_CREATE_BLOB),
            resource_id: self.id.into(),
            blob_mem: blob_mem::GUEST.into(),
            blob_flags: 0.into(),
            entries: (self.pages().len() as u32).into(),
            blob_id: 0.into(),
            size: self.bytes().into(),
        };
        self.with_pages(command.as_bytes())
    }

    pub(super) fn show_blob(&self, part: Rect) -> SetScanoutBlob {
        let stride = (self.width * 4).into();
        SetScanoutBlob {
            hdr: CtrlHdr::new(kind::SET_SCANOUT_BLOB),
            rect: part.into(),
            scanout_id: 0.into(),
            resource_id: self.id.into(),
            width: self.width.into(),
            height: self.height.into(),
            format: (self.format as u32).into(),
            padding: 0.into(),
            strides: [stride, 0.into(), 0.into(), 0.into()],
            offsets: [0.into(); 4],
        }
    }

    fn with_pages(&self, command: &[u8]) -> Vec<u8> {
        let mut command = command.to_vec();
        for (address, length) in self.pages() {
            let entry =
                MemEntry { address: address.into(), length: length.into(), padding: 0.into() };
            command.extend_from_slice(entry.as_bytes());
        }
        command
    }

    pub(super) fn transfer(&self, rect: Rect) -> Vec<u8> {
        let command = TransferToHost2d {
            hdr: CtrlHdr::new(kind::TRANSFER_TO_HOST_2D),
            rect: rect.into(),
            offset: (u64::from(rect.y * self.width + rect.x) * 4).into(),
            resource_id: self.id.into(),
            padding: 0.into(),
        };
        command.as_bytes().to_vec()
    }

    pub(super) fn flush(&self, rect: Rect) -> Vec<u8> {
        let command = ResourceFlush {
            hdr: CtrlHdr::new(kind::RESOURCE_FLUSH),
            rect: rect.into(),
            resource_id: self.id.into(),
            padding: 0.into(),
        };
        command.as_bytes().to_vec()
    }

    pub(super) fn unref(&self) -> Vec<u8> {
        let hdr = CtrlHdr::new(kind::RESOURCE_UNREF);
        let command = ResourceCommand { hdr, resource_id: self.id.into(), padding: 0.into() };
        command.as_bytes().to_vec()
    }

    pub(super) fn whole(&self) -> Rect {
        Rect::of_size(self.width, self.height)
    }

    pub(super) fn bytes(&self) -> u64 {
        u64::from(self.width) * u64::from(self.height) * 4
    }

    /// Pieces of guest memory: pages, the first of them last in memory.
    pub(super) fn pages(&self) -> Vec<(u64, u32)> {
        let count = self.bytes().div_ceil(4096);
        (0..count)
            .map(|page| {
                let length = (self.bytes() - page * 4096).min(4096) as u32;
                (HIGH + self.at + (count - 1 - page) * 4096, length)
            })
            .collect()
    }

    pub(super) fn read(&self, memory: &GuestMemory) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (address, length) in self.pages() {
            let mut page = vec![0; length as usize];
            memory.read_slice(&mut page, GuestAddress(address)).unwrap();
            bytes.extend(page);
        }
        bytes
    }

    pub(super) fn write(&self, memory: &GuestMemory, mut bytes: &[u8]) {
        for (address, length) in self.pages() {
            let (now, later) = bytes.split_at(length as usize);
            memory.write_slice(now, GuestAddress(address)).unwrap();
            bytes = later;
        }
    }
}

/// Every pixel of every generation differs from its neighbours.
pub(super) fn noise(seed: u32) -> impl Fn(u32, u32) -> [u8; 4] {
    move |x, y| {
        let n = (x.wrapping_mul(2_654_435_761) ^ y.wrapping_mul(40_503) ^ seed.wrapping_mul(97))
            .wrapping_mul(2_246_822_519);
        n.to_le_bytes()
    }
}
