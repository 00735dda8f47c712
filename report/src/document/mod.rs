//! The answer in its stable form: the JSON schema `stallscope.report/1`.
//!
//! Times are integer nanoseconds and every budget sums to its `total_ns` exactly. Fields may be added within
//! version 1; a reader ignores what it does not know, leaves and causes included.

mod build;
mod check;
mod links;
mod rollup;
#[cfg(test)]
mod tests;

pub use check::DocumentError;
pub use links::{Finding, LinkPath, LinkPort, Links, NotSeen};
pub use rollup::Rollup;

pub(crate) use build::by_node;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::share::{Points, Share};

/// The schema written by this version.
pub const SCHEMA: &str = "stallscope.report/1";

/// The whole report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Document {
    /// [`SCHEMA`].
    pub schema: String,
    /// The weakest tier behind any job: `A`, `B+C` or `B`; empty without jobs.
    pub tier: String,
    /// One entry per job.
    pub jobs: Vec<Job>,
    /// Which GPU reaches the network how, and what the devices told; absent when nothing of that was recorded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub links: Option<Links>,
}

/// One job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// Job name.
    pub job: String,
    /// Declared kind, or `unknown`.
    pub kind: String,
    /// How well this job was seen: `A`, `B+C` or `B`.
    #[serde(default)]
    pub tier: String,
    /// Which period the report speaks of; `null` when nothing was analysed.
    #[serde(default)]
    pub observed: Option<Period>,
    /// Model FLOPs utilisation in percent; `null` when it is not known.
    #[serde(default)]
    pub mfu_points: Option<Points>,
    /// What `mfu_points` rests on: `declared_flops`, `operator_shapes`, `tensor_activity` or `unknown`.
    #[serde(default)]
    pub mfu_source: MfuSource,
    /// Hardware FLOPs utilisation in percent, with what is repeated; absent when it is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hfu_points: Option<Points>,
    /// Which FLOPs count in `mfu_points`; absent when that is not told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mfu_convention: Option<String>,
    /// Which peak `mfu_points` is measured against; absent when that is not told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak: Option<String>,
    /// GPU time of kernels by class, most first; absent when kernels were not seen.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub kernels: Vec<KernelTime>,
    /// References that leaves were measured against, and what they do not cover.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// How well times of different nodes could be compared; absent with one node, or where none were compared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clocks: Option<Clocks>,
    /// All GPUs summed.
    #[serde(default)]
    pub total: Rollup,
    /// The GPUs of each node summed, by node name.
    #[serde(default)]
    pub nodes: BTreeMap<String, Rollup>,
    /// One per rank.
    pub gpus: Vec<Gpu>,
    /// Waiting of other ranks, moved to who caused it; the costs sum to `comm.skew` of `total`, in tier A to all
    /// waiting, also that under compute, which costs nothing and is in no leaf.
    pub blame: Vec<Blame>,
    /// Causes, largest cost first.
    pub verdicts: Vec<Verdict>,
    /// What is missing from the record.
    #[serde(default)]
    pub gaps: Vec<Gap>,
}

/// GPU time of one class of kernels, whatever ran beside them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelTime {
    /// `gemm`, `attention`, `convolution`, `normalisation`, `elementwise`, `optimiser`, `communication`, `memory`, or
    /// `unknown` for names of no known class.
    pub class: String,
    /// Sum of the kernels' lengths, GPU-ns; kernels that overlap count twice.
    pub time_ns: u64,
    /// Kernels.
    pub count: u64,
}

/// Clocks of nodes that were brought to one time by the ends of collectives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clocks {
    /// How many, the one whose time the others were brought to included.
    pub count: usize,
    /// By how much times of different clocks may still be off, ns; shorter waiting between them is nobody's.
    pub error_ns: u64,
}

/// What an MFU rests on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MfuSource {
    /// FLOPs per step that the job declared.
    DeclaredFlops,
    /// Shapes of the operators in a trace.
    OperatorShapes,
    /// Tensor activity of the devices.
    TensorActivity,
    /// There is no MFU, or its source is newer than this version.
    #[default]
    #[serde(other)]
    Unknown,
}

/// A stretch of wall-clock time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Period {
    /// Its beginning, `CLOCK_REALTIME` ns.
    pub start_unix_ns: u64,
    /// Its end, `CLOCK_REALTIME` ns.
    pub end_unix_ns: u64,
}

/// One GPU of a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gpu {
    /// Rank in the job.
    pub rank: u32,
    /// Node name.
    pub node: String,
    /// Device name; empty when unknown.
    pub device: String,
    /// GPU index on the node.
    #[serde(default)]
    pub gpu: u32,
    /// PCI address; empty when unknown.
    #[serde(default)]
    pub pci: String,
    /// Analysed time, ns.
    pub total_ns: u64,
    /// The four classes; they sum to `total_ns`.
    pub sweep: Sweep,
    /// Nanoseconds per leaf; they sum to `total_ns`.
    pub budget: BTreeMap<String, i64>,
    /// Bounds `[low, high]` in ns of the leaves that are not exact.
    #[serde(default)]
    pub intervals: BTreeMap<String, [i64; 2]>,
    /// Leaves that were not measured: their zero means nothing, their time sits in their class's residual.
    #[serde(default)]
    pub unmeasured: Vec<String>,
    /// How the steps were found and how long they are.
    pub steps: Steps,
    /// Mean device activity; `null` when it was not measured.
    #[serde(default)]
    pub activity: Option<Activity>,
    /// Why `activity` is `null`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub activity_missing: Option<String>,
}

