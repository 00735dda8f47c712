//! The same jobs as a profiler on every rank would have recorded them: kernels, copies, calls and what the host did.
//!
//! A trace tells when everything ran, to the nanosecond, on a clock of its node. It tells nothing of clocks, heat,
//! other processes, run queues or storage: what is expected of it is less than what an agent sees, and said so.

use stallscope_attribution::activity::{
    Collective, Declared, Device, Doing, HostRange, KernelClass, Launch, RankTrace, Record, TraceJob,
    Work as Ran,
};
use stallscope_attribution::cause::Cause;
use stallscope_attribution::time::Window;

use crate::job::{Job, Played};
use crate::observe::subject;
use crate::random::Random;
use crate::truth::{Answer, Truth, Where};
use crate::variant::{Dose, Fault, Injected, RANKS, Variant, drawn};
use crate::work::{node_of, noise_of};

/// Steps of a trace: what a profiler's schedule usually keeps, and more.
const STEPS: usize = 20;
/// Matrix kernels of a step.
const MATMULS: u64 = 16;
/// Other kernels of a step: fewer, so that nearly all kernels follow the clock.
const OTHERS: u64 = 4;
/// Rate of a healthy host link, bytes/ns.
const LINK: u64 = 25;
/// Bus bandwidth at which a healthy collective runs, bytes/ns.
const BUS: u64 = 100;
const THREAD: u32 = 1;
/// From a call to the start of what it launched on an idle GPU, ns.
const LATENCY_NS: u64 = 5_000;
/// Ends of a collective lie within this, ns.
const ENDS_NS: u64 = 3_000;

/// The variants that are traced: faults of which a trace tells something, and controls.
#[must_use]
pub fn variants(seeds: core::ops::Range<u64>) -> Vec<Variant> {
    let mut variants = Vec::new();
    for seed in seeds {
        let (rank, node) = (drawn(seed, 13, RANKS), node_of(drawn(seed, 13, RANKS)));
        let faults = [
            ("A1 slow clock", Fault::Thermal { rank }),
            ("A2 co-tenant", Fault::CoTenant { rank }),
            ("A3 half PCIe", Fault::HalfPcie { rank }),
            ("A4 loader", Fault::Loader),
            ("A5 cold storage", Fault::ColdStorage),
            ("A6 launch bound", Fault::LaunchBound),
            ("A7 checkpoint", Fault::Checkpoint),
            ("A8 GC pause", Fault::GcPause),
            ("A9 CPU quota", Fault::CpuQuota { node }),
            (
                "A10 stage imbalance",
                Fault::Stage {
                    interleaved: seed % 2 == 1,
                },
            ),
            ("A11 exposed copies", Fault::Copies),
            ("AC1 wrong algorithm", Fault::WrongAlgorithm),
            ("AC2 uneven sequences", Fault::UnevenSequences),
            ("AC3 hidden slow communication", Fault::HiddenSlowComm),
            ("AC4 power cap on all", Fault::PowerCapAll),
            ("AC5 profiler attach", Fault::ProfilerAttach),
        ];
        for dose in Dose::ALL {
            for (scenario, fault) in faults {
                variants.push(single(scenario, fault, dose, seed));
            }
        }
    }
    variants
}

fn single(scenario: &'static str, fault: Fault, dose: Dose, seed: u64) -> Variant {
    let steps = if fault == Fault::Checkpoint { 60 } else { STEPS };
    let until = if fault == Fault::ProfilerAttach { 1 } else { steps };
    Variant {
        scenario,
        faults: vec![Injected {
            fault,
            from: 0,
            until,
        }],
        dose,
        steps,
        seed,
    }
}

/// The traces of a job's ranks.
#[must_use]
pub fn traces(variant: &Variant, job: &Job) -> TraceJob {
    TraceJob {
        job: "train".into(),
        kind: "pretrain".into(),
        declared: Declared {
            bus_bytes_per_s: Some(BUS * 1_000_000_000),
            ..Declared::default()
        },
        ranks: (0..RANKS).map(|rank| Tracing::of(variant, job, rank)).collect(),
    }
}

