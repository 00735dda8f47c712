//! Causes named, with what was seen, what it was not, and what fixing them would return.

mod costs;
mod place;
mod rules;
mod words;

use super::align::AlignedStep;
use super::ledger::Ledger;
use super::{Evidence, Recovers, RuledOut, Verdict};
use crate::budget::Budget;
use crate::budget::arith::mul_div;
use crate::cause::{Cause, Confidence, Place};
use crate::facts::{GpuHistory, GpuSubject, PPM, SpanKind};
use crate::leaf::{Class, Leaf};

pub(super) use costs::cause_of;
pub(super) use place::rank_place;
use words::{View, evidence, millis, percent};

/// Checkpoints cost at least this share of all GPU time, parts per million.
const CHECKPOINT_PPM: u64 = 30_000;
/// Checkpoints since the first one, where there were none for long before.
const CHECKPOINT_SINCE_PPM: u64 = 50_000;
/// Steps longer than the healthy regime's by this much want an explanation, parts per million.
const UNEXPLAINED_STEP_PPM: u64 = 250_000;
/// Idle time without an explanation at this share is a finding of its own, parts per million.
const UNEXPLAINED_IDLE_PPM: u64 = 200_000;
/// What a fix returns at least of the cost, when nothing else binds next: percent.
const RETURNS_PERCENT: u64 = 85;

/// Everything the verdicts are made from.
pub(super) struct Case<'a> {
    pub(super) ranks: &'a [&'a GpuHistory],
    pub(super) subjects: &'a [&'a GpuSubject],
    pub(super) steps: &'a [AlignedStep<'a>],
    pub(super) ledgers: &'a [Ledger],
    /// Budgets of the ranks over everything analysed.
    pub(super) totals: &'a [Budget],
    /// All GPU time analysed, ns.
    pub(super) total_ns: u64,
    /// The model's arithmetic at the peak, ns, when it is known.
    pub(super) ideal_ns: Option<u64>,
}

/// The verdicts, largest first; never empty.
pub(super) fn judge(case: &Case<'_>) -> Vec<Verdict> {
    let mut verdicts = Vec::new();
    verdicts.extend(checkpoint(case));
    let mut order: Vec<usize> = (0..case.ledgers.len()).collect();
    order.sort_by_key(|at| (case.ledgers[*at].baseline.is_some(), *at));
    let mut chronic = Vec::new();
    let mut named = Vec::new();
    for at in order {
        let ledger = &case.ledgers[at];
        let base = ledger.baseline.map(|base| &case.ledgers[base]);
        let decision = rules::decide(ledger, base, costs::costs(ledger, base, &chronic));
        let dropped: Vec<RuledOut> = decision
            .dropped
            .iter()
            .map(|(cause, why)| RuledOut {
                cause: *cause,
                why: why.clone(),
            })
            .collect();
        for candidate in &decision.causes {
            if base.is_none() {
                chronic.push(candidate.cause);
            }
            let verdict = verdict(case, ledger, base, candidate, dropped.clone());
            let began = (at > 0).then(|| ledger.window.start_ns());
            named.push(Verdict {
                onset_ns: began,
                ..verdict
            });
        }
    }
    for verdict in named {
        join(&mut verdicts, verdict);
    }
    settle(&mut verdicts);
    for verdict in &mut verdicts {
        finish(case, verdict);
    }
    verdicts.sort_by(|a, b| b.cost_ns.cmp(&a.cost_ns).then(a.cause.cmp(&b.cause)));
    if verdicts.is_empty() {
        verdicts.push(unexplained(case).unwrap_or_else(|| nothing(case)));
    }
    verdicts
}

