//! One thread per display channel: takes frames in, encodes what changed, sends it.
//!
//! Nothing is encoded before the connection has room for it (see [`Flow`]), and always from the
//! newest frame, so a slow client gets fewer and newer pictures, and a stalled one holds one part.

use std::{
    io,
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
    flow::{Flow, MUTE},
    shared::{Command, Session, Shared, Traffic},
    stream::Stream,
    wake::Wake,
};
use crate::{
    ServerEvent, VideoCodec,
    display::{
        encoder::{Abilities, Encoder, Line},
        state::{DisplayShared, HasWork, Work},
        stats::{Counters, count, set},
    },
    proto::{
        channel::{BaseMessage, Caps, put_ping},
        display::{
            CAP_CODEC_H264, CAP_CODEC_MJPEG, CAP_CODEC_VP8, CAP_LZ4, CAP_MULTI_CODEC,
            CAP_SIZED_STREAM, CAP_STREAM_REPORT, ClientMessage, Compression, decode, limit,
        },
        framing::{Deframer, Framer, HeaderKind},
    },
};

/// Shortest mean time between two pictures.
const FRAME_INTERVAL: Duration = Duration::from_micros(16_667);
/// How long a new viewer waits for a picture that is being made for it.
const FIRST_PICTURE: Duration = Duration::from_secs(1);
/// How long buffers stay allocated while nothing moves.
const KEEP_BUFFERS: Duration = Duration::from_secs(2);
/// Encoded bytes worth a write of their own.
const WRITE_SIZE: usize = 64 * 1024;
/// How often the client is read before it is the picture's turn.
const READS: usize = 8;
/// While a picture is unfinished, the time between newer ones is at least so many times what looking
/// at one costs.
const UNFINISHED_PAUSE: u32 = 4;

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
    pub(crate) stream: Stream,
    pub(crate) traffic: Arc<Traffic>,
    pub(crate) header: HeaderKind,
    pub(crate) caps: Caps,
    /// [`LinkRequest::copies_surfaces`](crate::proto::link::LinkRequest::copies_surfaces).
    pub(crate) copies_surfaces: bool,
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
    let _registration =
        Registration { shared: shared.clone(), source: source.clone(), id, session, number };
    let stats = Arc::<Counters>::default();
    new.session.count_display(number, stats.clone());
    let has = |cap| new.caps.has(cap);
    let abilities = Abilities {
        modern: has(CAP_LZ4),
        surfaces: has(CAP_LZ4) && new.copies_surfaces,
        streams: has(CAP_MULTI_CODEC),
        reports: has(CAP_STREAM_REPORT),
        sized: has(CAP_SIZED_STREAM),
        local: new.session.peer.is_local(),
    };
    let mut encoder = Encoder::new(Framer::new(new.header), abilities, stats.clone());
    encoder.set_video(shared.config.video.clone(), |codec| match codec {
        VideoCodec::Mjpeg => has(CAP_CODEC_MJPEG),
        // Browsers' clients put it together for their media players, which have delays of their own.
        VideoCodec::Vp8 => has(CAP_CODEC_VP8) && abilities.modern,
        VideoCodec::H264 => has(CAP_CODEC_H264) && abilities.modern,
    });
    encoder.frame_cost = shared.config.keep_slow_codecs.then_some(Duration::ZERO);
    encoder.out = new.unsent;
    let now = Instant::now();
    let mut viewer = Viewer {
        id,
        number,
        source,
        clock: shared.clock,
        shared,
        deframer: Deframer::new(new.header),
        session: new.session,
        traffic: new.traffic,
        // Layers may hold something that poll does not know of.
        read_again: new.stream.is_layered(),
        stream: new.stream,
        sent: 0,
        accounted: encoder.out.len(),
        encoder,
        flow: Flow::new(now),
        next_sweep: now,
        sweep_cost: Duration::ZERO,
        black_at: now + FIRST_PICTURE,
        stats,
        handle,
    };
    viewer.session.note_received(&viewer.traffic, &new.received);
    viewer.deframer.receive(&new.received);
    let result = viewer.serve();
    viewer.stream.close();
    match result {
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
    /// Of its display.
    number: u8,
    shared: Arc<Shared>,
    source: Arc<DisplayShared>,
    /// When the multimedia clock was 0.
    clock: Instant,
    deframer: Deframer,
    session: Arc<Session>,
    traffic: Arc<Traffic>,
    stream: Stream,
    /// The connection's layers may hold more than was read.
    read_again: bool,
    encoder: Encoder,
    /// Bytes of the encoder's messages that are with the kernel, and that `flow` knows of.
    sent: usize,
    accounted: usize,
    flow: Flow,
    /// When the next picture may be looked at.
    next_sweep: Instant,
    /// What looking at the last one cost.
    sweep_cost: Duration,
    /// When black is better than nothing, if no picture has come.
    black_at: Instant,
    stats: Arc<Counters>,
    handle: ViewerHandle,
}

