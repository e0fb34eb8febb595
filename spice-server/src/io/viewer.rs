//! One thread per display channel: takes damage, encodes it from the newest frame, sends it.
//!
//! Nothing is encoded before the socket has taken what was encoded before, so a slow client gets
//! fewer and newer pictures, and a stalled one holds one message.

use std::{
    io::{self, Read, Write},
    net::TcpStream,
    os::fd::AsFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{
    pace::Pace,
    seen::{Seen, keep_columns},
    shared::{Command, Session, Shared},
    wake::Wake,
};
use crate::{
    Frame, Rect,
    display::{
        damage::Damage,
        handle::to_xrgb8888,
        state::{DisplayShared, HasWork, Work},
    },
    proto::{
        channel::{BaseMessage, Caps},
        display::{
            CAP_LZ4, ClientMessage, Compression, Surface, decode, limit, put_copy, put_fill,
            put_mark, put_monitors_config, put_surface_create, put_surface_destroy,
        },
        framing::{Deframer, Framer, HeaderKind},
        image::{Coding, put_image, put_surface_image},
    },
};

/// Shortest mean time between two pictures.
const FRAME_INTERVAL: Duration = Duration::from_micros(16_667);
/// How long a picture must rest before its lossy parts are drawn exactly.
const REFINE_AFTER: Duration = Duration::from_millis(300);
/// Quality of lossy parts, 1 to 100.
const JPEG_QUALITY: u8 = 80;
/// Smallest part, in bytes of pixels, that may be lossy.
const MIN_LOSSY: usize = 64 * 64 * 4;
/// How long a new viewer waits for a picture that is being made for it.
const FIRST_PICTURE: Duration = Duration::from_secs(1);
/// How long buffers stay allocated while nothing moves.
const KEEP_BUFFERS: Duration = Duration::from_secs(2);
/// Encoded bytes worth a write of their own.
const WRITE_SIZE: usize = 64 * 1024;

/// How the reactor stops a viewer.
#[derive(Clone)]
pub(crate) struct ViewerHandle {
    closed: Arc<AtomicBool>,
    wake: Arc<Wake>,
}

impl ViewerHandle {
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.wake.wake();
    }
}

/// A display channel that has finished its link.
pub(crate) struct NewViewer {
    pub(crate) shared: Arc<Shared>,
    pub(crate) session: Arc<Session>,
    pub(crate) display: u8,
    pub(crate) stream: TcpStream,
    pub(crate) header: HeaderKind,
    pub(crate) caps: Caps,
    /// Bytes the client sent after its ticket.
    pub(crate) received: Vec<u8>,
    /// Bytes of the link that have not been sent.
    pub(crate) unsent: Vec<u8>,
}

impl NewViewer {
    /// Starts the channel's thread.
    pub(crate) fn spawn(self) -> io::Result<(ViewerHandle, JoinHandle<()>)> {
        let handle = ViewerHandle { closed: Arc::default(), wake: Arc::new(Wake::new()?) };
        let for_thread = handle.clone();
        let thread = std::thread::Builder::new()
            .name(format!("spice-view-{}", self.display))
            .spawn(move || run(self, for_thread))?;
        Ok((handle, thread))
    }
}

fn run(new: NewViewer, handle: ViewerHandle) {
    let shared = new.shared.clone();
    let (session, number) = (new.session.id, new.display);
    let Some(source) = shared.displays.get(usize::from(number)).cloned() else { return };
    let id = source.add_viewer(handle.wake.clone());
    shared.count_viewer(true);
    let _registration = Registration { shared, source: source.clone(), id, session, number };
    let mut viewer = Viewer {
        id,
        source,
        deframer: Deframer::new(new.header),
        framer: Framer::new(new.header),
        session: new.session,
        stream: new.stream,
        out: new.unsent,
        sent: 0,
        pixels: Vec::new(),
        shown: None,
        staging: None,
        lz4: new.caps.has(CAP_LZ4),
        // Whoever knows LZ4 is spice-gtk or a relative; browsers' clients know neither.
        modern: new.caps.has(CAP_LZ4),
        mark_due: false,
        pace: Pace::default(),
        seen: Seen::new((0, 0)),
        lossy: None,
        refine_at: Instant::now(),
        next_sweep: Instant::now(),
        black_at: Instant::now() + FIRST_PICTURE,
        handle,
    };
    viewer.deframer.receive(&new.received);
    match viewer.serve() {
        Ok(()) => {}
        Err(error) if is_hangup(&error) => {
            tracing::debug!(session, number, %error, "display channel gone");
        }
        Err(error) => tracing::warn!(session, number, %error, "display channel failed"),
    }
}

