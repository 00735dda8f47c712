//! Which processes are traced.

use aya_ebpf::{
    helpers::bpf_get_current_pid_tgid,
    macros::map,
    maps::{Array, HashMap},
};
use stallscope_records::{PROCESS_HINTS, process_hint, role};

/// Traced processes: thread group id to [`role`]. The agent adds them; [`crate::procs`] adds their children and takes
/// out the dead.
#[map]
pub(crate) static PROCESSES: HashMap<u32, u32> = HashMap::with_max_entries(8192, 0);

/// Whether a traced process may fall into the slot: nearly every process of the node is told from the traced ones by one
/// load, without a hash. The agent sets and clears slots as it adds and removes processes.
#[map]
static HINTS: Array<u32> = Array::with_max_entries(PROCESS_HINTS, 0);

/// A thread, as the kernel names it: thread group id in the upper half, thread id in the lower.
#[derive(Clone, Copy)]
pub(crate) struct Task(pub(crate) u64);

impl Task {
    #[inline(always)]
    pub(crate) fn current() -> Self {
        Self(bpf_get_current_pid_tgid())
    }

    #[inline(always)]
    pub(crate) fn tgid(self) -> u32 {
        (self.0 >> 32) as u32
    }

    #[inline(always)]
    pub(crate) fn tid(self) -> u32 {
        self.0 as u32
    }
}

/// Whether the thread group is traced.
#[inline(always)]
pub(crate) fn is_traced(tgid: u32) -> bool {
    // SAFETY: the slot is a whole word; being late by one write is no harm.
    let hinted = HINTS
        .get_ptr(process_hint(tgid))
        .is_some_and(|hint| unsafe { *hint } != 0);
    hinted && PROCESSES.get_ptr(tgid).is_some()
}

/// The current thread, if its process is traced.
#[inline(always)]
pub(crate) fn traced() -> Option<Task> {
    let task = Task::current();
    is_traced(task.tgid()).then_some(task)
}

/// Starts tracing a child of a traced process.
#[inline(always)]
pub(crate) fn trace_child(tgid: u32) {
    // A full map leaves the child untraced; the agent sees it in its next scan and reports the limit.
    let _ = PROCESSES.insert(tgid, role::HELPER, 0);
    if let Some(hint) = HINTS.get_ptr_mut(process_hint(tgid)) {
        // SAFETY: every writer in the kernel writes the same value.
        unsafe { *hint = 1 };
    }
}

/// Forgets a dead process.
#[inline(always)]
pub(crate) fn forget(tgid: u32) {
    let _ = PROCESSES.remove(tgid);
}
