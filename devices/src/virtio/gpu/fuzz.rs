//! Entry point for fuzzers: what a back end's messages do to the front end, without a back end.

use std::{
    io,
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::Arc,
};

use gpu_protocol::socket::{FromBackEnd, ProtocolFeatures};
use vmm_sys_util::eventfd::EventFd;

use super::{
    display::{self, Display},
    handle::{DisplayMode, GpuHandle},
};
use crate::{
    GuestMemory,
    virtio::{device::VirtioInterrupt, shared_memory::SharedMemory},
};

/// Interrupts of a driver that does not care.
struct Unheard;

impl VirtioInterrupt for Unheard {
    fn signal_used(&self, _: u16) {}

    fn signal_config_change(&self) {}

    fn set_needs_reset(&self) {}

    fn queue_eventfd(&self, _: u16) -> io::Result<EventFd> {
        EventFd::new(0)
    }
}

/// The front end's state, driven as the thread of the GPU socket does it.
#[derive(Debug)]
pub struct FrontEnd {
    display: Arc<Display>,
    connection: u64,
}

impl FrontEnd {
    /// With so many scanouts, and a shared memory region of so many bytes if not 0.
    pub fn new(scanouts: u32, host_memory: u64) -> io::Result<Self> {
        let region = match host_memory {
            0 => None,
            size => Some(SharedMemory::new(size)?),
        };
        let offered = ProtocolFeatures::all();
        let display = Display::new(scanouts, DisplayMode::new(1024, 768), offered, region)?;
        Ok(Self { display, connection: 0 })
    }

    /// What the VMM has of it.
    pub fn handle(&self) -> GpuHandle {
        GpuHandle { display: self.display.clone() }
    }

    /// A back end comes; what it is sent goes to `socket`.
    pub fn connect(&mut self, socket: UnixStream) -> io::Result<()> {
        self.connection = self.display.connect(socket)?;
        Ok(())
    }

    /// The back end goes.
    pub fn disconnect(&self) {
        self.display.disconnect(self.connection);
    }

    /// A driver comes.
    pub fn activate(&self, memory: GuestMemory) {
        self.display.set_driver(Arc::new(Unheard), memory);
    }

    /// The driver goes, of which the back end will tell if it said that it does.
    pub fn reset(&self) {
        self.display.expect_reset();
        self.display.reset();
    }

    /// Whether the back end would be listened to: not while it leaves unread what it is sent.
    pub fn listens(&self) -> bool {
        self.display.has_room()
    }

    /// Sends what waits.
    pub fn flush(&self) {
        self.display.flush();
    }

    /// A message came, with a descriptor or without; then the sink is told.
    pub fn receive(&self, message: FromBackEnd<'_>, fd: Option<OwnedFd>) {
        let fd = fd.filter(|_| message.wants_fd());
        self.display.handle(message, fd);
        self.tell();
    }

    /// Tells the sink what there is to be told.
    pub fn tell(&self) {
        while let Some((sink, events)) = self.display.take_events() {
            display::deliver(&*sink, events);
        }
    }
}

/// What the fuzzer found.
#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use gpu_protocol::{Rect, frames};

    use super::*;
    use crate::virtio::gpu::{CursorImage, DisplaySink, Frame};

    #[derive(Default)]
    struct Sink {
        sizes: Mutex<Vec<Option<(u32, u32)>>>,
        numbers: Mutex<Vec<u64>>,
    }

    impl DisplaySink for Sink {
        fn scanout(&self, _: u32, size: Option<(u32, u32)>) {
            self.sizes.lock().unwrap().push(size);
        }
        fn frame(&self, _: u32, frame: Frame, _: &[Rect]) {
            self.numbers.lock().unwrap().push(frame.sequence());
        }
        fn cursor_define(&self, _: u32, _: &CursorImage<'_>) {}
        fn cursor_move(&self, _: u32, _: u32, _: u32) {}
        fn cursor_hide(&self, _: u32) {}
    }

    fn watched() -> (FrontEnd, Arc<Sink>, UnixStream) {
        let mut front = FrontEnd::new(1, 0).unwrap();
        let (ours, peers) = UnixStream::pair().unwrap();
        front.connect(ours).unwrap();
        let sink = Arc::<Sink>::default();
        front.handle().set_sink(sink.clone());
        front.handle().want_frames(0, 60);
        front.tell();
        (front, sink, peers)
    }

    #[test]
    fn nobody_is_told_of_a_picture_of_an_impossible_size() {
        let (front, sink, _peers) = watched();
        sink.sizes.lock().unwrap().clear();
        for (width, height) in
            [(u32::MAX, u32::MAX), (1 << 31, 1 << 31), (16_385, 1), (16_384, 16_384)]
        {
            front.receive(FromBackEnd::Scanout { scanout: 0, width, height }, None);
        }
        front.receive(FromBackEnd::Scanout { scanout: 0, width: 8, height: 8 }, None);
        front.receive(FromBackEnd::Scanout { scanout: 0, width: 1 << 31, height: 1 << 31 }, None);
        assert_eq!(*sink.sizes.lock().unwrap(), [Some((8, 8)), None]);
    }

    #[test]
    fn numbers_of_frames_go_round() {
        let (front, sink, _peers) = watched();
        front.receive(FromBackEnd::SetProtocolFeatures(ProtocolFeatures::all().bits()), None);
        front.receive(FromBackEnd::Scanout { scanout: 0, width: 8, height: 8 }, None);
        let damage = vec![Rect::of_size(8, 8)];
        let frame =
            frames::Frame { generation: 1, sequence: u64::MAX, damage, ..Default::default() };
        front.receive(FromBackEnd::Frame(frame), None);
        front.receive(FromBackEnd::SetProtocolFeatures(0), None);
        let rect = Rect::of_size(8, 8);
        front.receive(FromBackEnd::Update { scanout: 0, rect, pixels: &[7; 256] }, None);
        let numbers = sink.numbers.lock().unwrap().clone();
        assert_eq!(numbers.first(), Some(&u64::MAX), "{numbers:?}");
        assert!(numbers.len() > 1 && numbers[1] == 0, "{numbers:?}");
    }
}
