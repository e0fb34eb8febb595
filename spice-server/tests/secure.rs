//! TLS and Unix sockets, with spice-gtk and remote-viewer at the other end.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use std::{
    io::{Read, Write},
    net::TcpStream,
    path::Path,
    process::{Command, Stdio},
};

use spice_server::{ClientPolicy, SecureChannels, ServerBuilder};
use support::{
    Client, PATIENCE, Setup,
    certificates::{Certificates, EC, RSA, SUBJECT},
    eventually, have, have_client, setup,
};

fn secure_setup(
    certificates: &Certificates,
    more: impl FnOnce(ServerBuilder) -> ServerBuilder,
) -> Setup {
    let setup = setup(|builder| {
        more(builder.tls(Some(certificates.config())).secure_channels(SecureChannels::ALL))
    });
    setup.show_background((300, 200));
    setup
}

#[test]
fn spice_gtk_connects_by_authority_and_by_subject() {
    if !have_client() {
        return;
    }
    for key in [RSA, EC] {
        let Some(certificates) = Certificates::new(key) else { return };
        let setup = secure_setup(&certificates, |builder| builder);
        let wanted = support::hash(&support::picture::background(300, 200));
        let tls_port = format!("tls-port={}", setup.address().port());
        let ca = certificates.ca("ca.pem");
        let subject = format!("cert-subject={SUBJECT}");
        for verify in [&["verify=hostname"][..], &["verify=subject", &subject]] {
            let words = [&[&*tls_port, &*ca], verify].concat();
            let mut client = Client::start("127.0.0.1", "-", &words);
            client.wait_ready();
            assert_eq!(client.pixels(), wanted, "{verify:?}");
            let status = setup.server.status();
            assert_eq!(status.clients[0].channels.len(), 4);
        }
    }
}

#[test]
fn pictures_flow_through_tls() {
    if !have_client() {
        return;
    }
    let Some(certificates) = Certificates::new(EC) else { return };
    let setup = secure_setup(&certificates, |builder| builder);
    let tls_port = format!("tls-port={}", setup.address().port());
    let mut client = Client::start("127.0.0.1", "-", &[&tls_port, &certificates.ca("ca.pem")]);
    client.wait_ready();
    // Noise, much more than any buffer on the way holds.
    let mut state = 1u32;
    for _ in 0..20 {
        let noise: Vec<u8> = (0..1024 * 768 * 4)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 24) as u8
            })
            .collect();
        setup.show((1024, 768), noise);
    }
    let last = setup.show_background((1024, 768));
    eventually("the last picture", || client.pixels() == support::hash(&last));
    client.tell("key-press 30");
    setup.event("key", |event| matches!(event, support::picture::Event::Key(_)).then_some(()));
    let status = setup.server.status();
    let display = &status.clients[0].displays[0];
    assert!(display.round_trip > std::time::Duration::ZERO, "pings are answered: {display:?}");
}

#[test]
fn a_wrong_authority_is_refused_by_the_client_and_nobody_else_notices() {
    if !have_client() {
        return;
    }
    let Some(certificates) = Certificates::new(EC) else { return };
    let setup = secure_setup(&certificates, |builder| builder.client_policy(ClientPolicy::Shared));
    let tls_port = format!("tls-port={}", setup.address().port());
    let connect = |ca: &str| Client::start("127.0.0.1", "-", &[&tls_port, &certificates.ca(ca)]);
    let mut honest = connect("ca.pem");
    honest.wait_ready();
    let deceived = connect("other.pem");
    deceived.event("a TLS error", |e| (e["event"] == "error-tls").then_some(()));
    eventually("its connection is gone", || setup.server.status().pending_connections == 0);
    assert_eq!(setup.server.status().clients.len(), 1);
    let wanted = support::hash(&setup.show_background((320, 240)));
    eventually("the honest client's next picture", || honest.pixels() == wanted);
}

fn answer(setup: &Setup, port: u16, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect((setup.address().ip(), port)).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(bytes).unwrap();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    answer
}

/// The first message of a main channel.
fn hello() -> Vec<u8> {
    let mut out = b"REDQ".to_vec();
    for word in [2u32, 2, 22, 0] {
        out.extend_from_slice(&word.to_le_bytes());
    }
    out.extend_from_slice(&[1, 0]);
    for word in [1u32, 0, 18, 0xd] {
        out.extend_from_slice(&word.to_le_bytes());
    }
    out
}

#[test]
fn plain_clients_are_told_to_use_tls() {
    const NEED_SECURED: u32 = 5;
    let Some(certificates) = Certificates::new(EC) else { return };
    let setup = secure_setup(&certificates, |builder| builder);
    let reply = answer(&setup, setup.address().port(), &hello());
    assert_eq!(u32::from_le_bytes(reply[16..20].try_into().unwrap()), NEED_SECURED);

    // A port for TLS only says the same although no channel has to be secure.
    let setup = support::setup(|builder| {
        builder.tls(Some(certificates.config())).listen_tls(([127, 0, 0, 1], 0).into())
    });
    let tls_only = setup.server.local_addrs()[1].port();
    let reply = answer(&setup, tls_only, &hello());
    assert_eq!(u32::from_le_bytes(reply[16..20].try_into().unwrap()), NEED_SECURED);
    let reply = answer(&setup, setup.address().port(), &hello());
    assert_eq!(u32::from_le_bytes(reply[16..20].try_into().unwrap()), 0);
}

