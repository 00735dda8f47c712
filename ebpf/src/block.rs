//! File calls of traced processes, and the block requests they issue.
//!
//! The time of a file call is split by the scheduler's view: uninterruptible sleep is waiting for a device, the rest
//! is page cache and CPU. A call that slept interruptibly was on a pipe, a socket or a terminal and is left out.

use aya_ebpf::{
    helpers::bpf_ktime_get_ns,
    macros::{map, tracepoint},
    maps::{LruHashMap, PerCpuHashMap},
    programs::TracePointContext,
};
use stallscope_records::{
    Head, Kind, Ring,
    abi::FileOp,
    fold::{BlockFold, FileFold, FileKey},
    record::{FileIo, flag},
};

use crate::{
    emit::emit,
    filter::{Task, traced},
    sched::{Thread, known_thread, thread},
    settings::{
        COMPLETE_DEV, COMPLETE_SECTOR, FILE_CALL_MIN_NS, ISSUE_BYTES, ISSUE_DEV, ISSUE_SECTOR, SYSCALL_ARGS,
        SYSCALL_RET,
    },
};

/// `BPF_F_NO_PREALLOC`: one value per CPU is too much to hold ready for every process.
const NO_PREALLOC: u32 = 1;

/// File calls too short for a record, counted on each CPU apart.
#[map]
static FILE_FOLDS: PerCpuHashMap<FileKey, FileFold> = PerCpuHashMap::with_max_entries(4096, NO_PREALLOC);
/// Completed block requests, by the process that issued them, counted on each CPU apart.
#[map]
static BLOCK_FOLDS: PerCpuHashMap<u32, BlockFold> = PerCpuHashMap::with_max_entries(4096, NO_PREALLOC);

