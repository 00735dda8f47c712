//! Observations become per-GPU history.
//!
//! Pure: observations in, events out. Time is what the observations tell; there is no clock, no I/O and no thread, so
//! that a recording replays to the same events, bit for bit. Observations may arrive in any order within
//! [`reorder::HOLD_NS`].
//!
//! Every traced GPU's time, from where its process was first seen to where it is gone, is covered by steps and spans
//! without overlap, to the nanosecond.

mod checkpoint;
mod endings;
mod evidence;
mod gpu;
mod host;
mod marks;
mod process;
mod reorder;
mod steps;
mod stream_order;
mod subject;
mod told;
mod waits;
mod workers;

#[cfg(test)]
pub(crate) mod synthetic;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;

use stallscope_attribution::budget::{self, Budget};
use stallscope_attribution::facts::{
    GpuStep, GpuSubject, HardwareFacts, PortFacts, RecordGap, Span, SpanKind,
};
use stallscope_attribution::time::Window;

pub use process::{FIXED_NS, LONGEST_STEP_NS, SEARCH_NS, SETTLE_NS};
pub use reorder::HOLD_NS;

use crate::observation::{Fact, Observation, ProcessFacts, ProcessKey, ProcessRole, Thread};
use crate::sources::nccl_profiler;
use endings::Endings;
use gpu::GpuCounters;
use process::{Cut, CutKind, Process};
use subject::DeviceIdentity;

const MOST_PROCESSES: usize = 1_024;
const MOST_HELPERS: usize = 16_384;

/// What the timeline found out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A GPU of a job is accounted for from now on, or more is known about it.
    Subject {
        /// Which.
        subject: Arc<GpuSubject>,
        /// The job's declared kind.
        kind: Option<String>,
    },
    /// A step.
    Step {
        /// Of which GPU.
        subject: Arc<GpuSubject>,
        /// The step.
        step: Box<GpuStep>,
    },
    /// Time outside steps.
    Span {
        /// Of which GPU.
        subject: Arc<GpuSubject>,
        /// The span.
        span: Box<Span>,
    },
    /// A network window.
    Port(Box<PortFacts>),
    /// What a device told about itself and its links.
    Hardware(Box<HardwareFacts>),
    /// Something is missing.
    Gap(RecordGap),
    /// The process is gone and everything about it has been told.
    Gone {
        /// Of which GPU.
        subject: Arc<GpuSubject>,
    },
}

/// What the timeline counted, since it began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Observations taken in.
    pub observations: u64,
    /// Observations that came too late to be put in order.
    pub late: u64,
    /// Pieces of history forgotten for lack of room, by processes that still run.
    pub forgotten: u64,
    /// Kernel records lost, as the probes counted them.
    pub lost_records: u64,
    /// GPU processes and helpers not followed for lack of room.
    pub processes_refused: u64,
}

/// The timeline of one node.
#[derive(Debug)]
pub struct Timeline {
    node: String,
    reorder: reorder::Reorder,
    clock_ns: u64,
    realtime_offset_ns: i64,
    processes: BTreeMap<ProcessKey, Process>,
    helpers: BTreeMap<ProcessKey, ProcessKey>,
    gpus: BTreeMap<u32, GpuCounters>,
    devices: BTreeMap<u32, DeviceIdentity>,
    resume: Vec<(GpuSubject, u64)>,
    endings: Endings,
    waits: waits::Folding,
    counters: Counters,
    /// Before this instant of observed time no window becomes complete.
    next_due_ns: u64,
}

impl Timeline {
    /// A timeline that has seen nothing of the node.
    #[must_use]
    pub fn new(node: impl Into<String>) -> Self {
        Self {
            node: node.into(),
            reorder: reorder::Reorder::default(),
            clock_ns: 0,
            realtime_offset_ns: 0,
            processes: BTreeMap::new(),
            helpers: BTreeMap::new(),
            gpus: BTreeMap::new(),
            devices: BTreeMap::new(),
            resume: Vec::new(),
            endings: Endings::default(),
            waits: waits::Folding::default(),
            counters: Counters::default(),
            next_due_ns: 0,
        }
    }

    /// Tells where an earlier run of the agent left off, by subject, so that the time between is named as unobserved.
    pub fn resume_from(&mut self, left_off: Vec<(GpuSubject, u64)>) {
        self.resume = left_off;
    }

