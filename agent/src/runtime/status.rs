//! What the running agent knows now, shared with the control socket.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use stallscope_attribution::facts::{
    GpuHistory, GpuStep, GpuSubject, HardwareFacts, JobFacts, PortFacts, RecordGap, Span,
};

use crate::observation::GpuReading;

/// Most recent steps kept per GPU.
pub const RECENT_STEPS: usize = 512;
/// Most recent spans kept per GPU.
pub const RECENT_SPANS: usize = 64;
/// Most recent port windows kept for the node.
pub const RECENT_PORTS: usize = 512;
/// Windows and events of devices kept.
pub const RECENT_HARDWARE: usize = 2_048;
/// Most recent jobs kept.
pub const RECENT_JOBS: usize = 32;
/// Most steps and spans kept of all jobs together, about 1.2 KiB each; of the jobs heard of last.
pub const RECENT_ENTRIES: usize = 16_384;
/// Most processes kept per job; those heard of last.
pub const RECENT_GPUS: usize = 64;
/// Most recent gaps kept.
pub const RECENT_GAPS: usize = 128;

/// A handle on the agent's status. Locks are held for copying only.
#[derive(Debug, Clone, Default)]
pub struct SharedStatus(Arc<Mutex<Status>>);

impl SharedStatus {
    /// Access to the status. A writer that panicked leaves the last state readable.
    pub fn lock(&self) -> MutexGuard<'_, Status> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Everything the control socket can tell.
#[derive(Debug, Clone, Default)]
pub struct Status {
    /// Node name.
    pub node: String,
    /// `CLOCK_MONOTONIC` when the agent started, ns.
    pub started_ns: u64,
    /// `CLOCK_MONOTONIC` of the last update, ns.
    pub updated_ns: u64,
    /// `CLOCK_REALTIME` minus `CLOCK_MONOTONIC`, ns.
    pub realtime_offset_ns: i64,
    /// One entry per GPU index.
    pub gpus: BTreeMap<u32, GpuStatus>,
    /// Health of every source and sink, in the order in which they were started.
    pub health: Vec<Health>,
    /// What the agent itself costs.
    pub own: OwnUse,
    /// Recent history per job.
    pub recent: Recent,
}

impl Status {
    /// Records the health of one part; a part has one line.
    pub fn set_health(&mut self, part: &'static str, condition: Condition) {
        match self.health.iter_mut().find(|health| health.part == part) {
            Some(health) => health.condition = condition,
            None => self.health.push(Health { part, condition }),
        }
    }
}

/// The last that is known of one GPU: the inputs of a fitness check.
#[derive(Debug, Clone)]
pub struct GpuStatus {
    /// The last reading.
    pub reading: GpuReading,
    /// `CLOCK_MONOTONIC` at the end of the last reading, ns.
    pub read_ns: u64,
    /// Time held back by heat, over the readings of about the last ten seconds, ns.
    pub recent_thermal_ns: u64,
    /// Time held back by a power limit, over the same readings, ns.
    pub recent_power_limit_ns: u64,
    /// Length of those readings together, ns.
    pub recent_window_ns: u64,
    /// Readings in a row in which no counter could be read.
    pub failures: u32,
    /// Readings so far.
    pub readings: u64,
}

/// How one part of the agent is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Health {
    /// Which: `probes`, `nvml`, `procs`, `net`, `store`, `stream`, ...
    pub part: &'static str,
    /// How it is.
    pub condition: Condition,
}

/// Whether a part works.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Condition {
    /// As it should.
    Works,
    /// It works, but something is lost: what, why and what to do.
    Degraded(String),
    /// It does not work: what is lost, why and what to do.
    Missing(String),
    /// It is not known yet.
    Starting,
    /// Not configured.
    Off,
}

/// What the agent itself costs and handles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct OwnUse {
    /// CPU time since start, ms.
    pub cpu_ms: u64,
    /// CPU time over wall time since the last update, parts per million of one core.
    pub cpu_ppm: u64,
    /// Resident memory, bytes.
    pub resident_bytes: u64,
    /// Observations handled since start.
    pub observations: u64,
    /// Observations per second since the last update.
    pub observations_per_s: u64,
    /// Kernel records lost since start.
    pub lost_records: u64,
    /// Observations dropped between sources and timeline since start.
    pub dropped_observations: u64,
    /// Observations that came later than the reorder window.
    pub late_observations: u64,
    /// Messages dropped from the store before they were acknowledged.
    pub dropped_messages: u64,
}

/// The latest steps and spans of every job on this node, bounded.
#[derive(Debug, Clone, Default)]
pub struct Recent {
    jobs: BTreeMap<String, RecentJob>,
    heard: u64,
    /// Steps and spans of all jobs.
    entries: usize,
    ports: VecDeque<PortFacts>,
    hardware: VecDeque<HardwareFacts>,
    gaps: VecDeque<RecordGap>,
}

#[derive(Debug, Clone, Default)]
struct RecentJob {
    kind: String,
    gpus: BTreeMap<GpuSubject, RecentGpu>,
    /// When it was heard of last, in the count of everything heard.
    heard: u64,
}

#[derive(Debug, Clone, Default)]
struct RecentGpu {
    steps: VecDeque<GpuStep>,
    spans: VecDeque<Span>,
    /// When it was heard of last, in the count of everything heard.
    heard: u64,
}

impl RecentGpu {
    fn entries(&self) -> usize {
        self.steps.len() + self.spans.len()
    }
}

