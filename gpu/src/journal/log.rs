//! The commands that made what exists now, as a log in one of two halves of the memory.
//!
//! A record is added behind the last one and counts when the half's length says so. Where a record
//! takes back an earlier one, both stay until the half is four times as long as it had to be; then
//! the records that still count are copied into the other half, which counts when the number of the
//! half says so.

use std::collections::BTreeMap;

use gpu_protocol::virtio::{MAX_SCANOUTS, kind};
use vm_memory::VolatileSlice;

use super::Memory;

/// Bytes of a half: twice what the default limit on resources takes in pages of 4 KiB.
const HALF: usize = 8 << 20;
const HEAD: usize = 4096;
/// A half that is shorter than that is not rewritten: memory is taken page by page.
const EARLY: usize = 64 << 10;

/// Bytes of the log in the buffer.
pub(super) const SIZE: usize = HEAD + 2 * HALF;

/// "drago-gpu journal, version 1".
const MAGIC: u64 = 0x6472_6167_6a6e_6c01;

// In the head.
const AT_MAGIC: usize = 0;
const AT_ACTIVE: usize = 8;
const AT_LENGTHS: usize = 16;
const AT_CURSORS: usize = 64;

/// Before each command: operation u32, class u32, id u32, length u32.
const RECORD: usize = 16;
const PUT: u32 = 1;
const DELETE: u32 = 2;

// Where the numbers are in commands (VIRTIO 1.3 §5.7.6.8).
const RESOURCE: usize = 24;
const BLOB_MEM: usize = 28;
const BLOB_MEM_GUEST: u32 = 1;
const SCANOUT: usize = 40;
const SCANOUT_RESOURCE: usize = 44;
const CURSOR: usize = 24;
const CURSOR_X: usize = 28;
const CURSOR_Y: usize = 32;
const CURSOR_RESOURCE: usize = 40;

/// What a command is about. The order is that of execution.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
enum Class {
    Resource = 1,
    Backing = 2,
    Scanout = 3,
    Cursor = 4,
}

type Key = (Class, u32);

impl Class {
    fn from_wire(value: u32) -> Option<Self> {
        [Self::Resource, Self::Backing, Self::Scanout, Self::Cursor]
            .into_iter()
            .find(|class| *class as u32 == value)
    }
}

#[derive(Debug, Clone, Copy)]
struct Place {
    at: usize,
    length: usize,
}

pub(super) struct Log {
    /// From the start of the memory.
    start: usize,
    active: usize,
    length: usize,
    /// The length after the last rewriting.
    compacted: usize,
    /// Where the records that count are, in the active half.
    live: BTreeMap<Key, Place>,
    full: bool,
}

fn number(command: &[u8], at: usize) -> Option<u32> {
    let bytes = command.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(bytes.try_into().ok()?))
}

fn padded(length: usize) -> usize {
    RECORD + length.next_multiple_of(8)
}

impl Log {
    pub(super) fn new(start: usize) -> Self {
        Self { start, active: 0, length: 0, compacted: 0, live: BTreeMap::new(), full: false }
    }

    /// What a predecessor wrote. `None` if that is no log of this version.
    pub(super) fn read(memory: &Memory, start: usize) -> Option<Self> {
        let active = memory.get::<u64>(start + AT_ACTIVE);
        let mut log = Self::new(start);
        log.active = usize::try_from(active).ok().filter(|active| *active < 2)?;
        let length = memory.get::<u64>(start + AT_LENGTHS + 8 * log.active);
        log.length = usize::try_from(length).ok().filter(|length| *length <= HALF)?;
        if memory.get::<u64>(start + AT_MAGIC) != MAGIC {
            return None;
        }
        let mut at = 0;
        while at + RECORD <= log.length {
            let word = |index: usize| memory.get::<u32>(log.half(log.active) + at + 4 * index);
            let key = (Class::from_wire(word(1))?, word(2));
            let length = word(3) as usize;
            let next = at.checked_add(padded(length)).filter(|next| *next <= log.length)?;
            match word(0) {
                PUT => {
                    log.live.insert(key, Place { at: at + RECORD, length });
                }
                DELETE => {
                    log.live.remove(&key);
                }
                _ => return None,
            }
            at = next;
        }
        (at == log.length).then_some(log)
    }

