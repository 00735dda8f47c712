//! Causes named from exact leaves.
//!
//! In this order: waiting for a late rank and what each rank lost by itself, by cost; else what nothing explains; else
//! what the kernels themselves leave; else the small losses that stand out of steady steps; else `none`. A rank's own loss counts only beyond what it waits for others anyway:
//! without it the rank would wait longer, and the job would gain nothing.

mod compute;
mod steady;
mod waiting;

use std::collections::BTreeMap;

use super::Work;
use super::analyse::{Labelled, place};
use super::blame::Moved;
use super::collectives::Joined;
use crate::budget::arith::mul_div;
use crate::cause::{Cause, Confidence, Place};
use crate::facts::PPM;
use crate::job::{Blame, Evidence, Recovers, RuledOut, Verdict};
use crate::leaf::{Class, Leaf};
use steady::Bar;

/// A further cause costs at least this share of the first, percent.
const BESIDE_PERCENT: u64 = 35;
/// One rank is the place when it has at least this share of a cost, percent.
const ONE_RANK_PERCENT: u64 = 60;
/// Communication or idle time without an explanation at this share is a finding of its own, parts per million.
const UNEXPLAINED_PPM: u64 = 120_000;
/// What a fix returns at least of the cost, when nothing else binds next: percent.
const RETURNS_PERCENT: u64 = 85;

pub(super) struct Case<'a> {
    pub(super) gpus: &'a [Labelled],
    pub(super) joined: &'a Joined,
    pub(super) moved: &'a Moved,
    pub(super) blame: &'a [Blame],
    /// Ranks of the job, known or not.
    pub(super) ranks: u32,
    /// The model's arithmetic at the peak over all GPUs, ns; `None` when it is not known.
    pub(super) ideal_ns: Option<u64>,
}

#[derive(Default)]
struct Cost {
    /// By GPU, beyond what it waits for others anyway.
    own: Vec<u64>,
    /// What its waiting for others hides.
    hidden: u64,
    leaves: BTreeMap<Leaf, u64>,
}

impl Cost {
    fn total(&self) -> u64 {
        self.own.iter().fold(0, |sum: u64, ns| sum.saturating_add(*ns))
    }
}

/// What a leaf of a rank's own budget is a loss to; `None` for what is work, or waiting that is another's.
const fn own(gpu: &Labelled, leaf: Leaf) -> Option<Cause> {
    Some(match leaf {
        Leaf::MemoryPcie if gpu.slow_link => Cause::DevicePcie,
        Leaf::IdleDataCpu => Cause::DataLoader,
        Leaf::IdleDataStorage => Cause::DataStorage,
        Leaf::IdleCkpt => Cause::JobCheckpoint,
        Leaf::IdleGc => Cause::HostGc,
        Leaf::IdleCpuSched => Cause::HostCpu,
        Leaf::IdleCpuSync => Cause::HostSync,
        Leaf::IdleAlloc => Cause::HostAlloc,
        Leaf::IdleCompile => Cause::HostCompile,
        Leaf::IdleLaunch => Cause::HostLaunch,
        Leaf::MemoryCopy | Leaf::MemoryPcie => Cause::DataCopy,
        _ => return None,
    })
}

/// The cause of others waiting for a rank that was in this leaf.
pub(super) const fn late(gpu: &Labelled, leaf: Leaf) -> Cause {
    match own(gpu, leaf) {
        Some(cause) => cause,
        None => match leaf.class() {
            Class::Compute => Cause::JobImbalance,
            Class::Comm | Class::Memory | Class::Idle => Cause::Unknown,
        },
    }
}

pub(super) fn judge(case: &Case<'_>) -> Vec<Verdict> {
    let total_ns = sum(case, |gpu| gpu.total.window_ns());
    let (mut verdicts, mut dropped) = losses(case, total_ns, Bar::Usual);
    if verdicts.is_empty() {
        verdicts.extend(unexplained(case, total_ns).or_else(|| compute::kernels(case, total_ns)));
    }
    // Small losses are named only where nothing larger is.
    if let Some(bar) = Bar::of_steps(case.gpus).filter(|_| verdicts.is_empty()) {
        (verdicts, dropped) = losses(case, total_ns, bar);
    }
    if verdicts.is_empty() {
        verdicts.push(nothing(case, total_ns));
    }
    let network = waiting::network(case, total_ns);
    let mfu = |total_ns: u64| case.ideal_ns.map(|ideal| mul_div(ideal, 10_000, total_ns));
    for verdict in &mut verdicts {
        verdict.ruled_out = network.iter().chain(&dropped).cloned().collect();
        let after = mfu(total_ns.saturating_sub(verdict.cost_ns));
        verdict.recovers.mfu_centipoints = after
            .zip(mfu(total_ns))
            .filter(|_| verdict.cost_ns > 0)
            .map(|(then, now)| u32::try_from(then.saturating_sub(now)).unwrap_or(u32::MAX));
    }
    verdicts
}

