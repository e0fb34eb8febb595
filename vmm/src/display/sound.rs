//! Sound: what the guest plays to all viewers, and what one of them says to the guest.

use std::{sync::Arc, time::Duration};

use devices::virtio::snd::{AudioSink, AudioSource, Frame, SoundHandle};
use spice_server::{PlaybackHandle, RecordHandle, SpiceServer, ask_for_short_turns};

/// Connects a sound card with a server that was built with sound.
pub(super) fn connect(card: &SoundHandle, server: &SpiceServer) {
    if let (Some(playback), Some(record)) = (server.playback(), server.record()) {
        card.connect(Arc::new(Speaker(playback)), Arc::new(Microphone(record)));
    }
}

/// The device's thread has little to do, but at the right moment.
fn hurry() {
    if let Err(error) = ask_for_short_turns() {
        tracing::debug!(%error, "sound goes at the pace of everything else");
    }
}

struct Speaker(PlaybackHandle);

impl AudioSink for Speaker {
    fn start(&self, rate: u32) {
        hurry();
        self.0.start(rate);
    }

    fn play(&self, frames: &[Frame]) {
        self.0.play(frames);
    }

    fn stop(&self) {
        self.0.stop();
    }

    fn latency(&self) -> Duration {
        self.0.latency()
    }
}

struct Microphone(RecordHandle);

impl AudioSource for Microphone {
    fn start(&self, rate: u32) {
        hurry();
        self.0.start(rate);
    }

    fn capture(&self, frames: &mut [Frame]) {
        self.0.read(frames);
    }

    fn stop(&self) {
        self.0.stop();
    }
}
