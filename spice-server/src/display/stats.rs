//! What one display channel has sent, by way of drawing.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use crate::VideoCodec;

/// A way to bring a part of a picture to a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Codec {
    /// One colour.
    Fill,
    /// Pixels the client shows at another place.
    Move,
    /// An image the client has kept.
    Cached,
    /// LZ4, exact.
    Lz4,
    /// Raw pixels.
    Raw,
    /// JPEG, followed by the exact pixels when it rests.
    Jpeg,
    /// A frame of an MJPEG stream.
    Stream,
    /// A frame of a VP8 stream.
    Vp8,
    /// A frame of an H.264 stream.
    H264,
}

impl Codec {
    /// All of them, in the order of [`DisplayStats::codecs`].
    pub const ALL: [Self; 9] = [
        Self::Fill,
        Self::Move,
        Self::Cached,
        Self::Lz4,
        Self::Raw,
        Self::Jpeg,
        Self::Stream,
        Self::Vp8,
        Self::H264,
    ];

    /// Its name in counters.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fill => "fill",
            Self::Move => "move",
            Self::Cached => "cached",
            Self::Lz4 => "lz4",
            Self::Raw => "raw",
            Self::Jpeg => "jpeg",
            Self::Stream => "stream",
            Self::Vp8 => "vp8",
            Self::H264 => "h264",
        }
    }
}

impl From<VideoCodec> for Codec {
    fn from(codec: VideoCodec) -> Self {
        match codec {
            VideoCodec::Mjpeg => Self::Stream,
            VideoCodec::Vp8 => Self::Vp8,
            VideoCodec::H264 => Self::H264,
        }
    }
}

/// What was sent with one codec.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CodecStats {
    /// The codec.
    pub codec: Codec,
    /// Messages with it.
    pub messages: u64,
    /// Bytes of these messages.
    pub bytes: u64,
    /// Time spent encoding them.
    pub time: Duration,
}

/// What a display channel did since its client connected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DisplayStats {
    /// The display.
    pub display: u32,
    /// Frames of the program that were looked at.
    pub frames: u64,
    /// Frames that were replaced by newer ones before this client could take them.
    pub skipped_frames: u64,
    /// Frames in which nothing had changed.
    pub unchanged_frames: u64,
    /// Time spent comparing frames with what the client shows, and looking for what moved.
    pub compare_time: Duration,
    /// Parts that were sent again exactly after a lossy version.
    pub refined_parts: u64,
    /// Video streams begun.
    pub streams: u64,
    /// The codec films are sent with, once there was one.
    pub video_codec: Option<VideoCodec>,
    /// How often another codec, or pictures, had to take over.
    pub video_fallbacks: u64,
    /// How often a stream's frames became half as wide and high, because the line or the host could
    /// not cope.
    pub halved_streams: u64,
    /// Stream frames that the client says came too late.
    pub late_stream_frames: u64,
    /// How often there was something to send and no room for it, because the client had not taken what
    /// was on its way.
    pub blocked: u64,
    /// Bytes on their way: sent and not yet known to have been drawn.
    pub bytes_in_flight: u64,
    /// Shortest recent time until the client had drawn what it was sent; 0 while unknown.
    pub round_trip: Duration,
    /// Bytes per second the line is believed to carry; 0 while unknown.
    pub line_rate: u64,
    /// Bytes of memory for the client's picture.
    pub memory: u64,
    /// By codec.
    pub codecs: Vec<CodecStats>,
}

#[derive(Debug, Default)]
struct CodecCounters {
    messages: AtomicU64,
    bytes: AtomicU64,
    nanoseconds: AtomicU64,
}

/// The counters behind [`DisplayStats`]. One thread writes, any may read.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) frames: AtomicU64,
    pub(crate) skipped: AtomicU64,
    pub(crate) unchanged: AtomicU64,
    pub(crate) compare_nanoseconds: AtomicU64,
    pub(crate) refined: AtomicU64,
    pub(crate) streams: AtomicU64,
    /// Its place in [`VideoCodec::ALL`] and 1.
    pub(crate) video_codec: AtomicU64,
    pub(crate) fallbacks: AtomicU64,
    pub(crate) halved: AtomicU64,
    pub(crate) late: AtomicU64,
    pub(crate) blocked: AtomicU64,
    pub(crate) in_flight: AtomicU64,
    pub(crate) round_trip_microseconds: AtomicU64,
    pub(crate) line_rate: AtomicU64,
    pub(crate) memory: AtomicU64,
    codecs: [CodecCounters; Codec::ALL.len()],
}

/// Adds to a counter.
pub(crate) fn count(counter: &AtomicU64, value: u64) {
    counter.fetch_add(value, Ordering::Relaxed);
}

/// Sets a counter that is no sum.
pub(crate) fn set(counter: &AtomicU64, value: u64) {
    counter.store(value, Ordering::Relaxed);
}

impl Counters {
    /// A message was encoded since `start`.
    pub(crate) fn encoded(&self, codec: Codec, bytes: usize, start: Instant) {
        let Some(counters) = self.codecs.get(codec as usize) else { return };
        count(&counters.messages, 1);
        count(&counters.bytes, bytes as u64);
        count(&counters.nanoseconds, start.elapsed().as_nanos() as u64);
    }

    pub(crate) fn stats(&self, display: u32) -> DisplayStats {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let codecs = Codec::ALL.iter().zip(&self.codecs).map(|(codec, counters)| CodecStats {
            codec: *codec,
            messages: read(&counters.messages),
            bytes: read(&counters.bytes),
            time: Duration::from_nanos(read(&counters.nanoseconds)),
        });
        DisplayStats {
            display,
            frames: read(&self.frames),
            skipped_frames: read(&self.skipped),
            unchanged_frames: read(&self.unchanged),
            compare_time: Duration::from_nanos(read(&self.compare_nanoseconds)),
            refined_parts: read(&self.refined),
            streams: read(&self.streams),
            video_codec: usize::try_from(read(&self.video_codec))
                .ok()
                .and_then(|number| VideoCodec::ALL.get(number.checked_sub(1)?).copied()),
            video_fallbacks: read(&self.fallbacks),
            halved_streams: read(&self.halved),
            late_stream_frames: read(&self.late),
            blocked: read(&self.blocked),
            bytes_in_flight: read(&self.in_flight),
            round_trip: Duration::from_micros(read(&self.round_trip_microseconds)),
            line_rate: read(&self.line_rate),
            memory: read(&self.memory),
            codecs: codecs.collect(),
        }
    }
}
