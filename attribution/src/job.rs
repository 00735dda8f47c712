//! A job's ranks joined: roll-ups, blame, verdicts.

mod align;
mod blame;
mod ledger;
mod network;
mod pressure;
mod regimes;
mod rollup;
mod verdict;
mod waits;

use crate::budget::Budget;
use crate::cause::{Cause, Confidence, Place};
use crate::facts::{Activity, GpuSubject, RecordGap, StepMethod};
use crate::leaf::Leaf;
use crate::links::LinkReport;
use crate::reading::Reading;
use crate::time::Window;

pub use rollup::analyse;

/// How well the tier behind the numbers sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Tier {
    /// GPU activity records: exact.
    Activity,
    /// Host probes bounded and calibrated by device averages.
    ProbesAndCounters,
    /// Host probes only.
    Probes,
}

impl Tier {
    /// The stable name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Activity => "A",
            Self::ProbesAndCounters => "B+C",
            Self::Probes => "B",
        }
    }
}

/// One GPU of the job over the analysed time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuSummary {
    /// Which GPU.
    pub subject: GpuSubject,
    /// Sum of its steps and spans; sums to the analysed time exactly.
    pub total: Budget,
    /// How steps were found.
    pub method: StepMethod,
    /// Number of steps.
    pub steps: u64,
    /// Collectives per step.
    pub period_calls: u32,
    /// Median step, ns.
    pub median_step_ns: u64,
    /// Device activity averaged over the steps, weighted by their length; see [`Activity::mean`].
    pub activity: Reading<Activity>,
}

/// GPU time that one place cost the job, its own loss and the waiting of others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blame {
    /// Who.
    pub place: Place,
    /// Which leaf of the culprit the waiting was moved to.
    pub leaf: Leaf,
    /// The cause that leaf stands for.
    pub cause: Cause,
    /// Waiting of other ranks moved here, GPU-ns.
    pub cost_ns: u64,
}

/// One thing that was seen, beside what was expected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Evidence {
    /// What was measured, in words with its place.
    pub what: String,
    /// The value seen, with unit.
    pub value: String,
    /// What a healthy job shows, with unit.
    pub expected: String,
}

/// A cause that was considered and rejected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuledOut {
    /// Which cause.
    pub cause: Cause,
    /// Why not.
    pub why: String,
}

/// What was seen, beside what a healthy job shows.
pub(crate) fn evidence(
    what: impl Into<String>,
    value: impl Into<String>,
    expected: impl Into<String>,
) -> Evidence {
    Evidence {
        what: what.into(),
        value: value.into(),
        expected: expected.into(),
    }
}

/// A cause that it is not, and why.
pub(crate) fn ruled_out(cause: Cause, why: impl Into<String>) -> RuledOut {
    RuledOut {
        cause,
        why: why.into(),
    }
}

/// What fixing the cause would return.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Recovers {
    /// GPU time in the analysed period, ns.
    pub gpu_ns: u64,
    /// Least it can be, ns.
    pub low_gpu_ns: u64,
    /// Most it can be, ns.
    pub high_gpu_ns: u64,
    /// Hundredths of an MFU point; `None` without model FLOPs.
    pub mfu_centipoints: Option<u32>,
}

/// A named cause with its evidence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// Why.
    pub cause: Cause,
    /// Where.
    pub place: Place,
    /// GPU time it costs the job, ns.
    pub cost_ns: u64,
    /// The same, as parts per million of the analysed GPU time.
    pub share_ppm: u32,
    /// How sure.
    pub confidence: Confidence,
    /// What was seen.
    pub evidence: Vec<Evidence>,
    /// What it was not.
    pub ruled_out: Vec<RuledOut>,
    /// One step that confirms or refutes it.
    pub confirm: String,
    /// What fixing it would return.
    pub recovers: Recovers,
    /// When it began, `CLOCK_REALTIME` ns, if a beginning was seen.
    pub onset_ns: Option<u64>,
}

/// GPU time of one class of kernels, whatever ran beside them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelTime {
    /// The class's stable name: `gemm`, `attention`, ...; `unknown` for names of no known class.
    pub class: &'static str,
    /// Sum of the kernels' lengths, GPU-ns; kernels that overlap count twice.
    pub time_ns: u64,
    /// Kernels.
    pub count: u64,
}

/// What an MFU rests on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FlopsSource {
    /// FLOPs that the job or the user declares.
    Declared,
    /// Shapes of operators in a trace.
    OperatorShapes,
    /// Tensor activity of the device.
    TensorActivity,
}

/// How an MFU was computed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Efficiency {
    /// Where the FLOPs come from.
    pub source: FlopsSource,
    /// Hardware FLOPs utilisation, with what is repeated, parts per million; `None` when it is not known.
    pub hfu_ppm: Option<u32>,
    /// Which FLOPs count, in words.
    pub convention: String,
    /// Which peak they are measured against, in words with its number.
    pub peak: String,
}

/// Clocks of nodes that were brought to one time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClockAlignment {
    /// Different clocks, the one whose time the others were brought to included.
    pub clocks: usize,
    /// By how much times of different clocks may still be off against each other, ns. Shorter waiting between them is
    /// nobody's.
    pub error_ns: u64,
}

/// What the GPUs worked on, beside where their time went.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct WorkAccount {
    /// Kernels by class, most time first; empty when kernels were not seen.
    pub kernels: Vec<KernelTime>,
    /// How the MFU was computed; `None` without one.
    pub efficiency: Option<Efficiency>,
    /// What to bear in mind when reading the leaves: references used, what they do not cover.
    pub notes: Vec<String>,
    /// How well clocks of nodes could be compared; `None` with one node, or where none were compared.
    pub clocks: Option<ClockAlignment>,
}

/// The whole answer for one job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobAnalysis {
    /// Job name.
    pub job: String,
    /// Kind of job.
    pub kind: String,
    /// From the first window analysed to the end of the last, `CLOCK_REALTIME`; `None` when nothing was.
    pub observed: Option<Window>,
    /// How well it was seen.
    pub tier: Tier,
    /// One per rank, by rank.
    pub gpus: Vec<GpuSummary>,
    /// Waiting moved to who caused it; sums to all `comm.skew`.
    pub blame: Vec<Blame>,
    /// Causes by cost, largest first; a single `none` or `unknown` when nothing stands out.
    pub verdicts: Vec<Verdict>,
    /// What is missing from the record.
    pub gaps: Vec<RecordGap>,
    /// Model FLOPs utilisation in parts per million; `None` when model FLOPs are unknown.
    pub mfu_ppm: Option<u32>,
    /// Whether `mfu_ppm` rests on declared FLOPs (else on tensor activity).
    pub mfu_declared: bool,
    /// What the GPUs worked on.
    pub work: WorkAccount,
    /// Which GPU reaches the network how, and what the devices told.
    pub links: LinkReport,
}
