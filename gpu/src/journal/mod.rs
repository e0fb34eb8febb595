//! What must outlive this process, in memory that the front end keeps: if the process dies, its
//! successor gets the memory and goes on where it stopped.
//!
//! The memory is vhost-user's in-flight buffer (`VHOST_USER_GET_INFLIGHT_FD`), made here, with room
//! of our own behind the standard's tables:
//!
//! ```text
//!  tables   chains that were taken and not answered        gpu_protocol::inflight
//!  head     magic, which half is in use, how full the halves are, where the cursors are
//!  half 0   commands that made what exists now             [log]
//!  half 1   the same, while one half is rewritten into the other
//! ```
//!
//! What is kept are commands of the guest, as it gave them: resources whose pixels are in guest
//! memory, their backing, scanouts and cursors. A successor decodes and executes them like any
//! other command, so the contents of the buffer are trusted no more than a guest. Resources and
//! contexts of a 3D renderer die with the process.
//!
//! A process may die between any two stores; nothing else can go wrong, as memory does not. So each
//! change becomes valid by one store of one number.

mod log;
pub mod restore;

use std::{
    fs::File,
    io,
    os::fd::OwnedFd,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use gpu_protocol::{
    inflight::{self, InFlight, entry, entry_at, header, table_size},
    virtio::QUEUES,
};
use rustix::fs::{MemfdFlags, SealFlags};
use vm_memory::{AtomicAccess, Bytes, FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

use self::log::Log;

/// Where numbers are stored; all reads and writes are inside the mapping by construction, and where
/// a length comes from the memory itself it is checked.
struct Memory(MmapRegion);

impl Memory {
    fn slice(&self, at: usize, length: usize) -> io::Result<VolatileSlice<'_>> {
        self.0.get_slice(at, length).map_err(io::Error::other)
    }

    fn put<T: AtomicAccess>(&self, at: usize, value: T) {
        if let Err(error) = self.0.as_volatile_slice().store(value, at, Ordering::Release) {
            tracing::error!(%error, at, "the journal cannot be written");
        }
    }

    fn get<T: AtomicAccess + Default>(&self, at: usize) -> T {
        self.0.as_volatile_slice().load(at, Ordering::Acquire).unwrap_or_default()
    }
}

/// The table of one queue.
struct Table {
    /// From the start of the memory.
    at: usize,
    counter: u64,
}

/// The buffer, mapped.
pub struct Journal {
    memory: Memory,
    /// Entries of each table.
    queue_size: u16,
    tables: [Mutex<Table>; QUEUES],
    log: Mutex<Log>,
    /// A predecessor's, not looked at yet.
    inherited: AtomicBool,
}

impl std::fmt::Debug for Journal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Journal").field("queue_size", &self.queue_size).finish_non_exhaustive()
    }
}

fn tables_size(queue_size: u16) -> usize {
    (QUEUES * table_size(queue_size)).next_multiple_of(4096)
}

