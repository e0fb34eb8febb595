//! The GPU socket, back end's side.
//!
//! Queue threads never wait for the front end: what they send goes out at once where the socket
//! takes it and is finished by the socket's own thread otherwise. What could pile up is kept as
//! state instead of messages (cursors here, scanouts and damage in [`crate::scanout`]) and turned
//! into messages when there is room, so a front end that stops reading costs a bounded amount of
//! memory.

use std::{
    collections::VecDeque,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    thread,
};

use gpu_protocol::{
    socket::{CursorPos, Decoder, FromBackEnd, FromFrontEnd, Side},
    virtio::{CURSOR_BYTES, MAX_SCANOUTS},
};
use host::socket_io;
use rustix::{
    event::{EventfdFlags, PollFd, PollFlags},
    net::{RecvFlags, SendFlags},
};

/// What the socket's thread tells its owner.
pub trait Listener: Send + Sync {
    /// A message arrived, with its descriptor if it has one.
    fn message(&self, message: FromFrontEnd, fd: Option<OwnedFd>);
    /// The socket took everything: there is room for [`Link::send`] again.
    fn room(&self);
    /// The connection `generation` ended.
    fn closed(&self, generation: u64);
}

/// A 64 × 64 cursor image, B, G, R, A.
pub type CursorImage = Box<[u8; CURSOR_BYTES]>;

#[derive(Default)]
struct Cursor {
    image: Option<CursorImage>,
    hot: (u32, u32),
    pos: (u32, u32),
    visible: bool,
    image_dirty: bool,
    pos_dirty: bool,
}

#[derive(Default)]
struct Inner {
    socket: Option<Arc<UnixStream>>,
    generation: u64,
    out: Vec<u8>,
    sent: usize,
    /// Somebody found no room and is to be told when there is some, whoever makes it.
    refused: bool,
    /// Descriptors, and with which byte of `out` each goes.
    fds: VecDeque<(usize, OwnedFd)>,
    cursors: [Cursor; MAX_SCANOUTS],
}

impl Inner {
    /// Drops what was not sent.
    fn forget(&mut self) {
        self.out.clear();
        self.fds.clear();
        self.sent = 0;
    }
}

/// The sending half and the cursors, shared by all threads.
pub struct Link {
    inner: Mutex<Inner>,
    wake: OwnedFd,
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link").field("connected", &self.lock().socket.is_some()).finish()
    }
}

impl Link {
    /// A link without a connection.
    pub fn new() -> io::Result<Arc<Self>> {
        let wake = rustix::event::eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        Ok(Arc::new(Self { inner: Mutex::new(Inner::default()), wake }))
    }

    /// Uses `socket` from now on, in place of an earlier one, and starts its thread. Returns the
    /// number of the connection.
    pub fn connect(
        self: &Arc<Self>,
        socket: UnixStream,
        listener: Weak<dyn Listener>,
    ) -> io::Result<u64> {
        socket.set_nonblocking(true)?;
        let socket = Arc::new(socket);
        let generation = {
            let mut inner = self.lock();
            if let Some(old) = inner.socket.replace(socket.clone()) {
                let _ = old.shutdown(std::net::Shutdown::Both);
            }
            inner.forget();
            inner.generation += 1;
            for cursor in &mut inner.cursors {
                cursor.image_dirty = cursor.image.is_some();
                cursor.pos_dirty = cursor.image_dirty;
            }
            inner.generation
        };
        let reader = Reader { link: self.clone(), socket, listener, generation };
        thread::Builder::new().name("gpu-socket".into()).spawn(move || reader.run())?;
        Ok(generation)
    }

    /// Whether there is a connection.
    pub fn is_connected(&self) -> bool {
        self.lock().socket.is_some()
    }

    /// The number of the present or last connection.
    pub fn generation(&self) -> u64 {
        self.lock().generation
    }

    /// Whether there is a connection whose socket has taken all that was sent. If it has not,
    /// [`Listener::room`] is called as soon as it has.
    pub fn has_room(&self) -> bool {
        let mut inner = self.lock();
        let has_room = inner.socket.is_some() && inner.out.is_empty();
        inner.refused |= !has_room;
        has_room
    }

    /// Sends a message, at once or by and by. For messages whose number is bounded by design;
    /// anything else asks [`has_room`](Self::has_room) first.
    pub fn send(&self, message: &FromBackEnd<'_>) {
        let mut inner = self.lock();
        if inner.socket.is_some() {
            message.encode(&mut inner.out);
            self.flush(&mut inner);
        }
    }

