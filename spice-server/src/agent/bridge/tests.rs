use super::*;
use crate::proto::{agent::HEADER_SIZE, wire::Put};

use crate::proto::agent::CLIPBOARD;

fn message(kind: u32, body: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    Header { kind, opaque: 0, size: body.len() as u32 }.put(&mut out);
    out.extend_from_slice(body);
    out
}

fn chunked(data: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    put_chunks(&mut out, PORT_CLIENT, data);
    out
}

/// A bridge with one started client and, if asked for, an open guest.
fn bridge(guest: bool) -> Bridge {
    let mut bridge = Bridge::default();
    bridge.attach(1);
    bridge.start(1, u32::MAX);
    if guest {
        bridge.guest_opened(true);
        assert_eq!(bridge.next_for_client(1), Some(ToClient::Disconnected));
        assert_eq!(bridge.next_for_client(1), Some(ToClient::Connected { tokens: CLIENT_TOKENS }));
        bridge.start(1, u32::MAX);
    }
    bridge
}

fn drain_client(bridge: &mut Bridge, session: u32) -> Vec<u8> {
    let mut all = Vec::new();
    while let Some(item) = bridge.next_for_client(session) {
        let ToClient::Data(data) = item else { panic!("unexpected {item:?}") };
        assert!(data.len() <= MAX_CHUNK);
        all.extend(data);
    }
    all
}

/// Everything queued for the guest, by port.
fn drain_guest(bridge: &mut Bridge) -> Vec<(u32, Vec<u8>)> {
    let mut all = Vec::new();
    while let Some(mut item) = bridge.next_for_guest() {
        let mut cutter = ChunkCutter::default();
        let mut input = &item.bytes[item.written..];
        while let Some((port, data)) = cutter.next(&mut input).unwrap() {
            all.push((port, data.to_vec()));
        }
        item.written = item.bytes.len();
        assert!(bridge.wrote(item));
    }
    all
}

fn monitors_body(width: u32, height: u32) -> Vec<u8> {
    let mut body = Vec::new();
    for word in [1, 0, height, width, 32, 0, 0] {
        body.put_u32(word);
    }
    body
}

#[test]
fn the_server_answers_while_the_guest_has_no_agent() {
    let mut bridge = bridge(false);
    let announce = message(ANNOUNCE_CAPABILITIES, &[1, 0, 0, 0, 0xff, 0, 0, 0]);
    assert_eq!(bridge.client_data(1, &announce), Ok(None));
    assert_eq!(drain_client(&mut bridge, 1), server_capabilities());
    assert_eq!(bridge.take_returned(1), Some(1));
    let wish = message(MONITORS_CONFIG, &monitors_body(800, 600));
    assert_eq!(bridge.client_data(1, &wish[..30]), Ok(None));
    let monitors = bridge.client_data(1, &wish[30..]).unwrap().unwrap();
    assert_eq!(monitors[0].map(|m| (m.width, m.height)), Some((800, 600)));
    assert_eq!(drain_client(&mut bridge, 1), success_reply(MONITORS_CONFIG));
    assert_eq!(bridge.take_returned(1), Some(2));
    // Everything else goes nowhere.
    bridge.client_data(1, &message(CLIPBOARD, &[1; 100])).unwrap();
    assert!(drain_guest(&mut bridge).is_empty());
    assert_eq!(bridge.take_returned(1), Some(1));
}

#[test]
fn monitors_are_intercepted_from_a_guest_agent_too_and_the_rest_passes() {
    let mut bridge = bridge(true);
    let mut stream = message(CLIPBOARD, b"hello");
    stream.extend(message(MONITORS_CONFIG, &monitors_body(640, 480)));
    stream.extend(message(ANNOUNCE_CAPABILITIES, &[0; 8]));
    assert!(bridge.client_data(1, &stream).unwrap().is_some());
    let mut wanted = message(CLIPBOARD, b"hello");
    wanted.extend(message(ANNOUNCE_CAPABILITIES, &[0; 8]));
    assert_eq!(drain_guest(&mut bridge), [(PORT_CLIENT, wanted)]);
    assert_eq!(bridge.take_returned(1), Some(1));
}

