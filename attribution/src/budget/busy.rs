//! Splitting the time the GPU was not idle: compute against exposed communication, and compute by reason.

use super::arith::{mul_div, ppm_of, signed};
use crate::facts::{Activity, ClockFacts, DeviceProfile, PPM, StepEvidence};
use crate::leaf::Leaf;

/// Share of SMs that pure compute holds, when no window of the job has shown it.
const COMPUTE_SM_PPM: u64 = 950_000;
/// The highest share seen belongs to the widest kernels, often with a collective beside them; the mean over compute
/// is a little lower.
const COMPUTE_OF_HIGHEST_PPM: u64 = 970_000;
/// Least the mean can be of the highest.
const COMPUTE_LEAST_PPM: u64 = 900_000;
/// SMs a collective's kernel holds: NCCL's channels, usually 16 or 24 on Hopper, between 8 and 32.
const COMM_SMS: [u64; 3] = [8, 20, 32];
/// SMs assumed where the device is unknown.
const SM_COUNT: u64 = 132;
/// A foreign process below this share of SM time does not disturb the split, parts per million.
const FOREIGN_PPM: u64 = 20_000;
/// Best tensor activity a GEMM reaches where no measured rate is known: H100's 794.5 of 989.
const REACHABLE_PPM: u64 = 803_000;

/// Point estimate with bounds, ns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Estimate {
    pub(super) low: u64,
    pub(super) point: u64,
    pub(super) high: u64,
}

impl Estimate {
    fn ordered(low: u64, point: u64, high: u64) -> Self {
        Self {
            low: low.min(point),
            point,
            high: high.max(point),
        }
    }
}

/// Exposed communication of `busy_ns` in which the GPU had work of this process.
///
/// A collective's kernel holds a few SMs while compute holds nearly all: the mean SM share of the busy time lies
/// between the two in proportion. `None` when it cannot be told; without collectives there is none.
pub(super) fn exposed_comm(
    evidence: &StepEvidence,
    profile: &DeviceProfile,
    busy_ns: u64,
    drained_ns: u64,
) -> Option<Estimate> {
    if evidence.collectives.is_empty() {
        return Some(Estimate::default());
    }
    let activity = evidence.activity.value()?;
    let foreign_ppm = foreign_share(evidence);
    let mean = sm_share_while_busy(activity, foreign_ppm, evidence.window.len_ns(), drained_ns)?;
    let highest = if activity.compute_sm_ppm == 0 {
        COMPUTE_SM_PPM
    } else {
        u64::from(activity.compute_sm_ppm).min(PPM)
    };
    let sms = profile.sm_count.map_or(SM_COUNT, u64::from).max(1);
    let comm_share = |compute: u64, comm_sms: u64| {
        // Another process takes its share of what compute would hold, and comes on top of a collective's few SMs.
        let compute = ppm_of(compute, PPM - foreign_ppm) + foreign_ppm;
        let comm = (comm_sms * PPM / sms + foreign_ppm).min(compute);
        mul_div(
            busy_ns,
            compute.saturating_sub(mean.max(comm)),
            compute.saturating_sub(comm),
        )
    };
    let [few, usual, many] = COMM_SMS;
    Some(Estimate::ordered(
        comm_share(ppm_of(highest, COMPUTE_LEAST_PPM), few),
        comm_share(ppm_of(highest, COMPUTE_OF_HIGHEST_PPM), usual),
        comm_share(highest, many),
    ))
}

/// Other processes' share of SM time where it matters, parts per million.
pub(super) fn foreign_share(evidence: &StepEvidence) -> u64 {
    let foreign = evidence.foreign.value().filter(|foreign| foreign.processes > 0);
    foreign
        .map(|foreign| u64::from(foreign.sm_ppm).min(PPM))
        .filter(|ppm| *ppm >= FOREIGN_PPM)
        .unwrap_or(0)
}

/// Mean SM share while this process had work on the GPU. Another process runs on in our gaps: its share of them is
/// taken out.
fn sm_share_while_busy(
    activity: &Activity,
    foreign_ppm: u64,
    window_ns: u64,
    drained_ns: u64,
) -> Option<u64> {
    let sm = u64::from(activity.sm_ppm).min(PPM);
    if foreign_ppm > 0 {
        let own_ns = window_ns.checked_sub(drained_ns).filter(|ns| *ns > 0)?;
        let sm_ns = ppm_of(window_ns, sm).saturating_sub(ppm_of(drained_ns, foreign_ppm));
        return Some(mul_div(sm_ns, PPM, own_ns).min(PPM));
    }
    let busy = u64::from(activity.busy_ppm).min(PPM);
    (busy > 0).then(|| mul_div(sm, PPM, busy).min(PPM))
}

/// A leaf's point estimate, with its bounds where it is not exact.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LeafEstimate {
    pub(super) leaf: Leaf,
    pub(super) ns: i64,
    pub(super) bounds: Option<(i64, i64)>,
}

/// The model's arithmetic in this window at the device's peak.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ideal {
    /// From FLOPs that the job declares.
    Declared(u64),
    /// From tensor activity, which also counts recomputation.
    Active(u64),
    /// Nothing tells.
    Unknown,
}