fn verdict(
    case: &Case<'_>,
    ledger: &Ledger,
    base: Option<&Ledger>,
    candidate: &rules::Candidate,
    ruled_out: Vec<RuledOut>,
) -> Verdict {
    let hit = place::hit(&candidate.cost);
    let place = place::place(candidate.cause, &hit, case.subjects, ledger);
    let view = View {
        candidate,
        place: &place,
        hit: &hit,
        subjects: case.subjects,
        ledger,
        base,
    };
    let (evidence, kinds) = words::seen(&view);
    let pid = place.rank.and(hit.first()).map(|at| case.subjects[*at].pid);
    let cost_ns = candidate.cost.total();
    let (low, high) = bounds(case, candidate.cause, &hit, cost_ns);
    Verdict {
        cause: candidate.cause,
        cost_ns,
        share_ppm: 0,
        confidence: words::confidence(&view, kinds),
        evidence,
        ruled_out: ruled_out.into_iter().chain(healthy(&view)).collect(),
        confirm: words::confirm(candidate.cause, &place, pid),
        recovers: Recovers {
            gpu_ns: cost_ns,
            low_gpu_ns: low,
            high_gpu_ns: high,
            mfu_centipoints: None,
        },
        onset_ns: None,
        place,
    }
}

/// Causes that would look alike and show no sign of themselves.
fn healthy(view: &View<'_>) -> Vec<RuledOut> {
    let ranks = || view.ledger.ranks.iter();
    let mut out = Vec::new();
    let slow_clock = ranks().any(|rank| {
        rank.sm_mhz
            .zip(rank.reference_mhz)
            .is_some_and(|(mhz, reference)| mhz * 100 < u64::from(reference) * 97)
    });
    if !slow_clock && let Some(mhz) = ranks().filter_map(|rank| rank.sm_mhz).min() {
        let why = format!("the lowest SM clock of any rank is {mhz} MHz, not below its reference");
        out.push(RuledOut {
            cause: Cause::DeviceThermal,
            why,
        });
    }
    if ranks().all(|rank| rank.foreign_processes == 0) {
        out.push(RuledOut {
            cause: Cause::DeviceContention,
            why: "no other process uses any GPU of the job".into(),
        });
    }
    if view.ledger.pressure == super::network::Pressure::None && !view.ledger.ports.is_empty() {
        let why = "no port held packets back and no flow was held up".into();
        out.push(RuledOut {
            cause: Cause::NetworkNic,
            why,
        });
    }
    out.retain(|ruled| ruled.cause != view.candidate.cause);
    out
}

/// Least and most the cost can be, from the bounds of the leaf it is read from.
fn bounds(case: &Case<'_>, cause: Cause, hit: &[usize], cost_ns: u64) -> (u64, u64) {
    let Some(leaf) = leaf_of(cause) else {
        return (mul_div(cost_ns, RETURNS_PERCENT, 100), cost_ns);
    };
    let (mut low, mut point, mut high) = (0_u64, 0_u64, 0_u64);
    for total in hit.iter().map(|at| &case.totals[*at]) {
        let at = u64::try_from(total.leaf_ns(leaf)).unwrap_or(0);
        let interval = total.intervals().iter().find(|interval| interval.leaf == leaf);
        point += at;
        low += interval.map_or(at, |interval| u64::try_from(interval.low_ns).unwrap_or(0));
        high += interval.map_or(at, |interval| u64::try_from(interval.high_ns).unwrap_or(0));
    }
    let (low, high) = if point == 0 {
        (point, point)
    } else {
        (mul_div(cost_ns, low, point), mul_div(cost_ns, high, point))
    };
    let low = low.min(mul_div(cost_ns, RETURNS_PERCENT, 100));
    (
        low,
        high.clamp(cost_ns, cost_ns.saturating_mul(3) / 2)
            .min(case.total_ns.max(cost_ns)),
    )
}

fn leaf_of(cause: Cause) -> Option<Leaf> {
    Some(match cause {
        Cause::DataLoader => Leaf::IdleDataCpu,
        Cause::DataStorage => Leaf::IdleDataStorage,
        Cause::HostLaunch => Leaf::IdleLaunch,
        Cause::HostCpu => Leaf::IdleCpuSched,
        Cause::HostGc => Leaf::IdleGc,
        Cause::HostSync => Leaf::IdleCpuSync,
        Cause::DeviceThermal | Cause::DevicePowerCap | Cause::KernelClock => Leaf::ComputeClock,
        Cause::DeviceContention => Leaf::ComputeContention,
        Cause::NetworkNic | Cause::NetworkFabric => Leaf::CommNet,
        Cause::JobCheckpoint => Leaf::IdleCkpt,
        _ => return None,
    })
}

