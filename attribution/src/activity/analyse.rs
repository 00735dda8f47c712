//! From the traces of a job to its analysis.

use std::collections::BTreeMap;

use super::blame::Moved;
use super::collectives::{self, Joined, Joining};
use super::contention::{Contention, contention};
use super::efficiency::{ModelMath, Span, by_class, carve, model_math};
use super::label::{Known, Rates, before, label};
use super::math::{Arithmetic, repeated};
use super::steps::{marked, pattern};
use super::verdict::{self, Case};
use super::{Declared, Host, KernelClass, Label, RankTrace, Record, TraceJob, Work};
use crate::budget::Budget;
use crate::budget::arith::{median, mul_div, signed};
use crate::cause::{Cause, Place};
use crate::facts::{GpuSubject, PPM, RecordGap, StepMethod};
use crate::job::{Blame, ClockAlignment, FlopsSource, GpuSummary, JobAnalysis, Tier, WorkAccount};
use crate::leaf::Leaf;
use crate::links::LinkReport;
use crate::reading::Reading;
use crate::time::Window;

/// Leaves that records of the host and the device decide, whatever their value. Storage and run queues are not in a
/// trace; neither are clocks, peaks and reference rates.
const MEASURED: [Leaf; 12] = [
    Leaf::ComputeRecompute,
    Leaf::ComputeNonmatmul,
    Leaf::MemoryCopy,
    Leaf::IdleDataCpu,
    Leaf::IdleCkpt,
    Leaf::IdleGc,
    Leaf::IdleCpuSync,
    Leaf::IdleAlloc,
    Leaf::IdleCompile,
    Leaf::IdleLaunch,
    Leaf::IdleDep,
    Leaf::IdleUnknown,
];

/// Share of kernels' or collectives' time that must have a reference for their leaf to count as measured, percent.
const REFERENCED_PERCENT: u64 = 95;

/// One GPU with its labels.
pub(super) struct Labelled {
    pub(super) subject: GpuSubject,
    pub(super) records: Vec<Record>,
    pub(super) labels: Vec<Label>,
    /// What the host did before the first record; of no budget.
    before: Vec<Label>,
    pub(super) total: Budget,
    pub(super) contention: Contention,
    /// Its copies are far slower than those of the best GPU of its kind.
    pub(super) slow_link: bool,
    math: Result<ModelMath, String>,
    pub(super) steps: Vec<Window>,
    method: StepMethod,
    calls: u32,
}

/// The whole answer for one job, exact to the ns: budgets of every GPU, blame between ranks, causes.
#[must_use]
pub fn analyse(job: TraceJob) -> JobAnalysis {
    let mut gaps: Vec<RecordGap> = job.ranks.iter().flat_map(|rank| rank.gaps.clone()).collect();
    let mut devices: Vec<Read<'_>> = Vec::new();
    for rank in &job.ranks {
        for device in &rank.devices {
            let mut records = device.records.clone();
            records.sort_by_key(|record| (record.window, record.launch, record.stream, record.token));
            let edges = Edges::of(&records, &rank.marks);
            devices.push((rank, &device.subject, records, edges));
        }
    }
    devices.sort_by_key(|(_, subject, ..)| (subject.rank, subject.gpu));
    let world = devices
        .iter()
        .map(|(_, subject, ..)| subject.world)
        .max()
        .unwrap_or(0);
    let joining: Vec<Joining<'_>> = devices
        .iter()
        .map(|(_, subject, records, edges)| Joining {
            subject,
            records,
            steps: &edges.at_ns,
        })
        .collect();
    let joined = collectives::join(&joining, world, job.declared.bus_bytes_per_s);
    gaps.extend(joined.gaps.iter().cloned());
    let rates = best_rates(&devices);
    let labelled: Vec<Labelled> = devices
        .into_iter()
        .enumerate()
        .map(|(at, (rank, subject, records, edges))| {
            let best = rates[subject.device.as_str()];
            Labelled::new(
                rank,
                subject.clone(),
                (records, edges),
                (&joined.of(at), best),
                &job.declared,
            )
        })
        .collect();
    let moved = moved(&joined, &labelled);
    let blame = blames(&moved, &labelled);
    let observed = observed(&job, &labelled);
    let mut work = work(&labelled, &job.declared);
    work.clocks = alignment(&joined);
    work.notes.extend(work.clocks.map(told));
    work.notes.extend(circles(&moved, &labelled));
    let ideal_ns = work.efficiency.as_ref().map(|_| {
        labelled
            .iter()
            .fold(0_u64, |sum, gpu| sum.saturating_add(gpu.ns(Leaf::Ideal)))
    });
    let verdicts = verdict::judge(&Case {
        gpus: &labelled,
        joined: &joined,
        moved: &moved,
        blame: &blame,
        ranks: world.max(u32::try_from(labelled.len()).unwrap_or(u32::MAX)),
        ideal_ns,
    });
    let mfu_declared = work
        .efficiency
        .as_ref()
        .is_some_and(|how| how.source == FlopsSource::Declared);
    JobAnalysis {
        links: LinkReport::default(),
        job: job.job,
        kind: job.kind,
        observed,
        tier: Tier::Activity,
        mfu_ppm: work
            .efficiency
            .as_ref()
            .and_then(|_| share(&labelled, |gpu| gpu.ns(Leaf::Ideal))),
        mfu_declared,
        gpus: labelled.into_iter().map(Labelled::summary).collect(),
        blame,
        verdicts,
        gaps,
        work,
    }
}

