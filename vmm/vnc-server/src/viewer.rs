//! One viewer between its two threads: the reader says what the client wants, the writer waits for
//! work.

use std::{
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use crate::{
    encode::Method,
    geometry::Rect,
    proto::{clipboard, encoding, pixel::PixelFormat},
    tiles::Tiles,
};

/// Time between two updates.
const PACE: Duration = Duration::from_micros(16_600);

/// Least time between two turns with texts: clipboards may change, and be asked for, as fast as somebody
/// likes, and a text may be a megabyte.
const TEXT_PACE: Duration = Duration::from_millis(100);

/// What the client said it can do.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Abilities {
    pub(crate) method: Method,
    pub(crate) quality: Option<u8>,
    pub(crate) size: bool,
    pub(crate) extended_size: bool,
    pub(crate) cursor: bool,
    pub(crate) alpha_cursor: bool,
    pub(crate) extended_key: bool,
    pub(crate) extended_clipboard: bool,
}

impl Abilities {
    /// From SetEncodings: the best first, except that raw pixels are only for those who know nothing
    /// else.
    pub(crate) fn of(encodings: &[i32]) -> Self {
        let has = |wanted| encodings.contains(&wanted);
        let method = encodings.iter().find_map(|encoding| match *encoding {
            encoding::TIGHT => Some(Method::Tight),
            encoding::ZRLE => Some(Method::Zrle),
            _ => None,
        });
        let quality = encodings.iter().find_map(|encoding| {
            let level = encoding.checked_sub(encoding::JPEG_QUALITY_0)?;
            u8::try_from(level).ok().filter(|level| *level <= 9)
        });
        Self {
            method: method.unwrap_or_default(),
            quality,
            size: has(encoding::DESKTOP_SIZE),
            extended_size: has(encoding::EXTENDED_DESKTOP_SIZE),
            cursor: has(encoding::CURSOR),
            alpha_cursor: has(encoding::CURSOR_WITH_ALPHA),
            extended_key: has(encoding::EXTENDED_KEY),
            extended_clipboard: has(encoding::EXTENDED_CLIPBOARD),
        }
    }
}

#[derive(Debug)]
struct State {
    format: PixelFormat,
    abilities: Abilities,
    /// The client waits for an update.
    requested: bool,
    /// Size of the newest frame.
    size: (u32, u32),
    /// What changed since it was looked at last.
    damage: Tiles,
    /// What has to be sent even if it did not change.
    forced: Tiles,
    cursor: bool,
    /// The client has not been told that scancodes are welcome.
    announce_keys: bool,
    /// The client has not been told the size in the way it has learnt since.
    announce_size: bool,
    /// Answer to the client's own wish for a size.
    resize_status: Option<u16>,
    closed: bool,
    last_update: Option<Instant>,
    /// Frames so far.
    frames: u64,
    /// There is no frame: what is owed waits for the next one.
    no_frame: bool,
    /// The screen went off and nothing has been shown since.
    off: bool,
    /// The client has not been told so.
    blank: bool,
    clipboard: ClipboardNews,
    last_said: Option<Instant>,
}

/// What [`State::next`] finds.
#[derive(Debug)]
enum Next {
    Turn(Turn),
    /// Nothing before then, or before something changes.
    Wait(Option<Instant>),
}

/// What the client has to be told about clipboards.
#[derive(Debug, Default)]
struct ClipboardNews {
    /// It has just said that it knows the extension.
    abilities: bool,
    /// The guest's text is new.
    text: Option<Arc<str>>,
    /// It has asked for this text.
    asked: Option<Arc<str>>,
    /// Its own is wanted.
    request: bool,
}

impl ClipboardNews {
    fn is_empty(&self) -> bool {
        !self.abilities && !self.request && self.text.is_none() && self.asked.is_none()
    }

    /// The messages; nothing is news any more then.
    fn take(&mut self, extended: bool) -> Vec<u8> {
        let news = std::mem::take(self);
        let mut out = Vec::new();
        if news.abilities {
            out.extend(clipboard::abilities());
        }
        if let Some(text) = news.text {
            out.extend(if extended { clipboard::notify() } else { clipboard::plain(&text) });
        }
        if let Some(text) = news.asked.filter(|_| extended) {
            out.extend(clipboard::provide(&text));
        }
        if news.request && extended {
            out.extend(clipboard::request());
        }
        out
    }
}

/// What the writer has to do.
#[derive(Debug)]
pub(crate) enum Turn {
    /// Send these messages, for which the client need not have asked.
    Say(Vec<u8>),
    /// Send an update.
    Paint(Box<Work>),
}

/// What an update has to contain.
#[derive(Debug)]
pub(crate) struct Work {
    pub(crate) format: PixelFormat,
    pub(crate) abilities: Abilities,
    pub(crate) size: (u32, u32),
    pub(crate) damage: Tiles,
    pub(crate) forced: Tiles,
    pub(crate) cursor: bool,
    pub(crate) announce_keys: bool,
    pub(crate) announce_size: bool,
    pub(crate) resize_status: Option<u16>,
    /// The screen went off.
    pub(crate) blank: bool,
    /// Frames so far.
    pub(crate) frames: u64,
}