/// The same cause at the same place in several regimes is one verdict: costs add up, the costliest speaks.
fn join(verdicts: &mut Vec<Verdict>, verdict: Verdict) {
    let same = |other: &&mut Verdict| other.cause == verdict.cause && other.place == verdict.place;
    let Some(known) = verdicts.iter_mut().find(same) else {
        verdicts.push(verdict);
        return;
    };
    let onset_ns = known
        .onset_ns
        .zip(verdict.onset_ns)
        .map(|(one, other)| one.min(other));
    let cost_ns = known.cost_ns + verdict.cost_ns;
    let recovers = Recovers {
        gpu_ns: cost_ns,
        low_gpu_ns: known.recovers.low_gpu_ns + verdict.recovers.low_gpu_ns,
        high_gpu_ns: known.recovers.high_gpu_ns + verdict.recovers.high_gpu_ns,
        mfu_centipoints: None,
    };
    if verdict.cost_ns > known.cost_ns {
        *known = verdict;
    }
    *known = Verdict {
        onset_ns,
        cost_ns,
        recovers,
        ..known.clone()
    };
}

/// Drops verdicts that are consequences of a costlier one over the whole job.
fn settle(verdicts: &mut Vec<Verdict>) {
    verdicts.sort_by_key(|verdict| core::cmp::Reverse(verdict.cost_ns));
    let mut kept: Vec<Verdict> = Vec::new();
    for verdict in core::mem::take(verdicts) {
        let root = kept.iter_mut().find(|root| {
            let overlap = root.onset_ns.is_none() || verdict.onset_ns >= root.onset_ns;
            root.cause == Cause::JobCheckpoint && overlap && rules::follows(root.cause, verdict.cause)
        });
        match root {
            Some(root) => root.ruled_out.push(RuledOut {
                cause: verdict.cause,
                why: "costs less than the checkpoints, and comes with them".into(),
            }),
            None => kept.push(verdict),
        }
    }
    *verdicts = kept;
}

/// Shares of the whole, and what a fix returns.
fn finish(case: &Case<'_>, verdict: &mut Verdict) {
    verdict.cost_ns = verdict.cost_ns.min(case.total_ns);
    verdict.share_ppm = u32::try_from(mul_div(verdict.cost_ns, PPM, case.total_ns)).unwrap_or(u32::MAX);
    let left = case.total_ns.saturating_sub(verdict.cost_ns);
    let mfu = |total| case.ideal_ns.map(|ideal| mul_div(ideal, 10_000, total));
    verdict.recovers.gpu_ns = verdict.cost_ns;
    verdict.recovers.mfu_centipoints = mfu(left)
        .zip(mfu(case.total_ns))
        .map(|(then, now)| u32::try_from(then.saturating_sub(now)).unwrap_or(u32::MAX));
    let mut seen = std::collections::BTreeSet::new();
    verdict
        .ruled_out
        .retain(|ruled| ruled.cause != verdict.cause && seen.insert(ruled.cause));
}

/// The checkpoints of the rank that has most of them, as (start, length) in `CLOCK_REALTIME` ns.
fn checkpoints(case: &Case<'_>) -> Vec<(u64, u64)> {
    let of = |history: &GpuHistory| {
        let spans = history
            .spans
            .iter()
            .filter(|span| span.kind == SpanKind::Checkpoint)
            .map(|span| {
                (
                    super::rollup::realtime(span.window, span.realtime_offset_ns),
                    &span.budget,
                )
            });
        let steps = history.steps.iter().map(|step| {
            (
                super::rollup::realtime(step.window, step.realtime_offset_ns),
                &step.budget,
            )
        });
        let mut found: Vec<(u64, u64)> = spans
            .chain(steps)
            .map(|(window, budget)| {
                (
                    window.start_ns(),
                    u64::try_from(budget.leaf_ns(Leaf::IdleCkpt)).unwrap_or(0),
                    window.len_ns(),
                )
            })
            .filter(|(_, written, length)| written * 20 > *length)
            .map(|(start, written, _)| (start, written))
            .collect();
        found.sort_unstable();
        found
    };
    case.ranks
        .iter()
        .map(|history| of(history))
        .max_by_key(Vec::len)
        .unwrap_or_default()
}

