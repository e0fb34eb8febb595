//! What a program may want to know about who comes, goes and fails.

use std::time::Duration;

use crate::{Peer, VideoCodec};

/// Why somebody did not get in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refusal {
    /// Too many connections from this address in a short time.
    TooManyConnections,
    /// Too many wrong passwords from this address.
    LockedOut,
    /// The channel needs TLS.
    NotSecure,
    /// There are clients enough (see [`ClientPolicy`](crate::ClientPolicy)).
    Occupied,
    /// A web page of another site asked.
    ForeignPage,
}

impl Refusal {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::TooManyConnections,
        Self::LockedOut,
        Self::NotSecure,
        Self::Occupied,
        Self::ForeignPage,
    ];

    /// Its name in logs and events.
    pub fn name(self) -> &'static str {
        match self {
            Self::TooManyConnections => "too-many-connections",
            Self::LockedOut => "locked-out",
            Self::NotSecure => "not-secure",
            Self::Occupied => "occupied",
            Self::ForeignPage => "foreign-page",
        }
    }
}

/// Why films go to a client with this codec from now on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum VideoChange {
    /// It is the best one that both sides have.
    Chosen,
    /// The client reported that it cannot show the one before.
    NotShown,
    /// The host was too slow for the one before.
    TooSlow,
    /// The encoder of the one before failed.
    Failed,
}

impl VideoChange {
    /// Its name in logs and events.
    pub fn name(self) -> &'static str {
        match self {
            Self::Chosen => "chosen",
            Self::NotShown => "not-shown",
            Self::TooSlow => "too-slow",
            Self::Failed => "failed",
        }
    }
}

/// Something happened.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ServerEvent {
    /// A client has come in.
    ClientConnected {
        /// Number of its session, random.
        session: u32,
        /// Who it is.
        peer: Peer,
        /// Its connection, for example `tcp+tls1.3`.
        transport: String,
    },
    /// A client is gone.
    ClientDisconnected {
        /// Number of its session.
        session: u32,
        /// Who it was.
        peer: Peer,
        /// How long it was there.
        after: Duration,
        /// Bytes it was sent.
        bytes_sent: u64,
        /// Bytes it sent.
        bytes_received: u64,
    },
    /// Somebody gave a wrong password, or an expired one.
    WrongPassword {
        /// Who.
        peer: Peer,
        /// Its address has to wait for so long.
        locked_out: Option<Duration>,
    },
    /// Somebody did not get in.
    Refused {
        /// Who.
        peer: Peer,
        /// Why.
        reason: Refusal,
    },
    /// The guest's agent came or went.
    Agent {
        /// Whether it is there.
        open: bool,
    },
    /// Films go to a client with another codec than before.
    VideoCodec {
        /// Number of its session.
        session: u32,
        /// The display.
        display: u32,
        /// The codec; `None`: as pictures.
        codec: Option<VideoCodec>,
        /// Why.
        why: VideoChange,
    },
    /// A client asked for another size of a display.
    Resize {
        /// The display.
        display: u32,
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
    },
}

/// Hears events. Called from the server's threads: must not block.
pub trait EventSink: Send + Sync {
    /// Something happened.
    fn event(&self, event: ServerEvent);
}