#[derive(Clone, Copy)]
#[repr(C)]
struct RequestKey {
    sector: u64,
    dev: u64,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Request {
    issued_ns: u64,
    bytes: u32,
    tgid: u32,
}

/// Requests in flight; the least recent go when there is no room, such as those that never completed.
#[map]
static REQUESTS: LruHashMap<RequestKey, Request> = LruHashMap::with_max_entries(8192, 0);

#[tracepoint]
fn file_read(ctx: TracePointContext) -> u32 {
    enter(&ctx, FileOp::Read)
}

#[tracepoint]
fn file_write(ctx: TracePointContext) -> u32 {
    enter(&ctx, FileOp::Write)
}

#[tracepoint]
fn file_flush(ctx: TracePointContext) -> u32 {
    enter(&ctx, FileOp::Flush)
}

#[inline(always)]
fn enter(ctx: &TracePointContext, op: FileOp) -> u32 {
    let Some(task) = traced() else {
        return 0;
    };
    let Some(thread) = thread(task) else {
        return 0;
    };
    // SAFETY: the entry belongs to this thread, which is here.
    let thread = unsafe { &mut *thread };
    // SAFETY: the helper checks the address; the offset comes from this kernel's format file.
    thread.fd = unsafe { ctx.read_at::<u32>(SYSCALL_ARGS.get() as usize) }.unwrap_or(u32::MAX);
    thread.op = op as u32;
    thread.blocked_ns = 0;
    thread.slept_ns = 0;
    // SAFETY: the helper has no preconditions.
    thread.call_ns = unsafe { bpf_ktime_get_ns() };
    0
}

#[tracepoint]
fn file_done(ctx: TracePointContext) -> u32 {
    let task = Task::current();
    let Some(thread) = known_thread(task.tid()) else {
        return 0;
    };
    // SAFETY: the entry belongs to this thread, which is here.
    let thread = unsafe { &mut *thread };
    if thread.call_ns != 0 {
        leave(&ctx, task, thread);
        thread.call_ns = 0;
    }
    0
}

#[inline(always)]
fn leave(ctx: &TracePointContext, task: Task, thread: &Thread) {
    if thread.slept_ns != 0 {
        return;
    }
    // SAFETY: the helper has no preconditions.
    let now = unsafe { bpf_ktime_get_ns() };
    // SAFETY: the helper checks the address; the offset comes from this kernel's format file.
    let returned = unsafe { ctx.read_at::<i64>(SYSCALL_RET.get() as usize) }.unwrap_or(0);
    let bytes = if returned > 0 && thread.op != FileOp::Flush as u32 {
        returned as u64
    } else {
        0
    };
    let total_ns = now - thread.call_ns;
    if total_ns < FILE_CALL_MIN_NS.get() {
        fold_file(task, thread, bytes, total_ns);
        return;
    }
    emit(
        Ring::Block,
        &FileIo {
            head: Head {
                kind: Kind::FileIo as u16,
                flags: flag::RETURNED,
                result: if returned < 0 { -returned as i32 } else { 0 },
                tgid: task.tgid(),
                tid: task.tid(),
                begin_ns: thread.call_ns,
                end_ns: now,
            },
            bytes,
            blocked_ns: thread.blocked_ns,
            op: thread.op,
            fd: thread.fd,
        },
    );
}

#[inline(always)]
fn fold_file(task: Task, thread: &Thread, bytes: u64, total_ns: u64) {
    let key = FileKey {
        tgid: task.tgid(),
        op: thread.op,
    };
    if let Some(fold) = FILE_FOLDS.get_ptr_mut(key) {
        // SAFETY: the value is this CPU's.
        let fold = unsafe { &mut *fold };
        fold.calls += 1;
        fold.bytes += bytes;
        fold.total_ns += total_ns;
        fold.blocked_ns += thread.blocked_ns;
    } else {
        let fold = FileFold {
            calls: 1,
            bytes,
            total_ns,
            blocked_ns: thread.blocked_ns,
        };
        let _ = FILE_FOLDS.insert(key, fold, 0);
    }
}

#[tracepoint]
fn block_issue(ctx: TracePointContext) -> u32 {
    let Some(task) = traced() else {
        return 0;
    };
    // SAFETY: the helper checks the address; the offsets come from this kernel's format file.
    let (dev, sector, bytes) = unsafe {
        (
            ctx.read_at::<u32>(ISSUE_DEV.get() as usize),
            ctx.read_at::<u64>(ISSUE_SECTOR.get() as usize),
            ctx.read_at::<u32>(ISSUE_BYTES.get() as usize),
        )
    };
    if let (Ok(dev), Ok(sector), Ok(bytes)) = (dev, sector, bytes)
        && bytes != 0
    {
        // SAFETY: the helper has no preconditions.
        let issued_ns = unsafe { bpf_ktime_get_ns() };
        let key = RequestKey {
            sector,
            dev: u64::from(dev),
        };
        let _ = REQUESTS.insert(
            key,
            Request {
                issued_ns,
                bytes,
                tgid: task.tgid(),
            },
            0,
        );
    }
    0
}

#[tracepoint]
fn block_complete(ctx: TracePointContext) -> u32 {
    // SAFETY: the helper checks the address; the offsets come from this kernel's format file.
    let (dev, sector) = unsafe {
        (
            ctx.read_at::<u32>(COMPLETE_DEV.get() as usize),
            ctx.read_at::<u64>(COMPLETE_SECTOR.get() as usize),
        )
    };
    let (Ok(dev), Ok(sector)) = (dev, sector) else {
        return 0;
    };
    let key = RequestKey {
        sector,
        dev: u64::from(dev),
    };
    // SAFETY: the value is copied at once; the least that can happen is another request's time.
    let Some(request) = (unsafe { REQUESTS.get(key) }).copied() else {
        return 0;
    };
    // SAFETY: the helper has no preconditions.
    let latency_ns = unsafe { bpf_ktime_get_ns() }.saturating_sub(request.issued_ns);
    if let Some(fold) = BLOCK_FOLDS.get_ptr_mut(request.tgid) {
        // SAFETY: the value is this CPU's.
        let fold = unsafe { &mut *fold };
        fold.requests += 1;
        fold.bytes += u64::from(request.bytes);
        fold.latency_ns += latency_ns;
    } else {
        let fold = BlockFold {
            requests: 1,
            bytes: u64::from(request.bytes),
            latency_ns,
        };
        let _ = BLOCK_FOLDS.insert(request.tgid, fold, 0);
    }
    let _ = REQUESTS.remove(key);
    0
}