/// What ranks lost by themselves and waited for each other, by cost; and what was too small for that.
fn losses(case: &Case<'_>, total_ns: u64, bar: Bar) -> (Vec<Verdict>, Vec<RuledOut>) {
    let mut costs: Vec<(Cause, Cost)> = costs(case)
        .into_iter()
        .filter(|(_, cost)| cost.total() > 0)
        .collect();
    costs.sort_by(|(a_cause, a), (b_cause, b)| b.total().cmp(&a.total()).then(a_cause.cmp(b_cause)));
    let mut verdicts: Vec<Verdict> = Vec::new();
    let mut dropped = Vec::new();
    for (cause, cost) in costs {
        let first = verdicts.first().map_or(0, |first| first.cost_ns);
        let share = mul_div(cost.total(), PPM, total_ns);
        let least_ppm = bar.least_ppm(case.gpus, cause);
        if share < least_ppm
            || u128::from(cost.total()) * 100 < u128::from(first) * u128::from(BESIDE_PERCENT)
        {
            dropped.push(RuledOut {
                cause,
                why: format!("costs {} of GPU time", percent(share)),
            });
            continue;
        }
        verdicts.push(verdict(case, cause, &cost, total_ns, least_ppm));
    }
    verdicts.extend(waiting::late_rank(case, total_ns, bar));
    verdicts.sort_by_key(|verdict| (core::cmp::Reverse(verdict.cost_ns), verdict.cause));
    (verdicts, dropped)
}

fn costs(case: &Case<'_>) -> BTreeMap<Cause, Cost> {
    let mut costs: BTreeMap<Cause, Cost> = BTreeMap::new();
    for (at, gpu) in case.gpus.iter().enumerate() {
        let lost = Leaf::ALL.iter().filter(|leaf| own(gpu, **leaf).is_some());
        let lost_ns: u64 = lost.map(|leaf| gpu.ns(*leaf)).sum();
        let hidden_ns = lost_ns.min(gpu.ns(Leaf::CommSkew));
        for leaf in Leaf::ALL {
            let Some(cause) = own(gpu, *leaf) else { continue };
            let hidden = mul_div(gpu.ns(*leaf), hidden_ns, lost_ns);
            let cost = costs.entry(cause).or_default();
            cost.own.resize(case.gpus.len(), 0);
            cost.own[at] = cost.own[at].saturating_add(gpu.ns(*leaf) - hidden);
            cost.hidden = cost.hidden.saturating_add(hidden);
            *cost.leaves.entry(*leaf).or_default() += gpu.ns(*leaf);
        }
    }
    costs
}

fn price(verdict: &mut Verdict, cost_ns: u64, total_ns: u64) {
    verdict.cost_ns = cost_ns;
    verdict.share_ppm = u32::try_from(mul_div(cost_ns, PPM, total_ns)).unwrap_or(u32::MAX);
    verdict.recovers = Recovers {
        gpu_ns: cost_ns,
        low_gpu_ns: mul_div(cost_ns, RETURNS_PERCENT, 100),
        high_gpu_ns: cost_ns,
        mfu_centipoints: None,
    };
}

fn verdict(case: &Case<'_>, cause: Cause, cost: &Cost, total_ns: u64, least_ppm: u64) -> Verdict {
    let cost_ns = cost.total();
    let worst = cost.own.iter().enumerate().max_by_key(|(_, ns)| **ns);
    let one = worst.filter(|(_, ns)| {
        case.gpus.len() > 1 && u128::from(**ns) * 100 >= u128::from(cost_ns) * u128::from(ONE_RANK_PERCENT)
    });
    let mut verdict = plain(cause, confirm(cause));
    verdict.place = one.map_or_else(Place::default, |(at, _)| place(&case.gpus[at].subject));
    verdict.confidence = Confidence::High;
    let leaves = cost.leaves.iter().filter(|(_, ns)| **ns > 0);
    verdict.evidence = leaves
        .map(|(leaf, ns)| Evidence {
            what: format!("{} of all GPU time", leaf.name()),
            value: format!("{} ({})", percent(mul_div(*ns, PPM, total_ns)), millis(*ns)),
            expected: format!("below {}", percent(least_ppm)),
        })
        .collect();
    if cost.hidden > 0 {
        verdict.evidence.push(Evidence {
            what: "of it hidden behind waiting for late ranks".into(),
            value: format!(
                "{} ({})",
                percent(mul_div(cost.hidden, PPM, total_ns)),
                millis(cost.hidden)
            ),
            expected: "not counted: without it those ranks would wait longer".into(),
        });
    }
    if cause == Cause::DataCopy {
        verdict.evidence.extend(pageable(case));
    }
    price(&mut verdict, cost_ns, total_ns);
    verdict
}

/// Copies from memory that the host had not pinned: they cannot run under compute.
fn pageable(case: &Case<'_>) -> Option<Evidence> {
    let copies = || {
        let records = case.gpus.iter().flat_map(|gpu| &gpu.records);
        records.filter(|record| matches!(record.work, Work::ToDevice | Work::ToHost))
    };
    let time = |pageable: bool| -> u64 {
        let of_kind = copies().filter(|record| record.pageable || !pageable);
        of_kind.map(|record| record.window.len_ns()).sum()
    };
    (time(true) > 0).then(|| Evidence {
        what: "time of copies from or to pageable memory".into(),
        value: format!("{} of {}", millis(time(true)), millis(time(false))),
        expected: "none: pinned memory is copied without blocking".into(),
    })
}

