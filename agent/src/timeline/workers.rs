//! The load of the data loaders: helper processes and reading threads.
//!
//! Their time is folded into bins of [`BIN_NS`] as soon as it is known. Between two scheduler records of a thread it
//! was on CPU; a sleeping worker counts neither as computing nor as waiting for storage. What a thread does after its
//! last record is not known until the next one, nor what it did while scheduler records were lost.

use std::collections::{BTreeMap, VecDeque};

use stallscope_attribution::facts::WorkerLoad;
use stallscope_attribution::time::Window;

use crate::observation::{OffCpuReason, Thread};

/// Length of a bin, ns.
pub(super) const BIN_NS: u64 = 10_000_000;
/// Bins kept: 160 s.
const MOST_BINS: usize = 16_384;
/// A silent thread that used more of a window was on CPU all through it.
const BUSY_PERCENT: u128 = 90;
const MOST_WORKERS: usize = 4_096;
/// Most slices of one window.
const MOST_SLICES: u64 = 256;

#[derive(Debug, Clone, Copy, Default)]
struct Bin {
    cpu_ns: u64,
    io_ns: u64,
}

#[derive(Debug, Clone, Copy)]
struct Worker {
    /// What the thread did is known up to here.
    known_ns: u64,
    /// The last record, in case it comes again, longer.
    last: Option<(Window, u64)>,
}

/// Load of one GPU process's data loaders.
#[derive(Debug, Default)]
pub(super) struct Workers {
    threads: BTreeMap<Thread, Worker>,
    bins: VecDeque<Bin>,
    /// Number of the first bin kept.
    first_bin: u64,
    forgotten: u64,
}

impl Workers {
    /// The worker was off CPU.
    pub(super) fn off_cpu(&mut self, thread: Thread, reason: OffCpuReason, runnable_ns: u64, window: Window) {
        let (start_ns, end_ns) = (window.start_ns(), window.end_ns());
        let Some(worker) = self.worker(thread, start_ns) else {
            return;
        };
        let known_ns = worker.known_ns;
        // A record that comes again, longer, brings only what is new of it.
        let again_ns = worker
            .last
            .filter(|(last, _)| last.start_ns() == start_ns)
            .map(|(last, _)| last.end_ns());
        worker.last = Some((window, runnable_ns));
        worker.known_ns = known_ns.max(end_ns);
        if known_ns < start_ns {
            self.add(known_ns, start_ns, |bin| &mut bin.cpu_ns);
        }
        let new_ns = again_ns
            .unwrap_or(start_ns)
            .max(known_ns.min(end_ns))
            .max(start_ns);
        let runnable_from_ns = end_ns.saturating_sub(runnable_ns).max(new_ns).min(end_ns);
        match reason {
            OffCpuReason::Preempted => self.add(new_ns, end_ns, |bin| &mut bin.cpu_ns),
            OffCpuReason::Sleep => self.add(runnable_from_ns, end_ns, |bin| &mut bin.cpu_ns),
            OffCpuReason::Disk => {
                self.add(new_ns, runnable_from_ns, |bin| &mut bin.io_ns);
                self.add(runnable_from_ns, end_ns, |bin| &mut bin.cpu_ns);
            }
        }
    }

    /// The worker was seen running at `at_ns`.
    pub(super) fn running(&mut self, thread: Thread, at_ns: u64) {
        let Some(worker) = self.worker(thread, at_ns) else {
            return;
        };
        let known_ns = worker.known_ns;
        worker.known_ns = known_ns.max(at_ns);
        self.add(known_ns, at_ns, |bin| &mut bin.cpu_ns);
    }

    /// The worker used `cpu_ns` in a window in which it gave no record. Only one that was on CPU all the time tells
    /// when it was.
    pub(super) fn cpu_time(&mut self, thread: Thread, cpu_ns: u64, window: Window) {
        let busy = u128::from(cpu_ns) * 100 >= u128::from(window.len_ns()) * BUSY_PERCENT;
        let Some(worker) = self.worker(thread, window.start_ns()) else {
            return;
        };
        // What came since its last record is known only from the first read on.
        worker.known_ns = worker.known_ns.max(window.start_ns());
        if busy {
            self.running(thread, window.end_ns());
        }
    }

    /// Whether the thread is known as a worker.
    pub(super) fn knows(&self, thread: Thread) -> bool {
        self.threads.contains_key(&thread)
    }

    /// Scheduler records of some threads were lost, the last of them at `at_ns`: what they did up to there is not known.
    pub(super) fn lost(&mut self, at_ns: u64) {
        for worker in self.threads.values_mut() {
            worker.known_ns = worker.known_ns.max(at_ns);
        }
    }

    /// The worker's process is gone.
    pub(super) fn forget_process(&mut self, pid: u32) {
        self.threads.retain(|thread, _| thread.process.pid != pid);
    }

