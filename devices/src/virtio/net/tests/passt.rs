//! A real passt as the back end.

use super::*;

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

/// Debian 12's passt would go on with IPv6 alone, and 127.0.0.1 be the other program's.
#[test]
fn a_port_that_another_program_has_is_an_error() {
    if !have_passt() {
        return;
    }
    let other = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = other.local_addr().unwrap().port();
    for (address, ipv6) in [("", true), ("", false), ("127.0.0.1", false)] {
        let rule = format!("tcp:{address}:{port}-:22");
        let config = PasstConfig { ipv6, ..passt_config(&rule) };
        let error = Passt::start(&config, MAC, Link::new(false).unwrap()).map(drop).unwrap_err();
        let error = error.to_string();
        assert!(error.contains(&format!("hostfwd={rule}: another program")), "{error}");
    }
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
    assert!(error.to_string().contains("another program has this port"), "{error}");
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
