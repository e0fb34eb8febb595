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

mod passt;
mod tap;

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
