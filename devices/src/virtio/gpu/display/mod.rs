//! The state of the monitors: what the guest is told about them, what it shows on them, and who
//! looks. Messages come in from [`super::server`]'s thread, wishes from the VMM's, register accesses
//! from vCPUs.

use std::{
    collections::{HashMap, VecDeque},
    io,
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use gpu_protocol::{
    Rect,
    frames::{MAX_SIZE, Release},
    socket::{FromBackEnd, FromFrontEnd, ProtocolFeatures},
    virtio::{CURSOR_SIZE, Events},
};
use rustix::event::EventfdFlags;

mod cursor;
mod dmabuf;
mod guest_frames;
mod host_memory;
mod monitors;
mod outbox;
mod pictures;

use self::{
    cursor::Cursor,
    dmabuf::Dmabuf,
    guest_frames::{InGuest, Memories},
    outbox::Waiting,
};
use super::{
    frame::{Frame, Shadow, SlotMemory},
    handle::{CursorImage, DisplayMode, DisplaySink},
};
use crate::{
    GuestMemory,
    virtio::{device::VirtioInterrupt, shared_memory::SharedMemory},
};

/// Messages that may wait for a back end that does not read, before it is no longer listened to.
const MAX_WAITING: usize = 256;

/// What the sink is to be told, in order.
pub(super) enum Event {
    Scanout(u32, Option<(u32, u32)>),
    Frame(u32, Frame, Vec<Rect>),
    CursorDefine(u32, Arc<Cursor>),
    CursorMove(u32, u32, u32),
    CursorHide(u32),
    BackEnd(bool),
}

#[derive(Default)]
struct Scanout {
    mode: Option<DisplayMode>,
    size: Option<(u32, u32)>,
    max_fps: u32,
    /// Each frame is asked for, and whether the next one has been.
    one_by_one: bool,
    asked: bool,
    /// Memory for frames, and which of its slots are ours at present.
    slots: Option<Arc<SlotMemory>>,
    held: u32,
    generation: u32,
    shadow: Option<Arc<Shadow>>,
    /// Where the back end has the picture that goes into the shadow.
    dmabuf: Option<Dmabuf>,
    /// The slot of the newest frame, for after the back end's end.
    newest: Option<(u32, u64)>,
    /// The newest frame, if the guest has it.
    in_guest: Option<InGuest>,
    /// A complete frame is to be made here, because no back end sends it.
    full: bool,
    sequence: u64,
    /// What to add to the numbers of this back end's frames, so that they go on after the last one's.
    sequence_base: u64,
    /// Size, memory and cursor are those of a back end that is gone.
    stale: bool,
    cursor: Option<Arc<Cursor>>,
    cursor_pos: (u32, u32),
    cursor_visible: bool,
}

#[derive(Default)]
struct State {
    socket: Option<Arc<UnixStream>>,
    /// Counts the sockets.
    generation: u64,
    waiting: VecDeque<Waiting>,
    features: Option<ProtocolFeatures>,
    scanouts: Vec<Scanout>,
    events_read: u32,
    interrupt: Option<Arc<dyn VirtioInterrupt>>,
    sink: Option<Arc<dyn DisplaySink>>,
    replay: bool,
    events: VecDeque<Event>,
    warned_dmabuf: bool,
    warned_size: bool,
    offered: u64,
    /// The guest's shared memory region.
    region: Option<Arc<SharedMemory>>,
    /// What the back end calls the mapping at each offset.
    mappings: HashMap<u64, u64>,
    memories: Memories,
}

/// The monitors of one GPU.
pub(super) struct Display {
    state: Mutex<State>,
    wake: OwnedFd,
    this: Weak<Self>,
}

impl std::fmt::Debug for Display {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Display").finish_non_exhaustive()
    }
}