/// One GPU with the trace it comes from, its records by start and its steps.
type Read<'a> = (&'a RankTrace, &'a GpuSubject, Vec<Record>, Edges);

/// By device's name: the best rates that any GPU's copies reached.
fn best_rates<'a>(devices: &[Read<'a>]) -> BTreeMap<&'a str, Rates> {
    let mut best: BTreeMap<&str, Rates> = BTreeMap::new();
    for (_, subject, records, _) in devices {
        let rates = best.entry(&subject.device).or_default();
        *rates = rates.or_better(Rates::of(records));
    }
    best
}

/// Parts per million of all GPU time; `None` of no time.
fn share(gpus: &[Labelled], of: impl Fn(&Labelled) -> u64) -> Option<u32> {
    let sum = |of: &dyn Fn(&Labelled) -> u64| gpus.iter().fold(0_u64, |sum, gpu| sum.saturating_add(of(gpu)));
    let total_ns = sum(&|gpu| gpu.total.window_ns());
    (total_ns > 0).then(|| u32::try_from(mul_div(sum(&of), PPM, total_ns)).unwrap_or(u32::MAX))
}

/// What the GPUs worked on. The MFU is that of all GPUs, or of none.
fn work(gpus: &[Labelled], declared: &Declared) -> WorkAccount {
    let mut notes = Vec::new();
    let sum = |of: &dyn Fn(&Labelled) -> u64| gpus.iter().fold(0_u64, |sum, gpu| sum.saturating_add(of(gpu)));
    let (beside, unknown) = (
        sum(&|gpu| gpu.contention.beside_ns),
        sum(&|gpu| gpu.contention.unknown_ns),
    );
    if unknown > 0 {
        notes.push(format!(
            "compute.contention: {} % of the kernel time beside communication or copies has no run of the same kernel \
             and grid by itself to compare with",
            mul_div(unknown, 100, beside).max(1)
        ));
    }
    if gpus
        .iter()
        .any(|gpu| gpu.total.is_measured(Leaf::CommTransfer) && has_communication(&gpu.records))
    {
        notes.push(match declared.bus_bytes_per_s {
            Some(rate) => format!("comm.transfer: at the {}.{} GB/s of bus bandwidth given", rate / 1_000_000_000, rate / 100_000_000 % 10),
            None => "comm.transfer: as the best collective of the same operation and size in these traces; one that \
                     is always slow has no better one beside it (--busbw gives a reference)".to_owned(),
        });
    }
    let efficiency = match gpus.iter().find_map(|gpu| gpu.math.as_ref().err()) {
        Some(why) => {
            notes.push(format!("MFU: {why}"));
            None
        }
        None => gpus
            .iter()
            .find_map(|gpu| gpu.math.as_ref().ok())
            .map(|math| math.how.clone()),
    };
    let all_known = gpus.iter().all(|gpu| gpu.hardware_ns().is_some());
    let hfu_ppm = share(gpus, |gpu| gpu.hardware_ns().unwrap_or(0)).filter(|_| all_known);
    WorkAccount {
        kernels: by_class(gpus.iter().flat_map(|gpu| &gpu.records)),
        efficiency: efficiency.map(|how| crate::job::Efficiency { hfu_ppm, ..how }),
        notes,
        clocks: None,
    }
}

