//! The device as [`vhost_user_backend`] sees it: takes commands out of the queues, puts answers in.
//!
//! | module | what it does |
//! |---|---|
//! | [`worker`] | the device's thread: control queue, books, renderer |
//! | [`fences`] | commands that are not done yet |
//!
//! Two more threads serve the queues: that of the control queue only passes notifications on. The
//! cursor queue shares nothing with it but the moment in which a new image is read, so that the
//! pointer stays smooth under load. The control queue executes in order; on the two commands that
//! only the front end can answer it pauses (it does not wait) and goes on when the answer arrives.

mod fences;
mod worker;

use std::{
    io,
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
        mpsc::sync_channel,
    },
    thread,
};

use gpu_protocol::{
    socket::FromFrontEnd,
    virtio::{
        CONTROL_QUEUE, CURSOR_QUEUE, Command, Config, Features, MAX_SCANOUTS, QUEUES, Refusal,
        decode, kind,
    },
};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::VhostUserBackend;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::{
    epoll::EventSet,
    event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier},
};
use zerocopy::IntoBytes;

use self::{
    fences::Fences,
    worker::{Common, Job, Jobs, Worker},
};
use crate::{
    control::{Control, Limits},
    journal::Journal,
    link::{Link, Listener},
    relay::Direct,
    renderer::{FenceSink, Renderer},
    ring::{Memory, Next, Ring, RingState, Vring},
};

/// Entries in each queue at most.
pub const QUEUE_SIZE: usize = 1024;

const VERSION_1: u64 = 1 << 32;
const RING_FEATURES: u64 = (1 << 28) | (1 << 29);

struct Shared {
    common: Arc<Common>,
    features: u64,
    capsets: u32,
    jobs: Option<Jobs>,
    rings: [Arc<RingState>; QUEUES],
    /// What is kept for a successor, if the front end keeps it. Held while what a predecessor kept
    /// is executed.
    journal: Mutex<Option<Arc<Journal>>>,
    worker: Option<thread::JoinHandle<()>>,
    this: Weak<Shared>,
}

impl Drop for Shared {
    fn drop(&mut self) {
        // Ends the thread, and the renderer with it.
        self.jobs = None;
        if let Some(worker) = self.worker.take() {
            let _ = worker.join();
        }
    }
}

/// The device; clones are handles to the same one.
#[derive(Clone)]
pub struct GpuDevice(Arc<Shared>);

impl std::fmt::Debug for GpuDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GpuDevice").field("link", &self.0.common.link).finish_non_exhaustive()
    }
}

impl GpuDevice {
    /// A device without a front end. `renderer` is called on the device's own thread, which keeps
    /// what it makes; the device cannot be made if it fails.
    pub fn new<E>(
        renderer: impl FnOnce(Arc<dyn FenceSink>) -> Result<Box<dyn Renderer>, E> + Send + 'static,
        limits: Limits,
    ) -> io::Result<Self>
    where
        E: std::error::Error + Send + Sync + 'static,
    {
        let link = Link::new()?;
        let common = Arc::new(Common {
            memory: OnceLock::new(),
            link: link.clone(),
            event_idx: AtomicBool::new(false),
            kicked: AtomicBool::new(false),
            fences: Arc::new(Fences::default()),
        });
        let (jobs, inbox) = worker::jobs()?;
        let (made, result) = sync_channel(1);
        let for_worker = common.clone();
        let worker = thread::Builder::new().name("gpu-device".into()).spawn(move || {
            let renderer = match renderer(for_worker.fences.clone()) {
                Ok(renderer) => renderer,
                Err(error) => {
                    let _ = made.send(Err(error));
                    return;
                }
            };
            let _ = made.send(Ok((renderer.features(), renderer.capsets().len())));
            let control = Control::new(renderer, limits, link);
            Worker::new(for_worker, control).run(&inbox);
        })?;
        let (features, capsets) = result
            .recv()
            .map_err(|_| io::Error::other("the device's thread ended"))?
            .map_err(io::Error::other)?;
        Ok(Self(Arc::new_cyclic(|this| Shared {
            common,
            features: (features | Features::EDID).bits()
                | VERSION_1
                | RING_FEATURES
                | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits(),
            capsets: capsets as u32,
            jobs: Some(jobs),
            rings: [RingState::new(CONTROL_QUEUE), RingState::new(CURSOR_QUEUE)],
            journal: Mutex::default(),
            worker: Some(worker),
            this: this.clone(),
        })))
    }

