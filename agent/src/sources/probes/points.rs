//! Which program is attached where, and with which cookie.

use stallscope_records::Ring;
use stallscope_records::abi::{CallShape, CudaShape, Direction, Function, Launch, NO_ARGUMENT, SyncTarget};

use crate::sources::procs::LibraryKind;

/// How a program hooks into the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hook {
    /// First instruction of functions of a library.
    Entry,
    /// Return of functions of a library.
    Return,
    /// Tracepoints, as (category, name), attached while [`When`] holds.
    Tracepoints(When, &'static [(&'static str, &'static str)]),
}

/// When a tracepoint program is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum When {
    /// From loading on.
    Always,
    /// While at least one process is traced: they are on the path of every context switch or system call.
    Tracing,
}

/// A program of the object.
#[derive(Debug, Clone, Copy)]
pub(super) struct ProgramSpec {
    /// Its name in the object.
    pub(super) name: &'static str,
    /// Its world.
    pub(super) ring: Ring,
    /// Its hook.
    pub(super) hook: Hook,
    /// What is lost without it.
    pub(super) intent: &'static str,
}

const fn uprobe(name: &'static str, ring: Ring, hook: Hook, intent: &'static str) -> ProgramSpec {
    ProgramSpec {
        name,
        ring,
        hook,
        intent,
    }
}

const fn tracepoints(
    name: &'static str,
    ring: Ring,
    when: When,
    points: &'static [(&'static str, &'static str)],
    intent: &'static str,
) -> ProgramSpec {
    ProgramSpec {
        name,
        ring,
        hook: Hook::Tracepoints(when, points),
        intent,
    }
}

