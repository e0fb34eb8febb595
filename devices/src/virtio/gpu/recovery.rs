//! Life and death of the back end: the machine outlives it.
//!
//! ```text
//!   build ──▶ connected ──▶ died ──(back-off)──▶ another process: connects, gets what the last one
//!                 ▲                              kept, resumes the queues ──┐
//!                 └─────────────────────────────────────────────────────────┘
//! ```
//!
//! While there is none, commands wait in the queues; where that would take long, they are refused
//! ([`super::orphan`]), except those of a driver that starts in the meantime. A back end that we did not start, or that keeps nothing for a successor, gets
//! none: its commands are refused from then on.

use std::{
    collections::VecDeque,
    io,
    os::unix::net::UnixStream,
    path::Path,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use super::{
    display::Display,
    orphan::Refuser,
    process::{self, BackEndProcess, Launcher},
    server::Watch,
    vhost_user::{Inflight, Start, VhostUser},
};
use virtio_queue::QueueT;

use crate::{
    GuestMemory,
    virtio::{
        device::{ActivateError, Activation, ActiveQueue, VirtioInterrupt},
        registry::BuildError,
        vhost::VhostError,
        worker::Worker,
    },
};

/// Longer than this no command of the guest waits for a back end.
const GUEST_PATIENCE: Duration = Duration::from_secs(1);

/// The features that the driver uses of the device, not of its transport (VIRTIO 1.3 §2.2).
const DEVICE_FEATURES: u64 = (1 << 24) - 1;

/// How often a back end that dies is started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RestartPolicy {
    /// So often within [`window`](Self::window) at once.
    pub quick: usize,
    /// For counting deaths.
    pub window: Duration,
    /// The pause before one more, doubled each time.
    pub pause: Duration,
    /// The longest pause.
    pub longest_pause: Duration,
}

impl Default for RestartPolicy {
    /// Three per minute at once, then after 5, 10, 20, 30, 30, … seconds.
    fn default() -> Self {
        Self {
            quick: 3,
            window: Duration::from_secs(60),
            pause: Duration::from_secs(5),
            longest_pause: Duration::from_secs(30),
        }
    }
}

/// When to start again.
struct BackOff {
    policy: RestartPolicy,
    quick: VecDeque<Instant>,
    pause: Duration,
}

impl BackOff {
    fn new(policy: RestartPolicy) -> Self {
        Self { policy, quick: VecDeque::new(), pause: policy.pause }
    }

    /// How long to wait before the next start.
    fn next(&mut self, now: Instant) -> Duration {
        let RestartPolicy { quick, window, pause, longest_pause } = self.policy;
        while self.quick.front().is_some_and(|at| now.duration_since(*at) >= window) {
            self.quick.pop_front();
            self.pause = pause;
        }
        if self.quick.len() < quick {
            self.quick.push_back(now);
            return Duration::ZERO;
        }
        let pause = self.pause;
        self.pause = (pause * 2).min(longest_pause);
        pause
    }
}

/// What the driver set up.
struct Active {
    queues: Vec<ActiveQueue>,
    features: u64,
    memory: Arc<GuestMemory>,
    interrupt: Arc<dyn VirtioInterrupt>,
}

impl Active {
    fn largest_queue(&self) -> u16 {
        self.queues.iter().map(|queue| queue.queue.size()).max().unwrap_or(1)
    }
}

#[derive(Default)]
struct State {
    // Dropped in this order: the connection first, then the process that waits for its end.
    vhost: Option<VhostUser>,
    process: Option<BackEndProcess>,
    /// What the back end keeps for its successor, since the driver started.
    inflight: Option<Inflight>,
    active: Option<Active>,
    refuser: Option<Worker<Refuser>>,
    /// The back end keeps nothing for a successor, so it gets none.
    heirless: bool,
    /// No back end will come any more.
    abandoned: bool,
}

#[derive(Default)]
struct Signal {
    /// The newest connection that ended by itself.
    died: u64,
    stop: bool,
    /// The end of the pause before the next start, while there is one.
    pause_until: Option<Instant>,
    /// Another process is being started; nobody minds if it is not.
    starting: bool,
}