    /// The same with a descriptor.
    pub fn send_with(&self, message: &FromBackEnd<'_>, fd: OwnedFd) {
        let mut inner = self.lock();
        if inner.socket.is_some() {
            let at = inner.out.len();
            inner.fds.push_back((at, fd));
            message.encode(&mut inner.out);
            self.flush(&mut inner);
        }
    }

    /// A new cursor image at `pos`.
    pub fn cursor_define(
        &self,
        scanout: u32,
        pos: (u32, u32),
        hot: (u32, u32),
        image: CursorImage,
    ) {
        let mut inner = self.lock();
        if let Some(cursor) = inner.cursors.get_mut(scanout as usize) {
            cursor.image = Some(image);
            cursor.hot = hot;
            cursor.pos = pos;
            cursor.visible = true;
            cursor.image_dirty = true;
            self.flush(&mut inner);
        }
    }

    /// The cursor is at `pos` now.
    pub fn cursor_move(&self, scanout: u32, pos: (u32, u32)) {
        let mut inner = self.lock();
        if let Some(cursor) = inner.cursors.get_mut(scanout as usize) {
            cursor.pos = pos;
            cursor.pos_dirty |= cursor.visible;
            self.flush(&mut inner);
        }
    }

    /// No cursor is to be seen.
    pub fn cursor_hide(&self, scanout: u32) {
        let mut inner = self.lock();
        if let Some(cursor) = inner.cursors.get_mut(scanout as usize) {
            cursor.pos_dirty |= cursor.visible;
            cursor.visible = false;
            cursor.image_dirty = false;
            self.flush(&mut inner);
        }
    }

    /// Forgets all cursors, as after a reset.
    pub fn reset_cursors(&self) {
        for scanout in 0..MAX_SCANOUTS as u32 {
            self.cursor_hide(scanout);
        }
    }

    /// Lets the socket's thread look for room again.
    fn wake(&self) {
        // The counter cannot overflow in practice; a full one wakes just as well.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends what the socket takes: first bytes of earlier messages, then cursors.
    fn flush(&self, inner: &mut Inner) {
        loop {
            if inner.out.is_empty() && !encode_cursor(inner) {
                return;
            }
            let Some(socket) = &inner.socket else { return };
            // A descriptor goes with the first byte of its message, so bytes before it go alone.
            let mut fds = inner.fds.iter();
            let (own, end) = match fds.next() {
                Some((at, fd)) if *at == inner.sent => (Some(fd.as_fd()), fds.next()),
                next => (None, next),
            };
            let end = end.map_or(inner.out.len(), |(at, _)| *at);
            let rest = &inner.out[inner.sent..end];
            match socket_io::send(socket, rest, own.as_slice(), SendFlags::DONTWAIT) {
                Ok(count) => {
                    if own.is_some() && count > 0 {
                        inner.fds.pop_front();
                    }
                    inner.sent += count;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.wake();
                    return;
                }
                Err(_) => {
                    // The reading side sees the same end and reports it.
                    inner.forget();
                    inner.socket = None;
                    return;
                }
            }
            if inner.sent == inner.out.len() {
                inner.out.clear();
                inner.sent = 0;
                if inner.refused {
                    self.wake();
                }
            }
        }
    }
}

/// Appends the message for one cursor that changed; `false` if none did.
fn encode_cursor(inner: &mut Inner) -> bool {
    let Inner { cursors, out, .. } = inner;
    for (scanout, cursor) in cursors.iter_mut().enumerate() {
        if !cursor.image_dirty && !cursor.pos_dirty {
            continue;
        }
        let pos = CursorPos { scanout: scanout as u32, x: cursor.pos.0, y: cursor.pos.1 };
        match &cursor.image {
            _ if !cursor.visible => FromBackEnd::CursorHide(pos).encode(out),
            Some(image) if cursor.image_dirty => {
                let (hot_x, hot_y) = cursor.hot;
                FromBackEnd::CursorUpdate { pos, hot_x, hot_y, image: &image[..] }.encode(out);
            }
            _ => FromBackEnd::CursorPos(pos).encode(out),
        }
        cursor.image_dirty = false;
        cursor.pos_dirty = false;
        return true;
    }
    false
}

/// The socket's thread.
struct Reader {
    link: Arc<Link>,
    socket: Arc<UnixStream>,
    listener: Weak<dyn Listener>,
    generation: u64,
}

impl Reader {
    fn run(self) {
        match self.serve() {
            Ok(()) => tracing::debug!("the front end closed the GPU socket"),
            Err(error) => tracing::error!(%error, "the GPU socket is closed"),
        }
        {
            let mut inner = self.link.lock();
            if inner.generation == self.generation {
                inner.socket = None;
                inner.forget();
            }
        }
        if let Some(listener) = self.listener.upgrade() {
            listener.closed(self.generation);
        }
    }