impl Viewer {
    fn serve(&mut self) -> io::Result<()> {
        self.read_messages()?;
        self.ping(true, Instant::now());
        while !self.handle.closed.load(Ordering::Acquire) {
            if self.read_again {
                self.read()?;
            }
            if self.encoder.out.len() - self.sent >= WRITE_SIZE && !self.write()? {
                self.flow.blocked();
                count(&self.stats.blocked, 1);
                self.wait(true, None)?;
                continue;
            }
            let now = Instant::now();
            let work = self.source.has_work(self.id, self.encoder.size());
            let look = self.next_look();
            let due = match work {
                HasWork::No => None,
                HasWork::Yes => Some(look),
                HasWork::OnlyBlack => Some(look.max(self.black_at)),
            };
            let paced = self.paced_until(now);
            let room = paced.is_none() && self.flow.has_room(now);
            if room && due.is_some_and(|due| now >= due) {
                self.take_in(now);
                continue;
            }
            if room && work != HasWork::Yes && (now >= look || !self.encoder.has_work()) {
                self.source.want_next();
            }
            if room && self.encoder.has_work() {
                self.step(now);
                if std::mem::take(&mut self.encoder.urgent) && !self.write()? {
                    self.flow.blocked();
                    self.wait(true, None)?;
                }
                continue;
            }
            if !room && paced.is_none() && (self.encoder.has_work() || due.is_some()) {
                self.flow.blocked();
                count(&self.stats.blocked, 1);
            }
            self.ping(true, now);
            if !self.write()? {
                self.wait(true, None)?;
                continue;
            }
            match paced {
                Some(until) => {
                    self.wait(false, Some(until.saturating_duration_since(now)))?;
                }
                None => self.idle(room, due, now)?,
            }
        }
        Ok(())
    }

    /// Everything encoded is with the kernel, and nothing can be encoded now.
    fn idle(&mut self, room: bool, due: Option<Instant>, now: Instant) -> io::Result<()> {
        let timer = self.encoder.next_timer();
        let pause = match (due, timer) {
            // Only the client's answer makes room, or that none comes.
            _ if !room => Some(MUTE),
            (None, None) => Some(KEEP_BUFFERS),
            (Some(due), _) if timer.is_none_or(|timer| timer > now) => {
                Some(timer.map_or(due, |timer| timer.min(due)).saturating_duration_since(now))
            }
            (_, Some(timer)) if timer <= now => {
                let line = self.line(now);
                self.encoder.timer(&line, now);
                self.account(now);
                return Ok(());
            }
            (_, timer) => timer.map(|timer| timer.saturating_duration_since(now)),
        };
        if !self.wait(false, pause)? && pause == Some(KEEP_BUFFERS) {
            self.encoder.rest();
            self.encoder.out = Vec::new();
        }
        Ok(())
    }

    /// Until when a film's next frame has to wait for the line.
    fn paced_until(&self, now: Instant) -> Option<Instant> {
        let at = self.encoder.is_streaming().then(|| self.flow.next_frame_at());
        at.filter(|at| *at > now)
    }

    fn line(&self, now: Instant) -> Line {
        Line {
            slow: self.flow.is_slow(now),
            rate: self.flow.rate(),
            waiting: self.flow.transfer(0, now),
            clock: now.saturating_duration_since(self.clock).as_millis() as u32,
        }
    }

    /// When the next frame may be looked at.
    fn next_look(&self) -> Instant {
        let wait = if self.encoder.has_work() {
            self.sweep_cost.min(FRAME_INTERVAL) * UNFINISHED_PAUSE
        } else {
            Duration::ZERO
        };
        self.next_sweep + wait
    }

    /// Looks at what there is to show.
    fn take_in(&mut self, now: Instant) {
        // An interval of credit evens out a source that ticks unevenly.
        let earliest = now.checked_sub(FRAME_INTERVAL).unwrap_or(now);
        self.next_sweep = self.next_sweep.max(earliest) + FRAME_INTERVAL;
        loop {
            match self.source.next_work(self.id, self.encoder.size()) {
                Work::Surface(size) => self.encoder.show_black(size, now),
                Work::FrameSurface(size) => self.encoder.begin_picture(size, now),
                Work::Blank => self.encoder.blacken(now),
                Work::Draw(frame, rects, frames) => {
                    count(&self.stats.skipped, frames.saturating_sub(1));
                    let line = self.line(now);
                    self.encoder.take_in(&*frame, &rects, frames, &line, now);
                    break;
                }
                Work::Done => break,
            }
        }
        self.sweep_cost = now.elapsed();
        self.account(now);
    }

