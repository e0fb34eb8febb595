//! What a scanout shows, and how it gets to the front end.
//!
//! With shared memory ([`gpu_protocol::frames`]): a flush copies what changed into a free slot, once,
//! and names it in a FRAME. Where no slot is free, or frames come faster than wanted, the damage is
//! kept and the newest picture goes out later; nobody waits (a mailbox with one place). Each slot
//! remembers what has changed since it was last drawn, so that only that is copied. A front end that asks
//! for frames one by one gets none that nobody would look at before the next. What is in guest
//! memory is not copied at all: the front end reads it there ([`gpu_protocol::guest_frames`]).
//!
//! Without: damage is kept and sent as UPDATE messages, piece by piece, as fast as the socket takes
//! them.

use std::{
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use gpu_protocol::{
    Damage, Rect,
    format::BlobLayout,
    frames::{Frame, MAX_SLOTS, Release, ShmScanout, WANT_FULL, WANT_ONE, Want},
    guest_frames::GuestFrame,
    socket::FromBackEnd,
    virtio::Refusal,
};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

use crate::link::Link;

/// Pixels in one UPDATE message at most (256 KiB of them).
const UPDATE_PIXELS: u32 = 64 * 1024;

/// What is shown: a part of a resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Source {
    /// Which resource.
    pub resource: u32,
    /// Which part; not empty.
    pub rect: Rect,
    /// Where the picture is in a blob, checked against its size; `None` for a resource that is a
    /// picture itself.
    pub blob: Option<BlobLayout>,
}

/// Where pixels come from.
pub trait Pictures {
    /// Whether the front end can read the resource where the guest has it.
    fn share(&mut self, resource: u32) -> bool;

    /// Writes `part` of the resource of `source` to `target` as B, G, R, A/X, rows `stride` bytes
    /// apart.
    fn read(
        &mut self,
        source: &Source,
        part: Rect,
        target: &VolatileSlice<'_>,
        stride: usize,
    ) -> Result<(), Refusal>;
}

/// How pictures reach the front end, once that is negotiated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// Frames in shared memory.
    Shm,
    /// UPDATE messages.
    Update,
}

struct Slot {
    held: bool,
    /// What changed since this slot was drawn.
    stale: Damage,
}

/// The frame memory of one scanout.
struct Slots {
    layout: ShmScanout,
    memory: MmapRegion,
    slots: Vec<Slot>,
}

impl Slots {
    fn map(layout: ShmScanout, fd: OwnedFd) -> std::io::Result<Self> {
        let invalid = |what: &str| std::io::Error::new(std::io::ErrorKind::InvalidData, what);
        let size = layout.checked_size().ok_or_else(|| invalid("contradictory layout"))?;
        // A file that can shrink would kill this process when it touches a page behind its end.
        let seals = rustix::fs::fcntl_get_seals(&fd)?;
        if !seals.contains(rustix::fs::SealFlags::SHRINK) {
            return Err(invalid("the memory is not sealed against shrinking"));
        }
        let length = usize::try_from(size).map_err(|_| invalid("too big"))?;
        let file = FileOffset::new(std::fs::File::from(fd), 0);
        // Refuses a file that is shorter than `length`.
        let memory = MmapRegion::from_file(file, length).map_err(std::io::Error::other)?;
        let whole = Rect::of_size(layout.width, layout.height);
        let slots = (0..layout.slots.min(MAX_SLOTS))
            .map(|_| Slot { held: false, stale: Damage::of(whole) })
            .collect();
        Ok(Self { layout, memory, slots })
    }

    /// Memory of `rect` in a slot.
    fn target(&self, slot: usize, rect: Rect) -> Option<VolatileSlice<'_>> {
        let stride = self.layout.stride as usize;
        let start =
            slot * self.layout.slot_size as usize + rect.y as usize * stride + rect.x as usize * 4;
        let length = (rect.height as usize - 1) * stride + rect.width as usize * 4;
        self.memory.get_slice(start, length).ok()
    }
}

/// What the front end has use for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Demand {
    #[default]
    Nothing,
    /// One frame.
    One,
    /// One after the other.
    All,
}

