//! The state of the monitors: what the guest is told about them, what it shows on them, and who
//! looks. Messages come in from [`super::server`]'s thread, wishes from the VMM's, register accesses
//! from vCPUs.

use std::{
    collections::VecDeque,
    fs::File,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak},
};

use gpu_protocol::{
    Rect,
    edid::{self, Monitor},
    format::BYTES_PER_PIXEL,
    frames::{self, MAX_SIZE, Release, ShmScanout, WANT_FULL, Want},
    host_memory::Map,
    socket::{CursorPos, FromBackEnd, FromFrontEnd, ProtocolFeatures},
    virtio::{CURSOR_SIZE, CtrlHdr, Events, RespDisplayInfo, RespEdid, kind},
};
use host::socket_io;
use rustix::{
    event::EventfdFlags,
    fs::{MemfdFlags, SealFlags},
    net::SendFlags,
};

use super::{
    frame::{Frame, Shadow, SlotMemory},
    handle::{CursorImage, DisplayMode, DisplaySink},
};
use crate::virtio::{
    device::VirtioInterrupt,
    shared_memory::{MapError, SharedMemory},
};

/// Slots per scanout: one that is drawn, one on its way, one that is read.
const SLOTS: u32 = 3;

/// Largest picture that gets memory: 8K at 4 bytes per pixel, and half as much again.
const MAX_PICTURE: u64 = 192 << 20;

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

pub(super) struct Cursor {
    hot: (u32, u32),
    pixels: Vec<u8>,
}

struct Waiting {
    bytes: Vec<u8>,
    sent: usize,
    fd: Option<OwnedFd>,
}

#[derive(Default)]
struct Scanout {
    mode: Option<DisplayMode>,
    size: Option<(u32, u32)>,
    max_fps: u32,
    /// Memory for frames, and which of its slots are ours at present.
    slots: Option<Arc<SlotMemory>>,
    held: u32,
    generation: u32,
    shadow: Option<Arc<Shadow>>,
    /// The slot of the newest frame, for after the back end's end.
    newest: Option<(u32, u64)>,
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
    offered: u64,
    /// The guest's shared memory region.
    region: Option<Arc<SharedMemory>>,
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

    pub(super) fn want_frames(&self, scanout: u32, max_fps: u32) {
        let mut state = self.lock();
        let Some(target) = state.scanouts.get_mut(scanout as usize) else { return };
        if target.max_fps == 0 && max_fps == 0 {
            return;
        }
        target.max_fps = max_fps;
        target.full = max_fps > 0;
        state.send_want(scanout);
        drop(state);
        // A shadow's frame is made by the server.
        self.wake();
    }

    pub(super) fn is_alive(&self) -> bool {
        self.lock().socket.is_some()
    }
}

/// For [`super::device`].
impl Display {
    /// The driver is there and gets interrupts, or it is gone (`None`).
    pub(super) fn set_interrupt(&self, interrupt: Option<Arc<dyn VirtioInterrupt>>) {
        self.lock().interrupt = interrupt;
    }

    pub(super) fn events_read(&self) -> u32 {
        self.lock().events_read
    }

    pub(super) fn clear_events(&self, events: u32) {
        self.lock().events_read &= !events;
    }

