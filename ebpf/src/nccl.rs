//! NCCL's data-moving calls and groups.
//!
//! A call's arguments are saved at its entry and leave with its return as one record. Public functions call each
//! other, and only the outermost counts: while a call is saved, one deeper on the same stack is passed over, and the
//! stack pointer tells which return belongs to it. A saved call whose stack frame is gone left without returning here
//! (its return probe was not there yet, or it was left by an exception).

use aya_ebpf::{
    helpers::bpf_ktime_get_ns,
    macros::{map, uprobe, uretprobe},
    maps::HashMap,
    programs::{ProbeContext, RetProbeContext},
};
use stallscope_records::{
    Head, Kind, Ring,
    abi::{CallShape, NO_ARGUMENT},
    record::{Bare, Collective, flag},
};

use crate::{
    call::{arguments, cookie, entry_stack_pointer, stack_pointer},
    emit::emit,
    filter::{Task, traced},
    nccl_comms as comms,
};

/// Open calls, by thread.
const THREADS: u32 = 8192;

#[derive(Clone, Copy)]
#[repr(C)]
struct OpenCall {
    stack_pointer: u64,
    record: Collective,
}

#[map]
static NCCL_CALLS: HashMap<u64, OpenCall> = HashMap::with_max_entries(THREADS, 0);
/// Group nesting, by thread: depth of `ncclGroupStart`, begin and stack pointer of the open `ncclGroupEnd`.
#[map]
static NCCL_GROUPS: HashMap<u64, Group> = HashMap::with_max_entries(THREADS, 0);

#[derive(Clone, Copy)]
#[repr(C)]
struct Group {
    depth: u64,
    /// 0 while no outermost `ncclGroupEnd` is open.
    end_stack_pointer: u64,
    end_begin_ns: u64,
}

#[inline(always)]
pub(crate) fn head(kind: Kind, task: Task, begin_ns: u64) -> Head {
    Head {
        kind: kind as u16,
        flags: 0,
        result: 0,
        tgid: task.tgid(),
        tid: task.tid(),
        begin_ns,
        end_ns: begin_ns,
    }
}

#[inline(always)]
pub(crate) fn returned(head: &mut Head, result: i32, end_ns: u64) {
    head.flags |= flag::RETURNED;
    head.result = result;
    head.end_ns = end_ns;
}

/// Entry of every data-moving call; the cookie is a [`CallShape`].
#[uprobe]
fn nccl_call(ctx: ProbeContext) -> u32 {
    if let Some(task) = traced() {
        enter_call(&ctx, task);
    }
    0
}

#[inline(always)]
fn enter_call(ctx: &ProbeContext, task: Task) {
    let stack_pointer = stack_pointer(ctx);
    if let Some(open) = NCCL_CALLS.get_ptr(task.0) {
        // SAFETY: the entry belongs to this thread, which is here.
        let open = unsafe { &*open };
        if stack_pointer < open.stack_pointer {
            return;
        }
        emit(Ring::Nccl, &open.record);
    }
    let shape = cookie(ctx);
    let arguments = arguments(ctx);
    let argument = |nibble: u32| arguments.get(shape >> nibble);
    comms::used(
        task,
        argument(CallShape::COMM),
        (shape >> CallShape::RANK_OFFSET) as u32,
    );
    let takes_peer = (shape >> CallShape::PEER) & NO_ARGUMENT != NO_ARGUMENT;
    let mut head = head(Kind::Collective, task, 0);
    head.flags =
        if takes_peer { flag::PEER } else { 0 } | if arguments.readable { 0 } else { flag::UNREADABLE };
    let mut open = OpenCall {
        stack_pointer,
        record: Collective {
            head,
            comm: argument(CallShape::COMM),
            count: argument(CallShape::COUNT),
            stream: argument(CallShape::STREAM),
            function: (shape & 0xff) as u32,
            datatype: argument(CallShape::DATATYPE) as u32,
            peer: if takes_peer {
                argument(CallShape::PEER) as i32
            } else {
                0
            },
            reserved: 0,
        },
    };
    // SAFETY: the helper has no preconditions. Taken last, so that the window holds the call and not the probe.
    let now = unsafe { bpf_ktime_get_ns() };
    open.record.head.begin_ns = now;
    open.record.head.end_ns = now;
    if NCCL_CALLS.insert(task.0, &open, 0).is_err() {
        // No room to wait for the return: the call itself is worth more than its end.
        emit(Ring::Nccl, &open.record);
    }
}

