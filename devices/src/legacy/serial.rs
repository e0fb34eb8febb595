//! COM1, a 16550A UART (National Semiconductor PC16550D data sheet), on `vm_superio`'s register
//! model.
//!
//! Output goes through a [`Writer`] thread so that a vCPU never waits for a slow terminal, up to a
//! bounded amount; then the guest is slowed down rather than anything lost. A terminal that takes nothing
//! at all for a second has stopped: until it goes on the guest's output is lost, since a guest that waits
//! for ever is worse, and cannot be ended either. Input is queued by
//! [`Serial::enqueue`], which waits while the guest's FIFO is full.

use std::{
    collections::VecDeque,
    io::{self, Write},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::Duration,
};

use vm_superio::{
    Trigger,
    serial::{Serial as Uart, SerialEvents},
};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;

/// First port of COM1.
pub const PORT: u64 = 0x3f8;
/// Number of ports.
pub const PORTS: u64 = 8;
/// The interrupt line of COM1.
pub const GSI: u32 = 4;

/// Bytes that may wait for the sink before the guest has to wait.
const OUTPUT_BOUND: usize = 256 * 1024;
/// How long the guest waits for a sink that takes nothing.
const STOPPED: Duration = Duration::from_secs(1);
/// How long an unfinished line may wait for more bytes before it is written.
const LINE_DELAY: Duration = Duration::from_millis(2);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Default)]
struct Output {
    bytes: VecDeque<u8>,
    busy: bool,
    closed: bool,
    /// The sink takes nothing any more.
    stopped: bool,
    /// Bytes that were thrown away since.
    lost: u64,
}

impl Output {
    fn is_full(&self) -> bool {
        self.bytes.len() >= OUTPUT_BOUND && !self.closed
    }
}

#[derive(Default)]
struct Shared {
    output: Mutex<Output>,
    /// Something to write, or closed.
    filled: Condvar,
    /// Room again, or everything written.
    drained: Condvar,
}

/// The thread that carries the guest's output to a sink.
pub struct Writer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Writer").finish_non_exhaustive()
    }
}

impl Writer {
    /// Starts the thread.
    pub fn spawn(sink: Box<dyn Write + Send>) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let theirs = shared.clone();
        let thread = thread::Builder::new()
            .name("serial-out".to_owned())
            .spawn(move || carry(&theirs, sink))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Where the UART puts its bytes.
    fn feed(&self) -> Feed {
        Feed(self.shared.clone())
    }

    /// Waits until everything the guest has sent was written, at most `limit` (a terminal may be
    /// stopped for ever). Returns whether all of it was.
    pub fn flush(&self, limit: Duration) -> bool {
        let output = lock(&self.shared.output);
        let result = self
            .shared
            .drained
            .wait_timeout_while(output, limit, |output| output.busy || !output.bytes.is_empty())
            .unwrap_or_else(PoisonError::into_inner);
        !result.1.timed_out()
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        lock(&self.shared.output).closed = true;
        self.shared.filled.notify_all();
        self.shared.drained.notify_all();
        // Not joined: the sink may be a stopped terminal. `flush` is the orderly way.
        self.thread.take();
    }
}

fn carry(shared: &Shared, mut sink: Box<dyn Write + Send>) {
    let mut failed = false;
    loop {
        let mut output = lock(&shared.output);
        while output.bytes.is_empty() && !output.closed {
            output = shared.filled.wait(output).unwrap_or_else(PoisonError::into_inner);
        }
        if output.bytes.is_empty() {
            return;
        }
        if !output.bytes.contains(&b'\n') && !output.closed {
            // A line is under way byte by byte; one write(2) for all of it is cheaper.
            output = shared
                .filled
                .wait_timeout(output, LINE_DELAY)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        let chunk: Vec<u8> = output.bytes.drain(..).collect();
        output.busy = true;
        drop(output);
        if !failed && let Err(error) = sink.write_all(&chunk).and_then(|()| sink.flush()) {
            failed = true;
            tracing::warn!(%error, "the serial port's output cannot be written any more");
        }
        let mut output = lock(&shared.output);
        (output.busy, output.stopped) = (false, false);
        let lost = std::mem::take(&mut output.lost);
        drop(output);
        shared.drained.notify_all();
        if lost > 0 {
            tracing::warn!(bytes = lost, "output of the serial port was lost: nobody took it");
        }
    }
}

/// The UART's side of a [`Writer`].
struct Feed(Arc<Shared>);

impl Write for Feed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut output = lock(&self.0.output);
        if output.is_full() && !output.stopped {
            let (after, waited) = self
                .0
                .drained
                .wait_timeout_while(output, STOPPED, |output| output.is_full())
                .unwrap_or_else(PoisonError::into_inner);
            output = after;
            output.stopped = waited.timed_out();
        }
        if output.is_full() {
            output.lost += bytes.len() as u64;
            return Ok(bytes.len());
        }
        let was_empty = output.bytes.is_empty();
        output.bytes.extend(bytes);
        drop(output);
        if was_empty || bytes.contains(&b'\n') {
            self.0.filled.notify_one();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The UART's interrupt line.
struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Wakes whoever waits for room in the receive FIFO.
#[derive(Default)]
struct Room {
    taken: Mutex<u64>,
    changed: Condvar,
}

impl SerialEvents for Room {
    fn buffer_read(&self) {
        *lock(&self.taken) += 1;
        self.changed.notify_all();
    }

    fn out_byte(&self) {}

    fn tx_lost_byte(&self) {}

    fn in_buffer_empty(&self) {}
}

/// COM1.
pub struct Serial {
    uart: Mutex<Uart<Line, Arc<Room>, Feed>>,
    room: Arc<Room>,
}

impl std::fmt::Debug for Serial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Serial").finish_non_exhaustive()
    }
}

