//! Steps and spans summed to GPUs and jobs, with waiting moved to who caused it.

use std::collections::BTreeMap;

use super::align;
use super::ledger::{Ledger, Told, ledgers};
use super::verdict::{self, Case};
use super::{Blame, GpuSummary, JobAnalysis, Tier, blame, regimes};
use crate::budget::Budget;
use crate::budget::arith::{median, mul_div};
use crate::cause::{Cause, Place};
use crate::facts::{Activity, GpuHistory, GpuSubject, JobFacts, PPM, StepMethod};
use crate::leaf::Leaf;
use crate::links;
use crate::reading::Reading;
use crate::time::Window;

/// The whole answer for one job.
///
/// Ranks are joined by the ends of their steps; exposed communication beyond that of the last rank to arrive becomes
/// `comm.skew` and is moved, conserving every nanosecond, to that rank and the leaf that kept it; causes are named per
/// stretch of steps of one length, so that a fault in the last third of a run is not diluted by the rest.
#[must_use]
pub fn analyse(facts: &JobFacts) -> JobAnalysis {
    let mut ranks: Vec<&GpuHistory> = facts.gpus.iter().collect();
    ranks.sort_by(|a, b| {
        let key = |gpu: &GpuSubject| (gpu.rank, gpu.node.clone(), gpu.gpu, gpu.pid);
        key(&a.subject).cmp(&key(&b.subject))
    });
    let subjects: Vec<&GpuSubject> = ranks.iter().map(|history| &history.subject).collect();
    let working = ranks.iter().filter(|history| !history.steps.is_empty());
    let mut nodes: Vec<&str> = working.map(|history| history.subject.node.as_str()).collect();
    nodes.sort_unstable();
    nodes.dedup();

    let steps = align::align(&ranks);
    let regimes = regimes::find(&steps);
    let skew = blame::skew(&steps, &regimes);
    let mut links = links::examine(&facts.hardware, &facts.ports, &subjects);
    let told = Told {
        subjects: &subjects,
        ports: &facts.ports,
        hardware: &facts.hardware,
        findings: &links.findings,
    };
    let ledgers = ledgers(&steps, &regimes, &skew, &told, nodes.len());
    let gpus: Vec<GpuSummary> = ranks
        .iter()
        .enumerate()
        .map(|(at, history)| summary(history, at, &ledgers))
        .collect();
    let totals: Vec<Budget> = gpus.iter().map(|gpu| gpu.total.clone()).collect();
    let total_ns = totals
        .iter()
        .fold(0, |sum: u64, total| sum.saturating_add(total.window_ns()));
    let ideal_ns = ideal(&totals);
    let case = Case {
        kind: &facts.kind,
        ranks: &ranks,
        subjects: &subjects,
        steps: &steps,
        ledgers: &ledgers,
        totals: &totals,
        total_ns,
        ideal_ns,
    };
    let mut verdicts = verdict::judge(&case);
    verdict::join_findings(&mut verdicts, &mut links.findings, !steps.is_empty(), &totals);
    let mut gaps = facts.gaps.clone();
    gaps.extend(align::gaps(&ranks, &steps));
    JobAnalysis {
        job: facts.job.clone(),
        kind: facts.kind.clone(),
        observed: observed(&ranks),
        tier: tier(&ranks),
        blame: blames(&subjects, &ledgers, &totals),
        verdicts,
        gaps,
        mfu_ppm: ideal_ns
            .filter(|_| total_ns > 0)
            .map(|ideal| u32::try_from(mul_div(ideal, PPM, total_ns)).unwrap_or(u32::MAX)),
        mfu_declared: ideal_ns.is_some() && declared(&ranks),
        work: super::WorkAccount::default(),
        links,
        gpus,
    }
}

fn summary(history: &GpuHistory, at: usize, ledgers: &[Ledger]) -> GpuSummary {
    let steps = &history.steps;
    let budgets = steps
        .iter()
        .map(|step| &step.budget)
        .chain(history.spans.iter().map(|span| &span.budget));
    let mut total = Budget::sum(budgets);
    let mut moved = [0; Leaf::COUNT];
    let mut measured = 0;
    for rank in ledgers.iter().filter_map(|ledger| ledger.ranks.get(at)) {
        for (sum, ns) in moved.iter_mut().zip(rank.resplit) {
            *sum += ns;
        }
        measured |= rank.resplit_measured;
    }
    total.shift(&moved, measured);
    GpuSummary {
        subject: history.subject.clone(),
        total,
        method: typical(steps.iter().map(|step| step.method as u8)).map_or(
            StepMethod::FixedWindow,
            |method| {
                steps
                    .iter()
                    .map(|step| step.method)
                    .find(|other| *other as u8 == method)
                    .unwrap_or(StepMethod::FixedWindow)
            },
        ),
        steps: steps.len() as u64,
        period_calls: typical(steps.iter().map(|step| step.period_calls)).unwrap_or(0),
        median_step_ns: median(steps.iter().map(|step| step.window.len_ns()).collect()),
        activity: activity(history),
    }
}

