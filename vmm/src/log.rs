//! Where the log goes: standard error, as far as somebody takes it.
//!
//! Any thread may have something to say, also those which run the guest's processors, so none may wait
//! for a reader that has stopped (a pipe that nobody empties, a terminal after Ctrl-S). What such a reader
//! does not take within a moment is lost, and how much that was is said when it takes something again.

use std::{
    io::{self, Write},
    sync::atomic::{AtomicU64, Ordering},
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// How long a reader may take, in nanoseconds. One that is only slow is a good reader.
const PATIENCE: i64 = 50_000_000;

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
    // Pipes say so as soon as they have room for a page, which is more than a line is long.
    let patience = if lost.load(Ordering::Relaxed) == 0 { PATIENCE } else { 0 };
    let time = Timespec { tv_sec: 0, tv_nsec: patience };
    let room = poll(&mut [PollFd::new(sink, PollFlags::OUT)], Some(&time));
    if room == Ok(0) {
        lost.fetch_add(1, Ordering::Relaxed);
        return Ok(bytes.len());
    }
    let before = lost.swap(0, Ordering::Relaxed);
    if before > 0 {
        writeln!(sink, "drago-vmm: {before} lines of the log were lost: nobody read it")?;
    }
    sink.write_all(bytes)?;
    Ok(bytes.len())
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