#[test]
fn long_messages_flow_both_ways() {
    let mut bridge = bridge(true);
    let long = message(CLIPBOARD, &(0..50_000u32).map(|i| i as u8).collect::<Vec<_>>());
    let mut got = Vec::new();
    for part in long.chunks(MAX_CHUNK) {
        bridge.client_data(1, part).unwrap();
        drain_guest(&mut bridge).into_iter().for_each(|(_, data)| got.extend(data));
        assert_eq!(bridge.take_returned(1), Some(1));
    }
    assert_eq!(got, long);
    let wire = chunked(&long);
    let mut got = Vec::new();
    for part in wire.chunks(777) {
        assert_eq!(bridge.guest_data(part), part.len());
        got.extend(drain_client(&mut bridge, 1));
    }
    assert_eq!(got, long);
}

/// `VD_AGENT_AUDIO_VOLUME_SYNC`, and its capability.
const VOLUME_SYNC: u32 = 15;
const CAP_VOLUME_SYNC: u32 = 1 << 11;

#[test]
fn volumes_pass_between_the_owner_and_the_guest_and_from_nobody_else() {
    let mut bridge = bridge(true);
    // Is for playback, muted, two channels.
    let volume = [1, 0, 2, 0xff, 0x7f, 0xff, 0x7f];
    // Both hear that the other can do it.
    let announce = message(ANNOUNCE_CAPABILITIES, &[0, 0, 0, 0, 0, 8, 0, 0]);
    bridge.guest_data(&chunked(&announce));
    assert_ne!(announced(&drain_client(&mut bridge, 1)) & CAP_VOLUME_SYNC, 0);
    bridge.client_data(1, &announce).unwrap();
    assert_ne!(announced(&drain_guest(&mut bridge)[0].1) & CAP_VOLUME_SYNC, 0);
    let sync = message(VOLUME_SYNC, &volume);
    bridge.client_data(1, &sync).unwrap();
    assert_eq!(drain_guest(&mut bridge), [(PORT_CLIENT, sync.clone())]);
    bridge.guest_data(&chunked(&sync));
    assert_eq!(drain_client(&mut bridge, 1), sync);
    // Who only watches sets no volume.
    bridge.attach(2);
    bridge.start(2, u32::MAX);
    bridge.client_data(2, &sync).unwrap();
    assert_eq!(drain_guest(&mut bridge), []);
    assert_eq!(drain_client(&mut bridge, 2), []);
}

#[test]
fn a_guest_agents_capabilities_gain_the_servers() {
    let mut bridge = bridge(true);
    let announce = message(ANNOUNCE_CAPABILITIES, &[1, 0, 0, 0, 0, 0, 1, 0]);
    for byte in chunked(&announce) {
        bridge.guest_data(&[byte]);
    }
    let got = drain_client(&mut bridge, 1);
    assert_eq!(got.len(), announce.len());
    let own = server_capabilities();
    assert_eq!(got[HEADER_SIZE + 4], own[HEADER_SIZE + 4]);
    assert_eq!(got[HEADER_SIZE + 6], 1);
}

#[test]
fn a_client_that_does_not_read_holds_the_guest_up_but_costs_a_bounded_amount() {
    let mut bridge = bridge(true);
    let wire = chunked(&message(CLIPBOARD, &vec![0; 1 << 20]));
    let mut offered = &wire[..];
    loop {
        let taken = bridge.guest_data(offered);
        offered = &offered[taken..];
        if taken == 0 {
            break;
        }
    }
    assert!(wire.len() - offered.len() < 2 * MAX_OUTBOX);
    assert!(!bridge.take_wanted());
    drain_client(&mut bridge, 1);
    assert!(bridge.take_wanted());
    assert!(!bridge.take_wanted());
    assert!(bridge.guest_data(offered) > 0);
}

#[test]
fn a_guest_that_does_not_read_is_no_way_to_fill_memory() {
    let mut bridge = bridge(true);
    let mut sent = 0;
    let header = message(CLIPBOARD, &[]);
    while bridge.client_data(1, &header).is_ok() {
        sent += 1;
        assert!(sent <= CLIENT_TOKENS + TOKEN_SLACK);
    }
    assert_eq!(bridge.take_returned(1), None);
}

