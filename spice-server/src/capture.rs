//! What clients sent, kept in a file so that it can be played again.
//!
//! Only what comes after a link is kept, decrypted and out of its frames: no passwords of the server's, but
//! everything that was typed. The format, all numbers little-endian:
//!
//! ```text
//! header   "SPICECAP", u32 version (1)
//! record   u64 microseconds since the header, u32 connection, u32 length, u8 kind, then `length` bytes
//!   kind 1  a channel begins: u32 session, u8 channel type, u8 channel number, u32 count of words, then
//!           the client's capabilities for all channels, u32 count, then those for this channel
//!   kind 2  bytes of the client
//!   kind 3  the channel ends
//!   kind 4  the file is full, and there is nothing after this
//! ```

use std::{
    fs::{File, OpenOptions, Permissions},
    io::{self, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::Path,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use crate::{
    io::shared::lock,
    proto::{
        DecodeError,
        link::LinkRequest,
        wire::{Put, Reader},
    },
};

const MAGIC: &[u8; 8] = b"SPICECAP";
const VERSION: u32 = 1;
/// Of a record's head.
const HEAD: usize = 17;
/// Unless told otherwise, this is as large as the file becomes, in bytes.
const MAX_SIZE: u64 = 64 << 20;
/// Most words of capabilities of each kind, as on a link.
const MAX_CAP_WORDS: u32 = 256;

const OPENED: u8 = 1;
const BYTES: u8 = 2;
const CLOSED: u8 = 3;
const FULL: u8 = 4;

/// A file that is being written. Whatever goes wrong with it costs the clients nothing.
#[derive(Debug)]
pub struct Capture(Mutex<State>);

#[derive(Debug)]
struct State {
    /// Until it is full or fails.
    file: Option<File>,
    since: Instant,
    connections: u32,
    left: u64,
}

impl Capture {
    /// Makes the file, readable for its user only, or empties it. It grows to 64 MiB at most.
    ///
    /// # Errors
    ///
    /// When it cannot be made or written.
    pub fn create(path: &Path) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        // Not through a link that somebody else has put there.
        options.custom_flags(rustix::fs::OFlags::NOFOLLOW.bits() as i32);
        let file = options.write(true).create(true).truncate(true).mode(0o600).open(path)?;
        // A file that was there before may be readable for others.
        file.set_permissions(Permissions::from_mode(0o600))?;
        Self::to_file(file, MAX_SIZE)
    }

    fn to_file(mut file: File, max_size: u64) -> io::Result<Self> {
        let mut header = MAGIC.to_vec();
        header.put_u32(VERSION);
        file.write_all(&header)?;
        Ok(Self(Mutex::new(State {
            file: Some(file),
            since: Instant::now(),
            connections: 0,
            // Room for saying that there is no more.
            left: max_size.saturating_sub((header.len() + HEAD) as u64),
        })))
    }

    /// A client's channel begins.
    pub(crate) fn open(self: &Arc<Self>, session: u32, request: &LinkRequest) -> Tap {
        let mut body = Vec::new();
        body.put_u32(session);
        body.extend_from_slice(&[request.channel_type, request.channel_id]);
        for caps in [&request.common_caps, &request.channel_caps] {
            body.put_u32(caps.0.len() as u32);
            caps.0.iter().for_each(|word| body.put_u32(*word));
        }
        let mut state = lock(&self.0);
        state.connections = state.connections.wrapping_add(1);
        let connection = state.connections;
        state.write(connection, OPENED, &body);
        Tap { capture: self.clone(), connection }
    }
}

impl State {
    fn write(&mut self, connection: u32, kind: u8, body: &[u8]) {
        let Some(file) = &mut self.file else { return };
        let size = (HEAD + body.len()) as u64;
        let fits = size <= self.left;
        let (kind, body) = if fits { (kind, body) } else { (FULL, &[][..]) };
        let mut record = Vec::with_capacity(HEAD + body.len());
        let time = self.since.elapsed().as_micros() as u64;
        record.put_u64(time);
        record.put_u32(connection);
        record.put_u32(body.len() as u32);
        record.push(kind);
        record.extend_from_slice(body);
        let result = file.write_all(&record);
        match result {
            Ok(()) if fits => {
                self.left -= size;
                return;
            }
            Ok(()) => tracing::warn!("the capture of the SPICE clients is full"),
            Err(error) => tracing::warn!(%error, "the capture of the SPICE clients ends"),
        }
        self.file = None;
    }
}

/// Where the bytes of one channel go.
#[derive(Debug)]
pub(crate) struct Tap {
    capture: Arc<Capture>,
    connection: u32,
}

impl Tap {
    pub(crate) fn bytes(&self, bytes: &[u8]) {
        if !bytes.is_empty() {
            lock(&self.capture.0).write(self.connection, BYTES, bytes);
        }
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        lock(&self.capture.0).write(self.connection, CLOSED, &[]);
    }
}

/// Something in a capture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaptureRecord {
    /// When it happened, counted from the beginning.
    pub time: Duration,
    /// Number of the connection, from 1.
    pub connection: u32,
    /// What happened.
    pub event: CaptureEvent,
}

/// What may happen in a capture.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum CaptureEvent {
    /// A channel began.
    Opened {
        /// Number of its client's session.
        session: u32,
        /// Its type and number, as on the wire.
        channel: (u8, u8),
        /// The client's capabilities for all channels, which say what its headers look like.
        common_caps: Vec<u32>,
        /// The client's capabilities for this channel.
        channel_caps: Vec<u32>,
    },
    /// Bytes of the client.
    Bytes(Vec<u8>),
    /// The channel ended.
    Closed,
    /// The file was full.
    Full,
}

