//! What a viewer would see: frames in shared memory, cursors.

use std::{fs::File, os::fd::OwnedFd};

use gpu_protocol::{
    Rect,
    frames::{Frame, Release, ShmScanout, WANT_FULL, Want},
    socket::{Decoder, FromBackEnd, FromFrontEnd, ProtocolFeatures, Side},
    virtio::{CtrlHdr, RespDisplayInfo, kind},
};
use rustix::fs::{MemfdFlags, SealFlags};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};
use zerocopy::IntoBytes;

use super::FrontEnd;

/// A cursor as it was defined.
pub struct Cursor {
    pub scanout: u32,
    pub at: (u32, u32),
    pub hot: (u32, u32),
    pub image: Vec<u8>,
}

/// The front end's side of the GPU socket, with frames in shared memory.
pub struct Screen {
    decoder: Decoder,
    layouts: Vec<Option<(ShmScanout, MmapRegion)>>,
    generation: u32,
    wanted: [bool; 16],
    pub max_fps: u32,
    pub frames: u64,
    /// What [`Screen::pump`] met and nobody took.
    pub cursors: Vec<Cursor>,
}

impl Screen {
    /// Negotiates shared memory.
    pub fn new(front: &mut FrontEnd, max_fps: u32) -> Self {
        let mut decoder = Decoder::new(Side::FrontEnd);
        front.receive_until(&mut decoder, |m| *m == FromBackEnd::GetProtocolFeatures);
        let features = ProtocolFeatures::SHM_FRAMES | ProtocolFeatures::EDID;
        front.send(&FromFrontEnd::ProtocolFeatures(features.bits()), &[]);
        let layouts = (0..16).map(|_| None).collect();
        let wanted = [false; 16];
        Self { decoder, layouts, generation: 0, wanted, max_fps, frames: 0, cursors: Vec::new() }
    }

    /// Makes memory for a scanout.
    pub fn allocate(&mut self, front: &mut FrontEnd, scanout: u32, size: (u32, u32)) {
        self.generation += 1;
        let layout = ShmScanout::layout(scanout, self.generation, size.0, size.1, 3).unwrap();
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(rustix::fs::memfd_create("frames", flags).unwrap());
        let length = layout.checked_size().unwrap();
        file.set_len(length).unwrap();
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
        let fd = OwnedFd::from(file.try_clone().unwrap());
        let memory = MmapRegion::from_file(FileOffset::new(file, 0), length as usize).unwrap();
        front.send(&FromFrontEnd::ShmScanout(layout), &[fd]);
        self.layouts[scanout as usize] = Some((layout, memory));
        if !self.wanted[scanout as usize] {
            self.wanted[scanout as usize] = true;
            self.want(front, scanout, self.max_fps);
        }
    }

    /// Wants frames, or none.
    pub fn want(&mut self, front: &mut FrontEnd, scanout: u32, max_fps: u32) {
        let want = Want { scanout, max_fps, flags: WANT_FULL, reserved: 0 };
        front.send(&FromFrontEnd::Want(want), &[]);
    }

    /// Follows the back end until `scanout` has a frame of this size.
    pub fn frame(&mut self, front: &mut FrontEnd, scanout: u32) -> (Frame, Vec<u8>) {
        loop {
            let mut decoder = std::mem::replace(&mut self.decoder, Decoder::new(Side::FrontEnd));
            let mut resized = None;
            let mut frame = None;
            let mut cursor = None;
            front.receive_until(&mut decoder, |message| {
                match message {
                    FromBackEnd::Scanout { scanout, width, height } => {
                        resized = Some((*scanout, *width, *height));
                    }
                    FromBackEnd::Frame(new) => frame = Some(new.clone()),
                    FromBackEnd::CursorUpdate { pos, hot_x, hot_y, image } => {
                        cursor = Some(Cursor {
                            scanout: pos.scanout,
                            at: (pos.x, pos.y),
                            hot: (*hot_x, *hot_y),
                            image: image.to_vec(),
                        });
                    }
                    _ => return false,
                }
                true
            });
            self.decoder = decoder;
            self.cursors.extend(cursor);
            if let Some((scanout, width, height)) = resized {
                self.layouts[scanout as usize] = None;
                if width > 0 {
                    self.allocate(front, scanout, (width, height));
                }
            }
            let Some(frame) = frame else { continue };
            self.frames += 1;
            let Some((layout, _)) = &self.layouts[frame.scanout as usize] else { continue };
            if frame.generation != layout.generation {
                continue;
            }
            let pixels = self.pixels(&frame);
            let release = Release {
                scanout: frame.scanout,
                generation: frame.generation,
                slot: frame.slot,
                reserved: 0,
            };
            front.send(&FromFrontEnd::Release(release), &[]);
            if frame.scanout == scanout {
                return (frame, pixels);
            }
        }
    }

    /// Waits for the next cursor image.
    pub fn cursor(&mut self, front: &mut FrontEnd) -> Cursor {
        let mut cursor = None;
        front.receive_until(&mut self.decoder, |message| {
            if let FromBackEnd::CursorUpdate { pos, hot_x, hot_y, image } = message {
                let (at, hot) = ((pos.x, pos.y), (*hot_x, *hot_y));
                cursor = Some(Cursor { scanout: pos.scanout, at, hot, image: image.to_vec() });
            }
            cursor.is_some()
        });
        cursor.unwrap()
    }

    /// Returns when the device has done what it was told on the GPU socket: a question of the guest's
    /// goes there and back behind it.
    pub fn settle(&mut self, front: &mut FrontEnd) {
        let slot = front.submit(0, CtrlHdr::new(kind::GET_DISPLAY_INFO).as_bytes());
        front.receive_until(&mut self.decoder, |message| *message == FromBackEnd::GetDisplayInfo);
        let mut info = RespDisplayInfo::default();
        info.hdr.kind = kind::OK_DISPLAY_INFO.into();
        front.send(&FromFrontEnd::DisplayInfo(Box::new(info)), &[]);
        front.wait_for::<RespDisplayInfo>(0, slot);
    }

    /// All that is in the slots of a scanout.
    pub fn slots(&self, scanout: u32) -> Vec<u8> {
        let (_, memory) = self.layouts[scanout as usize].as_ref().unwrap();
        let mut bytes = vec![0; memory.size()];
        memory.as_volatile_slice().read_slice(&mut bytes, 0).unwrap();
        bytes
    }

    /// Overwrites the slots of a scanout.
    pub fn fill(&self, scanout: u32, value: u8) {
        let (_, memory) = self.layouts[scanout as usize].as_ref().unwrap();
        memory.as_volatile_slice().write_slice(&vec![value; memory.size()], 0).unwrap();
    }

    /// The picture without gaps between its rows; the fourth byte of each pixel is 0.
    fn pixels(&self, frame: &Frame) -> Vec<u8> {
        let (layout, memory) = self.layouts[frame.scanout as usize].as_ref().unwrap();
        let row = layout.width as usize * 4;
        let mut pixels = vec![0; row * layout.height as usize];
        for (line, target) in pixels.chunks_mut(row).enumerate() {
            let at =
                frame.slot as usize * layout.slot_size as usize + line * layout.stride as usize;
            memory.as_volatile_slice().read_slice(target, at).unwrap();
        }
        pixels.chunks_mut(4).for_each(|pixel| pixel[3] = 0);
        pixels
    }
}

/// All of a picture.
pub fn whole(size: (u32, u32)) -> Rect {
    Rect::of_size(size.0, size.1)
}
