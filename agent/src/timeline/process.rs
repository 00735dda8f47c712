//! The history of one GPU process, cut into steps and spans that cover its time without overlap.

use std::collections::{BTreeMap, VecDeque};

use stallscope_attribution::facts::{GpuSubject, HostState, StepMethod};
use stallscope_attribution::reading::Reading;
use stallscope_attribution::time::Window;

use super::checkpoint::Checkpoints;
use super::gpu::ComputeRatio;
use super::host::Host;
use super::marks::{Marks, mix};
use super::steps::{Calls, Region, StepFinder};
use super::stream_order::StreamOrder;
use super::workers::Workers;
use crate::observation::{
    Collective, CollectiveFunction, CommCreated, CopyDirection, Fact, FileOp, ProcessFacts, SyncTarget,
    Thread,
};

/// How long after its end a window is assessed, ns of observed time: what lags (scheduler records of long sleeps,
/// counters) has arrived by then.
pub const SETTLE_NS: u64 = 700_000_000;
/// How long a period is looked for before windows of fixed length are cut, ns.
pub const SEARCH_NS: u64 = 10_000_000_000;
/// Length of those windows, ns.
pub const FIXED_NS: u64 = 1_000_000_000;
/// A step longer than this is cut off and counted as a span, ns. Bounds what must be remembered.
pub const LONGEST_STEP_NS: u64 = 120_000_000_000;
/// Collectives this long ago no longer rule, ns.
const COLLECTIVES_STALE_NS: u64 = 30_000_000_000;
/// A jump of time longer than this was a suspended node or a damaged recording, ns.
const JUMP_NS: u64 = 600_000_000_000;
/// Reads below this do not make a thread a data loader, bytes.
const LEAST_READ_BYTES: u64 = 4_096;
/// A copy to the device of less is no batch, bytes.
const LEAST_BATCH_BYTES: u64 = 1_024;
const MOST_QUOTA: usize = 4_096;
const MOST_LOST: usize = 1_024;
const MOST_GROUP_THREADS: usize = 64;
const MOST_GROUP_STREAMS: usize = 64;

/// What a window is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CutKind {
    /// A step.
    Step {
        /// How its edges were found.
        method: StepMethod,
        /// Calls in the pattern.
        calls: u32,
    },
    /// Time outside steps; of which kind is decided when it is assessed.
    Between,
}

/// A window whose edges are known.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cut {
    pub(super) window: Window,
    pub(super) kind: CutKind,
}

/// One GPU process.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) facts: ProcessFacts,
    pub(super) gpu_seen: Option<u32>,
    pub(super) comm_rank: Option<(u32, u32)>,
    pub(super) announced: Option<GpuSubject>,
    pub(super) order: StreamOrder,
    pub(super) host: Host,
    pub(super) checkpoints: Checkpoints,
    pub(super) workers: Workers,
    pub(super) marks: Marks,
    pub(super) ratio: ComputeRatio,
    pub(super) quota: VecDeque<(Window, Reading<u64>)>,
    pub(super) lost: VecDeque<(u64, u64)>,
    pub(super) next_index: u64,
    by_collectives: StepFinder,
    /// A collective of a whole communicator was seen: sends and receives then do not tell steps.
    joint_calls: bool,
    by_launches: StepFinder,
    launches_since_drain: u64,
    /// Streams of the collectives a thread called since its last `ncclGroupEnd`.
    grouped: BTreeMap<u32, Vec<u64>>,
    /// Everything before is cut.
    covered_ns: u64,
    /// Where the finder in charge saw its last region end.
    region_ns: u64,
    pending: VecDeque<Cut>,
}

impl Process {
    /// A process whose GPU time is accounted for from `from_ns` on.
    pub(super) fn new(facts: ProcessFacts, from_ns: u64) -> Self {
        Self {
            facts,
            gpu_seen: None,
            comm_rank: None,
            announced: None,
            order: StreamOrder::new(from_ns),
            host: Host::default(),
            checkpoints: Checkpoints::default(),
            workers: Workers::default(),
            marks: Marks::default(),
            ratio: ComputeRatio::default(),
            quota: VecDeque::new(),
            lost: VecDeque::new(),
            next_index: 0,
            by_collectives: StepFinder::new(Calls::Collectives),
            joint_calls: false,
            by_launches: StepFinder::new(Calls::Drains),
            launches_since_drain: 0,
            grouped: BTreeMap::new(),
            covered_ns: from_ns,
            region_ns: from_ns,
            pending: VecDeque::new(),
        }
    }

