//! What was put in: causes with their places, and where every nanosecond went.

use std::collections::BTreeMap;

use stallscope_attribution::cause::Cause;

use crate::job::{Job, Played};
use crate::variant::{Dose, Fault, RANKS, Variant};
use crate::work::{self, node_of};

/// Where a cause sits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Where {
    /// The job as a whole: no node, GPU or rank.
    Job,
    /// A node.
    Node(usize),
    /// The port of a node.
    Port(usize),
    /// A rank's GPU.
    Rank(usize),
    /// A pipeline stage: no hardware. The last node may be named where the stage is that node.
    Stage {
        /// Whether the stage is a whole node.
        node: Option<usize>,
    },
}

/// A cause at its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answer {
    /// Why.
    pub cause: Cause,
    /// Where.
    pub place: Where,
}

/// What really happened.
#[derive(Debug, Clone)]
pub struct Truth {
    /// Answers that must be given at loud and quiet doses; empty for controls.
    pub expected: Vec<Answer>,
    /// Answers that may be given beside them, and accuse nobody.
    pub allowed: Vec<Answer>,
    /// By name of the leaf, summed over all ranks, ns.
    pub leaves: BTreeMap<&'static str, i64>,
    /// Sum of all ranks' time, ns.
    pub total_ns: u64,
    /// GPU time that the faults cost, ns.
    pub cost_ns: u64,
}

/// The truth of a played job.
#[must_use]
pub fn of(variant: &Variant, job: &Job) -> Truth {
    let mut leaves: BTreeMap<&'static str, i64> = BTreeMap::new();
    let mut total_ns = 0;
    for played in job.steps.iter().flatten() {
        total_ns += played.end - played.start;
        for (leaf, ns) in parts(played) {
            *leaves.entry(leaf).or_default() += ns;
        }
    }
    for pause in &job.pauses {
        let ns = (pause.end - pause.start) * RANKS as u64;
        total_ns += ns;
        *leaves.entry("idle.ckpt").or_default() += signed(ns);
    }
    debug_assert_eq!(leaves.values().sum::<i64>(), signed(total_ns));
    let healthy = Variant {
        faults: Vec::new(),
        ..variant.clone()
    };
    let without: u64 = crate::job::play(&prepared(&healthy, variant))
        .steps
        .iter()
        .flatten()
        .map(|played| played.end - played.start)
        .sum();
    let (mut expected, mut allowed) = (Vec::new(), Vec::new());
    for injected in &variant.faults {
        let (must, may) = answers(injected.fault, variant.dose);
        expected.extend(must);
        allowed.extend(may);
    }
    Truth {
        expected,
        allowed,
        leaves,
        total_ns,
        cost_ns: total_ns.saturating_sub(without),
    }
}

/// The same job with faults that never act: what the scenario's job has at all times stays.
fn prepared(healthy: &Variant, variant: &Variant) -> Variant {
    let never = variant.faults.iter().map(|injected| crate::variant::Injected {
        from: 0,
        until: 0,
        ..*injected
    });
    Variant {
        faults: never.collect(),
        ..healthy.clone()
    }
}

fn signed(ns: u64) -> i64 {
    i64::try_from(ns).unwrap_or(i64::MAX)
}

/// One rank's step by name of the leaf, ns.
fn parts(played: &Played) -> Vec<(&'static str, i64)> {
    let work = &played.work;
    let joint = played.end - played.start - work.arrival() - played.skew;
    vec![
        ("ideal", signed(work.ideal)),
        ("compute.platform", signed(work.platform)),
        ("compute.clock", signed(work.clock)),
        ("compute.contention", signed(work.overlap + work.foreign)),
        ("compute.nonmatmul", signed(work.nonmatmul)),
        ("compute.kernel", work.kernel),
        ("comm.transfer", signed(work.transfer)),
        ("comm.net", signed(joint - work.transfer + work.nvlink)),
        ("comm.skew", signed(played.skew)),
        ("memory.copy", signed(work.copy)),
        ("memory.pcie", signed(work.pcie)),
        ("idle.data.cpu", signed(work.loader)),
        ("idle.data.storage", signed(work.storage)),
        ("idle.gc", signed(work.gc)),
        ("idle.alloc", signed(work.alloc)),
        ("idle.cpu.sched", signed(work.sched)),
        ("idle.launch", signed(work.start + work.launch + work.attach)),
        ("idle.dep", signed(work.dep)),
        ("idle.unknown", signed(work.unknown)),
    ]
}

