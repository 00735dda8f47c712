//! How large a loss must be to be named.
//!
//! Usually it is a fixed share of GPU time. In a job whose steps hardly vary a smaller one stands out too, if it is of a
//! kind that a healthy job has next to nothing of and is there in step after step: what is large now and then may be
//! large by chance.

use super::own;
use crate::activity::analyse::Labelled;
use crate::activity::blame::{Culprit, Kind};
use crate::budget::arith::{median, mul_div};
use crate::cause::Cause;
use crate::facts::PPM;
use crate::leaf::Leaf;
use crate::noise;
use crate::time::Window;

/// Least share of GPU time that makes a cost a cause, parts per million.
const LEAST_PPM: u64 = 50_000;
/// Launching is a cause from here on: every job pays some of it.
const LEAST_LAUNCH_PPM: u64 = 90_000;
/// Of what ranks lose by themselves at least this share is named, parts per million: every job copies a little.
const LEAST_OWN_PPM: u64 = 25_000;
/// Waiting for a rank whose link copies far slower than the others' is named from this share on, parts per million: the
/// link stands by itself.
const LEAST_LINK_PPM: u64 = 10_000;
/// Fewer steps do not tell how much steps vary, nor what is in each of them.
const LEAST_STEPS: usize = 8;
/// Who is late by little is late in this share of the steps, percent: of two ranks each is last in half of them by chance.
const HABIT_PERCENT: usize = 90;

/// What a loss has to reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Bar {
    /// A share of GPU time, whatever the steps are like.
    Usual,
    /// A share that follows the noise of the mean step, parts per million.
    Steps(u64),
}

impl Bar {
    /// The bar that follows the noise of the middle GPU's mean step, which is that of a single one over the root of their
    /// number; `None` where too few steps are known of most.
    pub(super) fn of_steps(gpus: &[Labelled]) -> Option<Self> {
        let lengths = |gpu: &Labelled| gpu.steps.iter().map(|step| step.len_ns()).collect::<Vec<_>>();
        let known = gpus.iter().filter(|gpu| gpu.steps.len() >= LEAST_STEPS);
        let noises: Vec<u64> = known
            .map(|gpu| noise::noise_ppm(&lengths(gpu)) / (gpu.steps.len() as u64).isqrt())
            .collect();
        (noises.len() * 2 > gpus.len()).then(|| Self::Steps(median(noises)))
    }

    /// Least share of GPU time, parts per million; of a small loss that is not in each step the usual one.
    pub(super) fn least_ppm(self, gpus: &[Labelled], cause: Cause) -> u64 {
        let usual = match cause {
            Cause::HostLaunch => LEAST_LAUNCH_PPM,
            _ => LEAST_PPM,
        };
        match self {
            Self::Steps(noise_ppm) if stands_out(cause) => {
                let least = noise::least_ppm(usual, noise_ppm).max(LEAST_OWN_PPM);
                if typical_ppm(gpus, cause) >= least {
                    least
                } else {
                    usual
                }
            }
            _ => usual,
        }
    }

    /// Least share of GPU time that all waiting for late ranks has, parts per million.
    pub(super) fn of_waiting(self) -> u64 {
        match self {
            Self::Usual => LEAST_PPM,
            Self::Steps(noise_ppm) => noise::least_ppm(LEAST_PPM, noise_ppm),
        }
    }

    /// Whether waiting for a culprit, as a share of GPU time in parts per million, is enough to name it. Little waiting is,
    /// if it was for the same ranks in nearly every step and why they were late is known. More compute is no reason for
    /// ranks of no stage: whoever comes last by little has computed a little longer, whatever else keeps it.
    pub(super) fn is_met(self, cause: Cause, culprit: &Culprit, share_ppm: u64) -> bool {
        if self == Self::Usual {
            return true;
        }
        let habit = culprit.steps.filter(|(_, all)| *all >= LEAST_STEPS);
        let often = habit.is_some_and(|(own, all)| own * 100 >= all * HABIT_PERCENT);
        match (cause, culprit.kind) {
            (_, Kind::Moving) | (Cause::Unknown, _) => false,
            (Cause::JobImbalance, kind) if kind != Kind::Stage => false,
            (Cause::DevicePcie, _) => culprit.is_persistent() && share_ppm >= LEAST_LINK_PPM,
            _ => often && share_ppm >= self.of_waiting(),
        }
    }
}

/// Whether a healthy job has next to nothing of it.
const fn stands_out(cause: Cause) -> bool {
    matches!(
        cause,
        Cause::DataLoader | Cause::DataStorage | Cause::DataCopy | Cause::DevicePcie | Cause::HostGc
    )
}

/// A cause's share of the middle step over all GPUs, parts per million.
fn typical_ppm(gpus: &[Labelled], cause: Cause) -> u64 {
    let known = || gpus.iter().filter(|gpu| gpu.steps.len() >= LEAST_STEPS);
    let count = known().map(|gpu| gpu.steps.len()).min().unwrap_or(0);
    let mut steps = vec![(0_u64, 0_u64); count];
    for gpu in known() {
        for ((lost_ns, all_ns), step) in steps.iter_mut().zip(&gpu.steps) {
            *lost_ns = lost_ns.saturating_add(lost(gpu, cause, *step));
            *all_ns = all_ns.saturating_add(step.len_ns());
        }
    }
    let shares = steps
        .into_iter()
        .map(|(lost_ns, all_ns)| mul_div(lost_ns, PPM, all_ns));
    median(shares.collect())
}

/// What a GPU lost to a cause in a window, ns.
fn lost(gpu: &Labelled, cause: Cause, window: Window) -> u64 {
    let is_cause = |leaf: Leaf| own(gpu, leaf) == Some(cause);
    let from = gpu
        .labels
        .partition_point(|label| label.window.end_ns() <= window.start_ns());
    gpu.labels[from..]
        .iter()
        .take_while(|label| label.window.start_ns() < window.end_ns())
        .filter(|label| is_cause(label.leaf))
        .filter_map(|label| label.window.intersect(window))
        .map(Window::len_ns)
        .sum()
}