impl Serial {
    /// A UART that raises `interrupt` and sends its output to `writer`.
    pub fn new(interrupt: EventFd, writer: &Writer) -> Self {
        let room = Arc::new(Room::default());
        let uart = Uart::with_events(Line(interrupt), room.clone(), writer.feed());
        Self { uart: Mutex::new(uart), room }
    }

    /// Types `bytes` into the guest. Waits while its FIFO is full, so this must not be called from
    /// a vCPU thread.
    pub fn enqueue(&self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let before = *lock(&self.room.taken);
            let sent = {
                let mut uart = lock(&self.uart);
                if uart.fifo_capacity() == 0 {
                    0
                } else {
                    match uart.enqueue_raw_bytes(bytes) {
                        // Loopback mode swallows the line's input.
                        Ok(0) => return,
                        Ok(sent) => sent,
                        Err(error) => {
                            tracing::warn!(?error, "serial input was lost");
                            return;
                        }
                    }
                }
            };
            bytes = &bytes[sent..];
            if sent == 0 {
                let taken = lock(&self.room.taken);
                let _taken = self
                    .room
                    .changed
                    .wait_while(taken, |taken| *taken == before)
                    .unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let [value] = data {
            *value = lock(&self.uart).read(offset as u8);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let &[value] = data
            && let Err(error) = lock(&self.uart).write(offset as u8, value)
        {
            tracing::debug!(?error, "a serial register write failed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            lock(&self.0).extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn output_arrives_complete_and_in_order() {
        let sink = Sink::default();
        let writer = Writer::spawn(Box::new(sink.clone())).unwrap();
        let serial = Serial::new(EventFd::new(libc::EFD_NONBLOCK).unwrap(), &writer);
        let text: Vec<u8> = (0..10_000u32).map(|n| (n % 251) as u8).collect();
        for byte in &text {
            serial.write(0, &[*byte]);
        }
        assert!(writer.flush(Duration::from_secs(60)));
        assert_eq!(*lock(&sink.0), text);
    }

    /// Takes nothing until it is told to.
    struct Stopped(std::sync::mpsc::Receiver<()>, Sink);

    impl Write for Stopped {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.0.recv();
            self.1.write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_terminal_that_has_stopped_does_not_stop_the_guest() {
        let (go, stopped) = std::sync::mpsc::channel();
        let sink = Sink::default();
        let writer = Writer::spawn(Box::new(Stopped(stopped, sink.clone()))).unwrap();
        let serial = Serial::new(EventFd::new(libc::EFD_NONBLOCK).unwrap(), &writer);
        // What the thread has taken already, what may wait, and more.
        let sent = 2 * OUTPUT_BOUND + 1000;
        for _ in 0..sent {
            serial.write(0, b"x");
        }
        assert!(lock(&writer.shared.output).lost >= 1000);
        // From here on it takes everything again.
        drop(go);
        assert!(writer.flush(Duration::from_secs(60)));
        serial.write(0, b"y");
        assert!(writer.flush(Duration::from_secs(60)));
        let seen = lock(&sink.0);
        assert_eq!(seen.last(), Some(&b'y'));
        assert!(seen.len() < sent && seen.len() > OUTPUT_BOUND);
    }

    #[test]
    fn input_waits_for_room() {
        let writer = Writer::spawn(Box::new(io::sink())).unwrap();
        let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let serial = Arc::new(Serial::new(line.try_clone().unwrap(), &writer));
        serial.write(1, &[1]); // received data available interrupt
        let typist = serial.clone();
        let text: Vec<u8> = (0..200u8).collect();
        let expected = text.clone();
        let thread = thread::spawn(move || typist.enqueue(&text));
        let mut seen = Vec::new();
        while seen.len() < expected.len() {
            let mut status = [0];
            serial.read(5, &mut status);
            if status[0] & 1 == 0 {
                thread::yield_now();
                continue;
            }
            let mut byte = [0];
            serial.read(0, &mut byte);
            seen.push(byte[0]);
        }
        thread.join().unwrap();
        assert_eq!(seen, expected);
        assert!(line.read().unwrap() >= 1);
    }
}
