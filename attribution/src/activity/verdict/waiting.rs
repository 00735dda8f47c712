//! Waiting for late ranks.

use std::collections::BTreeMap;

use super::{Case, LEAST_PPM, ONE_RANK_PERCENT, millis, percent, plain, price, sum};
use crate::activity::{KernelClass, Record, Work};
use crate::budget::arith::mul_div;
use crate::cause::{Cause, Confidence, Place};
use crate::facts::PPM;
use crate::job::{Evidence, RuledOut, Verdict};
use crate::leaf::Leaf;

/// A late rank's cause is named when it kept the rank for this share of the waiting, percent.
const KNOWN_PERCENT: u64 = 25;
/// It is sure when it kept the rank for this share, percent.
const SURE_PERCENT: u64 = 60;
/// A device is slow when the same kernels take this share of the median rank's time there, percent.
const SLOWER_PERCENT: u64 = 105;
/// A device is judged by at least so many different kernels.
const LEAST_KERNELS: usize = 4;

/// Exposed waiting for late ranks, when it is a loss worth naming: the rank that most of it was for, and what it did.
/// Waiting under compute costs nothing and does not count.
pub(super) fn late_rank(case: &Case<'_>, total_ns: u64) -> Option<Verdict> {
    let exposed = sum(case, |gpu| gpu.ns(Leaf::CommSkew));
    if mul_div(exposed, PPM, total_ns) < LEAST_PPM {
        return None;
    }
    let mut by_rank: BTreeMap<&Place, u64> = BTreeMap::new();
    for blame in case.blame {
        *by_rank.entry(&blame.place).or_default() += blame.cost_ns;
    }
    let waited: u64 = by_rank.values().sum();
    let (worst, theirs) = by_rank.iter().max_by_key(|(_, ns)| **ns)?;
    let one = u128::from(*theirs) * 100 >= u128::from(waited) * u128::from(ONE_RANK_PERCENT);
    let mut causes: BTreeMap<Cause, u64> = BTreeMap::new();
    for blame in case.blame.iter().filter(|blame| !one || blame.place == **worst) {
        *causes.entry(blame.cause).or_default() += blame.cost_ns;
    }
    let blamed: u64 = causes.values().sum();
    let known = causes
        .iter()
        .filter(|(cause, _)| **cause != Cause::Unknown)
        .max_by_key(|(_, ns)| **ns)
        .filter(|(_, ns)| u128::from(**ns) * 100 >= u128::from(blamed) * u128::from(KNOWN_PERCENT));
    let mut cause = known.map_or(Cause::Unknown, |(cause, _)| *cause);
    let slower = worst
        .rank
        .filter(|_| one && cause == Cause::JobImbalance)
        .and_then(|rank| slower_percent(case, rank));
    if slower.is_some_and(|percent| percent >= SLOWER_PERCENT) {
        cause = Cause::KernelClock;
    }
    let cost_ns = if one {
        mul_div(exposed, *theirs, waited)
    } else {
        exposed
    };
    let confirm = if cause == Cause::KernelClock {
        "on the rank's node run nvidia-smi -q -d CLOCK,PERFORMANCE,TEMPERATURE and nvidia-smi pmon -c 5: a low clock, heat \
         or another process; a trace cannot tell them apart"
    } else {
        "trace the late rank and another one together with_stack=True: compare what they do before the collective"
    };
    let mut verdict = plain(cause, confirm);
    verdict.place = if one { (*worst).clone() } else { Place::default() };
    verdict.evidence = lateness(case);
    verdict.evidence.extend(meanwhile(case, one.then_some(*worst)));
    verdict.evidence.extend(slower.map(|percent| Evidence {
        what: "the same kernels beside the median rank's".into(),
        value: format!("{percent} % of their time"),
        expected: "100 %: then it has more work, not a slower device".into(),
    }));
    let sure = |ns: u64| u128::from(ns) * 100 >= u128::from(blamed) * u128::from(SURE_PERCENT);
    verdict.confidence = match (one, known) {
        (true, Some((_, ns))) if case.joined.residual_ns == 0 && sure(*ns) && cause != Cause::KernelClock => {
            Confidence::High
        }
        (_, Some(_)) => Confidence::Medium,
        (_, None) => Confidence::Low,
    };
    price(&mut verdict, cost_ns, total_ns);
    Some(verdict)
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

/// What the late rank did while the others waited, most first.
fn meanwhile(case: &Case<'_>, worst: Option<&Place>) -> Option<Evidence> {
    let worst = worst?;
    let mut leaves: Vec<(u64, Leaf)> = case
        .blame
        .iter()
        .filter(|blame| blame.place == *worst)
        .map(|blame| (blame.cost_ns, blame.leaf))
        .collect();
    leaves.sort_by_key(|(ns, leaf)| (core::cmp::Reverse(*ns), *leaf));
    let words: Vec<String> = leaves
        .iter()
        .take(3)
        .map(|(ns, leaf)| format!("{} {}", leaf.name(), millis(*ns)))
        .collect();
    Some(Evidence {
        what: "what it did while others waited for it".into(),
        value: words.join(", "),
        expected: "the same collective".into(),
    })
}

/// Time of one rank's compute kernels beside what the same kernels take on the median rank, percent; `None` when too
/// few of them are known of two others, or few are slower.
fn slower_percent(case: &Case<'_>, rank: u32) -> Option<u64> {
    let mut medians: BTreeMap<u64, Vec<(u32, u64)>> = BTreeMap::new();
    for gpu in case.gpus {
        for (token, median) in medians_of(&gpu.records) {
            medians.entry(token).or_default().push((gpu.subject.rank, median));
        }
    }
    let (mut own, mut usual) = (0_u64, 0_u64);
    let (mut kernels, mut slower) = (0, 0);
    for ranks in medians.values() {
        let mut others: Vec<u64> = ranks
            .iter()
            .filter(|(of, _)| *of != rank)
            .map(|(_, ns)| *ns)
            .collect();
        let mine = ranks.iter().find(|(of, _)| *of == rank);
        if let Some((_, mine)) = mine
            && others.len() >= 2
        {
            others.sort_unstable();
            let median = others[others.len() / 2];
            own = own.saturating_add(*mine);
            usual = usual.saturating_add(median);
            kernels += 1;
            slower += usize::from(u128::from(*mine) * 100 >= u128::from(median) * u128::from(SLOWER_PERCENT));
        }
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
    let medians = lengths.into_iter().map(|(token, mut lengths)| {
        lengths.sort_unstable();
        (token, lengths[lengths.len() / 2])
    });
    medians.collect()
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
