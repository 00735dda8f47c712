//! Processes appearing, changing and going: discovery hears of them at once, and children of traced processes are
//! traced from birth.

use aya_ebpf::{
    helpers::bpf_ktime_get_ns,
    macros::{map, tracepoint},
    maps::LruHashMap,
    programs::TracePointContext,
};
use stallscope_records::{Head, Kind, Ring, record::Bare};

use crate::{
    cuda,
    emit::{emit, note},
    filter::{Task, forget, is_traced, trace_child},
    nccl, sched,
    settings::{EXIT_GROUP_DEAD, NEWTASK_FLAGS, NEWTASK_PID, SYSCALL_ARGS},
};

/// Threads between entry and return of an `mmap` that maps a file executable.
#[map]
static MAPPING: LruHashMap<u64, u8> = LruHashMap::with_max_entries(1024, 0);

const CLONE_THREAD: u64 = 0x1_0000;
const PROT_EXEC: u64 = 4;
const MAP_ANONYMOUS: u64 = 0x20;

#[inline(always)]
fn notify(kind: Kind, tgid: u32, tid: u32, parent: u32) {
    // SAFETY: the helper has no preconditions.
    let now = unsafe { bpf_ktime_get_ns() };
    let head = Head {
        kind: kind as u16,
        flags: 0,
        result: parent as i32,
        tgid,
        tid,
        begin_ns: now,
        end_ns: now,
    };
    emit(Ring::Procs, &Bare { head });
}

#[tracepoint]
fn process_exec(_ctx: TracePointContext) -> u32 {
    let task = Task::current();
    notify(Kind::Exec, task.tgid(), task.tid(), 0);
    0
}

/// Runs in the parent, before the child does.
#[tracepoint]
fn process_fork(ctx: TracePointContext) -> u32 {
    let task = Task::current();
    if !is_traced(task.tgid()) {
        return 0;
    }
    // SAFETY: the helper checks the address; the offsets come from this kernel's format file.
    let (child, flags) = unsafe {
        (
            ctx.read_at::<u32>(NEWTASK_PID.get() as usize),
            ctx.read_at::<u64>(NEWTASK_FLAGS.get() as usize),
        )
    };
    if let (Ok(child), Ok(flags)) = (child, flags)
        && flags & CLONE_THREAD == 0
    {
        trace_child(child);
        note!(&ctx, "process {} has the child {}", task.tgid(), child);
        notify(Kind::Fork, child, child, task.tgid());
    }
    0
}

/// Runs in every thread that ends.
#[tracepoint]
fn process_exit(ctx: TracePointContext) -> u32 {
    let task = Task::current();
    // Also of a process that is traced no longer: it may have left entries.
    nccl::thread_gone(task);
    cuda::thread_gone(task);
    sched::thread_gone(task);
    if !is_traced(task.tgid()) {
        return 0;
    }
    let group_dead = match EXIT_GROUP_DEAD.get() as usize {
        0 => task.tid() == task.tgid(),
        // SAFETY: the helper checks the address; the offset comes from this kernel's format file.
        offset => unsafe { ctx.read_at::<u8>(offset) }.is_ok_and(|dead| dead != 0),
    };
    if group_dead {
        forget(task.tgid());
        notify(Kind::Exit, task.tgid(), task.tid(), 0);
    }
    0
}

#[tracepoint]
fn mmap_enter(ctx: TracePointContext) -> u32 {
    let args = SYSCALL_ARGS.get() as usize;
    // SAFETY: the helper checks the address; the offset comes from this kernel's format file.
    let (prot, flags) = unsafe { (ctx.read_at::<u64>(args + 16), ctx.read_at::<u64>(args + 24)) };
    if let (Ok(prot), Ok(flags)) = (prot, flags)
        && prot & PROT_EXEC != 0
        && flags & MAP_ANONYMOUS == 0
    {
        let _ = MAPPING.insert(Task::current().0, 1, 0);
    }
    0
}

/// The mapping is there to be found in `/proc/PID/maps` only now.
#[tracepoint]
fn mmap_done(_ctx: TracePointContext) -> u32 {
    let task = Task::current();
    if MAPPING.remove(task.0).is_ok() {
        notify(Kind::MapExec, task.tgid(), task.tid(), 0);
    }
    0
}
