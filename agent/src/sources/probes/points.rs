//! Which program is attached to which function of a library, and with which cookie.

use stallscope_records::abi::{
    CallShape, ConstructorShape, CudaShape, Direction, Function, Launch, NO_ARGUMENT, SyncTarget,
};
use stallscope_records::verbs::first_argument;

use crate::sources::procs::LibraryKind;

/// A function of a library and the programs on it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Point {
    /// The exported symbol.
    pub(super) symbol: &'static str,
    /// Program at its entry.
    pub(super) entry: &'static str,
    /// Program at its return.
    pub(super) on_return: Option<&'static str>,
    /// What the programs are told about it, whatever the library.
    cookie: u64,
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

impl Point {
    /// The cookie, with what is known about the library: its version code and the offset of the rank in its communicators.
    pub(super) fn cookie(&self, version: Option<u32>, rank_offset: Option<u32>) -> u64 {
        match (self.entry, self.on_return) {
            ("nccl_call", _) => CallShape::with_rank_offset(self.cookie, rank_offset.unwrap_or(0)),
            (_, Some("nccl_constructor_return")) => {
                self.cookie | u64::from(version.unwrap_or(0)) << ConstructorShape::VERSION
            }
            _ => self.cookie,
        }
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
    // The same with a configuration at the end, since 2.32.
    call("ncclAllReduceConfig", Function::AllReduce, [2, 3, NO_PEER, 5, 6]),
    call(
        "ncclReduceScatterConfig",
        Function::ReduceScatter,
        [2, 3, NO_PEER, 5, 6],
    ),
    call("ncclAllGatherConfig", Function::AllGather, [2, 3, NO_PEER, 4, 5]),
    call("ncclAlltoAllConfig", Function::AllToAll, [2, 3, NO_PEER, 4, 5]),
    call("ncclBroadcastConfig", Function::Broadcast, [2, 3, 4, 5, 6]),
    call("ncclReduceConfig", Function::Reduce, [2, 3, 5, 6, 7]),
    call("ncclGatherConfig", Function::Gather, [2, 3, 4, 5, 6]),
    call("ncclScatterConfig", Function::Scatter, [2, 3, 4, 5, 6]),
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
    Point {
        symbol: "ncclGetUniqueId",
        entry: "nccl_unique_id",
        on_return: Some("nccl_unique_id_return"),
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

/// A control call whose first argument leads to the device's context, as [`first_argument`] says.
const fn control(symbol: &'static str, first: u64) -> Point {
    Point {
        symbol,
        entry: "verbs_control",
        on_return: None,
        cookie: first,
    }
}

const fn queue_pair(symbol: &'static str, entry: &'static str) -> Point {
    Point {
        symbol,
        entry,
        on_return: None,
        cookie: 0,
    }
}

/// The exported calls, by verbs.h. Posting and polling are not among them: the header calls the provider directly.
const VERBS: &[Point] = &[
    control("ibv_alloc_pd", first_argument::IS_CONTEXT),
    control("ibv_create_cq", first_argument::IS_CONTEXT),
    control("ibv_reg_mr", first_argument::HOLDS_CONTEXT),
    control("ibv_reg_mr_iova2", first_argument::HOLDS_CONTEXT),
    control("ibv_reg_dmabuf_mr", first_argument::HOLDS_CONTEXT),
    Point {
        symbol: "ibv_create_qp",
        entry: "verbs_control",
        on_return: Some("verbs_qp_made"),
        cookie: first_argument::HOLDS_CONTEXT,
    },
    queue_pair("ibv_qp_to_qp_ex", "verbs_qp_extended"),
    queue_pair("ibv_modify_qp", "verbs_qp_changed"),
    queue_pair("ibv_destroy_qp", "verbs_qp_gone"),
    Point {
        symbol: "ibv_get_async_event",
        entry: "verbs_event_wait",
        on_return: Some("verbs_event_got"),
        cookie: 0,
    },
];

/// The functions to attach to in a library of this kind.
pub(super) const fn points(kind: LibraryKind) -> &'static [Point] {
    match kind {
        LibraryKind::Nccl => NCCL,
        LibraryKind::Cuda => CUDA,
        LibraryKind::Verbs => VERBS,
    }
}

#[cfg(test)]
mod tests {
    use super::super::programs::{Hook, PROGRAMS};
    use super::*;

    #[test]
    fn every_program_of_a_point_is_declared_with_its_hook() {
        for point in NCCL.iter().chain(CUDA).chain(VERBS) {
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
        let mut symbols: Vec<_> = NCCL
            .iter()
            .chain(CUDA)
            .chain(VERBS)
            .map(|point| point.symbol)
            .collect();
        symbols.sort_unstable();
        let before = symbols.len();
        symbols.dedup();
        assert_eq!(symbols.len(), before);
    }
}