    /// Takes over what newer facts tell; what they leave open stays.
    pub(super) fn learn(&mut self, newer: ProcessFacts) {
        let known = std::mem::replace(&mut self.facts, newer);
        let facts = &mut self.facts;
        facts.job = facts.job.take().or(known.job);
        facts.rank = facts.rank.or(known.rank);
        facts.world = facts.world.or(known.world);
        facts.local_rank = facts.local_rank.or(known.local_rank);
        facts.gpu = facts.gpu.or(known.gpu);
        facts.kind = facts.kind.take().or(known.kind);
        facts.model_flops_per_step = facts.model_flops_per_step.or(known.model_flops_per_step);
    }

    /// GPU index: as discovery tells, else where the counters see the process, else the rank on the node.
    pub(super) fn gpu(&self) -> Option<u32> {
        self.facts.gpu.or(self.gpu_seen).or(self.facts.local_rank)
    }

    /// A fact about a thread of this process.
    pub(super) fn observe(&mut self, window: Window, fact: &Fact) {
        match fact {
            Fact::CommCreated(created) => self.comm_created(created, window),
            Fact::CommDestroyed { comm, .. } => self.marks.destroyed(*comm),
            Fact::Collective(collective) => self.collective(collective, window),
            Fact::GroupEnd { thread } => self.group_end(thread.tid, window),
            Fact::LaunchRun {
                thread,
                stream,
                kernels,
                graphs,
            } => {
                self.launch_run(
                    thread.tid,
                    *stream,
                    u64::from(*kernels) + u64::from(*graphs),
                    window,
                );
            }
            Fact::Sync {
                thread,
                target,
                result,
            } => self.sync(thread.tid, *target, *result, window),
            Fact::EventRecord {
                thread,
                event,
                stream,
            } => {
                self.order.record(*event, *stream, thread.tid, window);
            }
            Fact::StreamWait {
                thread,
                stream,
                event,
            } => {
                self.order.wait(*stream, thread.tid, *event, window);
            }
            Fact::Copy {
                thread,
                bytes,
                direction,
                stream,
            } => {
                self.copy(thread.tid, *bytes, *direction, *stream, window);
            }
            Fact::OffCpu {
                thread,
                reason,
                runnable_ns,
            } => {
                self.host.off_cpu(thread.tid, *reason, *runnable_ns, window);
                if self.workers.knows(*thread) {
                    self.workers.off_cpu(*thread, *reason, *runnable_ns, window);
                }
            }
            Fact::FileIo {
                thread, op, bytes, ..
            } => self.file_io(*thread, *op, *bytes, window),
            Fact::CpuQuota { throttled_ns, .. } => {
                if self.quota.len() == MOST_QUOTA {
                    self.quota.pop_front();
                }
                self.quota.push_back((window, throttled_ns.clone()));
            }
            _ => {}
        }
    }

    /// A fact about a thread of a helper process.
    pub(super) fn observe_helper(&mut self, window: Window, fact: &Fact) {
        match fact {
            Fact::OffCpu {
                thread,
                reason,
                runnable_ns,
            } => {
                self.workers.off_cpu(*thread, *reason, *runnable_ns, window);
            }
            Fact::ThreadCpu { thread, cpu_ns } => self.workers.cpu_time(*thread, *cpu_ns, window),
            Fact::FileIo { thread, .. } => self.workers.running(*thread, window.end_ns()),
            _ => {}
        }
    }

    /// Kernel records were lost.
    pub(super) fn lost(&mut self, ring: &str, window: Window, count: u64) {
        // What the agent itself dropped may have been of any kind.
        if matches!(ring, "sched" | "agent") {
            self.host.lost(window);
            self.workers.lost(window.end_ns());
        }
        if self.lost.len() == MOST_LOST {
            self.lost.pop_front();
        }
        self.lost.push_back((window.end_ns(), count));
    }

    /// Before this instant of observed time there is nothing to cut or to assess, as long as no fact of it comes.
    pub(super) fn next_due_ns(&self) -> u64 {
        let pending = self.pending.front();
        let settled_ns = pending.map_or(u64::MAX, |cut| cut.window.end_ns().saturating_add(SETTLE_NS));
        settled_ns.min(self.covered_ns.saturating_add(SEARCH_NS + FIXED_NS))
    }