    /// Uses this GPU socket from now on.
    pub fn connect(&self, socket: UnixStream) -> io::Result<()> {
        let listener: Weak<dyn Listener> = self.0.this.clone();
        let outcome = self.0.ask(|reply| Job::Connect(socket, listener, reply));
        outcome.unwrap_or_else(|| Err(io::Error::other("the device's thread ended")))
    }

    /// Waits until the device has done what it was told, and what it can do of its control queue.
    pub fn settle(&self) {
        self.0.ask(Job::Settle);
    }
}

impl Shared {
    fn send(&self, job: Job) {
        if let Some(jobs) = &self.jobs {
            jobs.send(job);
        }
    }

    fn ask<T>(&self, job: impl FnOnce(std::sync::mpsc::SyncSender<T>) -> Job) -> Option<T> {
        self.jobs.as_ref()?.ask(job)
    }

    fn run_cursor(&self, ring: &Ring) {
        let Some(memory) = self.common.memory.get() else { return };
        loop {
            let request = match ring.next(memory) {
                Next::Request(request) => request,
                Next::Refused(request) => {
                    ring.refuse(&request, &memory.memory());
                    continue;
                }
                Next::Empty if self.common.rearm(ring) => continue,
                Next::Empty | Next::Stopped => return,
            };
            let (hdr, command) = decode(&request.command);
            let kind = match command.and_then(|command| self.cursor(&command)) {
                Ok(()) => kind::OK_NODATA,
                Err(refusal) => refusal as u32,
            };
            let answer = ring.settle(&request, &hdr, hdr.answer(kind).as_bytes().to_vec());
            request.answer(ring, &memory.memory(), &answer);
        }
    }

    fn cursor(&self, command: &Command<'_>) -> Result<(), Refusal> {
        let link = &self.common.link;
        let checked = |scanout: u32| match (scanout as usize) < MAX_SCANOUTS {
            true => Ok(scanout),
            false => Err(Refusal::InvalidScanout),
        };
        match *command {
            Command::MoveCursor { scanout, x, y } => {
                link.cursor_move(checked(scanout)?, (x, y));
            }
            Command::UpdateCursor { scanout, resource: 0, .. } => {
                link.cursor_hide(checked(scanout)?);
            }
            Command::UpdateCursor { scanout, x, y, resource, hot_x, hot_y } => {
                let scanout = checked(scanout)?;
                let image = self.ask(|reply| Job::CursorImage(resource, reply));
                let image = image.unwrap_or(Err(Refusal::Unspecified))?;
                link.cursor_define(scanout, (x, y), (hot_x, hot_y), image);
            }
            _ => return Err(Refusal::Unspecified),
        }
        Ok(())
    }
}

impl Listener for Shared {
    fn message(&self, message: FromFrontEnd, fd: Option<OwnedFd>) {
        self.send(Job::Message(message, fd));
    }

    fn room(&self) {
        self.send(Job::Room);
    }

    fn closed(&self, generation: u64) {
        self.send(Job::Closed(generation));
    }
}

/// What a successor needs.
impl Shared {
    fn journal(&self) -> MutexGuard<'_, Option<Arc<Journal>>> {
        self.journal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_journal(&self, journal: Journal) {
        let journal = Some(Arc::new(journal));
        for ring in &self.rings {
            ring.set_journal(journal.clone());
        }
        *self.journal() = journal;
    }