/// What must be said of a fault, and what may be.
fn answers(fault: Fault, dose: Dose) -> (Option<Answer>, Vec<Answer>) {
    let must = |cause, place| (Some(Answer { cause, place }), Vec::new());
    let may = |causes: &[Cause]| {
        let answers = causes.iter().map(|cause| Answer {
            cause: *cause,
            place: Where::Job,
        });
        (None, answers.collect())
    };
    match fault {
        Fault::SlowNic { node } => must(Cause::NetworkNic, Where::Port(node)),
        Fault::HalfPcie { rank } => {
            // The scenario's job has exposed copies on all ranks to begin with: naming them accuses nobody.
            let copies = Answer {
                cause: Cause::DataCopy,
                place: Where::Job,
            };
            (
                Some(Answer {
                    cause: Cause::DevicePcie,
                    place: Where::Rank(rank),
                }),
                vec![copies],
            )
        }
        Fault::Thermal { rank } => must(Cause::DeviceThermal, Where::Rank(rank)),
        Fault::Loader => must(Cause::DataLoader, Where::Job),
        Fault::LaunchBound => must(Cause::HostLaunch, Where::Job),
        Fault::CoTenant { rank } => must(Cause::DeviceContention, Where::Rank(rank)),
        Fault::Checkpoint => must(Cause::JobCheckpoint, Where::Job),
        Fault::GcPause => must(Cause::HostGc, Where::Job),
        Fault::NvlinkDown { node } => must(Cause::NetworkNvlink, Where::Node(node)),
        Fault::ColdStorage => must(Cause::DataStorage, Where::Job),
        Fault::CpuQuota { node } => must(Cause::HostCpu, Where::Node(node)),
        Fault::Stage { interleaved } => {
            let node = (!interleaved).then(|| node_of(RANKS - 1));
            must(Cause::JobImbalance, Where::Stage { node })
        }
        Fault::PowerCap { rank } => must(Cause::DevicePowerCap, Where::Rank(rank)),
        Fault::Xid { rank } => must(Cause::DeviceFault, Where::Rank(rank)),
        Fault::Copies => must(Cause::DataCopy, Where::Job),
        Fault::Fabric => must(Cause::NetworkFabric, Where::Job),
        Fault::LineDown { node } => must(Cause::NetworkNic, Where::Port(node)),
        Fault::LowTensor => must(Cause::KernelLowTensor, Where::Job),
        Fault::MemoryBound => must(Cause::KernelMemoryBound, Where::Job),
        Fault::WrongAlgorithm => may(&[Cause::NetworkConfig]),
        // Uneven data may be named as such, of the job as a whole.
        Fault::UnevenSequences => may(&[Cause::JobImbalance]),
        Fault::PowerCapAll if dose != Dose::Masked => may(&[Cause::DevicePowerCap]),
        Fault::PowerCapAll | Fault::HiddenSlowComm | Fault::ProfilerAttach | Fault::Decode => may(&[]),
    }
}

/// Names of leaves, so that a misspelt one is noticed.
#[must_use]
pub fn leaf_names() -> Vec<&'static str> {
    let played = Played {
        work: work::Work::default(),
        skew: 0,
        start: 0,
        end: 0,
    };
    parts(&played)
        .into_iter()
        .map(|(leaf, _)| leaf)
        .chain(["idle.ckpt"])
        .collect()
}