    /// Takes an observation in.
    pub fn push(&mut self, observation: Observation) {
        self.counters.observations += 1;
        self.reorder.push(observation);
    }

    /// Works through what can be worked through, and appends what was found out.
    pub fn advance(&mut self, events: &mut Vec<Event>) {
        while let Some(observation) = self.reorder.pop() {
            self.handle(observation, events);
        }
    }

    /// Works through everything: there will be no more input.
    pub fn finish(&mut self, events: &mut Vec<Event>) {
        while let Some(observation) = self.reorder.pop_any() {
            self.handle(observation, events);
        }
        let keys: Vec<ProcessKey> = self.processes.keys().copied().collect();
        for key in keys {
            self.gone(key, self.clock_ns, events);
        }
    }

    /// What was counted.
    #[must_use]
    pub fn counters(&self) -> Counters {
        Counters {
            late: self.reorder.late(),
            forgotten: self.processes.values().map(Process::forgotten).sum(),
            ..self.counters
        }
    }

    fn handle(&mut self, observation: Observation, events: &mut Vec<Event>) {
        let Observation { window, fact } = observation;
        self.clock_ns = self.clock_ns.max(window.end_ns());
        self.name_endings(events);
        for folded in self.waits.due(self.clock_ns) {
            self.tell_waits(folded, events);
        }
        match fact {
            Fact::Process(facts) => self.process(*facts, window),
            Fact::ProcessGone(key) => {
                self.gone(key, window.end_ns(), events);
                if let Some(owner) = self.helpers.remove(&key)
                    && let Some(process) = self.processes.get_mut(&owner)
                {
                    process.workers.forget_process(key.pid);
                }
            }
            Fact::Gpu(reading) => self.gpu_reading(window, &reading),
            Fact::Port(port) => events.push(Event::Port(port)),
            Fact::Hardware(facts) => self.hardware(facts, events),
            Fact::Lost { ring, count } => self.lost(ring, count, window, events),
            Fact::RealtimeOffset { ns } => self.realtime_offset_ns = ns,
            Fact::StepWaits { thread, waits } if self.processes.contains_key(&thread.process) => {
                self.waits.add(thread.process, window, &waits);
            }
            fact => self.thread_fact(window, &fact),
        }
        self.settle(events);
    }

    fn process(&mut self, facts: ProcessFacts, window: Window) {
        let key = facts.key;
        if facts.role == ProcessRole::Helper {
            let owner = facts.works_for.or_else(|| self.process_of_pid(facts.parent_pid));
            if self.helpers.len() >= MOST_HELPERS {
                self.counters.processes_refused += 1;
            } else if let Some(owner) = owner {
                self.helpers.insert(key, owner);
            }
            return;
        }
        self.helpers.remove(&key);
        if let Some(known) = self.processes.get_mut(&key) {
            known.learn(facts);
        } else if self.processes.len() >= MOST_PROCESSES {
            self.counters.processes_refused += 1;
        } else {
            let process = Process::new(facts, window.start_ns());
            self.next_due_ns = self.next_due_ns.min(process.next_due_ns());
            self.processes.insert(key, process);
        }
    }

    fn process_of_pid(&self, pid: u32) -> Option<ProcessKey> {
        self.processes.keys().find(|key| key.pid == pid).copied()
    }

    fn thread_fact(&mut self, window: Window, fact: &Fact) {
        let Some(key) = process_of(fact) else { return };
        if let Some(process) = self.processes.get_mut(&key) {
            process.observe(window, fact);
            self.next_due_ns = self.next_due_ns.min(process.next_due_ns());
        } else if let Some(owner) = self.helpers.get(&key)
            && let Some(process) = self.processes.get_mut(owner)
        {
            process.observe_helper(window, fact);
        }
    }

    fn lost(&mut self, ring: &'static str, count: u64, window: Window, events: &mut Vec<Event>) {
        if count == 0 {
            return;
        }
        self.counters.lost_records += count;
        // The plugin's events are not what steps are made of.
        if ring != nccl_profiler::RING {
            for process in self.processes.values_mut() {
                process.lost(ring, window, count);
            }
        }
        events.push(Event::Gap(RecordGap {
            node: self.node.clone(),
            window: self.realtime(window),
            what: match ring {
                "agent" => "the agent was behind by all its queue holds: observations are missing".to_owned(),
                nccl_profiler::RING => {
                    "a job's NCCL profiler plugin had more to tell than was read: waits of network steps are too short"
                        .to_owned()
                }
                ring => format!("the kernel's {ring} ring was full: records of calls are missing"),
            },
            count,
        }));
    }

