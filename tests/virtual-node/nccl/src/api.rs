//! The exported functions.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{c_char, c_int, c_void};
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::bootstrap::{UniqueId, start_root};
use crate::comm::Comm;
use crate::proxy::{Pattern, PeerOp, Work, submit};

pub(crate) type Status = c_int;
pub(crate) type Handle = *mut c_void;

pub(crate) const SUCCESS: Status = 0;
pub(crate) const UNHANDLED_CUDA: Status = 1;
const SYSTEM_ERROR: Status = 2;
pub(crate) const INVALID_ARGUMENT: Status = 4;
pub(crate) const INVALID_USAGE: Status = 5;

/// 2.27.5, in NCCL's way of counting.
const VERSION: c_int = 22_705;

/// Communicators by handle: handles are addresses of leaked markers, so no two are ever equal.
fn table() -> std::sync::MutexGuard<'static, HashMap<usize, Arc<Comm>>> {
    static TABLE: OnceLock<Mutex<HashMap<usize, Arc<Comm>>>> = OnceLock::new();
    TABLE
        .get_or_init(Mutex::default)
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
}

fn register(comm: Arc<Comm>) -> Handle {
    let handle = Box::into_raw(Box::new(comm.key)).cast::<c_void>();
    table().insert(handle as usize, comm);
    handle
}

pub(crate) fn find(comm: Handle) -> Option<Arc<Comm>> {
    table().get(&(comm as usize)).cloned()
}

struct Queued {
    comm: Arc<Comm>,
    stream: usize,
    work: Work,
}

#[derive(Default)]
struct Group {
    depth: u32,
    queued: Vec<Queued>,
}

thread_local! {
    static GROUP: RefCell<Group> = RefCell::default();
}

/// Submits now, or at the end of the outermost group.
fn enqueue(comm: Handle, stream: Handle, make: impl FnOnce(&Comm) -> Result<Work, Status>) -> Status {
    let Some(comm) = find(comm) else {
        return INVALID_ARGUMENT;
    };
    let work = match make(&comm) {
        Ok(work) => work,
        Err(status) => return status,
    };
    let queued = Queued {
        comm,
        stream: stream as usize,
        work,
    };
    let now = GROUP.with_borrow_mut(|group| match group.depth {
        0 => Some(queued),
        _ => {
            group.queued.push(queued);
            None
        }
    });
    now.map_or(SUCCESS, |queued| launch(vec![queued]))
}

/// Sends and receives of one communicator and stream become one kernel; collectives keep their order.
fn launch(all: Vec<Queued>) -> Status {
    let mut merged: Vec<Queued> = Vec::with_capacity(all.len());
    for queued in all {
        let twin = merged.iter_mut().find(|other| {
            other.stream == queued.stream
                && Arc::ptr_eq(&other.comm, &queued.comm)
                && matches!((&other.work, &queued.work), (Work::Peers(_), Work::Peers(_)))
        });
        match (twin.map(|twin| &mut twin.work), queued.work) {
            (Some(Work::Peers(ops)), Work::Peers(more)) => ops.extend(more),
            (_, work) => merged.push(Queued { work, ..queued }),
        }
    }
    let all_taken = merged
        .into_iter()
        .all(|queued| submit(&queued.comm, queued.stream as Handle, queued.work));
    if all_taken { SUCCESS } else { UNHANDLED_CUDA }
}

fn type_bytes(datatype: c_int) -> Option<u64> {
    match datatype {
        0 | 1 | 10 | 11 => Some(1), // int8, uint8, fp8 e4m3 and e5m2
        6 | 9 => Some(2),           // half, bfloat16
        2 | 3 | 7 => Some(4),       // int32, uint32, float
        4 | 5 | 8 => Some(8),       // int64, uint64, double
        _ => None,
    }
}

fn payload(count: usize, datatype: c_int) -> Result<u64, Status> {
    let width = type_bytes(datatype).ok_or(INVALID_ARGUMENT)?;
    (count as u64).checked_mul(width).ok_or(INVALID_ARGUMENT)
}

fn collective(comm: &Comm, pattern: Pattern, bytes: u64) -> Work {
    Work::Collective {
        sequence: comm.sequence.fetch_add(1, SeqCst),
        pattern,
        bytes,
    }
}

fn node_of(comm: &Comm, rank: c_int) -> Result<usize, Status> {
    let card = usize::try_from(rank)
        .ok()
        .and_then(|rank| comm.cards.get(rank))
        .ok_or(INVALID_ARGUMENT)?;
    comm.nodes
        .iter()
        .position(|node| *node == card.node)
        .ok_or(INVALID_ARGUMENT)
}

