//! A played job as an agent would have seen it: host states exactly, devices by blurred averages, clocks apart.

mod counters;
mod network;

use stallscope_attribution::budget::{assess, assess_span};
use stallscope_attribution::facts::{
    ClockFacts, CollectiveFact, Copies, DeviceProfile, ForeignLoad, GpuHistory, GpuSubject, HostState,
    JobFacts, LinkFacts, RecordGap, SpanKind, StateInterval, StepEvidence, StepMethod, WorkerLoad,
};
use stallscope_attribution::peaks;
use stallscope_attribution::reading::Reading;
use stallscope_attribution::time::Window;

use crate::job::{Job, Pause, Played};
use crate::random::Random;
use crate::variant::{Fault, GPUS, NODES, RANKS, Variant};
use crate::work::{MS, ideal, node_of, noise_of};
use counters::Counters;

/// Collectives of a step: gradient buckets.
const BUCKETS: u64 = 12;
/// Line rate of a node's port, bytes/s.
const LINE_BYTES_PER_S: u64 = 12_500_000_000;
/// One step in this many of a rank is lost on the way.
const LOST_STEPS: u64 = 400;
/// In one step in this many the ring lost records of the host.
const LOST_RECORDS: u64 = 300;

/// One node's clocks.
#[derive(Debug, Clone, Copy)]
struct NodeClock {
    /// `CLOCK_MONOTONIC` when the job began, ns.
    began_ns: u64,
    /// `CLOCK_REALTIME` minus `CLOCK_MONOTONIC` as the node believes, ns: nodes disagree by up to 0.2 ms.
    offset_ns: i64,
}

impl NodeClock {
    fn of(variant: &Variant, node: usize) -> Self {
        let mut random = Random::new(noise_of(variant, node) ^ 0xc10c);
        let began_ns = 1_000_000_000_000 + random.below(900_000_000_000);
        let error = i64::try_from(random.below(400_000)).unwrap_or(0) - 200_000;
        let epoch = 1_700_000_000_000_000_000 - i64::try_from(began_ns).unwrap_or(0);
        Self {
            began_ns,
            offset_ns: epoch + error,
        }
    }

    /// A stretch of the job on this node's monotonic clock.
    fn window(&self, start: u64, end: u64) -> Window {
        Window::new(self.began_ns + start, self.began_ns + end).unwrap_or_default()
    }
}

/// All that reaches the analysis of a job.
#[must_use]
pub fn facts(variant: &Variant, job: &Job) -> JobFacts {
    let is = |fault: Fault| variant.faults.iter().any(|injected| injected.fault == fault);
    let clocks: Vec<NodeClock> = (0..NODES).map(|node| NodeClock::of(variant, node)).collect();
    let mut gaps = Vec::new();
    let gpus = (0..RANKS)
        .map(|rank| history(variant, job, rank, clocks[node_of(rank)], &mut gaps))
        .collect();
    JobFacts {
        job: "train".into(),
        kind: if is(Fault::Decode) { "decode" } else { "pretrain" }.into(),
        gpus,
        ports: network::ports(variant, job, &clocks),
        hardware: Vec::new(),
        gaps,
    }
}

pub(crate) fn subject(rank: usize) -> GpuSubject {
    let small = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
    GpuSubject {
        job: "train".into(),
        node: node_name(node_of(rank)),
        gpu: small(rank % GPUS),
        pci: format!("0000:{:02x}:00.0", 0x10 + rank % GPUS),
        device: "NVIDIA H100 80GB HBM3".into(),
        rank: small(rank),
        world: small(RANKS),
        pid: 4_000 + small(rank),
    }
}

/// The name of a node in the job's facts.
#[must_use]
pub fn node_name(node: usize) -> String {
    format!("node-{node}")
}

fn profile(variant: &Variant) -> DeviceProfile {
    let ideal_ns = ideal(variant.faults.first().map(|injected| injected.fault));
    DeviceProfile {
        // The device's peak is 989.4 TFLOP/s.
        model_flops_per_step: Some(ideal_ns * 989_400),
        ..peaks::profile(0x2330_10de, "")
    }
}

