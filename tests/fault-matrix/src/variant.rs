//! What can go wrong with a job, how hard, where and when.

use crate::random::Random;

/// Nodes of the job.
pub const NODES: usize = 4;
/// GPUs of a node.
pub const GPUS: usize = 8;
/// Ranks of the job.
pub const RANKS: usize = NODES * GPUS;

/// One fault with its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// A node sends at half the rate: collectives take twice as long.
    SlowNic {
        /// Which node.
        node: usize,
    },
    /// One GPU's host link runs at half its width.
    HalfPcie {
        /// Of which rank.
        rank: usize,
    },
    /// One GPU is hot and runs at three quarters of its clock.
    Thermal {
        /// Of which rank.
        rank: usize,
    },
    /// Loader workers are too slow on all ranks.
    Loader,
    /// Ten times as many kernels, each shorter than its launch.
    LaunchBound,
    /// Another process uses one GPU.
    CoTenant {
        /// Of which rank.
        rank: usize,
    },
    /// A pause of all ranks to write a checkpoint, at a fixed cadence.
    Checkpoint,
    /// In each step another rank pauses to collect garbage.
    GcPause,
    /// Collectives inside a node fall back to PCIe.
    NvlinkDown {
        /// Which node.
        node: usize,
    },
    /// Loaders read cold files on all ranks.
    ColdStorage,
    /// A quota throttles a node's launching threads.
    CpuQuota {
        /// Which node.
        node: usize,
    },
    /// One pipeline stage has more work than the others.
    Stage {
        /// Whether stages alternate over ranks; else the stage is the last node.
        interleaved: bool,
    },
    /// One GPU is held back by its power limit.
    PowerCap {
        /// Of which rank.
        rank: usize,
    },
    /// One GPU reports faults and repeats work.
    Xid {
        /// Of which rank.
        rank: usize,
    },
    /// Batches are copied without pinned memory, on all ranks.
    Copies,
    /// The fabric between the nodes is congested.
    Fabric,
    /// A node's port was negotiated down to half its speed.
    LineDown {
        /// Which node.
        node: usize,
    },
    /// Pretraining at 11 % of the peak, the tensor cores badly fed by small kernels.
    LowTensor,
    /// Pretraining at 11 % of the peak, bound by the device's memory.
    MemoryBound,
    /// Control: decoding at 11 % of the peak, bound by the device's memory as it must be.
    Decode,
    /// Control: a badly chosen algorithm, the same everywhere.
    WrongAlgorithm,
    /// Control: sequences of uneven length, another rank is last in each step.
    UnevenSequences,
    /// Control: communication is slower and stays hidden behind compute.
    HiddenSlowComm,
    /// Control: all GPUs run at 0.95 of their clock by a power cap.
    PowerCapAll,
    /// Control: a profiler attaches in the first step.
    ProfilerAttach,
}

/// How hard a fault hits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Dose {
    /// As the scenario is defined.
    Loud,
    /// As loud, in a job whose ranks' compute varies three times as much.
    Noisy,
    /// A third of it.
    Quiet,
    /// A tenth of it.
    Masked,
}

impl Dose {
    /// All doses, loudest first.
    pub const ALL: [Self; 4] = [Self::Loud, Self::Noisy, Self::Quiet, Self::Masked];

    /// How much compute varies from rank to rank and step to step, times the usual.
    #[must_use]
    pub const fn noise(self) -> u64 {
        match self {
            Self::Noisy => 3,
            Self::Loud | Self::Quiet | Self::Masked => 1,
        }
    }

    /// The part of a loud delta, ns.
    #[must_use]
    pub const fn of(self, loud_ns: u64) -> u64 {
        match self {
            Self::Loud | Self::Noisy => loud_ns,
            Self::Quiet => loud_ns / 3,
            Self::Masked => loud_ns / 10,
        }
    }

    /// Its name in tables.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Loud => "loud",
            Self::Noisy => "loud, noisy",
            Self::Quiet => "quiet",
            Self::Masked => "masked",
        }
    }
}

/// A fault in the steps `from..until`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Injected {
    /// What.
    pub fault: Fault,
    /// First faulty step.
    pub from: usize,
    /// First healthy step after it.
    pub until: usize,
}

impl Injected {
    /// Whether the fault acts in a step.
    #[must_use]
    pub const fn acts(&self, step: usize) -> bool {
        self.from <= step && step < self.until
    }
}

/// One job to play.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Variant {
    /// Name of the scenario in tables.
    pub scenario: &'static str,
    /// Faults, none to two.
    pub faults: Vec<Injected>,
    /// How hard they hit.
    pub dose: Dose,
    /// Steps of the job.
    pub steps: usize,
    /// Seed of noise and places.
    pub seed: u64,
}

impl Variant {
    /// Whether nobody is to be accused.
    #[must_use]
    pub fn is_control(&self) -> bool {
        self.faults.iter().all(|injected| {
            matches!(
                injected.fault,
                Fault::WrongAlgorithm
                    | Fault::UnevenSequences
                    | Fault::HiddenSlowComm
                    | Fault::PowerCapAll
                    | Fault::ProfilerAttach
                    | Fault::Decode
            )
        })
    }

    /// Whether two faults act in it.
    #[must_use]
    pub fn is_compound(&self) -> bool {
        self.faults.len() > 1
    }

    /// The scenario with its dose, seed and first step: enough to play it again.
    #[must_use]
    pub fn name(&self) -> String {
        let from = self.faults.first().map_or(0, |injected| injected.from);
        format!(
            "{}, {}, seed {}, from step {from}",
            self.scenario,
            self.dose.name(),
            self.seed
        )
    }
}

/// A place drawn from the seed; the seed 0 has the places of the scenarios' definition.
#[must_use]
pub fn drawn(seed: u64, defined: usize, below: usize) -> usize {
    if seed == 0 {
        return defined;
    }
    let drawn = Random::new(seed ^ 0x51ac_e000).below(below as u64);
    usize::try_from(drawn).unwrap_or(defined)
}
