//! Which processes are traced.

use aya_ebpf::{helpers::bpf_get_current_pid_tgid, macros::map, maps::HashMap};
use stallscope_records::role;

/// Traced processes: thread group id to [`role`]. The agent adds them; [`crate::procs`] adds their children and takes
/// out the dead.
#[map]
pub(crate) static PROCESSES: HashMap<u32, u32> = HashMap::with_max_entries(8192, 0);

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
    PROCESSES.get_ptr(tgid).is_some()
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
}

/// Forgets a dead process.
#[inline(always)]
pub(crate) fn forget(tgid: u32) {
    let _ = PROCESSES.remove(tgid);
}