fn history(
    variant: &Variant,
    job: &Job,
    rank: usize,
    clock: NodeClock,
    gaps: &mut Vec<RecordGap>,
) -> GpuHistory {
    let counters = Counters::of(variant, job, rank);
    let mut random = Random::new(noise_of(variant, rank) ^ 0x105e);
    let mut steps = Vec::with_capacity(job.steps.len());
    let mut lost = 0;
    let profile = profile(variant);
    let mut before: Option<&Played> = None;
    for (index, played) in job.steps.iter().map(|step| &step[rank]).enumerate() {
        let gone = random.below(LOST_STEPS) == 0;
        let blind = random.below(LOST_RECORDS) == 0;
        if gone {
            lost += 1;
        } else {
            let seen = Seen {
                rank,
                index,
                clock,
                counters: &counters,
                played,
                before,
                blind,
            };
            steps.push(assess(&seen.evidence(), &profile));
        }
        before = Some(played);
    }
    if lost > 0 {
        let what = format!("steps of rank {rank} lost on the way");
        gaps.push(RecordGap {
            node: node_name(node_of(rank)),
            window: None,
            what,
            count: lost,
        });
    }
    let spans = job.pauses.iter().map(|pause| {
        let evidence = pause_evidence(rank, clock, &counters, *pause);
        assess_span(&evidence, &profile, SpanKind::Checkpoint)
    });
    GpuHistory {
        subject: subject(rank),
        steps,
        spans: spans.collect(),
    }
}

/// One step of one rank with what its observation depends on.
struct Seen<'a> {
    rank: usize,
    index: usize,
    clock: NodeClock,
    counters: &'a Counters,
    played: &'a Played,
    before: Option<&'a Played>,
    /// Records of the host's states were lost.
    blind: bool,
}

