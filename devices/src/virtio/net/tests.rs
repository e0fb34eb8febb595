use std::{
    io::{Read, Write},
    net::TcpStream,
    os::{
        fd::{AsRawFd, IntoRawFd},
        unix::net::UnixStream,
    },
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use super::{
    HEADER, NetConfig,
    backend::Link,
    config::sample,
    device::{MRG_RXBUF, Net},
    mac::MacAddress,
    passt::{HOST_ADDRESS, Passt, PasstConfig},
};
use crate::{
    spec::Spec,
    virtio::{
        VirtioDevice,
        testing::{Driver, DriverQueue, Part, guest_memory},
    },
};

const MAC: MacAddress = MacAddress([2, 0, 0, 0, 0, 9]);
const BUFFER: u32 = 2048;

fn stream_card() -> (Net, Arc<Link>, UnixStream) {
    let link = Link::new(false).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let net = Net::stream(None, link.clone(), MAC, None);
    link.connect(ours);
    (net, link, theirs)
}

fn read_frame(peer: &mut UnixStream) -> Vec<u8> {
    let mut length = [0; 4];
    peer.read_exact(&mut length).unwrap();
    let mut frame = vec![0; u32::from_be_bytes(length) as usize];
    peer.read_exact(&mut frame).unwrap();
    frame
}

fn write_frame(peer: &mut UnixStream, frame: &[u8]) {
    peer.write_all(&(frame.len() as u32).to_be_bytes()).unwrap();
    peer.write_all(frame).unwrap();
}

fn frame(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i * 7) as u8).collect()
}

fn send(queue: &mut DriverQueue, frame: &[u8]) {
    queue.send(&[Part::Out(&[0; HEADER]), Part::Out(frame)]);
}