/// One scanout.
#[derive(Default)]
pub struct Scanout {
    source: Option<Source>,
    /// The size the front end was last told; 0 × 0 is off.
    told: (u32, u32),
    /// It was left since then, and its memory with it: should it come back, it has to be told anew.
    left: bool,
    /// What changed since the last frame or update that was sent.
    unsent: Damage,
    /// A flush (or a request for a picture) happened and nothing has been sent since.
    due: bool,
    /// A flush happened and its picture has not been sent.
    flushed: bool,
    /// The guest has flushed the source since it is shown.
    drawn: bool,
    slots: Option<Slots>,
    /// The last frame was in guest memory.
    in_guest: bool,
    demand: Demand,
    /// While there is demand not 0.
    max_fps: u32,
    sequence: u64,
    /// Not before this.
    earliest: Option<Instant>,
    /// A picture that nobody asked for does not count before this.
    counted: Option<Instant>,
    pixels: Vec<u8>,
}

impl std::fmt::Debug for Scanout {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Scanout")
            .field("source", &self.source)
            .field("unsent", &self.unsent)
            .field("demand", &self.demand)
            .finish_non_exhaustive()
    }
}

impl Scanout {
    /// What is shown.
    pub fn source(&self) -> Option<Source> {
        self.source
    }

    /// Shows something else, or nothing. The picture counts as changed but is not sent before the
    /// next flush, because guests upload its contents in between.
    pub fn set_source(&mut self, source: Option<Source>) {
        let size = self.size();
        self.drawn &= self.source == source;
        self.source = source;
        if self.size() != size {
            self.unsent = Damage::new();
            self.slots = None;
            self.left = true;
            (self.due, self.flushed) = (false, false);
        }
        if source.is_some() {
            self.damage(Rect::of_size(self.size().0, self.size().1));
        }
    }

    /// Forgets what the front end knows: there is a new one.
    pub fn reconnect(&mut self) {
        (self.told, self.left) = ((0, 0), false);
        self.slots = None;
        self.in_guest = false;
        (self.demand, self.max_fps) = (Demand::Nothing, 0);
        self.earliest = None;
        if self.source.is_some() {
            self.damage(Rect::of_size(self.size().0, self.size().1));
            self.due = true;
        }
    }

    /// The guest flushed `rect` of `resource`; nothing happens if that is not shown here.
    pub fn flush(&mut self, resource: u32, rect: Rect) {
        let Some(source) = self.source.filter(|source| source.resource == resource) else { return };
        let visible = rect.intersection(&source.rect);
        if visible.is_empty() {
            return;
        }
        self.damage(Rect { x: visible.x - source.rect.x, y: visible.y - source.rect.y, ..visible });
        self.count_skipped();
        (self.due, self.flushed, self.drawn) = (true, true, true);
    }

    /// The front end made memory for frames, or took it away.
    pub fn set_slots(&mut self, layout: ShmScanout, fd: Option<OwnedFd>) {
        self.slots = None;
        if (layout.width, layout.height) != self.size() {
            // Made for a size that is history; that for the present one is on its way.
            return;
        }
        let Some(fd) = fd else { return };
        match Slots::map(layout, fd) {
            Ok(slots) => {
                self.slots = Some(slots);
                if !self.in_guest {
                    // A frame in memory for the same size of before is one that the front end ignores.
                    self.unsent = Damage::of(Rect::of_size(layout.width, layout.height));
                    self.due |= self.drawn;
                }
            }
            Err(error) => {
                tracing::error!(%error, scanout = layout.scanout, "frame memory cannot be used");
            }
        }
    }

    /// The front end is done with a slot.
    pub fn release(&mut self, release: &Release) {
        let Some(slots) = &mut self.slots else { return };
        if slots.layout.generation == release.generation
            && let Some(slot) = slots.slots.get_mut(release.slot as usize)
        {
            slot.held = false;
        }
    }

