//! NCCL's public calls.
//!
//! A call's arguments are saved at its entry and leave with its return as one record. Public functions call each
//! other, and only the outermost counts: while a call is saved, one deeper on the same stack is passed over, and the
//! stack pointer tells which return belongs to it. A saved call whose stack frame is gone left without returning here
//! (its return probe was not there yet, or it was left by an exception).

use aya_ebpf::{
    helpers::{bpf_ktime_get_ns, bpf_probe_read_user_buf},
    macros::{map, uprobe, uretprobe},
    maps::HashMap,
    programs::{ProbeContext, RetProbeContext},
};
use stallscope_records::{
    Head, Kind, Ring,
    abi::{CallShape, Function, NO_ARGUMENT},
    record::{Bare, Collective, Constructor, Teardown, flag},
};

use crate::{
    call::{after_id, arguments, by_value_id, cookie, entry_stack_pointer, read_user, stack_pointer},
    emit::{emit, note},
    filter::{Task, traced},
};

/// Open calls, by thread.
const THREADS: u32 = 8192;
/// Open constructors, by thread: rare, and each holds an id.
const CONSTRUCTING_THREADS: u32 = 1024;
/// Devices of one `ncclCommInitAll` that get a record.
const INIT_ALL_DEVICES: i32 = 16;

