//! Requests of the control queue and their answers (VIRTIO 1.3 §5.14.6), bytes in and bytes out.

use super::pcm::{self, Format, Params};

// §5.14.6.1: status codes.
pub(super) const OK: u32 = 0x8000;
pub(super) const BAD_MSG: u32 = 0x8001;
pub(super) const NOT_SUPP: u32 = 0x8002;
pub(super) const IO_ERR: u32 = 0x8003;

// Request codes.
const R_JACK_INFO: u32 = 1;
const R_JACK_REMAP: u32 = 2;
const R_PCM_INFO: u32 = 0x100;
const R_PCM_SET_PARAMS: u32 = 0x101;
const R_PCM_PREPARE: u32 = 0x102;
const R_PCM_RELEASE: u32 = 0x103;
const R_PCM_START: u32 = 0x104;
const R_PCM_STOP: u32 = 0x105;
const R_CHMAP_INFO: u32 = 0x200;

/// Bytes of the longest request, `virtio_snd_pcm_set_params`.
pub(super) const MAX_REQUEST: usize = 24;
/// The longest information a driver may expect, for one that knows longer ones than ours.
const MAX_INFO: usize = 256;

/// Streams and channel maps: output, input. There are no jacks: what is plugged in is not known.
pub(super) const STREAMS: u32 = 2;
const JACKS: u32 = 0;

/// Front left, front right (§5.14.6.9).
const POSITIONS: [u8; 2] = [3, 4];

/// Configuration space (§5.14.4): jacks, streams, channel maps.
pub(super) fn config() -> impl Iterator<Item = u8> {
    [JACKS, STREAMS, STREAMS].into_iter().flat_map(u32::to_le_bytes)
}

/// Which way a stream goes (§5.14.6): streams are numbered like this, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    Output = 0,
    Input = 1,
}

/// A request to a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Command {
    SetParams(Params),
    Prepare,
    Release,
    Start,
    Stop,
}

/// What a request asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Request {
    /// This is the answer.
    Answer(Vec<u8>),
    /// A stream has to do something.
    Stream(Direction, Command),
}

/// An answer that is only a status.
pub(super) fn status(code: u32) -> Vec<u8> {
    code.to_le_bytes().to_vec()
}

fn word(bytes: &[u8], index: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(index * 4..)?.first_chunk()?))
}

/// A stream by its number.
pub(super) fn direction(stream: u32) -> Option<Direction> {
    match stream {
        0 => Some(Direction::Output),
        1 => Some(Direction::Input),
        _ => None,
    }
}

/// Understands a request.
pub(super) fn request(bytes: &[u8]) -> Request {
    parse(bytes).unwrap_or_else(|code| Request::Answer(status(code)))
}

fn parse(bytes: &[u8]) -> Result<Request, u32> {
    let field = |index| word(bytes, index).ok_or(BAD_MSG);
    let code = field(0)?;
    let stream = || field(1).and_then(|id| direction(id).ok_or(BAD_MSG));
    Ok(match code {
        R_PCM_INFO => Request::Answer(infos(bytes, STREAMS, pcm_info)?),
        R_CHMAP_INFO => Request::Answer(infos(bytes, STREAMS, chmap_info)?),
        R_JACK_INFO => Request::Answer(infos(bytes, JACKS, |_| Vec::new())?),
        R_JACK_REMAP => return Err(BAD_MSG),
        R_PCM_SET_PARAMS => Request::Stream(stream()?, Command::SetParams(params(bytes)?)),
        R_PCM_PREPARE => Request::Stream(stream()?, Command::Prepare),
        R_PCM_RELEASE => Request::Stream(stream()?, Command::Release),
        R_PCM_START => Request::Stream(stream()?, Command::Start),
        R_PCM_STOP => Request::Stream(stream()?, Command::Stop),
        _ => return Err(NOT_SUPP),
    })
}

/// `virtio_snd_query_info`: items `start` to `start + count`, each in `size` bytes (§5.14.6.1).
fn infos(bytes: &[u8], items: u32, info: impl Fn(u32) -> Vec<u8>) -> Result<Vec<u8>, u32> {
    let field = |index| word(bytes, index).ok_or(BAD_MSG);
    let (start, count, size) = (field(1)?, field(2)?, field(3)? as usize);
    let end = start.checked_add(count).filter(|end| *end <= items).ok_or(BAD_MSG)?;
    let mut answer = status(OK);
    for item in start..end {
        let mut bytes = info(item);
        // A driver that knows a longer structure gets zeroes where ours ends.
        if size < bytes.len() || size > MAX_INFO {
            return Err(BAD_MSG);
        }
        bytes.resize(size, 0);
        answer.extend(bytes);
    }
    Ok(answer)
}

/// `virtio_snd_pcm_info` (§5.14.6.6.2).
fn pcm_info(stream: u32) -> Vec<u8> {
    let mut info = Vec::with_capacity(32);
    // No HDA node, no features.
    info.extend([0; 8]);
    info.extend(pcm::formats().to_le_bytes());
    info.extend(pcm::rates().to_le_bytes());
    info.extend([stream as u8, 1, pcm::MAX_CHANNELS, 0, 0, 0, 0, 0]);
    info
}