fn checkpoint(case: &Case<'_>) -> Option<Verdict> {
    let own: u64 = case
        .totals
        .iter()
        .map(|total| u64::try_from(total.leaf_ns(Leaf::IdleCkpt)).unwrap_or(0))
        .sum();
    let moved: u64 = case
        .ledgers
        .iter()
        .flat_map(|ledger| &ledger.ranks)
        .map(|rank| rank.moved[Leaf::IdleCkpt.index()])
        .sum();
    let cost_ns = own.saturating_add(moved);
    let found = checkpoints(case);
    let (first, last) = (found.first()?, found.last()?);
    let start = case
        .ledgers
        .first()
        .map_or(first.0, |ledger| ledger.window.start_ns());
    let end = case
        .ledgers
        .last()
        .map_or(last.0, |ledger| ledger.window.end_ns())
        .max(last.0);
    let interval = (found.len() > 1).then(|| (last.0 - first.0) / (found.len() as u64 - 1));
    let before = first.0.saturating_sub(start);
    let began = interval.is_some_and(|interval| before > interval + interval / 2);
    let since_ns = mul_div(case.total_ns, (end - first.0).max(1), (end - start).max(1));
    let share = mul_div(cost_ns, PPM, case.total_ns);
    let since = mul_div(cost_ns, PPM, since_ns);
    if share < CHECKPOINT_PPM && !(began && since >= CHECKPOINT_SINCE_PPM) {
        return None;
    }
    let length = super::align::median(found.iter().map(|(_, length)| *length).collect());
    let every = interval.map_or_else(
        || "once".into(),
        |ns| format!("every {} s", (ns + 500_000_000) / 1_000_000_000),
    );
    let evidence = vec![
        evidence(
            "GPU time spent in checkpoints, waiting of others included".into(),
            percent(share),
            "below 3 %".into(),
        ),
        evidence(
            "checkpoints seen".into(),
            format!("{} of {} ({every})", found.len(), millis(length)),
            "short against their interval".into(),
        ),
        evidence(
            "share since the first of them".into(),
            percent(since),
            "below 5 %".into(),
        ),
    ];
    let place = Place::default();
    Some(Verdict {
        cause: Cause::JobCheckpoint,
        confirm: words::confirm(Cause::JobCheckpoint, &place, None),
        place,
        cost_ns,
        share_ppm: 0,
        confidence: if found.len() > 1 {
            Confidence::High
        } else {
            Confidence::Medium
        },
        evidence,
        ruled_out: Vec::new(),
        recovers: Recovers {
            gpu_ns: cost_ns,
            low_gpu_ns: mul_div(cost_ns, RETURNS_PERCENT, 100),
            high_gpu_ns: cost_ns,
            mfu_centipoints: None,
        },
        onset_ns: began.then_some(first.0),
    })
}