#[test]
fn packets_cross_a_stream_both_ways() {
    let (mut net, _link, mut peer) = stream_card();
    let mut driver = Driver::start(&mut net);
    send(&mut driver.queues[1], &frame(60));
    assert_eq!(read_frame(&mut peer), frame(60));
    driver.queues[1].wait_used();
    // Too short for a frame: dropped, and the next one goes.
    send(&mut driver.queues[1], &frame(3));
    send(&mut driver.queues[1], &frame(65_000));
    assert_eq!(read_frame(&mut peer), frame(65_000));

    driver.queues[0].fill(64, BUFFER);
    write_frame(&mut peer, &frame(1514));
    let (_, packet) = driver.queues[0].wait_used();
    assert_eq!(packet[..HEADER], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    assert_eq!(packet[HEADER..], frame(1514));
    // A jumbo frame takes as many buffers as its header says.
    write_frame(&mut peer, &frame(9000));
    let (_, mut packet) = driver.queues[0].wait_used();
    assert_eq!(packet[10..12], [5, 0]);
    for _ in 1..5 {
        packet.extend(driver.queues[0].wait_used().1);
    }
    assert_eq!(packet[HEADER..], frame(9000));
    assert!(!driver.interrupt.needs_reset());
}

#[test]
fn packets_wait_for_buffers_and_survive_a_reset() {
    let (mut net, _link, mut peer) = stream_card();
    let mut driver = Driver::start(&mut net);
    for length in 100..110 {
        write_frame(&mut peer, &frame(length));
    }
    for length in 100..105 {
        driver.queues[0].fill(1, BUFFER);
        assert_eq!(driver.queues[0].wait_used().1[HEADER..], frame(length));
    }
    net.reset();
    net.reset();
    let mut driver = Driver::start(&mut net);
    driver.queues[0].fill(8, BUFFER);
    write_frame(&mut peer, &frame(999));
    // What the card held at the reset is lost, the rest arrives in order.
    let mut lengths = Vec::new();
    while lengths.last() != Some(&999) {
        lengths.push(driver.queues[0].wait_used().1.len() - HEADER);
    }
    assert!(lengths.is_sorted() && lengths.len() >= 3, "{lengths:?}");
}

#[test]
fn a_large_packet_waits_for_enough_buffers() {
    for event_idx in [0, 1 << 29] {
        let (mut net, _link, mut peer) = stream_card();
        let features = net.features() & !(1 << 29) | event_idx;
        let mut driver = Driver::start_with(&mut net, features, guest_memory());
        driver.queues[0].fill(2, BUFFER);
        write_frame(&mut peer, &frame(9000));
        // An answer on the other queue proves that the card has looked.
        for _ in 0..2 {
            send(&mut driver.queues[1], &frame(60));
            driver.queues[1].wait_used();
        }
        driver.queues[0].fill(2, BUFFER);
        driver.queues[0].fill(2, BUFFER);
        let packet: Vec<u8> = (0..5).flat_map(|_| driver.queues[0].wait_used().1).collect();
        assert_eq!(packet[HEADER..], frame(9000));
    }
}

#[test]
fn a_full_stream_holds_the_driver_back_without_loss() {
    let (mut net, _link, mut peer) = stream_card();
    let mut driver = Driver::start(&mut net);
    let reader = std::thread::spawn(move || {
        (0..100).map(|_| read_frame(&mut peer).len()).collect::<Vec<_>>()
    });
    for _ in 0..100 {
        send(&mut driver.queues[1], &frame(60_000));
        driver.queues[1].wait_used();
    }
    assert_eq!(reader.join().unwrap(), [60_000; 100]);
}

#[test]
fn without_mergeable_buffers_a_packet_takes_one() {
    let (mut net, _link, mut peer) = stream_card();
    let features = net.features() & !(1 << MRG_RXBUF);
    let mut driver = Driver::start_with(&mut net, features, guest_memory());
    driver.queues[0].fill(2, BUFFER);
    write_frame(&mut peer, &frame(4000));
    write_frame(&mut peer, &frame(60));
    assert_eq!(driver.queues[0].wait_used().1, b"", "too large: the buffer comes back empty");
    assert_eq!(driver.queues[0].wait_used().1[HEADER..], frame(60));
}

#[test]
fn more_buffers_than_a_queue_has_are_not_waited_for() {
    // However many entries of the queue a buffer takes up, and if one is left at the end.
    for descriptors in 1..=3 {
        let (mut net, _link, mut peer) = stream_card();
        let mut driver = Driver::start(&mut net);
        for _ in 0..256 / descriptors {
            driver.queues[0].add(&vec![Part::In(20); descriptors]);
        }
        driver.queues[0].kick();
        write_frame(&mut peer, &frame(9000));
        assert_eq!(driver.queues[0].wait_used().1, b"", "it can never fit");
        write_frame(&mut peer, &frame(60));
        let mut packet = Vec::new();
        while packet.len() < HEADER + 60 {
            packet.extend(driver.queues[0].wait_used().1);
        }
        assert_eq!(packet[HEADER..], frame(60));
    }
}

#[test]
fn small_frames_are_sent_together_and_none_is_kept() {
    let (mut net, _link, mut peer) = stream_card();
    let mut driver = Driver::start(&mut net);
    for round in 0..3 {
        for length in 60..160 {
            driver.queues[1].add(&[Part::Out(&[0; HEADER]), Part::Out(&frame(length + round))]);
        }
        driver.queues[1].add(&[Part::Out(&[0; HEADER]), Part::Out(&frame(30_000))]);
        driver.queues[1].kick();
        for length in 60..160 {
            assert_eq!(read_frame(&mut peer), frame(length + round));
        }
        assert_eq!(read_frame(&mut peer), frame(30_000));
        for _ in 0..101 {
            driver.queues[1].wait_used();
        }
    }
}

/// One read of the socket takes more frames than have a turn; nothing tells of the others.
#[test]
fn a_burst_of_small_frames_arrives_whole() {
    let (mut net, _link, mut peer) = stream_card();
    let mut driver = Driver::start(&mut net);
    driver.queues[0].fill(200, BUFFER);
    let mut burst = Vec::new();
    for length in 60..210 {
        burst.extend_from_slice(&(length as u32).to_be_bytes());
        burst.extend_from_slice(&frame(length));
    }
    peer.write_all(&burst).unwrap();
    for length in 60..210 {
        assert_eq!(driver.queues[0].wait_used().1[HEADER..], frame(length));
    }
}

#[test]
fn a_driver_that_never_pauses_cannot_keep_the_card_from_being_stopped() {
    let (mut net, _link, mut peer) = stream_card();
    let mut driver = Driver::start(&mut net);
    // Too short to be sent, so that nobody has to take it.
    let head = driver.queues[1].add(&[Part::Out(&[0; HEADER])]);
    let mut flood = driver.queues[1].flood(head);
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = stop.clone();
    let flooding = std::thread::spawn(move || {
        while !stopped.load(Ordering::Relaxed) {
            flood();
        }
    });
    // The other direction gets its turn.
    driver.queues[0].fill(8, BUFFER);
    for length in 100..108 {
        write_frame(&mut peer, &frame(length));
        assert_eq!(driver.queues[0].wait_used().1[HEADER..], frame(length));
    }
    net.reset();
    stop.store(true, Ordering::Relaxed);
    flooding.join().unwrap();
}

#[test]
fn the_cable_follows_the_peer() {
    let (mut net, link, peer) = stream_card();
    let status = |net: &Net| {
        let mut status = [0; 2];
        net.read_config(6, &mut status);
        status[0]
    };
    let mut driver = Driver::start(&mut net);
    assert_eq!(status(&net), 1);
    drop(peer);
    driver.interrupt.wait_config_change();
    assert_eq!(status(&net), 0);
    send(&mut driver.queues[1], &frame(60));
    driver.queues[1].wait_used();
    let (ours, mut peer) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    link.connect(ours);
    driver.interrupt.wait_config_change();
    assert_eq!(status(&net), 1);
    driver.queues[0].fill(2, BUFFER);
    write_frame(&mut peer, &frame(77));
    assert_eq!(driver.queues[0].wait_used().1.len(), HEADER + 77);
    // A peer that breaks the protocol is dropped like one that is gone.
    peer.write_all(&[0xff; 4]).unwrap();
    driver.interrupt.wait_config_change();
    assert_eq!(status(&net), 0);
}

#[test]
fn violations_need_a_reset() {
    let (mut net, _link, mut peer) = stream_card();
    let mut driver = Driver::start(&mut net);
    driver.queues[1].add_raw(&[(0x40_0000, 1 << 20, false)]);
    driver.queues[1].kick();
    driver.interrupt.wait_config_change();
    assert!(driver.interrupt.needs_reset());
    net.reset();
    let mut driver = Driver::start(&mut net);
    driver.queues[0].fill(1, 11);
    write_frame(&mut peer, &frame(60));
    driver.interrupt.wait_config_change();
    assert!(driver.interrupt.needs_reset());
    assert!(sample().is_ok());
}

/// A guest of one machine, just enough to get an address.
struct Guest {
    driver: Driver,
}

impl Guest {
    fn receive(&mut self) -> Vec<u8> {
        self.driver.queues[0].receive(BUFFER).split_off(HEADER)
    }

    fn transmit(&mut self, frame: &[u8]) {
        send(&mut self.driver.queues[1], frame);
        self.driver.queues[1].wait_used();
    }

    /// The next frame that `wanted` likes.
    fn wait_for(&mut self, wanted: impl Fn(&[u8]) -> bool) -> Vec<u8> {
        loop {
            let frame = self.receive();
            if wanted(&frame) {
                return frame;
            }
        }
    }
}

fn checksum(bytes: &[u8]) -> u16 {
    let sum: u32 = bytes.chunks(2).map(|p| u32::from(p[0]) << 8 | u32::from(p[1])).sum();
    !((sum & 0xffff) + (sum >> 16)) as u16
}

/// A DHCP message (RFC 2131) in UDP, IPv4 and Ethernet.
fn dhcp(kind: u8) -> Vec<u8> {
    let mut bootp = vec![1, 1, 6, 0, 1, 2, 3, 4];
    bootp.resize(28, 0);
    bootp.extend(MAC.0);
    bootp.resize(236, 0);
    bootp.extend([99, 130, 83, 99, 53, 1, kind, 55, 4, 1, 3, 6, 26]);
    if kind == 3 {
        bootp.extend([50, 4, 10, 0, 2, 15, 54, 4, 10, 0, 2, 2]);
    }
    bootp.push(255);
    bootp.resize(300, 0);
    let mut ip = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255];
    let total = (20 + 8 + bootp.len()) as u16;
    ip[2..4].copy_from_slice(&total.to_be_bytes());
    let sum = checksum(&ip);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let mut frame = vec![0xff; 6];
    frame.extend(MAC.0);
    frame.extend([8, 0]);
    frame.extend(ip);
    frame.extend([0, 68, 0, 67]);
    frame.extend((8 + bootp.len() as u16).to_be_bytes());
    frame.extend([0, 0]);
    frame.extend(bootp);
    frame
}