impl Seen<'_> {
    fn evidence(&self) -> StepEvidence {
        let Self { played, .. } = *self;
        let (work, facts) = (&played.work, &played.work.facts);
        let window = self.clock.window(played.start, played.end);
        let first = played.start + work.gap();
        let mut evidence = empty(self.rank, self.clock, window);
        evidence.index = self.index as u64;
        evidence.method = StepMethod::CollectivePeriod;
        evidence.drained = vec![self.clock.window(played.start, first)];
        evidence.host = if self.blind {
            Vec::new()
        } else {
            self.host_states()
        };
        evidence.lost_records = if self.blind { 17 } else { 0 };
        let share = |ppm: u64| window.len_ns() / 1_000_000 * ppm;
        evidence.workers = vec![WorkerLoad {
            window,
            cpu_ns: share(facts.worker_cpu_ppm),
            io_ns: share(facts.worker_io_ppm),
        }];
        evidence.quota_throttled_ns = Reading::Value(facts.throttled);
        evidence.launches = facts.launches;
        evidence.copies = Copies {
            to_device_bytes: work.copy * HOST_LINK_BYTES_PER_MS / MS,
            to_host_bytes: 64,
            count: 9,
            blocked_ns: 0,
        };
        evidence.collectives = self.collectives(first);
        evidence.activity = self.counters.activity(played.start, played.end);
        evidence.clock = Reading::Value(self.clock_facts(window.len_ns()));
        evidence.foreign = Reading::Value(self.foreign());
        evidence.links = Reading::Value(LinkFacts {
            pcie_lanes: facts.lanes,
            pcie_lanes_max: 16,
            pcie_generation: 5,
            pcie_generation_max: 5,
            nvlinks: 18,
            nvlinks_down: facts.nvlinks_down,
            faults: facts.faults,
            fault_code: if facts.faults > 0 { 94 } else { 0 },
            ..LinkFacts::default()
        });
        evidence
    }

    fn host_states(&self) -> Vec<StateInterval> {
        let work = &self.played.work;
        let mut at = self.played.start;
        let mut states = Vec::new();
        let mut push = |state, ns: u64| {
            states.push(StateInterval {
                window: self.clock.window(at, at + ns),
                state,
            });
            at += ns;
            at
        };
        push(HostState::Waiting, work.loader + work.storage + work.unknown);
        push(HostState::Gc, work.gc);
        push(HostState::Alloc, work.alloc);
        push(HostState::Runnable, work.sched);
        push(HostState::OnCpu, work.attach + work.start);
        let issued = push(HostState::OnCpu, work.facts.issue);
        push(HostState::Sync, self.played.end.saturating_sub(issued));
        states.retain(|state| !state.window.is_empty());
        states
    }

    fn collectives(&self, first: u64) -> Vec<CollectiveFact> {
        let issue = self.played.work.facts.issue;
        // 300 ms at the line rate for a ring of all ranks.
        let ring = 2 * (RANKS as u64 - 1);
        let bytes = 300 * MS / 1_000 * (LINE_BYTES_PER_S / 1_000_000) / ring * RANKS as u64 / BUCKETS;
        let call = |bucket: u64| first + issue * (bucket + 1) / (BUCKETS + 1);
        (0..BUCKETS)
            .map(|bucket| CollectiveFact {
                comm: 7,
                sequence: self.index as u64 * BUCKETS + bucket,
                function: "all_reduce",
                bytes,
                ranks: u32::try_from(RANKS).unwrap_or(0),
                call: self.clock.window(call(bucket), call(bucket) + 9_000),
            })
            .collect()
    }

    /// Clocks are read once a second: a change is seen late.
    fn clock_facts(&self, length_ns: u64) -> ClockFacts {
        let facts = &self.played.work.facts;
        let before = self.before.map_or(facts, |before| &before.work.facts);
        let mhz = (before.mhz * 3 + facts.mhz * 7) / 10;
        ClockFacts {
            sm_mhz: u32::try_from(mhz).unwrap_or(0),
            thermal_ns: if facts.thermal { length_ns } else { 0 },
            power_ns: if facts.power { length_ns } else { 0 },
            temperature_c: if facts.thermal { 89 } else { 62 },
            power_mw: if facts.thermal { 430_000 } else { 560_000 },
        }
    }

    /// Processes are listed seldom: the load of the step before.
    fn foreign(&self) -> ForeignLoad {
        let facts = &self.before.unwrap_or(self.played).work.facts;
        if facts.foreign_ppm == 0 {
            return ForeignLoad::default();
        }
        let sm_ppm = u32::try_from(facts.foreign_ppm).unwrap_or(u32::MAX);
        ForeignLoad {
            processes: 1,
            largest_pid: 31_337,
            sm_ppm,
        }
    }
}

/// Bytes that the host's link moves in a millisecond at its best: PCIe generation 5 with 16 lanes.
const HOST_LINK_BYTES_PER_MS: u64 = 63_000_000;

fn empty(rank: usize, clock: NodeClock, window: Window) -> StepEvidence {
    StepEvidence {
        subject: subject(rank),
        index: 0,
        window,
        realtime_offset_ns: clock.offset_ns,
        method: StepMethod::FixedWindow,
        drained: Vec::new(),
        host: Vec::new(),
        workers: Vec::new(),
        quota_throttled_ns: Reading::Value(0),
        launches: 0,
        copies: Copies::default(),
        collectives: Vec::new(),
        activity: Reading::NotMeasured,
        clock: Reading::NotMeasured,
        foreign: Reading::Value(ForeignLoad::default()),
        links: Reading::NotMeasured,
        lost_records: 0,
    }
}

fn pause_evidence(rank: usize, clock: NodeClock, counters: &Counters, pause: Pause) -> StepEvidence {
    let window = clock.window(pause.start, pause.end);
    let mut evidence = empty(rank, clock, window);
    evidence.index = pause.before as u64;
    evidence.drained = vec![window];
    evidence.host = vec![StateInterval {
        window,
        state: HostState::Checkpoint,
    }];
    evidence.activity = counters.activity(pause.start, pause.end);
    evidence
}
