//! Resource limits (getrlimit(2)).
//!
//! The address space is not limited: guest memory of a size that is not known yet gets mapped, and
//! graphics drivers reserve far more than they use. What can run away is the heap, which
//! `RLIMIT_DATA` counts: private writable memory. The number of processes is left to the filter of
//! system calls, because Linux counts all processes of the user.

use std::io;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::{Needs, Sandbox};

/// Code and data of this program, stacks of its threads, messages on their way.
const HEAP: u64 = 256 << 20;
/// A driver's own memory: shader compiler, command buffers; with llvmpipe all textures too.
const DRIVER_HEAP: u64 = 4 << 30;
/// Guest memory, queues, frames.
const DESCRIPTORS: u64 = 512;
/// Processes and threads of the render server. Linux counts them per user and user namespace, and it
/// gets one of its own where that is permitted.
const DRIVER_THREADS: u64 = 2048;
/// Also a buffer for each of the guest's.
const DRIVER_DESCRIPTORS: u64 = 8192;

/// Lowers the limits.
pub(super) fn apply(sandbox: &mut Sandbox, max_memory: u64) {
    let (heap, descriptors) = match sandbox.needs {
        Needs::Nothing => (HEAP, DESCRIPTORS),
        Needs::Driver { .. } | Needs::RenderServer { .. } => (DRIVER_HEAP, DRIVER_DESCRIPTORS),
    };
    let all = [
        // A dump would hold the guest's memory.
        (Resource::Core, 0),
        (Resource::Data, heap.saturating_add(max_memory)),
        (Resource::Nofile, descriptors),
    ];
    let processes = matches!(sandbox.needs, Needs::RenderServer { .. })
        .then_some((Resource::Nproc, DRIVER_THREADS));
    let all = all.into_iter().chain(processes);
    let result = all.into_iter().try_for_each(|(resource, limit)| lower(resource, limit));
    sandbox.note("limits", result.map_err(io::Error::from));
}

fn lower(resource: Resource, limit: u64) -> rustix::io::Result<()> {
    let now = getrlimit(resource).maximum.unwrap_or(u64::MAX);
    let limit = Some(limit.min(now));
    setrlimit(resource, Rlimit { current: limit, maximum: limit })
}
