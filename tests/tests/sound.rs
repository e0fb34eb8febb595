//! The nested suite with the sound guest: a tone that its `aplay` plays arrives in a SPICE client, and
//! one that a client says in its `arecord`.
//!
//! Run by `cargo xtask test --suite nested`; needs the test host, so it is `#[ignore]`d by default.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use drago_tests::guest::Guest;
use drago_tests::paths;
use drago_tests::tone::{RATE, TONE, clean, tone};
use drago_tests::vm::{Host, PATIENCE};

const PROMPT: &str = "minimal# ";

/// The client of spice-server's own tests; see there.
struct Ear(Child);

impl Ear {
    fn connect(port: u16, played: &Path) -> Self {
        let script = paths::workspace().join("spice-server/tests/sound_client.py");
        let child = Command::new("/usr/bin/python3")
            .arg(script)
            .args(["127.0.0.1", &port.to_string()])
            .arg(played)
            .arg(TONE.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Self(child)
    }
}

impl Drop for Ear {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn left(bytes: &[u8]) -> Vec<f64> {
    bytes.chunks_exact(4).map(|frame| i16::from_le_bytes([frame[0], frame[1]]).into()).collect()
}

#[test]
#[ignore = "nested"]
fn a_tone_goes_from_the_guest_to_a_client_and_back() {
    let guest = Guest::sound().unwrap();
    let agent = Path::new(env!("CARGO_BIN_EXE_drago-testbed-agent"));
    let host = Host::boot("sound", agent, 2048).unwrap();
    // A disk carries the samples: in, and out again.
    let samples: Vec<u8> =
        tone(0, RATE * 5).into_iter().flatten().flat_map(i16::to_le_bytes).collect();
    let file = host.results.join("tone");
    std::fs::write(&file, &samples).unwrap();
    let made = host.run(&format!(
        "cp '{}' /tmp/tone && truncate -s 2M /tmp/tone && truncate -s 2M /tmp/heard",
        file.display()
    ));
    assert_eq!(made.unwrap().code, 0);
    let options = [
        "--spice",
        "127.0.0.1:5900",
        "--disk",
        "path=/tmp/tone,ro=on",
        "--disk",
        "path=/tmp/heard",
    ];
    let mut vm = host.start("sound", &guest, &options).unwrap();
    vm.serial
        .wait_for(0, PROMPT, PATIENCE)
        .unwrap_or_else(|error| panic!("{error}\n{}", vm.state()));
    // ALSA gives up when a tenth more than the buffer passes without progress: 160 ms of it are little
    // on an emulated processor.
    vm.serial_command(
        "for m in $(cat /sound/order); do \
         case $m in virtio_snd*) set pcm_buffer_ms=800;; *) set --;; esac; \
         insmod /sound/$m $*; done",
    )
    .unwrap();
    let cards = vm.serial_command("/sound/aplay -l; /sound/arecord -l").unwrap();
    assert_eq!(cards.matches("card 0").count(), 2, "{cards}\n{}", vm.state());

    let played = host.results.join("played");
    let _ = std::fs::remove_file(&played);
    let ear = Ear::connect(host.spice_port().unwrap(), &played);
    let end = Instant::now() + PATIENCE;
    while !played.exists() {
        assert!(Instant::now() < end);
        std::thread::sleep(Duration::from_millis(50));
    }
    let format = "-D hw:0,0 -t raw -f S16_LE -c 2 -r 48000";
    let said = vm
        .serial_command(&format!("head -c {} /dev/vda | /sound/aplay {format} 2>&1", samples.len()))
        .unwrap();
    println!("aplay: {said}");
    let heard = left(&std::fs::read(&played).unwrap());
    let longest = clean(&heard, 10_000.0, 0.02);
    println!("the client heard {} frames, {longest:.2} s without a crackle", heard.len());
    let played = longest;

    let said =
        vm.serial_command(&format!("/sound/arecord {format} -d 5 2>&1 >/dev/vdb; sync")).unwrap();
    println!("arecord: {said}");
    drop(ear);
    vm.type_serial("poweroff").unwrap();
    assert_eq!(vm.wait().unwrap(), 0, "{}", vm.state());
    let heard = host.run("cat /tmp/heard").unwrap().stdout;
    std::fs::write(host.results.join("recorded"), &heard).unwrap();
    let longest = clean(&left(&heard), 10_000.0, 0.08);
    println!("the guest heard {longest:.2} s without a crackle");
    assert!(played > 1.0, "played: {played} s; {}", vm.state());
    assert!(longest > 1.0, "recorded: {longest} s; {said}");
}