#[test]
fn clients_follow_the_policy_of_each_channel() {
    if !have_client() {
        return;
    }
    let Some(certificates) = Certificates::new(EC) else { return };
    let mut secure = SecureChannels::NONE;
    assert!(secure.add("main") && secure.add("inputs"));
    let setup = support::setup(|builder| {
        let builder = builder.listen_tls(([127, 0, 0, 1], 0).into());
        builder.tls(Some(certificates.config())).secure_channels(secure)
    });
    setup.show_background((300, 200));
    // It tries in the clear first, and TLS where it is told to.
    let port = setup.address().port().to_string();
    let tls_port = format!("tls-port={}", setup.server.local_addrs()[1].port());
    let client = Client::start("127.0.0.1", &port, &[&tls_port, &certificates.ca("ca.pem")]);
    client.wait_ready();
    let status = setup.server.status();
    let mut transports: Vec<_> = status.clients[0].channels.iter().collect();
    transports.sort_by(|a, b| a.name.cmp(&b.name));
    let seen: Vec<_> = transports.iter().map(|c| (c.name.as_str(), c.transport.as_str())).collect();
    assert_eq!(
        seen,
        [
            ("cursor 0", "tcp"),
            ("display 0", "tcp"),
            ("inputs", "tcp+tls1.3"),
            ("main", "tcp+tls1.3")
        ]
    );
}

#[test]
fn a_certificate_is_renewed_at_run_time() {
    if !have_client() {
        return;
    }
    let (Some(old), Some(new)) = (Certificates::new(EC), Certificates::new(EC)) else { return };
    let setup = secure_setup(&old, |builder| builder.client_policy(ClientPolicy::Shared));
    let tls_port = format!("tls-port={}", setup.address().port());
    let connect =
        |by: &Certificates| Client::start("127.0.0.1", "-", &[&tls_port, &by.ca("ca.pem")]);
    let mut early = connect(&old);
    early.wait_ready();
    setup.server.set_tls(&new.config());
    connect(&old).event("a TLS error", |e| (e["event"] == "error-tls").then_some(()));
    connect(&new).wait_ready();
    let wanted = support::hash(&setup.show_background((320, 240)));
    eventually("the early client's next picture", || early.pixels() == wanted);
}

#[test]
fn garbage_after_a_client_hello_is_no_trouble() {
    let Some(certificates) = Certificates::new(EC) else { return };
    let setup = secure_setup(&certificates, |builder| builder);
    for bytes in [&b"\x16\x03\x01\xff\xff"[..], b"\x16\x03\x01\0\x05\x01\0\0\x01\0", &[0x16; 9000]]
    {
        let stream = TcpStream::connect(setup.address()).unwrap();
        (&stream).write_all(bytes).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
    }
    eventually("all are gone", || setup.server.status().pending_connections == 0);
}

#[test]
fn spice_gtk_comes_through_a_unix_socket() {
    if !have_client() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("spice.sock");
    let setup =
        setup(|builder| builder.listen_unix(&path, 0o600).secure_channels(SecureChannels::ALL));
    let wanted = support::hash(&setup.show_background((300, 200)));
    let socket = format!("unix-path={}", path.display());
    let mut client = Client::start("", "-", &[&socket]);
    client.wait_ready();
    assert_eq!(client.pixels(), wanted);
    let peer = setup.server.status().clients[0].peer.to_string();
    assert!(peer.starts_with("unix:uid="), "{peer}");
    drop(setup);
    assert!(!path.exists());
}

/// remote-viewer under Xvfb with these arguments, until the server has its display channel.
fn remote_viewer(setup: &Setup, arguments: &[&str]) {
    let screen = support::xvfb::Xvfb::start(1000, 800).unwrap();
    let log = tempfile::NamedTempFile::new().unwrap();
    let mut viewer = Command::new("remote-viewer")
        .arg("--spice-disable-audio")
        .args(arguments)
        .env("DISPLAY", &screen.display)
        .stdout(Stdio::null())
        .stderr(log.reopen().unwrap())
        .spawn()
        .expect("remote-viewer starts");
    let end = std::time::Instant::now() + PATIENCE;
    let shown = |setup: &Setup| {
        let status = setup.server.status();
        status.clients.first().is_some_and(|client| {
            client.displays.iter().any(|display| display.round_trip > std::time::Duration::ZERO)
        })
    };
    while !shown(setup) && std::time::Instant::now() < end {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let connected = shown(setup);
    let _ = viewer.kill();
    let _ = viewer.wait();
    assert!(connected, "{arguments:?}: {}", std::fs::read_to_string(log.path()).unwrap());
}

#[test]
fn remote_viewer_with_a_ca_file_a_host_subject_and_a_unix_socket() {
    if !have("remote-viewer") || !have("Xvfb") {
        return;
    }
    let Some(certificates) = Certificates::new(RSA) else { return };
    let folder = tempfile::tempdir().unwrap();
    let path: &Path = &folder.path().join("spice.sock");
    let setup = secure_setup(&certificates, |builder| builder.listen_unix(path, 0o600));
    let ca = format!("--spice-ca-file={}", certificates.path("ca.pem").display());
    let url = format!("spice://127.0.0.1?tls-port={}", setup.address().port());
    remote_viewer(&setup, &[&ca, &url]);
    let subject = format!("--spice-host-subject={SUBJECT}");
    remote_viewer(&setup, &[&ca, &subject, &url]);
    remote_viewer(&setup, &[&format!("spice+unix://{}", path.display())]);
}
