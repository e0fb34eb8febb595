//! The device as [`vhost_user_backend`] sees it: takes commands out of the queues, puts answers in.
//!
//! Two threads serve the queues. The control queue executes in order; on the two commands that only
//! the front end can answer it pauses (it does not wait) and the GPU socket's thread goes on with it
//! when the answer arrives. The cursor queue shares nothing with it but the moment in which a new
//! image is read, so that the pointer stays smooth under load.

use std::{
    io,
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use gpu_protocol::{
    socket::{FromBackEnd, FromFrontEnd},
    virtio::{
        CONTROL_QUEUE, CURSOR_QUEUE, Command, Config, CtrlHdr, Features, MAX_COMMAND, MAX_SCANOUTS,
        QUEUES, Refusal, decode, kind,
    },
};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VringRwLock, VringT};
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryLoadGuard};
use vmm_sys_util::{
    epoll::EventSet,
    event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier},
};
use zerocopy::IntoBytes;

use crate::{
    GuestMemory,
    control::{Control, Limits, Outcome, Question},
    link::{Link, Listener},
    renderer::Renderer,
};

/// Entries in each queue at most.
pub const QUEUE_SIZE: usize = 1024;

const VERSION_1: u64 = 1 << 32;
const RING_FEATURES: u64 = (1 << 28) | (1 << 29);

type Memory = GuestMemoryAtomic<GuestMemory>;
type Ring = VringRwLock<Memory>;

/// A chain that was taken out of a queue and has no answer yet.
#[derive(Debug)]
struct Request {
    head: u16,
    command: Vec<u8>,
    answer: Vec<(GuestAddress, u32)>,
}

impl Request {
    fn read(chain: DescriptorChain<GuestMemoryLoadGuard<GuestMemory>>) -> Self {
        let head = chain.head_index();
        let mut request = Self { head, command: Vec::new(), answer: Vec::new() };
        let memory = chain.memory().clone();
        for descriptor in chain {
            if descriptor.is_write_only() {
                request.answer.push((descriptor.addr(), descriptor.len()));
                continue;
            }
            let old = request.command.len();
            let length = (descriptor.len() as usize).min(MAX_COMMAND - old);
            request.command.resize(old + length, 0);
            if memory.read_slice(&mut request.command[old..], descriptor.addr()).is_err() {
                // An address outside memory: what was read so far will not decode.
                request.command.truncate(old);
                break;
            }
        }
        request
    }

    /// Writes the answer as far as there is room for it; returns the number of bytes.
    fn write(&self, memory: &GuestMemory, mut bytes: &[u8]) -> u32 {
        let mut written = 0;
        for (address, length) in &self.answer {
            let count = bytes.len().min(*length as usize);
            let (now, later) = bytes.split_at(count);
            if memory.write_slice(now, *address).is_err() {
                break;
            }
            written += count as u32;
            bytes = later;
        }
        written
    }
}

/// The control queue's state.
struct ControlQueue {
    control: Control,
    ring: Option<Ring>,
    /// The command on which the queue pauses.
    paused: Option<(Request, CtrlHdr, Question)>,
    /// Questions whose replies have not come yet, oldest first; the front end replies in order.
    asked: Vec<Question>,
}

struct Shared {
    memory: OnceLock<Memory>,
    features: u64,
    capsets: u32,
    control: Mutex<ControlQueue>,
    link: Arc<Link>,
    event_idx: AtomicBool,
    this: Weak<Shared>,
}

/// The device; clones are handles to the same one.
#[derive(Clone)]
pub struct GpuDevice(Arc<Shared>);

impl std::fmt::Debug for GpuDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GpuDevice").field("link", &self.0.link).finish_non_exhaustive()
    }
}

impl GpuDevice {
    /// A device without a front end.
    pub fn new(renderer: Box<dyn Renderer>, limits: Limits) -> io::Result<Self> {
        let link = Link::new()?;
        let features = (renderer.features() | Features::EDID).bits()
            | VERSION_1
            | RING_FEATURES
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let capsets = renderer.capsets();
        let queue = ControlQueue {
            control: Control::new(renderer, limits, link.clone()),
            ring: None,
            paused: None,
            asked: Vec::new(),
        };
        Ok(Self(Arc::new_cyclic(|this| Shared {
            memory: OnceLock::new(),
            features,
            capsets,
            control: Mutex::new(queue),
            link,
            event_idx: AtomicBool::new(false),
            this: this.clone(),
        })))
    }

    /// Uses this GPU socket from now on.
    pub fn connect(&self, socket: UnixStream) -> io::Result<()> {
        let listener: Weak<Shared> = self.0.this.clone();
        let mut queue = self.0.lock();
        self.0.link.connect(socket, listener)?;
        queue.asked.clear();
        queue.control.connected();
        // A command that was paused on the old front end asks the new one.
        if let Some((_, _, question)) = queue.paused {
            queue.ask(question, &self.0.link);
        }
        Ok(())
    }
}