    fn half(&self, number: usize) -> usize {
        self.start + HEAD + number * HALF
    }

    pub(super) fn clear(&mut self, memory: &Memory) {
        self.live.clear();
        self.length = 0;
        memory.put(self.start + AT_LENGTHS + 8 * self.active, 0_u64);
        memory.put(self.start + AT_ACTIVE, self.active as u64);
        memory.put(self.start + AT_MAGIC, MAGIC);
    }

    /// The commands that count, in the order of execution.
    pub(super) fn commands(&self, memory: &Memory) -> Vec<Vec<u8>> {
        let half = self.half(self.active);
        let mut commands = Vec::with_capacity(self.live.len());
        for ((class, id), place) in &self.live {
            let mut command = vec![0; place.length];
            let Ok(slice) = memory.slice(half + place.at, place.length) else { continue };
            slice.copy_to(&mut command);
            if *class == Class::Cursor
                && let Some(at) = self.cursor_at(*id)
                && let Some(target) = command.get_mut(CURSOR_X..CURSOR_Y + 4)
            {
                target[..4].copy_from_slice(&memory.get::<u32>(at).to_le_bytes());
                target[4..].copy_from_slice(&memory.get::<u32>(at + 4).to_le_bytes());
            }
            commands.push(command);
        }
        commands
    }

    fn cursor_at(&self, scanout: u32) -> Option<usize> {
        let scanout = usize::try_from(scanout).ok().filter(|scanout| *scanout < MAX_SCANOUTS)?;
        Some(self.start + AT_CURSORS + 8 * scanout)
    }

    pub(super) fn record(&mut self, memory: &Memory, command: &[u8]) {
        // A command that was executed has all its fields.
        let _ = self.try_record(memory, command);
    }

    fn try_record(&mut self, memory: &Memory, command: &[u8]) -> Option<()> {
        match number(command, 0)? {
            kind::RESOURCE_CREATE_2D => {
                self.put(memory, (Class::Resource, number(command, RESOURCE)?), command);
            }
            kind::RESOURCE_CREATE_BLOB if number(command, BLOB_MEM)? == BLOB_MEM_GUEST => {
                self.put(memory, (Class::Resource, number(command, RESOURCE)?), command);
            }
            kind::RESOURCE_ATTACH_BACKING => {
                let resource = number(command, RESOURCE)?;
                if self.live.contains_key(&(Class::Resource, resource)) {
                    self.put(memory, (Class::Backing, resource), command);
                }
            }
            kind::RESOURCE_DETACH_BACKING => {
                self.delete(memory, (Class::Backing, number(command, RESOURCE)?));
            }
            kind::RESOURCE_UNREF => {
                let resource = number(command, RESOURCE)?;
                let shown = |key: &&Key| key.0 == Class::Scanout;
                let scanouts: Vec<Key> = self.live.keys().filter(shown).copied().collect();
                for key in scanouts {
                    if self.shows(memory, key, resource) {
                        self.delete(memory, key);
                    }
                }
                self.delete(memory, (Class::Backing, resource));
                self.delete(memory, (Class::Resource, resource));
            }
            kind::SET_SCANOUT | kind::SET_SCANOUT_BLOB => {
                let resource = number(command, SCANOUT_RESOURCE)?;
                let key = (Class::Scanout, number(command, SCANOUT)?);
                self.put_about(memory, key, resource, command);
            }
            kind::UPDATE_CURSOR => {
                let key = (Class::Cursor, number(command, CURSOR)?);
                self.put_about(memory, key, number(command, CURSOR_RESOURCE)?, command);
                self.move_cursor(memory, command)?;
            }
            kind::MOVE_CURSOR => self.move_cursor(memory, command)?,
            _ => {}
        }
        Some(())
    }

    fn move_cursor(&self, memory: &Memory, command: &[u8]) -> Option<()> {
        let at = self.cursor_at(number(command, CURSOR)?)?;
        memory.put(at, number(command, CURSOR_X)?);
        memory.put(at + 4, number(command, CURSOR_Y)?);
        Some(())
    }