/// The ideal time of the window. Declared FLOPs are those of a step: they say nothing about another window.
pub(super) fn ideal(evidence: &StepEvidence, profile: &DeviceProfile, is_step: bool) -> Ideal {
    let declared = profile.model_flops_per_step.filter(|_| is_step);
    if let (Some(flops), Some(peak)) = (declared, profile.peak_flops_per_s)
        && peak > 0
    {
        let ns = (u128::from(flops) * 1_000_000_000 + u128::from(peak) / 2) / u128::from(peak);
        return Ideal::Declared(u64::try_from(ns).unwrap_or(u64::MAX));
    }
    let Some(activity) = evidence.activity.value() else {
        return Ideal::Unknown;
    };
    let at_clock = ppm_of(evidence.window.len_ns(), u64::from(activity.tensor_ppm));
    let ns = match (evidence.clock.value(), profile.reference_sm_mhz) {
        (Some(clock), Some(reference)) if clock.sm_mhz > 0 => {
            mul_div(at_clock, u64::from(clock.sm_mhz), u64::from(reference))
        }
        _ => at_clock,
    };
    Ideal::Active(ns)
}

/// Splits compute: what the peak would need, what no GEMM reaches, the clock, other processes; the rest is the
/// kernels'. The leaves sum to `compute_ns`.
pub(super) fn split_compute(
    evidence: &StepEvidence,
    profile: &DeviceProfile,
    ideal: Ideal,
    compute_ns: u64,
) -> Vec<LeafEstimate> {
    let (ideal_ns, bounds) = match ideal {
        Ideal::Declared(ns) => (ns.min(compute_ns), None),
        Ideal::Active(ns) => {
            let ns = ns.min(compute_ns);
            // Below one the pipe's activity counts instructions that are not the model's; above, its practical top
            // lies at 0.93.
            (
                ns,
                Some((
                    signed(ppm_of(ns, 750_000)),
                    signed(mul_div(ns, 100, 93).min(compute_ns)),
                )),
            )
        }
        Ideal::Unknown => (0, None),
    };
    let mut leaves = Vec::new();
    let mut add = |leaf, ns, bounds: Option<(i64, i64)>| leaves.push(LeafEstimate { leaf, ns, bounds });
    if ideal != Ideal::Unknown {
        add(Leaf::Ideal, signed(ideal_ns), bounds);
    }
    let room = compute_ns - ideal_ns;
    let platform = platform_ns(profile, ideal, ideal_ns).map(|ns| ns.min(room));
    let clock = evidence
        .clock
        .value()
        .and_then(|clock| clock_effect(evidence, profile, clock, compute_ns));
    let slowed = clock
        .as_ref()
        .map_or(0, |clock| u64::try_from(clock.point).unwrap_or(0));
    let contention = evidence.foreign.value().map(|_| {
        let ns = ppm_of(compute_ns.saturating_sub(slowed), foreign_share(evidence));
        Estimate::ordered(ns / 2, ns, ns.saturating_mul(3) / 2)
    });

    // Estimates that do not fit into what the ideal leaves are scaled down together.
    let wanted = platform.unwrap_or(0) + slowed + contention.map_or(0, |estimate| estimate.point);
    let fit = |ns: u64| {
        if wanted > room {
            mul_div(ns, room, wanted)
        } else {
            ns
        }
    };
    let mut kernel = signed(room);
    if let Some(platform) = platform {
        let ns = signed(fit(platform));
        kernel -= ns;
        add(Leaf::ComputePlatform, ns, None);
    }
    if let Some(clock) = clock {
        let ns = if clock.point > 0 {
            signed(fit(clock.point.unsigned_abs()))
        } else {
            clock.point
        };
        kernel -= ns;
        add(Leaf::ComputeClock, ns, Some((clock.low, clock.high)));
    }
    if let Some(contention) = contention {
        let ns = signed(fit(contention.point));
        kernel -= ns;
        let bounds = (signed(contention.low), signed(contention.high));
        add(
            Leaf::ComputeContention,
            ns,
            (contention.high > 0).then_some(bounds),
        );
    }
    add(Leaf::ComputeKernel, kernel, None);
    leaves
}

/// `ideal * (peak / reachable - 1)`.
fn platform_ns(profile: &DeviceProfile, ideal: Ideal, ideal_ns: u64) -> Option<u64> {
    let (peak, reachable) = (profile.peak_flops_per_s?, profile.reachable_flops_per_s?);
    (ideal != Ideal::Unknown && reachable > 0 && peak > reachable)
        .then(|| mul_div(ideal_ns, peak - reachable, reachable))
}

/// Signed effect of the clock with its bounds, ns.
struct ClockEffect {
    low: i64,
    point: i64,
    high: i64,
}

/// `T * (1 - f / f_ref)` where `T` is the time of kernels that scale with the clock: at least what tensor activity
/// needs at the best rate, at most all compute.
fn clock_effect(
    evidence: &StepEvidence,
    profile: &DeviceProfile,
    clock: &ClockFacts,
    compute_ns: u64,
) -> Option<ClockEffect> {
    let reference = i128::from(profile.reference_sm_mhz.filter(|mhz| *mhz > 0)?);
    let seen = i128::from(clock.sm_mhz);
    if seen == 0 {
        return None;
    }
    let reachable_ppm = match (profile.reachable_flops_per_s, profile.peak_flops_per_s) {
        (Some(reachable), Some(peak)) if peak > 0 && reachable > 0 => mul_div(PPM, reachable, peak),
        _ => REACHABLE_PPM,
    };
    let tensor_ppm = evidence
        .activity
        .value()
        .map_or(0, |activity| u64::from(activity.tensor_ppm));
    let least = mul_div(ppm_of(evidence.window.len_ns(), tensor_ppm), PPM, reachable_ppm).min(compute_ns);
    let scaling = least + (compute_ns - least) / 8 * 7;
    // No clock gains more than the time it had: a reading beyond that is wrong and must not run away.
    let effect = |ns: u64| {
        let all = i128::from(ns);
        i64::try_from((all * (reference - seen) / reference).max(-all)).unwrap_or(0)
    };
    let (one, other) = (effect(least), effect(compute_ns));
    Some(ClockEffect {
        low: one.min(other),
        point: effect(scaling),
        high: one.max(other),
    })
}