/// A node's clock: nodes are minutes apart and drift.
fn clock(rank: usize, at_ns: u64) -> u64 {
    let node = node_of(rank) as u64;
    let drift = at_ns / 1_000_000 * (node * 17 % 50);
    60_000_000_000 * (1 + node * 3) + at_ns + drift
}

/// One rank's trace as it grows.
struct Tracing {
    rank: usize,
    random: Random,
    records: Vec<Record>,
    host: Vec<HostRange>,
    marks: Vec<Window>,
    /// What has been told up to here, ns of the job.
    now: u64,
}

impl Tracing {
    fn of(variant: &Variant, job: &Job, rank: usize) -> RankTrace {
        let mut tracing = Self {
            rank,
            random: Random::new(noise_of(variant, rank) ^ 0x7ace),
            records: Vec::new(),
            host: Vec::new(),
            marks: Vec::new(),
            now: 0,
        };
        for (index, step) in job.steps.iter().enumerate() {
            for pause in job.pauses.iter().filter(|pause| pause.before == index) {
                tracing.does(Doing::Checkpoint, pause.end - pause.start);
            }
            tracing.step(&step[rank]);
        }
        RankTrace {
            devices: vec![Device {
                subject: subject(rank),
                records: tracing.records,
            }],
            host: tracing.host,
            repeated: Vec::new(),
            math: Vec::new(),
            marks: tracing.marks,
            main_thread: Some(THREAD),
            realtime_offset_ns: None,
            gaps: Vec::new(),
        }
    }

    fn window(&self, from: u64, to: u64) -> Window {
        Window::new(clock(self.rank, from), clock(self.rank, to)).unwrap_or_default()
    }

    /// The host does something for a while, the GPU has nothing.
    fn does(&mut self, doing: Doing, ns: u64) {
        let window = self.window(self.now, self.now + ns);
        self.host.push(HostRange {
            window,
            thread: THREAD,
            doing,
        });
        self.now += ns;
    }

    /// The GPU runs something from now on.
    fn runs(&mut self, work: Ran, token: u64, launched: u64, ns: u64, bytes: Option<u64>) {
        let launch = Launch {
            at_ns: clock(self.rank, launched),
            thread: THREAD,
        };
        self.records.push(Record {
            window: self.window(self.now, self.now + ns),
            work,
            stream: 7,
            launch: Some(launch),
            bytes,
            token,
            shaped: true,
            pipe: None,
            pageable: false,
            collective: None,
        });
        self.now += ns;
    }

    fn step(&mut self, played: &Played) {
        let work = &played.work;
        // The last step's collective may end a little later here.
        self.now = self.now.max(played.start);
        let begin = self.now;
        self.does(Doing::Data, work.loader + work.storage);
        self.now += work.unknown;
        self.does(Doing::Gc, work.gc);
        self.does(Doing::Alloc, work.alloc);
        self.does(Doing::Issue, (played.start + work.gap()).saturating_sub(self.now));
        let issued = self.now.saturating_sub(LATENCY_NS).max(begin + 1);
        let copied = work.copy * LINK;
        self.runs(Ran::ToDevice, 1, issued, work.copy + work.pcie, Some(copied));
        self.kernels(played, issued);
        self.collective(played, issued);
        let end = played.end;
        self.marks.push(self.window(begin, end));
    }

    /// Compute with its pauses: three for want of a launch, one behind another stream.
    fn kernels(&mut self, played: &Played, issued: u64) {
        let work = &played.work;
        let matmul = Ran::Kernel(KernelClass::Gemm);
        let (of_matmuls, of_others) = (work.compute() - work.nonmatmul, work.nonmatmul);
        for at in 0..MATMULS {
            let mut launched = issued;
            if matches!(at, 4 | 8 | 12) {
                self.does(Doing::Issue, part(work.launch, 3, at / 4 - 1));
                launched = self.now.saturating_sub(LATENCY_NS);
            }
            if at == 10 {
                self.now += work.dep;
            }
            self.runs(matmul, 10 + at, launched, part(of_matmuls, MATMULS, at), None);
            if at % 4 == 3 {
                let (other, ns) = (at / 4, part(of_others, OTHERS, at / 4));
                self.runs(
                    Ran::Kernel(KernelClass::Elementwise),
                    40 + other,
                    launched,
                    ns,
                    None,
                );
            }
        }
    }