impl Display {
    /// `scanouts` monitors, of which the first is plugged in, without a GPU socket.
    pub(super) fn new(
        scanouts: u32,
        mode: DisplayMode,
        mut offered: ProtocolFeatures,
        region: Option<Arc<SharedMemory>>,
    ) -> io::Result<Arc<Self>> {
        let wake = rustix::event::eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        offered.set(ProtocolFeatures::HOST_MEMORY, region.is_some());
        let offered = offered.bits();
        let mut state = State { offered, region, ..State::default() };
        state.scanouts.resize_with(scanouts as usize, Scanout::default);
        if let Some(first) = state.scanouts.first_mut() {
            first.mode = Some(mode);
        }
        Ok(Arc::new_cyclic(|this| Self { state: Mutex::new(state), wake, this: this.clone() }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Readable when the server has something to do that is not on its sockets.
    pub(super) fn wake_fd(&self) -> &OwnedFd {
        &self.wake
    }

    pub(super) fn wake(&self) {
        // A full counter wakes as well.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }
}

/// For [`super::handle`].
impl Display {
    pub(super) fn set_sink(&self, sink: Arc<dyn DisplaySink>) {
        let mut state = self.lock();
        state.sink = Some(sink);
        state.replay = true;
        drop(state);
        self.wake();
    }

    pub(super) fn scanouts(&self) -> u32 {
        self.lock().scanouts.len() as u32
    }

    pub(super) fn mode(&self, scanout: u32) -> Option<DisplayMode> {
        self.lock().scanouts.get(scanout as usize)?.mode
    }

    pub(super) fn set_mode(&self, scanout: u32, mode: Option<DisplayMode>) -> bool {
        let sizes = 1..=MAX_SIZE;
        if mode.is_some_and(|m| !sizes.contains(&m.width) || !sizes.contains(&m.height)) {
            return false;
        }
        let mut state = self.lock();
        let Some(target) = state.scanouts.get_mut(scanout as usize) else { return false };
        if target.mode == mode {
            return false;
        }
        target.mode = mode;
        state.events_read |= Events::DISPLAY.bits();
        let interrupt = state.interrupt.clone();
        drop(state);
        if let Some(interrupt) = interrupt {
            interrupt.signal_config_change();
        }
        true
    }

    pub(super) fn want_frames(&self, scanout: u32, max_fps: u32, one_by_one: bool) {
        let mut state = self.lock();
        let Some(target) = state.scanouts.get_mut(scanout as usize) else { return };
        if target.max_fps == 0 && max_fps == 0 {
            return;
        }
        target.max_fps = max_fps;
        target.one_by_one = one_by_one;
        target.full = max_fps > 0;
        state.send_want(scanout);
        drop(state);
        // A shadow's frame is made by the server.
        self.wake();
    }

    pub(super) fn want_next_frame(&self, scanout: u32) {
        self.lock().send_want_next(scanout);
    }

    pub(super) fn is_alive(&self) -> bool {
        self.lock().socket.is_some()
    }
}

/// For [`super::device`].
impl Display {
    /// The driver is there: its interrupts, and its memory.
    pub(super) fn set_driver(&self, interrupt: Arc<dyn VirtioInterrupt>, memory: GuestMemory) {
        let mut state = self.lock();
        state.interrupt = Some(interrupt);
        state.set_guest_memory(Some(memory));
    }

    /// It cannot be served.
    pub(super) fn forget_driver(&self) {
        let mut state = self.lock();
        state.interrupt = None;
        state.set_guest_memory(None);
        state.forget_all_memory();
    }

    pub(super) fn events_read(&self) -> u32 {
        self.lock().events_read
    }

    pub(super) fn clear_events(&self, events: u32) {
        self.lock().events_read &= !events;
    }

    /// The back end is about to be asked for a reset by RESET_DEVICE.
    pub(super) fn expect_reset(&self) {
        self.lock().expect_reset();
    }

    /// The driver is gone, and what it showed with it.
    pub(super) fn reset(&self) {
        self.forget_driver();
        let mut state = self.lock();
        state.events_read = 0;
        for id in 0..state.scanouts.len() as u32 {
            state.set_size(id, None);
            state.hide_cursor(id);
        }
        state.forget_host_memory();
        drop(state);
        self.wake();
    }
}

/// For [`super::server`].
impl Display {
    /// Whether the back end reads what it is sent.
    pub(super) fn has_room(&self) -> bool {
        self.lock().waiting.len() < MAX_WAITING
    }

    /// Whether something waits for room in the socket.
    pub(super) fn has_waiting(&self) -> bool {
        !self.lock().waiting.is_empty()
    }

    /// Sends what waits, as far as the socket takes it.
    pub(super) fn flush(&self) {
        self.lock().flush();
    }

    /// Uses the GPU socket of a back end. If it is not the first one, what the last one showed stays
    /// until it shows something. Returns the number of the connection.
    pub(super) fn connect(&self, socket: UnixStream) -> io::Result<u64> {
        socket.set_nonblocking(true)?;
        let mut state = self.lock();
        state.socket = Some(Arc::new(socket));
        state.generation += 1;
        state.waiting.clear();
        state.features = None;
        state.expect_no_reset();
        state.keep_pictures();
        for scanout in &mut state.scanouts {
            scanout.stale = true;
            scanout.sequence_base = scanout.sequence;
        }
        let generation = state.generation;
        drop(state);
        self.wake();
        Ok(generation)
    }

    /// The GPU socket and the number of its connection.
    pub(super) fn socket(&self) -> Option<(Arc<UnixStream>, u64)> {
        let state = self.lock();
        state.socket.clone().map(|socket| (socket, state.generation))
    }

    /// The number of the newest connection.
    pub(super) fn generation(&self) -> u64 {
        self.lock().generation
    }

    /// Ends the connection.
    pub(super) fn hang_up(&self) {
        if let Some(socket) = &self.lock().socket {
            let _ = socket.shutdown(std::net::Shutdown::Both);
        }
    }

    /// The back end of that connection is gone, and all that it said has been done. The last picture
    /// stays; what it mapped is of no use without it. A successor, or we, may tell the guest that it can
    /// have its memory back.
    pub(super) fn disconnect(&self, generation: u64) {
        let mut state = self.lock();
        state.forget_host_memory();
        if state.generation == generation {
            state.socket = None;
            state.waiting.clear();
            state.keep_pictures();
        }
    }

    /// Tells the sink that the back end is gone, or that there is one again.
    pub(super) fn tell_back_end(&self, alive: bool) {
        self.lock().events.push_back(Event::BackEnd(alive));
        self.wake();
    }

    /// The driver broke the rules of a queue.
    pub(super) fn ring_broken(&self) {
        let interrupt = self.lock().interrupt.clone();
        if let Some(interrupt) = interrupt {
            tracing::warn!("the driver violated a queue's rules; the GPU needs a reset");
            interrupt.set_needs_reset();
        }
    }

    /// Does what a message asks for.
    pub(super) fn handle(&self, message: FromBackEnd<'_>, fd: Option<OwnedFd>) {
        let mut state = self.lock();
        match message {
            FromBackEnd::GetProtocolFeatures => {
                let offered = state.offered;
                state.send(&FromFrontEnd::ProtocolFeatures(offered), None);
            }
            FromBackEnd::SetProtocolFeatures(bits) => {
                let features = ProtocolFeatures::from_bits_truncate(bits & state.offered);
                let knows = |feature| features.contains(feature);
                let pictures =
                    if knows(ProtocolFeatures::SHM_FRAMES | ProtocolFeatures::GUEST_FRAMES) {
                        "in shared memory, or where the guest has them"
                    } else if knows(ProtocolFeatures::SHM_FRAMES) {
                        "in shared memory"
                    } else {
                        "in linear dmabufs or through its socket, as the back end sends them"
                    };
                tracing::info!(?features, pictures, "the GPU's back end is connected");
                state.features = Some(features);
                for id in 0..state.scanouts.len() as u32 {
                    state.send_want(id);
                    // A picture that was announced too early gets the right kind of memory now.
                    let early = state.scanouts.get_mut(id as usize).filter(|s| !s.stale);
                    if let Some(size) = early.and_then(|scanout| scanout.size.take()) {
                        state.set_size(id, Some(size));
                    }
                }
            }
            FromBackEnd::GetDisplayInfo => {
                let info = state.display_info();
                state.send(&FromFrontEnd::DisplayInfo(Box::new(info)), None);
            }
            FromBackEnd::GetEdid { scanout } => {
                let edid = state.edid(scanout);
                state.send(&FromFrontEnd::Edid(Box::new(edid)), None);
            }
            FromBackEnd::CursorPos(pos) => state.move_cursor(pos),
            FromBackEnd::CursorHide(pos) => state.hide_cursor(pos.scanout),
            FromBackEnd::CursorUpdate { pos, hot_x, hot_y, image } => {
                state.define_cursor(pos, Cursor { hot: (hot_x, hot_y), pixels: image.to_vec() });
            }
            FromBackEnd::Scanout { scanout, width, height } => {
                let size = (width > 0 && height > 0).then_some((width, height));
                state.set_size(scanout, size);
            }
            FromBackEnd::Update { scanout, rect, pixels } => state.update(scanout, rect, pixels),
            FromBackEnd::Frame(frame) => {
                let shown = state.frame(&frame, &self.this);
                state.answered(frame.scanout, shown);
            }
            FromBackEnd::DmabufScanout { scanout, modifier } => {
                state.set_dmabuf(&scanout, modifier, fd);
            }
            FromBackEnd::DmabufUpdate { scanout, rect } => {
                state.dmabuf_update(scanout, rect);
                state.send(&FromFrontEnd::DmabufUpdated, None);
            }
            FromBackEnd::Map(map) => {
                let status = state.map(&map, fd).map_or_else(|error| error, |()| 0);
                state.send(&FromFrontEnd::Mapped(status), None);
            }
            FromBackEnd::Unmap(unmap) => state.unmap(unmap),
            FromBackEnd::GuestMemory(memory) => state.guest_memory(memory),
            FromBackEnd::ForgetMemory { resource } => state.forget_memory(resource),
            FromBackEnd::GuestFrame(frame) => {
                let shown = state.guest_frame(&frame);
                state.answered(frame.scanout, shown);
            }
            FromBackEnd::DeviceReset => state.device_reset(),
        }
    }

    /// Takes what the sink is to be told next. Without a sink, or for as long as there is none,
    /// events are dropped: a new sink is told the present state.
    pub(super) fn take_events(&self) -> Option<(Arc<dyn DisplaySink>, VecDeque<Event>)> {
        let mut state = self.lock();
        let Some(sink) = state.sink.clone() else {
            // Frames must be dropped without the lock.
            let events = std::mem::take(&mut state.events);
            drop(state);
            drop(events);
            return None;
        };
        if std::mem::take(&mut state.replay) {
            state.replay_all();
        }
        state.full_frames(&self.this);
        let events = std::mem::take(&mut state.events);
        drop(state);
        (!events.is_empty()).then_some((sink, events))
    }

    /// Gives a slot back to the back end.
    pub(super) fn release(&self, release: &Release) {
        let mut state = self.lock();
        let Some(scanout) = state.scanouts.get_mut(release.scanout as usize) else { return };
        if scanout.slots.is_none() || scanout.generation != release.generation {
            return;
        }
        scanout.held &= !(1 << release.slot);
        state.send(&FromFrontEnd::Release(*release), None);
    }
}

/// Tells the sink about events; called without any lock.
pub(super) fn deliver(sink: &dyn DisplaySink, events: VecDeque<Event>) {
    for event in events {
        match event {
            Event::Scanout(id, size) => sink.scanout(id, size),
            Event::Frame(id, frame, damage) => sink.frame(id, frame, &damage),
            Event::CursorDefine(id, cursor) => sink.cursor_define(
                id,
                &CursorImage {
                    width: CURSOR_SIZE,
                    height: CURSOR_SIZE,
                    hot_x: cursor.hot.0,
                    hot_y: cursor.hot.1,
                    pixels: &cursor.pixels,
                },
            ),
            Event::CursorMove(id, x, y) => sink.cursor_move(id, x, y),
            Event::CursorHide(id) => sink.cursor_hide(id),
            Event::BackEnd(alive) => sink.back_end(alive),
        }
    }
}

impl State {
    /// A frame came; in place of one that is not shown the back end is asked for another one.
    fn answered(&mut self, id: u32, shown: Option<()>) {
        let Some(scanout) = self.scanouts.get_mut(id as usize) else { return };
        scanout.asked = false;
        if shown.is_none() {
            self.send_want_next(id);
        }
    }

    fn replay_all(&mut self) {
        for id in 0..self.scanouts.len() as u32 {
            let Some(scanout) = self.scanouts.get_mut(id as usize) else { continue };
            scanout.full = scanout.max_fps > 0;
            let (size, pos) = (scanout.size, scanout.cursor_pos);
            let cursor = scanout.cursor.clone().filter(|_| scanout.cursor_visible);
            // Frames that wait for the sink before are for the picture it is told now.
            self.events.push_front(Event::Scanout(id, size));
            if let Some(cursor) = cursor {
                self.events.push_back(Event::CursorDefine(id, cursor));
                self.events.push_back(Event::CursorMove(id, pos.0, pos.1));
            }
            self.send_want(id);
        }
    }
}