    fn realtime(&self, window: Window) -> Option<Window> {
        let shifted = |ns: u64| ns.checked_add_signed(self.realtime_offset_ns);
        Window::new(shifted(window.start_ns())?, shifted(window.end_ns())?)
    }

    /// Assesses every window that has become complete.
    fn settle(&mut self, events: &mut Vec<Event>) {
        let clock_ns = self.clock_ns;
        if clock_ns < self.next_due_ns {
            return;
        }
        let mut due: Vec<(ProcessKey, Cut)> = Vec::new();
        for (key, process) in &mut self.processes {
            process.advance(clock_ns);
            while let Some(cut) = process.next_settled(clock_ns) {
                due.push((*key, cut));
            }
        }
        for (key, cut) in due {
            self.assess(key, cut, events);
        }
        let next_ns = self.processes.values().map(Process::next_due_ns).min();
        self.next_due_ns = next_ns.unwrap_or(u64::MAX);
    }

    /// Names ranks that ended while others of their job went on.
    fn name_endings(&mut self, events: &mut Vec<Event>) {
        let processes = &self.processes;
        for ended in self
            .endings
            .alone(self.clock_ns, |key| processes.contains_key(key))
        {
            events.push(Event::Gap(RecordGap {
                node: self.node.clone(),
                window: self.realtime(Window::instant(ended.at_ns)),
                what: format!(
                    "rank {} (process {}, GPU {}) ended while {} of the job's processes on the node went on",
                    ended.subject.rank, ended.subject.pid, ended.subject.gpu, ended.others
                ),
                count: 0,
            }));
        }
    }

    /// Ends the account of a process.
    fn gone(&mut self, key: ProcessKey, at_ns: u64, events: &mut Vec<Event>) {
        if let Some(folded) = self.waits.gone(key) {
            self.tell_waits(folded, events);
        }
        let Some(process) = self.processes.get_mut(&key) else {
            return;
        };
        process.finish(at_ns);
        let mut left = Vec::new();
        while let Some(cut) = process.next_pending() {
            left.push(cut);
        }
        for cut in left {
            self.assess(key, cut, events);
        }
        self.helpers.retain(|_, owner| *owner != key);
        if let Some(subject) = self.processes.remove(&key).and_then(|process| process.announced) {
            let of_job = |other: &Process| {
                other
                    .announced
                    .as_ref()
                    .is_some_and(|other| other.job == subject.job)
            };
            let others = self.processes.iter().filter(|(_, other)| of_job(other));
            let others = others.map(|(other, _)| *other).collect();
            self.endings.ended(subject.clone(), at_ns, others);
            events.push(Event::Gone {
                subject: Arc::new(subject),
            });
        }
    }

    fn assess(&mut self, key: ProcessKey, cut: Cut, events: &mut Vec<Event>) {
        let Some(subject) = self.announce(key, cut.window, events) else {
            return;
        };
        let Some(process) = self.processes.get(&key) else {
            return;
        };
        let gpu = process.gpu();
        let job = process.facts.job.as_deref();
        let ours = |pid: u32| {
            let of_job = |key: &ProcessKey| {
                self.processes
                    .get(key)
                    .is_some_and(|other| job.is_some() && other.facts.job.as_deref() == job)
            };
            pid == key.pid
                || self
                    .processes
                    .keys()
                    .any(|other| other.pid == pid && of_job(other))
                || self
                    .helpers
                    .iter()
                    .any(|(helper, owner)| helper.pid == pid && (*owner == key || of_job(owner)))
        };
        let evidence = evidence::gather(
            process,
            cut,
            (*subject).clone(),
            self.realtime_offset_ns,
            gpu.and_then(|gpu| self.gpus.get(&gpu)),
            ours,
        );
        let device = gpu
            .and_then(|gpu| self.devices.get(&gpu))
            .cloned()
            .unwrap_or_default();
        let mut step = budget::assess(&evidence, &device.profile(process.facts.model_flops_per_step));
        let event = if let CutKind::Step { calls, .. } = cut.kind {
            step.period_calls = calls;
            Event::Step {
                subject,
                step: Box::new(step),
            }
        } else {
            let kind = evidence::span_kind(process, &evidence);
            Event::Span {
                subject,
                span: Box::new(self.span(kind, cut.window, step.budget)),
            }
        };
        if let Some(process) = self.processes.get_mut(&key) {
            process.next_index += u64::from(matches!(event, Event::Step { .. }));
            process.prune(cut.window.end_ns());
        }
        events.push(event);
    }

