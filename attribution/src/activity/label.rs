//! One leaf for every nanosecond of a GPU.

use super::host::Host;
use super::{Record, Work};
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
const SKEW: usize = 3;
const COMM: usize = 4;
const COPY: usize = 5;
const SLOW_COPY: usize = 6;
const LEAVES: [Leaf; 7] = [
    Leaf::ComputeKernel,
    Leaf::ComputeKernel,
    Leaf::ComputeNonmatmul,
    Leaf::CommSkew,
    Leaf::CommProto,
    Leaf::MemoryCopy,
    Leaf::MemoryPcie,
];

/// A stretch of a GPU's time with its leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Label {
    /// When.
    pub window: Window,
    /// Where the time went.
    pub leaf: Leaf,
}

/// The leaves of a GPU's time from its first record to its last: disjoint, in order, without holes.
///
/// `records` are sorted by start. `waits` are the stretches in which a collective had started here and not yet on
/// its last rank. Kernels of no known class count as matrix work: they stay in compute's residual.
#[must_use]
pub fn label(records: &[Record], waits: &[Window], host: &Host) -> Vec<Label> {
    let start = records.first().map_or(0, |record| record.window.start_ns());
    let end = records
        .iter()
        .map(|record| record.window.end_ns())
        .max()
        .unwrap_or(start);
    let Some(all) = Window::new(start, end) else {
        return Vec::new();
    };
    let rates = Rates::of(records);
    let work = records.iter().flat_map(|record| layers(record, &rates)).flatten();
    let waits = waits.iter().map(|wait| (SKEW, *wait));
    let mut labels = Labels::default();
    for segment in sweep::sweep(all, work.chain(waits)) {
        // A wait is a stretch of a collective's own kernel, and counts only where that ran.
        let active = if segment.active & (1 << COMM) == 0 {
            segment.active & !(1 << SKEW)
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

fn layers(record: &Record, rates: &Rates) -> [Option<(usize, Window)>; 2] {
    let whole = |layer| [Some((layer, record.window)), None];
    match record.work {
        Work::Kernel(super::KernelClass::Communication) => whole(COMM),
        Work::Kernel(class) if class.is_matmul() => whole(MATMUL),
        Work::Kernel(super::KernelClass::Unknown) => whole(UNNAMED),
        Work::Kernel(_) => whole(NONMATMUL),
        Work::OnDevice => whole(COPY),
        Work::ToDevice | Work::ToHost => {
            let (start, end) = (record.window.start_ns(), record.window.end_ns());
            let at_best = rates.least_ns(record).unwrap_or(0);
            let cut = start.saturating_add(at_best).min(end);
            [
                Window::new(start, cut).map(|part| (COPY, part)),
                Window::new(cut, end).map(|part| (SLOW_COPY, part)),
            ]
        }
    }
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
    let launched = launch.at_ns.min(gap.end_ns());
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

/// The best rates that large copies of this trace reached, as (bytes, ns), by direction.
struct Rates {
    to_device: Option<(u64, u64)>,
    to_host: Option<(u64, u64)>,
}

impl Rates {
    fn of(records: &[Record]) -> Self {
        let best = |work: Work| {
            records
                .iter()
                .filter(|record| record.work == work && !record.window.is_empty())
                .filter_map(|record| Some((record.bytes?, record.window.len_ns())))
                .filter(|(bytes, _)| *bytes >= LARGE_COPY_BYTES)
                .max_by(|(a_bytes, a_ns), (b_bytes, b_ns)| {
                    (u128::from(*a_bytes) * u128::from(*b_ns))
                        .cmp(&(u128::from(*b_bytes) * u128::from(*a_ns)))
                })
        };
        Self {
            to_device: best(Work::ToDevice),
            to_host: best(Work::ToHost),
        }
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
