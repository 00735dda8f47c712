//! From what was seen of one GPU in one window to its budget.

use super::Budget;
use crate::facts::{DeviceProfile, GpuStep, StepEvidence, StepSignals};
use crate::leaf::Leaf;

/// The budget of one window, with the scalars the job-wide analysis needs beside it.
#[must_use]
pub fn assess(evidence: &StepEvidence, profile: &DeviceProfile) -> GpuStep {
    let _ = profile;
    let window_ns = evidence.window.len_ns();
    let drained_ns: u64 = evidence
        .drained
        .iter()
        .filter_map(|gap| gap.intersect(evidence.window))
        .map(|gap| gap.len_ns())
        .sum();
    let mut leaves = [0_i64; Leaf::COUNT];
    let idle_ns = drained_ns.min(window_ns);
    leaves[Leaf::IdleUnknown.index()] = i64::try_from(idle_ns).unwrap_or(i64::MAX);
    leaves[Leaf::ComputeKernel.index()] = i64::try_from(window_ns - idle_ns).unwrap_or(i64::MAX);
    let budget = Budget::from_leaves(window_ns, leaves, 0, Vec::new())
        .unwrap_or_else(|_| Budget::unobserved(window_ns));
    GpuStep {
        index: evidence.index,
        window: evidence.window,
        realtime_offset_ns: evidence.realtime_offset_ns,
        method: evidence.method,
        period_calls: u32::try_from(evidence.collectives.len()).unwrap_or(u32::MAX),
        budget,
        signals: StepSignals::default(),
    }
}
