//! Splitting idle time by what the launching thread did meanwhile.
//!
//! Two kinds of idle time: *drained* gaps, in which the GPU certainly had no work and whose host states are read
//! off exactly; and idle time inside the busy span, which only the device's averages tell the length of and which
//! is shared out over what the host did while it should have issued work.

use super::arith::{apportion, mul_div};
use crate::facts::{HostState, StepEvidence, WorkerLoad};
use crate::leaf::Leaf;
use crate::sweep::{Segment, sweep};
use crate::time::Window;

/// Layer of the drained gaps; the host's states use their own number.
const DRAINED: usize = 16;

/// Loaders that use less than this share of one thread do nothing worth waiting for, parts per million.
const LOADER_AT_WORK_PPM: u64 = 50_000;

/// Nanoseconds by leaf.
pub(super) type ByLeaf = [u64; Leaf::COUNT];

/// What the launching thread did in one window.
#[derive(Debug, Clone, Default)]
pub(super) struct HostTime {
    /// Drained time by idle leaf; sums to `drained_ns`.
    pub(super) drained: ByLeaf,
    /// Length of all drained gaps, ns.
    pub(super) drained_ns: u64,
    /// Outside the gaps, time in which work should have been issued, by the leaf it would be charged to.
    pub(super) issuing: ByLeaf,
    /// On CPU, ns.
    pub(super) on_cpu_ns: u64,
    /// Wanting a CPU, ns.
    pub(super) runnable_ns: u64,
    /// In a synchronisation, ns.
    pub(super) sync_ns: u64,
}

/// Sweeps the host's states over the window.
pub(super) fn host_time(evidence: &StepEvidence) -> HostTime {
    let within = evidence.window;
    let layers = evidence
        .host
        .iter()
        .map(|interval| (interval.state as usize, interval.window))
        .chain(evidence.drained.iter().map(|gap| (DRAINED, *gap)));
    let segments = sweep(within, layers);
    let main_gap = longest_gap(evidence);
    let mut host = HostTime::default();
    for segment in &segments {
        let ns = segment.window.len_ns();
        host.on_cpu_ns += if is(segment, HostState::OnCpu) { ns } else { 0 };
        host.runnable_ns += if is(segment, HostState::Runnable) { ns } else { 0 };
        host.sync_ns += if is(segment, HostState::Sync) { ns } else { 0 };
        let drained = segment.active & (1 << DRAINED) != 0;
        if drained {
            host.drained_ns += ns;
            let after_sync = main_gap.is_some_and(|gap| gap.intersect(segment.window).is_none());
            charge(&mut host.drained, segment, &evidence.workers, after_sync);
        } else if !blocked_on_gpu(segment) {
            charge(&mut host.issuing, segment, &evidence.workers, false);
        }
    }
    move_throttled(
        &mut host.drained,
        evidence.quota_throttled_ns.value().copied().unwrap_or(0),
    );
    host
}

/// Shares out `extra_ns` of idle time inside the busy span: over the host's issuing time in proportion, at most to
/// its length; what is left was idle while the host waited for the GPU, for reasons it cannot know.
pub(super) fn inside_busy_span(host: &HostTime, extra_ns: u64) -> ByLeaf {
    let issuing: u64 = host.issuing.iter().sum();
    let parts = apportion(extra_ns.min(issuing), &host.issuing);
    let mut leaves = [0; Leaf::COUNT];
    for (leaf, part) in leaves.iter_mut().zip(parts) {
        *leaf = part;
    }
    leaves[Leaf::IdleUnknown.index()] += extra_ns.saturating_sub(issuing);
    leaves
}

fn is(segment: &Segment, state: HostState) -> bool {
    segment.active & (1 << state as usize) != 0
}

/// Whether the host waited for work the GPU already had. A host that is back from waiting and has no CPU yet does not.
fn blocked_on_gpu(segment: &Segment) -> bool {
    segment.first() == Some(HostState::Sync as usize) && !is(segment, HostState::Runnable)
}

