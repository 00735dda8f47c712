//! What the threads of a GPU process did: calls and time off CPU.
//!
//! The launching thread is the one with most launches and collectives. Scheduler records exist only for intervals
//! of some tens of microseconds and more; the rest, between two records of a thread, is time on CPU. After a thread's
//! last record nothing is known, nor where scheduler records were lost, and if no scheduler record of the process was
//! ever seen, nothing is known at all: such time is left out rather than called on CPU.

use std::collections::{BTreeMap, VecDeque};

use stallscope_attribution::facts::{HostState, StateInterval};
use stallscope_attribution::time::Window;

use crate::observation::OffCpuReason;

const MOST_THREADS: usize = 512;
/// Records kept for a thread that launches.
const MOST_RECORDS: usize = 16_384;
/// Records kept for any other thread.
const MOST_RECORDS_OTHER: usize = 64;
/// Counts are halved beyond this, so that an old main thread gives way to a new one.
const WEIGHT_LIMIT: u64 = 1 << 20;
/// Stretches kept in which scheduler records were lost.
const MOST_LOST: usize = 64;

#[derive(Debug, Clone, Copy)]
struct OffCpu {
    window: Window,
    runnable_ns: u64,
    reason: OffCpuReason,
}

#[derive(Debug, Default)]
struct ThreadHistory {
    weight: u64,
    off_cpu: VecDeque<OffCpu>,
    calls: VecDeque<StateInterval>,
    /// What is kept is complete from here on.
    complete_from_ns: u64,
    last_seen_ns: u64,
}

impl ThreadHistory {
    fn seen(&mut self, window: Window) {
        if self.last_seen_ns == 0 {
            self.complete_from_ns = window.start_ns();
        }
        self.last_seen_ns = self.last_seen_ns.max(window.end_ns());
    }

    fn most(&self) -> usize {
        if self.weight > 0 {
            MOST_RECORDS
        } else {
            MOST_RECORDS_OTHER
        }
    }
}

/// The threads of one process.
#[derive(Debug, Default)]
pub(super) struct Host {
    threads: BTreeMap<u32, ThreadHistory>,
    scheduler_seen: bool,
    /// When scheduler records were lost, oldest first.
    lost: VecDeque<Window>,
    forgotten: u64,
}

impl Host {
    /// The thread submitted `count` pieces of work.
    pub(super) fn launched(&mut self, tid: u32, count: u64, call: Window) {
        let Some(thread) = self.thread(tid) else { return };
        thread.weight = thread.weight.saturating_add(count);
        thread.seen(call);
        if thread.weight > WEIGHT_LIMIT {
            for thread in self.threads.values_mut() {
                thread.weight /= 2;
            }
        }
    }

    /// The thread was in a call that counts as `state`.
    pub(super) fn called(&mut self, tid: u32, state: HostState, call: Window) {
        let Some(thread) = self.thread(tid) else { return };
        thread.seen(call);
        let full = thread.calls.len() >= thread.most();
        if full && let Some(oldest) = thread.calls.pop_front() {
            thread.complete_from_ns = thread.complete_from_ns.max(oldest.window.end_ns());
        }
        thread.calls.push_back(StateInterval { window: call, state });
        let counts = full && thread.weight > 0;
        self.forgotten += u64::from(counts);
    }

    /// The thread was off CPU. A record with the start of the last one replaces it: it then was still off CPU.
    pub(super) fn off_cpu(&mut self, tid: u32, reason: OffCpuReason, runnable_ns: u64, window: Window) {
        self.scheduler_seen = true;
        let Some(thread) = self.thread(tid) else { return };
        thread.seen(window);
        let record = OffCpu {
            window,
            runnable_ns: runnable_ns.min(window.len_ns()),
            reason,
        };
        if let Some(last) = thread.off_cpu.back_mut()
            && last.window.start_ns() == window.start_ns()
        {
            *last = record;
            return;
        }
        let mut forgotten = 0;
        if thread.off_cpu.len() >= thread.most() {
            if let Some(oldest) = thread.off_cpu.pop_front() {
                thread.complete_from_ns = thread.complete_from_ns.max(oldest.window.end_ns());
            }
            forgotten = u64::from(thread.weight > 0);
        }
        let at = thread
            .off_cpu
            .partition_point(|other| other.window.start_ns() <= window.start_ns());
        thread.off_cpu.insert(at, record);
        self.forgotten += forgotten;
    }

    /// Scheduler records of some threads were lost in the window.
    pub(super) fn lost(&mut self, window: Window) {
        if self.lost.len() >= MOST_LOST
            && let (Some(oldest), Some(next)) = (self.lost.pop_front(), self.lost.front_mut())
        {
            // Rather too much is unknown than too little.
            *next = Window::new(oldest.start_ns(), next.end_ns()).unwrap_or(*next);
        }
        self.lost.push_back(window);
    }