/// The back end, seen from the device.
pub(super) struct BackEnd {
    display: Arc<Display>,
    watch: Arc<Watch>,
    /// `None`: somebody else starts it.
    launcher: Option<Launcher>,
    policy: RestartPolicy,
    /// Held while the back end is spoken to.
    state: Mutex<State>,
    /// Never held while something is waited for; taken after `state`.
    signal: Mutex<Signal>,
    changed: Condvar,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An error with its causes on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// The first connection is there.
pub(super) struct Connected {
    /// Virtio features of the back end.
    pub(super) features: u64,
    /// Number of its capability sets.
    pub(super) capsets: u32,
}

impl BackEnd {
    pub(super) fn new(
        display: Arc<Display>,
        watch: Arc<Watch>,
        launcher: Option<Launcher>,
        policy: RestartPolicy,
    ) -> Arc<Self> {
        let (state, signal, changed) = (Mutex::default(), Mutex::default(), Condvar::new());
        Arc::new(Self { display, watch, launcher, policy, state, signal, changed })
    }

    /// The connection of this number ended by itself.
    pub(super) fn died(&self, generation: u64) {
        lock(&self.signal).died = generation;
        self.changed.notify_all();
    }

    /// Connects to a back end for the first time: to one that listens at `path`, or to one that is
    /// started. `failed` makes an error of a reason.
    pub(super) fn connect(
        &self,
        path: Option<&Path>,
        failed: impl FnOnce(String) -> BuildError,
    ) -> Result<Connected, BuildError> {
        let (socket, process) = match (path, &self.launcher) {
            (Some(path), _) => (process::connect(path)?, None),
            (None, Some(launcher)) => launcher.start().map(|(s, process)| (s, Some(process)))?,
            (None, None) => return Err(failed("there is no program to start".to_owned())),
        };
        let mut process = process;
        let negotiated = self.negotiate(socket);
        if negotiated.is_err() {
            self.watch.hang_up();
            self.display.hang_up();
            if let Some(process) = &mut process {
                // It may be busy with its start, for longer than anybody wants to wait.
                process.kill();
            }
        }
        let vhost = negotiated.map_err(failed)?;
        let connected = Connected { features: vhost.features(), capsets: vhost.capsets() };
        let mut state = lock(&self.state);
        state.vhost = Some(vhost);
        state.process = process;
        Ok(connected)
    }

    /// Makes a GPU socket and negotiates.
    fn negotiate(&self, socket: UnixStream) -> Result<VhostUser, String> {
        let host = |error: io::Error| format!("the GPU socket cannot be set up: {error}");
        let duplicate = socket.try_clone().map_err(host)?;
        let (ours, theirs) = UnixStream::pair().map_err(host)?;
        let generation = self.display.connect(ours).map_err(host)?;
        self.watch.connected(duplicate, generation);
        // After that the end of the device ends the connection, too.
        if lock(&self.signal).stop {
            return Err("the machine ends".to_owned());
        }
        let successors = self.launcher.is_some();
        self.watch
            .guard_start(&self.display, || VhostUser::connect(socket, &theirs, successors))
            .map_err(|error| error.to_string())
    }

    /// The driver is ready.
    pub(super) fn activate(&self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, features, queues, interrupt } = activation;
        let active = Active { queues, features, memory: Arc::new(memory), interrupt };
        let mut guard = lock(&self.state);
        let state = &mut *guard;
        if state.abandoned {
            return Err(ActivateError::Backend("it has died".to_owned()));
        }
        // A violation by the driver before this one is history.
        self.watch.take_ring_error();
        self.display.set_driver(active.interrupt.clone(), GuestMemory::clone(&active.memory));
        let Some(vhost) = &mut state.vhost else {
            // Served when there is a back end again.
            state.active = Some(active);
            return Ok(());
        };
        let started = self.watch.guard(&self.display, || {
            state.inflight = vhost.make_inflight(active.largest_queue())?;
            state.heirless = state.inflight.is_none();
            self.start(vhost, &active, Start::Fresh)
        });
        match started {
            Ok(()) => {
                state.active = Some(active);
                Ok(())
            }
            Err(error) if self.launcher.is_some() => {
                // Whether it died or does not answer: another one is started, and served.
                tracing::error!(%error, "the GPU's back end does not take the queues");
                self.watch.hang_up();
                state.active = Some(active);
                Ok(())
            }
            Err(error) => {
                self.display.forget_driver();
                Err(ActivateError::Backend(error.to_string()))
            }
        }
    }

    fn start(&self, vhost: &mut VhostUser, active: &Active, how: Start) -> Result<(), VhostError> {
        let Active { queues, features, memory, interrupt } = active;
        vhost.start(*features, memory, queues, &**interrupt, self.watch.ring_error(), how)
    }

