//! How long the network steps of NCCL's proxy threads are in each wait, integrated in kernel maps and read out by the agent.
//!
//! A thread has many steps under way at a time. For each wait a [`Clock`] holds how many are in it now, and the integral of
//! that number over time up to its last change; so a reader can add the time since, and no step has to end to be counted.

use crate::layout::record;

/// What a network step waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u32)]
pub enum Wait {
    /// Sending: for the GPU to produce the data.
    SendGpu = 0,
    /// Sending: for the receiver to give credit.
    SendCredit = 1,
    /// Sending: for the network to take and acknowledge the data.
    SendWire = 2,
    /// Receiving: for the data to arrive.
    ReceiveWire = 3,
    /// Receiving: for the data to be flushed to the GPU's memory.
    ReceiveFlush = 4,
    /// Receiving: for the GPU to consume the data.
    ReceiveGpu = 5,
}

impl Wait {
    /// Every wait, in the order of its number.
    pub const ALL: [Self; 6] = [
        Self::SendGpu,
        Self::SendCredit,
        Self::SendWire,
        Self::ReceiveWire,
        Self::ReceiveFlush,
        Self::ReceiveGpu,
    ];

    /// The wait with NCCL's number for it (`ncclProfilerEventState_t`, nccl_profiler.h; the same in every version that
    /// has it: 20 came with 2.27).
    #[must_use]
    pub const fn from_nccl(state: u32) -> Option<Self> {
        Some(match state {
            8 => Self::SendGpu,
            20 => Self::SendCredit,
            9 => Self::SendWire,
            10 => Self::ReceiveWire,
            11 => Self::ReceiveFlush,
            12 => Self::ReceiveGpu,
            _ => return None,
        })
    }

    /// Whether it is a wait of a step that receives.
    #[must_use]
    pub const fn receives(self) -> bool {
        self as u32 >= Self::ReceiveWire as u32
    }
}

record! {
    /// Names a step: NCCL's arguments of the operation, the sub-operation, and the step's number in it.
    pub struct StepKey: 24 {
        /// Address of the `ncclProxyArgs`.
        pub args: u64 = 0,
        /// The step's number.
        pub step: u64 = 8,
        /// Thread group id.
        pub tgid: u32 = 16,
        /// Sub-operation.
        pub sub: u32 = 20,
    }
}

record! {
    /// The wait a step is in.
    pub struct Step: 16 {
        /// A [`Wait`].
        pub wait: u32 = 0,
        /// Zero.
        pub reserved: u32 = 4,
        /// The epoch in which it was entered.
        pub epoch: u64 = 8,
    }
}

record! {
    /// One wait of one thread.
    pub struct Clock: 40 {
        /// Steps that are in it.
        pub present: u64 = 0,
        /// When that number last changed.
        pub changed_ns: u64 = 8,
        /// Time of all steps in it up to then, summed, ns.
        pub steps_ns: u64 = 16,
        /// Time in which at least one step was in it up to then, ns.
        pub any_ns: u64 = 24,
        /// Steps that entered it.
        pub entered: u64 = 32,
    }
}

impl Clock {
    /// The clock as it stands at `now_ns`; unchanged when that is before its last change.
    #[must_use]
    pub const fn at(mut self, now_ns: u64) -> Self {
        let since = now_ns.saturating_sub(self.changed_ns);
        self.steps_ns = self.steps_ns.wrapping_add(self.present.wrapping_mul(since));
        if self.present > 0 {
            self.any_ns = self.any_ns.wrapping_add(since);
        }
        self.changed_ns += since;
        self
    }
}

/// Clocks of a thread: one per [`Wait`], and as many more as make the number a power of two, so that a mask bounds an index.
pub const CLOCKS: usize = 8;

/// Everything about one thread, keyed by `tgid << 32 | tid`.
///
/// Counts of what is present hold within one epoch only: the agent starts a new one whenever it attaches the programs, since
/// nobody saw what happened between.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Waits {
    /// The epoch of the last hit.
    pub epoch: u64,
    /// Hits of the programs.
    pub hits: u64,
    /// Hits with a state that has no known meaning.
    pub unknown: u64,
    /// Steps sent.
    pub sent: u64,
    /// Steps received.
    pub received: u64,
    /// By number of the [`Wait`].
    pub clocks: [Clock; CLOCKS],
}

impl Waits {
    /// Words of 8 bytes that it takes.
    pub const WORDS: usize = 5 + 5 * CLOCKS;

    /// A thread that was never seen.
    pub const NONE: Self = {
        let clock = Clock {
            present: 0,
            changed_ns: 0,
            steps_ns: 0,
            any_ns: 0,
            entered: 0,
        };
        Self {
            epoch: 0,
            hits: 0,
            unknown: 0,
            sent: 0,
            received: 0,
            clocks: [clock; CLOCKS],
        }
    };

    /// From the words of the map's value.
    #[must_use]
    pub fn from_words(words: &[u64; Self::WORDS]) -> Self {
        let [epoch, hits, unknown, sent, received, rest @ ..] = words;
        let mut waits = Self {
            epoch: *epoch,
            hits: *hits,
            unknown: *unknown,
            sent: *sent,
            received: *received,
            ..Self::NONE
        };
        for (clock, words) in waits.clocks.iter_mut().zip(rest.as_chunks::<5>().0) {
            let [present, changed_ns, steps_ns, any_ns, entered] = *words;
            *clock = Clock {
                present,
                changed_ns,
                steps_ns,
                any_ns,
                entered,
            };
        }
        waits
    }
}

const _: () = assert!(size_of::<Waits>() == 8 * Waits::WORDS && Wait::ALL.len() <= CLOCKS);