/// The most frequent value.
fn typical<T: Ord + Copy>(values: impl Iterator<Item = T>) -> Option<T> {
    let mut counts: BTreeMap<T, usize> = BTreeMap::new();
    values.for_each(|value| *counts.entry(value).or_default() += 1);
    counts
        .into_iter()
        .max_by_key(|(_, count)| *count)
        .map(|(value, _)| value)
}

fn activity(history: &GpuHistory) -> Reading<Activity> {
    Activity::mean(
        history
            .steps
            .iter()
            .map(|step| (step.window.len_ns(), &step.signals.activity)),
    )
}

/// The model's arithmetic, where any rank's is known.
fn ideal(totals: &[Budget]) -> Option<u64> {
    let known = || totals.iter().filter(|total| total.is_measured(Leaf::Ideal));
    known().next()?;
    Some(
        known()
            .map(|total| u64::try_from(total.leaf_ns(Leaf::Ideal)).unwrap_or(0))
            .sum(),
    )
}

/// Whether all known arithmetic was declared: an estimate from tensor activity carries an interval.
fn declared(ranks: &[&GpuHistory]) -> bool {
    ranks.iter().flat_map(|history| &history.steps).all(|step| {
        !step.budget.is_measured(Leaf::Ideal)
            || step
                .budget
                .intervals()
                .iter()
                .all(|interval| interval.leaf != Leaf::Ideal)
    })
}

fn tier(ranks: &[&GpuHistory]) -> Tier {
    let steps = || ranks.iter().flat_map(|history| &history.steps);
    if steps().next().is_some() && steps().all(|step| step.budget.is_measured(Leaf::CommSkew)) {
        Tier::Activity
    } else if steps().any(|step| step.signals.activity.value().is_some()) {
        Tier::ProbesAndCounters
    } else {
        Tier::Probes
    }
}

/// Waiting by who caused it, largest first; sums to all `comm.skew`. Waiting in steps that no other rank's record shows
/// stays with nobody.
fn blames(subjects: &[&GpuSubject], ledgers: &[Ledger], totals: &[Budget]) -> Vec<Blame> {
    let mut costs: BTreeMap<(usize, Leaf), (u64, Cause)> = BTreeMap::new();
    for ledger in ledgers {
        for (at, rank) in ledger.ranks.iter().enumerate() {
            for leaf in Leaf::ALL.iter().filter(|leaf| rank.moved[leaf.index()] > 0) {
                let cause = verdict::cause_of(*leaf, rank, ledger.pressure).unwrap_or(Cause::Unknown);
                let cost = costs.entry((at, *leaf)).or_insert((0, cause));
                cost.0 += rank.moved[leaf.index()];
            }
        }
    }
    let mut blame: Vec<Blame> = costs
        .into_iter()
        .map(|((at, leaf), (cost_ns, cause))| Blame {
            place: verdict::rank_place(subjects[at]),
            leaf,
            cause,
            cost_ns,
        })
        .collect();
    let waited: i64 = totals.iter().map(|total| total.leaf_ns(Leaf::CommSkew)).sum();
    let moved: u64 = blame.iter().map(|blame| blame.cost_ns).sum();
    let unresolved = u64::try_from(waited).unwrap_or(0).saturating_sub(moved);
    if unresolved > 0 {
        let place = Place::default();
        blame.push(Blame {
            place,
            leaf: Leaf::CommSkew,
            cause: Cause::Unknown,
            cost_ns: unresolved,
        });
    }
    blame.sort_by(|a, b| {
        b.cost_ns
            .cmp(&a.cost_ns)
            .then_with(|| a.place.cmp(&b.place))
            .then(a.leaf.cmp(&b.leaf))
    });
    blame
}

/// A monotonic window in `CLOCK_REALTIME`.
pub(super) fn realtime(window: Window, offset_ns: i64) -> Window {
    Window::new(
        window.start_ns().saturating_add_signed(offset_ns),
        window.end_ns().saturating_add_signed(offset_ns),
    )
    .unwrap_or_default()
}

/// Whether a monotonic window counts for a stretch of `CLOCK_REALTIME`: its middle lies in it, so that it counts for one.
pub(super) fn counts_for(stretch: Window, window: Window, offset_ns: i64) -> bool {
    let window = realtime(window, offset_ns);
    let middle_ns = window.start_ns() + window.len_ns() / 2;
    (stretch.start_ns()..stretch.end_ns()).contains(&middle_ns)
}

fn observed(ranks: &[&GpuHistory]) -> Option<Window> {
    let windows = ranks.iter().flat_map(|gpu| {
        let steps = gpu
            .steps
            .iter()
            .map(|step| realtime(step.window, step.realtime_offset_ns));
        steps.chain(
            gpu.spans
                .iter()
                .map(|span| realtime(span.window, span.realtime_offset_ns)),
        )
    });
    windows
        .reduce(|a, b| Window::new(a.start_ns().min(b.start_ns()), a.end_ns().max(b.end_ns())).unwrap_or(a))
}
