//! What each processor is doing, for `ctl status` and the log.
//!
//! A vCPU thread notes two words per exit, without a clock, a lock or a shared cache line. Who wants to
//! know since when it has been at it looks twice ([`Activities::look`], from the main loop). Where the
//! guest is, a vCPU thread tells when it is asked ([`Activities::ask`]): it is interrupted for that, so
//! one that does not answer is not in `KVM_RUN`.

use std::{
    fmt,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use devices::bus::Bus;

/// An exit that takes longer is worth a line in the log: the guest's processor stands still for so long.
const LONG: Duration = Duration::from_secs(5);

/// How long a vCPU thread may take to say where its guest is.
const ANSWER: Duration = Duration::from_millis(250);

/// Between two interruptions: a signal that arrives just before `KVM_RUN` is lost.
const INTERRUPTION: Duration = Duration::from_millis(5);

const BUSY: u64 = 1 << 63;
const PORT: u64 = 1 << 62;
const WRITE: u64 = 1 << 61;

/// An access of the guest's that leaves `KVM_RUN`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    /// To a port, not to memory.
    pub port: bool,
    /// Not a read.
    pub write: bool,
    /// Port number or guest physical address.
    pub address: u64,
}

impl Access {
    fn encode(self) -> u64 {
        let port = if self.port { PORT } else { 0 };
        let write = if self.write { WRITE } else { 0 };
        BUSY | port | write | (self.address & (WRITE - 1))
    }

    fn decode(word: u64) -> Option<Self> {
        (word & BUSY != 0).then_some(Self {
            port: word & PORT != 0,
            write: word & WRITE != 0,
            address: word & (WRITE - 1),
        })
    }
}

/// What a processor was found doing by its own thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Instruction pointer.
    pub rip: u64,
    /// Flags; bit 9: takes interrupts.
    pub rflags: u64,
    /// Page table.
    pub cr3: u64,
}

/// One processor.
#[derive(Debug, Default)]
pub struct Activity {
    ports: AtomicU64,
    mmio: AtomicU64,
    others: AtomicU64,
    /// [`Access::encode`] while an exit is handled, else 0.
    doing: AtomicU64,
    asked: AtomicBool,
    place: Mutex<Option<Place>>,
    answered: Condvar,
}

impl Activity {
    /// The guest has left `KVM_RUN` for `access`, which is handled from now on.
    pub fn begin(&self, access: Access) {
        let counter = if access.port { &self.ports } else { &self.mmio };
        // Only this processor's thread writes.
        counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        self.doing.store(access.encode(), Ordering::Relaxed);
    }

    /// It goes back.
    pub fn end(&self) {
        self.doing.store(0, Ordering::Relaxed);
    }

    /// `KVM_RUN` ended for another reason.
    pub fn other(&self) {
        self.others.store(self.others.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }

    /// For the processor's thread, after an interruption: somebody may want to know where it is.
    pub fn answer(&self, place: impl FnOnce() -> Option<Place>) {
        if self.asked.swap(false, Ordering::AcqRel) {
            *self.place() = place();
            self.answered.notify_all();
        }
    }

    fn place(&self) -> MutexGuard<'_, Option<Place>> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn exits(&self) -> Exits {
        Exits {
            ports: self.ports.load(Ordering::Relaxed),
            mmio: self.mmio.load(Ordering::Relaxed),
            others: self.others.load(Ordering::Relaxed),
        }
    }

    /// Where the guest is, if its thread says so within `limit`.
    fn ask(&self, interrupt: impl Fn(), limit: Duration) -> Option<Place> {
        let mut place = self.place();
        *place = None;
        self.asked.store(true, Ordering::Release);
        let end = Instant::now() + limit;
        while place.is_none() && Instant::now() < end {
            interrupt();
            let waited = self.answered.wait_timeout(place, INTERRUPTION);
            place = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        *place
    }
}

/// How often a processor left `KVM_RUN`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Exits {
    /// For ports.
    pub ports: u64,
    /// For memory that is none.
    pub mmio: u64,
    /// By signals and for everything else.
    pub others: u64,
}

