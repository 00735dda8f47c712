//! One leaf for every nanosecond of a GPU.

use super::host::Host;
use super::{Launch, Record, Work};
use crate::leaf::Leaf;
use crate::sweep;
use crate::time::Window;

/// A gap before work that was queued in time is launch latency up to this long, a dependency beyond, ns.
const LAUNCH_LATENCY_NS: u64 = 30_000;
/// Copies from this size on show what the link can do, bytes.
const LARGE_COPY_BYTES: u64 = 1 << 20;

const MATMUL: usize = 0;
const UNNAMED: usize = 1;
const NONMATMUL: usize = 2;
const REPEATED: usize = 3;
const SLOWED: usize = 4;
const SKEW: usize = 5;
const TRANSFER: usize = 6;
const NET: usize = 7;
const COMM: usize = 8;
const COPY: usize = 9;
const SLOW_COPY: usize = 10;
const LEAVES: [Leaf; 11] = [
    Leaf::ComputeKernel,
    Leaf::ComputeKernel,
    Leaf::ComputeNonmatmul,
    Leaf::ComputeRecompute,
    Leaf::ComputeContention,
    Leaf::CommSkew,
    Leaf::CommTransfer,
    Leaf::CommNet,
    Leaf::CommProto,
    Leaf::MemoryCopy,
    Leaf::MemoryPcie,
];
/// Parts of a collective's own kernel, which count only where that ran.
const WITHIN_COMM: u32 = 1 << SKEW | 1 << TRANSFER | 1 << NET;

/// A stretch of a GPU's time with its leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Label {
    /// When.
    pub window: Window,
    /// Where the time went.
    pub leaf: Leaf,
}

/// What is known of records beyond themselves.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Known<'a> {
    /// When a collective had started here and not yet on its last rank.
    pub(super) waits: &'a [Window],
    /// When collectives moved bytes, and how long they should have.
    pub(super) moves: &'a [Moving],
    /// By record: forward work done again.
    pub(super) again: &'a [bool],
    /// By record: how much longer it ran than by itself, ns.
    pub(super) excess_ns: &'a [u64],
    /// What copies over the host's link should reach.
    pub(super) rates: Rates,
}

/// A collective after its last rank had arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Moving {
    /// From the arrival of the last rank to the end.
    pub(super) window: Window,
    /// What its bytes need at the reference rate, ns.
    pub(super) needs_ns: u64,
}

/// The leaves of a GPU's time from its first record to its last: disjoint, in order, without holes.
///
/// `records` are sorted by start. Kernels of no known class count as matrix work: they stay in compute's residual.
#[must_use]
pub(super) fn label(records: &[Record], known: Known<'_>, host: &Host) -> Vec<Label> {
    let start = records.first().map_or(0, |record| record.window.start_ns());
    let end = records
        .iter()
        .map(|record| record.window.end_ns())
        .max()
        .unwrap_or(start);
    let Some(all) = Window::new(start, end) else {
        return Vec::new();
    };
    let rates = known.rates;
    let work = records.iter().enumerate().flat_map(|(at, record)| {
        let again = known.again.get(at).copied().unwrap_or(false);
        let excess_ns = known.excess_ns.get(at).copied().unwrap_or(0);
        layers(record, again, excess_ns, &rates)
    });
    let waits = known.waits.iter().map(|wait| (SKEW, *wait));
    let moves = known.moves.iter().flat_map(|moving| {
        let [needed, beyond] = cut(moving.window, moving.needs_ns);
        [(TRANSFER, needed), (NET, beyond)]
    });
    let mut labels = Labels::default();
    for segment in sweep::sweep(all, work.flatten().chain(waits).chain(moves)) {
        let active = if segment.active & (1 << COMM) == 0 {
            segment.active & !WITHIN_COMM
        } else {
            segment.active
        };
        if active == 0 {
            gap(segment.window, records, host, &mut labels);
        } else {
            labels.push(segment.window, LEAVES[active.trailing_zeros() as usize]);
        }
    }
    labels.0
}

fn layers(record: &Record, again: bool, excess_ns: u64, rates: &Rates) -> [Option<(usize, Window)>; 2] {
    let whole = |layer| [Some((layer, record.window)), None];
    let compute = |layer| {
        let [usual, beyond] = cut(record.window, record.window.len_ns().saturating_sub(excess_ns));
        [Some((layer, usual)), Some((SLOWED, beyond))]
    };
    match record.work {
        Work::Kernel(super::KernelClass::Communication) => whole(COMM),
        Work::Kernel(_) if again => whole(REPEATED),
        Work::Kernel(class) if class.is_matmul() => compute(MATMUL),
        Work::Kernel(super::KernelClass::Unknown) => compute(UNNAMED),
        Work::Kernel(_) => compute(NONMATMUL),
        Work::OnDevice => whole(COPY),
        Work::ToDevice | Work::ToHost => {
            let [at_best, beyond] = cut(record.window, rates.least_ns(record).unwrap_or(0));
            [Some((COPY, at_best)), Some((SLOW_COPY, beyond))]
        }
    }
}

