//! Where the log goes: standard error, as far as somebody takes it.
//!
//! Any thread may have something to say, also those which run the guest's processors, so none may wait
//! for a reader that has stopped (a pipe that nobody empties, a terminal after Ctrl-S). What such a reader
//! does not take within a moment is lost, and how much that was is said when it takes something again.

use std::{
    io::{self, Write},
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// How long a reader may take. One that is only slow is a good reader.
const PATIENCE: Duration = Duration::from_millis(50);

/// What a pipe has room for when it says that it has any.
const PAGE: usize = 4096;

/// Writes that nobody took since the last one that somebody did.
static LOST: AtomicU64 = AtomicU64::new(0);

/// Standard error, for one line.
#[derive(Debug, Default)]
pub struct Log;

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // Held from the look to the write, so that nobody else fills the room that was seen.
        write_or_lose(&mut io::stderr().lock(), bytes, &LOST)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn write_or_lose(
    sink: &mut (impl Write + std::os::fd::AsFd),
    bytes: &[u8],
    lost: &AtomicU64,
) -> io::Result<usize> {
    let patience = if lost.load(Ordering::Relaxed) == 0 { PATIENCE } else { Duration::ZERO };
    let deadline = Instant::now() + patience;
    for (index, piece) in bytes.chunks(PAGE).enumerate() {
        if !has_room(sink, deadline) {
            lost.fetch_add(1, Ordering::Relaxed);
            break;
        }
        let before = if index == 0 { lost.swap(0, Ordering::Relaxed) } else { 0 };
        if before > 0 {
            let note = format!("drago-vmm: {before} lines of the log were lost: nobody read it\n");
            sink.write_all(note.as_bytes())?;
            if !has_room(sink, deadline) {
                lost.fetch_add(1, Ordering::Relaxed);
                break;
            }
        }
        sink.write_all(piece)?;
    }
    Ok(bytes.len())
}

/// Whether a page can be written without waiting, at the latest at the deadline.
fn has_room(sink: &impl std::os::fd::AsFd, deadline: Instant) -> bool {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let time = Timespec { tv_sec: 0, tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::new(sink, PollFlags::OUT)], Some(&time)) {
            // A vCPU that is wanted elsewhere.
            Err(rustix::io::Errno::INTR) => {}
            Ok(count) => return count > 0,
            Err(_) => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Read};

    use super::*;

    #[test]
    fn nobody_waits_for_a_reader_that_has_stopped() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let (mut reader, mut writer) = (File::from(reader), File::from(writer));
        let lost = AtomicU64::new(0);
        let line = [b'x'; 1000];
        let mut sent = 0;
        while lost.load(Ordering::Relaxed) < 100 {
            assert_eq!(write_or_lose(&mut writer, &line, &lost).unwrap(), line.len());
            sent += 1;
        }
        let mut taken = vec![0; (sent - 100) * line.len()];
        reader.read_exact(&mut taken).unwrap();
        write_or_lose(&mut writer, b"again", &lost).unwrap();
        drop(writer);
        let mut rest = String::new();
        reader.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "drago-vmm: 100 lines of the log were lost: nobody read it\nagain");
    }
}
