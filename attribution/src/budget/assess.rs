//! From what was seen of one GPU in one window to its budget.

use super::arith::{mul_div, ppm_of, signed};
use super::busy::{Estimate, Ideal, exposed_comm, foreign_share, ideal, split_compute};
use super::idle::{HostTime, host_time, inside_busy_span};
use super::{Budget, Leaves};
use crate::facts::{
    DeviceProfile, GpuStep, LinkFacts, PPM, Span, SpanKind, StepEvidence, StepMethod, StepSignals,
};
use crate::leaf::{Class, Leaf};

/// Share of the drained time by which a device average over the step may be off, because its samples straddle the
/// step's edges: one part in this.
const STRADDLE: u64 = 8;

/// The budget of one step, with the scalars the job-wide analysis needs beside it.
///
/// Drained gaps are exact. The rest of idle time, and the split of busy time into compute and exposed
/// communication, follow from the device's averages; those leaves carry intervals. Communication is not split into
/// waiting and moving: one rank alone cannot tell them apart.
#[must_use]
pub fn assess(evidence: &StepEvidence, profile: &DeviceProfile) -> GpuStep {
    let host = host_time(evidence);
    let is_step = evidence.method != StepMethod::FixedWindow;
    GpuStep {
        index: evidence.index,
        window: evidence.window,
        realtime_offset_ns: evidence.realtime_offset_ns,
        method: evidence.method,
        period_calls: u32::try_from(evidence.collectives.len()).unwrap_or(u32::MAX),
        budget: budget(evidence, profile, &host, is_step),
        signals: signals(evidence, profile, &host),
    }
}

/// The budget of a stretch outside any step. The model's FLOPs are those of a step and do not count in it.
#[must_use]
pub fn assess_span(evidence: &StepEvidence, profile: &DeviceProfile, kind: SpanKind) -> Span {
    let budget = if kind == SpanKind::Unobserved {
        Budget::unobserved(evidence.window.len_ns())
    } else {
        budget(evidence, profile, &host_time(evidence), false)
    };
    Span {
        kind,
        window: evidence.window,
        realtime_offset_ns: evidence.realtime_offset_ns,
        budget,
    }
}

/// Lengths of the four classes, ns; they sum to the window.
struct Classes {
    comm: Option<Estimate>,
    copy_ns: u64,
    /// Of them, what the host's link took longer than at its best.
    pcie_ns: u64,
    idle_ns: u64,
    compute_ns: u64,
    /// Copy time that may be exposed at most, ns.
    copy_high_ns: u64,
    /// Idle time inside the busy span, ns.
    extra_ns: u64,
    /// Most that can be, ns.
    extra_high_ns: u64,
}

fn budget(evidence: &StepEvidence, profile: &DeviceProfile, host: &HostTime, is_step: bool) -> Budget {
    let window_ns = evidence.window.len_ns();
    let untouched = evidence.launches == 0 && evidence.collectives.is_empty() && evidence.copies.count == 0;
    if untouched && evidence.drained.is_empty() && evidence.activity.value().is_none() {
        return Budget::unobserved(window_ns);
    }
    let ideal = ideal(evidence, profile, is_step);
    let classes = classes(evidence, profile, host, ideal);
    let mut leaves = Leaves::default();
    charge_idle(&mut leaves, evidence, host, &classes);
    charge_comm(&mut leaves, evidence, profile, &classes);
    if classes.copy_high_ns > 0 {
        leaves.set(
            Leaf::MemoryCopy,
            signed(classes.copy_ns - classes.pcie_ns),
            Some((0, signed(classes.copy_high_ns))),
        );
        if evidence.links.value().is_some() {
            let most = (classes.pcie_ns > 0).then_some((0, signed(classes.copy_high_ns)));
            leaves.set(Leaf::MemoryPcie, signed(classes.pcie_ns), most);
        }
    }
    for estimate in split_compute(evidence, profile, ideal, classes.compute_ns) {
        leaves.set(estimate.leaf, estimate.ns, estimate.bounds);
    }
    if evidence.activity.value().is_none() {
        // Compute holds whatever was not drained, communication included.
        leaves.unmeasure(Leaf::ComputeKernel, (0, signed(classes.compute_ns)));
    }
    leaves.into_budget(window_ns)
}