/// The gap every step has, between the drain that ends one step and the first work of the next. A step with
/// further gaps was drained in its middle too.
fn longest_gap(evidence: &StepEvidence) -> Option<Window> {
    evidence
        .drained
        .iter()
        .filter_map(|gap| gap.intersect(evidence.window))
        .max_by_key(|gap| (gap.len_ns(), core::cmp::Reverse(gap.start_ns())))
}

fn charge(to: &mut ByLeaf, segment: &Segment, workers: &[WorkerLoad], after_sync: bool) {
    let ns = segment.window.len_ns();
    let on_cpu = is(segment, HostState::OnCpu);
    let leaf = match segment.first() {
        Some(layer) if layer == HostState::Checkpoint as usize => Leaf::IdleCkpt,
        Some(layer) if layer == HostState::Gc as usize => Leaf::IdleGc,
        Some(layer) if layer == HostState::Compile as usize => Leaf::IdleCompile,
        Some(layer) if layer == HostState::Alloc as usize => Leaf::IdleAlloc,
        Some(layer) if layer == HostState::Sync as usize && is(segment, HostState::Runnable) => {
            Leaf::IdleCpuSched
        }
        Some(layer) if layer == HostState::Sync as usize => Leaf::IdleCpuSync,
        Some(layer) if layer == HostState::CommCall as usize => {
            match (on_cpu, is(segment, HostState::Runnable)) {
                (true, _) => Leaf::IdleLaunch,
                (false, true) => Leaf::IdleCpuSched,
                (false, false) => Leaf::IdleUnknown,
            }
        }
        // A read that never left the CPU came from the page cache: storage was not waited for.
        Some(layer) if layer == HostState::FileRead as usize && on_cpu => Leaf::IdleDataCpu,
        Some(layer) if layer == HostState::FileRead as usize => Leaf::IdleDataStorage,
        Some(layer) if layer == HostState::Waiting as usize => {
            charge_waiting(to, segment.window, workers);
            return;
        }
        Some(layer) if layer == HostState::Runnable as usize => Leaf::IdleCpuSched,
        Some(layer) if layer == HostState::OnCpu as usize && after_sync => Leaf::IdleCpuSync,
        Some(layer) if layer == HostState::OnCpu as usize => Leaf::IdleLaunch,
        _ => Leaf::IdleUnknown,
    };
    to[leaf.index()] += ns;
}

/// A sleep outside any traced call waits for a batch when loaders work meanwhile, split by what they did.
fn charge_waiting(to: &mut ByLeaf, waiting: Window, workers: &[WorkerLoad]) {
    let mut explained = 0;
    for load in workers {
        let Some(shared) = load.window.intersect(waiting) else {
            continue;
        };
        let active = load.cpu_ns.saturating_add(load.io_ns);
        if mul_div(active, 1_000_000, load.window.len_ns()) < LOADER_AT_WORK_PPM {
            continue;
        }
        // Consecutive windows do not overlap; if they do, no nanosecond is charged twice.
        let ns = shared.len_ns().min(waiting.len_ns() - explained);
        let storage = mul_div(ns, load.io_ns, active);
        to[Leaf::IdleDataStorage.index()] += storage;
        to[Leaf::IdleDataCpu.index()] += ns - storage;
        explained += ns;
    }
    to[Leaf::IdleUnknown.index()] += waiting.len_ns() - explained;
}

/// Throttled by its quota, the whole process group stands still: what looks like a slow loader or a hole in the
/// record is a missing CPU, up to the throttled time that run-queue delay does not show already.
fn move_throttled(drained: &mut ByLeaf, throttled_ns: u64) {
    let mut left = throttled_ns.saturating_sub(drained[Leaf::IdleCpuSched.index()]);
    for leaf in [Leaf::IdleDataCpu, Leaf::IdleUnknown] {
        let moved = drained[leaf.index()].min(left);
        drained[leaf.index()] -= moved;
        drained[Leaf::IdleCpuSched.index()] += moved;
        left -= moved;
    }
}