fn unexplained(case: &Case<'_>, total_ns: u64) -> Option<Verdict> {
    let comm = sum(case, |gpu| gpu.ns(Leaf::CommProto));
    let idle = sum(case, |gpu| gpu.ns(Leaf::IdleUnknown) + gpu.ns(Leaf::IdleDep));
    let (cost_ns, comm) = if comm >= idle { (comm, true) } else { (idle, false) };
    let share = mul_div(cost_ns, PPM, total_ns);
    if share < UNEXPLAINED_PPM {
        return None;
    }
    let given = case.gpus.len();
    let (what, confirm) = match (comm, case.joined.whole.iter().all(|whole| *whole)) {
        (true, false) => (
            format!("exposed communication, seen from {given} of {} ranks", case.ranks),
            "explain the traces of all ranks in one call: waiting for the last rank is then told from transfer",
        ),
        (true, true) => (
            "exposed communication after the last rank had arrived".to_owned(),
            "compare the collectives' bus bandwidth with a collective benchmark on the same nodes",
        ),
        (false, _) => (
            "idle time in which the trace shows no host activity, or work queued behind another stream"
                .to_owned(),
            "trace again with_stack=True, so that the host's functions are in the trace",
        ),
    };
    let mut verdict = plain(Cause::Unknown, confirm);
    verdict.cost_ns = cost_ns;
    verdict.share_ppm = u32::try_from(share).unwrap_or(u32::MAX);
    verdict.confidence = Confidence::Low;
    verdict.recovers.gpu_ns = cost_ns;
    verdict.recovers.high_gpu_ns = cost_ns;
    verdict.evidence.push(Evidence {
        what,
        value: format!("{} ({})", percent(share), millis(cost_ns)),
        expected: "below 12 %".into(),
    });
    Some(verdict)
}

fn nothing(case: &Case<'_>, total_ns: u64) -> Verdict {
    let mut verdict = plain(
        Cause::None,
        "nothing to confirm: no loss stands out in these traces",
    );
    let mut leaves: Vec<(u64, Leaf)> = Leaf::ALL
        .iter()
        .map(|leaf| (sum(case, |gpu| gpu.ns(*leaf)), *leaf))
        .collect();
    leaves.sort_by_key(|(ns, leaf)| (core::cmp::Reverse(*ns), *leaf));
    let largest = leaves.into_iter().take(3).filter(|(ns, _)| *ns > 0);
    verdict.evidence = largest
        .map(|(ns, leaf)| Evidence {
            what: format!("{} of all GPU time", leaf.name()),
            value: percent(mul_div(ns, PPM, total_ns)),
            expected: "no cause stands out".into(),
        })
        .chain(compute::plain_units(case))
        .collect();
    verdict
}

fn plain(cause: Cause, confirm: &str) -> Verdict {
    Verdict {
        cause,
        place: Place::default(),
        cost_ns: 0,
        share_ppm: 0,
        confidence: Confidence::Medium,
        evidence: Vec::new(),
        ruled_out: Vec::new(),
        confirm: confirm.to_owned(),
        recovers: Recovers::default(),
        onset_ns: None,
    }
}

const fn confirm(cause: Cause) -> &'static str {
    match cause {
        Cause::DataLoader => {
            "feed the same batch from memory for ten steps: the idle time must go; then raise num_workers"
        }
        Cause::HostLaunch => "capture the step as a graph, or compile it: idle time between kernels must go",
        Cause::HostSync => {
            "remove .item(), .cpu() and synchronize() calls from the step: the GPU must no longer drain"
        }
        Cause::DataCopy => {
            "pin the batch's memory and copy with non_blocking=True: the copies must go under compute"
        }
        Cause::JobImbalance => {
            "compare the late rank's batch and kernels with another's: its compute must be longer"
        }
        Cause::DevicePcie => {
            "run nvidia-smi -q -d PCIE on the rank's node under load: link width or generation must be below the maximum"
        }
        Cause::HostGc => "call gc.disable() for ten steps: the pauses must go",
        Cause::HostAlloc => {
            "set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True: allocation calls must leave the step"
        }
        Cause::HostCompile => "trace later steps: compilation must have ended",
        Cause::JobCheckpoint => "trace steps without a checkpoint, or write it asynchronously",
        _ => "trace again with_stack=True and look at the idle time",
    }
}

fn sum(case: &Case<'_>, of: impl Fn(&Labelled) -> u64) -> u64 {
    case.gpus
        .iter()
        .fold(0, |sum: u64, gpu| sum.saturating_add(of(gpu)))
}

fn percent(ppm: u64) -> String {
    let tenths = (ppm + 500) / 1000;
    format!("{}.{} %", tenths / 10, tenths % 10)
}

fn millis(ns: u64) -> String {
    format!("{}.{:03} ms", ns / 1_000_000, ns / 1000 % 1000)
}