    /// Whether a recorded scanout shows a resource.
    fn shows(&self, memory: &Memory, key: Key, resource: u32) -> bool {
        let Some(place) = self.live.get(&key).filter(|place| place.length >= SCANOUT_RESOURCE + 4)
        else {
            return false;
        };
        let at = self.half(self.active) + place.at + SCANOUT_RESOURCE;
        u32::from_le_bytes(memory.get::<u32>(at).to_ne_bytes()) == resource
    }

    /// Records a command about a resource, if that one will come back.
    fn put_about(&mut self, memory: &Memory, key: Key, resource: u32, command: &[u8]) {
        if self.live.contains_key(&(Class::Resource, resource)) {
            self.put(memory, key, command);
        } else {
            self.delete(memory, key);
        }
    }

    fn put(&mut self, memory: &Memory, key: Key, command: &[u8]) {
        if self.is_recorded(memory, key, command) {
            return;
        }
        if self.append(memory, PUT, key, command) {
            let at = self.length - padded(command.len()) + RECORD;
            self.live.insert(key, Place { at, length: command.len() });
            return;
        }
        if !std::mem::replace(&mut self.full, true) {
            tracing::warn!("the journal is full: not all of the picture would survive a crash");
        }
        self.delete(memory, key);
    }

    fn delete(&mut self, memory: &Memory, key: Key) {
        if self.live.contains_key(&key) && !self.append(memory, DELETE, key, &[]) {
            // Not even room for that: without any log nothing wrong comes back.
            tracing::error!("the journal is full and starts anew");
            self.clear(memory);
        }
        self.live.remove(&key);
    }

    fn is_recorded(&self, memory: &Memory, key: Key, command: &[u8]) -> bool {
        let Some(place) = self.live.get(&key).filter(|place| place.length == command.len()) else {
            return false;
        };
        let mut old = vec![0; place.length];
        let slice = memory.slice(self.half(self.active) + place.at, place.length);
        slice.map(|slice| slice.copy_to(&mut old)).is_ok() && old == command
    }

    /// Adds a record; `false` if there is no room for it.
    fn append(&mut self, memory: &Memory, operation: u32, key: Key, command: &[u8]) -> bool {
        let size = padded(command.len());
        if self.length + size > self.compacted.saturating_mul(4).clamp(EARLY, HALF) {
            self.compact(memory);
        }
        if self.length + size > HALF {
            return false;
        }
        let at = self.half(self.active) + self.length;
        write_record(memory, at, operation, key, command.len());
        if let Ok(slice) = memory.slice(at + RECORD, command.len()) {
            slice.copy_from(command);
        }
        self.length += size;
        memory.put(self.start + AT_LENGTHS + 8 * self.active, self.length as u64);
        true
    }

    /// Copies what counts into the other half and goes on there.
    fn compact(&mut self, memory: &Memory) {
        let other = 1 - self.active;
        let (from, to) = (self.half(self.active), self.half(other));
        let mut length = 0;
        for (key, place) in &mut self.live {
            write_record(memory, to + length, PUT, *key, place.length);
            let source = memory.slice(from + place.at, place.length);
            let target = memory.slice(to + length + RECORD, place.length);
            if let (Ok(source), Ok(target)) = (source, target) {
                copy(&source, &target);
            }
            place.at = length + RECORD;
            length += padded(place.length);
        }
        memory.put(self.start + AT_LENGTHS + 8 * other, length as u64);
        memory.put(self.start + AT_ACTIVE, other as u64);
        self.active = other;
        self.length = length;
        self.compacted = length;
    }
}

fn copy(source: &VolatileSlice<'_>, target: &VolatileSlice<'_>) {
    source.copy_to_volatile_slice(*target);
}

fn write_record(memory: &Memory, at: usize, operation: u32, (class, id): Key, length: usize) {
    memory.put(at, operation);
    memory.put(at + 4, class as u32);
    memory.put(at + 8, id);
    memory.put(at + 12, length as u32);
}