impl std::ops::Add for Exits {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            ports: self.ports + other.ports,
            mmio: self.mmio + other.mmio,
            others: self.others + other.others,
        }
    }
}

/// What a processor does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Its exits so far.
    pub exits: Exits,
    /// The exit that is being handled: which register of which device, and for how long at least.
    pub handling: Option<(String, Duration)>,
    /// Where its thread found it, unless that does not answer.
    pub place: Option<Place>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.handling, &self.place) {
            (Some((what, time)), _) => write!(f, "{what} for {} s", time.as_secs())?,
            (None, Some(place)) => {
                let interrupts = if place.rflags & 1 << 9 == 0 { ", interrupts off" } else { "" };
                write!(f, "in the guest at {:#x}{interrupts}", place.rip)?;
            }
            (None, None) => f.write_str("its thread does not answer")?,
        }
        let Exits { ports, mmio, others } = self.exits;
        write!(f, "; exits: {ports} ports, {mmio} memory, {others} others")
    }
}

/// Interrupts the thread of a processor.
pub type Interrupt = dyn Fn(usize) + Send + Sync;

/// What one look found, to compare the next one with.
#[derive(Debug, Clone, Copy)]
struct Seen {
    exits: Exits,
    since: Instant,
    told: bool,
}

/// All processors of a machine.
pub struct Activities {
    processors: Vec<Arc<Activity>>,
    seen: Mutex<Vec<Option<Seen>>>,
    ports: Arc<Bus>,
    mmio: Arc<Bus>,
    interrupt: OnceLock<Box<Interrupt>>,
    /// One question at a time.
    asking: Mutex<()>,
}

impl fmt::Debug for Activities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Activities").field("processors", &self.processors).finish_non_exhaustive()
    }
}

impl Activities {
    /// Of `count` processors.
    pub fn new(count: u32, ports: &Arc<Bus>, mmio: &Arc<Bus>) -> Arc<Self> {
        let processors: Vec<_> = (0..count).map(|_| Arc::default()).collect();
        let seen = Mutex::new(vec![None; processors.len()]);
        Arc::new(Self {
            processors,
            seen,
            ports: ports.clone(),
            mmio: mmio.clone(),
            interrupt: OnceLock::new(),
            asking: Mutex::default(),
        })
    }

    /// That of processor `id`.
    pub fn of(&self, id: usize) -> Arc<Activity> {
        self.processors.get(id).cloned().unwrap_or_default()
    }

    /// How to interrupt processors, once they run.
    pub fn interrupted_by(&self, interrupt: Box<Interrupt>) {
        let _ = self.interrupt.set(interrupt);
    }

    /// The exits of all.
    pub fn exits(&self) -> Exits {
        self.processors.iter().fold(Exits::default(), |sum, one| sum + one.exits())
    }

    /// Looks what everybody does; an exit that takes long is logged, once.
    pub fn look(&self, now: Instant) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        for (id, (activity, seen)) in self.processors.iter().zip(seen.iter_mut()).enumerate() {
            let Some((access, time)) = notice(activity, seen, now) else { continue };
            let Some(seen) = seen.as_mut().filter(|seen| !seen.told && time >= LONG) else {
                continue;
            };
            seen.told = true;
            tracing::warn!(
                cpu = id,
                seconds = time.as_secs(),
                "a processor of the guest stands still: {}",
                self.describe(access)
            );
        }
    }

    /// What everybody does. Takes a quarter of a second for each thread that does not answer.
    pub fn ask(&self) -> Vec<Report> {
        self.ask_for(ANSWER)
    }

    fn ask_for(&self, limit: Duration) -> Vec<Report> {
        let _one = self.asking.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let mut handling = Vec::new();
        {
            let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
            for (activity, seen) in self.processors.iter().zip(seen.iter_mut()) {
                handling.push(notice(activity, seen, now));
            }
        }
        let mut reports = Vec::new();
        for (id, (activity, handling)) in self.processors.iter().zip(handling).enumerate() {
            let interrupt = self.interrupt.get();
            let place = interrupt.and_then(|interrupt| activity.ask(|| interrupt(id), limit));
            // Who has answered is done with what he was seen doing.
            let handling = handling.filter(|_| place.is_none());
            let handling = handling.map(|(access, time)| (self.describe(access), time));
            reports.push(Report { exits: activity.exits(), handling, place });
        }
        reports
    }

    fn describe(&self, access: Access) -> String {
        let Access { port, write, address } = access;
        let bus = if port { &self.ports } else { &self.mmio };
        let way = if write { "write to" } else { "read of" };
        let kind = if port { "port " } else { "" };
        let device = bus.describe(address).unwrap_or_else(|| "nobody".to_owned());
        format!("{way} {kind}{address:#x} ({device})")
    }
}

