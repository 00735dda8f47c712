//! Waiting for late ranks.

use std::collections::BTreeMap;

use super::steady::Bar;
use super::{Case, confirm, late, millis, percent, plain, price, sum};
use crate::activity::analyse::place;
use crate::activity::blame::{Culprit, Kind, culprit};
use crate::activity::{KernelClass, Record, Work};
use crate::budget::arith::{median, mul_div};
use crate::cause::{Cause, Confidence, Place};
use crate::facts::PPM;
use crate::job::{Evidence, RuledOut, Verdict};
use crate::leaf::{Class, Leaf};

/// A late rank's cause is named when it kept the rank for this share of the waiting, percent.
const KNOWN_PERCENT: u64 = 25;
/// It is sure when it kept the rank for this share, percent.
const SURE_PERCENT: u64 = 60;
/// A device is slow when the same kernels take this share of the median rank's time there, percent.
const SLOWER_PERCENT: u64 = 105;
/// A device is judged by at least so many different kernels.
const LEAST_KERNELS: usize = 4;

/// Exposed waiting for late ranks, when it is a loss worth naming: the rank, node or stage that most of it was for, and
/// what it did. Waiting under compute costs nothing and does not count.
pub(super) fn late_rank(case: &Case<'_>, total_ns: u64, bar: Bar) -> Option<Verdict> {
    let exposed = sum(case, |gpu| gpu.ns(Leaf::CommSkew));
    if mul_div(exposed, PPM, total_ns) < bar.of_waiting() {
        return None;
    }
    let culprit = who(case)?;
    let one = culprit.kind != Kind::Moving;
    let mut causes: BTreeMap<Cause, u64> = BTreeMap::new();
    let (mut blamed, mut waited) = (0_u64, case.moved.circles.values().sum::<u64>());
    for ((rank, leaf, _), ns) in &case.moved.to {
        waited = waited.saturating_add(*ns);
        if !one || culprit.ranks.contains(rank) {
            *causes.entry(late(&case.gpus[*rank], *leaf)).or_default() += ns;
            blamed = blamed.saturating_add(*ns);
        }
    }
    let known = causes
        .iter()
        .filter(|(cause, _)| **cause != Cause::Unknown)
        .max_by_key(|(_, ns)| **ns)
        .filter(|(_, ns)| u128::from(**ns) * 100 >= u128::from(blamed) * u128::from(KNOWN_PERCENT));
    let mut cause = known.map_or(Cause::Unknown, |(cause, _)| *cause);
    let place = where_is(case, &culprit);
    // A stage of several nodes has more work by construction, not a slow device in each.
    let slower = Some(&culprit)
        .filter(|culprit| cause == Cause::JobImbalance && culprit.is_persistent() && place.node.is_some())
        .and_then(|culprit| slower_percent(case, &culprit.ranks));
    if slower.is_some_and(|percent| percent >= SLOWER_PERCENT) {
        cause = Cause::KernelClock;
    }
    let cost_ns = if one {
        mul_div(exposed, culprit.ns, waited)
    } else {
        exposed
    };
    if !bar.is_met(cause, &culprit, mul_div(cost_ns, PPM, total_ns)) {
        return None;
    }
    let confirm = if cause == Cause::DevicePcie {
        confirm(cause)
    } else if cause == Cause::KernelClock {
        "on the rank's node run nvidia-smi -q -d CLOCK,PERFORMANCE,TEMPERATURE and nvidia-smi pmon -c 5: a low clock, heat \
         or another process; a trace cannot tell them apart"
    } else {
        "trace the late rank and another one together with_stack=True: compare what they do before the collective"
    };
    let mut verdict = plain(cause, confirm);
    verdict.place = place;
    verdict.evidence = lateness(case);
    verdict.evidence.extend(together(case, &culprit, waited));
    verdict.evidence.extend(habit(&culprit));
    verdict.evidence.extend(meanwhile(case, &culprit));
    verdict.evidence.extend(slower.map(|percent| Evidence {
        what: "the same kernels beside the median rank's".into(),
        value: format!("{percent} % of their time"),
        expected: "100 %: then it has more work, not a slower device".into(),
    }));
    let sure = |ns: u64| u128::from(ns) * 100 >= u128::from(blamed) * u128::from(SURE_PERCENT);
    let steady = culprit.is_persistent() && case.joined.residual_ns == 0;
    verdict.confidence = match known {
        Some((_, ns)) if one && steady && sure(*ns) && cause != Cause::KernelClock => Confidence::High,
        Some(_) => Confidence::Medium,
        None => Confidence::Low,
    };
    price(&mut verdict, cost_ns, total_ns);
    Some(verdict)
}