    fn collective(&mut self, played: &Played, issued: u64) {
        let late = self.random.below(ENDS_NS);
        let end = (played.end + late).max(self.now);
        self.runs(
            Ran::Kernel(KernelClass::Communication),
            2,
            issued,
            end - self.now,
            None,
        );
        if let Some(record) = self.records.last_mut() {
            record.collective = Some(Collective {
                group: 1,
                ranks: u32::try_from(RANKS).unwrap_or(0),
                message: 1,
                peer: None,
                bus_bytes: Some(played.work.transfer * BUS),
            });
        }
    }
}

/// The part of a whole at a place; all parts sum to it.
const fn part(whole: u64, parts: u64, at: u64) -> u64 {
    whole * (at + 1) / parts - whole * at / parts
}

/// What a perfect reading of the traces says.
#[must_use]
pub fn truth(variant: &Variant, job: &Job, mut truth: Truth) -> Truth {
    truth.leaves.clear();
    truth.total_ns = 0;
    for (index, step) in job.steps.iter().enumerate() {
        for played in step {
            for (leaf, ns) in parts(played, index == 0) {
                truth.total_ns += ns;
                *truth.leaves.entry(leaf).or_default() += i64::try_from(ns).unwrap_or(i64::MAX);
            }
        }
    }
    for pause in job.pauses.iter().filter(|pause| pause.before > 0) {
        let ns = (pause.end - pause.start) * RANKS as u64;
        truth.total_ns += ns;
        *truth.leaves.entry("idle.ckpt").or_default() += i64::try_from(ns).unwrap_or(i64::MAX);
    }
    let answers = variant
        .faults
        .iter()
        .filter_map(|injected| answer(injected.fault));
    truth.expected = answers.collect();
    truth.allowed = vec![Answer {
        // Ranks whose compute varies wait for each other: so said of the job, it accuses nobody.
        cause: Cause::JobImbalance,
        place: Where::Job,
    }];
    truth
}

/// One rank's step by leaf, ns. A trace begins with the first record: what was before it is in no budget.
fn parts(played: &Played, first: bool) -> Vec<(&'static str, u64)> {
    let work = &played.work;
    let joint = played.end - played.start - work.arrival() - played.skew;
    let mut parts = vec![
        ("compute.kernel", work.compute() - work.nonmatmul),
        ("compute.nonmatmul", work.nonmatmul),
        ("comm.transfer", work.transfer),
        ("comm.net", joint - work.transfer),
        ("comm.skew", played.skew),
        ("memory.copy", work.copy),
        ("memory.pcie", work.pcie),
        ("idle.launch", work.launch),
        ("idle.dep", work.dep),
    ];
    if !first {
        parts.extend([
            ("idle.data.cpu", work.loader + work.storage),
            ("idle.unknown", work.unknown),
            ("idle.gc", work.gc),
            ("idle.alloc", work.alloc),
            ("idle.launch", work.sched + work.start + work.attach),
        ]);
    }
    parts
}

/// What a trace can tell of a fault. Heat, power and another process all look like a slow device in it, reading like
/// computing in a loader, a run queue like a slow launch.
fn answer(fault: Fault) -> Option<Answer> {
    let (cause, place) = match fault {
        Fault::Thermal { rank } | Fault::CoTenant { rank } => (Cause::KernelClock, Where::Rank(rank)),
        Fault::HalfPcie { rank } => (Cause::DevicePcie, Where::Rank(rank)),
        Fault::Loader | Fault::ColdStorage => (Cause::DataLoader, Where::Job),
        Fault::LaunchBound => (Cause::HostLaunch, Where::Job),
        Fault::Checkpoint => (Cause::JobCheckpoint, Where::Job),
        Fault::GcPause => (Cause::HostGc, Where::Job),
        Fault::CpuQuota { node } => (Cause::HostLaunch, Where::Node(node)),
        Fault::Stage { interleaved } => {
            let node = (!interleaved).then(|| node_of(RANKS - 1));
            (Cause::JobImbalance, Where::Stage { node })
        }
        Fault::Copies => (Cause::DataCopy, Where::Job),
        _ => return None,
    };
    Some(Answer { cause, place })
}
