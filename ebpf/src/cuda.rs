//! The CUDA driver's calls.
//!
//! Launches come at up to 100,000/s, so they are folded here into runs and never leave one by one. Synchronisations
//! and synchronous copies are recorded with begin and end; they are the points where host and device meet.

use aya_ebpf::{
    helpers::bpf_ktime_get_ns,
    macros::{map, uprobe, uretprobe},
    maps::HashMap,
    programs::{ProbeContext, RetProbeContext},
};
use stallscope_records::{
    Head, Kind, Ring,
    abi::{
        CudaShape, LAUNCH_CONFIG_STREAM, LAUNCH_KERNEL_STREAM, Launch, NO_ARGUMENT, STREAM_PER_THREAD,
        SyncTarget,
    },
    fold::{Run, Runs},
    record::{Copy, EventOp, LaunchRun, Sync, flag},
};

use crate::{
    call::{Arguments, arguments, cookie, entry_stack_pointer, read_user, stack_argument, stack_pointer},
    emit::emit,
    filter::{Task, traced},
    settings::{LAUNCH_GAP_NS, LAUNCH_RUN_NS},
};

const THREADS: u32 = 8192;

/// Open launch runs, by thread.
#[map]
static CUDA_RUNS: HashMap<u64, Runs> = HashMap::with_max_entries(THREADS, 0);

#[derive(Clone, Copy)]
#[repr(C)]
struct OpenCall {
    stack_pointer: u64,
    begin_ns: u64,
    /// Handle of a synchronisation, bytes of a copy.
    value: u64,
    /// The [`SyncTarget`] or `Direction`.
    tag: u32,
    is_copy: u32,
}

/// Open synchronisations and synchronous copies, by thread.
#[map]
static CUDA_CALLS: HashMap<u64, OpenCall> = HashMap::with_max_entries(THREADS, 0);

#[inline(always)]
fn head(kind: Kind, task: Task, begin_ns: u64, end_ns: u64) -> Head {
    Head {
        kind: kind as u16,
        flags: 0,
        result: 0,
        tgid: task.tgid(),
        tid: task.tid(),
        begin_ns,
        end_ns,
    }
}

#[inline(always)]
fn now_ns() -> u64 {
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_ktime_get_ns() }
}

/// The stream a call names; 0 in a `_ptsz` call is the thread's own.
#[inline(always)]
fn stream(shape: u64, handle: u64) -> u64 {
    if handle == 0 && shape & CudaShape::PER_THREAD != 0 {
        STREAM_PER_THREAD
    } else {
        handle
    }
}

#[inline(always)]
fn first(arguments: &Arguments, shape: u64) -> u64 {
    arguments.get(shape >> CudaShape::FIRST)
}

#[inline(always)]
fn second(arguments: &Arguments, shape: u64) -> u64 {
    arguments.get(shape >> CudaShape::SECOND)
}

#[inline(always)]
fn tag(shape: u64) -> u32 {
    (shape & 0xff) as u32
}

#[inline(always)]
fn emit_run(task: Task, run: &Run) {
    emit(
        Ring::Cuda,
        &LaunchRun {
            head: head(Kind::LaunchRun, task, run.first_ns, run.last_ns),
            stream: run.stream,
            kernels: run.kernels,
            graphs: run.graphs,
        },
    );
}

/// Ends every run of the thread.
#[inline(always)]
fn end_runs(task: Task) {
    if let Some(runs) = CUDA_RUNS.get_ptr_mut(task.0) {
        // SAFETY: the entry belongs to this thread, which is here.
        for run in unsafe { &mut (*runs).slots } {
            if run.first_ns != 0 {
                emit_run(task, run);
                run.first_ns = 0;
            }
        }
    }
}

/// Entry of every launch; the tag is a [`Launch`].
#[uprobe]
fn cuda_launch(ctx: ProbeContext) -> u32 {
    if let Some(task) = traced() {
        launch(&ctx, task);
    }
    0
}

