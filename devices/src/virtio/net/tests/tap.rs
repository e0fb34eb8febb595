//! Tap and macvtap interfaces in network namespaces of the tests' own.

use super::*;

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

/// An ARP request of the guest, 192.0.2.2: who has 192.0.2.1?
fn who_has_the_host() -> Vec<u8> {
    let mut request = vec![0xff; 6];
    request.extend(MAC.0);
    request.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    request.extend(MAC.0);
    request.extend([192, 0, 2, 2, 0, 0, 0, 0, 0, 0, 192, 0, 2, 1]);
    request.resize(60, 0);
    request
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
    // The host's kernel answers.
    let request = who_has_the_host();
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
    super::super::sys::attach(
        std::os::fd::AsFd::as_fd(&tun),
        "dragotest0",
        flags | libc::IFF_VNET_HDR,
    )
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
        let request = who_has_the_host();
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