impl ControlQueue {
    /// Sends a question unless the same one is already on its way.
    fn ask(&mut self, question: Question, link: &Link) {
        if self.asked.contains(&question) {
            return;
        }
        self.asked.push(question);
        link.send(&match question {
            Question::DisplayInfo | Question::EdidFromInfo(_) => FromBackEnd::GetDisplayInfo,
            Question::Edid(scanout) => FromBackEnd::GetEdid { scanout },
        });
    }

    /// The oldest question of one of two kinds was answered.
    fn answered(&mut self, edid: bool) -> Option<Question> {
        let is_kind = |question: &Question| matches!(question, Question::Edid(_)) == edid;
        let index = self.asked.iter().position(is_kind)?;
        Some(self.asked.remove(index))
    }

    /// Answers the paused command, if it waits for this.
    fn resume(&mut self, question: Question, memory: &GuestMemory) {
        match self.paused.take() {
            Some((request, hdr, paused_on)) if paused_on == question => {
                let answer = self.control.answer_to(&hdr, question);
                let written = request.write(memory, &answer);
                if let Some(ring) = &self.ring {
                    give_back(ring, request.head, written);
                }
            }
            other => self.paused = other,
        }
    }
}

/// Puts a chain into the used ring and tells the driver if it wants to know.
fn give_back(ring: &Ring, head: u16, written: u32) {
    if let Err(error) = ring.add_used(head, written) {
        tracing::error!(%error, "the used ring cannot be written");
        return;
    }
    signal(ring);
}

fn signal(ring: &Ring) {
    // If the guest's wish cannot be read, an interrupt too many does no harm.
    if ring.needs_notification().unwrap_or(true)
        && let Err(error) = ring.signal_used_queue()
    {
        tracing::error!(%error, "the driver cannot be notified");
    }
}

/// What a look into the available ring gave.
enum Next {
    Request(Request),
    Empty,
    /// The ring is stopped or broken: nothing more until the next notification.
    Stopped,
}

/// The next chain, while the ring runs.
fn next_request(ring: &Ring, memory: &Memory) -> Next {
    let mut state = ring.get_mut();
    if !state.is_enabled() || !state.get_queue().ready() {
        return Next::Stopped;
    }
    let chain = match state.get_queue_mut().iter(memory.memory()) {
        Ok(mut chains) => chains.next(),
        Err(error) => {
            tracing::error!(%error, "the available ring cannot be read");
            return Next::Stopped;
        }
    };
    drop(state);
    chain.map_or(Next::Empty, |chain| Next::Request(Request::read(chain)))
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, ControlQueue> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Executes what is in the control queue until it is empty or pauses.
    fn run_control(&self, queue: &mut ControlQueue) {
        let (Some(memory), Some(ring)) = (self.memory.get(), queue.ring.clone()) else { return };
        while queue.paused.is_none() {
            let request = match next_request(&ring, memory) {
                Next::Request(request) => request,
                Next::Empty if self.rearm(&ring) => continue,
                Next::Empty | Next::Stopped => break,
            };
            let guest = memory.memory();
            let (hdr, command) = decode(&request.command);
            match queue.control.execute(&guest, &hdr, command) {
                Outcome::Answer(bytes) => {
                    let written = request.write(&guest, &bytes);
                    give_back(&ring, request.head, written);
                }
                Outcome::Ask(question) if self.link.is_connected() => {
                    queue.paused = Some((request, hdr, question));
                    queue.ask(question, &self.link);
                }
                Outcome::Ask(question) => {
                    let answer = queue.control.answer_to(&hdr, question);
                    let written = request.write(&guest, &answer);
                    give_back(&ring, request.head, written);
                }
            }
        }
    }

    fn run_cursor(&self, ring: &Ring) {
        let Some(memory) = self.memory.get() else { return };
        loop {
            let request = match next_request(ring, memory) {
                Next::Request(request) => request,
                Next::Empty if self.rearm(ring) => continue,
                Next::Empty | Next::Stopped => return,
            };
            let (hdr, command) = decode(&request.command);
            let kind = match command.and_then(|command| self.cursor(&command)) {
                Ok(()) => kind::OK_NODATA,
                Err(refusal) => refusal as u32,
            };
            let written = request.write(&memory.memory(), hdr.answer(kind).as_bytes());
            give_back(ring, request.head, written);
        }
    }

    fn cursor(&self, command: &Command) -> Result<(), Refusal> {
        let checked = |scanout: u32| match (scanout as usize) < MAX_SCANOUTS {
            true => Ok(scanout),
            false => Err(Refusal::InvalidScanout),
        };
        match *command {
            Command::MoveCursor { scanout, x, y } => {
                self.link.cursor_move(checked(scanout)?, (x, y));
            }
            Command::UpdateCursor { scanout, resource: 0, .. } => {
                self.link.cursor_hide(checked(scanout)?);
            }
            Command::UpdateCursor { scanout, x, y, resource, hot_x, hot_y } => {
                let scanout = checked(scanout)?;
                let image = self.lock().control.cursor_image(resource)?;
                self.link.cursor_define(scanout, (x, y), (hot_x, hot_y), image);
            }
            _ => return Err(Refusal::Unspecified),
        }
        Ok(())
    }

    /// Asks for notifications again; `true` if there is already more to do.
    fn rearm(&self, ring: &Ring) -> bool {
        self.event_idx.load(Ordering::Relaxed)
            && ring.get_ref().is_enabled()
            && ring.enable_notification().unwrap_or(false)
    }
}