/// Time was lost and nothing says why: longer steps than before, or idle time without an explanation.
fn unexplained(case: &Case<'_>) -> Option<Verdict> {
    let slower = case.ledgers.iter().filter_map(|ledger| {
        let base = &case.ledgers[ledger.baseline?];
        let more = ledger.median_step_ns - base.median_step_ns;
        let share = mul_div(more, PPM, base.median_step_ns.max(1));
        let cost_ns = mul_div(ledger.total_ns, more, ledger.median_step_ns.max(1));
        (share >= UNEXPLAINED_STEP_PPM).then(|| (cost_ns, ledger, grown(ledger, base)))
    });
    let idle = case.ledgers.iter().filter_map(|ledger| {
        let ns: u64 = ledger.ranks.iter().map(|rank| rank.leaf(Leaf::IdleUnknown)).sum();
        let seen = evidence(
            "idle GPU time without an explanation".into(),
            percent(ledger.share_ppm(ns)),
            "below 10 %".into(),
        );
        (ledger.share_ppm(ns) >= UNEXPLAINED_IDLE_PPM).then(|| (ns, ledger, vec![seen]))
    });
    let (cost_ns, ledger, evidence) = slower.chain(idle).max_by_key(|(cost_ns, ..)| *cost_ns)?;
    let mut verdict = plain(Cause::Unknown, evidence);
    verdict.cost_ns = cost_ns;
    verdict.recovers = Recovers {
        gpu_ns: cost_ns,
        high_gpu_ns: cost_ns,
        ..Recovers::default()
    };
    verdict.confidence = Confidence::Low;
    verdict.onset_ns = (ledger.steps.start > 0).then(|| ledger.window.start_ns());
    finish(case, &mut verdict);
    Some(verdict)
}

/// The step before and after, and the leaves that grew most per step.
fn grown(ledger: &Ledger, base: &Ledger) -> Vec<Evidence> {
    let per_step = |ledger: &Ledger, leaf: Leaf| {
        let steps: u64 = ledger.ranks.iter().map(|rank| rank.steps).sum();
        ledger.ranks.iter().map(|rank| rank.leaf(leaf)).sum::<u64>() / steps.max(1)
    };
    let mut leaves: Vec<_> = Leaf::ALL
        .iter()
        .map(|leaf| (per_step(ledger, *leaf), per_step(base, *leaf), leaf))
        .collect();
    leaves.sort_by_key(|(now, before, _)| core::cmp::Reverse(now.saturating_sub(*before)));
    let step = evidence(
        "median step".into(),
        millis(ledger.median_step_ns),
        millis(base.median_step_ns),
    );
    let grown = leaves.iter().take(3).filter(|(now, before, _)| now > before);
    let grown = grown.map(|(now, before, leaf)| {
        evidence(
            format!("{}, all ranks, per step", leaf.name()),
            millis(*now),
            millis(*before),
        )
    });
    core::iter::once(step).chain(grown).collect()
}

/// Nothing stands out: the three largest losses, and no culprit.
fn nothing(case: &Case<'_>) -> Verdict {
    let mut leaves: Vec<(i64, Leaf)> = Leaf::ALL
        .iter()
        .filter(|leaf| **leaf != Leaf::Ideal)
        .map(|leaf| (case.totals.iter().map(|total| total.leaf_ns(*leaf)).sum(), *leaf))
        .collect();
    leaves.sort_by_key(|(ns, leaf)| (core::cmp::Reverse(*ns), *leaf));
    let largest = leaves.iter().take(3).filter(|(ns, _)| *ns > 0).map(|(ns, leaf)| {
        let share = mul_div(u64::try_from(*ns).unwrap_or(0), PPM, case.total_ns);
        let own = if leaf.class() == Class::Compute {
            "a matter of kernels, not of a fault"
        } else {
            "no cause stands out"
        };
        evidence(
            format!("{} of all GPU time", leaf.name()),
            percent(share),
            own.into(),
        )
    });
    let mut verdict = plain(Cause::None, largest.collect());
    verdict.confidence = if case.steps.len() >= 10 {
        Confidence::High
    } else {
        Confidence::Low
    };
    verdict
}

fn plain(cause: Cause, evidence: Vec<Evidence>) -> Verdict {
    Verdict {
        cause,
        place: Place::default(),
        cost_ns: 0,
        share_ppm: 0,
        confidence: Confidence::Medium,
        evidence,
        ruled_out: Vec::new(),
        confirm: words::confirm(cause, &Place::default(), None),
        recovers: Recovers::default(),
        onset_ns: None,
    }
}