/// Tells everybody that the viewer is gone when dropped, even by a panic in the program's frame.
struct Registration {
    shared: Arc<Shared>,
    source: Arc<DisplayShared>,
    id: u64,
    session: u32,
    number: u8,
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.source.remove_viewer(self.id);
        self.shared.count_viewer(false);
        self.shared.command(Command::ViewerGone { session: self.session, display: self.number });
    }
}

/// Whether an error only says that the client left.
pub(crate) fn is_hangup(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionReset
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::UnexpectedEof
            | io::ErrorKind::TimedOut
    )
}

struct Viewer {
    id: u64,
    source: Arc<DisplayShared>,
    deframer: Deframer,
    framer: Framer,
    session: Arc<Session>,
    stream: TcpStream,
    /// Encoded messages; `sent` bytes of them are with the kernel.
    out: Vec<u8>,
    sent: usize,
    /// Pixels of the part being encoded.
    pixels: Vec<u8>,
    /// Size of the client's surface.
    shown: Option<(u32, u32)>,
    /// Size of the surface that collects a new picture, while there is one.
    staging: Option<(u32, u32)>,
    lz4: bool,
    /// The client knows LZ4 and a second surface.
    modern: bool,
    /// The client waits for `MARK` to show its surface.
    mark_due: bool,
    pace: Pace,
    /// What the client shows.
    seen: Seen,
    /// What was drawn with a lossy coding and not yet exactly.
    lossy: Option<Damage>,
    /// When the picture has rested long enough to be drawn exactly.
    refine_at: Instant,
    /// When the next picture may begin.
    next_sweep: Instant,
    /// When black is better than nothing, if no picture has come.
    black_at: Instant,
    handle: ViewerHandle,
}

impl Viewer {
    fn serve(&mut self) -> io::Result<()> {
        let mut sweeping = false;
        self.read_messages()?;
        while !self.handle.closed.load(Ordering::Acquire) {
            if self.out.len() - self.sent >= WRITE_SIZE && !self.write()? {
                self.wait(true, None)?;
                continue;
            }
            if !sweeping && let Some(due) = self.next_work_at() {
                let now = Instant::now();
                if now >= due {
                    // An interval of credit evens out a source that ticks unevenly.
                    let earliest = now.checked_sub(FRAME_INTERVAL).unwrap_or(now);
                    self.next_sweep = self.next_sweep.max(earliest) + FRAME_INTERVAL;
                    self.source.begin_sweep(self.id);
                    sweeping = true;
                }
            }
            if sweeping {
                sweeping = self.step();
                continue;
            }
            if !self.write()? {
                self.wait(true, None)?;
                continue;
            }
            let now = Instant::now();
            let pause = if let Some(due) = self.next_work_at() {
                Some(due.saturating_duration_since(now))
            } else if let Some(lossy) = &mut self.lossy {
                if now >= self.refine_at {
                    lossy.begin_sweep();
                    self.refine();
                    continue;
                }
                Some(self.refine_at - now)
            } else if self.pixels.capacity() > 0 {
                Some(KEEP_BUFFERS)
            } else {
                None
            };
            if !self.wait(false, pause)? && pause == Some(KEEP_BUFFERS) {
                self.pixels = Vec::new();
                self.out = Vec::new();
            }
        }
        Ok(())
    }

    /// When the next sweep may begin, if there is anything to do.
    fn next_work_at(&self) -> Option<Instant> {
        match self.source.has_work(self.id, self.target().1) {
            HasWork::No => None,
            HasWork::Yes => Some(self.next_sweep),
            HasWork::OnlyBlack => Some(self.next_sweep.max(self.black_at)),
        }
    }

