//! Counters folded in kernel maps and read out by the agent. They only grow; the agent takes differences.

use crate::layout::record;

record! {
    /// Key of the file-call counters.
    pub struct FileKey: 8 {
        /// Thread group id.
        pub tgid: u32 = 0,
        /// A [`crate::abi::FileOp`].
        pub op: u32 = 4,
    }
}

record! {
    /// File calls of one process that were too short for a record of their own.
    pub struct FileFold: 32 {
        /// Calls.
        pub calls: u64 = 0,
        /// Bytes done.
        pub bytes: u64 = 8,
        /// Time inside the calls, ns.
        pub total_ns: u64 = 16,
        /// Of that, blocked on a device, ns.
        pub blocked_ns: u64 = 24,
    }
}

record! {
    /// Block requests issued by one process and completed.
    pub struct BlockFold: 24 {
        /// Requests.
        pub requests: u64 = 0,
        /// Bytes.
        pub bytes: u64 = 8,
        /// Sum of issue-to-completion times, ns.
        pub latency_ns: u64 = 16,
    }
}

record! {
    /// One open launch run of a thread.
    pub struct Run: 32 {
        /// Entry of the first launch; 0 when the slot is free.
        pub first_ns: u64 = 0,
        /// Entry of the last launch.
        pub last_ns: u64 = 8,
        /// The `CUstream`.
        pub stream: u64 = 16,
        /// Kernels.
        pub kernels: u32 = 24,
        /// Graphs.
        pub graphs: u32 = 28,
    }
}

/// Streams on which one thread may have an open run at a time; a launch on a further one ends the oldest.
pub const OPEN_RUNS: usize = 4;

/// The open launch runs of one thread, keyed by `tgid << 32 | tid`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Runs {
    /// The slots.
    pub slots: [Run; OPEN_RUNS],
}

const _: () = assert!(
    size_of::<Runs>() == OPEN_RUNS * size_of::<Run>(),
    "the slots have padding"
);