    /// The driver is gone, and what it showed with it.
    pub(super) fn reset(&self) {
        let mut state = self.lock();
        state.interrupt = None;
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
        // What the last one mapped is of no use without it.
        state.forget_host_memory();
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

    /// The back end of that connection is gone. The last picture stays.
    pub(super) fn disconnect(&self, generation: u64) {
        let mut state = self.lock();
        if state.generation == generation {
            state.socket = None;
            state.waiting.clear();
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
                tracing::info!(?features, "the GPU's back end is connected");
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
            FromBackEnd::Frame(frame) => state.frame(&frame, &self.this),
            FromBackEnd::DmabufScanout { scanout, .. } => {
                // The descriptor is closed here; the picture stays black.
                drop(fd);
                if !std::mem::replace(&mut state.warned_dmabuf, true) {
                    tracing::warn!(
                        "the GPU's back end sends dmabufs, which are not supported: start it \
                         without 3D (QEMU's vhost-user-gpu: without --virgl)"
                    );
                }
                let rect = scanout.rect;
                let size = (rect.width > 0 && rect.height > 0).then_some((rect.width, rect.height));
                state.set_size(scanout.scanout, size);
            }
            FromBackEnd::DmabufUpdate { .. } => state.send(&FromFrontEnd::DmabufUpdated, None),
            FromBackEnd::Map(map) => {
                let status = state.map(&map, fd).map_or_else(|error| error, |()| 0);
                state.send(&FromFrontEnd::Mapped(status), None);
            }
            FromBackEnd::Unmap(unmap) => {
                if let Some(region) = &state.region {
                    region.unmap(unmap.offset);
                }
            }
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

/// The guest's shared memory region.
impl State {
    fn forget_host_memory(&self) {
        if let Some(region) = &self.region {
            region.unmap_all();
        }
    }

    /// Shows memory of the back end to the guest; the error is a number of Linux.
    fn map(&self, map: &Map, fd: Option<OwnedFd>) -> Result<(), u32> {
        let region = self.region.as_ref().ok_or(libc::EOPNOTSUPP as u32)?;
        let fd = fd.ok_or(libc::EBADF as u32)?;
        region.map(map.offset, map.length, fd.as_fd(), map.file_offset).map_err(|error| {
            tracing::warn!(%error, offset = map.offset, length = map.length, "the GPU's memory stays unseen");
            match error {
                MapError::Place { .. } | MapError::Short { .. } | MapError::HugePages => {
                    libc::EINVAL as u32
                }
                MapError::InUse(_) => libc::EBUSY as u32,
                MapError::TooMany => libc::ENOMEM as u32,
                MapError::System(source) => source.raw_os_error().unwrap_or(libc::EIO) as u32,
            }
        })
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
    fn send(&mut self, message: &FromFrontEnd, fd: Option<OwnedFd>) {
        if self.socket.is_none() {
            return;
        }
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        self.waiting.push_back(Waiting { bytes, sent: 0, fd });
        self.flush();
    }

    fn flush(&mut self) {
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

    fn has_shm(&self) -> bool {
        self.features.is_some_and(|features| features.contains(ProtocolFeatures::SHM_FRAMES))
    }

    fn send_want(&mut self, id: u32) {
        let Some(scanout) = self.scanouts.get(id as usize) else { return };
        if self.has_shm() {
            let flags = if scanout.max_fps > 0 { WANT_FULL } else { 0 };
            let want = Want { scanout: id, max_fps: scanout.max_fps, flags, reserved: 0 };
            self.send(&FromFrontEnd::Want(want), None);
        }
    }

    fn display_info(&self) -> RespDisplayInfo {
        let hdr = CtrlHdr::new(kind::OK_DISPLAY_INFO);
        let mut info = RespDisplayInfo { hdr, ..RespDisplayInfo::default() };
        // Side by side, as drivers that know positions expect it.
        let mut x = 0;
        for (one, scanout) in info.scanouts.iter_mut().zip(&self.scanouts) {
            if let Some(mode) = scanout.mode {
                one.rect = Rect::new(x, 0, mode.width, mode.height).into();
                one.enabled = 1.into();
                x += mode.width;
            }
        }
        info
    }

    fn edid(&self, scanout: u32) -> RespEdid {
        match self.scanouts.get(scanout as usize) {
            None => RespEdid::new(CtrlHdr::new(kind::ERR_INVALID_SCANOUT_ID), &[]),
            Some(Scanout { mode: None, .. }) => {
                let monitor = Monitor::new(scanout, 1024, 768);
                RespEdid::new(CtrlHdr::new(kind::OK_EDID), &edid::generate(&monitor))
            }
            Some(Scanout { mode: Some(mode), .. }) => {
                let DisplayMode { width, height, width_mm, height_mm } = *mode;
                let monitor =
                    Monitor { width_mm, height_mm, ..Monitor::new(scanout, width, height) };
                RespEdid::new(CtrlHdr::new(kind::OK_EDID), &edid::generate(&monitor))
            }
        }
    }

    fn set_size(&mut self, id: u32, size: Option<(u32, u32)>) {
        let shm = self.has_shm();
        let Some(scanout) = self.scanouts.get_mut(id as usize) else { return };
        // The picture of a new back end that takes over: nothing changes but the memory.
        let taken_over = std::mem::take(&mut scanout.stale) && size.is_some();
        let same = scanout.size == size;
        if same && !taken_over {
            return;
        }
        scanout.size = size;
        scanout.slots = None;
        scanout.newest = None;
        scanout.held = 0;
        let old_shadow = scanout.shadow.take().filter(|_| same);
        scanout.generation = scanout.generation.wrapping_add(1);
        let generation = scanout.generation;
        if !same {
            self.events.push_back(Event::Scanout(id, size));
        }
        let Some((width, height)) = size else { return };
        let bytes = u64::from(width) * u64::from(height) * u64::from(BYTES_PER_PIXEL);
        if bytes > MAX_PICTURE || width > MAX_SIZE || height > MAX_SIZE {
            tracing::error!(width, height, "the guest's picture is too large to be shown");
            return;
        }
        if shm {
            let made = ShmScanout::layout(id, generation, width, height, SLOTS)
                .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))
                .and_then(make_slots);
            match made {
                Ok((memory, fd)) => {
                    let layout = *memory.layout();
                    if let Some(scanout) = self.scanouts.get_mut(id as usize) {
                        scanout.slots = Some(Arc::new(memory));
                    }
                    self.send(&FromFrontEnd::ShmScanout(layout), Some(fd));
                }
                Err(error) => tracing::error!(%error, "no memory for the guest's picture"),
            }
        } else if let Some(scanout) = self.scanouts.get_mut(id as usize) {
            let shadow = old_shadow.unwrap_or_else(|| {
                let pixels = RwLock::new(vec![0; bytes as usize]);
                Arc::new(Shadow { pixels })
            });
            scanout.shadow = Some(shadow);
            scanout.full = scanout.max_fps > 0;
        }
    }

    fn update(&mut self, id: u32, rect: Rect, pixels: &[u8]) {
        let Some(scanout) = self.scanouts.get_mut(id as usize) else { return };
        let (Some(shadow), Some((width, height))) = (&scanout.shadow, scanout.size) else { return };
        if rect.is_empty() || !rect.fits(width, height) {
            tracing::debug!(?rect, width, height, "an update outside its scanout is ignored");
            return;
        }
        let row = rect.width as usize * BYTES_PER_PIXEL as usize;
        let stride = width as usize * BYTES_PER_PIXEL as usize;
        let first = rect.y as usize * stride + rect.x as usize * BYTES_PER_PIXEL as usize;
        {
            let mut target = shadow.pixels.write().unwrap_or_else(PoisonError::into_inner);
            for (line, source) in pixels.chunks_exact(row).enumerate() {
                let start = first + line * stride;
                if let Some(target) = target.get_mut(start..start + row) {
                    target.copy_from_slice(source);
                }
            }
        }
        if scanout.max_fps > 0 {
            scanout.sequence += 1;
            let damage = match std::mem::take(&mut scanout.full) {
                true => Rect::of_size(width, height),
                false => rect,
            };
            let frame = Frame::over_shadow(shadow.clone(), (width, height), scanout.sequence);
            self.events.push_back(Event::Frame(id, frame, vec![damage]));
        }
    }

    /// Makes the complete frames that were asked for and that no back end will send.
    fn full_frames(&mut self, owner: &Weak<Display>) {
        let alive = self.socket.is_some();
        for (id, scanout) in self.scanouts.iter_mut().enumerate() {
            let Some((width, height)) = scanout.size.filter(|_| scanout.full) else { continue };
            let frame = match (&scanout.shadow, &scanout.slots, scanout.newest) {
                (Some(shadow), _, _) => {
                    scanout.sequence += 1;
                    Frame::over_shadow(shadow.clone(), (width, height), scanout.sequence)
                }
                (None, Some(memory), Some((slot, sequence))) if !alive => {
                    Frame::in_slot(memory.clone(), slot, sequence, owner.clone())
                }
                _ => continue,
            };
            scanout.full = false;
            let damage = vec![Rect::of_size(width, height)];
            self.events.push_back(Event::Frame(id as u32, frame, damage));
        }
    }

    fn frame(&mut self, frame: &frames::Frame, owner: &Weak<Display>) {
        let Some(scanout) = self.scanouts.get_mut(frame.scanout as usize) else { return };
        let Some(memory) = scanout.slots.clone() else { return };
        let layout = *memory.layout();
        if frame.generation != layout.generation {
            // Sent before the back end saw the memory for the new size.
            return;
        }
        let bit = 1 << frame.slot.min(31);
        if frame.slot >= layout.slots || scanout.held & bit != 0 {
            tracing::debug!(slot = frame.slot, "a frame in a slot that is not the back end's");
            return;
        }
        let surface = Rect::of_size(layout.width, layout.height);
        let damage: Vec<Rect> = frame
            .damage
            .iter()
            .map(|rect| rect.intersection(&surface))
            .filter(|rect| !rect.is_empty())
            .collect();
        scanout.held |= bit;
        let sequence = scanout.sequence_base.wrapping_add(frame.sequence);
        scanout.sequence = sequence;
        scanout.newest = Some((frame.slot, sequence));
        let picture = Frame::in_slot(memory, frame.slot, sequence, owner.clone());
        self.events.push_back(Event::Frame(frame.scanout, picture, damage));
    }

    fn define_cursor(&mut self, pos: CursorPos, cursor: Cursor) {
        let Some(scanout) = self.scanouts.get_mut(pos.scanout as usize) else { return };
        let cursor = Arc::new(cursor);
        scanout.cursor = Some(cursor.clone());
        scanout.cursor_pos = (pos.x, pos.y);
        scanout.cursor_visible = true;
        self.events.push_back(Event::CursorDefine(pos.scanout, cursor));
        self.events.push_back(Event::CursorMove(pos.scanout, pos.x, pos.y));
    }

    fn move_cursor(&mut self, pos: CursorPos) {
        let Some(scanout) = self.scanouts.get_mut(pos.scanout as usize) else { return };
        scanout.cursor_pos = (pos.x, pos.y);
        // "Set/show the cursor position": a hidden cursor comes back.
        if let Some(cursor) = scanout.cursor.clone().filter(|_| !scanout.cursor_visible) {
            scanout.cursor_visible = true;
            self.events.push_back(Event::CursorDefine(pos.scanout, cursor));
        }
        self.events.push_back(Event::CursorMove(pos.scanout, pos.x, pos.y));
    }

    fn hide_cursor(&mut self, id: u32) {
        let Some(scanout) = self.scanouts.get_mut(id as usize) else { return };
        if std::mem::take(&mut scanout.cursor_visible) {
            self.events.push_back(Event::CursorHide(id));
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

/// Makes the memory for frames; the descriptor is for the back end.
fn make_slots(layout: ShmScanout) -> io::Result<(SlotMemory, OwnedFd)> {
    let size = layout.checked_size().ok_or(io::ErrorKind::InvalidInput)?;
    let fd = rustix::fs::memfd_create(
        "drago-gpu-frames",
        MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
    )?;
    rustix::fs::ftruncate(&fd, size)?;
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    let memory = SlotMemory::map(layout, File::from(fd.try_clone()?))?;
    Ok((memory, fd))
}
