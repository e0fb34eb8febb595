//! The front end's half alone, with a back end that says what a test wants.

use std::{
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::Arc,
};

use gpu_protocol::socket::{Decoder, FromBackEnd, FromFrontEnd, ProtocolFeatures, Side};
use host::socket_io;
use rustix::net::RecvFlags;

use super::{
    super::display::{self, Display},
    sink::Sink,
    *,
};
use crate::virtio::shared_memory::SharedMemory;

/// The display's side and, as far as it matters, the back end's.
pub(super) struct Pair {
    pub(super) display: Arc<Display>,
    pub(super) sink: Arc<Sink>,
    back_end: UnixStream,
    decoder: Decoder,
}

impl Pair {
    /// The back end has agreed to all that is offered.
    pub(super) fn new(offered: ProtocolFeatures, region: Option<Arc<SharedMemory>>) -> Self {
        let display = Display::new(1, DisplayMode::new(64, 64), offered, region).unwrap();
        let (ours, back_end) = UnixStream::pair().unwrap();
        display.connect(ours).unwrap();
        let sink = Arc::new(Sink::default());
        display.set_sink(sink.clone());
        display.want_frames(0, 1000, false);
        let mut pair = Self { display, sink, back_end, decoder: Decoder::new(Side::BackEnd) };
        pair.tell(FromBackEnd::SetProtocolFeatures(offered.bits()), None);
        pair
    }

    /// A message of the back end.
    pub(super) fn tell(&mut self, message: FromBackEnd<'_>, fd: Option<OwnedFd>) {
        self.display.handle(message, fd);
        while let Some((sink, events)) = self.display.take_events() {
            display::deliver(&*sink, events);
        }
    }

    /// The next message to the back end.
    pub(super) fn hear(&mut self) -> FromFrontEnd {
        loop {
            if let Some(raw) = self.decoder.next_message().unwrap() {
                return FromFrontEnd::decode(&raw).unwrap();
            }
            let mut buffer = [0; 4096];
            let mut fds = Default::default();
            let flags = RecvFlags::DONTWAIT;
            let count = socket_io::receive(&self.back_end, &mut buffer, &mut fds, flags).unwrap();
            self.decoder.push(&buffer[..count]);
        }
    }
}
