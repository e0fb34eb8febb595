//! A queue in service: takes chains out of the available ring, puts answers into the used ring, and
//! keeps the books about what is in between ([`crate::journal`]).
//!
//! Locks are taken in this order: state of the ring, then the library's.
//!
//! A driver that breaks the rules for rings (VIRTIO 1.3 §2.7) gets no more service from that queue:
//! the front end is told by the ring's error descriptor and makes the device need a reset.

use std::{
    collections::VecDeque,
    fmt::Display,
    fs::File,
    io::{self, Write},
    ops::Deref,
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use gpu_protocol::{
    chain::{self, Violation},
    virtio::{CtrlHdr, MAX_COMMAND, kind},
};
use vhost_user_backend::{VringRwLock, VringT};
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend};

use zerocopy::{FromBytes, IntoBytes};

use crate::{GuestMemory, journal::Journal};

/// Guest memory, which the front end may replace.
pub type Memory = GuestMemoryAtomic<GuestMemory>;

/// A ring as [`vhost_user_backend`] has it.
pub type Vring = VringRwLock<Memory>;

/// A chain that was taken out of a queue and has no answer yet.
#[derive(Debug)]
pub struct Request {
    /// Its first descriptor.
    pub head: u16,
    /// All that the guest gave, up to [`MAX_COMMAND`] bytes.
    pub command: Vec<u8>,
    /// A predecessor took it and died: it is executed for the last time.
    pub again: bool,
    answer: Vec<(GuestAddress, u32)>,
}

impl Request {
    /// Reads the chain that begins at `head` of the table at `table`.
    fn read(
        memory: &GuestMemory,
        table: u64,
        ring_size: u16,
        head: u16,
    ) -> Result<Self, Violation> {
        let buffers = chain::walk(table, ring_size, head, |at| {
            let mut descriptor = [0; 16];
            memory.read_slice(&mut descriptor, GuestAddress(at)).ok().map(|()| descriptor)
        })?;
        let mut request = Self { head, command: Vec::new(), again: false, answer: Vec::new() };
        for buffer in buffers {
            let (address, length) = (GuestAddress(buffer.address), buffer.length as usize);
            if length > 0 && !memory.check_range(address, length) {
                return Err(Violation::Buffer);
            }
            if buffer.writable {
                request.answer.push((address, buffer.length));
                continue;
            }
            let old = request.command.len();
            request.command.resize(old + length.min(MAX_COMMAND - old), 0);
            memory
                .read_slice(&mut request.command[old..], address)
                .map_err(|_| Violation::Buffer)?;
        }
        Ok(request)
    }

    /// A chain without buffers.
    #[cfg(test)]
    pub(crate) fn empty() -> Self {
        Self { head: 0, command: Vec::new(), again: false, answer: Vec::new() }
    }

