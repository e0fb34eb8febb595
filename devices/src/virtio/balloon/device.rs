//! Configuration space, life cycle and handle of the balloon.

use std::{
    fmt, io,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{
    PAGES_PER_MIB,
    worker::{BalloonWorker, Role},
};
use crate::virtio::{
    ActivateError, Activation, DeviceType, RING_FEATURES, VirtioDevice, VirtioInterrupt,
    ring::Ring, worker::Worker,
};

// Feature bits, §5.5.3.
pub(super) const F_STATS_VQ: u64 = 1 << 1;
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
pub(super) const F_FREE_PAGE_HINT: u64 = 1 << 3;
pub(super) const F_PAGE_POISON: u64 = 1 << 4;
pub(super) const F_REPORTING: u64 = 1 << 5;

/// Linux wants at least 32 entries for reporting.
const QUEUE_SIZES: [u16; 5] = [128; 5];

/// What the guest says about its memory (§5.5.6.3); in bytes and counts since its boot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BalloonStats {
    /// Memory swapped in.
    pub swap_in: Option<u64>,
    /// Memory swapped out.
    pub swap_out: Option<u64>,
    /// Major page faults.
    pub major_faults: Option<u64>,
    /// Minor page faults.
    pub minor_faults: Option<u64>,
    /// Memory not used for anything.
    pub free: Option<u64>,
    /// All memory the guest has.
    pub total: Option<u64>,
    /// Memory that could be had without swapping.
    pub available: Option<u64>,
    /// Memory that caches files and could be reclaimed.
    pub disk_caches: Option<u64>,
}

impl BalloonStats {
    pub(super) fn set(&mut self, tag: u16, value: u64) {
        let field = match tag {
            0 => &mut self.swap_in,
            1 => &mut self.swap_out,
            2 => &mut self.major_faults,
            3 => &mut self.minor_faults,
            4 => &mut self.free,
            5 => &mut self.total,
            6 => &mut self.available,
            7 => &mut self.disk_caches,
            _ => return,
        };
        *field = Some(value);
    }
}

/// What device, worker and handle share.
pub(super) struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    /// Asks the worker for fresh statistics.
    pub(super) refresh: EventFd,
}

#[derive(Default)]
struct State {
    /// Pages the guest is to put into the balloon.
    target: u32,
    /// Pages that it says are in the balloon.
    actual: u32,
    /// What the guest fills free pages with.
    poison: u32,
    stats: BalloonStats,
    discarded: u64,
    interrupt: Option<Arc<dyn VirtioInterrupt>>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_stats(&self, stats: BalloonStats) {
        self.state().stats = stats;
        self.changed.notify_all();
    }

    pub(super) fn add_discarded(&self, bytes: u64) {
        self.state().discarded += bytes;
    }

    /// Whether free pages must keep what is in them.
    pub(super) fn is_poisoned(&self) -> bool {
        self.state().poison != 0
    }
}

/// The balloon at run time. Clones are the same balloon.
#[derive(Clone)]
pub struct BalloonHandle(Arc<Shared>);

impl fmt::Debug for BalloonHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.0.state();
        f.debug_struct("BalloonHandle")
            .field("target", &state.target)
            .field("actual", &state.actual)
            .finish_non_exhaustive()
    }
}

impl BalloonHandle {
    /// Asks the guest to give up `mib` MiB in all. It does so at its own pace, and as far as it
    /// can. More than the guest has would only make it run out of memory: check before.
    pub fn set_size_mib(&self, mib: u32) {
        let mut state = self.0.state();
        state.target = mib.saturating_mul(PAGES_PER_MIB);
        let interrupt = state.interrupt.clone();
        drop(state);
        if let Some(interrupt) = interrupt {
            interrupt.signal_config_change();
        }
    }

    /// What the guest was asked for, in MiB.
    pub fn size_mib(&self) -> u32 {
        self.0.state().target / PAGES_PER_MIB
    }

    /// What the guest has given up, in MiB.
    pub fn actual_mib(&self) -> u32 {
        self.0.state().actual / PAGES_PER_MIB
    }

    /// Waits until the guest has given up as much as it was asked for, at most for `limit`.
    /// Returns what it has given up then, in MiB.
    pub fn wait_settled(&self, limit: Duration) -> u32 {
        let guard = self.0.state();
        let waited =
            self.0.changed.wait_timeout_while(guard, limit, |state| state.actual != state.target);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.actual / PAGES_PER_MIB
    }