/// The first `first_ns` of a window and the rest.
fn cut(window: Window, first_ns: u64) -> [Window; 2] {
    let at = window.start_ns().saturating_add(first_ns).min(window.end_ns());
    [
        Window::new(window.start_ns(), at).unwrap_or(window),
        Window::new(at, window.end_ns()).unwrap_or_default(),
    ]
}

/// Leaves of the time from what is first seen of the host to the first record: nothing ran yet, and others may
/// have waited for it.
pub(super) fn before(records: &[Record], host: &Host) -> Vec<Label> {
    let mut labels = Labels::default();
    let first = records
        .first()
        .and_then(|record| Some((record.window.start_ns(), record.launch?)));
    if let Some((start, launch)) = first
        && let Some(from) = host.first_seen(launch.thread)
        && let Some(early) = Window::new(from, start)
    {
        until(early, launch, host, &mut labels);
    }
    labels.0
}

/// The idle time from the end of `p` to the start of `n`: until the launch of what runs next it is the host's.
fn gap(gap: Window, records: &[Record], host: &Host, labels: &mut Labels) {
    let at = records.partition_point(|record| record.window.start_ns() < gap.end_ns());
    let next = records[at..]
        .iter()
        .take_while(|record| record.window.start_ns() == gap.end_ns())
        .filter_map(|record| record.launch)
        .min();
    let Some(launch) = next else {
        return labels.push(gap, Leaf::IdleUnknown);
    };
    if launch.at_ns <= gap.start_ns() {
        let short = gap.len_ns() < LAUNCH_LATENCY_NS;
        return labels.push(gap, if short { Leaf::IdleLaunch } else { Leaf::IdleDep });
    }
    until(gap, launch, host, labels);
}

/// An idle stretch that ends with launched work: the host's until the launch, launch latency after it.
fn until(gap: Window, launch: Launch, host: &Host, labels: &mut Labels) {
    let launched = launch.at_ns.clamp(gap.start_ns(), gap.end_ns());
    if let Some(hosts) = Window::new(gap.start_ns(), launched) {
        host.explain(hosts, launch.thread, |window, leaf| labels.push(window, leaf));
    }
    if let Some(latency) = Window::new(launched, gap.end_ns()) {
        labels.push(latency, Leaf::IdleLaunch);
    }
}

#[derive(Default)]
struct Labels(Vec<Label>);

impl Labels {
    fn push(&mut self, window: Window, leaf: Leaf) {
        if window.is_empty() {
            return;
        }
        if let Some(last) = self.0.last_mut()
            && last.leaf == leaf
            && let Some(joined) = Window::new(last.window.start_ns(), window.end_ns())
        {
            last.window = joined;
            return;
        }
        self.0.push(Label { window, leaf });
    }
}

/// The best rates that large copies reached, as (bytes, ns), by direction.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Rates {
    to_device: Option<(u64, u64)>,
    to_host: Option<(u64, u64)>,
}

/// A link below this share of the best link's rate is slow, percent: half the lanes or a generation less is 50.
const SLOW_LINK_PERCENT: u128 = 70;

/// Whether one rate is below a share of another, percent.
const fn is_below((bytes, ns): (u64, u64), (best_bytes, best_ns): (u64, u64), percent: u128) -> bool {
    bytes as u128 * best_ns as u128 * 100 < best_bytes as u128 * ns as u128 * percent
}

impl Rates {
    /// Of some records.
    pub(super) fn of(records: &[Record]) -> Self {
        let best = |work: Work| {
            records
                .iter()
                .filter(|record| record.work == work && !record.window.is_empty())
                .filter_map(|record| Some((record.bytes?, record.window.len_ns())))
                .filter(|(bytes, _)| *bytes >= LARGE_COPY_BYTES)
                .reduce(|a, b| if is_below(a, b, 100) { b } else { a })
        };
        Self {
            to_device: best(Work::ToDevice),
            to_host: best(Work::ToHost),
        }
    }

    /// The better of both in each direction: GPUs of one kind have the same link.
    pub(super) fn or_better(self, other: Self) -> Self {
        let better = |a: Option<(u64, u64)>, b: Option<(u64, u64)>| match (a, b) {
            (Some(a), Some(b)) if is_below(a, b, 100) => Some(b),
            (None, b) => b,
            (a, _) => a,
        };
        Self {
            to_device: better(self.to_device, other.to_device),
            to_host: better(self.to_host, other.to_host),
        }
    }

    /// Whether even its best copies are far below the best ones.
    pub(super) fn is_slow_beside(self, best: Self) -> bool {
        let slow = |own: Option<(u64, u64)>, best: Option<(u64, u64)>| {
            own.zip(best)
                .is_some_and(|(own, best)| is_below(own, best, SLOW_LINK_PERCENT))
        };
        slow(self.to_device, best.to_device) || slow(self.to_host, best.to_host)
    }

    fn least_ns(&self, record: &Record) -> Option<u64> {
        let (bytes, ns) = match record.work {
            Work::ToDevice => self.to_device?,
            Work::ToHost => self.to_host?,
            Work::Kernel(_) | Work::OnDevice => return None,
        };
        Some(crate::budget::arith::mul_div(record.bytes?, ns, bytes))
    }
}