/// Nanoseconds per class, swept by priority compute, communication, memory, idle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Sweep {
    /// A compute kernel ran.
    pub compute_ns: i128,
    /// Only communication ran.
    pub exposed_comm_ns: i128,
    /// Only copies ran.
    pub exposed_memory_ns: i128,
    /// Nothing ran.
    pub idle_ns: i128,
}

/// The steps of one GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Steps {
    /// `collective_period`, `launch_period`, `declared` or `fixed_window`.
    pub method: String,
    /// How many.
    pub count: u64,
    /// Collectives per step.
    pub period_calls: u32,
    /// Median length, ns.
    pub median_ns: u64,
}

/// Mean device activity over the analysed steps, as shares of time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Activity {
    /// Any kernel resident: what the driver calls utilisation.
    pub driver_utilisation: Share,
    /// SMs with a resident warp.
    pub sm: Share,
    /// Resident warps over the maximum.
    pub occupancy: Share,
    /// Tensor pipes busy.
    pub tensor: Share,
    /// Device memory busy.
    pub hbm: Share,
}

/// Waiting of other ranks that one place caused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blame {
    /// Rank of the culprit; `null` when the waiting could not be given to one.
    pub rank: Option<u32>,
    /// Its node.
    pub node: Option<String>,
    /// Its GPU index.
    #[serde(default)]
    pub gpu: Option<u32>,
    /// What the culprit did meanwhile, as a cause.
    pub cause: String,
    /// And as a leaf of its own budget.
    #[serde(default)]
    pub leaf: String,
    /// Waiting of others, GPU-ns.
    pub cost_ns: u64,
}

/// A named cause with its evidence.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// Stable name of the cause; `none` and `unknown` are answers too.
    pub cause: String,
    /// Where it sits; nothing set means the whole job.
    #[serde(rename = "where")]
    pub place: Where,
    /// Share of the analysed GPU time, 0 to 1.
    pub share: Share,
    /// The same in GPU-ns.
    #[serde(default)]
    pub cost_ns: u64,
    /// MFU points it costs; `null` without model FLOPs.
    pub mfu_points: Option<Points>,
    /// `exact`, `high`, `medium` or `low`.
    pub confidence: String,
    /// What was seen beside what was expected.
    pub evidence: Vec<Evidence>,
    /// What it was not, and why.
    pub ruled_out: Vec<RuledOut>,
    /// One step that confirms or refutes it.
    pub confirm: String,
    /// What fixing it would return.
    pub recovers: Recovers,
    /// When it began; `null` when no beginning was seen.
    #[serde(default)]
    pub onset_unix_ns: Option<u64>,
    /// When a live analysis first gave this verdict; absent when none did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_seen_unix_ns: Option<u64>,
}

/// A place; parts that are not known or not meant are `null`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Where {
    /// Node name.
    pub node: Option<String>,
    /// GPU index on that node.
    pub gpu: Option<u32>,
    /// PCI address of that GPU.
    pub pci: Option<String>,
    /// Rank in the job.
    pub rank: Option<u32>,
    /// Network interface or port.
    pub nic_port: Option<String>,
    /// A link, named by its two ends.
    pub link: Option<String>,
    /// Process id on the node.
    pub process: Option<u32>,
}

/// One thing that was seen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evidence {
    /// What was measured.
    pub what: String,
    /// What was seen, with unit.
    pub value: String,
    /// What a healthy job shows, with unit.
    pub expected: String,
}

/// A cause that was considered and rejected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuledOut {
    /// Which cause.
    pub cause: String,
    /// Why not.
    pub why: String,
}

/// What fixing a cause would return over the analysed period.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Recovers {
    /// GPU time, ns.
    pub gpu_ns: u64,
    /// Least it can be, ns; 0 with `high_gpu_ns` 0 when no bounds are known.
    pub low_gpu_ns: u64,
    /// Most it can be, ns.
    pub high_gpu_ns: u64,
    /// MFU points; `null` without model FLOPs.
    pub mfu_points: Option<Points>,
}

/// Something missing from the record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gap {
    /// Node.
    pub node: String,
    /// When; `null` when it is not known.
    pub period: Option<Period>,
    /// What is missing and why.
    pub what: String,
    /// How many records, steps or messages; 0 when they cannot be counted.
    pub count: u64,
}

impl Document {
    /// The document as indented JSON, with a final newline.
    ///
    /// # Errors
    /// None is known for this type; serialisation is fallible by signature.
    pub fn to_json(&self) -> Result<String, serde_json::Error> {
        serde_json::to_string_pretty(self).map(|json| json + "\n")
    }

    /// Reads a document and checks that all its sums hold.
    ///
    /// # Errors
    /// When it is not JSON of this schema, or a sum does not hold.
    pub fn from_json(json: &str) -> Result<Self, DocumentError> {
        let document: Self = serde_json::from_str(json)?;
        document.check()?;
        Ok(document)
    }
}