    /// Does one piece of a sweep; `false` at its end.
    fn step(&mut self) -> bool {
        match self.source.next_work(self.id, self.target().1) {
            Work::Surface(size) => {
                self.show_surface(size);
                self.fill_black(size);
                put_mark(&mut self.framer, &mut self.out);
                true
            }
            Work::FrameSurface(size) if !self.modern => {
                self.show_surface(size);
                self.mark_due = true;
                self.seen = Seen::new(size);
                self.source.begin_sweep(self.id);
                true
            }
            Work::FrameSurface(size) => {
                // The parts of a new picture meet on a surface the client does not show, and
                // appear together: no half-painted first frame, no flicker when the size changes.
                self.drop_staging();
                let staging = Surface::Staging;
                put_surface_create(&mut self.framer, &mut self.out, staging, size);
                self.staging = Some(size);
                self.seen = Seen::new(size);
                self.source.begin_sweep(self.id);
                true
            }
            Work::Blank => {
                if let Some(size) = self.target().1 {
                    self.fill_black(size);
                }
                true
            }
            Work::Draw(frame, rect) => {
                self.draw(frame, rect, false);
                true
            }
            Work::Done => {
                self.show_staging();
                if std::mem::take(&mut self.mark_due) {
                    put_mark(&mut self.framer, &mut self.out);
                }
                false
            }
        }
    }

    /// Where drawing goes, and its size.
    fn target(&self) -> (Surface, Option<(u32, u32)>) {
        match self.staging {
            Some(size) => (Surface::Staging, Some(size)),
            None => (Surface::Primary, self.shown),
        }
    }

    /// Replaces what the client shows by a surface of this size.
    fn show_surface(&mut self, size: (u32, u32)) {
        if self.shown.is_some() {
            put_surface_destroy(&mut self.framer, &mut self.out, Surface::Primary);
        }
        put_surface_create(&mut self.framer, &mut self.out, Surface::Primary, size);
        put_monitors_config(&mut self.framer, &mut self.out, size);
        if self.shown.replace(size) != Some(size) {
            self.lossy = self.lossy.take().filter(|_| self.staging == Some(size));
        }
    }

    /// Shows the collected picture.
    fn show_staging(&mut self) {
        let Some(size) = self.staging else { return };
        if self.shown != Some(size) {
            self.show_surface(size);
        }
        let rect = Rect::new(0, 0, size.0, size.1);
        put_copy(&mut self.framer, &mut self.out, Surface::Primary, rect, |out| {
            put_surface_image(out, size, Surface::Staging);
        });
        self.drop_staging();
        self.mark_due = true;
    }

    fn drop_staging(&mut self) {
        if self.staging.take().is_some() {
            put_surface_destroy(&mut self.framer, &mut self.out, Surface::Staging);
        }
    }

    fn fill_black(&mut self, (width, height): (u32, u32)) {
        let rect = Rect::new(0, 0, width, height);
        let surface = self.target().0;
        self.seen = Seen::new((width, height));
        put_fill(&mut self.framer, &mut self.out, surface, rect, 0);
    }

    /// Encodes a part of a frame; `exact` forbids lossy codings.
    fn draw(&mut self, frame: Arc<dyn Frame>, rect: Rect, exact: bool) {
        let stride = rect.width as usize * 4;
        self.pixels.resize(stride * rect.height as usize, 0);
        frame.copy_rect(rect, &mut self.pixels, stride);
        to_xrgb8888(frame.format(), &mut self.pixels);
        // The frame's slot is free again before the encoder has done its work.
        drop(frame);
        let (surface, target) = self.target();
        let Some(target) = target else { return };
        let rect = if exact {
            rect
        } else {
            let Some(part) = self.seen.unseen(rect, &self.pixels) else { return };
            keep_columns(&mut self.pixels, rect, part);
            part
        };
        let size = (rect.width, rect.height);
        let raw = self.pixels.len();
        let may_lose = !exact && raw >= MIN_LOSSY && self.pace.is_slow(Instant::now());
        let mut coding = if self.lz4 { Coding::Lz4 } else { Coding::Raw };
        put_copy(&mut self.framer, &mut self.out, surface, rect, |out| {
            let start = out.len();
            coding = put_image(out, size, &self.pixels, coding);
            // What LZ4 cannot shrink is a photograph or a film, where JPEG is at its best; text and
            // other flat pictures never come here.
            if may_lose && out.len() - start > raw / 10 * 6 && !is_flat(&self.pixels) {
                out.truncate(start);
                coding = put_image(out, size, &self.pixels, Coding::Jpeg(JPEG_QUALITY));
            }
        });
        if matches!(coding, Coding::Jpeg(_)) {
            let (width, height) = target;
            self.seen.forget(rect);
            self.lossy.get_or_insert_with(|| Damage::new(width, height)).add(rect);
            self.refine_at = Instant::now() + REFINE_AFTER;
            self.pace.lossy();
        }
    }