/// Writes through an out-pointer of the caller.
///
/// # Safety
/// `to` is null or valid for a write of `T`.
pub(crate) unsafe fn put<T>(to: *mut T, value: T) -> Status {
    if to.is_null() {
        return INVALID_ARGUMENT;
    }
    // SAFETY: not null, and valid by the caller's contract.
    unsafe { to.write(value) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ncclGetVersion(version: *mut c_int) -> Status {
    // SAFETY: the caller's out-pointer.
    unsafe { put(version, VERSION) }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ncclGetUniqueId(id: *mut UniqueId) -> Status {
    match start_root() {
        // SAFETY: the caller's out-pointer.
        Ok(made) => unsafe { put(id, made) },
        Err(_) => SYSTEM_ERROR,
    }
}

/// # Safety
/// `comm` is null or valid for a write.
unsafe fn init(comm: *mut Handle, ranks: c_int, id: &UniqueId, rank: c_int) -> Status {
    let (Ok(ranks), Ok(rank)) = (u32::try_from(ranks), u32::try_from(rank)) else {
        return INVALID_ARGUMENT;
    };
    if comm.is_null() || rank >= ranks {
        return INVALID_ARGUMENT;
    }
    match Comm::join(id.key(), id.root(), rank, ranks) {
        // SAFETY: the caller's out-pointer.
        Ok(joined) => unsafe { put(comm, register(joined)) },
        Err(_) => SYSTEM_ERROR,
    }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ncclCommInitRank(
    comm: *mut Handle,
    ranks: c_int,
    id: UniqueId,
    rank: c_int,
) -> Status {
    // SAFETY: the caller's out-pointer.
    unsafe { init(comm, ranks, &id, rank) }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ncclCommInitRankConfig(
    comm: *mut Handle,
    ranks: c_int,
    id: UniqueId,
    rank: c_int,
    _config: *const c_void,
) -> Status {
    // SAFETY: the caller's out-pointer.
    unsafe { init(comm, ranks, &id, rank) }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ncclCommInitRankScalable(
    comm: *mut Handle,
    ranks: c_int,
    rank: c_int,
    ids: c_int,
    id: *const UniqueId,
    _config: *const c_void,
) -> Status {
    if ids < 1 || id.is_null() {
        return INVALID_ARGUMENT;
    }
    // SAFETY: at least one id lies behind the pointer; the out-pointer is the caller's.
    unsafe { init(comm, ranks, &*id, rank) }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ncclCommInitAll(
    comms: *mut Handle,
    devices: c_int,
    _list: *const c_int,
) -> Status {
    // One process driving one GPU is all this library needs to offer; more would need a thread per rank.
    if devices != 1 {
        return INVALID_USAGE;
    }
    let Ok(id) = start_root() else { return SYSTEM_ERROR };
    // SAFETY: the caller's out-pointer.
    unsafe { init(comms, 1, &id, 0) }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ncclCommSplit(
    comm: Handle,
    color: c_int,
    key: c_int,
    child: *mut Handle,
    _config: *const c_void,
) -> Status {
    let Some(comm) = find(comm) else {
        return INVALID_ARGUMENT;
    };
    match comm.split(i64::from(color), i64::from(key)) {
        // SAFETY: the caller's out-pointer.
        Ok(made) => unsafe { put(child, made.map_or(std::ptr::null_mut(), register)) },
        Err(_) => SYSTEM_ERROR,
    }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ncclCommShrink(
    comm: Handle,
    excluded: *const c_int,
    count: c_int,
    child: *mut Handle,
    _config: *const c_void,
    _flags: c_int,
) -> Status {
    let (Some(comm), Ok(count)) = (find(comm), usize::try_from(count)) else {
        return INVALID_ARGUMENT;
    };
    if excluded.is_null() || count == 0 {
        return INVALID_ARGUMENT;
    }
    // SAFETY: the caller's array of `count` ranks.
    let excluded = unsafe { std::slice::from_raw_parts(excluded, count) };
    match comm.shrink(excluded) {
        // SAFETY: the caller's out-pointer.
        Ok(made) => unsafe { put(child, register(made)) },
        Err(_) => SYSTEM_ERROR,
    }
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn ncclCommFinalize(comm: Handle) -> Status {
    if find(comm).is_some() {
        SUCCESS
    } else {
        INVALID_ARGUMENT
    }
}

fn take_down(comm: Handle, abort: bool) -> Status {
    let Some(found) = table().remove(&(comm as usize)) else {
        return INVALID_ARGUMENT;
    };
    found.close(abort);
    SUCCESS
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn ncclCommDestroy(comm: Handle) -> Status {
    take_down(comm, false)
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn ncclCommAbort(comm: Handle) -> Status {
    take_down(comm, true)
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ncclCommGetAsyncError(comm: Handle, status: *mut Status) -> Status {
    if find(comm).is_none() {
        return INVALID_ARGUMENT;
    }
    // SAFETY: the caller's out-pointer.
    unsafe { put(status, SUCCESS) }
}

fn ask(comm: Handle, to: *mut c_int, what: impl FnOnce(&Comm) -> i32) -> Status {
    match find(comm) {
        // SAFETY: the caller's out-pointer.
        Some(comm) => unsafe { put(to, what(&comm)) },
        None => INVALID_ARGUMENT,
    }
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn ncclCommCount(comm: Handle, count: *mut c_int) -> Status {
    ask(comm, count, |comm| comm.ranks.cast_signed())
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn ncclCommCuDevice(comm: Handle, device: *mut c_int) -> Status {
    ask(comm, device, |comm| comm.device)
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn ncclCommUserRank(comm: Handle, rank: *mut c_int) -> Status {
    ask(comm, rank, |comm| comm.rank.cast_signed())
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn ncclAllReduce(
    _send: *const c_void,
    _receive: *mut c_void,
    count: usize,
    datatype: c_int,
    _op: c_int,
    comm: Handle,
    stream: Handle,
) -> Status {
    enqueue(comm, stream, |comm| {
        Ok(collective(comm, Pattern::AllReduce, payload(count, datatype)?))
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn ncclAllGather(
    _send: *const c_void,
    _receive: *mut c_void,
    count: usize,
    datatype: c_int,
    comm: Handle,
    stream: Handle,
) -> Status {
    enqueue(comm, stream, |comm| {
        Ok(collective(
            comm,
            Pattern::Ring,
            payload(count, datatype)?.saturating_mul(u64::from(comm.ranks)),
        ))
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn ncclReduceScatter(
    _send: *const c_void,
    _receive: *mut c_void,
    count: usize,
    datatype: c_int,
    _op: c_int,
    comm: Handle,
    stream: Handle,
) -> Status {
    enqueue(comm, stream, |comm| {
        Ok(collective(
            comm,
            Pattern::Ring,
            payload(count, datatype)?.saturating_mul(u64::from(comm.ranks)),
        ))
    })
}

fn broadcast(count: usize, datatype: c_int, root: c_int, comm: Handle, stream: Handle) -> Status {
    enqueue(comm, stream, |comm| {
        let first = node_of(comm, root)?;
        Ok(collective(
            comm,
            Pattern::Chain { first },
            payload(count, datatype)?,
        ))
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn ncclBroadcast(
    _send: *const c_void,
    _receive: *mut c_void,
    count: usize,
    datatype: c_int,
    root: c_int,
    comm: Handle,
    stream: Handle,
) -> Status {
    broadcast(count, datatype, root, comm, stream)
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn ncclBcast(
    _buffer: *mut c_void,
    count: usize,
    datatype: c_int,
    root: c_int,
    comm: Handle,
    stream: Handle,
) -> Status {
    broadcast(count, datatype, root, comm, stream)
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn ncclReduce(
    _send: *const c_void,
    _receive: *mut c_void,
    count: usize,
    datatype: c_int,
    _op: c_int,
    root: c_int,
    comm: Handle,
    stream: Handle,
) -> Status {
    enqueue(comm, stream, |comm| {
        // The chain ends at the root's node.
        let first = (node_of(comm, root)? + 1) % comm.nodes.len();
        Ok(collective(
            comm,
            Pattern::Chain { first },
            payload(count, datatype)?,
        ))
    })
}

fn point_to_point(
    sends: bool,
    count: usize,
    datatype: c_int,
    peer: c_int,
    comm: Handle,
    stream: Handle,
) -> Status {
    enqueue(comm, stream, |comm| {
        let peer = u32::try_from(peer)
            .ok()
            .filter(|peer| *peer < comm.ranks)
            .ok_or(INVALID_ARGUMENT)?;
        Ok(Work::Peers(vec![PeerOp {
            sends,
            peer,
            bytes: payload(count, datatype)?,
        }]))
    })
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn ncclSend(
    _buffer: *const c_void,
    count: usize,
    datatype: c_int,
    peer: c_int,
    comm: Handle,
    stream: Handle,
) -> Status {
    point_to_point(true, count, datatype, peer, comm, stream)
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn ncclRecv(
    _buffer: *mut c_void,
    count: usize,
    datatype: c_int,
    peer: c_int,
    comm: Handle,
    stream: Handle,
) -> Status {
    point_to_point(false, count, datatype, peer, comm, stream)
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn ncclGroupStart() -> Status {
    GROUP.with_borrow_mut(|group| group.depth += 1);
    SUCCESS
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn ncclGroupEnd() -> Status {
    let ready = GROUP.with_borrow_mut(|group| {
        group.depth = group.depth.checked_sub(1)?;
        Some(if group.depth == 0 {
            std::mem::take(&mut group.queued)
        } else {
            Vec::new()
        })
    });
    ready.map_or(INVALID_USAGE, launch)
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn ncclGetErrorString(status: Status) -> *const c_char {
    let text = match status {
        SUCCESS => c"no error",
        UNHANDLED_CUDA => c"unhandled cuda error (run with NCCL_DEBUG=INFO for details)",
        SYSTEM_ERROR => c"unhandled system error (run with NCCL_DEBUG=INFO for details)",
        3 => c"internal error - please report this issue to the NCCL developers",
        INVALID_ARGUMENT => c"invalid argument (run with NCCL_DEBUG=WARN for details)",
        INVALID_USAGE => c"invalid usage (run with NCCL_DEBUG=WARN for details)",
        6 => c"remote process exited or there was a network error",
        7 => c"NCCL operation in progress",
        _ => c"unknown result code",
    };
    text.as_ptr()
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn ncclGetLastError(_comm: Handle) -> *const c_char {
    c"".as_ptr()
}