    /// The front end wants frames, or none.
    pub fn want(&mut self, want: &Want) {
        self.max_fps = want.max_fps;
        self.demand = match (want.max_fps, want.flags & WANT_ONE) {
            (0, _) => Demand::Nothing,
            (_, 0) => Demand::All,
            _ => Demand::One,
        };
        if want.flags & WANT_FULL != 0 {
            self.earliest = None;
            if self.source.is_some() {
                // Only what the viewer is told, not what has to be drawn.
                self.unsent = Damage::of(Rect::of_size(self.size().0, self.size().1));
                self.due = true;
            }
        }
    }

    /// When [`pump`](Self::pump) has to be called although nothing happens.
    pub fn deadline(&self) -> Option<Instant> {
        let has_room = self.in_guest || self.free_slot().is_some();
        self.earliest.filter(|_| self.due && self.demand != Demand::Nothing && has_room)
    }

    /// Sends what there is to send and can be sent now.
    pub fn pump(
        &mut self,
        id: u32,
        transport: Option<Transport>,
        pictures: &mut dyn Pictures,
        link: &Link,
    ) {
        // Until it is negotiated, a front end does not know what to prepare for a picture.
        let Some(transport) = transport else { return };
        // A size is told only when there is room, so that a guest that keeps changing it cannot
        // fill our memory.
        let size = self.size();
        if self.told != size || self.left {
            if !link.has_room() {
                return;
            }
            if self.told == size {
                // Only another size makes the front end prepare new memory.
                self.tell_size(id, (0, 0), link);
            }
            self.tell_size(id, size, link);
            self.left = false;
        }
        match transport {
            Transport::Shm => self.pump_frame(id, pictures, link),
            Transport::Update => self.pump_updates(id, pictures, link),
        }
    }

    fn tell_size(&mut self, id: u32, (width, height): (u32, u32), link: &Link) {
        if self.told != (width, height) {
            link.send(&FromBackEnd::Scanout { scanout: id, width, height });
            self.told = (width, height);
        }
    }

    fn size(&self) -> (u32, u32) {
        self.source.map_or((0, 0), |source| (source.rect.width, source.rect.height))
    }

    fn damage(&mut self, rect: Rect) {
        self.unsent.add(rect);
        for slot in self.slots.iter_mut().flat_map(|slots| &mut slots.slots) {
            slot.stale.add(rect);
        }
    }

    /// The free slot that takes the least copying.
    fn free_slot(&self) -> Option<usize> {
        let slots = &self.slots.as_ref()?.slots;
        let free = slots.iter().enumerate().filter(|(_, slot)| !slot.held);
        free.min_by_key(|(_, slot)| slot.stale.area()).map(|(index, _)| index)
    }

    fn pump_frame(&mut self, id: u32, pictures: &mut dyn Pictures, link: &Link) {
        if !self.due || self.max_fps == 0 || self.unsent.is_empty() {
            return;
        }
        if self.demand == Demand::Nothing {
            return;
        }
        let now = Instant::now();
        if self.earliest.is_some_and(|earliest| now < earliest) {
            // The device's thread comes back at the deadline.
            return;
        }
        let Some(source) = self.source else { return };
        if source.blob.is_some() && !link.has_room() {
            // No slot limits the number of such messages; the socket's thread comes back.
            self.earliest = None;
            return;
        }
        let blob = source.blob.filter(|_| pictures.share(source.resource));
        self.in_guest = blob.is_some();
        let frame = match blob {
            Some(layout) => Some(self.guest_frame(id, &source, layout)),
            None => self.frame(id, &source, pictures),
        };
        let Some(frame) = frame else { return };
        (self.due, self.flushed) = (false, false);
        self.earliest = Some(now + self.interval());
        self.counted = self.earliest;
        if self.demand == Demand::One {
            self.demand = Demand::Nothing;
        }
        link.send(&frame);
    }

    fn interval(&self) -> Duration {
        Duration::from_secs(1) / self.max_fps.max(1)
    }

    /// There is a newer picture. One before it that nobody asked for counts: how often the picture changes
    /// is how viewers' servers tell what is a film.
    fn count_skipped(&mut self) {
        if !self.flushed || self.max_fps == 0 || self.demand != Demand::Nothing {
            return;
        }
        let now = Instant::now();
        if self.counted.is_none_or(|counted| counted <= now) {
            self.sequence += 1;
            self.counted = Some(now + self.interval());
        }
    }

