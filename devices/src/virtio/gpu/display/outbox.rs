//! Messages to the back end, as far as its socket takes them.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use gpu_protocol::{
    frames::{WANT_FULL, WANT_ONE, Want},
    socket::{FromFrontEnd, ProtocolFeatures},
};
use host::socket_io;
use rustix::net::SendFlags;

use super::State;

/// A message on its way.
pub(super) struct Waiting {
    bytes: Vec<u8>,
    sent: usize,
    fd: Option<OwnedFd>,
}

impl State {
    pub(super) fn send(&mut self, message: &FromFrontEnd, fd: Option<OwnedFd>) {
        if self.socket.is_none() {
            return;
        }
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        self.waiting.push_back(Waiting { bytes, sent: 0, fd });
        self.flush();
    }

    pub(super) fn flush(&mut self) {
        while let (Some(socket), Some(first)) = (&self.socket, self.waiting.front_mut()) {
            let fd = first.fd.as_ref().filter(|_| first.sent == 0).map(AsFd::as_fd);
            let rest = &first.bytes[first.sent..];
            match socket_io::send(socket, rest, fd.as_slice(), SendFlags::DONTWAIT) {
                Ok(count) => first.sent += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // The server sees the end of the connection when it reads.
                Err(_) => {
                    self.waiting.clear();
                    return;
                }
            }
            if first.sent == first.bytes.len() {
                self.waiting.pop_front();
            }
        }
    }

    pub(super) fn has_shm(&self) -> bool {
        self.knows(ProtocolFeatures::SHM_FRAMES)
    }

    /// Whether the back end has agreed on a feature.
    pub(super) fn knows(&self, feature: ProtocolFeatures) -> bool {
        self.features.is_some_and(|features| features.contains(feature))
    }

    /// Tells what frames are wanted; if any, a complete one first.
    pub(super) fn send_want(&mut self, id: u32) {
        let Some(scanout) = self.scanouts.get(id as usize) else { return };
        let flags = if scanout.max_fps > 0 { WANT_FULL } else { 0 };
        self.send_want_with(id, flags);
    }

    /// The next frame is wanted, unless it has been asked for.
    pub(super) fn send_want_next(&mut self, id: u32) {
        let Some(scanout) = self.scanouts.get(id as usize) else { return };
        if scanout.one_by_one && scanout.max_fps > 0 && !scanout.asked {
            self.send_want_with(id, 0);
        }
    }

    fn send_want_with(&mut self, id: u32, flags: u32) {
        let has_shm = self.has_shm();
        let Some(scanout) = self.scanouts.get_mut(id as usize).filter(|_| has_shm) else { return };
        let one = if scanout.one_by_one && scanout.max_fps > 0 { WANT_ONE } else { 0 };
        let flags = flags | one;
        let want = Want { scanout: id, max_fps: scanout.max_fps, flags, reserved: 0 };
        scanout.asked = scanout.max_fps > 0;
        self.send(&FromFrontEnd::Want(want), None);
    }
}
