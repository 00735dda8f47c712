//! From the traces of a job to its analysis.

use super::collectives::{self, Joined};
use super::steps::{marked, pattern};
use super::verdict::{self, Case};
use super::{Host, Label, Record, TraceJob, Work, label};
use crate::budget::Budget;
use crate::budget::arith::signed;
use crate::cause::Place;
use crate::facts::{GpuSubject, RecordGap, StepMethod};
use crate::job::{Blame, GpuSummary, JobAnalysis, Tier};
use crate::leaf::Leaf;
use crate::reading::Reading;
use crate::time::Window;

/// Leaves that records of the host and the device decide, whatever their value. Storage and run queues are not in a
/// trace; neither are clocks, peaks and reference rates.
const MEASURED: [Leaf; 11] = [
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

/// One GPU with its labels.
pub(super) struct Labelled {
    pub(super) subject: GpuSubject,
    pub(super) labels: Vec<Label>,
    pub(super) total: Budget,
    steps: Vec<Window>,
    method: StepMethod,
    calls: u32,
}

/// The whole answer for one job, exact to the ns: budgets of every GPU, blame between ranks, causes.
#[must_use]
pub fn analyse(job: TraceJob) -> JobAnalysis {
    let mut gaps: Vec<RecordGap> = job.ranks.iter().flat_map(|rank| rank.gaps.clone()).collect();
    let mut devices = Vec::new();
    for rank in &job.ranks {
        for device in &rank.devices {
            let mut records = device.records.clone();
            records.sort_by_key(|record| (record.window, record.launch, record.stream, record.token));
            devices.push((rank, &device.subject, records));
        }
    }
    devices.sort_by_key(|(_, subject, _)| (subject.rank, subject.gpu));
    let world = devices
        .iter()
        .map(|(_, subject, _)| subject.world)
        .max()
        .unwrap_or(0);
    let all: Vec<&[Record]> = devices.iter().map(|(_, _, records)| records.as_slice()).collect();
    let joined = collectives::join(&all, world);
    gaps.extend(joined.gaps.iter().cloned());
    let labelled: Vec<Labelled> = devices
        .iter()
        .zip(&joined.waits)
        .zip(&joined.whole)
        .map(|(((rank, subject, records), waits), whole)| {
            let waits: Vec<Window> = waits.iter().map(|wait| wait.window).collect();
            let host = Host::new(&rank.host, rank.main_thread);
            let labels = label(records, &waits, &host);
            Labelled::new((*subject).clone(), records, labels, &rank.marks, *whole)
        })
        .collect();
    let blame = blames(&joined, &labelled);
    let observed = observed(&job, &labelled);
    let verdicts = verdict::judge(&Case {
        gpus: &labelled,
        joined: &joined,
        blame: &blame,
        ranks: world.max(u32::try_from(labelled.len()).unwrap_or(u32::MAX)),
    });
    JobAnalysis {
        job: job.job,
        kind: job.kind,
        observed,
        tier: Tier::Activity,
        gpus: labelled.into_iter().map(Labelled::summary).collect(),
        blame,
        verdicts,
        gaps,
        mfu_ppm: None,
        mfu_declared: false,
    }
}

impl Labelled {
    fn new(
        subject: GpuSubject,
        records: &[Record],
        labels: Vec<Label>,
        marks: &[Window],
        skew_known: bool,
    ) -> Self {
        let (edges, method, calls) = edges(records, marks);
        let end = labels.last().map_or(0, |label| label.window.end_ns());
        let declared = method == StepMethod::Declared;
        // The last mark ends with the trace; a pattern's last call begins a step that may be cut off.
        let ends = edges.iter().copied().skip(1).chain(declared.then_some(end));
        let steps = edges
            .iter()
            .zip(ends)
            .filter_map(|(start, end)| Window::new(*start, end));
        let total = budget(&labels, measured(records, skew_known));
        Self {
            subject,
            total,
            steps: steps.filter(|step| !step.is_empty()).collect(),
            method,
            calls,
            labels,
        }
    }

    fn summary(self) -> GpuSummary {
        let mut lengths: Vec<u64> = self.steps.iter().map(|step| step.len_ns()).collect();
        lengths.sort_unstable();
        GpuSummary {
            subject: self.subject,
            total: self.total,
            method: self.method,
            steps: self.steps.len() as u64,
            period_calls: self.calls,
            median_step_ns: lengths.get(lengths.len() / 2).copied().unwrap_or(0),
            activity: Reading::NotMeasured,
        }
    }

    /// Nanoseconds of one leaf.
    pub(super) fn ns(&self, leaf: Leaf) -> u64 {
        u64::try_from(self.total.leaf_ns(leaf)).unwrap_or(0)
    }
}

fn edges(records: &[Record], marks: &[Window]) -> (Vec<u64>, StepMethod, u32) {
    let declared = marked(records, marks);
    if !declared.is_empty() {
        return (declared, StepMethod::Declared, 0);
    }
    pattern(records).map_or((Vec::new(), StepMethod::FixedWindow, 0), |found| {
        (found.edges, found.method, found.calls)
    })
}

fn measured(records: &[Record], skew_known: bool) -> u32 {
    let link =
        |record: &Record| matches!(record.work, Work::ToDevice | Work::ToHost) && record.bytes.is_none();
    let mut bits = MEASURED.iter().fold(0, |bits, leaf| bits | (1 << leaf.index()));
    if records.iter().any(link) {
        bits &= !(1 << Leaf::MemoryCopy.index());
    }
    if skew_known {
        bits |= 1 << Leaf::CommSkew.index();
    }
    bits
}

fn budget(labels: &[Label], measured: u32) -> Budget {
    let mut leaves = [0_i64; Leaf::COUNT];
    for label in labels {
        leaves[label.leaf.index()] += signed(label.window.len_ns());
    }
    let window_ns = labels.iter().map(|label| label.window.len_ns()).sum();
    Budget::from_leaves(window_ns, leaves, measured, Vec::new())
        .unwrap_or_else(|_| Budget::unobserved(window_ns))
}

fn blames(joined: &Joined, gpus: &[Labelled]) -> Vec<Blame> {
    let labels: Vec<Vec<Label>> = gpus.iter().map(|gpu| gpu.labels.clone()).collect();
    let mut blames: Vec<Blame> = joined
        .blame(&labels)
        .into_iter()
        .map(|((culprit, leaf), cost_ns)| Blame {
            place: culprit.map_or_else(Place::default, |at| place(&gpus[at].subject)),
            leaf,
            cause: verdict::late(leaf),
            cost_ns,
        })
        .collect();
    blames.sort_by(|a, b| b.cost_ns.cmp(&a.cost_ns).then_with(|| a.place.cmp(&b.place)));
    blames
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