    const fn span(&self, kind: SpanKind, window: Window, budget: Budget) -> Span {
        Span {
            kind,
            window,
            realtime_offset_ns: self.realtime_offset_ns,
            budget,
        }
    }

    /// The process's subject, announced if it is new or more is known.
    fn announce(
        &mut self,
        key: ProcessKey,
        first: Window,
        events: &mut Vec<Event>,
    ) -> Option<Arc<GpuSubject>> {
        let process = self.processes.get_mut(&key)?;
        let gpu = process.gpu();
        let device = gpu
            .and_then(|gpu| self.devices.get(&gpu))
            .cloned()
            .unwrap_or_default();
        let now = subject::subject(
            &self.node,
            &process.facts,
            gpu.unwrap_or(0),
            &device,
            process.comm_rank,
        );
        if process.announced.as_ref() == Some(&now) {
            return Some(Arc::new(now));
        }
        let is_new = process.announced.is_none();
        process.announced = Some(now.clone());
        let kind = process.facts.kind.as_deref().and_then(subject::name);
        let subject = Arc::new(now);
        events.push(Event::Subject {
            subject: Arc::clone(&subject),
            kind,
        });
        if is_new && let Some(hole) = self.hole_before(&subject, first.start_ns()) {
            events.push(Event::Gap(RecordGap {
                node: self.node.clone(),
                window: self.realtime(hole),
                what: format!(
                    "the agent did not run: rank {} of {} was not observed",
                    subject.rank, subject.job
                ),
                count: 0,
            }));
            let span = self.span(SpanKind::Unobserved, hole, Budget::unobserved(hole.len_ns()));
            events.push(Event::Span {
                subject: Arc::clone(&subject),
                span: Box::new(span),
            });
        }
        Some(subject)
    }
}

impl Timeline {
    /// The time between where an earlier run of the agent left the subject and `first_ns`.
    fn hole_before(&mut self, subject: &GpuSubject, first_ns: u64) -> Option<Window> {
        let earlier = self
            .resume
            .iter()
            .filter(|(earlier, _)| same_gpu(earlier, subject));
        let left_off_ns = earlier.map(|(_, left_off_ns)| *left_off_ns).max()?;
        self.resume.retain(|(earlier, _)| !same_gpu(earlier, subject));
        Window::new(left_off_ns, first_ns).filter(|hole| !hole.is_empty())
    }
}

/// Whether two subjects are the same process on the same GPU; what else is known may have grown.
fn same_gpu(a: &GpuSubject, b: &GpuSubject) -> bool {
    (&a.job, a.gpu, a.pid) == (&b.job, b.gpu, b.pid)
}

/// The process whose thread a fact is about.
fn process_of(fact: &Fact) -> Option<ProcessKey> {
    let thread: &Thread = match fact {
        Fact::CommCreated(created) => &created.thread,
        Fact::Collective(collective) => &collective.thread,
        Fact::CommDestroyed { thread, .. }
        | Fact::GroupEnd { thread }
        | Fact::StepWaits { thread, .. }
        | Fact::LaunchRun { thread, .. }
        | Fact::Sync { thread, .. }
        | Fact::EventRecord { thread, .. }
        | Fact::StreamWait { thread, .. }
        | Fact::Copy { thread, .. }
        | Fact::OffCpu { thread, .. }
        | Fact::ThreadCpu { thread, .. }
        | Fact::FileIo { thread, .. } => thread,
        Fact::Block { process, .. } | Fact::FileIoFolded { process, .. } | Fact::CpuQuota { process, .. } => {
            return Some(*process);
        }
        Fact::Process(_)
        | Fact::ProcessGone(_)
        | Fact::Gpu(_)
        | Fact::Port(_)
        | Fact::Hardware(_)
        | Fact::Lost { .. }
        | Fact::RealtimeOffset { .. } => return None,
    };
    Some(thread.process)
}