    /// Load within the window, in consecutive slices that begin and end with it, cut also at `cuts`.
    pub(super) fn within(&self, window: Window, cuts: &[Window]) -> Vec<WorkerLoad> {
        if self.threads.is_empty() && self.bins.is_empty() {
            return Vec::new();
        }
        let slice_ns = (window.len_ns() / MOST_SLICES / BIN_NS + 1) * BIN_NS * 2;
        let mut edges: Vec<u64> = Vec::new();
        let mut edge_ns = window.start_ns() / slice_ns * slice_ns;
        while edge_ns < window.end_ns() {
            edges.push(edge_ns.max(window.start_ns()));
            let Some(next_ns) = edge_ns.checked_add(slice_ns) else {
                break;
            };
            edge_ns = next_ns;
        }
        edges.push(window.end_ns());
        for cut in cuts
            .iter()
            .filter(|cut| cut.len_ns() >= BIN_NS / 10)
            .take(MOST_SLICES as usize)
        {
            edges.extend(
                [cut.start_ns(), cut.end_ns()]
                    .into_iter()
                    .filter(|at_ns| (window.start_ns()..window.end_ns()).contains(at_ns)),
            );
        }
        edges.sort_unstable();
        edges.dedup();
        edges
            .windows(2)
            .filter_map(|pair| Window::new(pair[0], pair[1]))
            .map(|slice| self.load(slice))
            .collect()
    }

    /// Forgets bins that ended before `before_ns`.
    pub(super) fn prune(&mut self, before_ns: u64) {
        while !self.bins.is_empty() && (self.first_bin + 1).saturating_mul(BIN_NS) <= before_ns {
            self.bins.pop_front();
            self.first_bin += 1;
        }
    }

    /// Workers and bins forgotten for lack of room.
    pub(super) const fn forgotten(&self) -> u64 {
        self.forgotten
    }

    fn worker(&mut self, thread: Thread, seen_ns: u64) -> Option<&mut Worker> {
        if self.threads.len() >= MOST_WORKERS && !self.threads.contains_key(&thread) {
            self.forgotten += 1;
            return None;
        }
        Some(self.threads.entry(thread).or_insert(Worker {
            known_ns: seen_ns,
            last: None,
        }))
    }

    /// Load of a slice; a bin that it only partly covers gives its share.
    fn load(&self, slice: Window) -> WorkerLoad {
        let mut load = WorkerLoad {
            window: slice,
            cpu_ns: 0,
            io_ns: 0,
        };
        let mut number = (slice.start_ns() / BIN_NS).max(self.first_bin);
        while number.saturating_mul(BIN_NS) < slice.end_ns() {
            let Some(bin) = usize::try_from(number - self.first_bin)
                .ok()
                .and_then(|at| self.bins.get(at))
            else {
                break;
            };
            let start_ns = number * BIN_NS;
            let share_ns =
                slice.end_ns().min(start_ns.saturating_add(BIN_NS)) - slice.start_ns().max(start_ns);
            load.cpu_ns += share(bin.cpu_ns, share_ns);
            load.io_ns += share(bin.io_ns, share_ns);
            number += 1;
        }
        load
    }

    fn add(&mut self, from_ns: u64, to_ns: u64, part: fn(&mut Bin) -> &mut u64) {
        if from_ns >= to_ns {
            return;
        }
        let last = (to_ns - 1) / BIN_NS;
        if self.bins.is_empty() {
            self.first_bin = (from_ns / BIN_NS).max((last + 1).saturating_sub(MOST_BINS as u64));
        }
        let first = (from_ns / BIN_NS).max(self.first_bin);
        if last < first {
            return;
        }
        if last - self.first_bin >= MOST_BINS as u64 {
            self.make_room(last);
        }
        for number in first.max(self.first_bin)..=last {
            let Ok(at) = usize::try_from(number - self.first_bin) else {
                return;
            };
            while self.bins.len() <= at {
                self.bins.push_back(Bin::default());
            }
            let start_ns = number * BIN_NS;
            let share_ns = to_ns.min(start_ns.saturating_add(BIN_NS)) - from_ns.max(start_ns);
            *part(&mut self.bins[at]) += share_ns;
        }
    }

    /// Drops the oldest bins until bin `last` fits.
    fn make_room(&mut self, last: u64) {
        let first = last + 1 - MOST_BINS as u64;
        let drop = usize::try_from(first - self.first_bin)
            .unwrap_or(usize::MAX)
            .min(self.bins.len());
        self.bins.drain(..drop);
        self.first_bin = first;
        self.forgotten += drop as u64;
    }
}

/// `part_ns / BIN_NS` of `whole_ns`.
fn share(whole_ns: u64, part_ns: u64) -> u64 {
    u64::try_from(u128::from(whole_ns) * u128::from(part_ns) / u128::from(BIN_NS)).unwrap_or(u64::MAX)
}
