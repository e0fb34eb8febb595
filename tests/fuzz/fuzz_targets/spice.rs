//! Everything a SPICE client or the guest's agent can send.

#![no_main]

use libfuzzer_sys::fuzz_target;
use spice_server::fuzz;

fuzz_target!(|bytes: &[u8]| {
    let Some((which, bytes)) = bytes.split_first() else { return };
    match which % 10 {
        0 => fuzz::fuzz_link(bytes),
        1 => fuzz::fuzz_main_channel(bytes),
        2 => fuzz::fuzz_inputs_channel(bytes),
        3 => fuzz::fuzz_display_channel(bytes),
        4 => fuzz::fuzz_cursor_channel(bytes),
        5 => fuzz::fuzz_agent(bytes),
        6 => fuzz::fuzz_playback_channel(bytes),
        8 => fuzz::fuzz_web(bytes),
        7 => fuzz::fuzz_record_channel(bytes),
        _ => fuzz::fuzz_image(bytes),
    }
});
