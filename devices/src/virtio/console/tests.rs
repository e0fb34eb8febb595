use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
};

use super::{
    config::{ConsoleConfig, PortBackend, PortConfig},
    device::{Console, F_MULTIPORT},
    port::*,
    protocol::{self, Message},
    worker::{CONTROL_RX, CONTROL_TX},
};
use crate::{
    spec::Spec,
    virtio::{
        VirtioDevice,
        testing::{Driver, Part, guest_memory},
    },
};

const BUFFER: u32 = 4096;

#[derive(Debug, PartialEq, Eq)]
enum Seen {
    Data(Vec<u8>),
    Opened(bool),
    Writable,
}

/// Records what happens, and takes at most `budget` bytes.
struct Recorder {
    events: Mutex<mpsc::Sender<Seen>>,
    budget: AtomicUsize,
}

impl Recorder {
    fn new(budget: usize) -> (Arc<Self>, mpsc::Receiver<Seen>) {
        let (sender, receiver) = mpsc::channel();
        let budget = AtomicUsize::new(budget);
        (Arc::new(Self { events: Mutex::new(sender), budget }), receiver)
    }

    fn tell(&self, seen: Seen) {
        let _ = self.events.lock().unwrap().send(seen);
    }
}

impl PortListener for Recorder {
    fn data(&self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(self.budget.load(Ordering::SeqCst));
        self.budget.fetch_sub(taken, Ordering::SeqCst);
        self.tell(Seen::Data(bytes[..taken].to_vec()));
        taken
    }

    fn opened(&self, open: bool) {
        self.tell(Seen::Opened(open));
    }

    fn writable(&self) {
        self.tell(Seen::Writable);
    }
}

fn port(name: &str, backend: PortBackend) -> PortConfig {
    PortConfig { name: name.to_owned(), backend }
}

fn open(config: ConsoleConfig) -> (Console, ConsoleHandle) {
    config.open().unwrap()
}

/// The guest's side of the control protocol.
struct Guest {
    driver: Driver,
}

impl Guest {
    fn start(device: &mut Console) -> Self {
        let mut driver = Driver::start(device);
        driver.queues[usize::from(CONTROL_RX)].fill(16, BUFFER);
        let mut guest = Self { driver };
        guest.tell(u32::MAX, protocol::DEVICE_READY, 1);
        guest
    }

    fn tell(&mut self, port: u32, event: u16, value: u16) {
        let bytes = Message { port, event, value }.encode(&[]);
        let queue = &mut self.driver.queues[usize::from(CONTROL_TX)];
        queue.send(&[Part::Out(&bytes)]);
        queue.wait_used();
    }

    fn hear(&mut self) -> (Message, Vec<u8>) {
        let bytes = self.driver.queues[usize::from(CONTROL_RX)].receive(BUFFER);
        (Message::decode(bytes[..8].try_into().unwrap()), bytes[8..].to_vec())
    }

    fn expect(&mut self, port: u32, event: u16, value: u16) {
        assert_eq!(self.hear(), (Message { port, event, value }, Vec::new()));
    }

    /// Accepts the named port `id` whose host end is open, and opens it.
    fn open_port(&mut self, id: u32, name: &str) {
        self.tell(id, protocol::PORT_READY, 1);
        let header = Message { port: id, event: protocol::PORT_NAME, value: 1 };
        assert_eq!(self.hear(), (header, name.as_bytes().to_vec()));
        self.expect(id, protocol::PORT_OPEN, 1);
        self.tell(id, protocol::PORT_OPEN, 1);
    }

    fn receive(&mut self, port: u32) -> &mut crate::virtio::testing::DriverQueue {
        &mut self.driver.queues[2 * port as usize + 2]
    }

    fn transmit(&mut self, port: u32) -> &mut crate::virtio::testing::DriverQueue {
        &mut self.driver.queues[2 * port as usize + 3]
    }
}

