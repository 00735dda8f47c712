//! What host threads did, looked up by time.

use std::collections::BTreeMap;

use super::{Doing, HostRange};
use crate::leaf::Leaf;
use crate::sweep::{self, Segment};
use crate::time::Window;

/// A pause of the training loop between two operators up to this long is the interpreter at work, ns.
const INTERPRETER_NS: u64 = 1_000_000;

const LAYERS: [Doing; 7] = [
    Doing::Checkpoint,
    Doing::Gc,
    Doing::Compile,
    Doing::Alloc,
    Doing::Sync,
    Doing::Data,
    Doing::Issue,
];

/// The threads of a process over the time of a trace.
#[derive(Debug, Clone, Default)]
pub struct Host {
    threads: BTreeMap<u32, Thread>,
    main: Option<u32>,
}

#[derive(Debug, Clone, Default)]
struct Thread {
    /// Disjoint and in order, holes included.
    segments: Vec<Segment>,
    /// Synchronisations, by start.
    syncs: Vec<Window>,
}

impl Host {
    /// The threads from their ranges, given in any order. `main` is the thread of the training loop.
    #[must_use]
    pub fn new(ranges: &[HostRange], main: Option<u32>) -> Self {
        let mut by_thread: BTreeMap<u32, Vec<HostRange>> = BTreeMap::new();
        for range in ranges {
            by_thread.entry(range.thread).or_default().push(*range);
        }
        let threads = by_thread
            .into_iter()
            .map(|(thread, ranges)| (thread, Thread::new(&ranges)));
        Self {
            threads: threads.collect(),
            main,
        }
    }

    /// When the thread, or the training loop, was first seen.
    pub(super) fn first_seen(&self, thread: u32) -> Option<u64> {
        let own = self.threads.get(&thread);
        let main = self.main.and_then(|main| self.threads.get(&main));
        let starts = [own, main]
            .into_iter()
            .flatten()
            .filter_map(|thread| thread.segments.first());
        starts.map(|segment| segment.window.start_ns()).min()
    }

    /// Leaves of the time in which `thread` had not yet launched what the GPU ran next; disjoint, covering
    /// `window`. Where the thread shows nothing, the training loop speaks for it.
    pub(super) fn explain(&self, window: Window, thread: u32, mut give: impl FnMut(Window, Leaf)) {
        let own = self.threads.get(&thread);
        let main = self
            .main
            .filter(|main| *main != thread)
            .and_then(|main| self.threads.get(&main));
        let drained = [own, main]
            .into_iter()
            .flatten()
            .filter_map(|thread| thread.drained(window))
            .max();
        let mut intervals = Vec::new();
        for (base, thread) in [(0, own), (LAYERS.len(), main)] {
            for segment in thread.into_iter().flat_map(|thread| thread.within(window)) {
                if let Some(layer) = segment.first() {
                    intervals.push((base + layer, segment.window));
                }
            }
        }
        for segment in sweep::sweep(window, intervals) {
            let doing = segment.first().map(|layer| LAYERS[layer % LAYERS.len()]);
            match doing {
                Some(Doing::Issue) => late(segment.window, drained, Leaf::IdleLaunch, &mut give),
                None if segment.window.len_ns() <= INTERPRETER_NS => {
                    late(segment.window, drained, Leaf::IdleLaunch, &mut give);
                }
                None => give(segment.window, Leaf::IdleUnknown),
                Some(doing) => give(segment.window, leaf(doing)),
            }
        }
    }
}

const fn leaf(doing: Doing) -> Leaf {
    match doing {
        Doing::Checkpoint => Leaf::IdleCkpt,
        Doing::Gc => Leaf::IdleGc,
        Doing::Compile => Leaf::IdleCompile,
        Doing::Alloc => Leaf::IdleAlloc,
        Doing::Sync => Leaf::IdleCpuSync,
        Doing::Data => Leaf::IdleDataCpu,
        Doing::Issue => Leaf::IdleLaunch,
    }
}

/// Issuing work after a synchronisation that drained the GPU is the price of that synchronisation.
fn late(window: Window, drained: Option<u64>, otherwise: Leaf, give: &mut impl FnMut(Window, Leaf)) {
    let cut = drained.map_or(window.end_ns(), |at| at.clamp(window.start_ns(), window.end_ns()));
    for (from, to, leaf) in [
        (window.start_ns(), cut, otherwise),
        (cut, window.end_ns(), Leaf::IdleCpuSync),
    ] {
        if let Some(part) = Window::new(from, to).filter(|part| !part.is_empty()) {
            give(part, leaf);
        }
    }
}

impl Thread {
    fn new(ranges: &[HostRange]) -> Self {
        let start = ranges
            .iter()
            .map(|range| range.window.start_ns())
            .min()
            .unwrap_or(0);
        let end = ranges
            .iter()
            .map(|range| range.window.end_ns())
            .max()
            .unwrap_or(0);
        let layered = ranges.iter().map(|range| (range.doing as usize, range.window));
        let mut syncs: Vec<Window> = ranges
            .iter()
            .filter(|range| range.doing == Doing::Sync)
            .map(|range| range.window)
            .collect();
        syncs.sort_unstable();
        Self {
            segments: Window::new(start, end).map_or_else(Vec::new, |all| sweep::sweep(all, layered)),
            syncs,
        }
    }

    fn within(&self, window: Window) -> impl Iterator<Item = &Segment> {
        let from = self
            .segments
            .partition_point(|segment| segment.window.end_ns() <= window.start_ns());
        self.segments[from..]
            .iter()
            .take_while(move |segment| segment.window.start_ns() < window.end_ns())
    }

    /// When a synchronisation returned that was called before the gap began and returned inside it.
    fn drained(&self, gap: Window) -> Option<u64> {
        let before = self
            .syncs
            .partition_point(|sync| sync.start_ns() <= gap.start_ns());
        let ends = self.syncs[before.saturating_sub(4)..before].iter();
        ends.map(|sync| sync.end_ns())
            .filter(|end| (gap.start_ns()..=gap.end_ns()).contains(end))
            .max()
    }
}
