//! Checkpoints that cost too much.

use super::words::{self, millis, percent};
use super::{Case, RETURNS_PERCENT};
use crate::budget::arith::median;
use crate::budget::arith::mul_div;
use crate::cause::{Cause, Confidence, Place};
use crate::facts::{GpuHistory, PPM, SpanKind};
use crate::job::rollup::realtime;
use crate::job::{Recovers, Verdict, evidence};
use crate::leaf::Leaf;

/// Checkpoints cost at least this share of all GPU time, parts per million.
const CHECKPOINT_PPM: u64 = 30_000;
/// Checkpoints since the first one, where there were none for long before.
const CHECKPOINT_SINCE_PPM: u64 = 50_000;

/// The checkpoints of the rank that has most of them, as (start, length) in `CLOCK_REALTIME` ns.
fn checkpoints(case: &Case<'_>) -> Vec<(u64, u64)> {
    let of = |history: &GpuHistory| {
        let spans = history
            .spans
            .iter()
            .filter(|span| span.kind == SpanKind::Checkpoint)
            .map(|span| (realtime(span.window, span.realtime_offset_ns), &span.budget));
        let steps = history
            .steps
            .iter()
            .map(|step| (realtime(step.window, step.realtime_offset_ns), &step.budget));
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

pub(super) fn checkpoint(case: &Case<'_>) -> Option<Verdict> {
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
    let length = median(found.iter().map(|(_, length)| *length).collect());
    let every = interval.map_or_else(
        || "once".into(),
        |ns| format!("every {} s", (ns + 500_000_000) / 1_000_000_000),
    );
    let evidence = vec![
        evidence(
            "GPU time spent in checkpoints, waiting of others included",
            percent(share),
            "below 3 %",
        ),
        evidence(
            "checkpoints seen",
            format!("{} of {} ({every})", found.len(), millis(length)),
            "short against their interval",
        ),
        evidence("share since the first of them", percent(since), "below 5 %"),
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
