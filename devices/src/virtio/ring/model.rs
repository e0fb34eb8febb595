//! A model of the notifications on one queue, all of whose states are looked at.
//!
//! Driver and device are transcribed step by step, a step being one access to memory that both sides see,
//! on a processor that keeps its stores back (x86-TSO: a store becomes visible later, a load does not wait
//! for it, a fence does). The driver is Linux' `virtio_ring.c`, the device is [`Ring`](super::Ring) as the
//! workers call it. A state in which nobody can do anything, while requests are not answered, is a lost
//! notification.
//!
//! That the model means something is seen from its mutations: without any one of the fences, or with the
//! steps in another order, it finds one.

use std::collections::HashSet;

/// Requests altogether; and how many the driver has under way at most.
const REQUESTS: u16 = 4;
const DEPTH: u16 = 2;
/// So that the indices wrap around.
const START: u16 = u16::MAX - 1;

/// What of the code is changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mutation {
    None,
    /// `Ring::needs_notification` looks at what the driver wants before the used index is visible.
    NoFenceBeforeUsedEvent,
    /// `Ring::enable_kicks` looks for buffers before its wish is visible.
    NoFenceAfterAvailEvent,
    /// It does not look for buffers.
    NoSecondLook,
    /// The driver's two fences.
    NoFenceBeforeAvailEvent,
    NoFenceAfterUsedEvent,
    /// The device forgets what was used since it looked last.
    ForgetsNews,
}