#[inline(always)]
fn launch(ctx: &ProbeContext, task: Task) {
    let shape = cookie(ctx);
    let kind = tag(shape);
    let handle = if kind == Launch::Kernel as u32 {
        stack_argument(ctx, LAUNCH_KERNEL_STREAM)
    } else if kind == Launch::KernelEx as u32 {
        read_user::<u64>(arguments(ctx).get(0) + LAUNCH_CONFIG_STREAM)
    } else {
        Some(arguments(ctx).get(1))
    };
    let stream = stream(shape, handle.unwrap_or(0));
    let is_graph = kind == Launch::Graph as u32;
    let now = now_ns();
    let fresh = Run {
        first_ns: now,
        last_ns: now,
        stream,
        kernels: if is_graph { 0 } else { 1 },
        graphs: if is_graph { 1 } else { 0 },
    };
    let Some(runs) = CUDA_RUNS.get_ptr_mut(task.0) else {
        let empty = Run {
            first_ns: 0,
            last_ns: 0,
            stream: 0,
            kernels: 0,
            graphs: 0,
        };
        let runs = Runs {
            slots: [fresh, empty, empty, empty],
        };
        if CUDA_RUNS.insert(task.0, &runs, 0).is_err() {
            emit_run(task, &fresh);
        }
        return;
    };
    // SAFETY: the entry belongs to this thread, which is here.
    let slots = unsafe { &mut (*runs).slots };
    let mut oldest = 0;
    let mut oldest_ns = u64::MAX;
    for index in 0..slots.len() {
        let run = &mut slots[index];
        if run.first_ns != 0 && run.stream == stream {
            if now - run.last_ns <= LAUNCH_GAP_NS.get() && now - run.first_ns <= LAUNCH_RUN_NS.get() {
                run.last_ns = now;
                run.kernels += fresh.kernels;
                run.graphs += fresh.graphs;
            } else {
                emit_run(task, run);
                *run = fresh;
            }
            return;
        }
        let last_ns = if run.first_ns == 0 { 0 } else { run.last_ns };
        if last_ns < oldest_ns {
            oldest_ns = last_ns;
            oldest = index;
        }
    }
    let run = &mut slots[oldest & 3];
    if run.first_ns != 0 {
        emit_run(task, run);
    }
    *run = fresh;
}

/// Entry of a synchronisation; the tag is a [`SyncTarget`].
#[uprobe]
fn cuda_sync(ctx: ProbeContext) -> u32 {
    if let Some(task) = traced() {
        end_runs(task);
        let shape = cookie(&ctx);
        let handle = if tag(shape) == SyncTarget::Context as u32 {
            0
        } else {
            first(&arguments(&ctx), shape)
        };
        let value = if tag(shape) == SyncTarget::Stream as u32 {
            stream(shape, handle)
        } else {
            handle
        };
        enter(&ctx, task, value, tag(shape), 0);
    }
    0
}

/// Entry of a synchronous copy; the tag is a `Direction`.
#[uprobe]
fn cuda_copy(ctx: ProbeContext) -> u32 {
    if let Some(task) = traced() {
        end_runs(task);
        let shape = cookie(&ctx);
        enter(&ctx, task, first(&arguments(&ctx), shape), tag(shape), 1);
    }
    0
}

#[inline(always)]
fn enter(ctx: &ProbeContext, task: Task, value: u64, tag: u32, is_copy: u32) {
    let stack_pointer = stack_pointer(ctx);
    if let Some(open) = CUDA_CALLS.get_ptr(task.0) {
        // SAFETY: the entry belongs to this thread, which is here.
        let open = unsafe { &*open };
        if stack_pointer < open.stack_pointer {
            return;
        }
        emit_call(task, open, None, open.begin_ns);
    }
    let open = OpenCall {
        stack_pointer,
        begin_ns: now_ns(),
        value,
        tag,
        is_copy,
    };
    if CUDA_CALLS.insert(task.0, &open, 0).is_err() {
        emit_call(task, &open, None, open.begin_ns);
    }
}

