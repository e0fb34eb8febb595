use std::io::Read;

use super::{Listener, VsockConfig, device::Vsock};
use crate::{
    spec::Spec,
    virtio::{
        VirtioDevice,
        testing::{Driver, DriverQueue, Part},
    },
};

const CID: u32 = 4_242;
const HOST: u64 = 2;
const HEADER: usize = 44;
const BUFFER: u32 = 4096;

// Operations, §5.10.6.
const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RST: u16 = 3;
const SHUTDOWN: u16 = 4;
const RW: u16 = 5;
/// The sender of SHUTDOWN sends no more.
const SEND: u32 = 2;

fn parse(text: &str) -> Result<VsockConfig, String> {
    let spec = Spec::parse("vsock", text).unwrap();
    let config = VsockConfig::parse(spec).map_err(|error| error.to_string())?;
    let text = format!("{config:?}");
    let (_, cid) = text.split_once("cid: ").unwrap();
    let cid = cid.split([',', ' ']).next().unwrap().parse().unwrap();
    Ok(VsockConfig { cid, notify: text.contains("notify: true") })
}

#[test]
fn options() {
    assert_eq!(parse("cid=3"), Ok(VsockConfig { cid: 3, notify: false }));
    assert_eq!(
        parse("cid=4294967294,notify=on"),
        Ok(VsockConfig { cid: 4294967294, notify: true })
    );
    for wrong in ["cid=2", "cid=4294967295", "cid=-1", "cid=x"] {
        assert!(parse(wrong).unwrap_err().starts_with("--vsock: cid="), "{wrong}");
    }
    assert_eq!(parse("notify=on").unwrap_err(), "--vsock: 'cid=' is missing");
}

#[test]
fn the_guest_reads_its_context() {
    let device = Vsock::unserved(0x0102_0304);
    let mut space = [0xff; 10];
    device.read_config(0, &mut space);
    assert_eq!(space, [4, 3, 2, 1, 0, 0, 0, 0, 0xff, 0xff]);
}

/// A packet of the guest's, from one port to another.
fn packet(op: u16, (from, port): (u32, u32), flags: u32, length: usize) -> Vec<u8> {
    let mut header = Vec::with_capacity(HEADER);
    header.extend(u64::from(CID).to_le_bytes());
    header.extend(HOST.to_le_bytes());
    header.extend(from.to_le_bytes());
    header.extend(port.to_le_bytes());
    header.extend((length as u32).to_le_bytes());
    header.extend(1u16.to_le_bytes());
    header.extend(op.to_le_bytes());
    header.extend(flags.to_le_bytes());
    header.extend((64u32 << 10).to_le_bytes());
    header.extend(0u32.to_le_bytes());
    header
}

/// The operation of the next packet for a port of the guest's, other than RW and credit updates.
fn next_op(queue: &mut DriverQueue, port: u32) -> u16 {
    loop {
        let packet = queue.wait_used().1;
        let op = u16::from_le_bytes([packet[30], packet[31]]);
        if packet[20..24] == port.to_le_bytes() && op < RW {
            return op;
        }
    }
}

fn there_is_vhost() -> bool {
    let there = std::path::Path::new("/dev/vhost-vsock").exists();
    if !there {
        println!("SKIPPED: there is no /dev/vhost-vsock (run in the test host)");
    }
    there
}

#[test]
fn a_report_of_the_guest_arrives_and_its_connection_is_closed() {
    if !there_is_vhost() {
        return;
    }
    let mut device = Vsock::open(CID).unwrap();
    let taken = Vsock::open(CID).err().unwrap().to_string();
    assert!(taken.contains("cid=4242") && taken.contains("another machine"), "{taken}");
    let listener = Listener::bind(CID).unwrap();
    // Twice: the device survives a reset.
    for from in [1001, 1002] {
        let ports = (from, listener.port());
        let mut driver = Driver::start(&mut device);
        driver.queues[0].fill(16, BUFFER);
        driver.queues[1].send(&[Part::Out(&packet(REQUEST, ports, 0, 0))]);
        assert_eq!(next_op(&mut driver.queues[0], from), RESPONSE);
        let mut connection = listener.accept().unwrap();
        let header = packet(RW, ports, 0, 7);
        driver.queues[1].send(&[Part::Out(&header), Part::Out(b"READY=1")]);
        driver.queues[1].send(&[Part::Out(&packet(SHUTDOWN, ports, SEND, 0))]);
        let mut text = String::new();
        connection.read_to_string(&mut text).unwrap();
        assert_eq!(text, "READY=1");
        drop(connection);
        // The host has finished too.
        assert!(matches!(next_op(&mut driver.queues[0], from), SHUTDOWN | RST));

        device.reset();
    }
    // For somebody else's guest: the kernel makes the connection, and it is closed at once.
    let stranger = Listener::bind(CID + 1).unwrap();
    let port = stranger.port();
    std::thread::spawn(move || stranger.accept().is_ok());
    let mut driver = Driver::start(&mut device);
    driver.queues[0].fill(16, BUFFER);
    driver.queues[1].send(&[Part::Out(&packet(REQUEST, (1003, port), 0, 0))]);
    assert_eq!(next_op(&mut driver.queues[0], 1003), RESPONSE);
    assert!(matches!(next_op(&mut driver.queues[0], 1003), SHUTDOWN | RST));
}