/// By how much the queue grew.
fn push_bounded<T>(queue: &mut VecDeque<T>, item: T, most: usize) -> usize {
    let before = queue.len();
    if before == most {
        queue.pop_front();
    }
    queue.push_back(item);
    queue.len() - before
}

impl Recent {
    /// A job's declared kind.
    pub fn set_kind(&mut self, job: &str, kind: &str) {
        kind.clone_into(&mut self.job(job).kind);
    }

    /// The job's entry; made when there is none, in place of the job heard of longest ago when there are too many.
    fn job(&mut self, name: &str) -> &mut RecentJob {
        self.heard += 1;
        if self.jobs.len() >= RECENT_JOBS && !self.jobs.contains_key(name) {
            self.forget_oldest_job(name);
        }
        let job = self.jobs.entry(name.to_owned()).or_default();
        job.heard = self.heard;
        job
    }

    /// Forgets the job heard of longest ago that is not `but`. Whether there was one.
    fn forget_oldest_job(&mut self, but: &str) -> bool {
        let others = self.jobs.iter().filter(|(name, _)| *name != but);
        let oldest = others.min_by_key(|(_, job)| job.heard);
        let oldest = oldest.map(|(name, _)| name.clone());
        oldest.is_some_and(|name| {
            self.forget(&name);
            true
        })
    }

    fn gpu(&mut self, subject: &GpuSubject) -> &mut RecentGpu {
        if self.entries >= RECENT_ENTRIES && !self.forget_oldest_job(&subject.job) {
            self.forget_oldest_gpu(subject);
        }
        let job = self.job(&subject.job);
        let heard = job.heard;
        if job.gpus.len() >= RECENT_GPUS && !job.gpus.contains_key(subject) {
            self.forget_oldest_gpu(subject);
        }
        let gpu = self.job(&subject.job).gpus.entry(subject.clone()).or_default();
        gpu.heard = heard;
        gpu
    }

    /// Forgets the process of the subject's job that was heard of longest ago and is not the subject.
    fn forget_oldest_gpu(&mut self, but: &GpuSubject) {
        let Some(job) = self.jobs.get_mut(&but.job) else {
            return;
        };
        let others = job.gpus.iter().filter(|(subject, _)| *subject != but);
        let oldest = others.min_by_key(|(_, gpu)| gpu.heard);
        let oldest = oldest.map(|(subject, _)| subject.clone());
        if let Some(gpu) = oldest.and_then(|subject| job.gpus.remove(&subject)) {
            self.entries -= gpu.entries();
        }
    }

    /// Adds a step.
    pub fn push_step(&mut self, subject: &GpuSubject, step: GpuStep) {
        let added = push_bounded(&mut self.gpu(subject).steps, step, RECENT_STEPS);
        self.entries += added;
    }

    /// Adds a span.
    pub fn push_span(&mut self, subject: &GpuSubject, span: Span) {
        let added = push_bounded(&mut self.gpu(subject).spans, span, RECENT_SPANS);
        self.entries += added;
    }

    /// Adds a network window.
    pub fn push_port(&mut self, port: PortFacts) {
        push_bounded(&mut self.ports, port, RECENT_PORTS);
    }

    /// Remembers what a device told.
    pub fn push_hardware(&mut self, facts: HardwareFacts) {
        push_bounded(&mut self.hardware, facts, RECENT_HARDWARE);
    }

    /// Adds a gap.
    pub fn push_gap(&mut self, gap: RecordGap) {
        push_bounded(&mut self.gaps, gap, RECENT_GAPS);
    }

    /// Forgets a job.
    pub fn forget(&mut self, job: &str) {
        if let Some(job) = self.jobs.remove(job) {
            self.entries -= job.gpus.values().map(RecentGpu::entries).sum::<usize>();
        }
    }

    /// Names of the jobs remembered.
    pub fn jobs(&self) -> impl Iterator<Item = &str> {
        self.jobs.keys().map(String::as_str)
    }

    /// Who uses a GPU, and the last step of each.
    pub fn on_gpu(&self, gpu: u32) -> impl Iterator<Item = (&GpuSubject, Option<&GpuStep>)> {
        let gpus = self.jobs.values().flat_map(|job| &job.gpus);
        gpus.filter(move |(subject, _)| subject.gpu == gpu)
            .map(|(subject, recent)| (subject, recent.steps.back()))
    }

    /// The recent history as facts, one entry per job, in the order of names; what devices told without any job is one
    /// without a name.
    #[must_use]
    pub fn job_facts(&self) -> Vec<JobFacts> {
        if self.jobs.is_empty() && !self.hardware.is_empty() {
            return vec![JobFacts {
                ports: self.ports.iter().cloned().collect(),
                hardware: self.hardware.iter().cloned().collect(),
                gaps: self.gaps.iter().cloned().collect(),
                ..JobFacts::default()
            }];
        }
        self.jobs
            .iter()
            .map(|(name, job)| JobFacts {
                job: name.clone(),
                kind: if job.kind.is_empty() {
                    "unknown".to_owned()
                } else {
                    job.kind.clone()
                },
                gpus: job
                    .gpus
                    .iter()
                    .map(|(subject, gpu)| GpuHistory {
                        subject: subject.clone(),
                        steps: gpu.steps.iter().cloned().collect(),
                        spans: gpu.spans.iter().cloned().collect(),
                    })
                    .collect(),
                ports: self.ports.iter().cloned().collect(),
                hardware: self.hardware.iter().cloned().collect(),
                gaps: self.gaps.iter().cloned().collect(),
            })
            .collect()
    }
}