fn is_dhcp(frame: &[u8]) -> bool {
    frame.len() > 282 && frame[12..14] == [8, 0] && frame[23] == 17 && frame[36..38] == [0, 68]
}

fn dhcp_option(frame: &[u8], wanted: u8) -> Option<Vec<u8>> {
    let mut options = &frame[14 + 20 + 8 + 240..];
    while let [code, length, rest @ ..] = options {
        match code {
            0 => options = &options[1..],
            255 => return None,
            _ => {
                let value = &rest[..usize::from(*length)];
                if *code == wanted {
                    return Some(value.to_vec());
                }
                options = &rest[usize::from(*length)..];
            }
        }
    }
    None
}

fn passt_config(forward: &str) -> PasstConfig {
    PasstConfig {
        forwards: vec![forward.parse().unwrap()],
        host_access: true,
        mtu: 1500,
        ipv6: false,
        program: None,
    }
}

fn have_passt() -> bool {
    let there = Command::new("passt").arg("--version").output().is_ok();
    if !there {
        eprintln!("SKIPPED: the program 'passt' is not installed");
    }
    there
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

#[test]
fn the_guest_gets_an_address_and_a_forwarded_port_from_passt() {
    if !have_passt() {
        return;
    }
    let port = free_port();
    let link = Link::new(false).unwrap();
    let config = passt_config(&format!("tcp:127.0.0.1:{port}-:22"));
    let passt = Passt::start(&config, MAC, link.clone()).unwrap();
    let mut net = Net::stream(Some(passt), link.clone(), MAC, None);
    let driver = Driver::start(&mut net);
    let mut guest = Guest { driver };
    guest.driver.queues[0].fill(64, BUFFER);
    guest.transmit(&dhcp(1));
    let offer = guest.wait_for(is_dhcp);
    assert_eq!(dhcp_option(&offer, 53), Some(vec![2]));
    assert_eq!(offer[14 + 20 + 8 + 16..][..4], [10, 0, 2, 15]);
    guest.transmit(&dhcp(3));
    let ack = guest.wait_for(is_dhcp);
    assert_eq!(dhcp_option(&ack, 53), Some(vec![5]));
    assert_eq!(dhcp_option(&ack, 3), Some(HOST_ADDRESS.octets().to_vec()));
    assert_eq!(dhcp_option(&ack, 1), Some(vec![255, 255, 255, 0]));
    assert_eq!(dhcp_option(&ack, 26), Some(vec![0x05, 0xdc]));

    // Unless it is told otherwise a card can take what passt can.
    let user = NetConfig::parse(Spec::parse("net", "user").unwrap()).unwrap().build().unwrap();
    let mut mtu = [0; 2];
    user.device.read_config(10, &mut mtu);
    assert_eq!((user.device.features() >> 3 & 1, u16::from_le_bytes(mtu)), (1, 65_520));
    drop(user);

    // A connection to the forwarded port reaches port 22 of the guest.
    let _client = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let syn = guest.wait_for(|frame| frame[12..14] == [8, 0] && frame[23] == 6);
    assert_eq!(syn[30..34], [10, 0, 2, 15]);
    assert_eq!(syn[36..38], [0, 22]);
    assert_eq!(syn[47] & 0x3f, 2, "a SYN");

    // A second machine cannot have the same port, and is told so at once.
    let config = passt_config(&format!("tcp:127.0.0.1:{port}-:22"));
    let Err(error) = Passt::start(&config, MAC, Link::new(false).unwrap()) else {
        panic!("the port was forwarded twice");
    };
    assert!(error.to_string().contains("passt ended at its start"), "{error}");
}

#[test]
fn passt_is_started_again_when_it_dies() {
    if !have_passt() {
        return;
    }
    let link = Link::new(false).unwrap();
    let config = passt_config(&format!("tcp:127.0.0.1:{}-:22", free_port()));
    let passt = Passt::start(&config, MAC, link.clone()).unwrap();
    let first = passt.id();
    let mut net = Net::stream(Some(passt), link, MAC, None);
    let driver = Driver::start(&mut net);
    let mut guest = Guest { driver };
    guest.driver.queues[0].fill(64, BUFFER);
    guest.transmit(&dhcp(1));
    guest.wait_for(is_dhcp);
    assert!(
        Command::new("kill").args(["-9", &first.unwrap().to_string()]).status().unwrap().success()
    );
    // Down and up may be one or two notifications.
    guest.driver.interrupt.wait_config_change();
    let up = |net: &Net| {
        let mut status = [0];
        net.read_config(6, &mut status);
        status[0] == 1 && net.passt_id() != first
    };
    while !up(&net) {
        guest.driver.interrupt.wait_config_change();
    }
    guest.transmit(&dhcp(1));
    guest.wait_for(is_dhcp);
    let last = net.passt_id().unwrap();
    drop(net);
    assert!(!std::path::Path::new(&format!("/proc/{last}")).exists(), "passt is collected");
}

/// Runs the test `name` again inside a network namespace of its own.
fn in_namespace(name: &str) -> bool {
    namespace(name, "-rn", &["ip", "tuntap", "add", "t", "mode", "tap"])
}

/// Runs the test `name` again in the namespaces that `flags` of unshare(1) make, if `attempt` works there.
fn namespace(name: &str, flags: &str, attempt: &[&str]) -> bool {
    if std::env::var_os("DRAGO_TEST_NAMESPACE").is_some() {
        return true;
    }
    if !std::path::Path::new("/dev/net/tun").exists() {
        eprintln!("SKIPPED: there is no /dev/net/tun");
        return false;
    }
    let attempted = Command::new("unshare").arg(flags).args(attempt).output();
    if !attempted.is_ok_and(|output| output.status.success()) {
        eprintln!("SKIPPED: {attempt:?} is not possible in a network namespace here");
        return false;
    }
    let done = Command::new("unshare")
        .arg(flags)
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env("DRAGO_TEST_NAMESPACE", "1")
        .output()
        .unwrap();
    // As this test's, and not to be taken for a report of its own.
    for said in [&done.stdout, &done.stderr] {
        String::from_utf8_lossy(said).lines().for_each(|line| println!("    {line}"));
    }
    assert!(done.status.success());
    false
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status().unwrap();
    assert!(status.success(), "ip {arguments}");
}

#[test]
fn packets_cross_a_macvtap_interface_that_somebody_else_opened() {
    let name = "virtio::net::tests::packets_cross_a_macvtap_interface_that_somebody_else_opened";
    let attempt = "ip link add name a0 type veth peer name b0 && \
                   ip link add link b0 name mv0 type macvtap mode bridge";
    // Device nodes need the real root.
    if !namespace(name, "-nm", &["sh", "-c", attempt]) {
        return;
    }
    let status = Command::new("mount").args(["-t", "sysfs", "sysfs", "/sys"]).status().unwrap();
    assert!(status.success());
    ip("link add name a0 type veth peer name b0");
    ip("addr add 192.0.2.1/24 dev a0");
    ip("link add link b0 name mv0 address 02:00:00:00:00:0a type macvtap mode bridge");
    for interface in ["a0", "b0", "mv0"] {
        ip(&format!("link set {interface} up"));
    }
    // What is sent before the kernel has noticed the carrier is lost.
    for interface in ["a0", "b0", "mv0"] {
        let state = format!("/sys/class/net/{interface}/operstate");
        while std::fs::read_to_string(&state).unwrap().trim() != "up" {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
    // Not /dev/tapN, which on this machine may be that of another network namespace.
    let index = std::fs::read_to_string("/sys/class/net/mv0/ifindex").unwrap();
    let device = format!("/sys/class/net/mv0/macvtap/tap{}/dev", index.trim());
    let numbers = std::fs::read_to_string(device).unwrap();
    let (major, minor) = numbers.trim().split_once(':').unwrap();
    let folder = tempfile::tempdir().unwrap();
    let node = folder.path().join("tap");
    let status = Command::new("mknod").arg(&node).args(["c", major, minor]).status().unwrap();
    assert!(status.success());
    let Ok(tap) = std::fs::File::options().read(true).write(true).open(&node) else {
        eprintln!("SKIPPED: device nodes cannot be opened here");
        return;
    };
    let parse = |text: &str| NetConfig::parse(Spec::parse("net", text).unwrap()).unwrap();
    let fd = tap.as_raw_fd();
    let mut built = parse(&format!("fd={fd}")).build().unwrap();
    let mut mac = [0; 6];
    built.device.read_config(0, &mut mac);
    assert_eq!(mac, [2, 0, 0, 0, 0, 0x0a], "the guest has the address of the interface");
    let driver = Driver::start(&mut *built.device);
    let mut guest = Guest { driver };
    guest.driver.queues[0].fill(64, BUFFER);
    let mut request = vec![0xff; 6];
    request.extend(mac);
    request.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    request.extend(mac);
    request.extend([192, 0, 2, 2, 0, 0, 0, 0, 0, 0, 192, 0, 2, 1]);
    request.resize(60, 0);
    guest.transmit(&request);
    let reply = guest.wait_for(|frame| frame[12..14] == [8, 6] && frame[20..22] == [0, 2]);
    assert_eq!(reply[28..32], [192, 0, 2, 1]);
}

#[test]
fn packets_cross_a_tap_interface() {
    if !in_namespace("virtio::net::tests::packets_cross_a_tap_interface") {
        return;
    }
    ip("tuntap add dev dragotest0 mode tap vnet_hdr");
    ip("addr add 192.0.2.1/24 dev dragotest0");
    let parse = |text: &str| NetConfig::parse(Spec::parse("net", text).unwrap()).unwrap();
    let mut built = parse("tap=dragotest0,mac=02:00:00:00:00:09,mtu=1400").build().unwrap();
    // Only now: an interface that is up without a carrier gets its queue some time later.
    ip("link set dragotest0 up");
    let mut mac = [0; 12];
    built.device.read_config(0, &mut mac);
    assert_eq!(mac, [2, 0, 0, 0, 0, 9, 1, 0, 1, 0, 0x78, 0x05]);
    let driver = Driver::start(&mut *built.device);
    let mut guest = Guest { driver };
    guest.driver.queues[0].fill(64, BUFFER);
    // Who has 192.0.2.1? The host's kernel answers.
    let mut request = vec![0xff; 6];
    request.extend(MAC.0);
    request.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    request.extend(MAC.0);
    request.extend([192, 0, 2, 2, 0, 0, 0, 0, 0, 0, 192, 0, 2, 1]);
    request.resize(60, 0);
    guest.transmit(&request);
    let reply = guest.wait_for(|frame| frame[12..14] == [8, 6] && frame[20..22] == [0, 2]);
    assert_eq!(reply[28..32], [192, 0, 2, 1]);

    // What the host sends arrives.
    let listener = std::net::UdpSocket::bind("192.0.2.1:0").unwrap();
    listener.send_to(&frame(1000), "192.0.2.2:9").unwrap();
    let packet = guest.wait_for(|frame| frame[12..14] == [8, 0] && frame[23] == 17);
    assert_eq!(packet[42..], frame(1000));

    // With less room than it needs: the rest follows when there is more.
    built.device.reset();
    let mut driver = Driver::start(&mut *built.device);
    driver.queues[0].fill(3, 128);
    listener.send_to(&frame(1200), "192.0.2.2:9").unwrap();
    // An answer on the other queue proves that the card has looked.
    for _ in 0..2 {
        send(&mut driver.queues[1], &request);
        driver.queues[1].wait_used();
    }
    driver.queues[0].fill(60, 128);
    let packet = loop {
        let mut packet = driver.queues[0].wait_used().1;
        for _ in 1..packet[10] {
            packet.extend(driver.queues[0].try_used().expect("all of a packet at once").1);
        }
        if packet.len() > HEADER + 1200 {
            break packet;
        }
    };
    assert_eq!(packet[HEADER + 42..], frame(1200));

    // In use, then free again, also as an inherited descriptor.
    let busy = parse("tap=dragotest0").build().unwrap_err().to_string();
    assert!(busy.contains("another process uses it"), "{busy}");
    let missing = parse("tap=nosuchtap0").build().unwrap_err().to_string();
    assert!(missing.contains("ip tuntap add dev nosuchtap0"), "{missing}");
    drop(built);
    let tun = std::fs::File::options().read(true).write(true).open("/dev/net/tun").unwrap();
    let flags = libc::IFF_TAP | libc::IFF_NO_PI;
    super::sys::attach(std::os::fd::AsFd::as_fd(&tun), "dragotest0", flags | libc::IFF_VNET_HDR)
        .unwrap();
    let built = parse(&format!("fd={}", tun.as_raw_fd())).build().unwrap();
    assert!(built.device.features() & 1 != 0, "offloads");
    drop((built, tun));
    let null = std::fs::File::open("/dev/null").unwrap().into_raw_fd();
    let error = parse(&format!("fd={null}")).build().unwrap_err().to_string();
    assert!(error.contains("not a tap"), "{error}");
    let error = parse("fd=999").build().unwrap_err().to_string();
    assert!(error.contains("not an open descriptor"), "{error}");

    // The interface is removed under a running card.
    let mut built = parse("tap=dragotest0").build().unwrap();
    let mut driver = Driver::start(&mut *built.device);
    // Without buffers the card does not look at the interface.
    driver.queues[0].fill(64, BUFFER);
    ip("link del dragotest0");
    driver.interrupt.wait_config_change();
    let mut status = [9];
    built.device.read_config(6, &mut status);
    assert_eq!(status, [0]);
}

/// Sends `count` packets of as many flows to the guest, and counts what arrives at each pair.
fn flood(driver: &mut Driver, from: u16, count: u16) -> [usize; 2] {
    let mut arrived = [0; 2];
    for port in from..from + count {
        let socket = std::net::UdpSocket::bind(("192.0.2.1", port)).unwrap();
        socket.send_to(b"hello", "192.0.2.2:9").unwrap();
    }
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while arrived[0] + arrived[1] < usize::from(count) {
        assert!(std::time::Instant::now() < deadline, "{arrived:?} of {count}");
        for (pair, arrived) in arrived.iter_mut().enumerate() {
            while let Some((_, packet)) = driver.queues[2 * pair].try_used() {
                driver.queues[2 * pair].send(&[Part::In(BUFFER)]);
                let frame = &packet[HEADER..];
                *arrived += usize::from(frame[12..14] == [8, 0] && frame[36..38] == [0, 9]);
            }
        }
        std::thread::yield_now();
    }
    arrived
}

fn use_pairs(driver: &mut Driver, pairs: u16) -> u8 {
    let control = driver.queues.len() - 1;
    driver.queues[control].send(&[
        Part::Out(&[4, 0]),
        Part::Out(&pairs.to_le_bytes()),
        Part::In(1),
    ]);
    driver.queues[control].wait_used().1[0]
}

fn several_queues(name: &str, options: &str) {
    if !in_namespace(name) {
        return;
    }
    ip("tuntap add dev dragotest1 mode tap vnet_hdr multi_queue");
    ip("addr add 192.0.2.1/24 dev dragotest1");
    ip("neigh add 192.0.2.2 lladdr 02:00:00:00:00:09 dev dragotest1");
    let option = format!("tap=dragotest1,queues=2,mac=02:00:00:00:00:09{options}");
    let mut built =
        NetConfig::parse(Spec::parse("net", &option).unwrap()).unwrap().build().unwrap();
    ip("link set dragotest1 up");
    let mut pairs = [0; 2];
    built.device.read_config(8, &mut pairs);
    assert_eq!(pairs, [2, 0]);
    assert_eq!(built.device.queue_sizes().len(), 5);
    // Twice: the queues survive a reset.
    for _ in 0..2 {
        let mut driver = Driver::start(&mut *built.device);
        driver.queues[0].fill(128, BUFFER);
        driver.queues[2].fill(128, BUFFER);
        assert_eq!(flood(&mut driver, 2000, 32), [32, 0], "one pair at first");
        assert_eq!(use_pairs(&mut driver, 2), 0);
        let [first, second] = flood(&mut driver, 3000, 64);
        assert!(first > 0 && second > 0, "{first} and {second} packets");
        // The guest may send by any of them; the host's kernel answers.
        let mut request = vec![0xff; 6];
        request.extend(MAC.0);
        request.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        request.extend(MAC.0);
        request.extend([192, 0, 2, 2, 0, 0, 0, 0, 0, 0, 192, 0, 2, 1]);
        request.resize(60, 0);
        for queue in [1, 3] {
            send(&mut driver.queues[queue], &request);
            driver.queues[queue].wait_used();
        }
        for wrong in [0, 3] {
            assert_eq!(use_pairs(&mut driver, wrong), 1, "{wrong} pairs");
        }
        assert_eq!(use_pairs(&mut driver, 1), 0);
        flood(&mut driver, 4000, 16);
        assert_eq!(flood(&mut driver, 5000, 32), [32, 0], "one pair again");
        assert!(!driver.interrupt.needs_reset());
        built.device.reset();
    }
    drop(built);

    ip("tuntap add dev dragotest2 mode tap vnet_hdr");
    let option = Spec::parse("net", "tap=dragotest2,queues=2").unwrap();
    let error = NetConfig::parse(option).unwrap().build().unwrap_err().to_string();
    assert!(error.contains("multi_queue"), "{error}");
}

#[test]
fn a_card_is_not_started_again_and_again() {
    if !in_namespace("virtio::net::tests::a_card_is_not_started_again_and_again") {
        return;
    }
    ip("tuntap add dev dragotest1 mode tap vnet_hdr");
    let option = Spec::parse("net", "tap=dragotest1").unwrap();
    let mut built = NetConfig::parse(option).unwrap().build().unwrap();
    let driver = Driver::start(&mut *built.device);
    built.device.reset();
    // Each start costs one; that nothing is left at some time means that a reset gives nothing back.
    let refused = (0..5000).find_map(|_| {
        let activation = crate::virtio::Activation {
            memory: driver.memory.clone(),
            features: built.device.features(),
            queues: Vec::new(),
            interrupt: driver.interrupt.clone(),
        };
        let result = built.device.activate(activation);
        built.device.reset();
        result.err()
    });
    let refused = refused.expect("an end").to_string();
    assert!(refused.contains("too often"), "{refused}");
}

#[test]
fn packets_spread_over_several_queues() {
    several_queues("virtio::net::tests::packets_spread_over_several_queues", "");
}

#[test]
fn packets_spread_over_several_queues_of_the_kernel() {
    if !std::path::Path::new("/dev/vhost-net").exists() {
        println!("SKIPPED: there is no /dev/vhost-net (run in the test host)");
        return;
    }
    let name = "virtio::net::tests::packets_spread_over_several_queues_of_the_kernel";
    several_queues(name, ",vhost=on");
}

#[test]
fn options() {
    let parse = |text: &str| NetConfig::parse(Spec::parse("net", text).unwrap());
    for right in [
        "user",
        "user,hostfwd=tcp::2223-:22,hostfwd=udp::2223-:22,host-access=off,ipv6=off,mtu=9000",
        "tap=tap0,mac=02:00:00:00:00:01",
        "tap=tap0,queues=4,vhost=on",
        "fd=3",
        "fd=3:4:5,queues=3",
    ] {
        assert!(parse(right).is_ok(), "{right}");
    }
    for wrong in [
        "",
        "bridge",
        "user,tap=a",
        "tap=a,fd=3",
        "tap=",
        "tap=a-name-that-is-too-long",
        "fd=1",
        "fd=3:3",
        "fd=3:",
        "fd=3:4,queues=3",
        "user,vhost=on",
        "user,queues=2",
        "tap=a,queues=0",
        "tap=a,queues=65",
        "fd=x",
        "user,mtu=10",
        "user,mac=ff:ff:ff:ff:ff:ff",
        "user,hostfwd=tcp::1-:2,hostfwd=tcp::1-:3",
        "tap=a,hostfwd=tcp::1-:2",
    ] {
        assert!(parse(wrong).is_err(), "{wrong}");
    }
}
