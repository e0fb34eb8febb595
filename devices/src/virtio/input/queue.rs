//! Events that wait for the guest: bounded, grouped, and never losing a release.

use std::collections::{BTreeSet, VecDeque};

use super::{InputEvent, InputKind, codes::*};

/// Events that wait at most, not counting releases of keys.
pub const LIMIT: usize = 512;

/// The events between two SYN_REPORTs, the closing one included.
pub type Group = VecDeque<InputEvent>;

/// A queue of groups.
///
/// While the guest does not keep up, movements merge into one (positions: the newest, distances:
/// the sum). When the queue is full, movements are dropped first, then new presses; the release of
/// a key whose press was accepted is always accepted, so no key is stuck in the guest. The queue
/// stays bounded, since there is at most one release for each press.
#[derive(Debug)]
pub struct EventQueue {
    kind: InputKind,
    groups: VecDeque<Group>,
    /// Events in `groups`.
    length: usize,
    /// Keys and buttons whose press was accepted and whose release was not yet.
    down: BTreeSet<u16>,
}

impl EventQueue {
    /// An empty queue of a device of this kind.
    pub fn new(kind: InputKind) -> Self {
        Self { kind, groups: VecDeque::new(), length: 0, down: BTreeSet::new() }
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    /// Appends events; each SYN_REPORT among them, and the end, closes a group. Returns whether all
    /// were accepted. Events which the device does not have, repetitions of held keys and releases
    /// of keys that are up are left out.
    pub fn push(&mut self, events: &[InputEvent]) -> bool {
        let mut complete = true;
        for group in events.split(|event| event.kind == EV_SYN) {
            complete &= self.push_group(group);
        }
        complete
    }

    /// Releases all keys and buttons that are down.
    pub fn release_all(&mut self) {
        let events: Vec<_> = self.down.iter().map(|code| InputEvent::key(*code, false)).collect();
        self.push_group(&events);
    }

    /// Takes the oldest group.
    pub fn pop(&mut self) -> Option<Group> {
        let group = self.groups.pop_front()?;
        self.length -= group.len();
        Some(group)
    }

    /// Forgets everything, as after a reset of the device.
    pub fn clear(&mut self) {
        self.groups.clear();
        self.length = 0;
        self.down.clear();
    }

    fn push_group(&mut self, events: &[InputEvent]) -> bool {
        let mut events: Vec<_> =
            events.iter().copied().filter(|event| self.is_news(*event)).collect();
        if events.is_empty() {
            return true;
        }
        if self.merge(&events) {
            return true;
        }
        let mut complete = true;
        if self.length + events.len() >= LIMIT {
            self.drop_movements();
        }
        if self.length + events.len() >= LIMIT {
            let before = events.len();
            events.retain(|event| event.kind == EV_KEY && event.value == 0);
            complete = events.len() == before;
            if events.is_empty() {
                return false;
            }
        }
        for event in events.iter().filter(|event| event.kind == EV_KEY) {
            if event.value == 0 {
                self.down.remove(&event.code);
            } else {
                self.down.insert(event.code);
            }
        }
        events.push(InputEvent::SYN);
        self.length += events.len();
        self.groups.push_back(events.into());
        complete
    }

    /// Whether the guest would learn something from `event`.
    fn is_news(&self, event: InputEvent) -> bool {
        if !self.kind.has(event.kind, event.code) {
            return false;
        }
        match event.kind {
            EV_KEY => (event.value != 0) != self.down.contains(&event.code),
            EV_REL => event.value != 0,
            EV_ABS => true,
            _ => false,
        }
    }

    /// Merges a movement into the newest group if that is one, too.
    fn merge(&mut self, events: &[InputEvent]) -> bool {
        let Some(last) = self.groups.back_mut() else { return false };
        if !is_movement(events.iter()) || !is_movement(last.iter()) {
            return false;
        }
        for event in events {
            match last.iter_mut().find(|old| (old.kind, old.code) == (event.kind, event.code)) {
                Some(old) if event.kind == EV_REL => {
                    old.value = old.value.saturating_add(event.value);
                }
                Some(old) => old.value = event.value,
                None => {
                    // One entry for each axis of the device at most.
                    last.push_front(*event);
                    self.length += 1;
                }
            }
        }
        true
    }

    fn drop_movements(&mut self) {
        self.groups.retain(|group| !is_movement(group.iter()));
        self.length = self.groups.iter().map(VecDeque::len).sum();
    }
}

fn is_movement<'a>(mut events: impl Iterator<Item = &'a InputEvent>) -> bool {
    events.all(|event| event.kind != EV_KEY)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(code: u16, pressed: bool) -> InputEvent {
        InputEvent::key(code, pressed)
    }

    fn drain(queue: &mut EventQueue) -> Vec<Vec<InputEvent>> {
        std::iter::from_fn(|| queue.pop()).map(Vec::from).collect()
    }

    #[test]
    fn movements_merge_and_keep_their_place_between_buttons() {
        let mut queue = EventQueue::new(InputKind::Tablet);
        let at = |x| InputEvent::absolute(ABS_X, x);
        let wheel = InputEvent::relative(REL_WHEEL, -1);
        assert!(queue.push(&[at(1)]));
        assert!(queue.push(&[at(2), InputEvent::SYN, wheel, InputEvent::SYN, wheel]));
        assert!(queue.push(&[key(BTN_LEFT, true)]));
        assert!(queue.push(&[at(3)]));
        assert!(queue.push(&[InputEvent::relative(REL_X, 5), key(KEY_ESC, true)]), "left out");
        let both = InputEvent::relative(REL_WHEEL, -2);
        assert_eq!(
            drain(&mut queue),
            [
                vec![both, at(2), InputEvent::SYN],
                vec![key(BTN_LEFT, true), InputEvent::SYN],
                vec![at(3), InputEvent::SYN],
            ]
        );
    }

    #[test]
    fn releases_are_never_lost_and_memory_is_bounded() {
        let mut queue = EventQueue::new(InputKind::Keyboard);
        assert!(queue.push(&[key(30, true)]));
        assert!(queue.push(&[key(30, true)]), "a repetition is the guest's business");
        assert_eq!(queue.length, 2);
        let mut accepted = 0;
        while queue.push(&[key(48, true)]) {
            assert!(queue.push(&[key(48, false)]));
            accepted += 1;
        }
        assert!(accepted > 100);
        assert!(queue.push(&[key(30, false)]), "the release has its place");
        for _ in 0..1000 {
            assert!(!queue.push(&[key(48, true)]));
            assert!(queue.push(&[key(48, false)]), "nothing to release");
        }
        assert!(queue.length < LIMIT + 8);
        let groups = drain(&mut queue);
        assert_eq!(groups.last().unwrap()[0], key(30, false));
        assert!(queue.down.is_empty());
    }

    #[test]
    fn movements_make_room_for_buttons() {
        let mut queue = EventQueue::new(InputKind::Mouse);
        let mut pushed = 0;
        while queue.length + 4 < LIMIT {
            pushed += 1;
            queue.push(&[InputEvent::relative(REL_X, 1)]);
            queue.push(&[key(BTN_LEFT, pushed % 2 == 1)]);
        }
        for _ in 0..8 {
            pushed += 1;
            assert!(queue.push(&[key(BTN_LEFT, pushed % 2 == 1)]));
        }
        let groups = drain(&mut queue);
        assert_eq!(groups.len(), pushed);
        assert!(groups.iter().all(|group| group[0].kind == EV_KEY));
    }

    #[test]
    fn release_all_lets_go_of_what_is_down() {
        let mut queue = EventQueue::new(InputKind::Keyboard);
        queue.push(&[key(KEY_ESC, true), key(KEY_UP, true)]);
        queue.pop();
        queue.release_all();
        queue.release_all();
        let expected = vec![key(KEY_ESC, false), key(KEY_UP, false), InputEvent::SYN];
        assert_eq!(drain(&mut queue), [expected]);
    }
}