/// Return of every data-moving call.
#[uretprobe]
fn nccl_call_return(ctx: RetProbeContext) -> u32 {
    // SAFETY: the helper has no preconditions.
    let now = unsafe { bpf_ktime_get_ns() };
    let task = Task::current();
    let Some(open) = NCCL_CALLS.get_ptr_mut(task.0) else {
        return 0;
    };
    // SAFETY: the entry belongs to this thread, which is here.
    let open = unsafe { &mut *open };
    if entry_stack_pointer(&ctx) == open.stack_pointer {
        returned(&mut open.record.head, ctx.ret::<i32>(), now);
        emit(Ring::Nccl, &open.record);
        let _ = NCCL_CALLS.remove(task.0);
    }
    0
}

#[uprobe]
fn nccl_group_start(_ctx: ProbeContext) -> u32 {
    let Some(task) = traced() else {
        return 0;
    };
    if let Some(group) = NCCL_GROUPS.get_ptr_mut(task.0) {
        // SAFETY: the entry belongs to this thread, which is here.
        unsafe { (*group).depth += 1 };
    } else {
        let group = Group {
            depth: 1,
            end_stack_pointer: 0,
            end_begin_ns: 0,
        };
        let _ = NCCL_GROUPS.insert(task.0, &group, 0);
    }
    0
}

/// An end without a start we saw is taken for an outermost one.
#[uprobe]
fn nccl_group_end(ctx: ProbeContext) -> u32 {
    let Some(task) = traced() else {
        return 0;
    };
    let stack_pointer = stack_pointer(&ctx);
    // SAFETY: the helper has no preconditions.
    let now = unsafe { bpf_ktime_get_ns() };
    if let Some(group) = NCCL_GROUPS.get_ptr_mut(task.0) {
        // SAFETY: the entry belongs to this thread, which is here.
        let group = unsafe { &mut *group };
        if group.depth > 1 {
            group.depth -= 1;
            return 0;
        }
        *group = Group {
            depth: 0,
            end_stack_pointer: stack_pointer,
            end_begin_ns: now,
        };
    } else {
        let group = Group {
            depth: 0,
            end_stack_pointer: stack_pointer,
            end_begin_ns: now,
        };
        let _ = NCCL_GROUPS.insert(task.0, &group, 0);
    }
    0
}

#[uretprobe]
fn nccl_group_end_return(ctx: RetProbeContext) -> u32 {
    // SAFETY: the helper has no preconditions.
    let now = unsafe { bpf_ktime_get_ns() };
    let task = Task::current();
    let Some(group) = NCCL_GROUPS.get_ptr_mut(task.0) else {
        return 0;
    };
    // SAFETY: the entry belongs to this thread, which is here.
    let group = unsafe { &mut *group };
    if group.end_stack_pointer == entry_stack_pointer(&ctx) {
        let mut head = head(Kind::GroupEnd, task, group.end_begin_ns);
        returned(&mut head, ctx.ret::<i32>(), now);
        emit(Ring::Nccl, &Bare { head });
        group.end_stack_pointer = 0;
    }
    0
}

/// The thread is going: what it was inside of will not return.
#[inline(always)]
pub(crate) fn thread_gone(task: Task) {
    if let Some(open) = NCCL_CALLS.get_ptr(task.0) {
        // SAFETY: the entry belongs to this thread, which is here.
        emit(Ring::Nccl, unsafe { &(*open).record });
        let _ = NCCL_CALLS.remove(task.0);
    }
    comms::thread_gone(task);
    let _ = NCCL_GROUPS.remove(task.0);
}
