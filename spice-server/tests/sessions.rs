//! Links, passwords, second clients, and the guest agent.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod support;

use std::{
    io::{Read, Write},
    net::TcpStream,
    sync::Arc,
};

use spice_server::{ClientPolicy, Secret, SpiceServer};
use support::{Client, GuestPort, PATIENCE, eventually, guest_message, have_client, setup};

const CLIPBOARD: u32 = 4;
const ANNOUNCE_CAPABILITIES: u32 = 6;
const CLIPBOARD_GRAB: u32 = 7;
const CLIPBOARD_REQUEST: u32 = 8;
const CLIENT_DISCONNECTED: u32 = 13;
const AUDIO_VOLUME_SYNC: u32 = 15;

#[test]
fn a_wrong_password_is_told_as_such() {
    if !have_client() {
        return;
    }
    let secret = Secret::new("right").unwrap();
    let setup = setup(|builder| builder.password(Some(secret)));
    setup.show_background((64, 64));
    let wrong = Client::connect_with(setup.address(), Some("wrong"));
    wrong.event("authentication error", |e| (e["event"] == "error-auth").then_some(()));
    assert!(setup.server.status().clients.is_empty());
    Client::connect_with(setup.address(), Some("right")).wait_ready();
}

#[test]
fn a_new_client_takes_over() {
    if !have_client() {
        return;
    }
    let setup = setup(|builder| builder);
    setup.show_background((64, 64));
    let first = Client::connect_ready(&setup);
    let second = Client::connect_ready(&setup);
    first.named("stopped");
    eventually("one client", || setup.server.status().clients.len() == 1);
    drop(second);
    eventually("no client", || setup.server.status().clients.is_empty());
}

#[test]
fn a_new_client_is_refused() {
    if !have_client() {
        return;
    }
    let setup = setup(|builder| builder.client_policy(ClientPolicy::Refuse));
    setup.show_background((64, 64));
    let mut first = Client::connect_ready(&setup);
    let second = Client::connect(setup.address());
    second.event("an error", |e| {
        (e["event"].as_str().is_some_and(|event| event.starts_with("error"))).then_some(())
    });
    assert_ne!(first.pixels(), "none");
    drop(first);
    eventually("no client", || setup.server.status().clients.is_empty());
    Client::connect_ready(&setup);
}

#[test]
fn clients_share() {
    if !have_client() {
        return;
    }
    let setup = setup(|builder| builder.client_policy(ClientPolicy::Shared));
    let wanted = support::hash(&setup.show_background((300, 200)));
    let mut clients: Vec<_> = (0..3).map(|_| Client::connect_ready(&setup)).collect();
    for client in &mut clients {
        assert_eq!(client.pixels(), wanted);
    }
    let status = setup.server.status();
    assert_eq!(status.clients.len(), 3);
    for client in &status.clients {
        assert_eq!(client.channels.len(), 4, "{client:?}");
        assert!(client.bytes_sent > 0 && client.bytes_received > 0);
    }
}

#[test]
fn dropping_the_server_disconnects_everybody() {
    if !have_client() {
        return;
    }
    let setup = setup(|builder| builder);
    setup.show_background((64, 64));
    let client = Client::connect_ready(&setup);
    let address = setup.address();
    drop(setup);
    client.named("stopped");
    assert!(TcpStream::connect(address).is_err());
}

#[test]
fn an_address_in_use_is_named() {
    let first = SpiceServer::builder().listen(([127, 0, 0, 1], 0).into()).start().unwrap();
    let address = first.local_addr().unwrap();
    let error = SpiceServer::builder().listen(address).start().err().unwrap();
    assert!(error.to_string().contains(&address.to_string()));
    assert!(std::error::Error::source(&error).is_some());
}