#[test]
fn the_control_protocol_introduces_ports_as_linux_expects() {
    let config = ConsoleConfig {
        console_on: true,
        ports: vec![port("first", PortBackend::Handle), port("late", PortBackend::Handle)],
        ..ConsoleConfig::default()
    };
    let (mut device, handle) = open(config);
    let (listener, seen) = Recorder::new(usize::MAX);
    handle.port("first").unwrap().set_listener(listener);
    let mut guest = Guest::start(&mut device);
    guest.expect(0, protocol::PORT_ADD, 1);
    guest.expect(1, protocol::PORT_ADD, 1);
    guest.tell(0, protocol::PORT_READY, 1);
    guest.expect(0, protocol::CONSOLE_PORT, 1);
    guest.expect(0, protocol::PORT_OPEN, 1);
    guest.tell(0, protocol::PORT_OPEN, 1);
    guest.open_port(1, "first");
    assert_eq!(seen.recv().unwrap(), Seen::Opened(true));

    // The port nobody listened to appears when somebody does.
    let (listener, late) = Recorder::new(usize::MAX);
    handle.port("late").unwrap().set_listener(listener);
    guest.expect(2, protocol::PORT_ADD, 1);
    guest.open_port(2, "late");
    assert_eq!(late.recv().unwrap(), Seen::Opened(true));

    // Bytes both ways.
    guest.receive(1).fill(4, 8);
    let first = handle.port("first").unwrap();
    assert_eq!(first.write(b"hello guest"), 11);
    assert_eq!(guest.receive(1).wait_used().1, b"hello gu");
    assert_eq!(guest.receive(1).wait_used().1, b"est");
    guest.transmit(1).send(&[Part::Out(b"hello "), Part::Out(b"host")]);
    guest.transmit(1).wait_used();
    assert_eq!(seen.recv().unwrap(), Seen::Data(b"hello host".to_vec()));

    // The host's end closes and opens again, the guest sees both.
    first.set_host_open(false);
    guest.expect(1, protocol::PORT_OPEN, 0);
    first.set_host_open(true);
    guest.expect(1, protocol::PORT_OPEN, 1);

    // The guest closes: nothing can be written any more.
    guest.tell(1, protocol::PORT_OPEN, 0);
    assert_eq!(seen.recv().unwrap(), Seen::Opened(false));
    assert_eq!(first.write(b"x"), 0);
    guest.tell(1, protocol::PORT_OPEN, 1);
    assert_eq!(seen.recv().unwrap(), Seen::Opened(true));
    assert_eq!(seen.recv().unwrap(), Seen::Writable);

    device.reset();
    assert_eq!(seen.recv().unwrap(), Seen::Opened(false));
    let mut guest = Guest::start(&mut device);
    for id in 0..3 {
        guest.expect(id, protocol::PORT_ADD, 1);
    }
    guest.open_port(2, "late");
    assert!(!guest.driver.interrupt.needs_reset());
}

#[test]
fn a_slow_listener_holds_the_guest_back_without_loss() {
    let (mut device, handle) = open(ConsoleConfig::default());
    let agent = handle.port(super::VDAGENT_PORT).unwrap();
    let (listener, seen) = Recorder::new(3);
    agent.set_listener(listener.clone());
    let mut guest = Guest::start(&mut device);
    guest.expect(1, protocol::PORT_ADD, 1);
    guest.open_port(1, super::VDAGENT_PORT);
    assert_eq!(seen.recv().unwrap(), Seen::Opened(true));
    guest.transmit(1).send(&[Part::Out(b"abcde")]);
    guest.transmit(1).send(&[Part::Out(b"fgh")]);
    assert_eq!(seen.recv().unwrap(), Seen::Data(b"abc".to_vec()));
    assert!(guest.transmit(1).try_used().is_none(), "the buffer is still being read");
    listener.budget.store(100, Ordering::SeqCst);
    agent.resume();
    assert_eq!(seen.recv().unwrap(), Seen::Data(b"de".to_vec()));
    assert_eq!(seen.recv().unwrap(), Seen::Data(b"fgh".to_vec()));
    guest.transmit(1).wait_used();
    guest.transmit(1).wait_used();
    // A guest that closes loses what was not taken, and the port is not stuck.
    listener.budget.store(1, Ordering::SeqCst);
    guest.transmit(1).send(&[Part::Out(b"ij")]);
    assert_eq!(seen.recv().unwrap(), Seen::Data(b"i".to_vec()));
    guest.tell(1, protocol::PORT_OPEN, 0);
    guest.transmit(1).wait_used();
}