fn classes(evidence: &StepEvidence, profile: &DeviceProfile, host: &HostTime, ideal: Ideal) -> Classes {
    let window_ns = evidence.window.len_ns();
    let drained_ns = host.drained_ns;
    let foreign = foreign_share(evidence) > 0;
    // Another process keeps the device busy in our gaps: its average then says nothing about our idle time.
    let idle_seen = evidence
        .activity
        .value()
        .filter(|_| !foreign)
        .map_or(drained_ns, |activity| {
            window_ns - ppm_of(window_ns, u64::from(activity.busy_ppm).min(PPM))
        });
    let straddle = drained_ns / STRADDLE;
    let extra_high_ns = idle_seen
        .saturating_sub(drained_ns.saturating_sub(straddle))
        .min(window_ns - drained_ns);
    let mut extra_ns = idle_seen.saturating_sub(drained_ns + straddle);

    let copied = evidence
        .copies
        .to_device_bytes
        .saturating_add(evidence.copies.to_host_bytes);
    let link = profile.host_link_bytes_per_s.filter(|rate| *rate > 0);
    // A link that runs below its best takes that much longer.
    let link_ppm = evidence.links.value().map_or(PPM, LinkFacts::pcie_ppm).max(1);
    let at_best_ns = link.map_or(0, |rate| mul_div(copied, 1_000_000_000, rate));
    let copy_high_ns = mul_div(at_best_ns, PPM, link_ppm).min(window_ns - drained_ns);
    // Copy engines do not count as activity: an exposed copy is part of what looks idle.
    let copy_ns = copy_high_ns.min(extra_ns);
    let pcie_ns = copy_ns - ppm_of(copy_ns, link_ppm);
    extra_ns -= copy_ns;

    let idle_ns = drained_ns + extra_ns;
    let busy_ns = window_ns - idle_ns - copy_ns;
    let mut comm = exposed_comm(evidence, profile, busy_ns, drained_ns);
    if let (Some(comm), Ideal::Declared(least)) = (&mut comm, ideal) {
        // The arithmetic was done: it took at least its time at the peak.
        let most = busy_ns.saturating_sub(least.min(busy_ns));
        *comm = Estimate {
            low: comm.low.min(most),
            point: comm.point.min(most),
            high: comm.high.min(most),
        };
    }
    let compute_ns = busy_ns - comm.map_or(0, |comm| comm.point);
    Classes {
        comm,
        copy_ns,
        pcie_ns,
        idle_ns,
        compute_ns,
        copy_high_ns,
        extra_ns,
        extra_high_ns,
    }
}

fn charge_idle(leaves: &mut Leaves, evidence: &StepEvidence, host: &HostTime, classes: &Classes) {
    let inside = inside_busy_span(host, classes.extra_ns);
    let most = inside_busy_span(host, classes.extra_high_ns);
    let seen = |leaf: Leaf| match leaf {
        Leaf::IdleDataCpu | Leaf::IdleDataStorage => {
            !evidence.workers.is_empty() || !evidence.host.is_empty()
        }
        Leaf::IdleDep => false,
        _ => !evidence.host.is_empty(),
    };
    for leaf in Leaf::ALL.iter().filter(|leaf| leaf.class() == Class::Idle) {
        let at = leaf.index();
        let exact = host.drained[at];
        let ns = exact + inside[at];
        if ns == 0 && !seen(*leaf) {
            continue;
        }
        let bounds = (most[at] > 0 || inside[at] > 0)
            .then(|| (signed(exact), signed(exact + most[at].max(inside[at]))));
        leaves.set(*leaf, signed(ns), bounds);
    }
    debug_assert_eq!(
        host.drained.iter().sum::<u64>() + inside.iter().sum::<u64>(),
        classes.idle_ns
    );
}

fn charge_comm(leaves: &mut Leaves, evidence: &StepEvidence, profile: &DeviceProfile, classes: &Classes) {
    let Some(comm) = classes.comm else { return };
    let transfer = profile.comm_bytes_per_s.map(|rate| {
        let least = evidence
            .collectives
            .iter()
            .map(|call| transfer_ns(call.bytes, call.ranks, rate))
            .sum::<u64>();
        least.min(comm.point)
    });
    if let Some(ns) = transfer {
        leaves.set(Leaf::CommTransfer, signed(ns), Some((0, signed(ns))));
    }
    let proto = comm.point - transfer.unwrap_or(0);
    let bounds = (
        signed(comm.low.saturating_sub(transfer.unwrap_or(0))),
        signed(comm.high),
    );
    leaves.set(Leaf::CommProto, signed(proto), (comm.high > 0).then_some(bounds));
}

/// Time a ring needs to move a collective's payload over its slowest link.
fn transfer_ns(bytes: u64, ranks: u32, bytes_per_s: u64) -> u64 {
    let ranks = u64::from(ranks.max(2));
    let moved = mul_div(bytes, 2 * (ranks - 1), ranks);
    mul_div(moved, 1_000_000_000, bytes_per_s)
}

fn signals(evidence: &StepEvidence, profile: &DeviceProfile, host: &HostTime) -> StepSignals {
    let (worker_cpu_ns, worker_io_ns) = evidence.workers.iter().fold((0, 0), |(cpu, io), load| {
        let inside = load
            .window
            .intersect(evidence.window)
            .map_or(0, |shared| shared.len_ns());
        let whole = load.window.len_ns();
        (
            cpu + mul_div(load.cpu_ns, inside, whole),
            io + mul_div(load.io_ns, inside, whole),
        )
    });
    let start = evidence.window.start_ns();
    let called =
        |at: Option<&crate::facts::CollectiveFact>| at.map(|call| call.call.start_ns().saturating_sub(start));
    StepSignals {
        host_on_cpu_ns: host.on_cpu_ns,
        host_runnable_ns: host.runnable_ns,
        host_sync_ns: host.sync_ns,
        quota_throttled_ns: evidence.quota_throttled_ns.clone(),
        worker_cpu_ns,
        worker_io_ns,
        launches: evidence.launches,
        comm_bytes: evidence
            .collectives
            .iter()
            .fold(0, |sum: u64, call| sum.saturating_add(call.bytes)),
        collectives: u32::try_from(evidence.collectives.len()).unwrap_or(u32::MAX),
        first_collective_ns: called(evidence.collectives.first()),
        last_collective_ns: called(evidence.collectives.last()),
        activity: evidence.activity.clone(),
        clock: evidence.clock.clone(),
        reference_sm_mhz: profile.reference_sm_mhz,
        foreign: evidence.foreign.clone(),
        links: evidence.links.clone(),
        lost_records: evidence.lost_records,
    }
}