    /// Answers: writes what there is room for, gives the chain back, tells the driver.
    pub fn answer(&self, ring: &Ring, memory: &GuestMemory, bytes: &[u8]) {
        let written = self.write(memory, bytes);
        ring.give_back(self.head, written);
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

/// Whether it does no harm to execute a command that was perhaps executed already. 3D commands are
/// lost with their context, and one of them may be what the predecessor died of.
fn is_repeatable(command: &[u8]) -> bool {
    let kind = command.first_chunk().map(|bytes| u32::from_le_bytes(*bytes));
    kind.is_some_and(|kind| {
        matches!(
            kind,
            kind::GET_DISPLAY_INFO
                ..=kind::RESOURCE_DETACH_BACKING
                    | kind::GET_EDID
                    | kind::RESOURCE_CREATE_BLOB
                    | kind::SET_SCANOUT_BLOB
                    | kind::UPDATE_CURSOR
                    | kind::MOVE_CURSOR
        )
    })
}

/// Whether an error in answer to a repeated command may mean that it had been executed before.
fn was_done_before(command: &[u8]) -> bool {
    let kind = command.first_chunk().map(|bytes| u32::from_le_bytes(*bytes));
    kind.is_some_and(|kind| {
        matches!(
            kind,
            kind::RESOURCE_CREATE_2D
                | kind::RESOURCE_CREATE_BLOB
                | kind::RESOURCE_UNREF
                | kind::RESOURCE_ATTACH_BACKING
                | kind::RESOURCE_DETACH_BACKING
        )
    })
}

/// Whether an answer is one of the error answers (VIRTIO 1.3 §5.7.6.7).
pub(crate) fn is_error(answer: &[u8]) -> bool {
    let kind = answer.first_chunk().map_or(kind::ERR_UNSPEC, |bytes| u32::from_le_bytes(*bytes));
    kind >= kind::ERR_UNSPEC
}

/// What a look into the available ring gave.
#[derive(Debug)]
pub enum Next {
    /// A command.
    Request(Request),
    /// A command that a predecessor died on: to be refused.
    Refused(Request),
    /// Nothing there.
    Empty,
    /// The ring is stopped or broken: nothing more until the next notification.
    Stopped,
}

#[derive(Debug, Default)]
struct State {
    journal: Option<Arc<Journal>>,
    error: Option<File>,
    /// What a predecessor left, to be taken before anything else; the flag: refuse it.
    late: VecDeque<(Request, bool)>,
    started: bool,
}

/// What is kept about a ring beside what the vhost-user library has.
#[derive(Debug)]
pub struct RingState {
    number: u16,
    state: Mutex<State>,
    broken: AtomicBool,
}

impl RingState {
    /// For the queue of this number.
    pub fn new(number: u16) -> Arc<Self> {
        Arc::new(Self { number, state: Mutex::default(), broken: AtomicBool::new(false) })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps the books there from now on.
    pub fn set_journal(&self, journal: Option<Arc<Journal>>) {
        self.lock().journal = journal;
    }

    /// Where to tell that the ring is broken.
    pub fn set_error(&self, fd: Option<OwnedFd>) {
        self.lock().error = fd.map(File::from);
    }

    /// The ring was stopped.
    pub fn stopped(&self) {
        let mut state = self.lock();
        state.started = false;
        state.late.clear();
        self.broken.store(false, Ordering::Release);
    }
}

/// A ring together with its state. Clones refer to the same one.
#[derive(Clone)]
pub struct Ring {
    vring: Vring,
    state: Arc<RingState>,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").field("state", &self.state).finish_non_exhaustive()
    }
}

impl Deref for Ring {
    type Target = Vring;

    fn deref(&self) -> &Vring {
        &self.vring
    }
}

impl Ring {
    /// Serves `vring`. When it has just been started, what a predecessor left unanswered comes out
    /// of it first.
    pub fn new(vring: &Vring, state: &Arc<RingState>, memory: &Memory) -> Self {
        let ring = Self { vring: vring.clone(), state: state.clone() };
        let mut state = ring.state.lock();
        if !std::mem::replace(&mut state.started, true)
            && let Err(violation) = ring.resume(&mut state, &memory.memory())
        {
            drop(state);
            ring.fail(violation);
            return ring;
        }
        drop(state);
        ring
    }

    fn resume(&self, state: &mut State, memory: &GuestMemory) -> Result<(), Violation> {
        let Some(journal) = &state.journal else { return Ok(()) };
        let mut vring = self.vring.get_mut();
        let queue = vring.get_queue_mut();
        let (used, size, table) = (queue.next_used(), queue.size(), queue.desc_table());
        let left = journal.start(self.state.number, size, used);
        if left.is_empty() {
            return Ok(());
        }
        tracing::info!(queue = self.state.number, count = left.len(), "commands without an answer");
        queue.set_next_avail(used.wrapping_add(left.len() as u16));
        for one in left {
            let request = Request::read(memory, table, size, one.head)?;
            let refuse = one.attempts > 0 || !is_repeatable(&request.command);
            state.late.push_back((Request { again: true, ..request }, refuse));
        }
        Ok(())
    }

    /// The next chain, while the ring runs.
    pub fn next(&self, memory: &Memory) -> Next {
        if self.state.broken.load(Ordering::Acquire) {
            return Next::Stopped;
        }
        let mut state = self.state.lock();
        let mut vring = self.vring.get_mut();
        if !vring.is_enabled() || !vring.get_queue().ready() {
            return Next::Stopped;
        }
        if let Some((request, refuse)) = state.late.pop_front() {
            if refuse {
                return Next::Refused(request);
            }
            if let Some(journal) = &state.journal {
                journal.taken(self.state.number, request.head, 1);
            }
            return Next::Request(request);
        }
        let queue = vring.get_queue_mut();
        let head = match queue.iter(memory.memory()) {
            Ok(mut chains) => chains.next().map(|chain| chain.head_index()),
            Err(error) => {
                drop((vring, state));
                self.fail(error);
                return Next::Stopped;
            }
        };
        let Some(head) = head else { return Next::Empty };
        let (table, size) = (queue.desc_table(), queue.size());
        drop(vring);
        match Request::read(&memory.memory(), table, size, head) {
            Ok(request) => {
                if let Some(journal) = &state.journal {
                    journal.taken(self.state.number, head, 0);
                }
                Next::Request(request)
            }
            Err(violation) => {
                drop(state);
                self.fail(violation);
                Next::Stopped
            }
        }
    }

    /// Puts a chain into the used ring and tells the driver if it wants to know.
    fn give_back(&self, head: u16, written: u32) {
        let put = || {
            self.vring.add_used(head, written)?;
            Ok::<u16, virtio_queue::Error>(self.vring.get_ref().get_queue().next_used())
        };
        let journal = self.state.lock().journal.clone();
        let done = match journal {
            Some(journal) => journal.answered(self.state.number, head, put),
            None => put().map(drop),
        };
        match done {
            Ok(()) => self.signal(),
            Err(error) => self.fail(error),
        }
    }

    /// Whether the front end keeps something for a successor.
    pub fn has_journal(&self) -> bool {
        self.state.lock().journal.is_some()
    }

    /// Takes note of what became of a command before it is answered; returns the answer to give.
    pub fn settle(&self, request: &Request, hdr: &CtrlHdr, answer: Vec<u8>) -> Vec<u8> {
        if !is_error(&answer) {
            self.record(&request.command);
        } else if request.again && was_done_before(&request.command) {
            return hdr.answer(kind::OK_NODATA).as_bytes().to_vec();
        }
        answer
    }

    /// Answers a command that is not executed.
    pub fn refuse(&self, request: &Request, memory: &GuestMemory) {
        let hdr = CtrlHdr::read_from_prefix(&request.command)
            .map_or_else(|_| CtrlHdr::default(), |(hdr, _)| hdr);
        request.answer(self, memory, hdr.answer(kind::ERR_UNSPEC).as_bytes());
    }

    fn record(&self, command: &[u8]) {
        if let Some(journal) = &self.state.lock().journal {
            journal.record(command);
        }
    }

    fn signal(&self) {
        // If the guest's wish cannot be read, an interrupt too many does no harm.
        if self.vring.needs_notification().unwrap_or(true)
            && let Err(error) = self.vring.signal_used_queue()
        {
            tracing::error!(%error, "the driver cannot be notified");
        }
    }

    /// The driver broke the rules: no more of this ring, and the front end is told.
    fn fail(&self, reason: impl Display) {
        if self.state.broken.swap(true, Ordering::AcqRel) {
            return;
        }
        tracing::warn!(queue = self.state.number, %reason, "the driver violated the queue's rules");
        if let Some(mut error) = self.state.lock().error.as_ref()
            && let Err(error) = error.write_all(&1_u64.to_ne_bytes())
            && error.kind() != io::ErrorKind::WouldBlock
        {
            tracing::error!(%error, "the front end cannot be told of it");
        }
    }
}