    /// Cuts what `clock_ns` lets one cut without a pattern.
    pub(super) fn advance(&mut self, clock_ns: u64) {
        let open_ns = clock_ns.saturating_sub(self.covered_ns);
        if open_ns < SEARCH_NS + FIXED_NS {
            return;
        }
        if open_ns > JUMP_NS {
            self.cut(clock_ns - SEARCH_NS, CutKind::Between);
        }
        if self.finder(clock_ns).has_pattern() {
            if open_ns > LONGEST_STEP_NS {
                self.cut(clock_ns - SEARCH_NS, CutKind::Between);
            }
            return;
        }
        let until_ns = clock_ns - SEARCH_NS;
        while self.covered_ns + FIXED_NS <= until_ns {
            let idle_until_ns = self.idle_until(until_ns);
            if idle_until_ns > self.covered_ns {
                if idle_until_ns + FIXED_NS > until_ns && idle_until_ns - self.covered_ns < SEARCH_NS {
                    return;
                }
                self.cut(idle_until_ns, CutKind::Between);
            } else {
                let kind = CutKind::Step {
                    method: StepMethod::FixedWindow,
                    calls: 0,
                };
                self.cut(self.covered_ns + FIXED_NS, kind);
            }
        }
    }

    /// Cuts everything up to `end_ns`: the process is gone or the input ends.
    pub(super) fn finish(&mut self, end_ns: u64) {
        self.cut(end_ns, CutKind::Between);
    }

    /// The next window that may be assessed when observed time has come to `clock_ns`.
    pub(super) fn next_settled(&mut self, clock_ns: u64) -> Option<Cut> {
        let due = self.pending.front()?.window.end_ns().saturating_add(SETTLE_NS) <= clock_ns;
        if due { self.pending.pop_front() } else { None }
    }

    /// The next window, settled or not.
    pub(super) fn next_pending(&mut self) -> Option<Cut> {
        self.pending.pop_front()
    }

    /// Forgets what windows that ended by `before_ns` needed.
    pub(super) fn prune(&mut self, before_ns: u64) {
        self.order.prune(before_ns);
        self.host.prune(before_ns);
        self.checkpoints.prune(before_ns);
        self.workers.prune(before_ns);
        self.marks.prune(before_ns);
        while self
            .quota
            .front()
            .is_some_and(|(window, _)| window.end_ns() <= before_ns)
        {
            self.quota.pop_front();
        }
        while self.lost.front().is_some_and(|(at_ns, _)| *at_ns < before_ns) {
            self.lost.pop_front();
        }
    }

    /// Pieces of history forgotten for lack of room.
    pub(super) const fn forgotten(&self) -> u64 {
        self.order.forgotten() + self.host.forgotten() + self.workers.forgotten() + self.marks.forgotten()
    }

    /// End of the longest stretch from `covered_ns` in which nothing was submitted, in whole fixed windows.
    fn idle_until(&self, until_ns: u64) -> u64 {
        let mut end_ns = self.covered_ns;
        while end_ns + FIXED_NS <= until_ns {
            let Some(window) = Window::new(end_ns, end_ns + FIXED_NS) else {
                break;
            };
            let (launches, copies) = self.marks.counts_within(window);
            if launches > 0 || copies.count > 0 || !self.marks.collectives_within(window).is_empty() {
                break;
            }
            end_ns += FIXED_NS;
        }
        end_ns
    }

    fn finder(&self, clock_ns: u64) -> &StepFinder {
        let fresh = |last_ns: u64| clock_ns.saturating_sub(last_ns) < COLLECTIVES_STALE_NS;
        if self.by_collectives.last_call_ns().is_some_and(fresh) {
            &self.by_collectives
        } else {
            &self.by_launches
        }
    }

    fn cut(&mut self, end_ns: u64, kind: CutKind) {
        let Some(window) = Window::new(self.covered_ns, end_ns) else {
            return;
        };
        if window.is_empty() {
            return;
        }
        self.pending.push_back(Cut { window, kind });
        self.covered_ns = end_ns;
    }

    fn cut_regions(&mut self, regions: &[Region], method: StepMethod) {
        for region in regions {
            let kind = match region.step_calls {
                // A step of which a part is already accounted for is not a whole step any more.
                Some(calls) if self.region_ns == self.covered_ns => CutKind::Step { method, calls },
                _ => CutKind::Between,
            };
            self.cut(region.end_ns, kind);
            self.region_ns = region.end_ns;
        }
    }

    fn comm_created(&mut self, created: &CommCreated, window: Window) {
        self.marks.created(self.facts.key.pid, created);
        self.host.called(created.thread.tid, HostState::CommCall, window);
        if let (Some(rank), Some(ranks)) = (created.rank, created.ranks)
            && self.comm_rank.is_none_or(|(_, known)| ranks > known)
        {
            self.comm_rank = Some((rank, ranks));
        }
    }

