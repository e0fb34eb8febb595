//! What a VNC client sends, in pieces: the handshake, then messages. Only the password lets it in.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vnc_server::proto::{
    handshake::{Handshake, Step},
    message,
};

fuzz_target!(|bytes: &[u8]| {
    let Some(([flags, piece], stream)) = bytes.split_first_chunk::<2>() else { return };
    let password = (flags & 1 != 0).then(|| b"secret".to_vec());
    let mut handshake = Handshake::new(password.clone(), [7; 16]);
    let mut inside = flags & 2 != 0;
    let mut input = Vec::new();
    for piece in stream.chunks(usize::from(*piece).max(1)) {
        input.extend_from_slice(piece);
        while !inside {
            match handshake.advance(&mut input) {
                Ok(Step::Send(_)) => {}
                Ok(Step::Read) => break,
                Ok(Step::Done { .. }) => {
                    // Nobody guesses the answer to a challenge within a fuzzer's life.
                    assert!(password.is_none(), "a client got in without the password");
                    inside = true;
                }
                Ok(Step::Refuse(_)) | Err(_) => return,
            }
        }
        while inside {
            match message::take(&mut input) {
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(_) => return,
            }
        }
        // A client cannot make us keep more than the longest message and what one read brings.
        assert!(input.len() <= (1 << 20) + 8 + 256);
    }
});
