//! Commands that are executed but not done: answered when the renderer says so.
//!
//! A driver takes the answer to one fence for the answer to all earlier ones of the same timeline, so
//! answers keep their order there; between timelines there is none. A command is entered here before
//! its fence is made, because a fence may retire before the call that makes it returns.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
};

use vm_memory::GuestAddressSpace;

use crate::{
    renderer::{FenceSink, Timeline},
    ring::{Memory, Request, Ring},
};

struct Held {
    id: u64,
    request: Request,
    answer: Vec<u8>,
    done: bool,
}

#[derive(Default)]
struct State {
    ring: Option<(Ring, Memory)>,
    last: u64,
    timelines: HashMap<Timeline, VecDeque<Held>>,
}

impl State {
    /// Answers what is done, up to the first that is not.
    fn answer(&mut self, timeline: Timeline) {
        let Some(held) = self.timelines.get_mut(&timeline) else { return };
        while held.front().is_some_and(|first| first.done) {
            if let (Some(first), Some((ring, memory))) = (held.pop_front(), &self.ring) {
                first.request.answer(ring, &memory.memory(), &first.answer);
            }
        }
        if held.is_empty() {
            self.timelines.remove(&timeline);
        }
    }

    fn answer_all(&mut self, timeline: Timeline) {
        self.timelines.get_mut(&timeline).into_iter().flatten().for_each(|held| held.done = true);
        self.answer(timeline);
    }
}

/// What waits for fences.
#[derive(Default)]
pub(super) struct Fences(Mutex<State>);

impl Fences {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers go into this ring from now on.
    pub(super) fn start(&self, ring: &Ring, memory: &Memory) {
        self.lock().ring = Some((ring.clone(), memory.clone()));
    }

    /// Answers everything at once; afterwards no other thread touches the ring or guest memory.
    pub(super) fn stop(&self) {
        let mut state = self.lock();
        let timelines: Vec<Timeline> = state.timelines.keys().copied().collect();
        timelines.into_iter().for_each(|timeline| state.answer_all(timeline));
        state.ring = None;
    }

    /// Whether something waits there.
    pub(super) fn is_busy(&self, timeline: Timeline) -> bool {
        self.lock().timelines.contains_key(&timeline)
    }

    /// Enters a command that waits for a fence, or, `done`, for those before it. Returns the number
    /// its fence must have.
    pub(super) fn hold(
        &self,
        timeline: Timeline,
        mut request: Request,
        answer: Vec<u8>,
        done: bool,
    ) -> u64 {
        // Executed: only where its answer goes still matters, and it may have been a big one.
        request.command = Vec::new();
        let mut state = self.lock();
        state.last += 1;
        if state.last as u32 == 0 {
            // Not a number on the global timeline, where only 32 bits count.
            state.last += 1;
        }
        let id = state.last;
        state.timelines.entry(timeline).or_default().push_back(Held { id, request, answer, done });
        // All before it may have been answered in the meantime.
        state.answer(timeline);
        id
    }

    /// The fence could not be made: its command waits for nothing but those before it.
    pub(super) fn no_fence(&self, timeline: Timeline, id: u64) {
        let mut state = self.lock();
        let held = state.timelines.get_mut(&timeline).into_iter().flatten();
        held.filter(|held| held.id == id).for_each(|held| held.done = true);
        state.answer(timeline);
    }

    /// A context is gone, and with it the fences on its rings.
    pub(super) fn forget_context(&self, gone: u32) {
        let mut state = self.lock();
        let of_context = |timeline: &Timeline| matches!(timeline, Timeline::Ring { context, .. } if *context == gone);
        let timelines: Vec<Timeline> = state.timelines.keys().copied().filter(of_context).collect();
        timelines.into_iter().for_each(|timeline| state.answer_all(timeline));
    }
}

impl FenceSink for Fences {
    fn retired(&self, timeline: Timeline, id: u64) {
        let mut state = self.lock();
        let Some(held) = state.timelines.get_mut(&timeline) else { return };
        let is = |held: &Held| match timeline {
            Timeline::Global => held.id as u32 == id as u32,
            Timeline::Ring { .. } => held.id == id,
        };
        let Some(index) = held.iter().position(is) else { return };
        held.iter_mut().take(index + 1).for_each(|held| held.done = true);
        state.answer(timeline);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Without a ring, what is answered is what is no longer held.
    fn held(fences: &Fences, timeline: Timeline) -> Vec<u64> {
        fences.lock().timelines.get(&timeline).into_iter().flatten().map(|h| h.id).collect()
    }

    fn hold(fences: &Fences, timeline: Timeline, done: bool) -> u64 {
        fences.hold(timeline, Request::empty(), Vec::new(), done)
    }

    const RING: Timeline = Timeline::Ring { context: 3, ring: 1 };

    #[test]
    fn a_timeline_keeps_its_order_and_others_do_not_wait() {
        let fences = Fences::default();
        let ids = [(); 3].map(|()| hold(&fences, Timeline::Global, false));
        let other = hold(&fences, RING, false);
        fences.retired(RING, other);
        assert!(held(&fences, RING).is_empty());
        // A fence that could not be made waits for those before it.
        fences.no_fence(Timeline::Global, ids[1]);
        assert_eq!(held(&fences, Timeline::Global), ids);
        let done = hold(&fences, Timeline::Global, true);
        fences.retired(Timeline::Global, ids[0]);
        assert_eq!(held(&fences, Timeline::Global), [ids[2], done]);
        fences.retired(Timeline::Global, ids[2]);
        assert!(!fences.is_busy(Timeline::Global));
        // With nothing before it there is nothing to wait for.
        hold(&fences, Timeline::Global, true);
        assert!(!fences.is_busy(Timeline::Global));
    }

    #[test]
    fn one_fence_stands_for_all_before_it() {
        let fences = Fences::default();
        let ids = [(); 3].map(|()| hold(&fences, Timeline::Global, false));
        // Fences that nobody knows change nothing.
        fences.retired(Timeline::Global, ids[2] + 1);
        fences.retired(RING, ids[2]);
        assert_eq!(held(&fences, Timeline::Global).len(), 3);
        fences.retired(Timeline::Global, ids[1]);
        assert_eq!(held(&fences, Timeline::Global), [ids[2]]);
    }

    #[test]
    fn numbers_survive_the_end_of_32_bits() {
        let fences = Fences::default();
        fences.lock().last = u64::from(u32::MAX) - 1;
        let ids = [(); 3].map(|()| hold(&fences, Timeline::Global, false));
        assert_eq!(ids, [0xffff_ffff, 0x1_0000_0001, 0x1_0000_0002]);
        // The library counts in 32 bits.
        fences.retired(Timeline::Global, 1);
        assert_eq!(held(&fences, Timeline::Global), [ids[2]]);
    }

    #[test]
    fn nothing_is_held_for_what_is_gone() {
        let fences = Fences::default();
        hold(&fences, RING, false);
        hold(&fences, Timeline::Ring { context: 4, ring: 1 }, false);
        hold(&fences, Timeline::Global, false);
        fences.forget_context(3);
        assert_eq!(fences.lock().timelines.len(), 2);
        fences.stop();
        assert!(fences.lock().timelines.is_empty());
    }
}