/// Every program of the object.
pub(super) const PROGRAMS: &[ProgramSpec] = &[
    uprobe(
        "nccl_call",
        Ring::Nccl,
        Hook::Entry,
        "collectives, and with them steps",
    ),
    uprobe(
        "nccl_call_return",
        Ring::Nccl,
        Hook::Return,
        "ends and results of collectives",
    ),
    uprobe(
        "nccl_group_start",
        Ring::Nccl,
        Hook::Entry,
        "nesting of groups of collectives",
    ),
    uprobe("nccl_group_end", Ring::Nccl, Hook::Entry, "groups of collectives"),
    uprobe(
        "nccl_group_end_return",
        Ring::Nccl,
        Hook::Return,
        "groups of collectives",
    ),
    uprobe(
        "nccl_init_rank",
        Ring::Nccl,
        Hook::Entry,
        "communicators made from a unique id",
    ),
    uprobe(
        "nccl_init_scalable",
        Ring::Nccl,
        Hook::Entry,
        "communicators made from many unique ids",
    ),
    uprobe(
        "nccl_init_all",
        Ring::Nccl,
        Hook::Entry,
        "communicators of one process with many GPUs",
    ),
    uprobe(
        "nccl_split",
        Ring::Nccl,
        Hook::Entry,
        "communicators split from another",
    ),
    uprobe(
        "nccl_shrink",
        Ring::Nccl,
        Hook::Entry,
        "communicators shrunk from another",
    ),
    uprobe(
        "nccl_grow",
        Ring::Nccl,
        Hook::Entry,
        "communicators grown from another",
    ),
    uprobe(
        "nccl_constructor_return",
        Ring::Nccl,
        Hook::Return,
        "communicators",
    ),
    uprobe("nccl_teardown", Ring::Nccl, Hook::Entry, "ends of communicators"),
    uprobe(
        "cuda_launch",
        Ring::Cuda,
        Hook::Entry,
        "kernel and graph launches",
    ),
    uprobe(
        "cuda_sync",
        Ring::Cuda,
        Hook::Entry,
        "synchronisations, and with them waiting for the GPU",
    ),
    uprobe("cuda_copy", Ring::Cuda, Hook::Entry, "synchronous copies"),
    uprobe(
        "cuda_return",
        Ring::Cuda,
        Hook::Return,
        "synchronisations and synchronous copies",
    ),
    uprobe("cuda_copy_async", Ring::Cuda, Hook::Entry, "asynchronous copies"),
    uprobe(
        "cuda_event_record",
        Ring::Cuda,
        Hook::Entry,
        "order between streams",
    ),
    uprobe(
        "cuda_stream_wait",
        Ring::Cuda,
        Hook::Entry,
        "order between streams",
    ),
    tracepoints(
        "sched_switch",
        Ring::Sched,
        When::Tracing,
        &[("sched", "sched_switch")],
        "time off the CPU, and time blocked in file calls",
    ),
    tracepoints(
        "sched_wakeup",
        Ring::Sched,
        When::Tracing,
        &[("sched", "sched_wakeup")],
        "waiting for a CPU after a sleep",
    ),
    tracepoints(
        "file_read",
        Ring::Block,
        When::Tracing,
        &[
            ("syscalls", "sys_enter_read"),
            ("syscalls", "sys_enter_pread64"),
            ("syscalls", "sys_enter_readv"),
            ("syscalls", "sys_enter_preadv"),
            ("syscalls", "sys_enter_preadv2"),
        ],
        "reads of files",
    ),
    tracepoints(
        "file_write",
        Ring::Block,
        When::Tracing,
        &[
            ("syscalls", "sys_enter_write"),
            ("syscalls", "sys_enter_pwrite64"),
            ("syscalls", "sys_enter_writev"),
            ("syscalls", "sys_enter_pwritev"),
            ("syscalls", "sys_enter_pwritev2"),
        ],
        "writes of files",
    ),
    tracepoints(
        "file_flush",
        Ring::Block,
        When::Tracing,
        &[
            ("syscalls", "sys_enter_fsync"),
            ("syscalls", "sys_enter_fdatasync"),
            ("syscalls", "sys_enter_sync_file_range"),
            ("syscalls", "sys_enter_syncfs"),
        ],
        "flushes of files",
    ),
    tracepoints(
        "file_done",
        Ring::Block,
        When::Tracing,
        &[
            ("syscalls", "sys_exit_read"),
            ("syscalls", "sys_exit_pread64"),
            ("syscalls", "sys_exit_readv"),
            ("syscalls", "sys_exit_preadv"),
            ("syscalls", "sys_exit_preadv2"),
            ("syscalls", "sys_exit_write"),
            ("syscalls", "sys_exit_pwrite64"),
            ("syscalls", "sys_exit_writev"),
            ("syscalls", "sys_exit_pwritev"),
            ("syscalls", "sys_exit_pwritev2"),
            ("syscalls", "sys_exit_fsync"),
            ("syscalls", "sys_exit_fdatasync"),
            ("syscalls", "sys_exit_sync_file_range"),
            ("syscalls", "sys_exit_syncfs"),
        ],
        "every file call",
    ),
    tracepoints(
        "block_issue",
        Ring::Block,
        When::Tracing,
        &[("block", "block_rq_issue")],
        "block requests of traced processes",
    ),
    tracepoints(
        "block_complete",
        Ring::Block,
        When::Tracing,
        &[("block", "block_rq_complete")],
        "latency of block requests",
    ),
    tracepoints(
        "process_exec",
        Ring::Procs,
        When::Always,
        &[("sched", "sched_process_exec")],
        "news of started programs; they are found by scanning instead",
    ),
    tracepoints(
        "process_fork",
        Ring::Procs,
        When::Always,
        &[("task", "task_newtask")],
        "helpers from birth; they are found by scanning instead",
    ),
    tracepoints(
        "process_exit",
        Ring::Procs,
        When::Always,
        &[("sched", "sched_process_exit")],
        "ends of processes, and calls that were cut off by them",
    ),
    tracepoints(
        "mmap_enter",
        Ring::Procs,
        When::Always,
        &[("syscalls", "sys_enter_mmap")],
        "news of loaded libraries; they are found by scanning instead",
    ),
    tracepoints(
        "mmap_done",
        Ring::Procs,
        When::Always,
        &[("syscalls", "sys_exit_mmap")],
        "news of loaded libraries; they are found by scanning instead",
    ),
];

/// A function of a library and the programs on it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Point {
    /// The exported symbol.
    pub(super) symbol: &'static str,
    /// Program at its entry.
    pub(super) entry: &'static str,
    /// Program at its return.
    pub(super) on_return: Option<&'static str>,
    /// What the programs are told about it.
    pub(super) cookie: u64,
}

/// Positions of count, datatype, peer or root, communicator and stream in a data-moving call.
const fn call(
    symbol: &'static str,
    function: Function,
    [count, datatype, peer, comm, stream]: [u64; 5],
) -> Point {
    let shape = CallShape {
        function,
        count,
        datatype,
        peer,
        comm,
        stream,
    };
    Point {
        symbol,
        entry: "nccl_call",
        on_return: Some("nccl_call_return"),
        cookie: shape.cookie(),
    }
}

const fn constructor(symbol: &'static str, entry: &'static str, function: Function) -> Point {
    Point {
        symbol,
        entry,
        on_return: Some("nccl_constructor_return"),
        cookie: function as u64,
    }
}