    fn collective(&mut self, collective: &Collective, window: Window) {
        let tid = collective.thread.tid;
        self.host.launched(tid, 1, window);
        self.host.called(tid, HostState::CommCall, window);
        self.order.submit(collective.stream, tid, window);
        self.remember_group(tid, collective.stream);
        let token = self.marks.collective(collective, window);
        let pairwise = matches!(
            collective.function,
            CollectiveFunction::Send | CollectiveFunction::Recv
        );
        if pairwise && self.joint_calls {
            // Transfers between pipeline stages repeat with every micro-batch, not with the step.
            return self.by_collectives.heard(window.start_ns());
        }
        if !pairwise && !self.joint_calls {
            self.joint_calls = true;
            if self.by_collectives.last_call_ns().is_some() {
                self.by_collectives = StepFinder::new(Calls::Collectives);
            }
        }
        let mut regions = Vec::new();
        self.by_collectives.call(token, window.start_ns(), &mut regions);
        self.cut_regions(&regions, StepMethod::CollectivePeriod);
    }

    fn remember_group(&mut self, tid: u32, stream: u64) {
        if self.grouped.len() >= MOST_GROUP_THREADS && !self.grouped.contains_key(&tid) {
            self.grouped.pop_first();
        }
        let streams = self.grouped.entry(tid).or_default();
        if !streams.contains(&stream) && streams.len() < MOST_GROUP_STREAMS {
            streams.push(stream);
        }
    }

    /// Calls between group start and end only queue; the work is submitted by the end.
    fn group_end(&mut self, tid: u32, window: Window) {
        self.host.called(tid, HostState::CommCall, window);
        for stream in self.grouped.remove(&tid).unwrap_or_default() {
            self.order.submit(stream, tid, window);
        }
    }

    fn launch_run(&mut self, tid: u32, stream: u64, count: u64, window: Window) {
        self.host.launched(tid, count, window);
        self.order.submit(stream, tid, window);
        self.marks.launched(count, window.end_ns());
        self.launches_since_drain += count;
    }

    fn sync(&mut self, tid: u32, target: SyncTarget, result: i32, window: Window) {
        self.host.called(tid, HostState::Sync, window);
        self.marks.synchronised();
        if result == 0
            && let Some(at_ns) = self.order.synchronised(target, tid, window)
        {
            self.drained(at_ns);
        }
    }

    fn copy(&mut self, tid: u32, bytes: u64, direction: CopyDirection, stream: Option<u64>, window: Window) {
        let blocked_ns = if stream.is_none() { window.len_ns() } else { 0 };
        self.marks.copied(bytes, direction, blocked_ns, window.end_ns());
        if direction == CopyDirection::ToDevice && bytes >= LEAST_BATCH_BYTES {
            self.by_collectives.fed();
        }
        if direction == CopyDirection::ToHost {
            self.checkpoints.copied_to_host(bytes, window);
        }
        match stream {
            Some(stream) => self.order.submit(stream, tid, window),
            None => {
                self.host.called(tid, HostState::Sync, window);
                self.marks.synchronised();
                if direction != CopyDirection::ToHost {
                    self.order.submit(0, tid, window);
                } else if let Some(at_ns) = self.order.copied_to_host(window) {
                    self.drained(at_ns);
                }
            }
        }
    }

    fn drained(&mut self, at_ns: u64) {
        let mut regions = Vec::new();
        self.by_collectives.drained(at_ns, &mut regions);
        self.cut_regions(&regions, StepMethod::CollectivePeriod);
        let launches = std::mem::take(&mut self.launches_since_drain);
        if launches == 0 {
            return;
        }
        regions.clear();
        self.by_launches.call(mix(1, launches), at_ns, &mut regions);
        if std::ptr::eq(self.finder(at_ns), &raw const self.by_launches) {
            self.cut_regions(&regions, StepMethod::LaunchPeriod);
        }
    }

    fn file_io(&mut self, thread: Thread, op: FileOp, bytes: u64, window: Window) {
        let launching = self.host.launching_thread() == Some(thread.tid);
        match op {
            FileOp::Read if launching => self.host.called(thread.tid, HostState::FileRead, window),
            FileOp::Read if bytes >= LEAST_READ_BYTES || self.workers.knows(thread) => {
                self.workers.running(thread, window.end_ns());
            }
            FileOp::Read => {}
            FileOp::Write | FileOp::Flush => self.checkpoints.wrote(thread.tid, bytes, window),
        }
    }
}
