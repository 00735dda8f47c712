//! Records that the eBPF programs write into their rings and the agent reads.
//!
//! Layouts are `#[repr(C)]` without padding; sizes and offsets are asserted at compile time, so the two sides cannot
//! drift apart. All times are `CLOCK_MONOTONIC` nanoseconds.
#![no_std]
#![forbid(unsafe_code)]

mod layout;

pub mod abi;
pub mod device;
pub mod fold;
pub mod profiler;
pub mod record;
pub mod verbs;
pub mod waits;

pub use layout::Field;
pub use record::{Head, Kind};

/// The rings, one per traced world; also the index of a ring's drop counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u32)]
pub enum Ring {
    /// NCCL calls.
    Nccl = 0,
    /// CUDA driver calls.
    Cuda = 1,
    /// Threads leaving the CPU.
    Sched = 2,
    /// File calls.
    Block = 3,
    /// Processes appearing, changing and going.
    Procs = 4,
    /// RDMA queue pairs.
    Verbs = 5,
}

impl Ring {
    /// Every ring, in the order of its drop counter.
    pub const ALL: [Self; 6] = [
        Self::Nccl,
        Self::Cuda,
        Self::Sched,
        Self::Block,
        Self::Procs,
        Self::Verbs,
    ];

    /// The stable name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nccl => "nccl",
            Self::Cuda => "cuda",
            Self::Sched => "sched",
            Self::Block => "block",
            Self::Procs => "procs",
            Self::Verbs => "verbs",
        }
    }
}

/// Slots of the map of hints, a power of two.
pub const PROCESS_HINTS: u32 = 4096;

/// The slot of a process in the map of hints: not 0 while a traced process may fall into it.
#[must_use]
pub const fn process_hint(tgid: u32) -> u32 {
    tgid % PROCESS_HINTS
}

/// Value of the map of traced processes (keyed by thread group id).
pub mod role {
    /// The process uses a GPU.
    pub const GPU: u32 = 1;
    /// The process descends from one that does.
    pub const HELPER: u32 = 2;
}
