//! The GPU socket in both directions: whatever is understood must survive being written and read
//! again. Also what is computed from a peer's numbers: frame layouts, damage, EDIDs.

#![no_main]

use drago_fuzz::Input;
use gpu_protocol::{
    Damage, Rect,
    edid::{self, Monitor},
    frames::ShmScanout,
    socket::{Decoder, FromBackEnd, FromFrontEnd, RawMessage, Side},
};
use libfuzzer_sys::fuzz_target;

fn again<T>(side: Side, bytes: &[u8], decode: impl Fn(&RawMessage<'_>) -> T) -> T {
    let mut decoder = Decoder::new(side);
    decoder.push(bytes);
    let raw = decoder.next_message().expect("our own message").expect("a whole message");
    decode(&raw)
}

fn stream(side: Side, mut input: Input<'_>) {
    let mut decoder = Decoder::new(side);
    while !input.is_empty() {
        let part = usize::from(input.u8()) + 1;
        decoder.push(input.take(part));
        loop {
            let raw = match decoder.next_message() {
                Ok(Some(raw)) => raw,
                Ok(None) => break,
                Err(_) => return,
            };
            let mut bytes = Vec::new();
            match side {
                Side::FrontEnd => {
                    let Ok(message) = FromBackEnd::decode(&raw) else { return };
                    message.encode(&mut bytes);
                    again(side, &bytes, |raw| {
                        assert_eq!(FromBackEnd::decode(raw), Ok(message.clone()));
                    });
                }
                Side::BackEnd => {
                    let Ok(message) = FromFrontEnd::decode(&raw) else { return };
                    message.encode(&mut bytes);
                    assert_eq!(again(side, &bytes, FromFrontEnd::decode), Ok(message.clone()));
                    if let FromFrontEnd::ShmScanout(layout) = message {
                        check_layout(&layout);
                    }
                }
            }
        }
    }
}

/// A layout that is accepted has a place for every pixel.
fn check_layout(layout: &ShmScanout) {
    let Some(size) = layout.checked_size() else { return };
    let last_row = u64::from(layout.stride) * u64::from(layout.height - 1);
    let slot_end = last_row + u64::from(layout.width) * 4;
    let end = u64::from(layout.slots - 1) * layout.slot_size + slot_end;
    assert!(slot_end <= layout.slot_size && end <= size, "{layout:?}");
}

fn geometry(mut input: Input<'_>) {
    let rect = |input: &mut Input<'_>| {
        Rect::new(input.number(), input.number(), input.number(), input.number())
    };
    let (width, height) = (input.number(), input.number());
    let mut damage = Damage::new();
    while !input.is_empty() {
        let next = rect(&mut input);
        damage.add(next);
        assert!(damage.rects().len() <= Damage::MAX_RECTS);
        let surface = Rect::of_size(width, height);
        let mut seen = damage.clone();
        seen.clip(width, height);
        assert!(seen.rects().iter().all(|rect| rect.fits(width, height)));
        // Nothing of what was just added may be lost.
        let visible = next.intersection(&surface);
        let all = seen.rects().iter().fold(Rect::default(), |all, next| all.union(next));
        assert!(visible.is_empty() || all.contains(&visible), "{damage:?} lost {visible:?}");
    }
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input::new(bytes);
    match input.u8() % 5 {
        0 => stream(Side::FrontEnd, input),
        1 => stream(Side::BackEnd, input),
        2 => geometry(input),
        3 => {
            let (scanout, generation) = (input.number(), input.number());
            let (width, height, slots) = (input.number(), input.number(), input.number());
            if let Some(layout) = ShmScanout::layout(scanout, generation, width, height, slots) {
                assert!(layout.checked_size().is_some(), "{layout:?}");
                check_layout(&layout);
            }
        }
        _ => {
            let monitor = Monitor {
                width: input.number(),
                height: input.number(),
                width_mm: input.number(),
                height_mm: input.number(),
                refresh: input.number(),
                index: input.number(),
            };
            let edid = edid::generate(&monitor);
            assert!(edid.len() == 128 || edid.len() == 256);
            for block in edid.chunks(128) {
                assert_eq!(block.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)), 0);
            }
        }
    }
});