    /// The driver is gone. When this returns, nobody touches guest memory any more.
    pub(super) fn reset(&self) {
        let mut guard = lock(&self.state);
        let state = &mut *guard;
        if let Some(refuser) = state.refuser.take() {
            refuser.stop();
        }
        state.inflight = None;
        let Some(active) = state.active.take() else { return };
        // First: the back end answers what waits when it stops.
        self.display.forget_driver();
        if let Some(vhost) = &mut state.vhost {
            let indices = active.queues.iter().map(|queue| queue.index);
            if vhost.resets_devices() {
                self.display.expect_reset();
            }
            let stopped = self.watch.guard(&self.display, || vhost.stop(indices));
            if let Err(error) = stopped {
                tracing::warn!(%error, "the GPU's back end could not be stopped");
                self.watch.hang_up();
                if let Some(process) = &mut state.process {
                    process.kill();
                }
            }
        }
        drop(guard);
        self.display.reset();
    }

    /// The number of the process, if it is ours.
    #[cfg(test)]
    pub(super) fn process_id(&self) -> Option<u32> {
        lock(&self.state).process.as_ref().map(BackEndProcess::id)
    }

    /// Ends the connection and the process.
    pub(super) fn close(&self) {
        self.watch.hang_up();
        let mut state = lock(&self.state);
        state.vhost = None;
        let process = state.process.take();
        drop(state);
        drop(process);
    }
}

impl State {
    /// Answers the driver in place of a back end.
    fn take_over(&mut self) {
        let Some(active) = self.active.as_ref().filter(|_| self.refuser.is_none()) else { return };
        let Active { queues, memory, interrupt, .. } = active;
        match Refuser::start(queues, memory, interrupt, self.inflight.as_ref()) {
            Ok(refuser) => self.refuser = Some(refuser),
            Err(error) => {
                tracing::error!(%error, "the GPU's queues cannot be taken over");
                interrupt.set_needs_reset();
            }
        }
    }

    /// Ends [`take_over`](Self::take_over); everything up to now is answered.
    fn hand_back(&mut self) {
        let Some(refuser) = self.refuser.take() else { return };
        refuser.stop();
        if let Some(inflight) = &self.inflight
            && let Err(error) = inflight.wipe()
        {
            tracing::warn!(%error, "the GPU's in-flight tables cannot be written");
            self.inflight = None;
        }
    }
}

/// The thread that starts back ends again. Ends when dropped.
pub(super) struct Supervisor {
    back_end: Arc<BackEnd>,
    thread: Option<JoinHandle<()>>,
}

impl Supervisor {
    pub(super) fn spawn(back_end: Arc<BackEnd>) -> io::Result<Self> {
        let for_thread = back_end.clone();
        let thread = thread::Builder::new()
            .name("gpu-supervisor".into())
            .spawn(move || for_thread.supervise())?;
        Ok(Self { back_end, thread: Some(thread) })
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        lock(&self.back_end.signal).stop = true;
        self.back_end.changed.notify_all();
        if lock(&self.back_end.signal).starting {
            self.back_end.watch.hang_up();
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that watches over the GPU's back end panicked");
        }
    }
}

impl BackEnd {
    fn supervise(&self) {
        let mut back_off = BackOff::new(self.policy);
        let mut connected = true;
        loop {
            if connected && !self.wait_for_death() {
                return;
            }
            let pause = back_off.next(Instant::now());
            let abandoned = {
                let mut state = lock(&self.state);
                state.vhost = None;
                // Says how it ended.
                state.process = None;
                state.abandoned = self.launcher.is_none() || state.heirless;
                if state.abandoned || pause >= GUEST_PATIENCE {
                    state.take_over();
                }
                state.abandoned
            };
            if connected {
                self.display.tell_back_end(false);
            }
            let Some(launcher) = self.launcher.as_ref().filter(|_| !abandoned) else { return };
            if !pause.is_zero() {
                let seconds = pause.as_secs_f32();
                tracing::error!(
                    seconds,
                    "drago-gpu ended too often; the next one starts after a pause"
                );
            }
            if !self.pause(pause) {
                return;
            }
            connected = self.restart(launcher);
        }
    }