#[test]
fn output_is_bounded_and_room_is_announced() {
    let (mut device, handle) = open(ConsoleConfig::default());
    let agent = handle.port(super::VDAGENT_PORT).unwrap();
    let (listener, seen) = Recorder::new(usize::MAX);
    agent.set_listener(listener);
    let mut guest = Guest::start(&mut device);
    guest.expect(1, protocol::PORT_ADD, 1);
    guest.open_port(1, super::VDAGENT_PORT);
    assert_eq!(seen.recv().unwrap(), Seen::Opened(true));
    let big: Vec<u8> = (0..TO_GUEST_LIMIT + 10).map(|i| i as u8).collect();
    assert_eq!(agent.write(&big), TO_GUEST_LIMIT);
    let mut received = Vec::new();
    while received.len() < TO_GUEST_LIMIT {
        guest.receive(1).fill(1, BUFFER);
        received.extend(guest.receive(1).wait_used().1);
    }
    assert!(received == big[..TO_GUEST_LIMIT]);
    assert_eq!(seen.recv().unwrap(), Seen::Writable);
}

#[test]
fn a_driver_without_multiport_has_the_console_only() {
    let (mut device, handle) = open(ConsoleConfig::default());
    let features = device.features() & !F_MULTIPORT;
    let (listener, seen) = Recorder::new(usize::MAX);
    handle.port("hvc0").unwrap().set_listener(listener);
    let mut driver = Driver::start_queues(&mut device, features, guest_memory(), &[0, 1]);
    assert_eq!(seen.recv().unwrap(), Seen::Opened(true));
    driver.queues[1].send(&[Part::Out(b"boot\n")]);
    assert_eq!(seen.recv().unwrap(), Seen::Data(b"boot\n".to_vec()));
    driver.queues[0].fill(1, 16);
    assert_eq!(handle.port("hvc0").unwrap().write(b"ls\n"), 3);
    assert_eq!(driver.queues[0].wait_used().1, b"ls\n");
    device.write_config(8, b"!");
    assert_eq!(seen.recv().unwrap(), Seen::Data(b"!".to_vec()));
}

#[test]
fn a_driver_that_asks_and_never_listens_is_bounded() {
    let (mut device, _handle) = open(ConsoleConfig { console_on: true, ..Default::default() });
    let mut driver = Driver::start(&mut device);
    let ready = Message { port: 0, event: protocol::DEVICE_READY, value: 1 }.encode(&[]);
    let control = usize::from(CONTROL_TX);
    let mut answered = 0;
    for _ in 0..32 {
        driver.queues[control].send(&[Part::Out(&ready)]);
    }
    // Every message is eventually read once the answers find room.
    driver.queues[usize::from(CONTROL_RX)].fill(32, BUFFER);
    while answered < 32 {
        driver.queues[control].wait_used();
        answered += 1;
    }
    assert!(!driver.interrupt.needs_reset());
}

#[test]
fn an_absurd_write_is_a_violation() {
    let (mut device, _handle) = open(ConsoleConfig { console_on: true, ..Default::default() });
    let mut driver = Driver::start(&mut device);
    driver.queues[1].add_raw(&[(0x40_0000, 8 << 20, false)]);
    driver.queues[1].kick();
    driver.interrupt.wait_config_change();
    assert!(driver.interrupt.needs_reset());
    device.reset();
    device.reset();
    let _ = Guest::start(&mut device);
}