#[test]
fn tokens_of_the_client_are_kept() {
    let mut bridge = bridge(true);
    bridge.start(1, 2);
    bridge.guest_data(&chunked(&message(CLIPBOARD, &[0; MAX_CHUNK * 4])));
    assert!(bridge.next_for_client(1).is_some());
    assert!(bridge.next_for_client(1).is_some());
    assert_eq!(bridge.next_for_client(1), None);
    bridge.client_tokens(1, 1);
    assert!(bridge.next_for_client(1).is_some());
    assert_eq!(bridge.next_for_client(1), None);
}

#[test]
fn a_leaving_client_is_announced_after_the_chunk_that_has_begun() {
    let mut bridge = bridge(true);
    bridge.client_data(1, &message(CLIPBOARD, &[1; 100])).unwrap();
    bridge.client_data(1, &message(CLIPBOARD, &[2; 100])).unwrap();
    let mut first = bridge.next_for_guest().unwrap();
    first.written = 5;
    assert!(!bridge.wrote(first));
    bridge.detach(1);
    let first = bridge.next_for_guest().unwrap();
    assert_eq!(first.written, 5);
    assert!(bridge.wrote(ToGuest { written: first.bytes.len(), ..first }));
    assert_eq!(drain_guest(&mut bridge), [(PORT_SERVER, client_disconnected())]);
}

#[test]
fn the_next_client_does_not_get_the_rest_of_the_last_ones_message() {
    let mut bridge = bridge(true);
    let wire = chunked(&message(CLIPBOARD, &[9; 3000]));
    bridge.guest_data(&wire[..1000]);
    bridge.detach(1);
    drain_guest(&mut bridge);
    bridge.attach(2);
    bridge.start(2, u32::MAX);
    bridge.guest_data(&wire[1000..]);
    assert!(drain_client(&mut bridge, 2).is_empty());
    let fresh = message(CLIPBOARD, b"new");
    bridge.guest_data(&chunked(&fresh));
    assert_eq!(drain_client(&mut bridge, 2), fresh);
}

#[test]
fn a_client_cut_off_by_a_new_agent_starts_afresh() {
    let mut bridge = bridge(true);
    let long = message(CLIPBOARD, &[1; 4000]);
    bridge.client_data(1, &long[..2000]).unwrap();
    bridge.guest_opened(true);
    // The second half was on its way; it must not reach the new agent.
    bridge.client_data(1, &long[2000..]).unwrap();
    assert_eq!(bridge.next_for_client(1), Some(ToClient::Disconnected));
    assert_eq!(bridge.next_for_client(1), Some(ToClient::Connected { tokens: CLIENT_TOKENS }));
    bridge.start(1, u32::MAX);
    let announce = message(ANNOUNCE_CAPABILITIES, &[1, 0, 0, 0, 1, 0, 0, 0]);
    bridge.client_data(1, &announce).unwrap();
    assert_eq!(drain_guest(&mut bridge), [(PORT_CLIENT, announce)]);
    assert_eq!(bridge.take_returned(1), Some(1));
}

#[test]
fn bytes_for_an_old_opening_are_void() {
    let mut bridge = bridge(true);
    bridge.client_data(1, &message(CLIPBOARD, &[1; 10])).unwrap();
    let mut item = bridge.next_for_guest().unwrap();
    item.written = 3;
    bridge.guest_opened(false);
    bridge.guest_opened(true);
    assert!(bridge.wrote(item));
    assert!(bridge.next_for_guest().is_none());
}

#[test]
fn the_second_client_inherits_the_agent() {
    let mut bridge = bridge(true);
    bridge.attach(2);
    bridge.start(2, u32::MAX);
    bridge.client_data(2, &message(CLIPBOARD, b"no")).unwrap();
    assert!(drain_guest(&mut bridge).is_empty());
    bridge.detach(1);
    drain_guest(&mut bridge);
    assert_eq!(bridge.next_for_client(2), Some(ToClient::Disconnected));
    assert_eq!(bridge.next_for_client(2), Some(ToClient::Connected { tokens: CLIENT_TOKENS }));
    bridge.start(2, u32::MAX);
    bridge.client_data(2, &message(CLIPBOARD, b"yes")).unwrap();
    assert_eq!(drain_guest(&mut bridge), [(PORT_CLIENT, message(CLIPBOARD, b"yes"))]);
}