/// How a worker orders its calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    /// `notify_driver`, then `enable_kicks`: disks.
    NotifyFirst,
    /// `enable_kicks`, and on if there is more; then `notify_driver`: network cards.
    EnableFirst,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Driver {
    Idle,
    /// Requests were added: fence, then look whether the device wants to know.
    Fence,
    Kick,
    /// In the interrupt handler: look for used buffers.
    Reap,
    /// `virtqueue_enable_cb`: fence, then look again.
    EnableFence,
    EnableLook,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Device {
    Asleep,
    Pop,
    NotifyFence,
    Notify,
    Enable,
    EnableFence,
    EnableLook,
}

/// What both sides see, by index.
const AVAIL: usize = 0;
const USED: usize = 1;
const AVAIL_EVENT: usize = 2;
const USED_EVENT: usize = 3;

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct State {
    memory: [u16; 4],
    /// Stores of the driver and of the device that are not visible yet, oldest first.
    kept: [Vec<(usize, u16)>; 2],
    kick: bool,
    interrupt: bool,
    driver: Driver,
    /// Added, added when the device was told last, reaped.
    added: u16,
    told: u16,
    reaped: u16,
    device: Device,
    /// After notifying the device's worker sleeps: it comes from a request that was done in the pool.
    from_pool: bool,
    popped: u16,
    used: u16,
    notified: u16,
    /// Requests that a thread of the pool has.
    pool: u16,
}

impl State {
    fn new() -> Self {
        Self {
            memory: [START; 4],
            kept: Default::default(),
            kick: false,
            interrupt: false,
            driver: Driver::Idle,
            added: START,
            told: START,
            reaped: START,
            device: Device::Asleep,
            from_pool: false,
            popped: START,
            used: START,
            notified: START,
            pool: 0,
        }
    }

    fn store(&mut self, side: usize, at: usize, value: u16) {
        self.kept[side].push((at, value));
    }

    fn load(&self, side: usize, at: usize) -> u16 {
        let own = self.kept[side].iter().rfind(|(place, _)| *place == at);
        own.map_or(self.memory[at], |(_, value)| *value)
    }

    /// A fence is passed when nothing is kept back.
    fn may_pass(&self, side: usize, fence: bool) -> bool {
        !fence || self.kept[side].is_empty()
    }

    fn is_done(&self) -> bool {
        self.reaped == START.wrapping_add(REQUESTS)
    }

    /// All states that may come next.
    fn next(&self, order: Order, mutation: Mutation) -> Vec<Self> {
        let mut all = Vec::new();
        for side in 0..2 {
            if let Some((at, value)) = self.kept[side].first().copied() {
                let mut next = self.clone();
                next.kept[side].remove(0);
                next.memory[at] = value;
                all.push(next);
            }
        }
        self.driver_steps(mutation, &mut all);
        self.device_steps(order, mutation, &mut all);
        all
    }

    fn driver_steps(&self, mutation: Mutation, all: &mut Vec<Self>) {
        let mut step = |change: &dyn Fn(&mut Self)| {
            let mut next = self.clone();
            change(&mut next);
            all.push(next);
        };
        match self.driver {
            Driver::Idle => {
                if self.interrupt {
                    step(&|next| {
                        next.interrupt = false;
                        next.driver = Driver::Reap;
                    });
                }
                let room = self.added.wrapping_sub(self.reaped) < DEPTH;
                if self.added != START.wrapping_add(REQUESTS) && room {
                    step(&|next| {
                        next.added = next.added.wrapping_add(1);
                        next.store(0, AVAIL, next.added);
                        next.driver = Driver::Fence;
                    });
                }
            }
            Driver::Fence => {
                if self.may_pass(0, mutation != Mutation::NoFenceBeforeAvailEvent) {
                    step(&|next| next.driver = Driver::Kick);
                }
                // Another one before the device is told.
                let room = self.added.wrapping_sub(self.reaped) < DEPTH;
                if self.added != START.wrapping_add(REQUESTS) && room {
                    step(&|next| {
                        next.added = next.added.wrapping_add(1);
                        next.store(0, AVAIL, next.added);
                    });
                }
            }
            Driver::Kick => step(&|next| {
                next.kick |= is_wanted(next.load(0, AVAIL_EVENT), next.added, next.told);
                next.told = next.added;
                next.driver = Driver::Idle;
            }),
            Driver::Reap => step(&|next| {
                if next.load(0, USED) == next.reaped {
                    next.store(0, USED_EVENT, next.reaped);
                    next.driver = Driver::EnableFence;
                } else {
                    next.reaped = next.reaped.wrapping_add(1);
                    // `virtqueue_disable_cb`: some value that is not to come soon.
                    next.store(0, USED_EVENT, 0);
                }
            }),
            Driver::EnableFence => {
                if self.may_pass(0, mutation != Mutation::NoFenceAfterUsedEvent) {
                    step(&|next| next.driver = Driver::EnableLook);
                }
            }
            Driver::EnableLook => step(&|next| {
                let more = next.load(0, USED) != next.reaped;
                next.driver = if more { Driver::Reap } else { Driver::Idle };
            }),
        }
    }

    fn device_steps(&self, order: Order, mutation: Mutation, all: &mut Vec<Self>) {
        let mut step = |change: &dyn Fn(&mut Self)| {
            let mut next = self.clone();
            change(&mut next);
            all.push(next);
        };
        let complete = |next: &mut Self| {
            next.used = next.used.wrapping_add(1);
            next.store(1, USED, next.used);
        };
        let last = |next: &mut Self| {
            next.device = match order {
                _ if next.from_pool => Device::Asleep,
                Order::NotifyFirst => Device::Enable,
                Order::EnableFirst => Device::Asleep,
            };
        };
        match self.device {
            Device::Asleep => {
                if self.kick {
                    step(&|next| {
                        next.kick = false;
                        next.from_pool = false;
                        next.device = Device::Pop;
                    });
                }
                if self.pool > 0 {
                    step(&|next| {
                        next.pool -= 1;
                        complete(next);
                        next.from_pool = true;
                        next.device = Device::NotifyFence;
                    });
                }
            }
            Device::Pop => {
                if self.load(1, AVAIL) != self.popped {
                    step(&|next| {
                        next.popped = next.popped.wrapping_add(1);
                        complete(next);
                    });
                    step(&|next| {
                        next.popped = next.popped.wrapping_add(1);
                        next.pool += 1;
                    });
                } else {
                    step(&|next| {
                        next.device = match order {
                            Order::NotifyFirst => Device::NotifyFence,
                            Order::EnableFirst => Device::Enable,
                        };
                    });
                }
                // The end of a turn, whatever is left.
                if order == Order::NotifyFirst {
                    step(&|next| next.device = Device::NotifyFence);
                } else {
                    step(&|next| {
                        next.kick = true;
                        next.device = Device::NotifyFence;
                    });
                }
            }
            Device::NotifyFence => {
                if self.may_pass(1, mutation != Mutation::NoFenceBeforeUsedEvent) {
                    step(&|next| next.device = Device::Notify);
                }
            }
            Device::Notify => step(&|next| {
                let old = match mutation {
                    Mutation::ForgetsNews => next.used.wrapping_sub(1),
                    _ => next.notified,
                };
                if next.used != next.notified {
                    next.interrupt |= is_wanted(next.load(1, USED_EVENT), next.used, old);
                }
                next.notified = next.used;
                last(next);
            }),
            Device::Enable => step(&|next| {
                next.store(1, AVAIL_EVENT, next.popped);
                next.device = Device::EnableFence;
            }),
            Device::EnableFence => {
                if self.may_pass(1, mutation != Mutation::NoFenceAfterAvailEvent) {
                    step(&|next| next.device = Device::EnableLook);
                }
            }
            Device::EnableLook => step(&|next| {
                let more = next.load(1, AVAIL) != next.popped && mutation != Mutation::NoSecondLook;
                next.device = match (order, more) {
                    (Order::NotifyFirst, _) => {
                        next.kick |= more;
                        Device::Asleep
                    }
                    (Order::EnableFirst, true) => Device::Pop,
                    (Order::EnableFirst, false) => Device::NotifyFence,
                };
            }),
        }
    }
}

/// §2.7.7.1 and §2.7.10.1: whether `event` was passed on the way from `old` to `new`.
fn is_wanted(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// How many states there are, and one in which a notification is lost.
fn explore(order: Order, mutation: Mutation) -> (usize, Option<State>) {
    let mut seen = HashSet::from([State::new()]);
    let mut open = vec![State::new()];
    while let Some(state) = open.pop() {
        let next = state.next(order, mutation);
        if next.is_empty() && !state.is_done() {
            return (seen.len(), Some(state));
        }
        open.extend(next.into_iter().filter(|next| seen.insert(next.clone())));
    }
    (seen.len(), None)
}

#[test]
fn no_notification_is_lost_in_any_order_of_steps() {
    for order in [Order::NotifyFirst, Order::EnableFirst] {
        let (states, lost) = explore(order, Mutation::None);
        assert_eq!(lost, None, "{order:?}");
        assert!(states > 1000, "{order:?}: {states} states");
        for mutation in [
            Mutation::NoFenceBeforeUsedEvent,
            Mutation::NoFenceAfterAvailEvent,
            Mutation::NoSecondLook,
            Mutation::NoFenceBeforeAvailEvent,
            Mutation::NoFenceAfterUsedEvent,
            Mutation::ForgetsNews,
        ] {
            let (_, lost) = explore(order, mutation);
            assert!(lost.is_some(), "{order:?}: nothing is lost with {mutation:?}");
        }
    }
}