#[test]
fn a_socket_port_serves_one_client_after_the_other() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("qga.sock");
    // What a killed process leaves behind.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let ports = vec![port("org.qemu.guest_agent.0", PortBackend::Socket(path.clone()))];
    let (mut device, _handle) = open(ConsoleConfig { ports, ..Default::default() });
    let mut guest = Guest::start(&mut device);
    guest.expect(1, protocol::PORT_ADD, 1);
    guest.tell(1, protocol::PORT_READY, 1);
    assert_eq!(guest.hear().0.event, protocol::PORT_NAME);

    // A request sent before the guest's agent is there waits for it.
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(b"{\"execute\":\"guest-ping\"}\n").unwrap();
    guest.expect(1, protocol::PORT_OPEN, 1);
    let mut second = UnixStream::connect(&path).unwrap();
    guest.tell(1, protocol::PORT_OPEN, 1);
    guest.receive(1).fill(8, BUFFER);
    assert_eq!(guest.receive(1).wait_used().1, b"{\"execute\":\"guest-ping\"}\n");
    guest.transmit(1).send(&[Part::Out(b"{\"return\":{}}\n")]);
    let mut answer = [0; 14];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"{\"return\":{}}\n");

    // More than a socket holds goes through as the client reads, without loss.
    let block: Vec<u8> = (0..200_000u32).flat_map(u32::to_le_bytes).collect();
    for piece in block.chunks(32 << 10) {
        guest.transmit(1).send(&[Part::Out(piece)]);
    }
    let mut copy = vec![0; block.len()];
    client.read_exact(&mut copy).unwrap();
    assert!(copy == block);

    drop(client);
    guest.expect(1, protocol::PORT_OPEN, 0);
    guest.expect(1, protocol::PORT_OPEN, 1);
    second.write_all(b"again").unwrap();
    assert_eq!(guest.receive(1).wait_used().1, b"again");

    drop(device);
    assert!(!path.exists(), "the socket is removed with the device");
}

#[test]
fn a_socket_in_use_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let _other = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let config = ConsoleConfig { console: PortBackend::Socket(path.clone()), ..Default::default() };
    let Err(error) = config.open() else { panic!("the socket was taken over") };
    assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
    assert!(path.exists());
}

#[test]
fn hvc0_goes_to_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("log");
    let console = PortBackend::File(path.clone());
    let (mut device, _handle) = open(ConsoleConfig { console, ..Default::default() });
    let mut guest = Guest::start(&mut device);
    guest.expect(0, protocol::PORT_ADD, 1);
    guest.driver.queues[1].send(&[Part::Out(b"line\n")]);
    guest.driver.queues[1].wait_used();
    assert_eq!(std::fs::read(path).unwrap(), b"line\n");
}

#[test]
fn options() {
    let parse = |text: &str| ConsoleConfig::parse(Spec::parse("console", text).unwrap());
    let shown = |text: &str| format!("{:?}", parse(text).unwrap());
    assert_eq!(shown(""), format!("{:?}", ConsoleConfig::default()));
    let expected = ConsoleConfig {
        console: PortBackend::Socket("/run/c".into()),
        console_on: false,
        size: None,
        ports: vec![
            port("org.qemu.guest_agent.0", PortBackend::Socket("/run/q".into())),
            port("a", PortBackend::Handle),
            port("b", PortBackend::Socket(PathBuf::from("/run/b"))),
        ],
    };
    let text = "hvc0=socket=/run/c,vdagent=off,qga=/run/q,port=a,port=b:socket=/run/b";
    assert_eq!(shown(text), format!("{expected:?}"));
    for wrong in ["port=a/b", "port=", "port=a,port=a", "size=80", "hvc0=", "vga=on", "qga="] {
        assert!(parse(wrong).is_err(), "{wrong}");
    }
}
