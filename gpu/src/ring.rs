//! A queue in service: takes chains out of the available ring, puts answers into the used ring, and
//! keeps the books about what is in between ([`crate::journal`]).
//!
//! Locks are taken in this order: state of the ring, the journal's, the library's.
//!
//! A driver that breaks the rules for rings (VIRTIO 1.3 §2.7) gets no more service from that queue:
//! the front end is told by the ring's error descriptor and makes the device need a reset.

use std::{
    collections::{HashSet, VecDeque},
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
    /// Heads that were taken and not given back.
    taken: HashSet<u16>,
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
        state.taken.clear();
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
        let (used, size, table) = {
            let vring = self.vring.get_ref();
            let queue = vring.get_queue();
            (queue.next_used(), queue.size(), queue.desc_table())
        };
        let left = journal.start(self.state.number, size, used);
        if left.is_empty() {
            return Ok(());
        }
        tracing::info!(queue = self.state.number, count = left.len(), "commands without an answer");
        let next = used.wrapping_add(left.len() as u16);
        self.vring.get_mut().get_queue_mut().set_next_avail(next);
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
            drop(vring);
            state.taken.insert(request.head);
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
            // A chain that is in the device's hands cannot be given to it again (VIRTIO 1.3 §2.7.13);
            // it would also make the number of commands that wait for fences endless.
            Ok(_) if !state.taken.insert(head) => {
                drop(state);
                self.fail(Violation::InUse(head));
                Next::Stopped
            }
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
        let journal = {
            let mut state = self.state.lock();
            state.taken.remove(&head);
            state.journal.clone()
        };
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

#[cfg(test)]
mod tests {
    use std::io::Read;

    use gpu_protocol::virtio::CONTROL_QUEUE;
    use vm_memory::GuestAddress;

    use super::*;

    const SIZE: u16 = 8;
    const TABLE: u64 = 0;
    const AVAIL: u64 = 0x1000;
    const USED: u64 = 0x2000;
    const COMMANDS: u64 = 0x4000;
    const ANSWERS: u64 = 0x5000;

    /// A queue in which every head is a command of 24 bytes with as much room for the answer.
    struct Guest {
        memory: Memory,
        next: u16,
    }

    impl Guest {
        fn new() -> Self {
            let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
            let mut guest = Self { memory: Memory::new(memory), next: 0 };
            for head in 0..SIZE / 2 {
                let at = u64::from(head) * 0x100;
                guest.descriptor(head * 2, COMMANDS + at, 1, head * 2 + 1);
                guest.descriptor(head * 2 + 1, ANSWERS + at, 2, 0);
            }
            guest
        }

        fn put(&self, at: u64, bytes: &[u8]) {
            self.memory.memory().write_slice(bytes, GuestAddress(at)).unwrap();
        }

        fn descriptor(&mut self, index: u16, address: u64, flags: u16, next: u16) {
            let at = TABLE + u64::from(index) * 16;
            self.put(at, &address.to_le_bytes());
            self.put(at + 8, &24_u32.to_le_bytes());
            self.put(at + 12, &flags.to_le_bytes());
            self.put(at + 14, &next.to_le_bytes());
        }

        fn offer(&mut self, slot: u16, kind: u32) {
            self.put(COMMANDS + u64::from(slot) * 0x100, CtrlHdr::new(kind).as_bytes());
            self.offer_head(slot * 2);
        }

        fn offer_head(&mut self, head: u16) {
            self.put(AVAIL + 4 + u64::from(self.next % SIZE) * 2, &head.to_le_bytes());
            self.next += 1;
            self.put(AVAIL + 2, &self.next.to_le_bytes());
        }

        fn used(&self) -> u16 {
            self.memory.memory().read_obj(GuestAddress(USED + 2)).unwrap()
        }

        fn answer(&self, slot: u16) -> u32 {
            let at = GuestAddress(ANSWERS + u64::from(slot) * 0x100);
            self.memory.memory().read_obj(at).unwrap()
        }

        /// A process that starts to serve the queue, as the vhost-user library sets it up.
        fn serve(&self, journal: Option<Journal>) -> (Ring, Arc<RingState>) {
            let vring = Vring::new(self.memory.clone(), SIZE).unwrap();
            vring.set_queue_size(SIZE);
            vring.set_queue_info(TABLE, AVAIL, USED).unwrap();
            vring.set_queue_next_avail(self.used());
            vring.set_queue_next_used(self.used());
            vring.set_queue_ready(true);
            vring.set_enabled(true);
            let state = RingState::new(CONTROL_QUEUE);
            state.set_journal(journal.map(Arc::new));
            (Ring::new(&vring, &state, &self.memory), state)
        }

        fn taken(&self, ring: &Ring) -> (Request, bool) {
            match ring.next(&self.memory) {
                Next::Request(request) => (request, false),
                Next::Refused(request) => (request, true),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn a_successor_repeats_what_does_no_harm_and_that_once() {
        let mut guest = Guest::new();
        let (journal, fd) = Journal::create(SIZE).unwrap();
        let length = journal.size();
        let inherit = || Journal::inherit(fd.try_clone().unwrap(), length, SIZE).unwrap();
        let kinds = [kind::GET_EDID, kind::SUBMIT_3D, kind::RESOURCE_UNREF, kind::RESOURCE_FLUSH];
        for (slot, kind) in (0..).zip(kinds) {
            guest.offer(slot, kind);
        }
        let (first, _) = guest.serve(Some(journal));
        let requests: Vec<Request> = (0..3).map(|_| guest.taken(&first).0).collect();
        assert!(requests.iter().all(|request| !request.again));
        // The oldest is the only one that is answered; the last was never taken.
        requests[0].answer(&first, &guest.memory.memory(), &[1; 24]);
        drop(first);

        let (second, _) = guest.serve(Some(inherit()));
        let (request, refused) = guest.taken(&second);
        assert_eq!((request.head, refused), (2, true), "3D dies with its context");
        second.refuse(&request, &guest.memory.memory());
        assert_eq!((guest.used(), guest.answer(1)), (2, kind::ERR_UNSPEC));
        let (request, refused) = guest.taken(&second);
        assert_eq!((request.head, request.again, refused), (4, true, false));
        // It dies of that one.
        drop(second);

        let (third, _) = guest.serve(Some(inherit()));
        let (request, refused) = guest.taken(&third);
        assert_eq!((request.head, refused), (4, true), "not a third time");
        third.refuse(&request, &guest.memory.memory());
        let (request, refused) = guest.taken(&third);
        assert_eq!((request.head, request.again, refused), (6, false, false));
        request.answer(&third, &guest.memory.memory(), &[2; 24]);
        assert!(matches!(third.next(&guest.memory), Next::Empty));
        assert_eq!(guest.used(), 4);
    }

    #[test]
    fn what_was_done_before_is_no_error() {
        let mut guest = Guest::new();
        guest.offer(0, kind::RESOURCE_UNREF);
        let (journal, fd) = Journal::create(SIZE).unwrap();
        let length = journal.size();
        let (first, _) = guest.serve(Some(journal));
        let error = || CtrlHdr::default().answer(kind::ERR_INVALID_RESOURCE_ID);
        let (request, _) = guest.taken(&first);
        let answer = first.settle(&request, &CtrlHdr::default(), error().as_bytes().to_vec());
        assert!(is_error(&answer));
        let (second, _) = guest.serve(Some(Journal::inherit(fd, length, SIZE).unwrap()));
        let (request, _) = guest.taken(&second);
        let answer = second.settle(&request, &CtrlHdr::default(), error().as_bytes().to_vec());
        assert_eq!(answer[..4], kind::OK_NODATA.to_le_bytes());
    }

    #[test]
    fn violations_are_told_once_and_end_the_service() {
        let violations: [fn(&mut Guest); 5] = [
            |guest| guest.offer_head(SIZE),
            |guest| guest.descriptor(0, COMMANDS, 1, SIZE),
            |guest| guest.descriptor(1, ANSWERS, 3, 0),
            |guest| guest.descriptor(0, 0xffff, 1, 1),
            |guest| guest.next = SIZE * 2,
        ];
        for violate in violations {
            let mut guest = Guest::new();
            let (mut seen, told) = std::os::unix::net::UnixStream::pair().unwrap();
            let (ring, state) = guest.serve(None);
            state.set_error(Some(told.into()));
            violate(&mut guest);
            guest.offer(0, kind::RESOURCE_FLUSH);
            for _ in 0..3 {
                assert!(matches!(ring.next(&guest.memory), Next::Stopped));
            }
            let mut bytes = [0; 16];
            assert_eq!(seen.read(&mut bytes).unwrap(), 8);
            assert_eq!(bytes[..8], 1_u64.to_ne_bytes());
            assert_eq!(guest.used(), 0);
            // After a reset it is served again.
            state.stopped();
            let mut guest = Guest::new();
            guest.offer(0, kind::RESOURCE_FLUSH);
            let (ring, _) = guest.serve(None);
            assert!(matches!(ring.next(&guest.memory), Next::Request(_)));
        }
    }

    #[test]
    fn a_chain_in_our_hands_cannot_be_given_to_us_again() {
        let mut guest = Guest::new();
        guest.offer(0, kind::SUBMIT_3D);
        let (ring, _) = guest.serve(None);
        let (request, _) = guest.taken(&ring);
        // Given back, it may come again.
        request.answer(&ring, &guest.memory.memory(), &[1; 24]);
        guest.offer(0, kind::SUBMIT_3D);
        guest.taken(&ring);
        guest.offer_head(0);
        assert!(matches!(ring.next(&guest.memory), Next::Stopped));
        assert_eq!(guest.used(), 1);
    }
}
