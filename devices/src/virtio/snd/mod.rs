//! The sound device (VIRTIO 1.3 §5.14): one stream to play, one to record.
//!
//! | module | what it holds |
//! |---|---|
//! | [`config`] | the `--sound` option |
//! | `device` | configuration space, life cycle, [`SoundHandle`] |
//! | `protocol` | requests and answers of the control queue |
//! | [`pcm`] | formats of samples, and what becomes of them |
//! | `stream` | a stream's states, buffers and clock |
//! | `worker` | the queues |
//!
//! The clock of both streams is the host's: a buffer is given back at the moment at which a sound
//! card would have played or recorded it, whether or not anybody listens. What is in a buffer is read
//! 10 ms at a time, not before its turn, so the guest may change what it has queued, as with a sound
//! card, and its own buffer adds nothing to the time until it is heard.

pub mod config;
mod device;
pub mod pcm;
mod protocol;
mod stream;
#[cfg(test)]
mod tests;
mod worker;

use std::time::Duration;

pub use config::SoundConfig;
pub use device::SoundHandle;

use crate::virtio::registry::{Count, DeviceModule, Machines, Preset};

/// Sound in the registry.
pub static MODULE: DeviceModule = DeviceModule {
    option: "sound",
    value_name: "[on|off]",
    help: "sound card: SPICE viewers hear the guest and may speak to it; on with --spice",
    count: Count::One,
    presets: &[Preset { value: "on", on: Machines::Heard }],
    can_be_off: true,
    served_elsewhere: false,
    parse: SoundConfig::parse,
    sample: SoundConfig::sample,
};

/// A stereo frame, left sample first.
pub type Frame = [i16; 2];

/// Who hears the guest. Called on the device's thread; must not block.
pub trait AudioSink: Send + Sync {
    /// The guest begins to play, with `rate` frames per second.
    fn start(&self, rate: u32);
    /// What is to be heard now, 10 ms or less.
    fn play(&self, frames: &[Frame]);
    /// The guest no longer plays.
    fn stop(&self);
    /// How long it takes until what is played now is heard.
    fn latency(&self) -> Duration;
}

/// Who speaks to the guest. Called on the device's thread; must not block.
pub trait AudioSource: Send + Sync {
    /// The guest begins to record, with `rate` frames per second.
    fn start(&self, rate: u32);
    /// Fills `frames`, 10 ms or less, with what is heard now; with silence where there is nothing.
    fn capture(&self, frames: &mut [Frame]);
    /// The guest no longer records.
    fn stop(&self);
}
