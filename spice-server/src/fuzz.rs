//! Entry points for fuzzers: everything a peer can send goes through one of these.
//!
//! Each takes arbitrary bytes, must return, must not panic, and must not hold more memory than a
//! small multiple of what it was given.

use crate::{
    AgentPolicy, Clipboard,
    agent::bridge::Bridge,
    audio::{codec::Decoder, resample::Resampler},
    proto::{
        channel::Caps,
        cursor, display,
        framing::{Deframer, Framer, HeaderKind},
        http,
        image::{Coding, Keep, put_image},
        inputs::{self, ScancodeDecoder},
        link::{LinkCode, LinkEvent, PUBLIC_KEY_SIZE, ServerLink},
        main, playback, record,
        sound::Mode,
    },
};

/// Splits the input into parts whose sizes it tells itself, to exercise every cut.
fn parts(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    let (first, mut rest) = bytes.split_first().unwrap_or((&0, &[]));
    let size = usize::from(*first) + 1;
    std::iter::from_fn(move || {
        let (part, tail) = rest.split_at(rest.len().min(size));
        rest = tail;
        (!part.is_empty()).then_some(part)
    })
}

/// A connection from its first byte: link, then messages of the channel it asks for.
pub fn fuzz_link(bytes: &[u8]) {
    let mut link = ServerLink::new();
    let mut out = Vec::new();
    for part in parts(bytes) {
        link.receive(part);
        if link.overflowed() {
            return;
        }
        while let Some(event) = link.poll() {
            match event {
                LinkEvent::Request(request) => {
                    let caps: &Caps = &request.channel_caps;
                    std::hint::black_box((caps.has(0), caps.has(u32::MAX), request.header_kind()));
                    match request.known_type() {
                        Some(_) => link.accept(&[0; PUBLIC_KEY_SIZE], 0, &mut out),
                        None => return link.reject(LinkCode::ChannelNotAvailable, &mut out),
                    }
                }
                LinkEvent::Ticket(_) => link.finish(LinkCode::Ok, &mut out),
                LinkEvent::Failure(code) => return link.fail(code, &mut out),
            }
        }
    }
}

fn each_message(
    bytes: &[u8],
    limit: impl Fn(u16) -> u32 + Copy,
    mut message: impl FnMut(u16, &[u8]) -> bool,
) {
    for kind in [HeaderKind::Mini, HeaderKind::Data] {
        let mut deframer = Deframer::new(kind);
        'parts: for part in parts(bytes) {
            deframer.receive(part);
            loop {
                match deframer.next_message(limit) {
                    Ok(Some((kind, body))) => {
                        if !message(kind, body) {
                            break 'parts;
                        }
                    }
                    Ok(None) => break,
                    Err(_) => break 'parts,
                }
            }
        }
    }
}

/// Messages of a main channel, agent data included.
pub fn fuzz_main_channel(bytes: &[u8]) {
    let mut bridge = Bridge::default();
    bridge.attach(1);
    each_message(bytes, main::limit, |kind, body| match main::decode(kind, body) {
        Ok(main::ClientMessage::AgentData(data)) => bridge.client_data(1, data).is_ok(),
        Ok(main::ClientMessage::AgentStart { tokens }) => {
            bridge.start(1, tokens);
            true
        }
        Ok(main::ClientMessage::AgentToken { tokens }) => {
            bridge.client_tokens(1, tokens);
            while bridge.next_for_client(1).is_some() {}
            true
        }
        Ok(_) => true,
        Err(_) => false,
    });
}

/// Messages of an inputs channel, scan codes included.
pub fn fuzz_inputs_channel(bytes: &[u8]) {
    let mut decoder = ScancodeDecoder::default();
    each_message(bytes, inputs::limit, |kind, body| match inputs::decode(kind, body) {
        Ok(inputs::ClientMessage::Scancodes(codes)) => {
            for byte in codes.as_slice() {
                std::hint::black_box(decoder.byte(*byte));
            }
            true
        }
        result => result.is_ok(),
    });
}

/// Messages of a display channel.
pub fn fuzz_display_channel(bytes: &[u8]) {
    each_message(bytes, display::limit, |kind, body| display::decode(kind, body).is_ok());
}

/// Messages of a cursor channel.
pub fn fuzz_cursor_channel(bytes: &[u8]) {
    each_message(bytes, cursor::limit, |kind, body| cursor::decode(kind, body).is_ok());
}

/// Messages of a playback channel.
pub fn fuzz_playback_channel(bytes: &[u8]) {
    each_message(bytes, playback::limit, |kind, body| playback::decode(kind, body).is_ok());
}

/// Messages of a record channel, with what is recorded.
pub fn fuzz_record_channel(bytes: &[u8]) {
    let mut mode = Mode::Raw;
    let Some(mut decoder) = Decoder::new() else { return };
    let mut resampler = Resampler::new(48_000, 44_100);
    each_message(bytes, record::limit, |kind, body| match record::decode(kind, body) {
        Ok(record::ClientMessage::Mode(new)) => {
            mode = new;
            true
        }
        Ok(record::ClientMessage::Data(data)) if mode == Mode::Opus => match decoder.decode(data) {
            Some(frames) => {
                resampler.push(frames);
                resampler.pull(&mut [[0; 2]; 480]);
                resampler.skip(usize::MAX);
                true
            }
            None => false,
        },
        result => result.is_ok(),
    });
}