    /// Draws one lossy part again, exactly; `false` if there is none.
    fn refine(&mut self) -> bool {
        let (frame, rect) = (self.source.frame(), self.lossy.as_mut().and_then(Damage::take));
        match (frame, rect) {
            (Some(frame), Some(rect)) if Some((frame.width(), frame.height())) == self.shown => {
                self.draw(frame, rect, true);
                true
            }
            _ => {
                self.lossy = None;
                false
            }
        }
    }

    /// Writes what there is; `false` if the socket is full.
    fn write(&mut self) -> io::Result<bool> {
        while let Some(rest) = self.out.get(self.sent..).filter(|rest| !rest.is_empty()) {
            match self.stream.write(rest) {
                Ok(0) => return Err(io::ErrorKind::BrokenPipe.into()),
                Ok(count) => {
                    self.sent += count;
                    self.pace.took(count);
                    self.session.sent.fetch_add(count as u64, Ordering::Relaxed);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.pace.full(Instant::now());
                    return Ok(false);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.out.clear();
        self.sent = 0;
        self.pace.drained(Instant::now());
        Ok(true)
    }

    /// Waits for the client, for damage, for room in the socket if `blocked`, or for the pause's
    /// end (`false`).
    fn wait(&mut self, blocked: bool, pause: Option<Duration>) -> io::Result<bool> {
        let mut interest = PollFlags::IN;
        if blocked {
            interest |= PollFlags::OUT;
        }
        let timeout = pause.map(|pause| Timespec {
            tv_sec: pause.as_secs() as i64,
            tv_nsec: pause.subsec_nanos().into(),
        });
        let (readable, woken) = {
            let mut fds = [
                PollFd::from_borrowed_fd(self.stream.as_fd(), interest),
                PollFd::from_borrowed_fd(self.handle.wake.as_fd(), PollFlags::IN),
            ];
            match poll(&mut fds, timeout.as_ref()) {
                Ok(0) => return Ok(false),
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => return Ok(true),
                Err(error) => return Err(error.into()),
            }
            let [stream, wake] = fds.map(|fd| fd.revents());
            (stream.intersects(!PollFlags::OUT), wake.contains(PollFlags::IN))
        };
        if woken {
            self.handle.wake.clear();
        }
        if readable {
            self.read()?;
        }
        Ok(true)
    }

    fn read(&mut self) -> io::Result<()> {
        let mut buffer = [0; 4096];
        match self.stream.read(&mut buffer) {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                self.session.received.fetch_add(count as u64, Ordering::Relaxed);
                self.deframer.receive(buffer.get(..count).unwrap_or_default());
                self.read_messages()
            }
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn read_messages(&mut self) -> io::Result<()> {
        let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, error);
        while let Some((kind, body)) = self.deframer.next_message(limit).map_err(invalid)? {
            match decode(kind, body).map_err(invalid)? {
                ClientMessage::PreferredCompression(Compression::Off) => self.lz4 = false,
                ClientMessage::PreferredCompression(Compression::Lz4) => self.lz4 = true,
                ClientMessage::Base(BaseMessage::Disconnecting) => {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                ClientMessage::PreferredCompression(Compression::Automatic) => {
                    self.lz4 = self.modern;
                }
                ClientMessage::Base(_) | ClientMessage::Init | ClientMessage::Ignored => {}
            }
        }
        Ok(())
    }
}

/// Whether many neighbouring pixels are equal, as in text and drawings.
fn is_flat(pixels: &[u8]) -> bool {
    let (mut equal, mut all) = (0usize, 0usize);
    for pair in pixels.chunks_exact(8) {
        equal += usize::from(pair.get(..3) == pair.get(4..7));
        all += 1;
    }
    equal * 4 > all
}
