//! The leaves of the loss budget: where a nanosecond of a GPU can go.

/// The four classes into which a window is swept, in order of priority.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Class {
    /// A compute kernel runs.
    Compute,
    /// Only communication runs: it is exposed.
    Comm,
    /// Only copies run: they are exposed.
    Memory,
    /// Nothing runs.
    Idle,
}

impl Class {
    /// All classes, in order of priority.
    pub const ALL: [Self; 4] = [Self::Compute, Self::Comm, Self::Memory, Self::Idle];

    /// The leaf that takes what no other leaf of the class explains.
    #[must_use]
    pub const fn residual(self) -> Leaf {
        match self {
            Self::Compute => Leaf::ComputeKernel,
            Self::Comm => Leaf::CommProto,
            Self::Memory => Leaf::MemoryPcie,
            Self::Idle => Leaf::IdleUnknown,
        }
    }
}

macro_rules! leaves {
    ($($(#[doc = $doc:literal])+ $name:ident = $text:literal in $class:ident;)+) => {
        /// One leaf of the budget. Names are stable: they appear in JSON, on the wire and in reports.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum Leaf { $($(#[doc = $doc])+ $name,)+ }

        impl Leaf {
            /// Every leaf, in the order in which reports list them.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];

            /// The leaf's stable dotted name.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)+ }
            }

            /// The class whose time this leaf splits.
            #[must_use]
            pub const fn class(self) -> Class {
                match self { $(Self::$name => Class::$class,)+ }
            }

            /// The leaf of that name.
            #[must_use]
            pub fn from_name(name: &str) -> Option<Self> {
                match name { $($text => Some(Self::$name),)+ _ => None }
            }
        }
    };
}

leaves! {
    /// The model's arithmetic at the peak rate of the device.
    Ideal = "ideal" in Compute;
    /// Forward work repeated to save memory.
    ComputeRecompute = "compute.recompute" in Compute;
    /// The part of the peak that no GEMM reaches on this device.
    ComputePlatform = "compute.platform" in Compute;
    /// The clock differed from the reference clock; negative when it was above.
    ComputeClock = "compute.clock" in Compute;
    /// Kernels slowed by overlapped communication, copies or another process.
    ComputeContention = "compute.contention" in Compute;
    /// Normalisation, softmax, optimiser, element-wise work.
    ComputeNonmatmul = "compute.nonmatmul" in Compute;
    /// Residual of compute: GEMMs below what the device can reach; may be negative.
    ComputeKernel = "compute.kernel" in Compute;
    /// Exposed communication that the bytes need at the reference rate.
    CommTransfer = "comm.transfer" in Comm;
    /// Exposed communication slower than the reference.
    CommNet = "comm.net" in Comm;
    /// Exposed waiting for the last rank to arrive.
    CommSkew = "comm.skew" in Comm;
    /// Residual of communication: launch, latency, tails.
    CommProto = "comm.proto" in Comm;
    /// Exposed copies at the reference rate.
    MemoryCopy = "memory.copy" in Memory;
    /// Residual of copies: slower than the reference.
    MemoryPcie = "memory.pcie" in Memory;
    /// Waiting for a batch whose loaders compute.
    IdleDataCpu = "idle.data.cpu" in Idle;
    /// Waiting for a batch whose loaders wait for storage.
    IdleDataStorage = "idle.data.storage" in Idle;
    /// Writing a checkpoint.
    IdleCkpt = "idle.ckpt" in Idle;
    /// Garbage collection on the launching thread.
    IdleGc = "idle.gc" in Idle;
    /// The launching thread wanted a CPU and did not get one.
    IdleCpuSched = "idle.cpu.sched" in Idle;
    /// The host returned from a synchronisation and launched late.
    IdleCpuSync = "idle.cpu.sync" in Idle;
    /// The launching thread was in a memory allocator of the driver.
    IdleAlloc = "idle.alloc" in Idle;
    /// Compilation, autotuning or graph capture.
    IdleCompile = "idle.compile" in Idle;
    /// The launching thread was on a CPU issuing work, slower than the GPU consumed it.
    IdleLaunch = "idle.launch" in Idle;
    /// Work was queued and waited for another stream or rank.
    IdleDep = "idle.dep" in Idle;
    /// Residual of idle time.
    IdleUnknown = "idle.unknown" in Idle;
}

impl Leaf {
    /// Number of leaves.
    pub const COUNT: usize = Self::ALL.len();

    /// Position in [`Leaf::ALL`].
    #[must_use]
    pub const fn index(self) -> usize {
        self as usize
    }

    /// Whether the leaf may hold a negative number of nanoseconds: the clock term and compute's residual.
    #[must_use]
    pub const fn may_be_negative(self) -> bool {
        matches!(self, Self::ComputeClock | Self::ComputeKernel)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_round_trip() {
        for (index, leaf) in Leaf::ALL.iter().enumerate() {
            assert_eq!(leaf.index(), index);
            assert_eq!(Leaf::from_name(leaf.name()), Some(*leaf));
        }
        for class in Class::ALL {
            assert_eq!(class.residual().class(), class);
        }
    }
}