#[inline(always)]
fn emit_call(task: Task, open: &OpenCall, result: Option<i32>, end_ns: u64) {
    let kind = if open.is_copy == 0 { Kind::Sync } else { Kind::Copy };
    let mut head = head(kind, task, open.begin_ns, end_ns);
    if let Some(result) = result {
        head.flags = flag::RETURNED;
        head.result = result;
    }
    if open.is_copy == 0 {
        emit(
            Ring::Cuda,
            &Sync {
                head,
                handle: open.value,
                target: open.tag,
                reserved: 0,
            },
        );
    } else {
        emit(
            Ring::Cuda,
            &Copy {
                head,
                bytes: open.value,
                stream: 0,
                direction: open.tag,
                reserved: 0,
            },
        );
    }
}

/// Return of a synchronisation or a synchronous copy.
#[uretprobe]
fn cuda_return(ctx: RetProbeContext) -> u32 {
    let now = now_ns();
    let task = Task::current();
    let Some(open) = CUDA_CALLS.get_ptr(task.0) else {
        return 0;
    };
    // SAFETY: the entry belongs to this thread, which is here.
    let open = unsafe { &*open };
    if entry_stack_pointer(&ctx) == open.stack_pointer {
        emit_call(task, open, Some(ctx.ret::<i32>()), now);
        let _ = CUDA_CALLS.remove(task.0);
    }
    0
}

/// Entry of an asynchronous copy; the tag is a `Direction`, the arguments are bytes and stream.
#[uprobe]
fn cuda_copy_async(ctx: ProbeContext) -> u32 {
    let Some(task) = traced() else {
        return 0;
    };
    // Inside a traced copy it is the driver's own doing.
    if let Some(open) = CUDA_CALLS.get_ptr(task.0)
        // SAFETY: the entry belongs to this thread, which is here.
        && stack_pointer(&ctx) < unsafe { (*open).stack_pointer }
    {
        return 0;
    }
    end_runs(task);
    let shape = cookie(&ctx);
    let arguments = arguments(&ctx);
    let now = now_ns();
    let mut head = head(Kind::Copy, task, now, now);
    head.flags = flag::ASYNC;
    let handle = if (shape >> CudaShape::SECOND) & NO_ARGUMENT == NO_ARGUMENT {
        0
    } else {
        second(&arguments, shape)
    };
    let stream = stream(shape, handle);
    emit(
        Ring::Cuda,
        &Copy {
            head,
            bytes: first(&arguments, shape),
            stream,
            direction: tag(shape),
            reserved: 0,
        },
    );
    0
}

/// Entry of `cuEventRecord` and `cuEventRecordWithFlags`: the arguments are event and stream.
#[uprobe]
fn cuda_event_record(ctx: ProbeContext) -> u32 {
    event_op(&ctx, Kind::EventRecord);
    0
}

/// Entry of `cuStreamWaitEvent`: the arguments are event and stream.
#[uprobe]
fn cuda_stream_wait(ctx: ProbeContext) -> u32 {
    event_op(&ctx, Kind::StreamWait);
    0
}

#[inline(always)]
fn event_op(ctx: &ProbeContext, kind: Kind) {
    if let Some(task) = traced() {
        let shape = cookie(ctx);
        let arguments = arguments(ctx);
        let now = now_ns();
        let stream = stream(shape, second(&arguments, shape));
        emit(
            Ring::Cuda,
            &EventOp {
                head: head(kind, task, now, now),
                event: first(&arguments, shape),
                stream,
            },
        );
    }
}

/// The thread is going: its runs end, and what it was inside of will not return.
#[inline(always)]
pub(crate) fn thread_gone(task: Task) {
    end_runs(task);
    let _ = CUDA_RUNS.remove(task.0);
    if let Some(open) = CUDA_CALLS.get_ptr(task.0) {
        // SAFETY: the entry belongs to this thread, which is here.
        let open = unsafe { &*open };
        emit_call(task, open, None, now_ns());
        let _ = CUDA_CALLS.remove(task.0);
    }
}
