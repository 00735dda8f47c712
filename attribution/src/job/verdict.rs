//! Causes named, with what was seen, what it was not, and what fixing them would return.

mod checkpoint;
mod costs;
mod found;
mod place;
mod plain;
mod roof;
mod rules;
mod steps;
mod words;

use super::align::AlignedStep;
use super::ledger::Ledger;
use super::{Recovers, RuledOut, Verdict};
use crate::budget::Budget;
use crate::budget::arith::mul_div;
use crate::cause::{Cause, Place};
use crate::facts::{GpuHistory, GpuSubject, PPM};
use crate::leaf::Leaf;

pub(super) use costs::cause_of;
pub(super) use found::join_findings;
pub(super) use place::rank_place;
use words::View;

/// Over the whole job, a further cause costs at least this share of the first, percent.
const BESIDE_PERCENT: u64 = 15;
/// What a fix returns at least of the cost, when nothing else binds next: percent.
const RETURNS_PERCENT: u64 = 85;

/// Everything the verdicts are made from.
pub(super) struct Case<'a> {
    /// Declared kind of job.
    pub(super) kind: &'a str,
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
    verdicts.extend(checkpoint::checkpoint(case));
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
        let without_culprit = plain::unexplained(case).or_else(|| roof::slow_kernels(case));
        verdicts.push(without_culprit.unwrap_or_else(|| plain::nothing(case)));
    }
    if case.total_ns > 0 {
        let limit = roof::Limits::of(case).evidence();
        verdicts
            .iter_mut()
            .for_each(|verdict| verdict.evidence.push(limit.clone()));
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
    let hit = place::hit(candidate.cause, &candidate.cost, ledger, base);
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
    // Only what every rank's device told is ruled out for the job.
    let clocks: Option<Vec<_>> = ranks()
        .map(|rank| rank.sm_mhz.zip(rank.reference_mhz.map(u64::from)))
        .collect();
    let held = clocks
        .unwrap_or_default()
        .into_iter()
        .map(|(mhz, reference)| (mhz, mhz * 100 < reference * 97));
    let lowest = held.min_by_key(|(mhz, slow)| (!slow, *mhz));
    if let Some((mhz, false)) = lowest {
        let why = format!("the lowest SM clock of any rank is {mhz} MHz, not below its reference");
        out.push(RuledOut {
            cause: Cause::DeviceThermal,
            why,
        });
    }
    if ranks().all(|rank| rank.foreign_processes == Some(0)) {
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
    out.extend(steps::ruled_out(view));
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
        Cause::NetworkNic | Cause::NetworkFabric | Cause::HostReceiver => Leaf::CommNet,
        Cause::JobCheckpoint => Leaf::IdleCkpt,
        _ => return None,
    })
}

/// The same cause in several regimes is one verdict: costs add up, the costliest speaks. Where regimes disagree about
/// the place of anything but a device, the costlier one's place counts, or what both have in common.
fn join(verdicts: &mut Vec<Verdict>, verdict: Verdict) {
    let own_place = |cause| {
        matches!(
            cause,
            Cause::DeviceThermal | Cause::DevicePowerCap | Cause::DeviceContention | Cause::DevicePcie
        )
    };
    let same = |other: &&mut Verdict| {
        other.cause == verdict.cause && (other.place == verdict.place || !own_place(verdict.cause))
    };
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
    let (less, more) = (
        known.cost_ns.min(verdict.cost_ns),
        known.cost_ns.max(verdict.cost_ns),
    );
    let common = (less >= more / 2).then(|| common_place(&known.place, &verdict.place));
    if verdict.cost_ns > known.cost_ns {
        *known = verdict;
    }
    let place = common.unwrap_or_else(|| known.place.clone());
    *known = Verdict {
        onset_ns,
        cost_ns,
        recovers,
        place,
        ..known.clone()
    };
}

/// What two places have in common: the same place, the same node, or nothing.
fn common_place(one: &Place, other: &Place) -> Place {
    if one == other {
        return one.clone();
    }
    let node = one.node.clone().filter(|node| other.node.as_ref() == Some(node));
    Place {
        node,
        ..Place::default()
    }
}

/// Drops verdicts that are small beside a costlier one over the whole job, or come with it.
fn settle(verdicts: &mut Vec<Verdict>) {
    verdicts.sort_by_key(|verdict| core::cmp::Reverse(verdict.cost_ns));
    let most = verdicts.first().map_or(0, |verdict| verdict.cost_ns);
    let mut kept: Vec<Verdict> = Vec::new();
    for verdict in core::mem::take(verdicts) {
        if let Some(first) = kept.first_mut()
            && verdict.cost_ns < mul_div(most, BESIDE_PERCENT, 100)
        {
            let why = "stood out for a few steps, and costs little beside the first cause".into();
            first.ruled_out.push(RuledOut {
                cause: verdict.cause,
                why,
            });
            continue;
        }
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