/// A viewer.
#[derive(Debug)]
pub(crate) struct Viewer {
    state: Mutex<State>,
    changed: Condvar,
}

impl Viewer {
    /// A viewer that was told this size.
    pub(crate) fn new(size: (u32, u32)) -> Self {
        Self {
            state: Mutex::new(State {
                format: PixelFormat::BGRX,
                abilities: Abilities::default(),
                requested: false,
                size,
                damage: Tiles::new(size.0, size.1),
                forced: Tiles::new(size.0, size.1),
                cursor: false,
                announce_keys: false,
                announce_size: false,
                resize_status: None,
                closed: false,
                last_update: None,
                frames: 0,
                no_frame: true,
                off: false,
                blank: false,
                clipboard: ClipboardNews::default(),
                last_said: None,
            }),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    /// A new frame.
    pub(crate) fn damaged(&self, size: (u32, u32), damage: &[Rect]) {
        self.change(|state| {
            if state.size != size {
                state.size = size;
                state.damage = Tiles::new(size.0, size.1);
                state.forced = Tiles::new(size.0, size.1);
                state.forced.mark(Rect::new(0, 0, size.0, size.1));
            }
            damage.iter().for_each(|rect| state.damage.mark(*rect));
            if std::mem::take(&mut state.off) {
                state.damage.mark(Rect::new(0, 0, size.0, size.1));
            }
            state.blank = false;
            state.no_frame = false;
            state.frames += 1;
        });
    }

    /// The screen shows nothing.
    pub(crate) fn switched_off(&self) {
        self.change(|state| {
            state.damage.clear();
            state.off = true;
            state.blank = true;
        });
    }

    pub(crate) fn cursor_changed(&self) {
        self.change(|state| state.cursor = true);
    }

    pub(crate) fn set_format(&self, format: PixelFormat) {
        self.change(|state| state.format = format);
    }

    pub(crate) fn set_encodings(&self, encodings: &[i32]) {
        let new = Abilities::of(encodings);
        self.change(|state| {
            state.announce_keys |= new.extended_key && !state.abilities.extended_key;
            state.announce_size |= new.extended_size && !state.abilities.extended_size;
            state.clipboard.abilities |=
                new.extended_clipboard && !state.abilities.extended_clipboard;
            let cursors = |abilities: &Abilities| abilities.cursor || abilities.alpha_cursor;
            state.cursor |= cursors(&new) && !cursors(&state.abilities);
            state.abilities = new;
        });
    }

    /// The client wants an update, of `all` of a part or of what changed.
    pub(crate) fn request(&self, all: Option<Rect>) {
        self.change(|state| {
            state.requested = true;
            if let Some(part) = all {
                state.forced.mark(part);
            }
        });
    }

    /// The guest has copied this.
    pub(crate) fn clipboard_changed(&self, text: Arc<str>) {
        self.change(|state| state.clipboard.text = Some(text));
    }

    /// The client has asked for the guest's text.
    pub(crate) fn clipboard_asked(&self, text: Arc<str>) {
        self.change(|state| state.clipboard.asked = Some(text));
    }

    /// The client has something new.
    pub(crate) fn request_clipboard(&self) {
        self.change(|state| state.clipboard.request = true);
    }

    pub(crate) fn resize_answered(&self, status: u16) {
        self.change(|state| state.resize_status = Some(status));
    }

    pub(crate) fn close(&self) {
        self.change(|state| state.closed = true);
    }

    /// Waits until there is something to send and the client wants it; `None` when it is over.
    /// `rest`: when something that was sent with losses has to be sent again. `want_next` is called when
    /// only a newer frame helps.
    pub(crate) fn wait(&self, rest: Option<Instant>, want_next: impl Fn()) -> Option<Turn> {
        let mut state = self.lock();
        let mut asked_after = None;
        loop {
            if state.closed {
                return None;
            }
            let now = Instant::now();
            let deadline = match state.next(rest, now) {
                Next::Turn(turn) => return Some(turn),
                Next::Wait(until) => until,
            };
            if state.requested && !state.has_picture() && asked_after != Some(state.frames) {
                asked_after = Some(state.frames);
                drop(state);
                want_next();
                state = self.lock();
                continue;
            }
            state = match deadline {
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(at) => {
                    let left = at.saturating_duration_since(now);
                    let waited = self.changed.wait_timeout(state, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    /// The work turned out to be nothing: the client goes on waiting for its update.
    pub(crate) fn still_requested(&self) {
        self.lock().requested = true;
    }

    /// There is no frame of that size to paint from: it is done when there is one.
    pub(crate) fn put_off(&self, work: &Work) {
        self.change(|state| {
            if state.size == work.size {
                state.damage.add(&work.damage);
                state.forced.add(&work.forced);
                // One may have come meanwhile.
                state.no_frame = state.frames == work.frames;
            }
        });
    }
}

impl State {
    /// What is to be done now. Texts wait for their time, pictures never wait for texts.
    fn next(&mut self, rest: Option<Instant>, now: Instant) -> Next {
        let mut texts_at = None;
        if !self.clipboard.is_empty() {
            let at = self.last_said.map_or(now, |last| last + TEXT_PACE);
            if at > now {
                texts_at = Some(at);
            } else {
                let messages = self.clipboard.take(self.abilities.extended_clipboard);
                if !messages.is_empty() {
                    self.last_said = Some(now);
                    return Next::Turn(Turn::Say(messages));
                }
            }
        }
        let earliest = self.last_update.map_or(now, |last| last + PACE);
        let picture_at = match (self.requested, self.has_news()) {
            (false, _) => None,
            (true, true) => Some(earliest),
            (true, false) => rest.map(|rest| rest.max(earliest)),
        };
        match picture_at {
            Some(at) if at <= now => Next::Turn(Turn::Paint(Box::new(self.take(now)))),
            at => Next::Wait([at, texts_at].into_iter().flatten().min()),
        }
    }

    fn has_news(&self) -> bool {
        let size = self.announce_size || self.resize_status.is_some();
        let cursor = self.cursor && (self.abilities.cursor || self.abilities.alpha_cursor);
        size || cursor || self.announce_keys || self.blank || self.has_picture()
    }

    fn has_picture(&self) -> bool {
        !(self.no_frame || self.damage.is_empty() && self.forced.is_empty())
    }

    fn take(&mut self, now: Instant) -> Work {
        self.requested = false;
        self.last_update = Some(now);
        let work = Work {
            format: self.format,
            abilities: self.abilities,
            size: self.size,
            damage: self.damage.clone(),
            forced: self.forced.clone(),
            cursor: std::mem::take(&mut self.cursor),
            announce_keys: std::mem::take(&mut self.announce_keys),
            announce_size: std::mem::take(&mut self.announce_size),
            resize_status: self.resize_status.take(),
            blank: std::mem::take(&mut self.blank),
            frames: self.frames,
        };
        self.damage.clear();
        self.forced.clear();
        work
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_asked_for_when_the_client_waits_and_nothing_is_left() {
        let asked = std::cell::Cell::new(0);
        let viewer = Viewer::new((64, 64));
        let until_asked = || {
            asked.set(asked.get() + 1);
            viewer.close();
        };
        viewer.request(None);
        assert!(viewer.wait(None, until_asked).is_none());
        assert_eq!(asked.get(), 1);
        // There is something to be sent; there is a client that wants nothing.
        let viewer = Viewer::new((64, 64));
        viewer.damaged((64, 64), &[Rect::new(0, 0, 64, 64)]);
        viewer.request(None);
        let nobody = || panic!("nobody waits for a newer frame");
        assert!(matches!(viewer.wait(None, nobody), Some(Turn::Paint(_))));
        std::thread::scope(|scope| {
            scope.spawn(|| viewer.close());
            assert!(viewer.wait(None, nobody).is_none());
        });
    }

    #[test]
    fn a_flood_of_texts_holds_no_picture_up() {
        let viewer = Viewer::new((64, 64));
        let start = Instant::now();
        let (mut said, mut painted) = (0, 0);
        // For a second everything changes as fast as it can.
        for millisecond in 0..1000 {
            let now = start + Duration::from_millis(millisecond);
            viewer.clipboard_changed("a text".into());
            viewer.damaged((64, 64), &[Rect::new(0, 0, 64, 64)]);
            viewer.request(None);
            let mut state = viewer.lock();
            match state.next(None, now) {
                Next::Turn(Turn::Say(messages)) => {
                    assert!(!messages.is_empty());
                    said += 1;
                }
                Next::Turn(Turn::Paint(_)) => painted += 1,
                Next::Wait(until) => {
                    assert!(until.is_some_and(|until| until > now), "at {millisecond} ms");
                }
            }
        }
        assert_eq!(said, 10);
        assert!((55..=61).contains(&painted), "{painted}");
        // The newest text is not lost.
        let later = start + Duration::from_secs(2);
        assert!(matches!(viewer.lock().next(None, later), Next::Turn(Turn::Say(_))));
        let Next::Turn(Turn::Paint(_)) = viewer.lock().next(None, later) else {
            panic!("and then the picture")
        };
        assert!(matches!(viewer.lock().next(None, later), Next::Wait(None)));
    }

    #[test]
    fn what_a_client_does_not_know_is_no_news() {
        let viewer = Viewer::new((64, 64));
        viewer.request_clipboard();
        viewer.clipboard_asked("a text".into());
        assert!(matches!(viewer.lock().next(None, Instant::now()), Next::Wait(None)));
    }
}
