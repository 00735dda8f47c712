//! Which limit binds a job, and when slow kernels are the loss.
//!
//! Low utilisation of the peak is not always waste: a job that reads its weights for every token is bound by the
//! device's memory, and no kernel does better. The same figure in training is a loss.

use super::words::{self, percent};
use super::{Case, finish};
use crate::budget::Budget;
use crate::budget::arith::mul_div;
use crate::cause::{Cause, Confidence, Place};
use crate::facts::{Activity, PPM};
use crate::job::{Evidence, Recovers, RuledOut, Verdict, evidence};
use crate::leaf::{Class, Leaf};

/// The best any GEMM reaches of the peak, and the most that memory activity reaches, parts per million.
const PRACTICAL_TOP_PPM: u64 = 800_000;
/// Memory this active while the device is busy is saturated, parts per million.
const SATURATED_PPM: u64 = 700_000;
/// Kernels matter when compute has this share of the time, parts per million.
const COMPUTE_PPM: u64 = 600_000;
/// Compute that reaches less than this of the peak has bad kernels, parts per million of compute time.
const LOW_PPM: u64 = 300_000;
/// Kinds of jobs that are bound by memory by nature.
const MEMORY_BOUND_KINDS: [&str; 1] = ["decode"];
/// Kinds of jobs of which it is known that arithmetic should bind them.
const ARITHMETIC_KINDS: [&str; 4] = ["pretrain", "finetune", "rl", "prefill"];

/// What limits a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Roof {
    /// The tensor cores' peak.
    Flops,
    /// The device's memory.
    Hbm,
    /// The links between devices, nodes and hosts.
    Link,
    /// The host: what it does not issue in time.
    Host,
}

impl Roof {
    const fn words(self) -> &'static str {
        match self {
            Self::Flops => "the device's arithmetic",
            Self::Hbm => "the device's memory",
            Self::Link => "the links",
            Self::Host => "the host",
        }
    }
}

/// How close the job comes to each limit, parts per million of what is practical.
pub(super) struct Limits {
    ideal_known: bool,
    /// Of compute time, the model's arithmetic at the peak.
    efficiency_ppm: u64,
    compute_ppm: u64,
    /// Memory activity while busy; `None` when not measured.
    memory_ppm: Option<u64>,
    reached: [(Roof, u64); 4],
}

impl Limits {
    pub(super) fn of(case: &Case<'_>) -> Self {
        let total = Budget::sum(case.totals);
        let class = |class| u64::try_from(total.class_ns(class)).unwrap_or(0);
        let share = |ns: u64| mul_div(ns, PPM, total.window_ns());
        let compute = class(Class::Compute);
        let ideal = case.ideal_ns.unwrap_or(0);
        let readings = case.ranks.iter().flat_map(|history| &history.steps);
        let activity = Activity::mean(readings.map(|step| (step.window.len_ns(), &step.signals.activity)));
        let activity = activity.value();
        let memory = |activity: &Activity| {
            mul_div(
                u64::from(activity.dram_ppm),
                PPM,
                u64::from(activity.busy_ppm).max(1),
            )
            .min(PPM)
        };
        let dram_ppm = activity.map_or(0, |activity| u64::from(activity.dram_ppm));
        Self {
            ideal_known: case.ideal_ns.is_some(),
            efficiency_ppm: mul_div(ideal, PPM, compute),
            compute_ppm: share(compute),
            memory_ppm: activity.map(memory),
            reached: [
                (Roof::Flops, mul_div(share(ideal), PPM, PRACTICAL_TOP_PPM)),
                (Roof::Hbm, mul_div(dram_ppm, PPM, PRACTICAL_TOP_PPM)),
                (Roof::Link, share(class(Class::Comm) + class(Class::Memory))),
                (Roof::Host, share(class(Class::Idle))),
            ],
        }
    }