    fn serve(&self) -> io::Result<()> {
        let mut decoder = Decoder::new(Side::BackEnd);
        let mut fds = VecDeque::new();
        let mut buffer = vec![0; 16 * 1024];
        loop {
            let Some(listener) = self.listener.upgrade() else { return Ok(()) };
            let (pending, room) = {
                let mut inner = self.link.lock();
                if inner.generation != self.generation {
                    return Ok(());
                }
                let pending = !inner.out.is_empty();
                (pending, !pending && std::mem::take(&mut inner.refused))
            };
            if room {
                listener.room();
            }
            drop(listener);
            let events = self.wait(pending)?;
            let Some(listener) = self.listener.upgrade() else { return Ok(()) };
            if events.contains(PollFlags::OUT) {
                self.link.flush(&mut self.link.lock());
            }
            if events.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) {
                match socket_io::receive(&self.socket, &mut buffer, &mut fds, RecvFlags::DONTWAIT) {
                    Ok(0) => return Ok(()),
                    Ok(count) => decoder.push(&buffer[..count]),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error),
                }
                while let Some(raw) = decoder.next_message().map_err(io::Error::other)? {
                    let message = FromFrontEnd::decode(&raw).map_err(io::Error::other)?;
                    let fd = match message.wants_fd() {
                        true => Some(fds.pop_front().ok_or_else(|| {
                            io::Error::other("a message came without its descriptor")
                        })?),
                        false => None,
                    };
                    listener.message(message, fd);
                }
            }
        }
    }

    fn wait(&self, pending: bool) -> io::Result<PollFlags> {
        let mut wanted = PollFlags::IN;
        wanted.set(PollFlags::OUT, pending);
        let wake = &self.link.wake;
        let mut fds = [PollFd::new(&*self.socket, wanted), PollFd::new(wake, PollFlags::IN)];
        match rustix::event::poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let events = fds[0].revents();
        if fds[1].revents().contains(PollFlags::IN) {
            let _ = rustix::io::read(wake, &mut [0; 8]);
        }
        Ok(events)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Read,
        sync::mpsc::{Sender, channel},
    };

    use super::*;

    struct Told(Mutex<Sender<()>>);

    impl Listener for Told {
        fn message(&self, _: FromFrontEnd, _: Option<OwnedFd>) {}
        fn room(&self) {
            let _ = self.0.lock().unwrap().send(());
        }
        fn closed(&self, _: u64) {}
    }

    /// The socket's thread only sees that there is nothing to be sent.
    #[test]
    fn who_found_no_room_is_told_of_it_whoever_made_it() {
        let link = Link::new().unwrap();
        let (socket, mut front_end) = UnixStream::pair().unwrap();
        socket.set_nonblocking(true).unwrap();
        let socket = Arc::new(socket);
        link.lock().socket = Some(socket.clone());
        let mut sent = 0;
        while link.has_room() {
            link.send(&FromBackEnd::GetDisplayInfo);
            sent += 1;
        }
        // The front end reads, and the next message takes the rest along.
        let mut bytes = vec![0; 12 * (sent - 1)];
        front_end.read_exact(&mut bytes).unwrap();
        link.send(&FromBackEnd::GetDisplayInfo);
        assert!(link.lock().out.is_empty());
        let (told, heard) = channel();
        let listener: Arc<dyn Listener> = Arc::new(Told(Mutex::new(told)));
        let weak = Arc::downgrade(&listener);
        let reader = Reader { link: link.clone(), socket, listener: weak, generation: 0 };
        let reader = thread::spawn(move || reader.run());
        heard.recv().unwrap();
        assert!(link.has_room());
        drop(front_end);
        reader.join().unwrap();
        assert!(heard.try_recv().is_err(), "once");
    }
}