/// Whom most of the waiting was for.
fn who(case: &Case<'_>) -> Option<Culprit> {
    let mut waited: BTreeMap<(usize, Option<u32>), u64> = BTreeMap::new();
    let (mut computing, mut all) = (0_u64, 0_u64);
    for ((rank, leaf, step), ns) in &case.moved.to {
        *waited.entry((*rank, *step)).or_default() += ns;
        all = all.saturating_add(*ns);
        if leaf.class() == Class::Compute {
            computing = computing.saturating_add(*ns);
        }
    }
    let nobodys_ns = case.moved.circles.values().sum();
    culprit(&waited, nobodys_ns, &case.joined.groups, computing >= all / 2)
}

/// The place of a culprit: its rank, or the node that all its ranks are on.
fn where_is(case: &Case<'_>, culprit: &Culprit) -> Place {
    let subject = |at: &usize| &case.gpus[*at].subject;
    match culprit.ranks.as_slice() {
        [] => Place::default(),
        [rank] => place(subject(rank)),
        [first, ..] => {
            let node = &subject(first).node;
            let one = !node.is_empty() && culprit.ranks.iter().all(|at| subject(at).node == *node);
            Place {
                node: one.then(|| node.clone()),
                ..Place::default()
            }
        }
    }
}

/// What several culprits have in common.
fn together(case: &Case<'_>, culprit: &Culprit, waited: u64) -> Option<Evidence> {
    let what = match culprit.kind {
        Kind::Rank | Kind::Moving => return None,
        Kind::Node => "the GPUs of one node",
        Kind::Stage => "the replicas of one pipeline stage",
    };
    let ranks: Vec<String> = culprit
        .ranks
        .iter()
        .take(8)
        .map(|at| case.gpus[*at].subject.rank.to_string())
        .collect();
    let more = culprit.ranks.len().saturating_sub(ranks.len());
    let more = if more > 0 {
        format!(" and {more} more")
    } else {
        String::new()
    };
    Some(Evidence {
        what: format!("waiting for {what}: ranks {}{more}", ranks.join(", ")),
        value: format!("{} of {}", millis(culprit.ns), millis(waited)),
        expected: "no part of the job is last more often than others".into(),
    })
}

/// Whether the same was late in each step.
fn habit(culprit: &Culprit) -> Option<Evidence> {
    let (own, all) = culprit.steps.filter(|_| culprit.kind != Kind::Moving)?;
    Some(Evidence {
        what: "steps in which most of the waiting was for it".into(),
        value: format!("{own} of {all}"),
        expected: "below 60 %: a device that is slow is so in every step, data and pauses move about".into(),
    })
}

/// Who was late, how often, and what it cost the others.
fn lateness(case: &Case<'_>) -> Vec<Evidence> {
    let mut by_rank: BTreeMap<Option<u32>, u64> = BTreeMap::new();
    for blame in case.blame {
        *by_rank.entry(blame.place.rank).or_default() += blame.cost_ns;
    }
    let mut by_rank: Vec<_> = by_rank.into_iter().collect();
    by_rank.sort_by_key(|(rank, ns)| (core::cmp::Reverse(*ns), *rank));
    let waited: u64 = by_rank.iter().map(|(_, ns)| ns).sum();
    let exposed = sum(case, |gpu| gpu.ns(Leaf::CommSkew));
    let whole = Evidence {
        what: format!(
            "waiting for the last rank in {} collectives, all ranks",
            case.joined.collectives
        ),
        value: format!(
            "{}, of it {} with nothing else to run",
            millis(waited),
            millis(exposed)
        ),
        expected: "ranks arrive together".into(),
    };
    let worst = by_rank.into_iter().take(3).map(|(rank, ns)| {
        let (who, times) = rank.map_or(("ranks that wait in a circle".to_owned(), 0), |rank| {
            let late = case
                .gpus
                .iter()
                .zip(&case.joined.last)
                .filter(|(gpu, _)| gpu.subject.rank == rank);
            (format!("rank {rank}"), late.map(|(_, last)| last).sum())
        });
        Evidence {
            what: format!("waiting for {who}"),
            value: format!(
                "{}, last in {times} of {} collectives",
                millis(ns),
                case.joined.collectives
            ),
            expected: "no rank is last more often than others".into(),
        }
    });
    core::iter::once(whole).chain(worst).collect()
}