    /// Encodes a part, or a run of them.
    fn step(&mut self, now: Instant) {
        let line = self.line(now);
        let flow = &self.flow;
        self.encoder.step(&line, |bytes| flow.transfer(bytes, now), now);
        self.account(now);
    }

    /// Tells the flow what was encoded.
    fn account(&mut self, now: Instant) {
        let bytes = self.encoder.out.len() - self.accounted;
        self.accounted += bytes;
        if bytes > 0 {
            self.flow.queued(bytes, std::mem::take(&mut self.encoder.lossy), now);
            self.ping(false, now);
        }
        if let Some((codec, why)) = self.encoder.take_news() {
            let (session, display) = (self.session.id, self.number.into());
            self.shared.emit(ServerEvent::VideoCodec { session, display, codec, why });
        }
    }

    fn ping(&mut self, at_end: bool, now: Instant) {
        if let Some(id) = self.flow.ping(at_end, now) {
            let (framer, out) = self.encoder.framer();
            put_ping(framer, out, id);
            self.accounted = self.encoder.out.len();
        }
    }

    /// Writes what there is; `false` if the socket is full.
    fn write(&mut self) -> io::Result<bool> {
        while let Some(rest) = self.encoder.out.get(self.sent..).filter(|rest| !rest.is_empty()) {
            match self.stream.write(rest) {
                Ok(0) => return Err(io::ErrorKind::BrokenPipe.into()),
                Ok(count) => {
                    self.sent += count;
                    self.session.count_sent(&self.traffic, count);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Ok(self.blocked());
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        match self.stream.flush() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(self.blocked()),
            result => result?,
        }
        self.encoder.out.clear();
        (self.sent, self.accounted) = (0, 0);
        set(&self.traffic.waiting, 0);
        set(&self.stats.in_flight, self.flow.in_flight());
        Ok(true)
    }

    /// The socket is full.
    fn blocked(&self) -> bool {
        set(&self.traffic.waiting, (self.encoder.out.len() - self.sent) as u64);
        false
    }

    /// Waits for the client, for damage, for room in the socket if `blocked`, or for the pause's
    /// end (`false`).
    fn wait(&mut self, blocked: bool, pause: Option<Duration>) -> io::Result<bool> {
        let mut interest = PollFlags::IN;
        if blocked {
            interest |= PollFlags::OUT;
        }
        let pause = if self.read_again { Some(Duration::ZERO) } else { pause };
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
                Ok(0) => return Ok(self.read_again),
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

    /// Reads what there is, or a fair share of it.
    fn read(&mut self) -> io::Result<()> {
        let mut buffer = [0; 4096];
        self.read_again = false;
        for _ in 0..READS {
            match self.stream.read(&mut buffer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => {
                    let bytes = buffer.get(..count).unwrap_or_default();
                    self.session.note_received(&self.traffic, bytes);
                    self.deframer.receive(bytes);
                    self.read_messages()?;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            if !self.stream.is_layered() {
                return Ok(());
            }
        }
        self.read_again = true;
        Ok(())
    }

    fn read_messages(&mut self) -> io::Result<()> {
        let now = Instant::now();
        let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, error);
        while let Some((kind, body)) = self.deframer.next_message(limit).map_err(invalid)? {
            match decode(kind, body).map_err(invalid)? {
                ClientMessage::PreferredCompression(Compression::Off) => {
                    self.encoder.prefer_lz4(Some(false));
                }
                ClientMessage::PreferredCompression(Compression::Lz4) => {
                    self.encoder.prefer_lz4(Some(true));
                }
                ClientMessage::PreferredCompression(Compression::Automatic) => {
                    self.encoder.prefer_lz4(None);
                }
                ClientMessage::PreferredCodecs(codecs) => self.encoder.prefer_codecs(codecs),
                ClientMessage::Init { cache_pixels } => self.encoder.set_cache(cache_pixels),
                ClientMessage::StreamReport(report) => {
                    self.encoder.report(report, now);
                    self.account(now);
                }
                ClientMessage::Base(BaseMessage::Pong(id)) => self.pong(id, now),
                ClientMessage::Base(BaseMessage::Disconnecting) => {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                ClientMessage::Base(BaseMessage::Ack) | ClientMessage::Ignored => {}
            }
        }
        Ok(())
    }

    fn pong(&mut self, id: u32, now: Instant) {
        self.flow.pong(id, now);
        let round_trip = self.flow.round_trip().unwrap_or(0.0) * 1e6;
        set(&self.stats.in_flight, self.flow.in_flight());
        set(&self.stats.round_trip_microseconds, round_trip as u64);
        set(&self.stats.line_rate, self.flow.rate().unwrap_or(0.0) as u64);
    }
}