#[derive(Clone, Copy)]
#[repr(C)]
struct OpenCall {
    stack_pointer: u64,
    record: Collective,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct OpenConstructor {
    stack_pointer: u64,
    /// Where the communicator is written.
    comm_out: u64,
    record: Constructor,
}

#[map]
static NCCL_CALLS: HashMap<u64, OpenCall> = HashMap::with_max_entries(THREADS, 0);
#[map]
static NCCL_CONSTRUCTORS: HashMap<u64, OpenConstructor> = HashMap::with_max_entries(CONSTRUCTING_THREADS, 0);
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
fn head(kind: Kind, task: Task, begin_ns: u64) -> Head {
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
fn returned(head: &mut Head, result: i32, end_ns: u64) {
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

/// What a constructor's entry tells.
struct Construction {
    function: Function,
    comm_out: u64,
    parent: u64,
    /// User address of the unique id, or 0.
    id: u64,
    ranks: Option<i32>,
    rank: Option<i32>,
    color: i32,
}

#[inline(always)]
fn enter_constructor(ctx: &ProbeContext, task: Task, made: &Construction) {
    note!(
        ctx,
        "thread {} enters constructor {}",
        task.tid(),
        made.function as u32
    );
    let stack_pointer = stack_pointer(ctx);
    if let Some(open) = NCCL_CONSTRUCTORS.get_ptr(task.0) {
        // SAFETY: the entry belongs to this thread, which is here.
        if stack_pointer < unsafe { (*open).stack_pointer } {
            return;
        }
    }
    // SAFETY: the helper has no preconditions.
    let mut head = head(Kind::Constructor, task, unsafe { bpf_ktime_get_ns() });
    if made.ranks.is_some() {
        head.flags |= flag::RANKS;
    }
    if made.rank.is_some() {
        head.flags |= flag::RANK;
    }
    let open = OpenConstructor {
        stack_pointer,
        comm_out: made.comm_out,
        record: Constructor {
            head,
            comm: 0,
            parent: made.parent,
            function: made.function as u32,
            ranks: made.ranks.unwrap_or(0),
            rank: made.rank.unwrap_or(0),
            color: made.color,
            id: [0; 128],
        },
    };
    if NCCL_CONSTRUCTORS.insert(task.0, &open, 0).is_ok() && made.id != 0 {
        read_id(task, made.id);
    }
}

/// Reads the id where it will stay: the 512 bytes of a program's stack do not hold it twice.
#[inline(always)]
fn read_id(task: Task, address: u64) {
    if let Some(open) = NCCL_CONSTRUCTORS.get_ptr_mut(task.0) {
        // SAFETY: the entry belongs to this thread, which is here.
        let record = unsafe { &mut (*open).record };
        // SAFETY: the helper checks the address and fails instead of faulting.
        let read = unsafe { bpf_probe_read_user_buf(address as *const u8, &mut record.id) };
        record.head.flags |= if read.is_ok() { flag::ID } else { flag::UNREADABLE };
    }
}

/// `ncclCommInitRank(comm*, nranks, commId, rank)` and `ncclCommInitRankConfig(.., config*)`; the cookie is the function.
#[uprobe]
fn nccl_init_rank(ctx: ProbeContext) -> u32 {
    if let Some(task) = traced() {
        let arguments = arguments(&ctx);
        let function = if cookie(&ctx) == Function::CommInitRankConfig as u64 {
            Function::CommInitRankConfig
        } else {
            Function::CommInitRank
        };
        let made = Construction {
            function,
            comm_out: arguments.get(0),
            parent: 0,
            id: by_value_id(&ctx, 2),
            ranks: Some(arguments.get(1) as i32),
            rank: Some(arguments.get(after_id(2)) as i32),
            color: 0,
        };
        enter_constructor(&ctx, task, &made);
    }
    0
}

/// `ncclCommInitRankScalable(comm*, nranks, rank, nId, ids*, config*)`: the first id stands for all.
#[uprobe]
fn nccl_init_scalable(ctx: ProbeContext) -> u32 {
    if let Some(task) = traced() {
        let arguments = arguments(&ctx);
        let made = Construction {
            function: Function::CommInitRankScalable,
            comm_out: arguments.get(0),
            parent: 0,
            id: arguments.get(4),
            ranks: Some(arguments.get(1) as i32),
            rank: Some(arguments.get(2) as i32),
            color: arguments.get(3) as i32,
        };
        enter_constructor(&ctx, task, &made);
    }
    0
}

/// `ncclCommInitAll(comms*, devices, list*)`.
#[uprobe]
fn nccl_init_all(ctx: ProbeContext) -> u32 {
    if let Some(task) = traced() {
        let arguments = arguments(&ctx);
        let made = Construction {
            function: Function::CommInitAll,
            comm_out: arguments.get(0),
            parent: 0,
            id: 0,
            ranks: Some(arguments.get(1) as i32),
            rank: None,
            color: 0,
        };
        enter_constructor(&ctx, task, &made);
    }
    0
}

/// `ncclCommSplit(comm, color, key, newcomm*, config*)`: rank and ranks of the child are not among the arguments.
#[uprobe]
fn nccl_split(ctx: ProbeContext) -> u32 {
    if let Some(task) = traced() {
        let arguments = arguments(&ctx);
        let made = Construction {
            function: Function::CommSplit,
            comm_out: arguments.get(3),
            parent: arguments.get(0),
            id: 0,
            ranks: None,
            rank: None,
            color: arguments.get(1) as i32,
        };
        enter_constructor(&ctx, task, &made);
    }
    0
}

/// `ncclCommShrink(comm, excluded*, excludedCount, newcomm*, config*, flags)`.
#[uprobe]
fn nccl_shrink(ctx: ProbeContext) -> u32 {
    if let Some(task) = traced() {
        let arguments = arguments(&ctx);
        let made = Construction {
            function: Function::CommShrink,
            comm_out: arguments.get(3),
            parent: arguments.get(0),
            id: 0,
            ranks: None,
            rank: None,
            color: arguments.get(2) as i32,
        };
        enter_constructor(&ctx, task, &made);
    }
    0
}

/// `ncclCommGrow(comm, nranks, id*, rank, newcomm*, config*)`: ranks already in pass rank -1 and no id.
#[uprobe]
fn nccl_grow(ctx: ProbeContext) -> u32 {
    if let Some(task) = traced() {
        let arguments = arguments(&ctx);
        let rank = arguments.get(3) as i32;
        let made = Construction {
            function: Function::CommGrow,
            comm_out: arguments.get(4),
            parent: arguments.get(0),
            id: arguments.get(2),
            ranks: Some(arguments.get(1) as i32),
            rank: if rank < 0 { None } else { Some(rank) },
            color: 0,
        };
        enter_constructor(&ctx, task, &made);
    }
    0
}

/// Return of every constructor.
#[uretprobe]
fn nccl_constructor_return(ctx: RetProbeContext) -> u32 {
    // SAFETY: the helper has no preconditions.
    let now = unsafe { bpf_ktime_get_ns() };
    let task = Task::current();
    let Some(open) = NCCL_CONSTRUCTORS.get_ptr_mut(task.0) else {
        return 0;
    };
    // SAFETY: the entry belongs to this thread, which is here.
    let open = unsafe { &mut *open };
    if entry_stack_pointer(&ctx) != open.stack_pointer {
        return 0;
    }
    returned(&mut open.record.head, ctx.ret::<i32>(), now);
    if open.record.function == Function::CommInitAll as u32 {
        open.record.head.flags |= flag::RANK;
        for rank in 0..INIT_ALL_DEVICES {
            if rank >= open.record.ranks {
                break;
            }
            open.record.rank = rank;
            emit_constructed(open, open.comm_out + 8 * rank as u64);
        }
    } else {
        emit_constructed(open, open.comm_out);
    }
    let _ = NCCL_CONSTRUCTORS.remove(task.0);
    0
}

#[inline(always)]
fn emit_constructed(open: &mut OpenConstructor, comm_out: u64) {
    match read_user::<u64>(comm_out) {
        Some(comm) => open.record.comm = comm,
        None => open.record.head.flags |= flag::UNREADABLE,
    }
    emit(Ring::Nccl, &open.record);
}

/// Entry of finalize, destroy, abort and revoke; the cookie is the function.
#[uprobe]
fn nccl_teardown(ctx: ProbeContext) -> u32 {
    if let Some(task) = traced() {
        // SAFETY: the helper has no preconditions.
        let head = head(Kind::Teardown, task, unsafe { bpf_ktime_get_ns() });
        let function = cookie(&ctx) as u32;
        emit(
            Ring::Nccl,
            &Teardown {
                head,
                comm: arguments(&ctx).get(0),
                function,
                reserved: 0,
            },
        );
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
    if let Some(open) = NCCL_CONSTRUCTORS.get_ptr(task.0) {
        // SAFETY: the entry belongs to this thread, which is here.
        emit(Ring::Nccl, unsafe { &(*open).record });
        let _ = NCCL_CONSTRUCTORS.remove(task.0);
    }
    let _ = NCCL_GROUPS.remove(task.0);
}