/// What the late ranks did while the others waited, most first.
fn meanwhile(case: &Case<'_>, culprit: &Culprit) -> Option<Evidence> {
    let mut leaves: BTreeMap<Leaf, u64> = BTreeMap::new();
    for ((rank, leaf, _), ns) in &case.moved.to {
        if culprit.ranks.contains(rank) {
            *leaves.entry(*leaf).or_default() += ns;
        }
    }
    let mut leaves: Vec<(Leaf, u64)> = leaves.into_iter().collect();
    leaves.sort_by_key(|(leaf, ns)| (core::cmp::Reverse(*ns), *leaf));
    let words: Vec<String> = leaves
        .iter()
        .take(3)
        .map(|(leaf, ns)| format!("{} {}", leaf.name(), millis(*ns)))
        .collect();
    (!words.is_empty()).then(|| Evidence {
        what: "what it did while others waited for it".into(),
        value: words.join(", "),
        expected: "the same collective".into(),
    })
}

/// Time of some ranks' compute kernels beside what the same kernels take on the median of the others, percent; `None`
/// when too few of them are known of two others, or few are slower.
fn slower_percent(case: &Case<'_>, ranks: &[usize]) -> Option<u64> {
    let mut medians: BTreeMap<u64, (Vec<u64>, Vec<u64>)> = BTreeMap::new();
    for (at, gpu) in case.gpus.iter().enumerate() {
        for (token, median) in medians_of(&gpu.records) {
            let (own, others) = medians.entry(token).or_default();
            if ranks.contains(&at) { own } else { others }.push(median);
        }
    }
    let (mut own, mut usual) = (0_u64, 0_u64);
    let (mut kernels, mut slower) = (0, 0);
    for (mine, others) in medians.into_values() {
        if mine.is_empty() || others.len() < 2 {
            continue;
        }
        let (mine, typical) = (median(mine), median(others));
        own = own.saturating_add(mine);
        usual = usual.saturating_add(typical);
        kernels += 1;
        slower += usize::from(u128::from(mine) * 100 >= u128::from(typical) * u128::from(SLOWER_PERCENT));
    }
    // One kernel may take longer for its data's sake; a slow device slows nearly all.
    (kernels >= LEAST_KERNELS && slower * 4 >= kernels * 3).then(|| mul_div(own, 100, usual))
}

/// Median length of each compute kernel, by token.
fn medians_of(records: &[Record]) -> BTreeMap<u64, u64> {
    let mut lengths: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
    let compute =
        |record: &&Record| matches!(record.work, Work::Kernel(class) if class != KernelClass::Communication);
    for record in records.iter().filter(compute).filter(|record| record.shaped) {
        lengths
            .entry(record.token)
            .or_default()
            .push(record.window.len_ns());
    }
    lengths
        .into_iter()
        .map(|(token, lengths)| (token, median(lengths)))
        .collect()
}

/// The network is ruled out when collectives were mostly waiting.
pub(super) fn network(case: &Case<'_>, total_ns: u64) -> Option<RuledOut> {
    let skew = sum(case, |gpu| gpu.ns(Leaf::CommSkew));
    let moving = sum(case, |gpu| gpu.ns(Leaf::CommProto));
    (skew > moving).then(|| RuledOut {
        cause: Cause::NetworkFabric,
        why: format!(
            "after the last rank had arrived, exposed communication took {} of GPU time; waiting for it {}",
            percent(mul_div(moving, PPM, total_ns)),
            percent(mul_div(skew, PPM, total_ns)),
        ),
    })
}