    /// The picture where the guest has it.
    fn guest_frame(
        &mut self,
        id: u32,
        source: &Source,
        layout: BlobLayout,
    ) -> FromBackEnd<'static> {
        self.sequence += 1;
        FromBackEnd::GuestFrame(GuestFrame {
            scanout: id,
            resource: source.resource,
            part: source.rect,
            layout,
            sequence: self.sequence,
            damage: self.unsent.take().rects().to_vec(),
        })
    }

    /// A picture in the slot that takes the least copying.
    fn frame(
        &mut self,
        id: u32,
        source: &Source,
        pictures: &mut dyn Pictures,
    ) -> Option<FromBackEnd<'static>> {
        let index = self.free_slot()?;
        let slots = self.slots.as_mut()?;
        let stride = slots.layout.stride as usize;
        let stale = slots.slots[index].stale.take();
        for rect in stale.rects() {
            let part = Rect { x: source.rect.x + rect.x, y: source.rect.y + rect.y, ..*rect };
            let done = slots
                .target(index, *rect)
                .map(|target| pictures.read(source, part, &target, stride));
            if !matches!(done, Some(Ok(()))) {
                tracing::error!(?rect, ?source, "a frame could not be drawn");
                slots.slots[index].stale = stale;
                self.due = false;
                return None;
            }
        }
        slots.slots[index].held = true;
        self.sequence += 1;
        Some(FromBackEnd::Frame(Frame {
            scanout: id,
            generation: slots.layout.generation,
            slot: index as u32,
            sequence: self.sequence,
            damage: self.unsent.take().rects().to_vec(),
        }))
    }

    fn pump_updates(&mut self, id: u32, pictures: &mut dyn Pictures, link: &Link) {
        let Some(source) = self.source.filter(|_| self.due) else { return };
        while link.has_room() {
            let mut rects = self.unsent.rects().iter().copied();
            let Some(first) = rects.next() else {
                self.due = false;
                return;
            };
            let rows = (UPDATE_PIXELS / first.width).clamp(1, first.height);
            let now = Rect { height: rows, ..first };
            let later = Rect { y: first.y + rows, height: first.height - rows, ..first };
            let mut unsent = Damage::of(later);
            rects.for_each(|rect| unsent.add(rect));
            self.unsent = unsent;

            let stride = now.width as usize * 4;
            self.pixels.resize(stride * rows as usize, 0);
            let part = Rect { x: source.rect.x + now.x, y: source.rect.y + now.y, ..now };
            let target = VolatileSlice::from(&mut self.pixels[..]);
            if let Err(error) = pictures.read(&source, part, &target, stride) {
                tracing::error!(%error, ?source, "an update could not be drawn");
                continue;
            }
            let pixels = &self.pixels;
            link.send(&FromBackEnd::Update { scanout: id, rect: now, pixels });
        }
        // The next piece goes when the socket has taken this one: the link tells us.
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Read, os::unix::net::UnixStream};

    use gpu_protocol::{
        format::PixelFormat,
        socket::{Decoder, Side},
    };
    use rustix::fs::{MemfdFlags, SealFlags};

    use super::*;
    use crate::link::Listener;

    struct Quiet;

    impl Listener for Quiet {
        fn message(&self, _: gpu_protocol::socket::FromFrontEnd, _: Option<OwnedFd>) {}
        fn room(&self) {}
        fn closed(&self, _: u64) {}
    }

    /// Counts pixels instead of drawing them.
    #[derive(Default)]
    struct Counter(u64);

    impl Pictures for Counter {
        fn share(&mut self, resource: u32) -> bool {
            resource == SHARED
        }

        fn read(
            &mut self,
            _: &Source,
            part: Rect,
            _: &VolatileSlice<'_>,
            _: usize,
        ) -> Result<(), Refusal> {
            self.0 += part.area();
            Ok(())
        }
    }

    const SIZE: (u32, u32) = (640, 480);
    const WHOLE: Rect = Rect::of_size(SIZE.0, SIZE.1);
    const SHARED: u32 = 7;

    fn slots(generation: u32) -> (ShmScanout, Option<OwnedFd>) {
        let layout = ShmScanout::layout(0, generation, SIZE.0, SIZE.1, 2).unwrap();
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = rustix::fs::memfd_create("slots", flags).unwrap();
        rustix::fs::ftruncate(&fd, layout.checked_size().unwrap()).unwrap();
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK).unwrap();
        (layout, Some(fd))
    }

    /// A scanout, with a front end that is only a socket.
    struct Rig {
        link: std::sync::Arc<Link>,
        peer: UnixStream,
        counter: Counter,
        scanout: Scanout,
        /// The link ends when nobody listens.
        _listener: std::sync::Arc<dyn Listener>,
    }

    impl Rig {
        fn new() -> Self {
            let link = Link::new().unwrap();
            let (socket, peer) = UnixStream::pair().unwrap();
            let listener: std::sync::Arc<dyn Listener> = std::sync::Arc::new(Quiet);
            link.connect(socket, std::sync::Arc::downgrade(&listener)).unwrap();
            Self {
                link,
                peer,
                counter: Counter::default(),
                scanout: Scanout::default(),
                _listener: listener,
            }
        }
    }

    /// The messages in a socket.
    fn heard(peer: &mut UnixStream, decoder: &mut Decoder) -> Vec<FromBackEnd<'static>> {
        let mut bytes = [0; 64 * 1024];
        peer.set_nonblocking(true).unwrap();
        while let Ok(count @ 1..) = peer.read(&mut bytes) {
            decoder.push(&bytes[..count]);
        }
        let mut messages = Vec::new();
        while let Some(raw) = decoder.next_message().unwrap() {
            messages.push(match FromBackEnd::decode(&raw).unwrap() {
                FromBackEnd::Scanout { scanout, width, height } => {
                    FromBackEnd::Scanout { scanout, width, height }
                }
                FromBackEnd::Frame(frame) => FromBackEnd::Frame(frame),
                _ => continue,
            });
        }
        messages
    }

    /// Reading back stalls a GPU: nothing is read that nobody looks at, and nothing twice.
    #[test]
    fn only_what_is_wanted_and_changed_is_read() {
        let Rig { link, peer, mut counter, mut scanout, _listener } = Rig::new();
        scanout.set_source(Some(Source { resource: 1, rect: WHOLE, blob: None }));
        let (layout, fd) = slots(1);
        scanout.set_slots(layout, fd);
        let mut flush = |scanout: &mut Scanout, rect: Rect| {
            scanout.flush(1, rect);
            scanout.flush(2, WHOLE);
            scanout.pump(0, Some(Transport::Shm), &mut counter, &link);
            std::mem::take(&mut counter.0)
        };
        // Nobody looks.
        for _ in 0..10 {
            assert_eq!(flush(&mut scanout, WHOLE), 0);
        }
        assert_eq!(scanout.deadline(), None, "nobody is woken for it either");
        // Somebody looks: first everything, into each of the two slots.
        let want = |max_fps| Want { scanout: 0, max_fps, flags: WANT_FULL, reserved: 0 };
        let give_back = |scanout: &mut Scanout, slot: u32| {
            scanout.release(&Release { scanout: 0, generation: 1, slot, reserved: 0 });
            scanout.earliest = None;
        };
        scanout.want(&want(60));
        let part = Rect::new(10, 10, 20, 5);
        assert_eq!(flush(&mut scanout, part), WHOLE.area());
        give_back(&mut scanout, 0);
        // Then what changed, in the slot that needs the least.
        assert_eq!(flush(&mut scanout, part), part.area());
        scanout.earliest = None;
        assert_eq!(flush(&mut scanout, part), WHOLE.area(), "the other slot was never drawn");
        // No slot is free: nothing, and later all that changed since the slot was drawn.
        let other = Rect::new(100, 100, 7, 7);
        scanout.earliest = None;
        assert_eq!(flush(&mut scanout, other), 0);
        give_back(&mut scanout, 0);
        assert_eq!(flush(&mut scanout, other), part.area() + other.area());
        // Faster than wanted: it waits for its time.
        give_back(&mut scanout, 1);
        scanout.earliest = Some(Instant::now() + Duration::from_secs(3600));
        assert_eq!(flush(&mut scanout, other), 0);
        assert!(scanout.deadline().is_some());
        // Nobody looks any more.
        scanout.want(&want(0));
        give_back(&mut scanout, 0);
        assert_eq!(flush(&mut scanout, WHOLE), 0);
        drop(peer);
    }

    /// A viewer that takes two pictures a second costs two of them a second.
    #[test]
    fn one_by_one_nothing_is_read_before_it_is_asked_for() {
        let Rig { link, peer, mut counter, mut scanout, _listener } = Rig::new();
        scanout.set_source(Some(Source { resource: 1, rect: WHOLE, blob: None }));
        let (layout, fd) = slots(1);
        scanout.set_slots(layout, fd);
        let mut pump = |scanout: &mut Scanout| {
            scanout.pump(0, Some(Transport::Shm), &mut counter, &link);
            std::mem::take(&mut counter.0)
        };
        let want = |flags| Want { scanout: 0, max_fps: 1, flags, reserved: 0 };
        scanout.flush(1, WHOLE);
        scanout.want(&want(WANT_FULL | WANT_ONE));
        assert_eq!(pump(&mut scanout), WHOLE.area());
        scanout.release(&Release { scanout: 0, generation: 1, slot: 0, reserved: 0 });
        // However often the picture changes; but each counts that could have been shown before the next.
        let part = Rect::new(10, 10, 20, 5);
        for _ in 0..10 {
            scanout.counted = None;
            scanout.flush(1, part);
            assert_eq!(pump(&mut scanout), 0);
            assert_eq!(pump(&mut scanout), 0);
        }
        assert_eq!(scanout.sequence, 1 + 9);
        scanout.counted = Some(Instant::now() + Duration::from_secs(3600));
        scanout.flush(1, part);
        assert_eq!(pump(&mut scanout), 0);
        assert_eq!(scanout.sequence, 1 + 9, "no more than are wanted");
        assert_eq!(scanout.deadline(), None, "nobody is woken for it either");
        // Then it is the newest, and not before its time.
        scanout.want(&want(WANT_ONE));
        scanout.earliest = Some(Instant::now() + Duration::from_secs(3600));
        assert_eq!(pump(&mut scanout), 0);
        assert!(scanout.deadline().is_some());
        scanout.earliest = None;
        assert_eq!(pump(&mut scanout), part.area());
        assert_eq!(scanout.sequence, 1 + 9 + 1, "the last one counts once");
        // Asked for before it is there.
        scanout.want(&want(WANT_ONE));
        scanout.earliest = None;
        assert_eq!(pump(&mut scanout), 0);
        scanout.flush(1, part);
        assert_eq!(pump(&mut scanout), WHOLE.area(), "the other slot was never drawn");
        drop(peer);
    }

    /// The front end reads guest memory itself, and needs no slot for it.
    #[test]
    fn what_the_guest_has_is_not_read() {
        let Rig { link, mut peer, mut counter, mut scanout, _listener } = Rig::new();
        let layout = BlobLayout { format: PixelFormat::B8G8R8X8, stride: 2560, offset: 0 };
        let source = Source { resource: SHARED, rect: WHOLE, blob: Some(layout) };
        scanout.set_source(Some(source));
        scanout.want(&Want { scanout: 0, max_fps: 1, flags: 0, reserved: 0 });
        let mut decoder = Decoder::new(Side::FrontEnd);
        let mut next = || {
            let mut bytes = [0; 4096];
            loop {
                if let Some(raw) = decoder.next_message().unwrap() {
                    let message = FromBackEnd::decode(&raw).unwrap();
                    let FromBackEnd::GuestFrame(frame) = message else { continue };
                    return frame;
                }
                let count = peer.read(&mut bytes).unwrap();
                decoder.push(&bytes[..count]);
            }
        };
        let part = Rect::new(10, 10, 20, 5);
        let mut damage = vec![WHOLE];
        for sequence in 1..=3 {
            scanout.flush(SHARED, part);
            scanout.pump(0, Some(Transport::Shm), &mut counter, &link);
            let expected =
                GuestFrame { scanout: 0, resource: SHARED, part: WHOLE, layout, sequence, damage };
            assert_eq!(next(), expected);
            damage = vec![part];
            // Not more often than wanted, but then without anybody's asking.
            scanout.flush(SHARED, part);
            scanout.pump(0, Some(Transport::Shm), &mut counter, &link);
            assert_eq!(scanout.sequence, sequence);
            assert!(scanout.deadline().is_some());
            scanout.earliest = None;
        }
        assert_eq!(counter.0, 0);
    }

    /// A size that the guest leaves and comes back to before the front end can be told is another one.
    #[test]
    fn a_size_that_came_back_gets_memory_again() {
        let Rig { link, mut peer, mut counter, mut scanout, _listener } = Rig::new();
        let mut decoder = Decoder::new(Side::FrontEnd);
        let source = Some(Source { resource: 1, rect: WHOLE, blob: None });
        let told = |(width, height)| FromBackEnd::Scanout { scanout: 0, width, height };
        let mut pump = |scanout: &mut Scanout| {
            scanout.pump(0, Some(Transport::Shm), &mut counter, &link);
        };
        scanout.set_source(source);
        pump(&mut scanout);
        pump(&mut scanout);
        assert_eq!(heard(&mut peer, &mut decoder), [told(SIZE)]);
        // The front end does not read.
        while link.has_room() {
            link.send(&told(SIZE));
        }
        scanout.set_source(None);
        pump(&mut scanout);
        scanout.set_source(source);
        pump(&mut scanout);
        // Now it does.
        let mut told_now = Vec::new();
        while !link.has_room() {
            told_now.extend(heard(&mut peer, &mut decoder));
        }
        told_now.extend(heard(&mut peer, &mut decoder));
        assert!(told_now.iter().all(|message| *message == told(SIZE)));
        pump(&mut scanout);
        pump(&mut scanout);
        assert_eq!(heard(&mut peer, &mut decoder), [told((0, 0)), told(SIZE)]);
        // What was never told and is over need not be.
        scanout.set_source(None);
        pump(&mut scanout);
        scanout.set_source(source);
        scanout.set_source(None);
        pump(&mut scanout);
        assert_eq!(heard(&mut peer, &mut decoder), [told((0, 0))]);
    }

    /// A size that came back: the first memory for it is history, and so is a frame in it.
    #[test]
    fn new_memory_gets_the_picture_again() {
        let Rig { link, mut peer, mut counter, mut scanout, _listener } = Rig::new();
        let mut decoder = Decoder::new(Side::FrontEnd);
        let mut frames = |scanout: &mut Scanout| {
            scanout.earliest = None;
            scanout.pump(0, Some(Transport::Shm), &mut counter, &link);
            let messages = heard(&mut peer, &mut decoder);
            let frames = messages.into_iter().filter_map(|message| match message {
                FromBackEnd::Frame(frame) => Some((frame.generation, frame.damage)),
                _ => None,
            });
            frames.collect::<Vec<_>>()
        };
        let want = Want { scanout: 0, max_fps: 60, flags: WANT_ONE, reserved: 0 };
        scanout.want(&want);
        let source = Some(Source { resource: 1, rect: WHOLE, blob: None });
        scanout.set_source(source);
        let (layout, fd) = slots(1);
        scanout.set_slots(layout, fd);
        assert_eq!(frames(&mut scanout), [], "before its flush there is nothing to be seen");
        scanout.flush(1, WHOLE);
        assert_eq!(frames(&mut scanout), [(1, vec![WHOLE])]);
        let (layout, fd) = slots(3);
        scanout.set_slots(layout, fd);
        assert_eq!(frames(&mut scanout), [], "nobody asks");
        scanout.want(&want);
        assert_eq!(frames(&mut scanout), [(3, vec![WHOLE])]);
        scanout.want(&want);
        assert_eq!(frames(&mut scanout), [], "once is enough");
        // Another source of that size is not shown before its flush.
        scanout.set_source(Some(Source { resource: 2, rect: WHOLE, blob: None }));
        let (layout, fd) = slots(4);
        scanout.set_slots(layout, fd);
        assert_eq!(frames(&mut scanout), []);
    }
}