/// What a server answers to raw bytes.
fn answer(server: &SpiceServer, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(server.local_addr().unwrap()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(bytes).unwrap();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    answer
}

fn hello(connection_id: u32, kind: u8, id: u8) -> Vec<u8> {
    let mut out = b"REDQ".to_vec();
    for word in [2u32, 2, 22, connection_id] {
        out.extend_from_slice(&word.to_le_bytes());
    }
    out.extend_from_slice(&[kind, id]);
    for word in [1u32, 0, 18, 0xd] {
        out.extend_from_slice(&word.to_le_bytes());
    }
    out
}

#[test]
fn link_errors_have_the_right_code() {
    let server = SpiceServer::builder().listen(([127, 0, 0, 1], 0).into()).start().unwrap();
    let code = |bytes: &[u8]| {
        let answer = answer(&server, bytes);
        assert_eq!(answer[..4], *b"REDQ", "{answer:?}");
        u32::from_le_bytes(answer[16..20].try_into().unwrap())
    };
    assert_eq!(code(b"HELO"), 2);
    let mut version = hello(0, 1, 0);
    version[4] = 1;
    assert_eq!(code(&version), 4);
    let mut oversize = hello(0, 1, 0);
    oversize[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
    assert_eq!(code(&oversize), 3);
    assert_eq!(code(&hello(0, 99, 0)), 9);
    assert_eq!(code(&hello(4711, 2, 0)), 8);
    assert_eq!(code(&hello(4711, 1, 0)), 8);
}

#[test]
fn strangers_cannot_keep_a_client_out() {
    if !have_client() {
        return;
    }
    let setup = setup(|builder| builder);
    setup.show_background((64, 64));
    let strangers: Vec<_> =
        (0..100).map(|_| TcpStream::connect(setup.address()).unwrap()).collect();
    Client::connect_ready(&setup);
    eventually("old strangers are dropped", || setup.server.status().pending_connections <= 48);
    drop(strangers);
}

#[test]
fn clipboard_crosses_both_ways_and_the_guest_hears_who_comes_and_goes() {
    if !have_client() {
        return;
    }
    let port = Arc::new(GuestPort::default());
    let setup = setup(|builder| builder.agent(port.clone()));
    setup.show_background((64, 64));
    let mut client = Client::connect_ready(&setup);
    let agent = setup.server.agent();
    // The server's own agent was there first; the guest's takes over and hears the client's caps.
    agent.guest_opened(true);
    client.event("agent gone", |e| (e["ev"] == "agent" && e["connected"] == false).then_some(()));
    client.event("agent here", |e| (e["ev"] == "agent" && e["connected"] == true).then_some(()));
    let received = |kind| port.messages().iter().rev().find(|m| m.0 == kind).cloned();
    eventually("the client's capabilities", || received(ANNOUNCE_CAPABILITIES).is_some());
    // By demand, selections.
    let caps: u32 = 1 << 5 | 1 << 6;
    let mut body = vec![0; 4];
    body.extend_from_slice(&caps.to_le_bytes());
    agent.guest_data(&guest_message(ANNOUNCE_CAPABILITIES, &body));

    // Guest to client.
    let selection = [0, 0, 0, 0];
    let utf8 = 1u32.to_le_bytes();
    agent.guest_data(&guest_message(CLIPBOARD_GRAB, &[selection, utf8].concat()));
    client.named("grab");
    client.tell("paste");
    eventually("the client's request", || received(CLIPBOARD_REQUEST).is_some());
    // In one chunk, as spice-vdagentd writes it, whatever the protocol says of chunks' sizes.
    let text = "Grüße aus dem Gast ".repeat(500);
    let message = guest_message(CLIPBOARD, &[&selection, &utf8, text.as_bytes()].concat());
    assert_eq!(agent.guest_data(&message), message.len());
    assert_eq!(client.named("clipboard")["text"], text);

    // Client to guest, and long enough for many chunks.
    let long = "abcdefghij".repeat(500);
    client.tell(&format!("copy {long}"));
    eventually("the client's grab", || received(CLIPBOARD_GRAB).is_some());
    agent.guest_data(&guest_message(CLIPBOARD_REQUEST, &[selection, utf8].concat()));
    client.named("request");
    eventually("the text", || {
        received(CLIPBOARD).is_some_and(|(_, body)| body[8..] == *long.as_bytes())
    });

    drop(client);
    eventually("the client's end", || received(CLIENT_DISCONNECTED).is_some());
    // A later client finds the guest's agent at once.
    port.received.lock().unwrap().clear();
    let client = Client::connect_ready(&setup);
    eventually("the next client's capabilities", || received(ANNOUNCE_CAPABILITIES).is_some());
    agent.guest_opened(false);
    client.event("agent gone", |e| (e["ev"] == "agent" && e["connected"] == false).then_some(()));
    client.event("ours again", |e| (e["ev"] == "agent" && e["connected"] == true).then_some(()));
}

#[test]
fn the_guests_agent_hears_how_loud_its_client_plays() {
    if !have_client() {
        return;
    }
    let port = Arc::new(GuestPort::default());
    let setup = setup(|builder| builder.agent(port.clone()));
    setup.show_background((64, 64));
    // No sound card is needed to have a volume.
    let pipeline = "appsrc name=appsrc ! volume name=audiosink volume=0.125 ! fakesink";
    let mut client =
        Client::with_environment(setup.address(), &[("SPICE_GST_AUDIOSINK", pipeline)]);
    client.wait_ready();
    let agent = setup.server.agent();
    agent.guest_opened(true);
    let received = |kind| port.messages().into_iter().filter(move |m| m.0 == kind);
    eventually("the client's capabilities", || received(ANNOUNCE_CAPABILITIES).count() > 0);
    assert_eq!(received(AUDIO_VOLUME_SYNC).count(), 0, "to an agent that has said nothing");
    // By demand, selections, volume.
    let caps: u32 = 1 << 5 | 1 << 6 | 1 << 11;
    let body = [0, caps].map(u32::to_le_bytes).concat();
    agent.guest_data(&guest_message(ANNOUNCE_CAPABILITIES, &body));
    // Playback, not muted, two channels; half of 65535, as loudness goes (the cube root of 0.125).
    let half = 32767u16.to_le_bytes();
    let wanted = [&[1, 0, 2][..], &half, &half].concat();
    eventually("the volume", || {
        // spice-gtk writes it when it has something else to say.
        client.tell("copy something");
        received(AUDIO_VOLUME_SYNC).any(|(_, body)| body == wanted)
    });
}