    /// The thread with most launches and collectives; of equals, the oldest id.
    pub(super) fn launching_thread(&self) -> Option<u32> {
        self.threads
            .iter()
            .filter(|(_, thread)| thread.weight > 0)
            .max_by_key(|(tid, thread)| (thread.weight, u32::MAX - **tid))
            .map(|(tid, _)| *tid)
    }

    /// States of the launching thread within the window. They may overlap and leave holes.
    pub(super) fn states_within(&self, window: Window) -> Vec<StateInterval> {
        let Some(thread) = self.launching_thread().and_then(|tid| self.threads.get(&tid)) else {
            return Vec::new();
        };
        let mut states: Vec<StateInterval> = thread
            .calls
            .iter()
            .filter_map(|call| {
                let window = call.window.intersect(window)?;
                Some(StateInterval {
                    window,
                    state: call.state,
                })
            })
            .collect();
        if self.scheduler_seen {
            push_scheduler_states(thread, &self.lost, window, &mut states);
        }
        states
    }

    /// When the launching thread slept outside any call, within the window.
    pub(super) fn sleeping_within(&self, window: Window) -> Vec<Window> {
        let Some(thread) = self.launching_thread().and_then(|tid| self.threads.get(&tid)) else {
            return Vec::new();
        };
        thread
            .off_cpu
            .iter()
            .filter_map(|off| off.window.intersect(window))
            .collect()
    }

    /// Forgets what ended before `before_ns`.
    pub(super) fn prune(&mut self, before_ns: u64) {
        for thread in self.threads.values_mut() {
            while thread
                .off_cpu
                .front()
                .is_some_and(|off| off.window.end_ns() <= before_ns)
            {
                thread.off_cpu.pop_front();
            }
            while thread
                .calls
                .front()
                .is_some_and(|call| call.window.end_ns() <= before_ns)
            {
                thread.calls.pop_front();
            }
        }
        while self.lost.front().is_some_and(|loss| loss.end_ns() <= before_ns) {
            self.lost.pop_front();
        }
    }

    /// Records forgotten for lack of room.
    pub(super) const fn forgotten(&self) -> u64 {
        self.forgotten
    }

    fn thread(&mut self, tid: u32) -> Option<&mut ThreadHistory> {
        if self.threads.len() >= MOST_THREADS && !self.threads.contains_key(&tid) {
            let idle = self
                .threads
                .iter()
                .filter(|(_, thread)| thread.weight == 0)
                .min_by_key(|(_, thread)| thread.last_seen_ns)
                .map(|(tid, _)| *tid);
            self.forgotten += 1;
            self.threads.remove(&idle?);
        }
        Some(self.threads.entry(tid).or_default())
    }
}

/// When the last loss that reaches into a stretch ended: of what was lost nobody knows when it began, so nothing before is
/// certain either.
fn known_from(lost: &VecDeque<Window>, from_ns: u64, to_ns: u64) -> u64 {
    let reaching = |loss: &&Window| loss.start_ns() < to_ns && loss.end_ns() > from_ns;
    let ends = lost.iter().filter(reaching).map(|loss| loss.end_ns());
    ends.max().map_or(from_ns, |end_ns| end_ns.max(from_ns))
}

fn push_scheduler_states(
    thread: &ThreadHistory,
    lost: &VecDeque<Window>,
    window: Window,
    states: &mut Vec<StateInterval>,
) {
    let mut push = |start_ns: u64, end_ns: u64, state: HostState| {
        if let Some(part) = Window::new(start_ns, end_ns).and_then(|part| part.intersect(window)) {
            states.push(StateInterval { window: part, state });
        }
    };
    let mut on_cpu_from_ns = thread.complete_from_ns;
    for off in &thread.off_cpu {
        let (start_ns, end_ns) = (off.window.start_ns(), off.window.end_ns());
        push(
            known_from(lost, on_cpu_from_ns, start_ns),
            start_ns,
            HostState::OnCpu,
        );
        let runnable_from_ns = end_ns - off.runnable_ns;
        match off.reason {
            OffCpuReason::Preempted => push(start_ns, end_ns, HostState::Runnable),
            OffCpuReason::Sleep => push(start_ns, runnable_from_ns, HostState::Waiting),
            OffCpuReason::Disk => push(start_ns, runnable_from_ns, HostState::FileRead),
        }
        if off.reason != OffCpuReason::Preempted {
            push(runnable_from_ns, end_ns, HostState::Runnable);
        }
        on_cpu_from_ns = on_cpu_from_ns.max(end_ns);
    }
    push(
        known_from(lost, on_cpu_from_ns, thread.last_seen_ns),
        thread.last_seen_ns,
        HostState::OnCpu,
    );
}