    /// Waits until the present connection has died; `false` if the device ends.
    fn wait_for_death(&self) -> bool {
        let mut signal = lock(&self.signal);
        loop {
            if signal.stop {
                return false;
            }
            if signal.died >= self.display.generation() {
                return true;
            }
            signal = self.changed.wait(signal).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits; `false` if the device ends.
    fn pause(&self, pause: Duration) -> bool {
        let mut signal = lock(&self.signal);
        let until = *signal.pause_until.insert(Instant::now() + pause);
        self.changed.notify_all();
        loop {
            let until = signal.pause_until.unwrap_or(until);
            let left = until.saturating_duration_since(Instant::now());
            if signal.stop || left.is_zero() {
                signal.pause_until = None;
                return !signal.stop;
            }
            let (guard, _) =
                self.changed.wait_timeout(signal, left).unwrap_or_else(PoisonError::into_inner);
            signal = guard;
        }
    }

    /// Waits for a pause and ends it.
    #[cfg(test)]
    pub(super) fn end_pause(&self) {
        let signal = lock(&self.signal);
        let mut signal = self
            .changed
            .wait_while(signal, |signal| signal.pause_until.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        signal.pause_until = Some(Instant::now());
        self.changed.notify_all();
    }

    /// Starts another process and lets it resume; whether there is a connection now.
    fn restart(&self, launcher: &Launcher) -> bool {
        match self.try_restart(launcher) {
            Ok(()) => {
                tracing::warn!("another drago-gpu has taken over");
                self.display.tell_back_end(true);
                true
            }
            Err(_) if lock(&self.signal).stop => false,
            Err(reason) => {
                tracing::error!(reason, "drago-gpu could not be started again");
                false
            }
        }
    }

    fn try_restart(&self, launcher: &Launcher) -> Result<(), String> {
        let (socket, mut process) = launcher.start().map_err(|error| chain(&error))?;
        // Its start may take long; the device goes on meanwhile.
        lock(&self.signal).starting = true;
        let negotiated = self.negotiate(socket);
        lock(&self.signal).starting = false;
        let mut state = lock(&self.state);
        let resumed = negotiated.and_then(|mut vhost| {
            self.take_queues(&mut vhost, &mut state)?;
            Ok(vhost)
        });
        match resumed {
            Ok(vhost) => {
                state.vhost = Some(vhost);
                state.process = Some(process);
                Ok(())
            }
            Err(reason) => {
                self.watch.hang_up();
                self.display.hang_up();
                process.kill();
                Err(reason)
            }
        }
    }

    fn take_queues(&self, vhost: &mut VhostUser, state: &mut State) -> Result<(), String> {
        state.hand_back();
        let Some(active) = &state.active else { return Ok(()) };
        if active.features & DEVICE_FEATURES & !vhost.features() != 0 {
            return Err("it cannot do what the driver uses".to_owned());
        }
        self.watch
            .guard(&self.display, || self.resume(vhost, state))
            .map_err(|error| error.to_string())
    }

    fn resume(&self, vhost: &mut VhostUser, state: &mut State) -> Result<(), VhostError> {
        if let Some(inflight) = &state.inflight
            && let Err(error) = vhost.give_inflight(inflight)
        {
            if !error.is_refusal() {
                return Err(error);
            }
            tracing::error!("what the guest shows is lost with the last drago-gpu");
            state.take_over();
            state.hand_back();
            state.inflight = None;
        }
        let Some(active) = &state.active else { return Ok(()) };
        if state.inflight.is_none() {
            state.inflight = vhost.make_inflight(active.largest_queue())?;
        }
        self.start(vhost, active, Start::Resumed)?;
        for queue in &active.queues {
            // The last one may have died between an answer and its interrupt, or between a
            // notification and the answer.
            let _ = queue.kick.write(1);
            active.interrupt.signal_used(queue.index);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_times_at_once_and_then_slower_and_slower() {
        let mut back_off = BackOff::new(RestartPolicy::default());
        let start = Instant::now();
        let mut pauses = |at: u64, count: usize| {
            let now = start + Duration::from_secs(at);
            (0..count).map(|_| back_off.next(now).as_secs()).collect::<Vec<_>>()
        };
        assert_eq!(pauses(0, 8), [0, 0, 0, 5, 10, 20, 30, 30]);
        assert_eq!(pauses(59, 1), [30]);
        // A minute later it is trusted again.
        assert_eq!(pauses(61, 5), [0, 0, 0, 5, 10]);
    }
}
