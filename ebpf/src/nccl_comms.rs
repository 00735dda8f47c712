//! NCCL's communicators: made, used for the first time, ended.
//!
//! A constructor tells the unique id and what its caller knows. The first call with a communicator tells what the library
//! itself wrote into it: that covers the communicators that are older than the agent, those whose constructor returned
//! before they were made (in a group, or not blocking), and ranks and devices that are not among the arguments.

use aya_ebpf::{
    helpers::{bpf_ktime_get_ns, bpf_probe_read_user_buf},
    macros::{map, uprobe, uretprobe},
    maps::{HashMap, LruHashMap},
    programs::{ProbeContext, RetProbeContext},
};
use stallscope_records::{
    Kind, Ring,
    abi::{ConstructorShape, Function},
    record::{CommSeen, Constructor, Teardown, flag},
};

use crate::{
    call::{after_id, arguments, by_value_id, cookie, entry_stack_pointer, read_user, stack_pointer},
    emit::{emit, note},
    filter::{Task, traced},
    nccl::{head, returned},
};

/// Open constructors, by thread: rare, and each holds an id.
const CONSTRUCTING_THREADS: u32 = 1024;
/// Devices of one `ncclCommInitAll` that get a record.
const INIT_ALL_DEVICES: i32 = 16;
/// Communicators whose content was told; one that falls out is told again.
const COMMS: u32 = 4096;

#[derive(Clone, Copy)]
#[repr(C)]
struct OpenConstructor {
    stack_pointer: u64,
    /// Where the communicator is written.
    comm_out: u64,
    /// `ncclCommInitAll`: the list of devices, or 0 for 0, 1, 2...
    devices: u64,
    /// `ncclCommInitAll`: where the id that it makes for itself is being written, or 0.
    id_out: u64,
    record: Constructor,
}

#[map]
static NCCL_CONSTRUCTORS: HashMap<u64, OpenConstructor> = HashMap::with_max_entries(CONSTRUCTING_THREADS, 0);
/// Communicators that were told, by thread group id and address.
#[map]
static NCCL_COMMS: LruHashMap<[u64; 2], u64> = LruHashMap::with_max_entries(COMMS, 0);

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
    devices: u64,
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
        devices: made.devices,
        id_out: 0,
        record: Constructor {
            head,
            comm: 0,
            parent: made.parent,
            function: made.function as u32,
            ranks: made.ranks.unwrap_or(0),
            rank: made.rank.unwrap_or(0),
            color: made.color,
            id: [0; 128],
            version: (cookie(ctx) >> ConstructorShape::VERSION) as u32,
            device: 0,
        },
    };
    if NCCL_CONSTRUCTORS.insert(task.0, &open, 0).is_ok()
        && made.id != 0
        && let Some(open) = NCCL_CONSTRUCTORS.get_ptr_mut(task.0)
    {
        // SAFETY: the entry belongs to this thread, which is here.
        read_id(unsafe { &mut (*open).record }, made.id);
    }
}

/// Reads the id where it will stay: the 512 bytes of a program's stack do not hold it twice.
#[inline(always)]
fn read_id(record: &mut Constructor, address: u64) {
    // SAFETY: the helper checks the address and fails instead of faulting.
    let read = unsafe { bpf_probe_read_user_buf(address as *const u8, &mut record.id) };
    record.head.flags |= if read.is_ok() { flag::ID } else { flag::UNREADABLE };
}

/// `ncclCommInitRank(comm*, nranks, commId, rank)` and `ncclCommInitRankConfig(.., config*)`; the cookie is the function.
#[uprobe]
fn nccl_init_rank(ctx: ProbeContext) -> u32 {
    if let Some(task) = traced() {
        let arguments = arguments(&ctx);
        let function = if cookie(&ctx) as u32 == Function::CommInitRankConfig as u32 {
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
            devices: 0,
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
            devices: 0,
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
            devices: arguments.get(2),
        };
        enter_constructor(&ctx, task, &made);
    }
    0
}

/// `ncclGetUniqueId(id*)`, of interest only where `ncclCommInitAll` calls it: nobody else learns that id.
#[uprobe]
fn nccl_unique_id(ctx: ProbeContext) -> u32 {
    if let Some(open) = open_init_all() {
        open.id_out = arguments(&ctx).get(0);
    }
    0
}

#[uretprobe]
fn nccl_unique_id_return(_ctx: RetProbeContext) -> u32 {
    if let Some(open) = open_init_all()
        && open.id_out != 0
    {
        read_id(&mut open.record, open.id_out);
        open.id_out = 0;
    }
    0
}

/// The `ncclCommInitAll` that the current thread is in.
#[inline(always)]
fn open_init_all() -> Option<&'static mut OpenConstructor> {
    let open = NCCL_CONSTRUCTORS.get_ptr_mut(Task::current().0)?;
    // SAFETY: the entry belongs to this thread, which is here.
    let open = unsafe { &mut *open };
    (open.record.function == Function::CommInitAll as u32).then_some(open)
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
            devices: 0,
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
            devices: 0,
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
            devices: 0,
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
            let device = match open.devices {
                0 => Some(rank),
                list => read_user::<i32>(list + 4 * rank as u64),
            };
            open.record.device = device.unwrap_or(0);
            open.record.head.flags = if device.is_some() {
                open.record.head.flags | flag::DEVICE
            } else {
                open.record.head.flags & !flag::DEVICE
            };
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
        Some(comm) => {
            open.record.comm = comm;
            forget_comm(Task::current(), comm);
        }
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
        forget_comm(task, arguments(&ctx).get(0));
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

/// A call uses a communicator whose rank lies at `rank_offset`; 0 where that is not known.
#[inline(always)]
pub(crate) fn used(task: Task, comm: u64, rank_offset: u32) {
    if rank_offset < 8 {
        return;
    }
    let key = [u64::from(task.tgid()), comm];
    if NCCL_COMMS.get_ptr(key).is_some() {
        return;
    }
    // The 64-bit hash lies before the rank, and behind it the number of ranks and the device.
    let (Some(magic), Some([low, high, rank, ranks, device])) = (
        read_user::<u64>(comm),
        read_user::<[u32; 5]>(comm + u64::from(rank_offset) - 8),
    ) else {
        return;
    };
    if NCCL_COMMS.insert(key, 1, 0).is_err() {
        return;
    }
    emit(
        Ring::Nccl,
        &CommSeen {
            // SAFETY: the helper has no preconditions.
            head: head(Kind::CommSeen, task, unsafe { bpf_ktime_get_ns() }),
            comm,
            magic,
            hash: u64::from(high) << 32 | u64::from(low),
            rank: rank as i32,
            ranks: ranks as i32,
            device: device as i32,
            reserved: 0,
        },
    );
}

/// The address may be another communicator's from now on.
#[inline(always)]
fn forget_comm(task: Task, comm: u64) {
    let _ = NCCL_COMMS.remove([u64::from(task.tgid()), comm]);
}

/// The thread is going: what it was inside of will not return.
#[inline(always)]
pub(crate) fn thread_gone(task: Task) {
    if let Some(open) = NCCL_CONSTRUCTORS.get_ptr(task.0) {
        // SAFETY: the entry belongs to this thread, which is here.
        emit(Ring::Nccl, unsafe { &(*open).record });
        let _ = NCCL_CONSTRUCTORS.remove(task.0);
    }
}
