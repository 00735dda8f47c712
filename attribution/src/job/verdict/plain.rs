//! When no cause is named: nothing stands out, or something does and nothing says why.

use super::words::{self, millis, percent};
use super::{Case, finish};
use crate::budget::arith::mul_div;
use crate::cause::{Cause, Confidence, Place};
use crate::facts::PPM;
use crate::job::ledger::Ledger;
use crate::job::{Evidence, Recovers, Verdict, evidence};
use crate::leaf::{Class, Leaf};

/// Steps longer than the healthy regime's by this much want an explanation, parts per million.
const UNEXPLAINED_STEP_PPM: u64 = 250_000;
/// Idle time without an explanation at this share is a finding of its own, parts per million.
const UNEXPLAINED_IDLE_PPM: u64 = 200_000;

/// Time was lost and nothing says why: longer steps than before, or idle time without an explanation.
pub(super) fn unexplained(case: &Case<'_>) -> Option<Verdict> {
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
            "idle GPU time without an explanation",
            percent(ledger.share_ppm(ns)),
            "below 10 %",
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
        "median step",
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
pub(super) fn nothing(case: &Case<'_>) -> Verdict {
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
        evidence(format!("{} of all GPU time", leaf.name()), percent(share), own)
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