const fn teardown(symbol: &'static str, function: Function) -> Point {
    Point {
        symbol,
        entry: "nccl_teardown",
        on_return: None,
        cookie: function as u64,
    }
}

const NO_PEER: u64 = NO_ARGUMENT;

/// NCCL's public calls, by nccl.h; every version lacks some of them.
const NCCL: &[Point] = &[
    call("ncclAllReduce", Function::AllReduce, [2, 3, NO_PEER, 5, 6]),
    call(
        "ncclReduceScatter",
        Function::ReduceScatter,
        [2, 3, NO_PEER, 5, 6],
    ),
    call("ncclAllGather", Function::AllGather, [2, 3, NO_PEER, 4, 5]),
    call("ncclAlltoAll", Function::AllToAll, [2, 3, NO_PEER, 4, 5]),
    call("ncclBroadcast", Function::Broadcast, [2, 3, 4, 5, 6]),
    call("ncclBcast", Function::Broadcast, [1, 2, 3, 4, 5]),
    call("ncclReduce", Function::Reduce, [2, 3, 5, 6, 7]),
    call("ncclGather", Function::Gather, [2, 3, 4, 5, 6]),
    call("ncclScatter", Function::Scatter, [2, 3, 4, 5, 6]),
    call("ncclSend", Function::Send, [1, 2, 3, 4, 5]),
    call("ncclRecv", Function::Recv, [1, 2, 3, 4, 5]),
    Point {
        symbol: "ncclGroupStart",
        entry: "nccl_group_start",
        on_return: None,
        cookie: 0,
    },
    Point {
        symbol: "ncclGroupEnd",
        entry: "nccl_group_end",
        on_return: Some("nccl_group_end_return"),
        cookie: 0,
    },
    constructor("ncclCommInitRank", "nccl_init_rank", Function::CommInitRank),
    constructor(
        "ncclCommInitRankConfig",
        "nccl_init_rank",
        Function::CommInitRankConfig,
    ),
    constructor(
        "ncclCommInitRankScalable",
        "nccl_init_scalable",
        Function::CommInitRankScalable,
    ),
    constructor("ncclCommInitAll", "nccl_init_all", Function::CommInitAll),
    constructor("ncclCommSplit", "nccl_split", Function::CommSplit),
    constructor("ncclCommShrink", "nccl_shrink", Function::CommShrink),
    constructor("ncclCommGrow", "nccl_grow", Function::CommGrow),
    teardown("ncclCommFinalize", Function::CommFinalize),
    teardown("ncclCommDestroy", Function::CommDestroy),
    teardown("ncclCommAbort", Function::CommAbort),
    teardown("ncclCommRevoke", Function::CommRevoke),
];

const fn cuda(
    symbol: &'static str,
    entry: &'static str,
    on_return: Option<&'static str>,
    tag: u32,
    [first, second]: [u64; 2],
    per_thread: bool,
) -> Point {
    Point {
        symbol,
        entry,
        on_return,
        cookie: CudaShape {
            tag,
            first,
            second,
            per_thread,
        }
        .cookie(),
    }
}

const NONE: u64 = NO_ARGUMENT;

const fn sync(symbol: &'static str, target: SyncTarget, per_thread: bool) -> Point {
    cuda(
        symbol,
        "cuda_sync",
        Some("cuda_return"),
        target as u32,
        [0, NONE],
        per_thread,
    )
}

/// A synchronous copy with its byte count at index `bytes`.
const fn copy(symbol: &'static str, direction: Direction, bytes: u64) -> Point {
    cuda(
        symbol,
        "cuda_copy",
        Some("cuda_return"),
        direction as u32,
        [bytes, NONE],
        false,
    )
}

/// An asynchronous copy: byte count at `bytes`, stream behind it.
const fn copy_async(symbol: &'static str, direction: Direction, bytes: u64, per_thread: bool) -> Point {
    cuda(
        symbol,
        "cuda_copy_async",
        None,
        direction as u32,
        [bytes, bytes + 1],
        per_thread,
    )
}

const fn launch(symbol: &'static str, how: Launch, per_thread: bool) -> Point {
    cuda(symbol, "cuda_launch", None, how as u32, [NONE, NONE], per_thread)
}

const fn event_record(symbol: &'static str, per_thread: bool) -> Point {
    cuda(symbol, "cuda_event_record", None, 0, [0, 1], per_thread)
}

const fn stream_wait(symbol: &'static str, per_thread: bool) -> Point {
    cuda(symbol, "cuda_stream_wait", None, 0, [1, 0], per_thread)
}