/// What a processor handles, and since when it has been seen doing so.
fn notice(
    activity: &Activity,
    seen: &mut Option<Seen>,
    now: Instant,
) -> Option<(Access, Duration)> {
    let Some(access) = Access::decode(activity.doing.load(Ordering::Relaxed)) else {
        *seen = None;
        return None;
    };
    let exits = activity.exits();
    let seen = match seen {
        Some(seen) if seen.exits == exits => seen,
        _ => seen.insert(Seen { exits, since: now, told: false }),
    };
    Some((access, now.saturating_duration_since(seen.since)))
}

#[cfg(test)]
mod tests {
    use devices::bus::BusDevice;

    use super::*;

    struct Device;

    impl BusDevice for Device {
        fn read(&self, _: u64, _: &mut [u8]) {}

        fn write(&self, _: u64, _: &[u8]) {}

        fn describe(&self, offset: u64) -> String {
            format!("toaster, register {offset}")
        }
    }

    fn one() -> (Arc<Activities>, Arc<Activity>) {
        let mmio = Arc::new(Bus::new());
        mmio.insert(0x1000, 16, Arc::new(Device)).unwrap();
        let all = Activities::new(1, &Arc::new(Bus::new()), &mmio);
        let first = all.of(0);
        (all, first)
    }

    #[test]
    fn an_exit_that_lasts_is_seen_with_its_device() {
        let (all, activity) = one();
        let access = Access { port: false, write: true, address: 0x1004 };
        activity.begin(access);
        let begin = Instant::now();
        all.look(begin);
        let mut seen = all.seen.lock().unwrap().clone();
        assert!(!seen.remove(0).unwrap().told);
        all.look(begin + LONG);
        assert!(all.seen.lock().unwrap()[0].unwrap().told, "and logged");
        let [report] = &all.ask()[..] else { panic!("one processor") };
        assert_eq!(report.handling.as_ref().unwrap().0, "write to 0x1004 (toaster, register 4)");
        assert_eq!(report.exits, Exits { mmio: 1, ..Exits::default() });
        // The next one is another one, even if it is the same access.
        activity.end();
        activity.begin(access);
        all.look(begin + 2 * LONG);
        assert!(!all.seen.lock().unwrap()[0].unwrap().told);
        activity.end();
        all.look(begin + 3 * LONG);
        assert!(all.seen.lock().unwrap()[0].is_none());
    }

    #[test]
    fn a_processor_tells_where_it_is_when_interrupted() {
        let (all, activity) = one();
        let [report] = &all.ask()[..] else { panic!("one processor") };
        assert_eq!(
            report.to_string(),
            "its thread does not answer; exits: 0 ports, 0 memory, 0 others"
        );
        all.interrupted_by(Box::new(move |id| {
            let activity = activity.clone();
            // Another thread, as it would be.
            std::thread::spawn(move || {
                activity.other();
                activity.answer(|| Some(Place { rip: 0x10 + id as u64, rflags: 2, cr3: 0 }));
            });
        }));
        // However busy the machine is.
        let [report] = &all.ask_for(Duration::from_secs(60))[..] else { panic!("one processor") };
        assert_eq!(report.place, Some(Place { rip: 0x10, rflags: 2, cr3: 0 }));
        assert!(report.to_string().starts_with("in the guest at 0x10, interrupts off; exits: 0 "));
    }
}