    /// Brings back what a predecessor had, the first time that its journal is there. Returns when
    /// that is done, whichever thread does it.
    fn restore(&self) {
        let journal = self.journal();
        let commands = journal.as_ref().map(|journal| journal.inheritance()).unwrap_or_default();
        if commands.is_empty() {
            return;
        }
        let cursors = self.ask(|reply| Job::Restore(commands, reply)).unwrap_or_default();
        for bytes in cursors {
            let (_, command) = decode(&bytes);
            if let Err(refusal) = command.and_then(|command| self.cursor(&command)) {
                tracing::warn!(%refusal, "a cursor does not come back");
            }
        }
    }
}

impl Direct for GpuDevice {
    fn gpu_socket(&mut self, socket: UnixStream) -> io::Result<()> {
        self.connect(socket)
    }

    fn make_inflight(&mut self, queue_size: u16) -> io::Result<(u64, OwnedFd)> {
        let (journal, fd) = Journal::create(queue_size.min(QUEUE_SIZE as u16))?;
        let length = journal.size();
        // A front end asks when a driver starts: what the one before it left is gone.
        self.0.ask(Job::Reset);
        self.0.set_journal(journal);
        Ok((length, fd))
    }

    fn take_inflight(&mut self, fd: OwnedFd, length: u64, queue_size: u16) -> io::Result<()> {
        let journal = Journal::inherit(fd, length, queue_size.min(QUEUE_SIZE as u16))?;
        self.0.set_journal(journal);
        Ok(())
    }

    fn ring_error(&mut self, queue: u16, fd: Option<OwnedFd>) {
        if let Some(ring) = self.0.rings.get(usize::from(queue)) {
            ring.set_error(fd);
        }
    }
}

impl VhostUserBackend for GpuDevice {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        self.0.features
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
    }

    fn reset_device(&self) {
        self.0.ask(Job::ResetDevice);
        if let Some(journal) = &*self.0.journal() {
            journal.clear();
        }
    }

    fn set_event_idx(&self, enabled: bool) {
        self.0.common.event_idx.store(enabled, Ordering::Relaxed);
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        // All but num_capsets is the front end's business.
        let config = Config {
            num_scanouts: 1.into(),
            num_capsets: self.0.capsets.into(),
            ..Config::default()
        };
        let mut bytes = config.as_bytes().to_vec();
        // A front end may ask for more than there is; the rest reads as zero.
        let start = offset as usize;
        bytes.resize(bytes.len().max(start.saturating_add(size as usize).min(4096)), 0);
        bytes.get(start..start.saturating_add(size as usize)).unwrap_or(&[]).to_vec()
    }

    fn set_config(&self, _offset: u32, _bytes: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn update_memory(&self, memory: Memory) -> io::Result<()> {
        // The handle stays the same for ever; what it points at is replaced.
        let _ = self.0.common.memory.set(memory);
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        vec![1 << CONTROL_QUEUE, 1 << CURSOR_QUEUE]
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        // Without one the library waits for its threads for ever when the connection ends.
        new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC)
            .inspect_err(|error| tracing::error!(%error, "a queue thread cannot be ended"))
            .ok()
    }

    fn stop_vring(&self, index: u32) -> io::Result<()> {
        if index == u32::from(CONTROL_QUEUE) {
            self.0.ask(Job::Stop);
        }
        if let Some(ring) = self.0.rings.get(index as usize) {
            ring.stopped();
        }
        Ok(())
    }

    fn handle_event(
        &self,
        event: u16,
        events: EventSet,
        rings: &[Vring],
        thread: usize,
    ) -> io::Result<()> {
        let (Some(vring), true) = (rings.get(event as usize), events.contains(EventSet::IN)) else {
            return Ok(());
        };
        let common = &self.0.common;
        let (Some(memory), Some(state)) = (common.memory.get(), self.0.rings.get(thread)) else {
            return Ok(());
        };
        self.0.restore();
        let ring = Ring::new(vring, state, memory);
        if thread == usize::from(CURSOR_QUEUE) {
            self.0.run_cursor(&ring);
        } else if !common.kicked.swap(true, Ordering::SeqCst) {
            self.0.send(Job::Kick(ring));
        }
        Ok(())
    }
}