fn has_communication(records: &[Record]) -> bool {
    records
        .iter()
        .any(|record| record.work == Work::Kernel(KernelClass::Communication))
}

impl Labelled {
    fn new(
        rank: &RankTrace,
        subject: GpuSubject,
        (records, edges): (Vec<Record>, Edges),
        (joined, best): (&collectives::OfRank<'_>, Rates),
        declared: &Declared,
    ) -> Self {
        let again = repeated(&records, &rank.repeated);
        let contention = contention(&records);
        let known = Known {
            waits: &joined.waits,
            moves: joined.moves,
            again: &again,
            excess_ns: &contention.excess_ns,
            rates: best,
        };
        let host = Host::new(&rank.host, rank.main_thread);
        let labels = label(&records, known, &host);
        let end = labels.last().map_or(0, |label| label.window.end_ns());
        // The last mark ends with the trace; a pattern's last call begins a step that may be cut off.
        let marked = edges.method == StepMethod::Declared;
        let ends = edges.at_ns.iter().copied().skip(1).chain(marked.then_some(end));
        let steps: Vec<Window> = edges
            .at_ns
            .iter()
            .zip(ends)
            .filter_map(|(start, end)| Window::new(*start, end))
            .filter(|step| !step.is_empty())
            .collect();
        let arithmetic = Arithmetic::of(&records, &again, &rank.math);
        let span = Span {
            steps: steps.len() as u64,
            steps_ns: steps.iter().map(|step| step.len_ns()).sum(),
            window_ns: labels.iter().map(|label| label.window.len_ns()).sum(),
        };
        let math = model_math(&subject.device, declared, &records, &arithmetic, span);
        let total = budget(
            &labels,
            measured(&records, joined, &contention),
            math.as_ref().ok(),
        );
        Self {
            subject,
            labels,
            before: before(&records, &host),
            slow_link: Rates::of(&records).is_slow_beside(best),
            total,
            contention,
            math,
            steps,
            method: edges.method,
            calls: edges.calls,
            records,
        }
    }

    fn summary(self) -> GpuSummary {
        GpuSummary {
            subject: self.subject,
            total: self.total,
            method: self.method,
            steps: self.steps.len() as u64,
            period_calls: self.calls,
            median_step_ns: median(self.steps.iter().map(|step| step.len_ns()).collect()),
            activity: Reading::NotMeasured,
        }
    }

    /// What all its arithmetic needs at the peak, ns; `None` when that is not known.
    pub(super) fn hardware_ns(&self) -> Option<u64> {
        self.math.as_ref().ok()?.hardware_ns
    }

    /// Nanoseconds of one leaf.
    pub(super) fn ns(&self, leaf: Leaf) -> u64 {
        u64::try_from(self.total.leaf_ns(leaf)).unwrap_or(0)
    }
}

/// Where a GPU's steps begin.
struct Edges {
    at_ns: Vec<u64>,
    method: StepMethod,
    /// Calls per step; 0 when the job marked them.
    calls: u32,
}

impl Edges {
    fn of(records: &[Record], marks: &[Window]) -> Self {
        let declared = marked(records, marks);
        let found = if declared.is_empty() {
            pattern(records)
        } else {
            None
        };
        let method = if declared.is_empty() {
            StepMethod::FixedWindow
        } else {
            StepMethod::Declared
        };
        found.map_or(
            Self {
                at_ns: declared,
                method,
                calls: 0,
            },
            |found| Self {
                at_ns: found.edges,
                method: found.method,
                calls: found.calls,
            },
        )
    }
}

fn measured(records: &[Record], joined: &collectives::OfRank<'_>, contention: &Contention) -> u32 {
    let link =
        |record: &Record| matches!(record.work, Work::ToDevice | Work::ToHost) && record.bytes.is_none();
    let mut bits = MEASURED.iter().fold(0, |bits, leaf| bits | (1 << leaf.index()));
    if records.iter().any(link) {
        bits &= !(1 << Leaf::MemoryCopy.index());
    }
    let referenced = |unknown: u64, all: u64| {
        u128::from(unknown) * 100 <= u128::from(all) * u128::from(100 - REFERENCED_PERCENT)
    };
    if referenced(contention.unknown_ns, contention.beside_ns) {
        bits |= 1 << Leaf::ComputeContention.index();
    }
    if joined.whole {
        bits |= 1 << Leaf::CommSkew.index();
        let moving: u64 = joined.moves.iter().map(|moving| moving.window.len_ns()).sum();
        if referenced(
            joined.unreferenced_ns,
            moving.saturating_add(joined.unreferenced_ns),
        ) {
            bits |= 1 << Leaf::CommTransfer.index() | 1 << Leaf::CommNet.index();
        }
    }
    bits
}

fn budget(labels: &[Label], mut measured: u32, math: Option<&ModelMath>) -> Budget {
    let mut leaves = [0_i64; Leaf::COUNT];
    for label in labels {
        leaves[label.leaf.index()] += signed(label.window.len_ns());
    }
    let window_ns = labels.iter().map(|label| label.window.len_ns()).sum();
    let intervals = math.map_or_else(Vec::new, |math| carve(&mut leaves, &mut measured, math));
    Budget::from_leaves(window_ns, leaves, measured, intervals)
        .unwrap_or_else(|_| Budget::unobserved(window_ns))
}

fn moved(joined: &Joined, gpus: &[Labelled]) -> Moved {
    let labels: Vec<Vec<Label>> = gpus
        .iter()
        .map(|gpu| [&gpu.before[..], &gpu.labels].concat())
        .collect();
    joined.moved(&labels)
}

/// Waiting by who caused it; sums to all of it.
fn blames(moved: &Moved, gpus: &[Labelled]) -> Vec<Blame> {
    let mut costs: BTreeMap<(Option<usize>, Leaf), u64> = BTreeMap::new();
    for ((rank, leaf, _), ns) in &moved.to {
        *costs.entry((Some(*rank), *leaf)).or_default() += ns;
    }
    for ns in moved.circles.values() {
        *costs.entry((None, Leaf::CommSkew)).or_default() += ns;
    }
    let mut blames: Vec<Blame> = costs
        .into_iter()
        .map(|((culprit, leaf), cost_ns)| Blame {
            place: culprit.map_or_else(Place::default, |at| place(&gpus[at].subject)),
            leaf,
            cause: culprit.map_or(Cause::Unknown, |at| verdict::late(&gpus[at], leaf)),
            cost_ns,
        })
        .collect();
    blames.sort_by(|a, b| b.cost_ns.cmp(&a.cost_ns).then_with(|| a.place.cmp(&b.place)));
    blames
}

/// How well clocks of different nodes could be compared.
fn alignment(joined: &Joined) -> Option<ClockAlignment> {
    (joined.clocks > 0).then_some(ClockAlignment {
        clocks: joined.clocks + 1,
        error_ns: joined.residual_ns,
    })
}

fn told(alignment: ClockAlignment) -> String {
    format!(
        "comm.skew: {} clocks were aligned by the ends of collectives, to {} us; shorter waiting between them is nobody's",
        alignment.clocks,
        alignment.error_ns.div_ceil(1000),
    )
}

/// Waiting that could not be given to anybody, with the ranks it goes round in.
fn circles(moved: &Moved, gpus: &[Labelled]) -> Option<String> {
    let unresolved: u64 = moved.circles.values().fold(0, |sum, ns| sum.saturating_add(*ns));
    let (ranks, _) = moved.circles.iter().max_by_key(|(_, ns)| **ns)?;
    let names: Vec<String> = ranks
        .iter()
        .map(|at| gpus[*at].subject.rank.to_string())
        .collect();
    Some(format!(
        "comm.skew: {} us belong to nobody: ranks {} wait for each other in different communicators",
        unresolved / 1000,
        names.join(", "),
    ))
}

pub(super) fn place(subject: &GpuSubject) -> Place {
    Place {
        node: (!subject.node.is_empty()).then(|| subject.node.clone()),
        gpu: Some(subject.gpu),
        rank: Some(subject.rank),
        ..Place::default()
    }
}

fn observed(job: &TraceJob, gpus: &[Labelled]) -> Option<Window> {
    let offset = job.ranks.iter().find_map(|rank| rank.realtime_offset_ns)?;
    let at = |ns: u64| ns.saturating_add_signed(offset);
    let start = gpus
        .iter()
        .filter_map(|gpu| gpu.labels.first())
        .map(|label| label.window.start_ns())
        .min()?;
    let end = gpus
        .iter()
        .filter_map(|gpu| gpu.labels.last())
        .map(|label| label.window.end_ns())
        .max()?;
    Window::new(at(start), at(end))
}