/// Why bytes are no capture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CaptureError {
    /// Something else begins like that.
    #[error("not a capture of SPICE clients")]
    Magic,
    /// Another version's.
    #[error("a capture of version {0}; this program knows version {VERSION}")]
    Version(u32),
    /// A record is wrong.
    #[error("the record at byte {0} is wrong")]
    Record(usize),
}

/// The records of a capture. A record that was being written when the program ended is left out.
///
/// # Errors
///
/// When it is no capture, or one of another version.
pub fn read_capture(bytes: &[u8]) -> Result<Vec<CaptureRecord>, CaptureError> {
    let rest = bytes.strip_prefix(MAGIC).ok_or(CaptureError::Magic)?;
    let (version, mut rest) = rest.split_first_chunk::<4>().ok_or(CaptureError::Magic)?;
    match u32::from_le_bytes(*version) {
        VERSION => {}
        other => return Err(CaptureError::Version(other)),
    }
    let mut records = Vec::new();
    while let Some((head, body)) = rest.split_at_checked(HEAD) {
        let wrong = |_| CaptureError::Record(bytes.len() - rest.len());
        let mut head = Reader::new(head);
        let time = Duration::from_micros(head.u64().map_err(wrong)?);
        let (connection, length) = (head.u32().map_err(wrong)?, head.u32().map_err(wrong)?);
        let kind = head.u8().map_err(wrong)?;
        let Some((body, after)) = body.split_at_checked(length as usize) else { break };
        let event = decode(kind, body).map_err(wrong)?;
        records.push(CaptureRecord { time, connection, event });
        rest = after;
    }
    Ok(records)
}

fn decode(kind: u8, body: &[u8]) -> Result<CaptureEvent, DecodeError> {
    let mut reader = Reader::new(body);
    Ok(match kind {
        OPENED => {
            let session = reader.u32()?;
            let channel = (reader.u8()?, reader.u8()?);
            let mut caps = || {
                let count = reader.u32()?;
                if count > MAX_CAP_WORDS {
                    return Err(DecodeError::Value("count of capabilities"));
                }
                (0..count).map(|_| reader.u32()).collect::<Result<Vec<_>, _>>()
            };
            let (common_caps, channel_caps) = (caps()?, caps()?);
            CaptureEvent::Opened { session, channel, common_caps, channel_caps }
        }
        BYTES => CaptureEvent::Bytes(body.to_vec()),
        CLOSED => CaptureEvent::Closed,
        FULL => CaptureEvent::Full,
        _ => return Err(DecodeError::Value("kind of record")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::channel::Caps;

    fn request() -> LinkRequest {
        LinkRequest {
            connection_id: 0,
            channel_type: 3,
            channel_id: 1,
            common_caps: Caps(vec![9, 1]),
            channel_caps: Caps(vec![]),
        }
    }

    #[test]
    fn what_is_written_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("capture");
        let capture = Arc::new(Capture::create(&path).unwrap());
        let mode = std::os::unix::fs::PermissionsExt::mode(
            &std::fs::metadata(&path).unwrap().permissions(),
        );
        assert_eq!(mode & 0o777, 0o600, "it has what people typed");
        let first = capture.open(7, &request());
        let second = capture.open(8, &request());
        second.bytes(b"abc");
        first.bytes(b"");
        drop(first);
        let bytes = std::fs::read(&path).unwrap();
        let records = read_capture(&bytes).unwrap();
        let opened = |session| CaptureEvent::Opened {
            session,
            channel: (3, 1),
            common_caps: vec![9, 1],
            channel_caps: vec![],
        };
        let events: Vec<_> = records.iter().map(|r| (r.connection, r.event.clone())).collect();
        let wanted = [
            (1, opened(7)),
            (2, opened(8)),
            (2, CaptureEvent::Bytes(b"abc".to_vec())),
            (1, CaptureEvent::Closed),
        ];
        assert_eq!(events, wanted);
        assert!(records.windows(2).all(|pair| pair[0].time <= pair[1].time));
        // Cut anywhere, it is what was there before.
        for length in 12..bytes.len() {
            let cut = read_capture(&bytes[..length]).unwrap();
            assert_eq!(cut, records[..cut.len()]);
        }
    }

    #[test]
    fn it_does_not_grow_beyond_its_limit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("capture");
        let capture = Capture::to_file(File::create(&path).unwrap(), 1000).unwrap();
        let tap = Arc::new(capture).open(1, &request());
        (0..100).for_each(|_| tap.bytes(&[5; 50]));
        drop(tap);
        let bytes = std::fs::read(&path).unwrap();
        assert!((900..=1000).contains(&bytes.len()), "{}", bytes.len());
        assert_eq!(read_capture(&bytes).unwrap().last().unwrap().event, CaptureEvent::Full);
    }

    #[test]
    fn other_files_are_told_apart() {
        assert_eq!(read_capture(b"REDQ"), Err(CaptureError::Magic));
        assert_eq!(read_capture(b"SPICECAP\x02\0\0\0"), Err(CaptureError::Version(2)));
        let wrong = [&b"SPICECAP\x01\0\0\0"[..], &[0; 16], &[77]].concat();
        assert_eq!(read_capture(&wrong), Err(CaptureError::Record(12)));
    }
}