/// Bytes of the whole buffer.
fn size(queue_size: u16) -> usize {
    tables_size(queue_size) + log::SIZE
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Journal {
    /// A new one for queues of up to `queue_size` entries; the descriptor is for the front end.
    pub fn create(queue_size: u16) -> io::Result<(Self, OwnedFd)> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = rustix::fs::memfd_create("drago-gpu-journal", flags)?;
        // Sparse: pages come as they are written. Not ftruncate, with which a process could shorten
        // guest memory as well (see the sandbox).
        rustix::io::pwrite(&fd, &[0], size(queue_size) as u64 - 1)?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let journal = Self::map(fd.try_clone()?, queue_size)?;
        lock(&journal.log).clear(&journal.memory);
        Ok((journal, fd))
    }

    /// A predecessor's. The tables and the log are foreign bytes.
    pub fn inherit(fd: OwnedFd, mmap_size: u64, queue_size: u16) -> io::Result<Self> {
        let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what);
        if mmap_size != size(queue_size) as u64 {
            return Err(invalid("the in-flight buffer is not one of this back end's"));
        }
        // A file that can shrink would kill this process when it touches a page behind its end.
        if !rustix::fs::fcntl_get_seals(&fd)?.contains(SealFlags::SHRINK) {
            return Err(invalid("the in-flight buffer is not sealed against shrinking"));
        }
        let journal = Self::map(fd, queue_size)?;
        let log = Log::read(&journal.memory, tables_size(queue_size))
            .ok_or_else(|| invalid("the in-flight buffer holds no journal of this version"))?;
        *lock(&journal.log) = log;
        journal.inherited.store(true, Ordering::Release);
        Ok(journal)
    }

    fn map(fd: OwnedFd, queue_size: u16) -> io::Result<Self> {
        let file = FileOffset::new(File::from(fd), 0);
        // Refuses a file that is shorter than that.
        let region = MmapRegion::from_file(file, size(queue_size)).map_err(io::Error::other)?;
        let table = |number| Mutex::new(Table { at: number * table_size(queue_size), counter: 0 });
        let mut numbers = 0..QUEUES;
        let tables = std::array::from_fn(|_| table(numbers.next().unwrap_or_default()));
        let log = Mutex::new(Log::new(tables_size(queue_size)));
        let inherited = AtomicBool::new(false);
        Ok(Self { memory: Memory(region), queue_size, tables, log, inherited })
    }

    /// Bytes of the buffer.
    pub fn size(&self) -> u64 {
        size(self.queue_size) as u64
    }

    /// Forgets all commands, as a reset of the device does.
    pub fn clear(&self) {
        lock(&self.log).clear(&self.memory);
    }

    /// Remembers the effect of a command that was executed without error. `command` is all that the
    /// guest gave.
    pub fn record(&self, command: &[u8]) {
        lock(&self.log).record(&self.memory, command);
    }

    /// The commands that bring back what a predecessor had, in the order in which they have to be
    /// executed; nothing the second time.
    pub fn inheritance(&self) -> Vec<Vec<u8>> {
        match self.inherited.swap(false, Ordering::AcqRel) {
            true => lock(&self.log).commands(&self.memory),
            false => Vec::new(),
        }
    }
}

/// The tables.
impl Journal {
    /// A ring starts with this used index: what a predecessor left unanswered, oldest first.
    pub fn start(&self, queue: u16, ring_size: u16, used: u16) -> Vec<InFlight> {
        let Some(table) = self.tables.get(usize::from(queue)) else { return Vec::new() };
        let mut table = lock(table);
        let length = table_size(self.queue_size);
        let mut bytes = vec![0; length];
        if let Ok(slice) = self.memory.slice(table.at, length) {
            slice.copy_to(&mut bytes);
        }
        let found = inflight::parse(&bytes, ring_size.min(self.queue_size), used);
        let mut found = found.unwrap_or_default();
        // More than fit into the ring would be nonsense.
        found.truncate(usize::from(ring_size));
        for head in 0..self.queue_size {
            if !found.iter().any(|one| one.head == head) {
                self.memory.put(table.at + entry_at(head) + entry::INFLIGHT, 0_u8);
            }
        }
        self.memory.put(table.at + header::DESC_NUM, self.queue_size);
        self.memory.put(table.at + header::USED_IDX, used);
        self.memory.put(table.at + header::VERSION, inflight::VERSION);
        table.counter = found.len() as u64;
        for (counter, one) in found.iter().enumerate() {
            self.memory.put(table.at + entry_at(one.head) + entry::COUNTER, counter as u64);
        }
        found
    }

    /// A chain was taken out of the ring, for the `attempts`-th time after the first.
    pub fn taken(&self, queue: u16, head: u16, attempts: u8) {
        let Some(table) = self.tables.get(usize::from(queue)) else { return };
        if head >= self.queue_size {
            return;
        }
        let mut table = lock(table);
        let at = table.at + entry_at(head);
        self.memory.put(at + entry::ATTEMPTS, attempts);
        if attempts == 0 {
            table.counter += 1;
            self.memory.put(at + entry::COUNTER, table.counter);
            self.memory.put(at + entry::INFLIGHT, 1_u8);
        }
    }

    /// Answers a chain: `put` writes the used ring and returns its new index.
    pub fn answered<E>(
        &self,
        queue: u16,
        head: u16,
        put: impl FnOnce() -> Result<u16, E>,
    ) -> Result<(), E> {
        let table = self.tables.get(usize::from(queue)).filter(|_| head < self.queue_size);
        let Some(table) = table else { return put().map(drop) };
        let table = lock(table);
        // In this order: dying after `put`, the used index tells that this head was the last.
        self.memory.put(table.at + header::LAST_BATCH_HEAD, head);
        let used = put()?;
        self.memory.put(table.at + entry_at(head) + entry::INFLIGHT, 0_u8);
        self.memory.put(table.at + header::USED_IDX, used);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
