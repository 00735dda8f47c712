//! Threads of traced processes off the CPU: why, how long, and how much of it waiting for a CPU.

use aya_ebpf::{
    helpers::bpf_ktime_get_ns,
    macros::{map, tracepoint},
    maps::HashMap,
    programs::TracePointContext,
};
use stallscope_records::{Head, Kind, Ring, abi::OffCpuReason, record::OffCpu};

use crate::{
    emit::emit,
    filter::{Task, is_traced},
    hints::Hints,
    settings::{OFF_CPU_MIN_NS, SWITCH_NEXT_PID, SWITCH_PREV_STATE, WAKEUP_PID},
};

/// What is known about one thread: its time off the CPU and its open file call share an entry, so that a context
/// switch costs one lookup.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Thread {
    /// When it left the CPU; 0 while it runs.
    pub(crate) out_ns: u64,
    /// When it became runnable again; 0 while it sleeps.
    pub(crate) runnable_since_ns: u64,
    /// Entry of the open file call; 0 while there is none.
    pub(crate) call_ns: u64,
    /// In the open file call, blocked on a device, ns.
    pub(crate) blocked_ns: u64,
    /// In the open file call, asleep for something else, ns.
    pub(crate) slept_ns: u64,
    pub(crate) tgid: u32,
    pub(crate) reason: u32,
    pub(crate) op: u32,
    pub(crate) fd: u32,
}

impl Thread {
    const fn new(tgid: u32) -> Self {
        Self {
            out_ns: 0,
            runnable_since_ns: 0,
            call_ns: 0,
            blocked_ns: 0,
            slept_ns: 0,
            tgid,
            reason: 0,
            op: 0,
            fd: 0,
        }
    }
}

/// Threads of traced processes, by thread id.
#[map]
static THREADS: HashMap<u32, Thread> = HashMap::with_max_entries(16384, 0);
static HINTS: Hints = Hints::new();

/// The entry of a thread of a traced process, made when there is none.
#[inline(always)]
pub(crate) fn thread(task: Task) -> Option<*mut Thread> {
    HINTS.set(task.tid());
    if let Some(thread) = THREADS.get_ptr_mut(task.tid()) {
        return Some(thread);
    }
    THREADS.insert(task.tid(), Thread::new(task.tgid()), 0).ok()?;
    THREADS.get_ptr_mut(task.tid())
}

/// The entry of a thread, if there is one.
#[inline(always)]
pub(crate) fn known_thread(tid: u32) -> Option<*mut Thread> {
    if HINTS.is_set(tid) {
        THREADS.get_ptr_mut(tid)
    } else {
        None
    }
}

#[inline(always)]
pub(crate) fn thread_gone(task: Task) {
    if HINTS.is_set(task.tid()) {
        let _ = THREADS.remove(task.tid());
        HINTS.clear(task.tid());
    }
}

/// Task states that the tracepoint reports.
const INTERRUPTIBLE: i64 = 1;
const UNINTERRUPTIBLE: i64 = 2;
const DEAD_OR_ZOMBIE: i64 = 0x10 | 0x20;
/// States below this bit are sleeps; above lies the mark of a preempted, still runnable task.
const SLEEPS: i64 = 0xff;

#[tracepoint]
fn sched_switch(ctx: TracePointContext) -> u32 {
    leave(&ctx);
    arrive(&ctx);
    0
}

/// The tracepoint runs while the leaving thread is still the current one.
#[inline(always)]
fn leave(ctx: &TracePointContext) {
    let task = Task::current();
    if task.tid() == 0 || !is_traced(task.tgid()) {
        return;
    }
    // SAFETY: the helper checks the address; the offset comes from this kernel's format file.
    let Ok(state) = (unsafe { ctx.read_at::<i64>(SWITCH_PREV_STATE.get() as usize) }) else {
        return;
    };
    if state & DEAD_OR_ZOMBIE != 0 {
        // Its exit was seen, but until now it could still lose the CPU and get an entry anew.
        thread_gone(task);
        return;
    }
    let reason = if state & UNINTERRUPTIBLE != 0 {
        OffCpuReason::Disk
    } else if state & INTERRUPTIBLE != 0 || state & SLEEPS != 0 {
        OffCpuReason::Sleep
    } else {
        OffCpuReason::Preempted
    };
    let Some(thread) = thread(task) else {
        return;
    };
    // SAFETY: only switches and file calls of this thread write its entry, and they do not run at once.
    let thread = unsafe { &mut *thread };
    // SAFETY: the helper has no preconditions.
    let now = unsafe { bpf_ktime_get_ns() };
    thread.out_ns = now;
    thread.reason = reason as u32;
    thread.runnable_since_ns = if matches!(reason, OffCpuReason::Preempted) {
        now
    } else {
        0
    };
}

#[inline(always)]
fn arrive(ctx: &TracePointContext) {
    // SAFETY: the helper checks the address; the offset comes from this kernel's format file.
    let Ok(tid) = (unsafe { ctx.read_at::<u32>(SWITCH_NEXT_PID.get() as usize) }) else {
        return;
    };
    if tid == 0 {
        return;
    }
    let Some(thread) = known_thread(tid) else {
        return;
    };
    // SAFETY: as above; the arriving thread cannot run anything else yet.
    let thread = unsafe { &mut *thread };
    let out_ns = thread.out_ns;
    if out_ns == 0 {
        return;
    }
    thread.out_ns = 0;
    // SAFETY: the helper has no preconditions.
    let now = unsafe { bpf_ktime_get_ns() };
    let runnable_since_ns = if thread.runnable_since_ns < out_ns {
        now
    } else {
        thread.runnable_since_ns
    };
    if thread.call_ns != 0 {
        let asleep_ns = runnable_since_ns - out_ns;
        if thread.reason == OffCpuReason::Disk as u32 {
            thread.blocked_ns += asleep_ns;
        } else {
            thread.slept_ns += asleep_ns;
        }
    }
    if now - out_ns < OFF_CPU_MIN_NS.get() {
        return;
    }
    emit(
        Ring::Sched,
        &OffCpu {
            head: Head {
                kind: Kind::OffCpu as u16,
                flags: 0,
                result: 0,
                tgid: thread.tgid,
                tid,
                begin_ns: out_ns,
                end_ns: now,
            },
            runnable_ns: now - runnable_since_ns,
            reason: thread.reason,
            reserved: 0,
        },
    );
}

#[tracepoint]
fn sched_wakeup(ctx: TracePointContext) -> u32 {
    // SAFETY: the helper checks the address; the offset comes from this kernel's format file.
    let Ok(tid) = (unsafe { ctx.read_at::<u32>(WAKEUP_PID.get() as usize) }) else {
        return 0;
    };
    if let Some(thread) = known_thread(tid) {
        // SAFETY: a thread is woken once per sleep; a race with its arrival leaves a time that arrival ignores.
        let thread = unsafe { &mut *thread };
        if thread.out_ns != 0 && thread.runnable_since_ns == 0 {
            // SAFETY: the helper has no preconditions.
            thread.runnable_since_ns = unsafe { bpf_ktime_get_ns() };
        }
    }
    0
}