/// The driver's calls, by cuda.h. `_ptsz` and `_ptds` are what a program built for per-thread default streams calls.
const CUDA: &[Point] = &[
    sync("cuCtxSynchronize", SyncTarget::Context, false),
    sync("cuCtxSynchronize_v2", SyncTarget::Context, false),
    sync("cuStreamSynchronize", SyncTarget::Stream, false),
    sync("cuStreamSynchronize_ptsz", SyncTarget::Stream, true),
    sync("cuEventSynchronize", SyncTarget::Event, false),
    copy("cuMemcpy", Direction::Unknown, 2),
    copy("cuMemcpy_ptds", Direction::Unknown, 2),
    copy("cuMemcpyHtoD_v2", Direction::ToDevice, 2),
    copy("cuMemcpyHtoD_v2_ptds", Direction::ToDevice, 2),
    copy("cuMemcpyDtoH_v2", Direction::ToHost, 2),
    copy("cuMemcpyDtoH_v2_ptds", Direction::ToHost, 2),
    copy("cuMemcpyDtoD_v2", Direction::DeviceToDevice, 2),
    copy("cuMemcpyDtoD_v2_ptds", Direction::DeviceToDevice, 2),
    copy("cuMemcpyPeer", Direction::DeviceToDevice, 4),
    copy("cuMemcpyPeer_ptds", Direction::DeviceToDevice, 4),
    copy_async("cuMemcpyAsync", Direction::Unknown, 2, false),
    copy_async("cuMemcpyAsync_ptsz", Direction::Unknown, 2, true),
    copy_async("cuMemcpyHtoDAsync_v2", Direction::ToDevice, 2, false),
    copy_async("cuMemcpyHtoDAsync_v2_ptsz", Direction::ToDevice, 2, true),
    copy_async("cuMemcpyDtoHAsync_v2", Direction::ToHost, 2, false),
    copy_async("cuMemcpyDtoHAsync_v2_ptsz", Direction::ToHost, 2, true),
    copy_async("cuMemcpyDtoDAsync_v2", Direction::DeviceToDevice, 2, false),
    copy_async("cuMemcpyDtoDAsync_v2_ptsz", Direction::DeviceToDevice, 2, true),
    copy_async("cuMemcpyPeerAsync", Direction::DeviceToDevice, 4, false),
    copy_async("cuMemcpyPeerAsync_ptsz", Direction::DeviceToDevice, 4, true),
    launch("cuLaunchKernel", Launch::Kernel, false),
    launch("cuLaunchKernel_ptsz", Launch::Kernel, true),
    launch("cuLaunchCooperativeKernel", Launch::Kernel, false),
    launch("cuLaunchCooperativeKernel_ptsz", Launch::Kernel, true),
    launch("cuLaunchKernelEx", Launch::KernelEx, false),
    launch("cuLaunchKernelEx_ptsz", Launch::KernelEx, true),
    launch("cuGraphLaunch", Launch::Graph, false),
    launch("cuGraphLaunch_ptsz", Launch::Graph, true),
    event_record("cuEventRecord", false),
    event_record("cuEventRecord_ptsz", true),
    event_record("cuEventRecordWithFlags", false),
    event_record("cuEventRecordWithFlags_ptsz", true),
    stream_wait("cuStreamWaitEvent", false),
    stream_wait("cuStreamWaitEvent_ptsz", true),
];

/// The functions to attach to in a library of this kind.
pub(super) const fn points(kind: LibraryKind) -> &'static [Point] {
    match kind {
        LibraryKind::Nccl => NCCL,
        LibraryKind::Cuda => CUDA,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_program_of_a_point_is_declared_with_its_hook() {
        for point in NCCL.iter().chain(CUDA) {
            let entry = PROGRAMS.iter().find(|program| program.name == point.entry);
            assert_eq!(
                entry.map(|program| program.hook),
                Some(Hook::Entry),
                "{}",
                point.symbol
            );
            if let Some(on_return) = point.on_return {
                let program = PROGRAMS.iter().find(|program| program.name == on_return);
                assert_eq!(
                    program.map(|program| program.hook),
                    Some(Hook::Return),
                    "{}",
                    point.symbol
                );
            }
        }
    }

    #[test]
    fn a_symbol_is_attached_once() {
        let mut symbols: Vec<_> = NCCL.iter().chain(CUDA).map(|point| point.symbol).collect();
        symbols.sort_unstable();
        let before = symbols.len();
        symbols.dedup();
        assert_eq!(symbols.len(), before);
    }
}