    /// The limit the job comes closest to.
    pub(super) fn binding(&self) -> Roof {
        let closest = self.reached.iter().max_by_key(|(_, ppm)| *ppm);
        closest.map_or(Roof::Flops, |(roof, _)| *roof)
    }

    /// The limit in words, beside the others.
    pub(super) fn evidence(&self) -> Evidence {
        let binding = self.binding();
        let of = |roof: Roof| {
            self.reached
                .iter()
                .find(|(other, _)| *other == roof)
                .map_or(0, |(_, ppm)| *ppm)
        };
        let others = [Roof::Flops, Roof::Hbm, Roof::Link, Roof::Host]
            .into_iter()
            .filter(|roof| *roof != binding);
        let others: Vec<String> = others
            .map(|roof| format!("{} {}", roof.words(), percent(of(roof))))
            .collect();
        evidence(
            format!("the limit the job comes closest to is {}", binding.words()),
            percent(of(binding)),
            others.join(", "),
        )
    }

    fn is_memory_saturated(&self) -> bool {
        self.memory_ppm.is_some_and(|ppm| ppm >= SATURATED_PPM)
    }

    fn kernels_are_slow(&self) -> bool {
        self.ideal_known && self.compute_ppm >= COMPUTE_PPM && self.efficiency_ppm < LOW_PPM
    }
}

/// Kernels that reach little of the peak in a job that nothing else holds back.
///
/// `None` also where memory binds a job by nature, or nobody said what kind of job it is: the limit is then named
/// beside "nothing stands out".
pub(super) fn slow_kernels(case: &Case<'_>) -> Option<Verdict> {
    let limits = Limits::of(case);
    if !limits.kernels_are_slow() || MEMORY_BOUND_KINDS.contains(&case.kind) {
        return None;
    }
    let known = ARITHMETIC_KINDS.contains(&case.kind);
    let saturated = limits.is_memory_saturated();
    if saturated && !known || limits.memory_ppm.is_none() {
        return None;
    }
    let (cause, other, why) = if saturated {
        (
            Cause::KernelMemoryBound,
            Cause::KernelLowTensor,
            "memory is saturated: the tensor cores wait for it",
        )
    } else {
        (
            Cause::KernelLowTensor,
            Cause::KernelMemoryBound,
            "memory is far from saturated",
        )
    };
    let total = Budget::sum(case.totals);
    let compute = u64::try_from(total.class_ns(Class::Compute)).unwrap_or(0);
    let reachable = mul_div(case.ideal_ns.unwrap_or(0), PPM, PRACTICAL_TOP_PPM);
    let others = u64::try_from(total.leaf_ns(Leaf::ComputeClock) + total.leaf_ns(Leaf::ComputeContention))
        .unwrap_or(0);
    let cost_ns = compute.saturating_sub(reachable).saturating_sub(others);
    let place = Place::default();
    let mut verdict = Verdict {
        cause,
        confirm: words::confirm(cause, &place, None),
        place,
        cost_ns,
        share_ppm: 0,
        confidence: if known {
            Confidence::Medium
        } else {
            Confidence::Low
        },
        evidence: vec![
            evidence(
                "the model's arithmetic at the peak, of the time in kernels",
                percent(limits.efficiency_ppm),
                "above 30 %",
            ),
            evidence(
                "memory activity while the device is busy",
                percent(limits.memory_ppm.unwrap_or(0)),
                "about 80 % is all that memory gives",
            ),
        ],
        ruled_out: vec![RuledOut {
            cause: other,
            why: why.into(),
        }],
        // No job runs at the best GEMM's rate throughout: a quarter of the way is the least that a rewrite returns.
        recovers: Recovers {
            gpu_ns: cost_ns,
            low_gpu_ns: cost_ns / 4,
            high_gpu_ns: cost_ns,
            mfu_centipoints: None,
        },
        onset_ns: None,
    };
    finish(case, &mut verdict);
    Some(verdict)
}