    /// Bytes given back to the host since the start, by balloon and reports together; pages that
    /// the guest used again in between count each time.
    pub fn discarded_bytes(&self) -> u64 {
        self.0.state().discarded
    }

    /// The guest's last statistics.
    pub fn stats(&self) -> BalloonStats {
        self.0.state().stats
    }

    /// Asks the guest for fresh statistics; they are in [`stats`](Self::stats) some time later.
    pub fn request_stats(&self) {
        if let Err(error) = self.0.refresh.write(1) {
            tracing::error!(%error, "the balloon's worker cannot be woken");
        }
    }
}

/// The device.
pub(super) struct Balloon {
    shared: Arc<Shared>,
    deflate_on_oom: bool,
    worker: Option<Worker<BalloonWorker>>,
}

impl Balloon {
    pub(super) fn new(target: u32, deflate_on_oom: bool) -> io::Result<(Self, BalloonHandle)> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State { target, ..State::default() }),
            changed: Condvar::new(),
            refresh: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        });
        let handle = BalloonHandle(shared.clone());
        Ok((Self { shared, deflate_on_oom, worker: None }, handle))
    }
}

/// Which queue is which. Queues of features that are not negotiated do not exist, and drivers
/// disagree whether the following ones keep their numbers (the specification) or move up (Linux):
/// so the enabled ones are counted off in order, which is right for both.
pub(super) fn roles(features: u64, enabled: &[u16]) -> Vec<(u16, Role)> {
    let extra =
        [(F_STATS_VQ, Role::Stats), (F_FREE_PAGE_HINT, Role::Hint), (F_REPORTING, Role::Reporting)];
    let mut extra = extra.into_iter().filter(|(bit, _)| features & bit != 0);
    let mut roles = Vec::new();
    for index in enabled {
        let role = match index {
            0 => Some(Role::Inflate),
            1 => Some(Role::Deflate),
            _ => extra.next().map(|(_, role)| role),
        };
        roles.extend(role.map(|role| (*index, role)));
    }
    roles
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> DeviceType {
        DeviceType::BALLOON
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        // Hinting is offered and never started: together with it and the statistics, the reporting
        // queue has the same number for all drivers.
        let oom = if self.deflate_on_oom { F_DEFLATE_ON_OOM } else { 0 };
        RING_FEATURES | F_STATS_VQ | F_FREE_PAGE_HINT | F_PAGE_POISON | F_REPORTING | oom
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let state = self.shared.state();
        // Target, actual, free page hint command (0: stop), poison value.
        let fields = [state.target, state.actual, 0, state.poison];
        let space = fields.into_iter().flat_map(u32::to_le_bytes);
        let skip = usize::try_from(offset).unwrap_or(usize::MAX);
        for (to, from) in data.iter_mut().zip(space.skip(skip)) {
            *to = from;
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let mut state = self.shared.state();
        let write = |field: u64, value: &mut u32| {
            let mut bytes = value.to_le_bytes();
            for (index, byte) in (field..).zip(&mut bytes) {
                let from = index.checked_sub(offset).and_then(|index| data.get(index as usize));
                *byte = from.copied().unwrap_or(*byte);
            }
            *value = u32::from_le_bytes(bytes);
        };
        write(4, &mut state.actual);
        write(12, &mut state.poison);
        drop(state);
        self.shared.changed.notify_all();
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, features, queues, interrupt } = activation;
        let memory = Arc::new(memory);
        let enabled: Vec<u16> = queues.iter().map(|active| active.index).collect();
        let roles = roles(features, &enabled);
        let rings = queues.into_iter().filter_map(|active| {
            let (_, role) = roles.iter().find(|(index, _)| *index == active.index)?;
            Some((*role, Ring::new("balloon", active, &memory, &interrupt)))
        });
        let worker = BalloonWorker::new(self.shared.clone(), memory.clone(), rings.collect());
        self.shared.state().interrupt = Some(interrupt.clone());
        let worker = Worker::spawn("vio-balloon", worker)
            .map_err(|error| ActivateError::Host("the balloon's worker thread", error))?;
        self.worker = Some(worker);
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(worker) = self.worker.take() {
            worker.stop();
        }
        let mut state = self.shared.state();
        state.interrupt = None;
        (state.actual, state.poison) = (0, 0);
        drop(state);
        self.shared.changed.notify_all();
    }
}

impl Drop for Balloon {
    fn drop(&mut self) {
        self.reset();
    }
}
