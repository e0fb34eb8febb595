//! Sound: what the program plays to all clients, and what one client records for it.
//!
//! | module | what it holds |
//! |---|---|
//! | [`playback`] | packets of 10 ms, coded once for everybody, the newest few of them |
//! | [`record`] | the store between the client's clock and the program's |
//! | [`resample`] | changes of the sample rate, by a ratio that may drift |
//! | [`codec`] | Opus |

pub(crate) mod codec;
pub(crate) mod playback;
pub(crate) mod record;
pub(crate) mod resample;

use std::sync::Arc;

pub use playback::PlaybackHandle;
pub use record::RecordHandle;

use crate::io::wake::Wake;

/// A server's sound.
pub(crate) struct Sound {
    pub(crate) playback: Arc<playback::Playback>,
    pub(crate) record: Arc<record::Record>,
}

impl Sound {
    /// `io` wakes the thread of the channels.
    pub(crate) fn new(io: &Arc<Wake>) -> Self {
        Self {
            playback: Arc::new(playback::Playback::new(io.clone())),
            record: Arc::new(record::Record::new(io.clone())),
        }
    }
}