impl Listener for Shared {
    fn message(&self, message: FromFrontEnd, fd: Option<OwnedFd>) {
        let mut queue = self.lock();
        let guest = self.memory.get().map(GuestAddressSpace::memory);
        match message {
            FromFrontEnd::ProtocolFeatures(bits) => queue.control.negotiate(bits),
            FromFrontEnd::DisplayInfo(info) => {
                queue.control.set_display(&info);
                if let (Some(question), Some(guest)) = (queue.answered(false), &guest) {
                    queue.resume(question, guest);
                }
            }
            FromFrontEnd::Edid(edid) => {
                let question = queue.answered(true);
                if let Some(Question::Edid(scanout)) = question {
                    queue.control.set_edid(scanout, edid);
                }
                if let (Some(question), Some(guest)) = (question, &guest) {
                    queue.resume(question, guest);
                }
            }
            // Never asked for.
            FromFrontEnd::DmabufUpdated => {}
            FromFrontEnd::ShmScanout(layout) => queue.control.set_slots(layout, fd),
            FromFrontEnd::Release(release) => queue.control.release(&release),
            FromFrontEnd::Want(want) => queue.control.want(&want),
        }
        self.run_control(&mut queue);
    }

    fn room(&self) {
        self.lock().control.pump();
    }

    fn deadline_passed(&self) {
        self.lock().control.pump();
    }

    fn deadline(&self) -> Option<Instant> {
        self.lock().control.deadline()
    }

    fn closed(&self, generation: u64) {
        let mut queue = self.lock();
        if self.link.generation() != generation {
            return;
        }
        // Nobody will answer: go on with what was known before.
        queue.asked.clear();
        if let (Some((_, _, question)), Some(memory)) = (&queue.paused, self.memory.get()) {
            let question = *question;
            queue.resume(question, &memory.memory());
        }
        self.run_control(&mut queue);
    }
}

impl VhostUserBackend for GpuDevice {
    type Bitmap = ();
    type Vring = Ring;

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
    }

    fn reset_device(&self) {
        let mut queue = self.0.lock();
        queue.paused = None;
        queue.control.reset();
    }

    fn set_event_idx(&self, enabled: bool) {
        self.0.event_idx.store(enabled, Ordering::Relaxed);
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
        let _ = self.0.memory.set(memory);
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
            let mut queue = self.0.lock();
            // The front end may be waiting for this ring to stop before it answers anything, so the
            // paused command is answered with what was known before.
            if let (Some((_, _, question)), Some(memory)) = (&queue.paused, self.0.memory.get()) {
                let question = *question;
                queue.resume(question, &memory.memory());
            }
            queue.ring = None;
        }
        Ok(())
    }

    fn handle_event(
        &self,
        event: u16,
        events: EventSet,
        rings: &[Ring],
        thread: usize,
    ) -> io::Result<()> {
        let (Some(ring), true) = (rings.get(event as usize), events.contains(EventSet::IN)) else {
            return Ok(());
        };
        if thread == usize::from(CONTROL_QUEUE) {
            let mut queue = self.0.lock();
            if queue.ring.is_none() {
                let (ready, fresh) = {
                    let state = ring.get_ref();
                    let ring = state.get_queue();
                    (ring.ready(), ring.next_avail() == 0 && ring.next_used() == 0)
                };
                if ready && fresh {
                    // A driver that has just started, after a reset of which not every front end
                    // tells us: what the one before it left behind would be in its way.
                    queue.control.reset();
                }
                queue.ring = ready.then(|| ring.clone());
            }
            self.0.run_control(&mut queue);
        } else {
            self.0.run_cursor(ring);
        }
        Ok(())
    }
}