/// `virtio_snd_chmap_info` (§5.14.6.9.1).
fn chmap_info(map: u32) -> Vec<u8> {
    let mut info = vec![0; 4];
    info.extend([map as u8, POSITIONS.len() as u8]);
    info.extend(POSITIONS);
    info.resize(24, 0);
    info
}

/// `virtio_snd_pcm_set_params` (§5.14.6.6.3).
fn params(bytes: &[u8]) -> Result<Params, u32> {
    let field = |index| word(bytes, index).ok_or(BAD_MSG);
    let (buffer, period, features) = (field(2)?, field(3)?, field(4)?);
    let [channels, format, rate, _] =
        *bytes.get(20..24).and_then(|b| b.first_chunk()).ok_or(BAD_MSG)?;
    if features != 0 {
        return Err(NOT_SUPP);
    }
    let format = Format::from_wire(format).ok_or(NOT_SUPP)?;
    let rate = pcm::rate(rate).ok_or(NOT_SUPP)?;
    if channels == 0 || channels > pcm::MAX_CHANNELS {
        return Err(NOT_SUPP);
    }
    let params = Params { format, rate, channels };
    let frame = params.frame_bytes() as u32;
    if period == 0 || !period.is_multiple_of(frame) || buffer == 0 || !buffer.is_multiple_of(period)
    {
        return Err(BAD_MSG);
    }
    Ok(params)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    fn answer(words_in: &[u32]) -> Vec<u8> {
        match request(&words(words_in)) {
            Request::Answer(bytes) => bytes,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn streams_and_maps_describe_themselves() {
        let answer_bytes = answer(&[R_PCM_INFO, 0, 2, 32]);
        assert_eq!(answer_bytes.len(), 4 + 64);
        assert_eq!(answer_bytes[..4], OK.to_le_bytes());
        assert_eq!(answer_bytes[4 + 24..4 + 27], [0, 1, 2], "output, mono to stereo");
        assert_eq!(answer_bytes[36 + 24], 1, "input");
        // Longer structures end with zeroes, others are refused.
        assert_eq!(answer(&[R_PCM_INFO, 1, 1, 40]).len(), 44);
        assert_eq!(answer(&[R_PCM_INFO, 0, 1, 31]), status(BAD_MSG));
        assert_eq!(answer(&[R_PCM_INFO, 0, 1, u32::MAX]), status(BAD_MSG));
        assert_eq!(answer(&[R_PCM_INFO, 1, 2, 32]), status(BAD_MSG));
        assert_eq!(answer(&[R_PCM_INFO, u32::MAX, 2, 32]), status(BAD_MSG));
        assert_eq!(answer(&[R_PCM_INFO, 0, 2]), status(BAD_MSG));
        assert_eq!(answer(&[R_CHMAP_INFO, 1, 1, 24])[8..12], [1, 2, 3, 4]);
        assert_eq!(answer(&[R_JACK_INFO, 0, 1, 24]), status(BAD_MSG), "there are none");
        assert_eq!(answer(&[R_JACK_INFO, 0, 0, 24]), status(OK));
        assert_eq!(answer(&[0x9999]), status(NOT_SUPP));
        assert_eq!(request(&[1, 0]), Request::Answer(status(BAD_MSG)));
        assert_eq!(answer(&[R_PCM_INFO, 0, 2, 256]).len(), 516);
        assert_eq!(config().collect::<Vec<_>>(), words(&[0, 2, 2]));
    }

    #[test]
    fn parameters() {
        let set = |buffer, period, features, what: [u8; 3]| {
            let mut bytes = words(&[R_PCM_SET_PARAMS, 0, buffer, period, features]);
            bytes.extend(what);
            bytes.push(0);
            request(&bytes)
        };
        let good = Params { format: Format::S16, rate: 48_000, channels: 2 };
        assert_eq!(
            set(7680, 1920, 0, [2, 5, 7]),
            Request::Stream(Direction::Output, Command::SetParams(good))
        );
        let refused = |code| Request::Answer(status(code));
        assert_eq!(set(7680, 1920, 1, [2, 5, 7]), refused(NOT_SUPP), "features");
        assert_eq!(set(7680, 1920, 0, [3, 5, 7]), refused(NOT_SUPP), "channels");
        assert_eq!(set(7680, 1920, 0, [0, 5, 7]), refused(NOT_SUPP), "channels");
        assert_eq!(set(7680, 1920, 0, [2, 0, 7]), refused(NOT_SUPP), "format");
        assert_eq!(set(7680, 1920, 0, [2, 5, 13]), refused(NOT_SUPP), "rate");
        assert_eq!(set(7680, 0, 0, [2, 5, 7]), refused(BAD_MSG), "no period");
        assert_eq!(set(7680, 1921, 0, [2, 5, 7]), refused(BAD_MSG), "half a frame");
        assert_eq!(set(7000, 1920, 0, [2, 5, 7]), refused(BAD_MSG), "half a period");
        assert_eq!(request(&words(&[R_PCM_START, 2])), refused(BAD_MSG));
        let start = Request::Stream(Direction::Input, Command::Start);
        assert_eq!(request(&words(&[R_PCM_START, 1])), start);
    }
}