#[test]
fn nonsense_from_the_guest_closes_its_agent_only() {
    let mut bridge = bridge(true);
    assert_eq!(bridge.guest_data(&[0xff; 64]), 64);
    assert!(!bridge.guest_is_open());
    assert_eq!(bridge.next_for_client(1), Some(ToClient::Disconnected));
    bridge.guest_opened(true);
    assert!(bridge.guest_is_open());
}

/// A bridge whose client and guest both name selections and take detailed errors.
fn with_policy(policy: AgentPolicy) -> Bridge {
    let mut bridge = Bridge::new(policy);
    bridge.attach(1);
    bridge.guest_opened(true);
    while bridge.next_for_client(1).is_some() {}
    bridge.start(1, u32::MAX);
    let announce = message(ANNOUNCE_CAPABILITIES, &[0, 0, 0, 0, 0x78, 0x40, 0, 0]);
    bridge.client_data(1, &announce).unwrap();
    bridge.guest_data(&chunked(&announce));
    bridge
}

/// The first word of capabilities in an announcement.
fn announced(message: &[u8]) -> u32 {
    capabilities(&message[HEADER_SIZE..])
}

#[test]
fn a_clipboard_that_is_off_is_not_announced_and_does_not_pass() {
    let policy = AgentPolicy { clipboard: super::super::Clipboard::Off, ..AgentPolicy::default() };
    let mut bridge = with_policy(policy);
    let to_guest = drain_guest(&mut bridge);
    assert_eq!(announced(&to_guest[0].1) & 0x78, 0x10, "only DISPLAY_CONFIG is left");
    assert_eq!(announced(&drain_client(&mut bridge, 1)) & 0x78, 0x10);
    bridge.client_data(1, &message(CLIPBOARD, &[1; 100])).unwrap();
    bridge.guest_data(&chunked(&message(CLIPBOARD, &[1; 100])));
    assert!(drain_guest(&mut bridge).is_empty());
    assert!(drain_client(&mut bridge, 1).is_empty());
    assert_eq!(bridge.take_returned(1), Some(2), "tokens come back for what was dropped");
}

#[test]
fn too_long_a_clipboard_becomes_an_empty_one() {
    let mut bridge = with_policy(AgentPolicy { max_clipboard: 1000, ..AgentPolicy::default() });
    drain_guest(&mut bridge);
    drain_client(&mut bridge, 1);
    let mut body = vec![2, 0, 0, 0, 1, 0, 0, 0];
    body.resize(1001, b'x');
    let empty = message(CLIPBOARD, &[2, 0, 0, 0, 0, 0, 0, 0]);
    for part in message(CLIPBOARD, &body).chunks(300) {
        bridge.client_data(1, part).unwrap();
    }
    assert_eq!(drain_guest(&mut bridge), [(PORT_CLIENT, empty.clone())]);
    bridge.guest_data(&chunked(&message(CLIPBOARD, &body)));
    assert_eq!(drain_client(&mut bridge, 1), empty);
    body.pop();
    bridge.guest_data(&chunked(&message(CLIPBOARD, &body)));
    assert_eq!(drain_client(&mut bridge, 1), message(CLIPBOARD, &body));
}

#[test]
fn a_file_that_may_not_be_sent_is_refused() {
    const FILE_XFER_START: u32 = 10;
    const FILE_XFER_STATUS: u32 = 11;
    let mut bridge = with_policy(AgentPolicy { file_transfer: false, ..AgentPolicy::default() });
    drain_guest(&mut bridge);
    assert_ne!(announced(&drain_client(&mut bridge, 1)) & 1 << 13, 0, "FILE_XFER_DISABLED");
    bridge.client_data(1, &message(FILE_XFER_START, &[5, 0, 0, 0, b'x', 0])).unwrap();
    let refused = message(FILE_XFER_STATUS, &[5, 0, 0, 0, 7, 0, 0, 0]);
    assert_eq!(drain_client(&mut bridge, 1), refused);
    assert!(drain_guest(&mut bridge).is_empty());
}