/// Guest agent and client at once: the first bit of every part tells whose it is, the next whether
/// the guest's port opens or closes or a client comes or goes first. The first byte of all is the policy.
pub fn fuzz_agent(bytes: &[u8]) {
    let policy = bytes.first().map_or_else(AgentPolicy::default, |byte| AgentPolicy {
        clipboard: match byte & 3 {
            0 => Clipboard::Both,
            1 => Clipboard::ToGuest,
            2 => Clipboard::ToClient,
            _ => Clipboard::Off,
        },
        max_clipboard: if byte & 4 == 0 { u32::MAX } else { 100 },
        file_transfer: byte & 8 == 0,
    });
    let mut bridge = Bridge::new(policy);
    let mut session = 0;
    for part in parts(bytes) {
        let (first, data) = part.split_first().unwrap_or((&0, &[]));
        match first >> 1 & 7 {
            0 => bridge.guest_opened(true),
            1 => bridge.guest_opened(false),
            2 => {
                bridge.detach(session);
                session += 1;
                bridge.attach(session);
                bridge.start(session, u32::from(*first));
            }
            3 => bridge.client_tokens(session, 5),
            _ => {}
        }
        if first & 1 == 0 {
            bridge.guest_data(data);
        } else if bridge.client_data(session, data.get(..2048).unwrap_or(data)).is_err() {
            bridge.detach(session);
        }
        if first & 0x10 != 0 {
            while bridge.next_for_client(session).is_some() {}
            bridge.take_returned(session);
            bridge.take_wanted();
        }
        if first & 0x20 != 0
            && let Some(mut item) = bridge.next_for_guest()
        {
            item.written = (item.written + usize::from(*first)).min(item.bytes.len());
            bridge.wrote(item);
        }
    }
}

/// A browser: a request, and frames after it where it asks for a WebSocket.
pub fn fuzz_web(bytes: &[u8]) {
    let mut head = Vec::new();
    let mut parts = parts(bytes);
    while let Some(part) = parts.next() {
        head.extend_from_slice(part);
        match http::parse(&head) {
            Ok(None) => {}
            Ok(Some(request)) => {
                assert!(request.length <= head.len() && request.length <= http::MAX_HEAD);
                let elsewhere = http::redirect(&request.path);
                assert_eq!(elsewhere.matches("\r\n\r\n").count(), 1, "a second answer");
                std::hint::black_box(request.is_welcome(&[]));
                if request.upgrade.is_some() {
                    let rest = head.split_off(request.length);
                    crate::io::stream::fuzz_frames(rest, &mut parts);
                }
                return;
            }
            Err(status) => {
                std::hint::black_box(http::failure(status, ""));
                return;
            }
        }
    }
}

/// Pixels through every image coding: what comes out must be no longer than raw.
pub fn fuzz_image(bytes: &[u8]) {
    let Some((width, pixels)) = bytes.split_first() else { return };
    let width = u32::from(*width) % 64 + 1;
    let height = (pixels.len() / 4 / width as usize).min(64) as u32;
    let Some(pixels) = pixels.get(..(width * height * 4) as usize).filter(|p| !p.is_empty()) else {
        return;
    };
    for coding in [Coding::Raw, Coding::Lz4, Coding::Jpeg(80)] {
        let mut out = Vec::new();
        Framer::new(HeaderKind::Mini).message(&mut out, 304, |out| {
            put_image(out, (width, height), pixels, coding, Keep::No);
        });
        assert!(out.len() <= pixels.len() + 64, "an image grew");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every entry point with plausible and random bytes: a smoke test of the fuzzers themselves.
    #[test]
    fn entry_points_survive_noise() {
        let mut state = 0x1234_5678_9abc_def1_u64;
        let mut random = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let hello = b"\x10REDQ\x02\0\0\0\x02\0\0\0\x16\0\0\0\0\0\0\0\x01\0\x01\0\0\0\0\0\0\0\x12\0\0\0\x0d\0\0\0";
        let ask =
            b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
            Sec-WebSocket-Key: x\r\n\r\n\x82\x85\x01\x02\x03\x04";
        for round in 0..2000 {
            let mut bytes: Vec<u8> = match round % 3 {
                0 => hello.to_vec(),
                // Agent messages in chunks, or messages with small types and sizes.
                1 => vec![random() as u8, 1, 0, 0, 0, 20, 0, 0, 0, 1, 0, 0, 0, 6, 0, 0, 0],
                _ => vec![random() as u8, 101 + (random() % 14) as u8, 0, 4, 0, 0, 0],
            };
            let length = random() % 300;
            bytes.extend((0..length).map(|_| (random() >> 33) as u8 & (random() >> 33) as u8));
            fuzz_link(&bytes);
            fuzz_main_channel(&bytes);
            fuzz_inputs_channel(&bytes);
            fuzz_display_channel(&bytes);
            fuzz_cursor_channel(&bytes);
            fuzz_playback_channel(&bytes);
            fuzz_record_channel(&bytes);
            fuzz_agent(&bytes);
            fuzz_image(&bytes);
            bytes.splice(1..1, ask.iter().copied());
            fuzz_web(&bytes);
        }
    }
}
